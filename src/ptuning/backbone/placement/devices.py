"""Where the weights of a model lie: in memory, on several devices, or offloaded; and other modules over the same ones.

Hooks of accelerate on the modules move inputs between devices, and read offloaded weights for the moment of a pass.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def devices_of(model: nn.Module) -> set[torch.device]:
    """Return the devices on which the modules of a model are run."""
    running = {run_on(module) for module in model.modules()} - {None}
    there = {weight.device for weight in model.parameters() if not weight.is_meta}
    return {device for device in running if device is not None} or there


def run_on(module: nn.Module) -> torch.device | None:
    """Return the device on which a module is run by a hook; None without one."""
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return None if device is None else torch.device(device)


def replace_forward(module: nn.Module, forward: Callable[..., object]) -> None:
    """Let a module run another function, inside of the hook that moves its inputs and weights, if it has one."""
    setattr(module, "_old_forward" if run_on(module) is not None else "forward", forward)


def is_offloaded(model: nn.Module) -> bool:
    """Whether some weights are only in memory while they are used."""
    return any(weight.is_meta for weight in model.parameters())


def weights_of(model: nn.Module) -> Iterator[Tensor]:
    """Yield every weight once; offloaded ones are read one module at a time."""
    from accelerate.utils import align_module_device

    for module, names in _weights_by_module(model):
        with align_module_device(module):
            yield from (module._parameters[name] for name in names)  # type: ignore[misc]  # none of them is None


def number_of_weights(model: nn.Module) -> int:
    """Return how many numbers the weights of a model are; tied weights count once."""
    return sum(_numbers(module.get_parameter(name)) for module, names in _weights_by_module(model) for name in names)


def _numbers(weight: Tensor) -> int:
    """Return how many numbers a weight is; codes of 4 bits, two in a byte, know the shape that they stand for."""
    shape = getattr(getattr(weight, "quant_state", None), "shape", None)
    return weight.numel() if shape is None else math.prod(shape)


def _weights_by_module(model: nn.Module) -> Iterator[tuple[nn.Module, list[str]]]:
    # Offloaded weights that are tied are no longer one object; the model knows their names.
    tied = set(getattr(model, "all_tied_weights_keys", None) or {}) if is_offloaded(model) else set()
    seen: set[nn.Parameter] = set()
    for prefix, module in model.named_modules():
        own = dict(module.named_parameters(prefix, recurse=False))
        fresh = {name: weight for name, weight in own.items() if name not in tied and weight not in seen}
        seen.update(fresh.values())
        yield module, [name.rpartition(".")[2] for name in fresh]


def sharing(model: PreTrainedModel) -> PreTrainedModel:
    """Return new modules over the same weights: what is done to them or to their parameters (mode, gradients, hooks,
    adapters) is not done to the model's own.
    """
    memo: dict[int, Any] = {id(one): one for one in model.buffers()}
    for weight in model.parameters():
        # Quantised weights are classes of their own, which carry what they need beside their values.
        plain = type(weight) is nn.Parameter and not weight.is_meta
        memo[id(weight)] = nn.Parameter(weight.detach(), requires_grad=False) if plain else weight
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for name in ("weights_map", "tied_params_map"):  # the weights that a hook keeps
            kept = getattr(hook, name, None)
            memo[id(kept)] = kept
    return copy.deepcopy(model, memo)
