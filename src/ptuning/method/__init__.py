"""The methods of a comparison: majority, manual prompt, in-context examples, P-tuning, fine-tuning and LoRA.

One file a method, and one list of all (``registry``). This room must not import comparisons or reports.

Read first: ``base``, ``registry``, then a method such as ``majority``; ``tuned`` holds all that train.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ptuning.method.base import Setup as Setup
    from ptuning.method.base import Solution as Solution
    from ptuning.method.base import Task as Task

__all__ = ["Setup", "Solution", "Task"]


def __getattr__(name: str) -> object:
    """Return what a method of one's own needs; loaded on first use, because it imports torch."""
    if name not in __all__:
        raise AttributeError(f"module 'ptuning.method' has no attribute '{name}'")
    from ptuning.method import base

    return getattr(base, name)
