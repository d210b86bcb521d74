"""BLEU, chrF and ROUGE equal their libraries, on random pairs with one and several references."""

from __future__ import annotations

import random
from typing import Any

import pytest
import sacrebleu
from rouge_score import rouge_scorer

from ptuning.statistics import Sums, rows_of, summary, value_of
from ptuning.texts import overlap
from ptuning.texts.measured import Measured

WORDS = ["the", "a", "cat", "dog", "In", "sat,", "mat.", "Kenya's", "3.5", "don't", "running", "runs", "£20-25", "-"]
SIGNS = "国家首都是的人民币在非洲，。12"


def pairs(seed: int, rows: int, *, most: int = 1, words: list[str] = WORDS) -> tuple[list[str], list[list[str]]]:
    """Return texts and their references: mutilated copies, other texts, and nothing at all."""
    draw = random.Random(seed)

    def text() -> str:
        return " ".join(draw.choices(words, k=draw.randrange(0, 12)))

    references = [[text() or "none" for _ in range(draw.randint(1, most))] for _ in range(rows)]
    texts = [
        text() if draw.random() < 0.3 else " ".join(word for word in own[0].split() if draw.random() < 0.8)
        for own in references
    ]
    return texts, references


def streams(references: list[list[str]]) -> Any:
    """Return references as sacrebleu takes them."""
    most = max(map(len, references))
    return [[own[at] if at < len(own) else None for own in references] for at in range(most)]


def the(found: object, name: str) -> Measured:
    """Return a score of a metric."""
    assert isinstance(found, dict)
    one = found[name]
    assert isinstance(one, Measured)
    return one


@pytest.mark.parametrize("most", [1, 4])
def test_bleu_and_chrf_equal_sacrebleu_to_the_last_digit(most: int) -> None:
    for seed in range(0, 40, 3):
        texts, references = pairs(seed, rows=1 + seed, most=most)
        for name, found, library in (
            ("bleu", overlap.bleu(texts, references), sacrebleu.BLEU(force=True)),
            ("bleu-lc", overlap.bleu(texts, references, lowercase=True), sacrebleu.BLEU(force=True, lowercase=True)),
            ("chrf", overlap.chrf(texts, references), sacrebleu.CHRF()),
        ):
            right = library.corpus_score(texts, streams(references))
            assert value_of(the(found, name).values) == right.score
            assert the(found, name).signature == str(library.get_signature())


def test_chinese_is_cut_into_characters() -> None:
    texts, references = pairs(0, rows=20, words=list(SIGNS))
    found = the(overlap.bleu(texts, references), "bleu")
    assert "tok:zh" in str(found.signature)
    assert "tok:13a" in str(the(overlap.bleu(*pairs(0, rows=20)), "bleu").signature)
    right = sacrebleu.BLEU(tokenize="zh", force=True).corpus_score(texts, streams(references)).score
    assert value_of(found.values) == right


@pytest.mark.parametrize("most", [1, 4])
def test_rouge_equals_rouge_score(most: int) -> None:
    texts, references = pairs(1, rows=250, most=most)
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    rows = [scorer.score_multi(own, text) for text, own in zip(texts, references, strict=True)]
    found = overlap.rouge(texts, references)
    for name, theirs in (("rouge-1", "rouge1"), ("rouge-2", "rouge2"), ("rouge-l", "rougeL")):
        right = sum(row[theirs].fmeasure for row in rows) / len(rows)
        assert abs(value_of(found[name].values) - right) < 1e-12


def test_a_resample_of_rows_is_scored_as_the_library_scores_these_rows() -> None:
    """The interval is over rows: a row that is drawn twice counts twice."""
    texts, references = pairs(3, rows=30, most=3)
    values = the(overlap.bleu(texts, references), "bleu").values
    assert isinstance(values, Sums)
    drawn = random.Random(0).choices(range(30), k=30)
    right = sacrebleu.BLEU(force=True).corpus_score(
        [texts[at] for at in drawn], streams([references[at] for at in drawn])
    )
    assert values.of([float(values.totals[drawn, at].sum()) for at in range(values.totals.shape[1])]) == right.score
    score = summary([values], most=100.0)
    assert 0 < score.low < score.value < score.high < 100
    assert score.n == rows_of(values) == 30


def test_the_interval_of_a_few_rows_reaches_beyond_one() -> None:
    """BLEU goes to 100: bounds of a fraction would cut it."""
    texts, references = pairs(3, rows=12)
    score = summary([the(overlap.bleu(texts, references), "bleu").values], most=100.0)
    assert score.high > score.value > 1
