"""The methods of a comparison: majority, manual prompt, in-context examples, P-tuning, fine-tuning and LoRA.

``registry`` lists them. This package must not import comparisons or reports.

Read first: ``base``, ``registry``, ``untrained``, ``tuned``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ptuning.method.base import Setup as Setup
    from ptuning.method.base import Solution as Solution
    from ptuning.method.base import Task as Task

__all__ = ["Setup", "Solution", "Task"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'ptuning.method' has no attribute '{name}'")
    from ptuning.method import base  # imports torch

    return getattr(base, name)
