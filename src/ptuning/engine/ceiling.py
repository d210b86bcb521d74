"""The speed of a bare pass of the backbone, which training cannot exceed by much."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from ptuning.backbone.backbone import Backbone
from ptuning.engine.batch import collate
from ptuning.engine.learned import Learned
from ptuning.engine.objective import Item, inputs_of
from ptuning.engine.passes import run_embeddings


def measure_ceiling(
    backbone: Backbone, items: Sequence[Item], *, batch_size: int, slots: int, seconds: float = 10.0
) -> float:
    """Return the tokens per second of a bare forward and backward pass of the backbone over training batches.

    The embeddings are the leaves: no encoder, no slots, no optimizer. Logits are computed where training computes them,
    and a shared prefix runs once. Rows run whole, so training from the first slot onwards may be faster than this.
    """
    learned = Learned(torch.zeros(slots, backbone.width))  # says where slots are; its values are not used
    tokens, spent, began = 0, 0.0, time.monotonic()
    for number, at in enumerate((0, *range(0, len(items), batch_size))):
        batch = collate(inputs_of(items[at : at + batch_size]), learned).to(backbone.device)
        embeddings = backbone.embed(batch.token_ids).detach().requires_grad_(True)  # (B, T, E)
        start = time.monotonic()
        logits, _ = run_embeddings(backbone, embeddings, batch)
        torch.logsumexp(logits, dim=-1).sum().backward()
        if backbone.device.type == "cuda":
            torch.cuda.synchronize(backbone.device)
        if number:  # the first time, the first batch warms the machine up
            tokens, spent = tokens + batch.tokens, spent + time.monotonic() - start
        if number and time.monotonic() - began > seconds:
            break
    return tokens / spent
