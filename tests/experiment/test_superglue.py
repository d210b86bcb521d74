"""SuperGLUE on tiny models and made-up folders: parts, draws, scores, options that cannot be."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from ptuning.backbone.backbone import Backbone
from ptuning.config import TrainConfig
from ptuning.data.questions import Questions
from ptuning.data.splits import draw_few, draw_questions
from ptuning.data.task_files import load_task
from ptuning.errors import ConfigError, FileError, RecordError
from ptuning.experiment.compare import unrestricted_methods
from ptuning.experiment.suites import superglue, superglue_tasks, task_job
from ptuning.method.base import Setup, Solution
from ptuning.method.registry import METHODS
from ptuning.report.results_file import Results, read_answers
from tests.experiment.test_comparison import results_of

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
            "passage": {"text": text, "entities": [{"start": span["start"], "end": span["end"]} for span in spans]},
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
    results = run(causal, few, tmp_path / "out", methods=ALL, seeds=2)
    # Two sentences with their questions do not fit into the 64 tokens that a tiny model reads.
    assert {(cell.task, cell.method) for cell in results.failed} == {("WSC", "in-context")}
    assert {task: list(results.tasks[task]["manual"]) for task in results.tasks} == {
        "CB": ["score", "accuracy", "macro_f1"],
        "COPA": ["score", "accuracy"],
        "ReCoRD": ["score", "exact_match", "f1"],
        "WSC": ["score", "accuracy"],
    }
    # Methods that draw nothing run once; the mean over tasks is over the score of each task.
    seeds = {name: len({cell.seed for cell in results.cells if cell.method == name}) for name in ALL}
    assert seeds == {**dict.fromkeys(ALL, 2), "majority": 1, "manual": 1}
    manual = [results.tasks[task]["manual"]["score"].value for task in results.tasks]
    assert results.macro["manual"]["score"].value == pytest.approx(sum(manual) / 4)
    learned = results.tasks["CB"]["p-tuning"]["score"]
    assert learned.seeds == 2
    assert learned.lowest is not None
    assert learned.lowest <= learned.value
    agreement = results_of(tmp_path / "out")["agreement"]["cells"]
    assert len(agreement) == 4 * 4 * 2 - 2  # four methods choose something
    for row in agreement:
        folder = tmp_path / "out/cells" / row["task"] / row["method"] / f"seed-{row['seed']}"
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        hits = [answer.answer.hit for answer in read_answers(folder / "predictions.jsonl")]
        assert (row["dev"], row["test"]) == (record["chosen"]["dev_score"], sum(hits) / len(hits))
    page = (tmp_path / "out/report.md").read_text(encoding="utf-8")
    assert "Development and reported score" in page
    assert "ReCoRD: without a validation part" in page


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


def test_groups_are_never_cut(whole: Path) -> None:
    job = task_job(load_task("MultiRC"), whole, seeds=[0])
    groups = [{row.group for row in part} for part in (job.task.train, job.task.dev, job.test)]
    assert not groups[0] & groups[1]
    assert [len(part) for part in (job.task.train, job.task.dev)] == [2 * len(group) for group in groups[:2]]
    drawn = draw_questions(job.test, 5, seed=0)
    assert len(drawn) == 6  # three questions of two answers
    assert [row for row in job.test if row in drawn] == list(drawn)
    first, second = draw_few(Questions([*job.task.train, *job.task.dev]), 4, seed=1)
    assert len({row.group for row in first}) == len({row.group for row in second}) == 4  # a question is one example
    assert len(first) == 8


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


def test_each_seed_of_a_few_shot_run_has_examples_of_its_own(causal: Backbone, few: Path, tmp_path: Path) -> None:
    seen: dict[int, str] = {}

    def fit(task: Any, setup: Setup) -> Solution:
        seen[setup.seed] = str([row.record for row in task.train])
        return Solution.of_ranking(lambda _: ["neutral"])

    METHODS.register("looks", describe="of a test")(fit)
    try:
        options: dict[str, Any] = {"methods": ["looks", "manual", "majority"], "few_shot": 6, "seeds": 3, "limit": 3}
        results = run(causal, few, tmp_path / "out", tasks="CB", **options)
    finally:
        del METHODS["looks"]
    assert not results.failed
    assert len(set(seen.values())) == 3
    assert not [row for row in cb(9, start=30) if str(row["premise"]) in str(seen)], "the reported part"
    # The majority depends on the draw, a manual prompt does not.
    counts = {name: sum(cell.method == name for cell in results.cells) for name in ("looks", "majority", "manual")}
    assert counts == {"looks": 3, "majority": 3, "manual": 1}
    assert results.tasks["CB"]["majority"]["score"].n == 3


def test_the_majority_of_choices_is_the_place_that_is_right_most_often(
    causal: Backbone, few: Path, tmp_path: Path
) -> None:
    lines(few / "COPA/train.jsonl", [{**row, "label": 1} for row in copa(12)])
    results = run(causal, few, tmp_path / "out", tasks="COPA")
    assert results.tasks["COPA"]["majority"]["score"].value == pytest.approx(4 / 9)  # rows 31, 33, 35, 37 of 30 to 38
    rows = [
        json.loads(line)
        for line in (tmp_path / "out/cells/COPA/majority/seed-0/predictions.jsonl").read_text().splitlines()
    ]
    assert all(row["prediction"] == row["choices"][1] for row in rows)


def test_tasks_and_methods_by_name(few: Path) -> None:
    assert [file.name for file in superglue_tasks(few, "all")] == ["CB", "COPA", "ReCoRD", "WSC"]
    assert [file.name for file in superglue_tasks(few, "rte,CB,CB")] == ["RTE", "CB"]
    assert unrestricted_methods("majority,p-tuning+fine-tuning", "superglue") == ["majority", "p-tuning+fine-tuning"]
    # The first equals manual on closed tasks; a head has to be named.
    left_out = {"manual-restricted", "p-tuning+head", "p-tuning-v2+head"}
    assert set(unrestricted_methods("all", "superglue")) == set(METHODS) - left_out


TASK = 'name = "one"\nversion = "1"\n[labels]\na = ["good"]\nb = ["bad"]\n[[patterns]]\nmanual = "{text} [Y]"\n'


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"few_shot": 1}, ConfigError, "few_shot is 1"),
        ({"limit": 1}, ConfigError, "limit is 1"),
        ({"pattern": 9}, ConfigError, "pattern is 9.*CB has 2"),
        ({"config": TrainConfig(train_backbone="full")}, ConfigError, "train_backbone"),
        ({"tasks": ""}, ConfigError, "no tasks"),
        ({"tasks": "CBB"}, FileError, "'CBB'"),
        ({"tasks": "one.toml,other.toml"}, ConfigError, "the name one"),
        ({"tasks": "BoolQ"}, FileError, "BoolQ"),
        ({"tasks": "all", "data": "empty"}, FileError, "empty"),
        ({"tasks": "all", "data": "nowhere"}, FileError, "nowhere"),
        ({"data": "unlabelled"}, FileError, "'val' part of the task CB"),
    ],
)
def test_options_that_cannot_be(
    causal: Backbone, few: Path, monkeypatch: pytest.MonkeyPatch, options: Any, error: type[Exception], named: str
) -> None:
    monkeypatch.chdir(few)
    Path("empty").mkdir()
    lines(few / "unlabelled/CB/train.jsonl", cb(12))
    for name in ("one", "other"):
        Path(f"{name}.toml").write_text(f"# {name}\n{TASK}", encoding="utf-8")
    options = {"tasks": "CB", **options}
    with pytest.raises(error, match=named):
        run(causal, few / options.pop("data", ""), few / "out", **options)
    assert not (few / "out").exists()


@pytest.mark.parametrize(
    ("answers", "metrics", "labels"),
    [
        ('metrics = ["macro_f1"]\n[labels]\ngood = ["good"]\nbad = ["bad"]', ["macro_f1"], ("good", "bad")),
        # Neither labels nor choices: every method answers in words.
        ('metrics = ["exact_match", "f1"]', ["exact_match", "f1"], ("good", "a good film")),
    ],
)
def test_a_task_of_ones_own(
    causal: Backbone, tmp_path: Path, answers: str, metrics: list[str], labels: tuple[str, str]
) -> None:
    path = tmp_path / "mood.toml"
    text = f"name = 'mood'\nversion = '1'\n{answers}\n[[patterns]]\nmanual = '{{text}} is [Y].'\n"
    path.write_text(text, encoding="utf-8")
    rows = [{"text": f"film {at}", "label": labels[at % 2]} for at in range(12)]
    lines(tmp_path / "data/train.jsonl", rows)
    lines(tmp_path / "data/val.jsonl", rows[:4])
    methods = ("majority", "manual", "in-context", "p-tuning", "fine-tuning")
    results = run(causal, tmp_path / "data", tmp_path / "out", tasks=str(path), methods=methods)
    assert not results.failed
    assert [list(scores) for scores in results.tasks["mood"].values()] == [["score", *metrics]] * 5
