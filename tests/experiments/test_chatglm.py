"""BLEU and ROUGE as in ChatGLM's tables: those of a loop written as its script is, row by row."""

import random
import warnings

import pytest
from experiments.chatglm import chatglm

SIGNS = "这件上衣的版型很宽松，适合春天在城市里穿着。非洲国家首都"


def test_scores_equal_a_loop_as_in_the_script() -> None:
    import jieba
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    from rouge_chinese import Rouge

    draw = random.Random(0)
    labels = ["".join(draw.choices(SIGNS, k=draw.randrange(5, 30))) for _ in range(50)]
    texts = ["".join(sign for sign in label if draw.random() < 0.8) or "的" for label in labels]
    own = chatglm(texts, [[label] for label in labels])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for at, (text, label) in enumerate(zip(texts, labels, strict=True)):
            scores = Rouge().get_scores(" ".join(jieba.cut(text)), " ".join(jieba.cut(label)))[0]
            for name in ("rouge-1", "rouge-2", "rouge-l"):
                assert own[name][at] == pytest.approx(scores[name]["f"] * 100)
            bleu = sentence_bleu([list(label)], list(text), smoothing_function=SmoothingFunction().method3)
            assert own["bleu-4"][at] == pytest.approx(bleu * 100)


def test_an_empty_text_scores_nothing_and_the_best_reference_counts() -> None:
    own = chatglm(["", "非洲国家"], [["非洲"], ["上衣", "非洲国家"]])
    assert own["rouge-1"] == [0.0, pytest.approx(100.0, abs=1e-3)]
    assert own["bleu-4"][1] > 0
