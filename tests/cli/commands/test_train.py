"""`ptuning train`: its files and outputs, resuming, full disks, the estimate; and tasks from files to answers."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import NoReturn

import pytest
import safetensors.torch

from ptuning.cli import terminal
from ptuning.prompt.prompt import Prompt
from tests.cli.calls import WARM, call, everything_in, fails, json_of, lines_of, vectors_of, works, write_lines
from tests.messages import write_mail


def test_the_files_and_the_record_of_a_run(run_folder: Path, llama: str, data: Path) -> None:
    assert {path.name for path in run_folder.iterdir()} == {"predictions.jsonl", "prompt", "run.json"}
    record, rows = json_of(run_folder / "run.json"), lines_of(run_folder / "predictions.jsonl")
    assert len(rows) == record["data"]["dev"]["rows"]
    assert set(rows[0]) == {"record", "target", "prediction", "hit", "log_prob"}
    assert Prompt.load(run_folder / "prompt").slots == record["slots"] > 0
    assert f"--template '{WARM}'" in record["command"]
    settings = record["settings"]
    assert (settings["template"], settings["epochs"], settings["batch_size"]) == (WARM, 2, 4)
    assert len(set(record["seeds"].values())) == len(record["seeds"]) > 3  # each purpose draws from its own
    assert set(record["versions"]) >= {"ptuning", "python", "torch", "transformers"}
    assert (record["backbone"]["name"], record["backbone"]["kind"]) == (llama, "causal")
    assert record["backbone"]["parameters"] == record["frozen_parameters"] > record["trainable_parameters"] > 0
    train, dev = record["data"]["train"], record["data"]["dev"]
    assert (train["kept"], dev["kept"]) == (10, 2)
    assert train["name"].startswith(str(data / "train.jsonl"))
    assert train["sha256"] != dev["sha256"]
    assert [epoch["epoch"] for epoch in record["history"]] == [1, 2]
    assert record["seconds"] >= record["train_seconds"] > 0


def test_results_on_one_stream_and_progress_on_the_other(training: tuple[object, ...], run_folder: Path) -> None:
    done = call(*training, "--out", "out")
    assert [line.split(":")[0] for line in done.err.splitlines()] == ["epoch 1/2", "epoch 2/2"]
    for text in ("train loss", "chosen: ", "prompt:  out/prompt\n", f"next:    {terminal.program()} eval out --data"):
        assert text in done.out
    best = json_of("out/run.json")["dev_score"]
    assert f"\ndev score {best['value']:.3f} [{best['low']:.3f}, {best['high']:.3f}], n = {best['n']}\n" in done.out
    assert vectors_of("out") == vectors_of(run_folder)  # the same command leaves the same bytes
    before = everything_in(Path("out"))
    assert "chosen:" in works(*training, "--out", "out", "--resume")
    assert everything_in(Path("out")) == before
    fails(*training, "--out", "out", says=["out", "overwrite"])
    fails(*training, "--out", "out", "--resume", "--seed", "1", says=["seed was 0 and is 1"])
    Path("out/notes.txt").write_text("mine", encoding="utf-8")
    works(*training, "--out", "out", "--seed", "1", "--overwrite")
    assert vectors_of("out") != vectors_of(run_folder)
    assert Path("out/notes.txt").read_text(encoding="utf-8") == "mine"


def test_an_estimate_leaves_nothing(training: tuple[object, ...]) -> None:
    out = works(*training, "--dry-run")
    for text in ("10 records, 3 steps", "2 validation records", "backbone", "peak", "total: 2 epochs"):
        assert text in out
    assert everything_in(Path.cwd()) == {}


def test_options_reach_the_settings(llama: str, data: Path) -> None:
    options = ("--epochs", "1", "--batch-size", "3", "--lr", "0.01", "--seed", "5", "--dtype", "bfloat16")
    sets = [f"--set={pair}" for pair in ("encoder=mlp", "dropout=0.25", "train-eos=false", "log_to=csv")]
    args = ("--data", data / "train.jsonl", "--dev", data / "dev.jsonl", "--template", "[P*2] [X] [P] [Y]")
    works("train", *args, "--backbone", llama, "--out", "out", *options, *sets)
    settings = json_of("out/run.json")["settings"]
    wanted = {"epochs": 1, "batch_size": 3, "lr": 0.01, "seed": 5, "encoder": "mlp", "dropout": 0.25}
    wanted |= {"train_eos": False, "dtype": "bfloat16"}
    assert {name: settings[name] for name in wanted} == wanted
    assert json_of("out/run.json")["data"]["dev"]["name"] == str(data / "dev.jsonl")
    assert Path("out/log/log.csv").read_text(encoding="utf-8").startswith("step,epoch,loss,")


@pytest.mark.parametrize(
    ("args", "made"),
    [
        (("--manual", "[X] is located in [Y]", "--set", "about=country"), "[P:The country:] [X] [P:is located in] [Y]"),
        (("--manual", "[X] is located in [Y]"), "[P*3] [X] [P:is located in] [Y]"),
        (("--template", "@learn.txt"), "[P*2] [X]\n[Y]"),
    ],
)
def test_the_template_of_a_prompt(args: tuple[str, ...], made: str, llama: str, data: Path) -> None:
    Path("learn.txt").write_text("[P*2] [X]\n[Y]\n", encoding="utf-8")
    done = call("train", "--data", data / "dev.jsonl", *args, "--backbone", llama, "--out", "out", "--epochs", "1")
    assert done.code == 0, done.err
    assert (f"learned template: {made}\n" in done.err) == ("--manual" in args)
    assert json_of("out/run.json")["settings"]["template"] == made


def test_letters_that_look_like_a_line_break_are_warned_of(llama: str, data: Path) -> None:
    """A shell passes a backslash and an n on as they are."""
    args = ("train", "--data", data / "dev.jsonl", "--epochs", "1", "--out", "out", "--backbone", llama)
    done = call(*args, "--manual", r"{x}\nIt's for [Y]")
    assert "  $'{x}\\nIt\\'s for [Y]'\n" in done.err
    assert "a backslash and an n" not in call(*args, "--manual", "{x}\nIt's for [Y]", "--overwrite").err


@pytest.mark.parametrize("train_backbone", ["full", "lora"])
def test_from_training_weights_to_answers_without_them(train_backbone: str, training: tuple[object, ...]) -> None:
    """One prompt holds what was trained, every command takes it, and each part can be switched off."""
    rate = "lora_lr" if train_backbone == "lora" else "backbone_lr"
    works(*training, "--out", "out", "--train-backbone", train_backbone, "--set", f"{rate}=0.03", "--lr", "0.1")
    assert (Path("out") / "prompt" / "backbone").is_dir()
    shown = [("--ablate", "slots"), ("--ablate", "backbone"), ()]
    losses = [json.loads(works("eval", "out", "--data", training[2], "--json", *more))["loss"] for more in shown]
    assert len(set(losses)) == 3
    assert losses[2] < losses[1]
    assert "nearest by cosine" in works("inspect", "out")
    fails("predict", "out", "Kenya", "--ablate", "words", says=["'words'", "slots", "backbone"])


def test_labels_of_a_messy_mailbox(llama: str) -> None:
    """The prompt remembers the names of columns and the labels; an explicit name wins."""
    train, test = write_mail(Path.cwd())
    args = ("train", "--data", train, "--template", "{message} [P:This is for] [Y]", "--backbone", llama)
    more = ("--epochs", "1", "--field", "y=team", "--labels", "auto")
    fails(*args, *more, "--out", "mail", "--set", "strict=true", says=["lines 13, 58", "'biling'", "'billing'"])
    done = call(*args, *more, "--out", "mail")
    assert done.code == 0, done.err
    assert "billing" in done.err
    assert json_of("mail/run.json")["fields"] == {"y": "team"}
    moved = shutil.copytree("mail/prompt", "elsewhere/mail")
    found = json.loads(works("eval", moved, "--data", test, "--backbone", llama, "--json"))
    assert list(found["scores"]) == ["accuracy"]
    Path("other.csv").write_text("message,group,team\nhello,billing,x\n", encoding="utf-8")
    (row,) = lines_of(works("predict", moved, "--data", "other.csv", "--json", "--backbone", llama))
    assert row["record"] == {"message": "hello", "group": "billing", "y": "x"}
    assert set(row["probabilities"]) == set(found["labels"])
    (row,) = lines_of(works("predict", moved, "--data", "other.csv", "--json", "--field", "y=group"))
    assert row["record"]["y"] == "billing"


TASKS = {
    "moods": """
