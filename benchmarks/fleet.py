"""How much faster do many prompts train at once than one after another?

Both are what a user calls: ``ptuning.train_fleet`` once, ``ptuning.train`` for each prompt.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial

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
from benchmarks.material import FACTS_TEMPLATE, backbone_of, every, seconds_of
from ptuning.backbone.backbone import Backbone
from ptuning.config import TrainConfig
from ptuning.training.fleet import train_fleet
from ptuning.training.run import TrainResult, train
from ptuning.training.spec import FleetPrompt

SIZES = (1, 4, 16, 64)
# The size of the goal, and how many runs one after another stand for it.
ASKED = 16
# What a prompt learns from and is chosen by; a run takes an epoch in batches of the default size.
TRAIN_ROWS, DEV_ROWS = 16, 4
# Slot vectors of the two ways may differ by rounding: steps of 0.001 on sums in another order.
TOLERANCE = 1e-3
METHOD = (
    f"Prompts {FACTS_TEMPLATE} with seeds of their own on country -> capital, {TRAIN_ROWS} facts to learn from and "
    f"{DEV_ROWS} to choose by, one epoch in batches of {TrainConfig().batch_size}, all else by default. A fleet of K "
    "has all K in training at once. Whole calls are timed, development passes and the making of encoders and "
    "optimizers included; the fleet of 64 runs once. The slot vectors of both ways are compared first."
)


def main(settings: Settings) -> None:
    """Measure fleets of all sizes in turn with runs one after another."""
    began = time.monotonic()
    backbone = backbone_of(settings)
    prompts = fleet_of(settings.pick(max(SIZES), 4))
    sizes = [size for size in SIZES if size <= len(prompts)]
    asked = min(ASKED, len(prompts))
    gap = difference(backbone, prompts[: settings.pick(4, 2)])
    say(f"  slot vectors of the two ways differ by {gap:.1e} at most")

    def one_after_another(_: int) -> float:
        return seconds_of(lambda: [alone(backbone, prompt) for prompt in prompts[:asked]], backbone.device)

    def together(size: int, _: int) -> float:
        return seconds_of(lambda: train_fleet(prompts[:size], backbone=backbone, at_once=size), backbone.device)

    contestants: dict[str, Callable[[int], float]] = {"one after another": one_after_another}
    contestants |= {f"fleet of {size}": partial(together, size) for size in sizes if size <= ASKED}
    found = interleave(contestants, repeats=4, seconds=settings.pick(110, 5), seed=settings.seed, note="fleets")
    for size in sizes:
        if size > ASKED:  # takes as long as all others together, so it runs once
            found[f"fleet of {size}"] = [together(size, 0)]
    counts = {"one after another": asked} | {f"fleet of {size}": size for size in sizes}
    cells: list[dict[str, Json]] = [
        {
            "cell": "short facts",
            "contestant": name,
            "prompts": counts[name],
            "seconds": spread(values),
            "seconds_per_prompt": spread([value / counts[name] for value in values]),
        }
        for name, values in found.items()
    ]
    write_result(
        settings,
        "fleet",
        question=(__doc__ or "").splitlines()[0],
        cells=cells,
        answers=answers(backbone, found, asked, gap),
        method=METHOD,
        seconds=time.monotonic() - began,
    )


def answers(backbone: Backbone, found: Mapping[str, list[float]], asked: int, gap: float) -> dict[str, dict[str, Json]]:
    """Answer for the device that it ran on; the other one is not at hand."""
    here, there = ("gpu", "cpu") if backbone.device.type == "cuda" else ("cpu", "gpu")
    made = answer(ratios(found["one after another"], found[f"fleet of {asked}"]), f"vectors differ by {gap:.0e}")
    if gap > TOLERANCE:
        made = no_answer(f"the two ways learn slot vectors that differ by {gap:.1e}")
    missing = "no GPU on this machine" if there == "gpu" else "run on a GPU; --device cpu measures it"
    return {f"fleet-16-{here}": made, f"fleet-16-{there}": no_answer(missing)}


def fleet_of(count: int) -> list[FleetPrompt]:
    """Return prompts that differ in their seeds."""
    facts = every("capitals")
    train_rows, dev_rows = facts[:TRAIN_ROWS], facts[TRAIN_ROWS : TRAIN_ROWS + DEV_ROWS]
    return [
        FleetPrompt(f"seed-{seed}", FACTS_TEMPLATE, train_rows, dev=dev_rows, config=TrainConfig(epochs=1, seed=seed))
        for seed in range(count)
    ]


def alone(backbone: Backbone, prompt: FleetPrompt) -> TrainResult:
    """Train a prompt of the fleet by itself."""
    return train(prompt.template, prompt.data, backbone=backbone, dev=prompt.dev, config=prompt.config)


def difference(backbone: Backbone, prompts: list[FleetPrompt]) -> float:
    """Return how far the slot vectors of the two ways lie apart, at most; also warms both up."""
    results = train_fleet(prompts, backbone=backbone).results
    gaps = [0.0]
    for prompt in prompts:
        one, other = alone(backbone, prompt).prompt.slot_vectors, results[prompt.name].prompt.slot_vectors
        assert one is not None
        assert other is not None
        gaps.append(float((one - other).abs().max()) if one.shape == other.shape else torch.inf)
    return max(gaps)


if __name__ == "__main__":
    main(settings_of(parser(__doc__).parse_args()))
