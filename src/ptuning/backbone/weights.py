"""The weights of a model: where they are (memory, several devices, disk, several processes), as tensors, fingerprinted,
and shared with new modules.

Hooks of accelerate on the modules move inputs between devices, and read offloaded weights during a pass.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from ptuning.errors import BackboneError
from ptuning.files import sha256

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Number of values of each weight in the fingerprint, besides the whole embedding table.
FINGERPRINT_SAMPLES = 256
START = "torchrun --nproc-per-node N -m ptuning ..."


def devices_of(model: nn.Module) -> set[torch.device]:
    """Return the devices on which the modules of a model are run."""
    hooked = {device for module in model.modules() if (device := run_on(module)) is not None}
    return hooked or {weight.device for weight in model.parameters() if not weight.is_meta}


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


def number_of_weights(model: nn.Module) -> int:
    """Return the number of weights of a model; tied weights count once."""
    count = 0
    for module, names in _weights_by_module(model):
        for weight in map(module.get_parameter, names):
            # Codes of 4 bits, two in a byte, know the shape that they stand for.
            shape = getattr(getattr(weight, "quant_state", None), "shape", None)
            count += weight.numel() if shape is None else math.prod(shape)
    return count


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
    """Return new modules over the same weights: changes of them or of their parameters (mode, gradients, hooks,
    adapters) do not change the model.
    """
    memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for weight in model.parameters():
        # Quantised weights are classes of their own, with data besides their values.
        plain = type(weight) is nn.Parameter and not weight.is_meta
        memo[id(weight)] = nn.Parameter(weight.detach(), requires_grad=False) if plain else weight
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for name in ("weights_map", "tied_params_map"):  # the weights that a hook keeps
            kept = getattr(hook, name, None)
            memo[id(kept)] = kept
    return copy.deepcopy(model, memo)


def fingerprint(model: PreTrainedModel, table: nn.Module, *, name: str) -> str:
    """Return hashes of the embedding table and of samples of every weight: the same for any number format of weights
    that are not quantised, and wherever they are. Of quantised ones the codes and their scales are hashed; the first
    half, the table's, is the same for all formats.

    All processes over which the weights are spread must call it. Raises BackboneError if weights are quantised and
    offloaded at once.
    """
    from accelerate.utils import align_module_device

    def weights() -> Iterator[Tensor]:
        if is_packed(model):
            if is_offloaded(model):
                raise BackboneError(
                    f"{name}: its weights are quantised and some are offloaded, so they have no fingerprint; load it "
                    "without a device map, or not quantised"
                )
            tied = set(getattr(model, "all_tied_weights_keys", None) or {})
            for key, saved in model.state_dict().items():
                if key not in tied:
                    yield from _unpacked(saved)
            return
        for module, names in _weights_by_module(model):
            with align_module_device(module):  # offloaded weights are read one module at a time
                yield from (_whole(cast("Tensor", module._parameters[own])) for own in names)

    with align_module_device(table):
        rows = _as_bytes(_whole(cast("Tensor", table.weight)).to(torch.bfloat16))  # a table of codes, too
    samples = []
    for weight in weights():
        step = max(1, weight.numel() // FINGERPRINT_SAMPLES)
        samples.append(sha256(_as_bytes(weight.detach().reshape(-1)[::step])))
    # Sorted, since the names and the order of weights differ between releases of transformers.
    return f"{sha256(rows)[:16]}-{sha256(''.join(sorted(samples)).encode())[:16]}"


def _as_bytes(values: Tensor) -> bytes:
    """Return the bytes of numbers as bfloat16, of codes as they are."""
    values = values.detach()
    if values.is_floating_point():
        values = values.to(torch.bfloat16)
    return values.cpu().contiguous().view(torch.uint8).numpy().tobytes()


def is_packed(model: PreTrainedModel) -> bool:
    """Whether some weights are codes, which stand for numbers by scales next to them."""
    if getattr(model.config, "quantization_config", None) is None:
        return False
    return any(is_wrapped(saved) or not saved.is_floating_point() for saved in model.state_dict().values())


def is_wrapped(tensor: Tensor) -> bool:
    """Whether a tensor is of a class that keeps codes and scales inside."""
    return hasattr(_local(tensor), "__tensor_flatten__")


def _whole(tensor: Tensor) -> Tensor:
    """Return a tensor whose parts are in several processes (a DTensor) in one piece; any other as it is."""
    return tensor.full_tensor() if is_spread(tensor) else tensor  # type: ignore[attr-defined]


def _local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that is in this process."""
    return tensor.to_local() if is_spread(tensor) else tensor  # type: ignore[attr-defined]


