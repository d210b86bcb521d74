"""The prefix cache: rows that run from their first slot onwards equal rows that run whole."""

import os
import resource
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ptuning.backbone.backbone import Backbone
from ptuning.engine import prefix_cache
from ptuning.engine.forward import target_logits
from ptuning.engine.prefix_cache import PastKeyValues, PrefixCache
from ptuning.engine.soft_prompt import PromptBatch
from ptuning.records import Record, as_records
from ptuning.template.encode import Example
from tests.conftest import CAUSAL, bound, small_memory

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
    return torch.cat([target_logits(backbone, [row], PromptBatch(vectors)) for row in rows])


def prepared(
    backbone: Backbone, rows: Sequence[Example], *, memory_share: float = 0.25, disk_bytes: int = 0
) -> PrefixCache:
    cache = PrefixCache(backbone, memory_share=memory_share, disk_bytes=disk_bytes)
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
    found = target_logits(backbone, rows, PromptBatch(vectors), cache=cache)

    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.detach().abs().max()))
    if len(vectors):
        (expected,) = torch.autograd.grad(torch.logsumexp(wanted, dim=-1).sum(), vectors)
        (got,) = torch.autograd.grad(torch.logsumexp(found, dim=-1).sum(), vectors)
        assert float(expected.abs().max()) > 0
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def sizes(backbone: Backbone, rows: Sequence[Example]) -> list[int]:
    """Return the bytes of each row's entry."""
    return [part.nbytes for part in prepared(backbone, rows)._memory.values()]


@pytest.mark.parametrize(("part", "free"), [(1.0, True), (1.0, False), (0.5, True), (0.0, True)])
def test_beyond_the_memory_goes_to_the_disk_or_is_computed_anew(
    part: float, free: bool, causal: Backbone, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """To the disk only as far as it was asked for, and what is computed anew is said once, with what to do."""
    rows, vectors = rows_of(causal, LATE), vectors_of(causal, LATE)
    wanted = plain(causal, rows, vectors)
    (one,), every = sizes(causal, rows[1:2]), sum(sizes(causal, rows))
    monkeypatch.setattr(prefix_cache, "free_bytes", lambda _: 4 * one + 4)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=(1 << 50) if free else 0))
    allowed = int(part * every)

    with prepared(causal, rows, disk_bytes=allowed) as cache:
        assert cache.memory_bytes == one
        assert 0 <= cache.disk_bytes <= allowed
        assert (cache.disk_bytes > 0) == bool(allowed and free)
        cache.prepare(rows)
        for _ in range(2):
            found = target_logits(causal, rows, PromptBatch(vectors), cache=cache)
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.detach().abs().max()))
    complete = part == 1.0 and free
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(said) == (0 if complete else 1)
    assert complete or "MB of memory" in said[0]
    assert complete or "computed anew in every step. More memory (cache_memory) or disk (cache_disk)" in said[0]
    assert not cache.is_used
    assert not (cache.tokens)
    assert not (cache.memory_bytes)
    assert not (cache.disk_bytes)


