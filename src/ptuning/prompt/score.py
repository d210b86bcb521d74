"""Scores of a prompt on records, with confidence intervals: exact match, accuracy, a task's metrics, and ranks."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor

from ptuning.backbone.backbone import Backbone
from ptuning.config import GenerationSettings
from ptuning.data.questions import Questions, as_questions
from ptuning.engine.batch import batches
from ptuning.engine.evaluate import Evaluation, evaluate
from ptuning.engine.forward import shared_prefix_tokens, target_logits
from ptuning.engine.objective import ScoringRequest, inputs_of, request_parts, target_requests, warn_truncated
from ptuning.engine.soft_prompt import PromptBatch
from ptuning.errors import PromptError, RecordError
from ptuning.files import Json
from ptuning.metrics import ACCURACY, Answer, Confusion, score_values
from ptuning.progress import OnProgress, Progress
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prediction import Candidate, Prediction
from ptuning.prompt.prompt import OnePrompt, Prompt, as_prompt
from ptuning.records import TARGET_FIELD, Record, Records, Rows, plain, references_of, require_targets, target_of
from ptuning.statistics import Score, score, summary
from ptuning.template.ambiguity import is_distinguishable
from ptuning.template.encode import TokenizedTemplate
from ptuning.template.labels import Normalise
from ptuning.template.segments import FILLS_MASKS

# Texts that are written together, and kept together if the work is stopped.
WRITTEN_ROWS = 32


def answer_records(
    model: PromptModel,
    prompt: Prompt,
    records: Rows | Questions,
    *,
    closed: Sequence[str] | None = None,
    single_token: bool = False,
    max_tokens: int | None = None,
    num_beams: int = 1,
    report: OnProgress | None = None,
) -> list[Answer]:
    """Answer N records, and rank each target among the possible answers. Written answers have no rank.

    If the prompt has label words or choices, these are the possible answers, and targets may be missing. Else they are
    ``closed``, or with ``single_token`` (all targets are one token each) all tokens, or any text of up to
    ``max_tokens``, written with ``num_beams`` beams.

    Source: Petroni et al. (2019), section 4 (ranking single tokens); Liu et al. (2021), section 4.1.
    """
    questions = as_questions(records)
    data = questions.records
    model = model.for_prompt(prompt)
    if prompt.answer_space.is_closed:
        ranked = model.classify(questions, prompt)
        return [among_candidates(row.right, found) for row, found in zip(questions, ranked, strict=True)]
    bound = prompt.bind(model.backbone, force=model.force)
    learned = prompt.learned(model.backbone)
    if single_token:
        return _among_tokens(model.backbone, bound, learned, data, closed=closed, report=report)
    if closed is not None:
        ranked = model.rank(data, prompt, closed)
        return [among_candidates(row.right, found) for row, found in zip(questions, ranked, strict=True)]
    settings = GenerationSettings(max_new_tokens=max_tokens, num_beams=num_beams)
    written = [one for part in generate_parts(model, data, prompt, settings=settings, report=report) for one in part]
    if not all(row.right for row in questions):  # read without targets
        return [Answer(one.text, False, log_prob=one.log_prob) for one in written]
    items = target_requests(bound, data, with_stop=False)
    found = evaluate(model.backbone, [items], learned, report=report, note=data.name)
    found = of_any_reference(model.backbone, bound, data, learned, found, written=[one.text for one in written])
    return [
        Answer(one.text, bool(hit), log_prob=one.log_prob, known=known)
        for one, hit, known in zip(written, found.hits, found.known, strict=True)
    ]


def check_generates(prompt: Prompt) -> None:
    """Raise a PromptError if a prompt chooses among labels or choices and writes nothing."""
    if prompt.answer_space.is_closed:
        raise PromptError(
            f"the prompt answers with {prompt.answer_space.described} and writes no texts; use predict for its answers"
        )


def generate_parts(
    model: PromptModel,
    records: Rows | Questions,
    prompt: OnePrompt,
    *,
    settings: GenerationSettings | None = None,
    done: int = 0,
    report: OnProgress | None = None,
) -> Iterator[list[Prediction]]:
    """Yield what a prompt writes for N records, :data:`WRITTEN_ROWS` at a time; the first ``done`` records are left
    out. A text does not depend on those beside it. A PromptError if the prompt writes no texts.
    """
    prompt, questions = as_prompt(prompt), as_questions(records)
    check_generates(prompt)
    for start in range(done, len(questions), WRITTEN_ROWS):
        part = Questions(questions[start : start + WRITTEN_ROWS], name=questions.name)
        yield model.predict(part, prompt, generation=settings)
        if report is not None:
            report(Progress("predict", start + len(part), len(questions), questions.name))


def of_any_reference(
    backbone: Backbone,
    bound: TokenizedTemplate,
    records: Records,
    learned: PromptBatch,
    found: Evaluation,
    *,
    written: Sequence[str] = (),
) -> Evaluation:
    """Return how targets that are written were scored, with a hit where any reference of a record would be written; the
    loss stays that of the first ones, which a prompt learns. ``written`` is what is written for each record, if that is
    known: references that do not begin like it, nor it like them, are then not scored.
    """
    # How many masks a masked model fills depends on the reference, so what it wrote elsewhere says nothing.
    texts = written if written and backbone.kind not in FILLS_MASKS else None
    others = [
        (at, {**record, TARGET_FIELD: text})
        for at, record in enumerate(records)
        if not found.hits[at]
        for text in references_of(record)[1:]
        if texts is None or _begin_alike(texts[at], text)
    ]
    if not others:
        return found
    rows = Records([record for _, record in others], name=records.name)
    scored = evaluate(backbone, [target_requests(bound, rows, with_stop=False)], learned)
    hit = {at for (at, _), one in zip(others, scored.hits, strict=True) if one}
    known = {at for (at, _), one in zip(others, scored.known, strict=True) if one}
    return replace(
        found,
        hits=tuple(1.0 if at in hit else one for at, one in enumerate(found.hits)),
        known=tuple(one or at in known for at, one in enumerate(found.known)),
    )


def _begin_alike(one: str, other: str) -> bool:
    """Whether one of two texts begins with the other, by their letters and digits: tokenizers may change the rest."""
    plain = (unicodedata.normalize("NFKD", text.casefold()) for text in (one, other))
    left, right = ("".join(filter(str.isalnum, text)) for text in plain)
    return left.startswith(right) or right.startswith(left)


def among_candidates(right: Collection[str], found: Sequence[Candidate]) -> Answer:
    """Return the answer among sorted candidates. On a tie the right one ranks last, and so it does beside one that the
    tokenizer does not tell from it; if none is right, or none of the right ones is known, the rank is 0.
    """
    others = [one for one in found if one.text.strip() not in right]
    answers = [one for one in found if one.text.strip() in right]
    own = next((one for one in answers if one.collisions is not None), None)
    # "Not lower" rather than "higher or equal": comparing with a NaN is never true.
    rank = 0 if own is None else 1 + sum(not one.log_prob < own.log_prob or _collide(one, own) for one in others)
    best = own if own is not None and rank == 1 else next(iter(others), found[0])
    known = not answers or any(is_distinguishable(one.collisions, right) for one in answers)
    return Answer(best.text.strip(), best is own, rank, best.log_prob, known=known)


def _collide(one: Candidate, other: Candidate) -> bool:
    return one.text.strip() in (other.collisions or ())


@torch.no_grad()
def _among_tokens(
    backbone: Backbone,
    bound: TokenizedTemplate,
    learned: PromptBatch,
    records: Records,
    *,
    closed: Sequence[str] | None,
    report: OnProgress | None,
) -> list[Answer]:
    """Rank each record's target among all tokens, or among those of the closed set. On a tie it ranks last."""
    items = target_requests(bound, records, with_stop=False)
    counts = {} if closed is None else _single_tokens(bound, records, closed)
    allowed = torch.tensor(list(counts)) if counts else torch.arange(backbone.vocabulary)  # (C,)
    allowed = allowed.to(backbone.device)
    answers: dict[int, Answer] = {}
    prefix = shared_prefix_tokens(backbone, inputs_of(items))
    for chosen in batches([item.inputs for item in items], prefix=prefix):
        group = [items[index] for index in chosen]
        logits = target_logits(backbone, inputs_of(group), learned)  # (N, V)
        log_probs = torch.log_softmax(logits, dim=-1)[:, allowed]  # (N, C)
        targets = [_only_token(item) for item in group]
        gold = torch.tensor(targets, device=allowed.device)  # (N,)
        is_known = torch.tensor([item.choices[0].known for item in group], device=allowed.device)  # (N,)
        shared = torch.tensor([counts.get(token, 1) - 1 for token in targets], device=allowed.device)  # (N,)
        is_gold = (allowed[None] == gold[:, None]) & is_known[:, None]  # (N, C)
        own = log_probs.masked_fill(~is_gold, -torch.inf).amax(dim=-1, keepdim=True)  # (N, 1)
        # "Not lower" rather than "higher or equal": comparing with a NaN is never true.
        ranks = is_gold.any(dim=-1) * (1 + (~(log_probs < own) & ~is_gold).sum(dim=-1) + shared)  # (N,)
        # A target that only shares the first place is not the answer.
        is_shared = is_gold & (ranks > 1)[:, None]  # (N, C)
        best, places = log_probs.masked_fill(is_shared, -torch.inf).max(dim=-1)  # (N,), (N,)
        tokens = allowed[places].tolist()
        known = (is_known & (shared == 0)).tolist()
        for index, rank, value, token, one in zip(chosen, ranks.tolist(), best.tolist(), tokens, known, strict=True):
            answers[index] = Answer(backbone.tokenizer.decode([token]).strip(), rank == 1, rank, value, known=one)
        if report is not None:
            report(Progress("dev", len(answers), len(items), records.name))
    return [answers[index] for index in range(len(items))]


