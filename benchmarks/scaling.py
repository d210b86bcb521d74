"""Does cost grow in a straight line with slots, the length of a record, rows, and prompts in one batch?"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from benchmarks.common import Json, Settings, interleave, parser, say, settings_of, spread, write_result
from benchmarks.material import (
    TEXT_TEMPLATE,
    backbone_of,
    bind,
    every,
    items_of,
    passages,
    passes,
    repeated,
    seconds_of,
    train_seconds,
)
from ptuning.backbone.backbone import Backbone
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prompt import Prompt

BATCH = 16
METHOD = (
    "Seconds of ptuning's training steps (of a scoring pass for prompts) at several sizes, the sizes in random order "
    "in each round; a straight line is laid through the medians by least squares. r2 is the share of their spread "
    "that it explains, `off` the largest distance of a median from it, over the largest median."
)


def main(settings: Settings) -> None:
    """Measure the four lines."""
    began = time.monotonic()
    backbone = backbone_of(settings)
    cells: list[dict[str, Json]] = []
    for name, unit, sizes, work in (
        ("slots", "slots of a template", settings.pick((1, 4, 16, 64), (1, 4)), slots),
        ("length", "tokens of a record", settings.pick((16, 64, 128, 256), (8, 16)), length),
        ("rows", "rows of an epoch", settings.pick((32, 64, 128, 256), (8, 16)), rows),
        ("prompts", "prompts in one batch", settings.pick((1, 4, 16, 64), (1, 4)), prompts),
    ):
        contestants = {str(size): work(backbone, size, settings) for size in sizes}
        contestants[str(sizes[0])](0)  # what a process does once, before the clock runs
        found = interleave(contestants, repeats=settings.pick(3, 1), seconds=40, seed=settings.seed, note=name)
        medians = [float(np.median(found[str(size)])) for size in sizes]
        line = straight(sizes, medians)
        say(f"  {name}: {line['fixed_seconds']:.3f} s + {1000 * line['seconds_each']:.2f} ms each, r2 {line['r2']:.3f}")
        cells += [
            {
                "cell": name,
                "contestant": "ptuning",
                "unit": unit,
                "size": size,
                "seconds": spread(found[str(size)]),
                **line,
            }
            for size in sizes
        ]
    write_result(
        settings,
        "scaling",
        question=__doc__ or "",
        cells=cells,
        answers={},
        method=METHOD,
        seconds=time.monotonic() - began,
    )


def straight(sizes: Sequence[int], seconds: Sequence[float]) -> dict[str, float]:
    """Lay a line through points: its two numbers, and how well it fits."""
    each, fixed = (float(value) for value in np.polyfit(sizes, seconds, 1))
    rest = np.array(seconds) - (fixed + each * np.array(sizes))
    total = float(np.square(np.array(seconds) - np.mean(seconds)).sum())
    return {
        "fixed_seconds": fixed,
        "seconds_each": each,
        "r2": 1.0 - float(np.square(rest).sum()) / total if total else 1.0,
        "off": float(np.abs(rest).max()) / max(seconds),
    }


def slots(backbone: Backbone, size: int, settings: Settings) -> Callable[[int], float]:
    """One batch of facts with so many slots, half of them in front."""
    del settings  # the same in a smoke run
    half = size // 2
    bound = bind(backbone, f"{f'[P*{half}] ' if half else ''}[X] [P*{size - half}] [Y]")
    items = items_of(bound, every("capitals")[:BATCH])
    return lambda number: train_seconds(backbone, bound, items, batch_size=BATCH, seed=number)


def length(backbone: Backbone, size: int, settings: Settings) -> Callable[[int], float]:
    """One batch of records of so many tokens."""
    bound = bind(backbone, TEXT_TEMPLATE)
    items = items_of(bound, passages(backbone, [size] * BATCH, seed=settings.seed))
    batch_size, parts = passes(BATCH, size)
    return lambda number: train_seconds(backbone, bound, items, batch_size=batch_size, parts=parts, seed=number)


def rows(backbone: Backbone, size: int, settings: Settings) -> Callable[[int], float]:
    """An epoch of so many facts."""
    del settings  # the same in a smoke run
    bound = bind(backbone, "[P:The capital of] [X] [P:is] [Y]")
    items = repeated(items_of(bound, every("capitals")), size)
    return lambda number: train_seconds(backbone, bound, items, batch_size=BATCH, seed=number)


def prompts(backbone: Backbone, size: int, settings: Settings) -> Callable[[int], float]:
    """The scores of 64 facts, which so many prompts share."""
    template = "[P*3] [X] [P*3] [Y]"
    made = [Prompt.from_token_ids(template, range(9 + number, 15 + number), backbone) for number in range(size)]
    records = every("capitals")[: settings.pick(64, 8)]
    model = PromptModel(backbone)
    owners = [made[index % size] for index in range(len(records))]
    score = partial(model.target_logits, records, owners)
    return lambda _: seconds_of(score, backbone.device)


if __name__ == "__main__":
    main(settings_of(parser(__doc__).parse_args()))
