"""The table of metrics for texts. One more entry in :data:`TEXT_METRICS`, and ``eval``, ``compare`` and task files have
it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from ptuning.config import listed_names
from ptuning.errors import ConfigError, closest
from ptuning.metrics import most_of
from ptuning.records import Record, references_of
from ptuning.statistics import Score, Values, summary, value_of
from ptuning.texts import answers, chatglm, contents, overlap
from ptuning.texts.measured import Measured

# A score that is asked of a prompt and not of its texts: what it costs on plain sentences (``prompt/retention.py``).
RETENTION = "retention"

Compute = Callable[[Sequence[str], Sequence[Record]], Mapping[str, Measured]]
Beside = Callable[[Sequence[str], Sequence[Sequence[str]]], Mapping[str, Measured]]


@dataclass(frozen=True)
class TextMetric:
    """A way to score written texts.

    Args:
        about: What it is, in a few words.
        compute: N texts and the N records that they answer -> the scores that it consists of, by their names; the
            first is the one to show where there is room for one. A ConfigError names the extra that it lacks.
    """

    about: str
    compute: Compute


@dataclass(frozen=True)
class TextScore:
    """A score of texts with its 95 % interval over rows, and its signature, if it has one."""

    score: Score
    signature: str | None = None

    def to_json(self) -> dict[str, float | int | str]:
        """Return the score as ``eval --json`` prints it."""
        return {**self.score.to_json(), **({} if self.signature is None else {"signature": self.signature})}


def _beside(compute: Beside) -> Compute:
    """Return a metric that reads nothing but the references of a record."""
    return lambda texts, records: compute(texts, [references_of(record) for record in records])


TEXT_METRICS: Mapping[str, TextMetric] = {
    "bleu": TextMetric("BLEU by sacrebleu, 0 to 100", _beside(overlap.bleu)),
    "bleu-lc": TextMetric("the same without capitals", _beside(partial(overlap.bleu, lowercase=True))),
    "chrf": TextMetric("chrF2 by sacrebleu, 0 to 100", _beside(overlap.chrf)),
    "rouge": TextMetric("ROUGE-1, -2 and -L by rouge-score, for English", _beside(overlap.rouge)),
    "exact": TextMetric("share that is a reference, capitals and punctuation apart", _beside(answers.exact)),
    "last-number": TextMetric("share whose last number is right", _beside(answers.last_number)),
    "coverage": TextMetric("share of attribute values said, and of values invented", contents.coverage),
    "chatglm": TextMetric("BLEU and ROUGE as in ChatGLM's tables, for Chinese", _beside(chatglm.chatglm)),
}


def metrics_of(names: Sequence[str] | str, *, also: Sequence[str] = ()) -> list[str]:
    """Return names of metrics, given as a list or as one text with commas, each once; a ConfigError lists the known
    ones, ``also`` those that are no metrics of texts.
    """
    known = (*TEXT_METRICS, *also)
    found = list(dict.fromkeys(name.lower() for name in listed_names(names)))
    if not found:
        raise ConfigError(f"no metric is named; known: {', '.join(known)}")
    for name in found:
        if name not in known:
            raise ConfigError(f"unknown metric '{name}'.{closest(name, known)} Known: {', '.join(known)}")
    return found


def check_metrics(names: Sequence[str], records: Sequence[Record]) -> None:
    """Raise the error that metrics will raise for lack of an extra or of attributes, before anything is written."""
    some = records[:1]
    for name in names:
        TEXT_METRICS[name].compute([references_of(one)[0] for one in some], some)


def score_texts(texts: Sequence[str], records: Sequence[Record], names: Sequence[str]) -> dict[str, TextScore]:
    """Score N texts with metrics, against the references (or the contents) of the N records that they answer."""
    measured = measure_texts(texts, records, names)
    return {name: TextScore(summary([one.values], most=most_of(name)), one.signature) for name, one in measured.items()}


def measure_texts(texts: Sequence[str], records: Sequence[Record], names: Sequence[str]) -> dict[str, Measured]:
    """Return score -> what N texts have of it, row by row; the scores of the first metric are first."""
    return {part: one for name in names for part, one in TEXT_METRICS[name].compute(texts, records).items()}


def value_of_texts(texts: Sequence[str], records: Sequence[Record], name: str) -> float:
    """Return the first score of a metric, without an interval."""
    values: Values = next(iter(measure_texts(texts, records, [name]).values())).values
    return value_of(values)
