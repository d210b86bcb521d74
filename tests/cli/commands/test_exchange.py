"""`ptuning export` and `import`: prompts in the formats of other programs."""

import json
from pathlib import Path

import pytest

from ptuning import load_backbone
from tests.cli.calls import fails, json_of, works, write_lines
from tests.conftest import learned

FACTS = [{"x": "Kenya", "y": "Nairobi"}, {"x": "France", "y": "Paris"}]


@pytest.fixture
def prompt(llama: str) -> str:
    write_lines("facts.jsonl", FACTS)
    learned(load_backbone(llama, dtype="float32"), "[P*2] {x} is [Y]").save("prompt")
    return "prompt"


def test_export_compares_on_the_data_that_is_named(prompt: str, llama: str) -> None:
    args = ("export", prompt, "--as", "embeds", "--backbone", llama, "--data", "facts.jsonl")
    printed = works(*args, "--out", "one")
    assert "n = 2 (facts.jsonl)" in printed
    assert "one/README.md" in printed
    about = json.loads(works(*args, "--out", "two", "--json"))
    assert about == json_of("one/export.json")
    assert about["example"]["record"] == FACTS[0]
    assert about["backbone"]["loaded"]["dtype"] == "float32"


def test_export_takes_the_development_records_of_the_run(run_folder: Path, llama: str) -> None:
    args = ("--as", "embeds", "--backbone", llama, "--out")
    printed = works("export", run_folder, *args, "out")
    assert f"{run_folder}/predictions.jsonl" in printed
    assert works("export", run_folder / "prompt", *args, "other") == printed.replace("out", "other")


def test_an_import_answers_as_the_export_did(prompt: str, llama: str) -> None:
    """On the model that the adapter names."""
    works("export", prompt, "--as", "peft", "--backbone", llama, "--data", "facts.jsonl", "--out", "adapter")
    Path("template.txt").write_text("[P*2] {x} is [Y]\n", encoding="utf-8")
    printed = works("import", "adapter", "--template", "@template.txt", "--out", "back")
    assert f"back: 2 slots, prompt tuning of PEFT, for {llama}" in printed
    args = ("--data", "facts.jsonl", "--backbone", llama, "--json")
    before, after = (json.loads(works("eval", name, *args)) for name in ("prompt", "back"))
    assert after["loss"] == pytest.approx(before["loss"], abs=1e-5)


def test_bad_input(prompt: str, llama: str) -> None:
    for args, says in (
        (("export", prompt, "--as", "onnx", "--out", "out"), ["onnx", "lora"]),
        (("export", prompt, "--as", "embeds", "--out", prompt), ["not empty"]),
        (("export", "missing", "--as", "lora", "--out", "out"), ["missing"]),
        (("export", "manual:{x} is [Y]", "--as", "lora", "--out", "out"), ["no slots"]),
        (("import", "adapter", "--template", "[P*2 [X] [Y]", "--out", "out"), ["[P*2 [X]"]),
        (("import", "adapter", "--template", "[P*2] [X] [Y]", "--out", "out"), ["adapter_config.json"]),
        (("import", prompt, "--template", "[P] [X] [Y]", "--out", prompt), ["not empty"]),
    ):
        fails(*args, "--backbone", llama, says=says)
