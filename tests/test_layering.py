"""Imports go one way: each module imports only modules of a lower rank, wherever the import stands."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "ptuning"
RANKS = {
    name: rank
    for rank, names in enumerate(
        [
            "errors names",
            "files memory metrics config phrases",
            "records fields",
            "template segments questions fleet_file",
            "fill defaults relation_files recompute attention",
            "labels batch families tokenizer hub relations forward probes",
            "backbone tasks lora",
            "encoder vocabulary weights task_check",
            "prompt",
            "model",
            "objective decode constants",
            "measure checkpoint steps",
            "trainer predict method run_folder",
            "answers scores fleet",
            "evaluate cells",
            "runs inspection baselines head",
            "fleets",
            "tuning demo trial",
            "suite forecast",
            "results dry_run",
            "findings pictures server_files",
            "blocks",
            "tables caveats",
            "report",
            "experiment",
            "comparison",
            "paraphrases superglue",
            "show",
            "show_suite show_tasks show_forecast wiring",
            "suite_commands task_commands estimate_commands fleet_commands",
            "cli",
        ]
    )
    for name in names.split()
}
# The package itself may be imported by whoever writes its version down, and starts the command line.
PACKAGE, STARTER = "__init__", "__main__"
IMPORTS_PACKAGE = {"prompt", "cli"}
KNOWS_TRANSFORMERS = {"attention", "backbone", "forward", "tokenizer"}


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Every module that a file imports at run time, dotted, with its line; those for type checkers are left out."""
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            waiting += node.orelse
            continue
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: a relative import"
            if node.module == "ptuning":
                yield from ((f"ptuning.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield node.module or "", node.lineno


def test_every_module_has_a_rank() -> None:
    modules = {path.stem for path in SOURCE.glob("*.py")}
    assert modules == {*RANKS, PACKAGE, STARTER}
    assert not [path for path in SOURCE.rglob("*.py") if path.parent != SOURCE], "the package is one flat folder"


@pytest.mark.parametrize("name", [*RANKS, PACKAGE])
def test_a_module_imports_only_lower_ranks(name: str) -> None:
    for imported, line in imports(SOURCE / f"{name}.py"):
        package, _, other = imported.partition(".")
        if package != "ptuning":
            continue
        if not other:
            assert name in IMPORTS_PACKAGE, f"{name}.py:{line} imports the package itself"
            continue
        assert name in RANKS, f"{name}.py:{line} imports ptuning.{other}"
        other = other.partition(".")[0]
        assert RANKS[other] < RANKS[name], f"{name} (rank {RANKS[name]}), line {line}: {other} has rank {RANKS[other]}"


def test_the_documented_table_is_this_one() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (.+?) \|", text, flags=re.MULTILINE)
    documented = {name: int(rank) for rank, names in rows for name in re.findall(r"`(\w+)`", names)}
    assert documented == RANKS


def test_few_modules_know_transformers() -> None:
    """The loader of models, the forward pass, and what templates need of a tokenizer."""
    knowing = {
        path.stem
        for path in SOURCE.glob("*.py")
        if any(name.split(".")[0] == "transformers" for name, _ in imports(path))
    }
    assert knowing == KNOWS_TRANSFORMERS


def test_the_reader_of_imports_finds_them_wherever_they_stand(tmp_path: Path) -> None:
    """Without this, a test that finds nothing would pass."""
    path = tmp_path / "a.py"
    path.write_text(
        "import ptuning.a\nfrom ptuning import b\n"
        "if TYPE_CHECKING:\n    from ptuning.no import x\nelse:\n    from ptuning.c import x\n"
        "def f():\n    with y:\n        from ptuning.d import x\n        import transformers.e as z\n",
        encoding="utf-8",
    )
    assert {name for name, _ in imports(path)} == {
        "ptuning.a", "ptuning.b", "ptuning.c", "ptuning.d", "transformers.e",
    }  # fmt: skip
