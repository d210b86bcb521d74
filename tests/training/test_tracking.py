"""Logs of trainings: a line per step and epoch, resumed without a step twice, and clear words where one cannot be."""

import csv
import importlib.machinery
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from ptuning.backbone.backbone import Backbone
from ptuning.config import TrainConfig
from ptuning.errors import ConfigError
from ptuning.progress import Interrupted, Progress
from ptuning.records import Record
from ptuning.training import tracking
from ptuning.training.fleet import train_fleet
from ptuning.training.run import train
from ptuning.training.spec import FleetPrompt
from ptuning.training.tracking import CSV_FILE, TrainingLog

FACTS: list[Record] = [{"x": f"city {index}", "y": ("yes", "no", "good")[index % 3]} for index in range(11)]
FAST = TrainConfig(epochs=2, batch_size=3, lr=0.01, patience=99, checkpoint_seconds=0.0).as_defaults()
# Two epochs of three steps, and the development part before and after each.
STEPS = [0, 1, 2, 3, 3, 4, 5, 6, 6]


def learn(backbone: Backbone, out: Path | None, log: TrainingLog, **more: Any) -> Any:
    return train("[P*2] [X] [P:is] [Y]", FACTS, backbone=backbone, config=FAST, out=out, report=log, **more)


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def without_speed(found: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{**row, "tokens_per_second": ""} for row in found]


def after(steps: int) -> Callable[[], bool]:
    asked = iter(range(1, 1000))
    return lambda: next(asked) >= steps


def numbers_at(step: int, *, epoch: int = 1) -> Progress:
    return Progress("train", 0, 1, "", numbers={"step": step, "epoch": epoch, "loss": step / 10})


def test_a_table_has_every_step_and_what_the_record_says_of_epochs(causal: Backbone, tmp_path: Path) -> None:
    with TrainingLog("csv", tmp_path / "log") as log:
        record = learn(causal, None, log).record
    found = rows(tmp_path / "log" / CSV_FILE)
    assert [int(row["step"]) for row in found] == STEPS
    steps, epochs = ([row for row in found if bool(row["loss"]) is taken] for taken in (True, False))
    assert [float(row["lr"]) for row in steps] == pytest.approx([0.005, 0.01, 0.008, 0.006, 0.004, 0.002], abs=1e-3)
    assert all(float(row["tokens_per_second"]) > 0 for row in steps)
    assert [float(row["dev_loss"]) for row in epochs[1:]] == [one["dev_loss"] for one in record["history"]]
    assert float(epochs[0]["dev_score"]) == record["start"]["dev_score"]
    assert epochs[0]["train_loss"] == ""
    for at, one in enumerate(record["history"]):
        # Batches of three, three and two or three records: the mean over tokens lies between the means of batches.
        means = [float(row["loss"]) for row in steps if int(row["epoch"]) == at + 1]
        assert min(means) <= one["train_loss"] <= max(means)


@pytest.mark.parametrize("killed", [False, True])
def test_a_resumed_training_goes_on_in_its_log_with_no_step_twice(
    killed: bool, causal: Backbone, tmp_path: Path
) -> None:
    """Also if it was killed steps behind its checkpoint, in the middle of a line."""
    with TrainingLog("csv", tmp_path / "whole") as log:
        learn(causal, None, log)
    with TrainingLog("csv", tmp_path / "parts") as log, pytest.raises(Interrupted):
        learn(causal, tmp_path / "run", log, should_stop=after(4))
    file = tmp_path / "parts" / CSV_FILE
    assert [int(row["step"]) for row in rows(file)] == STEPS[:6]
    if killed:
        with file.open("a", encoding="utf-8") as lines:
            lines.write("5,2,0.123,0.1,9.0,,,\n6,2,0.456,")
    with TrainingLog("csv", tmp_path / "parts") as log:
        learn(causal, tmp_path / "run", log, resume=True)
    assert without_speed(rows(file)) == without_speed(rows(tmp_path / "whole" / CSV_FILE))
    with TrainingLog("csv", tmp_path / "parts") as log:
        learn(causal, tmp_path / "run", log, resume=True)  # it is finished
        assert len(rows(file)) == len(STEPS)
        learn(causal, tmp_path / "run", log, overwrite=True)
    assert [int(row["step"]) for row in rows(file)] == STEPS


