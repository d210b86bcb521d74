"""What every kind of inputs uses: the rule that is tried, folders, tiny backbones."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import strategies as st

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.loading import load_backbone
from ptuning.errors import PTuningError
from ptuning.prompt.predict import PromptModel
from tests.conftest import make_model

T = TypeVar("T")
Draw = Callable[[st.SearchStrategy[Any]], Any]
FAMILIES = ("llama", "bert", "gpt2")


def tried(read: Callable[..., T], *inputs: Any, **options: Any) -> T | None:
    """Read an input; None if that ends in an error of the package, which must say something."""
    try:
        return read(*inputs, **options)
    except PTuningError as error:
        if not str(error).strip():
            raise AssertionError(f"{type(error).__name__} without a message") from error
        return None


@contextmanager
def folder() -> Iterator[Path]:
    """Yield an empty folder that is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        yield Path(name)


@functools.cache
def tiny(family: str) -> Backbone:
    """A tiny random model of a family."""
    with folder() as path:
        make_model(family, path)
        return load_backbone(str(path), dtype="float32", device="cpu")


@functools.cache
def model(family: str) -> PromptModel:
    """A tiny backbone in use."""
    return PromptModel(tiny(family))
