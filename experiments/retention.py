"""Retention: what a prompt costs outside of its task, in nats per token of plain sentences.

    python -m experiments.retention PROMPT [--backbone MODEL]

The virtual tokens (and trained weights) of the prompt come before 200 plain sentences; the mean negative
log-likelihood of their tokens is compared with that of the backbone alone. Source: the measure of forgetting in PEFT's
``method_comparison/MetaMathQA``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

import ptuning
from ptuning.backbone.backbone import Backbone
from ptuning.engine.batch import batches
from ptuning.engine.forward import shared_prefix_tokens, target_logits
from ptuning.engine.objective import inputs_of, score_continuations, target_requests
from ptuning.errors import PromptError
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prompt import Prompt
from ptuning.records import TARGET_FIELD, Records
from ptuning.statistics import Ratios, Score, summary
from ptuning.template.encode import TokenizedTemplate
from ptuning.template.language import Template
from ptuning.template.segments import FILLS_MASKS

SENTENCES = Path(__file__).with_name("sentences.txt")
# The first word is input and not scored: without a prompt nothing comes before it.
SENTENCE = "{first} [Y]"


@dataclass(frozen=True)
class Retention:
    """Nats per token with the prompt and without it, and their difference with its interval over sentences."""

    score: Score
    with_prompt: float
    without: float


def plain_sentences() -> list[str]:
    """Return 200 plain English sentences."""
    return SENTENCES.read_text(encoding="utf-8").splitlines()


def retention(model: PromptModel, prompt: Prompt, *, sentences: Sequence[str] | None = None) -> Retention:
    """Return what a prompt costs on plain sentences.

    A PromptError if the prompt has neither virtual tokens nor trained weights, or the model fills masks.
    """
    if prompt.slot_vectors is None and prompt.weights is None:
        raise PromptError("retention is about virtual tokens or trained weights, and the prompt has neither")
    if model.backbone.kind in FILLS_MASKS:
        raise PromptError("retention is for generative models; this one fills masks")
    texts = [text.partition(" ") for text in (plain_sentences() if sentences is None else sentences)]
    records = Records([{"first": first, TARGET_FIELD: rest} for first, _, rest in texts], name="plain sentences")
    backbone = model.for_prompt(prompt).backbone
    prompt.bind(backbone, force=model.force)  # checks that it fits
    deep, slots = prompt.deep, ""
    if deep is not None and deep.prefix_slots:
        slots = f"[D*{deep.prefix_slots}]"
    if prompt.slots:
        slots += f"[{'P' if deep is None or slots else 'D'}*{prompt.slots}]"
    nats, counts = _nats(backbone, replace(prompt, template=Template.parse(slots + SENTENCE)), records)
    plain, _ = _nats(model.backbone, Prompt.manual(SENTENCE), records)
    difference = summary([Ratios((nats - plain)[:, None], counts[:, None])])
    return Retention(difference, float(nats.sum() / counts.sum()), float(plain.sum() / counts.sum()))


@torch.no_grad()
def _nats(backbone: Backbone, prompt: Prompt, records: Records) -> tuple[np.ndarray, np.ndarray]:
    """Return the negative log-likelihood of each sentence, and its number of tokens."""
    block = prompt.deep is not None and prompt.deep.prefix is not None
    bound = TokenizedTemplate(prompt.template, tokenizer=backbone.tokenizer, kind=backbone.kind, block=block)
    items = target_requests(bound, records, with_stop=False)
    learned = prompt.learned(backbone)
    nats = np.zeros(len(items))
    for chosen in batches(
        [item.inputs for item in items], prefix=shared_prefix_tokens(backbone, inputs_of(items), learned)
    ):
        group = [items[index] for index in chosen]
        log_probs = score_continuations(group, target_logits(backbone, inputs_of(group), learned)).log_probs.tolist()
        nats[list(chosen)] = [-value for value in log_probs]
    return nats, np.array([item.choices[0].own_tokens for item in items], dtype=np.float64)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", type=Path)
    parser.add_argument("--backbone")
    given = parser.parse_args()
    cost = retention(PromptModel(ptuning.load_backbone(given.backbone)), Prompt.load(given.prompt))
    score = cost.score
    print(f"{score.value:.3f} [{score.low:.3f}, {score.high:.3f}] nats per token, n = {score.n}")
    print(f"{cost.with_prompt:.3f} with the prompt, {cost.without:.3f} without")
