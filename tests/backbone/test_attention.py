"""Attention and heads of backbones: the numbers of transformers' own, without copies, in float32 where it matters."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ptuning.backbone.attention import ATTENTION, FLOAT32_KEYS, MARK, attend
from ptuning.backbone.backbone import Backbone
from ptuning.backbone.forward import Memory

ROWS, GROUPS, KEY_HEADS, WIDTH = 3, 3, 2, 8


class Spy:
    """Transformers' attention, and for how many heads it copied keys and values each time."""

    def __init__(self) -> None:
        self.groups: list[int] = []

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Note how many heads of queries share one of keys, and attend."""
        self.groups.append(getattr(module, "num_key_value_groups", 1))
        return sdpa_attention_forward(module, query, key, value, mask, **options)


def grouped_module(*, marked: bool = True) -> nn.Module:
    module = nn.Module()
    module.num_key_value_groups = GROUPS  # type: ignore[assignment]  # as models set it
    if marked:
        setattr(module, MARK, True)
    return module


def inputs(*, queries: int, keys: int) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    torch.manual_seed(0)
    query = torch.randn(ROWS, queries, GROUPS * KEY_HEADS, WIDTH).transpose(1, 2).requires_grad_()
    key, value = (torch.randn(ROWS, KEY_HEADS, keys, WIDTH, requires_grad=True) for _ in range(2))
    mask = torch.ones(ROWS, 1, queries, keys, dtype=torch.bool)
    mask[:, :, :, keys - queries :] = torch.ones(queries, queries, dtype=torch.bool).tril()
    mask[0, :, 2:, :2] = False
    return (query, key, value), mask


@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (4, 40), (1, 9)])
@pytest.mark.parametrize("additive", [False, True])
def test_packed_heads_attend_alike_with_equal_gradients(queries: int, keys: int, additive: bool) -> None:
    tensors, mask = inputs(queries=queries, keys=keys)
    if additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    module, spy = grouped_module(), Spy()
    found, _ = attend(spy, module, *tensors, mask, scaling=0.3)
    expected, _ = sdpa_attention_forward(module, *tensors, mask, scaling=0.3)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert spy.groups == [1], "keys and values were copied for every head"
    weights = torch.randn_like(found)
    for one, other in zip(
        torch.autograd.grad((found * weights).sum(), tensors),
        torch.autograd.grad((expected * weights).sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ["unmarked", "no mask", "mask per head", "position bias"])
def test_other_attention_is_left_to_transformers(case: str) -> None:
    tensors, mask = inputs(queries=4, keys=4)
    module, spy = grouped_module(marked=case != "unmarked"), Spy()
    options: dict[str, Any] = {}
    given: Tensor | None = mask
    if case == "no mask":
        given = None
    elif case == "mask per head":
        given = mask.expand(-1, GROUPS * KEY_HEADS, -1, -1)
    elif case == "position bias":
        options["position_bias"] = torch.zeros(1, GROUPS * KEY_HEADS, 4, 4)
    found, _ = attend(spy, module, *tensors, given, is_causal=True, **options)
    assert spy.groups == [GROUPS]
    expected, _ = sdpa_attention_forward(module, *tensors, given, is_causal=True, **options)
    assert torch.equal(found, expected)


def marked(backbone: Backbone) -> list[nn.Module]:
    return [module for module in backbone.model.modules() if getattr(module, MARK, False)]


def logits_behind_text(backbone: Backbone) -> tuple[Tensor, Tensor]:
    """Logits and gradients of rows that stand behind kept keys and values of other lengths."""
    ids = torch.arange(24).reshape(2, 12) + 5
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        kept = backbone.remember(backbone.embed(ids[:, :8]), mask=mask[:, :8], positions=positions[:, :8])
    leaf = backbone.embed(ids[:, 8:]).detach().requires_grad_()
    logits, _ = backbone.run(
        leaf,
        mask=mask,
        positions=positions[:, 8:],
        rows=torch.tensor([0, 1]),
        cols=torch.tensor([3, 3]),
        memory=Memory.of(kept.layers),
    )
    (gradient,) = torch.autograd.grad(logits.square().sum(), leaf)
    return logits.detach(), gradient


def test_a_backbone_packs_and_scores_as_without(causal: Backbone) -> None:
    assert marked(causal), "no attention of grouped heads was found"
    assert marked(causal.copy()), "a copy forgets it"
    packed = logits_behind_text(causal)
    for module in marked(causal):
        delattr(module, MARK)
    for one, other in zip(packed, logits_behind_text(causal), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_models_call_it_by_the_name_they_know_and_others_stay_unmarked(causal: Backbone) -> None:
    assert causal.model.config._attn_implementation == ATTENTION
    assert AttentionInterface()[ATTENTION].func is attend
    other = type(causal.model)(causal.model.config)
    assert not any(hasattr(module, MARK) for module in other.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("keys", "computed_in"), [(40, torch.float32), (FLOAT32_KEYS + 1, None)])
@pytest.mark.parametrize("additive", [False, True])
def test_short_rows_in_half_precision_attend_in_float32(
    dtype: torch.dtype, keys: int, computed_in: torch.dtype | None, additive: bool
) -> None:
    """torch's backward pass for attention in bfloat16 takes four to eight times as long on a processor."""
    tensors, mask = inputs(queries=4, keys=keys)
    query, key, value = (tensor.detach().to(dtype) for tensor in tensors)
    if additive:
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    seen: list[torch.dtype] = []

    def plain(module: nn.Module, query: Tensor, *given: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        seen.append(query.dtype)
        return sdpa_attention_forward(module, query, *given, **options)

    found, _ = attend(plain, grouped_module(), query, key, value, mask, scaling=0.3)
    assert seen == [computed_in or dtype]
    assert found.dtype == dtype
    wide = mask.float() if additive else mask
    expected, _ = sdpa_attention_forward(grouped_module(), query.float(), key.float(), value.float(), wide, scaling=0.3)
    torch.testing.assert_close(found, expected.to(dtype), rtol=2e-2, atol=1e-2)
    if computed_in is not None:
        assert torch.equal(found, expected.to(dtype)), "nothing but the result may be rounded"


def test_answers_are_scored_in_float32_whatever_the_weights(backbone: Backbone) -> None:
    """Half-precision logits tie, and ties rank behind."""
    backbone.model.bfloat16()
    ids = torch.arange(10).reshape(2, 5) + 5
    given: dict[str, Any] = {
        "mask": torch.ones_like(ids),
        "positions": torch.arange(5).expand(2, 5),
        "rows": torch.tensor([0, 1]),
        "cols": torch.tensor([4, 3]),
    }
    head, seen = backbone.model.get_output_embeddings(), []
    head.register_forward_hook(lambda _module, hidden, found: seen.append((hidden[0], found)))
    with torch.no_grad():
        scored, _ = backbone.run(backbone.embed(ids), **given)
    hidden, found = seen.pop()
    assert found.dtype == torch.float32
    bias = 0 if head.bias is None else head.bias.float()
    torch.testing.assert_close(found, hidden.float() @ head.weight.float().T + bias)
    trained, _ = backbone.run(backbone.embed(ids).requires_grad_(), **given)
    assert seen.pop()[1].dtype == torch.bfloat16, "training steps keep the fast format"
    assert not torch.equal(scored, trained.detach())


def test_a_copy_scores_with_its_own_head(causal: Backbone) -> None:
    other = causal.copy().model.bfloat16()
    head = other.get_output_embeddings()
    with torch.no_grad():
        head.weight.zero_()
    assert not head.forward(torch.ones(1, 1, head.in_features, dtype=torch.bfloat16)).any()
