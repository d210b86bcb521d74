"""The command line: every command and option on tiny models, every bad input, Ctrl-C and going on."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest
import safetensors.torch

import ptuning.backbone.loading
from ptuning import Prompt
from ptuning.cli import app, terminal
from ptuning.cli.commands import predict
from ptuning.progress import Progress
from ptuning.training.run import TrainingRun
from tests.conftest import make_model
from tests.processes import COMMAND_LINE, Forked, forked

FACTS = [
    ("Kenya", "Nairobi"), ("France", "Paris"), ("Peru", "Lima"), ("Chad", "yes"), ("Togo", "no"), ("Cuba", "great"),
    ("Oman", "film"), ("Fiji", "movie"), ("Mali", "answer"), ("Iran", "number"), ("Laos", "people"), ("Niue", "cities"),
]  # fmt: skip
WARM = "[P:The capital of] [X] [P:is] [Y]"
SENTIMENT = [("a good film", "positive"), ("a bad one", "negative"), ("great", "positive"), ("terrible", "negative")]
LABELS = "positive=great,good; negative=terrible,bad"
# What every training command needs besides its data; three steps per epoch keep a test under a second.
QUICK = ("--epochs", "2", "--batch-size", "4")


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int
    out: str
    err: str


def call(*args: object, stdin: bytes | io.StringIO = b"") -> Outcome:
    """Run a command line in this process, as ``ptuning`` does; ``stdin`` may be a stand-in for a terminal."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["ptuning", *map(str, args)])
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)) if isinstance(stdin, bytes) else stdin)
        try:
            app.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Outcome(code, out.getvalue(), err.getvalue())


def works(*args: object, stdin: bytes = b"") -> str:
    """Run a command line that must work, and return what it printed."""
    done = call(*args, stdin=stdin)
    assert done.code == 0, done.err
    return done.out


def everything_in(folder: Path) -> dict[str, bytes]:
    """Return every file under a folder, hidden and temporary ones too, with its bytes; folders as empty ones."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


def fails(*args: object, says: Sequence[str], stdin: bytes = b"") -> str:
    """Run a command line that must end with exit code 2, one message that says certain things, and nothing written."""
    before = everything_in(Path.cwd())
    done = call(*args, stdin=stdin)
    assert (done.code, done.out) == (2, ""), done
    assert "Traceback" not in done.err
    # The template made by --manual may be said before; the error itself is one message, the last one.
    notice, _, message = done.err.rpartition("error: ")
    assert "error" not in notice
    assert message.strip()
    for part in says:
        assert part in message, f"'{part}' is not in: {message}"
    assert everything_in(Path.cwd()) == before
    return message


@pytest.fixture(scope="module")
def other_llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A backbone of the same width with other weights."""
    folder = tmp_path_factory.mktemp("other") / "llama"
    make_model("llama", folder, seed=7)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data files that no test changes."""
    folder = tmp_path_factory.mktemp("data")
    write_lines(folder / "train.jsonl", [{"x": x, "y": y} for x, y in FACTS])
    write_lines(folder / "dev.jsonl", [{"x": x, "y": y} for x, y in FACTS[:4]])
    write_lines(folder / "sentiment.jsonl", [{"x": x, "label": y} for x, y in SENTIMENT * 2])
    return folder


@pytest.fixture(scope="module")
def run_folder(llama: str, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on the tiny LLaMA that no test changes."""
    out = tmp_path_factory.mktemp("runs") / "facts"
    works("train", "--data", data / "train.jsonl", "--template", WARM, "--backbone", llama, "--out", out, *QUICK)
    return out


