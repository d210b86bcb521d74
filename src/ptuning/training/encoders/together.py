"""Encoders of several prompts at once: slot vectors by one batched product, and one step of AdamW for all weights.

On a GPU a step is as long as its launches, and each prompt's encoder and optimizer would launch as much as a layer. A
processor gains nothing by it, so prompts go one after another there, and rounding stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from ptuning.training.encoders.encoder import PromptEncoder

# Types of devices on which encoders work together. Source: docs/scale.md, "On a GPU".
DEVICES = frozenset({"cuda"})
# Encoders whose products can be batched. An LSTM is one call of the device's own library for each prompt.
BATCHED = ("none", "mlp")
# A batched product holds a copy of each weight until its backward pass, in float32.
COPY_BYTES = 4
# Weights of an encoder that have a row for each slot.
BY_SLOT = ("start", "inputs", "free")
# The least that torch adds to the norm of gradients before it divides by it.
NORM_EPS = 1e-6


def works_together(device: torch.device) -> bool:
    """Whether encoders of several prompts work together on a device."""
    return device.type in DEVICES


def copied_bytes(encoder: PromptEncoder, device: torch.device) -> int:
    """Return the bytes for each weight of an encoder that a step together with others takes on a device besides."""
    return COPY_BYTES if works_together(device) and encoder.kind in BATCHED else 0


class StackedEncoders:
    """Slot vectors of several encoders of one kind and one backbone, by one product for each layer.

    Each prompt gets its own (P, E) vectors of it in :attr:`parts`, where gradients end; :meth:`backward` brings them to
    the weights of the encoders.

    Args:
        encoders: Of a kind in :data:`BATCHED`, without dropout; they may have different numbers of slots.
    """

    def __init__(self, encoders: Sequence[PromptEncoder]) -> None:
        most = max(len(one.start) for one in encoders)
        named = [{**dict(one.named_parameters()), **dict(one.named_buffers())} for one in encoders]
        stacked = {name: torch.stack([_padded(one[name], name, most) for one in named]) for name in named[0]}
        first = encoders[0]

        def run(own: Mapping[str, Tensor]) -> Tensor:
            vectors: Tensor = functional_call(first, dict(own), ())
            return vectors

        made: Tensor = torch.vmap(run, randomness="different")(stacked)  # (N, P, E) of N encoders
        rows = zip(made.unbind(), encoders, strict=True)
        self._made = [own if len(one.start) == most else own[: len(one.start)] for own, one in rows]
        # Each is a leaf of its own, so that a pass of one prompt touches nothing of the others.
        self.parts = [one.detach().requires_grad_(True) for one in self._made]

    def backward(self) -> None:
        """Bring the gradients of the vectors to the weights."""
        found = [(one, part.grad) for one, part in zip(self._made, self.parts, strict=True) if part.grad is not None]
        if found:
            torch.autograd.backward([one for one, _ in found], [gradient for _, gradient in found])


def stacked_where_it_helps(encoders: Sequence[PromptEncoder]) -> dict[PromptEncoder, tuple[StackedEncoders, Tensor]]:
    """Return for each encoder whose product can be batched with others what computes it, and its slot vectors there."""
    found: dict[PromptEncoder, tuple[StackedEncoders, Tensor]] = {}
    for kind in BATCHED:
        own = [one for one in encoders if one.kind == kind and not one.drops and len(one.start)]
        if len(own) > 1:
            stacked = StackedEncoders(own)
            found |= {one: (stacked, part) for one, part in zip(own, stacked.parts, strict=True)}
    return found


def _padded(weight: Tensor, name: str, slots: int) -> Tensor:
    """Return a weight with as many slots as the largest encoder has; slots do not see each other."""
    missing = slots - len(weight) if name in BY_SLOT else 0
    return functional.pad(weight, (0, 0, 0, missing)) if missing else weight


def adamw_step(optimizers: Sequence[torch.optim.Optimizer], max_norms: Sequence[float]) -> None:
    """Clip the gradients of each optimizer of AdamW to its largest norm and move its weights, in one call for all.

    States are those that torch's own step would leave. Gradients are used up.
    Source: Loshchilov and Hutter (2019), arXiv:1711.05101, algorithm 2, as ``torch.optim.AdamW`` has it.
    """
    moved: list[tuple[int, dict[str, Any], nn.Parameter]] = [
        (owner, group, weight)
        for owner, optimizer in enumerate(optimizers)
        for group in optimizer.param_groups
        for weight in group["params"]
        if weight.grad is not None
    ]
    if not moved:
        return
    owners, groups = [owner for owner, _, _ in moved], [group for _, group, _ in moved]
    weights = [weight.detach() for _, _, weight in moved]
    gradients = [weight.grad for _, _, weight in moved if weight.grad is not None]
    states = [_state_of(optimizers[owner], weight) for owner, _, weight in moved]
    firsts, seconds, steps = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))
    (beta, second_beta), eps = groups[0]["betas"], float(groups[0]["eps"])  # no setting changes them
    with torch.no_grad():
        torch._foreach_mul_(gradients, _shares(gradients, owners, max_norms))
        torch._foreach_add_(steps, 1)
        counts = [int(step) for step in steps]
        torch._foreach_mul_(weights, [1.0 - group["lr"] * group["weight_decay"] for group in groups])
        torch._foreach_lerp_(firsts, gradients, 1.0 - beta)
        torch._foreach_mul_(seconds, second_beta)
        torch._foreach_addcmul_(seconds, gradients, gradients, 1.0 - second_beta)
        # Gradients make room for what the first moments are divided by.
        torch._foreach_copy_(gradients, seconds)
        torch._foreach_sqrt_(gradients)
        torch._foreach_div_(gradients, [(1.0 - second_beta**count) ** 0.5 for count in counts])
        torch._foreach_add_(gradients, eps)
        sizes = [-group["lr"] / (1.0 - beta**count) for group, count in zip(groups, counts, strict=True)]
        torch._foreach_addcdiv_(weights, firsts, gradients, sizes)


def _state_of(optimizer: torch.optim.Optimizer, weight: nn.Parameter) -> dict[str, Tensor]:
    """Return the state of a weight; before the first step, zeros."""
    found: dict[str, Tensor] = optimizer.state[weight]
    if not found:
        found["step"] = torch.zeros((), dtype=torch.float32)
        found["exp_avg"], found["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
    return found


def _shares(gradients: list[Tensor], owners: Sequence[int], max_norms: Sequence[float]) -> list[float]:
    """Return for each gradient what it is multiplied by, so that all of its prompt's have at most the largest norm."""
    squares = torch.stack(torch._foreach_norm(gradients)).square()
    at = torch.tensor(owners, device=squares.device)
    norms = squares.new_zeros(len(max_norms)).index_add_(0, at, squares).sqrt().tolist()
    shares = [most / (norm + NORM_EPS) for most, norm in zip(max_norms, norms, strict=True)]
    return [1.0 if shares[owner] >= 1.0 else shares[owner] for owner in owners]  # no number stays none
