"""Label words: how they are written, what is wrong with them, and their ids as they stand in a sentence."""

from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerFast

from ptuning.backbone.tokenizer import TextTokenizer
from ptuning.errors import LabelWordError, RecordError
from ptuning.records import Records
from ptuning.template.encode import TokenizedTemplate
from ptuning.template.labels import LabelWords
from ptuning.template.language import Template

WORDS = LabelWords({"positive": ("great", "good"), "negative": ("terrible",)})
Bind = Callable[[str], TokenizedTemplate]


@pytest.fixture
def bind(raw_tokenizer: Callable[[str], PreTrainedTokenizerFast]) -> Bind:
    def get(family: str) -> TokenizedTemplate:
        tokenizer = TextTokenizer(raw_tokenizer(family), max_tokens=64)
        return TokenizedTemplate(
            Template.parse("{text} [P] It was [Y]."),
            tokenizer=tokenizer,
            kind="causal" if tokenizer.mask_id is None else "masked",
        )

    return get


@pytest.mark.parametrize(
    "text",
    [
        "positive=great,good;negative=terrible",
        " positive = great , good ; negative = terrible ; ",
        ";positive=great,good;;negative=terrible",
    ],
)
def test_label_words_are_read(text: str) -> None:
    words = LabelWords.parse(text)
    assert words == WORDS
    assert words.labels == ("positive", "negative")
    assert words.flat == ((0, "great"), (0, "good"), (1, "terrible"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"label words need at least two labels, with ';' between them, as in \"positive=great,good;negative="),
        ("positive=great", "label words need at least two labels"),
        ("good,bad", "label words need at least two labels, with ';' between them"),
        ("good; good ", "label 'good' is given twice in the label words"),
        ("a=great;b=bad;a=good", "label 'a' is given twice in the label words"),
        ("a=great;b=", "label 'b' has no name, no word or an empty one; write"),
        ("a=great,;b=bad", "label 'a' has no name, no word or an empty one"),
        ("=great;b=bad", "label '' has no name, no word or an empty one"),
        ("a=great,good;b=bad,good", "the word 'good' is given twice, for 'a' and 'b'"),
    ],
)
def test_what_is_wrong_with_label_words_is_said(text: str, message: str) -> None:
    with pytest.raises(LabelWordError, match=message):
        LabelWords.parse(text)


@pytest.mark.parametrize(
    "labels",
    [
        {"a": "yes", "b": "no"},
        {"a": ["yes"], "b": ("no",)},
        {" a ": " yes ", "b": ["no\n"]},
        "a=yes;b=no",
        LabelWords({"a": ("yes",), "b": ("no",)}),
    ],
)
def test_label_words_are_given_as_a_mapping_or_a_text(labels: object) -> None:
    """A text is one word, not its letters; the template brings the space in front of a word."""
    found = LabelWords.of(labels)  # type: ignore[arg-type]
    assert found.words == {"a": ("yes",), "b": ("no",)}
    assert found.flat == ((0, "yes"), (1, "no"))
    assert LabelWords.of(found) is found


@pytest.mark.parametrize("labels", ["billing; very late", ["billing", "very late"], ("billing ", "very late")])
def test_labels_without_words_are_their_own_words(labels: str | list[str] | tuple[str, ...]) -> None:
    assert LabelWords.of(labels).words == {"billing": ("billing",), "very late": ("very late",)}
    assert LabelWords.parse("billing;bad=poor,worse").words == {"billing": ("billing",), "bad": ("poor", "worse")}
    with pytest.raises(LabelWordError, match="label 'a' is given twice"):
        LabelWords.of(["a", "b", "a"])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (7, r'label words are a mapping or a text such as "positive=.*", not 7'),
        ([("a", "yes"), ("b", "no")], "label words are a mapping or a text"),
        ({"a": 1, "b": "no"}, "label 'a' has 1; its name is a text, and its words a text or a list of texts"),
        ({"a": ["yes", None], "b": "no"}, r"label 'a' has \['yes', None\]; its name"),
        ({"a": {"yes": 1}, "b": "no"}, r"label 'a' has \{'yes': 1\}; its name"),
        ({1: "yes", 0: "no"}, "label 1 has 'yes'; its name is a text"),
        ({"a": b"yes", "b": "no"}, "label 'a' has b'yes'"),
        ({"a": "yes", "a ": "no"}, "of the labels 'a', 'a ' two have the same name"),
        ({"a": "y\ud800", "b": "no"}, r"label words: label 'a' holds half a character \(a lone surrogate\); write it"),
        ({"a\ud800": "y", "b": "no"}, r"label words: label 'a\\ud800' holds half a character"),
    ],
)
def test_what_is_not_label_words_is_said(labels: object, message: str) -> None:
    with pytest.raises(LabelWordError, match=message):
        LabelWords.of(labels)  # type: ignore[arg-type]


