"""How long until ptuning scores what PEFT scores in the end?

The figure that a user feels: seconds from the start of training until the development score of the peer's finished run
is reached, against the seconds of that run.
"""

from __future__ import annotations

import time

from benchmarks.common import (
    Json,
    Settings,
    answer,
    interleave,
    no_answer,
    parser,
    say,
    settings_of,
    spread,
    write_result,
)
from benchmarks.material import backbone_of, bind, items_of, mean_tokens, synchronised
from benchmarks.peer import MISSING, Peer, is_installed, rows_of
from benchmarks.peer import SETTINGS as PEER_SETTINGS
from ptuning.backbone.backbone import Backbone
from ptuning.config import TrainConfig
from ptuning.data.questions import as_questions
from ptuning.data.reading import load_records
from ptuning.data.splits import split_questions
from ptuning.progress import Progress
from ptuning.records import Records
from ptuning.template.language import Template
from ptuning.training.trainer import Trainer

EPOCHS = 6
BATCH = 16
LR = 1e-3
ABOUT = "capital"
DEV_FRACTION = 0.25
METHOD = (
    f"Both train for {EPOCHS} epochs in batches of {BATCH} with a peak learning rate of {LR}, on the same facts, and "
    "are scored on the same development part: a hit is a target that greedy decoding would write, token by token. "
    "ptuning starts from the manual sentence (its default) and its clock includes tokenising, building the encoder "
    "and all development passes. PEFT has as many slots in front, once of the bare subject and once of the manual "
    "sentence; the better of the two in the first round is what it does in all others."
)


def main(settings: Settings) -> None:
    """Measure the rounds; a round has its own seed."""
    began = time.monotonic()
    backbone = backbone_of(settings)
    train, dev = facts(settings)
    template = str(Template.from_manual(settings.manual, about=ABOUT if settings.manual.startswith("[X]") else None))
    slots = bind(backbone, template).slots
    epochs = settings.pick(EPOCHS, 2)
    texts = {"bare subject": "[X] [Y]", "manual sentence": settings.manual}
    peer_runs: dict[str, tuple[float, float]] = {}

    def peer(number: int) -> tuple[float, float, str]:
        for name, text in texts.items():
            peer_runs[name] = peer_run(backbone, text, train, dev, slots=slots, epochs=epochs, seed=number)
            say(f"  peft, {name}: {peer_runs[name][1]:.3f} in {peer_runs[name][0]:.1f} s")
        best = max(texts, key=lambda name: peer_runs[name][1])
        for name in set(texts) - {best}:
            del texts[name]
        return (*peer_runs[best], best)

    def ours(number: int) -> list[tuple[float, float]]:
        return curve(backbone, template, train, dev, epochs=epochs, seed=number)

    # The peer's first round finds out what its best text is.
    contestants = {"ptuning": ours} | ({"peft": peer} if is_installed() else {})
    found = interleave(
        contestants,
        repeats=settings.pick(3, 1),
        seconds=260,
        seed=settings.seed,
        note="runs",
    )
    curves: list[list[tuple[float, float]]] = found["ptuning"]  # type: ignore[assignment]
    runs: list[tuple[float, float, str]] = found.get("peft", [])  # type: ignore[assignment]
    shared: dict[str, Json] = {"cell": f"{train.name}, {len(train)} facts", "tokens_per_row": None}
    shared["tokens_per_row"] = mean_tokens(items_of(bind(backbone, template), train))
    cells: list[dict[str, Json]] = [
        {
            **shared,
            "contestant": f"ptuning, {template}",
            "seconds": spread([one[-1][0] for one in curves]),
            "score": spread([max(score for _, score in one) for one in curves]),
            "curves": [[{"seconds": seconds, "score": score} for seconds, score in one] for one in curves],
        }
    ]
    if runs:
        cells.append(
            {
                **shared,
                "contestant": f"peft, {slots} slots in front of {texts[runs[-1][2]]}",
                "seconds": spread([seconds for seconds, _, _ in runs]),
                "score": spread([score for _, score, _ in runs]),
            }
        )
    write_result(
        settings,
        "scores",
        question=(__doc__ or "").splitlines()[0],
        cells=cells,
        answers={"time-to-peft-score": time_to_score(curves, runs, len(dev)) if runs else no_answer(MISSING)},
        method=METHOD,
        peer=PEER_SETTINGS,
        seconds=time.monotonic() - began,
    )


