"""Where a result comes from: the versions of all packages that it depends on, and the data."""

from functools import cache
from typing import Any

# The one place of the version; pyproject.toml reads it from here.
VERSION = "0.1.0"


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    return dict(_versions())


@cache
def _versions() -> dict[str, str]:
    import platform
    from importlib import metadata  # not needed by `import ptuning`, which must be quick

    packages = ("torch", "transformers", "tokenizers", "accelerate", "safetensors")
    installed = {name: metadata.version(name) for name in packages}
    return {"ptuning": VERSION, "python": platform.python_version(), **installed}


def described(data: Any, **counts: int) -> dict[str, str | int]:
    """Return the description of records or questions: their name, hash and number, then further counts."""
    return {"name": data.name, "sha256": data.sha256, "rows": len(data), **counts}
