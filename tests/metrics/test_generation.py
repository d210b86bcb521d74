"""BLEU, chrF and ROUGE equal their libraries, on random pairs with one and several references; numeric match."""

import importlib
import random
from decimal import Decimal
from types import ModuleType
from typing import Any

import pytest
import sacrebleu
from rouge_score import rouge_scorer

from ptuning.errors import ConfigError
from ptuning.metrics import generation
from ptuning.metrics.generation import TEXT_METRICS, RowScores, check_metrics, metrics_of, score_texts, value_of_texts
from ptuning.records import References, as_records
from ptuning.statistics import Sums, rows_of, summary, value_of

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


def the(scores: object, name: str) -> RowScores:
    """Return a score of a metric."""
    assert isinstance(scores, dict)
    score = scores[name]
    assert isinstance(score, RowScores)
    return score


@pytest.mark.parametrize("most", [1, 4])
def test_bleu_and_chrf_equal_sacrebleu_to_the_last_digit(most: int) -> None:
    for seed in range(0, 40, 3):
        texts, references = pairs(seed, rows=1 + seed, most=most)
        for name, scores, library in (
            ("bleu", generation.bleu(texts, references), sacrebleu.BLEU(force=True)),
            ("bleu-lc", generation.bleu(texts, references, lowercase=True), sacrebleu.BLEU(force=True, lowercase=True)),
            ("chrf", generation.chrf(texts, references), sacrebleu.CHRF()),
        ):
            right = library.corpus_score(texts, streams(references))
            assert value_of(the(scores, name).values) == right.score
            assert the(scores, name).signature == str(library.get_signature())


def test_chinese_is_cut_into_characters() -> None:
    texts, references = pairs(0, rows=20, words=list(SIGNS))
    scores = the(generation.bleu(texts, references), "bleu")
    assert "tok:zh" in str(scores.signature)
    assert "tok:13a" in str(the(generation.bleu(*pairs(0, rows=20)), "bleu").signature)
    right = sacrebleu.BLEU(tokenize="zh", force=True).corpus_score(texts, streams(references)).score
    assert value_of(scores.values) == right


@pytest.mark.parametrize("most", [1, 4])
def test_rouge_equals_rouge_score(most: int) -> None:
    texts, references = pairs(1, rows=250, most=most)
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    rows = [scorer.score_multi(own, text) for text, own in zip(texts, references, strict=True)]
    scores = generation.rouge(texts, references)
    for name, theirs in (("rouge-1", "rouge1"), ("rouge-2", "rouge2"), ("rouge-l", "rougeL")):
        right = sum(row[theirs].fmeasure for row in rows) / len(rows)
        assert abs(value_of(scores[name].values) - right) < 1e-12


def test_a_resample_of_rows_is_scored_as_the_library_scores_these_rows() -> None:
    """The interval is over rows: a row that is drawn twice counts twice."""
    texts, references = pairs(3, rows=30, most=3)
    values = the(generation.bleu(texts, references), "bleu").values
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
    score = summary([the(generation.bleu(texts, references), "bleu").values], most=100.0)
    assert score.high > score.value > 1


def test_every_metric_is_full_for_the_reference_itself() -> None:
    names = ["Kenya", "Peru", "Chad"]
    references = [References([f"The capital of {name} is the city of {name} 1.", f"{name} has one."]) for name in names]
    records = as_records([{"x": f"name#{name}", "y": own} for name, own in zip(names, references, strict=True)])
    texts = [str(own) for own in references]
    scores = score_texts(texts, records, list(TEXT_METRICS))
    for name, scored in scores.items():
        best = 100.0 if name.startswith(("bleu", "chrf")) else 1.0
        assert scored.score.value == pytest.approx(best, abs=1e-3), name
        assert scored.score.n == 3
    assert scores["bleu"].to_json()["signature"] == scores["bleu"].signature
    assert "signature" not in scores["coverage"].to_json()
    assert value_of_texts(texts, records, "rouge") == scores["rouge-1"].score.value


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("12 + 7 = 19", 19), ("12-7", 7), ("x = -7", -7), ("1,234.50 and", Decimal("1234.50")), ("3.", 3), ("3.0", 3),
        ("a7", 7), ("10 = 2 * 5\n", 5), ("none", None), ("", None), ("costs £20-25", 25),
    ],
)  # fmt: skip
def test_the_last_number_of_a_text(text: str, number: object) -> None:
    assert generation.last_number(text) == number


def test_numeric_and_exact_match() -> None:
    texts, references = ["12 + 7 = 19.", "19 or 20", "none", "4"], [["= 19"], ["19"], ["none"], ["5", "four: 4"]]
    assert generation.numeric_match(texts, references)["last-number"].values == [1.0, 0.0, 0.0, 1.0]
    scores = generation.exact(["the Nairobi!", "Nairobi, Kenya", ""], [["Nairobi"], ["Nairobi", "Kenya"], [""]])
    assert scores["exact"].values == [1.0, 0.0, 0.0]


def test_names_of_metrics_are_read_in_any_case_and_unknown_ones_refused() -> None:
    assert metrics_of(" BLEU,rouge, bleu") == ["bleu", "rouge"]
    for bad in ("blue", ","):
        with pytest.raises(ConfigError, match="bleu"):
            metrics_of(bad)


@pytest.mark.parametrize(
    ("metric", "package"), [("bleu", "sacrebleu"), ("chrf", "sacrebleu"), ("rouge", "rouge-score")]
)
def test_a_missing_extra_is_named_before_anything_is_generated(
    metric: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.import_module

    def without(name: str) -> ModuleType:
        if name.partition(".")[0] in ("sacrebleu", "rouge_score"):
            raise ImportError(name)
        return real(name)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(ConfigError, match=rf"{package}.*text-metrics"):
        check_metrics([metric], [{"x": "a", "y": "b"}])
    check_metrics(["exact", "last-number"], [{"x": "a", "y": "b"}])
