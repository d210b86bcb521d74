"""BLEU and ROUGE as ChatGLM's scripts report them, only to compare with their tables: they are no other BLEU.

Source: ``ptuning/main.py`` of ChatGLM-6B: BLEU-4 of single characters with smoothing method 3, ROUGE of jieba's words,
each the mean over rows, times 100. A row with several references has the best ROUGE of them; the scripts have one.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from ptuning.texts.measured import Measured, needed, version_of

EXTRA = "chinese"
ROUGE = ("rouge-1", "rouge-2", "rouge-l")


def chatglm(texts: Sequence[str], references: Sequence[Sequence[str]]) -> Mapping[str, Measured]:
    """Return ``chatglm-bleu-4`` and ``chatglm-rouge-1``, ``-2`` and ``-l``, 0 to 100."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an old package about its own imports
        jieba, words, bleu = (
            needed(module, package=package, metric="chatglm", extra=EXTRA)
            for module, package in (
                ("jieba", "jieba"), ("rouge_chinese", "rouge-chinese"), ("nltk.translate.bleu_score", "nltk"),
            )
        )  # fmt: skip
    smooth, rouge = bleu.SmoothingFunction().method3, words.Rouge()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rows without a common n-gram
        jieba.setLogLevel(logging.WARNING)
        cutter = jieba.Tokenizer()
        cutter.tmp_dir = folder  # else it would read what anybody may have left under a fixed name
        rows = [_row(text, own, cutter, rouge) for text, own in zip(texts, references, strict=True)]
        bleus = [
            100 * float(bleu.sentence_bleu([list(one) for one in own], list(text), smoothing_function=smooth))
            for text, own in zip(texts, references, strict=True)
        ]
    versions = "|".join(f"{package}:{version_of(package)}" for package in ("jieba", "rouge-chinese", "nltk"))
    signature = f"characters|smooth:3|{versions}"
    found = {"chatglm-bleu-4": bleus, **{f"chatglm-{name}": [row[name] for row in rows] for name in ROUGE}}
    return {name: Measured(values, signature) for name, values in found.items()}


def _row(text: str, references: Sequence[str], cutter: Any, rouge: Any) -> dict[str, float]:
    """Return the ROUGE of a text; 0 where there is no word, which the library refuses."""
    said = " ".join(cutter.cut(text))
    scores = [
        rouge.get_scores(said, " ".join(cutter.cut(one)))[0] if said.strip() and one.strip() else None
        for one in references
    ]
    return {name: max(0.0 if one is None else 100 * float(one[name]["f"]) for one in scores) for name in ROUGE}
