"""API keys: read from files, kept as hashes, compared in constant time, and never written anywhere."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from ptuning.errors import ConfigError
from ptuning.files import read_bytes

MAX_BYTES = 1 << 20


class Keys:
    """Hashes of keys."""

    def __init__(self, *keys: str) -> None:
        self._digests = [_digest(key) for key in keys]

    @classmethod
    def read(cls, path: Path) -> Keys:
        """Hash the keys of a file; errors as of :func:`read_keys`."""
        return cls(*read_keys(path))

    def hold(self, key: str) -> bool:
        """Whether a key is one of these."""
        digest = _digest(key)
        return sum(hmac.compare_digest(digest, known) for known in self._digests) > 0


def read_keys(path: Path) -> list[str]:
    """Read a file with a key in each line; lines that begin with ``#`` are comments.

    Raises:
        FileError: If the file cannot be read.
        ConfigError: If it holds no key, or a key with characters that no header can have.
    """
    keys = []
    lines = read_bytes(path, at_most=MAX_BYTES).decode("utf-8", "replace").splitlines()
    for number, key in enumerate(map(str.strip, lines), start=1):
        if not key or key.startswith("#"):
            continue
        if not key.isascii() or not key.isprintable() or " " in key:
            raise ConfigError(f"{path}, line {number}: a key has printable ASCII characters without spaces")
        keys.append(key)
    if not keys:
        raise ConfigError(
            f"{path} holds no key; write one in each line (python -c 'import secrets; "
            "print(secrets.token_urlsafe(32))' makes one)"
        )
    return keys


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
