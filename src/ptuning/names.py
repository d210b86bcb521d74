"""Names that stand in files, for what writes them and what reads them: of files, methods and scores. Imports nothing of
its own package.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

RUN_FILE = "run.json"
PREDICTIONS_FILE = "predictions.jsonl"
RESULTS_FILE = "results.json"
PROMPT_FOLDER = "prompt"
CHECKPOINT_FOLDER = "checkpoint"

# What stands for every method where a list is asked for.
ALL_METHODS = "all"
MANUAL, LEARNED = "manual", "p-tuning"
# Suffix of a method's name: what of the backbone is trained together with the prompt (the setting "tune").
ALONG: Mapping[str, str] = {"frozen": "", "tuned": "+fine-tuning", "lora": "+lora"}
# The label whose F1 over all answers is MultiRC's F1a.
POSITIVE = "true"
# Behind the name of a method that ran on a backbone with random weights.
RANDOM_WEIGHTS = "@random-weights"

# What a task with metrics of its own counts in a mean over tasks: the mean of its metrics.
TASK_SCORE = "score"
# Score -> what people call it, in the order of tables.
SCORES: Mapping[str, str] = {
    TASK_SCORE: "score",
    "p_at_1": "P@1",
    "p_at_10": "P@10",
    "mrr": "MRR",
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "f1a": "F1a",
    "f1": "F1",
    "exact_match": "exact match",
}


def is_folder_name(name: str, *, spaces: bool = False) -> bool:
    """Whether a name can be that of a folder, on any system and within the folder that it is meant to lie in."""
    plain = name.replace(" ", "") if spaces and name == name.strip() else name
    return len(name) <= 100 and re.fullmatch(r"\w[\w.+=-]*", plain) is not None


def called(score: str) -> str:
    """Return what people call a score."""
    return SCORES.get(score, score.replace("_", " "))


def in_order(scores: Iterable[str]) -> list[str]:
    """Return names of scores, each once: the usual ones first, others in alphabetical order."""
    present = set(scores)
    return [name for name in SCORES if name in present] + sorted(present - SCORES.keys())
