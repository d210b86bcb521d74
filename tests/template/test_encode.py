"""Filling: the ids are the tokenizer's own on the filled sentence, and only fields without an exclamation mark shrink.

The invariants that tests name are those of docs/invariants.md.
"""

import copy
import logging
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ptuning.backbone.tokenizer import TextTokenizer
from ptuning.errors import RecordError, TemplateError
from ptuning.template.encode import Example, TokenizedTemplate
from ptuning.template.language import Field, Literal, Piece, Slots, Target, Template, TextSlots
from ptuning.template.segments import Kind
from tests.families import tokenizer_of

OTHERS = ("metaspace", "prepend", "breaks")
FAMILIES = ("gpt2", "llama", "bert", "roberta", *OTHERS)
CORPUS = [
    "The capital of Kenya is Nairobi.\n\n",
    "In 1999, the film of Zürich was great; a good one.\n\n",
    "yes or no, it's terrible, is this the answer?\n\n",
] * 9


@dataclass(frozen=True)
class Family:
    """A tokenizer of one kind, and templates bound to it."""

    name: str
    raw: PreTrainedTokenizerFast
    tokenizer: TextTokenizer

    @property
    def kind(self) -> Kind:
        return "masked" if self.name in ("bert", "roberta") else "causal"

    def bind(self, pattern: str | Template, *, max_tokens: int = 10_000, multiline: bool = False) -> TokenizedTemplate:
        """Bind a template to a model that reads ``max_tokens``."""
        tokenizer = copy.copy(self.tokenizer)
        tokenizer.max_tokens = max_tokens
        template = Template.parse(pattern) if isinstance(pattern, str) else pattern
        return TokenizedTemplate(template, tokenizer=tokenizer, kind=self.kind, multiline=multiline)

    def whole(self, text: str) -> list[int]:
        """What the tokenizer itself makes of a sentence, special tokens included."""
        return list(self.raw(text, verbose=False)["input_ids"])

    def around(self, before: str, target: str, behind: str) -> tuple[str, str]:
        """The texts around a target, with something in front of it, and without what a causal model does not see.

        BERT makes one unknown token of a word with unknown letters and all that is glued to it: there is a space then.
        """
        before, behind = f"is {before}", behind if self.kind == "masked" else ""
        if self.name == "bert" and self.raw.unk_token_id in self.whole(before + target + behind):
            return f"{before} ", f" {behind}"
        return before, behind

    def sentence(self, example: Example) -> list[int]:
        """The row with its target in it: at the masks, or behind the last token that a causal model reads."""
        ids = list(example.token_ids)
        if self.kind == "causal":
            return ids + list(example.target_ids[-1:])
        for position, token in zip(example.logit_positions, example.target_ids, strict=True):
            ids[position] = token
        return ids

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """Ids as the tokenizer writes them."""
        return list(self.raw.convert_ids_to_tokens(list(ids)))


def make_other(name: str) -> PreTrainedTokenizerFast:
    """Make a tokenizer that conftest has no model for: SentencePiece's two ways to mark the beginning of a text
    (``metaspace`` as in newer releases, ``prepend`` as LLaMA 2 and Mistral came), and one in which two line breaks at
    the end of a text are one token.
    """
    raw = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=name != "breaks"))
    specials = ["<unk>", "<s>", "</s>"]
    alphabet: list[str] = []
    if name == "breaks":
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        raw.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        specials += [f"<0x{byte:02X}>" for byte in range(256)]
        if name == "metaspace":
            raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        else:
            raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        raw.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    # SentencePiece learns from words and marks, so that no token spans two.
    lines = CORPUS if name == "breaks" else [word for line in CORPUS for word in re.findall(r"\w+|[^\w\s]", line)]
    raw.train_from_iterator(lines, trainer)
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="session")
def families(raw_tokenizer: Callable[[str], PreTrainedTokenizerFast]) -> dict[str, Family]:
    made = {}
    for name in FAMILIES:
        raw = make_other(name) if name in OTHERS else raw_tokenizer(name)
        made[name] = Family(name, raw, TextTokenizer(raw, max_tokens=64))
    return made


@pytest.fixture(scope="session", params=FAMILIES)
def family(request: pytest.FixtureRequest, families: dict[str, Family]) -> Family:
    return families[request.param]


WORDS = st.one_of(
    st.sampled_from(["The", "capital", "of", "Kenya", "is", "Nairobi", "1999", "25", "it's", "Zürich", "São", "U.S."]),
    st.sampled_from(["e.g.", "-5", "a", "ab", "東京", "😀", "can't"]),
    st.text(alphabet="abeKn19é", min_size=1, max_size=5),
)
SPACES = st.sampled_from([" ", " ", " ", "  ", "\n", "\n\n", ", ", ": ", '"', " (", "-", "", "\t"])
TEXTS = st.lists(st.tuples(WORDS, SPACES), max_size=5).map(lambda parts: "".join(map("".join, parts)))
# What may stand between words and a target; letters glued to it are tokenised together with it, whatever one does.
GAPS = st.sampled_from([" ", "  ", "\n", "\n\n", "\n ", "\t", '"', " (", "-", ": "])
PLAIN = st.lists(WORDS, min_size=1, max_size=4).map(" ".join)


def pattern_of(*pieces: Piece) -> Template:
    """A template of pieces; empty literals are left out."""
    return Template(tuple(piece for piece in pieces if piece != Literal("")))


