"""Quantised weights: how a model is asked for in a format of fewer bits, which one it has, and what that means for a
prompt that was trained in another.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ptuning.errors import BackboneError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# The package that makes each format.
PACKAGES: Mapping[str, str] = {"int8": "torchao", "nf4": "bitsandbytes", "int8-bnb": "bitsandbytes"}
# What is known of a prompt that is used in another format than it was trained in.
# Source: docs/scale.md, where it was measured.
TRAVELS = "prompts were measured to score alike in both, within the error of the measurement; evaluate it again"
ANOTHER = (
    "weights of 4 bits make another model of a small one, and prompts scored 0.27 there instead of 0.40 (smollm2-135m) "
    "or 0.02 to 0.57 instead of 0.69 (Gemma 3 270M); train it in the format that it is used in, or evaluate it again"
)
UNKNOWN = "how prompts do there was not measured; evaluate it again"
OLDER = "an older release wrote down less of the format, so whether it is the same cannot be told; evaluate it again"
# Formats in which prompts were trained and used.
MEASURED = ("torchao int8-weight-only", "bitsandbytes int8", "bitsandbytes nf4")
# What a module of bitsandbytes calls the order that it moves its weights to.
REORDERS = "support_avx512bf16_for_cpu"


def asked_format(quantize: str, *, dtype: torch.dtype) -> object:
    """Return what transformers needs to quantise a model on loading, to one of ``sources.QUANTIZE``.
    Raises BackboneError if the package of the format is missing.
    """
    package = PACKAGES[quantize]
    if find_spec(package) is None:
        raise BackboneError(f"quantize '{quantize}' needs the package {package}: pip install 'ptuning[quantized]'")
    imported(package)
    import transformers

    if quantize == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return transformers.TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False))
    if quantize == "int8-bnb":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_quant_storage=torch.uint8
    )


def imported(package: str) -> None:
    """Import a package that makes a format, without what it says of kernels that a machine does not have; and let it
    say nothing in each pass of how it computes.
    """
    logging.getLogger(package).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import_module(package)


def import_for(stored: str | None) -> None:
    """Import what a folder of a format (:func:`format_of`) needs, if it is one of those that are known here."""
    package = (stored or "").split(" ")[0]
    if package in PACKAGES.values() and find_spec(package) is not None:
        imported(package)


def keep_in_place(model: nn.Module) -> None:
    """Let weights of 4 bits stay as they were loaded.

    At the first pass without gradients, bitsandbytes moves them on processors with AVX512-BF16 into another order.
    Products with these have no gradient, and they are saved with scales that belong to others (seen in 0.50.2).
    """
    for module in model.modules():
        if hasattr(module, REORDERS):
            setattr(module, REORDERS, False)


def format_of(config: PretrainedConfig) -> str | None:
    """Return the format of a model's quantised weights in words: method, type, bits and how many weights share a scale;
    None if they are not quantised.

    Example:
        >>> import transformers
        >>> asked = {"quant_method": "gptq", "bits": 4, "group_size": 128}
        >>> format_of(transformers.GPT2Config(quantization_config=asked))
        'gptq, 4 bits, groups of 128'
    """
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    about: dict[str, Any] = dict(found) if isinstance(found, Mapping) else found.to_dict()
    method = str(getattr(about.get("quant_method"), "value", about.get("quant_method")))
    if method == "bitsandbytes" and about.get("load_in_4bit"):
        double = ", scales in 8 bits" if about.get("bnb_4bit_use_double_quant") else ""
        return f"bitsandbytes {about.get('bnb_4bit_quant_type')}, 4 bits, groups of 64{double}"
    if method == "bitsandbytes":
        return "bitsandbytes int8, 8 bits, a scale for each row"
    if method == "torchao":
        return _of_torchao(about)
    bits, group = about.get("bits"), about.get("group_size")
    return ", ".join(
        [method, *([f"{bits} bits"] if bits else []), *([f"groups of {group}"] if group and group > 0 else [])]
    )


def _of_torchao(about: Mapping[str, Any]) -> str:
    """Return the format of a config of torchao: its class names what it does, such as ``Int8WeightOnlyConfig``."""
    asked = about.get("quant_type", {}).get("default", {})
    kind = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", str(asked.get("_type", "")).removesuffix("Config")).lower()
    bits = re.search(r"(\d+)-weight", kind)
    data = asked.get("_data", {})
    granularity = data.get("granularity") or {}
    group = data.get("group_size") or (granularity.get("_data") or {}).get("group_size")
    shared = f"groups of {group}" if group else "a scale for each row"
    return ", ".join(["torchao " + kind, *([f"{bits[1]} bits"] if bits else []), shared])


def in_another_format(trained: str | None, used: str | None) -> str | None:
    """Return what is known of a prompt that was trained in one format (:func:`format_of`) and is used in another; None
    if it is the same.

    Example:
        >>> in_another_format(None, "torchao int8-weight-only, 8 bits, a scale for each row") == TRAVELS
        True
        >>> in_another_format("gptq, 4 bits", "gptq, 4 bits") is None
        True
    """
    if trained == used:
        return None
    if trained and used and used.split(" ")[0] == trained:
        return OLDER
    if used and "4 bits" in used:
        return ANOTHER
    return TRAVELS if all(text is None or text.startswith(MEASURED) for text in (trained, used)) else UNKNOWN
