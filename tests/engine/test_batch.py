"""Collating: rows are whole before they are padded, and pads are known to mask and positions only."""

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from ptuning.backbone.tokenizer import TextTokenizer
from ptuning.engine.batch import Side, collate, cut_by_length, shared_tokens
from ptuning.engine.soft_prompt import PromptBatch
from ptuning.errors import PromptError
from ptuning.template.encode import Example, TokenizedTemplate
from ptuning.template.language import Template


def example(ids: list[int], *, slots: tuple[int, ...] = (), logits: tuple[int, ...] = (0,)) -> Example:
    return Example(tuple(ids), slots, logits, tuple(range(len(logits))), len(logits))


def each(*slots: int) -> PromptBatch:
    """Return what rows bring that each have a prompt of their own, of so many slots."""
    return PromptBatch(torch.zeros(sum(slots), 1), slots, tuple(range(len(slots))))


SHORT = example([5, 0, 7], slots=(1,), logits=(2,))
LONG = example([1, 0, 0, 4, 0], slots=(1, 2, 4), logits=(3, 4))
SIDES = pytest.mark.parametrize("side", ["left", "right"])


@pytest.mark.parametrize(
    ("side", "ids", "mask", "positions", "slot_cols", "logit_cols"),
    [
        ("right", [5, 0, 7, 0, 0], [1, 1, 1, 0, 0], [0, 1, 2, 0, 0], [1, 1, 2, 4], [2, 3, 4]),
        ("left", [0, 0, 5, 0, 7], [0, 0, 1, 1, 1], [0, 0, 0, 1, 2], [3, 1, 2, 4], [4, 3, 4]),
    ],
)
def test_a_batch_padded_on_either_side(
    side: Side,
    ids: list[int],
    mask: list[int],
    positions: list[int],
    slot_cols: list[int],
    logit_cols: list[int],
) -> None:
    """Positions count from each row's first token, wherever the pads are."""
    batch = collate([SHORT, LONG], each(1, 3), pad_side=side)
    assert batch.token_ids.tolist() == [ids, [1, 0, 0, 4, 0]]
    assert batch.mask.tolist() == [mask, [1, 1, 1, 1, 1]]
    assert batch.positions.tolist() == [positions, [0, 1, 2, 3, 4]]
    assert batch.slot_rows.tolist() == [0, 1, 1, 1]
    assert batch.slot_cols.tolist() == slot_cols
    assert batch.slot_index.tolist() == [0, 1, 2, 3]
    assert batch.logit_rows.tolist() == [0, 1, 1]
    assert batch.logit_cols.tolist() == logit_cols
    assert batch.counts == (1, 2)
    assert batch.tokens == 8
    assert {value.dtype for value in vars(batch).values() if isinstance(value, torch.Tensor)} == {torch.int64}


def test_rows_of_several_prompts_take_their_own_part_of_the_table() -> None:
    """Each row names its prompt: one batch may mix prompts of different lengths, and rows with none."""
    bare = example([3, 4])
    prompts = PromptBatch(torch.zeros(7, 1), slots=(1, 3, 3, 0), rows=(1, 3, 0, 2))
    batch = collate([LONG, bare, SHORT, LONG], prompts)
    assert batch.slot_rows.tolist() == [0, 0, 0, 2, 3, 3, 3]
    assert batch.slot_index.tolist() == [1, 2, 3, 0, 4, 5, 6]
    empty = collate([bare], PromptBatch.none(1))
    assert empty.slot_rows.tolist() == empty.slot_index.tolist() == []


@st.composite
def rows(draw: st.DrawFn) -> list[Example]:
    made = []
    for _ in range(draw(st.integers(1, 5))):
        ids = draw(st.lists(st.integers(0, 3), min_size=1, max_size=8))
        places = st.sets(st.integers(0, len(ids) - 1))
        made.append(example(ids, slots=tuple(sorted(draw(places))), logits=tuple(sorted(draw(places) | {0}))))
    return made


@SIDES
@pytest.mark.parametrize("family", ["gpt2", "bert", "roberta"])
def test_a_pad_is_no_token_id(side: Side, family: str, raw_tokenizer: Callable[[str], PreTrainedTokenizerFast]) -> None:
    """Text with the pad, unknown or end token in it keeps mask 1 there, as do slots, whose id is that of a pad.

    A mask made by comparing ids loses such text, since many tokenizers pad with their end or unknown token.
    """
    raw = raw_tokenizer(family)
    tokenizer = TextTokenizer(raw, max_tokens=64)
    special = (raw.pad_token or raw.eos_token).replace("[", "[[")
    bound = TokenizedTemplate(
        Template.parse(f"{{x}} {special} [P*2] is [Y]"),
        tokenizer=tokenizer,
        kind="causal" if family == "gpt2" else "masked",
    )
    examples = bound.examples([{"x": "東京", "y": "a"}, {"x": "The capital of Kenya is Nairobi, and so on", "y": "a"}])
    batch = collate(examples, each(2, 2), pad_side=side)
    pad = raw.convert_tokens_to_ids(raw.pad_token or raw.eos_token)
    assert all(pad in row.token_ids for row in examples)
    if family == "bert":
        assert raw.unk_token_id in examples[0].token_ids
    assert batch.mask.sum(dim=1).tolist() == [len(row.token_ids) for row in examples]
    assert bool(batch.mask[batch.slot_rows, batch.slot_cols].all())


