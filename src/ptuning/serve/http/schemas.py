"""Request bodies. Types are strict: a number in quotes is a text.

Sampling parameters are those of ``ptuning.GenerationSettings``, under their names there or in OpenAI's interface. Other
fields of that interface are refused by name if they would change the answer, and ignored if not.
"""

import secrets
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field

from ptuning.config import GenerationSettings
from ptuning.errors import PTuningError
from ptuning.prompt.rows import Answering
from ptuning.serve.http.errors import invalid
from ptuning.template.labels import Normalise

# Fields that change no answer.
IGNORED = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "request_id", "priority",
)  # fmt: skip
# Unsupported fields that would change the answer -> their neutral values, which are accepted.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
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
    "min_p": (0,),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "use_beam_search": (False,),
    "skip_special_tokens": (True,),
    "add_special_tokens": (True,),
}
# Settings with a name of their own in OpenAI's interface. Only ``/v1/predict`` takes the others that are left out here.
OPENAI_NAMES = {"stop_strings": "stop", "max_new_tokens": "max_tokens"}
SAMPLING = set(GenerationSettings.model_fields) - {*OPENAI_NAMES, "num_beams", "length_penalty", "do_sample"}
# Below this temperature a sample is the likeliest token, as far as 32-bit numbers can tell.
MIN_TEMPERATURE = 1e-4
MAX_LISTED = 1024  # texts, records, candidates, models, and characters of a name
MAX_IDS = 1 << 17
MAX_STOPS = 16
MAX_CHOICES = 16
MAX_LOGPROBS = 20
MAX_SETTINGS = {"num_beams": 16, "max_new_tokens": 1 << 17}


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("the text holds a lone surrogate (half a character)") from None
    return text


