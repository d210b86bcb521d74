"""The number format of ``dtype="auto"``: by the kind of device, and on a processor by its units and a short check."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PretrainedConfig

logger = logging.getLogger(__name__)

# A processor has units for products in bfloat16 if it names one of these. Source: torch.cpu.get_capabilities, and
# docs/decisions.md, decision 9, for what happens without them.
UNITS = ("avx512_bf16", "amx_bf16", "bf16")
# bfloat16 must be faster by this factor in the check; what else a step does is as fast in either format.
WORTH = 1.3
# The check multiplies (rows, width) by (width, 4 * width), forward and backward, this many times in either format.
CHECKED_ROWS, CHECKS, WIDEST = 176, 3, 1024
WIDTHS = ("hidden_size", "d_model", "n_embd", "dim")


class Chosen(NamedTuple):
    """A number format, and why ``auto`` took it."""

    dtype: torch.dtype
    reason: str


def automatic(device: torch.device, config: PretrainedConfig) -> Chosen:
    """Return the format in which a backbone's steps are fastest on a device, out of those that lose nothing there.

    On a processor that is bfloat16 if the weights are stored in it, the processor has units for it, and products of the
    backbone's width are faster by :data:`WORTH` in a check of milliseconds; else float32.
    Source: docs/decisions.md, decision 9.
    """
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Chosen(torch.bfloat16, "the GPU computes in it")
        return Chosen(torch.float16, "the GPU has no units for bfloat16")
    if device.type != "cpu":
        return Chosen(torch.float32, f"bfloat16 is not measured on {device.type}")
    if not has_units():
        return Chosen(torch.float32, "the processor has no units for bfloat16")
    stored = short_name(config.dtype or torch.float32)
    if stored != short_name(torch.bfloat16):
        return Chosen(torch.float32, f"the weights are stored in {stored}, and bfloat16 would round them")
    faster = speed_up(config)
    if faster < WORTH:
        return Chosen(torch.float32, f"bfloat16 is {faster:.1f} times as fast here, too little to pay")
    return Chosen(torch.bfloat16, f"bfloat16 is {faster:.1f} times as fast here")


def has_units() -> bool:
    """Whether this processor has units for products in bfloat16."""
    ask: Callable[[], Mapping[str, object]] = getattr(torch.cpu, "get_capabilities", dict)  # torch 2.8 and later
    return any(ask().get(unit) for unit in UNITS)


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


def speed_up(config: PretrainedConfig) -> float:
    """Return how many times as fast bfloat16 is as float32 in a product of the backbone's width and its gradient."""
    width = min(WIDEST, next((size for name in WIDTHS if (size := getattr(config, name, None))), WIDEST))
    rows, weight = torch.ones(CHECKED_ROWS, width), torch.ones(width, 4 * width)
    best = {dtype: float("inf") for dtype in (torch.float32, torch.bfloat16)}
    for _ in range(CHECKS + 1):  # the first one also sets up what a process needs once
        for dtype in best:
            best[dtype] = min(best[dtype], _seconds(rows.to(dtype), weight.to(dtype)))
    return best[torch.float32] / best[torch.bfloat16]


def _seconds(rows: Tensor, weight: Tensor) -> float:
    began = time.perf_counter()
    product = rows @ weight
    product @ weight.T
    return time.perf_counter() - began
