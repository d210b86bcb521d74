"""A tiny GLM-4 learns conversations in its own chat template, and answers in it."""

import json

import pytest

from ptuning.backbone.backbone import Backbone
from ptuning.config import TrainConfig
from ptuning.data.conversations import read_conversations
from ptuning.data.questions import Questions
from ptuning.data.reading import raw_rows
from ptuning.engine.decoding import StopCriteria
from ptuning.prompt.predict import PromptModel
from ptuning.template.chat import chat_template
from ptuning.training.run import train
from tests.chats import shaped
from tests.families import model_of


@pytest.fixture(scope="module")
def glm() -> Backbone:
    tokenizer = shaped("glm-4")
    made = Backbone(model_of("glm-4", vocab_size=len(tokenizer), max_position_embeddings=400), tokenizer, name="glm")
    made.freeze()
    return made


def talks() -> Questions:
    rows = [
        {"messages": [{"role": "user", "content": f"the movie {at}?"}, {"role": "assistant", "content": "great\nyes"}]}
        for at in range(8)
    ]
    text = "\n".join(map(json.dumps, rows))
    return read_conversations(raw_rows(text.encode(), name="talks.jsonl")).questions


def test_glm_4_learns_and_answers_with_its_chat_template(glm: Backbone) -> None:
    """Its answers end where the user's next turn begins, and have several lines; the template is kept as it is."""
    template = chat_template(glm.tokenizer)
    config = TrainConfig(epochs=6, batch_size=4, lr=0.05, encoder="none")
    result = train(template, talks(), backbone=glm, config=config)
    history = result.record["history"]
    start = result.record["start"]
    assert isinstance(history, list)
    assert isinstance(start, dict)
    assert min(float(epoch["dev_loss"]) for epoch in history) < float(start["dev_loss"])  # type: ignore[arg-type,index,call-overload]
    assert result.prompt.template == template
    assert result.prompt.learned_to_stop
    assert result.prompt.multiline
    bound = result.prompt.bind(glm)
    (example,) = bound.examples([talks()[0].record], with_stop=True)
    user = glm.tokenizer.special_ids["<|user|>"]
    assert example.target_ids[-1] == user
    ending = StopCriteria.of(glm, bound, 9)
    assert ending.stopped([5, user]) == "end"
    (answer,) = PromptModel(glm).predict([{"messages": "the movie 3?"}], result.prompt)
    assert answer.text is not None


@pytest.mark.parametrize("place", ["in front", "as the system text"])
def test_deep_slots_and_a_conversation_in_one_template(glm: Backbone, place: str) -> None:
    """What is supervised stays the answer and its end; the start is that of the words; it learns, answers, is saved."""
    words = str(chat_template(glm.tokenizer, "so good"))
    assert "[P:so good]" in words
    deep = "[D*3]" + words.replace("[P:so good]", "so good")
    if place == "as the system text":
        deep = words.replace("[P:so good]", "[D:so good]")
    config = TrainConfig(epochs=4, batch_size=4, deep_lr=0.05)
    found = train(deep, talks(), backbone=glm, config=config)
    plain = train(words, talks(), backbone=glm, config=TrainConfig(epochs=1, encoder="none"))
    losses = [float(one["dev_loss"]) for one in [found.record["start"], *found.record["history"]]]  # type: ignore[misc]
    assert min(losses) < losses[0]
    if place == "as the system text":
        assert losses[0] == pytest.approx(float(plain.record["start"]["dev_loss"]), abs=1e-4)  # type: ignore[arg-type,call-overload,index]
    assert found.prompt.deep is not None
    assert found.prompt.deep.count == (3 if place == "in front" else len(plain.prompt.bind(glm).slot_start_ids))
    record = talks()[0].record
    own, other = (one.prompt.bind(glm).examples([record], with_stop=True)[0] for one in (found, plain))
    assert own.target_ids == other.target_ids
    model = PromptModel(glm)
    together = model.predict([{"messages": "the movie 3?"}] * 2, [found.prompt, plain.prompt])
    alone = model.predict([{"messages": "the movie 3?"}], found.prompt)[0]
    assert together[0].text == alone.text