def test_tensorboard_reads_what_was_logged_and_a_resumed_run_once(causal: Backbone, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with TrainingLog(["tensorboard"], tmp_path / "log") as log, pytest.raises(Interrupted):
        learn(causal, tmp_path / "run", log, should_stop=after(4))
    with TrainingLog("tensorboard", tmp_path / "log") as log:
        log(numbers_at(5, epoch=2))  # a process that was killed behind its last checkpoint
        log.close()
        record = learn(causal, tmp_path / "run", log, resume=True).record
    found = EventAccumulator(str(tmp_path / "log"))
    found.Reload()
    assert [one.step for one in found.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert found.Scalars("loss")[4].value != 0.5
    assert [one.value for one in found.Scalars("dev_loss")[1:]] == pytest.approx(
        [one["dev_loss"] for one in record["history"]]
    )


def test_every_prompt_of_a_fleet_and_every_start_has_a_log_of_its_own(causal: Backbone, tmp_path: Path) -> None:
    prompts = [FleetPrompt(name, "[P*2] [X] [Y]", FACTS, config=FAST) for name in ("one", "two")]
    with TrainingLog("csv", tmp_path / "log", together=True) as log:
        train_fleet(prompts, backbone=causal, report=log)
        train("[P*2] [X] [Y]", FACTS, backbone=causal, config=TrainConfig(epochs=1, num_restarts=2), report=log)
    for name in ("one", "two"):
        assert [int(row["step"]) for row in rows(tmp_path / "log" / name / CSV_FILE)] == STEPS
    for folder in (tmp_path / "log", tmp_path / "log" / "start-1"):
        assert [int(row["step"]) for row in rows(folder / CSV_FILE)] == [0, 1, 2, 2]


def test_names_that_data_has_chosen_stay_inside_of_the_folder(tmp_path: Path) -> None:
    with TrainingLog("csv", tmp_path / "deep" / "log") as log:
        log(Progress("train", 0, 1, "", "../../up//..\\x/\x1b[2J", {"step": 1, "epoch": 1, "loss": 1.0}))
    (file,) = (path for path in tmp_path.rglob("*") if path.is_file())
    assert file.relative_to(tmp_path / "deep" / "log").parts == ("__", "__", "up", "___x", "__2J", CSV_FILE)


def test_only_so_many_logs_are_open_and_a_closed_one_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "OPEN", 2)
    with TrainingLog("csv", tmp_path) as log:
        for step in (1, 2):
            for name in "abc":
                log(Progress("train", 0, 1, "", name, {"step": step, "epoch": 1, "loss": 1.0}))
                assert len(log._open) <= 2
    assert [[row["step"] for row in rows(tmp_path / name / CSV_FILE)] for name in "abc"] == [["1", "2"]] * 3


def test_a_table_of_others_is_not_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / CSV_FILE).write_text("name,age\nKenya,1\n", encoding="utf-8")
    with TrainingLog("csv", tmp_path) as log:
        log(numbers_at(1))
    assert "log.csv is not a log of ptuning" in caplog.text
    assert (tmp_path / CSV_FILE).read_text(encoding="utf-8") == "name,age\nKenya,1\n"


