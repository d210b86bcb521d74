"""The commands that compare, end to end on tiny models: what they print, leave, refuse, and how they go on."""

from __future__ import annotations

import functools
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ptuning.cli import comparisons, terminal
from ptuning.cli.terminal import duration
from ptuning.experiment.cells import CellResult
from ptuning.experiment.comparison import Comparison, Watch
from ptuning.experiment.results import Collector
from ptuning.method.base import Solution
from ptuning.method.registry import METHODS
from ptuning.progress import Progress
from ptuning.report.results_file import Cell, MethodInfo, Results
from ptuning.training.run import TrainingRun
from tests.cli.test_app import call, fails, works
from tests.cli.test_terminal import Screen
from tests.experiment.test_compare import FACTS, LIST, ROWS, lines
from tests.experiment.test_comparison import timeless

MANUAL = "[X] is [Y] ."
QUICK = ("--epochs", "1", "--set", "batch_size=8")
UNTRAINED = ("--methods", "majority,manual")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undrawn: None) -> None:
    """Work in a folder with data of two kinds."""
    monkeypatch.chdir(tmp_path)
    for part, rows in (("train", FACTS[:12]), ("dev", FACTS[12:18]), ("test", FACTS[18:])):
        lines(tmp_path / f"{part}.jsonl", rows)
    lines(tmp_path / "LAMA" / "relations.jsonl", LIST)
    lines(tmp_path / "LAMA" / "TREx" / "P36.jsonl", ROWS)
    lines(tmp_path / "LAMA" / "TREx" / "P17.jsonl", ROWS[:10])


@pytest.fixture
def failing() -> Iterator[None]:
    """A method that always fails."""

    def fit(*_: object) -> Solution:
        raise ZeroDivisionError("one by [none]")

    METHODS.register("failing", describe="of a test")(fit)
    yield
    del METHODS["failing"]


def compare(llama: str, *options: object, quick: Sequence[object] = QUICK) -> tuple[object, ...]:
    data = ("--data", "train.jsonl", "--dev", "dev.jsonl", "--test", "test.jsonl", "--manual", MANUAL)
    return ("compare", *data, "--backbone", llama, "--out", "out", *quick, *options)


def lama(llama: str, *options: object, quick: Sequence[object] = QUICK) -> tuple[object, ...]:
    return ("compare", "--suite", "lama", "--data", "LAMA", "--backbone", llama, "--out", "out", *quick, *options)


def saved(out: str = "out") -> Any:
    return json.loads(Path(out, "results.json").read_text(encoding="utf-8"))


def test_compare(llama: str) -> None:
    done = call(*compare(llama, "--log-to", "csv"))
    assert done.code == 0, done.err
    for number, method in enumerate(("majority", "manual", "manual-restricted", "in-context", "p-tuning"), start=1):
        assert f"{number}/5  train  {method}  seed 0: P@1 0." in done.err
        assert method in done.out
    assert "train (n = records)" in done.out
    assert "p-tuning - manual: P@1 " in done.out
    assert "report:  out/report.html" in done.out
    results = saved()
    assert (results["suite"], list(results["tasks"])) == ("compare", ["train"])
    assert results["command"].startswith("ptuning compare --data train.jsonl ")
    assert results["settings"]["batch_size"] == 8
    assert "lora_rank" not in results["settings"]  # settings that act on none of the methods
    assert list(Path("out/log").rglob("log.csv")) == [Path("out/log/p-tuning-seed-0/train/try-1/log.csv")]
    again = call(*compare(llama, "--log-to", "csv"))
    assert (again.code, again.out) == (0, done.out)  # nothing was left to do
    assert "learned template: [P*3] [X] [P:is] [Y] ." in again.err
    assert saved() == results


