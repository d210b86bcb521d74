"""How long until something happens: import, help, a cached backbone, the first step?"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING

from benchmarks.common import (
    ROOT,
    Json,
    Settings,
    answer,
    child,
    interleave,
    parser,
    ratios,
    settings_of,
    spread,
    write_result,
)

if TYPE_CHECKING:
    from ptuning.backbone.backbone import Backbone
    from ptuning.engine.objective import ScoringRequest
    from ptuning.template.encode import TokenizedTemplate

IMPORT = "import time; start = time.perf_counter(); import ptuning; print(time.perf_counter() - start)"
METHOD = (
    "A new process each time, with the files in the system's cache. import: `import ptuning`. help: the whole "
    "process of `ptuning --help`. load: `ptuning.load_backbone()` of the backbone in the cache, with all imports "
    "that it needs; for transformers AutoTokenizer's and AutoModelForCausalLM's from_pretrained of the same folder, "
    "and its imports. The entry is the ratio of the two in the same round. First step: imports, load, tokenising and "
    "one step of 16 facts; for PEFT the same backbone, its own imports and transformers' Trainer."
)


def main(settings: Settings) -> None:
    """Start all processes, in random order in each round."""
    began = time.monotonic()
    contestants = {
        "import": lambda _: imported(),
        "help": lambda _: wall([sys.executable, "-m", "ptuning", "--help"]),
        "load": lambda _: stage("load", settings),
        "load, transformers": lambda _: stage("load-transformers", settings),
        "first step": lambda _: stage("step", settings),
    }
    if find_spec("peft") is not None:
        contestants["first step, peft"] = lambda _: stage("peft-step", settings)
    stage("prepare", settings)
    found = interleave(contestants, repeats=settings.pick(5, 1), seconds=70, seed=settings.seed, note="processes")
    cells: list[dict[str, Json]] = [
        {"cell": name, "contestant": name.partition(", ")[2] or "ptuning", "seconds": spread(values)}
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
            "load-against-transformers": answer(
                ratios(found["load"], found["load, transformers"]), f"{settings.backbone_name}, imports included"
            ),
        },
        method=METHOD,
        seconds=time.monotonic() - began,
    )


def imported() -> float:
    """Return the seconds of the import, as the process says them that does nothing else."""
    done = subprocess.run([sys.executable, "-c", IMPORT], cwd=ROOT, capture_output=True, text=True, check=True)
    return float(done.stdout)


def wall(command: list[str]) -> float:
    """Run a command and return its seconds from start to end."""
    start = time.perf_counter()
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    return time.perf_counter() - start


def stage(name: str, settings: Settings) -> float:
    """Run one stage in a new process of this script."""
    return float(child("startup", settings, f"--stage={name}"))


def seconds_of(name: str, settings: Settings) -> float:
    """Do one stage and return its seconds, counted from before the first import of anything heavy."""
    start = time.perf_counter()
    STAGES[name](settings)
    return time.perf_counter() - start


def prepare(settings: Settings) -> None:
    """Convert the backbone, if nothing did before, or write the tiny one; this also fills the system's cache."""
    from benchmarks import material

    material.backbone_of(settings)


def load(settings: Settings) -> None:
    """Load the backbone with ptuning."""
    import ptuning

    ptuning.load_backbone(folder_of(settings), dtype=settings.dtype, device=settings.device)


def load_transformers(settings: Settings) -> None:
    """Load the same folder with transformers; ``auto`` is the dtype in which it is stored."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = folder_of(settings)
    AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=settings.dtype)
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(automatic if settings.device == "auto" else settings.device)  # type: ignore[arg-type]


def folder_of(settings: Settings) -> str:
    """Return the folder of the backbone, without anything heavy."""
    from ptuning.backbone.sources import cache_root, gguf_weights

    if settings.backbone == "tiny":
        return str(settings.out / "tiny-backbone")
    packed = gguf_weights(settings.backbone)
    return str(cache_root() / packed.copy) if packed is not None else settings.backbone


def first_step(settings: Settings) -> None:
    """Load the backbone and take one step."""
    from benchmarks import material

    backbone, bound, items = _first_items(settings)
    material.train_seconds(backbone, bound, items, batch_size=16)


def first_step_of_peer(settings: Settings) -> None:
    """The same with PEFT and transformers' Trainer."""
    from benchmarks import material
    from benchmarks.peer import Peer, rows_of

    backbone, _, items = _first_items(settings)
    with Peer(backbone, slots=material.SLOTS) as peer:
        peer.train(rows_of(items), epochs=1, batch_size=16)


def _first_items(settings: Settings) -> tuple[Backbone, TokenizedTemplate, list[ScoringRequest]]:
    from benchmarks import material

    backbone = material.backbone_of(settings)
    bound = material.bind(backbone, material.FACTS_TEMPLATE)
    return backbone, bound, material.items_of(bound, material.every("capitals")[:16])


STAGES: Mapping[str, Callable[[Settings], None]] = {
    "prepare": prepare,
    "load": load,
    "load-transformers": load_transformers,
    "step": first_step,
    "peft-step": first_step_of_peer,
}


if __name__ == "__main__":
    given = parser(__doc__)
    given.add_argument("--stage", choices=tuple(STAGES), help="what a child does")
    chosen = given.parse_args()
    if chosen.stage:
        print(json.dumps(seconds_of(chosen.stage, settings_of(chosen))))
    else:
        main(settings_of(chosen))
