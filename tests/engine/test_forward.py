"""The injection site and the invariants that rest on it (docs/invariants.md): *Identity*, *Alone or in company*, and
*Fast = slow* where rows share their beginning.
"""

import random
from dataclasses import replace

import pytest
import torch

import ptuning.engine.forward as model_module
from ptuning.backbone.backbone import Backbone
from ptuning.engine.batch import MAX_BATCH_POSITIONS, MAX_BATCH_TOKENS, MAX_CACHED_TOKENS, batches, collate
from ptuning.engine.evaluate import evaluate, measure_ceiling
from ptuning.engine.forward import embed_inputs, shared_prefix_tokens, target_logits
from ptuning.engine.objective import inputs_of
from ptuning.engine.soft_prompt import PromptBatch
from ptuning.errors import PromptError
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prompt import Prompt
from ptuning.template.encode import Example
from tests.conftest import CAUSAL, RECORDS, bound, items_of, learned, plain_logits, spoken

TEMPLATES = (
    "[P*3] [X] [P*3] [Y]",
    "[P:The capital of] [X] [P:is] [Y]",
    "[X][P][Y]",
    "[X] is [P] located in [P*2] [Y] .",
    "question: [P] {x}? answer: [P*2] [Y]",
)


@pytest.mark.parametrize("template", TEMPLATES)
def test_slots_holding_token_embeddings_give_the_logits_of_the_plain_run(backbone: Backbone, template: str) -> None:
    """Invariant *Identity*: whatever the model does with embeddings, it does with slot vectors.

    The embeddings are what the model's layer gives for the tokens. Some models scale it, so the table's own rows would
    be wrong.
    """
    filled = bound(backbone, template)
    ids = random.Random(0).choices(range(5, backbone.vocabulary), k=filled.slots)
    found = PromptModel(backbone).target_logits(RECORDS, Prompt.from_token_ids(template, ids, backbone))
    for example, logits in zip(filled.examples(RECORDS), found, strict=True):
        expected = plain_logits(backbone, spoken(example, ids))[list(example.logit_positions)]
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_other_vectors_give_other_logits(backbone: Backbone) -> None:
    """Invariant *Identity* says little if slots are not read at all."""
    one, two = (
        PromptModel(backbone).target_logits(RECORDS, learned(backbone, TEMPLATES[0], seed=seed)) for seed in (1, 2)
    )
    assert all(float((a - b).abs().max()) > 1e-3 for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("segment", [0, 1])
def test_segments_are_those_of_the_plain_run(masked: Backbone, segment: int) -> None:
    """BERT is told the segment that its tokenizer gives a single sentence; slots and text have the same."""
    assert masked.tokenizer.segment_id == 0
    masked.tokenizer.segment_id = segment
    template = "[X] [P*2] [Y]"
    example = bound(masked, template).examples(RECORDS)[0]
    ids = torch.tensor([spoken(example, [7, 8])])
    with torch.no_grad():
        plain = masked.model(input_ids=ids, token_type_ids=torch.full_like(ids, segment)).logits[0]
    logits = PromptModel(masked).target_logits(RECORDS[:1], Prompt.from_token_ids(template, [7, 8], masked))[0]
    torch.testing.assert_close(logits, plain[list(example.logit_positions)], atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_every_slot_holds_its_vector_and_everything_else_its_token(backbone: Backbone, side: str) -> None:
    """Slots may be anywhere in a row, not only in front: position by position, against a slow loop.

    The given embeddings are left alone.
    """
    examples = bound(backbone, "[P*2] [X] [P:is] [Y]").examples(RECORDS)
    slots = len(examples[0].slot_positions)
    vectors = torch.randn(slots, backbone.width)
    batch = collate(examples, PromptBatch(vectors), pad_side=side)  # type: ignore[arg-type]
    given = backbone.embed(batch.token_ids)
    before = given.clone()
    found = embed_inputs(given, vectors, batch)
    assert torch.equal(given, before)
    for row, example in enumerate(examples):
        first = given.shape[1] - len(example.token_ids) if side == "left" else 0
        for position, token in enumerate(example.token_ids):
            expected = backbone.embed(torch.tensor([[token]]))[0, 0]
            if position in example.slot_positions:
                expected = vectors[example.slot_positions.index(position)]
            assert torch.equal(found[row, first + position], expected), (row, position)


def test_vectors_are_cast_where_they_are_written(causal: Backbone) -> None:
    """The vectors stay float32, in which small steps are not lost; in the row they have the embeddings' dtype."""
    examples = bound(causal, "[P*2] [X] [Y]").examples(RECORDS)
    vectors = torch.randn(2, causal.width, requires_grad=True)
    batch = collate(examples, PromptBatch(vectors))
    found = embed_inputs(causal.embed(batch.token_ids).bfloat16(), vectors, batch)
    assert found.dtype == torch.bfloat16
    found.float().sum().backward()
    assert vectors.grad is not None
    assert vectors.grad.dtype == torch.float32


def test_a_batch_that_asks_for_a_missing_vector_is_an_error(causal: Backbone) -> None:
    """A wrong count of vectors is never silent."""
    examples = bound(causal, "[P*3] [X] [Y]").examples(RECORDS)
    batch = collate(examples, PromptBatch(torch.zeros(3, causal.width)))
    with pytest.raises(PromptError, match="asks for slot 2, and there are 2 vectors"):
        embed_inputs(causal.embed(batch.token_ids), torch.zeros(2, causal.width), batch)
    with pytest.raises(PromptError, match="row 0 has 3 slots, and its prompt has 2 vectors"):
        target_logits(causal, examples, PromptBatch(torch.zeros(2, causal.width)))


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_alone_equals_the_row_in_company(backbone: Backbone, side: str) -> None:
    """Invariant *Alone or in company*: a row's logits are the same beside longer and shorter rows.

    Padded on either side, in any order.
    """
    prompt = learned(backbone, "[P*2] [X] [P:is] [Y]")
    alone = [PromptModel(backbone).target_logits([record], prompt)[0] for record in RECORDS]
    order = random.Random(1).sample(range(len(RECORDS)), len(RECORDS))
    examples = prompt.bind(backbone).examples([RECORDS[index] for index in order])
    logits = target_logits(backbone, examples, prompt.learned(backbone), pad_side=side)  # type: ignore[arg-type]
    found = logits.detach().split([len(example.logit_positions) for example in examples])
    for index, logits in zip(order, found, strict=True):
        torch.testing.assert_close(logits, alone[index], atol=1e-5, rtol=0)


def test_a_mixed_batch_equals_single_runs(backbone: Backbone) -> None:
    """Invariants *Alone or in company* and *Fast = slow*: each row has its own prompt's slots, in template order.

    Rows [A, B, none, A, B] with different templates, lengths and targets are in one batch.
    """
    a, b = learned(backbone, "[P*3] [X] [P*3] [Y]", seed=1), learned(backbone, "[P:about] {x} [P] so [Y]", seed=2)
    none = Prompt.manual("The capital of [X] is [Y]")
    prompts = [a, b, none, a, b]
    model = PromptModel(backbone)
    mixed = model.target_logits(RECORDS, prompts)
    for record, prompt, logits in zip(RECORDS, prompts, mixed, strict=True):
        torch.testing.assert_close(logits, model.target_logits([record], prompt)[0], atol=1e-5, rtol=0)


def test_batches_hold_every_row_once_and_keep_their_bounds(causal: Backbone) -> None:
    """Model: no forward pass grows without bound, and none is empty."""
    texts = [{"x": "a " * (index % 40), "y": "yes"} for index in range(700)]
    examples = bound(causal, "[X] so [Y]").examples(texts)
    found = list(batches([[example] for example in examples]))
    assert sorted(index for chosen in found for index in chosen) == list(range(700))
    for chosen in found:
        assert max(len(examples[i].token_ids) for i in chosen) * len(chosen) <= MAX_BATCH_TOKENS
        assert sum(len(examples[i].logit_positions) for i in chosen) <= MAX_BATCH_POSITIONS
    assert list(batches([])) == []


NEVER = 10**9
# (template, whether anything stands in front of the first field)
SHARED = (
    ("[P*3] [X] [P*3] [Y]", True),  # slots only
    ("The capital of [X] [P:is] [Y]", True),  # text only
    ("Kenya: Nairobi. [P:The capital] of [P*2] [X] is [Y]", True),  # text, slots, text, slots
    ("so the capital [P*2] of all is [P] [Y]", True),  # everything in front of the target, the rows' own is the rest
    ("[X] [P*3] is [Y]", False),
)


def run_both_ways(
    backbone: Backbone, examples: list[Example], prompts: PromptBatch, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return (logits, gradient of a random sum of them) with a shared prefix, and from the plain path."""
    found = []
    for least in (1, NEVER):
        monkeypatch.setattr(model_module, "MIN_SAVED_TOKENS", least)
        leaf = prompts.vectors.clone().requires_grad_(True)
        logits = target_logits(backbone, examples, replace(prompts, vectors=leaf))
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
        (torch.log_softmax(logits, dim=-1) * weights).sum().backward()
        assert leaf.grad is not None
        found.append((logits.detach(), leaf.grad))
    return found


def assert_same(found: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    (logits, gradient), (plain_logits, plain_gradient) = found
    torch.testing.assert_close(logits, plain_logits, atol=1e-5, rtol=0)
    assert float((gradient - plain_gradient).norm()) <= 1e-5 * float(plain_gradient.norm())
    assert bool((plain_gradient.norm(dim=-1) > 0).all())


class Passes:
    """What a backbone's body reads, as (rows, tokens) of each forward pass, and how many positions its head does."""

    def __init__(self, backbone: Backbone) -> None:
        self.bodies: list[tuple[int, ...]] = []
        self.head_positions: list[int] = []
        head = backbone.model.get_output_embeddings()
        assert head is not None
        assert head is not backbone.model.get_input_embeddings()
        backbone.model.base_model.register_forward_pre_hook(self._body, with_kwargs=True)
        head.register_forward_pre_hook(self._head)

    def _body(self, _module: object, _inputs: object, named: dict[str, torch.Tensor]) -> None:
        self.bodies.append(tuple(named["inputs_embeds"].shape[:2]))

    def _head(self, _module: object, inputs: tuple[torch.Tensor, ...]) -> None:
        self.head_positions.append(inputs[0].shape[:-1].numel())


@pytest.mark.parametrize(("template", "is_shared"), SHARED)
@pytest.mark.parametrize("with_stop", [False, True])
def test_a_shared_prefix_equals_the_plain_run(
    backbone: Backbone, template: str, is_shared: bool, with_stop: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Invariant *Fast = slow*: a shared prefix (docs/decisions.md, decision 16) gives the same logits and gradients.

    For rows and targets of different lengths.
    """
    examples = bound(backbone, template).examples(RECORDS, with_stop=with_stop)
    prompts = learned(backbone, template).learned(backbone)
    batch = collate(examples, prompts)
    assert len({len(example.token_ids) for example in examples}) > 1
    assert max(batch.counts) > 1
    if backbone.kind == "causal" and is_shared:
        assert batch.shared_tokens >= 3
        assert shared_prefix_tokens(backbone, examples) == batch.shared_tokens
    assert_same(run_both_ways(backbone, examples, prompts, monkeypatch))


@pytest.mark.parametrize("family", CAUSAL)
def test_a_prefix_runs_once(family: str, backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shared prefix runs in one row (docs/decisions.md, decision 16), then the rest of all rows behind it.

    Of the prefix the head reads one position.
    """
    template = "The capital [P*2] of [X] is [Y]"
    assert backbone.shares_prefix
    examples, prompts = bound(backbone, template).examples(RECORDS), learned(backbone, template).learned(backbone)
    batch = collate(examples, prompts)
    rows, width = batch.token_ids.shape
    shared = batch.shared_tokens
    assert shared > 3
    passes = Passes(backbone)
    monkeypatch.setattr(model_module, "MIN_SAVED_TOKENS", (rows - 1) * shared)
    target_logits(backbone, examples, prompts)
    assert passes.bodies == [(1, shared), (rows, width - shared)]
    assert passes.head_positions == [1, len(batch.logit_rows)]
    passes.bodies.clear()
    monkeypatch.setattr(model_module, "MIN_SAVED_TOKENS", (rows - 1) * shared + 1)
    target_logits(backbone, examples, prompts)
    assert passes.bodies == [(rows, width)]


@pytest.mark.parametrize("family", CAUSAL)
def test_a_backbone_in_training_mode_runs_whole_rows(
    family: str, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own dropout is drawn for every row, in the prefix as well."""
    examples = bound(backbone, "The capital of [X] is [Y]").examples(RECORDS)
    assert backbone.shares_prefix
    passes = Passes(backbone)
    monkeypatch.setattr(model_module, "MIN_SAVED_TOKENS", 1)
    backbone.thaw(backbone.model.parameters())
    target_logits(backbone, examples, PromptBatch.none(backbone.width))
    assert passes.bodies == [(len(examples), max(len(example.token_ids) for example in examples))]


@pytest.mark.parametrize("family", CAUSAL)
def test_a_prefix_of_mixed_prompts(family: str, backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariants *Alone or in company* and *Fast = slow*: the text in front of all prompts is shared.

    Slots of different prompts never are, even if the prompts have the same template and length.
    """
    front = "The capital city of "
    patterns = [front + "[P*2] [X] is [Y]", front + "[P*2] [X] is [Y]", front + "[X] is [Y]"]
    prompts = [learned(backbone, pattern, seed=seed).learned(backbone) for seed, pattern in enumerate(patterns[:2])]
    examples = [
        bound(backbone, pattern).examples([record])[0]
        for pattern, record in zip([*patterns, patterns[0]], RECORDS, strict=False)
    ]
    mixed = PromptBatch.join([*prompts, PromptBatch.none(backbone.width)], rows=[0, 1, 2, 0])
    assert 3 <= collate(examples, mixed).shared_tokens <= examples[0].slot_positions[0]
    assert_same(run_both_ways(backbone, examples, mixed, monkeypatch))
    two = PromptBatch.join(prompts, rows=[0, 1])
    assert collate(examples[:1] * 2, two).shared_tokens == examples[0].slot_positions[0]
    assert_same(run_both_ways(backbone, examples[:1] * 2, two, monkeypatch))


@pytest.mark.parametrize("family", CAUSAL)
def test_scores_and_the_ceiling_share_prefixes(
    family: str, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What training is compared with does the same work, and development scores do not change."""
    template = "[P*6] [X] [P*2] [Y]"
    items, prompts = items_of(backbone, template, RECORDS * 3), learned(backbone, template).learned(backbone)
    passes = Passes(backbone)
    found = []
    for least in (1, NEVER):
        monkeypatch.setattr(model_module, "MIN_SAVED_TOKENS", least)
        found.append(evaluate(backbone, [items], prompts))
    assert found[0].hits == found[1].hits
    assert found[0].loss == pytest.approx(found[1].loss, abs=1e-5)
    passes.bodies.clear()
    monkeypatch.setattr(model_module, "MIN_SAVED_TOKENS", 1)
    assert measure_ceiling(backbone, items, batch_size=5, slots=8) > 0
    assert measure_ceiling(backbone, items[:5], batch_size=5, slots=8) > 0  # a single batch, not only warmed up
    assert [tokens for rows, tokens in passes.bodies if rows == 1] == [
        collate(inputs_of(items[:5]), prompts).shared_tokens
    ] * (4 + 2)


def test_a_shared_prefix_makes_batches_no_smaller(causal: Backbone) -> None:
    """A prefix counts once in what is read, and once per row in what is kept; both are bounded.

    Source: docs/decisions.md, decision 16.
    """
    examples = bound(causal, "[X] so [Y]").examples([{"x": "a " * (index % 30), "y": "yes"} for index in range(900)])
    for prefix in (0, 20, 200):
        long = [
            replace(
                example,
                token_ids=(*range(prefix), *example.token_ids),
                logit_positions=tuple(at + prefix for at in example.logit_positions),
            )
            for example in examples
        ]
        found = list(batches([[example] for example in long], prefix=prefix))
        assert sorted(index for chosen in found for index in chosen) == list(range(900))
        for chosen in found:
            width = max(len(long[index].token_ids) for index in chosen)
            assert prefix + (width - prefix) * len(chosen) <= MAX_BATCH_TOKENS
            assert width * len(chosen) <= (MAX_CACHED_TOKENS if prefix else MAX_BATCH_TOKENS)
            assert sum(len(long[index].logit_positions) for index in chosen) <= MAX_BATCH_POSITIONS
        if prefix:
            assert len(found) < len(list(batches([[example] for example in long])))
