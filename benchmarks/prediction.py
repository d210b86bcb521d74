"""How fast are scores of targets, of a hundred candidates a record, and written answers?

Beside PEFT with the same vectors in front, and, for candidates, beside one forward pass per candidate.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise

import torch

from benchmarks.common import (
    Json,
    Settings,
    answer,
    interleave,
    no_answer,
    parser,
    ratios,
    settings_of,
    spread,
    write_result,
)
from benchmarks.material import backbone_of, bare_seconds, bind, every, items_of, seconds_of
from benchmarks.peer import Peer, Row, choice_rows, is_installed, rows_of
from ptuning.backbone.backbone import Backbone
from ptuning.data.word_lists import targets_of
from ptuning.engine.forward import target_logits
from ptuning.engine.objective import candidate_request
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prediction import Candidate
from ptuning.prompt.prompt import Prompt
from ptuning.records import Record
from ptuning.template.encode import Example, TokenizedTemplate

TEMPLATE = "[P*6] The capital of [X] is [Y]"
SUBJECT_FIRST = "[X] is a country. Its capital is [Y]"
CANDIDATES = 100
BATCH_ROWS = 64
MAX_TOKENS = 6
# Differences of log-probabilities that count as the same score, by type.
MOST_GAP = {torch.float32: 1e-2, torch.bfloat16: 1.0}
METHOD = (
    f"One prompt, {TEMPLATE}, its slots holding embeddings of words; PEFT gets the same vectors. Targets: "
    f"PromptModel.target_logits against PEFT's forward in batches, and against the bare backbone's forward over the "
    f"same rows in batches of {BATCH_ROWS} (logits at the targets only, rows tokenised beforehand); subject first: the "
    f"same for {SUBJECT_FIRST}, whose rows share no beginning. Candidates: PromptModel.rank of {CANDIDATES} capitals, "
    "against PEFT's forward on batches of a hundred rows, and against a loop of one forward pass per candidate of the "
    "bare backbone (logits at the target only). Written answers: PromptModel.predict against PEFT's generate, both "
    f"greedy, up to {MAX_TOKENS} tokens, rows of one length together. Times are compared only if log-probabilities "
    "agree."
)


def main(settings: Settings) -> None:
    """Measure the three kinds of prediction."""
    began = time.monotonic()
    backbone = backbone_of(settings)
    bound = bind(backbone, TEMPLATE)
    table_ids = backbone.tokenizer.encode(["The name of the main city"])[0] * bound.slots
    prompt = Prompt.from_token_ids(TEMPLATE, table_ids[: bound.slots], backbone)
    records = every("capitals")
    candidates = targets_of(records)[: settings.pick(CANDIDATES, 12)]
    model = PromptModel(backbone)
    plain = Prompt.manual(SUBJECT_FIRST)
    some = records[: settings.pick(128, 8)]
    work = {
        "targets": targets(model, prompt, bound, some),
        "targets, subject first": targets(model, plain, bind(backbone, SUBJECT_FIRST), some),
        "candidates": ranking(model, prompt, bound, records[: settings.pick(4, 2)], candidates),
        "written answers": writing(model, prompt, bound, records[: settings.pick(48, 4)]),
    }
    cells: list[dict[str, Json]] = []
    answers: dict[str, dict[str, Json]] = {}
    for run in work["targets"][0].values():  # what a process does once, before the clock runs
        run(0)
    for name, (contestants, counts) in work.items():
        found = interleave(contestants, repeats=settings.pick(5, 1), seconds=25, seed=settings.seed, note=name)
        each = {who: [seconds / counts[who] for seconds in values] for who, values in found.items()}
        cells += [
            {"cell": name, "contestant": who, "records": counts[who], "seconds_per_record": spread(values)}
            for who, values in each.items()
        ]
        if name == "candidates":
            gaps = agreement(model, prompt, bound, records[0], candidates)
            worst = max(gaps.values())
            note = f"{len(candidates)} capitals, log-probabilities differ by {worst:.0e}"
            same = worst <= MOST_GAP[backbone.dtype]
            values = ratios(each["one pass each"], each["ptuning"])
            answers["candidates-100"] = answer(values, note) if same else no_answer(f"scores do not agree: {note}")
            cells += [
                {"cell": "candidates, log-probability gap", "contestant": who, "gap": gap} for who, gap in gaps.items()
            ]
    write_result(
        settings,
        "prediction",
        question=(__doc__ or "").splitlines()[0],
        cells=cells,
        answers=answers,
        method=METHOD,
        seconds=time.monotonic() - began,
    )


Work = tuple[dict[str, Callable[[int], float]], dict[str, int]]


def targets(model: PromptModel, prompt: Prompt, bound: TokenizedTemplate, records: list[Record]) -> Work:
    """Score each record's own target; the peer has to have slots."""
    device = model.backbone.device

    def ours(_: int) -> float:
        return seconds_of(lambda: model.target_logits(records, prompt), device)

    def peer(_: int) -> float:
        with Peer(model.backbone, slots=prompt.slots, vectors=prompt.slot_vectors) as other:
            return seconds_of(lambda: other.score(rows_of(items_of(bound, records))), device)

    items = sorted(items_of(bound, records), key=lambda item: len(item.inputs[0].token_ids))

    def bare(_: int) -> float:
        return bare_seconds(model.backbone, items, batch_size=BATCH_ROWS, slots=prompt.slots, backward=False)

    contestants = {**(contest(ours, peer) if prompt.slots else {"ptuning": ours}), "bare": bare}
    return contestants, dict.fromkeys(contestants, len(records))


