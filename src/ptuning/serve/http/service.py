"""State that the routes share: the engine, the prompts by name, keys, limits, and whether requests are accepted."""

from __future__ import annotations

import time
import weakref
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from ptuning.files import sha256
from ptuning.serve.http.errors import invalid
from ptuning.serve.http.keys import Keys
from ptuning.serve.http.metrics import Metrics, stats_of

if TYPE_CHECKING:
    from starlette.requests import HTTPConnection

    from ptuning.prompt.prompt import Prompt
    from ptuning.serve.engine.engine import Engine
    from ptuning.serve.registry import Registry, Served

# Suffix of a prompt's name for the same prompt without its slots; no prompt's own name has a colon in it.
MANUAL = ":manual"


@dataclass(frozen=True)
class Settings:
    """Access and limits of the service.

    Args:
        keys: API keys of users; None lets everybody in.
        admin_keys: Keys of operators; None means that there are no routes for them.
        open_metrics: Whether there are metrics without admin keys, too.
        hosts: Allowed names in the header Host (against DNS rebinding); None for any.
        body_bytes: Maximum size of a request's body.
        body_seconds: Maximum time for a request's body to arrive.
        keep_alive: Seconds of silence after which a stream sends a comment.
        pending_pieces: Maximum number of unread pieces of a stream.
    """

    keys: Keys | None = None
    admin_keys: Keys | None = None
    open_metrics: bool = False
    hosts: frozenset[str] | None = None
    body_bytes: int = 4 << 20
    body_seconds: float = 30.0
    keep_alive: float = 15.0
    pending_pieces: int = 4096


@dataclass
class Service:
    """The engine, the prompts and the settings of an application, ``app.state.service``."""

    engine: Engine
    registry: Registry
    settings: Settings
    metrics: Metrics
    phase: Literal["serving", "draining"] = "serving"
    started: float = field(default_factory=time.time)
    # One object per prompt, since the engine caches by identity.
    _manual: weakref.WeakKeyDictionary[Prompt, Served] = field(default_factory=weakref.WeakKeyDictionary, repr=False)

    @classmethod
    def of(cls, request: HTTPConnection) -> Service:
        """Return the service that a request was made to."""
        service = request.app.state.service
        assert isinstance(service, cls)
        return service

    def find(self, request: HTTPConnection, name: str, *, param: str | None = None) -> Served | None:
        """Return the prompt of a name, None for the base model. ``param`` is the field that errors of rows name.

        Raises:
            UnknownPromptError: If there is neither.
            ApiError: If there is no manual prompt of this name, as the prompt has no slots.
        """
        request.scope["state"]["param"] = param
        plain, stats = name.removesuffix(MANUAL), stats_of(request)
        stats.add_model(plain)
        if name == self.registry.base_name:
            return None
        served = self.registry.get(plain)
        if plain != name:
            served = self._without_slots(served)
        stats.add_model(plain, served.prompt)
        return served

    def _without_slots(self, served: Served) -> Served:
        if not served.prompt.template.has_slots:
            raise invalid("model", f"'{served.name}' has no slots; it is a manual prompt itself", "unsupported")
        if served.prompt not in self._manual:
            self._manual[served.prompt] = replace(
                served,
                name=served.name + MANUAL,
                prompt=served.prompt.without("slots"),
                sha256=sha256(f"{served.sha256}{MANUAL}".encode()),
            )
        return self._manual[served.prompt]

    def fingerprint(self, served: Served | None) -> str:
        """Return ``system_fingerprint``: the model's fingerprint and the prompt's hash."""
        backbone = self.engine.model.backbone.fingerprint
        return backbone if served is None else f"{backbone}-{served.sha256[:12]}"

    @property
    def context(self) -> int:
        """Maximum number of tokens that the model reads."""
        return self.engine.model.backbone.tokenizer.max_tokens
