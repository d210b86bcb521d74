"""The program: help, completion, streams that are closed, messages of errors, and signals."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import pytest

import ptuning
import ptuning.backbone.loading
from ptuning.cli import app, terminal
from ptuning.training.run import TrainingRun
from tests.cli.calls import (
    WARM,
    call,
    commands_of,
    environment,
    interrupting,
    json_of,
    vectors_of,
    works,
)
from tests.processes import COMMAND_LINE, forked


def test_nothing_heavy_is_loaded_without_a_model() -> None:
    """One command after the other in a process of their own, as that takes a moment to start."""
    commands = ["--help", "train --help", "data", "data capitals", "task show RTE", "backbones", "--version"]
    code = (
        "import sys\nfrom ptuning.cli.app import main\n"
        "heavy = 'torch transformers accelerate safetensors tokenizers numpy scipy pyarrow'.split()\n"
        "heavy += 'fastapi uvicorn starlette prometheus_client'.split()\n"
        f"for words in {commands!r}:\n"
        "    sys.argv = ['ptuning', *words.split()]\n"
        "    try:\n        main()\n    except SystemExit:\n        pass\n"
        "    print('loaded:', words, [name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True)
    loaded = [line for line in done.stdout.splitlines() if line.startswith("loaded:")]
    assert loaded == [f"loaded: {words} []" for words in commands]


def test_help_of_every_command_has_a_summary_and_an_example() -> None:
    shown = works("--help")
    assert "Exit codes: 0 success" in shown
    names = [name for commands in app.COMMANDS.values() for name in commands]
    for name in names:
        assert f" {name.split()[0]} " in shown
        assert f"Example: ptuning {name}" in works(*name.split(), "--help").replace("\n", " ")
    assert len(names) == len(list(commands_of(app.program())))


def test_there_are_at_most_195_options() -> None:
    options = [
        option for command in commands_of(app.program()) for option in command.params if option.opts[0][0] == "-"
    ]
    assert len(options) <= 195
    assert all(option.help for option in options)


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("ptuning pre", ["predict"]),
        ("ptuning train --train-backbone l", ["lora"]),
        ("ptuning train --data cap", ["capitals:train", "capitals:dev", "capitals:test"]),
        ("ptuning train --task R", ["RTE", "ReCoRD"]),
        ("ptuning train --model-arg qu", ["quantize=int8", "quantize=int8-bnb", "quantize=nf4"]),
        ("ptuning train --data ./my", []),  # the shell offers files
    ],
)
def test_the_shell_completes(line: str, offered: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    words = {"COMP_WORDS": line, "COMP_CWORD": str(line.count(" ")), "_PTUNING_COMPLETE": "complete_bash"}
    for name, value in words.items():
        monkeypatch.setenv(name, value)
    assert sorted(call().out.split()) == sorted(offered)


def test_version() -> None:
    assert works("--version") == f"ptuning {ptuning.__version__}\n"
    assert {"ptuning", "torch", "transformers"} <= {line.split()[0] for line in works("--version", "-v").splitlines()}


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        ("{} data cities | true", 141, ""),  # as in "| head": the exit code of the signal that ends other programs
        ("{} data cities > /dev/full", 2, "error: [Errno 28] No space left on device; "),
        ("PYTHONUTF8=0 PYTHONIOENCODING=latin-1 {} data cities", 0, ""),
        ("{} data nothing >&- 2>&-", 2, ""),
        ("{} -v data nothing", 2, "error: no data file and no shipped facts named 'nothing:train'."),
    ],
)
def test_outputs_that_are_closed_or_full(command: str, code: int, message: str) -> None:
    line = f"set -o pipefail; {command.format(f'{sys.executable} -m ptuning')}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, env=environment(), check=False)
    assert done.returncode == code
    assert done.stderr.decode().startswith(message)
    assert (b"Traceback" in done.stderr) == ("-v" in command)  # which shows errors in full


@pytest.mark.parametrize(
    "command",
    ["data cities", "train --help", "--show-completion bash", "--version", "backbones --json", "task check none 2>&1"],
)
def test_no_command_minds_a_reader_that_went_away(command: str, tmp_path: Path) -> None:
    """The exit code is that of the signal that ends other programs, and there is no message."""
    words, both, _ = command.partition(" 2>&1")
    program = f"""
