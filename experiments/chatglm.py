"""BLEU and ROUGE as ChatGLM's scripts report them for Chinese, only to compare with their tables.

    python -m experiments.chatglm PREDICTIONS.JSONL

The file is that of `ptuning generate --out` or `eval --out` on records with targets. Source: ``ptuning/main.py`` of
ChatGLM-6B: BLEU-4 of single characters with smoothing method 3, ROUGE of jieba's words, each the mean over rows, times
100. Of several references the best ROUGE counts. Needs: pip install jieba nltk rouge-chinese.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ptuning.files import read_json_lines
from ptuning.statistics import summary

ROUGE = ("rouge-1", "rouge-2", "rouge-l")


def chatglm(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, list[float]]:
    """Return the scores of each text, 0 to 100: ``bleu-4`` and ``rouge-1``, ``-2`` and ``-l``."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old packages, and rows without a common n-gram
        import jieba
        import rouge_chinese
        from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

        jieba.setLogLevel(logging.WARNING)
        cutter = jieba.Tokenizer()
        cutter.tmp_dir = folder  # its default is a file with a fixed name, which anybody may have written
        smooth, scorer = SmoothingFunction().method3, rouge_chinese.Rouge()
        rouge = [_rouge(text, own, cutter, scorer) for text, own in zip(texts, references, strict=True)]
        bleu = [
            100 * float(sentence_bleu([list(reference) for reference in own], list(text), smoothing_function=smooth))
            for text, own in zip(texts, references, strict=True)
        ]
    return {"bleu-4": bleu, **{name: [row[name] for row in rouge] for name in ROUGE}}


def _rouge(text: str, references: Sequence[str], cutter: Any, scorer: Any) -> dict[str, float]:
    """Return the ROUGE of a text; 0 without a word, which the library refuses."""
    words = " ".join(cutter.cut(text))
    scores = [
        scorer.get_scores(words, " ".join(cutter.cut(reference)))[0]
        for reference in references
        if words.strip() and reference.strip()
    ]
    return {name: max((100 * float(score[name]["f"]) for score in scores), default=0.0) for name in ROUGE}


if __name__ == "__main__":
    rows: list[Any] = list(read_json_lines(Path(sys.argv[1])))
    own = [[row["target"]] if isinstance(row["target"], str) else row["target"] for row in rows]
    for name, values in chatglm([row.get("predicted", row.get("prediction")) for row in rows], own).items():
        score = summary([values], most=100.0)
        print(f"chatglm-{name}  {score.value:.2f} [{score.low:.2f}, {score.high:.2f}], n = {score.n}")
