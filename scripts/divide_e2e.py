"""Divide E2E's devset.csv by meaning representation: texts to learn from, and representations to choose by.

Usage: python scripts/divide_e2e.py DEVSET.CSV FOLDER

Writes FOLDER/dev.csv (all texts of 64 meaning representations) and FOLDER/train.csv (all texts of the others, in a
drawn order), with E2E's columns ``mr`` and ``ref``. No representation is in both. ``ptuning ... --train-size N`` learns
from N of the texts. E2E: Novikova et al. (2017), https://github.com/tuetschek/e2e-dataset, CC BY-SA 4.0.
"""

from __future__ import annotations

import csv
import random
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

DEV_REPRESENTATIONS = 64
COLUMNS = ("mr", "ref")


def main(source: Path, folder: Path) -> None:
    """Write both parts."""
    with source.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    chooser = random.Random("e2e 0")
    representations = sorted({row["mr"] for row in rows})
    dev = set(chooser.sample(representations, DEV_REPRESENTATIONS))
    chooser.shuffle(rows)
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "train.csv", (row for row in rows if row["mr"] not in dev))
    write(folder / "dev.csv", (row for row in rows if row["mr"] in dev))


def write(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    """Write rows as a CSV file."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows({name: row[name] for name in COLUMNS} for row in rows)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
