"""How fast is the service: with many prompts on one model, under load, and beside the same work in process?"""

from __future__ import annotations

import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import (
    Json,
    Settings,
    answer,
    child,
    interleave,
    no_answer,
    parser,
    ratios,
    say,
    settings_of,
    spread,
    write_result,
)
from benchmarks.load import NO_ANSWER, OK, REFUSED, Choice, Load, Run

if TYPE_CHECKING:
    from benchmarks.service import Service
    from ptuning.backbone.backbone import Backbone
    from ptuning.prompt.prediction import Prediction
    from ptuning.prompt.prompt import Prompt

Answers = dict[str, dict[str, Json]]
Cells = list[dict[str, Json]]

ABOVE, OVERLOAD, CALM, HALF = 1.3, 3.0, 0.7, 0.5  # of the capacity
KEPT_UP = 0.95  # of what was offered: who answers so much has not had more than it can do
RECORDS = 64  # of a request that is compared with the same work in process
WRITTEN_TOKENS = 8
PROMPTS, LOADED = 512, 1000
ONE, MANY = "1 prompt", "64 prompts"
PEAK, THRICE = "1.3 times the capacity", "3 times the capacity"
SERVER, PROCESS = "server", "in process"
# Differences of log-probabilities that count as the same.
MOST_GAP = 1e-2
OVER_HTTP = (
    "serve-64-prompts", "serve-p99-64", "serve-overhead-labels", "serve-overhead-written", "serve-overload",
    "serve-hot-load",
)  # fmt: skip
METHOD = (
    "One `ptuning serve` in a process of its own, with 512 prompts of one template, {x} is a country. Its continent is "
    "[P*6] [Y], whose slots hold embeddings of different tokens. Loads come from another process, at random times "
    "fixed beforehand (an open loop), and latency counts from when a request was due. A request is one record. The "
    "sender shares the machine's cores with the server: what it takes stands in the table, and all cells pay it alike. "
    "Loads of one round have the same texts at the same times. Throughput: answers up to the last one of the load's "
    "time, at 1.3 times the capacity that a burst shows; each prompt was asked before. Overload: 3 times the capacity, "
    "against 1.3 times in the same round. Tail: at 0.7 of the throughput with 64 prompts. Overhead: one request of 64 "
    "records, against PromptModel.predict of the same records in this process, in turn. Loading: POST /v1/prompts, one "
    "at a time, while 64 prompts are asked at half the capacity. Memory: the resident set of a process of its own "
    "after a registry has loaded 1,000 prompts, less that before. Mixed rows: 256 facts, each with one of 64 prompts "
    "at random, slots in front. Engine.ask in process runs against PEFT with the same vectors as 64 adapters on one "
    "model, its rows grouped into one pass for each prompt, logits at the scored positions alone, and set_adapter "
    "between; PEFT's rows are tokenised beforehand, the engine's are not, and it keeps the keys and values of slots "
    "in front, from a prompt's second row on, as it does in service. One text: 64 prompts with slots behind a "
    "text of 512 tokens, a new one each time, in one request; against 64 requests of an engine that keeps nothing, of "
    "which 16 are timed and count four times. Answers are compared first."
)


def main(settings: Settings) -> None:
    """Start a server, ask it, and compare."""
    from benchmarks import mixed, service
    from benchmarks.material import backbone_of

    began = time.monotonic()
    backbone = backbone_of(settings)
    gone = service.missing()
    with tempfile.TemporaryDirectory() as place:
        folder, many = Path(place, "prompts"), Path(place, "many")
        made = service.prompts(backbone, service.LABELS, settings.pick(PROMPTS, 8), seed=settings.seed)
        (written,) = service.prompts(backbone, service.WRITTEN, 1, seed=settings.seed, labelled=False)
        service.write_prompts(folder, made)
        written.save(folder / service.WRITES)
        with service.serving(settings, folder, Path(place)) as server:
            # The server gets up meanwhile.
            service.write_prompts(many, [made[at % len(made)] for at in range(settings.pick(LOADED, 12))])
            cells, answers = memory(many, settings)
            if gone is None:
                over = over_http(Asked(server, settings), backbone, made[0], written)
            else:
                over = [], {name: no_answer(gone) for name in OVER_HTTP}
    in_process = mixed.measure(backbone, settings)
    for more, others in (over, in_process):
        cells += more
        answers |= others
    write_result(
        settings,
        "serving",
        question=(__doc__ or "").splitlines()[0],
        cells=cells,
        answers=answers,
        method=METHOD,
        seconds=time.monotonic() - began,
    )


