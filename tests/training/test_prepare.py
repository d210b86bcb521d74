"""Where a template made from a manual one has its slots: behind the text, where that makes training passes shorter."""

from __future__ import annotations

import re

import pytest

from ptuning.backbone.backbone import Backbone
from ptuning.config import TrainConfig
from ptuning.records import Records
from ptuning.training.prepare import LONG_FIELD_TOKENS, Placement, place_slots
from tests.conftest import bound

WORDS = "the movie was great and terrible " * 5
TEXTS = Records([{"text": WORDS + f"in {1900 + at}", "y": "good"} for at in range(3)])
FACTS = Records([{"text": "Kenya", "y": "Nairobi"}] * 3)
MANUAL = "{text} It was a [Y] film"
BOTH, BEHIND = "[P*3] {text} [P:It was a] [Y] [P:film]", "{text} [P:It was a] [Y] [P:film]"


def place(backbone: Backbone, manual: str = MANUAL, records: Records = TEXTS, **options: object) -> Placement:
    given = {"config": TrainConfig(), "closed": True, **options}
    return place_slots(manual, records, backbone, **given)  # type: ignore[arg-type]


def test_with_labels_slots_stand_behind_the_text_and_the_other_place_is_counted(causal: Backbone) -> None:
    found = place(causal)
    assert str(found.template) == BEHIND
    fewer = len(bound(causal, "a [P:It was a] [Y]").contexts([{}])[0].slot_positions)
    more = len(bound(causal, "[P*3] {text} [P:It was a] [Y]").contexts(TEXTS[:1])[0].token_ids)
    assert found.told.startswith(f"slots stand behind the text: it is read once, and each training pass reads {fewer} ")
    assert f"it would read {more}, {more / fewer:.1f} times as many (counted on 3 records)" in found.told
    assert found.told.endswith(f"--template '{BOTH}'")


def test_without_labels_only_long_fields_do_that(causal: Backbone) -> None:
    """Facts learn better from slots on both sides (docs/decisions.md, decision 34)."""
    assert str(place(causal, closed=False).template) == BEHIND
    assert place(causal, records=FACTS, closed=False) == Placement(place(causal, records=FACTS).template)
    assert str(place(causal, records=FACTS).template) == BOTH
    tokens = len(causal.tokenizer.encode([TEXTS[0]["text"]])[0])
    assert tokens >= LONG_FIELD_TOKENS
    fewer = Records([{"text": "great " * (LONG_FIELD_TOKENS // 2), "y": "good"}])
    assert str(place(causal, records=fewer, closed=False).template) == BOTH


def test_slots_stay_in_front_where_nothing_is_kept(masked: Backbone, causal: Backbone) -> None:
    """A masked model reads its text anew in any case, and so does one whose weights change."""
    for backbone, config in (
        (masked, TrainConfig()),
        (causal, TrainConfig(tune="lora")),
        (causal, TrainConfig(cache_memory=0.0)),
    ):
        assert place(backbone, config=config) == Placement(place(backbone, closed=False, records=FACTS).template)


def test_what_can_not_stand_behind_says_what_that_costs(causal: Backbone) -> None:
    found = place(causal, "Review: {text} [Y]")
    assert str(found.template) == "[P:Review:] {text} [Y]"
    assert re.search(r"all of it, \d\d tokens a record; of words between the last field and \[Y\]", found.told)
    found = place(causal, about="mood")
    assert str(found.template) == "[P:The mood:] {text} [P:It was a] [Y] [P:film]"
    assert re.search(r"without --about it would read \d, and now reads [\d.]+ times as many", found.told)


def test_the_cost_is_counted_without_a_word_about_what_a_causal_model_does_not_see(
    causal: Backbone, caplog: pytest.LogCaptureFixture
) -> None:
    place(causal, MANUAL.replace("film", "picture"))
    assert not caplog.records


def test_records_without_the_field_are_left_to_the_training_to_name(causal: Backbone) -> None:
    assert place(causal, records=Records([{"y": "good"}])) == Placement(place(causal, records=FACTS).template)
