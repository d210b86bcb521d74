"""Draw the picture of the README: the demo's result, read from its files, as it stands on a terminal.

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
from ptuning.experiment.demo import load_demo

WIDTH = 88


def main(folder: Path, picture: Path) -> None:
    """Print the result of the demo in ``folder`` to a recorded terminal and save that as SVG."""
    console = Console(record=True, width=WIDTH, highlight=False, emoji=False, force_terminal=True, file=io.StringIO())
    with patch.object(terminal, "results", return_value=console):
        terminal.demo(load_demo(folder))
    # The picture brings no font of its own, so that it asks nobody for one.
    svg = console.export_svg(title="make demo", theme=MONOKAI, unique_id="demo")
    lines = [line for line in svg.splitlines() if "cdnjs" not in line]
    picture.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"wrote {picture}")


if __name__ == "__main__":
    given = [Path(argument) for argument in sys.argv[1:]]
    # From the root, as make runs it: the picture shows the folder's path, which should be nobody's own.
    main(*(given + [Path("runs/demo"), Path("docs/demo.svg")][len(given) :]))
