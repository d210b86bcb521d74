"""`ptuning predict`: ways in and out, abstaining, files of answers that are kept, and lines typed on a terminal."""

import csv
import io
import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest

from ptuning.cli import terminal
from ptuning.cli.commands import predict
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prompt import Prompt
from tests.cli.calls import call, fails, lines_of, works, write_lines

TEXTS = ["a good film", "a bad one, all in all", "terrible"]
LABELS = {"positive": ["great", "good"], "negative": ["terrible"], "none": ["25"]}
WRITES = "manual:{message} It was [Y]"


@pytest.fixture(autouse=True)
def _prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two prompts with labels, in the folder where every test works."""
    monkeypatch.setattr(predict, "PREDICTED_ROWS", 2)
    Prompt.manual("{message} It was [Y]", label_words=LABELS).save(tmp_path / "moods")
    Prompt.manual("{a} and {b} It was [Y]", label_words=LABELS).save(tmp_path / "two")


def table_of(path: str, delimiter: str = ",") -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(Path(path).read_text(encoding="utf-8")), delimiter=delimiter))


def test_an_answer_and_its_probabilities(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args = ("predict", "moods", TEXTS[0], "--backbone", llama)
    (found,) = lines_of(works(*args, "--json"))
    assert set(found) == {"record", "prediction", "probabilities", "candidates"}
    assert sum(found["probabilities"].values()) == pytest.approx(1.0, abs=1e-5)
    assert next(iter(found["probabilities"])) == found["prediction"] == found["candidates"][0]["text"]
    assert found["probabilities"][found["prediction"]] == pytest.approx(math.exp(found["candidates"][0]["log_prob"]))
    (shown,) = works(*args, "--num-answers", "3").splitlines()
    assert shown == "\t".join(f"{name} ({value:.3f})" for name, value in found["probabilities"].items())
    assert works(*args) == f"{found['prediction']}\n"  # for a script
    monkeypatch.setattr(type(terminal.results()), "is_terminal", True)  # for a person, with the probabilities
    assert works(*args).startswith(f"{found['prediction']}\t{found['probabilities'][found['prediction']]:.3f}\t(")


def test_generated_answers(run_folder: Path, data: Path) -> None:
    (found,) = lines_of(works("predict", run_folder, "Kenya", "--json"))
    assert set(found) == {"record", "prediction", "candidates", "tokens"}
    assert works("predict", run_folder, "Kenya") == terminal.visible(found["prediction"]) + "\n"
    (short,) = lines_of(works("predict", run_folder, "Kenya", "--json", "--max-new-tokens", "1"))
    assert short["tokens"] == 1
    how = ("--do-sample", "--temperature", "3", "--top-p", "0.9", "--top-k", "40", "--json")
    drawn = works("predict", run_folder, "Kenya", *how, "--seed", "5")
    assert (
        drawn
        == works("predict", run_folder, "Kenya", *how, "--seed", "5")
        != works("predict", run_folder, "Kenya", *how)
    )
    beams = ("--num-beams", "2", "--length-penalty", "0", "--repetition-penalty", "1.5", "--stop", "e")
    assert works("predict", run_folder, "Kenya", *beams)
    rows = ("--data", data / "dev.jsonl")
    assert works("predict", run_folder, *rows, "--stream") == works("predict", run_folder, *rows)


def test_a_prompt_of_another_backbone(run_folder: Path, llama: str, other_llama: str) -> None:
    own = works("predict", run_folder, "Kenya", "--json")
    assert works("predict", run_folder, "Kenya", "--json", "--backbone", llama) == own
    fails("predict", run_folder, "Kenya", "--backbone", other_llama, says=[llama, other_llama, "force"])
    assert works("predict", run_folder, "Kenya", "--json", "--backbone", other_llama, "--force") != own


def test_lines_csv_and_jsonl_get_the_same_answers_from_a_file_and_from_the_input(llama: str) -> None:
    Path("mail.txt").write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    Path("mail.csv").write_text("id;message\n" + "".join(f"{at};{x}\n" for at, x in enumerate(TEXTS)), encoding="utf-8")
    write_lines("named.jsonl", [{"msg": text} for text in TEXTS])
    more = ("--backbone", llama)
    wanted = works("predict", "moods", "--data", "mail.txt", *more)
    assert len(wanted.splitlines()) == 3
    for name, *field in (("mail.txt",), ("mail.csv",), ("named.jsonl", "--field", "message=msg")):
        assert works("predict", "moods", "--data", name, *field, *more) == wanted
        for source in (("-",), ("--data", "-")):
            assert works("predict", "moods", *source, *field, *more, stdin=Path(name).read_bytes()) == wanted


def test_a_csv_keeps_its_columns_and_gets_two(llama: str) -> None:
    Path("mail.csv").write_text('id;message;note\n1;"a good; film";"two\nlines"\n2;bad;\n', encoding="utf-8")
    args = ("predict", "moods", "--data", "mail.csv", "--backbone", llama)
    done = call(*args, "--out", "new/answers.csv")
    assert (done.code, done.out) == (0, "")
    assert "2 answers written to new/answers.csv" in done.err
    rows, found = table_of("new/answers.csv", ";"), lines_of(works(*args, "--json"))
    assert list(rows[0]) == ["id", "message", "note", "prediction", "probability"]
    assert (rows[0]["id"], rows[0]["message"], rows[0]["note"]) == ("1", "a good; film", "two\nlines")
    for row, answer in zip(rows, found, strict=True):
        assert row["prediction"] == answer["prediction"]
        assert float(row["probability"]) == pytest.approx(answer["probabilities"][answer["prediction"]], abs=1e-6)
    works(*args, "--out", "answers.jsonl")
    assert lines_of(Path("answers.jsonl")) == found
    write_lines("mail.jsonl", [{"message": "a", "n": 1}, {"message": "b", "tags": ["x"], "n": None}])
    works("predict", "moods", "--data", "mail.jsonl", "--backbone", llama, "--out", "answers.csv")
    rows = table_of("answers.csv")
    assert list(rows[0]) == ["message", "n", "tags", "prediction", "probability"]
    assert [(row["n"], row["tags"]) for row in rows] == [("1", ""), ("", '["x"]')]


def test_what_files_of_answers_refuse() -> None:
    Path("mail.csv").write_text("message\na\n", encoding="utf-8")
    Path("answers.csv").write_text("mine", encoding="utf-8")
    Path("done.csv").write_text("message,prediction\na,b\n", encoding="utf-8")
    Path("folder.csv").mkdir()
    for more, says in (
        (("--out", "answers.csv"), ["answers.csv exists", "--overwrite"]),
        (("--out", "mail.csv", "--overwrite"), ["mail.csv is the data itself"]),
        (("--out", "a.txt"), ["a.txt", ".csv", ".jsonl"]),
        (("--out", "folder.csv"), ["folder.csv is a folder"]),
        (("--overwrite",), ["--overwrite", "--out"]),
        (("--resume",), ["--resume", "--out"]),
        (("--out", "a.csv", "--json"), ["--json", "--out"]),
        (("--out", "a.csv", "--num-answers", "2"), ["--num-answers"]),
        (("--data", "done.csv", "--out", "a.csv", "--backbone", "none"), ["'prediction' already"]),
        (("--stream",), ["stream"]),
        (("--num-beams", "2"), ["num_beams"]),
        (("--min-probability", "1.01"), ["1.01"]),
        (("--labels", "auto", "--candidates", "mail.csv", "--calibrate"), ["calibrate"]),
    ):
        fails("predict", "moods", "--data", "mail.csv", *more, says=says)
    fails("predict", WRITES, "a", "--min-probability", "0.5", says=["min_probability"])
    fails("predict", WRITES, "a", "--stream", "--json", says=["--stream", "--json"])


@pytest.mark.parametrize(("prompt", "out"), [(WRITES, "texts.jsonl"), ("moods", "texts.csv")])
def test_a_run_that_was_killed_goes_on_after_the_finished_answers(
    prompt: str, out: str, llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed without a word in the middle of a line: what is whole is kept, and the file is as without the kill."""
    write_lines("rows.jsonl", [{"message": f"{text} {at}"} for at in range(2) for text in TEXTS])
    args = ("predict", prompt, "--data", "rows.jsonl", "--backbone", llama)
    works(*args, "--out", f"whole-{out}")
    real, calls = PromptModel.predict, 0

    def dies(self: PromptModel, *given: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise ZeroDivisionError  # as good as a kill: nothing catches it
        return real(self, *given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(PromptModel, "predict", dies)
        with pytest.raises(ZeroDivisionError):
            call(*args, "--out", out)
    assert not Path(out).exists()
    assert len(Path(f"{out}.part").read_text(encoding="utf-8").splitlines()) == 1 + 4
    with Path(f"{out}.part").open("a", encoding="utf-8") as handle:
        handle.write('{"record": {"x": "the mo')
    fails(*args, "--out", out, says=[f"{out}.part", "--resume", "--overwrite"])
    fails(*args, "--out", out, "--resume", "--normalise", "mean", says=["normalise"]) if prompt == "moods" else None
    assert "4 of 6 answers are there already" in call(*args, "--out", out, "--resume").err
    assert Path(out).read_bytes() == Path(f"whole-{out}").read_bytes()
    assert not Path(f"{out}.part").exists()
    assert "finished already" in call(*args, "--out", out, "--resume").err


def test_kept_answers_of_another_run(llama: str) -> None:
    write_lines("rows.jsonl", [{"message": text} for text in TEXTS])
    args = ("predict", WRITES, "--data", "rows.jsonl", "--out", "texts.jsonl", "--backbone", llama)
    Path("texts.jsonl.part").write_text('{"lines of": {"num_beams": 4}}\n', encoding="utf-8")
    fails(*args, "--resume", says=["num_beams was 4 and is 1"])
    for damaged in ("", "x\n", '{"a": 1}\n', '{"lines of": {}}\nx\n'):
        Path("texts.jsonl.part").write_text(damaged, encoding="utf-8")
        fails(*args, "--resume", says=["texts.jsonl.part is damaged"])
    works(*args, "--overwrite")
    assert len(lines_of(Path("texts.jsonl"))) == len(TEXTS)
    Path("texts.jsonl.part").mkdir()
    fails(*args, "--overwrite", says=["texts.jsonl.part is no file"])


def test_ctrl_c_keeps_answers_and_says_how_to_go_on(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines("rows.jsonl", [{"message": text} for text in TEXTS])
    real = PromptModel.predict

    def interrupted(self: PromptModel, *given: Any, **more: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return real(self, *given, **more)

    args = ("predict", WRITES, "--data", "rows.jsonl", "--out", "texts.jsonl", "--backbone", llama)
    with monkeypatch.context() as patch:
        patch.setattr(PromptModel, "predict", interrupted)
        done = call(*args)
    assert done.code == 130
    assert "stopped after 2 of 3 answers; texts.jsonl.part is kept" in done.err
    assert "--resume" in done.err
    done = call(*args, "--resume", "--max-new-tokens", "3")
    assert "max_new_tokens was" in done.err
    works(*args, "--resume")
    rows = lines_of(Path("texts.jsonl"))
    assert len(rows) == 3
    assert {"record", "prediction", "candidates", "tokens", "stopped"} == set(rows[0])


def test_unlikely_answers_are_held_back_and_counted(llama: str) -> None:
    args, data = ("predict", "moods", "-", "--backbone", llama), "\n".join(TEXTS).encode()
    free = lines_of(works(*args, "--json", stdin=data))
    best = [max(each["probabilities"].values()) for each in free]
    least = sorted(best)[1]
    done = call(*args, "--json", "--min-probability", str(least), stdin=data)
    wanted = [each["prediction"] if p >= least else None for each, p in zip(free, best, strict=True)]
    assert [each["prediction"] for each in lines_of(done.out)] == wanted
    assert "1 of 3 abstained" in done.err
    printed = call(*args, "--min-probability", str(least), stdin=data).out.splitlines()
    assert printed == [each or "abstained" for each in wanted]
    done = call(*args, "--min-probability", "1", "--out", "answers.csv", stdin=data)
    assert [row["prediction"] for row in table_of("answers.csv")] == ["", "", ""]
    assert "3 of 3 abstained" in done.err


def test_labels_replace_those_of_the_prompt(llama: str) -> None:
    args = ("predict", "moods", TEXTS[0], "--backbone", llama)
    plain = works(*args)
    for labels in ("auto", "positive=great,good;negative=terrible;none=25"):
        done = call(*args, "--labels", labels)
        assert (done.out, done.err) == (plain, "")
    other = call(*args, "--labels", "good;bad")
    assert other.out.strip() in ("good", "bad")
    assert "positive, negative, none" in other.err
    (found,) = lines_of(works("predict", WRITES, TEXTS[0], "--backbone", llama, "--json", "--labels", "good;bad"))
    assert set(found["probabilities"]) == {"good", "bad"}
    fails("predict", WRITES, "a", "--labels", "auto", says=["--labels auto"])


def test_empty_texts_are_answered_with_a_warning(llama: str) -> None:
    done = call("predict", "moods", "-", "--backbone", llama, stdin=b"a\n\nb\n")
    assert len(done.out.splitlines()) == 3
    assert "warning: the standard input, line 2" in done.err
    write_lines("mail.jsonl", [{"a": "x", "b": " "}] * 7)
    err = call("predict", "two", "--data", "mail.jsonl", "--backbone", llama).err
    assert err.count("warning") == 6
    assert "warning: mail.jsonl, line 5: the field 'b'" in err
    assert "2 more of 7" in err


class Typed(io.StringIO):
    """A person's typing."""

    def isatty(self) -> bool:
        return True


def test_texts_are_typed_until_an_empty_line(llama: str) -> None:
    alone = [works("predict", "moods", text, "--backbone", llama) for text in TEXTS[:2]]
    for ending in ("\n\nnever read\n", ""):
        done = call("predict", "moods", "--backbone", llama, stdin=Typed("\n".join(TEXTS[:2]) + ending))
        assert (done.code, done.out) == (0, "".join(alone)), done.err
        assert done.err.count("> ") == 3
    write_lines("one.jsonl", [{"a": "x", "b": ""}])
    alone = [works("predict", "two", "--data", "one.jsonl", "--json", "--backbone", llama)]
    done = call("predict", "two", "--json", "--backbone", llama, stdin=Typed("\ud83d\ny\nx\n\n\n"))
    assert (done.code, done.out) == (0, alone[0]), done.err  # after an error, too
    assert (done.err.count("a> "), done.err.count("b> "), done.err.count("error:")) == (3, 2, 1)


def test_ctrl_c_at_the_prompt_ends_without_a_word(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(terminal, "ask", interrupted)
    done = call("predict", "moods", "--backbone", llama, stdin=Typed(""))
    assert (done.code, done.out) == (130, "")
    assert "Traceback" not in done.err
    assert "stopped" not in done.err


def test_what_cannot_be_typed() -> None:
    for args, says in ((("moods", "--out", "a.csv"), "--out"), (("manual:So [Y]",), "nothing to type")):
        done = call("predict", *args, stdin=Typed("a\n"))
        assert (done.code, done.out) == (2, "")
        assert says in done.err
    fails("predict", "moods", says=["TEXT", "--data"])  # without a terminal


def test_text_that_the_tokenizer_does_not_know_is_warned_of(bert: str, caplog: pytest.LogCaptureFixture) -> None:
    works("predict", "manual:{x} is [Y]", "the movie", "--backbone", bert)
    assert not caplog.records
    works("predict", "manual:{x} is [Y]", "\U0001f642", "--backbone", bert)
    assert caplog.records
    assert json.loads(works("predict", "manual:{x} is [Y]", "the movie", "--backbone", bert, "--json"))["tokens"] >= 1
