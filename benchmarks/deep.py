"""What do deep slots cost: training beside PEFT's prefix tuning from the same start, mixed rows, and writing?

Deep slots in front of short facts, 16 and 160 of them; deep slots behind records of 512 tokens; 16 rows of 16 prompts
in one batch; and texts written with and without a prompt.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import replace
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
from benchmarks.material import (
    CONTINENTS,
    PASS_TOKENS,
    backbone_of,
    bind,
    every,
    items_of,
    mean_tokens,
    passages,
    passes,
    repeated,
    seconds_of,
    train_seconds,
)
from benchmarks.mixed import largest_gap, log_probs_of
from benchmarks.peer import MISSING, PrefixPeer, is_installed, rows_of
from benchmarks.peer import SETTINGS as PEER_SETTINGS
from ptuning.backbone.backbone import Backbone
from ptuning.config import TrainConfig
from ptuning.engine.forward import target_logits
from ptuning.engine.objective import ScoringRequest, inputs_of
from ptuning.engine.prefix_store import PreparedPrompt
from ptuning.engine.runner import generate
from ptuning.engine.soft_prompt import DeepParams, PromptBatch, prefix_of_tokens
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prompt import Prompt
from ptuning.template.encode import TokenizedTemplate
from ptuning.training.trainer import Trainer

FACTS = "The capital of [X] is [Y]"
ENDING = "In short, this country lies in"
LATE = f"{{text}} [D:{ENDING}] [Y]"
PLAIN = f"{{text}} {ENDING} [Y]"
FRONT_SLOTS = 16
FRONT = f"[D*{FRONT_SLOTS}] {{x}} is a country. Its continent is [Y]"
PROMPTS = 16
WRITTEN_ROWS, WRITTEN_TOKENS = 16, 32
# Differences of log-probabilities that count as the same, by type.
MOST_GAP = {torch.float32: 1e-4, torch.bfloat16: 1.0}
Found = tuple[list[dict[str, Json]], dict[str, Json]]
METHOD = (
    "Training: samples per second of the steps of one epoch, in rounds in one process and in random order. Both start "
    "at the keys and values of the same tokens, train with the same schedule on the same rows and passes of about "
    f"{PASS_TOKENS} tokens, ptuning with its defaults (a tenth of the columns is dropped, each layer has its own "
    f"learning rate). Records of 512 tokens: {LATE} against as many slots of PEFT in front of {PLAIN}; seconds of the "
    "steps of an epoch, for ptuning the mean of all after the first. Mixed rows: one call of PromptModel.predict with "
    f"{PROMPTS} prompts against {PROMPTS} calls. Writing: {WRITTEN_TOKENS} tokens greedily behind {WRITTEN_ROWS} "
    "records, with 16 deep slots and without any."
)


def main(settings: Settings) -> None:
    """Measure all questions."""
    began = time.monotonic()
    backbone = backbone_of(settings)
    cells: list[dict[str, Json]] = []
    answers: dict[str, dict[str, Json]] = {}
    questions: dict[str, Callable[[Backbone, Settings], Found]] = {
        "deep-16": partial(steps, slots=16),
        "deep-160": partial(steps, slots=160),
        "deep-late-512": late,
        "deep-mixed-16": mixed,
        "deep-writing": writing,
    }
    for name, measure in questions.items():
        rows, answers[name] = measure(backbone, settings)
        cells += rows
    write_result(
        settings,
        "deep",
        question=(__doc__ or "").splitlines()[0],
        cells=cells,
        answers=answers,
        method=METHOD,
        peer=PEER_SETTINGS,
        seconds=time.monotonic() - began,
    )


def short_facts(
    backbone: Backbone, settings: Settings, *, slots: int
) -> tuple[TokenizedTemplate, list[ScoringRequest], int, int]:
    """Return the template with deep slots that start at tokens, the items of some steps, and how a batch is cut."""
    draw = random.Random(f"deep {settings.seed}")
    bound = bind(backbone, f"[D*{slots}] {FACTS}")
    bound = bound.starting(bound.layout.filled_up(iter(lambda: draw.randrange(backbone.vocabulary), None)))
    batch_size, count = settings.pick(16, 4), settings.pick(6, 2)
    items = repeated(items_of(bound, every("capitals")), batch_size * count)
    return bound, items, *passes(batch_size, mean_tokens(items))


def steps(backbone: Backbone, settings: Settings, *, slots: int) -> Found:
    """Time training steps of short facts behind a block of deep slots."""
    slots = settings.pick(slots, slots // 8)
    bound, items, batch_size, parts = short_facts(backbone, settings, slots=slots)
    block, rows = block_at_start(backbone, bound), rows_of(items)

    def ours(number: int) -> float:
        return len(items) / train_seconds(backbone, bound, items, batch_size=batch_size, parts=parts, seed=number)

    def peer(number: int) -> float:
        with PrefixPeer(backbone, block=block, seed=number) as prompt:
            return len(items) / prompt.train(rows, epochs=1, batch_size=batch_size, parts=parts, seed=number)

    contestants: dict[str, Callable[[int], float]] = {"ptuning": ours}
    contestants |= {"peft": peer} if is_installed() else {}
    for run in contestants.values():
        run(0)  # what a process does once, before the clock runs
    found = interleave(
        contestants, repeats=settings.pick(5, 1), seconds=100, seed=settings.seed, note=f"{slots} deep slots"
    )
    cells: list[dict[str, Json]] = [
        {"cell": f"{slots} deep slots, short facts", "contestant": who, "samples_per_second": spread(values)}
        for who, values in found.items()
    ]
    if "peft" not in found:
        return cells, no_answer(MISSING)
    gap = start_gap(backbone, items[:8], DeepParams(block, bound.layout.prefix.bos))
    note = f"batch of {batch_size * parts}; log-probabilities before the first step differ by {gap:.0e}"
    say(f"  {note}")
    if gap > MOST_GAP[backbone.dtype]:
        return cells, no_answer(f"the starts do not agree: {note}")
    return cells, answer(ratios(found["ptuning"], found["peft"]), note)


def block_at_start(backbone: Backbone, bound: TokenizedTemplate) -> torch.Tensor:
    """Return the keys and values that the deep slots in front of a template start at, (L, 2, K, C, D)."""
    return prefix_of_tokens(
        backbone, [token or 0 for token in (*bound.layout.prefix.bos_ids, *bound.layout.prefix.start_ids)]
    )


@torch.no_grad()
def start_gap(backbone: Backbone, items: list[ScoringRequest], deep: DeepParams) -> float:
    """Return the largest difference of a target's log-probability between ptuning and PEFT at the start."""
    learned = PromptBatch.of(torch.zeros(0, backbone.width), deep).to(backbone.device)
    logits = target_logits(backbone, inputs_of(items), learned).log_softmax(-1)  # (N, V)
    assert deep.prefix is not None
    with PrefixPeer(backbone, block=deep.prefix) as prompt:
        theirs, _ = prompt.score(rows_of(items))
    gaps, at = [], 0
    for item, other in zip(items, theirs, strict=True):
        choice = item.choices[0]
        own = sum(
            float(logits[at + place, token]) for place, token in enumerate(choice.target_ids[: choice.own_tokens])
        )
        gaps.append(abs(own - other))
        at += len(choice.target_ids)
    return max(gaps)


