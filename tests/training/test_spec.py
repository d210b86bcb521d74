"""What a training is asked for, in Python: its rows are looked at once, and what was found goes with it."""

import logging

import pytest

from ptuning.backbone.backbone import Backbone
from ptuning.config import TrainConfig
from ptuning.errors import RecordError
from ptuning.prompt.prompt import Prompt
from ptuning.template.labels import LabelWords
from ptuning.training.run import train
from ptuning.training.spec import TrainSpec
from tests.messages import messages, messy

ROWS = [{"message": text, "team": team, "y": team} for text, team in messy(list(messages())[:64])]
TEMPLATE = "{message} [P:This is for] [Y]"


def test_rows_are_looked_at_once() -> None:
    asked = TrainSpec(TEMPLATE, ROWS, labels="auto", alias_label={"biling": "billing"})
    found = asked.check()
    assert found.labels == LabelWords({team: team for team in ("account", "billing", "shipping", "technical")})
    assert found.alias_label == ("biling=billing",)
    assert found.checked is not None
    assert [line.partition(":")[0] for line in found.checked.left_out] == [
        "in memory, record 12",
        "in memory, record 57",
    ]
    assert found.check() is found
    with pytest.raises(RecordError, match="in memory, record 34"):
        TrainSpec(TEMPLATE, ROWS, labels="auto", strict=True).check()


def test_a_training_in_python_finds_labels_and_warns(causal: Backbone, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        result = train(TEMPLATE, ROWS, backbone=causal, labels="auto", config=TrainConfig(epochs=1, batch_size=16))
    assert sum("'biling' looks like 'billing'" in text for text in caplog.messages) == 1
    assert result.record["labels"] == ["account", "billing", "shipping", "technical"]
    assert result.prompt.label_words is not None
    listed = train(
        TEMPLATE,
        [row for row in ROWS if row["y"] != "biling"],
        backbone=causal,
        labels=["account", "billing", "shipping", "technical"],
        config=TrainConfig(epochs=1, batch_size=16),
    )
    assert isinstance(listed.prompt, Prompt)
    assert listed.record["history"] != []
    assert (listed.prompt.label_words, listed.prompt.scores) == (result.prompt.label_words, result.prompt.scores)
