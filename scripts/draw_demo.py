"""Draw the picture of the README: the demo's result, read from its files, as a terminal shows it.

Usage: python scripts/draw_demo.py [RUN_FOLDER] [PICTURE]
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from unittest.mock import patch

from rich.console import Console
from rich.terminal_theme import MONOKAI

from ptuning.cli import terminal
from ptuning.cli.commands import demo
from ptuning.experiment.demo import load_demo

WIDTH = 88


def main(folder: Path, picture: Path) -> None:
    """Print the result of the demo in ``folder`` to a recorded terminal and save that as SVG."""
    console = Console(record=True, width=WIDTH, highlight=False, emoji=False, force_terminal=True, file=io.StringIO())
    with patch.object(terminal, "results", return_value=console):
        demo.show(load_demo(folder))
    # Without web fonts, so that the picture loads nothing from another server.
    svg = console.export_svg(title="make demo", theme=MONOKAI, unique_id="demo")
    lines = [line for line in svg.splitlines() if "cdnjs" not in line]
    picture.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"wrote {picture}")


if __name__ == "__main__":
    given = [Path(argument) for argument in sys.argv[1:]]
    # Run this from the root, as make does: the picture shows the folder's path, which should be a relative one.
    main(*(given + [Path("runs/demo"), Path("docs/demo.svg")][len(given) :]))
