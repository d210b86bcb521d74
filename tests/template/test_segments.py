"""Cutting the ids of a text into those of its segments, with a tokenizer whose words are plain to see.

For real tokenizers see test_encode.py.
"""

import re
from collections.abc import Mapping, Sequence

from ptuning.template.messages import ChatMessage
from ptuning.template.segments import LITERAL, TARGET, Encoded, Gap, Ids, MarkedText, TextRun


class Words:
    """Cuts text into words with the space in front, and the line breaks at its end as one; ids are first come, first
    served. Notes each call.
    """

    prefix_ids: Ids = ()
    suffix_ids: Ids = ()
    mask_id: int | None = None
    unknown_id: int | None = None
    stop_id: int | None = None
    line_end_id: int | None = None
    gap = Gap()
    decoder_ids: Ids = ()
    special_ids: Mapping[str, int] = {}
    max_tokens = 99

    def __init__(self) -> None:
        self.known: list[str] = []
        self.calls: list[list[str]] = []

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        self.calls.append(list(texts))
        return [[self.id_of(word) for word in re.findall(r"\n+\Z| ?\w+\.?|\n| ?[^\w\s]| ", text)] for text in texts]

    def encode_markup(self, texts: Sequence[MarkedText]) -> list[list[int]]:
        raise NotImplementedError

    def render_chat(self, turns: Sequence[ChatMessage], *, answer_next: bool) -> str:
        raise NotImplementedError

    def id_of(self, word: str) -> int:
        if word not in self.known:
            self.known.append(word)
        return self.known.index(word)


def run_of(*segments: tuple[str, str], is_open: bool = False) -> TextRun:
    return TextRun(tuple((name, MarkedText(text)) for name, text in segments), is_open=is_open)


def cut(run: TextRun) -> tuple[list[tuple[str, list[str]]], Words]:
    words = Words()
    spans = Encoded(words, [run]).cut(run)
    return [(name, [words.known[token] for token in ids]) for name, ids in spans], words


def test_a_token_belongs_to_the_segment_in_which_it_ends() -> None:
    run = run_of((LITERAL, "The "), ("field x", "Kenya, U.S"), (LITERAL, ". is "), (TARGET, "so"))
    spans, words = cut(run)
    assert spans == [
        (LITERAL, ["The"]),
        ("field x", [" Kenya", ",", " U."]),
        (LITERAL, ["S.", " is"]),
        (TARGET, [" so"]),
    ]
    assert len(words.calls) == 1, "all that a cut looks up is encoded in one call"


def test_line_breaks_before_a_segment_are_those_in_front_of_a_word() -> None:
    spans, _ = cut(run_of((LITERAL, "is\n\n"), (TARGET, "so")))
    assert spans == [(LITERAL, ["is", "\n", "\n"]), (TARGET, ["so"])]


def test_an_unknown_target_has_no_tokens() -> None:
    spans, _ = cut(run_of((LITERAL, "it is "), (TARGET, "a"), (LITERAL, " !"), is_open=True))
    assert spans == [(LITERAL, ["it", " is"]), (TARGET, []), (LITERAL, [" !"])]


def test_the_text_beside_an_unknown_target_is_not_swallowed_with_it() -> None:
    """The word that stands in for the target grows together with what is glued to it."""
    assert cut(run_of((LITERAL, "it un"), (TARGET, "a"), (LITERAL, " !"), is_open=True))[0] == [
        (LITERAL, ["it", " un"]),
        (TARGET, []),
        (LITERAL, [" !"]),
    ]
    assert cut(run_of((LITERAL, "it "), (TARGET, "a"), (LITERAL, "."), is_open=True))[0] == [
        (LITERAL, ["it"]),
        (TARGET, []),
        (LITERAL, ["."]),
    ]


def test_a_target_that_grows_together_with_the_text_behind_it_leaves_none_of_itself_there() -> None:
    """Whether all of its tokens do, or only the last: a masked model must not read the end of the answer."""
    for target, tokens in (("Rome", [" Rome."]), ("New York", [" New", " York."])):
        run = run_of((LITERAL, "it is "), (TARGET, target), (LITERAL, ". Yes!"))
        assert cut(run)[0] == [(LITERAL, ["it", " is"]), (TARGET, tokens), (LITERAL, [" Yes", "!"])]


def test_text_after_slots_is_tokenised_as_it_goes_on() -> None:
    """A word in front is cut off again, or left out where it has grown together with the text."""
    run = run_of((LITERAL, " is "), (TARGET, "so")).after_slots()
    assert run.prefixes == [MarkedText("a is "), MarkedText("a is so")]
    assert cut(run)[0] == [(LITERAL, [" is"]), (TARGET, [" so"])]
    assert run_of((LITERAL, "s it")).after_slots().lead == MarkedText("")
    merged = run_of((LITERAL, ". It "), (TARGET, "so")).after_slots()
    assert merged.lead == MarkedText("a")
    assert cut(merged)[0] == [(LITERAL, [".", " It"]), (TARGET, [" so"])]
    spaces = run_of((LITERAL, " "), (TARGET, "so")).after_slots()
    assert cut(spaces)[0] == [(LITERAL, []), (TARGET, [" so"])]


def test_a_text_that_was_not_foreseen_is_encoded_when_asked_for() -> None:
    words = Words()
    encoded = Encoded(words, [])
    assert encoded[MarkedText("new")] == encoded[MarkedText("new")] == (0,)
    assert words.calls == [[], ["new"]]
