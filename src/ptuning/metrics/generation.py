"""Metrics for generated texts: BLEU and chrF by sacrebleu, ROUGE by rouge-score, numeric match, slot coverage.

With one more entry in :data:`TEXT_METRICS`, ``eval``, ``compare`` and task files have it.
"""

import importlib
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from importlib import metadata
from types import ModuleType
from typing import Any

from ptuning.config import listed_names
from ptuning.errors import ConfigError, closest
from ptuning.metrics import exact_match, most_of
from ptuning.metrics.slot_coverage import coverage
from ptuning.records import Record, references_of
from ptuning.statistics import Score, Sums, Values, summary, value_of

# From this share of Chinese letters on, references count as Chinese and BLEU is over characters.
CHINESE_SHARE = 0.3
NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?|(?<=[^\W\d_])\d[\d,]*(?:\.\d+)?")
ROUGE = {"rouge-1": "rouge1", "rouge-2": "rouge2", "rouge-l": "rougeL"}

TextReferences = Sequence[Sequence[str]]  # one or more for each of N texts


@dataclass(frozen=True)
class RowScores:
    """Values of a score row by row, and its ``signature``: what must be equal for two scores to be comparable."""

    values: Values
    signature: str | None = None


@dataclass(frozen=True)
class TextScore:
    """A score of texts with its 95 % interval over rows, and its signature, if it has one."""

    score: Score
    signature: str | None = None

    def to_json(self) -> dict[str, float | int | str]:
        """Return the score as ``eval --json`` prints it."""
        return {**self.score.to_json(), **({} if self.signature is None else {"signature": self.signature})}


@dataclass(frozen=True)
class TextMetric:
    """A metric: ``compute`` maps N texts and their N records to its scores by name, the main one first."""

    about: str
    compute: Callable[[Sequence[str], Sequence[Record]], Mapping[str, RowScores]]


def bleu(texts: Sequence[str], references: TextReferences, *, lowercase: bool = False) -> Mapping[str, RowScores]:
    """Return BLEU, 0 to 100, tokenized as 13a, or by characters where references are Chinese (zh).
    Source: Papineni et al. (2002); Post (2018), arXiv:1804.08771.
    """
    name = "bleu-lc" if lowercase else "bleu"
    letters = [letter for row in references for text in row for letter in text if letter.isalpha()]
    chinese = sum("\u3400" <= letter <= "\u9fff" for letter in letters) >= CHINESE_SHARE * max(1, len(letters))
    library = _library("sacrebleu", "sacrebleu", name)
    metric = library.BLEU(tokenize="zh" if chinese else "13a", lowercase=lowercase, force=True)
    return {name: _corpus_sums(metric, texts, references)}


def chrf(texts: Sequence[str], references: TextReferences) -> Mapping[str, RowScores]:
    """Return chrF2, 0 to 100. Source: Popovic (2015), chrF, with sacrebleu's defaults."""
    return {"chrf": _corpus_sums(_library("sacrebleu", "sacrebleu", "chrf").CHRF(), texts, references)}


def _corpus_sums(metric: Any, texts: Sequence[str], references: TextReferences) -> RowScores:
    """Keep sacrebleu's sums row by row: a resample of rows is then scored by its own formula, to the last digit."""
    import numpy as np

    # sacrebleu takes the first reference of every text, then the second, ...; None where there are no more.
    streams = list(itertools.zip_longest(*references))
    sums = np.array(metric._extract_corpus_statistics(list(texts), streams), dtype=np.float64)  # (N, K)
    signature = str(metric.get_signature())
    return RowScores(Sums(sums, lambda totals: float(metric._compute_score_from_stats(totals).score)), signature)


def rouge(texts: Sequence[str], references: TextReferences) -> Mapping[str, RowScores]:
    """Return the F1 of ROUGE-1, ROUGE-2 and ROUGE-L, 0 to 1, with stemming, each with its best reference.
    Source: Lin (2004); Google's ``rouge_score``, ``score_multi``.
    """
    library = _library("rouge_score.rouge_scorer", "rouge-score", "rouge")
    scorer = library.RougeScorer(list(ROUGE.values()), use_stemmer=True)
    rows = [scorer.score_multi(list(own), text) for text, own in zip(texts, references, strict=True)]
    signature = f"refs:best|stem:yes|rouge-score:{metadata.version('rouge-score')}"
    return {name: RowScores([float(row[theirs].fmeasure) for row in rows], signature) for name, theirs in ROUGE.items()}


