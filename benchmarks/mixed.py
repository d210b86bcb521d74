"""Many prompts on one model, asked in process: mixed rows against PEFT, and one text for many prompts."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from benchmarks.common import Json, Settings, answer, interleave, no_answer, ratios, spread
from benchmarks.material import CONTINENTS, bind, every, items_of, passages, seconds_of
from benchmarks.peer import MISSING, Peers, Row, choice_rows, is_installed
from benchmarks.service import prompts
from ptuning.backbone.backbone import Backbone
from ptuning.data.questions import Question
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prediction import Prediction
from ptuning.prompt.prompt import Prompt
from ptuning.prompt.rows import PromptRow
from ptuning.records import Record
from ptuning.serve.engine.engine import Engine

Answers = dict[str, dict[str, Json]]
Cells = list[dict[str, Json]]

FRONT = "[P*6] {x} is a country. Its continent is [Y]"
BEHIND = "{text} [P*6] [Y]"
PROMPTS = 64
ROWS = 256
TEXT_TOKENS = 512
# Of 64 single requests that read the whole text so many are timed, and stand for all: each does the same again.
SINGLE = 16
ONE, KEPT, UNSHARED = "one request", "a request each, text kept", "a request each, nothing kept"
# Differences of log-probabilities that count as the same, by type.
MOST_GAP = {torch.float32: 1e-2, torch.bfloat16: 1.0}


@contextmanager
def engine(backbone: Backbone, *, cache_memory: float = 0.2) -> Iterator[Engine]:
    """Run an engine in this process."""
    made = Engine(PromptModel(backbone), queue_rows=4096, cache_memory=cache_memory)
    made.start()
    try:
        yield made
    finally:
        made.stop()


def measure(backbone: Backbone, settings: Settings) -> tuple[Cells, Answers]:
    """Measure both questions."""
    cells, answers = against_peer(backbone, settings)
    more, others = one_text(backbone, settings)
    return cells + more, answers | others


def mixed_rows(made: Sequence[Prompt], count: int, *, seed: int) -> list[tuple[int, Record]]:
    """Return rows in random order, each with the number of a prompt chosen at random."""
    draw = random.Random(f"mixed {seed}")
    records = [{"x": record["x"]} for record in every("continents")]
    return [(draw.randrange(len(made)), draw.choice(records)) for _ in range(count)]


def against_peer(backbone: Backbone, settings: Settings) -> tuple[Cells, Answers]:
    """Answer rows of many prompts with slots in front, mixed by the engine, and by PEFT prompt after prompt."""
    if not is_installed():
        return [], {"serve-peft-64": no_answer(MISSING)}
    made = prompts(backbone, FRONT, settings.pick(PROMPTS, 4), seed=settings.seed)
    rows = mixed_rows(made, settings.pick(ROWS, 12), seed=settings.seed)
    asked = [PromptRow(made[owner], Question(record)) for owner, record in rows]
    owners, vectors = [owner for owner, _ in rows], [one.slot_vectors for one in made if one.slot_vectors is not None]
    bound = bind(backbone, FRONT)
    items = items_of(bound, [{**record, "y": "Asia"} for _, record in rows], labels=CONTINENTS)
    choices = [choice_rows(item) for item in items]

    def peer(_: int) -> float:
        with Peers(backbone, vectors) as other:
            other.score(choices[:1], owners[:1])
            return seconds_of(lambda: other.score(choices, owners), backbone.device)

    with engine(backbone) as ours:
        gap = largest_gap(
            [one.prediction for one in ours.ask(asked)], scores_of_peer(backbone, vectors, choices, owners)
        )
        found = interleave(
            {"ptuning": lambda _: seconds_of(lambda: ours.ask(asked), backbone.device), "peft": peer},
            repeats=settings.pick(7, 1),
            seconds=60,
            seed=settings.seed,
            note="mixed rows",
        )
    cells: Cells = [
        {"cell": "mixed rows", "contestant": who, "prompts": len(made), "rows": len(rows), "seconds": spread(seconds)}
        for who, seconds in found.items()
    ]
    note = f"{len(rows)} rows of {len(made)} prompts, log-probabilities differ by {gap:.0e}"
    if gap > MOST_GAP[backbone.dtype]:
        return cells, {"serve-peft-64": no_answer(f"scores do not agree: {note}")}
    return cells, {"serve-peft-64": answer(ratios(found["peft"], found["ptuning"]), note)}


def scores_of_peer(
    backbone: Backbone, vectors: Sequence[torch.Tensor], choices: Sequence[Sequence[Row]], owners: Sequence[int]
) -> list[dict[str, float]]:
    """Return PEFT's log-probability of each label, the labels of a row adding up to 1."""
    with Peers(backbone, vectors) as other:
        totals = other.score(choices, owners)
    names = list(CONTINENTS.words)
    return [dict(zip(names, torch.tensor(one).log_softmax(-1).tolist(), strict=True)) for one in totals]


