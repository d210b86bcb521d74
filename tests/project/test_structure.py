"""The structure of the package: the import contracts find what they forbid."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "ptuning"

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
