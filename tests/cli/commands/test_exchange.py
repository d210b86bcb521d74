"""`ptuning export` and `import`: prompts in the formats of other programs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ptuning import load_backbone
from tests.cli.test_app import QUICK, fails, works
from tests.conftest import learned

FACTS = '{"x": "Kenya", "y": "Nairobi"}\n{"x": "France", "y": "Paris"}\n'


@pytest.fixture
def prompt(llama: str) -> str:
    learned(load_backbone(llama, dtype="float32"), "[P*2] {x} is [P] [Y]").save("prompt")
    return "prompt"


def test_export_compares_on_the_data_that_is_named(prompt: str, llama: str) -> None:
    Path("facts.jsonl").write_text(FACTS, encoding="utf-8")
    args = ("export", prompt, "--as", "embeds", "--backbone", llama, "--data", "facts.jsonl")
    printed = works(*args, "--out", "one")
    assert "n = 2 (facts.jsonl)" in printed
    assert "one/README.md" in printed
    about = json.loads(works(*args, "--out", "two", "--json"))
    assert about == json.loads(Path("one/export.json").read_text(encoding="utf-8"))
    assert about["example"]["record"] == {"x": "Kenya", "y": "Nairobi"}
    assert about["backbone"]["loaded"]["dtype"] == "float32"


def test_export_takes_the_development_records_of_the_run(llama: str) -> None:
    Path("facts.jsonl").write_text(FACTS * 6, encoding="utf-8")
    works(
        *("train", "--data", "facts.jsonl", "--template", "[P*2] [X] is [Y]", "--backbone", llama, "--out", "run"),
        *QUICK,
    )
    printed = works("export", "run", "--as", "peft", "--backbone", llama, "--out", "out")
    assert "run/predictions.jsonl" in printed
    assert works("export", "run/prompt", "--as", "peft", "--backbone", llama, "--out", "other") == printed.replace(
        "out", "other"
    )
    assert "(the template)" not in printed


def test_bad_input_of_export(prompt: str, llama: str) -> None:
    args = ("export", prompt, "--backbone", llama)
    fails(*args, "--as", "onnx", "--out", "out", says=["exported as lora, peft", "not as 'onnx'"])
    fails(*args, "--as", "embeds", "--out", prompt, says=["not empty"])
    fails(*args, "--as", "lora", "--out", "out", says=["3 slots", "rows that no text uses", "--as embeds"])
    fails("export", "missing", "--as", "lora", "--out", "out", says=["missing is not a prompt folder"])
    fails("export", "manual:{x} is [Y]", "--as", "lora", "--out", "out", "--backbone", llama, says=["no slots"])


def test_import_takes_the_model_that_the_adapter_names(llama: str) -> None:
    """And an export that is imported answers as the prompt did."""
    Path("facts.jsonl").write_text(FACTS, encoding="utf-8")
    learned(load_backbone(llama, dtype="float32"), "[P*2] {x} is [Y]").save("prompt")
    works("export", "prompt", "--as", "peft", "--backbone", llama, "--data", "facts.jsonl", "--out", "adapter")
    printed = works("import", "adapter", "--template", "[P*2] {x} is [Y]", "--out", "back")
    assert f"back: 2 slots, prompt tuning of PEFT, for {llama}" in printed
    asked = ("--data", "facts.jsonl", "--backbone", llama, "--json")
    before, after = (json.loads(works("eval", name, *asked)) for name in ("prompt", "back"))
    assert after["loss"] == pytest.approx(before["loss"], abs=1e-5)


def test_bad_input_of_import(prompt: str, llama: str) -> None:
    args = ("import", "adapter", "--backbone", llama, "--out", "out", "--template")
    fails(*args, "[P*2 [X] [Y]", says=["unknown piece"])
    fails(*args, "[P*2] [X] [Y]", says=["adapter_config.json", "check the path"])
    fails("import", prompt, "--template", "[P] [X] [Y]", "--out", prompt, says=["not empty"])