@pytest.mark.parametrize(
    ("source", "name"), [("deep/my:facts.jsonl", "my"), ("deep/:facts.jsonl", "task"), ("deep/a.b.jsonl", "a.b")]
)
def test_a_task_is_named_after_its_file_and_stays_in_the_folder(llama: str, source: str, name: str) -> None:
    lines(Path(source), FACTS[:12])
    works(*compare(llama, "--methods", "majority", quick=()), "--data", source)
    assert [path.name for path in Path("out/cells").iterdir()] == [name]


def test_lama_with_all_options(llama: str) -> None:
    Path("words.txt").write_text("yes\ngood\ngreat\n", encoding="utf-8")
    Path("learn.txt").write_text("[P*2] [X]\n[P*2] [Y]\n", encoding="utf-8")
    out = works(
        *lama(llama, "--methods", "majority,p-tuning,p-tuning@random-weights", "--seeds", 2, "--arg", "tries=2"),
        *("--task", "1-1", "--vocabulary", "words.txt", "--arg", "limit=12", "--train-size", 6),
        *("--arg", "split-seed=3", "--arg", "targets=token", "--set", "encoder=none", "--set", "num_restarts=2"),
        *("--template", "@learn.txt", "--set", "seed=5"),
    )
    assert "P36 (n = records)" in out
    assert "p-tuning - p-tuning@random-weights: P@1" in out
    results = saved()
    assert [(cell["method"], cell["seed"], cell["tried"]) for cell in results["cells"]] == [
        ("majority", 5, 1), ("p-tuning", 5, 2), ("p-tuning@random-weights", 5, 2),
        ("p-tuning", 6, 2), ("p-tuning@random-weights", 6, 2),
    ]  # fmt: skip
    task = results["task_info"]["P36"]
    assert (task["data"]["train"]["rows"], task["template"]) == (6, "[P*2] [X]\n[P*2] [Y]")
    wanted = {
        "limit": 12,
        "train_size": 6,
        "split_seed": 3,
        "seeds": 2,
        "tries": 2,
        "num_restarts": 2,
        "encoder": "none",
    }
    assert wanted.items() <= results["settings"].items()


def test_lama_on_several_relations_prints_means(llama: str) -> None:
    out = works(*lama(llama, *UNTRAINED, quick=()))
    assert "mean over 2 tasks (n = tasks)" in out
    assert "N-1 (n = tasks)" in out
    assert "P17 (n = records)" in out


def test_own_facts_and_a_line_for_each_relation(llama: str) -> None:
    """The number of facts left is printed before anything runs, in a dry run too."""
    long = [{"land": f"Peru {at}", "town": "a good film"} for at in range(3)]
    own = [{"relation": "P1", "land": row["sub_label"], "town": row["obj_label"]} for row in ROWS]
    lines(
        Path("own.jsonl"),
        [*own, *({"relation": "P2", **row} for row in long), *({**row, "relation": "P2"} for row in own)],
    )
    args: tuple[object, ...] = (
        "compare",
        "--suite",
        "lama",
        "--data",
        "own.jsonl",
        "--backbone",
        llama,
        *UNTRAINED,
        "--out",
        "o",
    )
    args = (*args, "--field", "sub_label=land", "--field", "obj_label=town")
    fails(*args, says=["P1", "own.jsonl", "--manual"])
    done = call(*args, "--manual", "[X] is [Y]", "--dry-run")
    assert done.code == 0, done.err
    assert "P1: 20 of 20 facts kept: 12 train, 4 dev, 4 test\n" in done.err
    assert "P2: 20 of 23 facts kept: " in done.err
    assert "dropped: 3 object is not one token (--arg targets=any keeps these)\n" in done.err
    assert not Path("o").exists()


