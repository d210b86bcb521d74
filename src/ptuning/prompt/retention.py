"""What a prompt costs outside of its task: the likelihood of plain sentences behind it, against that without it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources

import torch

from ptuning.backbone.backbone import Backbone
from ptuning.engine.batch import batches
from ptuning.engine.learned import Learned
from ptuning.engine.objective import inputs_of, score_choices, target_items
from ptuning.engine.passes import prefix_tokens, target_logits
from ptuning.errors import PromptError
from ptuning.progress import OnProgress, Progress
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prompt import Prompt
from ptuning.records import TARGET_FIELD, Records
from ptuning.statistics import Ratios, Score, summary
from ptuning.template.fill import BoundTemplate
from ptuning.template.language import Template
from ptuning.template.segments import FILLS_MASKS
from ptuning.texts.table import RETENTION

# A sentence behind slots: its first word is read, since nothing stands before it without them.
FIRST_WORD = "first"
SENTENCE = f"{{{FIRST_WORD}}} [Y]"


@dataclass(frozen=True)
class Retention:
    """What a prompt costs: nats a token of plain sentences behind it (``on``) and without it (``off``), and their
    difference with its interval over sentences.
    """

    score: Score
    on: float
    off: float


def plain_sentences() -> list[str]:
    """Return the 200 plain English sentences that ship with the package."""
    text = (resources.files("ptuning.data") / "plain" / "sentences.txt").read_text(encoding="utf-8")
    return text.splitlines()


def check_retention(prompt: Prompt) -> None:
    """Raise a PromptError if a prompt has nothing that a sentence could stand behind."""
    if prompt.slot_vectors is None and prompt.weights is None:
        raise PromptError(
            f"'{RETENTION}' is what slots or trained weights cost, and the prompt has neither; its words are not asked"
        )


def retention(
    model: PromptModel,
    prompt: Prompt,
    *,
    sentences: Sequence[str] | None = None,
    report: OnProgress | None = None,
) -> Retention:
    """Return what a prompt costs on plain sentences, by default on the shipped ones: its slots stand in front of each,
    without the words of its template, and its trained weights are in use; then neither.

    A PromptError if the prompt has no such parts, or the model fills masks and goes on with no text.

    Source: the measure of forgetting in PEFT's method comparison (``method_comparison/MetaMathQA``).
    """
    check_retention(prompt)
    if model.backbone.kind in FILLS_MASKS:
        raise PromptError(f"'{RETENTION}' is for models that write; this one fills masks")
    texts = [one.partition(" ") for one in (plain_sentences() if sentences is None else sentences)]
    records = Records([{FIRST_WORD: first, TARGET_FIELD: rest} for first, _, rest in texts], name="plain sentences")
    with_prompt = model.for_prompt(prompt).backbone
    prompt.bind(with_prompt, force=model.force)  # checks that it fits
    on = _nats(with_prompt, replace(prompt, template=_slots_in_front(prompt)), records, report=report)
    off = _nats(model.backbone, Prompt.manual(SENTENCE), records, report=report)
    return _between(on, off)


def _slots_in_front(prompt: Prompt) -> Template:
    """Return a template of all slots of a prompt and then a sentence. Which slots with a vector are deep says the
    prompt, by their number; those of a block stand in front of all.
    """
    deep, pieces = prompt.deep, ""
    if deep is not None and deep.in_front:
        pieces = f"[D*{deep.in_front}]"
    if prompt.slots:
        pieces += f"[{'P' if deep is None or pieces else 'D'}*{prompt.slots}]"
    return Template.parse(pieces + SENTENCE)


def _between(on: Sequence[tuple[float, int]], off: Sequence[tuple[float, int]]) -> Retention:
    """Return the difference of (nats, tokens) of the same sentences."""
    import numpy as np

    counts = np.array([[tokens] for _, tokens in on], dtype=np.float64)
    more = np.array([[one - other] for (one, _), (other, _) in zip(on, off, strict=True)])
    total = float(counts.sum())
    score = summary([Ratios(more, counts)])
    return Retention(score, sum(nats for nats, _ in on) / total, sum(nats for nats, _ in off) / total)


@torch.no_grad()
def _nats(
    backbone: Backbone, prompt: Prompt, records: Records, *, report: OnProgress | None
) -> list[tuple[float, int]]:
    """Return the nats of the tokens of each sentence, and their number."""
    block = prompt.deep is not None and prompt.deep.block is not None
    bound = BoundTemplate(prompt.template, tokenizer=backbone.tokenizer, kind=backbone.kind, block=block)
    items = target_items(bound, records, with_stop=False)
    learned: Learned = prompt.learned(backbone)
    found: dict[int, tuple[float, int]] = {}
    prefix = prefix_tokens(backbone, inputs_of(items), learned)
    for chosen in batches([item.inputs for item in items], prefix=prefix):
        group = [items[index] for index in chosen]
        log_probs = score_choices(group, target_logits(backbone, inputs_of(group), learned)).log_probs.tolist()
        found |= {
            index: (-value, item.choices[0].own_tokens)
            for index, value, item in zip(chosen, log_probs, group, strict=True)
        }
        if report is not None:
            report(Progress("dev", len(found), len(items), records.name))
    return [found[index] for index in range(len(items))]
