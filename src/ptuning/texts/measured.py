"""What a metric for texts gives, and the two things that metrics ask about: an extra, and whether texts are Chinese."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from types import ModuleType

from ptuning.errors import ConfigError
from ptuning.statistics import Values

# From this share of Chinese letters on, texts are Chinese: words are not separated by spaces.
CHINESE_SHARE = 0.3
CHINESE = ("\u3400", "\u9fff")


@dataclass(frozen=True)
class Measured:
    """Values of a score, and its ``signature``: what must be equal for two scores to be compared."""

    values: Values
    signature: str | None = None


def needed(module: str, *, package: str, metric: str, extra: str) -> ModuleType:
    """Import the library of a metric; a ConfigError says which extra brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"the metric '{metric}' needs the package {package}; install it with: pip install 'ptuning[{extra}]'"
        ) from error


def version_of(package: str) -> str:
    """Return the version of an installed package."""
    return metadata.version(package)


def are_chinese(texts: Sequence[str]) -> bool:
    """Whether texts are Chinese, by their letters."""
    letters = [letter for text in texts for letter in text if letter.isalpha()]
    chinese = sum(CHINESE[0] <= letter <= CHINESE[1] for letter in letters)
    return bool(letters) and chinese >= CHINESE_SHARE * len(letters)
