"""LoRA adapters on a model's linear layers, made by peft."""

import json
import re
import warnings
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Annotated

import torch
from pydantic import Field, StringConstraints
from torch import Tensor, nn

from ptuning.backbone.randomness import own_draws
from ptuning.config import listed_names
from ptuning.errors import BackboneError, ConfigError, PromptError
from ptuning.files import LARGEST, FileModel, parse_json, validate

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
PREFIX = "base_model.model."
ADAPTER = "default"
# The remedy for adapters that do not work: attention's linear modules take them in nearly every model.
ADVICE = "set lora_targets to names of its other linear modules, such as q_proj,v_proj"
# Syntax of peft's own name patterns. peft runs patterns from a file as regular expressions, so no others are read.
Pattern = Annotated[str, StringConstraints(pattern=r"^(\.\*\\\.)?\w+$")]
Rank = Annotated[int, Field(ge=1, le=LARGEST)]


class AdapterConfig(FileModel):
    """Keys of peft's config that are read: others could name code to be loaded. peft adapts linear modules and also
    parameters that hold all experts of a layer; a module that stacks two others has a rank of its own.
    """

    target_modules: list[str]
    target_parameters: list[str] | None = None
    r: Rank
    lora_alpha: int | float
    rank_pattern: dict[Pattern, Rank] | None = None
    alpha_pattern: dict[Pattern, int | float] | None = None
    fan_in_fan_out: bool | None = None


def add_adapters(model: nn.Module, *, rank: int, alpha: float, targets: str, seed: int) -> None:
    """Add new adapters to a model (its layers are replaced: pass a copy); untrained, they change nothing.

    ``targets`` is ``all-linear``, ``default`` (peft's choice for the architecture), or names with commas between them.
    Raises ConfigError if peft is missing, and BackboneError if the model has no such layers.
    Source: Hu et al. (2021), section 4.1.
    """
    chosen: str | list[str] | None = {"all-linear": "all-linear", "default": None}.get(targets, listed_names(targets))
    alpha = int(alpha) if alpha == int(alpha) else alpha  # as peft writes its own default
    config = _peft().LoraConfig(r=rank, lora_alpha=alpha, target_modules=chosen, inference_mode=True)
    with own_draws(seed=seed):
        try:
            _inject(model, config)
        except ValueError as error:
            raise BackboneError(
                f"{type(model).__name__} takes no adapters on '{targets}': {str(error).splitlines()[0]}; set "
                "lora_targets to all-linear, or to names of its linear modules"
            ) from error


def adapter_config(model: nn.Module, *, backbone: str) -> bytes:
    """Return the config of a model's adapters as peft writes it, always the same bytes."""
    config = model.peft_config[ADAPTER].to_dict()  # type: ignore[index, union-attr]  # put there by peft
    config = {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
    return (json.dumps({**config, "base_model_name_or_path": backbone}, indent=2, sort_keys=True) + "\n").encode()


def restore_adapters(model: nn.Module, config: bytes, tensors: Mapping[str, Tensor]) -> None:
    """Add saved adapters to a model, with a config from :func:`adapter_config`. Its layers are replaced: pass a copy.
    Raises ConfigError if peft is missing, and PromptError if they do not fit the model.
    """
    try:
        with torch.device("meta"):  # shapes without memory: a damaged config may ask for any rank
            saved = validate(AdapterConfig, parse_json(config.decode()), error=PromptError)
            _inject(model, _peft().LoraConfig(**saved.model_dump(exclude_none=True), inference_mode=True))
    except (PromptError, TypeError, ValueError, RuntimeError) as error:
        raise PromptError(
            f"the saved adapters do not fit {type(model).__name__}: {str(error).splitlines()[0]}; use the backbone "
            "they were trained on"
        ) from error
    check_fits(tensors, adapter_parameters(model), model=model)
    for name, weight in list(model.named_parameters()):
        if weight.is_meta:  # it gets the saved values, on the device of the layer that it belongs to
            layer, (owner, _, key) = name.partition(".lora_")[0], name.rpartition(".")
            device = next(other.device for other in model.get_submodule(layer).parameters() if not other.is_meta)
            value = tensors[_saved_name(name)].to(device, weight.dtype, copy=True)
            model.get_submodule(owner).register_parameter(key, nn.Parameter(value, requires_grad=False))


def check_fits(saved: Mapping[str, Tensor], own: Mapping[str, Tensor], *, model: nn.Module) -> None:
    """Raise a PromptError unless saved weights have the names and shapes of a model's own."""
    called = type(model).__name__
    for name, weight in own.items():
        if name not in saved:
            raise PromptError(f"the saved weights lack the key '{name}' of {called}")
        if saved[name].shape != weight.shape:
            raise PromptError(
                f"the saved weights have a wrong shape at '{name}': {tuple(saved[name].shape)}, and {called} has "
                f"{tuple(weight.shape)}"
            )
    if extra := saved.keys() - own.keys():
        raise PromptError(f"the saved weights hold the key '{min(extra)}', which {called} has no place for")


def check_restorable(model: nn.Module, other: nn.Module, *, targets: str) -> None:
    """Check that a model's adapters can be saved and loaded into a copy of the model without them (``other``).
    Raises BackboneError if they cannot be loaded, or differ when loaded.
    """
    saved = adapter_config(model, backbone="")
    what = f"adapters of {type(model).__name__} (lora_targets {targets}) could not be loaded again"
    try:
        restore_adapters(other, saved, adapter_parameters(model))
    except PromptError as error:
        raise BackboneError(f"{what}: {error.__cause__ or error}; {ADVICE}") from error
    again = json.loads(adapter_config(other, backbone=""))
    lost = sorted(name for name, value in json.loads(saved).items() if again.get(name) != value)
    if lost:
        raise BackboneError(f"{what}: peft also builds them from {', '.join(lost)}, which is not read; {ADVICE}")


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights of a model's adapters by the names under which peft saves them."""
    return {_saved_name(name): weight for name, weight in model.named_parameters() if ".lora_" in name}


def _saved_name(name: str) -> str:
    return PREFIX + re.sub(rf"\.{ADAPTER}(?=\.|$)", "", name)


def _inject(model: nn.Module, config: object) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")  # peft sets it right by itself
        # They match parameters, which peft does not check.
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match any targeted")
        _peft().inject_adapter_in_model(config, model)
    for name, weight in model.named_parameters():
        if ".lora_" in name:
            weight.data = weight.data.float()  # adapters are float32 for any backbone dtype, as slot vectors are


def check_peft() -> None:
    """Raise a ConfigError if peft is not installed."""
    if find_spec("peft") is None:
        raise ConfigError(
            "adapters (lora) need the package peft; install it with: pip install 'ptuning[lora]' (or pip install peft)"
        )


def _peft() -> ModuleType:
    """Import peft, which takes seconds, only where adapters are used."""
    check_peft()
    return import_module("peft")
