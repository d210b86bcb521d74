"""Try a model on a few tokens: does it read pads, later tokens, or embeddings in another way than token ids?"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ptuning.backbone.attention import HALF
from ptuning.backbone.forward import Memory, Seen
from ptuning.backbone.layers import LayerOffsets
from ptuning.backbone.number_format import format_of
from ptuning.backbone.tokenizer import TextTokenizer
from ptuning.errors import BackboneError
from ptuning.template.segments import Kind

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Tokens of one longer row. Not a multiple of 64 or less, the lengths into which some models cut rows (Reformer).
LONG_ROW = 67


class Probed(Protocol):
    """What is tried: a :class:`~ptuning.backbone.backbone.Backbone`, which asks these questions of itself."""

    name: str
    kind: Kind
    model: PreTrainedModel
    tokenizer: TextTokenizer
    vocabulary: int

    @property
    def device(self) -> torch.device: ...  # noqa: D102

    @property
    def dtype(self) -> torch.dtype: ...  # noqa: D102

    @property
    def embedding_rows(self) -> int: ...  # noqa: D102

    def table_of(self, part: PreTrainedModel) -> nn.Module: ...  # noqa: D102

    def embed(self, token_ids: Tensor) -> Tensor: ...  # noqa: D102

    def run(  # noqa: D102
        self,
        embeddings: Tensor,
        *,
        mask: Tensor,
        positions: Tensor,
        rows: Tensor,
        cols: Tensor,
        encoder_tokens: int = 0,
        memory: Memory | None = None,
        keep: bool = False,
        offsets: LayerOffsets | None = None,
        seen: Seen | None = None,
    ) -> tuple[Tensor, Memory | None]: ...


@torch.no_grad()
def check_reading(backbone: Probed) -> None:
    """Check that a model reads its input and nothing else.
    Raises BackboneError if it treats embeddings unlike token ids or takes only embeddings of tokens, if it reads pads,
    if a causal model sees later tokens, or if an encoder-decoder model has two embedding tables.
    """
    called = f"{backbone.name}: {type(backbone.model).__name__}"
    ids = probe_ids(backbone)[None]  # (1, 3)
    ones = torch.ones_like(ids)
    if backbone.kind == "encoder-decoder":
        decoder = backbone.table_of(backbone.model.get_decoder())
        if not same_logits(backbone, backbone.embed(ids).float(), decoder(ids).float()):
            raise BackboneError(
                f"{called} has an embedding table for its encoder and another for its decoder, and a prompt belongs to "
                "one table; use an encoder-decoder model that shares them, as T5 and BART do"
            )
    sides = ("", "decoder_") if backbone.kind == "encoder-decoder" else ("",)
    with running(f"{called} cannot read a row of {ids.shape[1]} tokens"):
        plain, embedded = (
            backbone.model(**{side + name: value for side in sides}, attention_mask=ones).logits[0].float()
            for name, value in (("input_ids", ids), ("inputs_embeds", backbone.embed(ids)))
        )
    if not same_logits(backbone, plain, embedded):
        raise BackboneError(
            f"{called} does something else with embeddings than with the tokens they belong to, so slots cannot be "
            "filled; use another language model"
        )
    between = (backbone.embed(ids) + backbone.embed(ids.roll(1, dims=1))) / 2  # (1, 3, E)
    with running(f"{called} cannot read embeddings that are not a token's"):
        backbone.model(**{f"{side}inputs_embeds": between.clone() for side in sides}, attention_mask=ones)
    with running(f"{called} cannot be asked for logits at some positions"):
        asked = _asked(backbone, ids)
    long = max(3, min(LONG_ROW, backbone.tokenizer.max_tokens - 1))
    with running(f"{called} cannot read a row of {long} tokens"):
        _asked(backbone, ids.repeat(1, long // 3 + 1)[:, :long])
    if backbone.kind != "permuted" and not same_logits(backbone, asked, plain[1:, : backbone.vocabulary]):
        raise BackboneError(
            f"{called} answers differently when asked for some positions only; use another language model"
        )
    if backbone.kind != "causal":
        if not same_logits(backbone, beside_pads(backbone, right=0), beside_pads(backbone, right=2)):
            raise BackboneError(
                f"{called} reads pads in spite of its attention_mask, so a row's answer would depend on the rows "
                "beside it; use another language model"
            )
        return
    cut_off = backbone.model(inputs_embeds=backbone.embed(ids[:, :2]), attention_mask=ones[:, :2])
    if not same_logits(backbone, embedded[:2], cut_off.logits[0].float()):
        if (stored := format_of(backbone.model.config)) is not None:
            raise BackboneError(
                f"{called} answers differently where later tokens stand behind: weights quantised to {stored} are "
                "multiplied in another way for each pass, and with this model that changes the answer; load it in "
                "another format (quantize=int8 or nf4, or none)"
            )
        raise BackboneError(
            f"{called} lets a position see later tokens, so it would be shown the target; use a causal "
            "language model, or a masked one with its masked language-model head"
        )


def _asked(backbone: Probed, ids: Tensor) -> Tensor:
    """Return the logits at the second and third position of a row, (2, V), computed as in training."""
    split = ids.shape[1] if backbone.kind == "encoder-decoder" else 0
    row = torch.cat([ids, ids], dim=1) if split else ids
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    logits, _ = backbone.run(
        backbone.embed(row),
        mask=torch.ones_like(row),
        positions=torch.cat([positions, positions], dim=1) if split else positions,
        rows=torch.zeros(2, dtype=torch.int64, device=ids.device),
        cols=torch.tensor([split + 1, split + 2], device=ids.device),
        encoder_tokens=split,
    )
    return logits


@contextlib.contextmanager
def running(what: str, *, do: str = "use another language model") -> Iterator[None]:
    """Turn any error of a model that is run into one that says what the model cannot do, and what to do."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BackboneError(f"{what}: {first} ({type(error).__name__}); {do}") from error


