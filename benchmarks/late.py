"""What does it bring to have the slots behind the text, so that the text is a constant of the frozen model?

Three questions: a whole run of five epochs on labelled sentences of 20 to 60 tokens, the pass over the constant part
included; an epoch after the first on records of 512 tokens; and one training step with and without the kept keys and
values, for texts of several lengths.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
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
    country_sentences,
    items_of,
    mean_tokens,
    passages,
    passes,
    seconds_of,
    synchronised,
)
from benchmarks.peer import MISSING, Peer, is_installed, rows_of
from benchmarks.peer import SETTINGS as PEER_SETTINGS
from ptuning.backbone.backbone import Backbone
from ptuning.config import TrainConfig
from ptuning.data.questions import as_questions
from ptuning.data.reading import load_records
from ptuning.data.splits import draw_records, split_questions
from ptuning.engine.evaluate import evaluate
from ptuning.engine.forward import target_logits
from ptuning.engine.objective import ScoringRequest, inputs_of, loss, score_continuations
from ptuning.engine.prefix_cache import PrefixCache
from ptuning.engine.soft_prompt import PromptBatch
from ptuning.records import Records
from ptuning.template.labels import LabelWords
from ptuning.training.trainer import Trainer

ENDING = "In short, this country lies in"
LATE = f"{{text}} [P:{ENDING}] [Y]"
# The peer has its slots in front, and the sentence behind the text as plain words.
PLAIN = f"{{text}} {ENDING} [Y]"
PEER_SLOTS = 4
EPOCHS = 5
BATCH = 16
TOLERANCE = 0.03
# Of the sweep.
STEP_ROWS = 16
METHOD = (
    f"Sentences: facts about countries in four wordings, labelled with one of {', '.join(CONTINENTS.words)}, where no "
    f"country stands in both parts; or the file given. Late slots: {LATE}; in front: the same with [P*{PEER_SLOTS}] "
    f"before it; PEFT: {PEER_SLOTS} slots in front of {PLAIN}. {EPOCHS} epochs, batches of {BATCH}. ptuning's time is "
    "that of its whole fit, the pass over the constant part included; PEFT's that of its steps; neither makes "
    "development passes meanwhile. Records of 512 tokens: seconds of the steps of an epoch, for ptuning the mean of "
    f"all after the first; passes of about {PASS_TOKENS} tokens."
)


def main(settings: Settings) -> None:
    """Measure all three questions."""
    began = time.monotonic()
    backbone = backbone_of(settings)
    cells: list[dict[str, Json]] = []
    answers: dict[str, dict[str, Json]] = {}
    for name, question in (("late-sentences", sentences), ("late-512", long_records)):
        rows, found = question(backbone, settings)
        cells += rows
        answers[name] = found
    cells += constant_part(backbone, settings)
    write_result(
        settings,
        "late",
        question=(__doc__ or "").splitlines()[0],
        cells=cells,
        answers=answers,
        method=METHOD,
        peer=PEER_SETTINGS,
        seconds=time.monotonic() - began,
    )


def sentences(backbone: Backbone, settings: Settings) -> tuple[list[dict[str, Json]], dict[str, Json]]:
    """Time whole runs of five epochs, and compare what they score."""
    train, dev, words, ending = labelled(settings, train=settings.pick(64, 16), dev=settings.pick(120, 12))
    late, plain = f"{{text}} [P:{ending}] [Y]", f"{{text}} {ending} [Y]"
    epochs = settings.pick(EPOCHS, 2)

    def peer(number: int) -> tuple[float, float]:
        bound = bind(backbone, plain)
        items = items_of(bound, train, labels=words)
        with Peer(backbone, slots=PEER_SLOTS, seed=number) as model:
            seconds = model.train(rows_of(items), epochs=epochs, batch_size=BATCH, seed=number)
            return seconds, model.accuracy(items_of(bound, dev, labels=words))

    def ours(template: str, number: int) -> tuple[float, float]:
        """Train as ``ptuning train --labels`` does, but for development passes, which the peer makes none of either."""
        bound = bind(backbone, template)
        items = items_of(bound, train, labels=words)
        config = TrainConfig(epochs=epochs, batch_size=BATCH, seed=number, patience=epochs)
        trainer = Trainer(backbone, bound, config=config)
        seconds = seconds_of(lambda: trainer.fit(items, items[:1]), backbone.device)
        return seconds, trainer.evaluate(items_of(bound, dev, labels=words)).score

    contestants: dict[str, Callable[[int], tuple[float, float]]] = {
        "late slots": partial(ours, late),
        "slots in front": partial(ours, f"[P*{PEER_SLOTS}] {late}"),
    }
    contestants |= {"peft": peer} if is_installed() else {}
    found = interleave(
        contestants, repeats=settings.pick(3, 1), seconds=260, seed=settings.seed, note="whole runs on sentences"
    )
    tokens = mean_tokens(items_of(bind(backbone, late), train, labels=words))
    cells: list[dict[str, Json]] = [
        {
            "cell": "sentences, whole run",
            "contestant": name,
            "tokens_per_row": tokens,
            "seconds": spread([seconds for seconds, _ in values]),
            "score": spread([score for _, score in values]),
        }
        for name, values in found.items()
    ]
    scores = {name: sum(score for _, score in values) / len(values) for name, values in found.items()}
    bound = bind(backbone, plain)
    untrained = evaluate(backbone, [items_of(bound, dev, labels=words)], PromptBatch.none(backbone.width))
    scores["manual prompt"] = untrained.score
    note = f"accuracy on {len(dev)} others: " + ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
    say(f"  {note}")
    if "peft" not in found:
        return cells, no_answer(MISSING)
    values = ratios([seconds for seconds, _ in found["peft"]], [seconds for seconds, _ in found["late slots"]])
    if scores["late slots"] < scores["slots in front"] - TOLERANCE:
        return cells, no_answer(f"late slots score lower, so {spread(values)['median']:.1f}x does not count; {note}")
    return cells, answer(values, note)


def labelled(settings: Settings, *, train: int, dev: int) -> tuple[Records, Records, LabelWords, str]:
    """Return training and held-out sentences, their label words, and the words behind them."""
    if settings.sentences is None:
        return *country_sentences(train=train, dev=dev, seed=settings.seed), CONTINENTS, ENDING
    drawn = draw_records(load_records(settings.sentences), train + dev, seed=settings.seed)
    kept, aside = split_questions(as_questions(drawn), fraction=dev / (train + dev), seed=settings.seed)
    return kept.records, aside.records, LabelWords.parse(settings.words), settings.ending


def long_records(backbone: Backbone, settings: Settings) -> tuple[list[dict[str, Json]], dict[str, Json]]:
    """Time an epoch on records of 512 tokens."""
    length = settings.pick(512, 48)
    rows = settings.pick(16, 8)
    records = passages(backbone, [length - 10] * rows, seed=settings.seed)
    epochs = settings.pick(6, 3)
    batch_size, parts = passes(BATCH if rows >= BATCH else rows, length)

    def peer(number: int) -> float:
        data = rows_of(items_of(bind(backbone, PLAIN), records))
        with Peer(backbone, slots=PEER_SLOTS, seed=number) as model:
            return model.train(data, epochs=1, batch_size=batch_size, parts=parts, seed=number)

    def ours(number: int) -> float:
        bound = bind(backbone, LATE)
        items = items_of(bound, records)
        config = TrainConfig(epochs=epochs, batch_size=batch_size * parts, seed=number, patience=epochs)
        trainer = Trainer(backbone, bound, config=config)
        trainer.fit(items, items[:1])
        later = [epoch["seconds"] for epoch in trainer.state.history[1:]]
        return sum(later) / len(later)

    found = interleave(
        {"late slots": ours} | ({"peft": peer} if is_installed() else {}),
        repeats=3,
        seconds=settings.pick(150, 5),
        seed=settings.seed,
        note=f"records of {length} tokens",
    )
    cells: list[dict[str, Json]] = [
        {
            "cell": f"{length} tokens, an epoch after the first",
            "contestant": name,
            "tokens_per_row": length,
            "rows": rows,
            "seconds": spread(values),
        }
        for name, values in found.items()
    ]
    if "peft" not in found:
        return cells, no_answer(MISSING)
    return cells, answer(ratios(found["peft"], found["late slots"]), f"{rows} records of {length} tokens")


def constant_part(backbone: Backbone, settings: Settings) -> list[dict[str, Json]]:
    """Time a pass forward and backward with whole rows and with kept keys and values, for several lengths of text."""
    bound = bind(backbone, LATE)
    with torch.no_grad():
        ids = torch.tensor([bound.slot_start_ids], device=backbone.device)  # (1, P)
        vectors = backbone.embed(ids)[0].float()  # (P, E)
    cells: list[dict[str, Json]] = []
    for length in settings.pick((4, 8, 16, 32, 64, 128), (8, 16)):
        items = items_of(bound, passages(backbone, [length] * STEP_ROWS, seed=settings.seed))
        kept = PrefixCache(backbone, memory_share=0.25)
        with kept:
            prepare = partial(kept.prepare, inputs_of(items))
            pass_seconds = seconds_of(prepare, backbone.device)
            if not kept.is_used:
                say(f"  constant part of {length} tokens: rows run whole")
                continue
            paths = {"whole rows": None, "kept": kept}
            found = interleave(
                {name: partial(step_seconds, backbone, items, cache, vectors) for name, cache in paths.items()},
                repeats=settings.pick(5, 2),
                seconds=15,
                seed=settings.seed,
                note=f"constant part of {length} tokens",
            )
        cells.append(
            {
                "cell": "a step, constant part",
                "contestant": "ptuning",
                "constant_tokens": length,
                "rows": STEP_ROWS,
                "whole_seconds": spread(found["whole rows"]),
                "kept_seconds": spread(found["kept"]),
                "pass_seconds": pass_seconds,
                "times_faster": spread(ratios(found["whole rows"], found["kept"])),
            }
        )
    return cells


def step_seconds(
    backbone: Backbone, items: Sequence[ScoringRequest], cache: PrefixCache | None, vectors: torch.Tensor, _: int
) -> float:
    """Return the seconds of one forward and backward pass from the slot vectors."""
    leaf = vectors.clone().requires_grad_(True)
    began = synchronised(backbone.device)
    logits = target_logits(backbone, inputs_of(items), PromptBatch(leaf), cache=cache)
    loss(items, score_continuations(items, logits))[0].backward()
    return synchronised(backbone.device) - began


if __name__ == "__main__":
    main(settings_of(parser(__doc__).parse_args()))
