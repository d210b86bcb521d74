"""The two files of an adapter of PEFT: written without PEFT, and read back by it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ptuning.backbone.lora import CONFIG_FILE, WEIGHTS_FILE
from ptuning.errors import ConfigError
from ptuning.exchange.rows import Source
from ptuning.files import Json, write_bytes, write_json


def check_peft() -> None:
    """Raise a ConfigError if peft is not installed: what is written is read back by it."""
    if find_spec("peft") is None:
        raise ConfigError(
            "this export is read back by the package peft before it is written; install it with: pip install "
            "'ptuning[lora]' (or pip install peft)"
        )


def write_adapter(source: Source, folder: Path, config: Mapping[str, Json], tensors: Mapping[str, Tensor]) -> None:
    """Write an adapter's config, with what all kinds of adapters have, and its tensors as float32."""
    backbone = source.backbone
    common: dict[str, Json] = {
        "base_model_name_or_path": backbone.name,
        "revision": backbone.revision,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
    }
    plain = {name: value.float().contiguous() for name, value in tensors.items()}
    write_json(folder / CONFIG_FILE, {**common, **config})
    write_bytes(folder / WEIGHTS_FILE, safetensors.torch.save(plain, {"format": "pt"}))


def read_adapter(source: Source, folder: Path) -> Any:
    """Load an adapter with PEFT into a model over the backbone's own weights, which do not change."""
    model = source.backbone.copy(share=True).model
    with notices_off():
        return (
            import_module("peft")
            .PeftModel.from_pretrained(model, str(folder), torch_device=str(source.backbone.device))
            .eval()
        )


@contextlib.contextmanager
def notices_off() -> Iterator[None]:
    """Leave out PEFT's warnings about what holds for every export, such as adapters on tied embeddings: only the input
    side is adapted, which is what is wanted, and merging is what it warns of.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@torch.no_grad()
def logits_at(model: Any, ids: list[int], positions: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the logits of a model for token ids alone, at some positions, (N, V)."""
    row = torch.tensor([ids], device=device)
    with notices_off():
        found: Tensor = model(input_ids=row, attention_mask=torch.ones_like(row)).logits[0]  # (T, V)
    return found[list(positions)]
