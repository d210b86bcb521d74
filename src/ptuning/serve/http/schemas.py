"""The bodies of requests. Types are taken as they are: a number in quotes is a text.

Fields of OpenAI's interface that would change the answer, and that are not there, are refused by their name; those that
change nothing are ignored.
"""

from __future__ import annotations

import functools
import secrets
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from ptuning.serve.http.errors import refused

# What may be sent and changes no answer.
IGNORED = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "request_id",
    "priority",
)
# What would change the answer -> the values that ask for nothing.
NOTHING: dict[str, tuple[object, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "best_of": (1,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "top_k": (0, -1),
    "min_p": (0,),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "use_beam_search": (False,),
    "skip_special_tokens": (True,),
    "add_special_tokens": (True,),
}
LONGEST_NAME = 1024
MOST_TEXTS = 1024
MOST_IDS = 1 << 17
MOST_STOPS = 16
MOST_CANDIDATES = 1024
MOST_MODELS = 1024
MOST_LOGPROBS = 20

Name = Annotated[str, Field(min_length=1, max_length=LONGEST_NAME)]
Text = Annotated[str, AfterValidator(lambda text: _whole(text))]
Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1, max_length=MOST_IDS)]
Stop = Annotated[Text, Field(min_length=1, max_length=1000)]
# The value of a record's field as a file may have it; what it may be is the task's business.
RowLike = dict[str, Any] | str


class StreamOptions(BaseModel):
    """What a stream has besides its pieces."""

    model_config = ConfigDict(strict=True, extra="ignore")

    include_usage: bool = False


class Sampling(BaseModel):
    """What the two routes of OpenAI's interface share."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: Name
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    fields: RowLike | Annotated[list[RowLike], Field(min_length=1, max_length=MOST_TEXTS)] | None = None

    @property
    def most_tokens(self) -> int | None:
        """Most tokens of an answer."""
        return self.max_tokens

    @property
    def most_name(self) -> str:
        """What the request calls :attr:`most_tokens`."""
        return "max_tokens"

    @functools.cached_property
    def drawn_seed(self) -> int:
        """The seed of the draws; another one for each request that gives none."""
        return secrets.randbits(62) if self.seed is None else self.seed % 2**62

    def check_extras(self) -> None:
        """Raise an ApiError that names a field which is not there, or would change the answer."""
        for name, value in (self.model_extra or {}).items():
            if name in IGNORED or value is None:
                continue
            if name not in NOTHING:
                raise refused(_shown(name), f"there is no field '{_shown(name)}'", "unknown_field")
            if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in NOTHING[name]):
                raise refused(name, f"'{name}' is not supported here; leave it out", "unsupported")


class CompletionRequest(Sampling):
    """``POST /v1/completions``."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MOST_TEXTS)]
        | Ids
        | Annotated[list[Ids], Field(min_length=1, max_length=MOST_TEXTS)]
        | None
    ) = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None


class Part(BaseModel):
    """A part of a message; only text can be read."""

    model_config = ConfigDict(strict=True, extra="allow")

    type: str
    text: Text | None = None


class Message(BaseModel):
    """A turn of a chat."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: str
    content: Text | Annotated[list[Part], Field(max_length=MOST_TEXTS)] | None = None


class ChatRequest(Sampling):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(max_length=MOST_TEXTS)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    @property
    def most_tokens(self) -> int | None:
        """Most tokens of an answer."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def most_name(self) -> str:
        """What the request calls :attr:`most_tokens`."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"


class PredictRequest(BaseModel):
    """``POST /v1/predict``: records as ``ptuning predict --data`` reads them. ``generation`` has the names of
    ``ptuning.GenerationSettings``.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    model: Name | Annotated[list[Name], Field(min_length=1, max_length=MOST_MODELS)]
    records: Annotated[list[RowLike], Field(min_length=1, max_length=MOST_TEXTS)]
    candidates: Annotated[list[Text], Field(min_length=1, max_length=MOST_CANDIDATES)] | None = None
    top_k: Annotated[int, Field(ge=1, le=MOST_CANDIDATES)] = 1
    min_probability: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    normalise: str | None = None
    calibrate: bool | None = None
    count_stop: bool = False
    generation: dict[str, Any] | None = None


class ClassifyRequest(BaseModel):
    """``POST /v1/classify``."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: Name
    input: RowLike | Annotated[list[RowLike], Field(min_length=1, max_length=MOST_TEXTS)]
    user: str | None = None


class TokenizeRequest(BaseModel):
    """``POST /tokenize``."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: Name | None = None
    prompt: Text
    add_special_tokens: bool = True
    return_token_strs: bool | None = None


class DetokenizeRequest(BaseModel):
    """``POST /detokenize``."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: Name | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=MOST_IDS)]


def _whole(text: str) -> str:
    """Return a text; a ValueError if it holds half a character, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("the text holds half a character (a lone surrogate)") from None
    return text


def _shown(name: str) -> str:
    return name if name.isprintable() and len(name) <= 64 else ascii(name[:64])