def _only_token(item: ScoringRequest) -> int:
    ids = item.choices[0].target_ids
    if len(ids) != 1:
        raise RecordError(f"a target takes {len(ids)} tokens, and only targets of one token can be ranked among tokens")
    return ids[0]


def token_ids_of(bound: TokenizedTemplate, records: Records, texts: Sequence[str]) -> Tensor:
    """Return the token ids of the texts that are one token in a template filled from the first record, (C,) int64, each
    once. Text that the tokenizer does not know is none. A RecordError if there are none.
    """
    return torch.tensor(list(_single_tokens(bound, records, texts)), dtype=torch.int64)


def _single_tokens(bound: TokenizedTemplate, records: Records, texts: Sequence[str]) -> dict[int, int]:
    """Return the number of different texts for each token of :func:`token_ids_of`."""
    different = list(dict.fromkeys(texts))
    examples = bound.examples([records[0]] * len(different), targets=different, source="answer")
    ids = Counter(example.target_ids[0] for example in examples if example.own_tokens == 1 and example.known)
    if not ids:
        raise RecordError(f"none of the {len(texts)} possible answers, such as '{texts[0]}', is one token of the model")
    return dict(ids)


# References for each record above which a text is written first, to see which of them can be hits.
# Source: docs/decisions.md, decision 74.
MANY_REFERENCES = 3


