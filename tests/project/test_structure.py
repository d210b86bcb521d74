"""The structure of the package: the import contracts find what they forbid, and rooms, modules and functions stay
small.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "ptuning"
ROOMS = sorted(path.parent for path in PACKAGE.glob("*/**/__init__.py"))
MAX_FILES_AT_THE_TOP = 12
MAX_MODULES_OF_A_ROOM = 14
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 12

# `splits` imports `questions`.
CIRCLE = "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    from ptuning.data import splits\n"
# What is broken -> the module, the lines added to it, and the contract that finds them.
BREACHES = {
    "an import of a higher room": (
        "data/reading.py",
        "from ptuning.training.run import train\n",
        "rooms import only rooms below them",
    ),
    "an import of a higher room inside a function": (
        "prompt/score.py",
        "def hidden() -> None:\n    from ptuning.cli import terminal\n",
        "rooms import only rooms below them",
    ),
    "a circle of imports for type checking only": ("data/questions.py", CIRCLE, "no circles inside a room"),
    "transformers outside of backbone": (
        "prompt/prompt.py",
        "import transformers\n",
        "transformers and peft are known in backbone and exchange only",
    ),
    "rich outside of cli": ("report/tables.py", "import rich\n", "rich and typer are known in cli only"),
    "fastapi outside of serve": ("cli/inputs.py", "import fastapi\n", "the web is known in serve only"),
    "starlette in the engine": ("serve/engine/job.py", "import starlette\n", "the web is known in serve only"),
}


def lint_a_copy(folder: Path, module: str | None = None, added: str = "") -> subprocess.CompletedProcess[str]:
    """Run the contracts of pyproject.toml on a copy of the package, with lines added to one module."""
    shutil.copytree(PACKAGE, folder / "ptuning", ignore=shutil.ignore_patterns("*.jsonl", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    if module is not None:
        path = folder / "ptuning" / module
        path.write_text(path.read_text(encoding="utf-8") + "\n\n" + added, encoding="utf-8")
    command = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    return subprocess.run(
        [sys.executable, "-c", command, "--no-cache"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_contracts_hold(tmp_path: Path) -> None:
    done = lint_a_copy(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 broken" in done.stdout


@pytest.mark.parametrize("breach", BREACHES)
def test_a_contract_finds_what_it_forbids(breach: str, tmp_path: Path) -> None:
    module, added, contract = BREACHES[breach]
    done = lint_a_copy(tmp_path, module, added)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"{contract} BROKEN" in done.stdout


def parsed() -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE), ast.parse(path.read_text(encoding="utf-8"))


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the number of lines of a function, signature included and docstring left out."""
    first = function.body[0]
    documented = ast.get_docstring(function) is not None
    lines = (function.end_lineno or 0) - function.lineno + 1
    return lines - ((first.end_lineno or 0) - first.lineno + 1 if documented else 0)


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the number of a function's parameters without ``self`` and ``cls``."""
    given = function.args
    names = [one.arg for one in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def test_there_are_few_modules_in_a_room_and_few_files_at_the_top() -> None:
    """A room is read in an afternoon. One that is full is split, or holds something that belongs elsewhere."""
    modules = {
        str(room.relative_to(PACKAGE)): len([path for path in room.glob("*.py") if path.stem != "__init__"])
        for room in ROOMS
    }
    assert max(modules.values()) <= MAX_MODULES_OF_A_ROOM, modules
    files = sorted(path.name for path in PACKAGE.iterdir() if path.is_file())
    assert len(files) <= MAX_FILES_AT_THE_TOP, files


def test_every_room_says_what_it_is_for_and_nothing_else() -> None:
    """A room's ``__init__`` is a docstring that ends with the order of reading, so that importing a room is cheap."""
    for room in ROOMS:
        tree = ast.parse((room / "__init__.py").read_text(encoding="utf-8"))
        said = ast.get_docstring(tree) or ""
        assert "must not" in said, f"{room.name} does not say what it must not know"
        _, found, order = said.partition("Read first: ")
        assert found, f"{room.name} does not say what to read first"
        for name in order.split("``")[1::2]:
            assert (room / f"{name}.py").is_file(), f"{room.name} has no module {name}"
        # A room may look up public names on first use.
        assert room.name == "method" or len(tree.body) == 1, f"{room.name} holds code in its __init__"


def test_no_two_public_classes_have_one_name() -> None:
    """Two classes with one name are taken for each other in messages, in searches and by readers."""
    found: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found.setdefault(node.name, []).append(str(path.relative_to(PACKAGE)))
    assert len(found) > 50
    assert {name: paths for name, paths in found.items() if len(paths) > 1} == {}


def test_functions_are_short_and_take_few_parameters() -> None:
    """A function fits a screen. Commands may take more parameters: each of their options is one."""
    long, wide = [], []
    for path, tree in parsed():
        for function in functions(tree):
            where, lines = f"{path}: {function.name}", code_lines(function)
            if lines > MAX_FUNCTION_LINES:
                long.append(f"{where} has {lines} lines")
            if path.parts[0] != "cli" and parameters(function) > MAX_PARAMETERS:
                wide.append(f"{where} takes {parameters(function)} parameters")
    assert long + wide == []
