"""Scores of a prompt on records, with confidence intervals: exact match, accuracy, a task's metrics, ranks, and metrics
of generated texts.
"""

import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor

from ptuning.backbone.backbone import Backbone
from ptuning.config import GenerationSettings
from ptuning.data.answer_space import AnswerSpace
from ptuning.data.questions import Questions, as_questions
from ptuning.engine.batch import batches
from ptuning.engine.evaluate import Evaluation, evaluate
from ptuning.engine.forward import shared_prefix_tokens, target_logits
from ptuning.engine.objective import ScoringRequest, inputs_of, request_parts, target_requests, warn_truncated
from ptuning.engine.prefix_store import PreparedPrompt
from ptuning.engine.runner import generate
from ptuning.engine.soft_prompt import PromptBatch
from ptuning.errors import PromptError, RecordError
from ptuning.files import Json, sha256
from ptuning.metrics import ACCURACY, Answer, Confusion, score_values
from ptuning.metrics.generation import check_metrics, metrics_of, score_texts, value_of_texts
from ptuning.progress import OnProgress, Progress
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prediction import Candidate, Prediction
from ptuning.prompt.prompt import OnePrompt, Prompt, as_prompt
from ptuning.prompt.rows import Answering
from ptuning.records import TARGET_FIELD, Records, Rows, plain, references_of, require_targets, target_of
from ptuning.statistics import Score, score, summary
from ptuning.template.ambiguity import is_distinguishable
from ptuning.template.encode import TokenizedTemplate
from ptuning.template.labels import Normalise
from ptuning.template.segments import FILLS_MASKS

# Texts that are generated together, and kept together if the work is stopped.
WRITTEN_ROWS = 32
# Mean number of references per record above which a text is generated first, to see which of them can be hits.
# Source: docs/decisions.md, decision 74.
MANY_REFERENCES = 3


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
    """Answer N records, and rank each target among the possible answers. Generated answers have no rank.

    If the prompt has label words or choices, these are the possible answers, and targets may be missing. Else they are
    ``closed``, or with ``single_token`` (all targets are one token each) all tokens, or any text of up to
    ``max_tokens``, generated with ``num_beams`` beams.

    Source: Petroni et al. (2019), section 4 (ranking single tokens); Liu et al. (2021), section 4.1.
    """
    questions = as_questions(records)
    data = questions.records
    model = model.for_prompt(prompt)
    if prompt.answer_space.is_closed:
        ranked = model.classify(questions, prompt)
        return [among_candidates(row.right, candidates) for row, candidates in zip(questions, ranked, strict=True)]
    bound = prompt.bind(model.backbone, force=model.force)
    learned = prompt.learned(model.backbone)
    if single_token:
        return _among_tokens(model.backbone, bound, learned, data, closed=closed, report=report)
    if closed is not None:
        ranked = model.rank(data, prompt, closed)
        return [among_candidates(row.right, candidates) for row, candidates in zip(questions, ranked, strict=True)]
    settings = GenerationSettings(max_new_tokens=max_tokens, num_beams=num_beams)
    parts = generate_parts(model, data, prompt, settings=settings, report=report)
    predictions = [prediction for part in parts for prediction in part]
    if not all(row.right for row in questions):  # read without targets
        return [Answer(prediction.text, False, log_prob=prediction.log_prob) for prediction in predictions]
    items, texts = target_requests(bound, data, with_stop=False), [prediction.text for prediction in predictions]
    evaluation = evaluate(model.backbone, [items], learned, report=report, note=data.name)
    evaluation = of_any_reference(model.backbone, bound, data, learned, evaluation, written=texts)
    return [
        Answer(prediction.text, bool(hit), log_prob=prediction.log_prob, known=known)
        for prediction, hit, known in zip(predictions, evaluation.hits, evaluation.known, strict=True)
    ]


