"""Cells: each written when done, finished ones skipped, broken ones made again, and the same after a stop or a kill."""

import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ptuning.backbone.backbone import Backbone
from ptuning.config import TrainConfig
from ptuning.data.questions import as_questions
from ptuning.data.task_files import TaskFile
from ptuning.errors import ConfigError, FileError, LabelWordError, RecordError, TrainingError
from ptuning.experiment import comparison as comparisons
from ptuning.experiment.cells import CellJob, CellResult, mean_seconds
from ptuning.experiment.compare import compare
from ptuning.experiment.comparison import Comparison, Watch
from ptuning.files import write_json
from ptuning.method.base import Setup, Solution, Task
from ptuning.method.registry import METHODS
from ptuning.names import CHECKPOINT_FILE
from ptuning.progress import Interrupted, Progress
from ptuning.prompt.prompt import Prompt
from ptuning.records import Record, Records
from ptuning.report.results_file import Cell, Results, TrainingWarning
from ptuning.template.language import Template
from ptuning.training import step, trainer
from ptuning.training.checkpoint import write_checkpoint
from ptuning.training.run import train_together
from ptuning.workers.pool import WorkerConfig
from tests.conftest import WARM
from tests.families import without_words
from tests.processes import forked
from tests.workers.fake_ray import use_fake_ray

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


def there(backbone: Backbone, out: Path, **options: Any) -> dict[tuple[str, int], bool]:
    """Compare, and return method and seed -> whether the cell was finished before."""
    seen: dict[tuple[str, int], bool] = {}

    def on_cell(result: CellResult, *_: int) -> None:
        seen[result.cell.method, result.cell.seed] = result.was_there

    run(backbone, out, **options, watch=Watch(on_cell=on_cell))
    return seen


def timeless(value: Any) -> Any:
    """Take out what depends on the clock, or on the command that was given."""
    if isinstance(value, dict):
        return {key: timeless(inner) for key, inner in value.items() if "second" not in key and key != "command"}
    return [timeless(inner) for inner in value] if isinstance(value, list) else value


def load(path: Path) -> Any:
    return timeless(json.loads(path.read_text(encoding="utf-8")))


def results_of(out: Path) -> Any:
    return load(out / "results.json")


def files_of(out: Path) -> dict[str, Any]:
    """Return path -> content of every file that is kept, without what depends on the clock."""
    files: dict[str, Any] = {}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if path.suffix == ".json":
            files[name] = load(path)
        elif path.is_file() and not name.startswith(("report", "pictures")):  # made of results.json, with times
            files[name] = path.read_bytes()
    return files


def statuses(out: Path) -> list[str]:
    return [cell["status"] for cell in results_of(out)["cells"]]


@pytest.fixture
def own_method() -> Iterator[Callable[..., None]]:
    """Register methods for one test."""
    before = set(METHODS)

    def add(name: str, fit: Callable[..., Solution], **options: Any) -> None:
        METHODS.pop(name, None)
        METHODS.register(name, describe="of a test", **options)(fit)

    yield add
    for name in set(METHODS) - before:
        del METHODS[name]


def answers(*texts: str) -> Callable[..., Solution]:
    return lambda *_: Solution.of_ranking(lambda _: texts)


def test_the_files_of_a_comparison(causal: Backbone, tmp_path: Path) -> None:
    results = run(causal, tmp_path / "out", seeds=2)
    saved = results_of(tmp_path / "out")
    assert saved == timeless(json.loads(json.dumps(results.to_json())))
    assert saved["suite"] == "compare"
    # The manual prompt and the majority draw nothing: they run with one seed.
    assert [(cell["method"], cell["seed"]) for cell in saved["cells"]] == [
        ("majority", 0), ("manual", 0), ("in-context", 0), ("p-tuning", 0), ("in-context", 1), ("p-tuning", 1),
    ]  # fmt: skip
    for cell in saved["cells"]:
        folder = tmp_path / "out" / cell["run"]
        record = load(folder / "run.json")
        rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
        assert cell["status"] == "done"
        assert cell["n"] == record["n"] == len(rows) == len(TEST)
        assert [row["record"] for row in rows] == TEST
        assert cell["scores"]["exact_match"] == sum(row["hit"] for row in rows) / len(rows)
        assert record["scores"]["p_at_1"]["value"] == cell["scores"]["p_at_1"]
    learned, manual = (saved["tasks"]["task"][name]["p_at_1"] for name in ("p-tuning", "manual"))
    assert (learned["n"], learned["seeds"], learned["std"] is None, manual["std"]) == (len(TEST), 2, False, None)
    assert (tmp_path / "out" / "cells/task/p-tuning/seed-1/try-1/prompt/prompt.safetensors").is_file()
    assert (tmp_path / "out" / "report.html").is_file()


