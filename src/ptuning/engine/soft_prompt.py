"""Learned parameters that prompts pass to the model: virtual-token vectors, prefix keys and values, layer offsets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.probes import BlockShape
from ptuning.errors import PromptError
from ptuning.files import Json
from ptuning.template.encode import TokenizedTemplate


@dataclass(frozen=True, eq=False)
class DeepParams:
    """What deep slots bring to the layers of a backbone.

    Args:
        block: (L, 2, K, C, D) float32; the keys and values of a block in front of rows, in L layers with K heads: of
            the ``lead`` tokens that open a text, which are not learned, and of C - ``lead`` deep slots.
        lead: Number of these tokens.
        offsets: (N, L - 1, H) float32; what is added in every layer but the first in the columns of N deep slots.
        slots: Which of the prompt's slots with a vector these N are.
        dtype: Number format of a file that holds them: the numbers are among those that it has.
    """

    block: Tensor | None = None
    lead: int = 0
    offsets: Tensor | None = None
    slots: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32

    def rounded(self, dtype: torch.dtype) -> DeepParams:
        """Return the same with the nearest numbers of a number format."""
        return replace(self.map(lambda one: one.to(dtype).float()), dtype=dtype)

    def parts(self, slots: int) -> tuple[DeepParams, DeepParams]:
        """Return what belongs to the block and the first slots with a vector, and what belongs to the others."""
        first = [at for at, slot in enumerate(self.slots) if slot < slots]
        rest = [at for at, slot in enumerate(self.slots) if slot >= slots]
        own = [None if self.offsets is None or not at else self.offsets[at] for at in (first, rest)]
        return (
            DeepParams(self.block, self.lead, own[0], tuple(self.slots[at] for at in first)),
            DeepParams(None, 0, own[1], tuple(self.slots[at] - slots for at in rest)),
        )

    def map(self, change: Callable[[Tensor], Tensor]) -> DeepParams:
        """Return the same with its tensors changed."""
        return replace(self, **{name: change(one) for name, one in self.tensors.items()})  # type: ignore[arg-type]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that there are, by their names."""
        found = {"block": self.block, "offsets": self.offsets}
        return {name: one for name, one in found.items() if one is not None}

    @property
    def in_front(self) -> int:
        """Number of deep slots of the block."""
        return 0 if self.block is None else self.block.shape[3] - self.lead

    @property
    def count(self) -> int:
        """Number of deep slots."""
        return len(self.slots) + self.in_front

    def to_json(self) -> dict[str, Json]:
        """Return what it is without its numbers, for manifests and records."""
        layers = len(self.block) if self.block is not None else 0
        if self.offsets is not None:
            layers = max(layers, self.offsets.shape[1] + 1)
        return {
            "slots": self.count,
            "block": self.in_front,
            "lead": self.lead,
            "of": list(self.slots),
            "layers": layers,
            **({} if self.dtype == torch.float32 else {"dtype": str(self.dtype).removeprefix("torch.")}),
        }


