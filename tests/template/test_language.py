"""The template language: every piece, every error with its caret, and that writing and reading a pattern agree."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptuning.errors import TemplateError
from ptuning.template.language import Field, Literal, Piece, Slots, Target, Template, TextSlots, Turn

TEXTS = st.text(alphabet="ab X[]{}!*:>PY\n\té東", min_size=1, max_size=12)
NAMES = st.text(alphabet="abxyz_-! ]1", min_size=1, max_size=6).filter(lambda name: name == name.strip() != "y")
PIECES: st.SearchStrategy[Piece] = st.one_of(
    st.builds(Literal, TEXTS),
    st.builds(Field, NAMES.filter(lambda name: not name.endswith("!"))),
    st.builds(Field, NAMES, st.just(True)),
    st.builds(Slots, st.integers(1, 1000)),
    st.builds(TextSlots, TEXTS.filter(str.strip)),
)


def piece_lists() -> st.SearchStrategy[list[Piece]]:
    """Pieces around one target. Neighbouring literals would be read as one, and the "]" of a literal behind text slots
    as an escaped bracket of theirs; neither comes out of a pattern.
    """

    def apart(pieces: list[Piece]) -> bool:
        return not any(
            isinstance(second, Literal)
            and (isinstance(first, Literal) or (isinstance(first, TextSlots) and second.text.startswith("]")))
            for first, second in pairwise(pieces)
        )

    turned = st.tuples(st.lists(PIECES, max_size=2), st.lists(PIECES, max_size=2)).map(lambda p: [*p[0], Turn(), *p[1]])
    fronts = st.one_of(st.lists(PIECES, max_size=5), turned)
    return st.tuples(fronts, st.lists(PIECES, max_size=3)).map(lambda p: [*p[0], Target(), *p[1]]).filter(apart)


@pytest.mark.parametrize(
    ("pattern", "pieces"),
    [
        ("[P][P*3][Y]", (Slots(1), Slots(3), Target())),
        ("[P*03][P*1000][Y]", (Slots(3), Slots(1000), Target())),
        (
            "[P:The capital of] [X] is [Y].",
            (TextSlots("The capital of"), Literal(" "), Field("x"), Literal(" is "), Target(), Literal(".")),
        ),
        (
            "{passage} question: {question!}? [P] answer: [Y]",
            (
                Field("passage"),
                Literal(" question: "),
                Field("question", keep=True),
                Literal("? "),
                Slots(1),
                Literal(" answer: "),
                Target(),
            ),
        ),
        ("{x}{x!}[X][Y]", (Field("x"), Field("x", keep=True), Field("x"), Target())),
        ("[[P] {{x} ]] }} [Y]", (Literal("[P] {x} ]] }} "), Target())),
        ("[[[P]{{{a}[Y]", (Literal("["), Slots(1), Literal("{"), Field("a"), Target())),
        ("[P:a [[b]] {c}][Y]", (TextSlots("a [b] {c}"), Target())),
        ("[X] [>] [P*2][Y].", (Field("x"), Literal(" "), Turn(), Literal(" "), Slots(2), Target(), Literal("."))),
        ("a > b [[>] [Y]", (Literal("a > b [>] "), Target())),
        ("a\tb\n[Y]", (Literal("a\tb\n"), Target())),
    ],
)
def test_each_piece_of_the_grammar(pattern: str, pieces: tuple[Piece, ...]) -> None:
    template = Template.parse(pattern)
    assert template.pieces == pieces
    assert Template.parse(str(template)) == template


@settings(max_examples=150, deadline=None)
@given(piece_lists())
def test_a_written_template_reads_back_as_itself(pieces: list[Piece]) -> None:
    template = Template(tuple(pieces))
    assert Template.parse(str(template)) == template


@settings(max_examples=200, deadline=None)
@given(TEXTS)
def test_any_text_stands_in_a_literal_with_doubled_opening_brackets(text: str) -> None:
    pattern = text.replace("[", "[[").replace("{", "{{") + "[Y]"
    assert Template.parse(pattern).pieces == (Literal(text), Target())


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="[]{}PXY:*!3ab ", max_size=20))
def test_a_pattern_parses_or_says_where_it_is_wrong(pattern: str) -> None:
    """No pattern, however odd, ends in anything but a template or an error with a caret inside the pattern."""
    problem = problem_of(pattern)
    if problem is None:
        template = Template.parse(pattern)
        assert Template.parse(str(template)) == template
    else:
        assert problem.pattern is not None
        assert problem.column is not None
        assert 0 <= problem.column <= len(problem.pattern)


def problem_of(pattern: str) -> TemplateError | None:
    try:
        Template.parse(pattern)
    except TemplateError as error:
        return error
    return None


@pytest.mark.parametrize(
    ("pattern", "column", "message"),
    [
        ("[X] is", 6, "a template needs one [Y], the place of the target; this one has none"),
        ("", 0, "a template needs one [Y]"),
        ("[Y] and [Y]", 8, "exactly one [Y], this one has two or more"),
        ("[X] [>] a [>] [Y]", 10, "a template turns to the decoder's side once, this one has two or more [>]"),
        ("[D:examples] [D:examples] [X] [Y]", 13, "a template shows examples once, this one has two or more"),
        ("[D:] [X] [Y]", 0, "write [D] for one slot that starts at a token of the data"),
        ("[X] [Y] [>]", 8, "[>] comes after [Y], but the target is always on the decoder's side"),
        ("[X] {y} [Y]", 4, "{y} would show the target to the model"),
        ("{y!} [Y]", 0, "{y} would show the target to the model"),
        (
            "a [X",
            2,
            "unclosed bracket; expected [P], [P*3], [P:words], [D], [D*3], [D:words], [X], [C], [Y] or [>]; write",
        ),
        ("a [Z] [Y]", 2, "unknown piece [Z]; expected [P]"),
        ("a [] [Y]", 2, "unknown piece []"),
        ("a [x] [Y]", 2, "unknown piece [x]"),
        ("[P*-1] [Y]", 0, "unknown piece [P*-1]"),
        ("[P*] [Y]", 0, "unknown piece [P*]"),
        ("[P*٣] [Y]", 0, "unknown piece [P*٣]"),
        ("a [P*0] [Y]", 2, "a piece takes 1 to 1000 slots, not 0"),
        ("a [P*1001] [Y]", 2, "not 1001"),
        ("a [P*99999999999999999999] [Y]", 2, "not 99999999999999999999"),
        ("a [P:] [Y]", 2, "[P:words] without words; write [P] for one slot that starts at random"),
        ("a [P:  ] [Y]", 2, "[P:words] without words"),
        ("a [P:words [Y]", 2, "expected ] after the words of [P:words], and [[ for a bracket among them"),
        ("a [P:words", 2, "unclosed bracket; expected ] after the words of [P:words]"),
        ("a [P:words]]", 2, "unclosed bracket; expected ] after the words of [P:words]"),
        ("a {x [Y]", 2, "unclosed brace; expected {field} or {field!}, and {{ for a literal brace"),
        ("a {} [Y]", 2, "a field's name goes in braces; expected {field} or {field!}"),
        ("a { x} [Y]", 2, "a field's name goes in braces"),
        ("a {!} [Y]", 2, "a field's name goes in braces"),
        ("a {b[c} [Y]", 2, "a field's name goes in braces"),
        ("a {b{c} [Y]", 2, "a field's name goes in braces"),
    ],
)
def test_an_error_shows_the_pattern_with_a_caret_and_what_was_expected(pattern: str, column: int, message: str) -> None:
    with pytest.raises(TemplateError) as caught:
        Template.parse(pattern)
    first, shown, caret = str(caught.value).split("\n")
    assert message in first
    assert shown == f"  {pattern}"
    assert caret == "  " + " " * column + f"^ column {column + 1}"
    assert (caught.value.pattern, caught.value.column) == (pattern, column)


def test_the_caret_stands_right_where_a_pattern_is_not_written_the_usual_way() -> None:
    """A count of one is shown as [P], so the caret must be where the piece stands in what is shown."""
    with pytest.raises(TemplateError) as caught:
        Template.parse("[P*1] a [Y] b [Y]")
    _, shown, caret = str(caught.value).split("\n")
    assert shown[caret.index("^") :].startswith("[Y]")
    assert shown[: caret.index("^")].count("[Y]") == 1


def test_a_line_break_in_a_pattern_keeps_the_caret_on_one_line() -> None:
    with pytest.raises(TemplateError) as caught:
        Template.parse("a\n\tb [Z] [Y]")
    _, shown, caret = str(caught.value).split("\n")
    assert shown == "  a⏎ b [Z] [Y]"
    assert shown[caret.index("^") :].startswith("[Z]")


@pytest.mark.parametrize(
    ("manual", "about", "learned"),
    [
        # The words become slots that start at them; a noun stands in front.
        ("[X] is located in [Y]", "country", "[P:The country:] [X] [P:is located in] [Y]"),
        ("[X] is located in [Y]", "  country ", "[P:The country:] [X] [P:is located in] [Y]"),
        ("The capital of [X] is [Y]", "capital", "[P:The capital:] [P:The capital of] [X] [P:is] [Y]"),
        ("[X] is [Y]", "[odd] noun", "[P:The [[odd]] noun:] [X] [P:is] [Y]"),
        # Without one, a template that begins with a field gets random slots, since both sides learn better.
        ("[X] is located in [Y]", None, "[P*3] [X] [P:is located in] [Y]"),
        ("[X] is located in [Y]", " ", "[P*3] [X] [P:is located in] [Y]"),
        ("{text!} It was [Y]", None, "[P*3] {text!} [P:It was] [Y]"),
        # Text in front is a start already.
        ("The capital of [X] is [Y]", None, "[P:The capital of] [X] [P:is] [Y]"),
        # Text behind the target becomes slots too, for models that see it.
        ("[X] and [Y] are friends.", None, "[P*3] [X] [P:and] [Y] [P:are friends.]"),
        # Punctuation alone stays: it holds the sentence together and has no wording to learn.
        ("[X]: [Y].", None, "[P*3] [X]: [Y]."),
        ("[X]'s capital, [Y]", None, "[P*3] [X][P:'s capital,] [Y]"),
        ("The [[big] one: [X]\n[Y]", None, "[P:The [[big]] one:] [X]\n[Y]"),
    ],
)
def test_a_manual_template_becomes_a_learned_one(manual: str, about: str | None, learned: str) -> None:
    template = Template.from_manual(manual, about=about)
    assert str(template) == learned
    assert Template.parse(learned) == template
    assert template.has_slots


@pytest.mark.parametrize(
    ("manual", "about", "learned"),
    [
        ("{text} It was [Y]", None, "{text} [P:It was] [Y]"),
        ("{text} This is for the [Y] team", None, "{text} [P:This is for the] [Y] [P:team]"),
        # What stands in front of the last field never changes, so that it can be kept.
        ("Message: {text} It was [Y]", None, "Message: {text} [P:It was] [Y]"),
        ("{a} and {b!}? It was [Y]", None, "{a} and {b!}[P:? It was] [Y]"),
        ("{text} It was [Y]", "mood", "The mood: {text} [P:It was] [Y]"),
        ("{text} It was [Y] for {who}", None, "{text} [P:It was] [Y] [P:for] {who}"),
    ],
)
def test_slots_behind_the_text(manual: str, about: str | None, learned: str) -> None:
    template = Template.from_manual(manual, about=about, after=True)
    assert str(template) == learned
    assert Template.parse(learned) == template


@pytest.mark.parametrize("manual", ["Text: {text} [Y]", "{text}: [Y] it is", "It was [Y]: {text}", "It was [Y]"])
def test_slots_behind_the_text_need_words_there(manual: str) -> None:
    with pytest.raises(TemplateError, match=r"no words between the last field and \[Y\]"):
        Template.from_manual(manual, after=True)


@pytest.mark.parametrize("manual", ["a [P*2] [X] [Y]", "a [P:b] [X] [Y]"])
def test_a_manual_template_with_slots_is_refused(manual: str) -> None:
    with pytest.raises(TemplateError, match="a manual template has no slots; give this one as template") as caught:
        Template.from_manual(manual)
    assert caught.value.column == 2


def test_what_a_template_says_of_itself() -> None:
    template = Template.parse("{a} [X] {a!} [Y] {b}")
    assert template.fields == ("a", "x", "b")
    assert not template.has_slots
    assert Template.parse("[P] [Y]").has_slots
    assert Template.parse("[P:w] [Y]").has_slots
    kept, dropped = template.without_tail()
    assert (str(kept), dropped) == ("{a} [X] {a!} [Y]", " {b}")


@pytest.mark.parametrize(("pattern", "column"), [("a\ud800 [Y]", 1), ("[P:a \udce9] [Y]", 5), ("{b\udfff} [Y]", 2)])
def test_half_a_character_is_refused_with_an_error_that_can_be_printed(pattern: str, column: int) -> None:
    """In a literal, in the words of slots or in a field's name, read from a pattern or put together from pieces."""
    with pytest.raises(TemplateError, match=r"half a character .*; write the template in UTF-8") as caught:
        Template.parse(pattern)
    assert (caught.value.pattern, caught.value.column) == (pattern, column)
    assert str(caught.value).encode().decode().split("\n")[2] == " " * (column + 2) + f"^ column {column + 1}"
    with pytest.raises(TemplateError, match="half a character"):
        Template((Literal(pattern), Target()))
    with pytest.raises(TemplateError, match="unclosed") as caught:
        Template.parse(pattern + "[")
    str(caught.value).encode()


def test_a_long_pattern_is_read_in_linear_time_and_shown_in_part() -> None:
    """Fifty thousand escaped brackets are one text; an error shows where it is, and not the whole pattern."""
    many = 50_000
    assert Template.parse("[[" * many + "[Y]").pieces == (Literal("[" * many), Target())
    assert len(Template.parse("{a} [P][X]" * many + "[Y]").pieces) == 4 * many + 1
    with pytest.raises(TemplateError, match="unknown piece") as caught:
        Template.parse("a" * many + "[Q] here [Y]" + "b" * many)
    _, shown, caret = str(caught.value).split("\n")
    assert (caught.value.column, caret.strip()) == (many, f"^ column {many + 1}")
    assert shown[caret.index("^") :].startswith("[Q] here")
    assert len(shown) < 500
