"""The tokens of the vocabulary nearest to each slot, and whether they can take its place."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ptuning.backbone.backbone import Backbone
from ptuning.data.questions import Questions
from ptuning.engine.soft_prompt import layer_input_rms, prefix_of_tokens
from ptuning.errors import PromptError
from ptuning.files import Json
from ptuning.progress import OnProgress
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prompt import Prompt
from ptuning.prompt.score import score_prompt
from ptuning.records import Rows
from ptuning.statistics import Score
from ptuning.template.encode import TokenizedTemplate

NEAREST = 5
SAMPLED_TOKENS = 512


@dataclass(frozen=True)
class Neighbour:
    """A token near a slot; ``value`` is a cosine similarity or a Euclidean distance."""

    token: str
    token_id: int
    value: float


@dataclass(frozen=True)
class SlotView:
    """One slot: the token it started at (None for a random start), its norm, and its nearest tokens by each measure."""

    start: str | None
    norm: float
    by_cosine: tuple[Neighbour, ...]
    by_distance: tuple[Neighbour, ...]


@dataclass(frozen=True)
class DeepView:
    """One deep slot: the token that it started at (None for one of the data's), where it is (``front``: keys and values
    in front of a row; else ``row``), and how far it moved in the mean layer, in shares of what was there: in front of
    its start, else of an ordinary token's input. ``largest`` is the layer, from 1, in which it moved most.
    """

    start: str | None
    where: str
    moved: float | None
    largest: int | None


@dataclass(frozen=True)
class Inspection:
    """The slots of a prompt in template order, beside the tokens of the vocabulary.

    ``token_distance`` is the median Euclidean distance between two tokens, ``neighbour_distance`` that of a token to
    its nearest other, ``token_norm`` the median norm of an embedding. With data, ``scores`` has the score ``as
    learned`` and that of the ``nearest tokens`` by cosine in the slots' place. If they differ much, the nearest tokens
    do not say what the prompt means.
    """

    slots: tuple[SlotView, ...]
    token_distance: float
    neighbour_distance: float
    token_norm: float
    scores: Mapping[str, Score]
    deep: tuple[DeepView, ...] = ()

    def to_json(self) -> dict[str, Json]:
        """Return the report as plain JSON."""
        return {
            "slots": [
                {
                    "start": view.start,
                    "norm": view.norm,
                    "nearest_by_cosine": [
                        {"token": n.token, "id": n.token_id, "similarity": n.value} for n in view.by_cosine
                    ],
                    "nearest_by_distance": [
                        {"token": n.token, "id": n.token_id, "distance": n.value} for n in view.by_distance
                    ],
                }
                for view in self.slots
            ],
            "typical": {
                "token_distance": self.token_distance,
                "neighbour_distance": self.neighbour_distance,
                "token_norm": self.token_norm,
            },
            **({"deep": [dict(vars(view)) for view in self.deep]} if self.deep else {}),
            "scores": {name: found.to_json() for name, found in self.scores.items()},
        }


@torch.no_grad()
def inspect_prompt(
    backbone: Backbone,
    prompt: Prompt,
    *,
    data: Rows | Questions | None = None,
    force: bool = False,
    report: OnProgress | None = None,
) -> Inspection:
    """Find the tokens nearest to each slot. With data, score the prompt with these tokens in the slots' place.

    A PromptError if the prompt has no slots, or belongs to another backbone.
    """
    if prompt.slot_vectors is None:
        raise PromptError("a manual prompt has no slots to inspect")
    backbone = prompt.adapt(backbone, force=force)
    bound = prompt.bind(backbone, force=force)
    table = backbone.table().cpu()  # (V, E)
    vectors = prompt.slot_vectors  # (P, E)
    cosine = torch.nn.functional.normalize(vectors, dim=-1) @ torch.nn.functional.normalize(table, dim=-1).T  # (P, V)
    # Exact, since a slot may equal a token: the faster matrix products would give a distance slightly above zero.
    distance = torch.cdist(vectors, table, compute_mode="donot_use_mm_for_euclid_dist")  # (P, V)
    views = tuple(
        SlotView(
            start=None if start is None else backbone.tokenizer.token(start),
            norm=float(vector.norm()),
            by_cosine=_neighbours(backbone, similar, largest=True),
            by_distance=_neighbours(backbone, far, largest=False),
        )
        for start, vector, similar, far in zip(bound.slot_start_ids, vectors, cosine, distance, strict=True)
    )
    scores = {}
    if data is not None:
        model = PromptModel(backbone, force=force)
        nearest = replace(prompt, slot_vectors=table[cosine.argmax(dim=-1)])
        for name, one in (("as learned", prompt), ("nearest tokens", nearest)):
            scores[name] = next(iter(score_prompt(model, data, one, report=report).scores.values()))
    return Inspection(views, *_typical(table), scores, _deep_views(prompt, bound, backbone))


def _deep_views(prompt: Prompt, bound: TokenizedTemplate, backbone: Backbone) -> tuple[DeepView, ...]:
    deep = prompt.deep
    if deep is None:
        return ()
    found: list[DeepView] = []

    def view(start: int | None, where: str, moved: Tensor | None) -> None:
        """Add a slot that has moved so far in each of some layers, (L,)."""
        share, layer = (float(moved.mean()), int(moved.argmax())) if moved is not None else (None, None)
        token = None if start is None else backbone.tokenizer.token(start)
        found.append(DeepView(token, where, share, None if layer is None else layer + (1 if where == "front" else 2)))

    starts = (*bound.layout.prefix.bos_ids, *bound.layout.prefix.start_ids)
    if deep.prefix is not None:
        known = [token for token in starts if token is not None]
        before = prefix_of_tokens(backbone, known) if len(known) == len(starts) else None  # (L, 2, K, C, D)
        for at in range(deep.bos, len(starts)):
            moved = None
            if before is not None:
                change = (deep.prefix - before)[:, :, :, at].flatten(1).norm(dim=1)  # (L,)
                moved = change / before[:, :, :, at].flatten(1).norm(dim=1)
            view(starts[at], "front", moved)
    if deep.offsets is not None:
        usual = layer_input_rms(backbone, torch.Generator().manual_seed(0))  # (L - 1,)
        for slot, offsets in zip(deep.offset_slots, deep.offsets, strict=True):
            view(bound.slot_start_ids[slot], "row", offsets.square().mean(dim=1).sqrt() / usual)
    return tuple(found)


def _neighbours(backbone: Backbone, values: Tensor, *, largest: bool) -> tuple[Neighbour, ...]:
    best, ids = values.topk(min(NEAREST, len(values)), largest=largest)
    return tuple(
        Neighbour(backbone.tokenizer.token(token), token, value)
        for token, value in zip(ids.tolist(), best.tolist(), strict=True)
    )


def _typical(table: Tensor) -> tuple[float, float, float]:
    """Return medians over a fixed sample of tokens: their distance, the distance to the nearest token, their norm."""
    chosen = torch.randperm(len(table), generator=torch.Generator().manual_seed(0))[:SAMPLED_TOKENS]
    distance = torch.cdist(table[chosen], table)  # (S, V)
    distance[torch.arange(len(chosen)), chosen] = torch.inf
    between = distance[:, chosen]
    return (
        float(between[between.isfinite()].median()),
        float(distance.min(dim=-1).values.median()),
        float(table.norm(dim=-1).median()),
    )