@pytest.mark.parametrize(
    ("trackers", "together", "says"),
    [
        ("csv,tensorbord", False, "'tensorbord'.*'tensorboard'"),
        ("mlflow", False, "mlflow"),
        ("wandb", True, "wandb"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_trained(
    trackers: str, together: bool, says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None if name == "mlflow" else object())
    with pytest.raises(ConfigError, match=says):
        TrainingLog(trackers, tmp_path, together=together)
    assert not list(tmp_path.iterdir())


def test_a_tracker_that_fails_is_left_out_and_training_goes_on(
    causal: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = tracking.CsvTracker.log

    def log_until_three(self: Any, values: Any, step: int | None = None, **_: object) -> None:
        if step == 3:
            raise OSError("No space left on device")
        real(self, values, step)

    monkeypatch.setattr(tracking.CsvTracker, "log", log_until_three)
    with TrainingLog("csv", tmp_path) as log:
        assert learn(causal, None, log).record["chosen_epoch"] is not None
    assert caplog.text.count("a log is not written further, since its tracker failed: No space left") == 1


class FakeWandB(ModuleType):
    """As much of wandb as accelerate and a log use; runs are kept on a server."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.runs: dict[str, Any] = {}
        self.config = SimpleNamespace(update=lambda values, **_: self.settings.update(values))
        self.settings: dict[str, Any] = {}
        self.asked: list[dict[str, Any]] = []

    def init(self, **named: Any) -> Any:
        self.asked.append(named)
        kept = self.runs.setdefault(named["id"], [])

        def log(values: dict[str, float], step: int) -> None:
            assert step >= max((at for at, _ in kept), default=0), "wandb takes no step that has passed"
            kept.append((step, values))

        step = max((at for at, _ in kept), default=-1) + 1
        return SimpleNamespace(step=step, log=log, finish=lambda: None)


def test_wandb_gets_settings_and_a_resumed_run_goes_on_in_the_same_one(
    causal: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    folder = tmp_path / "capitals" / "log"
    with TrainingLog("wandb", folder, settings={"lr": 0.01}) as log, pytest.raises(Interrupted):
        learn(causal, tmp_path / "run", log, should_stop=after(4))
    assert wandb.settings == {"lr": 0.01}
    with TrainingLog("wandb", folder) as log:
        learn(causal, tmp_path / "run", log, resume=True)
    (steps,) = ([at for at, _ in kept] for kept in wandb.runs.values())
    assert steps == STEPS
    assert {one["name"] for one in wandb.asked} == {"capitals"}
    assert {one["project"] for one in wandb.asked} == {"ptuning"}
    with TrainingLog("wandb", folder) as log:
        learn(causal, None, log)
    assert len(wandb.runs) == 2


class FakeMLflow(ModuleType):
    """As much of MLflow as accelerate and a log use."""

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.__spec__ = importlib.machinery.ModuleSpec("mlflow", None)
        self.runs: dict[str, list[tuple[str, int, float]]] = {}
        self.active = ""
        self.params: dict[str, Any] = {}
        self.utils = SimpleNamespace(
            validation=SimpleNamespace(MAX_PARAM_VAL_LENGTH=500, MAX_PARAMS_TAGS_PER_BATCH=100)
        )

    def search_experiments(self, **_: Any) -> list[Any]:
        return []

    def create_experiment(self, **_: Any) -> str:
        return "0"

    def start_run(self, *, run_id: str | None, **_: Any) -> Any:
        self.active = run_id or f"run-{len(self.runs)}"
        self.runs.setdefault(self.active, [])
        return SimpleNamespace(info=SimpleNamespace(run_id=self.active))

    def end_run(self) -> None:
        self.active = ""

    def log_params(self, values: dict[str, Any]) -> None:
        self.params.update(values)

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        self.runs[self.active] += [(name, step, value) for name, value in values.items()]

    def MlflowClient(self) -> Any:  # noqa: N802 - MLflow's name
        def history(run: str, name: str) -> list[Any]:
            return [SimpleNamespace(step=step) for known, step, _ in self.runs[run] if known == name]

        return SimpleNamespace(get_metric_history=history)


def test_mlflow_gets_settings_and_a_resumed_run_no_step_twice(
    causal: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = FakeMLflow()
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    folder = tmp_path / "capitals" / "log"
    with TrainingLog("mlflow", folder, settings={"lr": 0.01}) as log:
        with pytest.raises(Interrupted):
            learn(causal, tmp_path / "run", log, should_stop=after(4))
        log(numbers_at(5, epoch=2))  # a process that was killed behind its last checkpoint
    with TrainingLog("mlflow", folder) as log:
        learn(causal, tmp_path / "run", log, resume=True)
    assert mlflow.params == {"lr": 0.01}
    (kept,) = mlflow.runs.values()
    assert [step for name, step, _ in kept if name == "loss"] == [1, 2, 3, 4, 5, 6]
    assert [step for name, step, _ in kept if name == "dev_loss"] == [0, 3, 6]