def test_a_second_start_skips_what_is_finished_and_redoes_what_is_broken(causal: Backbone, tmp_path: Path) -> None:
    out = tmp_path / "out"
    # A line separator in a record does not break its cell: ``str.splitlines`` cuts at it.
    test = [{"x": "city\u2028of\x85light", "y": "yes"}, *TEST]
    run(causal, out, test=test)
    before = results_of(out)
    cut = out / "cells/task/manual/seed-0/run.json"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    record = out / "cells/task/majority/seed-0/run.json"
    record.write_text(json.dumps({**json.loads(record.read_text(encoding="utf-8")), "seconds": "many"}))
    rows = out / "cells/task/in-context/seed-0/predictions.jsonl"
    rows.write_text("".join(rows.read_text(encoding="utf-8").splitlines(keepends=True)[:-1]), encoding="utf-8")
    assert there(causal, out, test=test) == {
        ("majority", 0): False, ("manual", 0): False, ("in-context", 0): False, ("p-tuning", 0): True,
    }  # fmt: skip
    assert results_of(out) == before


def test_further_methods_and_seeds_join_what_is_there(causal: Backbone, tmp_path: Path) -> None:
    run(causal, tmp_path, methods=["manual"])
    assert there(causal, tmp_path, methods=["manual", "p-tuning"], seeds=2) == {
        ("manual", 0): True, ("p-tuning", 0): False, ("p-tuning", 1): False,
    }  # fmt: skip
    # Neither settings of training, nor the name of a file, matter to a method that is not trained.
    named = {"data": Records(TRAIN, name="train.csv", digest="1" * 64), "test": Records(TEST, name="other")}
    assert there(causal, tmp_path, methods=["manual"], config=TrainConfig(epochs=1), **named) == {("manual", 0): True}


def test_a_setting_is_varied_as_further_methods(causal: Backbone, tmp_path: Path) -> None:
    """Each value is a method of its own, with the same result as a comparison with that value; the others stay."""
    options: dict[str, Any] = {"methods": ["manual", "p-tuning"], "seeds": 2}
    base = run(causal, tmp_path / "out", **options)
    varied = run(causal, tmp_path / "out", **options, vary={"encoder": ["lstm", "none"], "lr": [0.1]})
    assert list(varied.tasks["task"]) == ["manual", "p-tuning", "p-tuning encoder=none", "p-tuning lr=0.1"]
    assert varied.tasks["task"]["p-tuning"] == base.tasks["task"]["p-tuning"]
    assert list(varied.differences)[:3] == [
        "p-tuning - manual", "p-tuning - p-tuning encoder=none", "p-tuning - p-tuning lr=0.1",
    ]  # fmt: skip
    assert varied.settings["vary"] == {"encoder": ["lstm", "none"], "lr": [0.1]}
    alone = run(causal, tmp_path / "alone", **options, config=FAST.adapted(encoder="none"))
    assert varied.tasks["task"]["p-tuning encoder=none"] == alone.tasks["task"]["p-tuning"]
    cell = load(tmp_path / "out/cells/task/p-tuning lr=0.1/seed-0/run.json")
    assert (cell["settings"]["lr"], cell["identity"]["lr"]) == (0.1, 0.1)


def names(backbone: Backbone, methods: Any, **more: Any) -> list[str]:
    return list(Comparison("compare", Path("out"), backbone, methods, **more).chosen)