# --- Tokenisation: every id is the one that the tokenizer gives it in the filled sentence ---


@settings(max_examples=25, deadline=None)
@given(before=TEXTS, target=PLAIN, after=TEXTS, as_fields=st.booleans())
def test_a_template_without_slots_has_the_ids_of_the_filled_sentence(
    family: Family, before: str, target: str, after: str, as_fields: bool
) -> None:
    """The ids are the tokenizer's own, whatever the text is made of, as literals or as fields.

    Special tokens come exactly once. Tokenised piece by piece, the sentence would lose spaces between its pieces, or
    have a special token in front of each.
    """
    before, after = family.around(before, target, after)
    if as_fields:
        template = pattern_of(Field("a"), Target(), Field("b"))
    else:
        template = pattern_of(Literal(before), Target(), Literal(after))
    example = family.bind(template).examples([{"a": before, "b": after, "y": target}])[0]
    assert family.sentence(example) == family.whole(before + target + after)


@settings(max_examples=25, deadline=None)
@given(
    before=TEXTS,
    gap=GAPS,
    target=st.sampled_from(["Nairobi", "the capital", "Zürich in 1999", "1999", "Kenya is a", "abé"]),
    behind=st.sampled_from(["", ".", " and on", "\n\nnext", '"']),
)
def test_the_scored_ids_are_those_of_the_target_in_the_filled_sentence(
    family: Family, before: str, gap: str, target: str, behind: str
) -> None:
    """A target may have other ids behind a space (" great") than alone ("great"); scored are those in the sentence.

    The tokenizer's own character offsets are the judge: a token is scored if it covers any of the target, or the
    space in front, which belongs to it.
    """
    before, behind = family.around(before + gap, target, behind)
    example = family.bind(pattern_of(Literal(before), Target(), Literal(behind))).examples([{"y": target}])[0]
    encoded = family.raw(before + target + behind, return_offsets_mapping=True, verbose=False)
    start, end = len(before.removesuffix(" ")), len(before + target)
    covering = [
        token
        for token, (first, last) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        if first < end and last > start
    ]
    assert list(example.target_ids) == covering
    assert example.own_tokens == len(covering)


@pytest.mark.parametrize(
    ("pattern", "target", "scored"),
    [
        ("The capital of Kenya is [Y]", "Nairobi", ["ĠNa", "ir", "obi"]),
        ('The capital is "[Y]', "Nairobi", ["Na", "ir", "obi"]),
        ("In [Y]", "1999", ["Ġ1999"]),
        ("In([Y]", "1999", ["1", "999"]),
        ("capital:\n[Y]", "The", ["The"]),
        ("capital:\n [Y]", "is", ["Ġis"]),
        ("is it[Y]", "'s", ["'s"]),
    ],
)
def test_the_scored_ids_by_hand(families: dict[str, Family], pattern: str, target: str, scored: list[str]) -> None:
    """A space before the target is part of its first token; quotes, brackets and line breaks are not."""
    example = families["gpt2"].bind(pattern).examples([{"y": target}])[0]
    assert families["gpt2"].tokens(example.target_ids) == scored


def test_two_line_breaks_are_not_scored_with_the_target(families: dict[str, Family]) -> None:
    """They are one token at the end of a text and two in front of a word; the context must be the same in training
    and prediction, and the scored ids the target's alone.
    """
    breaks = families["breaks"]
    assert breaks.tokens(breaks.whole("is\n\n")) == ["<s>", "is", "ĊĊ"]
    assert breaks.tokens(breaks.whole("is\n\nThe")) == ["<s>", "is", "Ċ", "Ċ", "The"]
    bound = breaks.bind("is\n\n[Y]")
    example = bound.examples([{"y": "The"}])[0]
    assert breaks.tokens(example.target_ids) == ["The"]
    assert breaks.tokens(example.token_ids) == ["<s>", "is", "Ċ", "Ċ"]
    assert bound.contexts([{}])[0].token_ids == example.token_ids


def test_a_target_grown_together_with_the_text_behind_it_takes_the_whole_token(families: dict[str, Family]) -> None:
    bert = families["bert"]
    assert bert.tokens(bert.whole("is"))[1:-1] == ["is"]
    example = bert.bind("The [Y]s of Kenya").examples([{"y": "i"}])[0]
    assert bert.tokens(example.target_ids) == ["is"]
    assert bert.sentence(example) == bert.whole("The is of Kenya")


@settings(max_examples=25, deadline=None)
@given(
    first=PLAIN, field=PLAIN, second=PLAIN, target=PLAIN, mark=st.sampled_from(["", ".", ",", "?"]), kept=st.booleans()
)
def test_a_warm_template_starts_as_its_manual_template(
    family: Family, first: str, field: str, second: str, target: str, mark: str, kept: bool
) -> None:
    """Invariant *Identity*: before the first step a prompt started from words is the sentence in words.

    With each slot at its start's id, ids and scored positions are those of that sentence. Also for tokenizers that
    mark the beginning of a text.
    """
    space = Literal(" ")
    words: list[Piece] = [TextSlots(first), space, Field("x", kept), space, TextSlots(second), Literal(mark + " ")]
    plain: list[Piece] = [Literal(f"{first} "), Field("x"), Literal(f" {second}{mark} ")]
    record = {"x": field, "y": target}
    learned = family.bind(Template((*words, Target())))
    manual = family.bind(Template((*plain, Target()))).examples([record])[0]
    example = learned.examples([record])[0]
    ids = list(example.token_ids)
    for position, start in zip(example.slot_positions, learned.slot_start_ids, strict=True):
        assert start is not None
        ids[position] = start
    assert ids == list(manual.token_ids)
    assert (example.logit_positions, example.target_ids) == (manual.logit_positions, manual.target_ids)


