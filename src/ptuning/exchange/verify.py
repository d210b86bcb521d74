"""Verification of an export: the rows it is compared on, with our log-probabilities of their targets and another
program's.
"""

from collections.abc import Callable, Sequence
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

# Number of records that are compared: each row runs alone, in both programs.
COMPARED_RECORDS = 64
# Largest difference per token of a target that is rounding: in float32, and where a head has 8 bits of a number.
EXACT, ROUGH = 1e-3, 0.15

# Runs a row in another program: returns its logits at the positions that score the target, (N, V).
Reader = Callable[[Example], Tensor]


@dataclass(frozen=True)
class ScoredRow:
    """An encoded row with its target, and the log-probability that the prompt gives to the target."""

    record: Record
    example: Example
    log_prob: float


@dataclass(frozen=True, eq=False)
class ExportSource:
    """A prompt with its backbone, its tokenized template and the rows that it is compared on.

    ``records`` is their number, ``data`` their name; ``least_likely`` is the token that is least likely in all places
    of their targets.
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

    def template_text(self, slot_texts: Sequence[str]) -> str:
        """Return the template up to the target as text, with its fields in braces."""
        return with_slots(self.bound.texts({name: f"{{{name}}}" for name in self.prompt.template.fields}), slot_texts)


@dataclass(frozen=True)
class Comparison:
    """Largest differences between another program's log-probabilities and ours.

    ``largest`` is that of a target; ``within`` that of a token if rows of the table that are no tokens of ours are left
    out, and ``beyond`` the largest probability of those. ``first`` is the log-probability of the first row's target.
    """

    largest: float
    within: float
    beyond: float
    first: float


def made_record(prompt: Prompt) -> Records:
    """Return a record made from the template, where there is no other: its fields hold their names."""
    words = prompt.label_words
    target = next(iter(words.labels)) if words is not None else "answer"
    return Records([{**{name: name for name in prompt.template.fields}, TARGET_FIELD: target}], name="the template")


@torch.no_grad()
def source_of(prompt: Prompt, backbone: Backbone, data: Rows | Questions) -> ExportSource:
    """Encode and score the rows of an export. Labels and choices are rows of their own.
    Raises ExchangeError if the model is not causal.
    """
    bound = prompt.bind(backbone)
    if bound.kind != "causal":
        raise ExchangeError(f"'{backbone.name}' is a model of the kind {bound.kind}; only causal models are exported")
    everything = as_questions(data)
    questions = Questions(everything[:COMPARED_RECORDS])
    answers, records = prompt.answer_space, questions.records
    if answers.is_closed:
        answers.check(questions, labelled=False)
        encoded = bound.answers(records, [answers.texts(question) for question in questions])
        pairs = [(record, example) for record, own in zip(records, encoded, strict=True) for example in own]
    else:
        pairs = list(zip(records, bound.examples(records), strict=True))
    learned = prompt.learned(backbone).to(backbone.device)
    rows, likeliest = [], torch.full((backbone.vocabulary,), -torch.inf, device=backbone.device)  # (V,)
    for record, example in pairs:
        log_probs = torch.log_softmax(target_logits(backbone, [example], learned), dim=-1)  # (N, V)
        rows.append(ScoredRow(record, example, log_prob_of(log_probs, example.target_ids)))
        likeliest = torch.maximum(likeliest, log_probs.amax(dim=0))
    return ExportSource(prompt, backbone, bound, rows, len(questions), everything.name, int(likeliest.argmin()))


def log_prob_of(logits: Tensor, target_ids: Sequence[int]) -> float:
    """Return the log-probability of a target by the logits that score it, (N, V)."""
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    ids = torch.tensor(target_ids, device=log_probs.device)
    return float(log_probs[torch.arange(len(ids), device=log_probs.device), ids].sum())


@torch.no_grad()
def compare(source: ExportSource, read: Reader, *, max_difference: float | None) -> Comparison:
    """Run every row in another program. Raises ExchangeError if a target's log-probability differs by more than
    ``max_difference`` per token; by default, by more than rounding in the backbone's number format.
    """
    allowed = max_difference or (EXACT if source.backbone.dtype == torch.float32 else ROUGH)
    largest = within = beyond = 0.0
    first = None
    own = source.backbone.vocabulary
    for row in source.rows:
        logits, target = read(row.example).float(), row.example.target_ids  # (N, V)
        theirs = log_prob_of(logits, target)
        first = theirs if first is None else first
        inside = abs(log_prob_of(logits[:, :own], target) - row.log_prob) / len(target)
        if not inside <= allowed:  # also if it is NaN
            raise ExchangeError(
                f"read back, the export gives {theirs:.4f} to the target of {dict(row.record)}, and the prompt "
                f"{row.log_prob:.4f}; that is more than rounding, so it is not written"
            )
        largest, within = max(largest, abs(theirs - row.log_prob)), max(within, inside)
        if logits.shape[1] > own:
            beyond = max(beyond, float(torch.softmax(logits, dim=-1)[:, own:].sum(dim=-1).max()))
    assert first is not None
    return Comparison(largest, within, beyond, first)


def as_token_ids(example: Example, slot_ids: Sequence[int]) -> list[int]:
    """Return the ids of a row with token ids at its slots."""
    ids = list(example.token_ids)
    for position, token in zip(example.slot_positions, slot_ids, strict=True):
        ids[position] = token
    return ids


def text_difference(
    source: ExportSource, slot_texts: Sequence[str], slot_ids: Sequence[int], encode: Callable[[str], Sequence[int]]
) -> str | None:
    """Return how the filled template, tokenized as text, differs from our ids; None if it is the same in all rows.
    Truncated rows are left out.
    """
    for row in source.rows:
        if row.example.shortened:
            continue
        text = with_slots(source.bound.texts(row.record), slot_texts)
        theirs, ours = list(encode(text)), as_token_ids(row.example, slot_ids)[: row.example.logit_positions[0] + 1]
        if theirs != ours:
            return f"the text {text!r} has the ids {theirs}, and the template {ours}"
    return None


def with_slots(texts: Sequence[str], slot_texts: Sequence[str]) -> str:
    """Join P + 1 texts with P texts for slots between them."""
    return "".join(text + slot for text, slot in zip(texts, [*slot_texts, ""], strict=True))
