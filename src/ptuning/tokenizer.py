"""What templates need of a backbone without its weights: its tokenizer and its kind. Knows no model's forward pass."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ptuning.errors import BackboneError
from ptuning.fill import Ids, Kind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Rows without a limit of their own (tokenizers say 1e30) are bounded by this many tokens.
UNBOUNDED_TOKENS = 1 << 20


class TextTokenizer:
    """A transformers tokenizer as templates need it: no special tokens added, special text in records is plain text.

    Args:
        tokenizer: The tokenizer; a copy of it is used, so the caller's stays as it is.
        max_tokens: Longest row that the model takes.
        rows: How many ids the model can embed, if known; special tokens beyond them do not count.

    Raises:
        BackboneError: If the tokenizer's special tokens cannot be told from text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int, rows: int | None = None) -> None:
        # Encoding special text as plain text leaves a mark in the tokenizer's state, which must not be the caller's.
        self._tokenizer = copy.deepcopy(tokenizer)
        self.max_tokens = min(max_tokens, int(min(tokenizer.model_max_length, UNBOUNDED_TOKENS)))
        self.mask_id: int | None = tokenizer.mask_token_id
        self.stop_id: int | None = tokenizer.eos_token_id
        self.unknown_id: int | None = tokenizer.unk_token_id
        self.line_end_id = self._probe_line_end()
        self.special_ids: Mapping[str, int] = {
            token.content: index
            for index, token in tokenizer.added_tokens_decoder.items()
            if token.special and (rows is None or index < rows)
        }
        self.prefix_ids, self.suffix_ids, self.segment_id = self._probe_specials()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, without special tokens."""
        if not texts:
            return []
        encoded = self._tokenizer(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return [list(ids) for ids in encoded["input_ids"]]

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files as transformers reads them."""
        self._tokenizer.save_pretrained(folder)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, without special tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def token(self, token_id: int) -> str:
        """Return a token as a person reads it: a space stays a space, other invisible characters are escaped."""
        text = str(self._tokenizer.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        written = self._tokenizer.convert_ids_to_tokens(token_id)
        return text if text.strip() or text == " " else repr(text)[1:-1] or str(written)

    def ends_line(self, token_id: int) -> bool:
        """Whether a token's text holds a line break."""
        return "\n" in self.decode([token_id])

    def _probe_line_end(self) -> int | None:
        """Return the token of a line break, if there is one; a tokenizer that drops line breaks has none."""
        ids = self.encode(["\n"])[0]
        return ids[0] if len(ids) == 1 and ids[0] != self.unknown_id and self.ends_line(ids[0]) else None

    def _probe_specials(self) -> tuple[Ids, Ids, int]:
        """Ask the tokenizer where it puts special tokens and which segment id a single sentence gets."""
        bare = self.encode(["a"])[0]
        whole = self._tokenizer("a", verbose=False)
        ids = list(whole["input_ids"])
        at = next((i for i in range(len(ids) - len(bare) + 1) if ids[i : i + len(bare)] == bare), None)
        if at is None:
            raise BackboneError(f"the tokenizer gives {ids} with special tokens and {bare} without; it cannot be used")
        segments = whole.get("token_type_ids", [0])
        return tuple(ids[:at]), tuple(ids[at + len(bare) :]), int(segments[min(at, len(segments) - 1)])


def kind_of(config: object, *, has_mask: bool) -> Kind:
    """Say from a model's config whether it is causal or masked.

    Raises:
        BackboneError: If it is neither.
    """
    from transformers.models.auto import modeling_auto

    if getattr(config, "is_encoder_decoder", False):
        raise BackboneError("encoder-decoder models are not supported yet; use a causal or a masked language model")
    model_type = str(getattr(config, "model_type", ""))
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    masked = modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    named = list(getattr(config, "architectures", None) or [])
    heads: dict[str, Kind] = {str(causal.get(model_type)): "causal", str(masked.get(model_type)): "masked"}
    for architecture in named:
        if architecture in heads:
            return heads[architecture]
    # No or another head is named: the family decides, and where it has both (BERT) whether there is a mask token.
    if model_type in masked and (has_mask or model_type not in causal):
        return "masked"
    if model_type in causal:
        return "causal"
    raise BackboneError(
        f"model type '{model_type}' has neither a causal nor a masked language-model head in transformers"
    )
