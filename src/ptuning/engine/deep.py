"""What deep slots start at: tokens as every layer of a backbone has them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ptuning.backbone.backbone import Backbone

# Tokens whose run shows what the layers of a backbone usually read.
ORDINARY_TOKENS = 32


@torch.no_grad()
def block_of(backbone: Backbone, token_ids: Sequence[int]) -> Tensor:
    """Return the keys and values of C tokens at the beginning of a row, (L, 2, K, C, D) float32 on the CPU."""
    ids = torch.tensor([list(token_ids)], device=backbone.device)  # (1, C)
    places = torch.arange(len(token_ids), device=ids.device)[None]
    memory = backbone.remember(backbone.embed(ids), mask=torch.ones_like(ids), positions=places)
    return torch.stack([torch.stack(pair) for pair in memory.layers])[:, :, 0].float().cpu()


@torch.no_grad()
def input_sizes(backbone: Backbone, generator: torch.Generator) -> Tensor:
    """Return the root mean square of what each layer but the first reads of an ordinary token, (L - 1,): the median
    over drawn tokens, since the first ones of a row are far from ordinary in some models.
    """
    layers, count = backbone.deep.layers, min(ORDINARY_TOKENS, backbone.tokenizer.max_tokens)
    ids = torch.randint(backbone.vocabulary, (1, count), generator=generator).to(backbone.device)
    both = backbone.kind == "encoder-decoder"
    row, places = torch.cat([ids, ids], dim=1) if both else ids, torch.arange(count, device=ids.device)[None]
    sizes: dict[int, list[Tensor]] = {}
    at = torch.zeros(1, dtype=torch.int64, device=ids.device)
    backbone.run(
        backbone.embed(row),
        mask=torch.ones_like(row),
        positions=torch.cat([places, places], dim=1) if both else places,
        rows=at,
        cols=at + row.shape[1] - 1,
        encoder_tokens=count if both else 0,
        seen=lambda layer, hidden: sizes.setdefault(layer, []).append(
            hidden[0, :count].float().square().mean(dim=-1).sqrt().median().cpu()
        ),
    )
    return torch.stack([torch.stack(sizes[layer]).mean() for layer in range(1, layers)])
