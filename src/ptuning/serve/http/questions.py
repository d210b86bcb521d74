"""From what a request says to rows of the engine: which prompt it means, and what that is asked.

Meaning: a template with one open field takes a text; one with several, or whose task's rows have choices, takes an
object with a row's fields (``fields``). The rows of a task are read as its files are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from ptuning.config import GenerationSettings
from ptuning.data.questions import Question
from ptuning.data.reading import RawRows
from ptuning.errors import PTuningError, RecordError
from ptuning.files import sha256
from ptuning.prompt.asked import ToAnswer, typed_fields
from ptuning.prompt.prompt import Prompt
from ptuning.serve.http.errors import ApiError, refused
from ptuning.serve.http.schemas import Sampling
from ptuning.serve.http.service import Service

# Below this a draw is the likeliest token, as far as numbers of 32 bits can tell.
COLD = 1e-4


def typed_question(prompt: Prompt, text: str, *, param: str) -> Question:
    """Return the question of a text, the value of a template's one open field. An ApiError if it has more or none."""
    if prompt.answer_space.has_choices:
        raise refused(param, "rows of this prompt's task have choices of their own; give a row as 'fields'")
    names = typed_fields(prompt)
    if not names and not text:
        return Question({})
    if len(names) != 1:
        listed = ", ".join(names) or "none"
        raise refused(param, f"a text fills one field, and the prompt reads {listed}; give 'fields', an object with it")
    return ToAnswer.typed(prompt, {names[0]: text}, where=param).questions[0]


def read_row(prompt: Prompt, row: object, *, where: str) -> list[Question]:
    """Return the questions of a row of data: one, unless the prompt's task reads a list in it. A text is the value of
    the one open field. A PTuningError or ApiError if it does not fit.
    """
    if isinstance(row, str):
        return [typed_question(prompt, row, param=where)]
    if not isinstance(row, Mapping):
        raise RecordError(f"{where}: a record is an object with named fields, or a text for the one open field")
    digest = sha256(json.dumps(row, sort_keys=True).encode())
    raw = RawRows([(where, row)], name=where, digest=digest, format="json", columns=list(row))
    found = list(ToAnswer.of(prompt, raw).questions)
    if not found:
        raise RecordError(f"{where} holds no rows of the prompt's task")
    return found


def fields_questions(prompt: Prompt, fields: object, *, param: str = "fields") -> list[Question]:
    """Return the questions of ``fields``: an object for one row, or a list of them."""
    rows = fields if isinstance(fields, list) else [fields]
    found = [read_row(prompt, row, where=f"{param}[{at}]" if len(rows) > 1 else param) for at, row in enumerate(rows)]
    return [one for listed in found for one in listed]


def generation_of(asked: Sampling, service: Service, prompt: Prompt | None, *, choice: int) -> GenerationSettings:
    """Return how an answer is written. Temperature 0, the default, takes the likeliest token at each step; labels and
    choices are not written, and sampling changes nothing of them.
    """
    if prompt is not None and prompt.answer_space.is_closed:
        return GenerationSettings()
    most = asked.most_tokens
    if most is not None and most > service.context:
        raise ApiError(
            400,
            f"{asked.most_name} is {most}, and the model reads and writes {service.context} tokens together",
            code="context_length_exceeded",
            param=asked.most_name,
        )
    stops = [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
    settings: dict[str, object] = {"stop_strings": tuple(stops)}
    if most:
        settings["max_new_tokens"] = most
    temperature = asked.temperature or 0.0
    if temperature >= COLD:
        seed = asked.drawn_seed + choice
        settings |= {"do_sample": True, "temperature": temperature, "top_k": 0, "seed": seed % 2**63}
        settings["top_p"] = 1.0 if asked.top_p is None else asked.top_p
    try:
        return GenerationSettings.of(settings)
    except PTuningError as error:
        raise refused(_named(str(error)), str(error)) from error


def _named(message: str) -> str:
    """Return the field that a message about a setting is about, in the words of the request."""
    words = {"stop_strings": "stop", "max_new_tokens": "max_tokens"}
    found = next((name for name in ("stop_strings", "max_new_tokens", "temperature", "top_p") if name in message), "")
    return words.get(found, found) or "temperature"


def settled(prompt: Prompt | None, questions: Sequence[Question]) -> Sequence[Question]:
    """Return questions, if there are any."""
    if prompt is not None and not questions:
        raise refused("prompt", "there is nothing to answer: the list is empty")
    return questions
