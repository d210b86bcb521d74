"""Grouped-query attention on a CPU without copies of keys and values."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION = "sdpa"
# Marks the attention modules of backbones; other models in the process keep transformers' attention.
MARK = "_ptuning_packs_heads"

Attention = Callable[..., tuple[Tensor, Tensor | None]]


def pack_heads(model: PreTrainedModel) -> None:
    """Let grouped-query attention use each head's keys and values without the copies that transformers makes, on a CPU.
    The queries of a group become more queries of one head; the numbers are the same up to rounding.
    Source: Ainslie et al. (2023), arXiv:2305.13245 (grouped-query attention); docs/decisions.md, decision 31.
    """
    grouped = [module for module in model.modules() if _groups(module) > 1]
    if grouped:
        _stand_in()
    for module in grouped:
        setattr(module, MARK, True)


@functools.cache
def _stand_in() -> None:
    """Replace transformers' attention by the packing one, once per process; unmarked modules see no change."""
    from transformers import AttentionInterface

    plain: Attention = AttentionInterface()[ATTENTION]
    AttentionInterface.register(ATTENTION, functools.partial(packed_attention, plain))


def packed_attention(
    plain: Attention,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: object,
) -> tuple[Tensor, Tensor | None]:
    """Attend as ``plain`` (transformers' attention) does; where it pays, the queries of a group share one head.
    Takes queries (B, H, T, D), keys and values (B, K, S, D), and a mask (B or 1, 1, T, S). Returns (B, T, H, D) first.
    """
    heads, length = query.shape[1:3]
    if (
        attention_mask is None
        or not getattr(module, MARK, False)
        or query.device.type != "cpu"
        or heads != key.shape[1] * _groups(module)
        or attention_mask.shape[1:3] != (1, length)
        or options.get("position_bias") is not None
    ):
        return plain(module, query, key, value, attention_mask, **options)
    packed = query.reshape(len(query), key.shape[1], -1, query.shape[-1])  # (B, K, H / K * T, D)
    mask = attention_mask.repeat(1, 1, _groups(module), 1)  # (B, 1, H / K * T, S)
    # A bare module has no groups, so ``plain`` copies nothing for them.
    found, weights = plain(nn.Module(), packed, key, value, mask, **options)
    return found.transpose(1, 2).reshape(len(query), heads, length, -1).transpose(1, 2).contiguous(), weights


def _groups(module: nn.Module) -> int:
    groups = getattr(module, "num_key_value_groups", 1)
    return groups if isinstance(groups, int) else 1
