"""`ptuning compare` and `report` on tiny models: what they print, leave, refuse, and how they continue."""

import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from ptuning.cli import comparisons, terminal
from ptuning.experiment.cells import CellResult
from ptuning.experiment.results import Collector
from ptuning.method.base import Solution
from ptuning.method.registry import METHODS
from ptuning.report.results_file import Cell, MethodInfo, Results
from ptuning.training.run import TrainingRun
from tests.cli.calls import call, fails, interrupting, json_of, works
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


def saved() -> Any:
    return json_of("out/results.json")


def test_compare(llama: str) -> None:
    args = compare(llama, "--methods", "majority,manual,p-tuning", "--vary", "encoder=none", "--log-to", "csv")
    done = call(*args)
    assert done.code == 0, done.err
    for number, method in enumerate(("majority", "manual", "p-tuning", "p-tuning encoder=none"), start=1):
        assert f"{number}/4  train  {method}  seed 0: P@1 0." in done.err
        assert method in done.out
    for text in ("95 % intervals", "p-tuning - manual", "report:  out/report.html"):
        assert text in done.out
    results = saved()
    assert (results["suite"], list(results["tasks"])) == ("compare", ["train"])
    assert results["command"].startswith("ptuning compare --data train.jsonl ")
    assert results["settings"]["batch_size"] == 8
    assert "lora_rank" not in results["settings"]  # settings that act on none of the methods
    assert len(list(Path("out/log").rglob("log.csv"))) == 2
    again = call(*args)
    assert (again.code, again.out) == (0, done.out)  # nothing was left to do
    assert "learned template: [P*3] [X] [P:is] [Y] ." in again.err
    assert saved() == results
    fails(*args, "--set", "dropout=0.5", says=["out", "dropout was", "overwrite"])


@pytest.mark.parametrize(("source", "name"), [("deep/my:facts.jsonl", "my"), ("deep/:facts.jsonl", "task")])
def test_a_task_is_named_after_its_file_and_stays_in_the_folder(llama: str, source: str, name: str) -> None:
    lines(Path(source), FACTS[:12])
    works(*compare(llama, "--methods", "majority", quick=()), "--data", source)
    assert [path.name for path in Path("out/cells").iterdir()] == [name]


def test_lama_with_all_options(llama: str) -> None:
    Path("words.txt").write_text("yes\ngood\ngreat\n", encoding="utf-8")
    Path("learn.txt").write_text("[P*2] [X]\n[P*2] [Y]\n", encoding="utf-8")
    extra = [f"--arg={pair}" for pair in ("tries=2", "limit=12", "split-seed=3", "targets=token")]
    out = works(
        *lama(llama, "--methods", "majority,p-tuning,p-tuning@random-weights", "--seeds", 2, *extra),
        *("--task", "1-1", "--vocabulary", "words.txt", "--train-size", 6, "--template", "@learn.txt"),
        *("--set", "encoder=none", "--set", "num_restarts=2", "--set", "seed=5"),
    )
    assert "p-tuning@random-weights" in out
    results = saved()
    assert [(cell["method"], cell["seed"], cell["tried"]) for cell in results["cells"]] == [
        ("majority", 5, 1), ("p-tuning", 5, 2), ("p-tuning@random-weights", 5, 2),
        ("p-tuning", 6, 2), ("p-tuning@random-weights", 6, 2),
    ]  # fmt: skip
    task = results["task_info"]["P36"]
    assert (task["data"]["train"]["rows"], task["template"]) == (6, "[P*2] [X]\n[P*2] [Y]")
    wanted = {"limit": 12, "train_size": 6, "split_seed": 3, "seeds": 2, "tries": 2, "num_restarts": 2}
    assert wanted.items() <= results["settings"].items()


