"""Attention of grouped heads on a processor, without copies of keys and values. Knows no tokenizer and no templates."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What transformers calls the attention that this one stands in for.
ATTENTION = "sdpa"
# Set on the attention modules of backbones; modules of other models in the process keep transformers' own way.
MARK = "_ptuning_packs_heads"

Attention = Callable[..., tuple[Tensor, Tensor | None]]


def pack_heads(model: PreTrainedModel) -> None:
    """Let a model's grouped-query attention read each head's keys and values where they are, on a processor.

    Several heads of queries share one of keys and values, and transformers copies these once for each of them where
    there is a mask. On the other side of the product the same can be had by looking at the queries of a group as more
    queries of one head, which copies nothing that is long: keys and values of kept text are, queries are few.
    The same numbers to rounding. Nothing else about the model changes, its config and its weights included.

    Source: Ainslie et al. (2023), arXiv:2305.13245 (grouped-query attention); docs/decisions.md, decision 31.
    """
    grouped = [module for module in model.modules() if _groups(module) > 1]
    if grouped:
        _stand_in()
    for module in grouped:
        setattr(module, MARK, True)


@functools.cache
def _stand_in() -> None:
    """Put the packing attention in the place of transformers' own, once a process; unmarked modules see no change."""
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
    """Attend as ``plain`` does, with the queries of a group as further queries of its one head where that pays.

    Args:
        plain: Transformers' attention.
        module: The attention module that calls.
        query: (B, H, T, D).
        key: (B, K, S, D), of K heads that H / K heads of queries share each.
        value: (B, K, S, D).
        attention_mask: (B or 1, 1, T, S), or None.
        options: For ``plain``.

    Returns:
        (B, T, H, D), and what ``plain`` returns beside it.
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
    # A bare module has no groups, so nothing is copied for them.
    found, weights = plain(nn.Module(), packed, key, value, mask, **options)
    return found.transpose(1, 2).reshape(len(query), heads, length, -1).transpose(1, 2).contiguous(), weights


def _groups(module: nn.Module) -> int:
    """Return how many heads of queries share one of keys and values; 1 if the module does not say."""
    groups = getattr(module, "num_key_value_groups", 1)
    return groups if isinstance(groups, int) else 1
