"""Names of files and methods that several rooms write or read."""

from __future__ import annotations

import re
from collections.abc import Mapping

RUN_FILE = "run.json"
PREDICTIONS_FILE = "predictions.jsonl"
RESULTS_FILE = "results.json"
PROMPT_FOLDER = "prompt"
CHECKPOINT_FOLDER = "checkpoint"
LOG_FOLDER = "log"

# Means every method where a list of methods is asked for.
ALL_METHODS = "all"
MANUAL, LEARNED = "manual", "p-tuning"
# Setting "tune" -> what is added to the name of a method that trains the backbone as well.
ALONG: Mapping[str, str] = {"frozen": "", "tuned": "+fine-tuning", "lora": "+lora"}
# Added to the name of a method that ran on a backbone with random weights.
RANDOM_WEIGHTS = "@random-weights"


def is_folder_name(name: str, *, spaces: bool = False) -> bool:
    """Whether a name can be a folder's on any system, without leaving its parent folder."""
    plain = name.replace(" ", "") if spaces and name == name.strip() else name
    return len(name) <= 100 and re.fullmatch(r"\w[\w.+=-]*", plain) is not None
