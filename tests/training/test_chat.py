"""A tiny GLM-4 learns conversations in its own chat template, and answers in it."""

from __future__ import annotations

import json

import pytest

from ptuning.backbone.backbone import Backbone
from ptuning.config import TrainConfig
from ptuning.data.chat.conversations import read_conversations
from ptuning.data.questions import Questions
from ptuning.data.reading import raw_rows
from ptuning.engine.writing.ending import Ending, OpenRow
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
    ending = Ending.of(glm, OpenRow(bound, {"messages": "a"}, 9))
    assert ending.is_own([5, user])
    (answer,) = PromptModel(glm).predict([{"messages": "the movie 3?"}], result.prompt)
    assert answer.text is not None
