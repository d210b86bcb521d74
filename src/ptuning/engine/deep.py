"""What deep slots start at, tokens as every layer of a backbone has them; and whether they fit a backbone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.probes import BlockShape
from ptuning.engine.learned import Deep
from ptuning.errors import PromptError
from ptuning.template.encode import TokenizedTemplate

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


def deep_start(
    backbone: Backbone, bound: TokenizedTemplate, *, generator: torch.Generator, random: bool = False
) -> tuple[Deep, dict[str, Tensor]] | None:
    """Return what the deep slots of a template start at, and the reach of each layer; None without deep slots.

    A block is what its tokens are in every layer of the frozen backbone; other deep slots add nothing yet, so that they
    are the tokens that their vectors start at. With ``random`` both are standard normal numbers instead.
    """
    layout = bound.layout
    slots = layout.deep_slots
    if not (layout.block_ids or slots):
        return None
    block = offsets = None
    reach: dict[str, Tensor] = {}
    if layout.block_ids:
        ids = [token or 0 for token in (*layout.lead_ids, *layout.block_ids)]
        block = block_of(backbone, ids)  # (L, 2, K, C, D)
        sizes = block[:, :, :, layout.lead :].square().mean(dim=(2, 4)).sqrt()  # (L, 2, C)
        reach["block"] = sizes.median(dim=2).values
    if slots:
        layers, width = backbone.deep
        offsets = torch.zeros(len(slots), layers - 1, width)
        reach["offsets"] = input_sizes(backbone, generator)
    if random:
        for drawn in (block[:, :, :, layout.lead :] if block is not None else None, offsets):
            if drawn is not None:
                drawn.normal_(generator=generator)
    return Deep(block, layout.lead, offsets, slots), reach


def check_deep(deep: Deep, bound: TokenizedTemplate, backbone: Backbone) -> None:
    """Raise a PromptError if what deep slots bring does not fit a template or a backbone."""
    layout, own = bound.layout, (deep.in_front, deep.lead, deep.slots)
    if own != (layout.in_front, layout.lead, layout.deep_slots):
        raise PromptError(
            f"the template '{bound.template}' has {layout.in_front} deep slots in front and {len(layout.deep_slots)} "
            f"elsewhere with this tokenizer, and the prompt has {deep.in_front} and {len(deep.slots)}"
        )
    if deep.block is not None:
        layers, _, heads, _, width = deep.block.shape
        theirs, read = BlockShape(layers, heads, width), backbone.block_shape
        if theirs != read:
            none = f"reads none there; they are of {theirs}"
            raise PromptError(
                f"the prompt's deep slots are keys and values in front of rows, and '{backbone.name}' "
                + (none if read is None else f"has {read}, where theirs are of {theirs}")
            )
    if deep.offsets is not None and tuple(deep.offsets.shape[1:]) != (backbone.deep.layers - 1, backbone.deep.width):
        raise PromptError(
            f"the prompt's deep slots are for {deep.offsets.shape[1] + 1} layers of width {deep.offsets.shape[2]}, and "
            f"'{backbone.name}' has {backbone.deep.layers} of width {backbone.deep.width}"
        )
