"""One filled template as token ids."""

from __future__ import annotations

from dataclasses import dataclass

from ptuning.template.segments import Ids

# Token id at a slot; any id would do, since the slot's vector replaces its embedding.
SLOT_PLACEHOLDER = 0


@dataclass(frozen=True)
class Example:
    """One filled template as token ids, unpadded.

    Args:
        token_ids: With :data:`SLOT_PLACEHOLDER` at the slots; the encoder's part, if any, comes first.
        slot_positions: The positions of the slots, in template order.
        logit_positions: Where the model's logits score ``target_ids``; one before each token in left-to-right models.
        target_ids: The scored ids; the last one is the stop token if the example teaches to stop.
        own_tokens: Number of ``target_ids`` without the stop token.
        shortened: Whether a field was truncated to fit.
        encoder_tokens: Number of ``token_ids`` that the encoder reads; 0 without one.
        known: Whether the tokenizer knows the target (:func:`~ptuning.template.ambiguity.is_known`); one without any
            tokens is replaced by an unknown token.
        begun: Number of tokens and slots in front of ``token_ids`` of which the prompt brings keys and values: its
            block of deep slots, and what the tokenizer puts in front of a text.
        unread: Which of these, counted from the row's beginning, this row does not read.
        turns_left_out: How many turns of a conversation were left out to fit.
        named_end: Whether the template names what the target ends with.
    """

    token_ids: Ids
    slot_positions: Ids
    logit_positions: Ids
    target_ids: Ids
    own_tokens: int
    shortened: bool = False
    encoder_tokens: int = 0
    known: bool = True
    begun: int = 0
    unread: Ids = ()
    turns_left_out: int = 0
    named_end: bool = False

    @property
    def length(self) -> int:
        """Number of tokens and slots of the whole row."""
        return self.begun + len(self.token_ids)
