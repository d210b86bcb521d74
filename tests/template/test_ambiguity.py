"""What a tokenizer does not know is never a hit: on WordPiece, unigram and byte-level vocabularies, whole and empty."""

import logging

import pytest

from ptuning.backbone.tokenizer import TextTokenizer
from ptuning.errors import RecordError
from ptuning.records import Records
from ptuning.template.ambiguity import (
    check_candidates,
    check_fields,
    check_targets,
    collisions_of,
    is_distinguishable,
    warn,
)
from ptuning.template.encode import TokenizedTemplate
from ptuning.template.language import Template
from ptuning.template.segments import Kind
from tests.families import tokenizer_of

EMOJI, RARE = "\U0001f642", "東京"
KINDS: dict[str, Kind] = {"bert": "masked", "t5": "encoder-decoder", "xlnet": "permuted", "gpt2": "causal"}


def bind(name: str, pattern: str = "{x} is [Y]") -> TokenizedTemplate:
    tokenizer = TextTokenizer(tokenizer_of(name), max_tokens=64)
    return TokenizedTemplate(Template.parse(pattern), tokenizer=tokenizer, kind=KINDS[name])


def records(*targets: str) -> Records:
    return Records([{"x": "Kenya", "y": text} for text in targets], name="facts.csv")


@pytest.mark.parametrize(("name", "knows"), [("bert", False), ("t5", False), ("xlnet", False), ("gpt2", True)])
def test_a_rare_answer_and_an_emoji_are_known_where_the_vocabulary_spells_them(name: str, knows: bool) -> None:
    filled = bind(name).examples(records("Nairobi", RARE, EMOJI, f"good {EMOJI}"))
    assert [one.known for one in filled] == [True, knows, knows, knows]


def test_a_target_without_tokens_is_unknown_and_takes_a_place() -> None:
    """A row whose target has no tokens must not stop the others, and none of its scored positions may be missing."""
    bound = bind("bert")
    nothing, yes = bound.examples(records("\u200b", "yes"))
    assert (nothing.known, nothing.target_ids, nothing.own_tokens) == (False, (bound.tokenizer.unknown_id,), 1)
    assert len(nothing.logit_positions) == 1
    assert yes.known


def test_a_record_without_a_target_yet_is_known() -> None:
    assert bind("bert").contexts(records(EMOJI))[0].known


def test_collisions_are_other_answers_with_the_same_tokens() -> None:
    """Labels have several words, of which two may be the same tokens; one of them is enough for collisions."""
    assert collisions_of(["a", "b", "b", "c", "c"], [0, 0, 1, 2, 2]) == [frozenset({1}), frozenset({0}), frozenset()]
    assert collisions_of([None, "a", None], [0, 1, 1]) == [None, frozenset()]


def test_only_what_is_told_from_every_wrong_answer_can_be_a_hit() -> None:
    assert is_distinguishable((), {"yes"})
    assert is_distinguishable(("Yes",), {"yes", "Yes"})
    assert not is_distinguishable(("Yes",), {"yes"})
    assert not is_distinguishable(None, {"yes"})


def test_a_few_unknown_targets_are_counted_with_an_example_and_the_remedy() -> None:
    rows = Records([{"y": "a"}, {"y": EMOJI}, {"y": RARE}], name="mail.csv", places=("", "mail.csv, line 7", ""))
    (text,) = check_targets([True, False, False], rows)
    assert text.startswith(
        f"2 of 3 targets of mail.csv are unknown to the tokenizer, such as '{EMOJI}' (mail.csv, line 7)"
    )
    assert check_targets([True, True, True], rows) == []


@pytest.mark.parametrize(("unknown", "is_error"), [(10, True), (8, True), (7, False)])
def test_nearly_only_unknown_targets_are_an_error(unknown: int, is_error: bool) -> None:
    known = [at >= unknown for at in range(10)]
    if is_error:
        with pytest.raises(RecordError, match=rf"{unknown} of 10 targets .*: the vocabulary does not fit the data"):
            check_targets(known, records(*"abcdefghij"))
    else:
        assert len(check_targets(known, records(*"abcdefghij"))) == 1


def test_candidates_that_are_not_told_apart_are_counted() -> None:
    (text,) = check_candidates([(), None, frozenset({3}), frozenset({2})], ["no", EMOJI, "a film", "a  film"])
    assert text.startswith(f"3 of 4 possible answers, such as '{EMOJI}', are unknown to the tokenizer or have")
    assert check_candidates([(), ()], ["yes", "no"]) == []


@pytest.mark.parametrize("name", ["bert", "t5", "gpt2"])
def test_fields_of_which_most_is_unknown_are_counted(name: str) -> None:
    """A single unknown word among known ones is nothing to speak of."""
    rows = Records([{"x": f"{EMOJI} {RARE}"}, {"x": f"the movie {EMOJI} was great"}, {"x": ""}], name="facts.csv")
    found = check_fields(bind(name).tokenizer, rows, ("x",))
    assert len(found) == (0 if name == "gpt2" else 1)
    if found:
        assert all(fact in found[0] for fact in ("'x'", "1 of 3 records", f"'{EMOJI} {RARE}' (facts.csv, record 1)"))


def test_the_same_warning_is_given_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        warn(["one", "two"])
        warn(["two"])
    assert caplog.messages == ["one", "two"]
