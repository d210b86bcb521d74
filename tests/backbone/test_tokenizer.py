"""Real kinds of tokenizers, trained on the spot: the rules of docs/templates.md hold on all of them."""

import functools
import json
import re
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from ptuning.backbone.tokenizer import TextTokenizer, decoder_start, kind_of
from ptuning.errors import BackboneError
from ptuning.template.encode import TokenizedTemplate
from ptuning.template.language import Template
from ptuning.template.segments import Gap, Kind, MarkedText
from tests.conftest import CONTEXT, CORPUS, make_tokenizer
from tests.families import tokenizer_of, unigram

# name -> (a model's kind, whether a text begins with a mark of its own, whether there is a padding token)
TOKENIZERS: dict[str, tuple[Kind, bool, bool]] = {
    "byte-level": ("causal", False, False),
    "byte-level-bos": ("causal", False, False),
    "word-piece": ("masked", False, True),
    "unigram-dummy-prefix": ("causal", True, True),
    "unigram-first-only": ("causal", True, True),
    "unigram-no-prefix": ("causal", False, True),
    "unigram-masks": ("permuted", True, True),
}
FACTS = [
    {"x": "Kenya", "y": "Nairobi"},
    {"x": "France and Peru", "y": "yes"},
    {"x": "the movie", "y": "a good film"},
    {"x": "25 of 37", "y": "1999"},
]
every_tokenizer = pytest.mark.parametrize("name", TOKENIZERS)


@functools.cache
def trained(name: str) -> PreTrainedTokenizerFast:
    """Train a tokenizer of a kind."""
    conftest = {"byte-level": "gpt2", "byte-level-bos": "llama", "word-piece": "bert"}
    if name in conftest:
        return make_tokenizer(conftest[name])
    if name == "unigram-masks":
        return tokenizer_of("xlnet")
    scheme = {"unigram-dummy-prefix": "always", "unigram-first-only": "first", "unigram-no-prefix": "never"}[name]
    return unigram(
        ["<unk>", "<s>", "</s>", "<pad>"],
        single="<s> $A",
        scheme=scheme,
        by_word=False,
        unk_token="<unk>",
        bos_token="<s>",
    )


@functools.cache
def own(name: str) -> TextTokenizer:
    return TextTokenizer(trained(name), max_tokens=CONTEXT)


def bind(name: str, pattern: str) -> TokenizedTemplate:
    return TokenizedTemplate(Template.parse(pattern), tokenizer=own(name), kind=TOKENIZERS[name][0])


def row_with_target(name: str, pattern: str, record: dict[str, str]) -> tuple[list[int], tuple[int, ...]]:
    """A filled row with its target in it, and the target's ids."""
    example = bind(name, pattern).examples([record])[0]
    ids = list(example.token_ids)
    if TOKENIZERS[name][0] == "causal":
        return [*ids, example.target_ids[-1]], example.target_ids
    for position, token in zip(example.logit_positions, example.target_ids, strict=True):
        ids[position] = token
    return ids, example.target_ids


@every_tokenizer
def test_a_tokenizer_is_the_kind_it_is_called(name: str) -> None:
    """Without this, the tests below might all look at the same rule."""
    _, marked, padded = TOKENIZERS[name]
    raw = trained(name)
    first = raw.convert_ids_to_tokens(own(name).encode(["Kenya"])[0])[0]
    assert first.startswith("▁") == marked
    assert (raw.pad_token_id is not None) == padded


@every_tokenizer
@pytest.mark.parametrize("pattern", ["The capital of [X] is [Y]", "[X] is [Y]", "question: {x!}? answer: [Y]"])
def test_without_slots_the_ids_are_those_of_the_filled_sentence(name: str, pattern: str) -> None:
    """The ids are the tokenizer's own: special tokens come once, where the tokenizer puts them."""
    for record in FACTS:
        sentence = pattern.replace("[X]", record["x"]).replace("{x!}", record["x"]).replace("[Y]", record["y"])
        assert row_with_target(name, pattern, record)[0] == list(trained(name)(sentence)["input_ids"])