def beside_pads(backbone: Probed, *, left: int = 0, right: int = 0) -> Tensor:
    """Return the logits at the last token of a row (or the decoder's only token), (1, V), with pads beside the row."""
    return _at_the_end(backbone, left=left, right=right)[0]


def _at_the_end(
    backbone: Probed, *, left: int = 0, right: int = 0, with_gradients: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the logits as :func:`beside_pads` does, and the row's embeddings, (1, T, E), which they depend on."""
    ids = nn.functional.pad(probe_ids(backbone)[None], (left, right))  # (1, T)
    mask = nn.functional.pad(torch.ones(1, 3, dtype=torch.int64, device=backbone.device), (left, right))
    positions, encoder_tokens, at = (mask.cumsum(1) - 1).clamp(min=0), 0, left + 2
    if backbone.kind == "encoder-decoder":
        encoder_tokens = at = ids.shape[1]
        ids, mask = (torch.cat([value, value[:, left : left + 1]], dim=1) for value in (ids, mask))
        positions = nn.functional.pad(positions, (0, 1))
    embeddings = backbone.embed(ids)
    if with_gradients:
        embeddings = embeddings.detach().clone().requires_grad_(True)
    logits, _ = backbone.run(
        embeddings,
        mask=mask,
        positions=positions,
        rows=torch.zeros(1, dtype=torch.int64, device=backbone.device),
        cols=torch.tensor([at], device=backbone.device),
        encoder_tokens=encoder_tokens,
    )
    return logits, embeddings


@torch.inference_mode(mode=False)
@torch.enable_grad()
def check_gradients(backbone: Probed) -> None:
    """Check that what is scored at the end of a row has a gradient at its beginning, where slots would learn from it.

    It is not looked at where the logits are: past all layers, a gradient gets there even through weights of which none
    lets it pass. Raises BackboneError if there is none, if it is zero, or no number.
    Source: docs/scale.md (quantised weights whose products are rounded have a gradient that is zero everywhere).
    """
    called = f"{backbone.name}: {type(backbone.model).__name__}"
    do = "load it in another format (dtype, quantize), or take another backbone"
    with running(f"{called} cannot be trained through", do=do), evaluating(backbone.model):
        logits, embeddings = _at_the_end(backbone, with_gradients=True)
        (gradient,) = torch.autograd.grad(torch.logsumexp(logits, dim=-1).sum(), embeddings)
    first = gradient[0, 0].float()
    if not bool(first.isfinite().all()):
        raise BackboneError(
            f"{called} gives gradients that are no numbers (NaN or infinite), so slots cannot learn; {do}"
        )
    if not bool(first.any()):
        raise BackboneError(
            f"{called} gives the first token of a row no gradient, so slots would stay as they start; {do}"
        )


def follows_branches(backbone: Probed) -> bool:
    """Whether a row with two continuations of its first two tokens gives the logits of two rows with one each."""
    first, second, third = probe_ids(backbone).tolist()
    # Columns 2 and 3 are one continuation, column 4 is the other.
    row, positions, parents = [first, second, third, first, second], [0, 1, 2, 3, 2], [0, 0, 1, 2, 1]
    reads = torch.eye(len(row), dtype=torch.bool, device=backbone.device)  # (T, T)
    for column, parent in enumerate(parents):
        reads[column] |= reads[parent]
    try:
        both = _logits_of(backbone, row, positions, [3, 4], reads[None, None])
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError):
        return False
    alone = [_logits_of(backbone, one, list(range(len(one))), [len(one) - 1]) for one in (row[:4], [*row[:2], row[4]])]
    return same_logits(backbone, both, torch.cat(alone))


