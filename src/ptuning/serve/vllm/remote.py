"""A vLLM server: what it is asked with embeddings or token ids, and what it answers."""

from __future__ import annotations

import base64
import io
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import httpx2
import torch
from torch import Tensor

from ptuning.config import GenerationSettings
from ptuning.errors import ConfigError
from ptuning.files import Unchecked, parse_json
from ptuning.serve.engine.job import QueueFullError, RemoteError
from ptuning.template.segments import Ids

# Seconds to connect, and between two pieces of an answer.
CONNECT_SECONDS, ANSWER_SECONDS = 10.0, 120.0
# The most of the likeliest tokens that vLLM tells by default (--max-logprobs). Tokens that are asked for come on top.
LIKELIEST = 20
# What a full server says about the time until it has room, where it says nothing.
RETRY_SECONDS = 1.0
SHOWN_CHARACTERS = 300
MOST_DIGITS = 9  # of a token's id


class Next(NamedTuple):
    """A written token: its id, its natural log-probability, and the likeliest tokens in its place."""

    id: int
    log_prob: float
    likeliest: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Read:
    """What the model reads: the embeddings of a row, (T, E), or its token ids."""

    embeddings: Tensor | None = None
    ids: Ids = ()

    def to_json(self) -> dict[str, object]:
        """Return it as a request holds it. vLLM takes embeddings in the format of ``torch.save``, which is only
        written here, never read.
        """
        if self.embeddings is None:
            return {"prompt": list(self.ids)}
        buffer = io.BytesIO()
        torch.save(self.embeddings.contiguous(), buffer)  # noqa: TID251 - it takes no other format
        return {"prompt_embeds": base64.b64encode(buffer.getvalue()).decode("ascii")}