def check_generates(prompt: Prompt) -> None:
    """Raise a PromptError if a prompt chooses among labels or choices, and generates nothing."""
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
    """Yield the predictions of a prompt for N records, :data:`WRITTEN_ROWS` at a time, without the first ``done``
    records. A text does not depend on the others. A PromptError if the prompt generates no texts.
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
    evaluation: Evaluation,
    *,
    written: Sequence[str] = (),
) -> Evaluation:
    """Return an evaluation of targets with a hit where any reference of a record would be generated; the loss stays
    that of the first ones, which a prompt learns. ``written`` are the generated texts, if they are known: references
    that do not begin like them, nor they like them, are then not scored.
    """
    # The number of masks that a masked model fills depends on the reference, so its other texts say nothing.
    texts = written if written and backbone.kind not in FILLS_MASKS else None
    others = [
        (at, {**record, TARGET_FIELD: text})
        for at, record in enumerate(records)
        if not evaluation.hits[at]
        for text in references_of(record)[1:]
        if texts is None or _begin_alike(texts[at], text)
    ]
    if not others:
        return evaluation
    rows = Records([record for _, record in others], name=records.name)
    scored = evaluate(backbone, [target_requests(bound, rows, with_stop=False)], learned)
    hit = {at for (at, _), value in zip(others, scored.hits, strict=True) if value}
    known = {at for (at, _), value in zip(others, scored.known, strict=True) if value}
    return replace(
        evaluation,
        hits=tuple(1.0 if at in hit else value for at, value in enumerate(evaluation.hits)),
        known=tuple(value or at in known for at, value in enumerate(evaluation.known)),
    )


def _begin_alike(*texts: str) -> bool:
    """Whether one of two texts begins with the other, by their letters and digits: tokenizers may change the rest."""
    plain = (unicodedata.normalize("NFKD", text.casefold()) for text in texts)
    left, right = ("".join(filter(str.isalnum, text)) for text in plain)
    return left.startswith(right) or right.startswith(left)


def among_candidates(right: Collection[str], candidates: Sequence[Candidate]) -> Answer:
    """Return the answer among sorted candidates. On a tie the right one ranks last, also against one that the tokenizer
    does not distinguish from it; if none is right, or none of the right ones is known, the rank is 0.
    """
    others = [candidate for candidate in candidates if candidate.text.strip() not in right]
    answers = [candidate for candidate in candidates if candidate.text.strip() in right]
    own = next((candidate for candidate in answers if candidate.collisions is not None), None)
    rank = 0
    if own is not None:
        rank = 1 + sum(
            # "Not lower" rather than "higher or equal": comparing with a NaN is never true.
            not other.log_prob < own.log_prob or own.text.strip() in (other.collisions or ())
            for other in others
        )
    best = own if own is not None and rank == 1 else next(iter(others), candidates[0])
    known = not answers or any(is_distinguishable(candidate.collisions, right) for candidate in answers)
    return Answer(best.text.strip(), best is own, rank, best.log_prob, known=known)


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
        values = zip(chosen, ranks.tolist(), best.tolist(), tokens, known, strict=True)
        for index, rank, value, token, can_hit in values:
            answers[index] = Answer(backbone.tokenizer.decode([token]).strip(), rank == 1, rank, value, known=can_hit)
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


@dataclass(frozen=True)
class Result:
    """Scores of a prompt on some records.

    ``scores`` has ``exact_match``, or ``accuracy`` with label words or choices, and a task's own metrics; with
    candidates also ``accuracy``, ``p_at_10`` and ``mrr`` among them. ``loss`` is the negative log-likelihood in nats
    per target token, or per record with label words or choices. ``hits`` are 1.0 or 0.0 per record, for the first
    score. ``missing`` counts the records whose target is not a candidate; they are misses.

    ``rows`` has the answers, one of :func:`prediction_rows` per record: always those of labels and choices, others
    on request. ``confusion`` is that of labels. Metrics for texts may have ``signatures``: two scores can be compared
    if theirs are equal.
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
        values: dict[str, Json] = {
            "scores": {name: score.to_json() for name, score in self.scores.items()},
            "loss": self.loss,
            "targets_not_among_candidates": self.missing,
        }
        if self.signatures:
            values["signatures"] = dict(self.signatures)
        if self.confusion is not None:
            values["labels"] = {label: dict(vars(scores)) for label, scores in self.confusion.scores.items()}
            values["confusion"] = [list(row) for row in self.confusion.counts]
        return values

    def worst(self, most: int) -> list[int]:
        """Return the places of at most ``most`` misses among the rows, those surest of a wrong answer first."""
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

    Exact match: greedy decoding would generate the target's tokens. Those that it would generate after them do not
    count, since a manual prompt never learned to stop. A masked model gets as many masks as the target has tokens. Of
    several references any is right.

    ``candidates`` are a closed set of answers to rank as well; on a tie the target ranks last. ``normalise``,
    ``calibrate`` and ``count_stop`` are as in :meth:`PromptModel.predict`. ``with_rows`` adds the answers even if they
    must be generated. A RecordError if there are no records, or one lacks its target; a ConfigError if candidates
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
    evaluation = _evaluated(model, prompt, questions, answers, report=report)
    records, predictions = questions.records, guessed(prompt, questions, evaluation)
    own = prompt.task.answer_metrics if prompt.task is not None else ()
    if not predictions and (own or (with_rows and candidates is None)):
        predictions = model.predict(records, prompt)
    if not answers.is_closed:
        # Generating a text for each record takes less than scoring many references.
        many = sum(len(references_of(record)) for record in records) > MANY_REFERENCES * len(records)
        generated = predictions or (model.predict(records, prompt) if many else [])
        texts = [prediction.text for prediction in generated]
        bound, learned = prompt.bind(model.backbone, force=model.force), prompt.learned(model.backbone)
        evaluation = of_any_reference(model.backbone, bound, records, learned, evaluation, written=texts)
    scores = {answers.score_name: score(evaluation.hits)}
    if own:
        triples = zip(predictions, evaluation.hits, evaluation.known, strict=True)
        given = [Answer(prediction.text, bool(hit), known=known) for prediction, hit, known in triples]
        values = score_values(given, questions, own)
        scores |= {name: summary([values[name]]) for name in own}
    rows = prediction_rows(records, predictions, evaluation.hits) if predictions else []
    missing = 0
    if candidates is not None:
        ranked = [
            among_candidates([text.strip() for text in references_of(record)], row)
            for record, row in zip(
                records,
                model.rank(records, prompt, candidates, normalise=normalise, count_stop=count_stop),
                strict=True,
            )
        ]
        values = score_values(ranked)
        names = ("mrr", "p_at_10") if len(candidates) > 10 else ("mrr",)
        scores |= {ACCURACY: summary([values["p_at_1"]]), **{name: summary([values[name]]) for name in names}}
        rows = [
            {
                "record": plain(record), "target": target_of(record), "prediction": answer.text, "hit": answer.hit,
                "log_prob": answer.log_prob, "rank": answer.rank,
            }
            for record, answer in zip(records, ranked, strict=True)
        ]  # fmt: skip
        missing = sum(answer.rank == 0 for answer in ranked)
    targets, texts = ([str(row[name]) for row in rows] for name in ("target", "prediction"))
    confusion = Confusion.of(answers.labels, targets, texts) if answers.labels else None
    return Result(scores, evaluation.loss, evaluation.hits, missing=missing, rows=rows, confusion=confusion)


