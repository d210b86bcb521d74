"""How far is `ptuning estimate` from what training then takes?

    python -m benchmarks.estimates --threads 1 --sentences sst2.jsonl

Each case is estimated in one process and trained in another. Seconds are processor time, which other work on the
machine leaves alone (with one thread it is what the clock would show on an idle one); bytes are the largest resident
set, or on a GPU the most that torch held. Not part of `make bench`: it prints a table.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.common import Settings, child, parser, say, settings_of

HOWS = ("estimate", "train")


@dataclass(frozen=True)
class Case:
    """A training run.

    Args:
        name: What it is called.
        data: ``facts``, ``sentences`` or ``records``.
        records: Records to learn from, and to choose by; the smaller ones of smoke runs come second.
        settings: What differs from the defaults.
    """

    name: str
    data: str
    records: tuple[tuple[int, int], tuple[int, int]]
    settings: dict[str, Any]


CASES = (
    Case("facts", "facts", ((146, 36), (24, 6)), {"epochs": 3}),
    Case("sentences, late slots", "sentences", ((160, 40), (24, 6)), {"epochs": 2}),
    Case("facts, LoRA", "facts", ((146, 36), (24, 6)), {"epochs": 1, "train_backbone": "lora"}),
    Case("facts, tuned", "facts", ((146, 36), (24, 6)), {"epochs": 1, "train_backbone": "full"}),
    Case("records of 128 tokens", "records", ((32, 4), (8, 4)), {"epochs": 1, "batch_size": 16}),
    Case(
        "the same, checkpointing", "records", ((32, 4), (8, 4)), {"epochs": 1, "batch_size": 16, "checkpointing": True}
    ),
)


def main(settings: Settings, wanted: Sequence[str]) -> None:
    """Estimate and train each case, and print a table."""
    say("| case | seconds: estimated | measured | | peak MB: estimated | measured | | the estimate took |")
    say("|---|---|---|---|---|---|---|---|")
    for index, case in enumerate(CASES):
        if wanted and case.name not in wanted:
            continue
        found = {how: child("estimates", settings, f"--child={index}", f"--how={how}") for how in HOWS}
        (one, other) = (found[how] for how in HOWS)
        cells = [case.name]
        for name, scale in (("seconds", 1.0), ("peak", 1e6)):
            off = one[name] / other[name] - 1
            cells += [f"{one[name] / scale:.0f}", f"{other[name] / scale:.0f}", f"{off:+.0%}"]
        say(f"| {' | '.join(cells)} | {one['took']:.0f} s |")


def work(case: Case, how: str, settings: Settings) -> dict[str, float]:
    """Estimate or train a case."""
    import ptuning
    from benchmarks import late, material
    from ptuning.data.reading import load_records
    from ptuning.engine import memory
    from ptuning.training import estimate

    estimate.clock = time.process_time
    backbone = material.backbone_of(settings)
    count, held_out = settings.pick(*case.records)
    given: dict[str, Any] = {"config": ptuning.TrainConfig(**case.settings)}
    if case.data == "facts":
        template = "[P:The capital of] [X] [P:is] [Y]"
        data, given["dev"] = load_records("capitals:train")[:count], load_records("capitals:dev")[:held_out]
    elif case.data == "sentences":
        data, given["dev"], given["labels"], ending = late.labelled(settings, train=count, dev=held_out)
        template = f"{{text}} [P:{ending}] [Y]"
    else:
        template = "[P*3] {text} [P:It lies in] [Y]"
        rows = material.passages(backbone, [128] * (count + held_out), seed=settings.seed)
        data, given["dev"] = rows[:count], rows[count:]
    began = time.process_time()
    if how == "estimate":
        found = estimate.estimate(template, data, backbone=backbone, **given)
        say(json.dumps(found.to_json()))
        seconds, peak = found.seconds["total"], found.memory["peak"]
    else:
        with tempfile.TemporaryDirectory() as folder:
            ptuning.train(template, data, backbone=backbone, out=f"{folder}/run", **given)
        seconds, peak = time.process_time() - began, memory.peak_so_far(backbone.device)
    return {"seconds": seconds, "peak": peak, "took": time.process_time() - began}


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--only", nargs="+", default=[], choices=[case.name for case in CASES], help="some cases")
    options.add_argument("--child", type=int, help="the case of a child")
    options.add_argument("--how", choices=HOWS, help="what a child does")
    chosen = options.parse_args()
    if chosen.child is None:
        main(settings_of(chosen), chosen.only)
    else:
        print(json.dumps(work(CASES[chosen.child], chosen.how, settings_of(chosen))))
