"""One forward pass: the inputs of a model by its kind, logits at the asked positions, and which token may be next."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from ptuning.backbone.attention import take_over
from ptuning.backbone.layers import LayerOffsets, Walk, walking
from ptuning.backbone.weights import is_spread, replace_forward, spread_product
from ptuning.config import GenerationSettings
from ptuning.errors import BackboneError
from ptuning.template.segments import Kind

if TYPE_CHECKING:
    from transformers import Cache, DynamicLayer, PreTrainedModel
    from transformers.modeling_outputs import BaseModelOutput

HEAD = "classification_head"
Seen = Callable[[int, Tensor], None]  # gets the index of a layer, counted on its side, and its (B, T, H) input
# So many rows of a head's weight are float32 at a time, which bounds the memory.
HEAD_ROWS = 8192
# The inputs that a model must take, and what goes wrong without them.
NEEDED = {"inputs_embeds": "so slots cannot be filled", "attention_mask": "so it would read pads"}
NEEDED_BY_KIND: dict[Kind, dict[str, str]] = {
    "causal": NEEDED,
    "masked": NEEDED,
    "permuted": {**NEEDED, "perm_mask": "so targets cannot be hidden", "target_mapping": "so none can be asked for"},
    "encoder-decoder": {**NEEDED, "decoder_inputs_embeds": "so slots on the decoder's side cannot be filled"},
}


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
        """Return the plain memory of both, one's rows below the other's, padded on the left to ``width`` positions."""

        def both(one: Tensor, two: Tensor) -> Tensor:
            return torch.cat([nn.functional.pad(part, (0, 0, width - part.shape[2], 0)) for part in (one, two)])

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
class _Asked:
    """The wanted positions, (N,) int64 each, and, once the hook has run, the hidden states there, (N, H)."""

    rows: Tensor
    cols: Tensor
    hidden: Tensor | None = None

    def of(self, states: Tensor) -> Tensor:
        """Return what (B, T, X) states are at the positions, (N, X), on the states' device: the last layer's."""
        return states[self.rows.to(states.device), self.cols.to(states.device)]


_gather: ContextVar[_Asked | None] = ContextVar("ptuning_gather", default=None)


class Forward:
    """Runs a model of any kind. What the model takes is read from its class and its config, once.
    Raises BackboneError if it does not take an input that its kind needs.
    """

    def __init__(self, model: PreTrainedModel, *, kind: Kind, name: str) -> None:
        accepted = inspect.signature(model.forward).parameters
        for needed, why in NEEDED_BY_KIND[kind].items():
            if needed not in accepted:
                raise BackboneError(
                    f"{name}: {type(model).__name__} takes no {needed} as input, {why}; use another language model"
                )
        self.kind = kind
        self._name = name
        self.first_position = _first_position(model)
        self.takes_positions = "position_ids" in accepted
        # A model without a segment table (GPT-2, XLM) would add the embedding of the word with the segment's id.
        self._takes_segments = "token_type_ids" in accepted and bool(getattr(model.config, "type_vocab_size", 0))
        # The head reads the body, or (OPT, encoder-decoder models) the decoder inside of it.
        if kind == "encoder-decoder":
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

    def __call__(
        self,
        model: PreTrainedModel,
        embeddings: Tensor,
        *,
        mask: Tensor,
        positions: Tensor,
        rows: Tensor,
        cols: Tensor,
        segment_id: int,
        encoder_tokens: int,
        memory: Memory | None,
        keep: bool,
        offsets: LayerOffsets | None,
        seen: Seen | None = None,
    ) -> tuple[Tensor, Memory | None]:
        """Run the model, or a copy of it; as :meth:`ptuning.backbone.backbone.Backbone.run`.

        A classification head reads the body's hidden states directly, without T5's scale or BART's bias per word.
        Raises BackboneError if the body does not return them.
        Source: docs/decisions.md, decision 6 (a hook on the body gathers before the head runs).
        """
        encoded = encoded_mask = None
        if self.kind == "encoder-decoder":
            if memory is None:
                encoded_mask = mask[:, :encoder_tokens]
                own = None if offsets is None else offsets.between(0, encoder_tokens)
                with walking(self._walk(embeddings[:, :encoder_tokens], own, seen)):
                    encoded = model.get_encoder()(
                        inputs_embeds=embeddings[:, :encoder_tokens], attention_mask=encoded_mask, return_dict=True
                    )
            else:
                encoded, encoded_mask = memory.encoded, memory.encoded_mask
            inputs: dict[str, object] = {
                "encoder_outputs": encoded,
                "attention_mask": encoded_mask,
                "decoder_inputs_embeds": embeddings[:, encoder_tokens:],
                "decoder_attention_mask": mask[:, encoder_tokens:],
            }
            cols = cols - encoder_tokens
            offsets = None if offsets is None else offsets.between(encoder_tokens)
        else:
            inputs = {"inputs_embeds": embeddings, "attention_mask": mask}
        if self.takes_positions:
            inputs["position_ids"] = positions + self.first_position
        if self._takes_segments:
            inputs["token_type_ids"] = torch.full_like(positions, segment_id)
        if self.kind in ("causal", "encoder-decoder"):
            inputs |= {
                "use_cache": keep or memory is not None,
                "past_key_values": None if memory is None else memory.cache,
            }
        with walking(self._walk(embeddings[:, encoder_tokens:], offsets, seen)):
            logits, cache = self._run(model, inputs, embeddings, _Asked(rows, cols))
        return logits, Memory(cache, encoded, encoded_mask) if keep and cache is not None else None

    def _walk(self, embeddings: Tensor, offsets: LayerOffsets | None, seen: Seen | None) -> Walk | None:
        if offsets is None and seen is None:
            return None
        rows, width = embeddings.shape[:2]
        return Walk(rows, width, self.kind == "permuted", offsets, seen)

    def _run(
        self, model: PreTrainedModel, inputs: dict[str, object], embeddings: Tensor, asked: _Asked
    ) -> tuple[Tensor, Cache | None]:
        head = getattr(model, HEAD, None)
        if self.kind == "permuted" and head is None:
            hidden, mapping, asked.cols = _asked_targets(embeddings, asked.rows, asked.cols)
            inputs |= {"perm_mask": hidden, "target_mapping": mapping}
        token = _gather.set(asked)
        try:
            output = model(**inputs, return_dict=True)
        finally:
            _gather.reset(token)
        if head is None:
            logits = asked.of(output.logits) if asked.hidden is None else output.logits[0]  # (N, V)
        elif asked.hidden is not None:
            logits = head(asked.hidden.to(embeddings.device))  # (N, K)
        else:
            raise BackboneError(
                f"{self._name}: {type(model).__name__} does not return the hidden states that a head reads, so no "
                "classification head can take its place; leave fine-tuning out of the methods"
            )
        return logits.float().to(embeddings.device), output.get("past_key_values")


def _asked_targets(embeddings: Tensor, rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Hide the asked positions from every position and ask for their tokens (Yang et al. 2019, section 2.3).
    Returns perm_mask (B, T, T), 1 where hidden; target_mapping (B, M, T); each asked position's row of the M, (N,).
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
    """Keep only the asked positions of the last hidden state, so that the head runs on nothing else."""
    asked = _gather.get()
    if asked is None or asked.hidden is not None or not isinstance(output, dict) or "last_hidden_state" not in output:
        return None
    asked.hidden = asked.of(output["last_hidden_state"])  # (N, H)
    output["last_hidden_state"] = asked.hidden[None]  # (1, N, H)
    return output


def _head_forward(head: nn.Linear, own: Callable[[Tensor], Tensor] | None, hidden: Tensor) -> Tensor:
    """Return the logits of a head, (1, N, V): in float32 where the asked positions are scored, whatever the weights.
    ``own`` is how it is run where its weight is spread over several processes.

    In bfloat16 the logits of likely tokens are multiples of 1/8, so that different answers tie. Training steps keep the
    fast format: ties mean nothing to them. Source: docs/decisions.md, decision 44.
    """
    asked = _gather.get()
    if asked is None or asked.hidden is None or hidden.dtype == torch.float32 or torch.is_grad_enabled():
        return nn.Linear.forward(head, hidden) if own is None else own(hidden)
    wide = hidden.float()
    if own is not None:
        logits = spread_product(wide, head.weight)
    else:
        logits = torch.cat([wide @ rows.float().T for rows in head.weight.split(HEAD_ROWS)], dim=-1)
    return logits if head.bias is None else logits + head.bias.float()


def _first_position(model: PreTrainedModel) -> int:
    """Return the model's first position: RoBERTa's table keeps its first rows for padding."""
    tables = [module for name, module in model.named_modules() if name.endswith("position_embeddings")]
    padding = getattr(tables[0], "padding_idx", None) if tables else None
    return 0 if padding is None else int(padding) + 1


def logits_processor(settings: GenerationSettings) -> Callable[[Tensor, Tensor], Tensor]:
    """Return what turns the logits (or log-probabilities) of the next token, (B, V), into those to choose from.
    It is called with the (B, T) ids that were written before, and does what transformers' ``generate`` does.
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