def _evaluated(
    model: PromptModel,
    prompt: Prompt,
    questions: Questions,
    answers: AnswerSpace,
    *,
    cut: bool = False,
    report: OnProgress | None,
) -> Evaluation:
    """Score the targets of questions, with a warning if rows are truncated; with ``cut`` long targets are, too."""
    bound = prompt.bind(model.backbone, force=model.force)
    parts = warn_truncated(request_parts(bound, questions, answers, cut=cut), questions.name, bound.max_length)
    learned, total = prompt.learned(model.backbone), len(questions)
    return evaluate(model.backbone, parts, learned, total=total, report=report, note=questions.name)


def guessed(prompt: Prompt, questions: Questions, evaluation: Evaluation) -> list[Prediction]:
    """Return the likeliest labels or choices that an evaluation has; an empty list for generated answers."""
    if not evaluation.guesses:
        return []
    predictions = []
    for question, guess, log_probs in zip(questions, evaluation.guesses, evaluation.log_probs, strict=True):
        ranked = list(map(Candidate, prompt.answer_space.names(question), log_probs))
        best = ranked.pop(guess)
        ranked.sort(key=lambda candidate: -candidate.log_prob)
        predictions.append(Prediction.of_classes([best, *ranked]))
    return predictions


def prediction_rows(data: Records, predictions: Sequence[Prediction], hits: Sequence[float]) -> list[dict[str, Json]]:
    """Return one row per record for ``predictions.jsonl``; labels and choices have ``probabilities``."""
    return [
        {
            "record": plain(record),
            "target": target_of(record),
            "prediction": prediction.text,
            "hit": bool(hit),
            "log_prob": prediction.log_prob,
            **({} if prediction.probabilities is None else {"probabilities": dict(prediction.probabilities)}),
        }
        for record, prediction, hit in zip(data, predictions, hits, strict=True)
    ]


