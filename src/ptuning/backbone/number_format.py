"""Number formats of weights: the format of ``dtype="auto"``, a warning of formats that are slow on a device, and
quantization.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from ptuning.errors import BackboneError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

logger = logging.getLogger(__name__)

# A processor has units for products in bfloat16 if it names one of these. Source: torch.cpu.get_capabilities, and
# docs/decisions.md, decision 9, for what happens without them.
UNITS = ("avx512_bf16", "amx_bf16", "bf16")
# Format of ``quantize`` -> the package that makes it.
PACKAGES: Mapping[str, str] = {"int8": "torchao", "nf4": "bitsandbytes", "int8-bnb": "bitsandbytes"}
# Advice about a prompt that is used in another format than it was trained in, and the formats that were measured.
# Source: docs/scale.md.
ALIKE = "prompts were measured to score alike in both, within the error of the measurement; evaluate it again"
ANOTHER = (
    "weights of 4 bits make another model of a small one, and prompts scored 0.27 there instead of 0.40 (smollm2-135m) "
    "or 0.02 to 0.57 instead of 0.69 (Gemma 3 270M); train it in the format that it is used in, or evaluate it again"
)
UNKNOWN = "prompts were not measured there; evaluate it again"
MEASURED = ("torchao int8-weight-only", "bitsandbytes int8", "bitsandbytes nf4")
# Attribute by which a module of bitsandbytes reorders its weights.
REORDERS = "support_avx512bf16_for_cpu"


class ChosenDtype(NamedTuple):
    """A number format, and the reason for it."""

    dtype: torch.dtype
    reason: str


def choose_dtype(name: str, device: torch.device, *, quantize: bool = False) -> ChosenDtype:
    """Return the format of a name. ``auto`` is the GPU's half precision, else float32; of weights that are left when
    others are quantised, bfloat16 where that is not slow.

    A processor with units for bfloat16 is faster in it, but prompts were not shown to score the same as in float32.
    Source: docs/decisions.md, decision 9.
    """
    if name != "auto":
        return ChosenDtype(getattr(torch, name), "it was asked for")
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return ChosenDtype(torch.bfloat16, "the GPU computes in it")
        return ChosenDtype(torch.float16, "the GPU has no units for bfloat16")
    if device.type != "cpu":
        return ChosenDtype(torch.float32, f"bfloat16 is not measured on {device.type}")
    if not units():
        return ChosenDtype(torch.float32, "the processor has no units for bfloat16")
    if quantize:
        return ChosenDtype(torch.bfloat16, "quantising is for less memory, and the processor computes in it")
    return ChosenDtype(torch.float32, "scores in bfloat16 were not shown to be equal; dtype=bfloat16 may be faster")


def units() -> list[str]:
    """Return the names of the units that this processor has for products in bfloat16."""
    ask: Callable[[], Mapping[str, object]] = getattr(torch.cpu, "get_capabilities", dict)  # torch 2.8 and later
    capabilities = ask()
    return [unit for unit in UNITS if capabilities.get(unit)]


def warn_if_slow(dtype: torch.dtype, device: torch.device) -> None:
    """Log a warning for a format that the processor has no units for."""
    if device.type == "cpu" and dtype != torch.float32 and (dtype == torch.float16 or not units()):
        logger.warning(
            "this processor has no units for %s: a product took 5 to 40 times as long as in float32 on such machines; "
            "leave dtype out, or give float32",
            short_name(dtype),
        )


def short_name(dtype: torch.dtype | str) -> str:
    """Return the name of a number format, such as ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def quantization_config(quantize: str, *, dtype: torch.dtype) -> object:
    """Return the config with which transformers quantises a model on loading, to a format of :data:`PACKAGES`.
    Raises BackboneError if the package of the format is missing.
    """
    package = PACKAGES[quantize]
    if find_spec(package) is None:
        raise BackboneError(f"quantize '{quantize}' needs the package {package}: pip install 'ptuning[quantized]'")
    import_quietly(package)
    import transformers

    if quantize == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return transformers.TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False))
    if quantize == "int8-bnb":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_quant_storage=torch.uint8
    )


def import_quietly(package: str) -> None:
    """Import a package that quantises, without its notices on import and in each pass."""
    if package in PACKAGES.values() and find_spec(package) is not None:
        logging.getLogger(package).setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import_module(package)


def keep_in_place(model: nn.Module) -> None:
    """Let weights of 4 bits stay as they were loaded.

    At the first pass without gradients, bitsandbytes moves them on processors with AVX512-BF16 into another order.
    Products with these have no gradient, and they are saved with scales that belong to others (seen in 0.50.2).
    """
    for module in model.modules():
        if hasattr(module, REORDERS):
            setattr(module, REORDERS, False)


def format_of(config: PretrainedConfig) -> str | None:
    """Return the format of a model's quantised weights in words: method, type, bits, number of weights per scale; None
    if they are not quantised.

    Example:
        >>> import transformers
        >>> stored = {"quant_method": "gptq", "bits": 4, "group_size": 128}
        >>> format_of(transformers.GPT2Config(quantization_config=stored))
        'gptq, 4 bits, groups of 128'
    """
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    about: dict[str, Any] = dict(stored) if isinstance(stored, Mapping) else stored.to_dict()
    method = str(getattr(about.get("quant_method"), "value", about.get("quant_method")))
    if method == "bitsandbytes" and about.get("load_in_4bit"):
        double = ", scales in 8 bits" if about.get("bnb_4bit_use_double_quant") else ""
        return f"bitsandbytes {about.get('bnb_4bit_quant_type')}, 4 bits, groups of 64{double}"
    if method == "bitsandbytes":
        return "bitsandbytes int8, 8 bits, a scale for each row"
    bits, group, shared = about.get("bits"), about.get("group_size"), ""
    if method == "torchao":  # the class of its config names what it does, such as Int8WeightOnlyConfig
        inner = about.get("quant_type", {}).get("default", {})
        kind = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", str(inner.get("_type", "")).removesuffix("Config")).lower()
        method, match = f"torchao {kind}", re.search(r"(\d+)-weight", kind)
        data = inner.get("_data", {})
        granularity = (data.get("granularity") or {}).get("_data") or {}
        bits, group = match and match[1], data.get("group_size") or granularity.get("group_size")
        shared = "a scale for each row"
    parts = [method, f"{bits} bits" if bits else "", f"groups of {group}" if group and group > 0 else shared]
    return ", ".join(part for part in parts if part)


def in_another_format(trained: str | None, used: str | None) -> str | None:
    """Return advice about a prompt that was trained in one format (:func:`format_of`) and is used in another; None if
    it is the same.

    Example:
        >>> in_another_format(None, "torchao int8-weight-only, 8 bits, a scale for each row") == ALIKE
        True
        >>> in_another_format("gptq, 4 bits", "gptq, 4 bits") is None
        True
    """
    if trained == used:
        return None
    if used and "4 bits" in used:
        return ANOTHER
    return ALIKE if all(text is None or text.startswith(MEASURED) for text in (trained, used)) else UNKNOWN
