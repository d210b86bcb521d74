"""What the routes work with: the engine, the prompts by name, the limits, and whether the service takes requests."""

from __future__ import annotations

import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from ptuning.errors import ConfigError
from ptuning.files import sha256
from ptuning.serve.http.errors import refused
from ptuning.serve.http.keys import Keys
from ptuning.serve.http.watch import Monitor, seen_of

if TYPE_CHECKING:
    from starlette.requests import HTTPConnection

    from ptuning.prompt.predict import PromptModel
    from ptuning.prompt.prompt import Prompt
    from ptuning.serve.engine.job import Job

Phase = Literal["loading", "serving", "draining"]
# Behind a prompt's name: the same prompt without its slots. No prompt's own name has a colon in it.
MANUAL = ":manual"


@dataclass(frozen=True)
class Settings:
    """Limits of the service, and who may use it.

    Args:
        keys: Of users; None lets everybody in.
        admin_keys: Of operators; None means that there are no routes for them.
        open_metrics: Whether there are metrics without admin keys, too.
        hosts: What the header Host may say (a page of a stranger that points its own name to this machine says its
            own); None for anything.
        body_bytes: Most bytes of a request's body.
        body_seconds: Most seconds until a request's body is there.
        depth: Most lists and objects inside of each other in a body.
        most_choices: Most answers (``n``) to one text.
        keep_alive: Seconds of silence after which a stream sends a comment.
        pending_pieces: Most pieces of a stream that wait for a client who does not read.
    """

    keys: Keys | None = None
    admin_keys: Keys | None = None
    open_metrics: bool = False
    hosts: frozenset[str] | None = None
    body_bytes: int = 4 << 20
    body_seconds: float = 30.0
    depth: int = 32
    most_choices: int = 16
    keep_alive: float = 15.0
    pending_pieces: int = 4096

    def __post_init__(self) -> None:
        if min(self.body_bytes, self.depth, self.most_choices, self.pending_pieces) < 1:
            raise ConfigError("the limits of the service are 1 or more")


class RowEngine(Protocol):
    """The engine, as the routes see it."""

    model: PromptModel
    queue_rows: int

    def submit(self, job: Job) -> None: ...  # noqa: D102
    def check_room(self) -> None: ...  # noqa: D102
    @property
    def status(self) -> object: ...  # noqa: D102
    @property
    def is_alive(self) -> bool: ...  # noqa: D102


class ServedPrompt(Protocol):
    """A prompt in service, as the routes see it."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def prompt(self) -> Prompt: ...  # noqa: D102
    @property
    def folder(self) -> Path: ...  # noqa: D102
    @property
    def sha256(self) -> str: ...  # noqa: D102
    @property
    def loaded_at(self) -> float: ...  # noqa: D102


class Prompts(Protocol):
    """The prompts in service, as the routes see them."""

    @property
    def base_name(self) -> str: ...  # noqa: D102
    @property
    def served(self) -> Mapping[str, ServedPrompt]: ...  # noqa: D102
    @property
    def failures(self) -> Mapping[str, str]: ...  # noqa: D102
    def get(self, name: str) -> ServedPrompt: ...  # noqa: D102


@dataclass(frozen=True)
class Manual:
    """A prompt in service without its slots: those that started at words are these words, and others are left out."""

    name: str
    prompt: Prompt
    folder: Path
    sha256: str
    loaded_at: float

    @classmethod
    def of(cls, served: ServedPrompt) -> Manual:
        """Return a prompt without its slots; an ApiError if it has none."""
        if not served.prompt.template.has_slots:
            raise refused("model", f"'{served.name}' has no slots; it is a manual prompt itself", "unsupported")
        prompt, digest = served.prompt.without("slots"), sha256(f"{served.sha256}{MANUAL}".encode())
        return cls(served.name + MANUAL, prompt, served.folder, digest, served.loaded_at)


@dataclass
class Service:
    """The service as its routes see it. ``phase`` is what ``GET /ready`` tells."""

    engine: RowEngine
    registry: Prompts
    settings: Settings
    watch: Monitor
    phase: Phase = "serving"
    started: float = field(default_factory=time.time)
    # Made once for each prompt, as long as that lives: the engine knows prompts by reference, too.
    _manual: weakref.WeakKeyDictionary[Prompt, Manual] = field(default_factory=weakref.WeakKeyDictionary, repr=False)

    @classmethod
    def of(cls, request: HTTPConnection) -> Service:
        """Return the service that a request was made to."""
        found = request.app.state.service
        assert isinstance(found, cls)
        return found

    def find(self, request: HTTPConnection, name: str, *, param: str | None = None) -> ServedPrompt | None:
        """Return the prompt of a name, None for the base model; an UnknownPromptError if there is neither. A name with
        :data:`MANUAL` behind it is that prompt without its slots, and counted as that. ``param`` is the field that
        holds what is asked: errors of rows name it.
        """
        request.scope["state"]["param"] = param
        plain = name.removesuffix(MANUAL)
        seen_of(request).asked(plain)
        if name == self.registry.base_name:
            return None
        found = self.registry.get(plain)
        if plain != name:
            found = self.manual(found)
        seen_of(request).asked(plain, found.prompt)
        return found

    def manual(self, served: ServedPrompt) -> Manual:
        """Return a prompt without its slots; an ApiError if it has none."""
        if served.prompt not in self._manual:
            self._manual[served.prompt] = Manual.of(served)
        return self._manual[served.prompt]

    def fingerprint(self, served: ServedPrompt | None) -> str:
        """Return what an answer was made with: the model's fingerprint and the prompt's hash."""
        own = self.engine.model.backbone.fingerprint
        return own if served is None else f"{own}-{served.sha256[:12]}"

    @property
    def context(self) -> int:
        """Most tokens that the model reads."""
        return self.engine.model.backbone.tokenizer.max_tokens
