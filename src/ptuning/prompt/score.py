"""Scores of a prompt on records, with confidence intervals: exact match, accuracy, a task's metrics, and ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

from ptuning.data.questions import Questions, as_questions
from ptuning.engine.evaluate import Evaluation, evaluate_parts
from ptuning.engine.objective import item_parts
from ptuning.engine.shortened import noticed
from ptuning.errors import RecordError
from ptuning.files import Json
from ptuning.metrics import ACCURACY, Answer, Confusion, score_values
from ptuning.progress import OnProgress
from ptuning.prompt.answer import among_candidates, of_any_reference
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prediction import Candidate, Prediction
from ptuning.prompt.prompt import OnePrompt, Prompt, as_prompt
from ptuning.records import Record, Records, Rows, plain, references_of, require_targets, target_of
from ptuning.statistics import Score, score, summary
from ptuning.template.labels import Normalise

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
    parts = noticed(item_parts(bound, questions, answers), questions.name, bound.max_length)
    learned, total = prompt.learned(model.backbone), len(questions)
    found = evaluate_parts(model.backbone, parts, learned, total=total, report=report, note=questions.name)
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
