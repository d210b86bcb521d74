"""All checks in their order, with the backbone loaded once; whatever is wrong, the rest is looked at."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.loading import load_backbone
from ptuning.backbone.sources import LoadOptions
from ptuning.doctor import machine, model
from ptuning.doctor.examine import Examination, examine
from ptuning.doctor.remote import Remote
from tests.doctor.conftest import FAULTS, StandIn, prompts_of, serves

PLAIN = LoadOptions(dtype="float32", device="cpu")


@pytest.fixture(autouse=True)
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of backbones that are loaded. Nothing is measured."""
    found: list[str] = []
    real = load_backbone

    def load(name: str, **options: object) -> Backbone:
        found.append(name)
        return real(name, **options)  # type: ignore[arg-type]  # the options of a test

    monkeypatch.setattr(model, "load_backbone", load)
    monkeypatch.setattr(machine, "product_ms", lambda *_: 1.0)
    return found


def test_everything_in_its_order(
    causal: Backbone, model_folder: Callable[[str], Path], tmp_path: Path, stand_in: StandIn, loads: list[str]
) -> None:
    prompts = prompts_of(causal)
    for name, prompt in prompts.items():
        prompt.save(tmp_path / "prompts" / name)
    FAULTS["cut off"][0](tmp_path / "prompts" / "facts", causal)
    serves(stand_in, causal, prompts)
    shown: list[str] = []

    @contextlib.contextmanager
    def working(text: str) -> Iterator[None]:
        shown.append(text)
        yield

    asked = Examination([str(tmp_path / "prompts")], options=PLAIN, server=Remote.of(stand_in.url))
    checks = list(examine(asked, working))
    groups = [group for group, _ in itertools.groupby(checks, lambda one: one.group)]
    assert groups == [
        "versions", "machine", "extras", "backbone", "prompt facts", "prompt moods", "port", "server"
    ]  # fmt: skip
    # The backbone is that of the first prompt that can be read, and is loaded once.
    assert loads == [str(model_folder("llama"))]
    assert [(one.group, one.name) for one in checks if one.status == "failed"] == [("prompt facts", "files")]
    assert f"loading {loads[0]}" in shown
    assert "asking the server" in shown


def test_a_backbone_that_is_named_comes_before_the_prompts_own(
    causal: Backbone, model_folder: Callable[[str], Path], tmp_path: Path, loads: list[str]
) -> None:
    prompts_of(causal)["facts"].save(tmp_path / "facts")
    name = str(model_folder("bert"))
    checks = list(examine(Examination([str(tmp_path / "facts")], name, PLAIN)))
    assert loads == [name]
    assert [(one.group, one.name) for one in checks if one.status == "failed"] == [("prompt facts", "backbone")]


def test_without_a_backbone_the_prompts_files_are_looked_at(causal: Backbone, tmp_path: Path, loads: list[str]) -> None:
    prompts_of(causal)["facts"].save(tmp_path / "facts")
    checks = list(examine(Examination([str(tmp_path / "facts")], str(tmp_path / "none"), PLAIN)))
    assert loads == []
    assert [(one.group, one.name) for one in checks if one.status == "failed"] == [("backbone", "found")]
    looked_at = [one.name for one in checks if one.group == "prompt facts"]
    assert looked_at == ["files", "vectors", "prompt.json", "exports", "not as peft"]
