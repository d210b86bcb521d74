"""Several folders as one report: which methods become which, paired differences, and what cannot be joined."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ptuning.backbone.backbone import Backbone
from ptuning.config import TrainConfig
from ptuning.errors import FileError
from ptuning.experiment.compare import compare
from ptuning.experiment.results import merged
from ptuning.report.results_file import Results
from ptuning.report.write import write_report
from tests.experiment.test_compare import FACTS

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
    found = merged([tmp_path / "lstm", tmp_path / "none"])
    assert list(found.tasks["task"]) == ["majority", "manual", "p-tuning (lstm)", "p-tuning (none)"]
    for one, other in {"p-tuning (lstm)": "p-tuning", "p-tuning (none)": "p-tuning encoder=none"}.items():
        assert found.tasks["task"][one] == together.tasks["task"][other]
        assert found.methods[one].learns_slots
    gap = found.differences["p-tuning (lstm) - p-tuning (none)"]
    assert gap == together.differences["p-tuning - p-tuning encoder=none"]
    assert found.differences["p-tuning (none) - manual"]
    assert found.settings["encoder"] == "lstm: lstm; none: none"
    assert found.settings["epochs"] == 2
    assert found.methods["p-tuning (none)"].describe.endswith("; none")
    page = write_report(found, tmp_path / "report")
    text = page.read_text(encoding="utf-8")
    assert "Learning curves" in text  # read from the folders' cells
    assert not (tmp_path / "report" / "results.json").exists()


def test_failed_and_missing_methods(run: Run, tmp_path: Path) -> None:
    run("few", methods=["manual"])
    run("more", "mlp", methods=["manual", "p-tuning"])
    found = merged([tmp_path / "few", tmp_path / "more"])
    assert list(found.tasks["task"]) == ["manual", "p-tuning"]
    assert found.cells[0].run == "few/cells/task/manual/seed-0"


def test_what_cannot_be_joined(run: Run, tmp_path: Path) -> None:
    run("a", methods=["manual"])
    run("b", methods=["manual"], test=5)
    run("c", methods=["manual"], name="other")
    a = tmp_path / "a"
    with pytest.raises(FileError, match=r"task: a and b have other test rows \(6 and 5\), so their methods cannot be"):
        merged([a, tmp_path / "b"])
    with pytest.raises(FileError, match="have no finished task in common"):
        merged([a, tmp_path / "c"])
    with pytest.raises(FileError, match="the same folder is given twice"):
        merged([a, a])
    with pytest.raises(FileError, match="there is no"):
        merged([a, tmp_path / "none"])
    path = tmp_path / "b" / "results.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"compare"', '"lama"', 1), encoding="utf-8")
    with pytest.raises(FileError, match=r"comparisons of different kinds \(compare, lama\)"):
        merged([a, tmp_path / "b"])
