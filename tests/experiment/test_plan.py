"""How a comparison is run: which methods, what is written when, and what is refused before it starts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import ptuning.experiment.plan
from ptuning.backbone.backbone import Backbone
from ptuning.config import TrainConfig
from ptuning.data.questions import as_questions
from ptuning.data.task_files import TaskFile
from ptuning.errors import ConfigError, FileError, LabelWordError, RecordError
from ptuning.experiment.cells import CellJob, CellResult
from ptuning.experiment.plan import Plan, Watch, run_jobs
from ptuning.method.base import Task
from ptuning.method.registry import METHODS
from ptuning.progress import Interrupted
from ptuning.records import Record
from ptuning.report.results_file import Results, TrainingWarning
from ptuning.template.language import Template
from tests.families import without_words

WORDS = ("yes", "good", "great")
FACTS: list[Record] = [{"x": f"Kenya {at}", "y": WORDS[at % 3]} for at in range(12)]
FAST = TrainConfig(epochs=1, batch_size=4)


def jobs(*names: str) -> list[CellJob]:
    train, dev = as_questions(FACTS[:6]), as_questions(FACTS[6:9])
    manual, learned = Template.parse("[X] is [Y] ."), Template.parse("[P*2] [X] [Y]")
    return [
        CellJob(
            Task(name, train, dev, manual, learned, WORDS, single_token=True),
            as_questions(FACTS[9:]),
            {"label": name},
            "1-1",
        )
        for name in names or ("P1",)
    ]


def run(backbone: Backbone, out: Path, *names: str, more: Any = None, **options: Any) -> Results:
    options = {"methods": ("majority", "manual"), "config": FAST, **options}
    return run_jobs(jobs(*names), plan=Plan("lama", out, backbone, **options), settings={"limit": 3}, more=more)


def saved(out: Path) -> Any:
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


def statuses(out: Path) -> list[str]:
    return [cell["status"] for cell in saved(out)["cells"]]


def test_methods_stand_in_the_order_of_the_tables(causal: Backbone) -> None:
    def names(methods: Any, **more: Any) -> list[str]:
        return Plan("compare", Path("out"), causal, methods, **more).method_names

    assert names("p-tuning, manual,manual,") == names(["p-tuning", "manual"]) == ["manual", "p-tuning"]
    assert names("all") == names(["all"]) == METHODS.every
    control = "p-tuning@random-weights"
    assert names(f"{control},p-tuning") == names(f"p-tuning,{control}") == ["p-tuning", control]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"methods": "p-tunning"}, r"unknown method 'p-tunning'\. Did you mean 'p-tuning'\?"),
        ({"methods": " , "}, "there are no methods to compare; known: all, majority, manual"),
        ({"methods": []}, "there are no methods to compare"),
        ({"seeds": 0}, "seeds is 0; it must be 1 or more"),
        ({"tries": 0}, "tries is 0; it must be a whole number from 1 to 5"),
        ({"tries": 6}, "tries is 6; it must be a whole number from 1 to 5"),
        (
            {"config": TrainConfig(train_backbone="full")},
            "train_backbone is 'full', but in a comparison each method says what it trains",
        ),
    ],
)
def test_what_is_refused_before_anything_runs(causal: Backbone, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Plan("compare", Path("out"), causal, **options)


def test_results_are_written_after_each_cell_and_the_report_in_the_end(causal: Backbone, tmp_path: Path) -> None:
    out, seen = tmp_path / "out", []

    def on_cell(result: object, number: int, total: int) -> None:
        seen.append((number, total, statuses(out).count("done"), (out / "report.html").exists()))

    run(causal, out, "P1", "P2", watch=Watch(on_cell=on_cell))
    assert seen == [(1, 4, 1, False), (2, 4, 2, False), (3, 4, 3, False), (4, 4, 4, False)]
    assert (out / "report.html").exists()


def test_what_results_say_about_a_run(causal: Backbone, tmp_path: Path) -> None:
    def with_warning(results: Results, cells: Sequence[CellResult]) -> Results:
        return replace(results, warnings=[TrainingWarning(**vars(one.cell), text=one.status) for one in cells[:1]])

    found = run(causal, tmp_path, command="ptuning lama", seeds=2, more=with_warning)
    about = saved(tmp_path)
    assert about["command"] == "ptuning lama"
    assert {"name": causal.name, "fingerprint": causal.fingerprint, "dtype": "float32"}.items() <= about[
        "backbone"
    ].items()
    assert {"limit": 3, "seeds": 2, "seed": 0}.items() <= about["settings"].items()
    # Neither trains, so that no setting of training acts.
    assert not {"tries", "epochs", "encoder"} & about["settings"].keys()
    for given in ({"tries": 3}, {"explicit": ["epochs"]}):
        with pytest.raises(ConfigError, match="majority, manual"):
            run(causal, tmp_path, **given)
    assert about["task_info"] == {"P1": {"label": "P1"}}
    assert about["methods"]["manual"] == {
        "describe": "the manual prompt (MP)", "trained": False, "learns_slots": False,
    }  # fmt: skip
    assert about["warnings"] == [{"task": "P1", "method": "majority", "seed": 0, "text": "done"}]
    assert found.to_json() == about
    assert about["by_type"].keys() == {"1-1"}


def test_stopped_before_the_first_new_cell_nothing_is_lost(causal: Backbone, tmp_path: Path) -> None:
    run(causal, tmp_path)
    before = saved(tmp_path)["tasks"]
    with pytest.raises(Interrupted, match="stopped after 1 of 4 results"):
        run(causal, tmp_path, "P1", "P2", watch=Watch(should_stop=lambda: True))
    assert statuses(tmp_path) == ["done", "waiting", "done", "waiting"]
    assert saved(tmp_path)["tasks"] == before
    run(causal, tmp_path, "P1", "P2")
    assert statuses(tmp_path) == ["done"] * 4


def test_a_dry_run_writes_nothing_and_gives_its_estimates(causal: Backbone, tmp_path: Path) -> None:
    told: list[Any] = []
    found = run(causal, tmp_path / "out", dry_run=True, watch=Watch(on_estimate=told.extend))
    assert [one.cell.method for one in told] == ["majority", "manual"]
    assert {cell.status for cell in found.cells} == {"waiting"}
    assert not (tmp_path / "out").exists()
    assert run(causal, tmp_path / "out", dry_run=True).tasks == {}


def test_a_folder_that_is_no_folder_of_results(causal: Backbone, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileError, match="holds files, but no results of a comparison"):
        run(causal, tmp_path)
    with pytest.raises(FileError, match="is not a folder"):
        run(causal, tmp_path / "notes.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_the_report_is_made_of_the_folder(causal: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []
    monkeypatch.setattr(ptuning.experiment.plan, "write_report", asked.append)
    run(causal, tmp_path / "out")
    assert asked == [tmp_path / "out"]


def test_a_vocabulary_that_does_not_fit_is_refused_by_a_dry_run_as_well(tmp_path: Path) -> None:
    for dry_run in (True, False):
        with pytest.raises(RecordError, match=r"targets of in memory are unknown .* the vocabulary does not fit"):
            run(without_words("bert"), tmp_path / "out", dry_run=dry_run)
    assert not (tmp_path / "out").exists()


def test_label_words_that_are_the_same_tokens_are_refused_before_anything_runs(
    masked: Backbone, tmp_path: Path
) -> None:
    file = TaskFile.parse(
        'name = "moods"\nversion = "1"\nlabels = {yes = ["a film"], no = ["a  film"]}\n[[patterns]]\n'
        'manual = "{x} It was [Y]"'
    )
    rows = file.read_rows([{"x": "Kenya", "label": "yes"}])
    task = Task("moods", rows, rows, file.manual[0], file.learned[0], ("yes", "no"), file=file)
    plan = Plan("superglue", tmp_path / "out", masked, methods=["majority"])
    with pytest.raises(LabelWordError, match="have the same token ids"):
        run_jobs([CellJob(task, rows, {})], plan=plan, settings={})
