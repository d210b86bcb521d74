"""`ptuning estimate`: takes what `ptuning train` takes, writes nothing, and prints a table or JSON."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from pathlib import Path

import pytest

from ptuning.cli.commands import estimate, train
from ptuning.training.estimate import Bytes, Forecast, Seconds
from tests.cli.test_app import QUICK, call, everything_in, fails, works

SIZES = Bytes(
    weights=538_060_000, trained=18_000_000, gradients=0, optimizer=37_000_000, activations=1_500_000_000,
    constant_part=0, other_starts=0, rest=520_000_000, before=1_244_000_000, on_disk=0,
)  # fmt: skip
FOUND = Forecast(
    device="cpu", dtype="float32", tune="frozen", train_records=146, dev_records=36, steps=19, epochs=6, starts=1,
    longest_pass=(8, 17), memory=SIZES,
    deep_in_front=0,
    seconds=Seconds(preparing=1.0, constant_part=2.0, epoch=45.0, dev=4.0, saving=5.0, answers=6.0, total=310.0),
)  # fmt: skip


@pytest.fixture
def facts() -> Path:
    path = Path("facts.jsonl")
    rows = [{"x": f"city {at}", "y": ("yes", "no")[at % 2]} for at in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_it_takes_the_options_of_train_but_those_of_files() -> None:
    training, own = (inspect.signature(one).parameters for one in (train.train, estimate.estimate))
    of_files = {"out", "resume", "overwrite", "measure_ceiling", "log_to"}
    assert training.keys() - own.keys() == of_files
    assert own.keys() <= training.keys()
    assert all(own[name] == training[name] for name in own.keys() & training.keys())


def test_numbers_of_a_run_and_nothing_written(llama: str, facts: Path) -> None:
    before = everything_in(Path.cwd())
    shown = works("estimate", "--data", facts, "--manual", "[X] is [Y]", "--backbone", llama, *QUICK, "--json")
    found = json.loads(shown)
    assert (found["train_records"], found["dev_records"], found["steps"], found["epochs"]) == (8, 2, 2, 2)
    assert found["memory_bytes"]["peak"] > found["memory_bytes"]["weights"] > 0
    assert everything_in(Path.cwd()) == before


def test_labels_and_settings_reach_it(llama: str, facts: Path) -> None:
    args = ("--data", facts, "--dev", facts, "--template", "[P*2] [X] [Y]", "--backbone", llama, *QUICK, "--json")
    more = ("--labels", "yes=great;no=bad", "--tune", "tuned", "--starts", "2", "--set", "checkpointing=true")
    found = json.loads(works("estimate", *args, *more))
    assert (found["tune"], found["starts"], found["dev_records"]) == ("tuned", 2, 10)
    assert found["memory_bytes"]["other_starts"] > 0


def test_bad_options_are_errors_as_in_training(llama: str, facts: Path) -> None:
    one = ("estimate", "--data", facts, "--backbone", llama)
    fails(*one, says=["give either --template, or --manual"])
    fails(*one, "--manual", "[X] is [Y]", "--set", "checkpointing=2", says=["'checkpointing' is 2", "true or false"])
    fails(*one, "--manual", "[X] is [Y]", "--backbone-lr", "0.1", says=["--backbone-lr goes with --tune"])
    fails(*one, "--template", "[X] is [Y]", says=["has no slots"])


def test_help_has_an_example() -> None:
    shown = works("estimate", "--help").replace("\n", " ")
    assert "Example: ptuning estimate --data capitals:train" in shown
    assert "\n  estimate " in works("--help")
    assert call("estimate", "--out", "x").code == 2


def printed(found: Forecast, capsys: pytest.CaptureFixture[str]) -> str:
    estimate.show(found, as_json=False)
    return capsys.readouterr().out


def test_the_tables_leave_out_what_is_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    out = squeezed(printed(FOUND, capsys))
    assert "146 records, 19 steps an epoch, the longest pass 8 x 17 tokens; 36 records to choose by" in out
    assert "activations of the largest pass 1,500" in out
    assert "kept text" not in out
    assert "training 2,613" in out
    assert "training, per epoch 45 s" in out
    assert "scoring the development part, each of 7 times 4 s" in out
    assert "all of it: 6 epochs 5 min" in out
    assert "deep slots" not in out
    deep = squeezed(printed(replace(FOUND, deep_in_front=16), capsys))
    assert "16 deep slots in front are keys and values: they cost no token of a pass" in deep
    more = replace(FOUND, starts=3, memory=replace(SIZES, constant_part=10**6, other_starts=10**6, on_disk=5 * 10**6))
    out = squeezed(printed(more, capsys))
    assert "kept text in front of the slots 1" in out
    assert "5 MB of the kept text do not fit" in out
    assert "all of it: 6 epochs, 3 starts 5 min" in out


def squeezed(text: str) -> str:
    """Return text with runs of spaces as one, whatever the width of columns."""
    return " ".join(text.split())
