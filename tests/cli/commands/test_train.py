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


def test_letters_that_look_like_a_line_break_are_warned_of(llama: str, bert: str, letters: Path) -> None:
    """A shell passes a backslash and an n on as they are; a masked model's tokenizer knows no line breaks."""
    asked = r"{message}\nIt's for [Y]"
    args = ("train", "--data", letters, *LABELS, "--epochs", "1", "--out", "out", "--overwrite", "--backbone")
    done = call(*args, llama, "--manual", asked)
    assert "write in bash or zsh\n  $'{message}\\nIt\\'s for [Y]'\n" in done.err
    assert "a backslash and an n" in call(*args, llama, "--template", r"{message}\n[P] [Y]").err
    assert "a backslash and an n" not in call(*args, llama, "--manual", asked.replace(r"\n", "\n")).err
    assert "a backslash and an n" not in call(*args, bert, "--manual", asked).err
    scored = call("eval", rf"manual:{asked}", "--data", letters, *LABELS[:2], "--backbone", llama)
    assert "a backslash and an n" in scored.err


# ------------------------------------------------------------------------------------------------------------ labels


def quick(data: object, llama: str, *more: object) -> tuple[object, ...]:
    return ("--data", data, "--template", TEMPLATE, "--backbone", llama, "--epochs", "1", "--batch-size", "16", *more)


def test_strict_refuses_what_may_be_a_mistake(llama: str, mail: tuple[Path, Path]) -> None:
    train, _ = mail
    says = [f"{train}, lines 13, 58", f"'biling' looks like 'billing' ({train}, line 35)"]
    fails("train", *quick(train, llama), "--labels", "auto", "--set", "strict=true", "--out", "mail", says=says)


@pytest.mark.parametrize(
    ("text", "labels", "says"),
    [
        ("message,team\na,x,y\n", "auto", ["mail.csv, line 2: 3 cells, and the header has 2 columns"]),
        ("message,team,id\na,billing,1\n", "auto", ["mail.csv, line 2: no target", "id, message, team", "y=NAME"]),
        ("message,price\n" + "".join(f"m{at},{at}.5\n" for at in range(9)), "auto", ["numbers", "a few classes"]),
        ("message,team\n" + "".join(f"m{at},t{at // 2}\n" for at in range(20_000)), "auto", ["10,000 different"]),
        ("message,team\n" + "a,Sales\nb,sales\n" * 9, "auto", ["'Sales' (9) and 'sales' (9)", "alias_label case"]),
        ("message,team\n" + "a,sales\nb,  \n" * 9, "auto", ["mail.csv, line 3: no target", "fill it in"]),
        ("message,team\n" + "a,sales\n" * 9, "auto", ["one label only (sales)", "--labels"]),
    ],
)
def test_files_that_give_no_labels_say_what_to_do(llama: str, text: str, labels: str, says: list[str]) -> None:
    Path("mail.csv").write_text(text, encoding="utf-8")
    fails("train", *quick("mail.csv", llama), "--labels", labels, "--out", "out", says=says)


def test_labels_in_the_spelling_of_a_file_and_spaces_around_them(llama: str) -> None:
    Path("mail.csv").write_text("message,team\n" + "".join(f"a{n}, sales\nb{n},Help \n" for n in range(9)))
    done = call("train", *quick("mail.csv", llama), "--labels", "auto", "--out", "out")
    assert "18 records: Help 9, sales 9" in done.err


def test_manual_prompts_are_scored_with_labels(llama: str, mail: tuple[Path, Path]) -> None:
    train, test = mail
    args = ("eval", "manual:{message} This is for [Y]", "--data", test, "--backbone", llama, "--json")
    found = json.loads(works(*args, "--labels", "auto"))
    assert [*found["scores"]] == ["accuracy"]
    assert json.loads(works(*args, "--labels", "account;billing;shipping;technical")) == found
    done = call(*args)
    assert [*json.loads(done.out)["scores"]] == ["exact_match"]
    assert "give --labels auto" in done.err
    fails(*args, "--labels", "auto", "--candidates", train, says=["has label words, which are all its answers"])


KIND_TEMPLATES = {
    "prompt-tuning": "[P*20] [X] is [Y]",
    "prefix-tuning": "[D*10] [X] is [Y]",
    "p-tuning-v2": "[D*20] [X] is [Y]",
    "context-tuning": "[D:{shown}][X] is [Y]",
    "hybrid": "[D:{shown}][X] [P:is] [Y]",
}


def test_a_kind_of_prompt_that_cannot_be_made(llama: str) -> None:
    args = ("train", "--data", "capitals:train", "--backbone", llama, "--out", "run")
    fails(*args, "--method", "prefix-tunig", "--manual", "[X] is [Y]", says=["Did you mean 'prefix-tuning'?"])
    fails(*args, "--method", "hybrid", "--template", "[P] [X] is [Y]", says=["method makes its template"])
    fails(*args, "--method", "hybrid", "--manual", "[P] [X] is [Y]", says=["a manual template has no slots"])