def late(backbone: Backbone, settings: Settings) -> Found:
    """Time an epoch on records of 512 tokens in front of deep slots."""
    length, rows = settings.pick(512, 48), settings.pick(16, 8)
    records = passages(backbone, [length - 10] * rows, seed=settings.seed)
    epochs = settings.pick(6, 3)
    batch_size, parts = passes(rows, length)
    bound = bind(backbone, LATE)
    slots = len(bound.layout.offset_slots)
    block = prefix_of_tokens(backbone, backbone.tokenizer.encode([ENDING])[0][:slots])

    def ours(number: int) -> float:
        items = items_of(bound, records)
        config = TrainConfig(epochs=epochs, batch_size=batch_size * parts, seed=number, patience=epochs)
        trainer = Trainer(backbone, bound, config=config)
        trainer.fit(items, items[:1])
        later = [epoch["seconds"] for epoch in trainer.state.history[1:]]
        return sum(later) / len(later)

    def peer(number: int) -> float:
        data = rows_of(items_of(bind(backbone, PLAIN), records))
        with PrefixPeer(backbone, block=block, seed=number) as model:
            return model.train(data, epochs=1, batch_size=batch_size, parts=parts, seed=number)

    found = interleave(
        {"late deep slots": ours} | ({"peft": peer} if is_installed() else {}),
        repeats=3,
        seconds=settings.pick(150, 5),
        seed=settings.seed,
        note=f"records of {length} tokens",
    )
    cells: list[dict[str, Json]] = [
        {"cell": f"{length} tokens, an epoch after the first", "contestant": who, "seconds": spread(values)}
        for who, values in found.items()
    ]
    if "peft" not in found:
        return cells, no_answer(MISSING)
    return cells, answer(ratios(found["peft"], found["late deep slots"]), f"{rows} records, {slots} slots of either")


