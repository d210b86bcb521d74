"""Texts that a prompt writes for many records: a row for each, and scores of them beside references."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ptuning.backbone.backbone import Backbone
from ptuning.config import GenerationSettings
from ptuning.data.questions import Questions, as_questions
from ptuning.engine.evaluate import evaluate
from ptuning.engine.objective import request_parts, warn_truncated
from ptuning.engine.prefix_store import PreparedPrompt
from ptuning.engine.runner import generate
from ptuning.engine.soft_prompt import PromptBatch
from ptuning.errors import RecordError
from ptuning.files import Json, sha256
from ptuning.metrics.generation import check_metrics, metrics_of, score_texts, value_of_texts
from ptuning.progress import OnProgress
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prompt import OnePrompt, Prompt, as_prompt
from ptuning.prompt.rows import Answering
from ptuning.prompt.score import Result, check_generates, generate_parts, prediction_rows
from ptuning.records import Records, Rows, references_of, require_targets
from ptuning.template.encode import TokenizedTemplate


def answers_identity(prompt: Prompt, questions: Questions, how: Answering, backbone: Backbone) -> dict[str, Json]:
    """Return what must be equal for answers to be those of one and the same run, on this backbone as it is loaded."""
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
    """Raise what :func:`score_generation` raises before anything is written."""
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
    extra is missing, before anything is written.
    """
    prompt, questions, names = as_prompt(prompt), as_questions(data), metrics_of(metrics)
    check_generation(prompt, questions, names)
    records = questions.records
    model = model.for_prompt(prompt)
    bound = prompt.bind(model.backbone, force=model.force)
    parts = warn_truncated(
        request_parts(bound, questions, prompt.answer_space, cut=True), questions.name, bound.max_length
    )
    learned, total = prompt.learned(model.backbone), len(questions)
    found = evaluate(model.backbone, parts, learned, total=total, report=report, note=questions.name)
    written = [
        one for part in generate_parts(model, questions, prompt, settings=settings, report=report) for one in part
    ]
    texts = [one.text for one in written]
    scores = score_texts(texts, records, names)
    hits = tuple(float(text in references_of(record)) for text, record in zip(texts, records, strict=True))
    rows: list[Mapping[str, Json]] = [
        {**row, "stopped": one.stopped, "tokens": one.tokens}
        for row, one in zip(prediction_rows(records, written, hits), written, strict=True)
    ]
    signatures = {name: one.signature for name, one in scores.items() if one.signature is not None}
    return Result({name: one.score for name, one in scores.items()}, found.loss, hits, rows=rows, signatures=signatures)


def epoch_metric(
    bound: TokenizedTemplate, records: Records, metric: str, *, max_tokens: int
) -> Callable[[Backbone, PromptBatch], float]:
    """Return what scores a metric of the texts that are written, greedily, for a few records with what was learned."""

    def judge(backbone: Backbone, learned: PromptBatch) -> float:
        answers = generate(backbone, PreparedPrompt(learned, bound), records, max_tokens=max_tokens)
        return value_of_texts([row[0].text for row in answers], records, metric)

    return judge
