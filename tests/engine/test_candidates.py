"""Candidates scored in rows of several: the invariant *Fast = slow* (docs/invariants.md), and what a pass may hold."""

from collections.abc import Sequence

import pytest
import torch

import ptuning.engine.batch
from ptuning.backbone.backbone import Backbone
from ptuning.engine.candidates import tree_batch, tree_rows
from ptuning.engine.forward import target_logits
from ptuning.engine.objective import candidate_request
from ptuning.engine.prefix_store import PreparedPrompt
from ptuning.engine.runner import Runner, Scoring
from ptuning.engine.soft_prompt import PromptBatch
from ptuning.template.encode import Example
from tests.conftest import RECORDS, bound, learned

TEMPLATE = "The capital of [P*3] [X] is [P] [Y]"
# Of one and several tokens, some beginning like others, one that begins another.
NAMES = ["yes", "no", "Nairobi", "São Tomé", "São", "a good film and a bad one", "a good film", "a bad one", "25"]


def examples_of(backbone: Backbone, template: str, *, with_stop: bool = False) -> list[list[Example]]:
    fill = bound(backbone, template)
    return [fill.examples([record] * len(NAMES), targets=NAMES, with_stop=with_stop) for record in RECORDS]


def candidate_log_probs(
    backbone: Backbone, examples: Sequence[Sequence[Example]], brought: PromptBatch
) -> list[list[float]]:
    prompt = PreparedPrompt(brought)
    works = [Scoring.of(candidate_request(own), prompt, NAMES, own) for own in examples]
    Runner(backbone).complete(works)
    return [work.log_probs for work in works]


@torch.no_grad()
def one_by_one(backbone: Backbone, examples: Sequence[Sequence[Example]], brought: PromptBatch) -> list[list[float]]:
    """Return the log-probability of each target from a pass of its own."""

    def alone(example: Example) -> float:
        logits = target_logits(backbone, [example], brought).log_softmax(dim=-1)
        return sum(float(logits[at, token]) for at, token in enumerate(example.target_ids))

    return [[alone(example) for example in own] for own in examples]


@pytest.mark.parametrize(
    ("template", "with_stop"),
    [(TEMPLATE, False), (TEMPLATE, True), ("[X] [P] {x} is [Y]", True), ("[P] [Y]", False), ("[X] is[P][Y]", True),
     ('[X] ("[Y]', False)],
)  # fmt: skip
def test_trees_of_candidates_equal_one_pass_each(
    backbone: Backbone, template: str, with_stop: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many passes a record's candidates take, whatever they share, and with records of different length."""
    examples = examples_of(backbone, template, with_stop=with_stop)[:3]
    brought = learned(backbone, template).learned(backbone) if "[P" in template else PromptBatch.none(backbone.width)
    expected = one_by_one(backbone, examples, brought)
    for positions in (256, 12, 1):
        monkeypatch.setattr(ptuning.engine.batch, "MAX_BATCH_POSITIONS", positions)
        with torch.no_grad():
            found = candidate_log_probs(backbone, examples, brought)
        for own, other in zip(found, expected, strict=True):
            assert own == pytest.approx(other, abs=1e-4), positions
    assert backbone.branches == (backbone.kind == "causal")


def test_what_candidates_share_is_read_once(causal: Backbone) -> None:
    """The context is in the row once, and each beginning of several candidates as well."""
    examples = examples_of(causal, TEMPLATE)[1]
    (tree,) = tree_rows(examples, PreparedPrompt(PromptBatch.none(causal.width)))
    row = tree.row
    context = min(example.logit_positions[0] for example in examples) + 1
    beginnings = {
        example.token_ids[context:length]
        for example in examples
        for length in range(context + 1, len(example.token_ids) + 1)
    }
    assert len(tree.parents) == len(beginnings) > 3
    assert len(row.example.token_ids) == context + len(beginnings)
    assert len(row.example.logit_positions) == len({*beginnings, ()})
    assert sorted(place for place, _, _ in tree.candidates) == list(range(len(NAMES)))


def test_a_token_reads_its_context_and_what_leads_to_it(causal: Backbone) -> None:
    """And nothing of another candidate; its position is that of a row of its own."""
    examples = examples_of(causal, TEMPLATE)[1]
    trees = tree_rows(examples, PreparedPrompt(learned(causal, TEMPLATE).learned(causal)))
    batch, _ = tree_batch(trees)
    seen = set()
    for column in range(len(trees[0].row.example.token_ids)):
        read = batch.mask[0, 0, column].nonzero().flatten().tolist()
        assert batch.positions[0, read].tolist() == list(range(len(read)))
        seen.add(tuple(batch.token_ids[0, read].tolist()))
    whole = {example.token_ids[:length] for example in examples for length in range(1, len(example.token_ids) + 1)}
    assert seen == whole


def test_the_context_of_a_record_that_fills_several_passes_runs_once(
    causal: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = examples_of(causal, TEMPLATE)[:2]
    brought = learned(causal, TEMPLATE).learned(causal)
    assert causal.branches
    monkeypatch.setattr(ptuning.engine.batch, "MAX_BATCH_POSITIONS", 10)
    read: list[int] = []
    causal.model.base_model.register_forward_pre_hook(
        lambda _module, _inputs, named: read.append(named["inputs_embeds"].shape[1]), with_kwargs=True
    )
    with torch.no_grad():
        candidate_log_probs(causal, examples, brought)
    contexts = [min(example.logit_positions[0] for example in own) for own in examples]
    assert [length for length in read if length in contexts] == contexts
    assert len(read) >= 6
    assert max(set(read) - set(contexts)) <= 10  # the last token of the context, and tokens with asked logits


def test_candidates_that_cannot_branch_run_in_rows_of_their_own(
    causal: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same scores, for a model that cannot hold several continuations in a row."""
    examples, brought = examples_of(causal, TEMPLATE), learned(causal, TEMPLATE).learned(causal)
    with torch.no_grad():
        found = candidate_log_probs(causal, examples, brought)
        monkeypatch.setattr(causal, "branches", False)
        plain = candidate_log_probs(causal, examples, brought)
    for own, other in zip(found, plain, strict=True):
        assert own == pytest.approx(other, abs=1e-4)