@every_tokenizer
def test_the_targets_ids_are_those_it_has_in_the_sentence(name: str) -> None:
    """Scored are the ids that the target has in the sentence, with the space in front of it."""
    raw = trained(name)
    for record in FACTS:
        whole = list(raw("the answer is " + record["y"], add_special_tokens=False)["input_ids"])
        target = row_with_target(name, "the answer is [Y]", record)[1]
        assert tuple(whole[-len(target) :]) == target
        assert str(raw.decode(list(target))).strip() == record["y"]


@every_tokenizer
def test_a_space_belongs_to_what_follows_it(name: str) -> None:
    """Words as slots start at the tokens that they have in the sentence, and the text behind slots keeps its space."""
    filled = bind(name, "[P:The capital of] [X] [P:is] [Y]")
    starts = [token for token in filled.slot_start_ids if token is not None]
    example = filled.examples(FACTS[:1])[0]
    spoken = list(example.token_ids)
    for position, token in zip(example.slot_positions, starts, strict=True):
        spoken[position] = token
    plain = bind(name, "The capital of [X] is [Y]").examples(FACTS[:1])[0]
    assert (tuple(spoken), example.target_ids) == (plain.token_ids, plain.target_ids)


@every_tokenizer
def test_special_text_in_a_record_is_text(name: str) -> None:
    """Text in a record is never a special token, and the template's own special tokens are special
    (docs/decisions.md, decision 8). A unigram vocabulary finds them in any text: there they are spelled out.
    """
    raw, tokenizer = trained(name), own(name)
    special = next(token for token in (raw.eos_token, raw.sep_token) if token)
    ids = bind(name, f"a{special.replace('[', '[[')} [X] is [Y]").contexts([{"x": f"b {special}"}])[0].token_ids
    inside = ids[len(tokenizer.prefix_ids) : len(ids) - len(tokenizer.suffix_ids)]
    assert list(inside).count(tokenizer.special_ids[special]) == 1


# --- The markup of chat models, on tokenizers with the normaliser, pre-tokenizer and flags of the real ones ---


@dataclass(frozen=True)
class Chat:
    """A chat format: its template, and the tokenizer of the model that it was made for.

    Args:
        pattern: The template, one turn for the model, the target behind it.
        spaces: How the tokenizer takes spaces: ``bytes`` (byte-level BPE), ``first`` (SentencePiece's mark in front of
            a text only, as transformers 5 loads LLaMA 2), ``prepend`` (the same as a normaliser, as its files have it)
            or ``replace`` (no mark in front, as Gemma).
        specials: Added tokens, of which ``plain`` ones are not called special.
        rstrip: Those that drop the white space behind them.
        begins: What the tokenizer puts in front of a text.
    """

    pattern: str
    spaces: str
    specials: tuple[str, ...]
    plain: tuple[str, ...] = ()
    rstrip: tuple[str, ...] = ()
    begins: str = "<s>"


LLAMA = ("<unk>", "<s>", "</s>")
PHI = ("<|user|>", "<|assistant|>", "<|end|>")
CHATS = {
    "llama-2": Chat("<s>[[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n[X] [[/INST] [Y]", "first", LLAMA),
    "zephyr": Chat("<|system|>\nBe brief.</s>\n<|user|>\n[X]</s>\n<|assistant|>\n[Y]", "first", LLAMA),
    "tinyllama": Chat("<|system|>\nBe brief.</s>\n<|user|>\n[X]</s>\n<|assistant|>\n[Y]", "prepend", LLAMA),
    "mistral": Chat("<s>[[INST] [X][[/INST] [Y]", "first", (*LLAMA, "[INST]", "[/INST]")),
    "phi-3": Chat("<|user|>\n[X]<|end|>\n<|assistant|>\n[Y]", "prepend", (*LLAMA, *PHI), rstrip=(*PHI, "</s>")),
    "gemma": Chat(
        "<bos><start_of_turn>user\n[X]<end_of_turn>\n<start_of_turn>model\n[Y]",
        "replace",
        ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
        plain=("\n\n", "\u2581\u2581"),
        begins="<bos>",
    ),
    "chatml": Chat(
        "<|im_start|>user\n[X]<|im_end|>\n<|im_start|>assistant\n[Y]",
        "bytes",
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        begins="",
    ),
    "llama-3": Chat(
        "<|start_header_id|>user<|end_header_id|>\n\n[X]<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n[Y]",
        "bytes",
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        begins="<|begin_of_text|>",
    ),
    "deepseek": Chat(
        "<begin>You are brief.<User>[X]<Assistant> [Y]",
        "bytes",
        ("<begin>",),
        ("<User>", "<Assistant>"),
        begins="<begin>",
    ),
}
every_chat = pytest.mark.parametrize("name", CHATS)
# Spaces and line breaks beside the markup, and several in a row.
ASKED = [{"x": "Kenya", "y": "Nairobi"}, {"x": " the film\n\nof  1999 ", "y": "São Tomé"}, {"x": "", "y": "a\nb"}]