def test_own_facts_and_a_line_for_each_relation(llama: str) -> None:
    """The number of facts left is printed before anything runs, in a dry run too."""
    long = [{"relation": "P2", "land": f"Peru {at}", "town": "a good film"} for at in range(3)]
    own = [{"land": row["sub_label"], "town": row["obj_label"]} for row in ROWS]
    lines(Path("own.jsonl"), [{"relation": name, **row} for name in ("P1", "P2") for row in own] + long)
    fields = ("--field", "sub_label=land", "--field", "obj_label=town")
    args = (*lama(llama, *UNTRAINED, *fields, quick=()), "--data", "own.jsonl", "--out", "o")
    fails(*args, says=["P1", "own.jsonl", "manual"])
    done = call(*args, "--manual", "[X] is [Y]", "--dry-run")
    assert done.code == 0, done.err
    assert "P1: 20 of 20 facts kept: 12 train, 4 dev, 4 test\n" in done.err
    assert "P2: 20 of 23 facts kept: " in done.err
    assert "dropped: 3 object is not one token (--arg targets=any keeps these)\n" in done.err
    assert not Path("o").exists()


def test_superglue(llama: str) -> None:
    labels = ("entailment", "contradiction", "neutral")
    for part, count in (("train", 12), ("dev32", 12), ("val", 9)):
        rows = [{"premise": f"{part} {at}", "hypothesis": "a film", "label": labels[at % 3]} for at in range(count)]
        lines(Path("GLUE/CB") / f"{part}.jsonl", [{**row, "idx": at} for at, row in enumerate(rows)])
    options = ("--methods", "majority,p-tuning", "--train-size", "8", "--seeds", "2", "--out", "out", *QUICK)
    args = ("compare", "--suite", "superglue", "--data", "GLUE", "--backbone", llama, *options)
    done = call(*args, "--task", "CB")
    assert done.code == 0, done.err
    assert "1/4  CB  majority  seed 0: score 0." in done.err
    assert "macro F1" in done.out
    assert "confusion of CB, p-tuning, 2 seeds added up" in done.out
    assert saved()["settings"]["few_shot"] == 8
    assert saved()["task_info"]["CB"]["data"]["train"]["rows"] == 8
    again = call(*args, "--task", "CB")
    assert (again.code, again.out, again.err) == (0, done.out, "")  # nothing was left to do
    fails(*args, "--task", "CBB", says=["'CBB'"])


def test_reports_of_one_folder_and_of_several(llama: str) -> None:
    for name in ("lstm", "none"):
        out = f"runs/{name}"
        works(*compare(llama, "--methods", "manual,p-tuning", "--set", f"encoder={name}"), "--out", out)
    pages = {path: path.read_bytes() for path in Path("runs/lstm").glob("report.*")}
    for path in pages:
        path.unlink()
    assert works("report", "runs/lstm") == "runs/lstm/report.html\n"
    assert {path: path.read_bytes() for path in Path("runs/lstm").glob("report.*")} == pages
    assert works("report", "runs/lstm", "runs/none", "--latex", "--csv") == "runs/report/report.html\n"
    for ending in ("tex", "csv"):
        assert Path(f"runs/report/tables/table-01-scores.{ending}").is_file()
    assert works("report", "runs/lstm", "runs/none", "--out", "both") == "both/report.html\n"
    fails("report", "missing", says=["missing"])


