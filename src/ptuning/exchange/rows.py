"""What an export is compared on: rows with our log-probabilities of targets, and another program's beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ptuning.backbone.backbone import Backbone
from ptuning.data.questions import Questions, as_questions
from ptuning.engine.forward import target_logits
from ptuning.errors import ExchangeError
from ptuning.prompt.prompt import Prompt
from ptuning.records import TARGET_FIELD, Record, Records, Rows
from ptuning.template.encode import Example, TokenizedTemplate
from ptuning.template.segments import Ids

# So many records are run: each row alone, in both programs.
COMPARED_RECORDS = 64
# The largest difference per token of a target that is rounding: in float32, and where a head has 8 bits of a number.
EXACT, ROUGH = 1e-3, 0.15

# What another program answers to a row: its logits at the positions that score the target, (N, V).
Reader = Callable[[Example], Tensor]


@dataclass(frozen=True)
class ScoredRow:
    """A filled row with its target, and the log-probability that we give to the target."""

    record: Record
    example: Example
    log_prob: float

    @property
    def input_ids(self) -> Ids:
        """The ids up to the target, with placeholders at the slots."""
        return self.example.token_ids[: self.example.logit_positions[0] + 1]


@dataclass(frozen=True, eq=False)
class Source:
    """What is exported: a prompt with its backbone, its bound template, and the rows that it is compared on; ``data``
    is what these are called. ``least_likely`` is the token that is least likely in all of their targets' places.
    """

    prompt: Prompt
    backbone: Backbone
    bound: TokenizedTemplate
    rows: Sequence[ScoredRow]
    records: int
    data: str
    least_likely: int

    @property
    def vectors(self) -> Tensor:
        """The slot vectors, (P, E) float32 on the CPU."""
        assert self.prompt.slot_vectors is not None
        return self.prompt.slot_vectors

    @property
    def rounding(self) -> float:
        """The largest difference per token that is rounding in the backbone's number format."""
        return EXACT if self.backbone.dtype == torch.float32 else ROUGH


@dataclass(frozen=True)
class Comparison:
    """How far another program's log-probabilities are from ours. ``within`` leaves out what it gives to rows of its
    table that are no tokens of ours, and ``beyond`` is the largest probability of these.
    """

    largest: float
    within: float
    beyond: float
    first: float


def made_record(prompt: Prompt) -> Records:
    """Return a record made from the template, where no other is at hand: its fields hold their names."""
    words = prompt.label_words
    target = next(iter(words.labels)) if words is not None else "answer"
    return Records([{**{name: name for name in prompt.template.fields}, TARGET_FIELD: target}], name="the template")


@torch.no_grad()
def source_of(prompt: Prompt, backbone: Backbone, data: Rows | Questions) -> Source:
    """Fill and score the rows of an export. Labels and choices are rows of their own.
    An ExchangeError if the model does not read from left to right.
    """
    bound = prompt.bind(backbone)
    if bound.kind != "causal":
        raise ExchangeError(
            f"'{backbone.name}' is a model of the kind {bound.kind}; prompts of causal models can be exported, which "
            "vLLM, llama.cpp and PEFT read from left to right"
        )
    everything = as_questions(data)
    questions = Questions(everything[:COMPARED_RECORDS])
    pairs = _filled(prompt, bound, questions)
    learned = prompt.learned(backbone).to(backbone.device)
    rows, likeliest = [], torch.full((backbone.vocabulary,), -torch.inf, device=backbone.device)  # (V,)
    for record, example in pairs:
        found = torch.log_softmax(target_logits(backbone, [example], learned), dim=-1)  # (N, V)
        rows.append(ScoredRow(record, example, log_prob_of(found, example.target_ids)))
        likeliest = torch.maximum(likeliest, found.amax(dim=0))
    return Source(prompt, backbone, bound, rows, len(questions), everything.name, int(likeliest.argmin()))


def _filled(prompt: Prompt, bound: TokenizedTemplate, questions: Questions) -> list[tuple[Record, Example]]:
    answers, records = prompt.answer_space, questions.records
    if not answers.is_closed:
        return list(zip(records, bound.examples(records), strict=True))
    texts = [answers.texts(question) for question in questions]
    answers.check(questions, labelled=False)
    filled = bound.answers(records, texts)
    return [(record, example) for record, own in zip(records, filled, strict=True) for example in own]


def log_prob_of(logits: Tensor, target_ids: Sequence[int]) -> float:
    """Return the log-probability of a target by the logits that score it, (N, V)."""
    found = torch.log_softmax(logits.float(), dim=-1)
    ids = torch.tensor(target_ids, device=found.device)
    return float(found[torch.arange(len(ids), device=found.device), ids].sum())


@torch.no_grad()
def compare(source: Source, reader: Reader, *, at_most: float) -> Comparison:
    """Run every row in another program, beside ours. An ExchangeError if they differ by more than ``at_most`` per token
    of a target.
    """
    largest = within = beyond = 0.0
    first = None
    own = source.backbone.vocabulary
    for row in source.rows:
        logits = reader(row.example).float()  # (N, V)
        theirs = log_prob_of(logits, row.example.target_ids)
        first = theirs if first is None else first
        inside = abs(log_prob_of(logits[:, :own], row.example.target_ids) - row.log_prob) / len(row.example.target_ids)
        if not inside <= at_most:  # also if it is NaN
            raise ExchangeError(
                f"read back, the export gives {theirs:.4f} to the target of {dict(row.record)}, and the prompt "
                f"{row.log_prob:.4f}; that is more than rounding, so it is not written"
            )
        largest, within = max(largest, abs(theirs - row.log_prob)), max(within, inside)
        if logits.shape[1] > own:
            beyond = max(beyond, float(torch.softmax(logits, dim=-1)[:, own:].sum(dim=-1).max()))
    assert first is not None
    return Comparison(largest, within, beyond, first)


def spoken(example: Example, slot_ids: Sequence[int]) -> list[int]:
    """Return the ids of a row with token ids at its slots."""
    ids = list(example.token_ids)
    for position, token in zip(example.slot_positions, slot_ids, strict=True):
        ids[position] = token
    return ids


def text_difference(
    source: Source, slot_texts: Sequence[str], slot_ids: Sequence[int], encode: Callable[[str], Sequence[int]]
) -> str | None:
    """Return how ids of a filled template written as text differ from ours; None if they are the same in all rows.
    Rows that were truncated are left out: their text was cut.
    """
    for row in source.rows:
        if row.example.shortened:
            continue
        text = with_slots(source.bound.texts(row.record), slot_texts)
        found, wanted = list(encode(text)), spoken(row.example, slot_ids)[: len(row.input_ids)]
        if found != wanted:
            return f"the text {text!r} has the ids {found}, and the template {wanted}"
    return None


def with_slots(texts: Sequence[str], slot_texts: Sequence[str]) -> str:
    """Join P + 1 texts with P texts for slots between them."""
    return "".join(text + slot for text, slot in zip(texts, [*slot_texts, ""], strict=True))


def template_text(source: Source, slot_texts: Sequence[str]) -> str:
    """Return the template up to the target as text, with its fields in braces."""
    fields: Mapping[str, str] = {name: f"{{{name}}}" for name in source.prompt.template.fields}
    return with_slots(source.bound.texts(fields), slot_texts)
