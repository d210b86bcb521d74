"""Checks of data: labels found in targets, merged labels, rows that may be mistakes; and of a task with a tokenizer."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.tokenizer import TextTokenizer
from ptuning.data.answer_space import AnswerSpace
from ptuning.data.checks import (
    MAX_LABELS,
    Labelled,
    Labels,
    Merge,
    Report,
    check_data,
    check_known,
    check_words,
    found_labels,
    label_rows,
    look_alikes,
    merges,
    seen_labels,
)
from ptuning.data.questions import Question, Questions, as_questions
from ptuning.data.reading import load_records
from ptuning.data.task_files import TaskFile
from ptuning.errors import LabelWordError, RecordError
from ptuning.template.labels import LabelWords
from ptuning.template.segments import Kind
from tests.conftest import bound
from tests.messages import write_mail

TEAMS = ("account", "billing", "shipping", "technical")
FIELDS = ("message",)


def rows_of(**counts: int) -> Questions:
    """Rows with different texts and so many rows of each label; a double underscore is a space."""
    rows = [(label.replace("__", " "), at) for label, count in counts.items() for at in range(count)]
    return Questions(
        [Question({"message": f"{label} text {at}", "y": label}, where=f"m.csv, line {line}")
         for line, (label, at) in enumerate(rows, start=2)],
        name="m.csv",
    )  # fmt: skip


def look(rows: Questions, labels: Labels | None = "auto", *, merge: Merge | None = None, **more: Questions) -> Labelled:
    return label_rows({"train": rows, **more}, labels, fields=FIELDS, merge=merge)


@pytest.fixture
def mail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Questions:
    """The messy mailbox; its places are those of a file in the working folder."""
    monkeypatch.chdir(tmp_path)
    write_mail(Path())
    return as_questions(load_records("mail.csv", fields={"y": "team"}))


# a messy file


def test_a_messy_mailbox_gives_its_teams_and_names_what_is_wrong(mail: Questions) -> None:
    found = look(mail)
    assert found.words == LabelWords({team: team for team in TEAMS})
    (counts, twice), warnings = found.report.facts, found.report.warnings
    assert counts == "train: 4 labels in 87 records: account 22, billing 21, shipping 22, technical 22"
    assert twice == "train: mail.csv, line 62 (as mail.csv, line 21) has the same text and label as another"
    empty, mistyped = warnings
    assert all(fact in empty for fact in ("'message'", "2 rows: mail.csv, lines 13, 58", "2 of 90 rows"))
    assert "'biling' looks like 'billing' (mail.csv, line 35)" in mistyped
    assert "alias_label biling=billing" in mistyped
    assert found.report.left_out == [
        "mail.csv, line 13: no text",
        "mail.csv, line 58: no text",
        "mail.csv, line 35: 'biling' looks like 'billing'",
    ]
    rows = found.parts["train"]
    assert (rows.name, len(rows), rows.fields) == ("mail.csv", 87, {"y": "team"})
    assert rows.sha256 != mail.sha256


def test_a_typo_is_never_merged_unless_that_is_asked_for(mail: Questions) -> None:
    found = look(mail, merge=["biling=billing"])
    assert "billing 22" in found.report.facts[0]
    assert len(found.parts["train"]) == 88
    assert not any("biling" in doubt for doubt in found.report.warnings)
    with pytest.raises(RecordError, match=r"line 35: 'biling' .*alias_label \"biling=billing\""):
        look(mail, list(TEAMS))
    assert look(mail, ";".join(TEAMS), merge={"biling": "billing"}).words == found.words


def test_without_labels_few_targets_are_named_with_what_to_type(mail: Questions) -> None:
    found = look(mail, None)
    assert found.words is None
    assert len(found.parts["train"]) == 88  # the rows without a text are of no use either way
    (fact,) = found.report.facts
    assert "5 distinct targets in 88 records: shipping 22, technical 22, account 22, billing 21, biling 1." in fact
    assert 'labels as auto, or "shipping;technical;account;billing"' in fact
    assert found.report.warnings[-1] == "'biling' (mail.csv, line 35) looks like 'billing'"


def test_strict_makes_an_error_of_every_doubt(mail: Questions) -> None:
    with pytest.raises(RecordError) as caught:
        label_rows({"train": mail}, "auto", fields=FIELDS, strict=True)
    for part in ("with strict", "mail.csv, lines 13, 58", "'biling' looks like 'billing' (mail.csv, line 35)"):
        assert part in str(caught.value)
    clean = rows_of(good=4, bad=4)
    assert label_rows({"train": clean}, "auto", fields=FIELDS, strict=True).parts["train"] is clean


def test_rows_that_nobody_has_labelled_yet_are_left_out() -> None:
    """An inbox holds mails that wait; in a file where most rows lack a target, another column holds it."""
    rows = rows_of(good=4, bad=4)
    waiting = [Question({"message": "new", **more}, where=f"m.csv, line {line}")
               for line, more in ((10, {"y": " "}), (11, {}))]  # fmt: skip
    for labels in ("auto", None):
        found = look(Questions([*rows, *waiting], name="m.csv", fields={"y": "team"}), labels)
        assert found.report.warnings == [
            "train: 2 of 10 rows have no target, the field 'team': m.csv, lines 10, 11; left out"
        ]
        assert found.report.left_out == ["m.csv, line 10: no target", "m.csv, line 11: no target"]
        assert list(found.parts["train"]) == list(rows)
    found = look(rows, test=Questions([*rows_of(good=2), waiting[0]], name="t.csv"))
    assert (len(found.parts["test"]), found.report.warnings[0][:28]) == (2, "test: 1 of 3 rows has no tar")
    with pytest.raises(RecordError, match=r"1 of 9 rows has no target"):
        label_rows({"train": Questions([*rows, waiting[0]])}, "auto", fields=FIELDS, strict=True)
    with pytest.raises(RecordError, match=r"no target; the field 'y' is missing or empty.*field y=NAME"):
        look(Questions([*rows[:2], *waiting], name="m.csv"))


# labels in targets


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({f"label {at}": 3 for at in range(10_000)}, "10,000 different targets in 30,000 records"),
        ({f"a text of its own {at}": 1 + (at == 0) for at in range(9)}, "9 different targets in 10 records"),
        ({"billing": 9, "biling": 1}, "one label only"),
        *((dict.fromkeys(numbers, 9), "the targets are numbers") for numbers in (
            [f"{at}.5" for at in range(4)], [str(at) for at in range(11)], ["1,5", "-2", "3%"]
        )),
    ],
)  # fmt: skip
def test_targets_that_can_be_no_labels(counts: dict[str, int], message: str) -> None:
    with pytest.raises(RecordError, match=f"m.csv: .*{message}"):
        found_labels(counts, name="m.csv")
    if "numbers" in message:
        report = Report()
        seen_labels(counts, {}, report)
        assert "near miss" in report.facts[0]


def test_many_classes_and_stars_are_labels() -> None:
    assert len(found_labels({f"label {at}": 3 for at in range(MAX_LABELS)}, name="m.csv")) == MAX_LABELS
    assert found_labels({str(at): 9 for at in range(1, 6)}, name="m.csv") == ["1", "2", "3", "4", "5"]


def test_labels_in_another_spelling_are_one_only_when_asked() -> None:
    rows = rows_of(billing=9, Billing=5, very__late=6, very____late=1)
    with pytest.raises(RecordError, match=r"'billing' \(9\) and 'Billing' \(5\)\. .*alias_label case"):
        look(rows)
    assert look(rows, merge="case").words == LabelWords({"billing": "billing", "very late": "very late"})
    given = look(rows, ["Billing", "very late"], merge=["case"])
    assert given.words is not None
    assert Counter(row.record["y"] for row in given.parts["train"]) == {"Billing": 14, "very late": 7}


def test_merges_are_pairs_or_case() -> None:
    assert merges(None) == ()
    assert merges({"a": "b"}) == merges("a=b") == merges([" a = b "]) == ("a=b",)
    assert merges(["case", "a=b"]) == ("a=b", "case")
    for wrong in ("a", 7, ["a=b", 7]):
        with pytest.raises(LabelWordError, match=r"WRONG=RIGHT|biling=billing"):
            merges(wrong)  # type: ignore[arg-type]


def test_long_targets_take_no_time() -> None:
    """Each pair of texts of a million characters would be compared letter by letter."""
    texts = ("9" * 1_000_000 + "x", "9" * 1_000_000 + "y")
    assert look_alikes({texts[0]: 20, texts[1]: 1}) == {}
    report = Report()
    seen_labels({texts[0]: 20, texts[1]: 9}, {}, report)
    assert len(report.facts[0]) < 500


@pytest.mark.parametrize(
    ("counts", "likely"),
    [
        ({"billing": 8, "biling": 2}, {"biling": "billing"}),
        ({"billing": 8, "billign": 1}, {"billign": "billing"}),
        ({"technical": 20, "tehcnicla": 1}, {"tehcnicla": "technical"}),
        ({"billing": 20, "biling": 3}, {}),  # too often for a slip
        ({"billing": 7, "biling": 2}, {}),  # the other is not frequent
        ({"5 stars": 20, "4 stars": 1}, {}),
        ({"increase": 20, "decrease": 1}, {}),
        ({"male": 20, "female": 1}, {}),
        ({"yes": 20, "yer": 1}, {}),  # too short to tell
        ({"sales": 20, "refunds": 1}, {}),
        ({"billing": 9, "sales": 9, "Billing": 1}, {"Billing": "billing"}),
    ],
)
def test_rare_labels_that_look_like_frequent_ones(counts: dict[str, int], likely: dict[str, str]) -> None:
    assert look_alikes(counts) == likely


def test_the_test_part_brings_no_labels_and_its_typos_are_left_out() -> None:
    train, test = rows_of(billing=9, sales=9), rows_of(billing=3, bilings=1)
    found = label_rows({"train": train, "test": test}, "auto", fields=("other",))
    assert found.words is not None
    assert found.words.labels == ("billing", "sales")
    assert len(found.parts["test"]) == 3
    with pytest.raises(RecordError, match="'refund' is not one of the labels billing, sales"):
        label_rows({"train": train, "test": rows_of(refund=5)}, "auto", fields=("other",))


def test_known_labels_are_taken_from_a_prompt() -> None:
    known = LabelWords({"billing": "bill", "sales": "sale"})
    found = label_rows({"data": rows_of(billing=3, biling=1)}, "auto", fields=FIELDS, known=known)
    assert (found.words, len(found.parts["data"])) == (known, 3)
    with pytest.raises(RecordError, match="'biling' is not one of the labels"):
        label_rows({"data": rows_of(billing=3, biling=1)}, fields=FIELDS, known=known)


def test_rows_with_their_own_choices_have_no_labels() -> None:
    rows = Questions([Question({"message": "a", "y": "b"}, ("b", "c"), (0,))])
    assert look(rows, None).parts == {"train": rows}
    with pytest.raises(LabelWordError, match="the rows bring their own choices"):
        look(rows)


# other rows


def test_only_rows_without_any_text_are_left_out_and_test_rows_never() -> None:
    rows = Questions([Question({"a": text, "b": " ", "y": "y"}, where=f"m.csv, line {at}") for at, text in
                      enumerate(["", "x", "z"], start=2)], name="m.csv")  # fmt: skip
    found = label_rows({"train": rows, "test": rows}, fields=("a", "b"))
    assert [len(part) for part in found.parts.values()] == [2, 3]
    assert found.report.warnings[1].endswith(
        "3 rows: m.csv, lines 2, 3, 4; 1 of 3 rows have no text at all and are left out"
    )
    assert "test: the field 'a' is empty in 1 row: m.csv, line 2" in found.report.warnings
    with pytest.raises(RecordError, match=r"the train data \(m.csv\) has no row with text in b"):
        label_rows({"train": rows}, fields=("b",))
    assert label_rows({"train": rows}, fields=()).parts["train"] is rows


def test_texts_that_are_there_twice() -> None:
    def part(*rows: tuple[str, str], start: int) -> Questions:
        found = [Question({"message": one, "y": two}, where=f"m.csv, line {start + at}")
                 for at, (one, two) in enumerate(rows)]  # fmt: skip
        return Questions(found, name="m.csv")

    train = part(("a", "good"), ("b", "bad"), ("a", "bad"), ("c", "good"), start=2)
    dev = part(("b", "bad"), ("d", "good"), start=12)
    warnings = label_rows({"train": train, "dev": dev}, ["good", "bad"], fields=FIELDS).report.warnings
    assert warnings == [
        "train: m.csv, line 4 (as m.csv, line 2) has the same text as another, and another label",
        "dev: m.csv, line 12 (as m.csv, line 3) has the text of a row of train, so the scores may be too good",
    ]


def test_empty_parts_and_missing_targets() -> None:
    with pytest.raises(RecordError, match=r"the dev data \(in memory\) holds no records"):
        look(rows_of(good=1), None, dev=Questions([]))
    with pytest.raises(RecordError, match=r"line 2: no target; .*field y=NAME\), or fill it in or remove the record"):
        look(Questions([Question({"a": "b", "y": " "}, where="m.csv, line 2"), *rows_of(good=1)]), None)


# a task and a tokenizer

TASK = """
name = "moods"
version = "1"
[labels]
good = ["great", "good"]
bad = ["terrible"]
[[patterns]]
manual = "{text} It was [Y]."
"""
MOODS: list[dict[str, object]] = [{"text": "a film", "label": "good"}, {"text": "  ", "label": "good"}]
Check = Callable[..., Report]


@pytest.fixture
def check(raw_tokenizer: Callable[[str], PreTrainedTokenizerFast]) -> Check:
    """Check a task file's text with a tiny tokenizer of a family."""

    def words(text: str, *, family: str = "llama", rows: list[dict[str, object]] | None = None) -> Report:
        task, kind = TaskFile.parse(text), "masked" if family in ("bert", "roberta") else "causal"
        parts = {"train": task.read_rows(rows)} if rows else {}
        found: Kind = "masked" if kind == "masked" else "causal"
        return check_words(task, TextTokenizer(raw_tokenizer(family), max_tokens=64), found, parts=parts)

    return words


