"""Where a result comes from: the versions of packages, and which data."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Protocol

# The one place of the version; pyproject.toml reads it from here.
VERSION = "0.1.0"


class Part(Protocol):
    """A part of the data: :class:`~ptuning.records.Records` or :class:`~ptuning.data.questions.Questions`."""

    name: str
    sha256: str

    def __len__(self) -> int:
        """Return the number of rows."""
        ...


def about_data(part: Part, **counts: int) -> dict[str, str | int]:
    """Return what every record says about a part of the data: its name, its SHA-256, its rows, and more counts."""
    return {"name": part.name, "sha256": part.sha256, "rows": len(part), **counts}


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    packages = ("torch", "transformers", "tokenizers", "accelerate", "safetensors")
    found = {name: metadata.version(name) for name in packages}
    return {"ptuning": VERSION, "python": platform.python_version(), **found}