@functools.cache
def chat_tokenizer(name: str) -> PreTrainedTokenizerFast:
    chat = CHATS[name]
    raw = Tokenizer(
        models.BPE(unk_token="<unk>" if "<unk>" in chat.specials else None, byte_fallback=chat.spaces != "bytes")
    )
    known: list[str] = []
    if chat.spaces == "bytes":
        raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        known = pre_tokenizers.ByteLevel.alphabet()
    elif chat.spaces == "first":
        raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    elif chat.spaces == "prepend":
        raw.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    else:
        raw.normalizer = normalizers.Replace(" ", "\u2581")
        raw.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    if chat.spaces != "bytes":
        raw.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    marks = [] if chat.spaces == "bytes" else [f"<0x{byte:02X}>" for byte in range(256)]
    # SentencePiece learns from words, so that no token spans two.
    lines = [word for line in CORPUS for word in (re.findall(r" ?\w+|[^\w\s]", line))]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=[*chat.specials, *marks], initial_alphabet=known, show_progress=False
    )
    raw.train_from_iterator(lines, trainer)
    if chat.begins:
        put = (chat.begins, raw.token_to_id(chat.begins))
        raw.post_processor = processors.TemplateProcessing(single=f"{chat.begins} $A", special_tokens=[put])
    # A token that is added again gets its flags. Bytes are pieces of the vocabulary like others.
    found = Tokenizer.from_str(_without_added_tokens(raw))
    flags = {
        token: AddedToken(token, special=token in chat.specials, normalized=False, rstrip=token in chat.rstrip)
        for token in (*chat.specials, *chat.plain)
    }
    found.add_special_tokens([flags[token] for token in chat.specials])
    found.add_tokens([flags[token] for token in chat.plain])
    return PreTrainedTokenizerFast(tokenizer_object=found, bos_token=chat.begins or None)


@functools.cache
def chat_own(name: str) -> TextTokenizer:
    return TextTokenizer(chat_tokenizer(name), max_tokens=500)


def _without_added_tokens(raw: Tokenizer) -> str:
    return json.dumps({**json.loads(raw.to_str()), "added_tokens": []})


def chat_row(name: str, record: dict[str, str], pattern: str | None = None) -> tuple[list[int], TokenizedTemplate]:
    """A row with its target, as a causal model is taught it."""
    bound = TokenizedTemplate(Template.parse(pattern or CHATS[name].pattern), tokenizer=chat_own(name), kind="causal")
    example = bound.examples([record])[0]
    return [*example.token_ids, *example.target_ids[-1:]], bound


def said(name: str, record: dict[str, str]) -> str:
    """The text of a chat, filled by hand."""
    return CHATS[name].pattern.replace("[[", "[").replace("[X]", record["x"]).replace("[Y]", record["y"])


@every_chat
def test_the_markup_of_a_chat_has_the_tokenizers_own_ids(name: str) -> None:
    """With the white space that special tokens drop, and without a mark of a text's beginning behind one. What the
    tokenizer puts in front stands there once, whether the template writes it or not, as in a chat template.
    """
    raw = chat_tokenizer(name)
    for record in ASKED:
        text = said(name, record)
        written = bool(CHATS[name].begins) and text.startswith(CHATS[name].begins)
        ids = list(raw(text, add_special_tokens=not written)["input_ids"])
        assert chat_row(name, record)[0] == ids
        assert not CHATS[name].begins or ids.count(raw.convert_tokens_to_ids(CHATS[name].begins)) == 1
        named = [part for part, token in chat_row(name, record)[1].describe(record) if token in raw.all_special_ids]
        assert set(named) <= {"special"}