def test_a_space_belongs_to_the_piece_that_follows_it(families: dict[str, Family]) -> None:
    gpt2 = families["gpt2"]
    example = gpt2.bind("The [P*2] [X] [P:is] [Y]").examples([{"x": "Kenya", "y": "Nairobi"}])[0]
    bound = gpt2.bind("The [P*2] [X] [P:is] [Y]")
    assert gpt2.tokens([start for start in bound.slot_start_ids if start is not None]) == ["Ġis"]
    words = [token for at, token in enumerate(gpt2.tokens(example.token_ids)) if at not in example.slot_positions]
    assert words == ["The", "ĠKe", "ny", "a", "ĠNa", "ir"]
    assert example.slot_positions == (1, 2, 6)
    assert gpt2.tokens(example.target_ids[-1:]) == ["obi"]


@settings(max_examples=25, deadline=None)
@given(
    before=TEXTS,
    gap=GAPS,
    target=st.sampled_from(["Nairobi", "the capital", "Zürich in 1999", "1999", "e.g."]),
    behind=st.sampled_from(["", " ", ".", "\n\n", '" ']),
    after=TEXTS,
    slots=st.booleans(),
)
def test_contexts_are_the_context_part_of_examples(
    family: Family, before: str, gap: str, target: str, behind: str, after: str, slots: bool
) -> None:
    """What a model sees when it predicts is what it saw in training: up to the target, or with masks at its place."""
    before, after = f"is {before}{gap}", f"{behind}{after}" if behind and family.kind == "masked" else ""
    middle: Piece = Slots(2) if slots else Literal(" ")
    bound = family.bind(pattern_of(Field("a"), middle, Field("b"), Target(), Field("c")))
    record = {"a": "The", "b": before, "c": after, "y": target}
    example = bound.examples([record])[0]
    context = bound.contexts([record], target_tokens=example.own_tokens)[0]
    length = len(example.token_ids) - (0 if family.kind == "masked" else example.own_tokens - 1)
    assert context.token_ids == example.token_ids[:length]
    assert context.slot_positions == example.slot_positions
    assert context.target_ids == ()
    if family.kind == "masked":
        assert context.logit_positions == example.logit_positions
    else:
        assert context.logit_positions == example.logit_positions[:1]


def test_each_logit_stands_one_before_the_token_it_scores(family: Family) -> None:
    """Invariant *Loss position = scored position*: a causal model's logit stands one before the token it scores.

    A masked one's stands at the mask. Where targets are shifted twice, or not at all, training and scores look at
    different positions.
    """
    example = family.bind("[P*3] [X] is [Y]").examples([{"x": "Kenya", "y": "Nairobi in Kenya"}])[0]
    ids = family.sentence(example)
    shift = 1 if family.kind == "causal" else 0
    assert [ids[position + shift] for position in example.logit_positions] == list(example.target_ids)
    assert len(example.target_ids) > 1
    if family.kind == "causal":
        assert len(example.token_ids) == example.logit_positions[-1] + 1
    else:
        assert {example.token_ids[position] for position in example.logit_positions} == {family.raw.mask_token_id}


# --- Text behind the target ---


def test_a_masked_model_sees_the_text_behind_the_target(families: dict[str, Family]) -> None:
    bert = families["bert"]
    example = bert.bind("[X] is [Y] and [P] people.").examples([{"x": "Kenya", "y": "Nairobi"}])[0]
    assert bert.tokens(example.token_ids)[3:5] == ["[MASK]", "and"]
    assert bert.tokens(example.token_ids)[-3:] == ["people", ".", "[SEP]"]


def test_a_causal_model_does_not_and_says_so_once(
    families: dict[str, Family], caplog: pytest.LogCaptureFixture
) -> None:
    gpt2 = families["gpt2"]
    with caplog.at_level(logging.INFO, logger="ptuning"):
        bound = gpt2.bind("{dropped notice} [Y] and on")
        gpt2.bind("{dropped notice} [Y] and on")
    assert [record.message for record in caplog.records] == [
        "a causal model cannot see what comes after [Y]; dropped 'and on' from '{dropped notice} [Y]'"
    ]
    assert caplog.records[0].levelno == logging.WARNING
    assert str(bound.template) == "{dropped notice} [Y]"
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="ptuning"):
        gpt2.bind(f"[D:{'Kenya: yes.' + chr(10)}{'Peru: no. ' * 50}] {{dropped notice}} [Y] and on")
    (said,) = (record.message for record in caplog.records)
    assert "'[D:Kenya: yes. Peru: no." in said
    assert said.endswith("no. Peru: no. ] {dropped notice} [Y]'")
    assert len(said) < 300
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="ptuning"):
        gpt2.bind("{dropped full stop} [Y].")
    assert [record.levelno for record in caplog.records] == [logging.INFO]


def test_a_decoder_does_not_either(families: dict[str, Family], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="ptuning"):
        template = Template.parse("{dropped word} [>] [Y] and on")
        TokenizedTemplate(template, tokenizer=families["gpt2"].tokenizer, kind="encoder-decoder")
    assert [record.message for record in caplog.records] == [
        "a decoder cannot see what comes after [Y]; dropped 'and on' from '{dropped word} [>] [Y]'"
    ]


