"""Which backbone a prompt belongs to, and whether another one is the same."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.placement.quantized import in_another_format
from ptuning.errors import PromptError
from ptuning.files import Json, Unchecked

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BackboneId:
    """The backbone that a prompt belongs to: known name, folder, GGUF file or hub id; commit on the hub, or None; and
    :attr:`~ptuning.backbone.backbone.Backbone.fingerprint`, which alone decides whether another one is the same.
    ``loaded`` says what it was loaded with (:attr:`~ptuning.backbone.backbone.Backbone.loaded`).
    """

    name: str
    revision: str | None
    fingerprint: str
    loaded: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, backbone: Backbone) -> BackboneId:
        """Return the identity of a loaded backbone."""
        return cls(backbone.name, backbone.revision, backbone.fingerprint, backbone.loaded)

    @classmethod
    def from_json(cls, found: Unchecked) -> BackboneId:
        """Read the identity from a manifest."""
        revision = found.optional("revision", Unchecked.text)
        loaded = {name: one.text() for name, one in found.at("loaded", {}).table().items()}
        return cls(found.at("name").text(), revision, found.at("fingerprint").text(), loaded)

    def to_json(self) -> dict[str, Json]:
        """Return the identity as a manifest holds it."""
        return {**vars(self), "loaded": dict(self.loaded)}

    @property
    def described(self) -> str:
        """A short description: the name, the revision, and what it was loaded with."""
        revision = [] if self.revision is None else [f"revision {self.revision[:12]}"]
        loaded = (f"rows of {value} tokens" if name == "max_length" else value for name, value in self.loaded.items())
        return ", ".join([self.name, *revision, *loaded])

    def check(self, backbone: Backbone) -> None:
        """Check that a backbone is this one. One with the same embedding table and weights in another format is, with a
        warning that says what is known of such. Raises PromptError for any other.
        """
        if self.fingerprint == backbone.fingerprint:
            return
        same_table = self.fingerprint.split("-")[0] == backbone.fingerprint.split("-")[0]
        formats = [loaded.get("quantization") for loaded in (self.loaded, backbone.loaded)]
        known = in_another_format(*formats)
        if same_table and known is not None:
            trained, used = (text or "whole weights" for text in formats)
            _warn_once(f"the prompt was trained on '{self.name}' with {trained}, and is used with {used}: {known}")
            return
        what = "has the same embeddings and other weights (a tuned copy?)" if same_table else "is another model"
        raise PromptError(
            f"the prompt was trained on the backbone '{self.name}' ({self.fingerprint}), and '{backbone.name}' "
            f"({backbone.fingerprint}) {what}; use the right backbone (--backbone), or insist with --force"
        )


@functools.lru_cache(maxsize=1024)
def _warn_once(text: str) -> None:
    logger.warning("%s", text)