def time_to_score(
    curves: list[list[tuple[float, float]]], runs: list[tuple[float, float, str]], count: int
) -> dict[str, Json]:
    """Return the entry: the peer's seconds over ours up to the peer's score, or why there is none."""
    values, untrained = [], 0
    for one, (seconds, target, _) in zip(curves, runs, strict=True):
        reached = next((spent for spent, score in one if score >= target), None)
        if reached is not None:
            values.append(seconds / reached)
            untrained += one[0][1] >= target
    scores = (
        f"development scores (n = {count}): PEFT {', '.join(f'{run[1]:.3f}' for run in runs)}, ptuning's best "
        f"{', '.join(f'{max(score for _, score in one):.3f}' for one in curves)}"
    )
    if len(values) < len(runs):
        return no_answer(f"not reached in {len(runs) - len(values)} of {len(runs)} rounds; {scores}")
    start = f"; reached before the first step in {untrained} of {len(runs)} rounds" if untrained else ""
    return answer(values, scores + start)


def facts(settings: Settings) -> tuple[Records, Records]:
    """Return the training and the development part of the shipped capitals, or of the file that is given."""
    if settings.data is not None:
        records = load_records(settings.data)
        named = Records(records, name=settings.data.replace("\\", "/").rpartition("/")[2], digest=records.sha256)
        kept, held = split_questions(as_questions(named), fraction=DEV_FRACTION, seed=settings.seed)
        return kept.records, held.records
    train, dev = load_records("capitals:train"), load_records("capitals:dev")
    count = settings.pick(len(train), 16)
    return Records(train[:count], name=train.name), Records(dev[:count], name=dev.name)


def peer_run(
    backbone: Backbone, text: str, train: Records, dev: Records, *, slots: int, epochs: int, seed: int
) -> tuple[float, float]:
    """Train the peer with slots in front of a text; return its seconds and its final development score."""
    bound = bind(backbone, text)
    with Peer(backbone, slots=slots, seed=seed) as model:
        seconds = model.train(rows_of(items_of(bound, train)), epochs=epochs, batch_size=BATCH, lr=LR, seed=seed)
        _, hits = model.score(rows_of(items_of(bound, dev)))
    return seconds, sum(hits) / len(hits)


def curve(
    backbone: Backbone, template: str, train: Records, dev: Records, *, epochs: int, seed: int
) -> list[tuple[float, float]]:
    """Train and return (seconds since the beginning, development score) before the first step and after each epoch."""
    points: list[tuple[float, float]] = []
    began = synchronised(backbone.device)
    bound = bind(backbone, template)
    config = TrainConfig(epochs=epochs, batch_size=BATCH, lr=LR, seed=seed, patience=epochs)
    trainer = Trainer(backbone, bound, config=config)
    scored = [0.0]

    def note(progress: Progress) -> None:
        now = synchronised(backbone.device) - began
        if progress.stage == "dev":
            scored[0] = now
        if progress.stage == "train" and not points:
            points.append((scored[0], trainer.state.start["dev_score"]))
        if progress.stage == "epoch" and trainer.state.history:
            points.append((now, trainer.state.history[-1]["dev_score"]))

    trainer.fit(items_of(bound, train), items_of(bound, dev), report=note)
    say(f"  ptuning: {' '.join(f'{score:.3f}' for _, score in points)} in {points[-1][0]:.1f} s")
    return points


if __name__ == "__main__":
    main(settings_of(parser(__doc__).parse_args()))
