"""What templates need from a backbone, without its weights: its tokenizer and its kind."""

from __future__ import annotations

import copy
import functools
import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ptuning.errors import BackboneError, shown
from ptuning.records import check_text
from ptuning.template.messages import ChatMessage
from ptuning.template.segments import ANCHOR_WORD, Gap, Ids, Kind, MarkedText
from ptuning.template.shared_prefix import SHARING_TEXTS, encode_shared_prefix, has_words_apart

if TYPE_CHECKING:
    from transformers import BatchEncoding, PretrainedConfig, PreTrainedTokenizerBase

# Longest row of a model without a limit (tokenizers then say 1e30).
UNBOUNDED_TOKENS = 1 << 20
# Sentinels of models that learned to fill gaps, such as T5: one for the first gap, one for the end of its filling.
# Some vocabularies write them with SentencePiece's space mark. Source: Raffel et al. (2020), section 3.1.4.
BARE: Mapping[str, bool] = {
    "add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False, "verbose": False,
}  # fmt: skip
# What tokens are called that a vocabulary keeps for later.
UNUSED = re.compile("unused|reserved", re.IGNORECASE)
SENTINELS = (("<extra_id_0>", "<extra_id_1>"), ("▁<extra_id_0>", "▁<extra_id_1>"))


class TextTokenizer:
    """A transformers tokenizer for templates: it adds no special tokens, and special text in records is plain text.

    ``max_tokens`` is the model's longest row; special tokens beyond ``rows``, the ids that it can embed, are ignored.
    ``end_ids`` end what the model writes, besides the tokenizer's own end of a text. A tokenizer that others may use
    (``is_shared``) is copied, since encoding special text as plain text changes its state; a copy takes 0.3 seconds.
    Raises BackboneError if the special tokens cannot be told apart from text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_tokens: int,
        rows: int | None = None,
        decoder_ids: Ids = (),
        end_ids: Ids = (),
        is_shared: bool = True,
    ) -> None:
        self._tokenizer = copy.deepcopy(tokenizer) if is_shared else tokenizer
        self._reserved: frozenset[int | None] = frozenset()
        self.max_tokens = min(max_tokens, int(min(tokenizer.model_max_length, UNBOUNDED_TOKENS)))
        self.mask_id = _embedded(tokenizer.mask_token_id, rows)
        self.stop_id = _embedded(tokenizer.eos_token_id, rows)
        self.end_ids = frozenset(token for token in (self.stop_id, *end_ids) if token is not None)
        self.unknown_id: int | None = _unknown_id(tokenizer)
        self.line_end_id = self._probe_line_end()
        self.special_ids: Mapping[str, int] = {
            token.content: index
            for index, token in tokenizer.added_tokens_decoder.items()
            if token.special and (rows is None or index < rows)
        }
        self._names = re.compile("|".join(map(re.escape, sorted(self.special_ids, key=len, reverse=True))) or "$^")
        self._rows = rows
        self.decoder_ids = decoder_ids
        self.gap = self._find_gap(rows)
        named = {*self.special_ids.values(), *self.gap.encoder_ids, self.gap.end_id}
        named |= {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._specials = frozenset(token for token in named if token is not None)
        self._reserved = self._specials - {self.unknown_id}  # text that is not known need not have its name in it
        self.prefix_ids, self.suffix_ids, self.segment_id = self._probe_specials()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, without special tokens."""
        if len(texts) < SHARING_TEXTS or not self._words_are_apart:
            return self._encode(texts)
        return encode_shared_prefix(self._encode, texts)

    @functools.cached_property
    def _words_are_apart(self) -> bool:
        return has_words_apart(self._tokenizer.get_vocab())

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded = _encoded(self._tokenizer, list(texts), split_special_tokens=True)
        return [self._spelled(text, list(ids)) for text, ids in zip(texts, encoded["input_ids"], strict=True)]

    def encode_markup(self, texts: Sequence[MarkedText]) -> list[list[int]]:
        """Return the token ids of texts whose markup has special tokens, as the tokenizer itself gives them: with the
        white space that it drops beside one, and without a mark of a text's beginning behind one. Special tokens that
        stand elsewhere are spelled out.
        """
        encoded = _encoded(self._with_specials, [text.characters for text in texts], split_special_tokens=False)
        return [self._own_specials(text, encoded, row) for row, text in enumerate(texts)]

    @functools.cached_property
    def _with_specials(self) -> PreTrainedTokenizerBase:
        """A copy that finds special tokens: a tokenizer that did now one and now the other would mix threads up."""
        return copy.deepcopy(self._tokenizer)

    def _own_specials(self, text: MarkedText, encoded: BatchEncoding, row: int) -> list[int]:
        """Return the ids of an encoded text; special tokens outside of its markup are spelled out."""
        ids: list[int] = []
        in_order = (name.span() for name in self._names.finditer(text.characters))  # where there are no offsets
        for at, token in enumerate(encoded["input_ids"][row]):
            span = None
            if token in self._specials:
                span = encoded.token_to_chars(row, at) if encoded.is_fast else next(in_order, None)
            is_own = True
            if span is not None and self._is_named(token, text.characters[slice(*span)]):
                is_own = token in self.special_ids.values() and text.has_markup(*span)
            ids += [token] if is_own or span is None else self._inside(text.characters[slice(*span)])
        return ids

    def _inside(self, text: str) -> list[int]:
        """Return the ids of plain text inside of a longer one, where a tokenizer puts no mark of a beginning."""
        lead, both = self.encode([ANCHOR_WORD, ANCHOR_WORD + text])
        return both[len(lead) :] if both[: len(lead)] == lead else self.encode([text])[0]

    def _is_named(self, token: int, text: str) -> bool:
        """Whether a text has the name of a special token in it. One for the bytes of an unknown letter is not named."""
        name = str(self._tokenizer.convert_ids_to_tokens(token)).lstrip("▁")
        return bool(name) and name in text

    def _spelled(self, text: str, ids: list[int]) -> list[int]:
        """Spell special tokens out that appear in the text; others (the bytes of an unknown letter) stay."""
        if self._reserved.isdisjoint(ids):
            return ids
        spelled: list[int] = []
        for token in ids:
            if token in self._reserved and self._is_named(token, text):
                name = str(self._tokenizer.convert_ids_to_tokens(token))
                found = [self._tokenizer.convert_tokens_to_ids(letter) for letter in name]
                spelled += [letter for letter in found if isinstance(letter, int)]
            else:
                spelled.append(token)
        return spelled

    def render_chat(self, turns: Sequence[ChatMessage], *, answer_next: bool) -> str:
        """Return a conversation as the model's chat template writes it, with the beginning of an answer if it comes
        next. A BackboneError if there is no chat template, or it refuses these turns.
        """
        if not self._tokenizer.chat_template:
            raise BackboneError(
                "the model has no chat template, which says how conversations are written for it; take a chat model, "
                "or write the markup into a template"
            )
        said = [turn._asdict() for turn in turns]
        try:
            return str(self._tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=answer_next))
        except Exception as error:  # a chat template is a program, which may raise anything
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            roles = ", ".join(turn.role for turn in turns[:8])
            raise BackboneError(f"the chat template of the model refuses the turns {roles}: {first}") from error

    def read(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the ids that the tokenizer itself gives a text in which special tokens are such."""
        return list(self._with_specials(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])

    @functools.cached_property
    def reserved_ids(self) -> Mapping[int, str]:
        """Tokens that never stand in a text, with their names: special ones without a use that is known here, and those
        that are called unused or reserved, which come first.
        """
        tokenizer = self._tokenizer
        chat = json.dumps(tokenizer.chat_template)  # a text, several by their names, or none
        used: set[int | None] = {*self.prefix_ids, *self.suffix_ids, *self.end_ids, *self.decoder_ids}
        used |= set(self.gap.encoder_ids)
        used |= {self.gap.end_id, self.mask_id, self.unknown_id}
        used |= {getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad", "sep", "cls")}
        found = {
            index: token.content
            for index, token in sorted(tokenizer.added_tokens_decoder.items())
            if (token.content in self.special_ids or UNUSED.search(token.content))
            and index not in used
            and json.dumps(token.content)[1:-1] not in chat
            and (self._rows is None or index < self._rows)
        }
        return dict(sorted(found.items(), key=lambda item: UNUSED.search(item[1]) is None))

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files as transformers reads them."""
        self._tokenizer.save_pretrained(folder)

    def described(self) -> dict[str, str | None]:
        """Return the tokenizer's class, and the names of its special tokens that have a use of their own."""
        uses = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
        named = {use: getattr(self._tokenizer, use) for use in uses}
        return {"tokenizer_class": type(self._tokenizer).__name__} | {
            use: None if token is None else str(token) for use, token in named.items()
        }

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, without special tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def token(self, token_id: int) -> str:
        """Return a token in readable form: a space stays a space, other invisible characters are escaped."""
        text = str(self._tokenizer.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        written = self._tokenizer.convert_ids_to_tokens(token_id)
        return text if text.strip() or text == " " else repr(text)[1:-1] or str(written)

    def ends_line(self, token_id: int) -> bool:
        """Whether a token's text contains a line break."""
        return "\n" in self.decode([token_id])

    def _probe_line_end(self) -> int | None:
        """Return the token of a line break; None if the tokenizer has none or drops line breaks."""
        ids = self.encode(["\n"])[0]
        return ids[0] if len(ids) == 1 and ids[0] != self.unknown_id and self.ends_line(ids[0]) else None

    def _find_gap(self, rows: int | None) -> Gap:
        if self.mask_id is not None:
            return Gap((self.mask_id,))
        for names in SENTINELS:
            gap, end = (self._id_of(name) for name in names)
            if gap is None or end is None:
                continue
            if rows is None or max(gap, end) < rows:
                return Gap((gap,), (gap,), end)
        return Gap()

    def _id_of(self, name: str) -> int | None:
        """Return the id of a token; None if there is none, for which tokenizers give the unknown token's id."""
        found = self._tokenizer.convert_tokens_to_ids(name)
        return found if isinstance(found, int) and self._tokenizer.convert_ids_to_tokens(found) == name else None

    def _probe_specials(self) -> tuple[Ids, Ids, int]:
        bare = self.encode(["a"])[0]
        whole = self._tokenizer("a", verbose=False)
        ids = list(whole["input_ids"])
        at = next((i for i in range(len(ids) - len(bare) + 1) if ids[i : i + len(bare)] == bare), None)
        if at is None:
            raise BackboneError(f"the tokenizer gives {ids} with special tokens and {bare} without; it cannot be used")
        segments = whole.get("token_type_ids", [0])
        return tuple(ids[:at]), tuple(ids[at + len(bare) :]), int(segments[min(at, len(segments) - 1)])


def kind_of(config: object, *, has_mask: bool) -> Kind:
    """Return what kind of language model it is, by its config; raises BackboneError if it is none."""
    from transformers.models.auto import modeling_auto

    model_type = str(getattr(config, "model_type", ""))
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    masked = modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    two_sided = modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    own = getattr(config, "auto_map", None) or {}  # of a model with code of its own
    if getattr(config, "is_encoder_decoder", False):
        if model_type not in two_sided and "AutoModelForSeq2SeqLM" not in own:
            raise BackboneError(
                f"model type '{model_type}' has an encoder and a decoder, and no language-model head for text in "
                "transformers; use a causal, a masked or another encoder-decoder language model"
            )
        return "encoder-decoder"
    forward: Kind = "permuted" if has_mask and _is_permuted(model_type) else "causal"
    heads: dict[str, Kind] = {str(causal.get(model_type)): forward, str(masked.get(model_type)): "masked"}
    for architecture in getattr(config, "architectures", None) or []:
        if architecture in heads:
            return heads[architecture]
    # No known head is named. The family decides; if it has both heads (BERT), the mask token does.
    if model_type in masked and (has_mask or model_type not in causal):
        return "masked"
    if model_type in causal or "AutoModelForCausalLM" in own:
        return forward
    if "AutoModelForMaskedLM" in own:
        return "masked"
    raise BackboneError(
        f"model type '{model_type}' has neither a causal nor a masked language-model head in transformers"
    )


def _encoded(tokenizer: PreTrainedTokenizerBase, texts: list[str], *, split_special_tokens: bool) -> BatchEncoding:
    """Encode texts without special tokens around them; a RecordError for one that holds half a character."""
    try:
        found: BatchEncoding = tokenizer(texts, split_special_tokens=split_special_tokens, **BARE)
    except TypeError:
        for text in texts:
            check_text(text, where="the tokenizer", what=f"the text {shown(text)}")
        raise
    return found


def _embedded(token: int | None, rows: int | None) -> int | None:
    """Return a token that a model can embed; None for one that was added to the tokenizer alone."""
    return None if token is None or (rows is not None and token >= rows) else token


def _unknown_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the token of text that has no other. One that only the vocabulary itself knows of is written as well."""
    found: int | None = tokenizer.unk_token_id
    if found is None and tokenizer.is_fast:
        named = getattr(tokenizer.backend_tokenizer.model, "unk_token", None)
        found = None if named is None else tokenizer.backend_tokenizer.token_to_id(named)
    return found


def _is_permuted(model_type: str) -> bool:
    import transformers
    from transformers.models.auto import modeling_auto

    if model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return False
    head = getattr(transformers, str(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)), None)
    accepted = inspect.signature(head.forward).parameters if head is not None else {}
    return "perm_mask" in accepted and "target_mapping" in accepted


def decoder_start(config: object, generation: object) -> Ids:
    """Return the ids that a decoder reads before it writes: its start token, and its forced first token, if any.
    The generation config comes first. Raises BackboneError if an encoder-decoder model names no start token.
    """
    if not getattr(config, "is_encoder_decoder", False):
        return ()

    def named(name: str) -> int | None:
        value = getattr(generation, name, None)
        value = getattr(config, name, None) if value is None else value
        return None if value is None else int(value)

    start = named("decoder_start_token_id")
    start = named("bos_token_id") if start is None else start
    if start is None:
        raise BackboneError(
            "its config has no decoder_start_token_id, which a decoder starts with; add it to config.json"
        )
    forced = named("forced_bos_token_id")
    return (start,) if forced is None else (start, forced)


def text_ends(config: object, generation: object) -> Ids:
    """Return the ids that end what a model writes: one or several of the generation config, else of the config.
    Raises BackboneError if they are none.
    """
    for source in (generation, config):
        ends = getattr(source, "eos_token_id", None)
        if ends is not None:
            listed = tuple(ends) if isinstance(ends, list | tuple) else (ends,)
            if not all(isinstance(one, int) for one in listed):
                raise BackboneError(
                    f"its eos_token_id is {shown(ends)}, and must be a token's number, or a list of them"
                )
            return listed
    return ()


def longest_row(config: PretrainedConfig) -> int:
    """Return the longest row that a model takes, on either side if it has two."""
    names = ["max_seq_len", *(f"max_{side}position_embeddings" for side in ("", "encoder_", "decoder_"))]
    found = [getattr(source, name, None) for source in (config, config.get_text_config()) for name in names]
    return min((int(value) for value in found if value and value > 0), default=UNBOUNDED_TOKENS)  # XLNet says -1


def original_lengths(config: PretrainedConfig) -> list[int]:
    """Return the lengths of rows that positions were first made for, as a config names them, the smallest first."""
    return sorted(set(_named(config.to_dict(), "original_max_position_embeddings")))


def _named(value: object, name: str) -> Iterator[int]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == name and isinstance(inner, int):
                yield inner
            yield from _named(inner, name)
