"""Load a backbone: find it, read its weights from safetensors, and try it on a few tokens."""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from ptuning.backbone import sources
from ptuning.backbone.backbone import Backbone, quiet
from ptuning.backbone.layers import layers_of
from ptuning.backbone.number_format import (
    choose_dtype,
    format_of,
    import_quietly,
    quantization_config,
    short_name,
    warn_if_slow,
)
from ptuning.backbone.probes import check_reading
from ptuning.backbone.sources import LoadOptions, check_no_revision, find_backbone
from ptuning.backbone.tokenizer import TextTokenizer, decoder_start, kind_of, longest_row, text_ends
from ptuning.backbone.weights import Shards, check_launch, shard_layers, tensor_parallel
from ptuning.errors import BackboneError, PTuningError, closest
from ptuning.template.segments import Kind

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

FOLDER_NEEDS = "The folder must hold config.json, a tokenizer and whole safetensors files"
CODE_NEEDS = "It runs only if you ask for it: read it, then give trust_remote_code=true"
QUANTIZE_NEEDS = "Not every machine and model can be quantised so; try another quantize, or none"
SMALLER = "take fewer bits for its weights (dtype, quantize), spread them (shard=map), or use device=cpu"
GGUF_NEEDS = "transformers reads causal models of common architectures; take the model's safetensors instead"


def load_backbone(
    name: str | Path = sources.BACKBONE,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    device_map: str | Mapping[str, str | int] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    max_length: int | None = None,
    quantize: str | None = None,
    shard: str | None = None,
) -> Backbone:
    """Load a language model, frozen and in evaluation mode.

    Args:
        name: A known name (``smollm2-135m``), a local folder, a GGUF file, or a hub id.
        dtype: ``float32``, ``bfloat16`` or ``float16``, or torch's; ``auto`` takes the GPU's half precision, and
            float32 elsewhere (:func:`~ptuning.backbone.number_format.choose_dtype`); ``dtype_reason`` says why.
        device: ``cpu``, ``cuda``, ``cuda:1``, ``mps``, ...; ``auto`` takes a GPU (CUDA, then Apple's) if there is one.
        device_map: Instead of a device, where each module goes, as transformers takes it: ``auto`` for all GPUs and
            then the memory, or a mapping from modules to devices, ``cpu`` and ``disk`` included.
        revision: Branch, tag or commit on the hub; by default the newest of the main branch.
        token: Access token of the hub; by default that of ``hf auth login`` or ``HF_TOKEN``. False sends none.
        cache_dir: Where downloads are kept; by default the hub's own cache.
        attn_implementation: ``sdpa``, ``eager``, ...; by default transformers' choice.
        trust_remote_code: Whether code that comes with the model may run. Read it before.
        max_length: Most tokens of a row, for everything that this backbone is used for; by default as many as the
            model reads. Fields of longer rows are truncated.
        quantize: ``int8`` (torchao, weights only), ``nf4`` or ``int8-bnb`` (bitsandbytes): fewer bits for the weights
            of linear layers. A folder that is quantised already loads without.
        shard: For a model that one device does not hold: ``tp`` (tensor parallelism) or ``layers`` (FSDP) over the
            processes that torchrun started, or ``map`` over all devices, the memory and the disk in one process.

    Raises:
        BackboneError: If there is no such backbone, if it is damaged, unsafe or of an unknown kind, or if an option has
            a wrong value.
    """
    options = LoadOptions(
        dtype=short_name(dtype),
        device=str(device),
        device_map=device_map,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
        max_length=max_length,
        quantize=quantize,
        shard=shard,
    )
    if options.shard is not None:
        check_launch(options.shard)
    place = _device(options.device)
    for target in set(options.device_map.values()) if isinstance(options.device_map, Mapping) else ():
        if target != "disk":
            _device(f"cuda:{target}" if isinstance(target, int) else str(target))
    if attn_implementation is not None and "/" not in attn_implementation:
        from transformers import AttentionInterface

        known = sorted({"eager", *AttentionInterface().valid_keys()})
        if attn_implementation not in known:
            raise BackboneError(
                f"unknown attn_implementation '{attn_implementation}'; use {', '.join(known)}."
                f"{closest(attn_implementation, known)}"
            )
    name = str(name)
    folder, found_revision = _find(name, options)
    with _reading(name):
        backbone = _load(folder, name, found_revision, options, place)
    backbone.load_options = options
    return backbone


