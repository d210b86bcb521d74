"""Attention on a CPU: grouped heads without copies of keys and values, and float32 for short rows in half precision."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION = "sdpa"
# Marks the attention modules of backbones; other models in the process keep transformers' attention.
MARK = "_ptuning_attends"
HALF = (torch.bfloat16, torch.float16)
# Up to so many keys, attention in half precision computes in float32. Source: docs/decisions.md, decision 9.
FLOAT32_KEYS = 512

Attention = Callable[..., tuple[Tensor, Tensor | None]]


def take_over(model: PreTrainedModel) -> None:
    """Let a model attend by :func:`attend`; the numbers are the same up to rounding.
    Source: Ainslie et al. (2023), arXiv:2305.13245 (grouped-query attention); docs/decisions.md, decisions 9 and 31.
    """
    _stand_in()
    for module in model.modules():
        setattr(module, MARK, True)


@functools.cache
def _stand_in() -> None:
    """Replace transformers' attention by ours, once per process; unmarked modules see no change."""
    from transformers import AttentionInterface

    plain: Attention = AttentionInterface()[ATTENTION]
    AttentionInterface.register(ATTENTION, functools.partial(attend, plain))


def attend(
    plain: Attention,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: object,
) -> tuple[Tensor, Tensor | None]:
    """Attend as ``plain`` (transformers' attention) does; where it pays, in float32, and the queries of a group share
    one head, so that nothing is copied for them.
    Takes queries (B, H, T, D), keys and values (B, K, S, D), and a mask (B or 1, 1, T, S). Returns (B, T, H, D) first.
    """
    if query.device.type != "cpu" or not getattr(module, MARK, False) or options.get("position_bias") is not None:
        return plain(module, query, key, value, attention_mask, **options)
    given = query.dtype
    if given in HALF and key.shape[2] <= FLOAT32_KEYS:
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask.float()
        query, key, value = query.float(), key.float(), value.float()
        found, weights = attend(plain, module, query, key, value, attention_mask, **options)
        return found.to(given), weights
    heads, length, groups = query.shape[1], query.shape[2], _groups(module)
    if (
        groups == 1
        or attention_mask is None
        or heads != key.shape[1] * groups
        or attention_mask.shape[1:3] != (1, length)
    ):
        return plain(module, query, key, value, attention_mask, **options)
    packed = query.reshape(len(query), key.shape[1], -1, query.shape[-1])  # (B, K, H / K * T, D)
    mask = attention_mask.repeat(1, 1, groups, 1)  # (B, 1, H / K * T, S)
    # A bare module has no groups, so ``plain`` copies nothing for them.
    found, weights = plain(nn.Module(), packed, key, value, mask, **options)
    return found.transpose(1, 2).reshape(len(query), heads, length, -1).transpose(1, 2).contiguous(), weights


def _groups(module: nn.Module) -> int:
    groups = getattr(module, "num_key_value_groups", 1)
    return groups if isinstance(groups, int) else 1
