"""How much faster are two workers than one process on the same cores, and how long does the engine take to start?

A part of LAMA made of the shipped facts: as many cells for each worker, all of them trained.
"""

from __future__ import annotations

import importlib.util
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.common import (
    Json,
    Settings,
    answer,
    interleave,
    no_answer,
    parser,
    ratios,
    say,
    settings_of,
    spread,
    write_result,
)
from benchmarks.material import backbone_of, every
from ptuning.backbone.backbone import Backbone
from ptuning.backbone.sources import LoadOptions
from ptuning.config import TrainConfig
from ptuning.experiment.suites import lama
from ptuning.files import write_json_lines
from ptuning.workers.pool import WorkerConfig, connected

WORKERS = 2
# Relations made of shipped facts; with two seeds they are eight cells, four for each worker.
RELATIONS = {"capitals": "capital", "continents": "continent", "currencies": "currency", "domains": "domain"}
SEEDS = 2
FACTS, EPOCHS = 60, 3
STARTS = 3
MISSING = 'ray is not installed: pip install "ptuning[ray]"'
METHOD = (
    f"p-tuning on {len(RELATIONS)} relations of {FACTS} facts made of the shipped ones, {SEEDS} seeds, {EPOCHS} "
    f"epochs: {len(RELATIONS) * SEEDS} cells, in one process with all cores, and by {WORKERS} workers that share them. "
    "The time is that of the whole call with a loaded backbone, start of the engine and loading by the workers "
    "included. The start alone is timed up to the moment where workers can be asked for."
)


def main(settings: Settings) -> None:
    """Measure one process and two workers in turn, and starts of the engine."""
    began = time.monotonic()
    backbone = backbone_of(settings)
    loading = LoadOptions(dtype=settings.dtype, device=settings.device)
    has_ray = importlib.util.find_spec("ray") is not None and not settings.smoke
    with tempfile.TemporaryDirectory(prefix="ptuning-bench-") as place:
        data = facts_in(Path(place) / "data", settings.pick(FACTS, 12))

        def run(workers: WorkerConfig | None, number: int) -> float:
            out = Path(place) / f"{workers is not None}-{number}"
            config = TrainConfig(epochs=settings.pick(EPOCHS, 1))
            at = time.monotonic()
            lama(
                data, backbone=backbone, out=out, methods="p-tuning", seeds=SEEDS, targets="any", config=config,
                workers=workers,
            )  # fmt: skip
            return time.monotonic() - at

        contestants = {"one process": partial(run, None)}
        if has_ray:
            contestants["two workers"] = partial(run, WorkerConfig(WORKERS, loading=loading))
        found = interleave(contestants, repeats=3, seconds=settings.pick(300, 1), seed=settings.seed, note="workers")
        starts = [start(backbone) for _ in range(settings.pick(STARTS, 1))] if has_ray else []
    cells: list[dict[str, Json]] = [
        {"cell": f"{len(RELATIONS) * SEEDS} cells", "contestant": name, "whole_seconds": spread(values)}
        for name, values in found.items()
    ]
    missing = "a smoke run starts no Ray" if settings.smoke else MISSING
    answers = {"workers-2": no_answer(missing), "ray-start": no_answer(missing)}
    if has_ray:
        cells.append({"cell": "start of the engine", "contestant": "Ray", "whole_seconds": spread(starts)})
        note = f"{torch.get_num_threads()} threads against {WORKERS} workers"
        answers = {
            "workers-2": answer(ratios(found["one process"], found["two workers"]), note),
            "ray-start": answer(starts),
        }
    write_result(
        settings,
        "workers",
        question=(__doc__ or "").splitlines()[0],
        cells=cells,
        answers=answers,
        method=METHOD,
        seconds=time.monotonic() - began,
    )


def facts_in(folder: Path, count: int) -> Path:
    """Write relations of so many facts, as ``ptuning lama`` reads them."""
    folder.mkdir(parents=True)
    write_json_lines(
        folder / "relations.jsonl",
        [{"relation": name, "template": f"The {word} of [X] is [Y]"} for name, word in RELATIONS.items()],
    )
    for name in RELATIONS:
        rows = [{"sub_label": row["x"], "obj_label": row["y"]} for row in every(name)[:count]]
        write_json_lines(folder / f"{name}.jsonl", rows)
    return folder


def start(backbone: Backbone) -> float:
    """Return the seconds until the engine is there."""
    work: Any = SimpleNamespace(backbone=backbone)
    at = time.monotonic()
    with connected(work, WorkerConfig(WORKERS), WORKERS):
        taken = time.monotonic() - at
    say(f"  the engine starts in {taken:.1f} s")
    return taken


if __name__ == "__main__":
    main(settings_of(parser(__doc__).parse_args()))
