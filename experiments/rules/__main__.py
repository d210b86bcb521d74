"""Write data made by rule: train.jsonl, dev.jsonl and test.jsonl.

    python -m experiments.rules NAME FOLDER

countries       attributes of a country and a text with them   --manual "{content} In a sentence: [Y]" --field y=summary
arithmetic      sums, differences, products with their steps   --manual "{input}, step by step: [Y]" --field y=output
instructions    conversations about countries                  --chat
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.rules import arithmetic, countries, instructions
from ptuning.files import make_folder, write_json_lines

RULES: Mapping[str, Callable[[str], Sequence[Mapping[str, Any]]]] = {
    "countries": countries.rows,
    "arithmetic": arithmetic.rows,
    "instructions": instructions.rows,
}


def write(name: str, folder: Path) -> None:
    """Write the three splits of a data set."""
    make_folder(folder)
    for split in ("train", "dev", "test"):
        write_json_lines(folder / f"{split}.jsonl", RULES[name](split))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=RULES)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    write(given.name, given.folder)
