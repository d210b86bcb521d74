"""Draws for data by rule. They come from a hash and never from a random generator: the same on every machine."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")

SEED = "ptuning-rules-1"
TRAIN_PERCENT, DEV_PERCENT = 60, 15  # the rest is test


def number(*key: object) -> int:
    """Return a large number for a key, equal for equal keys."""
    return int.from_bytes(hashlib.sha256(repr((SEED, *key)).encode()).digest()[:8], "big")


def shuffled(rows: Iterable[T], *key: object) -> list[T]:
    """Return different rows in a drawn order, which does not depend on the order in which they are given."""
    return sorted(rows, key=lambda row: number(*key, row))


def part_of(*key: object) -> str:
    """Return the part that a key belongs to: train, dev or test."""
    percent = number("part", *key) % 100
    return "train" if percent < TRAIN_PERCENT else "dev" if percent < TRAIN_PERCENT + DEV_PERCENT else "test"
