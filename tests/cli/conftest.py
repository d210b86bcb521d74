"""What the tests of commands share: an empty folder to work in, and tiny backbones."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Work in an empty folder, and leave the logger's level as it was."""
    monkeypatch.chdir(tmp_path)
    level = logging.getLogger("ptuning").level
    yield
    logging.getLogger("ptuning").setLevel(level)


@pytest.fixture(scope="module")
def llama(model_folder: Callable[[str], Path]) -> str:
    return str(model_folder("llama"))


@pytest.fixture(scope="module")
def bert(model_folder: Callable[[str], Path]) -> str:
    return str(model_folder("bert"))