# --- Special tokens: the template alone can write them, and the words of slots have none ---

HOSTILE = "[P*3] {mask} [MASK] </s> <|endoftext|> <s> <mask> [SEP] [X] [Y]"


def test_a_record_is_always_text(family: Family) -> None:
    """Whatever a record says, it makes no slot, no mask and no special token."""
    bound = family.bind("[P*2] {a!} is [Y]")
    harmless, hostile = bound.examples([{"a": "Kenya", "y": "Nairobi"}, {"a": HOSTILE, "y": "Nairobi"}])
    assert len(hostile.slot_positions) == bound.slots == 2
    assert len(hostile.logit_positions) == len(harmless.logit_positions)
    unknown = family.raw.unk_token_id

    def specials(example: Example) -> list[int]:
        kept = [token for at, token in enumerate(example.token_ids) if at not in example.slot_positions]
        return sorted(token for token in kept if token in family.raw.all_special_ids and token != unknown)

    assert specials(hostile) == specials(harmless)
    text = family.raw.decode(
        [token for at, token in enumerate(hostile.token_ids) if at not in hostile.slot_positions],
        clean_up_tokenization_spaces=False,
    )
    if family.name in ("gpt2", "llama", "roberta", "breaks"):  # which give back bytes as they were
        assert HOSTILE in text


def test_a_target_is_always_text(family: Family) -> None:
    """Text that reads like a special token is spelled out in a target, too."""
    token = str(family.raw.eos_token or family.raw.sep_token)
    example = family.bind("[P] is [Y]").examples([{"y": f"{token} Nairobi"}])[0]
    assert family.raw.convert_tokens_to_ids(token) not in example.target_ids
    assert example.own_tokens > 3


def test_the_first_token_of_a_text_may_stand_behind_slots(families: dict[str, Family]) -> None:
    """As in prompts of PEFT; it does not come in front of them as well."""
    family = families["llama"]
    row = family.bind("[P*2]<s>{x} is [Y]").examples([{"x": "Kenya", "y": "Nairobi"}])[0]
    assert row.slot_positions == (0, 1)
    assert list(row.token_ids[2:]) == family.whole("Kenya is Nairobi")[: len(row.token_ids) - 2]
    assert family.bind("[P*2]{x} is [Y]").examples([{"x": "Kenya", "y": "Nairobi"}])[0].slot_positions == (1, 2)


def test_texts_are_what_stands_between_the_slots(families: dict[str, Family]) -> None:
    bound = families["llama"].bind("The [P*2] {x} [P] is [Y] .")
    assert bound.texts({"x": "Kenya"}) == ("The", "", " Kenya", " is")


def test_a_special_token_that_the_template_writes_is_one(family: Family) -> None:
    token = str(family.raw.eos_token or family.raw.sep_token)
    written = token.replace("[", "[[")
    bound = family.bind(f"The{written} {{x}} {written} is [Y]")
    ids = family.sentence(bound.examples([{"x": "Kenya", "y": "Nairobi"}])[0])
    special = family.raw.all_special_ids[family.raw.all_special_tokens.index(token)]
    assert ids == family.whole(f"The{token} Kenya {token} is Nairobi")
    assert ids.count(special) - family.whole("The").count(special) == 2
    parts = bound.describe({"x": "Kenya", "y": "Nairobi"})
    assert [part for part, token_id in parts if token_id == special][:2] == ["special", "special"]


def test_no_special_token_is_a_start(family: Family) -> None:
    """The words of slots are tokenised without BOS or CLS, and special text among them is plain text.

    Otherwise special tokens would take slots from the words.
    """
    bound = family.bind("[P:The capital </s> [[SEP]] <|endoftext|> of] [X] [P:<s> is] [Y]")
    starts = set(bound.slot_start_ids)
    assert not starts & (set(family.raw.all_special_ids) - {family.raw.unk_token_id})
    assert family.tokens([start for start in bound.slot_start_ids if start is not None])[0].lstrip("▁") == "The"


# --- Slots: none is dropped or counted twice ---


def random_pieces(draw: random.Random, most: int) -> list[Piece]:
    """Up to ``most`` pieces of every kind but the target, in any order; neighbouring literals become one."""
    pieces: list[Piece] = []
    for _ in range(draw.randint(0, most)):
        literal: Piece = Literal(draw.choice([" ", ".", " and ", "is", "\n", "  ", ": "]))
        words: Piece = TextSlots(
            " ".join(draw.choices(["The", "capital", "Zürich", "1999", "it's", "-", "😀"], k=draw.randint(1, 4)))
        )
        field: Piece = Field(draw.choice("ab"), draw.random() < 0.5)
        piece = draw.choice([literal, field, Slots(draw.randint(1, 7)), words])
        if not (pieces and isinstance(pieces[-1], Literal) and isinstance(piece, Literal)):
            pieces.append(piece)
    return pieces


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32), a=TEXTS, b=TEXTS)
def test_a_row_has_exactly_the_slots_of_its_template(family: Family, seed: int, a: str, b: str) -> None:
    """Over a thousand random templates in all: as many slot positions as vectors, whatever the record holds."""
    draw = random.Random(seed)
    record = {"a": a, "b": b, "gap": " ", "y": "Nairobi"}
    for _ in range(15):
        front, back = random_pieces(draw, 6), random_pieces(draw, 3)
        bound = family.bind(Template((Field("gap"), *front, Field("gap"), Target(), Field("gap"), *back)))
        example = bound.examples([record])[0]
        seen = front if family.kind == "causal" else front + back
        random_starts = sum(piece.count for piece in seen if isinstance(piece, Slots))
        warm = [piece for piece in seen if isinstance(piece, TextSlots)]
        assert len(example.slot_positions) == bound.slots == len(bound.slot_start_ids)
        assert bound.slot_start_ids.count(None) == random_starts
        assert bound.slots >= random_starts + len(warm)
        assert list(example.slot_positions) == sorted(set(example.slot_positions))
        assert [part for part, _ in bound.describe(record)].count("slot") == bound.slots


