"""The language model: freeze, copy, embed, run."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from ptuning.backbone.forward import HEAD, Forward, Memory, Seen
from ptuning.backbone.layers import LayerOffsets, listen
from ptuning.backbone.number_format import format_of, keep_in_place, short_name
from ptuning.backbone.probes import (
    BlockShape,
    DeepShape,
    beside_pads,
    block_shape,
    check_gradients,
    check_reading,
    deep_shape,
    follows_branches,
    same_logits,
    turning_length,
)
from ptuning.backbone.randomness import own_draws
from ptuning.backbone.sources import LoadOptions
from ptuning.backbone.tokenizer import (
    TextTokenizer,
    decoder_start,
    kind_of,
    longest_row,
    original_lengths,
    text_ends,
)
from ptuning.backbone.weights import (
    Shards,
    devices_of,
    fingerprint,
    is_offloaded,
    is_packed,
    is_wrapped,
    number_of_weights,
    run_on,
    sharing,
)
from ptuning.errors import BackboneError
from ptuning.files import Json
from ptuning.template.segments import Kind

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Held by a pass of a model that turns to other positions: they are one tensor for all threads that run it.
_turning = threading.RLock()


class TableStatistics(NamedTuple):
    """Mean and standard deviation of the embeddings of all tokens, (E,) float32 on the CPU, and their mean norm."""

    mean: Tensor
    std: Tensor
    norm: float


class Backbone:
    """A language model with a copy of its tokenizer. ``name`` is its known name, folder or hub id.
    Raises BackboneError if the model is not a language model, or does not take embeddings as input.
    """

    trained: object | None = None  # the trained weights that were put into it, if any
    dtype_reason: str | None = None  # why the weights have their number format, where it was chosen on loading
    asked: LoadOptions | None = None  # how it was asked for, where it was loaded
    max_length: int | None = None  # most tokens of a row, where fewer were asked for than the model reads
    # The length beyond which the model reads a row, and all rows beside it, with other positions (LongRoPE), if any.
    turn: int | None = None

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        revision: str | None = None,
        is_tokenizer_shared: bool = True,
    ) -> None:
        self.model = model
        self.name = name
        self.revision = revision
        keep_in_place(model)
        self.kind: Kind = kind_of(model.config, has_mask=tokenizer.mask_token_id is not None)
        self.shards = Shards.of(model)
        self._forward = Forward(model, kind=self.kind, name=name)
        generation = getattr(model, "generation_config", None)
        self.tokenizer = TextTokenizer(
            tokenizer,
            max_tokens=longest_row(model.config) - self._forward.first_position,
            rows=self.embedding_rows,
            decoder_ids=decoder_start(model.config, generation),
            end_ids=text_ends(model.config, generation),
            is_shared=is_tokenizer_shared,
        )
        self.width = int(self.embed(torch.zeros(1, 1, dtype=torch.int64, device=self.device)).shape[-1])
        # Either can be larger: tables are padded to round sizes, and tokenizers get tokens that were never embedded.
        self.vocabulary = min(max(tokenizer.get_vocab().values()) + 1, self.embedding_rows)
        self.turn = turning_length(self, original_lengths(model.config))

    @classmethod
    def from_model(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str | None = None
    ) -> Backbone:
        """Make a frozen backbone of a model in memory. It has modules of its own over the same weights, so the model
        stays as it is (mode, gradients, hooks), and its owner may go on using it. If its owner goes on training it,
        the backbone changes along; make a new one then.

        Args:
            model: A language model of transformers, on any device and in any dtype.
            tokenizer: Its tokenizer; the backbone works on a copy.
            name: What prompts call the backbone; by default where the model was loaded from.

        Raises:
            BackboneError: If the model cannot be used; the message says why.
        """
        for given, wanted in ((model, "PreTrainedModel"), (tokenizer, "PreTrainedTokenizerBase")):
            if wanted not in {one.__name__ for one in type(given).__mro__}:
                raise BackboneError(
                    f"a backbone is made of a transformers model and its tokenizer, and {type(given).__name__} is no "
                    f"{wanted}; unwrap it (an adapter's merge_and_unload, a compiled or parallel model's module), or "
                    "load a name with load_backbone"
                )
        origin = str(getattr(model.config, "name_or_path", None) or "")
        from_hub = name is None and origin and not Path(origin).exists()
        backbone = cls(
            sharing(model),
            tokenizer,
            name=name or origin or f"a {type(model).__name__} in memory",
            revision=getattr(model.config, "_commit_hash", None) if from_hub else None,
        )
        backbone.freeze()
        check_reading(backbone)
        return backbone

    @property
    def device(self) -> torch.device:
        """Device on which embeddings are looked up."""
        return run_on(self._embedding) or self._table_weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return self.model.dtype

    @property
    def parameters(self) -> int:
        """Number of weights; tied weights count once."""
        return number_of_weights(self.model)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hashes of the embedding table and of samples of every weight; see :mod:`ptuning.backbone.weights`."""
        _ = self._table_weight  # says so, if there is none
        return fingerprint(self.model, self._embedding, name=self.name)

    @property
    def _embedding(self) -> nn.Module:
        return self.table_of(self.model.get_encoder() if self.kind == "encoder-decoder" else self.model)

    def table_of(self, part: PreTrainedModel) -> nn.Module:
        """Return the embedding table of the model, or of its encoder or decoder if that has its own."""
        source = part if hasattr(part, "get_input_embeddings") else self.model
        return source.get_input_embeddings()

    @property
    def _table_weight(self) -> Tensor:
        weight = self._embedding.weight
        if not isinstance(weight, Tensor):
            raise BackboneError(f"{self.name}: the input embeddings of {type(self.model).__name__} have no weight")
        if is_wrapped(weight):
            raise BackboneError(
                f"{self.name}: its embedding table is quantised, and slots are vectors in that table; quantise the "
                "model without its input embeddings"
            )
        return weight

    @property
    def embedding_rows(self) -> int:
        """Number of token ids that the model can embed."""
        return len(self._table_weight)

    @property
    def loaded(self) -> dict[str, str]:
        """What it was loaded with: ``dtype``, ``attn_implementation``, and ``quantization`` and ``max_length`` if there
        are any.
        """
        config = self.model.config
        found = {"dtype": short_name(self.dtype)}
        if isinstance(attention := getattr(config, "_attn_implementation", None), str):
            found["attn_implementation"] = attention
        if (quantization := format_of(config)) is not None:
            found["quantization"] = quantization
        if self.max_length is not None:
            found["max_length"] = str(self.max_length)
        return found

    def to_json(self) -> dict[str, Json]:
        """Return what identifies the backbone, for the record of a run."""
        return {
            "name": self.name,
            "revision": self.revision,
            "fingerprint": self.fingerprint,
            "kind": self.kind,
            "parameters": self.parameters,
            **self.loaded,
            "dtype_reason": self.dtype_reason,
            **({"shards": spread} if (spread := self.spread) is not None else {}),
        }

    @property
    def spread(self) -> dict[str, Json] | None:
        """Where weights are that do not lie in one place, and what is done without for that; None if they do."""
        devices, offloaded = devices_of(self.model), is_offloaded(self.model)
        if self.shards is None and len(devices) == 1 and not offloaded:
            return None
        found: dict[str, Json] = {"how": "map", "devices": ", ".join(sorted(map(str, devices))), "offloaded": offloaded}
        if self.shards is not None:
            found = {"how": self.shards.how, "processes": self.shards.processes}
        return {**found, "shares_prefix": self.shares_prefix, "keeps_prefixes": self.keeps_prefixes}

    def freeze(self) -> None:
        """Put the model into evaluation mode, and turn off gradients for all weights."""
        self.model.eval()
        self.model.requires_grad_(False)

    def check_evaluates(self) -> None:
        """Raise a BackboneError if the model is in training mode, where its dropout changes every answer."""
        if any(module.training for module in self.model.modules()):
            raise BackboneError(
                f"the model of '{self.name}' is in training mode, so its dropout would give another answer each time; "
                "call the backbone's freeze(), or the model's eval(), first"
            )

    @functools.cached_property
    def passes_gradients(self) -> bool:
        """Whether slots can learn through the model: always, or a BackboneError says why not. Found by running a row
        forward and backward.
        """
        with own_draws(self.device):
            check_gradients(self)
        return True

    def thaw(self, weights: Iterable[nn.Parameter]) -> None:
        """Put the model into training mode (its own dropout is on), and turn on gradients for some weights."""
        self.model.train()
        for weight in weights:
            weight.requires_grad_(True)

    def copy(self, *, share: bool = False) -> Backbone:
        """Return a frozen copy to train: with own float32 weights, or (``share``) the same tensors in new modules.
        Raises BackboneError if weights are offloaded or spread, or would have to be own ones and are quantised.
        """
        if self.shards is not None:
            raise BackboneError(
                f"{self.name}: its weights are spread over {self.shards.processes} processes, and only a prompt's "
                "slots can be trained beside such weights; leave out what needs a copy of the backbone (tuned, lora, a "
                "classification head, random weights), or load it without shard"
            )
        if is_offloaded(self.model):
            raise BackboneError(
                f"{self.name}: some of its weights are offloaded, and only a prompt's slots can be trained beside such "
                "weights; leave out what needs a copy of the backbone (tuned, lora, a classification head, random "
                "weights), or load it into memory"
            )
        if not share and is_packed(self.model):
            raise BackboneError(
                f"{self.name}: its weights are quantised ({self.loaded['quantization']}), so they cannot be trained or "
                "drawn anew; leave out what needs a copy of the backbone (tuned, a classification head, random "
                "weights), or load it without quantize, or from a folder that is not quantised"
            )
        other = copy.copy(self)
        for name in ("fingerprint", "trained", "table_statistics"):
            other.__dict__.pop(name, None)
        other.model = sharing(self.model) if share else copy.deepcopy(self.model).float()
        other.freeze()
        return other

    @property
    @torch.no_grad()
    def hidden_width(self) -> int:
        """Width of the hidden states that a classification head reads. Found by running three tokens."""
        other = self.copy(share=True)
        other.put_head(nn.Identity())
        return beside_pads(other).shape[-1]

    @property
    def head(self) -> nn.Module:
        """The classification head that was put in place of the language-model head."""
        return self.model.get_submodule(HEAD)

    def put_head(self, head: nn.Module) -> None:
        """Replace the language-model head: ``head`` turns (N, H) hidden states into (N, K) logits."""
        self.model.add_module(HEAD, head)

    def with_random_weights(self, *, seed: int) -> Backbone:
        """Return a frozen copy with random weights (Zhong et al. 2021, section 3: random controls)."""
        other = self.copy()
        with own_draws(seed=seed), quiet():
            fresh = type(self.model)(self.model.config)
        other.model.load_state_dict(fresh.state_dict())
        nn.Module.to(other.model, self.dtype)  # a model on several devices has another ``to``
        other.name = f"{self.name} with random weights (seed {seed})"
        return other

    def side(self, length: int) -> bool:
        """Whether a row of this many tokens is read with the positions of long rows. Only rows of one side may share a
        pass, and keys and values serve no row of the other side.
        """
        return self.turn is not None and length > self.turn

    @functools.cached_property
    @torch.no_grad()
    def shares_prefix(self) -> bool:
        """Whether rows can continue from a KV cache that they share. Found by running one token.
        The cache of a causal model must hold all keys and values and nothing else: no window, no recurrent state; and
        on one device, since rows' keys and values are put together.
        """
        import transformers

        if self.kind != "causal" or len(devices_of(self.model)) > 1:
            return False
        at = torch.zeros(1, dtype=torch.int64, device=self.device)
        start = at[None]  # (1, 1)
        _, memory = self.run(
            self.embed(start), mask=torch.ones_like(start), positions=start, rows=at, cols=at, keep=True
        )
        if memory is None or type(memory.cache) is not transformers.DynamicCache:
            return False
        return all(
            type(layer) is transformers.DynamicLayer and layer.get_seq_length() == 1 for layer in memory.cache.layers
        )

    @property
    def keeps_prefixes(self) -> bool:
        """Whether keys and values of text in front of slots can be kept. How many there is room for differs between the
        processes over which a model is spread, which must all run the same passes.
        """
        return self.shards is None and self.shares_prefix

    @functools.cached_property
    @torch.no_grad()
    def branches(self) -> bool:
        """Whether a row can hold several continuations of its beginning. Found by running one row and both alone.
        Positions must be those that are asked for, in rows of any length, and attention must follow any mask.
        """
        positions_are_free = self._forward.takes_positions and self.turn is None
        return self.shares_prefix and positions_are_free and follows_branches(self)

    @functools.cached_property
    @torch.no_grad()
    def block_shape(self) -> BlockShape | None:
        """Of given keys and values of any tokens in front of rows, some of them hidden (deep slots in front); None if
        rows cannot be read behind them. Found by running two rows. Positions must not depend on the row's length.
        """
        # Of a model in tensor parallelism, each process has the keys and values of its own heads.
        is_whole = self.shards is None or self.shards.how != "tp"
        return block_shape(self) if self.shares_prefix and self.turn is None and is_whole else None

    @property
    def reads_blocks(self) -> bool:
        """Whether rows can be read behind given keys and values of any tokens."""
        return self.block_shape is not None

    @functools.cached_property
    @torch.no_grad()
    def deep(self) -> DeepShape:
        """How many layers take vectors in the columns of deep slots, and how wide these are. Found by running rows.
        Raises a BackboneError with the reason if the layers of the model do not.
        """
        return deep_shape(self)

    @functools.cached_property
    @torch.no_grad()
    def pads_left(self) -> bool:
        """Whether rows can have pads on the left. Found by running one row with pads and without.
        They cannot if positions count from the first pad (BART) or a recurrent state reads every column (RWKV).
        """
        if self.kind == "encoder-decoder":
            return False
        return same_logits(self, beside_pads(self, left=0), beside_pads(self, left=2))

    def embed(self, token_ids: Tensor) -> Tensor:
        """Return the embeddings of (B, T) token ids by the model's own call, (B, T, E), scaled if the model scales."""
        embedded = self._embedding(token_ids)
        if not isinstance(embedded, Tensor):
            what = f"the input embeddings of {type(self.model).__name__} are not a tensor ({type(embedded).__name__})"
            raise BackboneError(f"{self.name}: {what}, so slots cannot be filled; use another language model")
        return embedded

    @torch.no_grad()
    def vectors_of(self, token_ids: Tensor) -> Tensor:
        """Return the embeddings of (N,) token ids, (N, E) float32, without gradients."""
        return self.embed(token_ids.to(self.device)[None])[0].float()

    def table(self) -> Tensor:
        """Return the embeddings of all tokens of the tokenizer, (V, E) float32: as large as the model's own table."""
        return self.vectors_of(torch.arange(self.vocabulary))

    @functools.cached_property
    def table_statistics(self) -> TableStatistics:
        """Statistics of the table: random slots start around the mean, and the norm bounds how far a slot moves."""
        table = self.table()
        return TableStatistics(table.mean(dim=0).cpu(), table.std(dim=0).cpu(), float(table.norm(dim=-1).mean()))

    def run(
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
    ) -> tuple[Tensor, Memory | None]:
        """Return asked float32 logits, (N, V) of the tokenizer's vocabulary or (N, K) of a head; and the KV cache.

        Args:
            embeddings: (B, T, E).
            mask: (B, T_all) int64; 1 at tokens, remembered ones included. For a model that :attr:`branches` also
                (B, 1, T, T_all) bool; which column reads which.
            positions: (B, T) int64; from 0 in each row, whatever the model itself counts from.
            rows: (N,) int64; the rows of the wanted logits, in order.
            cols: (N,) int64; their columns.
            encoder_tokens: Number of leading columns that the encoder reads; the decoder reads the others.
            memory: KV cache of earlier tokens (and the encoder's output: ``embeddings`` are then the decoder's).
            keep: Whether to return the KV cache, if the model has one.
            offsets: Vectors to add to the inputs of layers.
            seen: Called with the index of each layer on its side, and with its input.
        """
        if offsets is not None or seen is not None:
            listen(self.model)
        with _turning if self.turn is not None else contextlib.nullcontext():
            logits, memory = self._forward(
                self.model,
                embeddings,
                mask=mask,
                positions=positions,
                rows=rows,
                cols=cols,
                segment_id=self.tokenizer.segment_id,
                encoder_tokens=encoder_tokens,
                memory=memory,
                keep=keep,
                offsets=offsets,
                seen=seen,
            )
        return logits if hasattr(self.model, HEAD) else logits[:, : self.vocabulary], memory

    def run_prefix(
        self, embeddings: Tensor, *, positions: Tensor, rows: int, offsets: LayerOffsets | None = None
    ) -> Memory:
        """Run a prefix once, (1, T, E) and (1, T), for a model that :attr:`shares_prefix`.
        Returns the KV cache of T tokens for B rows, as views of one row's. Gradients flow through it.
        """
        memory = self.remember(embeddings, mask=torch.ones_like(positions), positions=positions, offsets=offsets)
        for layer in memory.cache.layers:
            layer.keys = layer.keys.expand(rows, -1, -1, -1)  # type: ignore[union-attr]  # all are plain layers
            layer.values = layer.values.expand(rows, -1, -1, -1)  # type: ignore[union-attr]
        return memory

    def remember(
        self, embeddings: Tensor, *, mask: Tensor, positions: Tensor, offsets: LayerOffsets | None = None
    ) -> Memory:
        """Run rows for their KV cache alone, for a model that :attr:`shares_prefix`; pads go on the right."""
        at = torch.zeros(1, dtype=torch.int64, device=embeddings.device)  # a head may fail on no position at all
        _, memory = self.run(embeddings, mask=mask, positions=positions, rows=at, cols=at, keep=True, offsets=offsets)
        assert memory is not None
        return memory


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and notices; ptuning shows its own."""
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
