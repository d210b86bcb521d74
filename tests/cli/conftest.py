"""Fixtures of the tests of commands: an empty folder to work in, tiny backbones, and prompts that are trained once."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.cli.calls import FACTS, QUICK, WARM, works, write_lines
from tests.conftest import FAMILIES, make_model

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
        key = repr((name, sorted(options.items())))
        if key not in kept:
            kept[key] = real(*name, **options)
        return copy.deepcopy(kept[key])

    return load


@pytest.fixture(autouse=True)
def _loaded_once(_load: Callable[..., Backbone], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ptuning.backbone.loading.load_backbone", _load)


@pytest.fixture(scope="session")
def llama(model_folder: Callable[[str], Path]) -> str:
    return str(model_folder("llama"))


@pytest.fixture(scope="session")
def bert(model_folder: Callable[[str], Path]) -> str:
    return str(model_folder("bert"))


@pytest.fixture(scope="session")
def other_llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A backbone of the same width with other weights."""
    folder = tmp_path_factory.mktemp("other") / "llama"
    make_model("llama", folder, seed=7)
    return str(folder)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with facts."""
    folder = tmp_path_factory.mktemp("data")
    write_lines(folder / "train.jsonl", [{"x": x, "y": y} for x, y in FACTS])
    write_lines(folder / "dev.jsonl", [{"x": x, "y": y} for x, y in FACTS[:4]])
    return folder


@pytest.fixture(scope="session")
def run_folder(llama: str, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that no test changes."""
    out = tmp_path_factory.mktemp("runs") / "facts"
    works("train", "--data", data / "train.jsonl", "--template", WARM, "--backbone", llama, "--out", out, *QUICK)
    return out


@pytest.fixture
def training(llama: str, data: Path) -> tuple[object, ...]:
    """The command line of that run, without its folder."""
    return ("train", "--data", data / "train.jsonl", "--template", WARM, "--backbone", llama, *QUICK)