def mixed(backbone: Backbone, settings: Settings) -> Found:
    """Answer a row of each of many prompts in one batch, and in a call each."""
    count = settings.pick(PROMPTS, 4)
    made = deep_prompts(backbone, count, seed=settings.seed)
    records = [{"x": record["x"]} for record in every("continents")[:count]]
    model = PromptModel(backbone)
    one = model.predict(records, made)
    alone = [model.predict([record], prompt)[0] for record, prompt in zip(records, made, strict=True)]
    gap = largest_gap(one, [log_probs_of(answer) for answer in alone])

    def apart() -> None:
        for record, prompt in zip(records, made, strict=True):
            model.predict([record], prompt)

    found = interleave(
        {
            "one batch": lambda _: seconds_of(lambda: model.predict(records, made), backbone.device),
            "a call each": lambda _: seconds_of(apart, backbone.device),
        },
        repeats=settings.pick(7, 2),
        seconds=60,
        seed=settings.seed,
        note="mixed deep prompts",
    )
    cells: list[dict[str, Json]] = [
        {"cell": f"{count} rows of {count} deep prompts", "contestant": who, "seconds": spread(values)}
        for who, values in found.items()
    ]
    note = f"{count} rows, log-probabilities differ by {gap:.0e}"
    if gap > MOST_GAP[backbone.dtype]:
        return cells, no_answer(f"answers do not agree: {note}")
    return cells, answer(ratios(found["a call each"], found["one batch"]), note)


def deep_prompts(backbone: Backbone, count: int, *, seed: int) -> list[Prompt]:
    """Return prompts of one template with labels, whose deep slots are drawn tokens."""
    made = []
    for number in range(count):
        draw = random.Random(f"prompt {seed} {number}")
        ids = [draw.randrange(backbone.vocabulary) for _ in range(FRONT_SLOTS)]
        made.append(replace(Prompt.from_token_ids(FRONT, ids, backbone), label_words=CONTINENTS))
    return made


def writing(backbone: Backbone, settings: Settings) -> Found:
    """Write texts with a deep prompt in front and without any."""
    tokens, records = settings.pick(WRITTEN_TOKENS, 4), every("capitals")[: settings.pick(WRITTEN_ROWS, 3)]
    end_ids, backbone.tokenizer.end_ids = backbone.tokenizer.end_ids, frozenset()
    bounds = {"deep prompt": bind(backbone, f"[D*16] {FACTS}"), "no prompt": bind(backbone, FACTS)}
    prompt = Prompt.from_token_ids(f"[D*16] {FACTS}", range(9, 25), backbone)
    learned = {"deep prompt": prompt.learned(backbone), "no prompt": PromptBatch.none(backbone.width)}

    @torch.no_grad()
    def write(who: str, _: int) -> float:
        bound = bounds[who]
        bound.multiline = True
        prompt = PreparedPrompt(learned[who], bound)
        return seconds_of(lambda: generate(backbone, prompt, records, max_tokens=tokens), backbone.device)

    for who in bounds:
        write(who, 0)  # what a process does once, before the clock runs
    found = interleave(
        {who: partial(write, who) for who in bounds},
        repeats=settings.pick(7, 2),
        seconds=120,
        seed=settings.seed,
        note="writing with a deep prompt",
    )
    backbone.tokenizer.end_ids = end_ids
    cells: list[dict[str, Json]] = [
        {"cell": f"writing {tokens} tokens", "contestant": who, "seconds": spread(values)}
        for who, values in found.items()
    ]
    return cells, answer(ratios(found["no prompt"], found["deep prompt"]), f"{len(records)} rows, {tokens} tokens")


if __name__ == "__main__":
    main(settings_of(parser(__doc__).parse_args()))
