"""Tables of cells: means, intervals, spreads over seeds and paired differences, by hand; several folders."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from ptuning.backbone.backbone import Backbone
from ptuning.config import TrainConfig
from ptuning.errors import FileError
from ptuning.experiment.cells import CellResult
from ptuning.experiment.compare import compare
from ptuning.experiment.results import Collector, compared, differences, merged, over_records, over_tasks
from ptuning.report.results_file import Cell, Results
from ptuning.report.write import write_report
from ptuning.statistics import mean_difference, mean_score, score
from tests.experiment.test_compare import FACTS


def done(
    task: str, method: str, hits: Sequence[float], *, seed: int = 0, ranks: Sequence[int] | None = None
) -> CellResult:
    values: dict[str, Sequence[float]] = {"p_at_1": list(hits), "exact_match": list(hits)}
    if ranks is not None:
        values |= {"p_at_10": [float(rank <= 10) for rank in ranks], "mrr": [1 / rank for rank in ranks]}
    return CellResult(Cell(task, method, seed), "done", values, 1.0)


def by_method(*cells: CellResult) -> dict[str, dict[str, list[CellResult]]]:
    table: dict[str, dict[str, list[CellResult]]] = {}
    for cell in cells:
        table.setdefault(cell.cell.task, {}).setdefault(cell.cell.method, []).append(cell)
    return table


def collect(*cells: CellResult, methods: Sequence[str], types: Mapping[str, str | None] | None = None) -> Results:
    kinds = types or {cell.cell.task: None for cell in cells}
    return Collector(Results("lama", command="x"), methods, kinds).collect(cells)


def test_one_seed_is_scored_over_records() -> None:
    table = over_records([done("t", "manual", [1, 0, 0, 0], ranks=[1, 2, 4, 20])])
    assert list(table) == ["p_at_1", "p_at_10", "mrr", "exact_match"]
    assert table["p_at_1"].value == 0.25
    assert table["p_at_10"].value == 0.75
    assert table["mrr"].value == pytest.approx((1 + 0.5 + 0.25 + 0.05) / 4)
    wilson = score([1.0, 0.0, 0.0, 0.0])
    assert (table["p_at_1"].low, table["p_at_1"].high, table["p_at_1"].n) == (wilson.low, wilson.high, 4)
    assert (table["p_at_1"].std, table["p_at_1"].seeds) == (None, 1)


def test_several_seeds_are_a_mean_per_record_and_a_spread() -> None:
    """Records (1, 1), (1, 0), (0, 0): means 1, 0.5, 0; the seeds' own means are 2/3 and 1/3."""
    table = over_records([done("t", "p", [1, 1, 0]), done("t", "p", [1, 0, 0], seed=1)])["p_at_1"]
    assert table.value == pytest.approx(0.5)
    assert table.n == 3  # three records, whatever the number of seeds
    assert table.seeds == 2
    assert table.std == pytest.approx((2 * (1 / 6) ** 2) ** 0.5)
    expected = mean_score([1.0, 0.5, 0.0])
    assert (table.low, table.high) == (expected.low, expected.high)


def test_the_mean_over_tasks_counts_each_task_once() -> None:
    cells = [done("a", "manual", [1, 1, 1, 1, 1, 1, 1, 1]), done("b", "manual", [0, 1]), done("c", "manual", [0, 0])]
    table = over_tasks(by_method(*cells), ["manual"])["manual"]["p_at_1"]
    assert table.value == pytest.approx(0.5)  # not 9 of 12
    assert (table.n, table.std, table.seeds) == (3, None, 1)
    expected = mean_score([1.0, 0.5, 0.0])
    assert (table.low, table.high) == (expected.low, expected.high)


def test_the_mean_over_tasks_of_scores_that_not_all_have() -> None:
    cells = [done("a", "m", [1], ranks=[1]), done("b", "m", [0])]
    assert list(over_tasks(by_method(*cells), ["m"])["m"]) == ["p_at_1", "exact_match"]
    assert over_tasks(by_method(*cells), ["m", "never-run"]).keys() == {"m"}


