"""Texts that begin alike are tokenised in parts, with the ids of whole texts."""

import functools
from collections.abc import Sequence
from unittest.mock import Mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptuning.backbone.tokenizer import TextTokenizer
from ptuning.template.shared_prefix import encode_shared_prefix, has_words_apart
from tests.conftest import CONTEXT, CORPUS
from tests.families import tokenizer_of, unigram

TOKENIZERS = ("gpt2", "llama", "bert", "roberta", "t5", "mt5", "xlnet")
every_tokenizer = pytest.mark.parametrize("name", [*TOKENIZERS, "whole-text"])
LONG = " ".join(CORPUS[:7])
ENDS = ["Paris", "Mexico", "Mexico City", "São Tomé", "25", "a", "", "?! ...", "\n\nno", "1234567890 and 25", "ﬁlm"]


@functools.cache
def tokenizer_named(name: str) -> TextTokenizer:
    """Return a family's tokenizer, or one that does not split text at spaces."""
    if name != "whole-text":
        return TextTokenizer(tokenizer_of(name), max_tokens=CONTEXT)
    marks = ["<unk>", "<s>", "</s>", "<pad>"]
    raw = unigram(marks, single="<s> $A", scheme="first", by_word=False, unk_token="<unk>", bos_token="<s>")
    return TextTokenizer(raw, max_tokens=CONTEXT)


def plain(tokenizer: TextTokenizer, texts: Sequence[str]) -> list[list[int]]:
    return [tokenizer.encode([text])[0] for text in texts]


@every_tokenizer
@settings(max_examples=25)
@given(data=st.data())
def test_ids_are_those_of_whole_texts(name: str, data: st.DataObject) -> None:
    """For any beginning that texts share, and anything behind it."""
    letters = st.text(alphabet=st.sampled_from("ab é́9_-.'\n\tĠ▁中ن<s>"), max_size=12)
    tokenizer = tokenizer_named(name)
    middle = data.draw(letters)
    texts = [LONG + middle + end for end in data.draw(st.lists(letters, min_size=4, max_size=8))]
    assert tokenizer.encode(texts) == plain(tokenizer, texts)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_shared_beginning_is_tokenised_once(name: str) -> None:
    """However many texts begin with it; and the order of texts, and equal ones, stay."""
    tokenizer = tokenizer_named(name)
    texts = [f"{LONG} The capital is {end}" for end in (*ENDS, *map(str, range(100)))]
    texts = [*texts, "short", texts[0], "another text, as long as the others are, which begins in a way of its own"]
    assert has_words_apart(tokenizer_of(name).get_vocab())
    encode = Mock(side_effect=tokenizer._encode)
    assert encode_shared_prefix(encode, texts) == plain(tokenizer, texts)
    read = sum(len(text) for call in encode.call_args_list for text in call.args[0])
    assert read < 4 * len(LONG) + 40 * len(texts) < len(LONG) * len(texts) / 5


def test_a_token_that_reaches_across_words() -> None:
    """Then words are no borders. Marks of spaces alone, and in front of a word, are none of that kind."""
    for apart in (
        ["Ġ", "Ġof", "ĠĠ", "the", "ĊĠĠčĊĠ"],
        ["čevap", "▁če"],
        ["▁of", "▁▁▁", "s"],
        ["##s", "[PAD]", "of"],
        ["'s", ".Ġ", "<extra_id_0>"],
    ):
        assert has_words_apart(apart)
    for across in (["Ġ", "ofĠthe"], ["Ġ", "Ã©Ġa"], ["▁of▁the"], ["▁č▁a"], ["a b"], ["Ġ", "itĠĠis"]):
        assert not has_words_apart(across)


def test_texts_whose_parts_have_other_ids_are_tokenised_whole() -> None:
    """Asked of the first and the last text: here a tokenizer that looks at what stands far behind."""
    texts = [f"{LONG} The capital is {end}" for end in ENDS]

    def by_end(listed: Sequence[str]) -> list[list[int]]:
        return [[len(text), *map(ord, text)] for text in listed]

    assert encode_shared_prefix(by_end, texts) == by_end(texts)


def test_texts_without_words_are_tokenised_whole() -> None:
    texts = ["中" * 100 + end for end in ENDS]
    encode = Mock(side_effect=lambda listed: [[*map(ord, text)] for text in listed])
    assert encode_shared_prefix(encode, texts) == [[*map(ord, text)] for text in texts]
    encode.assert_called_once_with(texts)