@dataclass(frozen=True)
class Result:
    """Scores of a prompt on some records.

    ``scores`` has ``exact_match``, or ``accuracy`` with label words or choices, and a task's own metrics; with
    candidates also ``accuracy``, ``p_at_10`` and ``mrr`` among them. ``loss`` is the negative log-likelihood in nats
    per target token, or per record with label words or choices. ``hits`` are 1.0 or 0.0 per record, for the first
    score. ``missing`` counts the records whose target is not a candidate; they are misses.

    ``rows`` has the answers, one of :func:`prediction_rows` per record: always those of labels and choices, others
    where they were asked for. ``confusion`` is that of labels. Metrics for texts may have ``signatures``: what must be
    equal for two scores to be compared.
    """

    scores: Mapping[str, Score]
    loss: float
    hits: tuple[float, ...]
    missing: int = 0
    rows: Sequence[Mapping[str, Json]] = ()
    confusion: Confusion | None = None
    signatures: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Json]:
        """Return the scores as ``eval --json`` prints them."""
        found: dict[str, Json] = {
            "scores": {name: found.to_json() for name, found in self.scores.items()},
            "loss": self.loss,
            "targets_not_among_candidates": self.missing,
        }
        if self.signatures:
            found["signatures"] = dict(self.signatures)
        if self.confusion is not None:
            found["labels"] = {label: dict(vars(one)) for label, one in self.confusion.scores.items()}
            found["confusion"] = [list(row) for row in self.confusion.counts]
        return found

    def worst(self, most: int) -> list[int]:
        """Return the places of at most so many misses among the rows: those that are surest of a wrong answer first."""
        misses = [at for at, row in enumerate(self.rows) if not row["hit"]]
        return sorted(misses, key=lambda at: -cast("float", self.rows[at]["log_prob"]))[:most]


