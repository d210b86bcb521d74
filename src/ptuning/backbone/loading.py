"""Load a backbone: find it, read its weights from safetensors, and try it on a few tokens."""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import torch

from ptuning.backbone import sources
from ptuning.backbone.backbone import Backbone, quiet
from ptuning.backbone.number_format import Chosen, automatic, short_name, warn_if_slow
from ptuning.backbone.probes import check_reading
from ptuning.backbone.sources import find_backbone
from ptuning.backbone.tokenizer import TextTokenizer, decoder_start, kind_of, longest_row, text_ends
from ptuning.errors import BackboneError, closest
from ptuning.template.segments import Kind

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Dtype = Literal["auto", "float32", "bfloat16"]


def load_backbone(name: str | Path = sources.BACKBONE, *, dtype: Dtype = "auto", device: str = "auto") -> Backbone:
    """Load a language model, frozen and in evaluation mode.

    Args:
        name: A known name (``smollm2-135m``), a local folder, or a hub id.
        dtype: ``float32`` or ``bfloat16``; ``auto`` takes the faster one that loses nothing on the device
            (:func:`~ptuning.backbone.number_format.automatic`), and the backbone's ``dtype_reason`` says why.
        device: ``cpu``, ``cuda``, ``cuda:1``, ...; ``auto`` takes a GPU if there is one.

    Raises:
        BackboneError: If there is no such backbone, or if it is damaged, unsafe or of an unknown kind.
    """
    place = _device(device)
    asked = _dtype(dtype)
    name = str(name)
    folder, revision = _find(name)
    config, tokenizer, kind = _read_tokenizer(folder, name=name)
    chosen = asked or automatic(place, config)
    warn_if_slow(chosen.dtype, place)
    logger.info("%s in %s: %s", name, short_name(chosen.dtype), chosen.reason)
    model = _load(folder, kind, name=name, dtype=chosen.dtype)
    model.to(place)  # type: ignore[arg-type]  # the stub of Module.to is lost behind a decorator
    backbone = Backbone(model, tokenizer, name=name, revision=revision)
    backbone.dtype_reason = chosen.reason
    backbone.freeze()
    check_reading(backbone)
    return backbone


def load_tokenizer(name: str | Path = sources.BACKBONE) -> tuple[TextTokenizer, Kind]:
    """Load what templates need from a backbone, without its weights; errors as :func:`load_backbone`."""
    name = str(name)
    folder, _ = _find(name)
    config, tokenizer, kind = _read_tokenizer(folder, name=name)
    generation = _generation(folder)
    return TextTokenizer(
        tokenizer,
        max_tokens=longest_row(config),
        decoder_ids=decoder_start(config, generation),
        end_ids=text_ends(config, generation),
    ), kind


def _find(name: str) -> tuple[str, str | None]:
    return (str(_default_folder(name)), None) if name in sources.KNOWN else find_backbone(name)


def _generation(folder: str) -> GenerationConfig | None:
    import transformers

    if not (Path(folder) / "generation_config.json").is_file():
        return None
    return transformers.GenerationConfig.from_pretrained(folder)


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turn any error of transformers' readers into one that names the backbone."""
    with quiet():
        try:
            yield
        except BackboneError as error:
            raise BackboneError(f"{name}: {error}") from error
        except Exception as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise BackboneError(
                f"cannot load the backbone '{name}': {first} ({type(error).__name__}). The folder must hold "
                "config.json, a tokenizer and whole safetensors files"
            ) from error


def _read_tokenizer(folder: str, *, name: str) -> tuple[PretrainedConfig, PreTrainedTokenizerBase, Kind]:
    import transformers

    with _reading(name):
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        return config, tokenizer, kind_of(config, has_mask=tokenizer.mask_token_id is not None)


def _load(folder: str, kind: Kind, *, name: str, dtype: torch.dtype) -> PreTrainedModel:
    """Load a model. Weights come from safetensors, never from pickles, and no code of the folder is run."""
    import transformers

    auto = {
        "causal": transformers.AutoModelForCausalLM,
        "masked": transformers.AutoModelForMaskedLM,
        "permuted": transformers.AutoModelForCausalLM,
        "encoder-decoder": transformers.AutoModelForSeq2SeqLM,
    }[kind]
    with _reading(name):
        model, info = auto.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise BackboneError(
            f"the backbone '{name}' lacks weights of {type(model).__name__}: {', '.join(missing[:3])}"
            f"{' and more' if len(missing) > 3 else ''}; it was saved without its language-model head"
        )
    return cast("PreTrainedModel", model)


def _default_folder(name: str) -> Path:

    def convert(gguf: Path, target: Path) -> None:
        import transformers

        # The reader of GGUF files has its own progress bar, which only this silences.
        with _reading(name), contextlib.redirect_stderr(io.StringIO()):
            # Unpack on reading: newer releases would otherwise keep the weights in GGUF blocks.
            packing = getattr(transformers, "GgufConfig", None)
            options = {"quantization_config": packing(dequantize=True)} if packing else {}
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
            read = transformers.AutoModelForCausalLM.from_pretrained(
                str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32, **options
            )
        # A model read from GGUF refuses save_pretrained, so its weights go into a new model.
        plain = {k: v for k, v in read.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
        with quiet():
            fresh = type(read)(type(read.config)(**plain))
            fresh.load_state_dict(read.state_dict())
            fresh.bfloat16().save_pretrained(target)
            tokenizer.save_pretrained(target)

    return sources.cached_folder(name, convert)


def _device(name: str) -> torch.device:
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise BackboneError(f"device '{name}' cannot be used: {first}; use auto, cpu or cuda") from error
    return device


def _dtype(name: str) -> Chosen | None:
    """Return the number format that is asked for; None for ``auto``."""
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if name == "auto":
        return None
    if name not in known:
        raise BackboneError(f"unknown dtype '{name}'; use auto, {' or '.join(known)}.{closest(name, known)}")
    return Chosen(known[name], "it was asked for")
