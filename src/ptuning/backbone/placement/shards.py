"""One model over several processes, of which each holds a part of the weights. All of them see the same rows."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from ptuning.errors import BackboneError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

How = Literal["tp", "layers"]
START = "torchrun --nproc-per-node N -m ptuning ..."


@dataclass(frozen=True)
class Shards:
    """How the weights of a model are spread over ``processes``: by tensor parallelism (``tp``), in which each computes
    with its own part of every layer; or its ``layers`` one by one (FSDP), each put together when it is run.
    """

    how: How
    processes: int

    @classmethod
    def of(cls, model: nn.Module) -> Shards | None:
        """Return how the weights of a model are spread; None if they are all here."""
        for weight in model.parameters():
            if is_spread(weight):
                whole_layers = any(hasattr(module, "unshard") for module in model.modules())
                return cls("layers" if whole_layers else "tp", int(weight.device_mesh.size()))  # type: ignore[attr-defined]
        return None


def is_spread(tensor: Tensor) -> bool:
    """Whether the parts of a tensor lie in several processes (a DTensor)."""
    return hasattr(tensor, "full_tensor")


def launched() -> int:
    """Return the number of processes that a launcher has started."""
    told = os.environ.get("WORLD_SIZE", "1")
    return int(told) if told.isdecimal() else 1


def check_launch(how: str) -> None:
    """Raise a BackboneError if as many processes run as a way to spread a model cannot use."""
    if how != "map" and launched() == 1:
        raise BackboneError(
            f"shard '{how}' spreads the model over several processes, and there is one; start several with: {START}; "
            "or use shard 'map': one process over all devices, the processor's memory and the disk"
        )
    if how == "map" and launched() > 1:
        raise BackboneError(
            f"shard 'map' is one process over all devices, and WORLD_SIZE says that there are {launched()}; start it "
            "without torchrun, or use shard 'tp' or 'layers'"
        )


def tensor_parallel(config: PretrainedConfig, *, name: str) -> object:
    """Return what transformers needs to load a model in tensor parallelism over all processes.
    Raises BackboneError if the model has no plan for it, or transformers is too old; says what else it can do.
    """
    try:
        from transformers.distributed.configuration_utils import DistributedConfig
    except ImportError as error:
        raise BackboneError(
            f"{name}: this release of transformers knows no tensor parallelism of this kind ({error}); install "
            "transformers 5.23, or use shard=layers or shard=map"
        ) from error
    if not getattr(config.get_text_config(), "base_model_tp_plan", None):
        raise BackboneError(
            f"{name}: transformers has no plan for the tensor parallelism of {config.model_type}; use shard=layers, "
            "which any model with a list of layers takes, or shard=map (one process)"
        )
    return DistributedConfig(tp_size=launched(), tp_plan="auto")


def shard_layers(layers: Iterable[nn.Module], *, device: torch.device, name: str) -> None:
    """Spread the weights of layers over all processes; what is not in a layer (table, norm, head) stays whole in each.

    A layer is put together when it is run, and again in the backward pass. The root of the model is left alone: its
    embedding table is used by itself, which FSDP does not allow. Raises BackboneError if there are no layers, or torch
    is too old.
    """
    found = list(layers)
    if not found:
        raise BackboneError(f"{name}: the model has no list of layers that could be spread; use shard=map")
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
    except ImportError as error:
        raise BackboneError(f"shard 'layers' needs torch 2.6 or later ({error}); use shard=map") from error
    mesh = init_device_mesh(device.type, (launched(),))
    for layer in found:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)  # each is its own root, which would keep its weights


def spread_product(hidden: Tensor, weight: Tensor) -> Tensor:
    """Return ``hidden @ weight.T`` in float32, (..., V), of a weight (V, H) that is spread and hidden states that every
    process has.
    """
    from torch.distributed.tensor import DTensor, Replicate

    mesh = weight.device_mesh  # type: ignore[attr-defined]
    everywhere = DTensor.from_local(hidden.float(), mesh, [Replicate()] * mesh.ndim, run_check=False)
    found: Tensor = (everywhere @ weight.float().T).full_tensor()  # type: ignore[attr-defined]
    return found