def test_superglue(llama: str) -> None:
    labels = ("entailment", "contradiction", "neutral")
    for part, count in (("train", 12), ("dev32", 12), ("val", 9)):
        rows = [
            {"premise": f"{part} {at}", "hypothesis": "a film", "label": labels[at % 3], "idx": at}
            for at in range(count)
        ]
        lines(Path("GLUE/CB") / f"{part}.jsonl", rows)
    command: tuple[object, ...] = (
        "compare",
        "--suite",
        "superglue",
        "--data",
        "GLUE",
        "--backbone",
        llama,
        "--out",
        "out",
        *QUICK,
    )
    command = (*command, "--methods", "majority,p-tuning")
    done = call(*command, "--task", "CB", "--seeds", 2)
    assert done.code == 0, done.err
    assert "1/3  CB  majority  seed 0: score 0." in done.err
    assert "macro F1  [95 % interval]" in done.out
    assert "confusion of CB, p-tuning, 2 seeds added up: a row for each target" in done.out
    assert Path("out/pictures/confusion-1.svg").is_file()
    results = saved()
    assert (results["suite"], results["settings"]["few_shot"]) == ("superglue", None)
    again = call(*command, "--task", "CB", "--seeds", 2)
    assert (again.code, again.out, again.err) == (0, done.out, "")  # nothing was left to do
    works(*command, "--train-size", "8", "--overwrite", "--seeds", 1)
    assert saved()["settings"]["few_shot"] == 8
    assert saved()["task_info"]["CB"]["data"]["train"]["rows"] == 8
    fails(*command, "--task", "CBB", says=["'CBB'"])


def test_reports_are_made_again_of_the_json_and_over_folders(llama: str) -> None:
    for name in ("lstm", "none"):
        out = works(
            *compare(llama, "--methods", "manual,p-tuning", "--set", f"encoder={name}"), "--out", f"runs/{name}"
        )
        assert f"report:  runs/{name}/report.html" in out
    pages = {path.name: path.read_bytes() for path in Path("runs/lstm").glob("report.*")}
    for name in pages:
        Path("runs/lstm", name).unlink()
    assert works("report", "runs/lstm") == "runs/lstm/report.html\n"
    assert {path.name: path.read_bytes() for path in Path("runs/lstm").glob("report.*")} == pages
    assert works("report", "runs/lstm", "runs/none", "--latex", "--csv") == "runs/report/report.html\n"
    assert Path("runs/report/tables/table-01-scores.tex").is_file()
    assert Path("runs/report/tables/table-01-scores.csv").is_file()
    assert works("report", "runs/lstm", "runs/none", "--out", "both") == "both/report.html\n"
    assert "| p-tuning (lstm) - p-tuning (none) |" in Path("both/report.md").read_text(encoding="utf-8")
    Path("mine").mkdir()
    Path("mine/report.html").write_text("mine", encoding="utf-8")
    fails("report", "runs/lstm", "runs/none", "--out", "mine", says=["mine/report.html"])
    fails("report", "missing", says=["missing"])


def test_an_ablation_is_further_columns_of_one_table(llama: str) -> None:
    out = works(*compare(llama, "--methods", "manual,p-tuning", "--vary", "encoder=mlp,none"))
    assert "p-tuning - p-tuning encoder=mlp: P@1 " in out
    assert list(saved()["methods"]) == ["manual", "p-tuning", "p-tuning encoder=mlp", "p-tuning encoder=none"]


def test_a_dry_run_prints_cells_and_leaves_nothing(llama: str) -> None:
    works(*compare(llama, "--methods", "manual", quick=()))
    before = saved()
    out = works(*compare(llama, "--methods", "manual,p-tuning", "--seeds", 2, "--dry-run"))
    assert "train  manual  seed 0: finished\n" in out
    assert "train  p-tuning  seed 1: unknown\n" in out
    assert "2 of 3 cells to run, estimated time: unknown; nothing was run\n" in out
    assert "report:" not in out
    assert saved() == before
    assert not Path("out/cells/train/p-tuning").exists()