def answers_identity(prompt: Prompt, questions: Questions, how: Answering, backbone: Backbone) -> dict[str, Json]:
    """Return the values that are equal for all answers of one run, on this backbone as it is loaded."""
    vectors = b"" if prompt.slot_vectors is None else prompt.slot_vectors.numpy().tobytes()
    deep = b"" if prompt.deep is None else b"".join(tensor.numpy().tobytes() for tensor in prompt.deep.tensors.values())
    return {
        "template": str(prompt.template),
        "slots (sha256)": sha256(vectors + deep),
        "weights": None if prompt.weights is None else prompt.weights.fingerprint,
        "label words": None if prompt.label_words is None else prompt.label_words.to_json(),
        "backbone": backbone.fingerprint,
        **{name: value for name, value in backbone.loaded.items() if name != "attn_implementation"},
        "data (sha256)": questions.sha256,
        "records": len(questions),
        "answers": how.top_k,
        "candidates": None if how.candidates is None else [*how.candidates],
        **{name: getattr(how, name) for name in ("normalise", "calibrate", "count_stop", "min_probability")},
        **{name: list(value) if isinstance(value, tuple) else value for name, value in vars(how.generation).items()},
    }


def check_generation(prompt: Prompt, questions: Questions, metrics: Sequence[str]) -> None:
    """Raise the errors of :func:`score_generation`, before anything is generated."""
    check_generates(prompt)
    if not questions:
        raise RecordError(f"{questions.name} holds no records, so there is nothing to score")
    require_targets(questions.records)
    check_metrics(metrics, questions.records)


def score_generation(
    model: PromptModel,
    data: Rows | Questions,
    prompt: OnePrompt,
    metrics: Sequence[str] | str,
    *,
    settings: GenerationSettings | None = None,
    report: OnProgress | None = None,
) -> Result:
    """Generate a text for each record, and score the texts (:data:`~ptuning.metrics.generation.TEXT_METRICS`).

    The loss is that of the first reference, per token; a hit is a text that is a reference, letter by letter. A
    RecordError if there are no records, or one lacks its target; a ConfigError for an unknown metric or one whose
    extra is missing, before anything is generated.
    """
    prompt, questions, names = as_prompt(prompt), as_questions(data), metrics_of(metrics)
    check_generation(prompt, questions, names)
    records, model = questions.records, model.for_prompt(prompt)
    evaluation = _evaluated(model, prompt, questions, prompt.answer_space, cut=True, report=report)
    parts = generate_parts(model, questions, prompt, settings=settings, report=report)
    predictions = [prediction for part in parts for prediction in part]
    texts = [prediction.text for prediction in predictions]
    scores = score_texts(texts, records, names)
    hits = tuple(float(text in references_of(record)) for text, record in zip(texts, records, strict=True))
    rows: list[Mapping[str, Json]] = [
        {**row, "stopped": prediction.stopped, "tokens": prediction.tokens}
        for row, prediction in zip(prediction_rows(records, predictions, hits), predictions, strict=True)
    ]
    signatures = {name: value.signature for name, value in scores.items() if value.signature is not None}
    means = {name: value.score for name, value in scores.items()}
    return Result(means, evaluation.loss, hits, rows=rows, signatures=signatures)


def epoch_metric(
    bound: TokenizedTemplate, records: Records, metric: str, *, max_tokens: int
) -> Callable[[Backbone, PromptBatch], float]:
    """Return a function that scores texts, generated greedily for a few records, by a metric."""

    def judge(backbone: Backbone, learned: PromptBatch) -> float:
        answers = generate(backbone, PreparedPrompt(learned, bound), records, max_tokens=max_tokens)
        return value_of_texts([row[0].text for row in answers], records, metric)

    return judge
