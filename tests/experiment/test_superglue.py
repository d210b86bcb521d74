"""SuperGLUE on tiny models and made-up folders: parts, draws, scores, resuming after a kill."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from ptuning.backbone.backbone import Backbone
from ptuning.config import TrainConfig
from ptuning.data.questions import Questions
from ptuning.data.splits import draw_few, draw_questions, split_questions
from ptuning.data.task_files import TaskFile, load_task
from ptuning.errors import ConfigError, FileError, RecordError
from ptuning.experiment.comparison import Watch
from ptuning.experiment.suites import asked_tasks, chosen_methods, superglue, task_job
from ptuning.method.base import Setup, Solution
from ptuning.method.registry import METHODS
from ptuning.report.results_file import Results
from tests.experiment.test_suite import results_of
from tests.processes import forked

FAST = TrainConfig(epochs=2, batch_size=4, lr=0.01, backbone_lr=1e-3, patience=9)
ALL = ("majority", "manual", "in-context", "p-tuning", "fine-tuning", "manual+fine-tuning")
NAMES = ("Kenya", "Peru", "Paris", "Lima", "a film", "one")


def lines(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def cb(number: int, *, start: int = 0) -> list[dict[str, object]]:
    labels = ("entailment", "contradiction", "neutral")
    return [
        {"premise": f"a {at} film", "hypothesis": f"{NAMES[at % 6]}", "label": labels[at % 3], "idx": at}
        for at in range(start, start + number)
    ]


def copa(number: int, *, start: int = 0) -> list[dict[str, object]]:
    return [
        {"premise": f"It is {at}", "choice1": "yes", "choice2": f"no {at}", "question": ("cause", "effect")[at % 2],
         "label": at % 2, "idx": at}
        for at in range(start, start + number)
    ]  # fmt: skip


def multirc(number: int, *, start: int = 0) -> list[dict[str, object]]:
    """Passages of two questions with two answers each."""
    return [
        {
            "idx": at,
            "passage": {
                "text": f"{at} is good",
                "questions": [
                    {
                        "idx": 10 * at + q,
                        "question": f"is {q}?",
                        "answers": [{"idx": 100 * at + 10 * q + a, "text": NAMES[a], "label": (at + q + a) % 2}
                                    for a in range(2)],
                    }
                    for q in range(2)
                ],
            },
        }
        for at in range(start, start + number)
    ]  # fmt: skip


def record(number: int, *, start: int = 0) -> list[dict[str, object]]:
    text = "Kenya and Peru"
    spans = [{"start": 0, "end": 4, "text": "Kenya"}, {"start": 10, "end": 13, "text": "Peru"}]
    return [
        {
            "idx": at,
            "passage": {"text": text, "entities": [{"start": one["start"], "end": one["end"]} for one in spans]},
            "qas": [{"idx": at, "query": f"@placeholder is {at}", "answers": [spans[at % 2]]}],
        }
        for at in range(start, start + number)
    ]


def wsc(number: int, *, start: int = 0) -> list[dict[str, object]]:
    return [
        {"text": f"Peru and Kenya {at} say it is good", "idx": at, "label": at % 2 == 0,
         "target": {"span1_text": "Peru", "span1_index": 0, "span2_text": "it", "span2_index": 5}}
        for at in range(start, start + number)
    ]  # fmt: skip


@pytest.fixture
def few(tmp_path: Path) -> Path:
    """A folder as FewGLUE has it: ReCoRD without a validation part."""
    folder = tmp_path / "FewGLUE"
    for name, make in (("CB", cb), ("COPA", copa), ("ReCoRD", record), ("WSC", wsc)):
        lines(folder / name / "train.jsonl", make(12))
        lines(folder / name / "dev32.jsonl", make(6, start=20))
        if name != "ReCoRD":
            lines(folder / name / "val.jsonl", make(9, start=30))
    return folder


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A folder as SuperGLUE has it: no part to choose by."""
    folder = tmp_path / "SuperGLUE"
    for name, make in (("CB", cb), ("MultiRC", multirc)):
        lines(folder / name / "train.jsonl", make(10))
        lines(folder / name / "val.jsonl", make(6, start=30))
    return folder