def _logits_of(
    backbone: Probed, ids: list[int], positions: list[int], cols: list[int], mask: Tensor | None = None
) -> Tensor:
    """Return the logits of one row at some columns, (N, V)."""
    row, at, asked = (torch.tensor(values, device=backbone.device) for values in (ids, positions, cols))
    logits, _ = backbone.run(
        backbone.embed(row[None]),
        mask=torch.ones_like(row[None]) if mask is None else mask,
        positions=at[None],
        rows=torch.zeros_like(asked),
        cols=asked,
    )
    return logits


def probe_ids(backbone: Probed) -> Tensor:
    """Return three token ids, (3,), without the model's own pad token."""
    padding = getattr(backbone.model.config.get_text_config(), "pad_token_id", None)
    usable = [token for token in range(min(6, backbone.embedding_rows)) if token != padding]
    return torch.tensor(usable[-3:], device=backbone.device)


def same_logits(backbone: Probed, one: Tensor, other: Tensor) -> bool:
    """Whether logits are equal up to rounding in the backbone's dtype."""
    tolerance = 2e-2 if backbone.dtype in HALF else 1e-4
    scale = max(1.0, float(one.abs().max()))
    return one.shape == other.shape and torch.allclose(one, other, rtol=tolerance, atol=tolerance * scale)


@torch.no_grad()
def turning_length(backbone: Probed, lengths: Iterable[int]) -> int | None:
    """Return the one of some lengths beyond which the model reads a row, and all rows beside it, with other positions
    (LongRoPE), if there is one. Found by running a row of three tokens, spread over a short row's positions, beside one
    with the last position of a long row, and beside one without. Raises BackboneError if long rows change each other.
    """
    called, longest = f"{backbone.name}: {type(backbone.model).__name__}", backbone.tokenizer.max_tokens
    for length in lengths if backbone.kind != "encoder-decoder" else ():
        if not 3 <= length < longest:
            continue
        with running(f"{called} cannot read a row of {length + 1} tokens"), evaluating(backbone.model):
            short, long = length - 1, length  # their last positions
            turns = not same_logits(backbone, _beside(backbone, short, 2), _beside(backbone, short, long))
            depends = not same_logits(backbone, _beside(backbone, long, long), _beside(backbone, long, longest - 1))
        if depends:
            raise BackboneError(
                f"{called} reads rows of more than {length} tokens by the longest row beside them, so an answer would "
                f"depend on its company; set max_position_embeddings in its config.json to {length}"
            )
        if turns:
            return length
    return None


