"""`ptuning predict`: every way in and out, abstaining, and what is typed on a terminal."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from ptuning.cli import inputs, terminal
from ptuning.cli.commands import predict
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prompt import Prompt
from tests.cli.test_app import call, fails, works, write_lines

TEXTS = ["a good film", "a bad one, all in all", "terrible"]
LABELS = {"positive": ["great", "good"], "negative": ["terrible"], "none": ["25"]}


@pytest.fixture(autouse=True)
def _prompt(tmp_path: Path, llama: str) -> None:
    """A prompt with labels, and one that writes, in the folder where every test works."""
    Prompt.manual("{message} It was [Y]", label_words=LABELS).save(tmp_path / "moods")
    Prompt.manual("{a} and {b} It was [Y]", label_words=LABELS).save(tmp_path / "two")


def lines_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def table_of(path: str, delimiter: str = ",") -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(Path(path).read_text(encoding="utf-8")), delimiter=delimiter))


def test_json_has_the_probabilities_of_all_labels(llama: str) -> None:
    """Without --top-k, and adding up to 1; the likeliest first."""
    (found,) = lines_of(works("predict", "moods", TEXTS[0], "--json", "--backbone", llama))
    assert set(found) == {"record", "prediction", "probabilities", "candidates"}
    assert set(found["probabilities"]) == set(LABELS)
    assert sum(found["probabilities"].values()) == pytest.approx(1.0, abs=1e-5)
    assert next(iter(found["probabilities"])) == found["prediction"] == found["candidates"][0]["text"]
    assert found["probabilities"][found["prediction"]] == pytest.approx(math.exp(found["candidates"][0]["log_prob"]))
    (shown,) = works("predict", "moods", TEXTS[0], "--num-answers", "3", "--backbone", llama).splitlines()
    assert shown == "\t".join(f"{name} ({value:.3f})" for name, value in found["probabilities"].items())


def test_the_answer_alone_is_printed_where_it_is_read_on(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script gets the label, a person on a terminal also how sure it is."""
    args = ("predict", "moods", TEXTS[0], "--backbone", llama)
    label = works(*args).strip()
    assert label in LABELS
    monkeypatch.setattr(type(terminal.results()), "is_terminal", True)
    name, probability, others = works(*args).strip().split("\t")
    assert (name, others.count(",")) == (label, 1)
    assert 1 / 3 <= float(probability) <= 1


def test_lines_csv_and_jsonl_get_the_same_answers_from_a_file_and_from_the_input(llama: str) -> None:
    Path("mail.txt").write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    Path("mail.csv").write_text("id;message\n" + "".join(f"{at};{x}\n" for at, x in enumerate(TEXTS)), encoding="utf-8")
    write_lines(Path("mail.jsonl"), [{"message": text} for text in TEXTS])
    write_lines(Path("named.jsonl"), [{"msg": text} for text in TEXTS])
    more = ("--backbone", llama)
    wanted = works("predict", "moods", "--data", "mail.txt", *more)
    assert len(wanted.splitlines()) == 3
    for name in ("mail.txt", "mail.csv", "mail.jsonl"):
        assert works("predict", "moods", "--data", name, *more) == wanted
        for source in (("-",), ("--data", "-")):
            assert works("predict", "moods", *source, *more, stdin=Path(name).read_bytes()) == wanted
    assert works("predict", "moods", "--data", "named.jsonl", "--field", "message=msg", *more) == wanted


def test_a_csv_keeps_its_columns_and_gets_two(llama: str) -> None:
    Path("mail.csv").write_text('id;message;note\n1;"a good; film";"two\nlines"\n2;bad;\n', encoding="utf-8")
    args = ("predict", "moods", "--data", "mail.csv", "--backbone", llama)
    done = call(*args, "--out", "new/answers.csv")
    assert (done.code, done.out) == (0, "")
    assert "2 answers written to new/answers.csv" in done.err
    rows = table_of("new/answers.csv", ";")
    assert list(rows[0]) == ["id", "message", "note", "prediction", "probability"]
    assert [(row["id"], row["message"], row["note"]) for row in rows] == [
        ("1", "a good; film", "two\nlines"),
        ("2", "bad", ""),
    ]
    found = lines_of(works(*args, "--json"))
    assert [row["prediction"] for row in rows] == [one["prediction"] for one in found]
    for row, one in zip(rows, found, strict=True):
        assert float(row["probability"]) == pytest.approx(one["probabilities"][one["prediction"]], abs=1e-6)
    works(*args, "--out", "answers.jsonl")
    assert lines_of(Path("answers.jsonl").read_text(encoding="utf-8")) == found