def test_only_seeds_that_all_tasks_have_make_a_spread() -> None:
    """A cell that failed must not let another task's seed 0 stand beside its seed 1."""
    cells = [
        done("a", "p", [1, 1], seed=1), done("a", "p", [0, 0], seed=2),
        done("b", "p", [0, 0]), done("b", "p", [1, 1], seed=1), done("b", "p", [0, 0], seed=2),
    ]  # fmt: skip
    table = over_tasks(by_method(*cells), ["p"])["p"]["p_at_1"]
    assert table.value == pytest.approx((0.5 + 1 / 3) / 2)
    assert table.seeds == 2
    assert table.std == pytest.approx(0.5**0.5)  # seed 1: 1 and 1, seed 2: 0 and 0
    apart = [done("a", "p", [1]), done("b", "p", [1], seed=1)]
    alone = over_tasks(by_method(*apart), ["p"])["p"]["p_at_1"]
    assert (alone.value, alone.std, alone.seeds) == (1.0, None, 1)


def test_the_pairs_that_are_compared() -> None:
    """Each with the learned and the manual prompt, a method with its variants, and the best with the next."""
    names = ["majority", "manual", "p-tuning", "p-tuning encoder=mlp"]
    pairs = [
        ("p-tuning", "majority"), ("p-tuning", "manual"), ("p-tuning", "p-tuning encoder=mlp"),
        ("majority", "manual"), ("p-tuning encoder=mlp", "manual"),
    ]  # fmt: skip
    assert compared(names, []) == pairs
    assert compared(names, ["manual", "p-tuning"]) == pairs  # there, the other way round
    assert compared(names, ["p-tuning encoder=mlp", "majority", "manual"]) == [
        *pairs,
        ("p-tuning encoder=mlp", "majority"),
    ]
    assert compared(["manual+lora", "manual+lora lora_rank=2"], []) == [("manual+lora", "manual+lora lora_rank=2")]


def test_differences_are_paired_over_tasks() -> None:
    cells = [
        done("a", "p-tuning", [1, 1]), done("a", "manual", [1, 0]),
        done("b", "p-tuning", [1, 0]), done("b", "manual", [0, 0]),
        done("c", "p-tuning", [0, 0]), done("c", "manual", [0, 1]),
        done("d", "p-tuning", [1, 1]),
    ]  # fmt: skip
    table = differences(by_method(*cells), compared(["manual", "p-tuning"], []))
    assert list(table) == ["p-tuning - manual"]
    gap = table["p-tuning - manual"]["p_at_1"]
    expected = mean_difference([0.5, 0.5, -0.5])  # d has one of the two only
    assert (gap.value, gap.low, gap.high, gap.n) == (expected.value, expected.low, expected.high, 3)


def test_differences_on_one_task_are_paired_over_its_records() -> None:
    cells = [
        done("a", "p-tuning", [1, 1, 0, 1]), done("a", "p-tuning", [1, 0, 0, 1], seed=1),
        done("a", "manual", [0, 1, 0, 1]),
    ]  # fmt: skip
    gap = differences(by_method(*cells), compared(["manual", "p-tuning"], []))["p-tuning - manual"]["p_at_1"]
    expected = mean_difference([1.0, -0.5, 0.0, 0.0])
    assert (gap.value, gap.low, gap.high, gap.n) == (0.125, expected.low, expected.high, 4)


def test_which_methods_are_compared() -> None:
    names = ["majority", "manual", "p-tuning", "fine-tuning"]
    cells = [done("a", name, [1, 0]) for name in names]
    assert list(differences(by_method(*cells), compared(names, []))) == [
        "p-tuning - majority", "p-tuning - manual", "p-tuning - fine-tuning", "majority - manual",
        "fine-tuning - manual",
    ]  # fmt: skip
    assert list(differences(by_method(*cells), compared(["majority", "fine-tuning"], []))) == []
    assert list(differences(by_method(*cells[:2]), compared(names, []))) == ["majority - manual"]
    apart = [done("a", "p-tuning", [1]), done("b", "manual", [1])]
    assert differences(by_method(*apart), compared(["manual", "p-tuning"], [])) == {}
    # Written answers have no rank, ranked ones do: what both have is compared.
    mixed = [done("a", "p-tuning", [1, 0]), done("a", "majority", [0, 0], ranks=[2, 3])]
    assert list(differences(by_method(*mixed), compared(names, []))["p-tuning - majority"]) == ["p_at_1", "exact_match"]