def exact(texts: Sequence[str], references: TextReferences) -> Mapping[str, RowScores]:
    """Return the share of texts equal to a reference, without capitals, punctuation and articles."""
    return {"exact": RowScores([exact_match(text, own) for text, own in zip(texts, references, strict=True)])}


def numeric_match(texts: Sequence[str], references: TextReferences) -> Mapping[str, RowScores]:
    """Return the share of texts whose last number is that of a reference: the answer after steps of arithmetic."""
    hits = [
        last_number(text) in {last_number(reference) for reference in own} - {None}
        for text, own in zip(texts, references, strict=True)
    ]
    return {"last-number": RowScores([float(hit) for hit in hits])}


def last_number(text: str) -> Decimal | None:
    """Return the last number of a text.

    >>> last_number("12 + 7 = 19."), last_number("-1,234.50"), last_number("none")
    (Decimal('19'), Decimal('-1234.50'), None)
    """
    numbers = NUMBER.findall(text)
    return Decimal(numbers[-1].replace(",", "")) if numbers else None


def _library(module: str, package: str, metric: str) -> ModuleType:
    """Import the library of a metric; a ConfigError names the extra that has it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"the metric '{metric}' needs the package {package}; install it with: pip install 'ptuning[text-metrics]'"
        ) from error


def _with_references(compute: Callable[[Sequence[str], TextReferences], Mapping[str, RowScores]]) -> Any:
    return lambda texts, records: compute(texts, [references_of(record) for record in records])


TEXT_METRICS: Mapping[str, TextMetric] = {
    "bleu": TextMetric("BLEU by sacrebleu, 0 to 100", _with_references(bleu)),
    "bleu-lc": TextMetric("the same without capitals", _with_references(partial(bleu, lowercase=True))),
    "chrf": TextMetric("chrF2 by sacrebleu, 0 to 100", _with_references(chrf)),
    "rouge": TextMetric("ROUGE-1, -2 and -L by rouge-score, for English", _with_references(rouge)),
    "exact": TextMetric("share equal to a reference, without capitals and punctuation", _with_references(exact)),
    "last-number": TextMetric("share whose last number is right", _with_references(numeric_match)),
    "coverage": TextMetric(
        "share of attribute values in the text",
        lambda texts, records: {"coverage": RowScores(coverage(texts, records))},
    ),
}


def metrics_of(names: Sequence[str] | str) -> list[str]:
    """Return the distinct names of a list or comma-separated text; a ConfigError lists the known ones."""
    chosen = list(dict.fromkeys(name.lower() for name in listed_names(names)))
    if not chosen:
        raise ConfigError(f"no metric is named; known: {', '.join(TEXT_METRICS)}")
    for name in chosen:
        if name not in TEXT_METRICS:
            known = ", ".join(TEXT_METRICS)
            raise ConfigError(f"unknown metric '{name}'.{closest(name, TEXT_METRICS)} Known: {known}")
    return chosen


def check_metrics(names: Sequence[str], records: Sequence[Record]) -> None:
    """Raise the error of a missing extra or missing attributes before anything is generated."""
    sample = records[:1]
    measure_texts([references_of(record)[0] for record in sample], sample, names)


def score_texts(texts: Sequence[str], records: Sequence[Record], names: Sequence[str]) -> dict[str, TextScore]:
    """Score N texts with metrics, against the references (or the attributes) of the N records that they answer."""
    measured = measure_texts(texts, records, names)
    return {
        name: TextScore(summary([rows.values], most=most_of(name)), rows.signature) for name, rows in measured.items()
    }


def measure_texts(texts: Sequence[str], records: Sequence[Record], names: Sequence[str]) -> dict[str, RowScores]:
    """Return score -> its values for N texts, row by row; the scores of the first metric are first."""
    return {part: rows for name in names for part, rows in TEXT_METRICS[name].compute(texts, records).items()}


def value_of_texts(texts: Sequence[str], records: Sequence[Record], name: str) -> float:
    """Return the main score of a metric, without an interval."""
    return value_of(next(iter(measure_texts(texts, records, [name]).values())).values)
