"""The table of metrics for texts: each gives scores with intervals; what is unknown or missing is named."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest

from ptuning.data.reading import load_records
from ptuning.errors import ConfigError
from ptuning.records import Records, references_of
from ptuning.texts.table import TEXT_METRICS, check_metrics, metrics_of, score_texts, value_of_texts


def test_every_metric_is_full_for_the_reference_itself() -> None:
    records = Records(load_records("countries:test")[:20])
    texts = [references_of(one)[3] for one in records]
    found = score_texts(texts, records, list(TEXT_METRICS))
    for name, one in found.items():
        best = 100.0 if name.startswith(("bleu", "chrf", "chatglm")) else 1.0
        if name in ("last-number", "invented"):  # there are no numbers, and nothing is invented
            best = 0.0
        assert one.score.value == pytest.approx(best, abs=1e-3), name
        assert one.score.n == 20
        assert one.score.low <= one.score.value <= one.score.high
    assert found["bleu"].to_json()["signature"] == found["bleu"].signature
    assert "signature" not in found["coverage"].to_json()
    assert value_of_texts(texts, records, "rouge") == found["rouge-1"].score.value


def test_names_of_metrics_are_read_in_any_case_and_unknown_ones_refused() -> None:
    assert metrics_of(" BLEU,rouge, bleu") == ["bleu", "rouge"]
    with pytest.raises(ConfigError, match=r"unknown metric 'blue'. Did you mean 'bleu'\? Known: bleu, bleu-lc, chrf"):
        metrics_of("blue")
    with pytest.raises(ConfigError, match="no metric is named"):
        metrics_of(",")


@pytest.mark.parametrize(
    ("metric", "package", "extra"),
    [
        ("bleu", "sacrebleu", "text-metrics"), ("chrf", "sacrebleu", "text-metrics"),
        ("rouge", "rouge-score", "text-metrics"), ("chatglm", "jieba", "chinese"),
    ],
)  # fmt: skip
def test_a_missing_extra_is_named_before_anything_is_written(
    metric: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.import_module

    def without(name: str) -> ModuleType:
        if name.partition(".")[0] in ("sacrebleu", "rouge_score", "jieba"):
            raise ImportError(name)
        return real(name)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(ConfigError, match=rf"'{metric}' needs the package {package}.*'ptuning\[{extra}\]'"):
        check_metrics([metric], [{"x": "a", "y": "b"}])
    check_metrics(["exact", "last-number"], [{"x": "a", "y": "b"}])
