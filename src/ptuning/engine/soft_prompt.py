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
    """Parameters of a prompt's deep slots: keys and values before rows (prefix tuning), or offsets in every layer.

    Args:
        prefix: (L, 2, K, C, D) float32; keys and values in L layers with K heads: of ``bos`` tokens that open a text,
            which are not learned, and of C - ``bos`` deep slots.
        bos: Number of these tokens.
        offsets: (N, L - 1, H) float32; added in every layer but the first at the positions of N deep slots in the row.
        offset_slots: Which of the prompt's slots with a vector these N are.
        dtype: Number format of a file that holds them: the numbers are among those that it has.
    """

    prefix: Tensor | None = None
    bos: int = 0
    offsets: Tensor | None = None
    offset_slots: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32

    def rounded(self, dtype: torch.dtype) -> DeepParams:
        """Return the same with the nearest numbers of a number format."""
        return replace(self.map(lambda tensor: tensor.to(dtype).float()), dtype=dtype)

    def parts(self, slots: int) -> tuple[DeepParams | None, DeepParams | None]:
        """Return the parameters of the prefix and the first slots with a vector, and those of the others."""
        first = [at for at, slot in enumerate(self.offset_slots) if slot < slots]
        rest = [at for at, slot in enumerate(self.offset_slots) if slot >= slots]
        own = [None if self.offsets is None or not at else self.offsets[at] for at in (first, rest)]
        return (
            DeepParams(self.prefix, self.bos, own[0], tuple(self.offset_slots[at] for at in first)),
            DeepParams(None, 0, own[1], tuple(self.offset_slots[at] - slots for at in rest)),
        )

    def map(self, change: Callable[[Tensor], Tensor]) -> DeepParams:
        """Return the same with its tensors changed."""
        return replace(self, **{name: change(tensor) for name, tensor in self.tensors.items()})  # type: ignore[arg-type]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that there are, by their names."""
        tensors = {"prefix": self.prefix, "offsets": self.offsets}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    @property
    def prefix_slots(self) -> int:
        """Number of deep slots of the prefix."""
        return 0 if self.prefix is None else self.prefix.shape[3] - self.bos

    @property
    def count(self) -> int:
        """Number of deep slots."""
        return len(self.offset_slots) + self.prefix_slots

    def to_json(self) -> dict[str, Json]:
        """Return the shapes, for manifests and records."""
        layers = len(self.prefix) if self.prefix is not None else 0
        if self.offsets is not None:
            layers = max(layers, self.offsets.shape[1] + 1)
        return {
            "slots": self.count,
            "prefix_slots": self.prefix_slots,
            "bos": self.bos,
            "offset_slots": list(self.offset_slots),
            "layers": layers,
            **({} if self.dtype == torch.float32 else {"dtype": str(self.dtype).removeprefix("torch.")}),
        }


@dataclass(frozen=True, eq=False)
class PromptBatch:
    """Learned parameters of one prompt, or of the several prompts of a batch: all that is not in the backbone.

    Args:
        vectors: (P, E) float32; the slot vectors of all prompts, one prompt below the other.
        slots: Number of slots of each prompt, adding up to P; read only if there are ``rows``.
        rows: For each row of a batch, which prompt it uses; None if all P vectors are the one prompt of every row.
        deep: Parameters of each prompt's deep slots, None without any; empty if no prompt has any.

    Example:
        >>> two, three = PromptBatch(torch.zeros(2, 8)), PromptBatch(torch.ones(3, 8))
        >>> both = PromptBatch.join([two, three], rows=[1, 0, 1])
        >>> both.layout(3), both.take([0, 2]).rows
        (([3, 2, 3], [2, 0, 2]), (1, 1))
    """

    vectors: Tensor
    slots: tuple[int, ...] = ()
    rows: tuple[int, ...] | None = None
    deep: tuple[DeepParams | None, ...] = ()

    @classmethod
    def of(cls, vectors: Tensor, deep: DeepParams | None) -> PromptBatch:
        """Return the parameters of one prompt: (P, E) slot vectors, and its deep slots' part, if it has any."""
        return cls(vectors, deep=() if deep is None else (deep,))

    @classmethod
    def none(cls, width: int) -> PromptBatch:
        """Return those of a manual prompt for a backbone of width E: no vectors, (0, E)."""
        return cls(torch.zeros(0, width))

    @classmethod
    def join(cls, prompts: Sequence[PromptBatch], *, rows: Sequence[int]) -> PromptBatch:
        """Return the parameters of several prompts for one batch, of whose rows each names its prompt by index."""
        if len(prompts) == 1:
            return prompts[0]
        vectors = torch.cat([prompt.vectors for prompt in prompts])  # (P, E)
        deep = tuple(prompt.deep[0] if prompt.deep else None for prompt in prompts)
        counts = tuple(len(prompt.vectors) for prompt in prompts)
        return cls(vectors, counts, tuple(rows), deep if any(deep) else ())

    def map(self, change: Callable[[Tensor], Tensor]) -> PromptBatch:
        """Return the same with its tensors changed."""
        deep = tuple(None if params is None else params.map(change) for params in self.deep)
        return replace(self, vectors=change(self.vectors), deep=deep)

    def apart(self) -> PromptBatch:
        """Return the same as leaves, where gradients end."""
        return self.map(lambda tensor: tensor.detach().requires_grad_(True))

    def to(self, device: torch.device) -> PromptBatch:
        """Return the same on a device."""
        return self.map(lambda tensor: tensor.to(device))

    def parts(self, slots: int) -> tuple[PromptBatch, PromptBatch]:
        """Return one prompt's parameters of the prefix and of the first slots with a vector, and those of the rest."""
        first, rest = self.deep[0].parts(slots) if self.deep and self.deep[0] is not None else (None, None)
        return PromptBatch.of(self.vectors[:slots], first), PromptBatch.of(self.vectors[slots:], rest)

    @property
    def tensors(self) -> list[Tensor]:
        """All learned tensors."""
        return [self.vectors, *(each for params in self.deep if params is not None for each in params.tensors.values())]

    @property
    def has_prefixes(self) -> bool:
        """Whether a prompt has learned keys and values before its rows."""
        return any(params is not None and params.prefix is not None for params in self.deep)

    def prefixes(self, rows: int) -> list[Tensor | None]:
        """Return for each of B rows the keys and values before it that its prompt has learned, (L, 2, K, C, D)."""
        prefixes = [None if params is None else params.prefix for params in self.deep]
        if not prefixes:
            return [None] * rows
        return prefixes * rows if self.rows is None else [prefixes[owner] for owner in self.rows]

    def offsets(self) -> tuple[Tensor, Tensor] | None:
        """Return the offsets of deep slots, (N, L - 1, H), and for each of the P slots its row there, (P,) int64, -1
        for one without; None if no prompt has such slots.
        """
        tables: list[Tensor] = []
        place = torch.full((len(self.vectors),), -1, dtype=torch.int64)
        start = number = 0
        for params, slots in zip(self.deep, self.slots or (len(self.vectors),), strict=False):
            if params is not None and params.offsets is not None:
                count = len(params.offset_slots)
                place[[start + slot for slot in params.offset_slots]] = torch.arange(number, number + count)
                tables.append(params.offsets)
                number += count
            start += slots
        return (torch.cat(tables), place.to(tables[0].device)) if tables else None

    def take(self, rows: Sequence[int]) -> PromptBatch:
        """Return the parameters for a batch of other rows, each given by the index of a row of this one."""
        return self if self.rows is None else replace(self, rows=tuple(self.rows[row] for row in rows))

    def layout(self, rows: int) -> tuple[list[int], list[int]]:
        """Return for each of B rows the number of its prompt's slots, and where they begin in ``vectors``."""
        if self.rows is None:
            return [len(self.vectors)] * rows, [0] * rows
        starts = [0, *accumulate(self.slots)]
        return [self.slots[prompt] for prompt in self.rows], [starts[prompt] for prompt in self.rows]


