"""A run from data to files: seeded, whole, resumable after a real kill, and never touched by the test part.

The invariants that tests name are those of docs/invariants.md.
"""

import json
import random
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.loading import load_backbone
from ptuning.config import TrainConfig, start_seed
from ptuning.data.questions import Questions
from ptuning.data.reading import load_records
from ptuning.data.task_files import TaskFile
from ptuning.engine import evaluate as evaluate_module
from ptuning.engine import prefix_cache
from ptuning.engine.batch import collate
from ptuning.engine.forward import target_logits
from ptuning.engine.prefix_cache import PrefixCache
from ptuning.engine.soft_prompt import PromptBatch
from ptuning.errors import (
    BackboneError,
    ConfigError,
    FileError,
    PTuningError,
    RecordError,
    TemplateError,
    TrainingError,
)
from ptuning.files import Json, new_path
from ptuning.names import (
    CARD_FILE,
    CHECKPOINT_FILE,
    CHECKPOINT_FOLDER,
    MANIFEST_FILE,
    PREDICTIONS_FILE,
    PROMPT_FOLDER,
    RUN_FILE,
    VECTORS_FILE,
)
from ptuning.progress import Interrupted, Progress
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prediction import Prediction
from ptuning.prompt.prompt import Prompt
from ptuning.prompt.score import score_prompt
from ptuning.records import Record, as_records
from ptuning.template.encode import Example
from ptuning.template.labels import LabelWords
from ptuning.template.segments import Ids
from ptuning.training.run import TrainingRun, TrainResult, train
from ptuning.training.trainer import Trainer, TrainingLoop
from tests.conftest import RECORDS, make_model
from tests.processes import COMMAND_LINE, forked

TEMPLATE = "[P*2] [X] [P:is] [Y]"
FACTS: list[Record] = [{"x": f"city {index}", "y": ("yes", "no", "São Tomé")[index % 3]} for index in range(11)]
SLOW = {"epochs": 4, "batch_size": 4, "checkpoint_seconds": 0.0}
FAST = {"epochs": 2, "batch_size": 3, "lr": 0.01, "patience": 99, "dropout": 0.2}
TUNED = {"train_backbone": "full", "backbone_lr": 0.005}
LORA = {"train_backbone": "lora", "lora_lr": 0.02}
WHOLE = {**TUNED, "save_weights": "whole"}


def run(
    backbone: Backbone, out: Path | None = None, data: list[Record] | Questions | None = None, **options: Any
) -> TrainResult:
    """Train with fast settings."""
    config = TrainConfig.from_json({**FAST, **options.pop("settings", {})}).as_defaults()
    return train(options.pop("template", TEMPLATE), data or FACTS, backbone=backbone, config=config, out=out, **options)


