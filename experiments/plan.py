"""Estimate time and cost of comparisons and of many prompts on a number of GPUs. Nothing is run or loaded.

    python -m experiments.plan [--weights 7e9] [--gpus 1,8,64] [--set layer_seconds=0.0007 ...]

The estimates rest on :data:`CONSTANTS`, most of which are assumed: measure layer_seconds and encoder_seconds first.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

# Weights -> layers, of models of common shapes.
LAYERS: Mapping[float, int] = {
    1.35e8: 30, 3.6e8: 32, 1.7e9: 24, 3e9: 36, 7e9: 32, 1.3e10: 40, 3.2e10: 64, 7e10: 80, 4.05e11: 126,
}  # fmt: skip
WEIGHTS_SHARE = 0.5  # of the memory of the GPUs that share a model
TUNED_BYTES = 16  # a tuned weight, its gradient and two moments in float32
PROMPTS_TOGETHER = 16  # prompts of a fleet that are trained in one process
# Defaults of a training; LAMA's T-REx relations, their tokens per row, and their facts per relation.
BATCH, EPOCHS, SEEDS = 8, 6, 5
RELATIONS, TOKENS = 31, 14
TRAIN_FACTS, DEV_FACTS = 414, 138

CONSTANTS: Mapping[str, tuple[float, str]] = {
    "peak_flops": (989e12, "FLOP/s in bfloat16 (the maker's figure for an H100 SXM)"),
    "used_share": (0.35, "share of peak_flops that passes reach (assumed)"),
    "memory_bytes_per_second": (3.35e12, "reading weights from a GPU's memory (the maker's figure)"),
    "memory_bytes": (80e9, "memory of a GPU"),
    "flops_per_weight": (4, "FLOP per token and step with a frozen backbone: 2 forward, 2 back to the slots"),
    "tuned_flops_per_weight": (6, "FLOP per token and step where all weights are trained"),
    "layer_seconds": (1e-3, "launching a layer's kernels, forward and backward (measured on a CPU, 0.98 ms)"),
    "step_seconds": (2e-3, "a step without the model (assumed)"),
    "encoder_seconds": (4e-3, "a prompt's encoder and optimizer, a step (assumed)"),
    "reduce_seconds": (25e-6, "one sum over the GPUs of a split model, four per layer and step (assumed)"),
    "start_seconds": (40.0, "start of a worker: process, imports, CUDA (assumed)"),
    "load_bytes_per_second": (2e9, "reading weights from a shared file system (assumed)"),
    "dollars_per_hour": (2.5, "price of a GPU (assumed)"),
}


@dataclass(frozen=True)
class Estimate:
    """Seconds and dollars of some work, and the GPUs that can be busy; None where the model does not fit."""

    used: int
    seconds: float | None = None
    dollars: float | None = None


@dataclass(frozen=True)
class Planner:
    """Estimates for a backbone of ``weights`` weights; ``constants`` overrides :data:`CONSTANTS`."""

    weights: float
    layers: int | None = None
    weight_bytes: float = 2.0
    constants: Mapping[str, float] = field(default_factory=dict)

    def __getitem__(self, name: str) -> float:
        return self.constants.get(name, CONSTANTS[name][0])

    @property
    def depth(self) -> int:
        """Number of layers; by default those of the known model that is nearest in size."""
        return self.layers or LAYERS[min(LAYERS, key=lambda weights: abs(math.log(weights / self.weights)))]

    @property
    def gpus_per_model(self) -> int:
        """GPUs that one copy of the model takes, a power of two."""
        needed = self.weights * self.weight_bytes / (WEIGHTS_SHARE * self["memory_bytes"])
        return 1 if needed <= 1 else 2 ** math.ceil(math.log2(needed))

    def _pass(self, flops: float, moved: float, launched: float) -> float:
        """Seconds of whatever takes longest: the products, reading the weights, or launching the kernels."""
        products = flops / (self.gpus_per_model * self["peak_flops"] * self["used_share"])
        return max(products, moved / (self.gpus_per_model * self["memory_bytes_per_second"]), launched)

    def step(self, rows: int, tokens: int, *, prompts: int = 1, tuned: bool = False) -> float:
        """Seconds of an optimizer step of ``prompts`` prompts with ``rows`` rows each."""
        flops = self["tuned_flops_per_weight" if tuned else "flops_per_weight"] * self.weights * rows * tokens * prompts
        moved = 2 * self.weights * self.weight_bytes + (2 * TUNED_BYTES * self.weights if tuned else 0.0)
        sums = 4 * self.depth * self["reduce_seconds"] if self.gpus_per_model > 1 else 0.0
        launched = self.depth * self["layer_seconds"]
        return self._pass(flops, moved, launched) + sums + self["step_seconds"] + prompts * self["encoder_seconds"]

    def scoring(self, rows: int, tokens: int) -> float:
        """Seconds of scoring rows in one pass."""
        launched = self.depth * self["layer_seconds"] / 2
        return self._pass(2 * self.weights * rows * tokens, self.weights * self.weight_bytes, launched)

    def training(self, rows: int, dev: int, tokens: int, *, prompts: int = 1, tuned: bool = False) -> float:
        """Seconds of training ``prompts`` prompts at once."""
        steps = math.ceil(rows / BATCH) * EPOCHS * self.step(BATCH, tokens, prompts=prompts, tuned=tuned)
        return steps + (EPOCHS + 1) * prompts * self.scoring(dev, tokens)

    def on(self, gpus: int, units: int, unit_seconds: float, *, tuned: bool = False) -> Estimate:
        """Return the estimate of ``units`` jobs on a number of GPUs. All weights are tuned on a single GPU only."""
        replicas = min(gpus // self.gpus_per_model, units)
        if not replicas or (tuned and TUNED_BYTES * self.weights > self["memory_bytes"]):
            return Estimate(0)
        loading = self["start_seconds"] + self.weights * self.weight_bytes / self["load_bytes_per_second"]
        seconds = loading + math.ceil(units / replicas) * unit_seconds
        used = replicas * self.gpus_per_model
        return Estimate(used, seconds, used * seconds / 3600 * self["dollars_per_hour"])

    def table(self, gpus: Sequence[int]) -> dict[str, list[Estimate]]:
        """Return work -> its estimate for each number of GPUs."""
        facts, fleets = (TRAIN_FACTS, DEV_FACTS, TOKENS), math.ceil(RELATIONS / PROMPTS_TOGETHER)
        cells, many = RELATIONS * SEEDS, 10_000
        work = {
            "LAMA, p-tuning in fleets, 5 seeds": (
                fleets * SEEDS, self.training(*facts, prompts=math.ceil(RELATIONS / fleets)),
            ),
            "LAMA, p-tuning alone, 5 seeds": (cells, self.training(*facts)),
            "LAMA, in-context": (RELATIONS, 13 * self.scoring(DEV_FACTS, 17 * TOKENS)),
            "LAMA, fine-tuning, 5 seeds": (cells, self.training(*facts, tuned=True)),
            "10,000 prompts of 150 facts, alone": (many, self.training(150, 50, TOKENS)),
            "the same in fleets of 16": (
                math.ceil(many / PROMPTS_TOGETHER), self.training(150, 50, TOKENS, prompts=PROMPTS_TOGETHER),
            ),
            "one prompt, 1,000 facts": (1, self.training(1000, 200, TOKENS)),
            "one prompt, 1,000 records of 512 tokens": (1, self.training(1000, 200, 512)),
        }  # fmt: skip
        return {
            name: [self.on(count, units, each, tuned="fine-tuning" in name) for count in gpus]
            for name, (units, each) in work.items()
        }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=float, default=7e9)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--weight-bytes", type=float, default=2.0)
    parser.add_argument("--gpus", default="1,8,64,1000")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help=", ".join(CONSTANTS))
    given = parser.parse_args()
    pairs = dict(pair.split("=", 1) for pair in given.set)
    if unknown := pairs.keys() - CONSTANTS.keys():
        parser.error(f"unknown constants: {', '.join(unknown)}; known: {', '.join(CONSTANTS)}")
    constants = {name: float(value) for name, value in pairs.items()}
    counts = [int(count) for count in given.gpus.split(",")]
    planner = Planner(given.weights, given.layers, given.weight_bytes, constants)
    print(f"| {planner.gpus_per_model} GPUs a model | {' | '.join(f'{count:,} GPUs' for count in counts)} |")
    print("|---|" + "---|" * len(counts))
    for name, estimates in planner.table(counts).items():
        cells = (
            "does not fit"
            if cost.seconds is None
            else f"{cost.seconds / 60:.0f} min, ${cost.dollars:,.1f} ({cost.used:,})"
            for cost in estimates
        )
        print(f"| {name} | {' | '.join(cells)} |")
    for name, (_, about) in CONSTANTS.items():
        print(f"{name} = {planner[name]:g}  {about}")
