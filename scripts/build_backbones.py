"""Run the tiny model of every family and write down what it supports: families.json in the package, and the table of
docs/backbones.md. A test compares both with the models.

Usage: python scripts/build_backbones.py
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.families import FAMILIES, as_markdown, examine  # noqa: E402 - the folder of the tests has to be found first

from ptuning.backbone.families import Family  # noqa: E402

START, END = "<!-- table: scripts/build_backbones.py -->\n", "<!-- end -->\n"


def data(rows: list[Family]) -> str:
    """Return the package's data file, one family per line."""
    listed = ",\n".join(json.dumps(row.to_json(), ensure_ascii=False) for row in rows)
    return f"[\n{listed}\n]\n"


def page(text: str, rows: list[Family]) -> str:
    """Return the docs page with its table replaced."""
    return re.sub(f"{START}.*{END}", lambda _: f"{START}\n{as_markdown(rows)}\n{END}", text, flags=re.DOTALL)


def main() -> None:
    """Write both."""
    rows = [examine(name) for name in FAMILIES]
    (ROOT / "src" / "ptuning" / "backbone" / "families.json").write_text(data(rows), encoding="utf-8")
    docs = ROOT / "docs" / "backbones.md"
    docs.write_text(page(docs.read_text(encoding="utf-8"), rows), encoding="utf-8")
    print(f"wrote {len(rows)} families")


if __name__ == "__main__":
    main()