@dataclass
class Asked:
    """A server that is asked, with the rate that it was found to reach."""

    server: Service
    settings: Settings
    capacity: float = 0.0

    def sender(self, load: Load) -> Callable[[int], Run]:
        """Return a contestant that sends a load, with the draws of its round."""
        return lambda number: self.server.run(replace(load, seed=1000 * self.settings.seed + number))

    def rounds(
        self, loads: Mapping[str, Load], cell: str, *, repeats: int, seconds: float
    ) -> tuple[dict[str, list[Run]], Cells]:
        """Send loads in rounds; return what became of them, and a cell for each."""
        found = interleave(
            {name: self.sender(load) for name, load in loads.items()},
            repeats=self.settings.pick(repeats, 1),
            seconds=seconds,
            seed=self.settings.seed,
            note=cell,
        )
        return found, [load_cell(cell, name, loads[name], runs) for name, runs in found.items()]

    def seconds(self, least: float, rows: int) -> float:
        """Return how long a load lasts: longer than ``least`` on a machine that answers so many rows no sooner."""
        return self.settings.pick(min(60.0, max(least, rows / self.capacity)), 0.3)

    @property
    def many(self) -> int:
        """The number of prompts that all questions ask."""
        return self.settings.pick(64, 6)


def over_http(asked: Asked, backbone: Backbone, labelled: Prompt, written: Prompt) -> tuple[Cells, Answers]:
    """Ask the server, one question after the other."""
    asked.server.warm()
    burst = asked.sender(Load(asked.settings.pick(1000.0, 100.0), 0.2, prompts=asked.many))
    burst(0)  # what a process does once, before the clock runs
    asked.capacity = burst(1).per_second()
    say(f"  capacity: {asked.capacity:.3g} records a second")
    cells: Cells = []
    answers: Answers = {}
    questions = (throughput, overload, loading, tail, partial(overhead, backbone=backbone, prompts=(labelled, written)))
    for question in questions:
        more, others = question(asked)
        cells += more
        answers |= others
    return cells, answers


def load_cell(cell: str, name: str, load: Load, runs: Sequence[Run]) -> dict[str, Json]:
    """Return what became of the runs of one load."""
    slowest = [late for run in runs if (late := run.latency(0.99)) is not None]
    return {
        "cell": cell,
        "load": name,
        "offered": load.rate,
        "per_second": spread([run.per_second(load.seconds) for run in runs]),
        "p50": spread([late for run in runs if (late := run.latency(0.5)) is not None] or [0.0]),
        "p99": spread(slowest or [0.0]),
        "answered": sum(len(run.of_status(OK)) for run in runs),
        "refused": sum(len(run.of_status(REFUSED)) for run in runs),
        "failed": sum(len([one for one in run.requests if one.status not in (OK, REFUSED)]) for run in runs),
        "no_answer": sum(len(run.of_status(NO_ANSWER)) for run in runs),
        "late": max(run.late for run in runs),
        "sender": sum(run.cpu_seconds for run in runs) / sum(run.wall_seconds for run in runs),
    }