@every_chat
@settings(max_examples=25)
@given(data=st.data())
def test_any_markup_has_the_tokenizers_own_ids(name: str, data: st.DataObject) -> None:
    """Special tokens anywhere among words, line breaks and fields, and beside the target."""
    raw, chat = chat_tokenizer(name), CHATS[name]
    pieces = data.draw(
        st.lists(
            st.sampled_from([*chat.specials, *chat.plain, "[X]", " ", "\n", "\n\n", "Kenya", " is", "."]), max_size=9
        )
    )
    record = {"x": data.draw(st.sampled_from(["", "Kenya", " the film", "a\n", "\n\nb ", "1999"])), "y": "Nairobi"}
    text = "".join(record["x"] if piece == "[X]" else piece for piece in ("it", *pieces)) + record["y"]
    pattern = "".join(piece if piece == "[X]" else piece.replace("[", "[[") for piece in ("it", *pieces)) + "[Y]"
    assert chat_row(name, record, pattern)[0] == list(raw(text)["input_ids"])


@every_chat
def test_slots_in_a_chat_start_as_the_words_they_stand_for(name: str) -> None:
    """Invariant *Identity*: behind markup, too."""
    pattern = CHATS[name].pattern
    words = pattern.replace("[X]", "The capital of [X]")
    learned = pattern.replace("[X]", "[P:The capital of] [X]")
    for record in ASKED:
        plain, _ = chat_row(name, record, words)
        spoken, bound = chat_row(name, record, learned)
        positions = bound.examples([record])[0].slot_positions
        for position, start in zip(positions, bound.slot_start_ids, strict=True):
            assert start is not None
            spoken[position] = start
        assert spoken == plain


@every_chat
def test_a_record_writes_no_markup_of_a_chat(name: str) -> None:
    """Whatever it holds, the special tokens of a row are those of the template; its text is all there."""
    raw, chat = chat_tokenizer(name), CHATS[name]
    hostile = f"no {' '.join(chat.specials)}\n{''.join(chat.specials)} yes"
    row, _ = chat_row(name, {"x": hostile, "y": "Nairobi"})
    harmless, _ = chat_row(name, {"x": "no", "y": "Nairobi"})
    specials = {raw.convert_tokens_to_ids(token) for token in chat.specials}
    assert [token for token in row if token in specials] == [token for token in harmless if token in specials]
    assert "".join(hostile.split()) in "".join(str(raw.decode(row)).split())


def test_the_other_flags_of_added_tokens_hold() -> None:
    """A token that takes white space on its left, and one that stands between spaces only."""
    raw = make_tokenizer("llama")
    flags = {"<left>": {"lstrip": True}, "<word>": {"single_word": True}}
    raw.add_special_tokens({"extra_special_tokens": [AddedToken(name, **given) for name, given in flags.items()]})
    tokenizer = TextTokenizer(raw, max_tokens=99)
    for pattern in ("it <left> [X]<left>\n <left>is [Y]", "<word> it <word>[X] and<word> <word> [Y]"):
        bound = TokenizedTemplate(Template.parse(pattern), tokenizer=tokenizer, kind="causal")
        example = bound.examples([{"x": "Kenya", "y": "yes"}])[0]
        text = pattern.replace("[X]", "Kenya").replace("[Y]", "yes")
        assert [*example.token_ids, *example.target_ids[-1:]] == list(raw(text)["input_ids"])


def test_a_tokenizer_without_offsets_keeps_markup_and_text_apart() -> None:
    """One that is written in Python says of no token where it stands."""
    raw = ByT5Tokenizer()
    tokenizer = TextTokenizer(raw, max_tokens=99)
    assert not raw.is_fast
    mark = "<extra_id_3>"
    text = MarkedText(f"a{mark}b", ((0, 14),)) + MarkedText(f"{mark}b") + MarkedText(mark, ((0, 12),))
    letters, a, b = tokenizer.encode([mark, "a", "b"])
    special = [tokenizer.special_ids[mark]]
    assert tokenizer.encode_markup([text]) == [[*a, *special, *b, *letters, *b, *special]]


