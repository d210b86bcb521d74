"""BLEU and ROUGE as in ChatGLM's tables: those of a loop written as its script is, row by row."""

from __future__ import annotations

import random
import warnings

import jieba
import pytest
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from rouge_chinese import Rouge

from ptuning.statistics import value_of
from ptuning.texts.chatglm import chatglm

SIGNS = "这件上衣的版型很宽松，适合春天在城市里穿着。非洲国家首都"


def test_scores_equal_a_loop_as_in_the_script() -> None:
    draw = random.Random(0)
    labels = ["".join(draw.choices(SIGNS, k=draw.randrange(5, 30))) for _ in range(100)]
    texts = ["".join(sign for sign in one if draw.random() < 0.8) or "的" for one in labels]
    right: dict[str, list[float]] = {"bleu-4": [], "rouge-1": [], "rouge-2": [], "rouge-l": []}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for text, label in zip(texts, labels, strict=True):
            scores = Rouge().get_scores(" ".join(jieba.cut(text)), " ".join(jieba.cut(label)))[0]
            for name in ("rouge-1", "rouge-2", "rouge-l"):
                right[name].append(scores[name]["f"] * 100)
            bleu = sentence_bleu([list(label)], list(text), smoothing_function=SmoothingFunction().method3)
            right["bleu-4"].append(bleu * 100)
    found = chatglm(texts, [[label] for label in labels])
    for name, values in right.items():
        assert abs(value_of(found[f"chatglm-{name}"].values) - sum(values) / 100) < 1e-9


def test_an_empty_text_scores_nothing_and_the_best_reference_counts() -> None:
    found = chatglm(["", "非洲国家"], [["非洲"], ["上衣", "非洲国家"]])
    assert found["chatglm-rouge-1"].values == [0.0, pytest.approx(100.0, abs=1e-3)]
    assert value_of(found["chatglm-bleu-4"].values) > 0
