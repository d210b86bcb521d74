"""Answers of a prompt to a task's records, with the rank of each target among the possible answers."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ptuning.backbone.backbone import Backbone
from ptuning.config import GenerationSettings
from ptuning.data.questions import Questions, as_questions
from ptuning.engine.batch import batches
from ptuning.engine.evaluate import Evaluation, evaluate
from ptuning.engine.learned import Learned
from ptuning.engine.objective import Item, inputs_of, target_items
from ptuning.engine.passes import prefix_tokens, target_logits
from ptuning.errors import PromptError, RecordError
from ptuning.metrics import Answer
from ptuning.progress import OnProgress, Progress
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prediction import Candidate, Prediction
from ptuning.prompt.prompt import OnePrompt, Prompt, as_prompt
from ptuning.records import TARGET_FIELD, Records, Rows, references_of
from ptuning.template.ambiguity import is_distinguishable
from ptuning.template.encode import TokenizedTemplate
from ptuning.template.segments import FILLS_MASKS

# Texts that are written together, and kept together if the work is stopped.
WRITTEN_ROWS = 32


def answer_records(
    model: PromptModel,
    prompt: Prompt,
    records: Rows | Questions,
    *,
    closed: Sequence[str] | None = None,
    single_token: bool = False,
    max_tokens: int | None = None,
    num_beams: int = 1,
    report: OnProgress | None = None,
) -> list[Answer]:
    """Answer N records, and rank each target among the possible answers. Written answers have no rank.

    If the prompt has label words or choices, these are the possible answers, and targets may be missing. Else they are
    ``closed``, or with ``single_token`` (all targets are one token each) all tokens, or any text of up to
    ``max_tokens``, written with ``num_beams`` beams.

    Source: Petroni et al. (2019), section 4 (ranking single tokens); Liu et al. (2021), section 4.1.
    """
    questions = as_questions(records)
    data = questions.records
    model = model.for_prompt(prompt)
    if prompt.answer_space.is_closed:
        ranked = model.classify(questions, prompt)
        return [among_candidates(row.right, found) for row, found in zip(questions, ranked, strict=True)]
    bound = prompt.bind(model.backbone, force=model.force)
    learned = prompt.learned(model.backbone)
    if single_token:
        return _among_tokens(model.backbone, bound, learned, data, closed=closed, report=report)
    if closed is not None:
        ranked = model.rank(data, prompt, closed)
        return [among_candidates(row.right, found) for row, found in zip(questions, ranked, strict=True)]
    settings = GenerationSettings(max_new_tokens=max_tokens, num_beams=num_beams)
    written = [one for part in written_parts(model, data, prompt, settings=settings, report=report) for one in part]
    if not all(row.right for row in questions):  # read without targets
        return [Answer(one.text, False, log_prob=one.log_prob) for one in written]
    items = target_items(bound, data, with_stop=False)
    found = evaluate(model.backbone, items, learned, report=report, note=data.name)
    found = of_any_reference(model.backbone, bound, data, learned, found, written=[one.text for one in written])
    return [
        Answer(one.text, bool(hit), log_prob=one.log_prob, known=known)
        for one, hit, known in zip(written, found.hits, found.known, strict=True)
    ]


def check_writes(prompt: Prompt) -> None:
    """Raise a PromptError if a prompt chooses among labels or choices and writes nothing."""
    if prompt.answer_space.is_closed:
        raise PromptError(
            f"the prompt answers with {prompt.answer_space.described} and writes no texts; use predict for its answers"
        )


def written_parts(
    model: PromptModel,
    records: Rows | Questions,
    prompt: OnePrompt,
    *,
    settings: GenerationSettings | None = None,
    done: int = 0,
    report: OnProgress | None = None,
) -> Iterator[list[Prediction]]:
    """Yield what a prompt writes for N records, :data:`WRITTEN_ROWS` at a time; the first ``done`` records are left
    out. A text does not depend on those beside it. A PromptError if the prompt writes no texts.
    """
    prompt, questions = as_prompt(prompt), as_questions(records)
    check_writes(prompt)
    for start in range(done, len(questions), WRITTEN_ROWS):
        part = Questions(questions[start : start + WRITTEN_ROWS], name=questions.name)
        yield model.predict(part, prompt, generation=settings)
        if report is not None:
            report(Progress("predict", start + len(part), len(questions), questions.name))


def of_any_reference(
    backbone: Backbone,
    bound: TokenizedTemplate,
    records: Records,
    learned: Learned,
    found: Evaluation,
    *,
    written: Sequence[str] = (),
) -> Evaluation:
    """Return how targets that are written were scored, with a hit where any reference of a record would be written; the
    loss stays that of the first ones, which a prompt learns. ``written`` is what is written for each record, if that is
    known: references that do not begin like it, nor it like them, are then not scored.
    """
    # How many masks a masked model fills depends on the reference, so what it wrote elsewhere says nothing.
    texts = written if written and backbone.kind not in FILLS_MASKS else None
    others = [
        (at, {**record, TARGET_FIELD: text})
        for at, record in enumerate(records)
        if not found.hits[at]
        for text in references_of(record)[1:]
        if texts is None or _begin_alike(texts[at], text)
    ]
    if not others:
        return found
    rows = Records([record for _, record in others], name=records.name)
    scored = evaluate(backbone, target_items(bound, rows, with_stop=False), learned)
    hit = {at for (at, _), one in zip(others, scored.hits, strict=True) if one}
    known = {at for (at, _), one in zip(others, scored.known, strict=True) if one}
    return replace(
        found,
        hits=tuple(1.0 if at in hit else one for at, one in enumerate(found.hits)),
        known=tuple(one or at in known for at, one in enumerate(found.known)),
    )


def _begin_alike(one: str, other: str) -> bool:
    """Whether one of two texts begins with the other, by their letters and digits: tokenizers may change the rest."""
    plain = (unicodedata.normalize("NFKD", text.casefold()) for text in (one, other))
    left, right = ("".join(filter(str.isalnum, text)) for text in plain)
    return left.startswith(right) or right.startswith(left)


def among_candidates(right: Collection[str], found: Sequence[Candidate]) -> Answer:
    """Return the answer among sorted candidates. On a tie the right one ranks last, and so it does beside one that the
    tokenizer does not tell from it; if none is right, or none of the right ones is known, the rank is 0.
    """
    others = [one for one in found if one.text.strip() not in right]
    answers = [one for one in found if one.text.strip() in right]
    own = next((one for one in answers if one.collisions is not None), None)
    # "Not lower" rather than "higher or equal": comparing with a NaN is never true.
    rank = 0 if own is None else 1 + sum(not one.log_prob < own.log_prob or _collide(one, own) for one in others)
    best = own if own is not None and rank == 1 else next(iter(others), found[0])
    known = not answers or any(is_distinguishable(one.collisions, right) for one in answers)
    return Answer(best.text.strip(), best is own, rank, best.log_prob, known=known)


def _collide(one: Candidate, other: Candidate) -> bool:
    return one.text.strip() in (other.collisions or ())


@torch.no_grad()
def _among_tokens(
    backbone: Backbone,
    bound: TokenizedTemplate,
    learned: Learned,
    records: Records,
    *,
    closed: Sequence[str] | None,
    report: OnProgress | None,
) -> list[Answer]:
    """Rank each record's target among all tokens, or among those of the closed set. On a tie it ranks last."""
    items = target_items(bound, records, with_stop=False)
    counts = {} if closed is None else _single_tokens(bound, records, closed)
    allowed = torch.tensor(list(counts)) if counts else torch.arange(backbone.vocabulary)  # (C,)
    allowed = allowed.to(backbone.device)
    answers: dict[int, Answer] = {}
    prefix = prefix_tokens(backbone, inputs_of(items))
    for chosen in batches([item.inputs for item in items], prefix=prefix):
        group = [items[index] for index in chosen]
        logits = target_logits(backbone, inputs_of(group), learned)  # (N, V)
        log_probs = torch.log_softmax(logits, dim=-1)[:, allowed]  # (N, C)
        targets = [_only_token(item) for item in group]
        gold = torch.tensor(targets, device=allowed.device)  # (N,)
        is_known = torch.tensor([item.choices[0].known for item in group], device=allowed.device)  # (N,)
        shared = torch.tensor([counts.get(token, 1) - 1 for token in targets], device=allowed.device)  # (N,)
        is_gold = (allowed[None] == gold[:, None]) & is_known[:, None]  # (N, C)
        own = log_probs.masked_fill(~is_gold, -torch.inf).amax(dim=-1, keepdim=True)  # (N, 1)
        # "Not lower" rather than "higher or equal": comparing with a NaN is never true.
        ranks = is_gold.any(dim=-1) * (1 + (~(log_probs < own) & ~is_gold).sum(dim=-1) + shared)  # (N,)
        # A target that only shares the first place is not the answer.
        is_shared = is_gold & (ranks > 1)[:, None]  # (N, C)
        best, places = log_probs.masked_fill(is_shared, -torch.inf).max(dim=-1)  # (N,), (N,)
        tokens = allowed[places].tolist()
        known = (is_known & (shared == 0)).tolist()
        for index, rank, value, token, one in zip(chosen, ranks.tolist(), best.tolist(), tokens, known, strict=True):
            answers[index] = Answer(backbone.tokenizer.decode([token]).strip(), rank == 1, rank, value, known=one)
        if report is not None:
            report(Progress("dev", len(answers), len(items), records.name))
    return [answers[index] for index in range(len(items))]


def _only_token(item: Item) -> int:
    ids = item.choices[0].target_ids
    if len(ids) != 1:
        raise RecordError(f"a target takes {len(ids)} tokens, and only targets of one token can be ranked among tokens")
    return ids[0]


def token_ids_of(bound: TokenizedTemplate, records: Records, texts: Sequence[str]) -> Tensor:
    """Return the token ids of the texts that are one token in a template filled from the first record, (C,) int64, each
    once. Text that the tokenizer does not know is none. A RecordError if there are none.
    """
    return torch.tensor(list(_single_tokens(bound, records, texts)), dtype=torch.int64)


def _single_tokens(bound: TokenizedTemplate, records: Records, texts: Sequence[str]) -> dict[int, int]:
    """Return the number of different texts for each token of :func:`token_ids_of`."""
    different = list(dict.fromkeys(texts))
    examples = bound.examples([records[0]] * len(different), targets=different, source="answer")
    ids = Counter(example.target_ids[0] for example in examples if example.own_tokens == 1 and example.known)
    if not ids:
        raise RecordError(f"none of the {len(texts)} possible answers, such as '{texts[0]}', is one token of the model")
    return dict(ids)