def test_the_words_of_slots_must_have_tokens(families: dict[str, Family]) -> None:
    with pytest.raises(TemplateError, match="the words of this piece have no tokens") as caught:
        families["bert"].bind("[P*1] [X] [P:\u200b] [Y]")
    assert caught.value.column == len("[P] [X] ")


# --- Truncation: invariant *Only marked fields shrink*, that is fields without an exclamation mark ---


def test_only_fields_without_an_exclamation_mark_shrink(family: Family) -> None:
    """Invariant *Only marked fields shrink*: slots, target, literals and fields like ``{kept!}`` stay whole.

    A field of ten thousand tokens fits, and loses nothing of the question beside it.
    """
    pattern = "[P*3] {long} of {kept!} [P:is it] that: [Y]"
    bound = family.bind(pattern, max_tokens=40)
    record = {"long": "a " * 10_000, "kept": "Kenya, Peru", "y": "Nairobi"}
    short = family.bind(pattern).examples([{**record, "long": "a a"}])[0]
    example = bound.examples([record])[0]
    assert example.shortened
    assert not short.shortened
    assert 38 <= len(example.token_ids) <= 40  # "a " more would not fit
    assert len(example.slot_positions) == bound.slots == 5
    assert example.target_ids == short.target_ids
    whole = family.bind(pattern).describe({**record, "long": "a a"})
    assert [part for part in bound.describe(record) if part[0] != "field long"] == [
        part for part in whole if part[0] != "field long"
    ]


@settings(max_examples=8, deadline=None)
@given(text=TEXTS, room=st.integers(0, 25), kept=PLAIN)
def test_a_shortened_row_fits_and_one_more_character_would_not(family: Family, text: str, room: int, kept: str) -> None:
    pattern = "[P*2] {long} and {kept!} [Y]"
    record = {"long": text * 6, "kept": kept, "y": "Nairobi"}
    least = len(family.bind(pattern).examples([{**record, "long": ""}])[0].token_ids)
    limit = least + room
    example = family.bind(pattern, max_tokens=limit).examples([record])[0]
    cuts = [{**record, "long": record["long"][:length]} for length in range(len(record["long"]) + 1)]
    rows = [len(cut.token_ids) for cut in family.bind(pattern).examples(cuts)]
    assert len(example.token_ids) <= limit
    assert example.shortened == (rows[-1] > limit)
    if example.shortened:
        length = next(at for at, size in enumerate(rows) if size == len(example.token_ids))
        assert any(size > limit for size in rows[length + 1 : length + 30])


def test_several_fields_are_cut_to_the_same_length_and_short_ones_not_at_all(family: Family) -> None:
    bound = family.bind("{a} [P] {b} and {c} [Y]", max_tokens=40)
    shown = bound.describe({"a": "a " * 500, "b": "a " * 90, "c": "Peru", "y": "is"})
    counts = {name: sum(part == f"field {name}" for part, _ in shown) for name in "abc"}
    assert abs(counts["a"] - counts["b"]) <= 1
    assert counts["a"] >= 12
    uncut = family.bind("The {c} [Y]").describe({"c": "Peru", "y": "is"})
    assert counts["c"] == sum(part == "field c" for part, _ in uncut)


def test_a_field_that_is_also_kept_somewhere_shrinks_only_where_it_may(families: dict[str, Family]) -> None:
    bound = families["gpt2"].bind("{x} question {x!} [Y]", max_tokens=30)
    words = "is " * 20
    example = bound.examples([{"x": words.strip(), "y": "a"}])[0]
    assert example.shortened
    assert families["gpt2"].tokens(example.token_ids).count("Ġis") >= 20


def test_what_does_not_fit_is_said(families: dict[str, Family]) -> None:
    bert = families["bert"]
    record = {"a": "x", "b": "Kenya", "y": "is"}
    # [CLS] and [SEP], three slots, "in", "Kenya" and one mask are eight tokens; the other field may go.
    assert len(bert.bind("[P*3] {a} in {b!} [Y]", max_tokens=8).examples([record])[0].token_ids) == 8
    with pytest.raises(TemplateError) as caught:
        bert.bind("[P*3] {a} in {b!} [Y]", max_tokens=7).examples([record], source="f")
    assert str(caught.value) == (
        "f 1 does not fit: slots (3), literal text, target (1 tokens) and kept fields b take 8 tokens, and a row has "
        "room for 7 (max_length, or what the model reads); write {field} instead of {field!} to let it be shortened"
    )
    with pytest.raises(
        TemplateError, match=r"and a row has room for 5 \(max_length, or what the model reads\); shorten them"
    ):
        bert.bind("[P*3] in [Y]", max_tokens=5).contexts([{}])