def test_a_table_of_other_data_has_all_its_names_as_columns(llama: str) -> None:
    rows = [{"message": "a", "n": 1}, {"message": "b", "tags": ["x"], "n": None}]
    write_lines(Path("mail.jsonl"), rows)  # type: ignore[arg-type]
    works("predict", "moods", "--data", "mail.jsonl", "--backbone", llama, "--out", "answers.csv")
    found = table_of("answers.csv")
    assert list(found[0]) == ["message", "n", "tags", "prediction", "probability"]
    assert [(row["n"], row["tags"]) for row in found] == [("1", ""), ("", '["x"]')]
    works("predict", "moods", "-", "--backbone", llama, "--out", "answers.csv", "--overwrite", stdin=b"a\nb\n")
    assert [row["message"] for row in table_of("answers.csv")] == ["a", "b"]
    works("predict", "moods", "a text", "--backbone", llama, "--out", "one.csv")
    assert [row["message"] for row in table_of("one.csv")] == ["a text"]


def test_nothing_is_overwritten_unasked(llama: str) -> None:
    Path("mail.csv").write_text("message\na\n", encoding="utf-8")
    Path("answers.csv").write_text("mine", encoding="utf-8")
    Path("done.csv").write_text("message,prediction\na,b\n", encoding="utf-8")
    args = ("predict", "moods", "--data", "mail.csv")
    fails(*args, "--out", "answers.csv", says=["answers.csv exists; name another file, or replace it with --overwrite"])
    fails(*args, "--out", "mail.csv", "--overwrite", says=["mail.csv is the data itself; name another file"])
    fails(*args, "--out", "moods", says=["cannot tell the format of moods; --out ends in one of .csv, .jsonl, .ndjson"])
    fails(*args, "--out", "a.txt", says=["cannot tell the format of a.txt"])
    fails(*args, "--overwrite", says=["--overwrite is for the file of the answers; name it with --out"])
    fails(*args, "--out", "a.csv", "--json", says=["--json prints answers, and --out FILE writes them"])
    fails(
        *args,
        "--out",
        "a.csv",
        "--num-answers",
        "2",
        says=["a CSV has one answer for each row; leave --num-answers out"],
    )
    fails("predict", "moods", "--data", "done.csv", "--out", "a.csv", "--backbone", "not looked for",
          says=["the data has a column 'prediction' already; rename it there, or write .jsonl"])  # fmt: skip
    works(*args, "--out", "answers.csv", "--overwrite", "--backbone", llama)
    assert table_of("answers.csv")[0]["message"] == "a"