def score_prompt(
    model: PromptModel,
    data: Rows | Questions,
    prompt: OnePrompt,
    *,
    candidates: Sequence[str] | None = None,
    normalise: Normalise | None = None,
    calibrate: bool | None = None,
    count_stop: bool = False,
    with_rows: bool = False,
    report: OnProgress | None = None,
) -> Result:
    """Score a prompt on records with targets, or on questions of a task.

    Exact match: greedy decoding would write the target's tokens. What it would write after them does not count, since
    a manual prompt never learned to stop. A masked model gets as many masks as the target has tokens. Of several
    references any is right.

    ``candidates`` are a closed set of answers to rank as well; on a tie the target ranks last. ``normalise``,
    ``calibrate`` and ``count_stop`` are as in :meth:`PromptModel.predict`. ``with_rows`` asks for the answers even if
    they must be written. A RecordError if there are no records, or one lacks its target; a ConfigError if candidates
    are given to a prompt with label words or choices.
    """
    prompt = as_prompt(prompt)
    if candidates is not None:
        prompt.check_open()
    if count_stop:
        prompt.check_stop_counts(candidates=candidates is not None)
    questions = as_questions(data)
    if not questions:
        raise RecordError(f"{questions.name} holds no records, so there is nothing to score")
    answers = prompt.answer_space.scored(normalise=normalise, calibrate=calibrate, candidates=candidates is not None)
    require_targets(questions.records)
    model = model.for_prompt(prompt)
    bound = prompt.bind(model.backbone, force=model.force)
    parts = warn_truncated(request_parts(bound, questions, answers), questions.name, bound.max_length)
    learned, total = prompt.learned(model.backbone), len(questions)
    found = evaluate(model.backbone, parts, learned, total=total, report=report, note=questions.name)
    records, said = questions.records, guessed(prompt, questions, found)
    own = prompt.task.answer_metrics if prompt.task is not None else ()
    if not said and (own or (with_rows and candidates is None)):
        said = model.predict(records, prompt)
    if not answers.is_closed:
        written = said or (model.predict(records, prompt) if _have_many_references(records) else [])
        texts = [one.text for one in written]
        found = of_any_reference(model.backbone, bound, records, learned, found, written=texts)
    scores = {answers.score_name: score(found.hits), **_metrics(questions, own, said, found)}
    rows = prediction_rows(records, said, found.hits) if said else []
    ranked: list[Answer] = []
    if candidates is not None:
        ranked = _rank(model, records, prompt, candidates, normalise=normalise, count_stop=count_stop)
        values = score_values(ranked)
        names = ("mrr", "p_at_10") if len(candidates) > 10 else ("mrr",)
        scores |= {ACCURACY: summary([values["p_at_1"]]), **{name: summary([values[name]]) for name in names}}
        rows = [_answered(record, one) for record, one in zip(records, ranked, strict=True)]
    targets, given = ([str(row[name]) for row in rows] for name in ("target", "prediction"))
    confusion = Confusion.of(answers.labels, targets, given) if answers.labels else None
    missing = sum(answer.rank == 0 for answer in ranked)
    return Result(scores, found.loss, found.hits, missing=missing, rows=rows, confusion=confusion)


def _have_many_references(records: Records) -> bool:
    """Whether writing a text for each record takes less than scoring all of its references."""
    return sum(len(references_of(record)) for record in records) > MANY_REFERENCES * len(records)


def _metrics(
    questions: Questions, names: Sequence[str], said: Sequence[Prediction], found: Evaluation
) -> dict[str, Score]:
    if not names:
        return {}
    rows = zip(said, found.hits, found.known, strict=True)
    answers = [Answer(one.text, bool(hit), known=known) for one, hit, known in rows]
    values = score_values(answers, questions, names)
    return {name: summary([values[name]]) for name in names}


def _rank(
    model: PromptModel,
    records: Records,
    prompt: Prompt,
    candidates: Sequence[str],
    *,
    normalise: Normalise | None,
    count_stop: bool,
) -> list[Answer]:
    ranked = model.rank(records, prompt, candidates, normalise=normalise, count_stop=count_stop)
    pairs = zip(records, ranked, strict=True)
    return [among_candidates([text.strip() for text in references_of(row)], found) for row, found in pairs]


def guessed(prompt: Prompt, questions: Questions, found: Evaluation) -> list[Prediction]:
    """Return the likeliest labels or choices, which scoring has found already; an empty list for written answers."""
    if not found.guesses:
        return []
    predictions = []
    for question, guess, log_probs in zip(questions, found.guesses, found.log_probs, strict=True):
        ranked = list(map(Candidate, prompt.answer_space.names(question), log_probs))
        best = ranked.pop(guess)
        ranked.sort(key=lambda one: -one.log_prob)
        predictions.append(Prediction.of_classes([best, *ranked]))
    return predictions


def prediction_rows(data: Records, predictions: Sequence[Prediction], hits: Sequence[float]) -> list[dict[str, Json]]:
    """Return one row per record for ``predictions.jsonl``; labels and choices have ``probabilities``."""
    return [
        {
            "record": plain(record),
            "target": target_of(record),
            "prediction": found.text,
            "hit": bool(hit),
            "log_prob": found.log_prob,
            **({} if found.probabilities is None else {"probabilities": dict(found.probabilities)}),
        }
        for record, found, hit in zip(data, predictions, hits, strict=True)
    ]


def _answered(record: Record, answer: Answer) -> dict[str, Json]:
    """Return the row of an answer that was ranked."""
    found: dict[str, Json] = {"record": plain(record), "target": target_of(record), "prediction": answer.text}
    return {**found, "hit": answer.hit, "log_prob": answer.log_prob, "rank": answer.rank}
