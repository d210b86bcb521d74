"""Trials of a model on a few tokens: whether it reads pads or later tokens, passes gradients, and what its layers and
KV cache are.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ptuning.backbone.attention import HALF
from ptuning.backbone.forward import LanguageModel, Memory
from ptuning.backbone.layers import LayerOffsets
from ptuning.backbone.number_format import format_of
from ptuning.errors import BackboneError

# Tokens of one longer row. Not a multiple of 64 or less, the lengths into which some models cut rows (Reformer).
LONG_ROW = 67
MODEL_ERRORS = (RuntimeError, ValueError, TypeError, AttributeError, LookupError)


@torch.no_grad()
def check_reading(model: LanguageModel) -> None:
    """Check that a model reads its input and nothing else.
    Raises BackboneError if it treats embeddings unlike token ids or takes only embeddings of tokens, if it reads pads,
    if a causal model sees later tokens, or if an encoder-decoder model has two embedding tables.
    """
    called, is_two_sided = _called(model), model.kind == "encoder-decoder"
    ids = probe_ids(model)[None]  # (1, 3)
    ones = torch.ones_like(ids)
    if is_two_sided:
        decoder = model.table_of(model.model.get_decoder())
        if not same_logits(model, model.embed(ids).float(), decoder(ids).float()):
            raise BackboneError(
                f"{called} has an embedding table for its encoder and another for its decoder, and a prompt belongs to "
                "one table; use an encoder-decoder model that shares them, as T5 and BART do"
            )
    sides = ("", "decoder_") if is_two_sided else ("",)
    with running(f"{called} cannot read a row of {ids.shape[1]} tokens"):
        plain, embedded = (
            model.model(**{side + name: value for side in sides}, attention_mask=ones).logits[0].float()
            for name, value in (("input_ids", ids), ("inputs_embeds", model.embed(ids)))
        )
    if not same_logits(model, plain, embedded):
        raise BackboneError(
            f"{called} treats embeddings unlike the tokens they belong to, so slots cannot be filled; use another "
            "language model"
        )
    between = (model.embed(ids) + model.embed(ids.roll(1, dims=1))) / 2  # (1, 3, E)
    with running(f"{called} cannot read embeddings that are not a token's"):
        model.model(**{f"{side}inputs_embeds": between.clone() for side in sides}, attention_mask=ones)
    with running(f"{called} cannot be asked for logits at some positions"):
        some = _logits(model, ids, (1, 2))
    long = max(3, min(LONG_ROW, model.tokenizer.max_tokens - 1))
    with running(f"{called} cannot read a row of {long} tokens"):
        _logits(model, ids.repeat(1, long // 3 + 1)[:, :long], (1, 2))
    if model.kind != "permuted" and not same_logits(model, some, plain[1:, : model.vocabulary]):
        raise BackboneError(
            f"{called} answers differently when asked for some positions only; use another language model"
        )
    if model.kind != "causal":
        if not same_logits(model, logits_with_pads(model, right=0), logits_with_pads(model, right=2)):
            raise BackboneError(
                f"{called} reads pads in spite of its attention_mask, so a row's answer would depend on the other rows "
                "of its batch; use another language model"
            )
        return
    cut_off = model.model(inputs_embeds=model.embed(ids[:, :2]), attention_mask=ones[:, :2])
    if not same_logits(model, embedded[:2], cut_off.logits[0].float()):
        if (stored := format_of(model.model.config)) is not None:
            raise BackboneError(
                f"{called} answers differently if later tokens follow: weights quantised to {stored} are multiplied in "
                "another way for each pass, and with this model that changes the answer; load it in another format "
                "(quantize=int8 or nf4, or none)"
            )
        raise BackboneError(
            f"{called} lets a position see later tokens, so it would be shown the target; use a causal "
            "language model, or a masked one with its masked language-model head"
        )


def _called(model: LanguageModel) -> str:
    return f"{model.name}: {type(model.model).__name__}"


def _logits(
    model: LanguageModel,
    ids: Tensor,
    cols: Sequence[int],
    *,
    positions: Sequence[Sequence[int]] | None = None,
    **more: Any,
) -> Tensor:
    """Return the logits of (B, T) rows at some columns, (B * N, V). An encoder-decoder model reads the rows on both
    sides, and is asked on the decoder's.
    """
    batch, width = ids.shape
    if positions is None:
        places = torch.arange(width, device=ids.device).expand(batch, width)
    else:
        places = torch.tensor(positions, device=ids.device)
    at = torch.tensor(cols, device=ids.device)
    if model.kind == "encoder-decoder":
        ids, places, at = torch.cat([ids, ids], dim=1), torch.cat([places, places], dim=1), at + width
        more["encoder_tokens"] = width
    more.setdefault("mask", torch.ones_like(ids))
    rows = torch.arange(batch, device=ids.device).repeat_interleave(len(at))
    return model.run(model.embed(ids), positions=places, rows=rows, cols=at.repeat(batch), **more)[0]


@contextlib.contextmanager
def running(what: str, *, do: str = "use another language model") -> Iterator[None]:
    """Turn any error of a model that is run into one that says what the model cannot do, and what to do."""
    try:
        yield
    except MODEL_ERRORS as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BackboneError(f"{what}: {first} ({type(error).__name__}); {do}") from error


def logits_with_pads(model: LanguageModel, *, left: int = 0, right: int = 0) -> Tensor:
    """Return the logits at the last token of a row (or the decoder's only token), (1, V), with pads around the row."""
    return _padded(model, left=left, right=right)[0]


def _padded(
    model: LanguageModel, *, left: int = 0, right: int = 0, with_gradients: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the logits of :func:`logits_with_pads`, and the row's embeddings, (1, T, E), which they depend on."""
    ids = nn.functional.pad(probe_ids(model)[None], (left, right))  # (1, T)
    mask = nn.functional.pad(torch.ones(1, 3, dtype=torch.int64, device=model.device), (left, right))
    positions, encoder_tokens, at = (mask.cumsum(1) - 1).clamp(min=0), 0, left + 2
    if model.kind == "encoder-decoder":
        encoder_tokens = at = ids.shape[1]
        ids, mask = (torch.cat([value, value[:, left : left + 1]], dim=1) for value in (ids, mask))
        positions = nn.functional.pad(positions, (0, 1))
    embeddings = model.embed(ids)
    if with_gradients:
        embeddings = embeddings.detach().clone().requires_grad_(True)
    zero = torch.zeros(1, dtype=torch.int64, device=model.device)
    logits, _ = model.run(
        embeddings, mask=mask, positions=positions, rows=zero, cols=zero + at, encoder_tokens=encoder_tokens
    )
    return logits, embeddings


@torch.inference_mode(mode=False)
@torch.enable_grad()
def check_gradients(model: LanguageModel) -> None:
    """Check that the score at the end of a row has a gradient at its beginning, where slots would learn from it.

    It is not looked at where the logits are: past all layers, a gradient gets there even through weights of which none
    lets it pass. Raises BackboneError if there is none, if it is zero, or no number.
    Source: docs/scale.md (quantised weights whose products are rounded have a gradient that is zero everywhere).
    """
    called, do = _called(model), "load it in another format (dtype, quantize), or take another backbone"
    with running(f"{called} cannot be trained through", do=do), evaluating(model.model):
        logits, embeddings = _padded(model, with_gradients=True)
        (gradient,) = torch.autograd.grad(torch.logsumexp(logits, dim=-1).sum(), embeddings)
    first = gradient[0, 0].float()
    if not bool(first.isfinite().all()):
        raise BackboneError(f"{called} gives gradients that are NaN or infinite, so slots cannot learn; {do}")
    if not bool(first.any()):
        raise BackboneError(
            f"{called} gives the first token of a row no gradient, so slots would stay as they start; {do}"
        )


def shares_prefix(model: LanguageModel) -> bool:
    """Whether the KV cache holds all keys and values and nothing else: no window, no recurrent state."""
    import transformers

    zero = torch.zeros(1, dtype=torch.int64, device=model.device)
    start = zero[None]  # (1, 1)
    _, memory = model.run(
        model.embed(start), mask=torch.ones_like(start), positions=start, rows=zero, cols=zero, keep=True
    )
    if memory is None or type(memory.cache) is not transformers.DynamicCache:
        return False
    return all(
        type(layer) is transformers.DynamicLayer and layer.get_seq_length() == 1 for layer in memory.cache.layers
    )


def follows_branches(model: LanguageModel) -> bool:
    """Whether a row with two continuations of its first two tokens gives the logits of two rows with one each."""
    ids = probe_ids(model)
    # Columns 2 and 3 are one continuation, column 4 is the other.
    row, positions, parents = ids[[0, 1, 2, 0, 1]], [0, 1, 2, 3, 2], [0, 0, 1, 2, 1]
    reads = torch.eye(len(row), dtype=torch.bool, device=model.device)  # (T, T)
    for column, parent in enumerate(parents):
        reads[column] |= reads[parent]
    try:
        both = _logits(model, row[None], [3, 4], positions=[positions], mask=reads[None, None])
    except MODEL_ERRORS:
        return False
    alone = [_logits(model, row[None, :4], [3]), _logits(model, row[None, [0, 1, 4]], [2])]
    return same_logits(model, both, torch.cat(alone))


def probe_ids(model: LanguageModel) -> Tensor:
    """Return three token ids, (3,), without the model's own pad token."""
    padding = getattr(model.model.config.get_text_config(), "pad_token_id", None)
    usable = [token for token in range(min(6, model.embedding_rows)) if token != padding]
    return torch.tensor(usable[-3:], device=model.device)


def same_logits(model: LanguageModel, logits: Tensor, wanted: Tensor) -> bool:
    """Whether logits are equal up to rounding in the model's dtype."""
    tolerance = 2e-2 if model.dtype in HALF else 1e-4
    scale = max(1.0, float(logits.abs().max()))
    return logits.shape == wanted.shape and torch.allclose(logits, wanted, rtol=tolerance, atol=tolerance * scale)


@torch.no_grad()
def turning_length(model: LanguageModel, lengths: Iterable[int]) -> int | None:
    """Return the one of some lengths beyond which the model reads a row, and all rows of its batch, with other
    positions (LongRoPE), if there is one. Found by running a row of three tokens, spread over a short row's positions,
    next to one with the last position of a long row, and next to one without. Raises BackboneError if long rows change
    each other.
    """
    called, longest = _called(model), model.tokenizer.max_tokens
    for length in lengths if model.kind != "encoder-decoder" else ():
        if not 3 <= length < longest:
            continue
        with running(f"{called} cannot read a row of {length + 1} tokens"), evaluating(model.model):
            short, long = length - 1, length  # their last positions
            turns = not same_logits(model, _beside(model, short, 2), _beside(model, short, long))
            depends = not same_logits(model, _beside(model, long, long), _beside(model, long, longest - 1))
        if depends:
            raise BackboneError(
                f"{called} reads rows of more than {length} tokens by the longest row of a batch, so an answer would "
                f"depend on other rows; set max_position_embeddings in its config.json to {length}"
            )
        if turns:
            return length
    return None


def _beside(model: LanguageModel, last: int, other: int) -> Tensor:
    """Return the logits of a row that ends at the position ``last``, (2, V), next to one that ends at ``other``."""
    ids = probe_ids(model).expand(2, 3)
    return _logits(model, ids, (1, 2), positions=[[0, last // 2, last], [0, 1, other]])[:2]


class DeepShape(NamedTuple):
    """Number of layers of the side with the most, and the width of their inputs."""

    layers: int
    width: int


def deep_shape(model: LanguageModel) -> DeepShape:
    """Return the shape of the layers for deep slots. Found by running two rows, and adding vectors to the inputs of
    one's layers at one column: the other row and (in a causal model) earlier columns must not change, and every layer's
    vector must change what follows. Raises a BackboneError with the reason otherwise.
    """
    ids = probe_ids(model).expand(2, 3)
    widths: dict[int, int] = {}

    def run(**more: Any) -> Tensor:
        return _logits(model, ids, (0, 1, 2), **more).view(2, 3, -1)

    cannot = f"{_called(model)} does not take deep slots (vectors of its layers)"
    with running(cannot, do="write [P] for slots of the input"), evaluating(model.model):
        plain = run(seen=lambda layer, hidden: widths.update({layer: hidden.shape[2]}))
        if not widths or len(set(widths.values())) > 1:
            raise ValueError(f"its layers are {sorted(set(widths.values())) or 'not a list'} wide")
        width, layers = widths[0], len(widths)
        at = torch.zeros(1, dtype=torch.int64, device=ids.device)
        for column in (1, 4) if model.kind == "encoder-decoder" else (1,):
            for layer in range(1, layers):
                values = torch.zeros(1, layers - 1, width, device=ids.device)
                values[:, layer - 1] = torch.linspace(-1, 1, width, device=ids.device) * 3
                moved = run(offsets=LayerOffsets(at, at + column, values))
                is_stray = not same_logits(model, moved[1], plain[1])
                is_early = model.kind == "causal" and not same_logits(model, moved[0, :1], plain[0, :1])
                if is_stray or is_early:
                    raise ValueError("a vector that is added in one column of a row changes other rows or columns")
                if torch.equal(moved[0], plain[0]):
                    raise ValueError(f"a vector that is added to the input of layer {layer + 1} changes nothing")
    return DeepShape(layers, width)


class BlockShape(NamedTuple):
    """Number of layers, of their heads' keys and values, and the width of these."""

    layers: int
    heads: int
    width: int

    def __str__(self) -> str:
        return f"{self.layers} layers with {self.heads} heads of {self.width} numbers"


def block_shape(model: LanguageModel) -> BlockShape | None:
    """Return the shape of keys and values before a row; None unless its last token, after those of the first two and a
    hidden one, gives the logits of the whole row.
    """
    ids = probe_ids(model)[None]  # (1, 3)
    whole = _logits(model, ids, [2])
    places = torch.arange(2, device=ids.device)[None]
    try:
        memory = model.remember(model.embed(ids[:, :2]), mask=torch.ones_like(places), positions=places)
        if len({part.shape for pair in memory.layers for part in pair}) > 1:
            return None
        hidden = [
            (nn.functional.pad(keys, (0, 0, 1, 0), value=1.0), nn.functional.pad(values, (0, 0, 1, 0), value=1.0))
            for keys, values in memory.layers
        ]
        mask = torch.tensor([[0, 1, 1, 1]], device=ids.device)
        last = _logits(model, ids[:, 2:], [0], positions=[[2]], mask=mask, memory=Memory.of(hidden))
    except MODEL_ERRORS:
        return None
    _, heads, _, width = memory.layers[0][0].shape
    return BlockShape(len(memory.layers), heads, width) if same_logits(model, last, whole) else None


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
