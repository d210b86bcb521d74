"""The prefix cache: rows that run from their first slot onwards equal rows that run whole."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ptuning.backbone.backbone import Backbone
from ptuning.engine import prefix_cache
from ptuning.engine.learned import Learned
from ptuning.engine.passes import target_logits
from ptuning.engine.prefix_cache import PrefixCache
from ptuning.records import Record, as_records
from ptuning.template.fill import Example
from tests.conftest import CAUSAL, bound

TEXTS: list[Record] = [
    {"text": "All in all, the movie was great.", "y": "yes"},
    {"text": "It was", "y": "a good film and a bad one"},
    {"text": "the movie Zürich was great and the capital of Kenya is Nairobi", "y": "São Tomé"},
    {"text": "It was", "y": "25"},
]
LATE = "{text} [P:It was] [Y]"
TEMPLATES = (
    LATE,
    "{text} [P*2] is {text} [P] [Y]",
    "[P:It was] {text} [Y]",
    "{text} was [Y]",
    "question: {text} [P*3] [Y]",
)


def rows_of(backbone: Backbone, template: str, records: Sequence[Record] = TEXTS) -> list[Example]:
    return bound(backbone, template).examples(as_records(list(records)), with_stop=True)


def vectors_of(backbone: Backbone, template: str) -> torch.Tensor:
    noise = torch.randn(bound(backbone, template).slots, backbone.width, generator=torch.Generator().manual_seed(1))
    return (noise * float(backbone.table().std())).requires_grad_(True)


def plain(backbone: Backbone, rows: Sequence[Example], vectors: torch.Tensor) -> torch.Tensor:
    """Each row alone, whole."""
    return torch.cat([target_logits(backbone, [row], Learned(vectors)) for row in rows])


def prepared(backbone: Backbone, rows: Sequence[Example], *, memory_share: float = 0.25) -> PrefixCache:
    cache = PrefixCache(backbone, memory_share=memory_share)
    cache.prepare(rows)
    assert cache.is_used
    return cache


@pytest.fixture(autouse=True)
def _short_texts_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_cache, "MIN_PREFIX_TOKENS", 0)


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("template", TEMPLATES)
def test_equals_whole_rows(family: str, template: str, make_backbone: Callable[[str], Backbone]) -> None:
    backbone = make_backbone(family)
    rows, vectors = rows_of(backbone, template), vectors_of(backbone, template)
    cache = prepared(backbone, rows)

    wanted = plain(backbone, rows, vectors)
    found = target_logits(backbone, rows, Learned(vectors), cache=cache)

    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.detach().abs().max()))
    if len(vectors):
        (expected,) = torch.autograd.grad(torch.logsumexp(wanted, dim=-1).sum(), vectors)
        (got,) = torch.autograd.grad(torch.logsumexp(found, dim=-1).sum(), vectors)
        assert float(expected.abs().max()) > 0
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_is_kept_once_for_rows_that_begin_alike(causal: Backbone) -> None:
    rows = rows_of(causal, LATE)
    cache = prepared(causal, rows)
    assert cache.tokens == sum(map(len, {row.token_ids[: row.slot_positions[0]] for row in rows}))
    before = cache.memory_bytes
    cache.prepare(rows)
    assert cache.memory_bytes == before > 0


@pytest.mark.parametrize("room", [True, False])
def test_beyond_the_memory_goes_to_the_disk_or_is_computed_anew(
    room: bool, causal: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, vectors = rows_of(causal, LATE), vectors_of(causal, LATE)
    wanted = plain(causal, rows, vectors)
    one = next(iter(prepared(causal, rows[1:2])._memory.values())).nbytes
    monkeypatch.setattr(prefix_cache, "free_bytes", lambda _: 4 * one + 4)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=(1 << 50) if room else 0))

    with prepared(causal, rows) as cache:
        assert cache.memory_bytes == one
        assert (cache.disk_bytes > 0) == room
        found = target_logits(causal, rows, Learned(vectors), cache=cache)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.detach().abs().max()))
    assert not cache.is_used
    assert not (cache.tokens)
    assert not (cache.memory_bytes)
    assert not (cache.disk_bytes)


def test_rows_that_were_not_prepared_are_run_too(causal: Backbone) -> None:
    rows, vectors = rows_of(causal, LATE), vectors_of(causal, LATE)
    cache = prepared(causal, rows[:1])
    wanted = plain(causal, rows, vectors)
    found = target_logits(causal, rows, Learned(vectors), cache=cache)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.detach().abs().max()))


@pytest.mark.parametrize(
    ("family", "template", "share"), [("bert", LATE, 0.25), ("llama", LATE, 0.0), ("llama", "[P] {text} [Y]", 0.25)]
)
def test_falls_back_where_it_does_not_apply(
    family: str, template: str, share: float, make_backbone: Callable[[str], Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix_cache, "MIN_PREFIX_TOKENS", 2)
    backbone = make_backbone(family)
    rows, vectors = rows_of(backbone, template), vectors_of(backbone, template)
    cache = PrefixCache(backbone, memory_share=share)
    cache.prepare(rows)
    assert not cache.is_used
    assert not cache.tokens
    wanted = plain(backbone, rows, vectors)
    found = target_logits(backbone, rows, Learned(vectors), cache=cache)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.detach().abs().max()))


def test_no_gradient_reaches_what_is_kept(causal: Backbone) -> None:
    rows, vectors = rows_of(causal, LATE), vectors_of(causal, LATE)
    cache = prepared(causal, rows)
    kept = [part.clone() for part in cache._memory.values()]
    target_logits(causal, rows, Learned(vectors), cache=cache).sum().backward()
    assert all(not part.requires_grad for part in cache._memory.values())
    assert all(torch.equal(one, other) for one, other in zip(kept, cache._memory.values(), strict=True))


@pytest.mark.parametrize("in_memory", [True, False])
def test_texts_that_no_row_needs_any_more_are_dropped(
    in_memory: bool, causal: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From memory and from the disk, and their bytes no longer count."""
    monkeypatch.setattr(prefix_cache, "free_bytes", lambda _: (1 << 40) if in_memory else 0)
    rows = rows_of(causal, LATE)
    with prepared(causal, rows) as cache, prepared(causal, rows[1:2]) as wanted:
        assert cache.tokens > wanted.tokens
        cache.keep_only(rows[1:2])
        assert cache.to_json() == wanted.to_json()
        assert cache._folder is None or len(list(Path(cache._folder.name).iterdir())) == 1
        assert bool(cache.disk_bytes) != in_memory
