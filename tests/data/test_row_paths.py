"""Paths to texts in a row, lists unfolded, and repairs."""

import pytest

from ptuning.data.questions import RowPath, unfold
from ptuning.errors import RecordError, TaskError
from ptuning.files import Json

ROW: Json = {
    "text": "Tina said it was hers.",
    "n": 2,
    "right": True,
    "nothing": None,
    "target": {"span": "Tina", "at": 2},
    "passage": {"text": "p", "questions": [{"q": "a", "answers": [{"t": "1"}, {"t": "2"}]}, {"q": "b", "answers": []}]},
}


def read(path: str, row: Json = ROW) -> list[str]:
    return RowPath.parse(path).texts({"": row}, where="here")


def test_a_path_names_what_it_goes_through() -> None:
    assert read("target.span") == ["Tina"]
    assert read("passage.questions[].q") == ["a", "b"]
    assert read("passage.questions[].answers[].t") == ["1", "2"]
    assert read("n") + read("right") == ["2", "true"]


def test_lists_unfold_into_one_context_each_and_paths_stay_in_theirs() -> None:
    lists = [RowPath.parse("passage.questions[]"), RowPath.parse("passage.questions[].answers[]")]
    contexts = list(unfold(ROW, lists, where="here"))
    assert len(contexts) == 2  # the second question has no answers
    texts = [
        RowPath.parse(place).text(contexts[1], where="here") for place in ("passage.text", "passage.questions[].q")
    ]
    assert texts == ["p", "a"]
    assert RowPath.parse("passage.questions[].answers[].t").text(contexts[1], where="here") == "2"


@pytest.mark.parametrize(
    ("repair", "text", "repaired"),
    [
        ("no_full_stop", "It rains.", "It rains"),
        ("no_full_stop", "e.g. this ?! ", "e.g. this"),
        ("lower_first", "The man left.", "the man left."),
        ("lower_first", "Water ran.", "water ran."),
        ("lower_first", "NASA said so.", "NASA said so."),
        ("lower_first", "I left.", "I left."),
        ("before @gap", "in @gap we", "in "),
        ("after @gap", "in @gap we", " we"),
        ("without @hl", "a @hl b@hl", "a  b"),
        ("no_full_stop|lower_first", "We left.", "we left"),
    ],
)
def test_repairs(repair: str, text: str, repaired: str) -> None:
    assert read(f"t|{repair}", {"t": text}) == [repaired]


def test_a_marked_word_keeps_its_punctuation_outside() -> None:
    assert read("text|mark target.at") == ["Tina said *it* was hers."]
    assert read("t|mark n", {"t": 'for him,"', "n": 1}) == ['for *him*,"']


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "is not a path into a row"),
        ("a..b", "is not a path into a row"),
        ("a[0].b", "is not a path into a row"),
        ("a|no_ful_stop", "unknown repair 'no_ful_stop'. Did you mean 'no_full_stop'"),
        ("a|no_full_stop now", "takes nothing"),
        ("a|before", "needs something"),
    ],
)
def test_malformed_paths_are_errors_of_the_task(path: str, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        RowPath.parse(path)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("txt", "here: no 'txt'.*Did you mean 'text'"),
        ("text.span", "looks for 'span' in \"Tina said it was hers.\", which is not an object"),
        ("target[].span", "'target' is not a list"),
        ("nothing", "is null"),
        ("target", "is an object"),
        ("passage.questions", "is a list"),
        ("text|before @gap", "there is no '@gap'"),
        ("text|mark n9", "no 'n9'"),
        ("target.span|mark n", "no word number 2"),
    ],
)
def test_rows_that_lack_something_are_errors_of_the_data(path: str, message: str) -> None:
    with pytest.raises(RecordError, match=message):
        read(path)


def test_a_field_takes_one_text() -> None:
    with pytest.raises(RecordError, match="leads to 2 texts"):
        RowPath.parse("passage.questions[].q").text({"": ROW}, where="here")


@pytest.mark.parametrize(
    ("text", "without"),
    [
        ("It ends.", "It ends"), ("It ends ?! ", "It ends"), ("a. . .", "a. ."), (" . ", ""), ("None ", "None "),
        ("line.\n", "line"), ("", ""), ("1.5", "1.5"), ("." * 300_000 + "x", "." * 300_000 + "x"),
        ("x" + " " * 300_000 + "y", "x" + " " * 300_000 + "y"), ("x" + " ." * 100_000, "x" + " ." * 99_999),
    ],
)  # fmt: skip
def test_a_full_stop_is_taken_off_texts_of_any_length(text: str, without: str) -> None:
    """A regular expression would take hours for the long ones."""
    assert RowPath.parse("x|no_full_stop").texts({"": {"x": text}}, where="here") == [without]


def test_a_number_of_thousands_of_digits_marks_no_word() -> None:
    row: Json = {"text": "a b", "at": "9" * 5000}
    with pytest.raises(RecordError, match=r"here: no word number 9{80} to mark among the 2"):
        read("text|mark at", row)
