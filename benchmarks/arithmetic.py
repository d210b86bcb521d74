"""What do the number format, the threads and the kind of attention bring to a training step?

Forward and backward of the bare backbone over one batch of short facts, where no setting of ptuning's own takes part;
and, on a processor with units for bfloat16, whole steps of ptuning in either format.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from benchmarks.common import (
    Json,
    Settings,
    answer,
    interleave,
    no_answer,
    parser,
    ratios,
    settings_of,
    spread,
    write_result,
)
from benchmarks.material import (
    FACTS_TEMPLATE,
    backbone_of,
    bare_logits,
    bare_seconds,
    bind,
    every,
    items_of,
    mean_tokens,
    passes,
    repeated,
    train_seconds,
)
from ptuning.backbone.backbone import Backbone
from ptuning.backbone.number_format import units
from ptuning.engine.objective import ScoringRequest

TEMPLATE = "[P*6] The capital of [X] is [Y]"
ROWS = 16
DEFAULT, HALF = "float32", "bfloat16"
# Batches in which whole steps are compared, each with a number of steps.
STEPS = {8: 8, 16: 6, 64: 2}
METHOD = (
    f"Forward and backward of the bare backbone over {ROWS} rows of {TEMPLATE}, in rounds. All start from the same "
    "weights; off is the largest difference of a logit from float32's, over the largest logit. TF32 is "
    "measured on a GPU, where it exists. bf16-cpu: whole steps of ptuning's Trainer with its defaults on short facts, "
    "on a processor with units for bfloat16 only."
)


@dataclass(frozen=True)
class Way:
    """A way to compute."""

    dtype: str = DEFAULT
    threads: int | None = None
    attention: str | None = None
    tf32: bool = False


def main(settings: Settings) -> None:
    """Measure each way."""
    began = time.monotonic()
    named = ways(settings.device)
    backbones = {dtype: backbone_of(replace(settings, dtype=dtype)) for dtype in {one.dtype for one in named.values()}}
    bound = bind(backbones[DEFAULT], TEMPLATE)
    items = repeated(items_of(bound, every("capitals")), ROWS)

    def measured(way: Way) -> Callable[[int], float]:
        def run(_: int) -> float:
            with computing(way, backbones[way.dtype]) as backbone:
                return bare_seconds(backbone, items, batch_size=ROWS, slots=bound.slots)

        return run

    contestants = {name: measured(way) for name, way in named.items()}
    plain = logits_of(named[DEFAULT], backbones, items, slots=bound.slots)
    gaps = {}
    for name, way in named.items():  # what a process does once, before the clock runs
        gaps[name] = float(
            (logits_of(way, backbones, items, slots=bound.slots) - plain).abs().max() / plain.abs().max()
        )
    found = interleave(contestants, repeats=settings.pick(5, 1), seconds=30, seed=settings.seed, note="arithmetic")
    steps, gain = steps_of(backbones, settings)
    write_result(
        settings,
        "arithmetic",
        question=(__doc__ or "").splitlines()[0],
        cells=[
            {
                "cell": "arithmetic",
                "contestant": name,
                "samples_per_second": spread([ROWS / seconds for seconds in values]),
                "times_faster": spread(ratios(found[DEFAULT], values)),
                "gap": gaps[name],
            }
            for name, values in found.items()
        ]
        + steps,
        answers={"bf16-cpu": gain},
        method=METHOD,
        seconds=time.monotonic() - began,
    )


def steps_of(backbones: Mapping[str, Backbone], settings: Settings) -> tuple[list[dict[str, Json]], dict[str, Json]]:
    """Return a row for each size of batches, with how many times faster a step is in bfloat16 than in float32; and the
    entry of the summary, the size at which that is least.
    """
    device = backbones[DEFAULT].device
    if device.type != "cpu":
        return [], no_answer(f"asks for a processor, and this run was on {device.type}")
    if not units():
        return [], no_answer("no units for bfloat16 on this processor")
    bound = bind(backbones[DEFAULT], FACTS_TEMPLATE)
    gains: dict[int, list[float]] = {}
    for batch_size, steps in STEPS.items():
        items = repeated(items_of(bound, every("capitals")), batch_size * settings.pick(steps, 1))
        contestants = {dtype: stepping(backbones[dtype], items, batch_size) for dtype in (DEFAULT, HALF)}
        name = f"steps of {batch_size}"
        found = interleave(contestants, repeats=settings.pick(5, 1), seconds=70, seed=settings.seed, note=name)
        gains[batch_size] = ratios(found[DEFAULT], found[HALF])
    worst = min(gains, key=lambda size: statistics.median(gains[size]))
    listed = ", ".join(f"{size}: {statistics.median(values):.2f}" for size, values in gains.items())
    rows = [{"cell": "steps", "batch_size": size, "bfloat16_gain": spread(values)} for size, values in gains.items()]
    return rows, answer(gains[worst], f"by size of batches {listed}")


def stepping(backbone: Backbone, items: list[ScoringRequest], batch_size: int) -> Callable[[int], float]:
    """Return what trains on items for an epoch and returns the seconds of its steps."""
    bound = bind(backbone, FACTS_TEMPLATE)
    rows, parts = passes(batch_size, mean_tokens(items))
    return lambda number: train_seconds(backbone, bound, items, batch_size=rows, parts=parts, seed=number)


def ways(device: str) -> Mapping[str, Way]:
    """Return what is compared on a device, by names for people."""
    found = {
        DEFAULT: Way(),
        "bfloat16": Way("bfloat16"),
        "float32, eager attention": Way(attention="eager"),
    }
    if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()):
        return {**found, "float32 as TF32": Way(tf32=True)}
    cores = os.cpu_count() or 1
    return {**found, **({"float32, one thread": Way(threads=1)} if cores > 1 else {})}


@contextmanager
def computing(way: Way, backbone: Backbone) -> Iterator[Backbone]:
    """Compute in a way, and as before afterwards."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    attention = backbone.model.config._attn_implementation
    torch.set_num_threads(way.threads or threads)
    torch.set_float32_matmul_precision("high" if way.tf32 else precision)
    backbone.model.set_attn_implementation(way.attention or attention)
    try:
        yield backbone
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        backbone.model.set_attn_implementation(attention)


@torch.no_grad()
def logits_of(way: Way, backbones: Mapping[str, Backbone], items: list[ScoringRequest], *, slots: int) -> torch.Tensor:
    """Return the logits at the scored positions, (N, V) float32."""
    with computing(way, backbones[way.dtype]) as backbone:
        return bare_logits(backbone, items, slots=slots)


if __name__ == "__main__":
    main(settings_of(parser(__doc__).parse_args()))