[values.label]
0 = "bad"
1 = "good"
[labels]
good = ["great"]
bad = ["terrible"]
[[patterns]]
manual = "{text} It was [Y]."
""",
    "choose": """
[choices]
from = ["a", "b"]
[[patterns]]
manual = "{text} is [Y]"
""",
    "places": """
label = "ref"
gather = true
metrics = ["exact", "last-number"]
[[patterns]]
manual = "{text} is [Y]"
""",
}


@pytest.fixture
def tasks() -> None:
    """Three tasks and the folders of their data: one of labels, one of choices, one of texts with references."""
    rows: dict[str, list[dict[str, object]]] = {
        "moods": [{"text": f"a film of {at}", "label": at % 2} for at in range(8)],
        "choose": [{"text": f"city {at}", "a": "yes", "b": "a good film", "label": at % 2} for at in range(8)],
        "places": [{"text": f"Kenya {at % 3}", "ref": word} for at, word in enumerate(("a film", "25", "no", "yes"))],
    }
    for name, text in TASKS.items():
        text = f'name = "{name}"\nversion = "3"\n' + text.replace('label = "ref"', 'label = "ref"', 1)
        Path(f"{name}.toml").write_text(text, encoding="utf-8")
        for part in ("train", "dev32", "val"):
            write_lines(f"d/{name}/{part}.jsonl", rows[name])
        unlabelled = [{key: row[key] for key in row if key not in ("label", "ref")} for row in rows[name]]
        write_lines(f"d/{name}/test.jsonl", unlabelled)


@pytest.mark.usefixtures("tasks")
@pytest.mark.parametrize("name", ["moods", "choose"])
def test_a_task_from_files_to_answers(name: str, llama: str) -> None:
    task = ("--task", f"{name}.toml")
    args = ("train", *task, "--data", "d", "--backbone", llama, "--out", "run", "--epochs", "1")
    works(*args, "--dev", "d:val", "--set", "calibrate=true")
    assert Prompt.load("run").calibrate
    for more in ((), ("--no-calibrate", "--normalise", "mean")):
        found = json.loads(works("eval", "run", "--data", "d:val", "--json", *more))
        assert (list(found["scores"]), found["scores"]["accuracy"]["n"]) == (["accuracy"], 8)
    answers = {"bad", "good"} if name == "moods" else {"yes", "a good film"}
    rows = lines_of(works("predict", "run", "--data", "d:test", "--json", "--num-answers", 2))
    assert [{each["text"] for each in row["candidates"]} for row in rows] == [answers] * 8
    typed = b'{"text": "Kenya", "a": "Nairobi", "b": "no"}\n'
    assert works("predict", "run", "--data", "-", stdin=typed).strip() in answers | {"Nairobi", "no"}
    manual = json.loads(works("eval", "manual:1", *task, "--data", "d", "--backbone", llama, "--json"))
    assert list(manual["scores"]) == ["accuracy"]
    fails("eval", "run", "--data", "d:val", "--candidates", "train", says=["leave the candidates"])
    if name == "choose":
        fails("predict", "run", "Kenya", says=["choose", "data"])
    else:
        assert works("predict", "run", "a film").strip() in answers
    Path(f"{name}.toml").write_text(f'name = "{name}"\nversion = "4"\n{TASKS[name]}', encoding="utf-8")
    fails(*args, "--dev", "d:val", "--set", "calibrate=true", "--resume", says=["cannot resume", "task"])


@pytest.mark.usefixtures("tasks")
def test_a_task_of_texts_is_learned_generated_and_scored_by_its_metrics(llama: str) -> None:
    """With all references of an input where texts are scored, and with each on its own where they are learned."""
    args = ("--task", "places.toml", "--data", "d", "--backbone", llama)
    assert "dev exact" in works("train", *args, "--dev", "d:val", "--out", "run", "--epochs", "1")
    run = json_of("run/run.json")
    assert run["settings"]["metric_for_best_model"] == "exact"
    assert [run["data"][part]["kept"] for part in ("train", "dev")] == [4, 3]
    found = json.loads(works("eval", "run", "--data", "d", "--json", "--out", "scored.jsonl"))
    assert {name: score["n"] for name, score in found["scores"].items()} == {"exact": 3, "last-number": 3}
    assert lines_of(Path("scored.jsonl"))[0]["target"] == ["a film", "yes"]
    works("predict", "run", "--data", "d:test", "--out", "texts.jsonl")
    assert len(lines_of(Path("texts.jsonl"))) == 4


@pytest.mark.parametrize("written", [0, 1, 3, 6])
def test_a_disk_that_fills_up(
    written: int, training: tuple[object, ...], run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the file that does not fit: one message, no half file, and going on once there is room."""
    count, sync = 0, os.fsync

    def full(handle: int) -> None:
        nonlocal count
        count += 1
        if count > written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        done = call(*training, "--out", "out")
    # Training goes on without a checkpoint; the prompt, its predictions and the record must be written.
    assert (count > written, done.code) == (True, 2)
    assert "No space left on device" in done.err.rpartition("error: ")[2]
    left = everything_in(Path.cwd())
    assert [name for name in left if ".tmp" in name or ".old" in name] == []
    assert "out/run.json" not in left
    if "out/checkpoint/state.safetensors" in left:
        safetensors.torch.load(left["out/checkpoint/state.safetensors"])  # whole
    works(*training, "--out", "out", "--resume")
    assert vectors_of("out") == vectors_of(run_folder)


def test_a_folder_without_rights(training: tuple[object, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *_: object, **__: object) -> NoReturn:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    done = call(*training, "--out", "out")
    assert done.code == 2
    assert "Permission denied" in done.err.rpartition("error: ")[2]
    assert everything_in(Path.cwd()) == {}