def _load(folder: str, name: str, revision: str | None, options: LoadOptions, place: torch.device) -> Backbone:
    config, tokenizer, kind, _ = _read_tokenizer(folder, name, options)
    stored = format_of(config)
    if stored is not None and options.quantize is not None:
        raise BackboneError(f"the backbone '{name}' is quantised already: {stored}; leave out quantize")
    chosen = choose_dtype(options.dtype, place, quantize=options.quantize is not None)
    warn_if_slow(chosen.dtype, place)
    logger.info("%s in %s: %s", name, short_name(chosen.dtype), chosen.reason)
    import_quietly((stored or "").split(" ")[0])
    device_map = "auto" if options.shard == "map" else options.device_map
    if device_map is None and (options.quantize is not None or stored is not None):
        device_map = {"": str(place)}  # quantised weights are made where they stay
    is_placed = device_map is not None or options.shard == "tp"
    # float16 has a smaller range than the other formats, so the fingerprint is taken of the weights as they are stored.
    is_halved = chosen.dtype == torch.float16 and not is_placed
    dtype = getattr(torch, short_name(config.dtype or torch.float32)) if is_halved else chosen.dtype
    more: dict[str, Any] = {"device_map": device_map, "attn_implementation": options.attn_implementation}
    if options.shard == "tp":
        more["distributed_config"] = tensor_parallel(config, name=name)
    if options.quantize is not None:
        more["quantization_config"] = quantization_config(options.quantize, dtype=dtype)
    model = _load_model(folder, kind, name, options, dtype=dtype, more=more)
    backbone = Backbone(model, tokenizer, name=name, revision=revision, is_tokenizer_shared=False)
    backbone.dtype_reason, backbone.max_length = chosen.reason, options.max_length
    # The fingerprint of weights that are spread is taken in all processes, or before.
    if is_halved or options.shard in ("tp", "layers"):
        logger.debug("%s: fingerprint %s", name, backbone.fingerprint)
    if is_halved:
        model.half()
    if options.shard == "layers":
        shard_layers(layers_of(model), device=place, name=name)
        backbone.shards = Shards.of(model)
    if not is_placed:
        model.to(place)  # type: ignore[arg-type]  # the stub of Module.to is lost behind a decorator
    backbone.freeze()
    check_reading(backbone)
    return backbone


def _load_model(
    folder: str, kind: Kind, name: str, options: LoadOptions, *, dtype: torch.dtype, more: Mapping[str, Any]
) -> PreTrainedModel:
    """Load a model. Weights come from safetensors, never from pickles, and no code of the folder is run that was not
    asked for.
    """
    import transformers

    auto = {
        "causal": transformers.AutoModelForCausalLM,
        "masked": transformers.AutoModelForMaskedLM,
        "permuted": transformers.AutoModelForCausalLM,
        "encoder-decoder": transformers.AutoModelForSeq2SeqLM,
    }[kind]
    with _reading(name, needs=FOLDER_NEEDS if options.quantize is None else QUANTIZE_NEEDS):
        model, info = auto.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=options.trust_remote_code,
            output_loading_info=True,
            **{option: value for option, value in more.items() if value is not None},
        )
    missing = sorted(info["missing_keys"])
    if missing:
        listed = f"{', '.join(missing[:3])}{' and more' if len(missing) > 3 else ''}"
        raise BackboneError(
            f"the backbone '{name}' lacks weights of {type(model).__name__}: {listed}; it was saved without its "
            "language-model head"
        )
    return cast("PreTrainedModel", model)


def load_tokenizer(
    name: str | Path = sources.BACKBONE, options: LoadOptions | None = None
) -> tuple[TextTokenizer, Kind]:
    """Load the tokenizer and kind of a backbone, without its weights; errors as :func:`load_backbone`."""
    name, options = str(name), options or LoadOptions()
    folder, _ = _find(name, options)
    with _reading(name):
        config, tokenizer, kind, generation = _read_tokenizer(folder, name, options)
        return TextTokenizer(
            tokenizer,
            max_tokens=longest_row(config),
            decoder_ids=decoder_start(config, generation),
            end_ids=text_ends(config, generation),
            is_shared=False,
        ), kind


def _find(name: str, options: LoadOptions) -> tuple[str, str | None]:
    weights = sources.gguf_weights(name)
    if weights is None:
        return find_backbone(name, options)
    check_no_revision(name, options)
    return str(sources.cached_folder(weights, lambda gguf, folder: _convert(gguf, folder, name=name))), None


@contextlib.contextmanager
def _reading(name: str, *, needs: str = FOLDER_NEEDS) -> Iterator[None]:
    """Turn any error of reading and trying a model into one that names the backbone and says what it ``needs``: config,
    tokenizer and weights are files of others, in which anything may stand.
    """
    with quiet():
        try:
            yield
        except PTuningError as error:
            if name in str(error) or not isinstance(error, BackboneError):
                raise
            raise BackboneError(f"{name}: {error}") from error
        except torch.OutOfMemoryError as error:
            raise BackboneError(f"the backbone '{name}' does not fit into the GPU's memory; {SMALLER}") from error
        except Exception as error:
            first, *more = (str(error).strip() or type(error).__name__).splitlines()
            first = " ".join([first, *(line.strip() for line in more[:1] if first.endswith(":"))])
            if "trust_remote_code" in str(error):
                first, needs = "it brings code of its own", CODE_NEEDS
            raise BackboneError(
                f"cannot load the backbone '{name}': {first} ({type(error).__name__}). {needs}"
            ) from error