@dataclass(frozen=True, eq=False)
class PromptBatch:
    """What one prompt, or the several prompts of a batch, bring to a pass: all that is learned outside of the backbone.

    Args:
        vectors: (P, E) float32; the slot vectors of all prompts, one prompt below the other.
        slots: Number of slots of each prompt, adding up to P; read only if there are ``rows``.
        rows: For each row of a batch, which prompt it uses; None if all P vectors are the one prompt of every row.
        deep: What each prompt's deep slots bring, None without any; empty if no prompt has any.

    Example:
        >>> one, two = PromptBatch(torch.zeros(2, 8)), PromptBatch(torch.ones(3, 8))
        >>> both = PromptBatch.join([one, two], rows=[1, 0, 1])
        >>> both.layout(3), both.take([0, 2]).rows
        (([3, 2, 3], [2, 0, 2]), (1, 1))
    """

    vectors: Tensor
    slots: tuple[int, ...] = ()
    rows: tuple[int, ...] | None = None
    deep: tuple[DeepParams | None, ...] = ()

    @classmethod
    def of(cls, vectors: Tensor, deep: DeepParams | None) -> PromptBatch:
        """Return what one prompt brings: (P, E) slot vectors, and its deep slots' part, if it has any."""
        return cls(vectors, deep=() if deep is None else (deep,))

    @classmethod
    def none(cls, width: int) -> PromptBatch:
        """Return what a manual prompt brings to a backbone of width E: no vectors, (0, E)."""
        return cls(torch.zeros(0, width))

    @classmethod
    def join(cls, prompts: Sequence[PromptBatch], *, rows: Sequence[int]) -> PromptBatch:
        """Return what several prompts bring to one batch, of whose rows each names its prompt by index."""
        if len(prompts) == 1:
            return prompts[0]
        vectors = torch.cat([one.vectors for one in prompts])  # (P, E)
        deep = tuple(one.deep[0] if one.deep else None for one in prompts)
        counts = tuple(len(one.vectors) for one in prompts)
        return cls(vectors, counts, tuple(rows), deep if any(deep) else ())

    def apart(self) -> PromptBatch:
        """Return the same as leaves: gradients end there, instead of going on to what made them."""

        def leaf(tensor: Tensor) -> Tensor:
            return tensor.detach().requires_grad_(True)

        deep = tuple(None if one is None else one.map(leaf) for one in self.deep)
        return replace(self, vectors=leaf(self.vectors), deep=deep)

    def to(self, device: torch.device) -> PromptBatch:
        """Return the same on a device."""
        deep = tuple(None if one is None else one.map(lambda tensor: tensor.to(device)) for one in self.deep)
        return replace(self, vectors=self.vectors.to(device), deep=deep)

    def parts(self, slots: int) -> tuple[PromptBatch, PromptBatch]:
        """Return what one prompt brings to its first slots with a vector and in front of them, and what to the rest."""
        first, rest = self.deep[0].parts(slots) if self.deep and self.deep[0] is not None else (None, None)
        return PromptBatch.of(self.vectors[:slots], first), PromptBatch.of(self.vectors[slots:], rest)

    @property
    def tensors(self) -> list[Tensor]:
        """All that is learned."""
        return [self.vectors, *(tensor for one in self.deep if one is not None for tensor in one.tensors.values())]

    @property
    def has_blocks(self) -> bool:
        """Whether rows of a prompt stand behind keys and values that it brings."""
        return any(one is not None and one.block is not None for one in self.deep)

    def blocks(self, rows: int) -> list[Tensor | None]:
        """Return for each of B rows the keys and values before it that its prompt has learned, (L, 2, K, C, D)."""
        blocks = [None if deep is None else deep.block for deep in self.deep]
        if not blocks:
            return [None] * rows
        return blocks * rows if self.rows is None else [blocks[owner] for owner in self.rows]

    def offsets(self) -> tuple[Tensor, Tensor] | None:
        """Return what deep slots add, (N, L - 1, H), and for each of the P slots its row there, (P,) int64, -1 for one
        that is not deep; None if no prompt has such slots.
        """
        tables = [one.offsets for one in self.deep if one is not None and one.offsets is not None]
        if not tables:
            return None
        place = torch.full((len(self.vectors),), -1, dtype=torch.int64)
        start = number = 0
        for one, slots in zip(self.deep, self.slots or (len(self.vectors),), strict=True):
            if one is not None and one.offsets is not None:
                place[[start + slot for slot in one.slots]] = torch.arange(number, number + len(one.slots))
                number += len(one.slots)
            start += slots
        return torch.cat(tables), place.to(tables[0].device)

    def take(self, rows: Sequence[int]) -> PromptBatch:
        """Return the same for a batch of other rows, each given by the index of a row of this one."""
        return self if self.rows is None else replace(self, rows=tuple(self.rows[row] for row in rows))

    def layout(self, rows: int) -> tuple[list[int], list[int]]:
        """Return for each of B rows the number of its prompt's slots, and where they begin in ``vectors``."""
        if self.rows is None:
            return [len(self.vectors)] * rows, [0] * rows
        starts = [0, *accumulate(self.slots)]
        return [self.slots[prompt] for prompt in self.rows], [starts[prompt] for prompt in self.rows]


# Tokens whose run shows what the layers of a backbone usually read.
ORDINARY_TOKENS = 32


@torch.no_grad()
def prefix_of_tokens(backbone: Backbone, token_ids: Sequence[int]) -> Tensor:
    """Return the keys and values of C tokens at the beginning of a row, (L, 2, K, C, D) float32 on the CPU."""
    ids = torch.tensor([list(token_ids)], device=backbone.device)  # (1, C)
    places = torch.arange(len(token_ids), device=ids.device)[None]
    memory = backbone.remember(backbone.embed(ids), mask=torch.ones_like(ids), positions=places)
    return torch.stack([torch.stack(pair) for pair in memory.layers])[:, :, 0].float().cpu()


@torch.no_grad()
def layer_input_rms(backbone: Backbone, generator: torch.Generator) -> Tensor:
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


def initial_deep_params(
    backbone: Backbone, bound: TokenizedTemplate, *, generator: torch.Generator, random: bool = False
) -> tuple[DeepParams, dict[str, Tensor]] | None:
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
        block = prefix_of_tokens(backbone, ids)  # (L, 2, K, C, D)
        sizes = block[:, :, :, layout.lead :].square().mean(dim=(2, 4)).sqrt()  # (L, 2, C)
        reach["block"] = sizes.median(dim=2).values
    if slots:
        layers, width = backbone.deep
        offsets = torch.zeros(len(slots), layers - 1, width)
        reach["offsets"] = layer_input_rms(backbone, generator)
    if random:
        for drawn in (block[:, :, :, layout.lead :] if block is not None else None, offsets):
            if drawn is not None:
                drawn.normal_(generator=generator)
    return DeepParams(block, layout.lead, offsets, slots), reach


def check_deep_params(deep: DeepParams, bound: TokenizedTemplate, backbone: Backbone) -> None:
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
