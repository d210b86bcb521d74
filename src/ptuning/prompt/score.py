"""Scores of a prompt on records, with confidence intervals: exact match, accuracy, a task's metrics, and ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ptuning.data.questions import Questions, as_questions
from ptuning.engine.evaluate import Evaluation, evaluate
from ptuning.engine.objective import question_items
from ptuning.errors import RecordError
from ptuning.files import Json
from ptuning.metrics import ACCURACY, Answer, score_values
from ptuning.progress import OnProgress
from ptuning.prompt.answer import among_candidates
from ptuning.prompt.predict import Candidate, Prediction, PromptModel
from ptuning.prompt.prompt import OnePrompt, Prompt, as_prompt
from ptuning.records import TARGET_FIELD, Records, Rows, require_targets
from ptuning.statistics import Score, score, summary
from ptuning.template.labels import Normalise


@dataclass(frozen=True)
class Result:
    """Scores of a prompt on some records.

    ``scores`` has ``exact_match``, or ``accuracy`` with label words or choices, and a task's own metrics; with
    candidates also ``accuracy``, ``p_at_10`` and ``mrr`` among them. ``loss`` is the negative log-likelihood in nats
    per target token, or per record with label words or choices. ``hits`` are 1.0 or 0.0 per record, for the first
    score. ``missing`` counts the records whose target is not a candidate; they are misses.
    """

    scores: Mapping[str, Score]
    loss: float
    hits: tuple[float, ...]
    missing: int = 0

    def to_json(self) -> dict[str, Json]:
        """Return the scores as ``eval --json`` prints them."""
        return {
            "scores": {name: found.to_json() for name, found in self.scores.items()},
            "loss": self.loss,
            "targets_not_among_candidates": self.missing,
        }


def score_prompt(
    model: PromptModel,
    data: Rows | Questions,
    prompt: OnePrompt,
    *,
    candidates: Sequence[str] | None = None,
    normalise: Normalise | None = None,
    calibrate: bool | None = None,
    count_stop: bool = False,
    report: OnProgress | None = None,
) -> Result:
    """Score a prompt on records with targets, or on questions of a task.

    Exact match: greedy decoding would write the target's tokens. What it would write after them does not count, since
    a manual prompt never learned to stop. A masked model gets as many masks as the target has tokens.

    ``candidates`` are a closed set of answers to rank as well; on a tie the target ranks last. ``normalise``,
    ``calibrate`` and ``count_stop`` are as in :meth:`PromptModel.predict`. A RecordError if there are no records, or
    one lacks its target; a ConfigError if candidates are given to a prompt with label words or choices.
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
    items = question_items(prompt.bind(model.backbone, force=model.force), questions, answers)
    found = evaluate(model.backbone, items, prompt.learned(model.backbone), report=report, note=questions.name)
    scores = {answers.score_name: score(found.hits), **_metrics(model, questions, prompt, found)}
    ranked: list[Answer] = []
    if candidates is not None:
        ranked = _rank(model, questions.records, prompt, candidates, normalise=normalise, count_stop=count_stop)
        values = score_values(ranked)
        names = ("mrr", "p_at_10") if len(candidates) > 10 else ("mrr",)
        scores |= {ACCURACY: summary([values["p_at_1"]]), **{name: summary([values[name]]) for name in names}}
    return Result(scores, found.loss, found.hits, missing=sum(answer.rank == 0 for answer in ranked))


def _metrics(model: PromptModel, questions: Questions, prompt: Prompt, found: Evaluation) -> dict[str, Score]:
    if prompt.task is None:
        return {}
    said = guessed(prompt, questions, found) or model.predict(questions.records, prompt)
    rows = zip(said, found.hits, found.known, strict=True)
    answers = [Answer(one.text, bool(hit), known=known) for one, hit, known in rows]
    values = score_values(answers, questions, prompt.task.metrics)
    return {name: summary([values[name]]) for name in prompt.task.metrics}


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
    return [among_candidates((row[TARGET_FIELD].strip(),), found) for row, found in zip(records, ranked, strict=True)]


def guessed(prompt: Prompt, questions: Questions, found: Evaluation) -> list[Prediction]:
    """Return the likeliest labels or choices, which scoring has found already; an empty list for written answers."""
    if not found.guesses:
        return []
    names = map(prompt.answer_space.names, questions)
    best = [
        Candidate(listed[guess], log_prob)
        for listed, guess, log_prob in zip(names, found.guesses, found.log_probs, strict=True)
    ]
    return [Prediction(one.text, (one,)) for one in best]


def prediction_rows(data: Records, predictions: Sequence[Prediction], hits: Sequence[float]) -> list[dict[str, Json]]:
    """Return one row per record for ``predictions.jsonl``."""
    return [
        {
            "record": dict(record),
            "target": record.get(TARGET_FIELD),
            "prediction": found.text,
            "hit": bool(hit),
            "log_prob": found.log_prob,
        }
        for record, found, hit in zip(data, predictions, hits, strict=True)
    ]