@pytest.mark.parametrize("vectors", [0, 2, 4])
def test_a_row_with_another_number_of_slots_than_its_prompt_is_refused(vectors: int) -> None:
    """A row with more or fewer slots than its prompt has vectors is an error, never cut or filled up."""
    with pytest.raises(PromptError, match=f"row 1 has 3 slots, and its prompt has {vectors} vectors"):
        collate([SHORT, LONG], each(1, vectors))


QUESTION = example([1, 0, 0, 4, 6], slots=(1, 2), logits=(4,))


@pytest.mark.parametrize(
    ("other", "shared"),
    [
        (example([1, 0, 0, 4, 7, 8], slots=(1, 2), logits=(5,)), 4),
        (example([1, 0, 0, 4, 6, 8], slots=(1, 2), logits=(5,)), 4),  # the first row's scored position is its own
        (example([1, 0, 0, 4, 6], slots=(1, 2), logits=(2, 3, 4)), 2),  # nothing scored is shared
        (example([1, 0, 0, 5, 6], slots=(1, 2), logits=(4,)), 3),
        (example([1, 0, 0, 4, 6], slots=(1, 3), logits=(4,)), 2),  # token 0 is no slot
        (example([1, 0, 0, 4], slots=(1, 2), logits=(3,)), 3),
        (example([2, 0, 0, 4, 6], slots=(1, 2), logits=(4,)), 0),
        (example([1], logits=(0,)), 0),
        (QUESTION, 4),
    ],
)
def test_what_rows_share_at_their_front(other: Example, shared: int) -> None:
    """A shared prefix (docs/decisions.md, decision 16) is what all rows begin with, in whatever order the rows are.

    The same tokens and slots, before the first scored position of every row.
    """
    for rows in ([QUESTION, other], [other, QUESTION], [QUESTION, other, QUESTION]):
        one_or_none = PromptBatch(
            torch.zeros(2, 1), slots=(2, 0), rows=tuple(int(not row.slot_positions) for row in rows)
        )
        assert shared_tokens(rows) == shared
        assert collate(rows, one_or_none).shared_tokens == shared


@settings(max_examples=100, deadline=None)
@given(examples=rows(), owners=st.lists(st.integers(0, 1), min_size=5, max_size=5))
def test_shared_columns_are_equal_and_the_next_one_is_not(examples: list[Example], owners: list[int]) -> None:
    """Against a slow look at the batch: every column before the bound is the same in all rows, the bound's is not."""
    wanted = [(len(row.slot_positions), owner) for row, owner in zip(examples, owners, strict=False)]
    prompts = sorted(set(wanted))  # of each number of slots one or two
    counts = tuple(count for count, _ in prompts)
    batch = collate(examples, PromptBatch(torch.zeros(sum(counts), 1), counts, tuple(map(prompts.index, wanted))))
    slots = {
        (int(row), int(column)): int(index)
        for row, column, index in zip(batch.slot_rows, batch.slot_cols, batch.slot_index, strict=True)
    }

    def column(at: int) -> set[object]:
        every = range(len(examples))
        return {("slot", slots[row, at]) if (row, at) in slots else int(batch.token_ids[row, at]) for row in every}

    first = min(min(row.logit_positions) for row in examples)
    assert batch.shared_tokens <= first
    assert all(len(column(at)) == 1 for at in range(batch.shared_tokens))
    assert batch.shared_tokens == first or len(column(batch.shared_tokens)) > 1


def cost(passes: list[list[int]], lengths: list[int], pass_tokens: int) -> int:
    return sum(len(one) * max(lengths[at] for at in one) + pass_tokens for one in passes)


@given(st.lists(st.integers(1, 40), max_size=7), st.integers(0, 60))
def test_rows_are_cut_where_that_costs_least(lengths: list[int], pass_tokens: int) -> None:
    """Each row is in one pass, and no other cut of the rows in their order has fewer pads and passes together."""
    found = cut_by_length(lengths, pass_tokens=pass_tokens)
    assert sorted(at for one in found for at in one) == list(range(len(lengths)))
    order = sorted(range(len(lengths)), key=lambda at: lengths[at])
    for choice in itertools.product((False, True), repeat=max(0, len(lengths) - 1)):
        starts = [0, *(at for at, begins in enumerate(choice, start=1) if begins)]
        other = [order[start:end] for start, end in zip(starts, [*starts[1:], None], strict=True)]
        assert not lengths or cost(found, lengths, pass_tokens) <= cost(other, lengths, pass_tokens)
