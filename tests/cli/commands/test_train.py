"""`ptuning train` on a mailbox owner's file: other names of columns, and labels."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.cli.test_app import QUICK, call, works
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