def largest_gap(ours: Sequence[Prediction | None], theirs: Sequence[Mapping[str, float]]) -> float:
    """Return the largest difference of log-probabilities of a label."""
    gaps = [0.0]
    for one, other in zip(ours, theirs, strict=True):
        mine = log_probs_of(one)
        gaps += [abs(mine[name] - value) for name, value in other.items()]
    return max(gaps)


def one_text(backbone: Backbone, settings: Settings) -> tuple[Cells, Answers]:
    """Ask many prompts with late slots about one long text, which is a new one each time."""
    made = prompts(backbone, BEHIND, settings.pick(PROMPTS, 6), seed=settings.seed)
    repeats, single = settings.pick(4, 1), settings.pick(SINGLE, 2)
    texts = iter(passages(backbone, [settings.pick(TEXT_TOKENS, 48)] * (1 + 3 * repeats), seed=settings.seed))
    device = backbone.device

    def new_rows() -> list[PromptRow]:
        question = Question({"text": next(texts)["text"]})
        return [PromptRow(prompt, question) for prompt in made]

    with engine(backbone) as kept, engine(backbone, cache_memory=0) as alone:

        def in_one(_: int) -> float:
            rows = new_rows()
            return seconds_of(lambda: kept.ask(rows), device)

        def one_by_one(_: int) -> float:
            rows = new_rows()
            return seconds_of(lambda: [kept.ask([row]) for row in rows], device)

        def unshared(_: int) -> float:
            rows = new_rows()[:single]
            return seconds_of(lambda: [alone.ask([row]) for row in rows], device) * len(made) / single

        rows = new_rows()
        shared = [found.prediction for found in kept.ask(rows)][:single]
        singly = [alone.ask([row])[0].prediction for row in rows[:single]]
        gap = largest_gap(shared, [log_probs_of(one) for one in singly])
        found = interleave(
            {ONE: in_one, KEPT: one_by_one, UNSHARED: unshared},
            repeats=repeats,
            seconds=90,
            seed=settings.seed,
            note="one text",
        )
    cells: Cells = [
        {"cell": "one text", "contestant": who, "prompts": len(made), "rows": len(made), "seconds": spread(seconds)}
        for who, seconds in found.items()
    ]
    note = f"log-probabilities differ by {gap:.0e}; kept text, a request each: "
    note += f"{statistics.median(ratios(found[UNSHARED], found[KEPT])):.3g} times"
    if gap > MOST_GAP[backbone.dtype]:
        return cells, {"serve-one-text": no_answer(f"scores do not agree: {note}")}
    return cells, {"serve-one-text": answer(ratios(found[UNSHARED], found[ONE]), note)}


def log_probs_of(prediction: Prediction | None) -> dict[str, float]:
    """Return the log-probability of each label."""
    assert prediction is not None
    assert prediction.probabilities is not None
    return {name: math.log(value) for name, value in prediction.probabilities.items()}
