"""Chat templates: the markup around conversations, what is supervised of them, and what a record cannot write."""

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from ptuning.backbone.tokenizer import TextTokenizer
from ptuning.errors import BackboneError, RecordError, TemplateError
from ptuning.prompt.prompt import Prompt
from ptuning.prompt.storage import BackboneId
from ptuning.template.chat import DEFAULT_SYSTEM, chat_template
from ptuning.template.encode import Example, TokenizedTemplate, TooLongError
from ptuning.template.language import Literal, Target, Template, TextSlots
from ptuning.template.messages import ASSISTANT, USER, read_messages, write_messages
from ptuning.template.messages import ChatMessage as Turn
from tests.chats import PLAIN, SHAPES, SPECIALS, chat_tokenizer, shaped
from tests.conftest import CORPUS, make_tokenizer

every_shape = pytest.mark.parametrize("name", SHAPES)
CONVERSATIONS = 500  # over all shapes
WORDS = " ".join(CORPUS).split()
# Letters at the ends of contents that tokenizers join with what stands beside them.
ENDS = ("", ".", "...", "\n1.", " é", "\n\nyes", "?!", " 😀", ")", "'s")
SYSTEM = "Be brief, and kind."


def content(draw: random.Random) -> str:
    text = " ".join(draw.choices(WORDS, k=draw.randint(1, 6)))
    if draw.random() < 0.3:
        text = text.replace(" ", draw.choice(["\n", "\n\n", "  "]), 1)
    return (text + draw.choice(ENDS)).strip()


def conversation(draw: random.Random) -> list[Turn]:
    roles = [USER, ASSISTANT] * draw.randint(1, 3)
    return [Turn(role, content(draw)) for role in roles]


def bound(name: str, system: str = SYSTEM, max_length: int | None = None) -> TokenizedTemplate:
    tokenizer = chat_tokenizer(name)
    return TokenizedTemplate(
        chat_template(tokenizer, system), tokenizer=tokenizer, kind="causal", max_length=max_length
    )


def record_of(turns: Sequence[Turn]) -> dict[str, str]:
    """The record of a conversation's last answer."""
    return {"messages": write_messages(turns[:-1]), "y": turns[-1].content}


def messages(name: str, turns: Sequence[Turn], system: str = SYSTEM) -> list[dict[str, str]]:
    """The conversation as transformers takes it, with the words of the slots where they stand."""
    said = [turn._asdict() for turn in turns]
    if SHAPES[name].system == "none":
        said[0]["content"] = f"{system}\n\n{said[0]['content']}"
        return said
    return [{"role": "system", "content": system}, *said]


def written(name: str, turns: Sequence[Turn], *, answer_next: bool) -> str:
    """The conversation as transformers writes it."""
    return str(
        shaped(name).apply_chat_template(messages(name, turns), tokenize=False, add_generation_prompt=answer_next)
    )


def row_of(example: Example, starts: Sequence[int | None]) -> list[int]:
    """All ids of a row, with the words that its slots start at."""
    ids = [*example.token_ids, example.target_ids[-1]]
    for position, start in zip(example.slot_positions, starts, strict=True):
        assert start is not None
        ids[position] = start
    return ids


@every_shape
def test_a_template_is_made_of_the_models_own(name: str) -> None:
    """The parts are literals of a template like any other, which is what a prompt remembers."""
    shape, tokenizer = SHAPES[name], chat_tokenizer(name)
    made = chat_template(tokenizer)
    assert Template.parse(str(made)) == made
    assert made.pieces[-3:] == (Literal(shape.header), Target(), Literal(shape.end))
    own = "You are Tiny, made for tests." if shape.system == "own" else DEFAULT_SYSTEM
    after = made.pieces[made.pieces.index(TextSlots(own)) + 1]
    assert (after == Literal("\n\n")) == (shape.system == "none") or name == "llama-2"
    assert TextSlots(SYSTEM) in chat_template(tokenizer, SYSTEM).pieces


