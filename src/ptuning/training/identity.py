"""Identity of a result: what must be equal for a training to be resumed, or for a finished result to be reused."""

from __future__ import annotations

from collections.abc import Mapping

from ptuning.config import (
    RECIPE,
    STEPS_RECIPE,
    EncoderKind,
)
from ptuning.errors import FileError, TrainingError
from ptuning.files import Json, sha256
from ptuning.names import RUN_FILE
from ptuning.template.language import Template

# What the version of the training code is called in an identity.
RECIPE_NAME = "recipe of training"
# Settings that do not change the result, so that a training may be resumed with other values.
IRRELEVANT_SETTINGS = ("checkpoint_seconds", "cache_memory", "cache_disk", "checkpointing", "device")


def recipe_of(template: Template, encoder: EncoderKind) -> int:
    """Return the version of the code that trains a template."""
    free = encoder == "none" and template.has_input_slots
    return RECIPE + STEPS_RECIPE * (free or template.has_deep)


def identity(
    settings: Mapping[str, Json],
    data: Mapping[str, Json],
    *,
    fingerprint: Json,
    recipe: Json,
    task_file: str | None = None,
) -> dict[str, Json]:
    """Return the identity of a result: settings but :data:`IRRELEVANT_SETTINGS`, and SHA-256 of each part of the data.

    ``fingerprint`` is the backbone's, ``recipe`` the version of the code that trained
    (:func:`recipe_of`; None where nothing is trained), and ``task_file`` the text of the task file, if there is one.
    """
    names = {name: value for name, value in settings.items() if name not in IRRELEVANT_SETTINGS}
    found: dict[str, Json] = dict(names)
    found |= {f"{part} data (sha256)": digest for part, digest in data.items()}
    if task_file is not None:
        found["task file (sha256)"] = sha256(task_file.encode("utf-8"))
    found["backbone fingerprint"] = fingerprint
    if recipe is not None:
        found[RECIPE_NAME] = recipe
    return found


def identity_of_run(record: Mapping[str, Json]) -> dict[str, Json]:
    """Return the identity of a training run from its ``run.json``.

    Raises:
        FileError: If the record is not one of a training run.
    """
    settings, data, backbone = record.get("settings"), record.get("data"), record.get("backbone")
    if not (isinstance(settings, Mapping) and isinstance(data, Mapping) and isinstance(backbone, Mapping)):
        raise FileError(f"{RUN_FILE} is damaged: its settings, data and backbone must be objects; use --overwrite")
    parts = {name: data.get(name) for name in ("train", "dev")}
    task = record.get("task")
    return identity(
        settings,
        {name: part.get("sha256") if isinstance(part, Mapping) else None for name, part in parts.items()},
        fingerprint=backbone.get("fingerprint"),
        recipe=record.get("recipe"),
        task_file=str(task.get("file")) if isinstance(task, Mapping) else None,
    )


def check_identity(now: Mapping[str, Json], saved: Mapping[str, Json], *, where: str) -> None:
    """Check that what was saved may be resumed or reused now.

    Raises:
        TrainingError: If anything differs; shows what was saved and what is asked for now.
    """
    names = [name for name in {**saved, **now} if saved.get(name) != now.get(name)]
    if names:
        shown = "; ".join(f"{name} was {saved.get(name)} and is {now.get(name)}" for name in names)
        older = names == [RECIPE_NAME]
        advice = "A ptuning that trains otherwise made it: start" if older else "Repeat the command as it was, or start"
        raise TrainingError(f"cannot resume from {where}: {shown}. {advice} anew with --overwrite or in another folder")
