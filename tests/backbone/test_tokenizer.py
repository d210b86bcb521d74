"""Real kinds of tokenizers, trained on the spot: the rules of docs/templates.md hold on all of them."""

from __future__ import annotations

import functools

import pytest
from transformers import PreTrainedTokenizerFast

from ptuning.backbone.tokenizer import TextTokenizer, decoder_start, kind_of
from ptuning.errors import BackboneError
from ptuning.template.fill import BoundTemplate
from ptuning.template.language import Template
from ptuning.template.segments import Gap, Kind
from tests.conftest import CONTEXT, make_tokenizer
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


def bind(name: str, pattern: str) -> BoundTemplate:
    return BoundTemplate(Template.parse(pattern), tokenizer=own(name), kind=TOKENIZERS[name][0])


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
