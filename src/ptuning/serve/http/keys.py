"""Keys of the service: read from files, kept as hashes, compared in constant time, and never written anywhere."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass, field
from pathlib import Path

from ptuning.errors import ConfigError
from ptuning.files import read_bytes

MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class Keys:
    """The SHA-256 of each key."""

    digests: tuple[bytes, ...] = field(repr=False)

    @classmethod
    def of(cls, *keys: str) -> Keys:
        """Return keys given as texts."""
        return cls(tuple(_digest(key) for key in keys))

    @classmethod
    def read(cls, path: Path) -> Keys:
        """Read a file with a key in each line; what begins with ``#`` is a comment.

        Raises:
            FileError: If the file cannot be read.
            ConfigError: If it holds no key, or a key with white space or signs that no header can have.
        """
        lines = read_bytes(path, at_most=MOST_BYTES).decode("utf-8", "replace").splitlines()
        found = []
        for number, line in enumerate(lines, start=1):
            key = line.strip()
            if not key or key.startswith("#"):
                continue
            if not key.isascii() or not key.isprintable() or " " in key:
                raise ConfigError(f"{path}, line {number}: a key has letters, digits and signs of ASCII without spaces")
            found.append(key)
        if not found:
            raise ConfigError(
                f"{path} holds no key; write one in each line (python -c 'import secrets; "
                "print(secrets.token_urlsafe(32))' makes one)"
            )
        return cls.of(*found)

    def hold(self, key: str) -> bool:
        """Whether a key is one of these. The time that it takes tells nothing."""
        asked = _digest(key)
        return sum(hmac.compare_digest(asked, one) for one in self.digests) > 0


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
