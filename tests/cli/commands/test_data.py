"""The commands that show what there is: shipped facts, a filled template, families of backbones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import ptuning
from ptuning.data.reading import shipped_facts
from tests.cli.test_app import WARM, call, fails, works


def test_data_lists_the_shipped_facts() -> None:
    printed = works("data")
    for name, entry in shipped_facts().items():
        (line,) = [line for line in printed.splitlines() if line.startswith(f"{name} ")]
        assert str(entry["manual"]) in line  # whole, for copying
        assert str(entry["about"]) in line


@pytest.mark.parametrize(
    ("args", "split"),
    [(["capitals"], "train"), (["capitals", "--split", "dev"], "dev"), (["capitals:test"], "test")],
)
def test_data_prints_facts_as_jsonl(args: list[str], split: str) -> None:
    printed = [json.loads(line) for line in works("data", *args).splitlines()]
    assert printed == list(ptuning.load_records(f"capitals:{split}"))


def test_bad_input_of_data() -> None:
    fails("data", "captials", says=["no shipped facts named 'captials:train'. Did you mean 'capitals'?"])
    fails("data", "capitals", "--split", "tests", says=["train, dev, test, not 'tests'"])


def test_template_show_with_a_record(llama: str) -> None:
    args = ("template", "show", WARM, "--backbone", llama, "--record", '{"x": "Kenya", "y": "Nairobi"}')
    rows = json.loads(works(*args, "--json"))
    assert set(rows[0]) == {"position", "part", "token_id", "token"}
    assert [row["position"] for row in rows] == list(range(len(rows)))
    parts = [row["part"] for row in rows]
    assert parts[:5] == ["special", "slot", "slot", "slot", "field x"]
    assert "".join(row["token"] for row in rows if row["part"] == "field x") == " Kenya"
    assert "".join(row["token"] for row in rows if row["part"] == "target") == " Nairobi"
    printed = works(*args)
    assert "' capital' (start)" in printed
    assert "field x" in printed


def test_template_show_without_a_record_fills_in_the_names(bert: str) -> None:
    template = "[P*2] {question} [P] answer: [Y] ."
    rows = json.loads(works("template", "show", template, "--backbone", bert, "--json"))
    assert [row["part"] for row in rows].count("slot") == 3
    assert {row["token_id"] for row in rows if row["part"] == "slot"} == {None}
    assert "".join(row["token"] for row in rows if row["part"] == "field question") == "question"
    assert "random start" in works("template", "show", template, "--backbone", bert)
    assert "start drawn" in works("template", "show", "[D*2] {question} [Y]", "--backbone", bert)
    shown = call("template", "show", "[D:examples] {question} [Y]", "--backbone", bert)
    assert "training puts worked examples of its data there" in shown.err


def test_template_show_does_not_load_the_weights(llama: str, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    assert "special" in works("template", "show", WARM, "--backbone", "model")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([WARM, "--record", '{"x": "Ke'], ["--record, line 1: not a JSON object"]),
        ([WARM, "--record", "[1]"], ["--record, line 1: a record must be an object"]),
        ([WARM, "--record", ""], ["--record takes one JSON object"]),
        ([WARM, "--record", '{"z": "a"}'], ["no field 'x'", "its fields: z"]),
        (["[P:The] [X", "--record", '{"x": "a"}'], ["unclosed bracket", "^ column 9"]),
    ],
)
def test_bad_input_of_template_show(args: list[str], says: list[str], llama: str) -> None:
    fails("template", "show", *args, "--backbone", llama, says=says)


def test_the_table_of_backbones() -> None:
    """For people the columns that fit, for programs all, with what is tested."""
    shown = works("backbones")
    assert all(name in shown for name in ("LLaMA", "XLNet", "permuted", "encoder-decoder", "fills masks"))
    rows = {row["head"]: row for row in json.loads(works("backbones", "--json"))}
    assert rows["T5ForConditionalGeneration"]["slots"] == "on either side"
    assert rows["LlamaForCausalLM"]["shared_prefix"] is True
    assert "identity" in rows["BertForMaskedLM"]["tested"]


def test_template_show_says_that_a_target_is_unknown(bert: str) -> None:
    """A masked model's row shows masks in the target's place, whatever the target is."""
    for target, is_known in (("\U0001f642", False), ("Nairobi", True)):
        record = json.dumps({"x": "a", "y": target})
        done = call("template", "show", "[P] [X] [Y]", "--backbone", bert, "--record", record)
        assert done.code == 0
        assert (f"the target '{target}' is unknown" in done.err) != is_known


def test_template_show_reads_a_file_and_warns_of_letters_for_a_line_break(llama: str) -> None:
    Path("chat.txt").write_text("user\n[X]\n[Y]\n", encoding="utf-8")
    done = call("template", "show", "--template-file", "chat.txt", "--backbone", llama, "--json")
    assert done.code == 0, done.err
    assert "".join(row["token"] for row in json.loads(done.out) if row["part"] != "special").startswith("user\\n")
    assert "a backslash and an n" not in done.err
    done = call("template", "show", r"user\n[X] [Y]", "--backbone", llama)
    assert "a backslash and an n" in done.err
    fails("template", "show", says=["give either a TEMPLATE, or --template-file"])
    fails("template", "show", "a [Y]", "--template-file", "chat.txt", says=["give either a TEMPLATE"])
