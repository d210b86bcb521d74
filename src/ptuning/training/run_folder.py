"""Folder of a training run: its files, the check before a run writes into it, and clearing it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ptuning.files import Json, Unchecked, read_json
from ptuning.names import (
    ALONG,
    CHECKPOINT,
    CHECKPOINT_FOLDER,
    RUN,
    RUN_FILE,
    check_writable,
    clear,
    remove,
    remove_stale,
)
from ptuning.training.identity import check_identity, identity_of_run


def checkpoint_folder(folder: Path, number: int) -> Path:
    """Return the checkpoint folder of one of several starts, from 0."""
    return folder / CHECKPOINT_FOLDER / (f"start-{number}" if number else "")


def check_folder(folder: Path, wanted: Mapping[str, Json], *, resume: bool, overwrite: bool) -> dict[str, Json] | None:
    """Check that a run may be written; return the record of a finished one that is to be resumed.

    Raises:
        FileError: If the folder holds other files, or a run that is neither to be resumed nor replaced, or the record
            cannot be read.
        TrainingError: If the finished run does not have the ``wanted`` identity.
    """
    if resume and (folder / RUN_FILE).is_file():
        record = read_json(folder / RUN_FILE)
        check_identity(wanted, identity_of_run(record), where=str(folder))
        _check_finished(Unchecked(record, f"{folder / RUN_FILE} is damaged", advice="start anew with --overwrite"))
        return record
    check_writable(folder, RUN, overwrite=overwrite, resume=resume)
    return None


def _check_finished(run: Unchecked) -> None:
    """Raise a FileError if a record lacks what that of a finished run has, or has something else in its place."""
    for row in (run.at("start"), *run.at("history").items()):
        for name in ("dev_loss", "dev_score"):
            row.at(name).number(finite=False)
    for row in run.at("history").items():
        row.at("epoch").whole()
        row.at("train_loss").number(finite=False)
    for name in ("chosen_epoch", "trainable_parameters", "frozen_parameters"):
        run.at(name).whole(least=0)
    for name in ("seconds", "train_seconds"):
        run.at(name).number()
    for name in ("tokens_per_second", "ceiling_tokens_per_second"):
        run.optional(name, Unchecked.number)
    run.at("train_backbone").one_of(tuple(ALONG))
    run.at("choice_rule").text()
    dev = run.at("data").at("dev")
    dev.at("rows").whole()
    dev.at("name").text()


def clear_folder(folder: Path, *, replaces: bool, finished: bool) -> None:
    """Remove what killed processes left: half-written files, and the checkpoint of a run that is finished; and the
    earlier run, its record first, if it is to be replaced.
    """
    remove_stale(folder, RUN)
    if replaces:
        clear(folder, RUN)
    elif finished:
        remove(folder / CHECKPOINT_FOLDER, CHECKPOINT)