def throughput(asked: Asked) -> tuple[Cells, Answers]:
    """Offer more than the capacity, to one prompt and to many; what is found is the capacity from then on."""
    few, most = asked.settings.pick((8, 512), (2, 8))
    kinds: dict[str, tuple[int, Choice]] = {
        ONE: (1, "one"), f"{few} prompts": (few, "uniform"), MANY: (asked.many, "uniform"),
        f"{MANY}, Zipf": (asked.many, "zipf"), f"{most} prompts": (most, "uniform"),
    }  # fmt: skip
    seconds = asked.seconds(8.0, 300)
    loads = {name: Load(ABOVE * asked.capacity, seconds, *kind) for name, kind in kinds.items()}
    found, cells = asked.rounds(loads, "throughput", repeats=4, seconds=190)
    rates = {name: [run.per_second(seconds) for run in runs] for name, runs in found.items()}
    offered, asked.capacity = ABOVE * asked.capacity, statistics.median(rates[MANY])
    told = [
        f"{name} {statistics.median(ratios(values, rates[ONE])):.2f}"
        for name, values in rates.items()
        if name not in (ONE, MANY)
    ]
    note = f"{asked.capacity:.3g} records a second with 64; of 1 prompt's, {', '.join(told)}"
    if not asked.settings.smoke and asked.capacity > KEPT_UP * offered:
        return cells, {"serve-64-prompts": no_answer(f"the server kept up with the load, whose burst was slow: {note}")}
    return cells, {"serve-64-prompts": answer(ratios(rates[MANY], rates[ONE]), note)}


def overload(asked: Asked) -> tuple[Cells, Answers]:
    """Offer three times the capacity: what is completed, and how soon is the rest refused?"""
    # The queue of 256 rows is full after less than half of it.
    load = Load(ABOVE * asked.capacity, asked.seconds(10.0, 400), prompts=asked.many)
    loads = {PEAK: load, THRICE: replace(load, rate=OVERLOAD * asked.capacity)}
    found, cells = asked.rounds(loads, "overload", repeats=3, seconds=75)
    rates = {name: [run.per_second(load.seconds) for run in runs] for name, runs in found.items()}
    late = [late for run in found[THRICE] if (late := run.latency(0.99, REFUSED)) is not None]
    if not late and not asked.settings.smoke:
        return cells, {"serve-overload": no_answer("nothing was refused: the machine was slow when it was timed")}
    note = "nothing was refused"
    if late:
        cells.append({"cell": "refusals", "load": THRICE, "p99": spread(late)})
        note = f"refusals, 99th percentile: {1000 * statistics.median(late):.0f} ms (goal 50)"
    return cells, {"serve-overload": answer(ratios(rates[THRICE], rates[PEAK]), note)}


def loading(asked: Asked) -> tuple[Cells, Answers]:
    """Take prompts into service under new names, while others are asked."""
    from benchmarks.service import name_of

    def take(name: str, number: int) -> float:
        began = time.perf_counter()
        asked.server.post("/v1/prompts", {"name": name, "path": name_of(number)})
        return time.perf_counter() - began

    count, pause = asked.settings.pick((20, 0.25), (2, 0.0))
    load = Load(HALF * asked.capacity, asked.settings.pick(8.5, 0.5), prompts=asked.many)
    take("first", 0)
    idle = [take(f"idle-{number}", number) for number in range(asked.settings.pick(10, 1))]
    rounds: list[list[float]] = []
    for at in range(asked.settings.pick(2, 1)):
        rounds.append([])
        with asked.server.running(replace(load, seed=at)):
            time.sleep(asked.settings.pick(1.5, 0.5))  # until requests come
            for number in range(count):
                rounds[-1].append(take(f"hot-{at}-{number}", number))
                time.sleep(pause)
    busy = [seconds for one in rounds for seconds in one]
    cells: Cells = [
        {"cell": "loading", "load": "nothing else", "seconds": spread(idle)},
        {"cell": "loading", "load": "half of the capacity", "seconds": spread(busy)},
    ]
    note = f"medians of {count} loads, the slowest {max(busy):.2g} s; idle {statistics.median(idle):.2g} s"
    return cells, {"serve-hot-load": answer([statistics.median(one) for one in rounds], note)}


def tail(asked: Asked) -> tuple[Cells, Answers]:
    """Offer less than the capacity: how slow are the slowest answers?"""
    load = Load(CALM * asked.capacity, asked.seconds(20.0, 400), prompts=asked.many)
    loads = {ONE: replace(load, choice="one"), MANY: load}
    found, cells = asked.rounds(loads, "tail", repeats=3, seconds=140)
    slowest = {name: [run.latency(0.99) for run in runs] for name, runs in found.items()}
    pairs = [(many, one) for many, one in zip(slowest[MANY], slowest[ONE], strict=True) if many and one]
    if not pairs:
        return cells, {"serve-p99-64": no_answer("nothing was answered")}
    seconds = statistics.median(many for many, _ in pairs)
    note = f"{load.rate:.3g} requests a second for {load.seconds:g} s; with 64 prompts {seconds:.2g} s"
    return cells, {"serve-p99-64": answer([many / one for many, one in pairs], note)}


