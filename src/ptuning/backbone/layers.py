"""The layers of a model: activation checkpointing, and vectors added to the inputs of layers at some positions (deep
slots of a model of any kind).
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
    """Return the layers of a model, in order: the members of its outermost lists of modules. Of several lists of one
    module (XLM's attentions, norms, ...) the first one counts.
    """
    layers: list[nn.Module] = []
    for first in [child for child in model.children() if isinstance(child, nn.ModuleList)][:1]:
        # A list of lists (Funnel) is not a layer, but holds some.
        layers += [layer for layer in first if not isinstance(layer, nn.ModuleList)] or layers_of(first)
    for child in model.children():
        if not isinstance(child, nn.ModuleList):
            layers += layers_of(child)
    return list(dict.fromkeys(layers))


@contextlib.contextmanager
def recomputing(model: nn.Module, *, name: str) -> Iterator[None]:
    """Checkpoint the activations of each layer, for forward passes in this thread and block.

    The backward pass may come after the block. Transformers' own switch does nothing in evaluation mode, in which a
    frozen backbone stays, and it drops the KV cache. Raises TrainingError if no layer of the model can be run again.
    Source: Chen et al. (2016), section 4; docs/decisions.md, decision 29.
    """
    layers, seen = layers_of(model), list[nn.Module]()
    with _lock:
        for layer in layers:
            count, own = _replaced.get(layer, (0, layer.__dict__.get("forward")))
            _replaced[layer] = count + 1, own
            if not count:
                # A method, so that a copy of the layer made now runs itself.
                layer.forward = MethodType(_forward, layer)
    token = _runs.set(seen)
    try:
        yield
    finally:
        _runs.reset(token)
        with _lock:
            for layer in layers:
                count, own = _replaced.pop(layer)
                if count > 1:
                    _replaced[layer] = count - 1, own
                elif own is None:
                    del layer.forward
                else:
                    layer.forward = own
    if not seen:
        raise TrainingError(
            f"{name}: {type(model).__name__} runs no list of layers that could be computed again; leave checkpointing "
            "out, and use smaller batches with accumulation_steps to save memory"
        )


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
        self._forward, self._args, self._named = forward, args, named

    def __call__(self, _: Tensor) -> object:
        given = (*self._args, *self._named.values())
        restores = {id(value): _snapshot(value) for value in given if _is_cache(value)}
        output = self._forward(*self._args, **self._named)
        restored = {key: restore() for key, restore in restores.items()}
        self._args = tuple(restored.get(id(value), value) for value in self._args)
        self._named = {name: restored.get(id(value), value) for name, value in self._named.items()}
        return output


def _is_cache(value: object) -> bool:
    return hasattr(value, "reorder_cache") and not isinstance(value, type)


def _snapshot(cache: Any) -> Callable[[], object]:
    """Return a function that returns a copy of a cache as it is now. Layers that did not change until then are left out
    of it: they would keep their tensors in memory.
    """
    inner = {name: _snapshot(value) for name, value in vars(cache).items() if _is_cache(value)}
    plain = {name: dict(value) for name, value in vars(cache).items() if isinstance(value, dict)}
    layers = [copy.copy(layer) for layer in getattr(cache, "layers", ())]

    def restore() -> object:
        restored = copy.copy(cache)
        vars(restored).update(plain, **{name: again() for name, again in inner.items()})
        if hasattr(cache, "layers"):
            restored.layers = [
                None if layer is None or all(vars(now)[name] is value for name, value in vars(layer).items()) else layer
                for now, layer in zip(cache.layers, layers, strict=False)
            ]
        return restored

    return restore


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
        owner, order = (rows[:, None] == self.rows[None]).nonzero(as_tuple=True)
        return replace(self, rows=owner, cols=self.cols[order], values=self.values[order])


@dataclass
class LayerPass:
    """A (B, T) batch on its way through layers: vectors that are added to their inputs, and a function that sees these.
    ``time_first`` says that layers read (T, B, H), as XLNet's do.
    """

    batch: int
    width: int
    time_first: bool = False
    offsets: LayerOffsets | None = None
    seen: Callable[[int, Tensor], None] | None = None
    layer: int = field(default=0, init=False)

    def enter(self, hidden: Tensor) -> Tensor:
        """Return the input of the next layer, (B, T, H) or (T, B, H), with the vectors added. Some models add pads to
        the T tokens.
        """
        at, self.layer = self.layer, self.layer + 1
        rows_dim = 1 if self.time_first else 0
        if hidden.ndim != 3 or hidden.shape[rows_dim] != self.batch or hidden.shape[1 - rows_dim] < self.width:
            raise BackboneError(f"its layers read {tuple(hidden.shape)}, and not (rows, tokens, width)")
        if self.seen is not None:
            self.seen(at, hidden.transpose(0, 1) if self.time_first else hidden)
        if self.offsets is None or not at or at > self.offsets.values.shape[1]:
            return hidden
        rows, cols = self.offsets.rows.to(hidden.device), self.offsets.cols.to(hidden.device)
        added = self.offsets.values[:, at - 1].to(hidden.device, hidden.dtype)  # (S, H)
        return hidden.index_put((cols, rows) if self.time_first else (rows, cols), added, accumulate=True)


_layer_pass: ContextVar[LayerPass | None] = ContextVar("ptuning_layer_inputs", default=None)


@contextlib.contextmanager
def entering_layers(layer_pass: LayerPass | None) -> Iterator[None]:
    """Let the layers that a model runs in this block and thread read the inputs that ``layer_pass`` makes."""
    token = _layer_pass.set(layer_pass)
    try:
        yield
    finally:
        _layer_pass.reset(token)


def add_layer_hooks(model: nn.Module) -> None:
    """Let the layers of a model look for vectors to add, in all later passes."""
    for layer in layers_of(model):
        if not getattr(layer, MARK, False):
            layer.register_forward_pre_hook(_enter, with_kwargs=True)
            setattr(layer, MARK, True)


def _enter(
    _layer: nn.Module, args: tuple[object, ...], named: Mapping[str, object]
) -> tuple[tuple[object, ...], dict[str, object]] | None:
    layer_pass = _layer_pass.get()
    if layer_pass is None:
        return None
    if args and isinstance(args[0], Tensor):
        return (layer_pass.enter(args[0]), *args[1:]), dict(named)
    for name, value in named.items():
        if isinstance(value, Tensor):
            return args, {**named, name: layer_pass.enter(value)}
    raise BackboneError("its layers read no tensor")
