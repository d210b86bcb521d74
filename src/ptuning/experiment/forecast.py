"""A plan on paper: time and cost of comparisons, of many prompts and of one prompt, on so many GPUs.

Nothing is run. The figures rest on :data:`CONSTANTS`, most of which are assumed; a user with a GPU measures their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ptuning.errors import ConfigError, closest
from ptuning.files import Json
from ptuning.workers.units import UNIT_PROMPTS

NUMBERS_OF_GPUS = (1, 8, 64, 1000)
# Weights -> layers, of models of common shapes.
LAYERS: Mapping[float, int] = {
    1.35e8: 30, 3.6e8: 32, 1.7e9: 24, 3e9: 36, 7e9: 32, 1.3e10: 40, 3.2e10: 64, 7e10: 80, 4.05e11: 126,
}  # fmt: skip
# A model is spread over so many GPUs that its weights take at most this share of their memory.
WEIGHTS_SHARE = 0.5
# Of the numbers that are given; the smallest is one by this.
LARGEST = 1e30
# Of a weight that is tuned: itself, its gradient and two moments, all float32.
TUNED_BYTES = 16
# The learning that is planned: the defaults of a training, and LAMA's T-REx relations with their facts per relation.
BATCH, EPOCHS, SEEDS = 8, 6, 5
RELATIONS, TOKENS = 31, 14
FACTS = {"train": 414, "dev": 138, "test": 138}


@dataclass(frozen=True)
class Constant:
    """A figure that plans rest on; ``measured`` says where, and it is assumed otherwise."""

    value: float
    unit: str
    about: str
    measured: str | None = None

    @property
    def origin(self) -> str:
        """Whether it is measured or assumed."""
        return f"measured: {self.measured}" if self.measured else "assumed"


CONSTANTS: Mapping[str, Constant] = {
    "peak_flops": Constant(989e12, "FLOP/s", "bfloat16 products of a GPU at best (the maker's figure for an H100 SXM)"),
    "used_share": Constant(0.35, "", "share of peak_flops that passes reach; not known for a backward pass to slots"),
    "memory_bytes_per_second": Constant(3.35e12, "B/s", "reading weights from a GPU's memory (the maker's figure)"),
    "memory_bytes": Constant(80e9, "B", "memory of a GPU"),
    "flops_per_weight": Constant(4, "FLOP", "a token and step with a frozen backbone: 2 forward, 2 back to the slots"),
    "tuned_flops_per_weight": Constant(6, "FLOP", "a token and step where all weights are trained"),
    "layer_seconds": Constant(
        1e-3, "s", "launching a layer's kernels, forward and backward", "Python and dispatch on a CPU, 0.98 ms"
    ),
    "step_seconds": Constant(2e-3, "s", "a step beside the model"),
    "encoder_seconds": Constant(
        4e-3, "s", "a prompt's encoder and optimizer, a step; in a fleet of encoders none or mlp nearly nothing"
    ),
    "reduce_seconds": Constant(25e-6, "s", "one sum over the GPUs of a split model, four for each layer and step"),
    "start_seconds": Constant(40.0, "s", "start of a worker: process, imports, CUDA"),
    "load_bytes_per_second": Constant(2e9, "B/s", "reading weights from a shared file system"),
    "dollars_per_hour": Constant(2.5, "$", "price of a GPU for an hour"),
}


@dataclass(frozen=True)
class Planned:
    """Some work on so many GPUs: how many of them can be busy, and what it takes. ``seconds`` is None where the model
    does not fit.
    """

    gpus: int
    used: int
    seconds: float | None
    dollars: float | None


@dataclass(frozen=True)
class PlanLine:
    """A line of the plan: some work, cut into ``units`` of ``unit_seconds`` each."""

    what: str
    units: int
    unit_seconds: float
    on: Sequence[Planned]


@dataclass(frozen=True)
class Paper:
    """A plan for a backbone of so many ``weights``.

    Args:
        weights: Number of weights of the backbone.
        layers: Its layers; by default those of a model of this size.
        weight_bytes: Bytes of a weight: 2 for bfloat16, 1 for int8.
        split: GPUs that share a model; by default as many as its weights need.
        constants: Other values of :data:`CONSTANTS`.

    A ConfigError if a number cannot be, or there is no such constant.
    """

    weights: float
    layers: int | None = None
    weight_bytes: float = 2.0
    split: int | None = None
    constants: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        for name in self.constants or ():
            if name not in CONSTANTS:
                known = ", ".join(CONSTANTS)
                raise ConfigError(f"there is no constant '{name}'.{closest(name, CONSTANTS)} Known: {known}")
        numbers = {name: getattr(self, name) for name in ("weights", "layers", "weight_bytes", "split")}
        for name, value in {**numbers, **(self.constants or {})}.items():
            if value is not None and not 1 / LARGEST <= value <= LARGEST:
                raise ConfigError(f"{name} is {value:g}; it must be a number above 0, and not above {LARGEST:g}")

    def __getitem__(self, name: str) -> float:
        return (self.constants or {}).get(name, CONSTANTS[name].value)

    @property
    def depth(self) -> int:
        """Number of layers."""
        nearest = min(LAYERS, key=lambda weights: abs(math.log(weights / self.weights)))
        return self.layers or LAYERS[nearest]

    @property
    def size(self) -> float:
        """Bytes of all weights."""
        return self.weights * self.weight_bytes

    @property
    def replica(self) -> int:
        """GPUs that one copy of the model takes, a power of two."""
        if self.split is not None:
            return self.split
        needed = self.size / (WEIGHTS_SHARE * self["memory_bytes"])
        return 1 if needed <= 1 else 2 ** math.ceil(math.log2(needed))

    def step(self, rows: int, tokens: int, *, prompts: int = 1, tuned: bool = False) -> float:
        """Seconds of an optimizer step of ``prompts`` at once, each with so many rows."""
        flops = self["tuned_flops_per_weight" if tuned else "flops_per_weight"] * self.weights * rows * tokens * prompts
        products = flops / (self.replica * self["peak_flops"] * self["used_share"])
        moved = 2 * self.size + (2 * TUNED_BYTES * self.weights if tuned else 0.0)  # these are read and written
        reading = moved / (self.replica * self["memory_bytes_per_second"])
        sums = 4 * self.depth * self["reduce_seconds"] if self.replica > 1 else 0.0
        launched = self.depth * self["layer_seconds"]
        return max(products, reading, launched) + sums + self["step_seconds"] + prompts * self["encoder_seconds"]

    def scoring(self, rows: int, tokens: int) -> float:
        """Seconds of scoring rows, in one pass."""
        products = 2 * self.weights * rows * tokens / (self.replica * self["peak_flops"] * self["used_share"])
        reading = self.size / (self.replica * self["memory_bytes_per_second"])
        return max(products, reading, self.depth * self["layer_seconds"] / 2)

    def training(self, rows: int, dev: int, tokens: int, *, prompts: int = 1, tuned: bool = False) -> float:
        """Seconds of training ``prompts`` at once."""
        steps = math.ceil(rows / BATCH) * EPOCHS
        scored = (EPOCHS + 1) * prompts * self.scoring(dev, tokens)
        return steps * self.step(BATCH, tokens, prompts=prompts, tuned=tuned) + scored

    def on(self, gpus: int, units: int, unit_seconds: float, *, tuned: bool = False) -> Planned:
        """Return what units of work take on so many GPUs. All weights are ``tuned`` on a GPU of their own only."""
        replicas = min(gpus // self.replica, units)
        if not replicas or (tuned and TUNED_BYTES * self.weights > self["memory_bytes"]):
            return Planned(gpus, 0, None, None)
        loading = self["start_seconds"] + self.size / self["load_bytes_per_second"]
        seconds = loading + math.ceil(units / replicas) * unit_seconds
        used = replicas * self.replica
        return Planned(gpus, used, seconds, used * seconds / 3600 * self["dollars_per_hour"])

    def lines(self, gpus: Sequence[int] = NUMBERS_OF_GPUS) -> list[PlanLine]:
        """Return the plan: LAMA with five seeds in several ways, 10,000 prompts, and one prompt."""
        for number in gpus:
            if number < 1:
                raise ConfigError(f"gpus is {number}; it must be 1 or more")
        rows, dev, most = FACTS["train"], FACTS["dev"], UNIT_PROMPTS
        cells, many = RELATIONS * SEEDS, 10_000
        fleets = math.ceil(RELATIONS / most) * SEEDS
        in_fleet = math.ceil(RELATIONS / math.ceil(RELATIONS / most))
        in_context = (4 * 3 + 1) * self.scoring(dev, 17 * TOKENS)
        asked = [
            (
                "LAMA, p-tuning in fleets, 5 seeds",
                fleets,
                self.training(rows, dev, TOKENS, prompts=in_fleet),
            ),
            ("LAMA, p-tuning alone, 5 seeds", cells, self.training(rows, dev, TOKENS)),
            ("LAMA, in-context", RELATIONS, in_context),
            ("LAMA, fine-tuning, 5 seeds", cells, self.training(rows, dev, TOKENS, tuned=True)),
            ("10,000 prompts of 150 facts, alone", many, self.training(150, 50, TOKENS)),
            ("the same in fleets of 16", math.ceil(many / most), self.training(150, 50, TOKENS, prompts=most)),
            ("one prompt, 1,000 facts", 1, self.training(1000, 200, TOKENS)),
            ("one prompt, 1,000 records of 512 tokens", 1, self.training(1000, 200, 512)),
        ]
        return [
            PlanLine(what, units, each, [self.on(one, units, each, tuned="fine-tuning" in what) for one in gpus])
            for what, units, each in asked
        ]

    def to_json(self, gpus: Sequence[int] = NUMBERS_OF_GPUS) -> dict[str, Json]:
        """Return the plan with the constants that it rests on."""
        given = self.constants or {}
        return {
            "weights": self.weights,
            "layers": self.depth,
            "gpus_per_model": self.replica,
            "constants": {
                name: {"value": self[name], "unit": one.unit, "origin": "given" if name in given else one.origin}
                for name, one in CONSTANTS.items()
            },
            "plan": [
                {
                    "what": line.what,
                    "units": line.units,
                    "unit_seconds": line.unit_seconds,
                    "on": [dict(vars(one)) for one in line.on],
                }
                for line in self.lines(gpus)
            ],
        }
