"""The import contracts hold, and find what they forbid."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT

# Module -> lines that break a contract.
BREACHES = {
    "data/reading.py": "from ptuning.training.run import train",
    "prompt/score.py": "def hidden() -> None:\n    from ptuning.cli import terminal",
    # `splits` imports `questions`.
    "data/questions.py": "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    from ptuning.data import splits",
    "prompt/prompt.py": "import transformers",
    "report/tables.py": "import rich",
    "cli/inputs.py": "import fastapi",
}
CONTRACTS = 5


def lint(package: Path, folder: Path) -> str:
    """Run the contracts of pyproject.toml on a package, and return what they print."""
    command = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    environment = {**os.environ, "PYTHONPATH": str(package.parent), "COLUMNS": "200"}
    shutil.copy(ROOT / "pyproject.toml", folder)
    done = subprocess.run(
        [sys.executable, "-c", command, "--no-cache"], cwd=folder, env=environment, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    return done.stdout + done.stderr


def test_the_contracts_hold(tmp_path: Path) -> None:
    assert f"{CONTRACTS} kept, 0 broken" in lint(ROOT / "src" / "ptuning", tmp_path)


def test_each_contract_finds_what_it_forbids(tmp_path: Path) -> None:
    package = tmp_path / "ptuning"
    shutil.copytree(ROOT / "src" / "ptuning", package, ignore=shutil.ignore_patterns("*.jsonl", "__pycache__"))
    for name, lines in BREACHES.items():
        with (package / name).open("a", encoding="utf-8") as file:
            file.write(f"\n\n{lines}\n")
    printed = lint(package, tmp_path)
    assert f"0 kept, {CONTRACTS} broken" in printed
    for module in ("data.reading", "prompt.score"):
        assert f"ptuning.{module} -> " in printed
