"""`ptuning train` on a mailbox owner's file: other names of columns, and labels."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.cli.test_app import QUICK, call, fails, works
from tests.messages import write_mail

TEMPLATE = "{message} [P:This is for] [Y]"


@pytest.fixture
def mail() -> tuple[Path, Path]:
    """A messy mailbox, and messages that were not learned from."""
    return write_mail(Path.cwd())


def test_the_next_command_works_as_it_is_printed(llama: str, mail: tuple[Path, Path]) -> None:
    """In another folder, too: the prompt remembers how the columns are called. What is asked for explicitly wins."""
    train, test = mail
    args = ("--data", train, "--field", "y=team", "--template", TEMPLATE, "--backbone", llama, *QUICK)
    out = works("train", *args, "--out", "m2")
    assert out.rstrip().endswith("eval m2 --data FILE")
    record = json.loads(Path("m2/run.json").read_text(encoding="utf-8"))
    assert (record["labels"], record["fields"]) == (None, {"y": "team"})
    best = record["dev_score"]
    assert f"\ndev score {best['value']:.3f} [{best['low']:.3f}, {best['high']:.3f}], n = {best['n']}\n" in out
    moved = Path("elsewhere") / "m2"
    shutil.copytree("m2/prompt", moved)
    for command in ("eval", "inspect"):
        found = json.loads(works(command, moved, "--data", test, "--backbone", llama, "--json"))
        assert found
    rows = works("predict", moved, "--data", test, "--backbone", llama, "--json").splitlines()
    assert json.loads(rows[0])["record"].keys() == {"message", "y"}
    other = Path("other.csv")
    other.write_text("message,group,team\nhello,billing,x\n", encoding="utf-8")
    asked = ("predict", moved, "--data", other, "--backbone", llama, "--json")
    assert json.loads(works(*asked))["record"] == {"message": "hello", "group": "billing", "y": "x"}
    assert json.loads(works(*asked, "--field", "y=group"))["record"] == {
        "message": "hello",
        "y": "billing",
        "team": "x",
    }
    done = call("eval", "m2", "--data", test, "--candidates", "train", "--backbone", llama)
    assert done.code == 0, done.err


LABELS = ("--field", "y=team", "--labels", "billing=good;technical=bad;shipping=great;sales=yes")


@pytest.fixture
def letters() -> Path:
    """Messages long enough for what stands in front of slots to be worth keeping."""
    rows = [f"the movie was great and terrible in {at}," + ("billing", "sales", "shipping")[at % 3] for at in range(9)]
    path = Path("letters.csv")
    path.write_text("\n".join(["message,team", *rows]) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("command", ["train", "estimate"])
def test_with_labels_a_manual_template_gets_its_slots_behind_the_text(
    command: str, llama: str, bert: str, letters: Path
) -> None:
    args = (command, "--data", letters, "--manual", "{message} This is for [Y]", *LABELS, "--epochs", "1")
    done = call(*args, "--backbone", llama, *(("--out", "out") if command == "train" else ()))
    assert done.code == 0, done.err
    assert "slots stand behind the text: it is read once, and each training pass reads" in done.err
    assert "times as many (counted on 9 records): --template '[P*3] {message} [P:This is for] [Y]'" in done.err
    if command == "train":
        assert "learned template: {message} [P:This is for] [Y]\n" in done.err
        assert json.loads(Path("out/run.json").read_text())["settings"]["template"] == "{message} [P:This is for] [Y]"
        done = call(*args, "--backbone", bert, "--out", "masked")
        assert "learned template: [P*3] {message} [P:This is for] [Y]\n" in done.err
        assert "slots stand" not in done.err


def test_a_template_comes_from_a_file(llama: str, letters: Path) -> None:
    """As it is, with its line breaks, but for those at its end; one without slots is a manual one."""
    Path("chat.txt").write_bytes(b"Message:\r\n{message}\r\n[P*2]\n[Y]\n\n")
    Path("manual.txt").write_text("{message}\nThis is for [Y]\n", encoding="utf-8")
    args = ("train", "--data", letters, *LABELS, "--epochs", "1", "--backbone", llama, "--template-file")
    for name, more, learned in (
        ("chat.txt", (), "Message:\n{message}\n[P*2]\n[Y]"),
        ("manual.txt", (), "{message}\n[P:This is for] [Y]"),
        ("manual.txt", ("--tune", "lora"), "{message}\nThis is for [Y]"),
    ):
        done = call(*args, name, *more, "--out", "out", "--overwrite")
        assert done.code == 0, done.err
        assert json.loads(Path("out/run.json").read_text())["settings"]["template"] == learned
        assert "a backslash and an n" not in done.err


def test_a_template_file_that_cannot_be_used(letters: Path) -> None:
    Path("empty.txt").write_text("\n", encoding="utf-8")
    args = ("train", "--data", letters, "--out", "out", "--template-file", "empty.txt")
    fails(*args, says=["empty.txt: a template needs one [Y]"])
    fails(*args[:-1], "missing.txt", says=["missing.txt"])
    fails(*args, "--manual", "{message} [Y]", says=["--template-file brings the template; leave --template, --manual"])


def test_letters_that_look_like_a_line_break_are_warned_of(llama: str, bert: str, letters: Path) -> None:
    """A shell passes a backslash and an n on as they are; a masked model's tokenizer knows no line breaks."""
    asked = r"{message}\nIt's for [Y]"
    args = ("train", "--data", letters, *LABELS, "--epochs", "1", "--out", "out", "--overwrite", "--backbone")
    done = call(*args, llama, "--manual", asked)
    assert r"write in bash or zsh" "\n  $'{message}\\nIt\\'s for [Y]'\n" in done.err
    assert "a backslash and an n" in call(*args, llama, "--template", r"{message}\n[P] [Y]").err
    assert "a backslash and an n" not in call(*args, llama, "--manual", asked.replace(r"\n", "\n")).err
    assert "a backslash and an n" not in call(*args, bert, "--manual", asked).err
    scored = call("eval", rf"manual:{asked}", "--data", letters, *LABELS[:2], "--backbone", llama)
    assert "a backslash and an n" in scored.err
