"""How much memory does each take at its peak, on every question?

Each contestant does each job in a process of its own, which reports its largest resident set (on a GPU: the most that
torch held there). The process that starts them loads no torch: a child's figure begins at its parent's.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial

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

OURS, PEER = "ptuning", "peft"
# Job -> contestants. Every job is one optimizer step or pass on the sizes of the other scripts.
JOBS = ("short-16", "late-sentences", "long-512-16", "candidates")
# The same beside PEFT's prefix tuning, an entry of their own.
DEEP_JOBS = {"deep-16": 16, "deep-160": 160}
# A job of ptuning alone: what it takes above the loaded model.
RANK = "rank"
RANKED_RECORDS, RANKED_TOKENS, RANKED_CANDIDATES = 100, 400, 1000
METHOD = (
    "One process per contestant and job, from its start to the end of one or two optimizer steps (of records of 512 "
    "tokens one pass, of candidates one record's hundred): the largest resident set the system reports, loading "
    "included; on a GPU the most that torch held. Same weights, type, rows and passes as in the other scripts. The "
    "entry is the largest ratio of ptuning's peak to PEFT's over all jobs. Ranking: the 1,000 shortest names of towns "
    "behind records of 400 tokens; the most that the process takes while PromptModel.rank runs, less what it takes "
    "before, looked at every 5 ms."
)


def main(settings: Settings) -> None:
    """Start all children, one after another."""
    assert settings.smoke or "torch" not in sys.modules, "the parent must stay small"
    began = time.monotonic()
    from importlib.util import find_spec

    contestants = (OURS, PEER) if find_spec("peft") is not None else (OURS,)
    peaks: dict[tuple[str, str], list[float]] = {}
    for job in settings.pick((*JOBS, *DEEP_JOBS), (JOBS[0], "deep-16")):
        found = interleave(
            {who: partial(peak_of, job, who, settings) for who in contestants},
            repeats=settings.pick(2, 1),
            seconds=45,
            seed=settings.seed,
            note=job,
        )
        peaks |= {(job, who): values for who, values in found.items()}
        line = ", ".join(f"{who} {max(peaks[job, who]) / 1e6:.0f} MB" for who in contestants)
        say(f"  {job}: {line}")
    ranking = peak_of(RANK, OURS, settings, 0)
    say(f"  {RANK}: {ranking / 1e6:.0f} MB above the loaded model")
    cells: list[dict[str, Json]] = [
        {"cell": job, "contestant": who, "peak_bytes": spread(values)} for (job, who), values in peaks.items()
    ]
    cells.append({"cell": RANK, "contestant": OURS, "peak_bytes": spread([ranking])})
    measured = list(dict.fromkeys(job for job, _ in peaks))
    answers = {
        "memory-worst": worst(peaks, [job for job in measured if job in JOBS]),
        "deep-memory": worst(peaks, [job for job in measured if job in DEEP_JOBS]),
        "rank-memory": answer([ranking / 1e6], settings.backbone_name),
    }
    write_result(
        settings,
        "memory",
        question=(__doc__ or "").splitlines()[0],
        cells=cells,
        answers=answers,
        method=METHOD,
        seconds=time.monotonic() - began,
    )


def worst(peaks: Mapping[tuple[str, str], Sequence[float]], jobs: Sequence[str]) -> dict[str, Json]:
    """Return the entry of the job with the largest peak of ptuning's over PEFT's."""
    if (jobs[0], PEER) not in peaks:
        return no_answer("peft is not installed; make bench installs it")
    found = {job: ratios(peaks[job, OURS], peaks[job, PEER]) for job in jobs}
    most = max(found, key=lambda job: max(found[job]))
    return answer(found[most], f"worst of {len(jobs)} questions: {most}")


def peak_of(job: str, who: str, settings: Settings, _: int) -> float:
    """Run one job in a process of its own and return the bytes at its peak."""
    return float(child("memory", settings, f"--job={job}", f"--who={who}")["peak_bytes"])


def peak_bytes(job: str, who: str, settings: Settings) -> int:
    """Do one job and return this process's peak."""
    import torch

    from benchmarks import material, prediction

    backbone = material.backbone_of(settings)
    if job == RANK:
        return rank(settings, backbone)
    if job == "candidates":
        from ptuning.data.word_lists import targets_of
        from ptuning.prompt.predict import PromptModel
        from ptuning.prompt.prompt import Prompt

        bound = material.bind(backbone, prediction.TEMPLATE)
        prompt = Prompt.from_token_ids(prediction.TEMPLATE, range(9, 9 + bound.slots), backbone)
        records = material.every("capitals")
        candidates = targets_of(records)[: prediction.CANDIDATES]
        if who == OURS:
            PromptModel(backbone).rank(records[:1], prompt, candidates)
        else:
            from benchmarks.peer import Peer

            rows = prediction.candidate_rows(bound, records[0], candidates)
            with Peer(backbone, slots=prompt.slots, vectors=prompt.slot_vectors) as peer:
                peer.score(rows, batch_rows=prediction.CANDIDATES)
    else:
        train(job, who, settings, backbone)
    # Kilobytes on Linux, bytes on a Mac.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if backbone.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(backbone.device)
    return peak


