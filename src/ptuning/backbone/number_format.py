"""The number format of ``dtype="auto"``, by the kind of device, and a warning of formats that are slow on one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

logger = logging.getLogger(__name__)

# A processor has units for products in bfloat16 if it names one of these. Source: torch.cpu.get_capabilities, and
# docs/decisions.md, decision 9, for what happens without them.
UNITS = ("avx512_bf16", "amx_bf16", "bf16")


class Chosen(NamedTuple):
    """A number format, and why ``auto`` took it."""

    dtype: torch.dtype
    reason: str


def automatic(device: torch.device, *, quantize: bool = False) -> Chosen:
    """Return the format of a device's backbones where none was asked for: the GPU's half precision, else float32; of
    what is left when weights are quantised, bfloat16 where that is not slow.

    A processor with units for bfloat16 is faster in it, but prompts were not shown to score the same as in float32.
    Source: docs/decisions.md, decision 9.
    """
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Chosen(torch.bfloat16, "the GPU computes in it")
        return Chosen(torch.float16, "the GPU has no units for bfloat16")
    if quantize and device.type == "cpu" and has_units():
        return Chosen(torch.bfloat16, "quantising is for less memory, and the processor computes in it")
    if device.type != "cpu":
        return Chosen(torch.float32, f"bfloat16 is not measured on {device.type}")
    if not has_units():
        return Chosen(torch.float32, "the processor has no units for bfloat16")
    return Chosen(torch.float32, "scores in bfloat16 were not shown to be equal; --dtype bfloat16 may be faster")


def units() -> list[str]:
    """Return the names of the units that this processor has for products in bfloat16."""
    ask: Callable[[], Mapping[str, object]] = getattr(torch.cpu, "get_capabilities", dict)  # torch 2.8 and later
    found = ask()
    return [unit for unit in UNITS if found.get(unit)]


def has_units() -> bool:
    """Whether this processor has units for products in bfloat16."""
    return bool(units())


def warn_if_slow(dtype: torch.dtype, device: torch.device) -> None:
    """Log a warning for a format that the processor has no units for."""
    if device.type == "cpu" and dtype != torch.float32 and (dtype == torch.float16 or not has_units()):
        logger.warning(
            "this processor has no units for %s: a product took 5 to 40 times as long as in float32 on such machines; "
            "leave --dtype out, or give float32",
            short_name(dtype),
        )


def short_name(dtype: torch.dtype | str) -> str:
    """Return the name of a number format, such as ``bfloat16``."""
    return str(dtype).removeprefix("torch.")
