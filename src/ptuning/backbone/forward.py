"""One forward pass: what a model of each kind is given, and logits at the asked positions only. Knows no tokenizer and
no templates.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from ptuning.backbone.grouped_attention import pack_heads
from ptuning.errors import BackboneError
from ptuning.template.segments import Kind

if TYPE_CHECKING:
    from transformers import Cache, DynamicLayer, PreTrainedModel
    from transformers.modeling_outputs import BaseModelOutput

# The module of a model that reads its hidden states where its own head would, if there is one.
HEAD = "classification_head"
# What a model must take as input, and what is wrong with one that does not.
NEEDED = {"inputs_embeds": "so slots cannot be filled", "attention_mask": "so it would read pads"}
NEEDED_BY_KIND: dict[Kind, dict[str, str]] = {
    "causal": NEEDED,
    "masked": NEEDED,
    "permuted": {
        **NEEDED,
        "perm_mask": "so targets cannot be hidden",
        "target_mapping": "so none can be asked for",
    },
    "encoder-decoder": {**NEEDED, "decoder_inputs_embeds": "so slots on the decoder's side cannot be filled"},
}


@dataclass
class Memory:
    """What a model keeps of the earlier tokens of B rows for the next call.

    Args:
        cache: Keys and values.
        encoded: What the encoder made of its side, if there is one: an output with a (B, T_encoder, H) hidden state.
        encoded_mask: (B, T_encoder) int64; 1 at its tokens.
    """

    cache: Cache
    encoded: BaseModelOutput | None = None
    encoded_mask: Tensor | None = None

    @classmethod
    def of(cls, layers: Sequence[tuple[Tensor, Tensor]]) -> Memory:
        """Return the memory of given keys and values, one pair of (B, heads, T, D) for each layer."""
        from transformers import DynamicCache

        cache = DynamicCache()
        for index, (keys, values) in enumerate(layers):
            cache.update(keys, values, index)
        return cls(cache)

    @property
    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values, one pair of (B, heads, T, D) for each layer, of a cache that is nothing but those."""
        layers = cast("Sequence[DynamicLayer]", self.cache.layers)
        return [(layer.keys, layer.values) for layer in layers]  # type: ignore[misc]  # all were filled

    def reorder(self, rows: Tensor) -> None:
        """Let row i hold what row ``rows[i]`` held, in place (to repeat rows, or to follow beams)."""
        self.cache.reorder_cache(rows)  # type: ignore[arg-type]  # any int64 tensor will do
        if self.encoded is not None and self.encoded_mask is not None:
            self.encoded = type(self.encoded)(last_hidden_state=self.encoded["last_hidden_state"][rows])
            self.encoded_mask = self.encoded_mask[rows]


@dataclass
class _Asked:
    """The positions of one forward pass whose logits are wanted, (N,) int64 each, and the hidden states there, (N, H),
    once a hook took them.
    """

    rows: Tensor
    cols: Tensor
    hidden: Tensor | None = None


_gather: ContextVar[_Asked | None] = ContextVar("ptuning_gather", default=None)


