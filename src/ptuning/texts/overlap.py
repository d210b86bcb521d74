"""BLEU and chrF by sacrebleu, ROUGE by rouge-score: how much of the references a text has in common with.

BLEU and chrF are one number of sums over all rows, so rows keep sacrebleu's own sums, and a resample of rows is scored
by sacrebleu's own formula: scores equal the library's to the last digit.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from ptuning.statistics import Sums
from ptuning.texts.measured import Measured, are_chinese, needed, version_of

EXTRA = "text-metrics"
ROUGE = {"rouge-1": "rouge1", "rouge-2": "rouge2", "rouge-l": "rougeL"}

TextReferences = Sequence[Sequence[str]]  # of each of N texts one or more


def bleu(texts: Sequence[str], references: TextReferences, *, lowercase: bool = False) -> Mapping[str, Measured]:
    """Return BLEU, 0 to 100, tokenised as 13a, or character by character where references are Chinese (zh).
    Source: Papineni et al. (2002); Post (2018), arXiv:1804.08771.
    """
    name = "bleu-lc" if lowercase else "bleu"
    library = needed("sacrebleu", package="sacrebleu", metric=name, extra=EXTRA)
    chinese = are_chinese([one for row in references for one in row])
    metric = library.BLEU(tokenize="zh" if chinese else "13a", lowercase=lowercase, force=True)
    return {name: _summed(metric, texts, references)}


def chrf(texts: Sequence[str], references: TextReferences) -> Mapping[str, Measured]:
    """Return chrF2, 0 to 100. Source: Popovic (2015), chrF, with sacrebleu's defaults."""
    metric = needed("sacrebleu", package="sacrebleu", metric="chrf", extra=EXTRA).CHRF()
    return {"chrf": _summed(metric, texts, references)}


def _summed(metric: Any, texts: Sequence[str], references: TextReferences) -> Measured:
    import numpy as np

    # sacrebleu wants the first reference of every text, then the second, ...; None where there are no more.
    streams = list(itertools.zip_longest(*references))
    sums = np.array(metric._extract_corpus_statistics(list(texts), streams), dtype=np.float64)  # (N, K)
    signature = str(metric.get_signature())
    return Measured(Sums(sums, lambda totals: float(metric._compute_score_from_stats(totals).score)), signature)


def rouge(texts: Sequence[str], references: TextReferences) -> Mapping[str, Measured]:
    """Return the F1 of ROUGE-1, ROUGE-2 and ROUGE-L, 0 to 1, with stemming, each against the best of the references.
    Source: Lin (2004); Google's ``rouge_score``, ``score_multi``.
    """
    scorer = needed("rouge_score.rouge_scorer", package="rouge-score", metric="rouge", extra=EXTRA)
    rows = scorer.RougeScorer(list(ROUGE.values()), use_stemmer=True)
    found = [rows.score_multi(list(own), text) for text, own in zip(texts, references, strict=True)]
    signature = f"refs:best|stem:yes|rouge-score:{version_of('rouge-score')}"
    return {
        name: Measured([float(row[theirs].fmeasure) for row in found], signature=signature)
        for name, theirs in ROUGE.items()
    }
