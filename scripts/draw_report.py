"""Copy a picture of a comparison's report into the docs.

Usage: python scripts/draw_report.py RESULTS_FOLDER [NAME] [PICTURE]
"""

from __future__ import annotations

import sys
from pathlib import Path

from ptuning.report import write_report


def main(folder: Path, name: str, picture: Path) -> None:
    """Write the report of ``folder`` anew from its JSON, and copy the picture ``name`` of it."""
    write_report(folder)
    picture.write_bytes((folder / "pictures" / f"{name}.svg").read_bytes())
    print(f"wrote {picture}")


if __name__ == "__main__":
    root = Path(__file__).resolve().parents[1]
    given = sys.argv[1:]
    if not given:
        sys.exit(__doc__)
    chosen = given[1] if len(given) > 1 else "dots"
    main(Path(given[0]), chosen, Path(given[2]) if len(given) > 2 else root / "docs" / "lama.svg")
