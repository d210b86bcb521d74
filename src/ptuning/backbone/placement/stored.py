"""The weights of a model as they are stored: opened where a tensor is packed or spread, counted, and fingerprinted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from ptuning.backbone.placement.devices import is_offloaded, weights_of
from ptuning.errors import BackboneError
from ptuning.files import sha256

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Number of values of each weight in the fingerprint, besides the whole embedding table.
FINGERPRINT_SAMPLES = 256


def fingerprint(model: PreTrainedModel, table: nn.Module, *, name: str) -> str:
    """Return hashes of the embedding table and of samples of every weight: the same for any number format of weights
    that are not quantised, and wherever they lie. Of quantised ones the codes and their scales are hashed; the first
    half, the table's, is the same for all formats.

    All processes over which the weights are spread must ask for it. Raises BackboneError if weights are quantised and
    offloaded at once.
    """
    from accelerate.utils import align_module_device

    with align_module_device(table):
        rows = _as_bytes(whole(cast("Tensor", table.weight)).to(torch.bfloat16))  # a table of codes, too
    weights = _codes(model, name=name) if is_packed(model) else map(whole, weights_of(model))
    samples = [sha256(_as_bytes(_sample(weight))) for weight in weights]
    # Sorted, since the names and the order of weights differ between releases of transformers.
    return f"{sha256(rows)[:16]}-{sha256(''.join(sorted(samples)).encode())[:16]}"


def is_packed(model: PreTrainedModel) -> bool:
    """Whether some weights are codes, which stand for numbers by scales beside them."""
    if getattr(model.config, "quantization_config", None) is None:
        return False
    return any(is_wrapped(one) or not one.is_floating_point() for one in model.state_dict().values())


def is_wrapped(tensor: Tensor) -> bool:
    """Whether a tensor is of a class that keeps codes and scales inside."""
    return hasattr(_own(tensor), "__tensor_flatten__")


def _codes(model: PreTrainedModel, *, name: str) -> Iterator[Tensor]:
    """Yield what quantised weights are saved as, tied ones once: codes, scales and what was left as it was."""
    if is_offloaded(model):
        raise BackboneError(
            f"{name}: its weights are quantised, and some are offloaded, so which ones they are cannot be told; load "
            "it without a device map, or not quantised"
        )
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    for key, saved in model.state_dict().items():
        if key not in tied:
            yield from opened(saved)


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor whose parts lie in several processes (a DTensor) in one piece; any other as it is."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def _own(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that lies in this process."""
    local = getattr(tensor, "to_local", None)
    return tensor if local is None else local()


def opened(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the plain tensors that a tensor consists of in this process: the codes and scales of a packed one."""
    tensor = _own(tensor)
    parts = getattr(tensor, "__tensor_flatten__", None)
    if parts is None:
        yield tensor
        return
    for part in parts()[0]:
        yield from opened(getattr(tensor, part))


def stored_tensors(model: nn.Module) -> list[Tensor]:
    """Return the tensors that a model holds in this process: of packed weights their codes and scales."""
    saved = [*model.state_dict().values(), *model.parameters(), *model.buffers()]
    return [part for one in saved for part in opened(one.detach()) if not part.is_meta]


def _sample(weight: Tensor) -> Tensor:
    step = max(1, weight.numel() // FINGERPRINT_SAMPLES)
    return weight.detach().reshape(-1)[::step]


def _as_bytes(values: Tensor) -> bytes:
    """Return the bytes of numbers as bfloat16, of codes as they are."""
    values = values.detach()
    if values.is_floating_point():
        values = values.to(torch.bfloat16)
    return values.cpu().contiguous().view(torch.uint8).numpy().tobytes()