def test_a_dry_run_prints_cells_and_leaves_nothing(llama: str) -> None:
    works(*compare(llama, "--methods", "manual", quick=()))
    before = saved()
    out = works(*compare(llama, "--methods", "manual,p-tuning", "--seeds", 2, "--dry-run"))
    rows = [line.split() for line in out.splitlines()]
    assert ["train", "manual", "0", "finished"] in rows
    assert ["train", "p-tuning", "1", "unknown"] in rows
    assert "2 of 3 cells to run, estimated time: unknown; nothing was run\n" in out
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
        (("--arg", "tries=9"), ["9", "5"]),
        (("--arg", "trys=2"), ["trys", "'tries'"]),
        (("--set", "train_backbone=full"), ["train_backbone", "fine-tuning"]),
        (("--set", "epoch=3"), ["'epoch'", "epochs"]),
        (("--epochs", "2", "--set", "epochs=3"), ["'epochs'"]),
        (("--vary", "encoder=gru"), ["encoder", "'gru'"]),
        (("--vocabulary", "words.txt"), ["words.txt"]),
        (("--template", "[X] [Y]"), ["no slots"]),
        (("--manual", "@none.txt"), ["none.txt"]),
        # Options without effect on any of the methods.
        ((*UNTRAINED, "--epochs", "50"), ["epochs", "majority"]),
        ((*UNTRAINED, "--arg", "tries=3"), ["tries"]),
        (("--methods", "fine-tuning", "--vary", "lora_rank=3"), ["lora_rank"]),
        # Work that cannot be divided like this.
        ((*UNTRAINED, "--part", "4/2"), ["4"]),
        ((*UNTRAINED, "--part", "9/9"), ["9/9"]),
        (("--gpus-per-worker", "0.5"), ["--gpus-per-worker", "--workers"]),
        (("--workers", "2", "--model-arg", "shard=tp"), ["shard"]),
        (("--model-arg", "shard=tp"), ["shard=tp"]),
    ],
)
def test_what_comparisons_refuse(llama: str, options: tuple[str, ...], says: list[str]) -> None:
    fails(*compare(llama, *options, quick=()), says=says)


def test_what_does_not_go_with_a_suite_is_refused(llama: str) -> None:
    fails(*lama(llama, "--task", "P63"), says=["'P63'", "'P36'"])
    fails(*lama(llama, "--arg", "targets=tokens"), says=["'tokens'"])
    fails(*lama(llama, "--metrics", "bleu"), says=["--metrics", "lama"])
    fails(*lama(llama, "--test", "test.jsonl"), says=["--test", "lama"])
    fails(*compare(llama, "--arg", "limit=3"), says=["limit", "--suite"])
    fails(*compare(llama, "--suite", "glue"), says=["'glue'"])
    fails(*compare(llama), "--test", "tset.jsonl", says=["tset.jsonl", "test.jsonl"])


def test_parts_and_their_collection(llama: str) -> None:
    args = compare(llama, "--methods", "majority,manual,p-tuning", "--log-to", "csv")
    assert works(*args, "--part", "2/2").startswith("part 2/2: 1 of 1 cells are done in out/cells\n")
    assert not Path("out/results.json").exists()
    works(*args, "--part", "1/2")
    assert [path.parts[2] for path in Path("out/log").rglob("log.csv")] == ["part-1-of-2"]
    assert "p-tuning - manual" in works(*args)
    assert [cell["status"] for cell in saved()["cells"]] == ["done"] * 3