@pytest.mark.usefixtures("failing")
def test_a_failed_cell_ends_with_exit_code_1_after_the_others(llama: str) -> None:
    done = call(*compare(llama, "--methods", "failing,manual", quick=()))
    assert done.code == 1
    assert "failed: cells/train/failing/seed-0: one by [none]\n" in done.out
    assert "Traceback" not in done.err
    assert {cell["method"]: cell["status"] for cell in saved()["cells"]} == {"failing": "failed", "manual": "done"}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--methods", "p-tunning"), ["'p-tunning'", "'p-tuning'"]),
        (("--methods", ","), ["no methods"]),
        (("--arg", "tries=9"), ["9", "5"]),
        (("--arg", "trys=2"), ["'trys'", "'tries'"]),
        (("--set", "train_backbone=full"), ["train_backbone", "fine-tuning"]),
        (("--set", "epoch=3"), ["'epoch'", "epochs"]),
        (("--vary", "encoder=gru"), ["encoder", "'gru'"]),
        (("--vocabulary", "words.txt"), ["words.txt"]),
        (("--template", "[X] [Y]"), ["no slots"]),
        # Options without effect on any of the methods.
        ((*UNTRAINED, "--epochs", "50"), ["epochs", "majority"]),
        ((*UNTRAINED, "--set", "encoder=none"), ["encoder"]),
        ((*UNTRAINED, "--arg", "tries=3"), ["tries"]),
        (("--methods", "p-tuning", "--set", "lora_rank=3"), ["lora_rank"]),
        (("--methods", "fine-tuning", "--vary", "lora_rank=3"), ["lora_rank"]),
    ],
)
def test_what_comparisons_refuse(llama: str, options: tuple[str, ...], says: list[str]) -> None:
    fails(*compare(llama, *options, quick=()), says=says)
    fails(*lama(llama, *options, quick=()), says=says)


def test_what_does_not_go_with_a_suite_is_refused(llama: str) -> None:
    fails(*lama(llama, "--task", "P63"), says=["'P63'", "'P36'"])
    fails(*lama(llama, "--arg", "targets=tokens"), says=["'tokens'"])
    fails(*lama(llama, "--metrics", "bleu"), says=["--metrics", "lama"])
    fails(*lama(llama, "--test", "test.jsonl"), says=["--test", "lama"])
    fails(*compare(llama, "--arg", "limit=3"), says=["limit", "--suite"])
    fails(*compare(llama, "--suite", "glue"), says=["'glue'"])
    fails(*compare(llama), "--test", "tset.jsonl", says=["tset.jsonl", "test.jsonl"])
    fails(*compare(llama, "--manual", "@none.txt"), says=["none.txt"])


def test_results_of_other_settings_are_an_error_that_names_them(llama: str) -> None:
    works(*compare(llama, "--methods", "p-tuning"))
    other = compare(llama, "--methods", "p-tuning", "--set", "encoder=none")
    fails(*other, says=["out", "encoder was lstm and is none", "--overwrite", "--vary encoder=none"])
    works(*other, "--overwrite")
    assert saved()["settings"]["encoder"] == "none"


def interrupting(times: int, number: int = signal.SIGINT) -> Callable[..., object]:
    """Return a stand-in for training that sends this process signals at its first step."""
    real, left = TrainingRun.train, times

    def train(*args: Any, report: Callable[[Progress], None], **named: Any) -> object:
        def watch(progress: Progress) -> None:
            nonlocal left
            report(progress)
            while left and progress.stage == "train":
                left -= 1
                signal.raise_signal(number)

        return real(*args, report=watch, **named)

    return train


