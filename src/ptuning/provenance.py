"""Where a result comes from: the versions of all packages that it depends on."""

from __future__ import annotations

import platform
from importlib import metadata

# The one place of the version; pyproject.toml reads it from here.
VERSION = "0.1.0"


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    packages = ("torch", "transformers", "tokenizers", "accelerate", "safetensors")
    found = {name: metadata.version(name) for name in packages}
    return {"ptuning": VERSION, "python": platform.python_version(), **found}
