"""Targets that are texts: how much their end weighs, what is cut, and what an epoch is chosen by."""

from pathlib import Path
from typing import Any

import pytest

import ptuning.training.run
from ptuning.backbone.backbone import Backbone
from ptuning.config import TrainConfig
from ptuning.errors import PTuningError
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.score import score_generation
from ptuning.records import Record, Records, as_records
from ptuning.template.encode import TokenizedTemplate
from ptuning.training import prepare
from tests.conftest import items_of
from tests.training.test_run import FACTS, TEMPLATE, run

TEXTS: list[Record] = [
    {"x": f"city {at}", "y": ("a good film and a bad one, all in all", "the movie was great; it was terrible")[at % 2]}
    for at in range(9)
]
DEV: list[Record] = [{**row, "x": f"town {at}"} for at, row in enumerate(TEXTS[:4])]


def every(record: Any, name: str) -> list[float]:
    """Return a number of the start and of every epoch."""
    return [float(one[name]) for one in (record["start"], *record["history"])]


def test_an_epoch_is_chosen_by_a_metric_of_what_is_written(causal: Backbone, tmp_path: Path) -> None:
    """The record has the metric of the start and of every epoch, and it is that of the chosen prompt's own texts."""
    settings = {"epochs": 3, "lr": 0.05, "metric_for_best_model": "chrf"}
    result = run(causal, tmp_path / "out", TEXTS, settings=settings, dev=DEV)
    record = result.record
    values = every(record, "dev_chrf")
    losses = every(record, "dev_loss")
    assert record["chosen_epoch"] == max(range(4), key=lambda at: (values[at], -losses[at], -at))
    assert str(record["choice_rule"]).startswith("highest dev chrf; of equal ones the lowest dev loss; of equal ones")
    found = score_generation(PromptModel(causal), as_records(DEV), result.prompt, ["chrf"])
    assert found.scores["chrf"].value == pytest.approx(max(values), abs=1e-6)
    by_loss = run(causal, None, TEXTS, settings={**settings, "metric_for_best_model": "loss"}, dev=DEV).record
    losses = every(by_loss, "dev_loss")
    assert by_loss["chosen_epoch"] == losses.index(min(losses))
    assert str(by_loss["choice_rule"]).startswith("lowest dev loss")


def test_at_most_64_development_records_are_written_for_and_they_are_drawn(causal: Backbone) -> None:
    rows: list[Record] = [{**TEXTS[index % 9], "x": f"city {index}"} for index in range(100)]
    seen: list[int] = []

    def judging(bound: TokenizedTemplate, records: Records, metric: str, *, max_tokens: int) -> Any:
        seen.extend((len(records), max_tokens))
        return lambda *_: 0.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ptuning.training.run, "epoch_metric", judging)
        run(causal, None, TEXTS[:3], settings={"epochs": 1, "metric_for_best_model": "exact"}, dev=rows)
    (longest,) = {max(len(one) for one in causal.tokenizer.encode([f" {row['y']}" for row in TEXTS]))}
    assert seen == [64, longest + 2]


@pytest.mark.parametrize(
    ("name", "labels", "says"),
    [
        (
            "blue",
            None,
            r"metric_for_best_model is 'blue', which is no metric. Did you mean 'bleu'\? Known: score, loss, bleu",
        ),
        ("bleu", {"a": ["yes"], "b": ["no"]}, "a metric for texts that are written, and the answers are 2 labels"),
        ("coverage", None, "no field holds them; fields: x"),
    ],
)
def test_what_cannot_choose_is_refused(causal: Backbone, name: str, labels: Any, says: str) -> None:
    rows: list[Record] = FACTS if labels is None else [{"x": f"city {at}", "y": "ab"[at % 2]} for at in range(9)]
    with pytest.raises(PTuningError, match=says):
        run(causal, None, rows, settings={"metric_for_best_model": name}, labels=labels)


def test_long_targets_are_cut_where_they_are_learned_and_nowhere_else(
    causal: Backbone, caplog: pytest.LogCaptureFixture
) -> None:
    """With a count; a cut one teaches no end, and the development loss is that of whole targets."""
    whole = run(causal, None, TEXTS, dev=DEV)
    assert not caplog.records
    found = run(causal, None, TEXTS, dev=DEV, settings={"max_target_tokens": 5})
    (told,) = [one.getMessage() for one in caplog.records]
    assert told.startswith("9 of 9 targets of in memory are longer than 5 tokens (max_target_tokens): their beginnings")
    assert found.record["start"] == whole.record["start"]
    assert (found.prompt.target_tokens, found.prompt.learned_to_stop) == (5, False)


def test_without_a_setting_one_target_in_a_hundred_may_be_cut(
    causal: Backbone, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rows: list[Record] = [
        *({"x": f"city {at}", "y": "yes"} for at in range(199)),
        {"x": "city", "y": "a good film and a bad one"},
    ]
    items = items_of(causal, TEMPLATE, rows)
    monkeypatch.setattr(prepare, "FEWEST_TARGET_TOKENS", 2)
    found = prepare._with_cut_targets(items, "rows", TrainConfig())
    assert max(item.choices[0].own_tokens for item in found) == 2
    assert "1 of 200 targets of rows are longer than 2 tokens (99 in 100 have no more" in caplog.text
    monkeypatch.setattr(prepare, "FEWEST_TARGET_TOKENS", 64)
    assert prepare._with_cut_targets(items, "rows", TrainConfig()) == items  # short ones are never cut