def test_a_context_keeps_room_for_the_target(families: dict[str, Family]) -> None:
    """A causal model that is to write four tokens must be able to read the first three of them; the row is then cut
    where it was cut in training.
    """
    for name in ("llama", "bert"):
        bound = families[name].bind("[P*2] {x} is [Y]", max_tokens=30)
        record = {"x": "a " * 100, "y": "Nairobi in Kenya"}
        example = bound.examples([record])[0]
        context = bound.contexts([record], target_tokens=example.own_tokens)[0]
        ahead = example.own_tokens - 1 if name == "llama" else 0
        assert context.shortened
        assert len(context.token_ids) + ahead == len(example.token_ids)
        assert context.token_ids == example.token_ids[: len(context.token_ids)]


@pytest.mark.parametrize("text", ["a ", "Nairobi in 1999 ", "Zürich, "])
def test_answers_of_one_record_stand_behind_the_same_context(family: Family, text: str) -> None:
    """A record that is too long is cut for its longest answer, so that all answers are scored alike."""
    bound = family.bind("[P*2] {x} is [Y]", max_tokens=40)
    texts = [["Peru", "the film of Zürich was great; a good one", "Kenya"], ["yes", "no"]]
    long, short = bound.answers([{"x": text * 60}, {"x": "Kenya"}], texts)
    assert [one.shortened for one in (*long, *short)] == [True] * 3 + [False] * 2
    if family.kind == "causal":
        contexts = {one.token_ids[: one.logit_positions[0] + 1] for one in long}
    else:
        contexts = {tuple(token for token in one.token_ids if token != family.raw.mask_token_id) for one in long}
    assert len(contexts) == 1
    assert max(len(one.token_ids) for one in long) <= 40
    alone = [
        bound.examples([{"x": text * 60}], targets=[texts[0][1]])[0],
        *bound.examples([{"x": "Kenya"}] * 2, targets=texts[1]),
    ]
    assert [long[1], *short] == alone


def test_an_answer_that_does_not_fit_is_named(families: dict[str, Family]) -> None:
    bound = families["gpt2"].bind("{x!} is [Y]", max_tokens=12)
    with pytest.raises(TemplateError, match="f, row 2, answer 2 does not fit"):
        bound.answers([{"x": "a"}] * 2, [["no"], ["yes", "yes " * 20]], source="f, row")
    with pytest.raises(RecordError, match="f, row 1, answer 1 has no target"):
        bound.answers([{"x": "a"}], [[" "]], source="f, row")


# --- Errors and the stop token ---


def test_a_missing_field_is_named_with_those_that_are_there(families: dict[str, Family]) -> None:
    with pytest.raises(TemplateError) as caught:
        families["gpt2"].bind("[P*1] {a} {b} [Y]").examples([{"a": "1", "b": "2", "y": "3"}, {"a": "1", "y": "2"}])
    first, shown, caret = str(caught.value).split("\n")
    assert first == "no field 'b' in record 2; its fields: a, y"
    assert shown == "  [P] {a} {b} [Y]"
    assert shown[caret.index("^") :].startswith("{b}")
    with pytest.raises(TemplateError, match="no field 'a' in record 1; its fields: none"):  # not "in in memory"
        families["gpt2"].bind("{a} [Y]").check_fields({}, where="in memory, record 1")
    with pytest.raises(TemplateError, match="no field 'a' in the record; its fields: none"):
        families["gpt2"].bind("{a} [Y]").check_fields({})


def test_a_missing_target_is_named(families: dict[str, Family]) -> None:
    bound = families["gpt2"].bind("is [Y]")
    with pytest.raises(RecordError, match=r"data.jsonl, record 2 has no target \(field 'y'\)"):
        bound.examples([{"y": "a"}, {"y": " "}], source="data.jsonl, record")
    with pytest.raises(RecordError, match="record 1 has no target"):
        bound.examples([{}])


def test_a_causal_model_needs_something_in_front_of_the_target(families: dict[str, Family]) -> None:
    """GPT-2 has no BOS: there is no position whose logits could score the first token."""
    with pytest.raises(TemplateError, match="needs something before ") as caught:
        families["gpt2"].bind("{x}[Y]").examples([{"x": "", "y": "is"}])
    assert caught.value.column == len("[X]")
    assert families["llama"].bind("[Y]").examples([{"y": "a"}])[0].logit_positions == (0,)


def test_a_masked_model_needs_a_mask_token(families: dict[str, Family]) -> None:
    with pytest.raises(TemplateError, match="has no mask token"):
        TokenizedTemplate(Template.parse("[Y]"), tokenizer=families["gpt2"].tokenizer, kind="masked")


@pytest.mark.parametrize("multiline", [False, True])
def test_the_stop_token_follows_the_target_of_a_causal_model_only(family: Family, multiline: bool) -> None:
    """An answer of one line ends with its line where a line break is a token, any other with the text."""
    bound = family.bind("[X] is [Y]", multiline=multiline)
    record = {"x": "Kenya", "y": "Nairobi"}
    plain, stopped = bound.examples([record])[0], bound.examples([record], with_stop=True)[0]
    if family.kind == "masked":
        assert stopped == plain
        return
    line_end = "Ċ" if family.name in ("gpt2", "llama", "breaks") and not multiline else family.raw.eos_token
    assert family.tokens(stopped.target_ids) == [*family.tokens(plain.target_ids), line_end]
    assert stopped.own_tokens == plain.own_tokens == len(plain.target_ids)
    assert list(stopped.token_ids) == family.sentence(plain)
    assert stopped.logit_positions == (*plain.logit_positions, plain.logit_positions[-1] + 1)