def test_the_tokens_of_words_are_told_once_for_all_patterns(check: Check) -> None:
    found = check(TASK + '[[patterns]]\nmanual = "Text: {text} It was [Y]."')
    assert len(found.facts) == 1
    assert found.facts[0].startswith("label words and their tokens: good: 'great' [")
    assert not found.warnings + found.problems


def test_words_that_collide_or_are_unknown_are_problems_of_every_pattern(check: Check) -> None:
    found = check(TASK.replace('"terrible"', '"漢"'), family="bert")
    assert len(found.problems) == 2
    assert found.problems[0].startswith("pattern 1, manual: the word '漢' of label 'bad' is unknown to the tokenizer")
    found = check(TASK.replace('"great"', '"no film"').replace('"terrible"', '"no  film"'), family="bert")
    assert any("have the same token ids" in problem for problem in found.problems)


def test_rows_that_are_shortened_and_rows_that_do_not_fit(check: Check) -> None:
    rows: list[dict[str, object]] = [{"text": "city " * 80, "label": "bad"}, *MOODS]
    found = check(TASK, rows=rows)
    assert not found.problems
    assert (
        "pattern 1, manual: 1 of 3 rows are shortened to 64 tokens, in the fields without '!': text" in found.warnings
    )
    kept = check(TASK.replace("{text}", "{text!}"), rows=rows)
    assert any("does not fit" in problem for problem in kept.problems)