@every_shape
def test_supervised_are_the_answers_and_their_ends(name: str) -> None:
    """Of generated conversations: the ids are the tokenizer's own of the whole, the scored ones those of the answer and
    of its end, as character offsets find them, and nothing else.
    """
    draw, filled, raw, shape = random.Random(f"chat {name}"), bound(name), shaped(name), SHAPES[name]
    conversations = [conversation(draw) for _ in range(CONVERSATIONS // len(SHAPES) + 1)]
    answers = [turns[: at + 1] for turns in conversations for at in range(1, len(turns), 2)]
    examples = filled.examples([record_of(turns) for turns in answers], with_stop=True)
    for turns, example in zip(answers, examples, strict=True):
        asked, told = written(name, turns[:-1], answer_next=True), written(name, turns, answer_next=False)
        assert told.startswith(asked)
        # Behind the header, which belongs to the prompt.
        begin = told.index(shape.header, max(0, len(asked) - len(shape.header))) + len(shape.header)
        assert told.startswith(turns[-1].content, begin)
        assert not told[len(asked) : begin].replace("<think>", "").replace("</think>", "").strip()
        end = begin + len(turns[-1].content) + len(shape.end)
        told = told if told[begin:].startswith(turns[-1].content + shape.end) else told + shape.end
        begin -= told[begin - 1] == " "  # a space belongs to the word behind it
        found = raw(told[:end], add_special_tokens=False, return_offsets_mapping=True)
        supervised = [
            token for token, (_, last) in zip(found["input_ids"], found["offset_mapping"], strict=True) if last > begin
        ]
        assert list(example.target_ids) == supervised
        ids = row_of(example, filled.slot_start_ids)
        assert ids == found["input_ids"]
        assert [at + 1 for at in example.logit_positions] == list(range(len(ids) - len(supervised), len(ids)))


@every_shape
def test_ids_are_those_of_apply_chat_template(name: str) -> None:
    """To the last one, where it asks for an answer; only what belongs to the answer's header may stand behind."""
    draw, filled, raw = random.Random(f"ids {name}"), bound(name), shaped(name)
    records = [conversation(draw) for _ in range(20)]
    for turns in records:
        (example,) = filled.contexts([record_of(turns)])
        asked = messages(name, turns[:-1])
        own = raw.apply_chat_template(asked, tokenize=True, add_generation_prompt=True, return_dict=False)
        ids = list(example.token_ids)
        for position, start in zip(example.slot_positions, filled.slot_start_ids, strict=True):
            ids[position] = start if start is not None else -1
        assert ids[: len(own)] == own
        assert not str(raw.decode(ids[len(own) :])).replace("<think>", "").replace("</think>", "").strip()


@every_shape
def test_contents_never_become_markup(name: str) -> None:
    """Whatever stands in a content, special tokens are those of the chat template, and the text is all there."""
    draw, filled, raw = random.Random(f"hostile {name}"), bound(name), shaped(name)
    specials = {raw.convert_tokens_to_ids(token) for token in SPECIALS}
    for _ in range(10):
        turns = conversation(draw)
        hostile = [
            Turn(role, f"{draw.choice(SPECIALS)} {text}{''.join(draw.choices(SPECIALS, k=2))} {draw.choice(SPECIALS)}")
            for role, text in turns
        ]
        mild, example = (filled.examples([record_of(one)], with_stop=True)[0] for one in (turns, hostile))
        plain, own = (row_of(one, filled.slot_start_ids) for one in (mild, example))
        assert str(raw.decode(list(example.target_ids[: example.own_tokens]))).strip() == hostile[-1].content
        assert [token for token in own if token in specials] == [token for token in plain if token in specials]
        text = "".join(str(raw.decode(own)).split())
        assert all("".join(turn.content.split()) in text for turn in hostile)


@every_shape
def test_what_a_chat_template_changes_is_refused(name: str) -> None:
    """Qwen's cuts thoughts out of answers: then the model would not read what the record says."""
    turns = [Turn(USER, "a"), Turn(ASSISTANT, "it is far</think>yes"), Turn(USER, "b"), Turn(ASSISTANT, "no")]
    if name != "qwen":
        assert bound(name).examples([record_of(turns)])
        return
    for own in (turns, turns[:2]):
        with pytest.raises(RecordError, match=r"record 1: .*assistant's text 'it is far</think>yes'"):
            bound(name).examples([record_of(own)])


def with_template(jinja: str) -> TextTokenizer:
    raw = make_tokenizer("llama")
    raw.chat_template = jinja
    return TextTokenizer(raw, max_tokens=99)


PLAINLY = "{% for m in messages %}<t>{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("jinja", "says"),
    [
        ("", "the model has no chat template"),
        ("{% for m in messages %}{{ m.content | e }}{% endfor %}", "it escapes or leaves out letters"),
        ("{% for m in messages %}{{ m.content[:30] }}{% endfor %}", "it escapes or leaves out letters"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "does not write the texts of user"),
        ("{{ messages[-1].content }}", "does not write the texts of user"),
        ("{{ raise_exception('never') }}", "refuses the turns user, assistant: never"),
        ("{{ messages.nothing.there }}", "refuses the turns user, assistant: "),
        ("{{ messages | length }}" + PLAINLY, "begins the conversation or its last answer in another way"),
    ],
)
def test_chat_templates_that_cannot_be_used_are_refused(jinja: str, says: str) -> None:
    tokenizer = with_template(jinja)
    with pytest.raises(BackboneError, match=says):
        chat_template(tokenizer)
    if not jinja:
        with pytest.raises(BackboneError, match=says):
            TokenizedTemplate(Template.parse("[C] [Y]"), tokenizer=tokenizer, kind="causal")


def test_the_chat_template_alone_says_what_a_row_begins_with() -> None:
    """It writes BOS itself, or there is none; a tokenizer that puts one in front of texts does not here."""
    tokenizer = with_template("{% for m in messages %}{{ 'a ' + m.content + ' ' }}{% endfor %}")
    assert tokenizer.prefix_ids
    for pattern, begins in (("the [C] [Y]", False), ("the {messages} [Y]", True)):
        filled = TokenizedTemplate(Template.parse(pattern), tokenizer=tokenizer, kind="causal")
        (example,) = filled.contexts([{"messages": "movie"}])
        assert (example.token_ids[: len(tokenizer.prefix_ids)] == tokenizer.prefix_ids) is begins


def test_an_answer_that_is_asked_for_in_another_way_is_said(caplog: pytest.LogCaptureFixture) -> None:
    made = chat_template(with_template(PLAINLY + "{% if add_generation_prompt %}<think>{% endif %}"))
    assert str(made) == "<t>[P:You are a helpful assistant.]\n\n[C]<t>[Y]</s>" or "<think>" not in str(made)
    assert "answer after '<think>', and writes answers after '<t>'" in caplog.text


def test_a_conversation_loses_its_oldest_turns_where_it_is_too_long() -> None:
    turns = [Turn(role, f"{'so ' * 20}{number}") for number, role in enumerate([USER, ASSISTANT] * 4)]
    whole = bound("chatml").examples([record_of(turns)])[0]
    size, four = (len(bound("chatml").examples([record_of(turns[at:])])[0].token_ids) for at in (0, 4))
    assert not whole.turns_left_out
    shorter = [bound("chatml", max_length=most).examples([record_of(turns)])[0] for most in (size, size - 1, four)]
    assert [(one.turns_left_out, one.shortened) for one in shorter] == [(0, False), (2, True), (4, True)]
    for one in shorter:
        left = bound("chatml").examples([record_of(turns[one.turns_left_out :])])[0]
        assert (one.token_ids, one.target_ids) == (left.token_ids, left.target_ids)
    single = bound("chatml", max_length=110).examples([record_of([Turn(USER, "so " * 99), turns[-1]])])[0]
    assert single.shortened
    assert len(single.token_ids) <= 110
    with pytest.raises(TooLongError, match="record 1 does not fit"):
        bound("chatml", max_length=20).examples([record_of(turns)])


def test_what_is_shown_of_a_cut_conversation_is_what_is_learned() -> None:
    record = record_of([Turn(USER, "so " * 99), Turn(ASSISTANT, "no")])
    for most in range(100, 110):  # with and without room for the answer's end
        filled = bound("chatml", max_length=most)
        (example,) = filled.examples([record], with_stop=True)
        shown = [token for part, token in filled.describe(record) if part != "slot"]
        read = [token for at, token in enumerate(example.token_ids) if at not in example.slot_positions]
        assert shown == [*read, example.target_ids[-1]]  # the last one is never read


def test_positions_say_who_speaks() -> None:
    turns = [Turn(USER, "yes"), Turn(ASSISTANT, "no"), Turn(USER, "film"), Turn(ASSISTANT, "a")]
    shown = [part for part, _ in bound("chatml").describe(record_of(turns))]
    assert [part for at, part in enumerate(shown) if shown[at - 1 : at] != [part]] == [
        "special", "literal", "slot", "special", "literal", "special", "literal", "user", "special", "literal",
        "special", "literal", "assistant", "special", "literal", "special", "literal", "user", "special", "literal",
        "special", "literal", "target", "end",
    ]  # fmt: skip


@every_shape
def test_the_end_of_answers_is_kept_with_the_template(name: str, tmp_path: object) -> None:
    """Saved and loaded it is the same template, and fills the same."""
    filled = bound(name)
    vectors = torch.zeros(filled.slots, 8)
    prompt = Prompt(filled.template, vectors, BackboneId("tiny", None, "0-0"), multiline=filled.multiline)
    prompt.save(f"{tmp_path}/prompt")
    again = Prompt.load(f"{tmp_path}/prompt")
    assert again.template == filled.template == chat_template(chat_tokenizer(name), SYSTEM)
    turns = conversation(random.Random(name))
    loaded = TokenizedTemplate(again.template, tokenizer=chat_tokenizer(name), kind="causal", multiline=again.multiline)
    assert loaded.examples([record_of(turns)], with_stop=True) == filled.examples([record_of(turns)], with_stop=True)
    (end,) = filled.end_ids
    assert end == shaped(name).convert_tokens_to_ids(SHAPES[name].end.strip())


def test_any_template_may_name_the_end_of_its_answers() -> None:
    """A special token behind the target; without it an answer ends with its line, as ever."""
    tokenizer = chat_tokenizer("chatml")
    for pattern, ends in (("[X] is [Y]<|im_end|> and more", True), ("[X] is [Y] <end>", True), ("[X] is [Y].", False)):
        filled = TokenizedTemplate(Template.parse(pattern), tokenizer=tokenizer, kind="causal")
        (example,) = filled.examples([{"x": "it", "y": "far"}], with_stop=True)
        assert filled.multiline is ends
        assert bool(filled.end_ids) is ends
        assert (example.target_ids[-1] in tokenizer.special_ids.values()) is ends


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ([USER, USER], "record 1: turn 2 .*'user'"),
        ([ASSISTANT], "record 1: turn 1 .*'assistant'"),
        ([USER, ASSISTANT], "record 1: the last turn"),
        (["tool"], "record 1: turn 1 .*'tool'"),
    ],
)
def test_turns_that_are_no_conversation(roles: list[str], message: str) -> None:
    with pytest.raises(RecordError, match=message):
        bound("chatml").contexts([{"messages": write_messages([Turn(role, "a") for role in roles])}])
    with pytest.raises(TemplateError, match="no field 'messages'"):
        bound("chatml").contexts([{"x": "a"}])


@pytest.mark.parametrize("text", ["[]", "[1]", '[{"role": "user"}]', '[{"role": 1, "content": "a"}]', "[P*3] is it?"])
def test_text_that_looks_like_turns_is_text(text: str) -> None:
    assert read_messages(text) == (Turn(USER, text),)
    assert read_messages(write_messages([Turn(USER, text)])) == (Turn(USER, text),)


def test_plain_added_tokens_are_told_from_markup() -> None:
    """An added token that is not called special is text wherever it stands, as for the tokenizer itself."""
    assert set(PLAIN).isdisjoint(chat_tokenizer("qwen").special_ids)
    assert replace(bound("qwen").examples([{"messages": "a", "y": "b"}])[0], shortened=True).own_tokens == 1