# --- What each position is ---

RECORD = {"x": "Kenya", "z": "Zürich", "y": "Nairobi"}


@pytest.mark.parametrize(
    ("name", "pattern", "parts"),
    [
        (
            "gpt2",
            "[P:The capital of] [X] [P:is] [Y]",
            "slot=The slot=Ġcapital slot=Ġof field_x=ĠKe field_x=ny field_x=a slot=Ġis target=ĠNa target=ir target=obi",
        ),
        (
            "llama",
            "[P*2] is [X]: [Y]",
            "special=<s> slot slot literal=Ġis field_x=ĠKe field_x=ny field_x=a literal=: "
            "target=ĠNa target=ir target=obi",
        ),
        (
            "roberta",
            "The capital of [X] is [Y].",
            "special=<s> literal=The literal=Ġcapital literal=Ġof field_x=ĠKe field_x=ny field_x=a literal=Ġis "
            "target=<mask> target=<mask> target=<mask> literal=. special=</s>",
        ),
        (
            "bert",
            "[[CLS] ([X]) {z!} [P]is[P:of] [Y] and [X]",
            "special=[CLS] literal=( field_x=Kenya literal=) field_z=Zürich slot literal=is slot=of "
            "target=[MASK] literal=and field_x=Kenya special=[SEP]",
        ),
    ],
)
def test_describe_names_each_position(families: dict[str, Family], name: str, pattern: str, parts: str) -> None:
    """Special tokens, slots with their starts, literals, fields and the target, each with its token."""
    family = families[name]
    shown = family.bind(pattern).describe(RECORD)
    written = [
        part.replace(" ", "_") + ("" if token is None else f"={family.tokens([token])[0]}") for part, token in shown
    ]
    assert written == parts.split()


def test_describe_shows_the_row_that_a_model_gets(family: Family) -> None:
    """Also for a record that has no target yet, and for one that is too long."""
    for record in (RECORD, {"x": "Kenya", "z": "Peru"}, {**RECORD, "x": "a " * 99}):
        bound = family.bind("[P:The one:] [X] in {z} [P*2] is [Y]", max_tokens=40)
        shown = bound.describe(record)
        example = (bound.examples if "y" in record else bound.contexts)([record])[0]
        ids = [token for part, token in shown if part != "slot"]
        row = family.sentence(example) if family.kind == "causal" else example.token_ids
        assert ids == [token for at, token in enumerate(row) if at not in example.slot_positions]
        assert tuple(at for at, (part, _) in enumerate(shown) if part == "slot") == example.slot_positions
        assert tuple(token for part, token in shown if part == "slot") == bound.slot_start_ids
        shift = 1 if family.kind == "causal" else 0
        targets = tuple(at - shift for at, (part, _) in enumerate(shown) if part == "target")
        assert targets == (example.logit_positions if "y" in record or not shift else ())


@settings(max_examples=30, deadline=None)
@given(front=PLAIN, value=PLAIN, middle=PLAIN)
def test_describe_gives_a_token_that_a_field_shares_to_the_field(
    family: Family, front: str, value: str, middle: str
) -> None:
    """The tokenizer's own offsets are the judge: every token that covers some of the field's text is the field's."""
    shown = family.bind("{front} {x} {middle}: [Y]").describe({"front": front, "x": value, "middle": middle})
    encoded = family.raw(f"{front} {value} {middle}:", return_offsets_mapping=True, verbose=False)
    start, end = len(front), len(front) + 1 + len(value)
    covering = [
        token
        for token, (first, last) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        if first < end and last > start
    ]
    assert [token for part, token in shown if part == "field x"] == covering


class Sides:
    """An encoder-decoder model's tokenizer, and its rows as text."""

    def __init__(self, kind: str, *, decoder_ids: tuple[int, ...] = (0,), max_tokens: int = 64) -> None:
        self.raw = tokenizer_of(kind)
        self.tokenizer = TextTokenizer(self.raw, max_tokens=max_tokens, decoder_ids=decoder_ids)

    def bind(self, pattern: str) -> TokenizedTemplate:
        return TokenizedTemplate(Template.parse(pattern), tokenizer=self.tokenizer, kind="encoder-decoder")

    def rows(self, example: Example) -> tuple[str, str, str]:
        """What the encoder reads, what the decoder reads, and what is scored; slots as P, tokens joined."""
        tokens = list(self.raw.convert_ids_to_tokens(list(example.token_ids)))
        for position in example.slot_positions:
            tokens[position] = "(P)"
        split = example.encoder_tokens
        scored = self.raw.convert_ids_to_tokens(list(example.target_ids))
        return "".join(tokens[:split]), "".join(tokens[split:]), "".join(scored)


FACT = {"x": "Kenya", "y": "Nairobi"}