def test_gaps_are_asked_of_the_tokenizer() -> None:
    """A mask where there is one, else the first two sentinels, with a space's mark or without, else nothing."""
    mask = own("word-piece").mask_id
    assert mask is not None
    assert own("word-piece").gap == Gap((mask,))
    for kind, mark in (("t5", ""), ("mt5", "▁")):
        raw = tokenizer_of(kind)
        first, second = (raw.get_vocab()[f"{mark}<extra_id_{number}>"] for number in (0, 1))
        assert TextTokenizer(raw, max_tokens=9).gap == Gap((first,), (first,), second)
        # Sentinels that the model never embedded cannot be used.
        assert TextTokenizer(raw, max_tokens=9, rows=second).gap == Gap()
    assert own("byte-level").gap == Gap()


class Named:
    """A config with some names."""

    is_encoder_decoder = True

    def __init__(self, **names: object) -> None:
        vars(self).update(names)


def test_what_a_decoder_starts_with() -> None:
    """Its start token and a token it is forced to write, of the generation config before the model's; else its BOS."""
    assert decoder_start(Named(decoder_start_token_id=2), None) == (2,)
    assert decoder_start(Named(decoder_start_token_id=2), Named(decoder_start_token_id=3)) == (3,)
    assert decoder_start(Named(bos_token_id=5), Named(forced_bos_token_id=7)) == (5, 7)
    assert decoder_start(Named(is_encoder_decoder=False), None) == ()
    with pytest.raises(BackboneError, match=r"has no decoder_start_token_id.*add it to config.json"):
        decoder_start(Named(), Named())


def test_kinds() -> None:
    """By what the config names; a family with both heads and nothing named by its mask token."""
    named = functools.partial(Named, is_encoder_decoder=False)
    assert kind_of(named(model_type="llama"), has_mask=False) == "causal"
    assert kind_of(named(model_type="bert"), has_mask=True) == "masked"
    assert kind_of(named(model_type="bert", architectures=["BertLMHeadModel"]), has_mask=True) == "causal"
    assert kind_of(named(model_type="xlnet"), has_mask=True) == "permuted"
    assert kind_of(named(model_type="xlnet"), has_mask=False) == "causal"
    assert kind_of(Named(model_type="t5"), has_mask=False) == "encoder-decoder"
    with pytest.raises(BackboneError, match="model type 'vit' has neither"):
        kind_of(named(model_type="vit"), has_mask=False)


def test_the_unknown_token_of_the_vocabulary_itself_counts_where_none_is_named() -> None:
    raw = tokenizer_of("bert")
    bare = PreTrainedTokenizerFast(tokenizer_object=raw.backend_tokenizer, model_max_length=64)
    assert bare.unk_token_id is None
    assert TextTokenizer(bare, max_tokens=64).unknown_id == raw.unk_token_id
    assert TextTokenizer(tokenizer_of("gpt2"), max_tokens=64).unknown_id == tokenizer_of("gpt2").unk_token_id


def test_reserved_tokens_are_those_without_a_use() -> None:
    """Not the ends of texts, nor what the chat template writes; those that say so come first."""
    made = make_tokenizer("llama")
    made.add_special_tokens({"extra_special_tokens": ["<|turn|>", "<file>", "<unused7>"]})
    made.chat_template = "{% for message in messages %}<|turn|>{{ message.content }}{% endfor %}"
    names = list(TextTokenizer(made, max_tokens=64).reserved_ids.values())
    assert names == ["<unused7>", "<file>"]
    assert list(TextTokenizer(made, max_tokens=64, rows=len(made) - 1).reserved_ids.values()) == ["<file>"]


def test_read_is_what_the_tokenizer_itself_gives() -> None:
    made = make_tokenizer("llama")
    tokenizer = TextTokenizer(made, max_tokens=64)
    text = "Kenya</s> is"
    assert tokenizer.read(text) == made(text)["input_ids"]
    assert tokenizer.read(text, add_special_tokens=False) == made(text, add_special_tokens=False)["input_ids"]
    assert made.eos_token_id in tokenizer.read(text)
