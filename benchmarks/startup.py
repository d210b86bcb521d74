"""How long until something happens: import, help, a cached backbone, the first step?"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from importlib.util import find_spec

from benchmarks.common import ROOT, Json, Settings, answer, interleave, parser, settings_of, spread, write_result

IMPORT = "import time; start = time.perf_counter(); import ptuning; print(time.perf_counter() - start)"
METHOD = (
    "A new process each time, with the files in the system's cache. import: `import ptuning`. help: the whole "
    "process of `ptuning --help`. load: `ptuning.load_backbone()` of the backbone in the cache, with all imports "
    "that it needs. First step: imports, load, tokenising and one step of 16 facts; for PEFT the same backbone, its "
    "own imports and transformers' Trainer."
)


def main(settings: Settings) -> None:
    """Start all processes, in random order in each round."""
    began = time.monotonic()
    contestants = {
        "import": lambda _: printed([sys.executable, "-c", IMPORT]),
        "help": lambda _: wall([sys.executable, "-m", "ptuning", "--help"]),
        "load": lambda _: stage("load", settings),
        "first step": lambda _: stage("step", settings),
    }
    if find_spec("peft") is not None:
        contestants["first step, peft"] = lambda _: stage("peft-step", settings)
    if not settings.smoke:
        contestants["load"](0)  # converts the backbone, if nothing did before
    elif len(contestants) > 4:
        del contestants["first step"]  # each process takes seconds, and the peer's goes the same way
    found = interleave(contestants, repeats=settings.pick(5, 1), seconds=70, seed=settings.seed, note="processes")
    cells: list[dict[str, Json]] = [
        {"cell": name, "contestant": "peft" if name.endswith("peft") else "ptuning", "seconds": spread(values)}
        for name, values in found.items()
    ]
    write_result(
        settings,
        "startup",
        question=(__doc__ or "").splitlines()[0],
        cells=cells,
        answers={
            "import-seconds": answer(found["import"], "import ptuning"),
            "help-seconds": answer(found["help"], "ptuning --help, the whole process"),
            "load-seconds": answer(
                found["load"], f"{settings.backbone_name}, imports of torch and transformers included"
            ),
        },
        method=METHOD,
        seconds=time.monotonic() - began,
    )


def printed(command: list[str]) -> float:
    """Run a command and return the number on its last line."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"startup, {command[-1]}:\n{done.stderr}")
    return float(json.loads(done.stdout.splitlines()[-1]))


def wall(command: list[str]) -> float:
    """Run a command and return its seconds from start to end."""
    start = time.perf_counter()
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    return time.perf_counter() - start


def stage(name: str, settings: Settings) -> float:
    """Run one stage in a new process of this script."""
    return printed([sys.executable, "-m", "benchmarks.startup", *settings.arguments(), "--stage", name])


def stage_of(name: str, settings: Settings) -> None:
    """Do one stage and print its seconds, counted from before the first import of anything heavy."""
    start = time.perf_counter()
    from benchmarks import material

    backbone = material.backbone_of(settings)
    if name != "load":
        bound = material.bind(backbone, material.FACTS_TEMPLATE)
        items = material.items_of(bound, material.every("capitals")[:16])
        if name == "step":
            material.train_seconds(backbone, bound, items, batch_size=16)
        else:
            from benchmarks.peer import Peer, rows_of

            with Peer(backbone, slots=material.SLOTS) as peer:
                peer.train(rows_of(items), epochs=1, batch_size=16)
    print(json.dumps(time.perf_counter() - start))


if __name__ == "__main__":
    given = parser(__doc__)
    given.add_argument("--stage", choices=("load", "step", "peft-step"), help="what a child does")
    chosen = given.parse_args()
    if chosen.stage:
        stage_of(chosen.stage, settings_of(chosen))
    else:
        main(settings_of(chosen))
