"""What does it bring to run a long shared prefix once: 200 of 224 tokens, against the plain path?"""

from __future__ import annotations

import time
from unittest.mock import patch

import torch

from benchmarks.common import Settings, answer, interleave, no_answer, parser, ratios, settings_of, spread, write_result
from benchmarks.material import backbone_of, bind, every, fact_sentences, items_of, mean_tokens, synchronised
from ptuning.backbone.backbone import Backbone
from ptuning.engine import forward as forward_module
from ptuning.engine.batch import shared_tokens
from ptuning.engine.objective import ScoringRequest, inputs_of, loss, score_continuations
from ptuning.engine.soft_prompt import PromptBatch
from ptuning.template.encode import TokenizedTemplate

ROWS = 16
# In float32 the two paths add up in another order; what is compared must be the same gradient.
MOST_GAP = 1e-3
METHOD = (
    "Forward and backward of one training batch from the slot vectors, whose slots stand at the very front, so that "
    "gradients flow through the whole prefix; the plain path is the same code with forward.MIN_SAVED_TOKENS out of "
    "reach. The gap is the largest difference between the two gradients, over the largest entry."
)


def main(settings: Settings) -> None:
    """Measure both paths."""
    began = time.monotonic()
    backbone = backbone_of(settings)
    bound, items = instructed(backbone, settings)
    with torch.no_grad():
        vectors = backbone.table()[: bound.slots]  # (P, E)
    rows = inputs_of(items)
    shared = shared_tokens(rows)

    def step(least_saved: int) -> tuple[float, torch.Tensor]:
        leaf = vectors.clone().requires_grad_(True)
        with patch.object(forward_module, "MIN_SAVED_TOKENS", least_saved):
            start = synchronised(backbone.device)
            logits = forward_module.target_logits(backbone, rows, PromptBatch(leaf))
            loss(items, score_continuations(items, logits))[0].backward()
            seconds = synchronised(backbone.device) - start
        assert leaf.grad is not None
        return seconds, leaf.grad

    plain_gradient, shared_gradient = step(1 << 60)[1], step(1)[1]
    gap = float((plain_gradient - shared_gradient).abs().max() / plain_gradient.abs().max())
    found = interleave(
        {"plain": lambda _: step(1 << 60)[0], "shared": lambda _: step(1)[0]},
        repeats=settings.pick(5, 2),
        seconds=60,
        seed=settings.seed,
        note="shared prefix",
    )
    tokens = mean_tokens(items)
    note = f"{shared} of {tokens:.0f} tokens shared, {ROWS} rows, gradients differ by {gap:.0e}"
    most = MOST_GAP if backbone.dtype == torch.float32 else 0.1
    good = gap <= most and backbone.shares_prefix
    write_result(
        settings,
        "prefix",
        question=(__doc__ or "").splitlines()[0],
        cells=[
            {
                "cell": "long shared prefix",
                "contestant": name,
                "shared_tokens": shared,
                "tokens_per_row": tokens,
                "seconds": spread(values),
                "gradient_gap": gap,
            }
            for name, values in found.items()
        ],
        answers={
            "shared-prefix": answer(ratios(found["plain"], found["shared"]), note)
            if good
            else no_answer(f"the two paths do not agree, or the backbone cannot share: {note}")
        },
        method=METHOD,
        seconds=time.monotonic() - began,
    )


def instructed(backbone: Backbone, settings: Settings) -> tuple[TokenizedTemplate, list[ScoringRequest]]:
    """Return a template with a long instruction in front, and the items of one batch."""
    wanted = settings.pick(196, 40)
    ids = backbone.tokenizer.encode([" ".join(fact_sentences()[:200])])[0]
    text = backbone.tokenizer.decode(ids[:wanted]).replace("[", "(").replace("{", "(")
    bound = bind(
        backbone, f"[P*4] {text}\nFill in a capital of the list of all countries of the world: [X], that is [Y]"
    )
    return bound, items_of(bound, every("capitals")[:ROWS])


if __name__ == "__main__":
    main(settings_of(parser(__doc__).parse_args()))
