"""Grouped-query attention on a CPU without copies of keys and values."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The attention of transformers that this one replaces.
ATTENTION = "sdpa"
# Marks the attention modules of backbones; other models in the process keep transformers' attention.
MARK = "_ptuning_packs_heads"

Attention = Callable[..., tuple[Tensor, Tensor | None]]


def pack_heads(model: PreTrainedModel) -> None:
    """Let a model's grouped-query attention use each head's keys and values without copying them, on a CPU.

    Several query heads share one head of keys and values. With a mask, transformers copies keys and values once per
    query head. Here the queries of a group become more queries of one head instead. That copies only queries, which are
    few, while the KV cache of a long text is large. The numbers are the same up to rounding. Config and weights of the
    model do not change.

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
    """Attend as ``plain`` does; where it pays, the queries of a group become more queries of one head.

    Args:
        plain: Transformers' attention.
        module: The calling attention module.
        query: (B, H, T, D).
        key: (B, K, S, D); each of the K heads is shared by H / K query heads.
        value: (B, K, S, D).
        attention_mask: (B or 1, 1, T, S), or None.
        options: Further arguments of ``plain``.

    Returns:
        (B, T, H, D), and the second result of ``plain``.
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
    """Return the number of query heads per head of keys and values; 1 if the module does not say."""
    groups = getattr(module, "num_key_value_groups", 1)
    return groups if isinstance(groups, int) else 1