def test_rows_that_bring_their_choices(check: Check) -> None:
    text = 'name="c"\nversion="1"\n[choices]\nfrom=["a","b"]\n[[patterns]]\nmanual="[X] is [Y]"'
    assert check(text) == Report()
    rows: list[dict[str, object]] = [{"x": "city", "a": "yes", "b": "people " * 80, "label": 0}]
    found = check(text, rows=rows)
    assert all("does not fit" in problem for problem in found.problems)
    assert len(found.problems) == 2


def test_what_stands_in_the_data() -> None:
    task = TaskFile.parse(TASK)
    found = check_data(task, {"train": task.read_rows(MOODS), "test": task.read_rows(MOODS, labelled=False)})
    assert found.facts == ["train: 2 rows of in memory; good 2, bad 0", "test: 2 rows of in memory"]
    assert found.warnings[:2] == ["train: no row has the label bad", "train: the field 'text' is empty in 1 row: row 2"]
    text = 'name="c"\nversion="1"\ngroup="g"\n[choices]\nfrom=["a[]"]\n[[patterns]]\nmanual="[X] is [Y]"'
    choose = TaskFile.parse(text)
    rows = choose.read_rows([{"x": "b", "a": list("abcd"[:n]), "label": 0, "g": 1} for n in (2, 3, 4)])
    assert check_data(choose, {"dev": rows}).facts == [
        "dev: 3 rows of in memory; 2 to 4 choices, 3 in the middle; 1 groups"
    ]