def test_a_records_label_is_known_by_its_name() -> None:
    """Answers are keyed by name, never by position: files of one task may put their labels in another order."""
    assert WORDS.label_of({"y": "negative"}, where="here") == 1
    WORDS.check_records(Records([{"y": "negative"}, {"y": "positive"}]))
    with pytest.raises(RecordError, match=r"a.jsonl, record 2: 'postive' .*'positive'.*alias_label"):
        WORDS.check_records(Records([{"y": "negative"}, {"y": "postive"}], name="a.jsonl"))
    many = Records([{"y": "negative"}, *({"y": f"odd {at}"} for at in range(8))], name="a.jsonl")
    with pytest.raises(RecordError, match=r"record 2: 'odd 0' .* Neither is a.jsonl, record 3: 'odd 1'; .*; 8 rows in"):
        WORDS.check_records(many)
    with pytest.raises(RecordError, match="here: '' is not one of the labels"):
        WORDS.label_of({}, where="here")


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "roberta"])
def test_the_ids_of_words_are_those_in_the_filled_sentence(
    bind: Bind, raw_tokenizer: Callable[[str], PreTrainedTokenizerFast], family: str
) -> None:
    """ " great" and "great" are different tokens; shown and scored is the one that stands in the sentence."""
    raw, bound = raw_tokenizer(family), bind(family)
    lines = WORDS.check_known(WORDS.examples(bound, {"text": "A film."}))
    in_sentence = [
        raw(f"It was {word}", add_special_tokens=False)["input_ids"] for word in ("great", "good", "terrible")
    ]
    before = len(raw("It was", add_special_tokens=False)["input_ids"])
    assert lines == [
        f"{label}: '{word}' {ids[before:]}"
        for label, word, ids in zip(
            ["positive", "positive", "negative"], ["great", "good", "terrible"], in_sentence, strict=True
        )
    ]
    if family != "bert":
        assert in_sentence[0][before:] != raw("great", add_special_tokens=False)["input_ids"]
    examples = WORDS.examples(bound, {"text": "A film."})
    assert [list(example.target_ids) for example in examples] == [ids[before:] for ids in in_sentence]


def test_words_of_two_labels_with_the_same_ids_collide(bind: Bind) -> None:
    """BERT reads two spaces as one, so that these words cannot be told apart; of one label they may be equal."""
    words = LabelWords({"a": ("a film",), "b": ("a  film",)})
    with pytest.raises(
        LabelWordError, match=r"the words 'a film' and 'a  film' of the labels 'a' and 'b' have the same to"
    ):
        words.check_known(words.examples(bind("bert"), {"text": "x"}))
    same = LabelWords({"a": ("a film", "a  film"), "b": ("yes",)})
    assert len(same.check_known(same.examples(bind("bert"), {"text": "x"}))) == 3
    assert len(words.check_known(words.examples(bind("gpt2"), {"text": "x"}))) == 2


def test_a_word_that_the_tokenizer_does_not_know_is_refused(bind: Bind) -> None:
    """Any two such words would be the same token."""
    words = LabelWords({"a": ("great",), "b": ("東京",)})
    with pytest.raises(
        LabelWordError, match=r"the word '東京' of label 'b' is unknown to the tokenizer \(ids \[1, 1\]\)"
    ):
        words.check_known(words.examples(bind("bert"), {"text": "x"}))
    assert len(words.check_known(words.examples(bind("gpt2"), {"text": "x"}))) == 2
