"""Token ids that slots can take in another program, and slot vectors as rows of its embedding table."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.tokenizer import UNUSED
from ptuning.errors import ExchangeError
from ptuning.exchange.rows import Source
from ptuning.template.segments import Ids

# So many rows of the table say by what it is scaled.
SCALE_ROWS = 256


@dataclass(frozen=True)
class SlotTokens:
    """The tokens in the slots' places, by id and text; the text of a row of the table without a token is None."""

    ids: Ids = ()
    texts: tuple[str | None, ...] = ()

    @property
    def named(self) -> tuple[str, ...] | None:
        """The texts, if every token has one."""
        found = tuple(text for text in self.texts if text is not None)
        return found if len(found) == len(self.texts) else None


def reserved_tokens(source: Source) -> SlotTokens | None:
    """Return a reserved token of the tokenizer for each slot; None if there are too few."""
    reserved = _reserved(source)
    chosen = tuple(reserved)[: len(source.vectors)]
    return SlotTokens(chosen, tuple(map(reserved.get, chosen))) if len(chosen) == len(source.vectors) else None


def unused_rows(source: Source) -> SlotTokens:
    """Return a row of the table for each slot that no text uses: tokens that are called unused or reserved, then rows
    without a token (tables are padded to round sizes), then other reserved tokens. An ExchangeError if these are too
    few.
    """
    backbone, reserved = source.backbone, _reserved(source)
    called = [index for index, text in reserved.items() if UNUSED.search(text)]
    beyond = range(backbone.vocabulary, backbone.embedding_rows)
    chosen = tuple(dict.fromkeys([*called, *beyond, *reserved]))
    if len(chosen) < len(source.vectors):
        raise ExchangeError(
            f"the prompt has {len(source.vectors)} slots, and the embedding table of '{backbone.name}' has "
            f"{len(chosen)} rows that no text uses (reserved tokens, and rows without a token); take --as tokens, "
            "which adds tokens, or --as embeds, which needs none"
        )
    chosen = chosen[: len(source.vectors)]
    return SlotTokens(chosen, tuple(map(reserved.get, chosen)))


def _reserved(source: Source) -> dict[int, str]:
    """Return the reserved tokens that stand in no row that the export is compared on."""
    used: set[int] = set()
    for row in source.rows:
        slots = set(row.example.slot_positions)
        used |= {token for at, token in enumerate(row.example.token_ids) if at not in slots}
        used |= set(row.example.target_ids)
    return {index: text for index, text in source.backbone.tokenizer.reserved_ids.items() if index not in used}


@torch.no_grad()
def stored_rows(backbone: Backbone, ids: Ids) -> Tensor:
    """Return rows of the embedding table as they are stored, (N, E) float32 on the CPU."""
    return _table(backbone)[list(ids)].float().cpu()


@torch.no_grad()
def as_rows(backbone: Backbone, vectors: Tensor) -> Tensor:
    """Return slot vectors as rows of the table, (P, E): a model that scales its embeddings (Gemma) scales rows, and
    slot vectors stand behind the scale. An ExchangeError if the model does more to rows than to scale them.
    """
    ids = torch.arange(min(SCALE_ROWS, backbone.embedding_rows), device=backbone.device)
    rows, embedded = _table(backbone)[ids].float(), backbone.embed(ids[None])[0].float()  # (N, E)
    if rows.shape == embedded.shape:
        scale = float((rows * embedded).sum() / (rows * rows).sum())
        rounding = 1e-5 if backbone.dtype == torch.float32 else 2e-2
        apart = (embedded - rows * scale).abs().max()
        if scale and apart <= rounding * embedded.abs().max():
            return vectors if abs(scale - 1) < rounding else vectors / scale
    raise ExchangeError(
        f"'{backbone.name}' does more to the rows of its embedding table than to scale them, so no row gives a slot's "
        "vector; take --as embeds"
    )


def _table(backbone: Backbone) -> Tensor:
    weight = backbone.table_of(backbone.model).weight
    assert isinstance(weight, Tensor)
    return weight
