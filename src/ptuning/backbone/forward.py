"""A language model and its forward pass: inputs by its kind, logits at some positions, KV cache, and the filter of
logits for generation.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from ptuning.backbone.attention import take_over
from ptuning.backbone.layers import LayerOffsets, LayerPass, add_layer_hooks, entering_layers
from ptuning.backbone.tokenizer import TextTokenizer, decoder_start, kind_of, longest_row, text_ends
from ptuning.backbone.weights import is_spread, is_wrapped, replace_forward, run_on, spread_product
from ptuning.config import GenerationSettings
from ptuning.errors import BackboneError
from ptuning.template.segments import Kind

if TYPE_CHECKING:
    from transformers import Cache, DynamicLayer, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.modeling_outputs import BaseModelOutput

HEAD = "classification_head"
Seen = Callable[[int, Tensor], None]  # gets the index of a layer, counted on its side, and its (B, T, H) input
HEAD_ROWS = 8192  # rows of a head's weight that are float32 at a time, which bounds the memory
# The inputs that a model must take, and what goes wrong without them.
NEEDED = {"inputs_embeds": "so slots cannot be filled", "attention_mask": "so it would read pads"}
NEEDED_BY_KIND: dict[Kind, dict[str, str]] = {
    "causal": NEEDED,
    "masked": NEEDED,
    "permuted": {**NEEDED, "perm_mask": "so targets cannot be hidden", "target_mapping": "so none can be asked for"},
    "encoder-decoder": {**NEEDED, "decoder_inputs_embeds": "so slots on the decoder's side cannot be filled"},
}
# Held by a pass of a model whose positions depend on the length (LongRoPE): they are one tensor for all threads.
_switching = threading.RLock()


@dataclass
class Memory:
    """The KV cache of B rows; and the encoder's output, (B, T_encoder, H), with its mask, (B, T_encoder) int64."""

    cache: Cache
    encoded: BaseModelOutput | None = None
    encoded_mask: Tensor | None = None

    @classmethod
    def of(cls, layers: Sequence[tuple[Tensor, Tensor]]) -> Memory:
        """Return the memory for given keys and values, one pair of (B, heads, T, D) per layer."""
        from transformers import DynamicCache

        cache = DynamicCache()
        for index, (keys, values) in enumerate(layers):
            cache.update(keys, values, index)
        return cls(cache)

    @property
    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values, one pair of (B, heads, T, D) per layer, for a cache that holds nothing else."""
        layers = cast("Sequence[DynamicLayer]", self.cache.layers)
        return [(layer.keys, layer.values) for layer in layers]  # type: ignore[misc]  # all were filled

    @property
    def is_plain(self) -> bool:
        """Whether the cache holds all keys and values of all positions and nothing else, so that it can be joined."""
        from transformers.cache_utils import DynamicLayer

        return self.encoded is None and all(
            type(layer) is DynamicLayer and layer.is_initialized for layer in self.cache.layers
        )

    def join(self, other: Memory, *, width: int) -> Memory:
        """Return the plain memory of the rows of both, padded on the left to ``width`` positions."""

        def both(own: Tensor, added: Tensor) -> Tensor:
            return torch.cat([nn.functional.pad(part, (0, 0, width - part.shape[2], 0)) for part in (own, added)])

        pairs = zip(self.layers, other.layers, strict=True)
        return Memory.of([(both(keys, more), both(values, others)) for (keys, values), (more, others) in pairs])

    def drop_first(self, positions: int) -> Memory:
        """Return the plain memory without its first positions, which are pads in every row."""
        return Memory.of([(keys[:, :, positions:], values[:, :, positions:]) for keys, values in self.layers])

    def reorder(self, rows: Tensor) -> None:
        """Replace row i by row ``rows[i]``, in place (to repeat rows, or to follow beams)."""
        self.cache.reorder_cache(rows)  # type: ignore[arg-type]  # any int64 tensor will do
        if self.encoded is not None and self.encoded_mask is not None:
            self.encoded = type(self.encoded)(last_hidden_state=self.encoded["last_hidden_state"][rows])
            self.encoded_mask = self.encoded_mask[rows]


@dataclass
class _Wanted:
    """The positions of wanted logits, (N,) int64 each, and, once the hook has run, the hidden states there, (N, H)."""

    rows: Tensor
    cols: Tensor
    hidden: Tensor | None = None

    def of(self, states: Tensor) -> Tensor:
        """Return (B, T, X) states at the positions, (N, X), on the states' device: the last layer's."""
        return states[self.rows.to(states.device), self.cols.to(states.device)]


_wanted: ContextVar[_Wanted | None] = ContextVar("ptuning_gather", default=None)


class LanguageModel:
    """A model and a copy of its tokenizer. The inputs that it takes are read from its class and its config, once.
    Raises BackboneError if it is no language model, or does not take an input that its kind needs.
    """

    # Length beyond which the model reads a row, and all rows of its batch, with other positions (LongRoPE), if any.
    turn: int | None = None

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str, is_tokenizer_shared: bool = True
    ) -> None:
        self.model = model
        self.name = name
        self.kind: Kind = kind_of(model.config, has_mask=tokenizer.mask_token_id is not None)
        accepted = inspect.signature(model.forward).parameters
        for needed, why in NEEDED_BY_KIND[self.kind].items():
            if needed not in accepted:
                raise BackboneError(
                    f"{name}: {type(model).__name__} takes no {needed} as input, {why}; use another language model"
                )
        # RoBERTa's table of positions keeps its first rows for padding.
        tables = [
            module for module_name, module in model.named_modules() if module_name.endswith("position_embeddings")
        ]
        padding = getattr(tables[0], "padding_idx", None) if tables else None
        self._first_position = 0 if padding is None else int(padding) + 1
        self.takes_positions = "position_ids" in accepted
        # A model without a segment table (GPT-2, XLM) would add the embedding of the word with the segment's id.
        self._takes_segments = "token_type_ids" in accepted and bool(getattr(model.config, "type_vocab_size", 0))
        # The head reads the body, or (OPT, encoder-decoder models) the decoder inside of it.
        if self.kind == "encoder-decoder":
            bodies = {model.get_decoder()}
        else:
            bodies = {model.base_model, getattr(model.base_model, "decoder", model.base_model)}
        for body in bodies:
            body.register_forward_hook(_gather_hook)
        take_over(model)
        output = model.get_output_embeddings()
        if type(output) is nn.Linear:
            # Not a method of the module: it could not be pickled. A copy of it made later runs itself.
            own = vars(output).get("forward") if is_spread(output.weight) else None
            replace_forward(output, functools.partial(_head_forward, output, own))
        generation = getattr(model, "generation_config", None)
        self.tokenizer = TextTokenizer(
            tokenizer,
            max_tokens=longest_row(model.config) - self._first_position,
            rows=self.embedding_rows,
            decoder_ids=decoder_start(model.config, generation),
            end_ids=text_ends(model.config, generation),
            is_shared=is_tokenizer_shared,
        )
        self.width = int(self.embed(torch.zeros(1, 1, dtype=torch.int64, device=self.device)).shape[-1])
        # Either can be larger: tables are padded to round sizes, and tokenizers get tokens that were never embedded.
        self.vocabulary = min(max(tokenizer.get_vocab().values()) + 1, self.embedding_rows)

    @property
    def device(self) -> torch.device:
        """Device on which embeddings are looked up."""
        return run_on(self._embedding) or self._table_weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return self.model.dtype

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

    def embed(self, token_ids: Tensor) -> Tensor:
        """Return the embeddings of (B, T) token ids by the model's own call, (B, T, E), scaled if the model scales."""
        embedded = self._embedding(token_ids)
        if not isinstance(embedded, Tensor):
            raise BackboneError(
                f"{self.name}: the input embeddings of {type(self.model).__name__} are not a tensor "
                f"({type(embedded).__name__}), so slots cannot be filled; use another language model"
            )
        return embedded

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
        """Return float32 logits at some positions, (N, V) of the tokenizer's vocabulary or (N, K) of a head; and the KV
        cache. A classification head reads the body's hidden states directly, without T5's scale or BART's bias per
        word. Source: docs/decisions.md, decision 6 (a hook on the body gathers before the head runs).

        Args:
            embeddings: (B, T, E).
            mask: (B, T_all) int64; 1 at tokens, remembered ones included. For a model that ``branches`` also
                (B, 1, T, T_all) bool; which column reads which.
            positions: (B, T) int64; from 0 in each row, whatever the model itself counts from.
            rows: (N,) int64; the rows of the wanted logits, in order.
            cols: (N,) int64; their columns.
            encoder_tokens: Number of leading columns that the encoder reads; the decoder reads the others.
            memory: KV cache of earlier tokens (and the encoder's output: ``embeddings`` are then the decoder's).
            keep: Whether to return the KV cache, if the model has one.
            offsets: Vectors to add to the inputs of layers.
            seen: Called with the index of each layer on its side, and with its input.

        Raises:
            BackboneError: If the body does not return the hidden states that a classification head reads.
        """
        model, is_two_sided = self.model, self.kind == "encoder-decoder"
        if offsets is not None or seen is not None:
            add_layer_hooks(model)

        def layer_pass(part: Tensor, added: LayerOffsets | None) -> LayerPass | None:
            if added is None and seen is None:
                return None
            return LayerPass(len(part), part.shape[1], self.kind == "permuted", added, seen)

        with _switching if self.turn is not None else contextlib.nullcontext():
            encoded = encoded_mask = None
            inputs: dict[str, object] = {"inputs_embeds": embeddings, "attention_mask": mask}
            if is_two_sided:
                if memory is None:
                    text, encoded_mask = embeddings[:, :encoder_tokens], mask[:, :encoder_tokens]
                    own = None if offsets is None else offsets.between(0, encoder_tokens)
                    with entering_layers(layer_pass(text, own)):
                        encoded = model.get_encoder()(inputs_embeds=text, attention_mask=encoded_mask, return_dict=True)
                else:
                    encoded, encoded_mask = memory.encoded, memory.encoded_mask
                inputs = {
                    "encoder_outputs": encoded,
                    "attention_mask": encoded_mask,
                    "decoder_inputs_embeds": embeddings[:, encoder_tokens:],
                    "decoder_attention_mask": mask[:, encoder_tokens:],
                }
                cols = cols - encoder_tokens
                offsets = None if offsets is None else offsets.between(encoder_tokens)
            if self.takes_positions:
                inputs["position_ids"] = positions + self._first_position
            if self._takes_segments:
                inputs["token_type_ids"] = torch.full_like(positions, self.tokenizer.segment_id)
            if self.kind in ("causal", "encoder-decoder"):
                inputs["use_cache"] = keep or memory is not None
                inputs["past_key_values"] = None if memory is None else memory.cache
            wanted, head = _Wanted(rows, cols), getattr(model, HEAD, None)
            if self.kind == "permuted" and head is None:
                hidden, mapping, wanted.cols = _hidden_targets(embeddings, rows, cols)
                inputs |= {"perm_mask": hidden, "target_mapping": mapping}
            token = _wanted.set(wanted)
            try:
                with entering_layers(layer_pass(embeddings[:, encoder_tokens:], offsets)):
                    output = model(**inputs, return_dict=True)
            finally:
                _wanted.reset(token)
            if head is None:
                logits = wanted.of(output.logits) if wanted.hidden is None else output.logits[0]  # (N, V)
                logits = logits[:, : self.vocabulary]
            elif wanted.hidden is not None:
                logits = head(wanted.hidden.to(embeddings.device))  # (N, K)
            else:
                raise BackboneError(
                    f"{self.name}: {type(model).__name__} does not return the hidden states that a head reads, so no "
                    "classification head can take its place; leave fine-tuning out of the methods"
                )
        cache = output.get("past_key_values")
        logits = logits.float().to(embeddings.device)
        return logits, Memory(cache, encoded, encoded_mask) if keep and cache is not None else None

    def remember(
        self, embeddings: Tensor, *, mask: Tensor, positions: Tensor, offsets: LayerOffsets | None = None
    ) -> Memory:
        """Run rows for their KV cache alone, for a model that ``shares_prefix``; pads go on the right."""
        at = torch.zeros(1, dtype=torch.int64, device=embeddings.device)  # a head may fail on no position at all
        _, memory = self.run(embeddings, mask=mask, positions=positions, rows=at, cols=at, keep=True, offsets=offsets)
        assert memory is not None
        return memory