def test_tables_hold_what_is_done() -> None:
    cells = [
        done("P1", "p-tuning", [1, 0]), done("P1", "manual", [0, 0]), done("P2", "manual", [1, 1]),
        CellResult(Cell("P2", "p-tuning", 0), "failed", error="no room"),
        CellResult(Cell("P3", "manual", 0), "waiting"),
    ]  # fmt: skip
    table = collect(*cells, methods=["manual", "p-tuning"], types={"P1": "1-1", "P2": "N-1", "P3": "N-M"})
    assert {task: list(table) for task, table in table.tasks.items()} == {
        "P1": ["manual", "p-tuning"], "P2": ["manual"],
    }  # fmt: skip
    assert (table.macro["manual"]["p_at_1"].value, table.macro["manual"]["p_at_1"].n) == (0.5, 2)
    assert (table.macro["p-tuning"]["p_at_1"].value, table.macro["p-tuning"]["p_at_1"].n) == (0.5, 1)
    assert list(table.by_type) == ["1-1", "N-1"]
    assert table.by_type["1-1"]["p-tuning"]["p_at_1"].value == 0.5
    assert list(table.by_type["N-1"]) == ["manual"]
    assert [result.error for result in table.failed] == ["no room"]


def test_tables_follow_further_seeds() -> None:
    """What is kept of finished pairs is drawn again when a seed joins."""
    collector = Collector(Results("compare"), ["p"], {"t": None})
    first, second = done("t", "p", [1, 1, 1, 1]), done("t", "p", [0, 0, 0, 0], seed=1)
    assert collector.collect([first]).tasks["t"]["p"]["p_at_1"].value == 1.0
    both = collector.collect([first, second]).tasks["t"]["p"]["p_at_1"]
    assert (both.value, both.seeds) == (0.5, 2)


Run = Callable[..., Results]


@pytest.fixture
def run(causal: Backbone, tmp_path: Path) -> Run:
    """Compare in a folder of a name, with an encoder."""

    def run(folder: str, encoder: Any = "lstm", test: int = 6, **options: Any) -> Results:
        config = TrainConfig(epochs=2, batch_size=4, lr=0.05, encoder=encoder)
        options = {"methods": ["majority", "manual", "p-tuning"], "manual": "[X] is [Y] .", "seeds": 2, **options}
        rows: dict[str, Any] = {"dev": FACTS[12:18], "test": FACTS[18 : 18 + test]}
        return compare(FACTS[:12], **rows, backbone=causal, out=tmp_path / folder, config=config, **options)

    return run


def test_methods_that_differ_are_named_after_their_folder(run: Run, tmp_path: Path) -> None:
    """The others have one column. Differences are those that one comparison with both would have had."""
    run("lstm")
    run("none", "none")
    together = run("all", vary={"encoder": ["none"]})
    table = merged([tmp_path / "lstm", tmp_path / "none"])
    assert list(table.tasks["task"]) == ["majority", "manual", "p-tuning (lstm)", "p-tuning (none)"]
    for first, second in {"p-tuning (lstm)": "p-tuning", "p-tuning (none)": "p-tuning encoder=none"}.items():
        assert table.tasks["task"][first] == together.tasks["task"][second]
        assert table.methods[first].learns_slots
    gap = table.differences["p-tuning (lstm) - p-tuning (none)"]
    assert gap == together.differences["p-tuning - p-tuning encoder=none"]
    assert table.differences["p-tuning (none) - manual"]
    assert table.settings["encoder"] == "lstm: lstm; none: none"
    assert table.settings["epochs"] == 2
    assert table.methods["p-tuning (none)"].describe.endswith("; none")
    page = write_report(table, tmp_path / "report")
    text = page.read_text(encoding="utf-8")
    assert "Learning curves" in text  # read from the folders' cells
    assert not (tmp_path / "report" / "results.json").exists()


def test_folders_that_cannot_be_joined(run: Run, tmp_path: Path) -> None:
    run("a", methods=["manual"])
    run("b", methods=["manual"], test=5)
    run("c", methods=["manual"], name="other")
    for names, named in (
        ("ab", r"task: a and b .* \(6 and 5\)"), ("ac", "no finished task"), ("aa", "twice"), ("ax", "there is no"),
    ):  # fmt: skip
        with pytest.raises(FileError, match=named):
            merged([tmp_path / name for name in names])
    path = tmp_path / "b" / "results.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"compare"', '"lama"', 1), encoding="utf-8")
    with pytest.raises(FileError, match=r"\(compare, lama\)"):
        merged([tmp_path / "a", tmp_path / "b"])
