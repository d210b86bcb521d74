"""``ptuning fleet``: what it prints, leaves and refuses, and how a stopped one goes on."""

from pathlib import Path
from typing import Any

import pytest

from tests.cli.calls import call, fails, json_of, works
from tests.experiment.test_compare import FACTS, lines

CONFIG = """
[all]
manual = "[X] is [Y] ."
data = "train.jsonl"
dev = "dev.jsonl"
epochs = 1

[[prompt]]
name = "facts"
seed = [0, 1]

[[prompt]]
name = "kinds"
data = "kinds.jsonl"
template = "{text} [P:It was] [Y]"
labels = {good = ["good", "yes"], bad = "no"}
fields = {text = "x", y = "kind"}
dev = "kinds.jsonl"
"""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work beside a folder that holds the fleet's file and its data."""
    folder = tmp_path / "configs"
    lines(folder / "train.jsonl", FACTS[:9])
    lines(folder / "dev.jsonl", FACTS[9:14])
    lines(folder / "kinds.jsonl", [{"x": row["x"], "kind": ("good", "bad")[n % 2]} for n, row in enumerate(FACTS[:8])])
    (folder / "fleet.toml").write_text(CONFIG, encoding="utf-8")
    monkeypatch.chdir(tmp_path)


def fleet(llama: str, *options: object) -> tuple[object, ...]:
    return ("fleet", "--config", "configs/fleet.toml", "--out", "out", "--backbone", llama, *options)


def saved() -> Any:
    return json_of("out/fleet.json")


def test_each_prompt_is_left_as_train_leaves_it(llama: str) -> None:
    shown = works(*fleet(llama))
    for text in ("facts-seed=0", "facts-seed=1", "kinds", "dev score", "out/NAME"):
        assert text in shown
    assert [row["name"] for row in saved()["prompts"]] == ["facts-seed=0", "facts-seed=1", "kinds"]
    for name in ("facts-seed=0", "facts-seed=1", "kinds"):
        assert {path.name for path in Path("out", name).iterdir()} == {"prompt", "run.json", "predictions.jsonl"}
    assert "out/kinds" in works("eval", "out/kinds", "--data", "configs/kinds.jsonl", "--field", "text=x", "--field",
                                "y=kind", "--backbone", llama)  # fmt: skip
    fails(*fleet(llama), says=["overwrite"])
    works(*fleet(llama, "--overwrite", "--at-once", 1, "--log-to", "csv"))
    assert saved()["at_once"] == 1
    assert {path.parent.name for path in Path("out/log").rglob("log.csv")} == {"facts-seed=0", "facts-seed=1", "kinds"}


def test_a_part_of_a_fleet_says_how_to_collect(llama: str) -> None:
    shown = works(*fleet(llama, "--part", "1/1"))
    assert "the same command with --resume instead of --part collects" in shown
    assert "fleet.json" not in shown
    assert not Path("out/fleet.json").exists()
    works(*fleet(llama, "--resume"))
    assert [row["status"] for row in saved()["prompts"]] == ["done"] * 3


def test_a_finished_fleet_takes_further_prompts_in(llama: str) -> None:
    works(*fleet(llama))
    before = Path("out/kinds/run.json").read_bytes()
    with Path("configs/fleet.toml").open("a", encoding="utf-8") as file:
        file.write('\n[[prompt]]\nname = "more"\nseed = 5\n')
    works(*fleet(llama, "--resume"))
    assert [row["name"] for row in saved()["prompts"]] == ["facts-seed=0", "facts-seed=1", "kinds", "more"]
    assert Path("out/kinds/run.json").read_bytes() == before


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("epochs = 1", "epochs = 0", ["'facts", "epochs"]),
        ('data = "kinds.jsonl"', 'data = "kind.jsonl"', ["'kinds'", "kind.jsonl"]),
        ("epochs = 1", 'train_backbone = "lora"', ["'facts-seed=0'", "frozen"]),
        ('name = "kinds"', 'name = "a/b"', ["a/b"]),
    ],
)
def test_bad_input_names_the_prompt_and_leaves_nothing(llama: str, old: str, new: str, says: list[str]) -> None:
    path = Path("configs/fleet.toml")
    path.write_text(path.read_text(encoding="utf-8").replace(old, new, 1), encoding="utf-8")
    fails(*fleet(llama), says=says)


def test_a_prompt_that_comes_to_nothing_ends_with_exit_code_1(llama: str) -> None:
    path = Path("configs/fleet.toml")
    text = path.read_text(encoding="utf-8").replace('name = "kinds"', 'name = "kinds"\nlr = 1e308')
    path.write_text(text, encoding="utf-8")
    result = call(*fleet(llama))
    assert result.code == 1, result.err
    assert "failed" in result.out
    assert [row["status"] for row in saved()["prompts"]] == ["done", "done", "failed"]


def test_a_log_and_workers(llama: str) -> None:
    """Numbers of trainings stay in their workers."""
    fails(*fleet(llama, "--log-to", "csv", "--workers", "2"), says=["--log-to", "--workers"])
