"""P-tuning for Hugging Face language models: learn a prompt's vectors, compare it honestly, use many at once."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from ptuning.provenance import VERSION

__version__ = VERSION

if TYPE_CHECKING:
    from ptuning.backbone.backbone import Backbone as Backbone
    from ptuning.backbone.loading import load_backbone as load_backbone
    from ptuning.config import GenerationSettings as GenerationSettings
    from ptuning.config import TrainConfig as TrainConfig
    from ptuning.data.conversations import load_conversations as load_conversations
    from ptuning.data.reading import load_records as load_records
    from ptuning.data.task_files import load_task as load_task
    from ptuning.errors import PTuningError as PTuningError
    from ptuning.experiment.compare import compare as compare
    from ptuning.experiment.suites import lama as lama
    from ptuning.experiment.suites import superglue as superglue
    from ptuning.method.base import Solution as Solution
    from ptuning.method.registry import methods as methods
    from ptuning.prompt.predict import PromptModel as PromptModel
    from ptuning.prompt.prompt import Prompt as Prompt
    from ptuning.template.chat import chat_template as chat_template
    from ptuning.template.labels import LabelWords as LabelWords
    from ptuning.template.language import Template as Template
    from ptuning.training.estimate import estimate as estimate
    from ptuning.training.fleet import train_fleet as train_fleet
    from ptuning.training.run import train as train
    from ptuning.training.spec import FleetPrompt as FleetPrompt
    from ptuning.training.tracking import TrainingLog as TrainingLog

# Public name -> its module, which is imported on first use: torch and transformers take seconds.
_HOMES = {
    "Backbone": "backbone.backbone",
    "FleetPrompt": "training.spec",
    "GenerationSettings": "config",
    "LabelWords": "template.labels",
    "Prompt": "prompt.prompt",
    "PromptModel": "prompt.predict",
    "PTuningError": "errors",
    "Solution": "method.base",
    "Template": "template.language",
    "TrainConfig": "config",
    "TrainingLog": "training.tracking",
    "chat_template": "template.chat",
    "compare": "experiment.compare",
    "estimate": "training.estimate",
    "lama": "experiment.suites",
    "load_backbone": "backbone.loading",
    "load_conversations": "data.conversations",
    "load_records": "data.reading",
    "load_task": "data.task_files",
    "methods": "method.registry",
    "superglue": "experiment.suites",
    "train": "training.run",
    "train_fleet": "training.fleet",
}

__all__ = sorted(_HOMES)


def __dir__() -> list[str]:
    return sorted({*__all__, "__version__"})


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'ptuning' has no attribute '{name}'")
    return getattr(import_module(f"ptuning.{_HOMES[name]}"), name)
