"""Run all benchmark scripts one after another, then write summary, report, picture and the tables of the documentation.

python -m benchmarks.run                    # everything, more than an hour on two cores
python -m benchmarks.run --smoke            # that everything works, in seconds, on a tiny random model
python -m benchmarks.run --only training prefix
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import time
from collections.abc import Sequence

from benchmarks.common import ROOT, Settings, parser, say, settings_of
from benchmarks.goals import SCRIPTS


def main(settings: Settings, names: Sequence[str]) -> int:
    """Run scripts; one that fails stops no other, and leaves no older figure behind.

    Returns:
        0 if all went well, 1 otherwise.
    """
    began, failed = time.monotonic(), []
    if settings.smoke:  # so that no fork has to
        importlib.import_module("transformers.trainer")
    for name in names:
        say(f"{name} ...")
        (settings.out / f"{name}.json").unlink(missing_ok=True)
        if settings.smoke:
            importlib.import_module(f"benchmarks.{name}").main(settings)
            continue
        command = [sys.executable, "-m", f"benchmarks.{name}", *settings.arguments()]
        if subprocess.run(command, cwd=ROOT, check=False).returncode:
            failed.append(name)
    importlib.import_module("benchmarks.report").main(settings)
    say(f"all in {(time.monotonic() - began) / 60:.1f} minutes" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def known() -> list[str]:
    """Return the scripts that are there."""
    return [name for name in SCRIPTS if (ROOT / "benchmarks" / f"{name}.py").is_file()]


if __name__ == "__main__":
    given = parser(__doc__)
    given.add_argument("--only", nargs="+", choices=known(), metavar="SCRIPT", help=f"some of: {', '.join(known())}")
    chosen = given.parse_args()
    sys.exit(main(settings_of(chosen), [name for name in known() if name in (chosen.only or known())]))
