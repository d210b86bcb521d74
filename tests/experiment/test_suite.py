"""Cells: each written when done, finished ones skipped, broken ones made again, and the same after a kill."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from ptuning.backbone.backbone import Backbone
from ptuning.config import TrainConfig
from ptuning.data.questions import as_questions
from ptuning.errors import ConfigError, FileError, TrainingError
from ptuning.experiment.cells import CellJob, mean_seconds
from ptuning.experiment.compare import compare
from ptuning.experiment.plan import Plan, Watch
from ptuning.experiment.suite import Suite
from ptuning.method.base import Setup, Solution, Task
from ptuning.method.registry import METHODS
from ptuning.names import CHECKPOINT_FILE
from ptuning.progress import Interrupted, Progress
from ptuning.prompt.prompt import Prompt
from ptuning.records import Record, Records
from ptuning.report.results_file import Cell, Results
from ptuning.template.language import Template
from ptuning.training import step, trainer
from ptuning.training.checkpoint import write_checkpoint
from ptuning.training.run import train_together
from tests.conftest import WARM
from tests.processes import forked

MANUAL = "The capital of [X] is [Y] ."
NAMES = ("Nairobi", "yes", "no", "good")
FACTS: list[Record] = [{"x": f"city {index}", "y": NAMES[index % 4]} for index in range(24)]
TRAIN, DEV, TEST = FACTS[:12], FACTS[12:17], FACTS[17:]
METHODS_RUN = ("majority", "manual", "in-context", "p-tuning")
FAST = TrainConfig(epochs=2, batch_size=4, lr=0.01, patience=9)


def run(backbone: Backbone, out: Path, **options: Any) -> Results:
    """Compare with fast settings."""
    options = {"dev": DEV, "test": TEST, "methods": METHODS_RUN, "config": FAST, "template": WARM, **options}
    return compare(options.pop("data", TRAIN), manual=MANUAL, backbone=backbone, out=out, **options)


def timeless(value: Any) -> Any:
    """Take out what depends on the clock, or on the command that was given."""
    if isinstance(value, dict):
        return {key: timeless(one) for key, one in value.items() if "second" not in key and key != "command"}
    return [timeless(one) for one in value] if isinstance(value, list) else value


def results_of(out: Path) -> Any:
    return timeless(json.loads((out / "results.json").read_text(encoding="utf-8")))


@pytest.fixture
def own_method() -> Iterator[Callable[..., None]]:
    """Register methods for one test."""
    before = set(METHODS)

    def add(name: str, fit: Callable[..., Solution], **options: Any) -> None:
        METHODS.register(name, describe="of a test", **options)(fit)

    yield add
    for name in set(METHODS) - before:
        del METHODS[name]


def test_what_a_comparison_leaves(causal: Backbone, tmp_path: Path) -> None:
    found = run(causal, tmp_path / "out", seeds=2)
    saved = results_of(tmp_path / "out")
    assert saved == timeless(json.loads(json.dumps(found.to_json())))
    assert saved["suite"] == "compare"
    # The manual prompt and the majority draw nothing: one seed is all there is to them.
    assert [(cell["method"], cell["seed"]) for cell in saved["cells"]] == [
        ("majority", 0), ("manual", 0), ("in-context", 0), ("p-tuning", 0), ("in-context", 1), ("p-tuning", 1),
    ]  # fmt: skip
    for cell in saved["cells"]:
        folder = tmp_path / "out" / cell["run"]
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
        assert cell["status"] == "done"
        assert cell["n"] == record["n"] == len(rows) == len(TEST)
        assert [row["record"] for row in rows] == TEST
        assert cell["scores"]["exact_match"] == sum(row["hit"] for row in rows) / len(rows)
        assert record["scores"]["p_at_1"]["value"] == cell["scores"]["p_at_1"]
    task = saved["tasks"]["task"]["p-tuning"]["p_at_1"]
    assert (task["n"], task["seeds"]) == (len(TEST), 2)
    assert task["std"] is not None
    assert saved["tasks"]["task"]["manual"]["p_at_1"]["std"] is None
    assert (tmp_path / "out" / "cells/task/p-tuning/seed-1/try-1/prompt/prompt.safetensors").is_file()
    assert (tmp_path / "out" / "report.html").is_file()


def test_a_second_start_skips_what_is_finished_and_redoes_what_is_broken(causal: Backbone, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(causal, out)
    before = results_of(out)
    (out / "cells/task/manual/seed-0/run.json").write_text('{"cut off')
    record = out / "cells/task/majority/seed-0/run.json"
    record.write_text(json.dumps({**json.loads(record.read_text(encoding="utf-8")), "seconds": "many"}))
    kept = (out / "cells/task/in-context/seed-0/predictions.jsonl").read_text(encoding="utf-8").splitlines()
    (out / "cells/task/in-context/seed-0/predictions.jsonl").write_text("\n".join(kept[:-1]) + "\n", encoding="utf-8")
    seen: dict[str, bool] = {}
    run(causal, out, watch=Watch(on_cell=lambda result, *_: seen.update({result.cell.method: result.was_there})))
    assert seen == {"majority": False, "manual": False, "in-context": False, "p-tuning": True}
    assert results_of(out) == before


def test_further_methods_and_seeds_join_what_is_there(causal: Backbone, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(causal, out, methods=["manual"])
    seen: dict[Cell, bool] = {}
    watch = Watch(on_cell=lambda result, *_: seen.update({result.cell: result.was_there}))
    run(causal, out, methods=["manual", "p-tuning"], seeds=2, watch=watch)
    assert [(cell.method, cell.seed, there) for cell, there in seen.items()] == [
        ("manual", 0, True), ("p-tuning", 0, False), ("p-tuning", 1, False),
    ]  # fmt: skip


def test_a_setting_is_varied_as_further_methods(causal: Backbone, tmp_path: Path) -> None:
    """Each value is a method of its own, with the same result as a comparison with that value; the others stay."""
    options: dict[str, Any] = {"methods": ["manual", "p-tuning"], "seeds": 2}
    base = run(causal, tmp_path / "out", **options)
    found = run(causal, tmp_path / "out", **options, vary={"encoder": ["lstm", "none"], "lr": [0.1]})
    assert list(found.tasks["task"]) == ["manual", "p-tuning", "p-tuning encoder=none", "p-tuning lr=0.1"]
    assert found.tasks["task"]["p-tuning"] == base.tasks["task"]["p-tuning"]
    assert found.methods["p-tuning encoder=none"].describe.endswith("; encoder=none")
    assert list(found.differences)[:3] == [
        "p-tuning - manual", "p-tuning - p-tuning encoder=none", "p-tuning - p-tuning lr=0.1",
    ]  # fmt: skip
    assert found.settings["vary"] == {"encoder": ["lstm", "none"], "lr": [0.1]}
    alone = run(causal, tmp_path / "alone", **options, config=FAST.adapted(encoder="none"))
    assert found.tasks["task"]["p-tuning encoder=none"] == alone.tasks["task"]["p-tuning"]
    cell = json.loads((tmp_path / "out/cells/task/p-tuning lr=0.1/seed-0/run.json").read_text(encoding="utf-8"))
    assert (cell["settings"]["lr"], cell["identity"]["lr"]) == (0.1, 0.1)


def test_each_method_is_varied_by_what_it_depends_on(causal: Backbone) -> None:
    """A cell that another one equals would only take time."""
    names = "in-context,prompt-tuning,p-tuning-v2,hybrid,p-tuning,fine-tuning"
    plan = Plan.of(
        "compare", backbone=causal, out="x", methods=names, vary={"deep_start": ["random"], "encoder": ["mlp"]}
    )
    assert [name for name in plan.method_names if " " in name] == [
        "p-tuning deep_start=random",
        "p-tuning encoder=mlp",
        "p-tuning-v2 deep_start=random",
        "hybrid deep_start=random",
        "hybrid encoder=mlp",
    ]


@pytest.mark.parametrize(
    ("vary", "says"),
    [
        ({"encoder": ["gru"]}, "setting 'encoder' is 'gru'.*lstm.*mlp.*none"),
        ({"encodr": ["mlp"]}, r"unknown setting 'encodr'\. Did you mean 'encoder'\?"),
        ({"seed": [1]}, "the setting 'seed' is not varied: --seeds N repeats"),
        ({"lora_rank": [2]}, "'lora_rank' has no effect on the methods manual, p-tuning"),
        ({"lr": []}, "no value is given to vary 'lr' by"),
    ],
)
def test_what_cannot_be_varied(causal: Backbone, tmp_path: Path, vary: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        run(causal, tmp_path / "out", methods=["manual", "p-tuning"], vary=vary)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"config": TrainConfig(epochs=3, batch_size=4, lr=0.01, patience=9)}, "epochs was 2 and is 3"),
        ({"test": TEST[:-1]}, "test data (sha256) was"),
        ({"template": "[P*2] [X] [P:is] [Y]"}, "template was"),
        ({"tries": 2}, "tries was 1 and is 2"),
    ],
)
def test_results_of_other_settings_are_not_mixed(
    causal: Backbone, tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    out = tmp_path / "out"
    run(causal, out, methods=["p-tuning"])
    before = results_of(out)
    with pytest.raises(FileError, match="made with other settings") as raised:
        run(causal, out, methods=["p-tuning"], **change)
    assert says in str(raised.value)
    assert "--overwrite" in str(raised.value)
    assert results_of(out) == before
    run(causal, out, methods=["p-tuning"], overwrite=True, **change)
    assert results_of(out) != before


def test_settings_of_training_do_not_matter_to_what_is_not_trained(causal: Backbone, tmp_path: Path) -> None:
    run(causal, tmp_path, methods=["manual"])
    there: list[bool] = []
    watch = Watch(on_cell=lambda result, *_: there.append(result.was_there))
    run(causal, tmp_path, methods=["manual"], config=TrainConfig(epochs=1), watch=watch)
    assert there == [True]


def test_a_folder_of_something_else_is_left_alone(causal: Backbone, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileError, match=r"holds files, but no results of a comparison; choose another folder"):
        run(causal, tmp_path, methods=["manual"], overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_progress_says_how_long_the_other_cells_will_take(
    causal: Backbone, tmp_path: Path, own_method: Callable[..., None]
) -> None:
    """By the mean of the finished cells of their method. A failed cell tells nothing of the next one."""

    def fails(*_: object) -> Solution:
        raise RuntimeError("no room")

    own_method("answers", lambda *_: Solution.of_ranking(lambda _: ["x"]), seeded=True)
    own_method("fails", fails, seeded=True)
    told: list[Progress] = []
    run(causal, tmp_path / "out", methods=["answers", "fails"], seeds=2, watch=Watch(report=told.append))
    found = [(one.done, one.untimed) for one in told if one.stage == "suite"]
    assert list(dict.fromkeys(found)) == [(0, 4), (1, 2), (2, 1), (3, 1), (4, 0)]
    assert {one.seconds_left is None for one in told if one.stage == "suite"} == {False}
    times = {Cell("a", "m", 0): 2.0, Cell("b", "m", 0): 4.0, Cell("a", "n", 0): 9.0}
    assert mean_seconds(times) == {"m": 3.0, "n": 9.0}


def test_a_failing_cell_does_not_stop_the_others(
    causal: Backbone, tmp_path: Path, own_method: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    def fit(*_: object) -> Solution:
        raise ZeroDivisionError("one by none")

    own_method("broken", fit)
    found = run(causal, tmp_path, methods=["broken", "manual"])
    assert {result.method: result.status for result in found.cells} == {"broken": "failed", "manual": "done"}
    assert [result.error for result in found.failed] == ["one by none"]
    assert list(found.tasks["task"]) == ["manual"]
    assert "task broken seed 0 failed: one by none" in caplog.text
    saved = next(cell for cell in results_of(tmp_path)["cells"] if cell["method"] == "broken")
    assert (saved["status"], saved["error"], saved["n"]) == ("failed", "one by none", 0)
    METHODS.pop("broken")
    own_method("broken", lambda *_: Solution.of_ranking(lambda _: ["yes"]))
    assert run(causal, tmp_path, methods=["broken", "manual"]).failed == []


def test_a_method_of_ones_own_takes_a_few_lines(
    causal: Backbone, tmp_path: Path, own_method: Callable[..., None]
) -> None:
    own_method("always-yes", lambda *_: Solution.of_ranking(lambda _: ["yes", "no"]))
    found = run(causal, tmp_path, methods=["always-yes"])
    scores = found.tasks["task"]["always-yes"]
    assert scores["p_at_1"].value == sum(row["y"] == "yes" for row in TEST) / len(TEST)
    assert scores["mrr"].value == pytest.approx(
        sum({"yes": 1.0, "no": 0.5}.get(row["y"], 0.0) for row in TEST) / len(TEST)
    )


def test_a_trained_method_of_ones_own_is_in_tables_and_limits_of_the_report(
    causal: Backbone, tmp_path: Path, own_method: Callable[..., None]
) -> None:
    """What the report needs to know about a method is in ``results.json``; no list elsewhere can forget it."""
    own_method(
        "prefix", lambda *_: Solution.of_ranking(lambda _: ["yes", "no"]), trained=True, seeded=True, learns_slots=True
    )
    found = run(causal, tmp_path, methods=["manual", "prefix"], seeds=2)
    assert "prefix - manual" in found.differences
    page = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "There is no control with random weights for prefix:" in page
    assert "A written or a learned prompt is missing" not in page
    found = run(causal, tmp_path, methods=["manual", "prefix", "prefix@random-weights"], seeds=2)
    assert list(found.tasks["task"]) == ["manual", "prefix", "prefix@random-weights"]
    assert "There is no control" not in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_no_method_sees_the_test_part(causal: Backbone, tmp_path: Path, own_method: Callable[..., None]) -> None:
    """The task that a method fits on holds nothing of it but the set of possible answers."""
    seen: list[object] = []

    def fit(task: object, _: object) -> Solution:
        seen.append(task)
        return Solution.of_ranking(lambda _: ["yes"])

    own_method("curious", fit)
    run(causal, tmp_path, methods=["curious"])
    assert all(row["x"] not in repr(seen) for row in TEST)
    assert all(row["x"] in repr(seen) for row in TRAIN + DEV)


@pytest.mark.parametrize("methods", [("p-tuning", "in-context"), ("manual+fine-tuning",)])
def test_permuting_the_test_labels_changes_nothing_that_is_learned_or_chosen(
    causal: Backbone, tmp_path: Path, methods: tuple[str, ...]
) -> None:
    """Done when of the comparison: nothing about the test part chooses anything."""
    labels = [row["y"] for row in TEST]
    permuted = [{**row, "y": label} for row, label in zip(TEST, labels[1:] + labels[:1], strict=True)]
    for name, test in (("as-is", TEST), ("permuted", permuted)):
        run(causal, tmp_path / name, test=test, methods=methods, tries=2)
    for method in methods:
        cells = [tmp_path / name / f"cells/task/{method}/seed-0" for name in ("as-is", "permuted")]
        one, other = (timeless(json.loads((cell / "run.json").read_text(encoding="utf-8"))) for cell in cells)
        assert one["tried"] == other["tried"]
        assert one["chosen"] == other["chosen"]
        assert one["prompt"] == other["prompt"]
        predictions = [(cell / "predictions.jsonl").read_text(encoding="utf-8").splitlines() for cell in cells]
        said = [[json.loads(line)["prediction"] for line in lines] for lines in predictions]
        assert said[0] == said[1]
        assert one["data"]["test"]["sha256"] != other["data"]["test"]["sha256"]
        if method == "p-tuning":
            vectors = [(cell / "try-1/prompt/prompt.safetensors").read_bytes() for cell in cells]
            assert vectors[0] == vectors[1]


def test_it_stops_when_asked_and_goes_on(causal: Backbone, tmp_path: Path) -> None:
    asked = iter([False] * 5 + [True] * 99)
    with pytest.raises(Interrupted):
        run(causal, tmp_path / "cut", watch=Watch(should_stop=lambda: next(asked)))
    waiting = [cell["status"] for cell in results_of(tmp_path / "cut")["cells"]]
    assert waiting == ["done", "done", "done", "waiting"]
    run(causal, tmp_path / "cut")
    run(causal, tmp_path / "whole")
    assert results_of(tmp_path / "cut") == results_of(tmp_path / "whole")


PROGRAM = """
import json, pathlib, sys
from ptuning import TrainConfig, compare, load_backbone
train, dev, test = json.loads(pathlib.Path(sys.argv[2]).read_text())
compare(train, dev=dev, test=test, manual=sys.argv[4], template=sys.argv[5], out=sys.argv[3],
        backbone=load_backbone(sys.argv[1], dtype="float32", device="cpu"), methods=sys.argv[6].split(","),
        tries=int(sys.argv[7]),
        config=TrainConfig(epochs=3, batch_size=2, lr=0.01, patience=9, checkpoint_seconds=0.0))
