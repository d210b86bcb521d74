"""Which weights a training moves beside the slots, their optimizer, and code that needs gradients."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.trained_weights import with_adapters
from ptuning.config import TrainConfig, derived_seed

Work = TypeVar("Work", bound=Callable[..., object])


def with_gradients(work: Work) -> Work:
    """Let a function or generator that trains compute gradients, though its caller may have turned them off."""
    return torch.inference_mode(mode=False)(torch.enable_grad()(work))


def to_train(backbone: Backbone, config: TrainConfig) -> Backbone:
    """Return what is trained of a frozen backbone: itself, a copy, or one with a head or adapters."""
    if config.train_backbone == "none":
        return backbone
    if config.train_backbone == "full":
        return backbone.copy()
    if config.train_backbone == "head":  # which ``prepare`` has put on it
        other = backbone.copy(share=True)
        other.put_head(copy.deepcopy(other.head))
        return other
    return with_adapters(
        backbone,
        rank=config.lora_rank,
        alpha=config.lora_alpha,
        targets=config.lora_targets,
        seed=derived_seed(config.seed, "adapter weights"),
    )


def make_optimizer(
    encoders: Sequence[nn.Module], weights: Mapping[str, Tensor], config: TrainConfig
) -> torch.optim.AdamW:
    """Return the optimizer of a prompt encoder, of one of deep slots if it is the second, and of the backbone's
    ``weights`` that are trained. Each group names the ``setting`` of its peak learning rate.
    """
    groups: list[dict[str, list[nn.Parameter] | list[Tensor] | float | str]] = [
        {"params": list(encoder.parameters()), "lr": getattr(config, setting), "setting": setting}
        for encoder, setting in zip(encoders, ("lr", "deep_lr"), strict=False)
    ]
    setting = {"lora": "lora_lr", "head": "head_lr"}.get(config.train_backbone, "backbone_lr")
    decay = config.backbone_weight_decay if config.train_backbone == "full" else 0.0
    for is_matrix in (True, False):
        own = [weight for weight in weights.values() if (weight.ndim > 1) == is_matrix]
        if own:
            own_decay = decay if is_matrix else 0.0
            groups.append(
                {"params": own, "lr": getattr(config, setting), "weight_decay": own_decay, "setting": setting}
            )
    # Fused where it matters: other variants hold a second copy of all weights while they step.
    fused = True if config.train_backbone == "full" else None
    return torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=fused)


def learning_rates(optimizer: torch.optim.Optimizer, share: float, peaks: Sequence[float]) -> dict[str, float]:
    """Return the learning rates at a share of their peaks by their settings, of groups that hold any numbers."""
    groups = zip(optimizer.param_groups, peaks, strict=True)
    return {group["setting"]: share * peak for group, peak in groups if any(w.numel() for w in group["params"])}


def linear_schedule(step: int, total_steps: int, *, warmup_fraction: float) -> float:
    """Return the share of the peak learning rate at a step: linear warm-up, then linear decay to zero."""
    warmup = math.ceil(total_steps * warmup_fraction)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return (total_steps - step) / max(1, total_steps - warmup)


def overflows(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step may be larger than float32 holds."""
    sizes = [
        float(group["lr"]) * max(1.0 / (1.0 - group["betas"][0]), float(group["weight_decay"]))
        for group in optimizer.param_groups
    ]
    return bool(max(sizes) > torch.finfo(torch.float32).max)