def _beside(backbone: Probed, last: int, other: int) -> Tensor:
    """Return the logits of a row that ends at the position ``last``, (2, V), beside one that ends at ``other``."""
    ids = probe_ids(backbone).expand(2, 3)
    return backbone.run(
        backbone.embed(ids),
        mask=torch.ones_like(ids),
        positions=torch.tensor([[0, last // 2, last], [0, 1, other]], device=ids.device),
        rows=torch.zeros(2, dtype=torch.int64, device=ids.device),
        cols=torch.tensor([1, 2], device=ids.device),
    )[0]


class DeepShape(NamedTuple):
    """Number of layers of the side with the most, and the width of their inputs."""

    layers: int
    width: int


def deep_shape(backbone: Probed) -> DeepShape:
    """Return what deep slots need to know of the layers. Found by running two rows, and adding vectors to the inputs of
    one's layers at one column: the other row and (in a causal model) earlier columns must not change, and every layer's
    vector must change what comes behind. Raises a BackboneError with the reason otherwise.
    """
    called = f"{backbone.name}: {type(backbone.model).__name__}"
    ids = probe_ids(backbone).expand(2, 3)
    both = backbone.kind == "encoder-decoder"
    row = torch.cat([ids, ids], dim=1) if both else ids
    widths: dict[int, int] = {}

    def run(offsets: LayerOffsets | None = None, seen: Seen | None = None) -> Tensor:
        positions = torch.arange(3, device=row.device).expand(2, 3)
        logits, _ = backbone.run(
            backbone.embed(row),
            mask=torch.ones_like(row),
            positions=torch.cat([positions, positions], dim=1) if both else positions,
            rows=torch.arange(2, device=row.device).repeat_interleave(3),
            cols=torch.arange(row.shape[1] - 3, row.shape[1], device=row.device).repeat(2),
            encoder_tokens=3 if both else 0,
            offsets=offsets,
            seen=seen,
        )
        return logits.view(2, 3, -1)

    def wide(layer: int, hidden: Tensor) -> None:
        widths[layer] = hidden.shape[2]

    cannot = f"{called} does not take deep slots (vectors of its layers)"
    with running(cannot, do="write [P] for slots of the input"), evaluating(backbone.model):
        plain = run(seen=wide)
        if not widths or len(set(widths.values())) > 1:
            raise ValueError(f"its layers are {sorted(set(widths.values())) or 'not a list'} wide")
        width, layers = widths[0], len(widths)
        at = torch.zeros(1, dtype=torch.int64, device=row.device)
        for column in (1, 4) if both else (1,):
            for layer in range(1, layers):
                values = torch.zeros(1, layers - 1, width, device=row.device)
                values[:, layer - 1] = torch.linspace(-1, 1, width, device=row.device) * 3
                moved = run(LayerOffsets(at, at + column, values))
                is_stray = not same_logits(backbone, moved[1], plain[1])
                is_early = backbone.kind == "causal" and not same_logits(backbone, moved[0, :1], plain[0, :1])
                if is_stray or is_early:
                    raise ValueError("what is added in one column of a row changes other rows or earlier columns")
                if torch.equal(moved[0], plain[0]):
                    raise ValueError(f"what is added to the input of layer {layer + 1} changes nothing")
    return DeepShape(layers, width)


class BlockShape(NamedTuple):
    """Number of layers, of their heads' keys and values, and the width of these."""

    layers: int
    heads: int
    width: int

    def __str__(self) -> str:
        return f"{self.layers} layers with {self.heads} heads of {self.width} numbers"


def block_shape(backbone: Probed) -> BlockShape | None:
    """Return the shape of keys and values in front of a row; None unless its last token, behind those of the first two
    and beside a hidden one, gives the logits of the whole row.
    """
    ids = probe_ids(backbone)
    whole = _logits_of(backbone, ids.tolist(), [0, 1, 2], [2])
    start, places = ids[None, :2], torch.arange(2, device=ids.device)[None]
    try:
        _, memory = backbone.run(
            backbone.embed(start),
            mask=torch.ones_like(start),
            positions=places,
            rows=places[0, :1],
            cols=places[0, :1],
            keep=True,
        )
        if memory is None or len({keys.shape for keys, _ in memory.layers} | {v.shape for _, v in memory.layers}) > 1:
            return None
        hidden = [tuple(nn.functional.pad(one, (0, 0, 1, 0), value=1.0) for one in pair) for pair in memory.layers]
        zero = torch.zeros(1, dtype=torch.int64, device=ids.device)
        behind, _ = backbone.run(
            backbone.embed(ids[None, 2:]),
            mask=torch.tensor([[0, 1, 1, 1]], device=ids.device),
            positions=zero[None] + 2,
            rows=zero,
            cols=zero,
            memory=Memory.of(hidden),  # type: ignore[arg-type]  # pairs
        )
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError):
        return None
    _, heads, _, width = memory.layers[0][0].shape
    return BlockShape(len(memory.layers), heads, width) if same_logits(backbone, behind, whole) else None


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode for a block; afterwards each of its modules is in the mode that it was in."""
    modules = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in modules:
            module.training = True