# Number of random tokens by which the usual size of layer inputs is measured.
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
    """Return the root mean square of each layer's input but the first's at an ordinary token, (L - 1,): the median
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
    """Return the initial parameters of a template's deep slots, and the reach of each layer; None without deep slots.

    A prefix holds its tokens' keys and values in the frozen backbone; offsets are zero, so that slots are the tokens
    that their vectors start at. With ``random`` both are standard normal numbers instead.
    """
    layout = bound.layout
    if not (layout.prefix.slots or layout.offset_slots):
        return None
    prefix = offsets = None
    bos, reach = layout.prefix.bos, dict[str, Tensor]()
    if layout.prefix.slots:
        prefix = prefix_of_tokens(
            backbone, [token or 0 for token in (*layout.prefix.bos_ids, *layout.prefix.start_ids)]
        )
        sizes = prefix[:, :, :, bos:].square().mean(dim=(2, 4)).sqrt()  # (L, 2, C)
        reach["prefix"] = sizes.median(dim=2).values
    if layout.offset_slots:
        layers, width = backbone.deep
        offsets = torch.zeros(len(layout.offset_slots), layers - 1, width)
        reach["offsets"] = layer_input_rms(backbone, generator)
    if random:
        for learned in (prefix[:, :, :, bos:] if prefix is not None else None, offsets):
            if learned is not None:
                learned.normal_(generator=generator)
    return DeepParams(prefix, bos, offsets, layout.offset_slots), reach


def check_deep_params(deep: DeepParams, bound: TokenizedTemplate, backbone: Backbone) -> None:
    """Raise a PromptError if the parameters of deep slots do not fit a template or a backbone."""
    layout = bound.layout
    expected = (layout.prefix.slots, layout.prefix.bos, layout.offset_slots)
    if (deep.prefix_slots, deep.bos, deep.offset_slots) != expected:
        raise PromptError(
            f"the template '{bound.template}' has {expected[0]} deep slots at its front and {len(expected[2])} "
            f"elsewhere with this tokenizer, and the prompt has {deep.prefix_slots} and {len(deep.offset_slots)}"
        )
    if deep.prefix is not None:
        layers, _, heads, _, width = deep.prefix.shape
        shape, expected_shape = BlockShape(layers, heads, width), backbone.block_shape
        if shape != expected_shape:
            raise PromptError(
                f"the prompt's deep slots are keys and values of {shape} before rows, and '{backbone.name}' takes "
                + ("none there" if expected_shape is None else f"those of {expected_shape}")
            )
    if deep.offsets is not None and tuple(deep.offsets.shape[1:]) != (backbone.deep.layers - 1, backbone.deep.width):
        raise PromptError(
            f"the prompt's deep slots are for {deep.offsets.shape[1] + 1} layers of width {deep.offsets.shape[2]}, and "
            f"'{backbone.name}' has {backbone.deep.layers} of width {backbone.deep.width}"
        )
