"""Losses as (sum, count), scores of targets, candidates, label words and choices, and the truncation report."""

import functools
import itertools
import logging
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from ptuning.data.answer_space import AnswerSpace
from ptuning.data.questions import Question, Questions
from ptuning.errors import RecordError, TemplateError
from ptuning.records import TARGET_FIELD, Record, Records
from ptuning.template.ambiguity import check_fields, check_targets, collisions_of, is_distinguishable, warn
from ptuning.template.encode import Example, TokenizedTemplate, TooLongError
from ptuning.template.labels import Normalise
from ptuning.template.segments import FILLS_MASKS, Ids

logger = logging.getLogger(__name__)

# Weight of the stop token in the loss; each token of the target weighs 1. It is learned easily, and with full weight it
# takes half of the loss from one-token targets and costs hits (docs/decisions.md, decision 13).
STOP_WEIGHT = 0.2
# A longer target is a text and no name. It has many tokens besides its end, which then weighs as each of them.
NAME_TOKENS = 8
# Texts of questions that are filled in and scored together: what bounds the memory.
TEXTS_AT_ONCE = 2048


def stop_weight(own_tokens: int, *, named: bool = False) -> float:
    """Return the weight of the stop token after a target of N tokens: :data:`STOP_WEIGHT` after a name, and that much
    more with each token from :data:`NAME_TOKENS` on, up to 1. An end that the template ``named`` weighs 1: a chat model
    that does not write it goes on to speak for the user.

    >>> [round(stop_weight(tokens), 1) for tokens in (1, 9, 10, 12, 13, 40)]
    [0.2, 0.2, 0.4, 0.8, 1.0, 1.0]
    """
    return 1.0 if named else min(1.0, STOP_WEIGHT * max(1, own_tokens - NAME_TOKENS))


@dataclass(frozen=True)
class Continuation:
    """A text to score after an input: its ``own_tokens`` ids, and then perhaps the stop token. ``known`` says whether
    the tokenizer knows it, and ``named_end`` whether the template names what it ends with.
    """

    input: int
    target_ids: Ids
    own_tokens: int
    known: bool = True
    named_end: bool = False


@dataclass(frozen=True)
class ScoringRequest:
    """One record ready to be scored: its different ``inputs``, and how ``normalise`` treats choices of several tokens.

    Args:
        choices: The texts to score: the target alone, or every candidate, label word or choice of the row.
        classes: Class of each choice: its label, for label words; otherwise each choice is a class of its own.
        answers: The right classes (one, for label words); empty without classes.
        empty: For calibration: the same choices, scored after inputs made from an empty record.
    """

    inputs: tuple[Example, ...]
    choices: tuple[Continuation, ...]
    classes: Ids = ()
    answers: Ids = ()
    empty: tuple[Continuation, ...] = ()
    normalise: Normalise = "sum"

    @property
    def tokens(self) -> int:
        """Number of tokens that the model reads for it."""
        return sum(len(example.token_ids) for example in self.inputs)

    @functools.cached_property
    def collisions(self) -> list[frozenset[int] | None]:
        """The collisions of each class (:func:`~ptuning.template.ambiguity.collisions_of`)."""
        scored = [
            (self.inputs[choice.input].token_ids, choice.target_ids) if choice.known else None
            for choice in self.choices
        ]
        return collisions_of(scored, self.classes or range(len(scored)))

    @functools.cached_property
    def distinguishable(self) -> frozenset[int]:
        """The classes that are right, or the target alone, as far as the tokenizer tells them from wrong ones."""
        right = self.answers or (0,)
        return frozenset(answer for answer in right if is_distinguishable(self.collisions[answer], right))


def inputs_of(items: Iterable[ScoringRequest]) -> list[Example]:
    """Return the rows of requests, one request after the other."""
    return [example for item in items for example in item.inputs]


def share_inputs(examples: Sequence[Example]) -> tuple[tuple[Example, ...], tuple[Continuation, ...]]:
    """Turn examples of one record into their different inputs, and one choice per example.
    Candidates that differ in their last token only (for a masked model: of the same length) share an input.
    """
    inputs: dict[tuple[Ids, Ids, Ids], int] = {}
    kept: list[Example] = []
    choices = []
    for example in examples:
        key = (example.token_ids, example.slot_positions, example.logit_positions)
        if key not in inputs:
            inputs[key] = len(kept)
            kept.append(example)
        choices.append(_continuation(example, inputs[key]))
    return tuple(kept), tuple(choices)


