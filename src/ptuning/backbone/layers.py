"""The layers of a model: their activations dropped and computed again in the backward pass (activation checkpointing),
and vectors added to what each layer reads at some positions, which is what deep slots are to a model of any kind.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ptuning.errors import BackboneError, TrainingError

# Layers run so far in this thread's pass; None outside of a block that recomputes.
_runs: ContextVar[list[nn.Module] | None] = ContextVar("ptuning_recompute", default=None)
# Layer -> number of blocks that replace its forward now, and the forward that was set on it before, if any.
_replaced: MutableMapping[nn.Module, tuple[int, Callable[..., object] | None]] = WeakKeyDictionary()
_lock = threading.Lock()
# Marks the layers that look for vectors to add; a copy of a layer keeps mark and hook.
MARK = "_ptuning_layer"


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Return the layers of a model, in order: the members of its outermost lists of modules."""
    found: list[nn.Module] = []
    for child in model.children():
        # A list of lists (Funnel) is not a layer, but holds some.
        inside = (
            [one for one in child if not isinstance(one, nn.ModuleList)] if isinstance(child, nn.ModuleList) else []
        )
        found += inside or layers_of(child)
    return found


@contextlib.contextmanager
def recomputing(model: nn.Module, *, name: str) -> Iterator[None]:
    """Checkpoint the activations of each layer, for forward passes in this thread and block.

    The backward pass may come after the block. Transformers' own switch does nothing in evaluation mode, in which a
    frozen backbone stays, and it drops the KV cache. Raises TrainingError if no layer of the model can be run again.
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
                # A method, so that a copy of the layer made now runs itself.
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
    own = _replaced.get(layer, (0, None))[1]
    forward = own or MethodType(type(layer).forward, layer)
    seen = _runs.get()
    tensors = [value for value in (*args, *named.values()) if isinstance(value, Tensor)]
    if seen is None or not tensors or not torch.is_grad_enabled():
        return forward(*args, **named)
    seen.append(layer)
    # The tensor only names the device on which random numbers are drawn.
    return checkpoint(_Run(forward, args, named), tensors[0], use_reentrant=False)


class _Run:
    """A layer's forward pass, which can run again: then on a copy of the KV cache as it was before the first run."""

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
    return callable(getattr(value, "update", None)) and callable(getattr(value, "reorder_cache", None))


def _state(cache: object) -> dict[str, Any]:
    """Copy what changes in a cache: its layers' attributes, its dicts, and the same of caches inside it."""
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
    """Return a copy of a cache in which the layers that changed since are as before, and the others are None."""
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


@dataclass(frozen=True)
class LayerOffsets:
    """Vectors to add to the inputs of layers: row j of ``values``, (S, L, H), at the row and column j of a batch.

    The first layer reads embeddings, so that L is one less than the number of layers. Source: Qin and Eisner (2021),
    arXiv:2104.06599, section 3.2 (deep perturbation); docs/decisions.md, decision 63.
    """

    rows: Tensor
    cols: Tensor
    values: Tensor

    def between(self, start: int, stop: int | None = None, *, rows: int | None = None) -> LayerOffsets | None:
        """Return those in some columns, counted from ``start``, of the first ``rows`` rows; None if there are none."""
        keep = self.cols >= start
        if stop is not None:
            keep &= self.cols < stop
        if rows is not None:
            keep &= self.rows < rows
        if not bool(keep.any()):
            return None
        return LayerOffsets(self.rows[keep], self.cols[keep] - start, self.values[keep])

    def take(self, rows: Tensor) -> LayerOffsets:
        """Return those of a batch whose row i is row ``rows[i]`` of this one."""
        found = [(self.rows == row).nonzero()[:, 0] for row in rows.tolist()]
        order = torch.cat(found) if found else torch.zeros(0, dtype=torch.int64, device=self.rows.device)
        owner = torch.repeat_interleave(
            torch.arange(len(rows), device=self.rows.device), torch.tensor([len(one) for one in found]).to(rows.device)
        )
        return replace(self, rows=owner, cols=self.cols[order], values=self.values[order])


@dataclass
class Walk:
    """The way of a (B, T) batch through layers: what is added to their inputs, and what was seen of these. ``turned``
    says that they read (T, B, H), as XLNet's do.
    """

    batch: int
    width: int
    turned: bool = False
    offsets: LayerOffsets | None = None
    seen: Callable[[int, Tensor], None] | None = None
    layer: int = field(default=0, init=False)

    def enter(self, hidden: Tensor) -> Tensor:
        """Return the input of the next layer, (B, T, H) or (T, B, H), with the vectors added. Some models put pads
        behind the T tokens.
        """
        at, self.layer = self.layer, self.layer + 1
        side = 1 if self.turned else 0
        if hidden.ndim != 3 or hidden.shape[side] != self.batch or hidden.shape[1 - side] < self.width:
            raise BackboneError(f"its layers read {tuple(hidden.shape)}, and not (rows, tokens, width)")
        if self.seen is not None:
            self.seen(at, hidden.transpose(0, 1) if self.turned else hidden)
        if self.offsets is None or not at or at > self.offsets.values.shape[1]:
            return hidden
        rows, cols = self.offsets.rows.to(hidden.device), self.offsets.cols.to(hidden.device)
        added = self.offsets.values[:, at - 1].to(hidden.device, hidden.dtype)  # (S, H)
        places = (cols, rows) if self.turned else (rows, cols)
        return hidden.index_put(places, added, accumulate=True)


_walk: ContextVar[Walk | None] = ContextVar("ptuning_layer_inputs", default=None)


@contextlib.contextmanager
def walking(walk: Walk | None) -> Iterator[None]:
    """Let the layers that a model runs in this block and thread read what ``walk`` makes of their inputs."""
    token = _walk.set(walk)
    try:
        yield
    finally:
        _walk.reset(token)


def listen(model: nn.Module) -> None:
    """Let the layers of a model look for vectors to add, once and for all passes."""
    for layer in dict.fromkeys(_entries(model)):
        if not getattr(layer, MARK, False):
            layer.register_forward_pre_hook(_enter, with_kwargs=True)
            setattr(layer, MARK, True)


def _entries(model: nn.Module) -> list[nn.Module]:
    """Return where layers begin: the members of the outermost lists of modules, but of the lists of one module (XLM's
    attentions, norms, ...) the first one alone.
    """
    lists = [child for child in model.children() if isinstance(child, nn.ModuleList)]
    found: list[nn.Module] = []
    for first in lists[:1]:
        found += [one for one in first if not isinstance(one, nn.ModuleList)] or _entries(first)
    for child in model.children():
        if not isinstance(child, nn.ModuleList):
            found += _entries(child)
    return found


def _enter(
    _layer: nn.Module, args: tuple[object, ...], named: Mapping[str, object]
) -> tuple[tuple[object, ...], dict[str, object]] | None:
    walk = _walk.get()
    if walk is None:
        return None
    if args and isinstance(args[0], Tensor):
        return (walk.enter(args[0]), *args[1:]), dict(named)
    name = next((name for name, value in named.items() if isinstance(value, Tensor)), None)
    if name is None:
        raise BackboneError("its layers read no tensor")
    hidden = named[name]
    assert isinstance(hidden, Tensor)
    return args, {**named, name: walk.enter(hidden)}
