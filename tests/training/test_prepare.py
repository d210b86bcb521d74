"""Where a template made from a manual one has its slots: after the text, where that makes training passes shorter."""

import re

import pytest
import torch

from ptuning.backbone.backbone import Backbone
from ptuning.config import TrainConfig
from ptuning.engine.forward import target_logits
from ptuning.engine.soft_prompt import PromptBatch
from ptuning.errors import ConfigError
from ptuning.prompt.prompt import Prompt
from ptuning.prompt.storage import BackboneId
from ptuning.records import Records
from ptuning.training.prepare import LONG_FIELD_TOKENS, place_slots, prepare
from ptuning.training.spec import TrainSpec
from ptuning.training.step import Learner
from tests.conftest import bound

WORDS = "the movie was great and terrible " * 5
TEXTS = Records([{"text": WORDS + f"in {1900 + at}", "y": "good"} for at in range(3)])
FACTS = Records([{"text": "Kenya", "y": "Nairobi"}] * 3)
MANUAL = "{text} It was a [Y] film"
BOTH, BEHIND = "[P*3] {text} [P:It was a] [Y] [P:film]", "{text} [P:It was a] [Y] [P:film]"


def place(backbone: Backbone, manual: str = MANUAL, records: Records = TEXTS, **options: object) -> tuple[str, str]:
    given = {"config": TrainConfig(), "closed": True, **options}
    template, note = place_slots(manual, records, backbone, **given)  # type: ignore[arg-type]
    return str(template), note


def test_with_labels_slots_come_after_the_text_and_the_other_place_is_counted(causal: Backbone) -> None:
    template, note = place(causal)
    assert template == BEHIND
    fewer = len(bound(causal, "a [P:It was a] [Y]").contexts([{}])[0].slot_positions)
    more = len(bound(causal, "[P*3] {text} [P:It was a] [Y]").contexts(TEXTS[:1])[0].token_ids)
    assert f"pass reads {fewer} " in note
    assert f"read {more}, {more / fewer:.1f} times as many (counted on 3 records)" in note
    assert note.endswith(f"template '{BOTH}'")


def test_without_labels_only_long_fields_do_that(causal: Backbone) -> None:
    """Facts learn better from slots on both sides (docs/decisions.md, decision 34)."""
    assert place(causal, closed=False)[0] == BEHIND
    assert place(causal, records=FACTS, closed=False) == place(causal, records=FACTS) == (BOTH, "")
    tokens = len(causal.tokenizer.encode([TEXTS[0]["text"]])[0])
    assert tokens >= LONG_FIELD_TOKENS
    fewer = Records([{"text": "great " * (LONG_FIELD_TOKENS // 2), "y": "good"}])
    assert place(causal, records=fewer, closed=False)[0] == BOTH


def test_slots_come_first_where_nothing_is_cached(masked: Backbone, causal: Backbone) -> None:
    """A masked model reads its text anew in any case, and so does one whose weights change."""
    for backbone, config in (
        (masked, TrainConfig()),
        (causal, TrainConfig(train_backbone="lora")),
        (causal, TrainConfig(cache_memory=0.0)),
    ):
        assert place(backbone, config=config) == (BOTH, "")


def test_the_note_says_what_slots_before_the_text_cost(causal: Backbone) -> None:
    template, note = place(causal, "Review: {text} [Y]")
    assert template == "[P:Review:] {text} [Y]"
    assert re.search(r"\d\d tokens a record; of words", note)
    template, note = place(causal, about="mood")
    assert template == "[P:The mood:] {text} [P:It was a] [Y] [P:film]"
    assert re.search(r"'about' it would read \d, and now reads [\d.]+ times as many", note)


def test_the_cost_is_counted_without_a_word_about_what_a_causal_model_does_not_see(
    causal: Backbone, caplog: pytest.LogCaptureFixture
) -> None:
    place(causal, MANUAL.replace("film", "picture"))
    assert not caplog.records


def test_records_without_the_field_are_left_to_the_training_to_name(causal: Backbone) -> None:
    assert place(causal, records=Records([{"y": "good"}])) == (BOTH, "")


CAPITALS = [
    {"x": name, "y": city} for name, city in (("Kenya", "Nairobi"), ("Peru", "Lima"), ("a", "yes"), ("b", "no"))
]


@pytest.mark.parametrize("name", ["causal", "masked"])
def test_examples_as_deep_slots_are_the_examples_in_context(name: str, request: pytest.FixtureRequest) -> None:
    """Before training, with the same logits; each record of the training part does not read its own example."""
    backbone: Backbone = request.getfixturevalue(name)
    spec = TrainSpec(
        "[D:examples] [P:The capital of] [X] [P:is] [Y]",
        CAPITALS,
        dev=[{"x": "Zürich", "y": "yes"}, {"x": "Kenya and Peru", "y": "no"}],
        config=TrainConfig(examples=3, train_eos=False),
    )
    prepared = prepare(spec, backbone)
    drawn = prepared.items["train"]
    assert sum(bool(item.inputs[0].unread) for item in drawn) == 3
    start = Learner(backbone, prepared.bound, config=spec.settings).learned()
    shown = Prompt(
        prepared.bound.template, start.vectors, BackboneId.of(backbone), deep=start.deep[0], method="test"
    ).without("slots")
    assert str(shown.template).count("The capital of") == 4
    words = shown.bind(backbone).examples(list(prepared.parts["dev"].records))
    nothing = PromptBatch.none(backbone.width)
    with torch.no_grad():
        found = target_logits(backbone, [item.inputs[0] for item in prepared.items["dev"]], start)
        torch.testing.assert_close(found, target_logits(backbone, words, nothing), atol=1e-5, rtol=0)
    # What a row does not read is its own example and nothing else.
    own = next(item.inputs[0] for item in drawn if item.inputs[0].unread)
    layout = prepared.bound.layout
    hidden = [layout.start_ids[layout.places(own.slot_positions).index(place)] for place in own.unread]
    record = prepared.parts["train"][drawn.index(next(item for item in drawn if item.inputs[0] is own))].record
    end = "\n" if backbone.kind == "causal" else ""
    (line,) = backbone.tokenizer.encode([f"The capital of {record['x']} is {record['y']}{end}"])
    assert hidden == line


def test_too_few_or_too_long_examples(causal: Backbone) -> None:
    def ask(examples: int, **settings: object) -> None:
        config = TrainConfig(examples=examples).with_settings(settings)
        prepare(TrainSpec("[D:examples] so [X] is [Y]", CAPITALS, dev=CAPITALS, config=config), causal)

    with pytest.raises(ConfigError, match=r"shows 9 examples, and .* has 4 records to learn from; .* \(examples=4\)"):
        ask(9)
    with pytest.raises(ConfigError, match=r"the 4 examples .* take \d+ tokens, .* take fewer \(examples=1\)"):
        ask(4, max_length=20)
    ask(1, max_length=20)


def test_deep_slots_without_words_start_at_tokens_of_the_data(causal: Backbone) -> None:
    spec = TrainSpec("[D*3] [X] is [D] [Y]", CAPITALS, dev=CAPITALS)
    bound = prepare(spec, causal).bound
    known = {token for ids in causal.tokenizer.encode([one["x"] for one in CAPITALS]) for token in ids}
    assert len(bound.layout.start_ids) == 4
    assert known.issuperset(bound.layout.start_ids)