def _continuation(example: Example, place: int = 0) -> Continuation:
    return Continuation(place, example.target_ids, example.own_tokens, example.known, example.named_end)


def target_requests(
    bound: TokenizedTemplate, records: Records, *, with_stop: bool, cut: bool = False
) -> list[ScoringRequest]:
    """Return one request per record, with its target as the only choice. Warns about targets that the tokenizer does
    not know, and raises a RecordError if there are hardly any others. With ``cut``, targets that do not fit are
    truncated, without a stop token, and a warning is logged.
    """
    shorter = _truncated_targets(bound, records, with_stop=with_stop) if cut else {}
    rows = [shorter.get(index, record) for index, record in enumerate(records)]
    examples = bound.examples(rows, with_stop=with_stop, source=f"{records.name}, record")
    items = [ScoringRequest((example,), (_continuation(example),)) for example in examples]
    for index in shorter if bound.kind not in FILLS_MASKS else ():
        items[index] = truncate_target(items[index], max(1, items[index].choices[0].own_tokens - 1))
    _check_known(bound, records, [bool(item.distinguishable) for item in items], is_choice=False)
    return items


def _truncated_targets(bound: TokenizedTemplate, records: Records, *, with_stop: bool) -> dict[int, Record]:
    """Return index -> record with a truncated target, of those whose target does not fit, even with truncated fields:
    half of what the model reads is left of it.
    """
    most, encode = bound.max_length // 2, bound.tokenizer.encode
    long = [index for index, record in enumerate(records) if len(record.get(TARGET_FIELD, "").encode()) > most]
    truncated: dict[int, Record] = {}
    for index, ids in zip(long, encode([records[index][TARGET_FIELD] for index in long]), strict=True):
        if len(ids) <= most:
            continue
        try:
            bound.examples([records[index]], with_stop=with_stop)
        except TooLongError:
            target = records[index][TARGET_FIELD]
            end = bisect_right(range(len(target)), most, key=lambda at: len(encode([target[: at + 1]])[0]))
            truncated[index] = {**records[index], TARGET_FIELD: target[: max(1, end)]}
        except (TemplateError, RecordError):
            continue  # raised again with its place when all records are filled in
    if truncated:
        logger.warning(
            "%d of %d targets of %s do not fit into the %d tokens that the model reads: of these only the beginning is "
            "read, %d tokens",
            len(truncated), len(records), records.name, bound.max_length, most,
        )  # fmt: skip
    return truncated


def _check_known(bound: TokenizedTemplate, records: Records, known: Sequence[bool], *, is_choice: bool) -> None:
    warn(check_targets(known, records, is_choice=is_choice))
    warn(check_fields(bound.tokenizer, records, bound.template.fields))


def build_requests(
    bound: TokenizedTemplate,
    questions: Questions,
    answers: AnswerSpace,
    *,
    with_stop: bool = False,
    labelled: bool = True,
    cut: bool = False,
) -> list[ScoringRequest]:
    """Return one request per question: with every text of a closed answer space a choice, else with the target alone.

    A generated target gets a stop token ``with_stop``, and is ``cut`` as in :func:`target_requests`. Requests of a
    closed space have their right classes if ``labelled``. Raises RecordError if a question cannot be answered, or its
    target is not an answer; LabelWordError if the tokenizer does not know a label's word, or not from that of another;
    warns and raises as :func:`target_requests`.
    """
    parts = request_parts(bound, questions, answers, with_stop=with_stop, labelled=labelled, cut=cut)
    return [item for part in parts for item in part]