"""


def has_checkpoint(out: Path) -> bool:
    """Whether a training is under way somewhere in a folder."""
    return any(CHECKPOINT_FILE in files for _, _, files in os.walk(out))


@pytest.mark.parametrize(("method", "tries"), [("p-tuning", 3), ("fine-tuning", 1)])
def test_killed_in_the_middle_of_a_cell_it_ends_as_if_it_had_not_been(
    model_folder: Callable[[str], Path], tmp_path: Path, method: str, tries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Done when: ``kill -9`` in a cell, started again, the same ``results.json``; also where prompts train at once."""
    (tmp_path / "data.json").write_text(json.dumps([TRAIN, DEV, TEST]))
    model = str(model_folder("llama"))

    def arguments(out: str) -> list[str]:
        folder = str(tmp_path / out)
        return ["-c", model, str(tmp_path / "data.json"), folder, MANUAL, WARM, f"manual,{method}", str(tries)]

    folder = tmp_path / f"cut/cells/task/{method}/seed-0"
    with forked(PROGRAM, *arguments("cut")[1:], folder=tmp_path / "said") as process:
        process.wait_until(lambda: has_checkpoint(tmp_path / "cut"))
        process.kill()
    assert not (folder / "run.json").exists()
    for out in ("cut", "whole"):
        monkeypatch.setattr(sys, "argv", arguments(out))
        exec(PROGRAM, {})
    assert results_of(tmp_path / "cut") == results_of(tmp_path / "whole")
    cells = [tmp_path / out / f"cells/task/{method}/seed-0" for out in ("cut", "whole")]
    said = [(cell / "predictions.jsonl").read_bytes() for cell in cells]
    records = [timeless(json.loads((cell / "run.json").read_text(encoding="utf-8"))) for cell in cells]
    assert (said[0], records[0]) == (said[1], records[1])