def _read_tokenizer(
    folder: str, name: str, options: LoadOptions
) -> tuple[PretrainedConfig, PreTrainedTokenizerBase, Kind, GenerationConfig | None]:
    import transformers

    with _reading(name):
        trusted = options.trust_remote_code
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trusted)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted)
        if options.max_length is not None:
            longest = min(longest_row(config), int(tokenizer.model_max_length))
            if options.max_length > longest:
                raise BackboneError(
                    f"max_length is {options.max_length:,}, and the model reads {longest:,} tokens at most"
                )
            tokenizer.model_max_length = options.max_length
        kind = kind_of(config, has_mask=tokenizer.mask_token_id is not None)
        generation = None
        if (Path(folder) / "generation_config.json").is_file():  # transformers ignores a damaged one silently
            generation = transformers.GenerationConfig.from_pretrained(folder)
        return config, tokenizer, kind, generation


def _convert(gguf: Path, folder: Path, *, name: str) -> None:
    """Write a GGUF file as ``save_pretrained`` would have: what is quantised as bfloat16, what is not as float32."""
    import transformers

    dtype = _dtype_of_gguf(gguf, name=name)
    # The reader of GGUF files has its own progress bar, which only this silences.
    with _reading(name, needs=GGUF_NEEDS), contextlib.redirect_stderr(io.StringIO()):
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    read = read_gguf(gguf, name=name)
    # A model read from GGUF refuses save_pretrained, so its weights go into a new model.
    plain = {k: v for k, v in read.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    with _reading(name, needs=GGUF_NEEDS):
        fresh = type(read)(type(read.config)(**plain))
        fresh.load_state_dict(read.state_dict())
        fresh.to(dtype)  # type: ignore[arg-type]  # the stub of Module.to is lost behind a decorator
    with quiet():
        fresh.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def read_gguf(gguf: Path, *, name: str) -> PreTrainedModel:
    """Return the model of a GGUF file with unpacked float32 weights. Raises BackboneError if transformers cannot."""
    import transformers

    with _reading(name, needs=GGUF_NEEDS), contextlib.redirect_stderr(io.StringIO()):
        # Unpack on reading: newer releases would otherwise keep the weights in GGUF blocks.
        packing = getattr(transformers, "GgufConfig", None)
        options = {"quantization_config": packing(dequantize=True)} if packing else {}
        read = transformers.AutoModelForCausalLM.from_pretrained(
            str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32, **options
        )
    return cast("PreTrainedModel", read)


def _dtype_of_gguf(gguf: Path, *, name: str) -> torch.dtype:
    """Return the dtype that loses nothing of weights that were not quantised; of the others bfloat16 is enough.
    Raises BackboneError if the file is damaged, since transformers would read past the end of one that is cut off; or
    if it asks for more than its weights can fill.
    """
    from gguf import GGMLQuantizationType, GGUFReader

    try:
        reader = GGUFReader(gguf)
        matrices = [tensor for tensor in reader.tensors if len(tensor.shape) > 1]
        single = {name: field.parts[-1] for name, field in reader.fields.items() if len(field.types) == 1}
        header = {name: part.item() for name, part in single.items() if part.size == 1}
        shapes = [tensor.shape.tolist() for tensor in reader.tensors]
    except Exception as error:
        raise BackboneError(
            f"cannot read the weights of {name}: {gguf.name} is not a whole GGUF file, but cut off or damaged ({error})"
        ) from error
    sources.check_plausible(header, shapes, where=f"the header of {gguf.name}")
    exact = {GGMLQuantizationType.F32, GGMLQuantizationType.F16}
    return torch.float32 if all(tensor.tensor_type in exact for tensor in matrices) else torch.bfloat16


def _device(name: str) -> torch.device:
    has_apple = torch.backends.mps.is_available()
    if name == "auto":
        if torch.cuda.is_available():
            rank = os.environ.get("LOCAL_RANK", "0")  # an earlier launcher may have left another value there
            return torch.device("cuda", (int(rank) if rank.isdecimal() else 0) % torch.cuda.device_count())
        return torch.device("mps" if has_apple else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ValueError, OverflowError) as error:
        first = str(error).splitlines()[0].partition(". ")[0].removesuffix(".")  # torch goes on for hundreds of words
        known = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count())), *["mps"] * has_apple]
        raise BackboneError(f"device '{name}' cannot be used: {first}; use auto, {', '.join(known)}") from error
    return device