def test_methods_are_in_the_order_of_the_tables(causal: Backbone) -> None:
    assert names(causal, "p-tuning, manual,manual,") == names(causal, ["p-tuning", "manual"]) == ["manual", "p-tuning"]
    assert names(causal, "all") == names(causal, ["all"]) == METHODS.every
    control = "p-tuning@random-weights"
    assert names(causal, f"{control},p-tuning") == ["p-tuning", control]
    # A method is varied by the settings it depends on: a cell that another one equals would only take time.
    vary: Any = {"deep_start": ["random"], "encoder": ["mlp"]}
    varied = names(causal, "in-context,prompt-tuning,p-tuning-v2,hybrid,p-tuning,fine-tuning", vary=vary)
    assert [name for name in varied if " " in name] == [
        "p-tuning deep_start=random", "p-tuning encoder=mlp", "p-tuning-v2 deep_start=random",
        "hybrid deep_start=random", "hybrid encoder=mlp",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"methods": "p-tunning"}, "'p-tuning'"),
        ({"methods": "manual@random-weights"}, "trained"),
        ({"methods": "p-tuning@shuffled"}, "@random-weights"),
        ({"methods": " , "}, "majority, manual"),
        ({"methods": []}, "no methods"),
        ({"seeds": 0}, "seeds is 0"),
        ({"tries": 0}, "tries is 0"),
        ({"tries": 6}, "tries is 6"),
        ({"tries": 3, "methods": "majority,manual"}, "majority, manual"),
        ({"explicit": ["epochs"], "methods": "majority,manual"}, "'epochs'.*majority, manual"),
        ({"config": TrainConfig(train_backbone="full")}, "'full'"),
        ({"vary": {"encoder": ["gru"]}}, "'gru'.*lstm.*mlp.*none"),
        ({"vary": {"encodr": ["mlp"]}}, "'encodr'.*'encoder'"),
        ({"vary": {"seed": [1]}}, "'seed'.*seeds="),
        ({"vary": {"lora_rank": [2]}}, "'lora_rank'.*manual, p-tuning"),
        ({"vary": {"lr": []}}, "'lr'"),
        ({"part": "1/9"}, "2 jobs"),
        ({"part": "3/2"}, "no part 3"),
        ({"part": "half"}, "K/N"),
    ],
)
def test_bad_options_run_nothing(causal: Backbone, tmp_path: Path, options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        run(causal, tmp_path / "out", **{"methods": ["manual", "p-tuning"], **options})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"config": FAST.adapted(epochs=3)}, "epochs was 2 and is 3"),
        ({"test": TEST[:-1]}, "test data (sha256) was"),
        ({"template": "[P*2] [X] [P:is] [Y]"}, "template was"),
        ({"tries": 2}, "tries was 1 and is 2"),
    ],
)
def test_results_of_other_settings_are_not_mixed(
    causal: Backbone, tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    out = tmp_path / "out"
    run(causal, out, methods=["p-tuning"])
    before = files_of(out)
    for dry_run in (True, False):
        with pytest.raises(FileError, match="overwrite") as raised:
            run(causal, out, methods=["p-tuning"], dry_run=dry_run, **change)
        assert named in str(raised.value)
    run(causal, out, methods=["p-tuning"], overwrite=True, dry_run=True, **change)
    assert files_of(out) == before
    run(causal, out, methods=["p-tuning"], overwrite=True, **change)
    assert results_of(out) != before["results.json"]


def test_results_of_another_number_format_are_not_mixed(causal: Backbone, tmp_path: Path) -> None:
    """The fingerprint is the same in every format, and answers are not."""
    run(causal, tmp_path, methods=["manual"])
    causal.model.to(torch.bfloat16)  # type: ignore[arg-type]
    with pytest.raises(FileError, match="dtype was None and is bfloat16"):
        run(causal, tmp_path, methods=["manual"])


def test_folders_of_something_else_are_left_alone(causal: Backbone, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for options in ({"overwrite": True}, {"dry_run": True}):
        with pytest.raises(FileError, match="holds files, but no results of a comparison"):
            run(causal, tmp_path, methods=["manual"], **options)
    with pytest.raises(FileError, match="is not a folder"):
        run(causal, tmp_path / "thesis.tex", methods=["manual"])
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_progress_says_how_long_the_other_cells_will_take(
    causal: Backbone, tmp_path: Path, own_method: Callable[..., None]
) -> None:
    """By the mean of the finished cells of their method. A failed cell tells nothing of the next one."""

    def fails(*_: object) -> Solution:
        raise RuntimeError("no room")

    own_method("answers", answers("x"), seeded=True)
    own_method("fails", fails, seeded=True)
    reported: list[Progress] = []
    run(causal, tmp_path / "out", methods=["answers", "fails"], seeds=2, watch=Watch(report=reported.append))
    suite = [now for now in reported if now.stage == "suite"]
    assert list(dict.fromkeys((now.done, now.untimed) for now in suite)) == [(0, 4), (1, 2), (2, 1), (3, 1), (4, 0)]
    assert {now.seconds_left is None for now in suite} == {False}
    times = {Cell("a", "m", 0): 2.0, Cell("b", "m", 0): 4.0, Cell("a", "n", 0): 9.0}
    assert mean_seconds([CellResult(cell, "done", seconds=taken) for cell, taken in times.items()]) == {
        "m": 3.0, "n": 9.0,
    }  # fmt: skip


def test_a_failing_cell_does_not_stop_the_others(
    causal: Backbone, tmp_path: Path, own_method: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    def fit(*_: object) -> Solution:
        raise ZeroDivisionError("one by none")

    own_method("broken", fit)
    results = run(causal, tmp_path, methods=["broken", "manual"])
    assert {cell.method: cell.status for cell in results.cells} == {"broken": "failed", "manual": "done"}
    assert list(results.tasks["task"]) == ["manual"]
    assert "task broken seed 0 failed: one by none" in caplog.text
    saved = next(cell for cell in results_of(tmp_path)["cells"] if cell["method"] == "broken")
    assert (saved["status"], saved["error"], saved["n"]) == ("failed", "one by none", 0)
    own_method("broken", answers("yes", "no"))
    results = run(causal, tmp_path, methods=["broken", "manual"])
    assert not results.failed
    right = [{"yes": 1.0, "no": 0.5}.get(row["y"], 0.0) for row in TEST]
    scores = results.tasks["task"]["broken"]
    assert (scores["p_at_1"].value, scores["mrr"].value) == (right.count(1.0) / len(TEST), sum(right) / len(TEST))


def test_a_trained_method_of_ones_own_is_in_tables_and_limits_of_the_report(
    causal: Backbone, tmp_path: Path, own_method: Callable[..., None]
) -> None:
    """The report knows of methods by ``results.json`` alone; no list elsewhere can forget it."""
    own_method("prefix", answers("yes", "no"), trained=True, seeded=True, learns_slots=True)
    results = run(causal, tmp_path, methods=["manual", "prefix"], seeds=2)
    assert "prefix - manual" in results.differences
    assert "no control with random weights for prefix:" in (tmp_path / "report.md").read_text(encoding="utf-8")
    results = run(causal, tmp_path, methods=["manual", "prefix", "prefix@random-weights"], seeds=2)
    assert list(results.tasks["task"]) == ["manual", "prefix", "prefix@random-weights"]
    assert "no control" not in (tmp_path / "report.md").read_text(encoding="utf-8")


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
    labels = [row["y"] for row in TEST]
    permuted = [{**row, "y": label} for row, label in zip(TEST, labels[1:] + labels[:1], strict=True)]
    for name, test in (("as-is", TEST), ("permuted", permuted)):
        run(causal, tmp_path / name, test=test, methods=methods, tries=2)
    for method in methods:
        cells = [tmp_path / name / f"cells/task/{method}/seed-0" for name in ("as-is", "permuted")]
        first, second = (load(cell / "run.json") for cell in cells)
        assert [first[key] for key in ("tried", "chosen", "prompt")] == [
            second[key] for key in ("tried", "chosen", "prompt")
        ]
        predictions = [(cell / "predictions.jsonl").read_text(encoding="utf-8").splitlines() for cell in cells]
        texts = [[json.loads(line)["prediction"] for line in lines] for lines in predictions]
        assert texts[0] == texts[1]
        assert first["data"]["test"]["sha256"] != second["data"]["test"]["sha256"]
        if method == "p-tuning":
            vectors = [(cell / "try-1/prompt/prompt.safetensors").read_bytes() for cell in cells]
            assert vectors[0] == vectors[1]


def test_it_stops_when_asked_and_goes_on(causal: Backbone, tmp_path: Path) -> None:
    stops = iter([False] * 5 + [True] * 99)
    with pytest.raises(Interrupted):
        run(causal, tmp_path / "cut", watch=Watch(should_stop=lambda: next(stops)))
    assert statuses(tmp_path / "cut") == ["done", "done", "done", "waiting"]
    run(causal, tmp_path / "cut")
    run(causal, tmp_path / "whole")
    assert results_of(tmp_path / "cut") == results_of(tmp_path / "whole")


PROGRAM = """
import json, pathlib, sys
from ptuning import TrainConfig, compare, load_backbone
train, dev, test = json.loads(pathlib.Path(sys.argv[2]).read_text())
options = json.loads(sys.argv[6])
config = TrainConfig(batch_size=4, lr=0.01, patience=9, **options.pop("config"))
compare(train, dev=dev, test=test, out=sys.argv[3], manual=sys.argv[4], template=sys.argv[5],
        backbone=load_backbone(sys.argv[1], dtype="float32", device="cpu"), config=config, **options)
"""


def has_checkpoint(out: Path) -> bool:
    """Whether a training is under way somewhere in a folder."""
    return any(CHECKPOINT_FILE in files for _, _, files in os.walk(out))


@pytest.fixture
def arguments(model_folder: Callable[[str], Path], tmp_path: Path) -> Callable[..., list[str]]:
    (tmp_path / "data.json").write_text(json.dumps([TRAIN, DEV, TEST]))

    def make(out: str, **options: Any) -> list[str]:
        paths = [str(path) for path in (model_folder("llama"), tmp_path / "data.json", tmp_path / out)]
        return [*paths, MANUAL, WARM, json.dumps(options)]

    return make


@pytest.mark.parametrize(("method", "tries"), [("p-tuning", 3), ("fine-tuning", 1)])
def test_killed_in_the_middle_of_a_cell_it_ends_as_if_it_had_not_been(
    arguments: Callable[..., list[str]], tmp_path: Path, method: str, tries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``kill -9`` in a cell, started again, the same ``results.json``; also where prompts train at once."""
    options = {"methods": ["manual", method], "tries": tries, "config": {"epochs": 3, "checkpoint_seconds": 0.0}}
    folder = tmp_path / f"cut/cells/task/{method}/seed-0"
    with forked(PROGRAM, *arguments("cut", **options), folder=tmp_path / "said") as process:
        process.wait_until(lambda: has_checkpoint(tmp_path / "cut"))
        process.kill()
    assert not (folder / "run.json").exists()
    for out in ("cut", "whole"):
        monkeypatch.setattr(sys, "argv", ["-c", *arguments(out, **options)])
        exec(PROGRAM, {})
    assert results_of(tmp_path / "cut") == results_of(tmp_path / "whole")
    for name in ("predictions.jsonl", "run.json"):
        cut, whole = (files_of(tmp_path / out / f"cells/task/{method}/seed-0")[name] for out in ("cut", "whole"))
        assert cut == whole


def suite(
    backbone: Backbone,
    out: Path,
    *,
    counts: Sequence[int],
    template: str = WARM,
    config: TrainConfig = FAST,
    **options: Any,
) -> Comparison:
    """A comparison of p-tuning on tasks with a number of facts to learn from each."""
    parts = (as_questions(DEV), Template.parse(MANUAL), Template.parse(template), tuple(sorted(NAMES)))
    jobs = [
        CellJob(Task(f"task-{count}", as_questions(TRAIN[:count]), *parts), as_questions(TEST), {}) for count in counts
    ]
    comparison = Comparison("lama", out, backbone, **{"methods": ["p-tuning"], "config": config, **options})
    comparison.tasks = {job.task.name: job for job in jobs}
    return comparison


def learned(out: Path) -> dict[str, torch.Tensor]:
    paths = {str(path.relative_to(out)): Prompt.load(path.parent) for path in sorted(out.rglob("prompt/prompt.json"))}
    return {name: prompt.slot_vectors for name, prompt in paths.items() if prompt.slot_vectors is not None}


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
    together = list(suite(causal, tmp_path / "together", counts=(5, 12, 8)).results())
    assert max(sizes) == 3
    monkeypatch.setattr(Comparison, "_trains_together", lambda *_: False)
    in_turn = list(suite(causal, tmp_path / "turn", counts=(5, 12, 8)).results())
    assert [result.cell.task for result in together] == ["task-5", "task-8", "task-12"], "each when it has ended"
    assert {result.cell: result.values for result in together} == {result.cell: result.values for result in in_turn}
    first, second = learned(tmp_path / "together"), learned(tmp_path / "turn")
    assert list(first) == list(second)
    assert len(first) == 3
    for name, vectors in first.items():
        torch.testing.assert_close(vectors, second[name], rtol=0, atol=1e-4)
    assert not (tmp_path / "together" / "fleets").exists()
    assert all(result.seconds > 0 for result in together)


@pytest.mark.parametrize("steps_taken", [1, 4, 6])
def test_stopped_while_several_tasks_train_it_goes_on_exactly(
    causal: Backbone, tmp_path: Path, steps_taken: int
) -> None:
    """Also where one task was done already when it was stopped."""
    stops = iter([False] * (steps_taken - 1) + [True] * 99)
    whole = {result.cell: result.values for result in suite(causal, tmp_path / "whole", counts=(5, 12, 8)).results()}
    stopped = suite(causal, tmp_path / "cut", counts=(5, 12, 8), watch=Watch(should_stop=lambda: next(stops)))
    with pytest.raises(Interrupted):
        list(stopped.results())
    again = suite(causal, tmp_path / "cut", counts=(5, 12, 8)).results()
    assert {result.cell: result.values for result in again} == whole
    first, second = learned(tmp_path / "cut"), learned(tmp_path / "whole")
    assert list(first) == list(second)
    assert all(torch.equal(vectors, second[name]) for name, vectors in first.items())


def test_a_task_that_cannot_be_trained_fails_alone(
    causal: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For lack of records, or by a bad loss in the middle."""
    real = step.Learner.finish

    def finish(self: step.Learner, taken: step.Step, losses: Sequence[torch.Tensor]) -> float:
        if taken.number == 3:  # which the task of 4 records never takes
            raise TrainingError("the loss became nan")
        return real(self, taken, losses)

    monkeypatch.setattr(step.Learner, "finish", finish)
    results = {result.cell.task: result for result in suite(causal, tmp_path, counts=(0, 4, 12)).results()}
    assert {name: result.status for name, result in results.items()} == {
        "task-0": "failed", "task-4": "done", "task-12": "failed",
    }  # fmt: skip
    assert "became nan" in str(results["task-12"].error)
    assert "no records" in str(results["task-0"].error)


def test_prompts_that_cannot_be_trained_at_once_are_trained_one_after_another(
    causal: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(steps: Sequence[Any]) -> list[Any]:
        if len(steps) > 1:
            raise RuntimeError("out of memory")
        return step.take_steps(steps)

    monkeypatch.setattr(trainer, "take_steps", full)
    results = list(suite(causal, tmp_path, counts=(5, 12)).results())
    assert [result.status for result in results] == ["done", "done"]
    assert "at once failed: out of memory" in caplog.text
    assert not (tmp_path / "fleets").exists()


@pytest.mark.parametrize("failing", [0, 1, 2, 5])
def test_a_checkpoint_that_cannot_be_written_changes_no_result(
    failing: int, causal: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on a disk that is full for a moment: prompts go on training together, to the same bytes."""
    often = FAST.adapted(checkpoint_seconds=0.0)
    list(suite(causal, tmp_path / "whole", counts=(5, 12), config=often).results())
    written = itertools.count()

    def full_once(real: Callable[..., None]) -> Callable[..., None]:
        def write(path: Path, *rest: Any, **named: Any) -> None:
            if next(written) == failing:
                raise FileError(f"{path}: No space left on device")
            real(path, *rest, **named)

        return write

    monkeypatch.setattr(trainer, "SAVING_PAUSE", 0.0)
    monkeypatch.setattr(trainer, "write_checkpoint", full_once(write_checkpoint))
    results = list(suite(causal, tmp_path / "full", counts=(5, 12), config=often).results())
    assert [result.status for result in results] == ["done", "done"]
    assert caplog.text.count("no checkpoint was written, and training goes on") == 1
    assert "at once failed" not in caplog.text
    whole, full = (
        {path.relative_to(out): path.read_bytes() for path in out.rglob("*.safetensors")}
        for out in (tmp_path / "whole", tmp_path / "full")
    )
    assert full == whole != {}
    assert not (tmp_path / "full" / "fleets").exists()


def test_a_finished_task_is_not_trained_again_with_new_ones(
    causal: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever has become of the files of its training."""
    before = list(suite(causal, tmp_path, counts=(5, 12)).results())
    shutil.rmtree(tmp_path / before[0].cell.folder / "try-1")
    trained: list[str] = []

    def spy(runs: Any, **options: Any) -> Any:
        trained.extend(runs)
        return train_together(runs, **options)

    monkeypatch.setattr(comparisons, "train_together", spy)
    assert len(list(suite(causal, tmp_path, counts=(5, 12, 8)).results())) == 3
    assert trained == ["task-8/try-1"]


def test_other_settings_forget_what_was_in_training_at_once(causal: Backbone, tmp_path: Path) -> None:
    stops = iter([False] * 3 + [True] * 99)
    with pytest.raises(Interrupted):
        list(suite(causal, tmp_path, counts=(5, 12), watch=Watch(should_stop=lambda: next(stops))).results())
    other = suite(causal, tmp_path, counts=(5, 12), template="[P*2] [X] [P] [Y]")
    with pytest.raises(FileError, match="other settings"):
        other.check(other.jobs)
    other.overwrite = True
    other.check(other.jobs)
    assert [result.status for result in other.results()] == ["done", "done"]


def test_a_dry_run_gives_the_times_of_finished_cells(causal: Backbone, tmp_path: Path) -> None:
    """Cells that wait take the mean of the finished cells of the same method, whatever their task."""
    out = tmp_path / "out"
    comparison = suite(causal, out, counts=(5, 8, 12), methods=["manual", "in-context"], seeds=2)
    jobs = comparison.jobs
    assert {result.seconds for result in comparison.estimates(jobs)} == {0.0}
    assert not out.exists()
    list(comparison.results(jobs[:2]))
    for folder, seconds in ((jobs[0].folders[0], 3.0), (jobs[1].folders[0], 5.0)):
        record = json.loads((out / folder / "run.json").read_text(encoding="utf-8"))
        write_json(out / folder / "run.json", {**record, "seconds": seconds})
    estimates = comparison.estimates(jobs)
    assert [(result.cell.method, result.was_there, result.seconds) for result in estimates] == [
        ("manual", True, 3.0), ("manual", True, 5.0), ("manual", False, 4.0), *[("in-context", False, 0.0)] * 6,
    ]  # fmt: skip
    before, listed = sorted(out.rglob("*")), list[CellResult]()
    watch = Watch(on_estimate=listed.extend)
    planned = run(causal, out, methods=["majority", "manual"], dry_run=True, part="2/2", watch=watch)
    assert [result.cell.method for result in listed] == ["manual"]
    assert [cell.status for cell in planned.cells] == ["waiting"]
    assert planned.tasks == {}
    assert sorted(out.rglob("*")) == before


def test_the_random_weights_control_leaves_the_backbone_alone(
    causal: Backbone, tmp_path: Path, own_method: Callable[..., None]
) -> None:
    """Each seed has random weights of its own, whichever seed the comparison began with."""
    before = causal.fingerprint
    methods = ["p-tuning", "fine-tuning", "p-tuning@random-weights", "fine-tuning@random-weights"]
    results = run(causal, tmp_path / "out", methods=methods)
    assert list(results.tasks["task"]) == methods
    assert not results.failed
    causal.__dict__.pop("fingerprint", None)
    assert causal.fingerprint == before
    seen: dict[int, str] = {}

    def fit(_: object, setup: Setup) -> Solution:
        seen[setup.seed] = setup.backbone.fingerprint
        return Solution.of_ranking(lambda _: ["yes"])

    own_method("looks", fit, trained=True)
    run(causal, tmp_path / "both", methods=["looks@random-weights"], seeds=2)
    assert seen == {seed: causal.with_random_weights(seed=seed).fingerprint for seed in (0, 1)}
    assert len({before, *seen.values()}) == 3
    both = dict(seen)
    run(causal, tmp_path / "second", methods=["looks@random-weights"], config=FAST.adapted(seed=1))
    assert seen == both


def test_the_identity_of_a_started_cell_is_kept_until_it_is_done(
    causal: Backbone, tmp_path: Path, own_method: Callable[..., None]
) -> None:
    folder = tmp_path / "out/cells/task/slow/seed-0"

    def fit(*_: object) -> Solution:
        assert [path.name for path in folder.iterdir()] == ["started.json"]
        raise Interrupted("stopped")

    own_method("slow", fit, trained=True)
    with pytest.raises(Interrupted):
        run(causal, tmp_path / "out", methods=["slow"])
    own_method("slow", answers("yes"), trained=True)
    with pytest.raises(FileError, match="epochs was 2 and is 3"):
        run(causal, tmp_path / "out", methods=["slow"], config=FAST.adapted(epochs=3))
    run(causal, tmp_path / "out", methods=["slow"])
    assert sorted(path.name for path in folder.iterdir()) == ["predictions.jsonl", "run.json"]


def untrained(backbone: Backbone, out: Path, *tasks: str, more: Any = None, **options: Any) -> Results:
    jobs = []
    for name in tasks or ("P1",):
        (job,) = suite(backbone, out, counts=(12,)).tasks.values()
        jobs.append(replace(job, task=replace(job.task, name=name), info={"label": name, "type": "1-1"}))
    comparison = Comparison("lama", out, backbone, **{"methods": ("majority", "manual"), "config": FAST, **options})
    return comparison.run(jobs, settings={"limit": 3}, more=more)


def test_results_are_written_after_each_cell_and_the_report_in_the_end(causal: Backbone, tmp_path: Path) -> None:
    seen = []

    def on_cell(_: object, number: int, total: int) -> None:
        seen.append((number, total, statuses(tmp_path).count("done"), (tmp_path / "report.html").exists()))

    def with_warning(results: Results, cells: Sequence[CellResult]) -> Results:
        return replace(results, warnings=[TrainingWarning(**vars(cells[0].cell), text=cells[0].status)])

    watch = Watch(on_cell=on_cell)
    results = untrained(causal, tmp_path, "P1", "P2", command="ptuning", seeds=2, more=with_warning, watch=watch)
    assert seen == [(1, 4, 1, False), (2, 4, 2, False), (3, 4, 3, False), (4, 4, 4, False)]
    assert (tmp_path / "report.html").exists()
    saved: Mapping[str, Any] = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert results.to_json() == saved
    assert saved["command"] == "ptuning"
    backbone = {"name": causal.name, "fingerprint": causal.fingerprint, "dtype": "float32"}
    assert backbone.items() <= saved["backbone"].items()
    assert {"limit": 3, "seeds": 2, "seed": 0}.items() <= saved["settings"].items()
    # Neither trains, so that no setting of training acts.
    assert not {"tries", "epochs", "encoder"} & saved["settings"].keys()
    assert saved["task_info"]["P1"] == {"label": "P1", "type": "1-1"}
    assert saved["methods"]["manual"].keys() == {"describe", "trained", "learns_slots"}
    assert saved["warnings"] == [{"task": "P1", "method": "majority", "seed": 0, "text": "done"}]
    assert saved["by_type"].keys() == {"1-1"}


def test_stopped_before_the_first_new_cell_nothing_is_lost(causal: Backbone, tmp_path: Path) -> None:
    untrained(causal, tmp_path)
    before = results_of(tmp_path)["tasks"]
    with pytest.raises(Interrupted, match="1 of 4"):
        untrained(causal, tmp_path, "P1", "P2", watch=Watch(should_stop=lambda: True))
    assert statuses(tmp_path) == ["done", "waiting", "done", "waiting"]
    assert results_of(tmp_path)["tasks"] == before
    untrained(causal, tmp_path, "P1", "P2")
    assert statuses(tmp_path) == ["done"] * 4


def test_words_that_the_tokenizer_does_not_know_run_nothing(masked: Backbone, tmp_path: Path) -> None:
    for dry_run in (True, False):
        with pytest.raises(RecordError, match="vocabulary does not fit"):
            untrained(without_words("bert"), tmp_path / "out", dry_run=dry_run)
    file = TaskFile.parse(
        'name = "moods"\nversion = "1"\nlabels = {yes = ["a film"], no = ["a  film"]}\n[[patterns]]\n'
        'manual = "{x} It was [Y]"'
    )
    rows = file.read_rows([{"x": "Kenya", "label": "yes"}])
    task = Task("moods", rows, rows, file.manual[0], file.learned[0], ("yes", "no"), file=file)
    with pytest.raises(LabelWordError, match="same token ids"):
        Comparison("superglue", tmp_path / "out", masked, ["majority"]).run([CellJob(task, rows, {})], settings={})
    assert not (tmp_path / "out").exists()


# Parts and workers: each runs its share of the cells, and together they leave the files of one process.
SHARED: dict[str, Any] = {"methods": ("majority", "manual", "p-tuning"), "seeds": 2}


@pytest.fixture(scope="module")
def whole(loaded: Callable[[str], Backbone], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that one process leaves."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run(loaded("llama"), out, **SHARED)
    return out


@pytest.mark.parametrize("of", [1, 3])
def test_parts_leave_the_same_files_as_one_process(causal: Backbone, whole: Path, tmp_path: Path, of: int) -> None:
    """In any order; results.json comes from the command without a part, and nothing is run then."""
    for number in reversed(range(1, of + 1)):
        part = run(causal, tmp_path, **SHARED, part=f"{number}/{of}")
        assert {cell.status for cell in part.cells} == {"done"}
        assert not (tmp_path / "results.json").exists()
        assert not (tmp_path / "report.html").exists()
    assert set(there(causal, tmp_path, **SHARED).values()) == {True}
    assert files_of(tmp_path) == files_of(whole)


@pytest.mark.parametrize("shared", [None, False])
def test_workers_leave_the_same_files_as_one_process(
    causal: Backbone, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: bool | None
) -> None:
    """Whether they see the folder or not, and though some of them end in the middle."""
    ray = use_fake_ray(monkeypatch, causal, task_manual_seed_0=1)
    reported: list[str] = []
    watch = Watch(
        report=lambda now: reported.append(now.stage), on_cell=lambda result, *_: reported.append(result.status)
    )
    out = tmp_path / "workers"
    results = run(causal, out, **SHARED, workers=WorkerConfig(3, shared_folder=shared), watch=watch)
    assert [name for _, name in ray.begun].count("task manual seed 0") == 2
    assert reported.count("done") == len(results.cells) == 4
    files = files_of(out)
    assert {files[f"{cell.folder}/run.json"].pop("worker")["engine"] for cell in results.cells} == {"fake"}
    assert files == files_of(whole)
    again = run(causal, out, **SHARED, workers=3)
    assert len(ray.begun) == 5, "nothing was left to do"
    assert again.tasks == results.tasks


def test_parts_may_run_at_once_and_be_killed(
    arguments: Callable[..., list[str]], loaded: Callable[[str], Backbone], whole: Path, tmp_path: Path
) -> None:
    """Two parts, one of them started twice, and one killed: the same files in the end."""

    def started(part: str, name: str) -> Any:
        given = arguments("parts", **SHARED, config={"epochs": 2}, part=part)
        return forked(PROGRAM, *given, folder=tmp_path / "said" / name)

    with (
        started("1/2", "1") as first, started("2/2", "2") as second, started("2/2", "3") as again,
        started("1/2", "4") as killed,
    ):  # fmt: skip
        killed.wait_until(lambda: (tmp_path / "parts").exists())
        killed.kill()
        assert [process.wait() for process in (first, second, again)] == [0, 0, 0], first.err + second.err + again.err
    run(loaded("llama"), tmp_path / "parts", **SHARED)
    assert files_of(tmp_path / "parts") == files_of(whole)


def test_a_part_looks_at_its_own_cells_only(causal: Backbone, tmp_path: Path) -> None:
    """Others may be of other settings while they are replaced part by part; its own are refused or replaced."""
    options = {**SHARED, "seeds": 1}
    run(causal, tmp_path, **options)
    (tmp_path / "cells/task/manual/seed-0/run.json").write_text('{"identity": {"seed": 5}}')
    run(causal, tmp_path, **options, part="1/3")
    with pytest.raises(FileError, match="other settings"):
        run(causal, tmp_path, **options, part="2/3")
    run(causal, tmp_path, **options, part="2/3", overwrite=True)
    assert statuses(tmp_path)[1] == "done"


def test_prompts_that_train_together_are_cut_by_the_comparison_alone(
    causal: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparisons, "JOB_PROMPTS", 2)
    whole, parts = (suite(causal, tmp_path / name, counts=(5, 12, 8)) for name in ("whole", "parts"))
    assert [len(job.folders) for job in whole.jobs] == [2, 1]
    assert [job.checkpoint for job in whole.jobs] == ["fleets/p-tuning-seed-0", "fleets/p-tuning-seed-0-2"]
    assert len(list(whole.results())) == 3
    for job in reversed(parts.jobs):
        assert [result.status for result in parts.results([job])] == ["done"] * len(job.folders)
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "whole")
    assert not (tmp_path / "parts" / "fleets").exists()