def _unpacked(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the plain tensors that a tensor consists of in this process: the codes and scales of a packed one."""
    tensor = _local(tensor)
    parts = getattr(tensor, "__tensor_flatten__", None)
    if parts is None:
        yield tensor
        return
    for part in parts()[0]:
        yield from _unpacked(getattr(tensor, part))


def stored_tensors(model: nn.Module) -> list[Tensor]:
    """Return the tensors that a model holds in this process: of packed weights their codes and scales."""
    saved = [*model.state_dict().values(), *model.parameters(), *model.buffers()]
    return [part for tensor in saved for part in _unpacked(tensor.detach()) if not part.is_meta]


@dataclass(frozen=True)
class Shards:
    """How the weights of a model are spread over ``processes``, all of which see the same rows: by tensor parallelism
    (``tp``), in which each computes with its own part of every layer; or its ``layers`` one by one (FSDP), each put
    together when it is run.
    """

    how: Literal["tp", "layers"]
    processes: int

    @classmethod
    def of(cls, model: nn.Module) -> Shards | None:
        """Return how the weights of a model are spread; None if they are all here."""
        spread = next((weight for weight in model.parameters() if is_spread(weight)), None)
        if spread is None:
            return None
        whole_layers = any(hasattr(module, "unshard") for module in model.modules())
        return cls("layers" if whole_layers else "tp", int(spread.device_mesh.size()))  # type: ignore[attr-defined]


def is_spread(tensor: Tensor) -> bool:
    """Whether the parts of a tensor are in several processes (a DTensor)."""
    return hasattr(tensor, "full_tensor")


def launched() -> int:
    """Return the number of processes that a launcher has started."""
    size = os.environ.get("WORLD_SIZE", "1")
    return int(size) if size.isdecimal() else 1


def check_launch(how: str) -> None:
    """Raise a BackboneError if the number of processes does not fit a way to spread a model."""
    if how != "map" and launched() == 1:
        raise BackboneError(
            f"shard '{how}' spreads the model over several processes, and there is one; start several with: {START}; "
            "or use shard 'map': one process over all devices, the processor's memory and the disk"
        )
    if how == "map" and launched() > 1:
        raise BackboneError(
            f"shard 'map' is one process over all devices, and WORLD_SIZE is {launched()}; start it without torchrun, "
            "or use shard 'tp' or 'layers'"
        )


def tensor_parallel(config: PretrainedConfig, *, name: str) -> object:
    """Return the config with which transformers loads a model in tensor parallelism over all processes.
    Raises BackboneError if the model has no plan for it, or transformers is too old.
    """
    try:
        from transformers.distributed.configuration_utils import DistributedConfig
    except ImportError as error:
        raise BackboneError(
            f"{name}: this release of transformers has no such tensor parallelism ({error}); install transformers "
            "5.23, or use shard=layers or shard=map"
        ) from error
    if not getattr(config.get_text_config(), "base_model_tp_plan", None):
        raise BackboneError(
            f"{name}: transformers has no plan for the tensor parallelism of {config.model_type}; use shard=layers "
            "(any model with a list of layers) or shard=map (one process)"
        )
    return DistributedConfig(tp_size=launched(), tp_plan="auto")


def shard_layers(layers: Iterable[nn.Module], *, device: torch.device, name: str) -> None:
    """Spread the weights of layers over all processes; other weights (table, norm, head) stay whole in each.

    A layer is put together when it is run, and again in the backward pass. The root of the model is left alone: its
    embedding table is used by itself, which FSDP does not allow. Raises BackboneError if there are no layers, or torch
    is too old.
    """
    listed = list(layers)
    if not listed:
        raise BackboneError(f"{name}: the model has no list of layers that could be spread; use shard=map")
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
    except ImportError as error:
        raise BackboneError(f"shard 'layers' needs torch 2.6 or later ({error}); use shard=map") from error
    mesh = init_device_mesh(device.type, (launched(),))
    for layer in listed:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)  # each is its own root, which would keep its weights


def spread_product(hidden: Tensor, weight: Tensor) -> Tensor:
    """Return ``hidden @ weight.T`` in float32, (..., V), of a weight (V, H) that is spread and hidden states that every
    process has.
    """
    from torch.distributed.tensor import DTensor, Replicate

    mesh = weight.device_mesh  # type: ignore[attr-defined]
    everywhere = DTensor.from_local(hidden.float(), mesh, [Replicate()] * mesh.ndim, run_check=False)
    product: Tensor = (everywhere @ weight.float().T).full_tensor()  # type: ignore[attr-defined]
    return product