@pytest.mark.parametrize(
    ("kind", "pattern", "encoder", "decoder", "scored"),
    [
        # T5 fills the gap that its first sentinel marks, and ends with the second.
        ("t5", "[X] is [Y].", "▁Kenya▁is<extra_id_0>.</s>", "<pad><extra_id_0>", "▁Nairobi<extra_id_1>"),
        ("t5", "[Y] is in [X]", "<extra_id_0>▁is▁in▁Kenya</s>", "<pad><extra_id_0>", "▁Nairobi<extra_id_1>"),
        ("mt5", "[X] is [Y]", "▁Kenya▁is▁<extra_id_0></s>", "<pad>▁<extra_id_0>", "▁Nairobi▁<extra_id_1>"),
        ("t5", "[P*2] [X] [P] [Y]", "(P)(P)▁Kenya(P)<extra_id_0></s>", "<pad><extra_id_0>", "▁Nairobi<extra_id_1>"),
        # Behind [>] the decoder reads, there is no gap, and the text ends as texts do; what follows [Y] is dropped.
        ("t5", "[X] [>] [Y]", "▁Kenya</s>", "<pad>", "▁Nairobi</s>"),
        ("t5", "[X] [>] [P*2] [Y].", "▁Kenya</s>", "<pad>(P)(P)", "▁Nairobi</s>"),
        ("t5", "[P*2] [X] [>] it is [P] [Y]", "(P)(P)▁Kenya</s>", "<pad>▁it▁is(P)", "▁Nairobi</s>"),
        ("t5", "a <extra_id_0> [>] [X] [Y]", "▁a<extra_id_0></s>", "<pad>▁Kenya", "▁Nairobi</s>"),
        # BART's mask stands on the encoder's side alone.
        ("roberta", "[X] is [Y].", "<s>KenyaĠis<mask>.</s>", "<s>", "ĠNairobi</s>"),
        ("roberta", "[X] [>] [Y]", "<s>Kenya</s>", "<s>", "Nairobi</s>"),
        ("roberta", "[X] [>] is [Y]", "<s>Kenya</s>", "<s>is", "ĠNairobi</s>"),
        ("roberta", "[X] [>] [P] [Y]", "<s>Kenya</s>", "<s>(P)", "ĠNairobi</s>"),
        # A tokenizer with neither: nothing marks the gap.
        ("llama", "[X] is [Y]", "<s>KenyaĠis", "<unk>", "ĠNairobi</s>"),
    ],
)
def test_the_two_sides_of_an_encoder_decoder(kind: str, pattern: str, encoder: str, decoder: str, scored: str) -> None:
    """What stands where: the whole template in front of the encoder, or cut at [>]; the target behind the decoder's."""
    sides = Sides(kind)
    example = sides.bind(pattern).examples([FACT], with_stop=True)[0]
    before, behind, target = sides.rows(example)
    assert (before, target) == (encoder, scored)
    # The decoder has read all of the target but its last token, and is asked from one before the first.
    assert target.startswith(behind.removeprefix(decoder))
    assert behind.startswith(decoder)
    first = len(example.token_ids) - len(example.target_ids)
    assert example.logit_positions == tuple(range(first, len(example.token_ids)))
    assert example.own_tokens == len(example.target_ids) - 1


def test_a_decoder_is_made_to_begin() -> None:
    """A start token, and the token that the model is made to write first."""
    sides = Sides("roberta", decoder_ids=(2, 0))
    example = sides.bind("[X] [>] [P] [Y]").contexts([FACT])[0]
    assert sides.rows(example)[1] == "</s><s>(P)"
    assert example.logit_positions == (len(example.token_ids) - 1,)
    shown = [part for part, _ in sides.bind("[X] [>] [P] [Y]").describe({"x": "Kenya"})]
    assert shown[-3:] == ["special", "special", "slot"]


def test_slots_are_counted_over_both_sides() -> None:
    """In the template's order, each started at the words it stands for, as they are on their side."""
    sides = Sides("t5")
    filled = sides.bind("[P:The capital] [X] [>] [P:is] [P] [Y]")
    starts = filled.slot_start_ids
    words = sides.raw.convert_ids_to_tokens([start for start in starts if start is not None])
    assert "".join(words) == "▁The▁capital▁is"
    assert starts[-1] is None
    example = filled.examples([FACT])[0]
    assert len(example.slot_positions) == filled.slots == len(starts)
    behind = [position for position in example.slot_positions if position >= example.encoder_tokens]
    assert len(behind) == len(sides.tokenizer.encode(["is"])[0]) + 1


def test_each_side_has_room_of_its_own() -> None:
    """Invariant *Only marked fields shrink*, on two sides: fields are shortened for the side that is too long.

    What cannot be shortened says so.
    """
    sides = Sides("t5", max_tokens=12)
    long = {"x": "the movie was great and good " * 5, "z": "a film", "y": "yes"}
    example = sides.bind("[X] [>] {z} [Y]").examples([long])[0]
    assert example.shortened
    assert example.encoder_tokens <= 12 < len(sides.tokenizer.encode([long["x"]])[0])
    with pytest.raises(
        TemplateError, match=r"kept fields x take \d+ tokens, and a row has room for 12 .* on either side"
    ):
        sides.bind("{x!} [>] {z} [Y]").examples([long])
    with pytest.raises(TemplateError, match=r"a row has room for 12 .* on either side"):
        sides.bind("[X] [>] [P*13] [Y]").examples([long])
    assert sides.bind("[P*8] [X] [>] [P*8] [Y]").examples([long])[0].shortened


def test_an_encoder_that_reads_nothing_is_an_error() -> None:
    """GPT-2's tokenizer puts nothing around a text, so the encoder's side would be empty."""
    sides = Sides("gpt2")
    with pytest.raises(TemplateError, match=r"the encoder needs something to read.*\n.*\n +\^ column 1"):
        sides.bind("[>] [P] [Y]").examples([FACT])
