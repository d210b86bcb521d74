"""The commands that show what there is: shipped facts, a filled template, families of backbones."""

import json
import shutil
from pathlib import Path

import pytest

import ptuning
from ptuning.data.reading import shipped_facts
from tests.cli.calls import WARM, call, fails, works


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


def test_template_show_with_a_record(llama: str) -> None:
    args = ("template", "show", WARM, "--backbone", llama, "--record", '{"x": "Kenya", "y": "Nairobi"}')
    rows = json.loads(works(*args, "--json"))
    assert set(rows[0]) == {"position", "part", "token_id", "token"}
    parts = [row["part"] for row in rows]
    assert parts[:5] == ["special", "slot", "slot", "slot", "field x"]
    for part, text in (("field x", " Kenya"), ("target", " Nairobi")):
        assert "".join(row["token"] for row in rows if row["part"] == part) == text
    printed = works(*args)
    assert "' capital' (start)" in printed
    assert "field x" in printed


def test_template_show_without_a_record_fills_in_the_names(bert: str) -> None:
    args = ("--backbone", bert)
    template = "[P*2] {question} [P] answer: [Y] ."
    rows = json.loads(works("template", "show", template, *args, "--json"))
    assert [row["token_id"] for row in rows if row["part"] == "slot"] == [None] * 3
    assert "".join(row["token"] for row in rows if row["part"] == "field question") == "question"
    assert "random start" in works("template", "show", template, *args)
    assert "start drawn" in works("template", "show", "[D*2] {question} [Y]", *args)
    assert "worked examples" in call("template", "show", "[D:examples] {question} [Y]", *args).err
    for target, is_known in (("\U0001f642", False), ("Nairobi", True)):
        record = json.dumps({"x": "a", "y": target})
        done = call("template", "show", "[P] [X] [Y]", *args, "--record", record)
        assert (f"the target '{target}' is unknown" in done.err) != is_known


def test_template_show_reads_a_file_and_no_weights(llama: str, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    Path("chat.txt").write_text("user\n[X]\n[Y]\n", encoding="utf-8")
    done = call("template", "show", "@chat.txt", "--backbone", "model", "--json")
    assert done.code == 0, done.err
    assert "".join(row["token"] for row in json.loads(done.out) if row["part"] != "special").startswith("user\\n")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["template", "show", WARM, "--record", '{"x": "Ke'], ["--record, line 1"]),
        (["template", "show", WARM, "--record", ""], ["--record"]),
        (["template", "show", WARM, "--record", '{"z": "a"}'], ["'x'", "z"]),
        (["template", "show", "[P:The] [X", "--record", '{"x": "a"}'], ["^ column 9"]),
        (["template", "show", "@none.txt"], ["none.txt"]),
        (["template", "show"], ["TEMPLATE", "--chat"]),
        (["data", "captials"], ["'captials:train'", "'capitals'"]),
        (["data", "capitals", "--split", "tests"], ["train, dev, test", "'tests'"]),
    ],
)
def test_bad_input(args: list[str], says: list[str], llama: str) -> None:
    fails(*args, *(("--backbone", llama) if args[0] == "template" else ()), says=says)


def test_the_table_of_backbones() -> None:
    """For people the columns that fit, for programs all, with what is tested."""
    shown = works("backbones")
    assert all(name in shown for name in ("LLaMA", "XLNet", "permuted", "encoder-decoder", "fills masks"))
    rows = {row["head"]: row for row in json.loads(works("backbones", "--json"))}
    assert rows["T5ForConditionalGeneration"]["slots"] == "on either side"
    assert rows["LlamaForCausalLM"]["shared_prefix"] is True
    assert "identity" in rows["BertForMaskedLM"]["tested"]