class Forward:
    """How a model is run, asked of its class and its config once.

    Args:
        model: A language model of transformers with its head.
        kind: What kind of language model it is.
        name: What to call it in messages.

    Raises:
        BackboneError: If it lacks an input that its kind needs.
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
        self._takes_positions = "position_ids" in accepted
        # A model without a table of segments (GPT-2, XLM) would add the embedding of the word with the segment's id.
        self._takes_segments = "token_type_ids" in accepted and bool(getattr(model.config, "type_vocab_size", 0))
        # The head reads the body, or (OPT, encoder-decoder models) calls the decoder inside of it.
        if kind == "encoder-decoder":
            bodies = {model.get_decoder()}
        else:
            bodies = {model.base_model, getattr(model.base_model, "decoder", model.base_model)}
        for body in bodies:
            body.register_forward_hook(_gather_hook)
        pack_heads(model)

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
    ) -> tuple[Tensor, Memory | None]:
        """Run the model, or a copy of it; as :meth:`ptuning.backbone.backbone.Backbone.run`.

        A head that was put beside the model's own reads what the body makes of the asked positions: nothing of what
        language models do to hidden states or logits on the way to words (T5's scale, BART's bias per word), and a
        permuted model sees the asked positions like all others, since there is nothing to predict.

        Raises:
            BackboneError: If there is such a head, and the body does not show its hidden states.

        Source: docs/decisions.md, decision 6 (a hook on the body gathers before the head runs).
        """
        inputs: dict[str, object]
        if self.kind == "encoder-decoder":
            encoded: BaseModelOutput | None
            encoded_mask: Tensor | None
            if memory is None:
                encoded, encoded_mask = _encode(model, embeddings[:, :encoder_tokens], mask[:, :encoder_tokens])
            else:
                encoded, encoded_mask = memory.encoded, memory.encoded_mask
            inputs = {
                "encoder_outputs": encoded,
                "attention_mask": encoded_mask,
                "decoder_inputs_embeds": embeddings[:, encoder_tokens:],
                "decoder_attention_mask": mask[:, encoder_tokens:],
            }
            cols = cols - encoder_tokens
        else:
            inputs = {"inputs_embeds": embeddings, "attention_mask": mask}
        if self._takes_positions:
            inputs["position_ids"] = positions + self.first_position
        if self._takes_segments:
            inputs["token_type_ids"] = torch.full_like(positions, segment_id)
        if self.kind in ("causal", "encoder-decoder"):
            inputs |= {
                "use_cache": keep or memory is not None,
                "past_key_values": None if memory is None else memory.cache,
            }
        head = getattr(model, HEAD, None)
        if self.kind == "permuted" and head is None:
            hidden, mapping, cols = _asked_targets(embeddings, rows, cols)
            inputs |= {"perm_mask": hidden, "target_mapping": mapping}
        asked = _Asked(rows, cols)
        token = _gather.set(asked)
        try:
            output = model(**inputs, return_dict=True)
        finally:
            _gather.reset(token)
        if head is None:
            logits = output.logits[rows, cols] if asked.hidden is None else output.logits[0]  # (N, V)
        elif asked.hidden is not None:
            logits = head(asked.hidden)  # (N, K)
        else:
            raise BackboneError(
                f"{self._name}: {type(model).__name__} does not show the hidden states that its head reads, so no "
                "classification head can take its place; leave fine-tuning out of the methods"
            )
        cache = output.get("past_key_values") if keep else None
        if cache is None:
            return logits.float(), None
        if memory is not None:
            memory.cache = cache
        elif self.kind == "encoder-decoder":
            memory = Memory(cache, encoded, encoded_mask)
        else:
            memory = Memory(cache)
        return logits.float(), memory


def _encode(model: PreTrainedModel, embeddings: Tensor, mask: Tensor) -> tuple[BaseModelOutput, Tensor]:
    """Return what the encoder makes of its side, (B, T_encoder, E), and its mask."""
    return model.get_encoder()(inputs_embeds=embeddings, attention_mask=mask, return_dict=True), mask


def _asked_targets(embeddings: Tensor, rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what hides the asked positions from every position, and what asks for them, as permutation language
    models are trained.

    Args:
        embeddings: (B, T, E).
        rows: (N,) int64, row by row.
        cols: (N,) int64.

    Returns:
        (B, T, T) 1 where a position must not see another, (B, M, T) one row per asked position, and (N,) which of
        the M it is.

    Source: Yang et al. (2019), section 2.3 (two-stream attention).
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
    """Keep the asked positions of the last hidden state, so that the head runs on nothing else."""
    asked = _gather.get()
    if asked is None or asked.hidden is not None or not isinstance(output, dict) or "last_hidden_state" not in output:
        return None
    asked.hidden = output["last_hidden_state"][asked.rows, asked.cols]  # (N, H)
    output["last_hidden_state"] = asked.hidden[None]  # (1, N, H)
    return output


def _first_position(model: PreTrainedModel) -> int:
    """Return what the model counts positions from: RoBERTa's table keeps its first rows for padding."""
    tables = [module for name, module in model.named_modules() if name.endswith("position_embeddings")]
    padding = getattr(tables[0], "padding_idx", None) if tables else None
    return 0 if padding is None else int(padding) + 1
