"""Activation checkpointing: what a layer computes is dropped after the forward pass, and computed again when gradients
flow back through it. Works on any model with a list of layers; knows no training loop.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator, MutableMapping
from contextvars import ContextVar
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ptuning.errors import TrainingError

# Layers run so far in this thread's pass; None where layers are to run as they always do.
_runs: ContextVar[list[nn.Module] | None] = ContextVar("ptuning_recompute", default=None)
# Layer -> how many passes have its forward replaced now, and the one it had of its own, if any.
_replaced: MutableMapping[nn.Module, tuple[int, Callable[..., object] | None]] = WeakKeyDictionary()
_lock = threading.Lock()


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Return the layers of a model, in order: what its outermost lists of modules hold.

    Example:
        >>> blocks = nn.ModuleList([nn.Sequential(nn.ModuleList([nn.Linear(1, 1)])) for _ in range(2)])
        >>> len(layers_of(nn.Sequential(nn.Linear(1, 1), blocks)))
        2
    """
    found: list[nn.Module] = []
    for child in model.children():
        # A list of lists (Funnel) is no layer, but holds some.
        inside = (
            [one for one in child if not isinstance(one, nn.ModuleList)] if isinstance(child, nn.ModuleList) else []
        )
        found += inside or layers_of(child)
    return found


@contextlib.contextmanager
def recomputing(model: nn.Module, *, name: str) -> Iterator[None]:
    """Let each layer of a model drop what it computes, in this thread and block; the backward pass, which may come
    later, runs it again: the same numbers with less memory, for one more forward pass.

    Transformers' own switch does nothing in evaluation mode, in which a frozen backbone stays, and drops the keys and
    values that rows stand behind.

    Args:
        model: The model; whoever else runs it at the same time sees nothing of this.
        name: What to call it in messages.

    Raises:
        TrainingError: If no layer of the model can be run again.

    Source: Chen et al. (2016), section 4; docs/decisions.md, decision 29.
    """
    layers = list(dict.fromkeys(layers_of(model)))
    seen: list[nn.Module] = []
    _replace(layers)
    token = _runs.set(seen)
    try:
        yield
    finally:
        _runs.reset(token)
        _restore(layers)
    if not seen:
        raise TrainingError(
            f"{name}: {type(model).__name__} runs no list of layers that could be computed again; leave checkpointing "
            "out, and use smaller batches with accumulation_steps where memory is short"
        )


def _replace(layers: list[nn.Module]) -> None:
    with _lock:
        for layer in layers:
            count, own = _replaced.get(layer, (0, layer.__dict__.get("forward")))
            _replaced[layer] = count + 1, own
            if not count:
                # A method, so that a copy made of the layer in this moment runs itself.
                layer.forward = MethodType(_forward, layer)


def _restore(layers: list[nn.Module]) -> None:
    with _lock:
        for layer in layers:
            count, own = _replaced.pop(layer)
            if count > 1:
                _replaced[layer] = count - 1, own
            elif own is None:
                del layer.forward
            else:
                layer.forward = own


def _forward(layer: nn.Module, *args: object, **named: object) -> object:
    """Run a layer, and drop what it computes if this thread is to."""
    own = _replaced.get(layer, (0, None))[1]
    forward = own or MethodType(type(layer).forward, layer)
    seen = _runs.get()
    tensors = [value for value in (*args, *named.values()) if isinstance(value, Tensor)]
    if seen is None or not tensors or not torch.is_grad_enabled():
        return forward(*args, **named)
    seen.append(layer)
    # The tensor only says on which device random numbers are drawn.
    return checkpoint(_Run(forward, args, named), tensors[0], use_reentrant=False)


class _Run:
    """A layer's forward pass, which may be taken again: what it wrote into a cache of keys and values is then written
    into a copy of the cache as it was before. Nothing of the cache is kept but what this layer found in it.
    """

    def __init__(self, forward: Callable[..., object], args: tuple[object, ...], named: dict[str, object]) -> None:
        self._forward = forward
        self._args = list(args)
        self._named = dict(named)

    def __call__(self, _: Tensor) -> object:
        args, named = self._args, self._named
        before = [(value, _state(value)) for value in (*args, *named.values()) if _is_cache(value)]
        found = self._forward(*args, **named)
        for cache, state in before:
            as_it_was = _as_it_was(cache, state)
            self._args = [as_it_was if value is cache else value for value in self._args]
            self._named = {key: as_it_was if value is cache else value for key, value in self._named.items()}
        return found


def _is_cache(value: object) -> bool:
    """Whether it is a cache of transformers, which changes as layers run."""
    return callable(getattr(value, "update", None)) and callable(getattr(value, "reorder_cache", None))


def _state(cache: object) -> dict[str, Any]:
    """Return what a cache consists of, unchanged when it changes: attributes of layers, the same of caches inside it,
    and copies of its notes.
    """
    found: dict[str, Any] = {}
    for name, value in vars(cache).items():
        if _is_cache(value):
            found[name] = _state(value)
        elif name == "layers":
            found[name] = [{} if layer is None else dict(vars(layer)) for layer in value]
        elif isinstance(value, dict):
            found[name] = dict(value)
    return found


def _as_it_was(cache: object, state: dict[str, Any]) -> object:
    """Return a copy of a cache with the layers that changed since as they were, and nothing in the place of others."""
    found = copy.copy(cache)
    for name, before in state.items():
        now = vars(cache)[name]
        if _is_cache(now):
            setattr(found, name, _as_it_was(now, before))
        elif name == "layers":
            setattr(found, name, [_layer_as_it_was(*pair) for pair in zip(now, before, strict=False)])
        else:
            setattr(found, name, before)
    return found


def _layer_as_it_was(layer: object, before: dict[str, Any]) -> object:
    if all(vars(layer)[name] is value for name, value in before.items()):
        return None
    found = copy.copy(layer)
    found.__dict__ = before
    return found