def test_its_files_have_no_names(causal: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a killed process leaves nothing behind. They are in the folder for temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(prefix_cache, "free_bytes", lambda _: 0)
    with prepared(causal, rows_of(causal, LATE), disk_bytes=1 << 40) as cache:
        assert cache.disk_bytes > 0
        (file, *_) = cache._files
        assert os.fstat(file.fileno()).st_size > 0
        assert os.fstat(file.fileno()).st_dev == tmp_path.stat().st_dev
        assert list(tmp_path.iterdir()) == []
    assert file.closed


def test_a_disk_that_takes_no_more_ends_no_training(
    causal: Backbone, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A quota, or a limit on the size of a file, while the disk itself has room."""
    rows, vectors = rows_of(causal, LATE), vectors_of(causal, LATE)
    wanted, largest = plain(causal, rows, vectors), max(sizes(causal, rows))
    monkeypatch.setattr(prefix_cache, "free_bytes", lambda _: 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest + 100, hard))
    try:
        with prepared(causal, rows, disk_bytes=1 << 40) as cache:
            assert 0 < len(cache._disk) < len(set(map(cache.ids_of, rows)))
            found = target_logits(causal, rows, PromptBatch(vectors), cache=cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.detach().abs().max()))
    assert "cannot be written to the disk" in caplog.text


def test_what_cannot_be_read_is_computed_anew(causal: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, vectors = rows_of(causal, LATE), vectors_of(causal, LATE)
    wanted = plain(causal, rows, vectors)
    monkeypatch.setattr(prefix_cache, "free_bytes", lambda _: 0)
    with prepared(causal, rows, disk_bytes=1 << 40) as cache:
        for file in cache._files:
            file.truncate(100)
        found = target_logits(causal, rows, PromptBatch(vectors), cache=cache)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.detach().abs().max()))


def test_rows_that_were_not_prepared_are_run_too(causal: Backbone) -> None:
    rows, vectors = rows_of(causal, LATE), vectors_of(causal, LATE)
    cache = prepared(causal, rows[:1])
    wanted = plain(causal, rows, vectors)
    found = target_logits(causal, rows, PromptBatch(vectors), cache=cache)
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
    found = target_logits(backbone, rows, PromptBatch(vectors), cache=cache)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.detach().abs().max()))


def test_no_gradient_reaches_what_is_kept(causal: Backbone) -> None:
    rows, vectors = rows_of(causal, LATE), vectors_of(causal, LATE)
    cache = prepared(causal, rows)
    kept = [part.clone() for part in cache._memory.values()]
    target_logits(causal, rows, PromptBatch(vectors), cache=cache).sum().backward()
    assert all(not part.requires_grad for part in cache._memory.values())
    assert all(torch.equal(one, other) for one, other in zip(kept, cache._memory.values(), strict=True))


@pytest.mark.parametrize("in_memory", [True, False])
def test_texts_that_no_row_needs_any_more_are_dropped(
    in_memory: bool, causal: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From memory and from the disk, and their bytes no longer count."""
    monkeypatch.setattr(prefix_cache, "free_bytes", lambda _: (1 << 40) if in_memory else 0)
    monkeypatch.setattr(prefix_cache, "FILES", 1 << 40)  # a file for each text
    rows = rows_of(causal, LATE)
    room = 1 << 39
    with prepared(causal, rows, disk_bytes=room) as cache, prepared(causal, rows[1:2], disk_bytes=room) as wanted:
        assert cache.tokens > wanted.tokens
        files = [*cache._files]
        cache.keep_only(rows[1:2])
        assert cache.to_json() == wanted.to_json()
        assert sum(not file.closed for file in files) == (0 if in_memory else 1)
        assert bool(cache.disk_bytes) != in_memory


def test_texts_that_do_not_fit_into_one_pass_are_kept_in_several(
    causal: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, vectors = rows_of(causal, LATE), vectors_of(causal, LATE)
    wanted = prepared(causal, rows)
    with torch.no_grad():
        whole = target_logits(causal, rows, PromptBatch(vectors), cache=wanted)
        ran = small_memory(monkeypatch, 40)
        cache = prepared(causal, rows)
        found = target_logits(causal, rows, PromptBatch(vectors), cache=cache)
    assert max(ran) <= 40
    assert cache.tokens == wanted.tokens
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-5 * float(whole.abs().max()))


def test_parts_with_gradients_are_put_together_as_constant_ones() -> None:
    """Of several lengths, named by several rows or by none; each part gets the gradient of its rows."""
    drawn = torch.Generator().manual_seed(0)
    parts = {name: torch.randn(2, 2, 3, length, 4, generator=drawn) for name, length in (("a", 5), ("b", 2), ("c", 1))}
    names = ["b", "b", "a", "none", "c", "a"]
    plain = PastKeyValues.of([parts.get(name) for name in names])
    own = {name: part.clone().requires_grad_() for name, part in parts.items()}
    found = PastKeyValues.of([own.get(name) for name in names])
    assert torch.equal(found.mask, plain.mask)
    for ours, theirs in zip(found.layers, plain.layers, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    weights = torch.randn(2, 2, len(names), 3, 5, 4, generator=drawn)
    torch.stack([torch.stack(pair) for pair in found.layers]).mul(weights).sum().backward()
    for name, part in own.items():
        rows = [row for row, named in enumerate(names) if named == name]
        expected = weights[:, :, rows, :, 5 - part.shape[3] :].sum(dim=2)
        assert part.grad is not None
        assert torch.allclose(part.grad, expected, atol=1e-6)