def run(backbone: Backbone, data: Path, out: Path, **options: Any) -> Results:
    return superglue(
        data, backbone=backbone, out=out, **{"config": FAST, "seeds": 1, "methods": ("majority",), **options}
    )


def test_every_method_on_every_kind_of_task(causal: Backbone, few: Path, tmp_path: Path) -> None:
    found = run(causal, few, tmp_path / "out", methods=ALL, seeds=2)
    # Two sentences with their questions do not fit into the 64 tokens that a tiny model reads.
    assert {(one.task, one.method) for one in found.failed} == {("WSC", "in-context")}
    assert list(found.tasks) == ["CB", "COPA", "ReCoRD", "WSC"]
    assert {task: list(found.tasks[task]["manual"]) for task in found.tasks} == {
        "CB": ["score", "accuracy", "macro_f1"],
        "COPA": ["score", "accuracy"],
        "ReCoRD": ["score", "exact_match", "f1"],
        "WSC": ["score", "accuracy"],
    }
    # Methods that draw nothing run once; the mean over tasks is over what each task counts as its score.
    seeds = {name: len({one.seed for one in found.cells if one.method == name}) for name in ALL}
    assert seeds == {**dict.fromkeys(ALL, 2), "majority": 1, "manual": 1}
    manual = [found.tasks[task]["manual"]["score"].value for task in found.tasks]
    assert found.macro["manual"]["score"].value == pytest.approx(sum(manual) / 4)
    learned = found.tasks["CB"]["p-tuning"]["score"]
    assert learned.seeds == 2
    assert learned.lowest is not None
    assert learned.lowest <= learned.value
    saved = results_of(tmp_path / "out")
    agreement = saved["agreement"]["cells"]
    assert len(agreement) == 4 * 4 * 2 - 2  # four methods choose something
    for row in agreement:
        folder = tmp_path / "out/cells" / row["task"] / row["method"] / f"seed-{row['seed']}"
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        hits = [
            json.loads(line)["hit"] for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        assert (row["dev"], row["test"]) == (record["chosen"]["dev_score"], sum(hits) / len(hits))
    page = (tmp_path / "out/report.md").read_text(encoding="utf-8")
    assert "macro F1" in page
    assert "Development and reported score" in page
    assert "ReCoRD: there is no validation part" in page


def test_a_second_start_runs_nothing_and_says_the_same(causal: Backbone, few: Path, tmp_path: Path) -> None:
    run(causal, few, tmp_path / "out", methods=ALL, tasks="COPA")
    before = results_of(tmp_path / "out")
    there: list[bool] = []
    run(
        causal,
        few,
        tmp_path / "out",
        methods=ALL,
        tasks="COPA",
        watch=Watch(on_cell=lambda one, *_: there.append(one.was_there)),
    )
    assert there == [True] * len(ALL)
    assert results_of(tmp_path / "out") == before


def test_settings_are_varied_as_in_other_comparisons(causal: Backbone, whole: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"tasks": "CB", "few_shot": 3, "seeds": 2, "methods": ("manual", "p-tuning")}
    found = run(causal, whole, tmp_path / "out", **options, vary={"encoder": ["lstm", "none"], "lr": [0.1]})
    assert not found.failed
    varied = ["p-tuning encoder=none", "p-tuning lr=0.1"]
    assert list(found.tasks["CB"]) == ["manual", "p-tuning", *varied]
    assert [name for name in found.differences if name.startswith("p-tuning - p-tuning ")] == [
        f"p-tuning - {name}" for name in varied
    ]
    alone = run(causal, whole, tmp_path / "alone", **options, config=FAST.adapted(encoder="none"))
    assert found.tasks["CB"]["p-tuning encoder=none"] == alone.tasks["CB"]["p-tuning"]


def test_the_parts_of_a_folder(few: Path, whole: Path) -> None:
    given = task_job(load_task("CB"), few, seeds=[0])
    assert [len(part) for part in (given.task.train, given.task.dev, given.test)] == [12, 6, 9]
    assert "as given; reported on the validation part" in str(given.info["split"])
    split = task_job(load_task("CB"), whole, seeds=[0])
    assert [len(part) for part in (split.task.train, split.task.dev, split.test)] == [8, 2, 6]
    assert "20% of the training part set aside" in str(split.info["split"])
    no_val = task_job(load_task("ReCoRD"), few, seeds=[0])
    assert [len(part) for part in (no_val.task.train, no_val.task.dev, no_val.test)] == [10, 2, 6]
    assert no_val.info["reported"] == "dev"
    assert {str(row.record) for row in no_val.task.dev}.isdisjoint({str(row.record) for row in no_val.test})


def test_nothing_to_report_on(few: Path) -> None:
    (few / "CB/val.jsonl").unlink()
    (few / "CB/dev32.jsonl").unlink()
    with pytest.raises(FileError, match="no 'val' part of the task CB"):
        task_job(load_task("CB"), few, seeds=[0])


def test_groups_are_never_cut(whole: Path) -> None:
    job = task_job(load_task("MultiRC"), whole, seeds=[0])
    groups = [{row.group for row in part} for part in (job.task.train, job.task.dev, job.test)]
    assert not groups[0] & groups[1]
    assert [len(part) for part in (job.task.train, job.task.dev)] == [2 * len(one) for one in groups[:2]]
    drawn = draw_questions(job.test, 5, seed=0)
    assert len(drawn) == 6  # three questions of two answers
    assert [row for row in job.test if row in drawn] == list(drawn)
    one, other = draw_few(Questions([*job.task.train, *job.task.dev]), 4, seed=1)
    assert len({row.group for row in one}) == len({row.group for row in other}) == 4  # a question is one example
    assert len(one) == 8


def test_few_examples_are_balanced_and_drawn_by_seed(few: Path) -> None:
    file = load_task("CB")
    pool = file.read(few / "CB/train.jsonl")
    assert file.label_words is not None
    labels = file.label_words.labels
    draws = [draw_few(pool, 6, labels, seed=seed) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    for train, dev in draws:
        for part in (train, dev):
            assert sorted(row.record["y"] for row in part) == sorted([*labels] * 2)
        assert not [row for row in train if row in dev]
    with pytest.raises(RecordError, match="there are 12"):
        draw_few(pool, 7, labels, seed=0)


def test_rows_that_read_the_same_stay_together() -> None:
    file = load_task("CB")
    rows = file.read_rows([{**row, "idx": at} for at, row in enumerate([*cb(5), *cb(5)])])
    kept, aside = split_questions(rows, fraction=0.4, seed=0)
    assert (len(kept), len(aside)) == (6, 4)
    assert not {row.record["premise"] for row in kept} & {row.record["premise"] for row in aside}


def test_each_seed_of_a_few_shot_run_has_examples_of_its_own(causal: Backbone, few: Path, tmp_path: Path) -> None:
    seen: dict[int, object] = {}

    def fit(task: Any, setup: Setup) -> Solution:
        seen[setup.seed] = [row.record for row in task.train]
        return Solution.of_ranking(lambda _: ["neutral"])

    METHODS.register("looks", describe="of a test")(fit)
    try:
        found = run(
            causal, few, tmp_path / "out", tasks="CB", methods=["looks", "manual", "majority"], few_shot=6, seeds=3
        )
    finally:
        del METHODS["looks"]
    assert not found.failed
    assert len({str(rows) for rows in seen.values()}) == 3
    # The majority depends on what was drawn, a written prompt does not.
    counts = {name: sum(one.method == name for one in found.cells) for name in ("looks", "majority", "manual")}
    assert counts == {"looks": 3, "majority": 3, "manual": 1}


def test_no_method_sees_the_validation_part(causal: Backbone, few: Path, tmp_path: Path) -> None:
    seen: list[object] = []

    def fit(task: object, _: object) -> Solution:
        seen.append(task)
        return Solution.of_ranking(lambda _: ["neutral"])

    METHODS.register("curious", describe="of a test")(fit)
    try:
        run(causal, few, tmp_path / "out", tasks="CB", methods=["curious"])
    finally:
        del METHODS["curious"]
    assert all(str(row["premise"]) not in repr(seen) for row in cb(9, start=30))
    assert all(str(row["premise"]) in repr(seen) for row in [*cb(12), *cb(6, start=20)])


def test_the_majority_of_choices_is_the_place_that_is_right_most_often(
    causal: Backbone, few: Path, tmp_path: Path
) -> None:
    lines(few / "COPA/train.jsonl", [{**row, "label": 1} for row in copa(12)])
    found = run(causal, few, tmp_path / "out", tasks="COPA")
    assert found.tasks["COPA"]["majority"]["score"].value == pytest.approx(4 / 9)  # rows 31, 33, 35, 37 of 30 to 38
    rows = [
        json.loads(line)
        for line in (tmp_path / "out/cells/COPA/majority/seed-0/predictions.jsonl").read_text().splitlines()
    ]
    assert all(row["prediction"] == row["choices"][1] for row in rows)


def test_a_draw_of_rows(causal: Backbone, whole: Path, tmp_path: Path) -> None:
    found = run(causal, whole, tmp_path / "out", tasks="CB", limit=3)
    assert found.tasks["CB"]["majority"]["score"].n == 3


def test_all_methods_for_labels_and_choices() -> None:
    assert chosen_methods("majority,p-tuning+fine-tuning") == ["majority", "p-tuning+fine-tuning"]
    # The first equals manual on closed tasks; a head has to be named.
    assert set(chosen_methods("all")) == set(METHODS) - {"manual-restricted", "p-tuning+head", "p-tuning-v2+head"}


def test_tasks_by_name(few: Path, tmp_path: Path) -> None:
    assert [file.name for file in asked_tasks(few, "all")] == ["CB", "COPA", "ReCoRD", "WSC"]
    assert [file.name for file in asked_tasks(few, "rte,CB")] == ["RTE", "CB"]
    with pytest.raises(FileError, match="no shipped task 'CBB'"):
        asked_tasks(few, "CBB")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileError, match="holds no folder of a SuperGLUE task"):
        asked_tasks(tmp_path / "empty", "all")
    with pytest.raises(FileError, match="no such data folder"):
        asked_tasks(tmp_path / "nowhere", "all")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"few_shot": 1}, "few_shot is 1"),
        ({"pattern": 9}, "pattern is 9, and the task CB has 2"),
        ({"config": TrainConfig(train_backbone="full")}, "train_backbone"),
    ],
)
def test_settings_that_cannot_be(causal: Backbone, few: Path, tmp_path: Path, options: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        run(causal, few, tmp_path / "out", tasks="CB", **options)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_lists_every_cell(causal: Backbone, few: Path, tmp_path: Path) -> None:
    estimates: list[Any] = []
    run(causal, few, tmp_path / "out", methods=ALL, dry_run=True, watch=Watch(on_estimate=estimates.extend))
    assert len(estimates) == 4 * len(ALL)
    assert not any(one.is_finished for one in estimates)
    assert not (tmp_path / "out").exists()


def test_a_task_of_ones_own(causal: Backbone, tmp_path: Path) -> None:
    path = tmp_path / "mood.toml"
    path.write_text(
        'name = "mood"\nversion = "1"\nmetrics = ["macro_f1"]\n[labels]\ngood = ["good"]\nbad = ["bad"]\n'
        "[[patterns]]\nmanual = '{text} is [Y].'\n",
        encoding="utf-8",
    )
    rows = [{"text": f"film {at}", "label": ("good", "bad")[at % 2]} for at in range(12)]
    lines(tmp_path / "data/train.jsonl", rows)
    lines(tmp_path / "data/val.jsonl", rows[:4])
    assert isinstance(load_task(path), TaskFile)
    found = run(causal, tmp_path / "data", tmp_path / "out", tasks=str(path), methods=("majority", "p-tuning"))
    assert not found.failed
    assert list(found.tasks["mood"]["p-tuning"]) == ["score", "macro_f1"]


def test_a_task_whose_answers_are_written(causal: Backbone, tmp_path: Path) -> None:
    """Neither labels nor choices: every method answers in words."""
    path = tmp_path / "free.toml"
    path.write_text(
        'name = "free"\nversion = "1"\nmetrics = ["exact_match", "f1"]\n[[patterns]]\nmanual = \'{text} is [Y].\'\n',
        encoding="utf-8",
    )
    rows = [{"text": f"film {at}", "label": ("good", "a good film")[at % 2]} for at in range(12)]
    lines(tmp_path / "data/train.jsonl", rows)
    lines(tmp_path / "data/val.jsonl", rows[:4])
    methods = ("majority", "manual", "in-context", "p-tuning", "fine-tuning")
    found = run(causal, tmp_path / "data", tmp_path / "out", tasks=str(path), methods=methods)
    assert not found.failed
    assert [list(scores) for scores in found.tasks["free"].values()] == [["score", "exact_match", "f1"]] * 5


def test_two_files_of_one_name(causal: Backbone, few: Path, tmp_path: Path) -> None:
    """The first used to be left out without a word."""
    text = 'name = "one"\nversion = "1"\n[labels]\na = ["good"]\nb = ["bad"]\n[[patterns]]\nmanual = "{text} [Y]"\n'
    for name in ("one", "other"):
        (tmp_path / f"{name}.toml").write_text(f"# {name}\n{text}", encoding="utf-8")
    with pytest.raises(ConfigError, match="two task files have the name one"):
        run(causal, few, tmp_path / "out", tasks=f"{tmp_path}/one.toml,{tmp_path}/other.toml")
    assert [file.name for file in asked_tasks(few, "CB,CB")] == ["CB"]


PROGRAM = """
import sys
from ptuning import TrainConfig, load_backbone
from ptuning.experiment.suites import superglue
superglue(sys.argv[2], backbone=load_backbone(sys.argv[1], dtype="float32", device="cpu"), out=sys.argv[3], seeds=1,
          tasks="CB,COPA", methods=sys.argv[4].split(","),
          config=TrainConfig(epochs=8, batch_size=2, lr=0.01, patience=9, checkpoint_seconds=0.0))
"""


def test_killed_in_the_middle_of_a_cell_it_ends_as_if_it_had_not_been(
    model_folder: Callable[[str], Path], few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A classification head has no checkpoints; its cell begins anew. (Cells of prompts: test_suite.)"""
    method = "fine-tuning"

    def arguments(out: str) -> list[str]:
        return ["-c", str(model_folder("llama")), str(few), str(tmp_path / out), f"majority,{method}"]

    folder = tmp_path / f"cut/cells/COPA/{method}/seed-0"
    with forked(PROGRAM, *arguments("cut")[1:], folder=tmp_path / "said") as process:
        process.wait_until(folder.is_dir)
        process.kill()
    assert not (folder / "run.json").exists()
    for out in ("cut", "whole"):
        monkeypatch.setattr(sys, "argv", arguments(out))
        exec(PROGRAM, {})
    assert results_of(tmp_path / "cut") == results_of(tmp_path / "whole")
    said = [
        (tmp_path / out / "cells/COPA" / method / "seed-0/predictions.jsonl").read_bytes() for out in ("cut", "whole")
    ]
    assert said[0] == said[1]