Name = Annotated[str, Field(min_length=1, max_length=MAX_LISTED)]
Text = Annotated[str, AfterValidator(_encodable)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
Ids = Annotated[list[Count], Field(min_length=1, max_length=MAX_IDS)]
Stop = Annotated[Text, Field(min_length=1, max_length=1000)]
RowLike = dict[str, Any] | str  # as a file may have it; what a field may hold is the task's business
RowLikes = RowLike | Annotated[list[RowLike], Field(min_length=1, max_length=MAX_LISTED)]


class StrictRequest(BaseModel, strict=True, extra="forbid"):
    """A body whose fields are all known."""


class StreamOptions(BaseModel, strict=True, extra="ignore"):
    """Options of a stream."""

    include_usage: bool = False


class SamplingRequest(BaseModel, strict=True, extra="allow"):
    """Fields that completions and chats share."""

    model: Name
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    fields: RowLikes | None = None

    def token_limit(self) -> tuple[str, int | None]:
        """Return the name and value of the field that limits the length of an answer."""
        return "max_tokens", self.max_tokens

    def model_post_init(self, _: object) -> None:
        """Refuse unknown fields, and unsupported ones that are not neutral."""
        for name, value in (self.model_extra or {}).items():
            if name in IGNORED or name in SAMPLING or value is None:
                continue
            if name not in NEUTRAL:
                shown = name if name.isprintable() and len(name) <= 64 else ascii(name[:64])
                raise invalid(shown, f"there is no field '{shown}'", "unknown_field")
            if not any(value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
                       for neutral in NEUTRAL[name]):  # fmt: skip
                raise invalid(name, f"'{name}' is not supported here; leave it out", "unsupported")
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options", "stream_options go with stream: true")

    def settings(self) -> list[GenerationSettings]:
        """Return how each of the ``n`` answers is generated. Temperature 0, the default, is greedy decoding, which
        other sampling fields do not change: clients send them always. An ApiError names a wrong field.
        """
        values: dict[str, Any] = {
            name: value for name, value in (self.model_extra or {}).items() if name in SAMPLING and value is not None
        }
        values["stop_strings"] = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        limit_name, limit = self.token_limit()
        if limit:
            values["max_new_tokens"] = limit
        seed, top_k = (secrets.randbits(62) if self.seed is None else self.seed % 2**62), values.pop("top_k", 0)
        is_sampled = (self.temperature or 0.0) >= MIN_TEMPERATURE
        if is_sampled:
            values |= {"do_sample": True, "temperature": self.temperature, "top_k": 0 if top_k == -1 else top_k}
            values["top_p"] = 1.0 if self.top_p is None else self.top_p
        elif top_k not in (0, -1):
            values["top_k"] = top_k  # refused: it has no effect
        try:
            return [
                GenerationSettings.of({**values, "seed": seed + choice} if is_sampled else values)
                for choice in range(self.n or 1)
            ]
        except PTuningError as error:
            message, names = str(error), {**OPENAI_NAMES, "max_new_tokens": limit_name}
            named = [name for name in GenerationSettings.model_fields if name in message]
            wrong = min(named, key=message.index, default="temperature")
            raise invalid(names.get(wrong, wrong), message) from error


class CompletionRequest(SamplingRequest):
    """``POST /v1/completions``."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_LISTED)]
        | Ids
        | Annotated[list[Ids], Field(min_length=1, max_length=MAX_LISTED)]
        | None
    ) = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None


class MessagePart(BaseModel, strict=True, extra="allow"):
    """A part of a message; only text can be read."""

    type: str
    text: Text | None = None


class Message(BaseModel, strict=True, extra="allow"):
    """A message of a chat."""

    role: str
    content: Text | Annotated[list[MessagePart], Field(max_length=MAX_LISTED)] | None = None


class ChatRequest(SamplingRequest):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(max_length=MAX_LISTED)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    def token_limit(self) -> tuple[str, int | None]:
        """Return the name and value of the field that limits the length of an answer."""
        if self.max_completion_tokens is None:
            return super().token_limit()
        return "max_completion_tokens", self.max_completion_tokens

    def model_post_init(self, context: object) -> None:
        """Refuse fields that go with others."""
        super().model_post_init(context)
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("top_logprobs", "top_logprobs goes with logprobs: true")


class PredictRequest(StrictRequest):
    """``POST /v1/predict``: records as ``ptuning predict --data`` reads them. ``generation`` has the names of
    ``ptuning.GenerationSettings``.
    """

    model: Name | Annotated[list[Name], Field(min_length=1, max_length=MAX_LISTED)]
    records: Annotated[list[RowLike], Field(min_length=1, max_length=MAX_LISTED)]
    candidates: Annotated[list[Text], Field(min_length=1, max_length=MAX_LISTED)] | None = None
    top_k: Annotated[int, Field(ge=1, le=MAX_LISTED)] = 1
    min_probability: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    normalise: Normalise | None = None
    calibrate: bool | None = None
    count_stop: bool = False
    generation: dict[str, Any] | None = None

    def answering(self) -> Answering:
        """Return how records are answered; an ApiError names a wrong setting of generation."""
        values = self.generation or {}
        for name, limit in MAX_SETTINGS.items():
            if isinstance(values.get(name), int) and values[name] > limit:
                raise invalid(f"generation.{name}", f"{name} is {values[name]}; it must be {limit} or less")
        stops = values.get("stop_strings")
        if isinstance(stops, list) and len(stops) > MAX_STOPS:
            raise invalid("generation.stop_strings", f"there are more than {MAX_STOPS} stop strings")
        try:
            generation = GenerationSettings.of(values)
        except PTuningError as error:
            raise invalid("generation", str(error)) from error
        fields = ("candidates", "top_k", "min_probability", "normalise", "calibrate", "count_stop")
        return Answering(generation=generation, **{name: getattr(self, name) for name in fields})


class ClassifyRequest(StrictRequest):
    """``POST /v1/classify``."""

    model: Name
    input: RowLikes
    user: str | None = None


class TokenizeRequest(StrictRequest):
    """``POST /tokenize``."""

    model: Name | None = None
    prompt: Text
    add_special_tokens: bool = True
    return_token_strs: bool | None = None


class DetokenizeRequest(StrictRequest):
    """``POST /detokenize``."""

    model: Name | None = None
    tokens: Annotated[list[Count], Field(max_length=MAX_IDS)]