def test_a_file_of_answers_appears_whole_or_not_at_all(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers are written as they are made, beside the file's name, and the half file goes where work ends early."""
    monkeypatch.setattr(predict, "PREDICTED_ROWS", 2)
    seen: list[int] = []
    answer = PromptModel.predict

    def watched(*given: Any, **named: Any) -> Any:
        (half,) = [path for path in Path.cwd().iterdir() if path.name.endswith(".tmp")]
        seen.append(len(half.read_bytes()))
        if len(seen) == 2:
            raise KeyboardInterrupt
        return answer(*given, **named)

    monkeypatch.setattr(PromptModel, "predict", watched)
    done = call("predict", "moods", "-", "--backbone", llama, "--out", "answers.csv", stdin=b"a\nb\nc\nd\n")
    assert done.code == 130
    assert [path.name for path in Path.cwd().iterdir() if path.name not in ("moods", "two")] == []


def test_unlikely_answers_are_held_back_and_counted(llama: str) -> None:
    args = ("predict", "moods", "-", "--backbone", llama)
    data = "\n".join(TEXTS).encode()
    free = lines_of(works(*args, "--json", stdin=data))
    best = [max(one["probabilities"].values()) for one in free]
    least = sorted(best)[1]
    done = call(*args, "--json", "--min-probability", str(least), stdin=data)
    found = lines_of(done.out)
    assert [one["prediction"] for one in found] == [
        one["prediction"] if p >= least else None for one, p in zip(free, best, strict=True)
    ]
    assert [one.get("abstained", False) for one in found] == [p < least for p in best]
    assert [one["probabilities"] for one in found] == [one["probabilities"] for one in free]
    assert done.err.splitlines()[-1] == f"1 of 3 abstained: no answer was as likely as {least:g}"
    printed = call(*args, "--min-probability", str(least), stdin=data).out.splitlines()
    assert printed == [one["prediction"] or "abstained" for one in found]
    works(*args, "--min-probability", "1", "--out", "answers.csv", stdin=data)
    assert [row["prediction"] for row in table_of("answers.csv")] == ["", "", ""]
    assert "0 of 3 abstained" in call(*args, "--min-probability", "0", stdin=data).err


@pytest.mark.parametrize("value", ["-0.1", "1.01", "nan"])
def test_a_threshold_is_a_probability(value: str) -> None:
    fails("predict", "moods", "a", "--min-probability", value, says=["a probability lies between 0 and 1"])


def test_a_threshold_needs_labels() -> None:
    for more, what in (((), "answers that are written"), (("--candidates", "some.txt"), "candidates")):
        says = ["min_probability (--min-probability) is for labels and choices", f"{what} have none that do"]
        fails("predict", "manual:[X] is [Y]", "a", "--min-probability", "0.5", *more, says=says)


def test_a_learned_prompt_needs_no_labels_and_a_manual_one_does(llama: str) -> None:
    """``--labels`` of training, given once more, is answered and not refused."""
    args = ("predict", "moods", TEXTS[0], "--backbone", llama)
    plain = works(*args)
    for labels in ("auto", "positive=great,good;negative=terrible;none=25"):
        done = call(*args, "--labels", labels)
        assert (done.out, done.code) == (plain, 0)
        assert "--labels is not needed: the prompt remembers its labels, positive, negative, none" in done.err
    other = call(*args, "--labels", "good;bad")
    assert other.out.strip() in ("good", "bad")
    assert "takes the place of the labels that the prompt learned, positive, negative, none" in other.err
    manual = ("predict", "manual:{message} It was [Y]", TEXTS[0], "--backbone", llama, "--json")
    (found,) = lines_of(works(*manual, "--labels", "good;bad"))
    assert set(found["probabilities"]) == {"good", "bad"}
    fails(*manual, "--labels", "auto", says=["--labels auto finds the labels in targets", "name them, as in --labels"])


def test_texts_that_are_empty_are_said(llama: str) -> None:
    """With their lines, at most a few of them; they are still answered, so that there is an answer for each row."""
    fails("predict", "moods", "", says=["the TEXT is empty, so there is nothing to answer"])
    done = call("predict", "moods", "-", "--backbone", llama, stdin=b"a\n\nb\n")
    assert len(done.out.splitlines()) == 3
    assert "warning: standard input, line 2: the text is empty, so the prediction is meaningless" in done.err
    rows = [{"a": "x", "b": " "}] * 7
    write_lines(Path("mail.jsonl"), rows)
    said = call("predict", "two", "--data", "mail.jsonl", "--backbone", llama).err
    assert said.count("warning") == 6
    assert "warning: mail.jsonl, line 5: the field 'b' is empty" in said
    assert "warning: so are 2 more of 7" in said


# ------------------------------------------------------------------------------------------- typed on a terminal


class Typed(io.StringIO):
    """What a person types."""

    def isatty(self) -> bool:
        return True


def test_texts_are_typed_until_an_empty_line(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = 0
    real = inputs.load

    def load(*given: Any, **named: Any) -> Any:
        nonlocal loads
        loads += 1
        return real(*given, **named)

    monkeypatch.setattr(predict, "load", load)
    alone = [works("predict", "moods", text, "--backbone", llama) for text in TEXTS[:2]]
    loads = 0
    for ending in ("\n\nnever read\n", "\n", ""):
        done = call("predict", "moods", "--backbone", llama, stdin=Typed("\n".join(TEXTS[:2]) + ending))
        assert (done.code, done.out) == (0, "".join(alone)), done.err
        assert done.err.count("> ") == 3
    assert loads == 3
    done = call("predict", "moods", "--backbone", llama, "--min-probability", "1", stdin=Typed("a\n"))
    assert (done.out, done.err.count("abstained")) == ("abstained\n", 0)  # each answer says it


def test_fields_are_asked_for_by_name_and_an_error_ends_nothing(llama: str) -> None:
    write_lines(Path("one.jsonl"), [{"a": "x", "b": ""}])
    alone = works("predict", "two", "--data", "one.jsonl", "--json", "--backbone", llama)
    typed = "\ud83d\ny\nx\n\n\n"
    done = call("predict", "two", "--json", "--backbone", llama, stdin=Typed(typed))
    assert (done.code, done.out) == (0, alone), done.err
    assert (done.err.count("a> "), done.err.count("b> ")) == (3, 2)
    assert "error: the text: it holds half a character" in done.err


def test_ctrl_c_at_the_prompt_ends_without_a_word(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(terminal, "ask", interrupted)
    done = call("predict", "moods", "--backbone", llama, stdin=Typed(""))
    assert (done.code, done.out) == (130, "")
    assert "Traceback" not in done.err
    assert "stopped" not in done.err


def test_what_cannot_be_typed() -> None:
    Path("choose.toml").write_text(
        'name="choose"\nversion="1"\n[choices]\nfrom=["a","b"]\n[[patterns]]\nmanual="[X]: [Y]"', encoding="utf-8"
    )
    for args, says in (
        (("moods", "--out", "a.csv"), "--out is for answers to --data"),
        (("manual:So [Y]",), "the template reads no field, so there is nothing to type"),
        (("manual:", "--task", "choose.toml"), "whose rows have choices of their own; use --data with JSONL or CSV"),
    ):
        done = call("predict", *args, stdin=Typed("a\n"))
        assert (done.code, done.out) == (2, "")
        assert says in done.err


def test_without_a_terminal_nothing_is_waited_for() -> None:
    fails("predict", "moods", says=["give either a TEXT or --data (a file, or - for lines of text, CSV or JSONL"])
    assert sys.stdin is not None


def test_text_that_the_tokenizer_does_not_know_is_warned_of(bert: str, caplog: pytest.LogCaptureFixture) -> None:
    works("predict", "manual:{x} is [Y]", "the movie", "--backbone", bert)
    assert not caplog.records
    works("predict", "manual:{x} is [Y]", "\U0001f642", "--backbone", bert)
    assert "the field 'x' of 1 of 1 records of the command line is mostly unknown to the tokenizer" in caplog.text