@pytest.fixture(scope="module")
def finished(loaded: Callable[[str], Backbone], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, to be copied."""
    out = tmp_path_factory.mktemp("finished") / "out"
    run(loaded("llama"), out)
    return out


def after(steps: int) -> Callable[[], bool]:
    """Ask to stop after some steps."""
    asked = iter(range(1, 1000))
    return lambda: next(asked) >= steps


def saved_files(out: Path) -> dict[str, bytes]:
    """The bytes of everything that was saved with a prompt."""
    return {str(path.relative_to(out)): path.read_bytes() for path in (out / PROMPT_FOLDER).rglob("*.*")}


def timeless(value: Json) -> Json:
    """Take out of a record what depends on the clock."""
    if isinstance(value, dict):
        return {key: timeless(one) for key, one in value.items() if "second" not in key}
    return [timeless(one) for one in value] if isinstance(value, list) else value


def test_what_a_run_leaves(backbone: Backbone, tmp_path: Path) -> None:
    """A run leaves prompt, record and predictions; no checkpoint, nothing half-written."""
    result = run(backbone, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        (PROMPT_FOLDER, RUN_FILE, PREDICTIONS_FILE)
    )
    record = json.loads((tmp_path / "out" / RUN_FILE).read_text(encoding="utf-8"))
    assert record == json.loads(json.dumps(result.record))
    assert [part["rows"] for part in (record["data"]["train"], record["data"]["dev"])] == [9, 2]
    assert record["data"]["test"] is None
    assert (record["train_backbone"], record["slots"], record["stopped_early"]) == ("none", 3, False)
    assert len(record["history"]) == 2
    assert record["backbone"]["fingerprint"] == backbone.fingerprint
    assert record["trainable_parameters"] > 0
    assert record["frozen_parameters"] == backbone.parameters
    assert record["settings"]["template"] == TEMPLATE
    rows = [json.loads(line) for line in (tmp_path / "out" / PREDICTIONS_FILE).read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 2
    chosen = [record["start"], *record["history"]][record["chosen_epoch"]]
    assert sum(row["hit"] for row in rows) / 2 == chosen["dev_score"] == result.prompt.scores["exact_match"]
    assert result.prompt.scores["loss"] == chosen["dev_loss"]


def test_the_saved_prompt_is_the_trained_one(backbone: Backbone, tmp_path: Path) -> None:
    """Invariant *Saved is what was trained*: loaded, it has bit-equal vectors and logits."""
    result = run(backbone, tmp_path / "out")
    loaded = Prompt.load(tmp_path / "out")
    assert loaded.slot_vectors is not None
    assert result.prompt.slot_vectors is not None
    assert torch.equal(loaded.slot_vectors, result.prompt.slot_vectors)
    model = PromptModel(backbone)
    for one, other in zip(
        model.target_logits(RECORDS, loaded), model.target_logits(RECORDS, result.prompt), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("chosen", [0, 1, 2])
def test_the_record_s_scores_are_those_of_a_separate_call(
    causal: Backbone, chosen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Invariant *Loss position = scored position*: what training reports on the development part is what ``eval`` finds
    there for the chosen epoch.
    """
    real = Trainer._rank

    def rank(self: Trainer, score: float, loss: float, value: float) -> tuple[float, float]:
        is_later = self.state.step > 0 and self.state.epoch > chosen
        return (0.0, 0.0) if is_later else real(self, score, loss, value)

    monkeypatch.setattr(Trainer, "_rank", rank)
    result = run(causal, dev=FACTS[:4], settings={"train_eos": False})
    assert result.record["chosen_epoch"] == chosen
    found = score_prompt(PromptModel(causal), as_records(FACTS[:4]), result.prompt)
    assert found.scores["exact_match"].value == result.prompt.scores["exact_match"]
    assert found.loss == pytest.approx(result.prompt.scores["loss"], abs=1e-5)


def test_two_runs_give_the_same_bytes(backbone: Backbone, tmp_path: Path) -> None:
    """Invariant *Seeds are separate*: two runs with one seed give the same bytes, whatever the global generator did.

    Another seed gives others.
    """
    for name in ("one", "two"):
        torch.manual_seed(hash(name))
        run(backbone, tmp_path / name)
    for file in (VECTORS_FILE, MANIFEST_FILE, CARD_FILE):
        one, two = ((tmp_path / name / PROMPT_FOLDER / file).read_bytes() for name in ("one", "two"))
        assert one == two
    assert (tmp_path / "one" / PREDICTIONS_FILE).read_bytes() == (tmp_path / "two" / PREDICTIONS_FILE).read_bytes()
    one, two = (json.loads((tmp_path / name / RUN_FILE).read_text()) for name in ("one", "two"))
    assert timeless(one) == timeless(two)
    other = run(backbone, tmp_path / "other", settings={"seed": 1})
    assert other.prompt.seed == 1
    vectors = [(tmp_path / name / PROMPT_FOLDER / VECTORS_FILE).read_bytes() for name in ("one", "other")]
    assert vectors[0] != vectors[1]


STARTS = {"num_restarts": 2}


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, 1), ({}, 3), ({}, 4), (STARTS, 8), (TUNED, 1), (TUNED, 4), (WHOLE, 4), (LORA, 1), ({**TUNED, **STARTS}, 8),
        ({**LORA, **STARTS}, 8),
    ],
    ids=str,
)  # fmt: skip
def test_interrupted_and_resumed(
    make_backbone: Callable[[str], Backbone], tmp_path: Path, settings: dict[str, Any], steps: int
) -> None:
    """Invariant *Resume is exact*: stopped within an epoch, at its end, in the next, and in the next restart; moved,
    and with other settings that change no result. BERT's own dropout is on where its weights are trained.
    """
    masked = make_backbone("bert")
    whole = run(masked, tmp_path / "whole", settings=settings)
    with pytest.raises(Interrupted):
        run(masked, tmp_path / "here", settings={**settings, "checkpoint_seconds": 0.0}, should_stop=after(steps))
    assert (tmp_path / "here" / CHECKPOINT_FOLDER / CHECKPOINT_FILE).is_file()
    assert not (tmp_path / "here" / RUN_FILE).exists()
    shutil.move(tmp_path / "here", tmp_path / "cut")
    resumed = run(masked, tmp_path / "cut", settings=settings, resume=True)
    assert timeless(dict(resumed.record)) == timeless(dict(whole.record))
    assert saved_files(tmp_path / "cut") == saved_files(tmp_path / "whole") != {}
    assert not (tmp_path / "cut" / CHECKPOINT_FOLDER).exists()
    starts: Any = whole.record.get("starts", [])
    assert not starts or whole.prompt.scores["exact_match"] == max(start["dev_score"] for start in starts)


def command(folder: Path, model: Path, *more: str) -> list[str]:
    """Return a training command that takes a while and writes a checkpoint after every step."""
    settings = [f"--set={name}={value}" for name, value in {**FAST, **SLOW}.items()]
    files = ["--data", str(folder / "train.jsonl"), "--backbone", str(model), "--out", str(folder / "cut")]
    return [
        *("train", *files, "--template", TEMPLATE),
        *("--dtype", "float32", "--device", "cpu", *settings, *more),
    ]