@pytest.fixture(scope="module")
def masked_run(bert: str, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on the tiny BERT that no test changes."""
    out = tmp_path_factory.mktemp("runs") / "masked"
    works("train", "--data", data / "train.jsonl", "--template", f"{WARM} .", "--backbone", bert, "--out", out, *QUICK)
    return out


@pytest.fixture(scope="module")
def label_run(llama: str, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished classification run that no test changes."""
    out = tmp_path_factory.mktemp("runs") / "labels"
    args = ("--data", data / "sentiment.jsonl", "--template", "{x} [P:It was] [Y]", "--labels", LABELS)
    works("train", *args, "--backbone", llama, "--out", out, *QUICK)
    return out


def write_lines(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def record_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return found


def vectors_of(folder: Path) -> bytes:
    return (folder / "prompt" / "prompt.safetensors").read_bytes()


# ---------------------------------------------------------------------------------------------------- the program


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}


def test_what_needs_no_model_loads_nothing_heavy() -> None:
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
    told = [line for line in done.stdout.splitlines() if line.startswith("loaded:")]
    assert told == [f"loaded: {words} []" for words in commands]


def test_the_commands_are_put_together_once_in_a_process() -> None:
    """It takes longer than many a command."""
    assert app.program() is app.program()


def test_help_of_every_command_has_an_example() -> None:
    commands = ["train", "eval", "predict", "serve", "inspect", "template show", "data", "backbones", "demo"]
    shown = works("--help")
    for command in commands:
        assert f" {command.split()[0]} " in shown
        assert f"Example: ptuning {command}" in works(*command.split(), "--help").replace("\n", " ")
    assert "Exit codes: 0 success" in shown


def commands_of(group: Any) -> Iterator[Any]:
    for command in group.commands.values():
        yield from commands_of(command) if hasattr(command, "commands") else [command]


def asked_by_bash(line: str) -> dict[str, str]:
    """The environment in which bash asks what to offer for the last word of a command line."""
    words = line.split(" ")
    return {"_PTUNING_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("ptuning pre", ["predict"]),
        ("ptuning train --train-backbone l", ["lora"]),
        ("ptuning train --data cap", ["capitals:train", "capitals:dev", "capitals:test"]),
        ("ptuning train --task R", ["RTE", "ReCoRD"]),
        ("ptuning train --data ./my", []),  # the shell offers files
    ],
)
def test_the_shell_completes(line: str, offered: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in asked_by_bash(line).items():
        monkeypatch.setenv(name, value)
    assert sorted(call().out.split()) == sorted(offered)


def test_the_shell_completes_in_a_process_of_its_own() -> None:
    command, asked = [sys.executable, "-m", "ptuning"], asked_by_bash("ptuning pre")
    done = subprocess.run(command, capture_output=True, text=True, env={**environment(), **asked}, check=False)
    assert (done.stdout.split(), done.stderr) == (["predict"], "")


def test_version_with_the_packages_below_it() -> None:
    shown = works("--version", "-v").splitlines()
    assert shown[0] == f"ptuning {ptuning.__version__}"
    assert {"torch", "transformers"} <= {line.split()[0] for line in shown}


def test_version_both_ways() -> None:
    assert works("--version") == f"ptuning {ptuning.__version__}\n"
    done = subprocess.run(
        [sys.executable, "-m", "ptuning", "--version"], capture_output=True, text=True, env=environment(), check=True
    )
    assert (done.stdout, done.stderr) == (f"ptuning {ptuning.__version__}\n", "")


@pytest.mark.parametrize("command", ["data cities", "--help", "backbones --json"])
def test_a_reader_that_goes_away_is_no_error(command: str) -> None:
    """As in ``| head``: the exit code is that of the signal that ends other programs there, and nothing is said."""
    command = f"set -o pipefail; {sys.executable} -m ptuning {command} | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment(), check=False)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    "command",
    [
        "data cities", "--help", "train --help", "task --help", "--show-completion bash", "--version", "data",
        "backbones", "backbones --json", "task list", "task show sentiment", "task check missing 2>&1",
    ],
)  # fmt: skip
def test_no_command_minds_a_reader_that_went_away(command: str, tmp_path: Path) -> None:
    """The same where nobody has read from the start."""
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


def test_a_full_disk_behind_the_output_is_one_message() -> None:
    command = f"{sys.executable} -m ptuning data cities > /dev/full"
    done = subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        env={**environment(), "PYTHONUNBUFFERED": ""},
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: [Errno 28] No space left on device; ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("PYTHONUTF8=0 PYTHONIOENCODING=latin-1 {} data cities", 0),
        ("{} data cities | true", 141),  # a reader of a line may leave after the last one is written
        ("{} data cities >&-", 0),
        ("{} data nothing >&- 2>&-", 2),
    ],
)
def test_streams_that_are_closed_or_cannot_show_a_text_are_no_reason_to_fail(command: str, code: int) -> None:
    line = f"set -o pipefail; {command.format(f'{sys.executable} -m ptuning')}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, env=environment(), check=False)
    assert done.returncode == code
    assert b"Traceback" not in done.stderr


def test_an_input_that_is_closed_holds_no_records(tmp_path: Path) -> None:
    """As in ``ptuning predict ... <&-``, where Python finds nothing to read from."""
    closed = f"import os, sys\nos.close(0)\nsys.stdin = None\n{COMMAND_LINE}"
    with forked(closed, "predict", "manual:[X] is [Y]", "--data", "-", folder=tmp_path / "said") as process:
        assert process.wait() == 2
    assert process.err == "error: the standard input holds no records: lines of text, CSV or JSONL\n"


# --------------------------------------------------------------------------------------------------------- train


