"""How fast does one prompt train, beside PEFT with transformers' ``Trainer`` and beside the bare backbone?

Cells: short facts, sentences of 20 to 60 tokens, and records of 128 and 512 tokens, in batches of 16 and 64. All three
read the same tokens: six slots, the text, the target. Short facts also run in the number format that is best for each.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
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
    say,
    settings_of,
    spread,
    write_result,
)
from benchmarks.material import (
    FACTS_TEMPLATE,
    PASS_TOKENS,
    SLOTS,
    TEXT_TEMPLATE,
    backbone_of,
    bare_seconds,
    bind,
    every,
    items_of,
    mean_tokens,
    passages,
    passes,
    repeated,
    train_seconds,
)
from benchmarks.peer import MISSING, Peer, is_installed, rows_of, with_own_attention
from benchmarks.peer import SETTINGS as PEER_SETTINGS
from ptuning.backbone.backbone import Backbone
from ptuning.backbone.number_format import short_name, units
from ptuning.engine.objective import ScoringRequest
from ptuning.records import Record

METHOD = (
    "Samples per second of training steps, in rounds in one process, the three in random order in each. ptuning: its "
    "Trainer with its defaults, from the end of the first development pass to the end of the last step. bare: "
    "forward and backward of the backbone over the same batches, logits at the targets, the embeddings as leaves. "
    f"All three cut a batch into passes of about {PASS_TOKENS} tokens at most and gather gradients. They run on one "
    "loaded model, so the peer has ptuning's attention. On short facts it also runs as its users have it, with "
    "transformers' attention, in each number format that the device has units for; ptuning chooses its own (auto)."
)


@dataclass(frozen=True)
class Cell:
    """One kind of records in one size of batches; ``seconds`` bound its rounds."""

    kind: str
    low: int
    high: int
    batch_size: int
    steps: int
    repeats: int
    seconds: float

    @property
    def name(self) -> str:
        """As it stands in tables."""
        return f"{self.kind}-{self.batch_size}"


# A cell of one round is left out on a machine where that round would take longer.
MOST_SECONDS = 300.0
FULL = (
    Cell("short", 0, 0, 16, 6, 5, 100),
    Cell("short", 0, 0, 64, 2, 5, 100),
    Cell("sentences", 20, 60, 16, 2, 3, 50),
    Cell("sentences", 20, 60, 64, 1, 3, 60),
    Cell("long-128", 128, 128, 16, 1, 3, 50),
    Cell("long-128", 128, 128, 64, 1, 2, 100),
    Cell("long-512", 512, 512, 16, 1, 2, 140),
    Cell("long-512", 512, 512, 64, 1, 1, 0),  # one round, four to five minutes on two cores
)
TINY = tuple(
    Cell(kind, low, high, size, 2, 1, 20)
    for kind, low, high in (("short", 0, 0), ("sentences", 8, 16), ("long-128", 24, 24), ("long-512", 40, 40))
    for size in (4, 8)
)


def main(settings: Settings) -> None:
    """Measure all cells."""
    began = time.monotonic()
    backbone = backbone_of(settings)
    others = own_formats(backbone, settings)
    # What a process does once, before the clock runs.
    measure(Cell("warm-up", 0, 0, 16, 1, 1, 0), backbone, settings, others=others)
    rows: list[dict[str, Json]] = []
    answers: dict[str, dict[str, Json]] = {}
    left_out, last_round = "", 0.0
    for cell in settings.pick(FULL, (*TINY[:2], TINY[-1])):
        if cell.repeats == 1 and 4 * last_round > MOST_SECONDS:  # the cell before it, with a quarter of the rows
            left_out = f" Left out, since a round would take about {4 * last_round:.0f} s here: {cell.name}."
            say(left_out.strip())
            continue
        start = time.monotonic()
        found = measure(cell, backbone, settings, others=others if cell.kind == "short" else {})
        last_round = (time.monotonic() - start) / len(found["bare"][1])
        rows += [row for row, _ in found.values()]
        rates = {name: values for name, (_, values) in found.items()}
        if cell.kind == "short":
            size = 16 if cell.batch_size in (4, 16) else 64
            answers |= short_answers(rates, size)
            answers[f"peft-short-{size}-auto"] = best_format_answer(rates, [*others], backbone, settings)
    write_result(
        settings,
        "training",
        question=(__doc__ or "").splitlines()[0],
        cells=rows,
        answers=answers,
        method=METHOD + left_out,
        peer=PEER_SETTINGS,
        seconds=time.monotonic() - began,
    )


def short_answers(rates: dict[str, list[float]], batch_size: int) -> dict[str, dict[str, Json]]:
    """Return the entries on short facts for one size of batches."""
    note = "capitals, six slots"
    peer = answer(ratios(rates["ptuning"], rates["peft"]), note) if "peft" in rates else no_answer(MISSING)
    return {
        f"peft-short-{batch_size}": peer,
        f"ceiling-short-{batch_size}": answer(ratios(rates["ptuning"], rates["bare"]), note),
    }


def own_formats(backbone: Backbone, settings: Settings) -> dict[str, Backbone]:
    """Return, by names for people, what the peer runs on as its users have it: transformers' attention, in each number
    format that the device has units for. Nothing without a peer, or where ``auto`` does not choose ours.
    """
    if settings.dtype != "auto" or not is_installed():
        return {}
    device = backbone.device
    has_half = bool(units()) if device.type == "cpu" else device.type == "cuda" and torch.cuda.is_bf16_supported()
    formats = ("float32", "bfloat16") if has_half else ("float32",)
    return {f"peft, {name}": with_own_attention(backbone_of(replace(settings, dtype=name))) for name in formats}


def best_format_answer(
    rates: Mapping[str, list[float]], peers: Sequence[str], backbone: Backbone, settings: Settings
) -> dict[str, Json]:
    """Return the entry on short facts in the number formats that are fastest for either."""
    if settings.dtype != "auto":
        return no_answer("asks for --dtype auto")
    if not peers:
        return no_answer(MISSING)
    best = max(peers, key=lambda name: statistics.median(rates[name]))
    note = f"capitals, six slots; ptuning in {short_name(backbone.dtype)}; best of the peer: {best}"
    return answer(ratios(rates["ptuning"], rates[best]), note)


def measure(
    cell: Cell, backbone: Backbone, settings: Settings, *, others: Mapping[str, Backbone]
) -> dict[str, tuple[dict[str, Json], list[float]]]:
    """Return, for each contestant, its row and its samples per second in every round; ``others`` are further models
    that the peer runs on.
    """
    items, template = records_of(cell, backbone, settings)
    bound = bind(backbone, template)
    tokens = mean_tokens(items)
    batch_size, parts = passes(cell.batch_size, tokens)
    peer_rows = rows_of(items)
    assert sum(len(row.ids) + SLOTS for row in peer_rows) == sum(item.tokens for item in items), "unequal token streams"

    def ours(number: int) -> float:
        return len(items) / train_seconds(backbone, bound, items, batch_size=batch_size, parts=parts, seed=number)

    def bare(number: int) -> float:
        order = random.Random(number).sample(items, len(items))
        return len(items) / bare_seconds(backbone, order, batch_size=batch_size, slots=SLOTS)

    def peer_on(model: Backbone) -> Callable[[int], float]:
        def run(number: int) -> float:
            with Peer(model, slots=SLOTS, seed=number) as prompt:
                return len(items) / prompt.train(peer_rows, epochs=1, batch_size=batch_size, parts=parts, seed=number)

        return run

    peers = {"peft": backbone, **others} if is_installed() else {}
    contestants = {"ptuning": ours, "bare": bare, **{name: peer_on(model) for name, model in peers.items()}}
    found = interleave(contestants, repeats=cell.repeats, seconds=cell.seconds, seed=settings.seed, note=cell.name)
    line = ", ".join(f"{name} {spread(values)['median']:.1f}" for name, values in found.items())
    say(f"  {cell.name}: {line} samples/s ({tokens:.0f} tokens)")
    shared = {"cell": cell.name, "batch_size": cell.batch_size, "rows_per_pass": batch_size, "steps": cell.steps}
    return {
        name: (
            {
                **shared,
                "tokens_per_row": tokens,
                "contestant": name,
                "samples_per_second": spread(values),
                "of_bare": spread(ratios(values, found["bare"])),
            },
            values,
        )
        for name, values in found.items()
    }


def records_of(cell: Cell, backbone: Backbone, settings: Settings) -> tuple[list[ScoringRequest], str]:
    """Return the items of a cell's steps, and the template they fill."""
    count = cell.batch_size * cell.steps
    template = FACTS_TEMPLATE if not cell.high else TEXT_TEMPLATE
    records: list[Record] = every("capitals")
    if cell.high:
        draw = random.Random(f"{cell.kind} {settings.seed}")
        # The length is that of the whole row, slots and a target of about two tokens included, where it is fixed.
        off = SLOTS + 2 if cell.low == cell.high else 0
        lengths = [draw.randint(cell.low, cell.high) - off for _ in range(count)]
        records = passages(backbone, lengths, seed=settings.seed)
    return repeated(items_of(bind(backbone, template), records), count), template


if __name__ == "__main__":
    main(settings_of(parser(__doc__).parse_args()))
