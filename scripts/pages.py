"""Figures that pages of the docs are made from, and tables between marks that nobody writes between by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

INNERMOST = re.compile(r"\[[^][{}]*\]|\{[^][{}]*\}")
Figures = Mapping[str, Mapping[str, Any]]


def read_figures(path: Path) -> dict[str, dict[str, Any]]:
    """Read figures that :func:`write_figures` wrote."""
    found: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return found


def write_figures(path: Path, figures: Figures) -> None:
    """Write figures as a file that people can read: what holds no other list or object is on one line."""
    text = json.dumps(figures, indent=1)
    text = INNERMOST.sub(lambda found: " ".join(found[0].split()).replace("[ ", "[").replace(" ]", "]"), text)
    path.write_text(text + "\n", encoding="utf-8")


def fill(path: Path, owner: str, made: Mapping[str, str]) -> None:
    """Replace what stands between ``<!-- OWNER: TABLE -->`` and ``<!-- OWNER: end -->`` by that table.

    Raises:
        KeyError: If a mark names no table.
    """
    marked = re.compile(rf"(<!-- {owner}: (\w+) -->\n).*?(<!-- {owner}: end -->)", flags=re.DOTALL)
    page = path.read_text(encoding="utf-8")
    path.write_text(marked.sub(lambda mark: f"{mark[1]}{made[mark[2]]}\n{mark[3]}", page), encoding="utf-8")
