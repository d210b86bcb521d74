"""The goals, and ``summary.json``: every goal with what was measured, taken from the scripts' JSON files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import Json

SUMMARY = "summary"
# In the order in which they run.
SCRIPTS = (
    "startup", "memory", "training", "late", "deep", "prefix", "scores", "fleet", "prediction", "writing", "serving",
    "scaling", "arithmetic", "stages", "workers", "reduced", "formats",
)  # fmt: skip


@dataclass(frozen=True)
class Goal:
    """What a figure should be: at least ``goal`` times, or at most ``goal`` of what is counted in another unit."""

    question: str
    script: str
    goal: float
    unit: str = "times"
    most: bool = False

    @property
    def text(self) -> str:
        """The goal as it stands in a table."""
        unit = {
            "times": "x",
            "seconds": " s",
            "of the peer": "",
            "of transformers": "",
            "MB": " MB",
            "bytes": " bytes",
            "of float32": "",
            "points": " points",
        }[self.unit]
        return f"{self.goal:g}{unit} or {'less' if self.most else 'more'}"


PEER, PREFIX_PEER = "PEFT + Trainer", "PEFT's PREFIX_TUNING + Trainer"
GOALS: dict[str, Goal] = {
    "peft-short-16": Goal(f"one prompt, short facts, batch 16, against {PEER}", "training", 1.8),
    "peft-short-64": Goal(f"the same, batch 64, against {PEER}", "training", 2.2),
    "peft-short-16-auto": Goal(
        f"one prompt, short facts, batch 16, number format as auto chooses, against {PEER} in its own best format",
        "training",
        1.8,
    ),
    "peft-short-64-auto": Goal(f"the same, batch 64, against {PEER} in its own best format", "training", 2.2),
    "bf16-cpu": Goal(
        "a training step in bfloat16 on a processor with units for it, batches of 8, 16 and 64, worst, against float32",
        "arithmetic",
        1.7,
    ),
    "ceiling-short-16": Goal("one prompt, short facts, batch 16, against bare forward and backward", "training", 0.85),
    "ceiling-short-64": Goal("the same, batch 64, against bare forward and backward", "training", 0.85),
    "late-sentences": Goal(
        f"slots late, sentences of 20 to 60 tokens, a whole run of 5 epochs with the pass before it, against {PEER}; "
        "accuracy within 3 points of slots in front",
        "late",
        5.0,
    ),
    "late-512": Goal(f"slots late, records of 512 tokens, an epoch after the first, against {PEER}", "late", 30.0),
    "deep-16": Goal(f"16 deep slots, short facts, batch 16, against {PREFIX_PEER} from the same start", "deep", 1.3),
    "deep-160": Goal(f"the same with 160 deep slots, against {PREFIX_PEER}", "deep", 1.5),
    "deep-late-512": Goal(
        f"deep slots late, records of 512 tokens, an epoch after the first, against {PREFIX_PEER}", "deep", 30.0
    ),
    "deep-mixed-16": Goal("16 rows of 16 deep prompts in one batch, against 16 calls", "deep", 4.0),
    "deep-writing": Goal("writing with 16 deep slots, against writing without a prompt", "deep", 0.95),
    "deep-memory": Goal(
        f"peak memory with 16 and 160 deep slots over that of {PREFIX_PEER}, worst", "memory", 1.0, "of the peer", True
    ),
    "shared-prefix": Goal("long shared prefix (200 of 224 tokens), against the plain path", "prefix", 4.0),
    "time-to-peft-score": Goal("time to PEFT's final development score, against the time of PEFT's run", "scores", 5.0),
    "fleet-16-cpu": Goal("fleet of 16 on a CPU, against 16 runs one after another", "fleet", 1.3),
    "fleet-16-gpu": Goal("fleet of 16 on a GPU, against 16 runs one after another", "fleet", 8.0),
    "workers-2": Goal(
        "two workers against one process on the same cores, eight cells of LAMA, start of the workers included",
        "workers",
        1.5,
    ),
    "ray-start": Goal("start of the engine of workers (Ray)", "workers", 8.0, "seconds", True),
    "candidates-100": Goal("100 candidates a record, against one forward pass per candidate", "prediction", 10.0),
    "writing-32": Goal(
        "greedy writing of 32 tokens, batch of 16, against transformers' generate with the same embeddings",
        "writing",
        1.0,
    ),
    "memory-worst": Goal(
        f"peak memory over that of {PEER}, worst of all questions", "memory", 1.0, "of the peer", True
    ),
    "rank-memory": Goal(
        "ranking 1,000 candidates for 100 records of 400 tokens, peak memory above the loaded model",
        "memory",
        500.0,
        "MB",
        True,
    ),
    "serve-64-prompts": Goal("service: throughput with 64 prompts at random, against one prompt", "serving", 0.95),
    "serve-p99-64": Goal(
        "service: 99th percentile of latency at 70 % of its capacity, 64 prompts against one",
        "serving",
        1.15,
        most=True,
    ),
    "serve-peft-64": Goal(
        "256 rows of 64 prompts at random, mixed, against PEFT batched per prompt and switched between", "serving", 8.0
    ),
    "serve-one-text": Goal(
        "64 prompts with late slots on one text of 512 tokens in one request, against 64 without sharing",
        "serving",
        20.0,
    ),
    "serve-overhead-labels": Goal("service: throughput of labels, against PromptModel in process", "serving", 0.9),
    "serve-overhead-written": Goal(
        "service: throughput of written answers, against PromptModel in process", "serving", 0.85
    ),
    "serve-overload": Goal(
        "service: completed per second with three times its capacity offered, against its peak; 99th percentile of "
        "refusals 50 ms or less",
        "serving",
        0.9,
    ),
    "serve-hot-load": Goal("service: loading a prompt while requests run", "serving", 0.05, "seconds", True),
    "serve-1000-prompts": Goal("service: memory of 1,000 loaded prompts", "serving", 50.0, "MB", True),
    "reduced-bytes": Goal(
        "bytes that a step of data parallelism sends around, lstm encoder", "reduced", 25_000, "bytes", True
    ),
    "int8-memory": Goal("int8: memory of the weights, against float32", "formats", 0.35, "of float32", True),
    "int8-score": Goal(
        "int8: score of a prompt that is trained on it, against one trained on bfloat16", "formats", 3.0, "points", True
    ),
    "import-seconds": Goal("import ptuning", "startup", 0.2, "seconds", True),
    "help-seconds": Goal("ptuning --help", "startup", 0.5, "seconds", True),
    "load-against-transformers": Goal(
        "loading the cached backbone in a new process, against transformers", "startup", 1.1, "of transformers", True
    ),
}
NOT_RUN = "not measured yet; make bench does it"


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """Return script -> what it wrote, in the order of :data:`SCRIPTS`."""
    files = {name: folder / f"{name}.json" for name in SCRIPTS}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in files.items() if path.is_file()}


def summarise(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Json]:
    """Return ``summary.json``: machine and versions of the last script that ran, and an entry for each goal."""
    last = max(results.values(), key=lambda result: result["written"], default={})
    questions: dict[str, Json] = {}
    for name, goal in GOALS.items():
        found = results.get(goal.script, {}).get("answers", {}).get(name)
        if found is None:
            found = {"measured": None, "low": None, "high": None, "note": NOT_RUN}
        questions[name] = {
            "goal": goal.goal,
            "measured": found["measured"],
            "low": found["low"],
            "high": found["high"],
            "unit": goal.unit,
            "note": found["note"],
        }
    return {"machine": last.get("machine"), "versions": last.get("versions"), "questions": questions}


def is_met(name: str, measured: float) -> bool:
    """Whether a figure reaches its goal."""
    goal = GOALS[name]
    return measured <= goal.goal if goal.most else measured >= goal.goal
