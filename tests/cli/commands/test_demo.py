"""``ptuning demo``: what it prints, and what becomes of a run that is in its folder."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

import ptuning
from ptuning.cli import terminal
from ptuning.training.run import TrainingRun
from tests.cli.test_app import QUICK, WARM, call, fails, interrupting, record_of, works


def test_demo_prints_what_a_person_wants_to_see(llama: str) -> None:
    done = call("demo", "--out", "runs/demo", "--backbone", llama, "--set", "epochs=1", "--set", "encoder=none")
    assert done.code == 0, done.err
    record = record_of(Path("runs/demo"))
    for name, prompt in (("majority", "always '"), ("manual", "The capital of [X] is [Y]"), ("p-tuning", WARM)):
        (line,) = [line for line in done.out.splitlines() if line.split()[:1] == [name]]
        assert prompt in line
        score = record["scores"][name]["exact_match"]
        assert f"{score['value']:.3f}  [{score['low']:.3f}, {score['high']:.3f}]" in line
    tested = ptuning.load_records("capitals:test")
    for fact in tested[:5]:
        assert any(fact["x"] in line and fact["y"] in line for line in done.out.splitlines())
    size = Path("runs/demo/prompt/prompt.safetensors").stat().st_size
    assert f"\nprompt:  4 vectors, {size / 1000:.1f} KB\n" in done.out
    assert f"trained: 128 parameters of the prompt encoder; frozen: {record['frozen_parameters']:,} of" in done.out
    assert "\ntime:    " in done.out
    assert "\nfiles:   runs/demo  (prompt/, run.json, predictions.jsonl)\n" in done.out
    assert f"\nnext:    {terminal.program()} predict runs/demo {tested[0]['x']}\n" in done.out
    assert record["command"] == f"ptuning demo --out runs/demo --backbone {llama} --set epochs=1 --set encoder=none"


def test_a_demo_does_not_replace_another_run(llama: str) -> None:
    works("train", "--data", "capitals:dev", "--template", WARM, "--backbone", llama, "--out", "out", *QUICK)
    says = ["cannot resume from out", "--overwrite or in another folder"]
    fails("demo", "--out", "out", "--backbone", llama, says=says)
    works("demo", "--out", "out", "--backbone", llama, "--set", "epochs=1", "--set", "encoder=none", "--overwrite")
    assert "scores" in record_of(Path("out"))


def test_a_second_demo_shows_the_first_again(llama: str, caplog: pytest.LogCaptureFixture) -> None:
    command = ("demo", "--out", "out", "--backbone", llama, "--set", "epochs=1", "--set", "encoder=none")
    first, second = call(*command), call(*command)
    assert (second.code, second.out) == (0, first.out)
    assert "out holds this demo already; give --overwrite to run it again" in caplog.text


def test_a_stopped_demo_says_how_to_go_on(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    at_a_step = interrupting(signal.SIGINT, times=1, at=lambda now: now.stage == "train")
    monkeypatch.setattr(TrainingRun, "train", at_a_step)
    done = call("demo", "--out", "out", "--overwrite", "--backbone", llama, "--set", "epochs=1")
    assert done.code == 130
    # Without --overwrite, with which it would begin anew.
    again = f"{terminal.program()} demo --out out --backbone {llama} --set epochs=1"
    assert done.err.endswith(f"out/checkpoint is kept, go on with:\n  {again}\n")