import os, sys
os.environ["_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION"] = "1"  # the shell is named, whatever runs the tests
read, write = os.pipe()
os.close(read)
for number, name in {[(1, "stdout"), (2, "stderr")] if both else [(1, "stdout")]}:
    os.dup2(write, number)
    setattr(sys, name, os.fdopen(number, "w"))
{COMMAND_LINE}"""
    with forked(program, *words.split(), folder=tmp_path / "said") as process:
        assert (process.wait(), process.err) == (141, "")


@pytest.mark.parametrize(
    "arguments", [("template", "show", "caf\udce9 [X] [Y]"), ("predict", "manual:[X] [Y]", "caf\udce9"), ("caf\udce9",)]
)
def test_an_argument_that_is_not_utf_8_is_one_error(arguments: Sequence[str]) -> None:
    """As of $'caf\\xe9' in a shell: no tokenizer and no file takes it."""
    done = call(*arguments)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert f"argument {len(arguments)}" in done.err


def test_a_first_conversion_is_announced(monkeypatch: pytest.MonkeyPatch, data: Path) -> None:
    def convert(*_: object, **__: object) -> NoReturn:
        raise ptuning.PTuningError("as far as this test goes")

    monkeypatch.setenv("XDG_CACHE_HOME", str(Path.cwd()))
    monkeypatch.setattr(ptuning.backbone.loading, "load_backbone", convert)
    done = call("eval", "manual:[X] is [Y]", "--data", data / "dev.jsonl")
    assert done.err.startswith("converting smollm2-135m for the first time")
    assert done.err.endswith("\nerror: as far as this test goes\n")


# -------------------------------------------------------------------------------------------------------- signals


def test_ctrl_c_in_training_leaves_a_checkpoint_from_which_it_goes_on(llama: str, data: Path, tmp_path: Path) -> None:
    """In a process of its own: SIGINT, exit code, message, checkpoint, and the same bytes in the end."""
    args = ["train", "--data", str(data / "train.jsonl"), "--template", WARM, "--backbone", llama, "--epochs", "20",
            "--batch-size", "4", "--set", "patience=20", "--set", "checkpoint_seconds=0"]  # fmt: skip
    checkpoint = Path("out/checkpoint/state.safetensors")
    with forked(COMMAND_LINE, *args, "--out", "out", folder=tmp_path / "said") as process:
        process.wait_until(checkpoint.is_file)
        process.send(signal.SIGINT)
        assert process.wait() == 130
    assert process.out == ""
    assert "Traceback" not in process.err
    message = process.err[process.err.index("stopped in epoch ") :]
    assert f"; out/checkpoint is kept, continue with:\n  {terminal.program()} train --data " in message
    assert message.endswith(" --out out --resume\n")
    assert not Path("out/run.json").exists()
    works(*args, "--out", "out", "--resume")
    works(*args, "--out", "plain")
    assert vectors_of("out") == vectors_of("plain")
    assert not checkpoint.exists()
    assert len(json_of("out/run.json")["history"]) == 20


def test_ctrl_c_before_training_leaves_nothing(llama: str, tmp_path: Path) -> None:
    os.mkfifo("train.jsonl")  # the process waits here for data until the signal comes
    handles: list[int] = []

    def waits() -> bool:
        with contextlib.suppress(OSError):  # nobody reads yet
            handles.append(os.open("train.jsonl", os.O_WRONLY | os.O_NONBLOCK))
        return bool(handles)

    args = ["train", "--data", "train.jsonl", "--template", WARM, "--backbone", llama, "--out", "out"]
    with forked(COMMAND_LINE, *args, folder=tmp_path / "said") as process:
        process.wait_until(waits)
        # Python may enter a read just after it noted a signal and before it acts on it; the next one ends that.
        for _ in range(6):
            process.send(signal.SIGINT)
            with contextlib.suppress(AssertionError):
                process.wait(20)
                break
    os.close(handles[0])
    assert (process.code, process.out, process.err) == (130, "", "stopped; nothing was written\n")
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["said", "train.jsonl"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_step_and_keeps_the_run(
    number: int, code: int, training: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(TrainingRun, "train", interrupting(number))
    done = call(*training, "--out", "out", "--resume")
    assert done.code == code
    assert "stopped in epoch 1 of 2, after 1 steps; out/checkpoint is kept" in done.err
    assert done.err.count("--resume") == 1  # it is in the command already
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


def test_a_second_ctrl_c_stops_at_once(
    training: tuple[object, ...], run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "train", interrupting(times=2))
        done = call(*training, "--out", "out")
    assert (done.code, done.out, done.err.splitlines()[-1]) == (130, "", "stopped at once; nothing was written")
    assert not Path("out").exists()
    with monkeypatch.context() as patch:
        later = interrupting(times=2, at=lambda now: now.stage == "train" and Path("out/checkpoint").exists())
        patch.setattr(TrainingRun, "train", later)
        done = call(*training, "--out", "out")
    assert done.code == 130
    assert "stopped at once; out/checkpoint is kept" in done.err
    works(*training, "--out", "out", "--resume")
    assert vectors_of("out") == vectors_of(run_folder)


def test_ctrl_c_while_a_backbone_loads(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(ptuning.backbone.loading, "load_backbone", interrupted)
    done = call("train", "--data", data / "train.jsonl", "--template", WARM, "--backbone", "any", "--out", "out")
    assert (done.code, done.out, done.err) == (130, "", "stopped; nothing was written\n")
    assert not Path("out").exists()