def ranking(
    model: PromptModel, prompt: Prompt, bound: TokenizedTemplate, records: list[Record], candidates: list[str]
) -> Work:
    """Score a closed set of answers for each record."""
    device = model.backbone.device

    def ours(_: int) -> float:
        return seconds_of(lambda: model.rank(records, prompt, candidates), device)

    def one_each(_: int) -> float:
        return seconds_of(lambda: looped(model.backbone, prompt, bound, records[0], candidates), device)

    def peer(_: int) -> float:
        with Peer(model.backbone, slots=prompt.slots, vectors=prompt.slot_vectors) as other:
            rows = [row for record in records for row in candidate_rows(bound, record, candidates)]
            return seconds_of(lambda: other.score(rows, batch_rows=CANDIDATES), device)

    contestants = contest(ours, peer) | {"one pass each": one_each}
    return contestants, {"ptuning": len(records), "peft": len(records), "one pass each": 1}


def writing(model: PromptModel, prompt: Prompt, bound: TokenizedTemplate, records: list[Record]) -> Work:
    """Write answers greedily."""
    device = model.backbone.device
    contexts = [
        tuple(token for at, token in enumerate(row.token_ids) if at not in set(row.slot_positions))
        for row in bound.contexts(records)
    ]

    def ours(_: int) -> float:
        return seconds_of(lambda: model.predict(records, prompt, generation={"max_new_tokens": MAX_TOKENS}), device)

    def peer(_: int) -> float:
        with Peer(model.backbone, slots=prompt.slots, vectors=prompt.slot_vectors) as other:
            return seconds_of(lambda: other.write(contexts, max_tokens=MAX_TOKENS, stop_id=bound.stop_id), device)

    return contest(ours, peer), {"ptuning": len(records), "peft": len(records)}


def contest(ours: Callable[[int], float], peer: Callable[[int], float]) -> dict[str, Callable[[int], float]]:
    """Return the contestants that are there."""
    return {"ptuning": ours} | ({"peft": peer} if is_installed() else {})


def candidate_examples(bound: TokenizedTemplate, record: Record, candidates: list[str]) -> list[Example]:
    """Return a record's row for each candidate."""
    return bound.examples([record] * len(candidates), targets=candidates)


def candidate_rows(bound: TokenizedTemplate, record: Record, candidates: list[str]) -> list[Row]:
    """Return the peer's row for each candidate."""
    return choice_rows(candidate_request(candidate_examples(bound, record, candidates)))


@torch.no_grad()
def looped(
    backbone: Backbone, prompt: Prompt, bound: TokenizedTemplate, record: Record, candidates: list[str]
) -> list[float]:
    """Return the log-probability of each candidate from a forward pass of its own."""
    assert prompt.slot_vectors is not None
    found = []
    for example in candidate_examples(bound, record, candidates):
        logits = target_logits(backbone, [example], prompt.learned(backbone))
        ids = torch.tensor(example.target_ids, device=logits.device)
        found.append(float(logits.log_softmax(-1).gather(1, ids[:, None]).sum()))
    return found


def agreement(
    model: PromptModel, prompt: Prompt, bound: TokenizedTemplate, record: Record, candidates: list[str]
) -> dict[str, float]:
    """Return the largest difference between our log-probabilities and each other contestant's."""
    ranked: list[Candidate] = model.rank([record], prompt, candidates)[0]
    ours = {candidate.text: candidate.log_prob for candidate in ranked}
    assert all(first.log_prob >= second.log_prob for first, second in pairwise(ranked))
    others = {"one pass each": looped(model.backbone, prompt, bound, record, candidates)}
    if is_installed():
        with Peer(model.backbone, slots=prompt.slots, vectors=prompt.slot_vectors) as other:
            others["peft"] = other.score(candidate_rows(bound, record, candidates), batch_rows=CANDIDATES)[0]
    return {
        name: max(abs(value - ours[text]) for text, value in zip(candidates, values, strict=True))
        for name, values in others.items()
    }


if __name__ == "__main__":
    main(settings_of(parser(__doc__).parse_args()))