def _hidden_targets(embeddings: Tensor, rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Hide the wanted positions from every position and ask for their tokens (Yang et al. 2019, section 2.3).
    Returns perm_mask (B, T, T), 1 where hidden; target_mapping (B, M, T); each wanted position's row of the M, (N,).
    """
    batch, width = embeddings.shape[:2]
    counts = torch.bincount(rows, minlength=batch)  # (B,)
    order = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]  # (N,)
    hidden = embeddings.new_zeros(batch, width, width)
    hidden.transpose(1, 2)[rows, cols] = 1.0
    mapping = embeddings.new_zeros(batch, max(1, int(counts.max())), width)
    mapping[rows, order, cols] = 1.0
    return hidden, mapping, order


def _gather_hook(_module: nn.Module, _inputs: object, output: object) -> dict[str, Tensor] | None:
    """Keep only the wanted positions of the last hidden state, so that the head runs on nothing else."""
    wanted = _wanted.get()
    if wanted is None or wanted.hidden is not None or not isinstance(output, dict) or "last_hidden_state" not in output:
        return None
    wanted.hidden = wanted.of(output["last_hidden_state"])  # (N, H)
    output["last_hidden_state"] = wanted.hidden[None]  # (1, N, H)
    return output


def _head_forward(head: nn.Linear, own: Callable[[Tensor], Tensor] | None, hidden: Tensor) -> Tensor:
    """Return the logits of a head, (1, N, V): in float32 where the wanted positions are scored, whatever the weights.
    ``own`` runs it where its weight is spread over several processes.

    In bfloat16 the logits of likely tokens are multiples of 1/8, so that different answers tie. Training steps keep the
    fast format: ties mean nothing to them. Source: docs/decisions.md, decision 44.
    """
    wanted = _wanted.get()
    if wanted is None or wanted.hidden is None or hidden.dtype == torch.float32 or torch.is_grad_enabled():
        return nn.Linear.forward(head, hidden) if own is None else own(hidden)
    wide = hidden.float()
    if own is not None:
        logits = spread_product(wide, head.weight)
    else:
        logits = torch.cat([wide @ rows.float().T for rows in head.weight.split(HEAD_ROWS)], dim=-1)
    return logits if head.bias is None else logits + head.bias.float()


def logits_processor(settings: GenerationSettings) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a function that turns the logits (or log-probabilities) of the next token, (B, V), into those to choose
    from, given the (B, T) ids that were generated before. It does what transformers' ``generate`` does.
    """
    from transformers.generation import logits_process as known

    steps = known.LogitsProcessorList()
    if settings.repetition_penalty != 1.0:
        steps.append(known.RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
    if settings.do_sample:
        if settings.temperature != 1.0:
            steps.append(known.TemperatureLogitsWarper(settings.temperature))
        if settings.top_k:
            steps.append(known.TopKLogitsWarper(settings.top_k))
        if settings.top_p < 1.0:
            steps.append(known.TopPLogitsWarper(settings.top_p))
    return steps  # type: ignore[return-value]  # the stub asks for a LongTensor