def test_parts_say_what_collects_them(llama: str) -> None:
    args = compare(llama, "--methods", "majority,manual,p-tuning")
    out = works(*args, "--part", "2/2", "--log-to", "csv")
    assert out.startswith("part 2/2: 1 of 1 cells are done in out/cells\n")
    assert "the same command without --part collects them" in out
    assert not Path("out/results.json").exists()
    works(*args, "--part", "1/2", "--log-to", "csv")
    assert [path.parts[2] for path in Path("out/log").rglob("log.csv")] == ["part-1-of-2"]
    assert "p-tuning - manual: P@1" in works(*args)
    assert [cell["status"] for cell in saved()["cells"]] == ["done"] * 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--part", "4/2"), "there is no part 4"),
        (("--part", "9/9"), "there are only 2 jobs to share"),
        (("--part", "first"), "part 'first' is not K/N"),
        (("--gpus-per-worker", "0.5"), "--gpus-per-worker goes with --workers or --ray"),
        (("--workers", "2", "--gpus-per-worker", "-1"), "GPUs per worker is -1"),
        (("--workers", "2", "--model-arg", "shard=tp"), "workers have a whole backbone each: leave out shard=tp"),
        (("--model-arg", "shard=tp"), "shard=tp is for train and fleet"),
    ],
)
def test_a_command_that_cannot_be_divided_so_runs_nothing(llama: str, options: tuple[str, ...], said: str) -> None:
    fails(*compare(llama, *UNTRAINED, quick=()), *options, says=[said])


@pytest.mark.parametrize("dry_run", [False, True])
def test_what_workers_need_is_asked_for_before_the_backbone_is_loaded(
    dry_run: bool, llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large one takes minutes. What would be done is told without."""
    monkeypatch.setitem(sys.modules, "ray", None)
    args = compare(llama, *UNTRAINED, "--workers", "2", quick=())
    if dry_run:
        assert "nothing was run" in works(*args, "--dry-run")
    else:
        monkeypatch.setattr("ptuning.cli.inputs.load", lambda _: pytest.fail("it was loaded"))
        fails(*args, says=["need the package ray", "ptuning[ray]"])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_in_a_cell_says_how_to_go_on_and_the_end_is_the_same(
    llama: str, number: int, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = compare(llama, "--methods", "manual,p-tuning")
    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "train", interrupting(1, number))
        done = call(*args)
    assert (done.code, done.out) == (code, "")
    assert "Traceback" not in done.err
    message = done.err[done.err.index("stopped in epoch 1 of 1") :]
    assert f"; out/results.json is kept, go on with:\n  {terminal.program()} compare --data train.jsonl " in message
    assert "--resume" not in message
    assert [cell["status"] for cell in saved()["cells"]] == ["done", "waiting"]
    assert call("report", "out").code == 0
    assert Path("out/cells/train/p-tuning/seed-0/try-1/checkpoint").is_dir()
    works(*args)
    whole = timeless(saved())
    Path("out").rename("cut")
    works(*args)
    assert timeless(saved()) == whole
    assert {path.name for path in Path("out/cells/train/p-tuning/seed-0").iterdir()} == {
        path.name for path in Path("cut/cells/train/p-tuning/seed-0").iterdir()
    }


def test_a_second_ctrl_c_stops_at_once(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingRun, "train", interrupting(2))
    done = call(*compare(llama, "--methods", "p-tuning"))
    assert done.code == 130
    assert "stopped at once; out/results.json is kept, go on with:\n" in done.err


def test_an_interrupted_cell_is_not_mixed_with_other_settings(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It used to end as a failed cell that --overwrite did not mend."""
    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "train", interrupting(1))
        assert call(*compare(llama, "--methods", "p-tuning")).code == 130
    other = compare(llama, "--methods", "p-tuning", "--set", "encoder=mlp")
    fails(*other, says=["made with other settings", "encoder was lstm and is mlp"])
    works(*other, "--overwrite")
    assert [cell["status"] for cell in saved()["cells"]] == ["done"]


# -------------------------------------------------------------------------------------------------- what is printed


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[str, str]]:
    """Return what was printed on the standard output and on the error stream, on 80 columns."""
    for name in ("results", "_errors"):
        monkeypatch.setattr(
            terminal, name, lambda name=name: Console(width=80, highlight=False, emoji=False, stderr=name == "_errors")
        )

    def read() -> tuple[str, str]:
        found = capsys.readouterr()
        return found.out, found.err

    return read