def test_targets_and_fields_that_the_tokenizer_does_not_know(check: Check) -> None:
    task = TASK.replace('[labels]\ngood = ["great", "good"]\nbad = ["terrible"]\n', "")
    rows: list[dict[str, object]] = [{"text": "a film", "label": "good"}, {"text": "漢漢", "label": "\U0001f642"}]
    found = check(task, family="bert", rows=rows)
    assert any(
        "1 of 2 targets of in memory are unknown to the tokenizer, such as '\U0001f642'" in one
        for one in found.warnings
    )
    assert any("the field 'text' of 1 of 2 records of in memory is mostly unknown" in one for one in found.warnings)
    assert (len(found.warnings), found.problems) == (2, [])
    assert check(task, family="llama", rows=rows) == Report()
    (manual, learned) = check(task, family="bert", rows=rows[1:]).problems
    assert "1 of 1 targets" in manual
    assert "the vocabulary does not fit the data" in learned


def test_a_template_may_begin_with_a_field(make_backbone: Callable[[str], Backbone]) -> None:
    """Targets are tokenised without their rows; a causal model without BOS needs something in front of them."""
    known = as_questions([{"x": "Kenya", "y": "Nairobi"}])
    assert check_known(bound(make_backbone("gpt2"), "[X] [Y]"), AnswerSpace(), [known]) == []