@pytest.mark.parametrize("train_backbone", ["full", "lora"])
def test_from_training_weights_to_answers_without_them(train_backbone: str, llama: str, data: Path) -> None:
    """One prompt holds what was trained, every command takes it, and each part can be switched off."""
    rate = "lora_lr" if train_backbone == "lora" else "backbone_lr"
    works("train", "--data", data / "train.jsonl", "--template", WARM, "--backbone", llama, *QUICK, "--out", "out",
          "--train-backbone", train_backbone, "--set", f"{rate}=0.03", "--lr", "0.1")  # fmt: skip
    settings = record_of(Path("out"))["settings"]
    assert settings["train_backbone"] == train_backbone
    assert settings[rate] == 0.03
    assert (Path("out") / "prompt" / "backbone").is_dir()

    def loss(*more: str) -> float:
        found = json.loads(works("eval", "out", "--data", data / "train.jsonl", "--json", *more))
        return float(found["loss"])

    losses = [loss(), loss("--ablate", "slots"), loss("--ablate", "backbone")]
    assert len(set(losses)) == 3
    assert losses[0] < losses[2]
    for more in ([], ["--ablate", "slots"], ["--ablate", "backbone"]):
        assert works("predict", "out", "Kenya", "--max-new-tokens", "2", *more)
    assert "nearest by cosine" in works("inspect", "out", "--data", data / "train.jsonl")
    fails("eval", "out", "--data", data / "train.jsonl", "--ablate", "words",
          says=["no part 'words' to leave out; it has slots and backbone"])  # fmt: skip