def request_parts(
    bound: TokenizedTemplate,
    questions: Questions,
    answers: AnswerSpace,
    *,
    with_stop: bool = False,
    labelled: bool = True,
    cut: bool = False,
) -> Iterator[list[ScoringRequest]]:
    """Yield the requests of :func:`build_requests` in parts, each built on demand, so that the labels or choices of a
    few questions are in memory at a time. Warnings about all records are logged before the last part.
    """
    if not answers.is_closed:
        yield target_requests(bound, questions.records, with_stop=with_stop, cut=cut)
        return
    answers.check(questions, labelled=labelled)
    source, known = f"{questions.name}, record", list[bool]()
    # Parts of about TEXTS_AT_ONCE texts.
    texts = list(itertools.accumulate(len(answers.texts(question)) for question in questions))
    groups = itertools.groupby(range(len(questions)), key=lambda index: (texts[index] - 1) // TEXTS_AT_ONCE)
    for indices in (list(group) for _, group in groups):
        part = range(indices[0], indices[-1] + 1)
        own = questions[part.start : part.stop]
        items = _closed_requests(bound, own, answers, source=source, first=part.start + 1, labelled=labelled)
        if labelled:
            known += [bool(item.distinguishable) for item in items]
            if part.stop == len(questions):
                is_choice = any(answers.right(question) for question in questions)
                _check_known(bound, questions.records, known, is_choice=is_choice)
        yield items
        del items  # while the next part is made


def _closed_requests(
    bound: TokenizedTemplate,
    questions: Sequence[Question],
    answers: AnswerSpace,
    *,
    source: str,
    first: int,
    labelled: bool,
) -> list[ScoringRequest]:
    if answers.head:
        return _head_requests(bound, questions, answers, source=source, labelled=labelled)
    scoring, texts = answers.scoring, [answers.texts(question) for question in questions]
    filled = bound.answers([question.record for question in questions], texts, source=source, first=first)
    if answers.words is not None and filled:
        answers.words.check_known(filled[0])
    items = []
    empty: dict[tuple[object, ...], list[Example]] = {}
    for question, listed, own in zip(questions, texts, filled, strict=True):
        without: list[Example] = []
        if scoring.calibrate:
            bare = scoring.empty_record({name: question.record[name] for name in bound.template.fields})
            key = (*bare.items(), *enumerate(listed))
            without = empty[key] if key in empty else bound.answers([bare], [listed])[0]
            empty[key] = without
        inputs, choices = share_inputs([*own, *without])
        items.append(
            ScoringRequest(
                inputs,
                choices[: len(own)],
                answers.classes(question),
                answers.right(question) if labelled else (),
                choices[len(own) :],
                scoring.normalise,
            )
        )
    return items


def _head_requests(
    bound: TokenizedTemplate, questions: Sequence[Question], answers: AnswerSpace, *, source: str, labelled: bool
) -> list[ScoringRequest]:
    """Return requests whose classes are the outputs of a classification head, which reads the hidden state that
    predicts the first token of the target.
    """
    choices = tuple(Continuation(0, (label,), 1) for label in range(len(answers.labels)))
    filled = bound.contexts([question.record for question in questions], source=source)
    rows = (replace(example, logit_positions=example.logit_positions[:1]) for example in filled)
    return [
        ScoringRequest((row,), choices, tuple(range(len(choices))), answers.right(question) if labelled else ())
        for row, question in zip(rows, questions, strict=True)
    ]


def truncate_target(item: ScoringRequest, most: int) -> ScoringRequest:
    """Return a request whose target has at most ``most`` tokens, for training; a truncated one has no stop token. For
    generative models, where nothing comes after the target.
    """
    (example,), (choice,) = item.inputs, item.choices
    if choice.own_tokens <= most:
        return item
    first = example.logit_positions[0]
    shorter = replace(
        example,
        token_ids=example.token_ids[: first + most],
        logit_positions=example.logit_positions[:most],
        target_ids=example.target_ids[:most],
        own_tokens=most,
    )
    return replace(item, inputs=(shorter,), choices=(_continuation(shorter),))


def candidate_request(examples: Sequence[Example]) -> ScoringRequest:
    """Return the request that scores each example's target as a candidate."""
    inputs, choices = share_inputs(examples)
    return ScoringRequest(inputs, choices)


@dataclass(frozen=True)
class ContinuationScores:
    """Log-probabilities of the choices of several items, C choices and M scored tokens in all.

    Args:
        log_probs: (C,) float32, differentiable; total log-probability of each choice's own ``lengths`` tokens.
        all_log_probs: (C,) float32; the same, including the stop token if it is scored.
        correct: (C,) bool; whether every own token is the most likely one given those before it (exact match).
        token_count: Number of scored tokens; a stop token counts :func:`stop_weight`.
        more_stop: By how much the stop token of each choice weighs more than :data:`STOP_WEIGHT`; empty if none does.
        per_item: Number of choices of each item; those of an empty record, if any, come last.
    """

    log_probs: Tensor
    all_log_probs: Tensor
    correct: Tensor
    lengths: Tensor
    token_count: float
    per_item: tuple[int, ...]
    more_stop: tuple[float, ...] = ()

    @property
    def means(self) -> Tensor:
        """(C,) float32; the mean log-probability of each choice's own tokens."""
        return self.log_probs / self.lengths


def score_continuations(items: Sequence[ScoringRequest], logits: Tensor) -> ContinuationScores:
    """Score the choices of requests from the (N, V) float32 logits at the scored positions of their inputs."""
    rows: list[int] = []
    ids: list[int] = []
    choice_of: list[int] = []
    own: list[bool] = []
    start = number = 0
    for item in items:
        starts = []
        for example in item.inputs:
            starts.append(start)
            start += len(example.logit_positions)
        for choice in (*item.choices, *item.empty):
            count = len(choice.target_ids)
            rows += range(starts[choice.input], starts[choice.input] + count)
            ids += choice.target_ids
            choice_of += [number] * count
            own += [index < choice.own_tokens for index in range(count)]
            number += 1
    scored = [choice for item in items for choice in (*item.choices, *item.empty)]
    device = logits.device
    at, token, owner = (torch.tensor(values, dtype=torch.int64, device=device) for values in (rows, ids, choice_of))
    is_own = torch.tensor(own, dtype=torch.bool, device=device)  # (M,)
    token_log_probs = logits[at, token] - torch.logsumexp(logits, dim=-1)[at]  # (M,)
    missed = (logits.argmax(dim=-1)[at] != token) & is_own  # (M,)
    zeros = torch.zeros(number, dtype=torch.float32, device=device)
    return ContinuationScores(
        log_probs=zeros.index_add(0, owner, token_log_probs * is_own),
        all_log_probs=zeros.index_add(0, owner, token_log_probs),
        correct=zeros.index_add(0, owner, missed.float()) == 0,
        lengths=zeros.index_add(0, owner, is_own.float()),
        token_count=_token_count(scored),
        per_item=tuple(len(item.choices) + len(item.empty) for item in items),
        more_stop=_more_stop(scored),
    )


def score_parts(parts: Sequence[Sequence[ScoringRequest]], logits: Tensor) -> list[ContinuationScores]:
    """Return the scores of several lists of requests, computed from all logits at once."""
    whole = score_continuations([item for part in parts for item in part], logits)
    choices = [[choice for item in part for choice in (*item.choices, *item.empty)] for part in parts]
    sizes = [len(own) for own in choices]
    columns = (each.split(sizes) for each in (whole.log_probs, whole.all_log_probs, whole.correct, whole.lengths))
    per_item = (tuple(len(item.choices) + len(item.empty) for item in part) for part in parts)
    return [
        ContinuationScores(log_probs, all_log_probs, correct, lengths, _token_count(scored), counts, _more_stop(scored))
        for log_probs, all_log_probs, correct, lengths, scored, counts in zip(*columns, choices, per_item, strict=True)
    ]


def _token_count(choices: Sequence[Continuation]) -> float:
    """Return the number of scored tokens of choices, with each stop token as it weighs."""
    own = sum(choice.own_tokens for choice in choices)
    stops = [len(choice.target_ids) - choice.own_tokens for choice in choices]
    more = sum(weight * stop for weight, stop in zip(_more_stop(choices), stops, strict=False))
    return own + STOP_WEIGHT * sum(stops) + more


def _more_stop(choices: Sequence[Continuation]) -> tuple[float, ...]:
    """Return by how much the stop token of each choice weighs more than that of a name; nothing if all are names."""
    more = tuple(stop_weight(choice.own_tokens, named=choice.named_end) - STOP_WEIGHT for choice in choices)
    return more if any(more) else ()


def class_scores(items: Sequence[ScoringRequest], scored: ContinuationScores) -> Tensor:
    """Return one score per item and class: the log of the mean probability of the class's words.

    With calibration, each word's probability is divided by its probability after an empty record. Returns (I, K)
    unnormalised log-probabilities of I items; minus infinity where an item lacks a class.
    Source: Zhao et al. (2021), arXiv:2102.09690, section 5, for the calibration (in its diagonal form).
    """
    totals, means = scored.log_probs.split(scored.per_item), scored.means.split(scored.per_item)
    parts = []
    for item, total, mean in zip(items, totals, means, strict=True):
        values, own = mean if item.normalise == "mean" else total, len(item.choices)
        parts.append(values[:own] - values[own:] if item.empty else values)
    scores = pad_sequence(parts, batch_first=True, padding_value=-torch.inf)[:, None]  # (I, 1, C)
    width = scores.shape[-1]
    of_choice = torch.tensor(
        [[*item.classes, *[-1] * (width - len(item.classes))] for item in items], device=scores.device
    )  # (I, C)
    members = torch.arange(int(of_choice.max()) + 1, device=scores.device)[:, None] == of_choice[:, None]  # (I, K, C)
    masked = scores.masked_fill(~members, -torch.inf)  # (I, K, C)
    return torch.logsumexp(masked, dim=-1) - members.sum(dim=-1).clamp(min=1).log()  # (I, K)


def loss(items: Sequence[ScoringRequest], scored: ContinuationScores) -> tuple[Tensor, float]:
    """Return the loss of items as (sum, count). Divide once, by the count of the whole optimizer step.

    Without classes: the negative log-likelihood of the target, counted in tokens; the stop token weighs
    :func:`stop_weight`. With classes: minus the log of the right classes' total probability, counted in items.
    Source: Liu et al. (2021), section 3.1 (the downstream loss); Schick and Schuetze (2021), equation 1, for classes.
    """
    if not items[0].answers:
        own, everything = scored.log_probs.sum(), scored.all_log_probs.sum()
        total = -own - STOP_WEIGHT * (everything - own)
        if scored.more_stop:
            more = torch.tensor(scored.more_stop, device=total.device)  # (C,)
            total = total - (more * (scored.all_log_probs - scored.log_probs)).sum()
        return total, scored.token_count
    scores = class_scores(items, scored)  # (I, K)
    if all(len(item.answers) == 1 for item in items):
        gold = torch.tensor([item.answers[0] for item in items], device=scores.device)  # (I,)
        return functional.cross_entropy(scores, gold, reduction="sum"), len(items)
    is_right = torch.zeros_like(scores, dtype=torch.bool)  # (I, K)
    for row, item in enumerate(items):
        is_right[row, list(item.answers)] = True
    right = torch.log_softmax(scores, dim=-1).masked_fill(~is_right, -torch.inf)  # (I, K)
    return -torch.logsumexp(right, dim=-1).sum(), len(items)


def loss_count(items: Sequence[ScoringRequest]) -> float:
    """Return the count that :func:`loss` will return for requests, without running them."""
    if not items[0].answers:
        return _token_count([choice for item in items for choice in item.choices])
    return len(items)


def hits(items: Sequence[ScoringRequest], scored: ContinuationScores) -> list[float]:
    """Return 1.0 for each item answered correctly: greedy decoding would write the target, or its class is right.
    Targets that the tokenizer does not know or tell apart are never a hit (:attr:`ScoringRequest.distinguishable`).
    """
    if not items[0].answers:
        return [
            float(hit and bool(item.distinguishable)) for hit, item in zip(scored.correct.tolist(), items, strict=True)
        ]
    guesses = class_scores(items, scored).argmax(dim=-1).tolist()
    return [float(guess in item.distinguishable) for guess, item in zip(guesses, items, strict=True)]


def warn_truncated(parts: Iterable[list[ScoringRequest]], name: str, max_length: int) -> Iterator[list[ScoringRequest]]:
    """Yield requests, and log at the end what of them was truncated to ``max_length`` tokens, once for each data."""
    cut, turns, rows = 0, list[int](), 0
    for part in parts:
        for request in part:
            rows += 1
            cut += any(example.shortened and not example.turns_left_out for example in request.inputs)
            turns.append(max(example.turns_left_out for example in request.inputs))
        yield part
        del part  # while the next one is made
    _warn_truncated(cut, rows, sum(map(bool, turns)), sum(turns), name, max_length)


@functools.lru_cache(maxsize=1024)
def _warn_truncated(cut: int, rows: int, answers: int, turns: int, name: str, max_length: int) -> None:
    if cut:
        text = "%d of %d rows of %s are longer than %d tokens (max_length, or what the model reads); fields were cut"
        logger.warning(text, cut, rows, name, max_length)
    if turns:
        text = "too much is said in front of %d answers of %s: the oldest turns are left out, %d in all"
        logger.warning(text, answers, name, turns)