@pytest.mark.parametrize("mode", [{}, TUNED, LORA], ids=["none", "full", "lora"])
def test_killed_and_resumed(tmp_path: Path, model_folder: Callable[[str], Path], mode: dict[str, Any]) -> None:
    """Invariant *Resume is exact*: kill -9 at two random moments, also between the best weights and the checkpoint that
    names them. It ends with the bytes of an undisturbed run.
    """
    rows: list[Record] = [
        {"x": f"city {index} of {index % 7}", "y": ("yes", "no", "25")[index % 3]} for index in range(40)
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = model_folder("llama")
    checkpoint = tmp_path / "cut" / CHECKPOINT_FOLDER / CHECKPOINT_FILE
    moments = random.Random(time.time_ns())
    options = [f"--set={name}={value}" for name, value in mode.items()]
    for kill in range(2):
        before = checkpoint.read_bytes() if checkpoint.exists() else b""
        more = [*options, "--resume"] if kill else options
        with forked(COMMAND_LINE, *command(tmp_path, model, *more), folder=tmp_path / "said") as process:
            process.wait_until(lambda: checkpoint.exists() and checkpoint.read_bytes() != before)  # noqa: B023 - now
            time.sleep(moments.uniform(0.0, 0.05))
            process.kill()
    backbone, data = load_backbone(str(model), dtype="float32", device="cpu"), load_records(tmp_path / "train.jsonl")
    run(backbone, tmp_path / "cut", data, settings={**SLOW, **mode}, resume=True)
    run(backbone, tmp_path / "whole", data, settings={**SLOW, **mode})
    assert saved_files(tmp_path / "cut") == saved_files(tmp_path / "whole") != {}
    one, two = (json.loads((tmp_path / name / RUN_FILE).read_text()) for name in ("cut", "whole"))
    assert timeless(one["history"]) == timeless(two["history"])
    assert not [path for path in (tmp_path / "cut").rglob("*") if path.name.endswith(".tmp")]


def test_killed_between_prompt_and_record(causal: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant *Resume is exact*: a run is finished when its record is written; until then resuming ends it."""
    whole = run(causal, tmp_path / "whole")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ptuning.training.run.write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            run(causal, tmp_path / "cut")
    new_path(tmp_path / "cut" / RUN_FILE).touch()  # a kill before the renaming leaves one
    steps: list[Progress] = []
    resumed = run(causal, tmp_path / "cut", resume=True, report=steps.append)
    assert not [step for step in steps if step.stage == "train"]
    assert timeless(dict(resumed.record)) == timeless(dict(whole.record))


def test_resuming_a_finished_run_returns_it(causal: Backbone, tmp_path: Path) -> None:
    """Invariant *Resume is exact*: resuming a finished run takes no step and touches no file."""
    run(causal, tmp_path / "out")
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "out").rglob("*.*")}
    steps: list[Progress] = []
    again = run(causal, tmp_path / "out", resume=True, report=steps.append)
    assert steps == []
    assert again.record == json.loads((tmp_path / "out" / RUN_FILE).read_text(encoding="utf-8"))
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "out").rglob("*.*")} == before


def other_backbone(folder: Path) -> Backbone:
    """Return a backbone of the same size and another seed."""
    make_model("llama", folder, seed=5)
    return load_backbone(str(folder), dtype="float32", device="cpu")


@pytest.mark.parametrize("finished", [True, False])
def test_resume_of_another_run_names_the_difference(causal: Backbone, tmp_path: Path, finished: bool) -> None:
    """Invariant *Resume is exact*: a run goes on as it began, or not at all.

    Settings, data, template, label words and backbone: each difference is named, with both values.
    """
    out = tmp_path / "out"
    if finished:
        run(causal, out)
    else:
        with pytest.raises(Interrupted):
            run(causal, out, should_stop=after(2))
    (tmp_path / "m").mkdir()
    cases: list[tuple[str, Backbone, dict[str, Any]]] = [
        (r"lr was 0\.01 and is 0\.5", causal, {"settings": {"lr": 0.5}}),
        (r"seed was 0 and is 7", causal, {"settings": {"seed": 7}}),
        (r"epochs was 2 and is 3\. Repeat the command as it was", causal, {"settings": {"epochs": 3}}),
        (r"template was .* and is \[P\*3\]", causal, {"template": "[P*3] [X] [Y]"}),
        (r"train data \(sha256\) was \w+ and is \w+", causal, {"data": [*FACTS, {"x": "new", "y": "no"}]}),
        (r"dev data \(sha256\) was \w+ and is \w+", causal, {"dev": FACTS[:2]}),
        (r"label_words was None and is \{", causal, {"labels": "yes=great;no=bad;São Tomé=25"}),
        (r"backbone fingerprint was [\w-]+ and is [\w-]+", other_backbone(tmp_path / "m"), {}),
        (r"train_backbone was none and is lora", causal, {"settings": LORA}),
    ]
    for message, backbone, options in cases:
        data = options.pop("data", None)
        with pytest.raises(TrainingError, match=rf"cannot resume from .*out.*: .*{message}"):
            run(backbone, out, data, resume=True, **options)


def test_a_damaged_checkpoint_or_record(causal: Backbone, tmp_path: Path) -> None:
    """Invariant *Resume is exact*: damage is an error with a way out, and the way out works."""
    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        run(causal, out, should_stop=after(2))
    path = out / CHECKPOINT_FOLDER / CHECKPOINT_FILE
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(TrainingError, match=r"is damaged .*overwrite"):
        run(causal, out, resume=True)
    run(causal, out, overwrite=True)
    (out / RUN_FILE).write_text('{"settings": {}, "data": ')
    with pytest.raises(FileError, match="is not valid JSON"):
        run(causal, out, resume=True)
    for text in ('{"settings": [], "data": {}, "backbone": {}}', "{}", '{"settings": {}, "data": {}, "backbone": {}}'):
        (out / RUN_FILE).write_text(text)
        with pytest.raises(PTuningError, match=r"run.json is damaged|cannot resume"):
            run(causal, out, resume=True)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("start", None), ("start", {}), ("history", {}), ("history", [[]]), ("history", [{"epoch": "x"}]),
        ("train_backbone", 7),
        ("chosen_epoch", None), ("train_seconds", "long"), ("choice_rule", []), ("trainable_parameters", 1.5),
    ],
)  # fmt: skip
def test_a_finished_record_that_lacks_its_outcome_is_damaged(
    causal: Backbone, finished: Path, tmp_path: Path, key: str, value: object
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    record = json.loads((out / RUN_FILE).read_text(encoding="utf-8"))
    (out / RUN_FILE).write_text(json.dumps({**record, key: value}), encoding="utf-8")
    with pytest.raises(FileError, match=r"run.json is damaged: .*overwrite"):
        run(causal, out, resume=True)


def test_overwriting(causal: Backbone, tmp_path: Path) -> None:
    """Nothing is overwritten unasked; and when asked, nothing of the earlier run is left."""
    out = tmp_path / "out"
    first = run(causal, out)
    with pytest.raises(FileError, match=r"exists and is not empty"):
        run(causal, out, settings={"seed": 1})
    assert Prompt.load(out).seed == first.prompt.seed == 0
    with pytest.raises(Interrupted):
        run(causal, out, overwrite=True, settings={"seed": 1}, should_stop=after(1))
    assert sorted(path.name for path in out.iterdir()) == [CHECKPOINT_FOLDER]
    run(causal, out, overwrite=True, settings={"seed": 2})
    assert Prompt.load(out).seed == 2


def test_a_run_that_cannot_start_replaces_nothing(causal: Backbone, tmp_path: Path) -> None:
    """The earlier run used to be removed before it was known that the new one can be made."""
    out = tmp_path / "out"
    run(causal, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(BackboneError, match="nonsense"):
        run(causal, out, overwrite=True, settings={"train_backbone": "lora", "lora_targets": "nonsense"})
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("how", ["resume", "overwrite"])
def test_what_a_killed_run_left_half_written_goes(how: str, causal: Backbone, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        run(causal, out, should_stop=after(2))
    half = new_path(out / CHECKPOINT_FOLDER / "files")
    half.mkdir()
    for path in (half / CHECKPOINT_FILE, new_path(out / RUN_FILE), new_path(out / CHECKPOINT_FOLDER / CHECKPOINT_FILE)):
        path.write_bytes(b"half")
    mine = [out / ".run.json.backup.old", out / ".run.json.12.tmp", out / ".prompts.old"]
    for path in mine:
        path.write_bytes(b"not half")
    run(causal, out, resume=how == "resume", overwrite=how == "overwrite")
    left = (PROMPT_FOLDER, RUN_FILE, PREDICTIONS_FILE, *(path.name for path in mine))
    assert sorted(path.name for path in out.iterdir()) == sorted(left)


@pytest.mark.parametrize("lr", [1e38, 1e308])
def test_a_learning_rate_that_overflows_is_an_error_of_training(lr: float, causal: Backbone) -> None:
    with pytest.raises(TrainingError, match=r"overflows .*; lower the learning rate|the loss became nan"):
        run(causal, settings={"lr": lr, "warmup_fraction": 0.0})


def test_gradients_that_are_off_outside(causal: Backbone) -> None:
    with torch.no_grad():
        first = run(causal)
    with torch.inference_mode():
        second = run(causal)
    assert first.prompt.slot_vectors is not None
    assert second.prompt.slot_vectors is not None
    assert torch.equal(first.prompt.slot_vectors, second.prompt.slot_vectors)


def test_a_folder_with_something_else(causal: Backbone, tmp_path: Path) -> None:
    """Neither resume nor a plain run writes among a user's files; overwrite leaves them alone."""
    (tmp_path / "notes.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(FileError, match="exists and is not empty"):
            run(causal, tmp_path, resume=resume)
    run(causal, tmp_path, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"template": "[X] is [Y]"}, TemplateError, "has no slots, so there is nothing to learn"),
        (
            {"settings": {"train_backbone": "lora", "lora_targets": "nowhere"}},
            PTuningError,
            "takes no adapters on 'nowhere'",
        ),
        ({"template": "[X] [Y] [P*3]"}, TemplateError, r"'\[X\] \[Y\] \[P\*3\]'"),
        ({"template": "[X] [Y] [P*3]", "settings": {"train_backbone": "full"}}, TemplateError, "slots"),
        ({"template": "[P] [X]"}, TemplateError, r"needs one \[Y\]"),
        ({"template": "[P] {z} [Y]"}, RecordError, "'z'"),
        ({"data": [{"x": "a", "y": "b"}, {"x": "c"}]}, RecordError, "record 2: no target"),
        ({"data": [{"x": "a", "y": "b"}]}, RecordError, "too few different records to set some aside"),
        ({"dev": []}, RecordError, r"the dev data \(in memory\) holds no records"),
        ({"labels": "yes=great;no=bad"}, RecordError, "'São Tomé' is not one of the labels"),
        ({"labels": "yes=great"}, PTuningError, "at least two labels"),
        ({"template": f"[P:{'1 ' * 200}] [X] is [Y]"}, TemplateError, "does not fit"),
        ({"resume": True, "out": None}, ConfigError, "nothing to resume without the folder"),
    ],
)
def test_errors_before_anything_is_written(
    causal: Backbone, tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    """The error is that of the stage at fault, and no folder appears."""
    with pytest.raises(error, match=message):
        run(causal, **{"out": tmp_path / "out", **options})
    assert not (tmp_path / "out").exists()


def test_dev_data_chooses_only(causal: Backbone) -> None:
    """The development part chooses and does not train: with its answers permuted, the same epochs are trained."""
    dev = FACTS[:6]
    turned = [{**record, "y": other["y"]} for record, other in zip(dev, dev[1:] + dev[:1], strict=True)]
    one, other = run(causal, dev=dev).record, run(causal, dev=turned).record
    losses = [[epoch["train_loss"] for epoch in found["history"]] for found in (one, other)]  # type: ignore[union-attr, index, call-overload]
    assert losses[0] == losses[1]
    assert one["history"] != other["history"]


def test_white_space_around_a_target_is_not_learned(causal: Backbone) -> None:
    """A space or line break at the end would be a token of its own, and one line break would turn the prompt into one
    that writes several lines.
    """
    spaced: list[Record] = [
        {"x": row["x"], "y": f"{' ' * (at % 2)}{row['y']}{('', ' ', chr(10))[at % 3]}"} for at, row in enumerate(FACTS)
    ]
    plain, found = run(causal), run(causal, data=spaced)
    assert plain.prompt.slot_vectors is not None
    assert found.prompt.slot_vectors is not None
    assert torch.equal(found.prompt.slot_vectors, plain.prompt.slot_vectors)
    assert (found.prompt.multiline, found.prompt.scores) == (False, plain.prompt.scores)
    scored = score_prompt(PromptModel(causal), as_records(spaced), plain.prompt)
    assert scored.hits == score_prompt(PromptModel(causal), as_records(FACTS), plain.prompt).hits
    assert plain.prompt.learned_to_stop
    lines: list[Record] = [{"x": row["x"], "y": f"{row['y']}\nand on\n"} for row in FACTS]
    assert run(causal, data=lines).prompt.multiline


def test_label_words(backbone: Backbone, tmp_path: Path) -> None:
    """Classification: words as text, object or mapping, the same run; saved with the prompt."""
    text = "yes=great,good;no=bad;São Tomé=25"
    plain = {"yes": ["great", "good"], "no": "bad", "São Tomé": "25"}
    words = LabelWords({"yes": ("great", "good"), "no": ("bad",), "São Tomé": ("25",)})
    one = run(backbone, tmp_path / "one", labels=text)
    two = run(backbone, tmp_path / "two", labels=words)
    three = run(backbone, labels=plain)
    assert one.prompt.label_words == two.prompt.label_words == three.prompt.label_words == words
    assert Prompt.manual("[X] is [Y]", label_words=plain).label_words == words
    assert Prompt.load(tmp_path / "one").label_words == words
    names = [(tmp_path / name / PROMPT_FOLDER / VECTORS_FILE).read_bytes() for name in ("one", "two")]
    assert names[0] == names[1]
    assert set(one.prompt.scores) == {"accuracy", "loss"}
    answers = PromptModel(backbone).predict(FACTS, one.prompt)
    assert {answer.text for answer in answers} <= set(words.words)


def test_without_a_folder_nothing_is_written(causal: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For notebooks."""
    monkeypatch.chdir(tmp_path)
    result = run(causal)
    assert result.folder is None
    assert list(tmp_path.iterdir()) == []


def test_the_ceiling_is_measured_when_asked(causal: Backbone) -> None:
    """The record has the bare backbone's speed, which no training can exceed, beside the run's own."""
    assert "ceiling_tokens_per_second" not in run(causal).record
    found = run(causal, ceiling=True).record["ceiling_tokens_per_second"]
    assert isinstance(found, float)
    assert found > 0


def test_of_several_starts_the_best_one_is_kept(causal: Backbone, tmp_path: Path) -> None:
    """Each from a draw of its own, the first as it would be alone, chosen on the development part."""
    found = run(causal, tmp_path / "three", settings={"num_restarts": 3})
    alone = run(causal, tmp_path / "one")
    listed: Any = json.loads(json.dumps(found.record["starts"]))
    assert [start["seed"] for start in listed] == [start_seed(0, number) for number in range(3)]
    assert listed[0]["seed"] == 0
    keys = [(start["dev_score"], -start["dev_loss"]) for start in listed]
    assert keys[0] == (alone.prompt.scores["exact_match"], -alone.prompt.scores["loss"])
    assert len(set(keys)) == 3
    assert (found.prompt.scores["exact_match"], -found.prompt.scores["loss"]) == max(keys)
    assert "starts" not in alone.record


LATE = "{x} lies in {x} [P:is] [P] [Y]"


def test_several_starts_share_the_text_in_front_of_the_slots(
    causal: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is run once, every start learns what it learns with keys and values of its own, and none are left behind."""
    monkeypatch.setattr(prefix_cache, "MIN_PREFIX_TOKENS", 2)
    made: list[PrefixCache] = []
    ids: list[Ids] = []
    real_run, real_init = PrefixCache._run, PrefixCache.__init__

    def watch(parts: PrefixCache, group: Sequence[Ids]) -> list[torch.Tensor]:
        ids.extend(group)
        return real_run(parts, group)

    def init(parts: PrefixCache, backbone: Backbone, *, memory_share: float, disk_bytes: int) -> None:
        real_init(parts, backbone, memory_share=memory_share, disk_bytes=disk_bytes)
        made.append(parts)

    monkeypatch.setattr(PrefixCache, "_run", watch)
    monkeypatch.setattr(PrefixCache, "__init__", init)
    shared = run(causal, tmp_path / "shared", template=LATE, settings={"num_restarts": 3})
    assert len(ids) == len(set(ids)) == len(FACTS)
    assert not any(parts.tokens or parts.is_used for parts in made)

    real = TrainingRun.trainer
    monkeypatch.setattr(TrainingRun, "trainer", lambda one, number, *, checkpoint, prefix_cache: real(one, number))
    own = run(causal, tmp_path / "own", template=LATE, settings={"num_restarts": 3})
    assert len(ids) == 4 * len(FACTS)
    assert timeless(own.record) == timeless(shared.record)
    assert any(cast("dict[str, int]", own.record["constant_part"]).values())
    for file in (VECTORS_FILE, MANIFEST_FILE):
        one, other = ((tmp_path / out / PROMPT_FOLDER / file).read_bytes() for out in ("shared", "own"))
        assert one == other


MODES = pytest.mark.parametrize("mode", [TUNED, WHOLE, LORA], ids=["full", "whole", "lora"])
# Every family once, and every mode with a causal and a masked model where it may matter.
SOME = pytest.mark.parametrize(
    ("family", "mode"),
    [("gpt2", TUNED), ("llama", WHOLE), ("llama", LORA), ("bert", TUNED), ("roberta", LORA)],
    ids=["gpt2-tuned", "llama-whole", "llama-lora", "bert-tuned", "roberta-lora"],
)
# Answers in a process of its own, for prompts that it reads from their folders.
ANSWER = """
import json, sys, torch
from ptuning.backbone.loading import load_backbone
from ptuning.engine.forward import target_logits
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prediction import Prediction
from ptuning.prompt.prompt import Prompt
model = PromptModel(load_backbone(sys.argv[1], dtype="float32", device="cpu"))
for folder in sys.argv[3:]:
    logits = model.target_logits(json.loads(sys.argv[2]), Prompt.load(folder))
    print([one.view(torch.int32).tolist() for one in logits])
"""


def weights(backbone: Backbone) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in backbone.model.state_dict().items()}


@SOME
def test_trained_weights_are_saved_with_the_prompt(backbone: Backbone, tmp_path: Path, mode: dict[str, Any]) -> None:
    """Invariants *Saved is what was trained* and *Frozen is frozen*: loading gives bit-equal logits, and the caller's
    backbone is bit-identical.
    """
    before = weights(backbone)
    # Chosen by what it learns from, so that what is kept is not the start.
    result = run(backbone, tmp_path / "out", FACTS * 3, dev=FACTS, settings={**mode, "epochs": 3, "batch_size": 4})
    assert result.record["chosen_epoch"]
    after = weights(backbone)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(weight.requires_grad or weight.grad is not None for weight in backbone.model.parameters())
    assert not any(module.training for module in backbone.model.modules())
    assert (result.record["train_backbone"], result.record["method"]) == (
        (mode["train_backbone"], "p-tuning+lora")
        if mode["train_backbone"] == "lora"
        else ("full", "p-tuning+fine-tuning")
    )
    trained, frozen = result.record["trainable_parameters"], result.record["frozen_parameters"]
    assert isinstance(trained, int)
    assert frozen == (backbone.parameters if mode["train_backbone"] == "lora" else 0)
    model = PromptModel(backbone)
    wanted = model.target_logits(RECORDS, result.prompt)
    found = PromptModel(backbone).target_logits(RECORDS, Prompt.load(tmp_path / "out"))
    assert all(map(torch.equal, wanted, found))
    plain = model.target_logits(RECORDS, result.prompt.without("backbone"))
    assert not torch.allclose(plain[0], wanted[0], atol=1e-3)
    rows = [json.loads(line) for line in (tmp_path / "out" / PREDICTIONS_FILE).read_text().splitlines()]
    assert sum(row["hit"] for row in rows) / len(FACTS) == result.prompt.scores["exact_match"]


def test_a_new_process_gives_bit_equal_logits(causal: Backbone, tmp_path: Path) -> None:
    wanted = []
    for name, mode in (("full", TUNED), ("whole", WHOLE), ("lora", LORA)):
        prompt = run(causal, tmp_path / name, settings=mode).prompt
        found = PromptModel(causal).target_logits(RECORDS, prompt)
        wanted.append([one.view(torch.int32).tolist() for one in found])
    arguments = [causal.name, json.dumps(RECORDS), *(str(tmp_path / name) for name in ("full", "whole", "lora"))]
    with forked(ANSWER, *arguments, folder=tmp_path / "said") as process:
        assert process.wait() == 0, process.err
    assert [json.loads(line) for line in process.out.splitlines()] == wanted


def test_best_weights_and_a_checkpoint_that_does_not_name_them_yet(
    causal: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill after an epoch's weights were set aside, before the checkpoint: the earlier best ones are still there."""
    whole = run(causal, tmp_path / "whole", settings=TUNED)
    real, calls = TrainingLoop.save, list[int]()

    def save(self: TrainingLoop) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(self)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingLoop, "save", save)
        with pytest.raises(KeyboardInterrupt):
            run(causal, tmp_path / "cut", settings=TUNED)
    assert run(causal, tmp_path / "cut", settings=TUNED, resume=True).prompt.scores == whole.prompt.scores


@SOME
def test_a_manual_template_is_enough_where_the_backbone_learns(
    backbone: Backbone, tmp_path: Path, mode: dict[str, Any]
) -> None:
    result = run(backbone, tmp_path / "out", template="[X] is [Y]", settings=mode, dev=FACTS)
    assert result.record["chosen_epoch"] != 0
    prompt = Prompt.load(tmp_path / "out")
    assert (prompt.slots, prompt.slot_vectors) == (0, None)
    assert prompt.method == ("manual+lora" if mode["train_backbone"] == "lora" else "manual+fine-tuning")
    assert prompt.backbone is not None
    model = PromptModel(backbone)
    one, two = (model.target_logits(RECORDS, found) for found in (prompt, result.prompt))
    assert all(map(torch.equal, one, two))
    assert not torch.equal(one[0], model.target_logits(RECORDS, Prompt.manual("[X] is [Y]"))[0])


@MODES
def test_label_words_with_trained_weights(causal: Backbone, mode: dict[str, Any]) -> None:
    labels = "yes=great,good;no=bad;São Tomé=25"
    result = run(causal, None, FACTS * 5, labels=labels, settings={**mode, "epochs": 3}, dev=FACTS)
    found = score_prompt(PromptModel(causal), as_records(FACTS), result.prompt)
    assert found.scores["accuracy"].value == result.prompt.scores["accuracy"] > 0.6


def test_tuned_weights_are_float32_whatever_the_backbone_is(causal: Backbone, tmp_path: Path) -> None:
    """Weights are trained in float32: a bfloat16 one hardly ever moves under small steps."""
    causal.model.to(torch.bfloat16)  # type: ignore[arg-type]
    for name, mode in (("full", TUNED), ("lora", LORA)):
        result = run(causal, tmp_path / name, settings=mode)
        assert result.prompt.weights is not None
        assert {one.dtype for one in result.prompt.weights.tensors.values()} == {torch.float32}
        one, two = (PromptModel(causal).target_logits(RECORDS, found) for found in (
            result.prompt, Prompt.load(tmp_path / name)
        ))  # fmt: skip
        assert all(map(torch.equal, one, two))
        assert causal.dtype == torch.bfloat16


def test_room_on_disk_is_checked_before(causal: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr("ptuning.training.run.check_room", lambda _, needed: asked.append(needed))
    for name, mode in (("none", {}), ("lora", LORA), ("full", TUNED)):
        run(causal, tmp_path / name, settings=mode)
    assert asked[0] < asked[1] < asked[2]
    assert asked[2] - asked[0] == 9 * 4 * causal.parameters


def test_no_files_are_left_where_none_are_asked_for(
    causal: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run(causal, settings=TUNED)
    with pytest.raises(Interrupted):
        run(causal, settings=TUNED, should_stop=after(2))
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------------------------------------- tasks

CHOICE_TASK = TaskFile.parse(
    """
name = "choose"
version = "7"
group = ["g"]
[choices]
from = ["options[]"]
[[patterns]]
manual = "[X] is [Y]"
learned = "[P*2] [X] [P:is] [Y]"
"""
)
CHOICE_ROWS = [
    {
        "x": f"city {at}",
        "options": ["yes", "no", "São Tomé", *(f"{at} {n}" for n in range(at))],
        "label": at % 3,
        "g": at // 2,
    }
    for at in range(12)
]


def test_a_task_with_choices_from_rows_to_answers(backbone: Backbone, tmp_path: Path) -> None:
    """The prompt carries the task and answers new rows; the record names it; dev rows of a group stay together."""
    asked = CHOICE_TASK.read_rows(CHOICE_ROWS)
    found = run(backbone, tmp_path / "out", data=asked, template=CHOICE_TASK.learned[0], task=CHOICE_TASK)
    assert found.record["task"] == CHOICE_TASK.to_json()
    assert found.record["choices"] is True
    assert set(found.prompt.scores) == {"accuracy", "loss"}
    loaded = Prompt.load(tmp_path / "out")
    assert (loaded.task, loaded.answer_space.has_choices, loaded.label_words) == (CHOICE_TASK, True, None)
    lines = (tmp_path / "out" / PREDICTIONS_FILE).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    by_text = {question.record["x"]: question for question in asked}
    held = [by_text[row["record"]["x"]] for row in rows]
    assert len(held) == len(lines) >= 2
    assert all(row["prediction"] in question.choices for row, question in zip(rows, held, strict=True))
    assert len({question.group for question in held}) == len(held) / 2
    scored = score_prompt(PromptModel(backbone), Questions(held), loaded)
    assert scored.hits == tuple(float(row["hit"]) for row in rows)


def test_rows_are_cut_to_max_length_in_training_and_in_use(
    causal: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The prompt says to how many tokens."""
    long: list[Record] = [{"x": f"city {index} " + "a " * 40, "y": row["y"]} for index, row in enumerate(FACTS)]
    run(causal, tmp_path / "out", data=long, settings={"max_length": 20})
    assert "are longer than 20 tokens (max_length, or what the model reads); fields were cut" in caplog.text
    prompt = Prompt.load(tmp_path / "out")
    assert (prompt.max_length, TrainConfig().max_length) == (20, 2048)
    read: list[int] = []

    def spy(examples: Sequence[Example], *rest: Any, **options: Any) -> Any:
        read.extend(len(example.token_ids) for example in examples)
        return collate(examples, *rest, **options)

    monkeypatch.setattr("ptuning.engine.forward.collate", spy)
    model = PromptModel(causal)
    model.rank(long, prompt, ["yes", "no", "São Tomé"])
    score_prompt(model, as_records(long), prompt)
    assert max(read) <= 20
    score_prompt(model, as_records(long), replace(prompt, max_length=None))
    assert max(read) > 20
    with pytest.raises(TemplateError, match=r"take \d+ tokens, and a row has room for 6 \(max_length, or what"):
        run(causal, settings={"max_length": 6}, template="[P*6] [X] is [Y]")


def test_calibration_is_trained_with_and_goes_into_the_prompt(causal: Backbone, tmp_path: Path) -> None:
    labels = "yes=great,good;no=bad;São Tomé=25"
    plain, other = run(causal, labels=labels), run(causal, tmp_path / "out", labels=labels, calibrate=True)
    assert (plain.prompt.calibrate, other.prompt.calibrate) == (False, True)
    assert plain.record["start"] != other.record["start"]
    assert "task" not in plain.record
    assert other.record["settings"]["calibrate"] is True  # type: ignore[index, call-overload]
    assert Prompt.load(tmp_path / "out").calibrate
    with pytest.raises(ConfigError, match="is for label words and a task's choices"):
        run(causal, calibrate=True)


def test_a_tasks_label_words_are_its_own_unless_others_are_given(causal: Backbone) -> None:
    task = TaskFile.parse(
        'name="t"\nversion="1"\ncalibrate=true\n[labels]\nyes=["great"]\nno=["bad"]\n"São Tomé"=["25"]\n'
        '[[patterns]]\nmanual="[X] is [Y]"'
    )
    found = run(causal, task=task).prompt
    assert (found.label_words, found.calibrate) == (task.label_words, True)
    words = LabelWords({"yes": ("good",), "no": ("bad",), "São Tomé": ("1999",)})
    found = run(causal, task=task, labels=words, calibrate=False).prompt
    assert (found.label_words, found.calibrate) == (words, False)


@pytest.mark.parametrize("case", ["labels", "calibrated", "choices", "full", "written"])
def test_the_written_predictions_are_those_of_predict(
    case: str, causal: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The development part is scored once, behind what is kept of it; what is chosen there is what ``predict`` says."""
    monkeypatch.setattr(prefix_cache, "MIN_PREFIX_TOKENS", 2)
    labels = None if case in ("choices", "written") else "yes=great,good;no=bad;São Tomé=25"
    asked = CHOICE_TASK.read_rows(CHOICE_ROWS) if case == "choices" else None
    task = CHOICE_TASK if case == "choices" else None
    settings = TUNED if case == "full" else {}
    whole: list[int] = []
    real = target_logits

    def watch(backbone: Backbone, examples: Any, learned: PromptBatch, *, cache: PrefixCache | None) -> torch.Tensor:
        if cache is None or not cache.is_used:
            whole.append(len(examples))
        return real(backbone, examples, learned, cache=cache)

    monkeypatch.setattr(evaluate_module, "target_logits", watch)
    answered: list[int] = []
    predict = PromptModel.predict

    def answer(model: PromptModel, rows: Questions, prompt: Prompt) -> list[Prediction]:
        answered.append(len(rows))
        return predict(model, rows, prompt)

    monkeypatch.setattr(PromptModel, "predict", answer)
    found = run(
        causal, tmp_path, data=asked, task=task, template=LATE, labels=labels, settings=settings,
        calibrate=True if case == "calibrated" else None,
    )  # fmt: skip
    assert bool(whole) == (case == "full")
    assert bool(answered) == (case == "written")
    lines = (tmp_path / PREDICTIONS_FILE).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    held: Any = [row["record"] for row in rows]
    if asked is not None:
        held = Questions([next(one for one in asked if one.record["x"] == row["x"]) for row in held])
    for row, wanted in zip(rows, predict(PromptModel(causal), held, found.prompt), strict=True):
        assert row["prediction"] == wanted.text
        assert row["log_prob"] == pytest.approx(wanted.log_prob, abs=1e-4)


def test_the_score_that_chose_has_its_interval_everywhere(causal: Backbone, tmp_path: Path) -> None:
    """The same as a separate call of scoring gives: in the record, in the prompt, and on its card."""
    found = run(causal, dev=FACTS[:4], out=tmp_path)
    own = cast("Any", found.record)["dev_score"]
    again = score_prompt(PromptModel(causal), as_records(FACTS[:4]), Prompt.load(tmp_path)).scores["exact_match"]
    assert own == again.to_json()
    assert own["n"] == 4
    assert 0 <= own["low"] <= own["value"] <= own["high"] <= 1
    saved = Prompt.load(tmp_path)
    assert saved.intervals == found.prompt.intervals == {"exact_match": (own["low"], own["high"])}
    card = (tmp_path / "prompt" / "README.md").read_text(encoding="utf-8")
    assert f"n = 4) | {own['value']:.3f} [{own['low']:.3f}, {own['high']:.3f}] |" in card


def test_answers_that_the_tokenizer_does_not_know_are_not_learned_and_never_hits(masked: Backbone) -> None:
    """To learn the unknown token is to forget answers."""
    rare: list[Record] = [{"x": "Kenya", "y": "\U0001f642"}, {"x": "Peru", "y": "東京"}]
    dev = [*FACTS[:4], *rare]
    plain, found = run(masked, dev=dev), run(masked, data=[*FACTS, *rare], dev=dev)
    assert plain.prompt.slot_vectors is not None
    assert found.prompt.slot_vectors is not None
    assert torch.equal(plain.prompt.slot_vectors, found.prompt.slot_vectors)
    counts = cast("Any", found.record["data"])["train"]
    assert (counts["rows"], counts["kept"], counts["dropped"]) == (len(FACTS) + 2, len(FACTS), 2)
    assert cast("Any", found.record["data"])["dev"]["dropped"] == 0
    assert found.prompt.scored_on == 6


def test_a_part_without_any_known_answer_is_an_error(masked: Backbone) -> None:
    rows: list[Record] = [{"x": "Kenya", "y": "yes"}, *({"x": f"Peru {at}", "y": "\U0001f642"} for at in range(3))]
    with pytest.raises(RecordError, match="the tokenizer knows no target of in memory"):
        run(masked, data=rows)


def test_deep_slots_are_rounded_once_when_the_prompt_is_made(causal: Backbone, tmp_path: Path) -> None:
    """What is returned, what is saved and what is loaded are the same numbers."""
    template, settings = "[D*2] [X] is [D] [Y]", {**FAST, "deep_dtype": "bfloat16"}
    config = TrainConfig.from_json(settings).as_defaults()
    found = train(template, FACTS, backbone=causal, config=config, out=tmp_path / "half").prompt
    whole = train(template, FACTS, backbone=causal, config=TrainConfig.from_json(FAST).as_defaults()).prompt
    saved = Prompt.load(tmp_path / "half").deep
    assert found.deep is not None
    assert saved is not None
    assert whole.deep is not None
    assert saved.dtype == torch.bfloat16
    for name, one in found.deep.tensors.items():
        assert torch.equal(one, saved.tensors[name])
        assert torch.equal(one, whole.deep.tensors[name].bfloat16().float())
