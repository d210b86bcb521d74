"""Result of writing an export format, and what formats share: tokens for slots, rows of the embedding table, reading
back.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.tokenizer import UNUSED
from ptuning.errors import ExchangeError
from ptuning.exchange.verify import ExportSource, Reader
from ptuning.template.encode import Example
from ptuning.template.segments import Ids

SCALE_ROWS = 256  # rows of the table that show its scale
# How an example is sent to a server that takes ids as a prompt.
SEND_IDS = r"""```
ids=$(python -c 'import json; print(json.load(open("THIS_FOLDER/export.json"))["example"]["input_ids"])')
curl http://localhost:8000/v1/completions -H 'Content-Type: application/json' \
  -d '{"model": "my-prompt", "prompt": '"$ids"', "max_tokens": 8, "temperature": 0}'
```
"""


@dataclass(frozen=True)
class SlotTokens:
    """Tokens in the places of slots, by id and text; the text of a row of the table without a token is None."""

    ids: Ids = ()
    texts: tuple[str | None, ...] = ()

    @property
    def names(self) -> tuple[str, ...] | None:
        """The texts, if every token has one."""
        names = tuple(text for text in self.texts if text is not None)
        return names if len(names) == len(self.texts) else None


@dataclass(frozen=True, eq=False)
class ExportResult:
    """Files written into a folder, and how another program reads them.

    Args:
        load: Loads the files with the other program's code.
        input_ids: Returns the ids of a row, target included, that the other program is given.
        usage: Markdown about the use in the other program.
        tokens: Tokens in the places of the slots, if any.
        text: Their texts, if the template written as text has the ids of the rows.
        why_no_text: The reason, if it has not.
        max_difference: Largest difference per token that is rounding, if it is not that of the number format.
    """

    load: Callable[[], Reader]
    input_ids: Callable[[Example], Sequence[int]]
    usage: str
    tokens: SlotTokens = SlotTokens()
    text: Sequence[str] | None = None
    why_no_text: str | None = None
    max_difference: float | None = None


@contextlib.contextmanager
def quiet_peft() -> Iterator[None]:
    """Hide PEFT's warnings about adapters on tied embeddings: only the input side is adapted, which is intended."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def reader_of(model: Any, input_ids: Callable[[Example], Sequence[int]], device: torch.device) -> Reader:
    """Return what runs rows as token ids in a model."""

    @torch.no_grad()
    def read(example: Example) -> Tensor:
        row = torch.tensor([list(input_ids(example))], device=device)
        with quiet_peft():
            logits: Tensor = model(input_ids=row, attention_mask=torch.ones_like(row)).logits[0]  # (T, V)
        return logits[list(example.logit_positions)]

    return read


def reserved_tokens(source: ExportSource) -> SlotTokens | None:
    """Return a reserved token of the tokenizer for each slot; None if there are too few."""
    reserved = _reserved(source)
    chosen = tuple(reserved)[: len(source.vectors)]
    return SlotTokens(chosen, tuple(map(reserved.get, chosen))) if len(chosen) == len(source.vectors) else None


def unused_rows(source: ExportSource) -> SlotTokens:
    """Return a row of the table for each slot that no text uses: tokens that are called unused or reserved, then rows
    without a token (tables are padded to round sizes), then other reserved tokens. Raises ExchangeError if these are
    too few.
    """
    backbone, reserved = source.backbone, _reserved(source)
    unused = [index for index, text in reserved.items() if UNUSED.search(text)]
    beyond = range(backbone.vocabulary, backbone.embedding_rows)
    chosen = tuple(dict.fromkeys([*unused, *beyond, *reserved]))
    if len(chosen) < len(source.vectors):
        raise ExchangeError(
            f"the prompt has {len(source.vectors)} slots, and the embedding table of '{backbone.name}' has "
            f"{len(chosen)} rows that no text uses; take the format tokens, which adds tokens, or embeds, which needs "
            "none"
        )
    chosen = chosen[: len(source.vectors)]
    return SlotTokens(chosen, tuple(map(reserved.get, chosen)))


def _reserved(source: ExportSource) -> dict[int, str]:
    """Return the reserved tokens that are in no row that the export is compared on."""
    used: set[int] = set()
    for row in source.rows:
        slots = set(row.example.slot_positions)
        used |= {token for at, token in enumerate(row.example.token_ids) if at not in slots}
        used |= set(row.example.target_ids)
    return {index: text for index, text in source.backbone.tokenizer.reserved_ids.items() if index not in used}


@torch.no_grad()
def stored_rows(backbone: Backbone, ids: Sequence[int]) -> Tensor:
    """Return rows of the embedding table as they are stored, (N, E) float32 on the CPU."""
    weight: Tensor = backbone.table_of(backbone.model).weight  # type: ignore[assignment]
    return weight[list(ids)].float().cpu()


@torch.no_grad()
def as_rows(backbone: Backbone, vectors: Tensor) -> Tensor:
    """Return slot vectors as rows of the table, (P, E). A model that scales its embeddings (Gemma) scales rows, while
    slot vectors are scaled already. Raises ExchangeError if the model does more to rows than scaling.
    """
    ids = torch.arange(min(SCALE_ROWS, backbone.embedding_rows))
    rows, embedded = stored_rows(backbone, ids.tolist()), backbone.vectors_of(ids).float().cpu()  # (N, E)
    if rows.shape == embedded.shape:
        scale = float((rows * embedded).sum() / (rows * rows).sum())
        if scale and is_close(rows * scale, embedded, backbone.dtype):
            return vectors if abs(scale - 1) < rounding_of(backbone.dtype) else vectors / scale
    raise ExchangeError(
        f"'{backbone.name}' does more to the rows of its embedding table than scaling, so no row gives a slot's "
        "vector; take the format embeds"
    )


def rounding_of(dtype: torch.dtype) -> float:
    """Return the relative rounding of a number format."""
    return 1e-5 if dtype == torch.float32 else 2e-2


def is_close(values: Tensor, wanted: Tensor, dtype: torch.dtype) -> bool:
    """Whether values are equal up to rounding in a number format."""
    return bool((values - wanted).abs().max() <= rounding_of(dtype) * wanted.abs().max())