@pytest.mark.parametrize("dry_run", [False, True])
def test_what_workers_need_is_checked_before_the_backbone_is_loaded(
    dry_run: bool, llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large one takes minutes. A dry run needs none."""
    monkeypatch.setitem(sys.modules, "ray", None)
    args = compare(llama, *UNTRAINED, "--workers", "2", quick=())
    if dry_run:
        assert "nothing was run" in works(*args, "--dry-run")
    else:
        monkeypatch.setattr("ptuning.cli.inputs.load", lambda _: pytest.fail("it was loaded"))
        fails(*args, says=["ptuning[ray]"])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_in_a_cell_says_how_to_go_on_and_the_end_is_the_same(
    llama: str, number: int, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = compare(llama, "--methods", "manual,p-tuning")
    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "train", interrupting(number))
        done = call(*args)
    assert (done.code, done.out) == (code, "")
    assert "Traceback" not in done.err
    assert f"; out/results.json is kept, continue with:\n  {terminal.program()} compare --data train.jsonl " in done.err
    assert "--resume" not in done.err
    assert [cell["status"] for cell in saved()["cells"]] == ["done", "waiting"]
    assert call("report", "out").code == 0
    assert Path("out/cells/train/p-tuning/seed-0/try-1/checkpoint").is_dir()
    other = compare(llama, "--methods", "manual,p-tuning", "--set", "encoder=mlp")
    fails(*other, says=["encoder was lstm and is mlp"])  # an interrupted cell is not continued with other settings
    works(*args)
    whole = timeless(saved())
    Path("out").rename("cut")
    works(*args)
    assert timeless(saved()) == whole
    cell = Path("cells/train/p-tuning/seed-0")
    assert {path.name for path in (Path("out") / cell).iterdir()} == {
        path.name for path in (Path("cut") / cell).iterdir()
    }


# ------------------------------------------------------------------------------------------------------- printing


def finished(task: str, method: str, hits: Sequence[float], **more: object) -> CellResult:
    values = {"p_at_1": hits, "p_at_10": [1.0] * len(hits), "mrr": hits, "exact_match": hits}
    return CellResult(Cell(task, method, 0), "done", values, 3.4, **more)  # type: ignore[arg-type]


def collected(*cells: CellResult) -> Results:
    names = ["majority", "manual", "p-tuning"]
    methods = {name: MethodInfo(learns_slots=name == "p-tuning") for name in names}
    empty = Results("lama", folder=Path("runs/x"), methods=methods)
    return Collector(empty, names, {cell.cell.task: None for cell in cells}).collect(cells)


def test_a_line_per_new_cell(capsys: pytest.CaptureFixture[str]) -> None:
    comparisons.show_cell(finished("P36", "manual", [1, 0, 0, 0]), 2, 9)
    comparisons.show_cell(finished("P36", "majority", [1, 0], was_there=True), 3, 9)
    comparisons.show_cell(CellResult(Cell("P36", "p-tuning", 1), "failed", error="no [room]"), 4, 9)
    comparisons.show_cell(CellResult(Cell("texts", "manual", 0), "done", {"bleu": [50.0] * 4}, 3.4), 1, 2)
    assert capsys.readouterr().err == (
        "2/9  P36  manual  seed 0: P@1 0.250  [0.046, 0.699], n = 4, 3 s\n"
        "4/9  P36  p-tuning  seed 1: failed: no [room]\n"
        "1/2  texts  manual  seed 0: bleu 50.000  n = 4, 3 s\n"
    )


def test_results_are_the_tables_of_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    comparisons.show_results(collected(finished("P36", "manual", [0, 0, 0, 1]), finished("P36", "p-tuning", [1] * 4)))
    out = capsys.readouterr().out
    assert "n counts facts" in out
    assert "n = 4" in out
    assert out.rstrip().endswith("(with report.md, results.json and cells/)")
    tasks = [f"P{number}" for number in range(4)]
    cells = [finished(task, method, [1, 0]) for task in tasks for method in ("majority", "manual")]
    comparisons.show_results(collected(*cells))
    out = capsys.readouterr().out
    assert "means of 4 tasks" in out
    assert "P0" not in out  # too many for a terminal
    comparisons.show_results(collected(CellResult(Cell("P36", "manual", 0), "failed", error="no room")))
    assert capsys.readouterr().out.startswith("failed: cells/P36/manual/seed-0: no room\n")


def test_estimates(capsys: pytest.CaptureFixture[str]) -> None:
    known = [
        CellResult(Cell("P36", "manual", 0), "waiting", was_there=True, seconds=3.0),
        CellResult(Cell("P36", "p-tuning", 0), "waiting", seconds=90.0),
        CellResult(Cell("P36", "p-tuning", 1), "waiting", seconds=4000.0),
    ]
    comparisons.show_estimates(known)
    assert "2 of 3 cells to run, estimated time: 1 h 08 min; nothing was run\n" in capsys.readouterr().out
    comparisons.show_estimates([*known, CellResult(Cell("P36", "in-context", 0), "waiting")])
    assert "3 of 4 cells to run, estimated time: 1 h 08 min + unknown" in capsys.readouterr().out