def done(task: str, method: str, hits: Sequence[float], **more: object) -> CellResult:
    values: Mapping[str, Sequence[float]] = {"p_at_1": hits, "p_at_10": [1.0] * len(hits), "mrr": hits}
    return CellResult(Cell(task, method, 0), "done", {**values, "exact_match": hits}, 3.4, **more)  # type: ignore[arg-type]


def collected(*cells: CellResult, types: Mapping[str, str | None] | None = None) -> Results:
    kinds = types or {cell.cell.task: None for cell in cells}
    names = ["majority", "manual", "p-tuning"]
    methods = {name: MethodInfo(learns_slots=name == "p-tuning") for name in names}
    return Collector(Results("lama", folder=Path("runs/x"), methods=methods), names, kinds).collect(cells)


def test_a_line_per_new_cell(printed: Callable[[], tuple[str, str]]) -> None:
    comparisons.show_cell(done("P36", "manual", [1, 0, 0, 0]), 2, 9)
    comparisons.show_cell(done("P36", "majority", [1, 0], was_there=True), 3, 9)
    comparisons.show_cell(CellResult(Cell("P36", "p-tuning", 1), "failed", error="no [room]"), 4, 9)
    assert printed() == (
        "",
        "2/9  P36  manual  seed 0: P@1 0.250  [0.046, 0.699], n = 4, 3 s\n"
        "4/9  P36  p-tuning  seed 1: failed: no [room]\n",
    )


def test_the_results_of_one_task(printed: Callable[[], tuple[str, str]]) -> None:
    comparisons.show_results(collected(done("P36", "manual", [0, 0, 0, 1]), done("P36", "p-tuning", [1, 1, 0, 1])))
    out, err = printed()
    assert err == ""
    assert "P36 (n = records)\n" in out
    assert "mean over" not in out
    header = next(line for line in out.splitlines() if "method" in line)
    # P@1 is exact match here, and P@10 stands in the report.
    assert "P@1  [95 % interval]" in header
    assert "MRR  [95 % interval]" in header
    assert "exact match" not in header
    assert "P@10" not in header
    row = next(line for line in out.splitlines() if line.strip().startswith("p-tuning "))
    assert "0.750  [" in row
    assert row.split()[-1] == "4"
    assert "p-tuning - manual: P@1 +0.500  [" in out
    assert out.endswith("report:  runs/x/report.html  (report.md, results.json and cells/ beside it)\n")
    assert max(map(len, out.splitlines()[:-1])) <= 80


def test_scores_that_do_not_fit_beside_each_other_stand_below(printed: Callable[[], tuple[str, str]]) -> None:
    values = {"coverage": [0.0] * 4, "invented": [1.0, 0, 0, 1], "bleu": [50.0, 60, 40, 30]}
    cells = [CellResult(Cell("texts", name, 0), "done", values, 3.4) for name in ("manual", "p-tuning")]
    comparisons.show_cell(CellResult(Cell("texts", "manual", 0), "done", {"bleu": [50.0] * 4}, 3.4), 1, 2)
    comparisons.show_results(collected(*cells))
    out, err = printed()
    assert "bleu 50.000  n = 4, 3 s" in err
    heads = [line.split("  ") for line in out.splitlines() if line.strip().startswith("method ")]
    assert [[one.strip() for one in head if one.strip()] for head in heads] == [
        ["method", "coverage", "[95 % interval]", "invented", "[95 % interval]", "n"],
        ["method", "bleu", "[95 % interval]", "n"],
    ]
    rows = [line for line in out.splitlines() if line.strip().startswith("p-tuning ")]
    assert [row.split()[-1] for row in rows[:2]] == ["4", "4"]
    assert "…" not in out