class VllmServer:
    """A vLLM server at a URL. Its methods may be called from several threads.

    Args:
        url: Its address, such as ``http://localhost:8000``.
        key: What it asks for as ``Authorization: Bearer``, if anything.
        connections: Most requests at a time.
        transport: Stands for the network.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        connections: int = 64,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        wrong = f"'{url}' is no address of a server (--engine-url), such as http://localhost:8000"
        if not url.startswith(("http://", "https://")):
            raise ConfigError(wrong)
        self.url = url.rstrip("/").removesuffix("/v1")
        try:
            self._client = httpx2.Client(
                base_url=self.url,
                headers={} if key is None else {"Authorization": f"Bearer {key}"},
                timeout=httpx2.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS),
                limits=httpx2.Limits(max_connections=connections, max_keepalive_connections=connections),
                follow_redirects=False,
                transport=transport,
            )
        except (httpx2.InvalidURL, ValueError) as error:
            raise ConfigError(f"{wrong}: {error}") from error
        try:
            self.model, self.max_tokens = self._first_model()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close its connections."""
        self._client.close()

    def _first_model(self) -> tuple[str, int | None]:
        """Return the name of the model that it serves, and how many tokens that reads and writes together, if told."""
        try:
            response = self._client.get("/v1/models")
            first = _unchecked(self._checked(response)).at("data").items()[0]
            return first.at("id").text(), first.optional("max_model_len", lambda found: found.whole(least=1))
        except (httpx2.HTTPError, IndexError) as error:
            raise self._unreachable(error) from error

    def log_probs(self, read: Read, wanted: Sequence[int]) -> dict[int, float]:
        """Return the log-probabilities of some tokens as the next one; a RemoteError if it does not tell them."""
        body = {**self._body(read, most=1), "logprobs": LIKELIEST, "logprob_token_ids": list(wanted)}
        told = list(self._tokens(self._post(body), None))
        if len(told) != 1:
            raise RemoteError(f"{self.url}: {len(told)} tokens, and one was asked for; is it vLLM?")
        first = told[0]
        found = dict(first.likeliest) | {first.id: first.log_prob}
        missing = [token for token in wanted if token not in found]
        if missing:
            raise RemoteError(
                f"this vLLM tells only the {LIKELIEST} likeliest next tokens, and {len(missing)} that an answer needs "
                "are not among them; take a version that knows logprob_token_ids (0.32 does), or labels of one common "
                "token"
            )
        return {token: found[token] for token in wanted}

    def echo(self, ids: Ids, *, alternatives: int) -> list[tuple[float | None, tuple[tuple[int, float], ...]]]:
        """Return the log-probability of each token of a text, None for the first, and the likeliest ones there."""
        body = {**self._body(Read(ids=ids), most=1), "echo": True, "logprobs": max(1, alternatives)}
        choice = self._post(body)
        values, tops = (one[: len(ids)] for one in _columns(choice.at("logprobs"), "token_logprobs", "top_logprobs"))
        found: list[tuple[float | None, tuple[tuple[int, float], ...]]] = []
        for value, top in zip(values, tops, strict=True):
            log_prob = None if value.value is None else value.number()
            best = () if top.value is None else _likeliest(top)[:alternatives]
            found.append((log_prob, best))
        return found

    def write(
        self, read: Read, settings: GenerationSettings, *, most: int, alternatives: int
    ) -> Generator[Next, None, None]:
        """Write up to ``most`` tokens and yield them one by one; whoever stops asking ends it."""
        body = {**self._body(read, most=most), "logprobs": alternatives, "stream": True, "ignore_eos": False}
        if settings.do_sample:
            body |= {"temperature": settings.temperature, "top_p": settings.top_p, "seed": settings.seed}
            body |= {"top_k": settings.top_k or -1}
        try:
            with self._client.stream("POST", "/v1/completions", json=body) as response:
                if response.status_code != 200:
                    response.read()
                self._checked(response, is_stream=True)
                for line in response.iter_lines():
                    data = line.removeprefix("data:").strip()
                    if not line.startswith("data:") or data == "[DONE]":
                        continue
                    found = _unchecked(_parsed(data))
                    if "error" in found.table():
                        raise RemoteError(f"vLLM at {self.url}: {found.at('error').at('message').text()}")
                    for choice in found.at("choices").items():
                        yield from self._tokens(choice, alternatives)
        except httpx2.HTTPError as error:
            raise self._unreachable(error) from error

    def _body(self, read: Read, *, most: int) -> dict[str, object]:
        return {
            "model": self.model,
            **read.to_json(),
            "max_tokens": most,
            "temperature": 0,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "add_special_tokens": False,
        }

    def _post(self, body: Mapping[str, object]) -> Unchecked:
        """Return the only choice of an answer."""
        try:
            response = self._client.post("/v1/completions", json=body)
        except httpx2.HTTPError as error:
            raise self._unreachable(error) from error
        found = _unchecked(self._checked(response)).at("choices").items()
        if len(found) != 1:
            raise RemoteError(f"{self.url}: {len(found)} answers for one; is it vLLM?")
        return found[0]

    def _checked(self, response: httpx2.Response, *, is_stream: bool = False) -> object:
        """Return the body of a response that is well; raise what it says if it is not."""
        if response.status_code in (429, 503):
            after = response.headers.get("retry-after", "")
            seconds = float(after) if after.isascii() and after.isdigit() else RETRY_SECONDS
            raise QueueFullError("the vLLM server has no room now; try again later", retry_after=seconds)
        if response.status_code != 200:
            said = response.text[:SHOWN_CHARACTERS]
            raise RemoteError(f"vLLM at {self.url} answers {response.status_code}: {said}")
        return None if is_stream else _parsed(response.text)

    def _unreachable(self, error: Exception) -> RemoteError:
        return RemoteError(f"no answer from vLLM at {self.url} ({type(error).__name__}); is it running?")

    def _tokens(self, choice: Unchecked, alternatives: int | None) -> Iterator[Next]:
        """Yield the tokens of a choice, or of a piece of it; None for all alternatives that were told."""
        if choice.at("logprobs").value is None:
            return
        columns = _columns(choice.at("logprobs"), "tokens", "token_logprobs", "top_logprobs")
        for token, value, top in zip(*columns, strict=True):
            yield Next(_token_id(token.text()), value.number(), _likeliest(top)[:alternatives])


def _columns(listed: Unchecked, *names: str) -> list[list[Unchecked]]:
    """Return lists that have an entry for each token. A RemoteError if one is longer than another."""
    found = [listed.at(name).items() for name in names]
    if len({len(one) for one in found}) > 1:
        raise listed.failure(f"{', '.join(names)} are lists of different lengths")
    return found


def _likeliest(top: Unchecked) -> tuple[tuple[int, float], ...]:
    """Return tokens with their log-probabilities, the likeliest first."""
    pairs = ((_token_id(name), value.number()) for name, value in top.table().items())
    return tuple(sorted(pairs, key=lambda pair: -pair[1]))


def _token_id(text: str) -> int:
    """Read ``token_id:17``."""
    number = text.removeprefix("token_id:")
    if number == text or not (number.isascii() and number.isdigit()) or len(number) > MOST_DIGITS:
        raise RemoteError(f"the server names a token '{text}', and not by its id; is it vLLM?")
    return int(number)


def _unchecked(value: object) -> Unchecked:
    return Unchecked(value, "the answer of the vLLM server", RemoteError, "is it vLLM?")


def _parsed(text: str) -> object:
    try:
        return parse_json(text)
    except ValueError as error:
        raise RemoteError(f"the server answers no JSON: {text[:SHOWN_CHARACTERS]}") from error
