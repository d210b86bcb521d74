"""``POST /v1/chat/completions``: the messages are a chat prompt's conversation; for any other prompt the user's message
is the value of its one open field.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from fastapi import APIRouter, Request
from starlette.responses import Response

from ptuning.data.conversations import read_conversations
from ptuning.data.questions import Question
from ptuning.data.reading import RawRows
from ptuning.errors import RecordError
from ptuning.serve.engine.job import Outcome, Token
from ptuning.serve.http.errors import JsonResponse, refused
from ptuning.serve.http.questions import fields_questions, typed_question
from ptuning.serve.http.replies import answered
from ptuning.serve.http.routes.completions import checked, frame, opened, rows_of
from ptuning.serve.http.schemas import ChatRequest, Message
from ptuning.serve.http.service import ServedPrompt
from ptuning.serve.http.shapes import Shape, Told, chat_log_probs, text_of, tokens_of
from ptuning.serve.http.streams import streamed
from ptuning.template.messages import SYSTEM

router = APIRouter()


@dataclass
class Turns(Told):
    """Answers as ``/v1/chat/completions`` tells them."""

    kind = "chat.completion"
    stream_kind = "chat.completion.chunk"
    prefix = "chatcmpl"

    def choice(self, outcome: Outcome) -> Shape:
        """Return the content of a choice."""
        message = {"role": "assistant", "content": text_of(outcome), "refusal": None}
        return {"message": message, "logprobs": self._told(tokens_of(outcome))}

    def begun(self) -> Shape:
        """Return the content of a choice before its first piece: who speaks."""
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def grown(self, text: str, tokens: Sequence[Token], *, offset: int) -> Shape:  # noqa: ARG002
        """Return the content of a choice that has grown by a text."""
        return {"delta": {"content": text}, "logprobs": self._told(tokens)}

    def ended(self) -> Shape:
        """Return the content of the last chunk of a choice."""
        return {"delta": {}, "logprobs": None}

    def _told(self, tokens: Sequence[Token]) -> Shape | None:
        return None if self.log_probs is None else chat_log_probs(tokens, self.log_probs)


@router.post("/v1/chat/completions")
async def chat(asked: ChatRequest, request: Request) -> Response:
    """Answer the last user message, ``n`` times."""
    service, served = opened(asked, request, param="messages" if asked.fields is None else "fields")
    if served is None:
        raise refused("model", "the base model has no form of a chat here; ask it at /v1/completions", "unsupported")
    if asked.top_logprobs is not None and not asked.logprobs:
        raise refused("top_logprobs", "top_logprobs goes with logprobs: true")
    if asked.most_tokens == 0:
        raise refused(asked.most_name, f"{asked.most_name} is 0; it must be 1 or more")
    (question,) = _questions(asked, served)
    told_tokens = asked.top_logprobs or 0 if asked.logprobs else None
    told = Turns(asked.model, service.fingerprint(served), **frame(asked), log_probs=told_tokens)
    rows = rows_of(asked, service, served, [question], alternatives=told_tokens)
    if asked.stream:
        return await streamed(request, rows, told)
    return JsonResponse(told.whole(checked(await answered(request, rows))))


def _questions(asked: ChatRequest, served: ServedPrompt) -> list[Question]:
    if asked.fields is not None:
        if asked.messages:
            raise refused("messages", "the request has messages and fields; with fields, send an empty list")
        found = fields_questions(served.prompt, asked.fields)
        if len(found) != 1:
            raise refused("fields", f"a chat has one answer, and fields are {len(found)} rows; ask /v1/completions")
        return found
    if not asked.messages:
        raise refused("messages", "there is no message; send one of the user")
    if served.prompt.template.has_conversation:
        return [_conversation(asked.messages, served)]
    for at, message in enumerate(asked.messages):
        if message.role != "user" or at > 0:
            where = f"messages[{at}]" if message.role != "user" else "messages"
            raise refused(
                where,
                "the prompt's template is the whole input, so it takes one message of the user and no other turns "
                f"(the request has {', '.join(one.role[:20] for one in asked.messages[:8])})",
                "unsupported",
            )
    return [typed_question(served.prompt, _text(asked.messages[0], 0), param="messages[0].content")]


def _conversation(messages: Sequence[Message], served: ServedPrompt) -> Question:
    """Return the question of a conversation, whose last turn is the user's."""
    last = len(messages) - 1
    if messages[last].role != "user":
        raise refused(f"messages[{last}]", "the last message must be the user's, which is answered", "unsupported")
    said = [{"role": message.role, "content": _text(message, at)} for at, message in enumerate(messages)]
    rows = RawRows([("the request", {"messages": said})], name="the request", digest="", format="json")
    try:
        (question,) = read_conversations(rows, ask=True).questions
    except RecordError as error:
        place = re.search(r"messages\[\d+\](\.\w+)?", str(error))
        raise refused(place[0] if place else "messages", str(error)) from error
    missing = [name for name in served.prompt.template.fields if name not in question.record]
    if missing:
        raise refused("messages", f"the prompt also reads {', '.join(missing)}; give 'fields'")
    if SYSTEM in question.record and SYSTEM not in served.prompt.template.fields:
        text = "the prompt brings its own system text, which it has learned; leave this message out"
        raise refused("messages[0]", text, "unsupported")
    return question


def _text(message: Message, number: int) -> str:
    if message.content is None or isinstance(message.content, str):
        return message.content or ""
    for at, part in enumerate(message.content):
        if part.type != "text" or part.text is None:
            raise refused(f"messages[{number}].content[{at}]", "only parts of the type text can be read", "unsupported")
    return "".join(part.text or "" for part in message.content)