def suite(
    backbone: Backbone, out: Path, *, counts: Sequence[int], template: str = WARM, config: TrainConfig = FAST
) -> Suite:
    """A suite of p-tuning on tasks with so many facts to learn from each."""
    jobs = [
        CellJob(
            Task(
                f"task-{count}",
                as_questions(TRAIN[:count]),
                as_questions(DEV),
                Template.parse(MANUAL),
                Template.parse(template),
                tuple(sorted(NAMES)),
            ),
            as_questions(TEST),
            {},
        )
        for count in counts
    ]
    return Suite(out, jobs=jobs, methods=["p-tuning"], seeds=1, backbone=backbone, config=config, tries=1)


def learned(out: Path) -> dict[str, torch.Tensor]:
    found = {str(path.relative_to(out)): Prompt.load(path.parent) for path in sorted(out.rglob("prompt/prompt.json"))}
    return {name: prompt.slot_vectors for name, prompt in found.items() if prompt.slot_vectors is not None}


def test_prompts_of_several_tasks_are_trained_at_once(
    causal: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one pass, and each as if it were alone, but for rounding."""
    sizes: list[int] = []
    real = step._run

    def spy(chunks: Sequence[step.Chunk]) -> dict[step.Chunk, torch.Tensor]:
        sizes.append(len(chunks))
        return real(chunks)

    monkeypatch.setattr(step, "_run", spy)
    together = list(suite(causal, tmp_path / "together", counts=(5, 12, 8)).run())
    assert max(sizes) == 3
    monkeypatch.setattr(Suite, "_trains_together", lambda *_: False)
    in_turn = list(suite(causal, tmp_path / "turn", counts=(5, 12, 8)).run())
    assert [one.cell.task for one in together] == ["task-5", "task-8", "task-12"], "each when it has ended"
    assert {one.cell: one.values for one in together} == {one.cell: one.values for one in in_turn}
    one, other = learned(tmp_path / "together"), learned(tmp_path / "turn")
    assert list(one) == list(other)
    assert len(one) == 3
    for name, vectors in one.items():
        torch.testing.assert_close(vectors, other[name], rtol=0, atol=1e-4)
    assert not (tmp_path / "together" / "fleets").exists()
    assert all(result.seconds > 0 for result in together)


@pytest.mark.parametrize("steps_taken", [1, 4, 6])
def test_stopped_while_several_tasks_train_it_goes_on_exactly(
    causal: Backbone, tmp_path: Path, steps_taken: int
) -> None:
    """Also where one task was done already when it was stopped."""
    asked = iter([False] * (steps_taken - 1) + [True] * 99)
    whole = {one.cell: one.values for one in suite(causal, tmp_path / "whole", counts=(5, 12, 8)).run()}
    with pytest.raises(Interrupted):
        list(suite(causal, tmp_path / "cut", counts=(5, 12, 8)).run(should_stop=lambda: next(asked)))
    again = list(suite(causal, tmp_path / "cut", counts=(5, 12, 8)).run())
    assert {one.cell: one.values for one in again} == whole
    one, other = learned(tmp_path / "cut"), learned(tmp_path / "whole")
    assert list(one) == list(other)
    for name, vectors in one.items():
        assert torch.equal(vectors, other[name]), name


def test_one_tasks_bad_loss_fails_its_cell_alone(
    causal: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = step.Learner.finish

    def finish(self: step.Learner, taken: step.Step, losses: Sequence[torch.Tensor]) -> float:
        if taken.number == 3:  # which the first task never takes
            raise TrainingError("the loss became nan")
        return real(self, taken, losses)

    monkeypatch.setattr(step.Learner, "finish", finish)
    found = {one.cell.task: one for one in suite(causal, tmp_path, counts=(4, 12)).run()}
    assert {name: one.status for name, one in found.items()} == {"task-4": "done", "task-12": "failed"}
    assert "became nan" in str(found["task-12"].error)


def test_what_cannot_be_trained_at_once_is_trained_one_after_another(
    causal: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As where so many encoders do not fit into the memory."""

    def full(steps: Sequence[Any]) -> list[Any]:
        if len(steps) > 1:
            raise RuntimeError("out of memory")
        return step.take_steps(steps)

    monkeypatch.setattr(trainer, "take_steps", full)
    found = list(suite(causal, tmp_path, counts=(5, 12)).run())
    assert [one.status for one in found] == ["done", "done"]
    assert "at once failed: out of memory" in caplog.text
    assert not (tmp_path / "fleets").exists()


@pytest.mark.parametrize("failing", [0, 1, 2, 5])
def test_a_checkpoint_that_cannot_be_written_changes_no_result(
    failing: int, causal: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on a disk that is full for a moment: prompts go on training together, to the same bytes."""
    often = FAST.adapted(checkpoint_seconds=0.0)
    list(suite(causal, tmp_path / "whole", counts=(5, 12), config=often).run())
    written = itertools.count()

    def full_once(real: Callable[..., None]) -> Callable[..., None]:
        def write(path: Path, *rest: Any, **named: Any) -> None:
            if next(written) == failing:
                raise FileError(f"{path}: No space left on device")
            real(path, *rest, **named)

        return write

    monkeypatch.setattr(trainer, "SAVING_PAUSE", 0.0)
    monkeypatch.setattr(trainer, "write_checkpoint", full_once(write_checkpoint))
    found = list(suite(causal, tmp_path / "full", counts=(5, 12), config=often).run())
    assert [one.status for one in found] == ["done", "done"]
    assert caplog.text.count("no checkpoint was written, and training goes on") == 1
    assert "at once failed" not in caplog.text
    whole, full = (
        {path.relative_to(out): path.read_bytes() for path in out.rglob("*.safetensors")}
        for out in (tmp_path / "whole", tmp_path / "full")
    )
    assert full == whole != {}
    assert not (tmp_path / "full" / "fleets").exists()


def test_a_finished_task_is_not_trained_again_beside_new_ones(
    causal: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever has become of the files of its training."""
    before = list(suite(causal, tmp_path, counts=(5, 12)).run())
    shutil.rmtree(tmp_path / before[0].cell.folder / "try-1")
    names: list[str] = []
    real = train_together

    def spy(runs: Any, **options: Any) -> Any:
        names.extend(runs)
        return real(runs, **options)

    monkeypatch.setattr("ptuning.experiment.suite.train_together", spy)
    assert len(list(suite(causal, tmp_path, counts=(5, 12, 8)).run())) == 3
    assert names == ["task-8/try-1"]


def test_a_task_that_cannot_be_trained_fails_alone(causal: Backbone, tmp_path: Path) -> None:
    found = {one.cell.task: one for one in suite(causal, tmp_path, counts=(0, 12)).run()}
    assert {name: one.status for name, one in found.items()} == {"task-0": "failed", "task-12": "done"}
    assert "no records" in str(found["task-0"].error)


def test_other_settings_forget_what_was_in_training_at_once(causal: Backbone, tmp_path: Path) -> None:
    asked = iter([False] * 3 + [True] * 99)
    one = suite(causal, tmp_path, counts=(5, 12))
    with pytest.raises(Interrupted):
        list(one.run(should_stop=lambda: next(asked)))
    other = suite(causal, tmp_path, counts=(5, 12), template="[P*2] [X] [P] [Y]")
    with pytest.raises(FileError, match="other settings"):
        other.check(overwrite=False)
    other.check(overwrite=True)
    assert [result.status for result in other.run()] == ["done", "done"]


def test_a_dry_run_leaves_nothing_and_knows_what_is_finished(causal: Backbone, tmp_path: Path) -> None:
    estimates: list[Any] = []
    watch = Watch(on_estimate=estimates.extend)
    run(causal, tmp_path / "out", dry_run=True, watch=watch)
    assert not (tmp_path / "out").exists()
    assert [one.cell.method for one in estimates] == list(METHODS_RUN)
    assert not any(one.is_finished for one in estimates)
    run(causal, tmp_path / "out", methods=["manual"])
    estimates.clear()
    run(causal, tmp_path / "out", dry_run=True, watch=watch)
    assert [one.is_finished for one in estimates] == [False, True, False, False]


@pytest.mark.parametrize(
    ("methods", "says"),
    [
        ("p-tunning", r"unknown method 'p-tunning'\. Did you mean 'p-tuning'\?"),
        ("manual@random-weights", "only a trained one"),
        ("p-tuning@shuffled", "only @random-weights may follow"),
        ((), "no methods to compare"),
    ],
)
def test_methods_that_are_none(causal: Backbone, tmp_path: Path, methods: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        run(causal, tmp_path / "out", methods=methods)
    assert not (tmp_path / "out").exists()


def test_names_of_methods() -> None:
    with pytest.raises(ConfigError, match="already"):
        METHODS.register("manual", describe="again")
    for name in ("", "a/b", "..", "a b", "a@b", "a,b"):
        with pytest.raises(ConfigError, match="not a valid name for a method"):
            METHODS.register(name, describe="")
    assert "majority" in METHODS
    assert METHODS.get("nobody") is None


def test_the_random_weights_control_differs_and_leaves_the_backbone_alone(causal: Backbone, tmp_path: Path) -> None:
    before = causal.fingerprint
    found = run(
        causal, tmp_path, methods=["p-tuning", "fine-tuning", "p-tuning@random-weights", "fine-tuning@random-weights"]
    )
    assert list(found.tasks["task"]) == [
        "p-tuning", "fine-tuning", "p-tuning@random-weights", "fine-tuning@random-weights",
    ]  # fmt: skip
    assert not found.failed
    causal.__dict__.pop("fingerprint", None)
    assert causal.fingerprint == before
    other = causal.with_random_weights(seed=0)
    assert other.fingerprint != before
    assert other.fingerprint == causal.with_random_weights(seed=0).fingerprint
    assert other.fingerprint != causal.with_random_weights(seed=1).fingerprint


def test_records_hash_alike_wherever_they_come_from(causal: Backbone, tmp_path: Path) -> None:
    run(causal, tmp_path, methods=["manual"])
    there: list[bool] = []
    watch = Watch(on_cell=lambda result, *_: there.append(result.was_there))
    named = {"dev": Records(DEV, name="dev.csv", digest="0" * 64), "test": Records(TEST, name="other")}
    run(
        causal,
        tmp_path,
        methods=["manual"],
        data=Records(TRAIN, name="train.csv", digest="1" * 64),
        watch=watch,
        **named,
    )
    assert there == [True]
    shutil.rmtree(tmp_path)


def test_a_line_separator_in_a_record_does_not_make_its_cell_run_again(causal: Backbone, tmp_path: Path) -> None:
    """``str.splitlines`` cuts at it, and the cell passed for a broken one at every start."""
    test = [{"x": "city\u2028of\x85light", "y": "yes"}, *TEST]
    run(causal, tmp_path, methods=["manual"], test=test)
    there: list[bool] = []
    run(
        causal,
        tmp_path,
        methods=["manual"],
        test=test,
        watch=Watch(on_cell=lambda one, *_: there.append(one.was_there)),
    )
    assert there == [True]


def test_results_of_another_type_of_numbers_are_not_mixed(causal: Backbone, tmp_path: Path) -> None:
    """The fingerprint is the same in every type, and answers are not."""
    run(causal, tmp_path, methods=["manual"])
    before = causal.fingerprint
    causal.model.to(torch.bfloat16)  # type: ignore[arg-type]
    assert causal.fingerprint == before
    with pytest.raises(FileError, match="dtype was None and is bfloat16"):
        run(causal, tmp_path, methods=["manual"])


def test_each_seed_of_the_control_has_random_weights_of_its_own(
    causal: Backbone, tmp_path: Path, own_method: Callable[..., None]
) -> None:
    """A cell depends on its own seed alone, not on which one the suite began with."""
    seen: dict[int, str] = {}

    def fit(_: object, setup: Setup) -> Solution:
        seen[setup.seed] = setup.backbone.fingerprint
        return Solution.of_ranking(lambda _: ["yes"])

    own_method("looks", fit, trained=True)
    run(causal, tmp_path / "both", methods=["looks@random-weights"], seeds=2)
    assert seen == {seed: causal.with_random_weights(seed=seed).fingerprint for seed in (0, 1)}
    both = dict(seen)
    run(causal, tmp_path / "one", methods=["looks@random-weights"], config=FAST.adapted(seed=1))
    assert seen == both


def test_what_a_cell_was_started_with_is_known_until_it_is_done(
    causal: Backbone, tmp_path: Path, own_method: Callable[..., None]
) -> None:
    folder = tmp_path / "out/cells/task/slow/seed-0"

    def fit(*_: object) -> Solution:
        assert [path.name for path in folder.iterdir()] == ["started.json"]
        raise Interrupted("stopped")

    own_method("slow", fit, trained=True)
    with pytest.raises(Interrupted):
        run(causal, tmp_path / "out", methods=["slow"])
    METHODS.pop("slow")
    own_method("slow", lambda *_: Solution.of_ranking(lambda _: ["yes"]), trained=True)
    with pytest.raises(FileError, match="epochs was 2 and is 3"):
        run(causal, tmp_path / "out", methods=["slow"], config=FAST.adapted(epochs=3))
    run(causal, tmp_path / "out", methods=["slow"])
    assert sorted(path.name for path in folder.iterdir()) == ["predictions.jsonl", "run.json"]