def test_the_results_of_many_tasks(printed: Callable[[], tuple[str, str]]) -> None:
    tasks = [f"P{number}" for number in range(4)]
    cells = [done(task, method, [1, 0]) for task in tasks for method in ("majority", "manual")]
    comparisons.show_results(collected(*cells, types=dict.fromkeys(tasks[:2], "1-1") | dict.fromkeys(tasks[2:], None)))
    out, _ = printed()
    assert "mean over 4 tasks (n = tasks)" in out
    assert "1-1 (n = tasks)" in out
    assert "P0 (n = records)" not in out  # too many for a terminal
    assert "majority - manual" not in out


def test_nothing_but_failures(printed: Callable[[], tuple[str, str]]) -> None:
    comparisons.show_results(collected(CellResult(Cell("P36", "manual", 0), "failed", error="no room")))
    out, _ = printed()
    assert out.startswith("failed: cells/P36/manual/seed-0: no room\n")


def test_estimates(printed: Callable[[], tuple[str, str]]) -> None:
    known = [
        CellResult(Cell("P36", "manual", 0), "waiting", was_there=True, seconds=3.0),
        CellResult(Cell("P36", "p-tuning", 0), "waiting", seconds=90.0),
        CellResult(Cell("P36", "p-tuning", 1), "waiting", seconds=4000.0),
    ]
    comparisons.show_estimates(known)
    out, _ = printed()
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.strip()}
    assert rows["manual"] == ["1", "1", "0", "s"]
    assert rows["p-tuning"] == ["2", "0", "1", "h", "08", "min"]
    assert "P36  manual  seed 0: finished\nP36  p-tuning  seed 0: 2 min\nP36  p-tuning  seed 1: 1 h 07 min\n" in out
    assert out.endswith("2 of 3 cells to run, estimated time: 1 h 08 min; nothing was run\n")
    comparisons.show_estimates([*known, CellResult(Cell("P36", "in-context", 0), "waiting")])
    out, _ = printed()
    assert "P36  in-context  seed 0: unknown\n" in out
    assert "3 of 4 cells to run, estimated time: 1 h 08 min + unknown; nothing was run\n" in out
    assert "unknown: no cell of this method is finished" in out


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.0, "0 s"), (59.0, "59 s"), (60.0, "1 min"), (3570.0, "1 h 00 min"), (7500.0, "2 h 05 min")],
)
def test_times(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_a_terminal_has_a_bar_for_every_stage_that_a_suite_reports(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Every comparison on a terminal ended in a KeyError: tests do not run on one."""
    screen = Screen()
    console = Console(file=screen, force_terminal=True, width=80, color_system=None)
    monkeypatch.setattr(terminal, "_errors", lambda: console)
    told: list[Progress] = []

    class Stub(Comparison):
        def __init__(self) -> None:
            """Takes nothing: its cells are all there."""
            self.out, self.workers, self.watch = tmp_path, None, Watch(report=tell)

        @functools.cached_property
        def cells(self) -> list[Cell]:
            return [Cell("P36", "manual", 0), Cell("P36", "p-tuning", 0)]

        def _trains_together(self, cells: Sequence[Cell]) -> bool:
            return False

        def load(self, folder: str) -> CellResult:
            cell = self._by_folder[folder]
            return done(cell.task, cell.method, [1.0], was_there=True)

    with terminal.bar() as report:

        def tell(progress: Progress) -> None:
            told.append(progress)
            report(progress)

        for result in Stub().results():
            comparisons.show_cell(result, 1, 2)
        report(Progress("suite", 1, 2, "P36 p-tuning"))
        time.sleep(0.15)  # two frames
    assert [(progress.stage, progress.done, progress.total) for progress in told] == [
        ("suite", 0, 2), ("suite", 1, 2), ("suite", 2, 2),
    ]  # fmt: skip
    assert "comparing" in screen.getvalue()