def overhead(asked: Asked, *, backbone: Backbone, prompts: tuple[Prompt, Prompt]) -> tuple[Cells, Answers]:
    """Send one request of many records, and answer the same in this process."""
    from benchmarks.service import WRITES, name_of, texts
    from ptuning.prompt.predict import PromptModel

    model = PromptModel(backbone)
    records = [{"x": text} for text in texts()[: asked.settings.pick(RECORDS, 4)]]
    generation = {"max_new_tokens": WRITTEN_TOKENS}
    cells: Cells = []
    answers: Answers = {}
    kinds = (("labels", name_of(0), prompts[0], None), ("written", WRITES, prompts[1], generation))
    for kind, name, prompt, how in kinds:
        body = {"model": name, "records": records} | ({} if how is None else {"generation": how})
        ask: dict[str, Callable[[], Any]] = {
            SERVER: partial(asked.server.post, "/v1/predict", body),
            PROCESS: partial(model.predict, records, prompt, generation=how),
        }
        same, note = compared(ask[SERVER]()["predictions"], ask[PROCESS]())
        found = interleave(
            {who: partial(_seconds, work) for who, work in ask.items()},
            repeats=asked.settings.pick(9, 1),
            seconds=asked.settings.pick(30, 1),
            seed=asked.settings.seed,
            note=f"overhead, {kind}",
        )
        cells += [
            {
                "cell": f"one request, {kind}",
                "contestant": who,
                "prompts": 1,
                "rows": len(records),
                "seconds": spread(values),
            }
            for who, values in found.items()
        ]
        values = ratios(found[PROCESS], found[SERVER])
        note = f"{len(records)} records, {note}"
        answers[f"serve-overhead-{kind}"] = answer(values, note) if same else no_answer(f"answers differ: {note}")
    return cells, answers


def _seconds(work: Callable[[], Any], _: int) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def compared(theirs: Sequence[Mapping[str, Any]], ours: Sequence[Prediction]) -> tuple[bool, str]:
    """Return whether the server's answers are those in process, and in words how far they differ."""
    pairs = list(zip(theirs, ours, strict=True))
    gap = max(abs(one["candidates"][0]["log_prob"] - other.log_prob) for one, other in pairs)
    same = sum(one["prediction"] == other.text for one, other in pairs)
    return gap <= MOST_GAP and same == len(pairs), f"log-probabilities differ by {gap:.0e}, {same} answers are the same"


def memory(folder: Path, settings: Settings) -> tuple[Cells, Answers]:
    """Load a folder of prompts in a process of its own."""
    found = child("serving", settings, f"--registry={folder}")
    cells: Cells = [{"cell": "memory", **found}]
    return cells, {"serve-1000-prompts": answer([found["bytes"] / 1e6], f"{found['prompts']} prompts of 6 slots")}


def registry(folder: Path) -> None:
    """Load a folder of prompts, and print how many there are and what they take."""
    import psutil

    from ptuning.prompt.prompt import Prompt
    from ptuning.serve.registry import Registry

    made = Registry(folder, base_name="base", check=lambda _: None)
    Prompt.load(next(folder.iterdir()))  # what a process does once
    gc.collect()
    before = psutil.Process().memory_info().rss
    failed = made.reload().failed
    gc.collect()
    assert not failed, failed
    print(json.dumps({"prompts": len(made.served), "bytes": psutil.Process().memory_info().rss - before}))


if __name__ == "__main__":
    given = parser(__doc__)
    given.add_argument("--registry", type=Path, help="what a child loads")
    chosen = given.parse_args()
    if chosen.registry:
        registry(chosen.registry)
    else:
        main(settings_of(chosen))