@pytest.mark.parametrize("fixture", ["run_folder", "masked_run"])
def test_train_leaves_prompt_record_and_predictions(fixture: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(fixture)
    assert sorted(path.name for path in folder.iterdir()) == ["predictions.jsonl", "prompt", "run.json"]
    assert sorted(path.name for path in (folder / "prompt").iterdir()) == [
        "README.md",
        "prompt.json",
        "prompt.safetensors",
    ]
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == record_of(folder)["data"]["dev"]["rows"]
    assert set(rows[0]) == {"record", "target", "prediction", "hit", "log_prob"}
    assert Prompt.load(folder / "prompt").slots == record_of(folder)["slots"] > 0


def test_the_record_of_a_run(run_folder: Path, llama: str, data: Path) -> None:
    record = record_of(run_folder)
    assert record["format_version"] == 1
    assert record["command"].startswith("ptuning train --data ")
    assert f"--template '{WARM}'" in record["command"]
    settings = record["settings"]
    assert (settings["template"], settings["epochs"], settings["batch_size"]) == (WARM, 2, 4)
    assert (settings["dtype"], settings["device"], settings["label_words"]) == ("float32", "cpu", None)
    assert record["seeds"]["seed"] == 0
    assert len(set(record["seeds"].values())) == len(record["seeds"]) > 3  # each purpose draws from its own
    assert set(record["versions"]) >= {"ptuning", "python", "torch", "transformers", "accelerate", "safetensors"}
    backbone = record["backbone"]
    assert (backbone["name"], backbone["kind"]) == (llama, "causal")
    assert len(backbone["fingerprint"]) == 33
    assert backbone["parameters"] == record["frozen_parameters"] > record["trainable_parameters"] > 0
    train, dev = record["data"]["train"], record["data"]["dev"]
    assert record["data"]["test"] is None
    for part, rows in ((train, 10), (dev, 2)):
        assert (part["rows"], part["kept"], part["dropped"]) == (rows, rows, 0)
        assert len(part["sha256"]) == 64
        assert part["name"].startswith(str(data / "train.jsonl"))
    assert train["sha256"] != dev["sha256"]
    assert [epoch["epoch"] for epoch in record["history"]] == [1, 2]
    for epoch in record["history"]:
        assert set(epoch) >= {"epoch", "train_loss", "dev_loss", "dev_score", "seconds"}
        assert epoch["train_loss"] > 0
        assert epoch["seconds"] > 0
        assert 0 <= epoch["dev_score"] <= 1
    assert record["chosen_epoch"] in (0, 1, 2)
    assert record["seconds"] >= record["train_seconds"] > 0
    assert record["tokens_per_second"] > 0


def test_train_prints_results_on_one_stream_and_progress_on_the_other(llama: str, data: Path) -> None:
    done = call(
        "train", "--data", data / "train.jsonl", "--template", WARM, "--backbone", llama, "--out", "out", *QUICK
    )
    assert [line.split(":")[0] for line in done.err.splitlines()] == ["epoch 1/2", "epoch 2/2"]
    assert "train loss" in done.err
    assert "epoch   train loss   dev loss   dev score" in done.out
    assert f"development part: 2 records of {data}/train.jsonl (20% set aside, seed 0)\n" in done.out
    assert "\nprompt:  out/prompt\n" in done.out
    assert f"\nnext:    {terminal.program()} eval out --data FILE\n" in done.out


def test_train_with_development_data(llama: str, data: Path) -> None:
    args = ("--data", data / "train.jsonl", "--dev", data / "dev.jsonl", "--template", WARM)
    works("train", *args, "--backbone", llama, "--out", "out", *QUICK)
    parts = record_of(Path("out"))["data"]
    assert (parts["train"]["rows"], parts["dev"]["rows"]) == (12, 4)
    assert parts["dev"]["name"] == str(data / "dev.jsonl")


@pytest.mark.parametrize(
    ("args", "made"),
    [
        (("--manual", "[X] is located in [Y]", "--set", "about=country"), "[P:The country:] [X] [P:is located in] [Y]"),
        (("--manual", "The capital of [X] is [Y]"), WARM),
        (("--manual", "[X] is located in [Y]"), "[P*3] [X] [P:is located in] [Y]"),
    ],
)
def test_train_makes_a_template_from_a_manual_one_and_says_which(
    args: tuple[str, ...], made: str, llama: str, data: Path
) -> None:
    done = call("train", "--data", data / "dev.jsonl", *args, "--backbone", llama, "--out", "out", "--epochs", "1")
    assert done.code == 0, done.err
    assert done.err.startswith(f"learned template: {made}\n")
    assert record_of(Path("out"))["settings"]["template"] == made


def test_options_reach_the_settings(llama: str, data: Path) -> None:
    args = ("--epochs", "1", "--batch-size", "3", "--lr", "0.01", "--seed", "5", "--set", "encoder=mlp")
    length = ("--set", "max_length=30")
    sets = ("--set", "dropout=0.25", "--set", "start=vocabulary", "--set", "train-eos=false", "--set", "patience=2")
    works("train", "--data", data / "train.jsonl", "--template", "[P*2] [X] [P] [Y]", "--backbone", llama,
          "--out", "out", "--dtype", "bfloat16", "--device", "cpu", *args, *length, *sets)  # fmt: skip
    settings = record_of(Path("out"))["settings"]
    wanted = {
        "epochs": 1, "batch_size": 3, "lr": 0.01, "seed": 5, "encoder": "mlp", "dropout": 0.25, "start": "vocabulary",
        "train_eos": False, "patience": 2, "dtype": "bfloat16", "device": "cpu", "max_length": 30,
    }  # fmt: skip
    assert {name: settings[name] for name in wanted} == wanted


def test_two_runs_leave_the_same_bytes_and_another_seed_does_not(run_folder: Path, llama: str, data: Path) -> None:
    args = ("--data", data / "train.jsonl", "--template", WARM, "--backbone", llama, *QUICK)
    works("train", *args, "--out", "again")
    works("train", *args, "--out", "other", "--seed", "1")
    assert vectors_of(Path("again")) == vectors_of(run_folder)
    assert vectors_of(Path("other")) != vectors_of(run_folder)


def test_fields_can_be_renamed(llama: str, tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", [{"country": x, "capital": y} for x, y in FACTS[:6]])
    args = ("--data", "train.jsonl", "--field", "x=country", "--field", "y=capital")
    works("train", *args, "--template", WARM, "--backbone", llama, "--out", "out", "--epochs", "1")
    found = json.loads(works("eval", "out", *args, "--candidates", "train", "--json"))
    assert found["targets_not_among_candidates"] == 0
    assert found["scores"]["accuracy"]["n"] == 6


def test_label_words_from_training_to_answers(label_run: Path, data: Path) -> None:
    record = record_of(label_run)
    assert record["settings"]["label_words"] == {"positive": ["great", "good"], "negative": ["terrible", "bad"]}
    scores = json.loads(works("eval", label_run, "--data", data / "sentiment.jsonl", "--json"))["scores"]
    assert list(scores) == ["accuracy"]
    (line,) = works("predict", label_run, "a good film", "--json", "--num-answers", "2").splitlines()
    answer = json.loads(line)
    assert {one["text"] for one in answer["candidates"]} == {"positive", "negative"}
    assert answer["prediction"] == answer["candidates"][0]["text"]


def test_overwriting_replaces_a_run_and_nothing_else(llama: str, data: Path) -> None:
    args = ("--data", data / "train.jsonl", "--template", WARM, "--backbone", llama, "--out", "out", *QUICK)
    works("train", *args)
    first = vectors_of(Path("out"))
    Path("out/notes.txt").write_text("mine", encoding="utf-8")
    works("train", *args, "--seed", "3", "--overwrite")
    assert vectors_of(Path("out")) != first
    assert record_of(Path("out"))["settings"]["seed"] == 3
    assert Path("out/notes.txt").read_text(encoding="utf-8") == "mine"


def test_resuming_a_finished_run_changes_nothing(llama: str, data: Path) -> None:
    args = ("--data", data / "train.jsonl", "--template", WARM, "--backbone", llama, "--out", "out", *QUICK)
    works("train", *args)
    before = everything_in(Path("out"))
    assert "chosen:" in works("train", *args, "--resume")
    assert everything_in(Path("out")) == before


# ------------------------------------------------------------------------------------------------ eval and predict


def test_eval_prints_a_table_or_json(run_folder: Path, data: Path) -> None:
    args = ("eval", run_folder, "--data", data / "dev.jsonl")
    printed = works(*args)
    assert f"{run_folder} on {data}/dev.jsonl, n = 4\n" in printed
    assert "exact match" in printed
    found = json.loads(works(*args, "--json"))
    assert set(found) == {"prompt", "data", "scores", "loss", "targets_not_among_candidates"}
    assert found["prompt"] == str(run_folder)
    assert (found["data"]["name"], found["data"]["rows"]) == (str(data / "dev.jsonl"), 4)
    (exact,) = found["scores"].values()
    assert 0 <= exact["low"] <= exact["value"] <= exact["high"] <= 1
    assert exact["n"] == 4
    assert found["loss"] > 0


def test_eval_among_candidates_of_every_kind(run_folder: Path, data: Path, tmp_path: Path) -> None:
    answers = [y for _, y in FACTS]
    (tmp_path / "some.txt").write_text("\ufeffNairobi\n\n Paris \nParis\n", encoding="utf-8")  # as editors leave it
    write_lines(tmp_path / "all.jsonl", [{"y": y} for y in answers])
    args = ("eval", run_folder, "--data", data / "train.jsonl", "--json", "--candidates")
    some, every, train = (json.loads(works(*args, source)) for source in ("some.txt", "all.jsonl", "train"))
    assert some["targets_not_among_candidates"] == len(answers) - 2
    assert list(some["scores"]) == ["exact_match", "accuracy", "mrr"]
    assert every["targets_not_among_candidates"] == 0
    assert list(every["scores"]) == ["exact_match", "accuracy", "mrr", "p_at_10"]
    assert train == every  # the training part of the run has all of the answers
    mean = json.loads(works(*args, "all.jsonl", "--normalise", "mean"))
    assert mean["scores"]["mrr"] != every["scores"]["mrr"]
    printed = works("eval", run_folder, "--data", data / "train.jsonl", "--candidates", "some.txt")
    assert f"{len(answers) - 2} of {len(answers)} targets are no candidates; they count as misses" in printed


def test_predict_a_text(run_folder: Path) -> None:
    (answer,) = works("predict", run_folder, "Kenya").splitlines()
    (line,) = works("predict", run_folder / "prompt", "Kenya", "--json").splitlines()
    found = json.loads(line)
    assert set(found) == {"record", "prediction", "candidates"}
    assert found["record"] == {"x": "Kenya"}
    assert found["candidates"] == [{"text": found["prediction"], "log_prob": found["candidates"][0]["log_prob"]}]
    assert found["candidates"][0]["log_prob"] < 0
    assert answer == terminal.visible(found["prediction"])


def test_predict_records_from_a_file_and_from_the_input(
    run_folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "PREDICTED_ROWS", 3)  # so that the four records take two steps
    from_file = works("predict", run_folder, "--data", data / "dev.jsonl", "--json")
    from_input = works("predict", run_folder, "--data", "-", "--json", stdin=(data / "dev.jsonl").read_bytes())
    assert from_file == from_input
    rows = [json.loads(line) for line in from_file.splitlines()]
    assert [row["record"] for row in rows] == [{"x": x, "y": y} for x, y in FACTS[:4]]
    assert len(works("predict", run_folder, "--data", data / "dev.jsonl").splitlines()) == 4


def test_predict_several_written_answers_and_a_limit(run_folder: Path) -> None:
    def answers(*limit: str) -> list[dict[str, Any]]:
        (line,) = works("predict", run_folder, "Kenya", "--json", "--num-answers", "3", *limit).splitlines()
        listed: list[dict[str, Any]] = json.loads(line)["candidates"]
        assert works("predict", run_folder, "Kenya", *limit) == terminal.visible(listed[0]["text"]) + "\n"
        return listed

    short, free = answers("--max-new-tokens", "1"), answers()
    assert len(short) == len(free) == 3
    assert max(len(one["text"]) for one in short) < max(len(one["text"]) for one in free)
    drawn = answers("--do-sample", "--temperature", "3", "--top-p", "0.9", "--top-k", "40", "--seed", "5")
    assert drawn == answers("--do-sample", "--temperature", "3", "--top-p", "0.9", "--top-k", "40", "--seed", "5")
    assert drawn != answers("--do-sample", "--temperature", "3", "--top-p", "0.9", "--top-k", "40")
    answers("--num-beams", "2", "--length-penalty", "0", "--repetition-penalty", "1.5", "--stop", "e", "--stop", "a")


def test_a_streamed_answer_is_the_answer(run_folder: Path, data: Path) -> None:
    rows = ("--data", data / "dev.jsonl")
    assert works("predict", run_folder, *rows, "--stream") == works("predict", run_folder, *rows)


def test_a_masked_model_says_how_long_its_answer_is(masked_run: Path) -> None:
    (line,) = works("predict", masked_run, "Kenya", "--json").splitlines()
    found = json.loads(line)
    assert set(found) == {"record", "prediction", "candidates", "tokens"}
    unit = "token" if found["tokens"] == 1 else "tokens"
    assert works("predict", masked_run, "Kenya") == f"{found['prediction']}\t({found['tokens']} {unit})\n"


def test_a_prompt_finds_its_own_backbone_and_may_use_another_by_force(
    run_folder: Path, llama: str, other_llama: str
) -> None:
    own = works("predict", run_folder, "Kenya", "--json")
    assert works("predict", run_folder, "Kenya", "--json", "--backbone", llama) == own
    assert works("predict", run_folder, "Kenya", "--json", "--backbone", other_llama, "--force") != own


# --------------------------------------------------------------------------------- inspect, template show, data


def test_inspect_shows_the_nearest_tokens(run_folder: Path, data: Path) -> None:
    found = json.loads(works("inspect", run_folder, "--json"))
    assert found["template"] == WARM
    assert set(found) == {"template", "backbone", "slots", "typical", "scores"}
    assert found["backbone"]["loaded"]["dtype"] in ("float32", "bfloat16", "float16")
    assert [slot["start"] for slot in found["slots"]] == ["The", " capital", " of", " is"]
    for slot in found["slots"]:
        # Two epochs move no slot far from the token it started at.
        assert slot["nearest_by_cosine"][0]["token"] == slot["start"]
        assert slot["nearest_by_distance"][0]["token"] == slot["start"]
        assert len(slot["nearest_by_cosine"]) == 5
    assert found["scores"] == {}
    scored = json.loads(works("inspect", run_folder, "--data", data / "dev.jsonl", "--json"))
    assert set(scored["scores"]) == {"as learned", "nearest tokens"}
    printed = works("inspect", run_folder)
    assert "--data FILE scores them" in printed
    assert "' capital'" in printed
    assert "score of the slots as learned" in works("inspect", run_folder, "--data", data / "dev.jsonl")


# ------------------------------------------------------------------------------------------------- what is shown


def test_a_first_conversion_is_announced(monkeypatch: pytest.MonkeyPatch, data: Path) -> None:
    def convert(*_: object, **__: object) -> NoReturn:
        raise ptuning.PTuningError("as far as this test goes")

    monkeypatch.setenv("XDG_CACHE_HOME", str(Path.cwd()))
    monkeypatch.setattr(ptuning.backbone.loading, "load_backbone", convert)
    done = call("eval", "manual:[X] is [Y]", "--data", data / "dev.jsonl")
    assert done.err.splitlines() == [
        "converting smollm2-135m for the first time, 20 seconds or more",
        "error: as far as this test goes",
    ]


def test_verbose_shows_an_error_in_full() -> None:
    command = [sys.executable, "-m", "ptuning", "-v", "data", "nothing"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no data file and no shipped facts named 'nothing:train'.")
    assert "Traceback" in done.stderr


# ----------------------------------------------------------------------------------------------------- bad input

LONG = "a good film and a bad one " * 12


@pytest.mark.parametrize(
    "arguments",
    [
        ("template", "show", "caf\udce9 [X] [Y]"),
        ("template", "show", "[X] [Y]", "--record", '{"x": "caf\udce9"}'),
        ("predict", "manual:[X] [Y]", "caf\udce9"),
        ("caf\udce9",),
    ],
)
def test_an_argument_that_is_not_utf_8_is_one_error(arguments: Sequence[str]) -> None:
    """As of $'caf\\xe9' in a shell: no tokenizer and no file takes it."""
    found = call(*arguments)
    assert (found.code, found.out) == (2, "")
    assert found.err == (
        f"error: the command line: argument {len(arguments)} holds half a character (a lone surrogate); write it in "
        "UTF-8\n"
    )


def test_an_output_folder_that_exists(llama: str, data: Path) -> None:
    args = ("--data", data / "train.jsonl", "--template", WARM, "--backbone", llama, "--out", "out")
    Path("out").mkdir()
    Path("out/mine.txt").write_text("mine", encoding="utf-8")
    fails("train", *args, says=["out exists and is not empty", "--overwrite"])
    shutil.rmtree("out")
    Path("out").write_text("mine", encoding="utf-8")
    fails("train", *args, "--overwrite", says=["out exists and is not a folder"])


def test_resuming_with_other_settings(run_folder: Path, llama: str, data: Path) -> None:
    shutil.copytree(run_folder, "out")
    args = ("--data", data / "train.jsonl", "--template", WARM, "--backbone", llama, "--out", "out", "--resume")
    fails("train", *args, "--epochs", "3", "--batch-size", "4", says=["epochs was 2 and is 3", "--overwrite"])


def test_numbers_go_to_a_log_in_the_output_folder(llama: str, data: Path) -> None:
    """A resumed and a replaced run know the folder for their own."""
    args = ("--data", data / "train.jsonl", "--template", WARM, "--backbone", llama, "--out", "out", *QUICK)
    works("train", *args, "--set", "log_to=csv")
    first = Path("out/log/log.csv").read_text(encoding="utf-8").splitlines()
    rates = "lr,deep_lr,head_lr,backbone_lr,lora_lr"
    assert first[0] == f"step,epoch,loss,{rates},tokens_per_second,train_loss,dev_loss,dev_score"
    works("train", *args, "--set", "log_to=csv, tensorboard", "--overwrite")
    assert len(Path("out/log/log.csv").read_text(encoding="utf-8").splitlines()) == len(first) > 3
    assert list(Path("out/log").glob("events.*"))
    for path in Path("out").iterdir():
        if path.name != "log":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    works("train", *args, "--resume")  # as after a kill before the first checkpoint


@pytest.mark.parametrize("written", [0, 1, 2, 3, 4, 5, 6])
def test_a_disk_that_fills_up_while_writing(
    written: int, llama: str, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the file that does not fit: one message, no half file, and going on once there is room."""
    args = ("--data", data / "train.jsonl", "--template", WARM, "--backbone", llama, "--out", "out", *QUICK)
    count = 0
    sync = os.fsync

    def full(handle: int) -> None:
        nonlocal count
        count += 1
        if count > written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        done = call("train", *args)
    # Two checkpoints, three files of the prompt, predictions and the record: seven files, none of them the last.
    assert count == written + 1
    assert done.code == 2
    message = done.err.rpartition("error: ")[2]
    assert "No space left on device; free some space or choose another folder" in message
    assert message.count("\n") == 1
    left = everything_in(Path.cwd())
    assert [name for name in left if ".tmp" in name or ".old" in name] == []
    assert "out/run.json" not in left
    if written == 0:
        assert left == {}
        return
    safetensors.torch.load(left["out/checkpoint/state.safetensors"])  # whole
    works("train", *args, "--resume")
    works("train", *args[:-6], "--out", "plain", *QUICK)
    assert vectors_of(Path("out")) == vectors_of(Path("plain"))


def test_a_folder_without_rights(llama: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *_: object, **__: object) -> NoReturn:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    args = ("--data", data / "train.jsonl", "--template", WARM, "--backbone", llama, "--out", "out", *QUICK)
    done = call("train", *args)
    assert done.code == 2
    assert "Permission denied; check the path and its rights" in done.err.rpartition("error: ")[2]
    assert everything_in(tmp_path) == {}


# Commands that use a prompt, each with what it needs besides.
USES: dict[str, tuple[str, ...]] = {
    "eval": ("--data", "capitals:dev"),
    "predict": ("Kenya",),
    "inspect": (),
}


@pytest.mark.parametrize("command", USES)
def test_a_prompt_of_another_backbone(command: str, run_folder: Path, llama: str, other_llama: str) -> None:
    args = (command, run_folder, *USES[command], "--backbone", other_llama)
    message = fails(*args, says=["was trained on the backbone", "is another model", "--backbone", "--force"])
    assert llama in message
    assert other_llama in message
    works(*args, "--force")


@pytest.mark.parametrize("command", USES)
def test_a_cut_off_prompt(command: str, run_folder: Path, llama: str) -> None:
    shutil.copytree(run_folder, "out")
    vectors = Path("out/prompt/prompt.safetensors")
    vectors.write_bytes(vectors.read_bytes()[:-10])
    says = ["prompt.safetensors", "cut off"]
    fails(command, "out", *USES[command], "--backbone", llama, says=says)
    fails(command, "out", *USES[command], "--backbone", llama, "--force", says=says)  # forgives another backbone only


# -------------------------------------------------------------------------------------------- Ctrl-C and going on


def test_ctrl_c_in_training_leaves_a_checkpoint_from_which_it_goes_on(llama: str, data: Path, tmp_path: Path) -> None:
    """In a process of its own: SIGINT, exit code, message, checkpoint, and the same bytes in the end."""
    args = ["train", "--data", str(data / "train.jsonl"), "--template", WARM, "--backbone", llama, "--epochs", "20",
            "--batch-size", "4", "--set", "patience=20", "--set", "checkpoint_seconds=0"]  # fmt: skip
    checkpoint = Path("out/checkpoint/state.safetensors")
    with forked(COMMAND_LINE, *args, "--out", "out", folder=tmp_path / "said") as process:
        process.wait_until(checkpoint.is_file)
        process.send(signal.SIGINT)
        assert process.wait() == 130
    printed, said = process.out, process.err
    assert printed == ""
    assert "Traceback" not in said
    assert "stopping after this step; once more to stop at once\n" in said
    message = said[said.index("stopped in epoch ") :]
    assert "of 20, after " in message
    assert f"; out/checkpoint is kept, go on with:\n  {terminal.program()} train --data " in message
    assert message.endswith(" --out out --resume\n")
    assert checkpoint.is_file()
    assert not Path("out/run.json").exists()
    works(*args, "--out", "out", "--resume")
    works(*args, "--out", "plain")
    assert vectors_of(Path("out")) == vectors_of(Path("plain"))
    assert not checkpoint.exists()
    assert len(record_of(Path("out"))["history"]) == 20


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
        press_ctrl_c(process)
    os.close(handles[0])
    assert (process.code, process.out, process.err) == (130, "", "stopped; nothing was written\n")
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["said", "train.jsonl"]


def press_ctrl_c(process: Forked) -> None:
    """Press it until the process ends: Python may enter a read just after it noted the signal and before it acts on it,
    and then sits there until the next one.
    """
    for _ in range(6):
        process.send(signal.SIGINT)
        with contextlib.suppress(AssertionError):
            process.wait(20)
            return
    raise AssertionError("the process did not stop")


def interrupting(number: int, *, times: int, at: Callable[[Progress], bool]) -> Callable[..., object]:
    """Return a stand-in for ``TrainingRun.train`` that sends this process signals when a progress report says so."""
    real = TrainingRun.train
    left = times

    def train(*args: Any, report: Callable[[Progress], None], **named: Any) -> object:
        def watch(progress: Progress) -> None:
            nonlocal left
            report(progress)
            while left and at(progress):
                left -= 1
                signal.raise_signal(number)

        return real(*args, report=watch, **named)

    return train


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_step_and_keeps_the_run(
    number: int, code: int, llama: str, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(TrainingRun, "train", interrupting(number, times=1, at=lambda now: now.stage == "train"))
    args = ("--data", data / "train.jsonl", "--template", WARM, "--backbone", llama, "--out", "out", *QUICK)
    done = call("train", *args, "--resume")
    assert done.code == code
    assert done.err.splitlines()[-2] == ("stopped in epoch 1 of 2, after 1 steps; out/checkpoint is kept, go on with:")
    assert done.err.count("--resume") == 1  # what is there already is not said twice
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


def test_a_second_ctrl_c_stops_at_once(llama: str, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = ("--data", data / "train.jsonl", "--template", WARM, "--backbone", llama, "--out", "out", *QUICK)
    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "train", interrupting(signal.SIGINT, times=2, at=lambda now: now.stage == "train"))
        done = call("train", *args)
    assert (done.code, done.out) == (130, "")
    assert done.err.splitlines()[-1] == "stopped at once; nothing was written"
    assert not Path("out").exists()
    with monkeypatch.context() as patch:
        patch.setattr(
            TrainingRun,
            "train",
            interrupting(
                signal.SIGINT, times=2, at=lambda now: now.stage == "train" and Path("out/checkpoint").exists()
            ),
        )
        done = call("train", *args)
    assert done.code == 130
    assert "stopped at once; out/checkpoint is kept, go on with:\n" in done.err
    works("train", *args, "--resume")
    works("train", *args[:-6], "--out", "plain", *QUICK)
    assert vectors_of(Path("out")) == vectors_of(Path("plain"))


def test_ctrl_c_while_a_backbone_loads(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(ptuning.backbone.loading, "load_backbone", interrupted)
    done = call("train", "--data", data / "train.jsonl", "--template", WARM, "--backbone", "any", "--out", "out")
    assert (done.code, done.out, done.err) == (130, "", "stopped; nothing was written\n")
    assert not Path("out").exists()
