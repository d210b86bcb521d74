"""What the tests of commands share: an empty folder to work in, and tiny backbones."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.conftest import FAMILIES

if TYPE_CHECKING:
    from ptuning.backbone.backbone import Backbone


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Work in an empty folder, and leave the logger's level as it was."""
    monkeypatch.chdir(tmp_path)
    level = logging.getLogger("ptuning").level
    yield
    logging.getLogger("ptuning").setLevel(level)


@pytest.fixture(scope="session")
def _load(model_folder: Callable[[str], Path]) -> Callable[..., Backbone]:
    """Load each tiny model once with the same options; a command gets a copy, which takes a tenth of the time."""
    from ptuning.backbone import loading

    real, tiny = loading.load_backbone, {str(model_folder(family)) for family in FAMILIES}
    kept: dict[str, Backbone] = {}

    def load(*name: str | Path, **options: Any) -> Backbone:
        if not tiny & {*map(str, name)}:
            return real(*name, **options)
        asked = repr((name, sorted(options.items())))
        if asked not in kept:
            kept[asked] = real(*name, **options)
        return copy.deepcopy(kept[asked])

    return load


@pytest.fixture(autouse=True)
def _loaded_once(_load: Callable[..., Backbone], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ptuning.backbone.loading.load_backbone", _load)


@pytest.fixture(scope="module")
def llama(model_folder: Callable[[str], Path]) -> str:
    return str(model_folder("llama"))


@pytest.fixture(scope="module")
def bert(model_folder: Callable[[str], Path]) -> str:
    return str(model_folder("bert"))
