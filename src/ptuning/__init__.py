"""P-tuning for Hugging Face language models: learn a prompt's vectors, compare it honestly, use many at once."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ptuning.backbone import load_backbone as load_backbone
    from ptuning.comparison import compare as compare
    from ptuning.comparison import lama as lama
    from ptuning.config import TrainConfig as TrainConfig
    from ptuning.errors import PTuningError as PTuningError
    from ptuning.experiment import methods as methods
    from ptuning.fleets import FleetPrompt as FleetPrompt
    from ptuning.fleets import train_fleet as train_fleet
    from ptuning.forecast import estimate as estimate
    from ptuning.labels import LabelWords as LabelWords
    from ptuning.predict import PromptModel as PromptModel
    from ptuning.prompt import Prompt as Prompt
    from ptuning.records import load_records as load_records
    from ptuning.runs import train as train
    from ptuning.template import Template as Template

# Where each public name lives. They are loaded on first use: torch and transformers take seconds to import.
_HOMES = {
    "FleetPrompt": "fleets",
    "LabelWords": "labels",
    "Prompt": "prompt",
    "PromptModel": "predict",
    "PTuningError": "errors",
    "Template": "template",
    "TrainConfig": "config",
    "compare": "comparison",
    "estimate": "forecast",
    "lama": "comparison",
    "load_backbone": "backbone",
    "load_records": "records",
    "methods": "experiment",
    "train": "runs",
    "train_fleet": "fleets",
}

__all__ = [
    "FleetPrompt",
    "LabelWords",
    "PTuningError",
    "Prompt",
    "PromptModel",
    "Template",
    "TrainConfig",
    "compare",
    "estimate",
    "lama",
    "load_backbone",
    "load_records",
    "methods",
    "train",
    "train_fleet",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'ptuning' has no attribute '{name}'")
    return getattr(import_module(f"ptuning.{_HOMES[name]}"), name)