def rank(settings: Settings, backbone: object) -> int:
    """Rank many candidates for long records, and return the bytes that this takes above the loaded model."""
    from benchmarks import material
    from ptuning.backbone.backbone import Backbone
    from ptuning.engine.memory import PeakMemory, taken_bytes
    from ptuning.prompt.predict import PromptModel
    from ptuning.prompt.prompt import Prompt

    assert isinstance(backbone, Backbone)
    towns = [record for name in ("cities", "us_cities", "counties") for record in material.every(name)]
    sentences = " ".join(f"{record['x']} lies in {record['y']}." for record in towns[-100:])
    text = backbone.tokenizer.decode(backbone.tokenizer.encode([sentences])[0][: settings.pick(RANKED_TOKENS - 20, 20)])
    records = [
        {"x": f"{record['x']} lies in {record['y']}. {text}"} for record in towns[: settings.pick(RANKED_RECORDS, 2)]
    ]
    names = sorted({record["x"] for record in towns}, key=lambda name: (len(name), name))
    prompt, model = Prompt.manual("{x} Another town is [Y]"), PromptModel(backbone)
    model.rank(records[:1], prompt, names[:2])  # what a process does once
    before = taken_bytes(backbone.device)
    with PeakMemory(backbone.device) as peak:
        model.rank(records, prompt, names[: settings.pick(RANKED_CANDIDATES, 20)])
    return peak.bytes - before


def train(job: str, who: str, settings: Settings, backbone: object) -> None:
    """Take the optimizer steps of one job."""
    from benchmarks import late, material, training
    from benchmarks.peer import Peer, rows_of
    from ptuning.backbone.backbone import Backbone

    assert isinstance(backbone, Backbone)
    if job in DEEP_JOBS:
        from benchmarks import deep
        from benchmarks.peer import PrefixPeer

        slots = settings.pick(DEEP_JOBS[job], 2)
        bound, items, batch_size, parts = deep.short_facts(backbone, settings, slots=slots)
        items = items[: 2 * batch_size * parts]
        if who == OURS:
            material.train_seconds(backbone, bound, items, batch_size=batch_size, parts=parts)
            return
        with PrefixPeer(backbone, block=deep.block_at_start(backbone, bound)) as prefix:
            prefix.train(rows_of(items), epochs=1, batch_size=batch_size, parts=parts)
        return
    if job == "late-sentences":
        records = material.country_sentences(train=160, dev=40, seed=settings.seed)[0][:64]
        slots, batch_size, parts = late.PEER_SLOTS, late.BATCH, 1
        bound = material.bind(backbone, late.LATE if who == OURS else late.PLAIN)
        items = material.items_of(bound, records, labels=material.CONTINENTS)
    else:
        sizes = settings.pick(training.FULL, training.TINY)
        place = [cell.name for cell in training.FULL].index(job)
        cell = training.Cell(**{**vars(sizes[place]), "steps": 2 if job.startswith("short") else 1})
        items, template = training.records_of(cell, backbone, settings)
        slots, bound = material.SLOTS, material.bind(backbone, template)
        batch_size, parts = material.passes(cell.batch_size, material.mean_tokens(items))
        if parts > 1:  # one pass of a step that takes several takes as much memory
            items, parts = items[:batch_size], 1
    if who == OURS:
        material.train_seconds(backbone, bound, items, batch_size=batch_size, parts=parts)
        return
    with Peer(backbone, slots=slots) as peer:
        peer.train(rows_of(items), epochs=1, batch_size=batch_size, parts=parts)


if __name__ == "__main__":
    given = parser(__doc__)
    given.add_argument("--job", choices=(*JOBS, *DEEP_JOBS, RANK), help="what a child does")
    given.add_argument("--who", choices=(OURS, PEER), help="who does it")
    chosen = given.parse_args()
    if chosen.job:
        print(json.dumps({"peak_bytes": peak_bytes(chosen.job, chosen.who, settings_of(chosen))}))
    else:
        main(settings_of(chosen))
