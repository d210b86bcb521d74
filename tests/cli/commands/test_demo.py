"""``ptuning demo``: what it prints, and how it treats an earlier run in its folder."""

import shutil
from pathlib import Path

import pytest

import ptuning
from ptuning.cli import terminal
from ptuning.training.run import TrainingRun
from tests.cli.calls import WARM, call, fails, interrupting, json_of, works


def test_demo_prints_scores_and_answers(llama: str, run_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    args = ("demo", "--backbone", llama, "--set", "epochs=1", "--set", "encoder=none", "--out")
    done = call(*args, "out")
    assert done.code == 0, done.err
    record = json_of("out/run.json")
    for name, prompt in (("majority", "always '"), ("manual", "The capital of [X] is [Y]"), ("p-tuning", WARM)):
        (line,) = [line for line in done.out.splitlines() if line.split()[:1] == [name]]
        score = record["scores"][name]["exact_match"]
        assert prompt in line
        assert f"{score['value']:.3f}  [{score['low']:.3f}, {score['high']:.3f}]" in line
    tested = ptuning.load_records("capitals:test")
    for fact in tested[:5]:
        assert any(fact["x"] in line and fact["y"] in line for line in done.out.splitlines())
    for text in ("prompt:  4 vectors", "trained: 128 parameters", "time:    ", "files:   out"):
        assert text in done.out
    assert f"\nnext:    {terminal.program()} predict out {tested[0]['x']}\n" in done.out
    again = call(*args, "out")
    assert (again.code, again.out) == (0, done.out)
    assert "out holds this demo already" in caplog.text
    shutil.copytree(run_folder, "other")
    fails(*args, "other", says=["other", "overwrite"])
    works(*args, "other", "--overwrite")
    assert "scores" in json_of("other/run.json")


def test_a_stopped_demo_says_how_to_go_on(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingRun, "train", interrupting())
    done = call("demo", "--out", "out", "--overwrite", "--backbone", llama, "--set", "epochs=1")
    assert done.code == 130
    # Without --overwrite, with which it would start again.
    command = f"{terminal.program()} demo --out out --backbone {llama} --set epochs=1"
    assert done.err.endswith(f"out/checkpoint is kept, continue with:\n  {command}\n")
