"""The language model: find, load, freeze, embed, run. The one module that knows transformers; knows no templates'
pieces, no prompts and no training.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from ptuning import defaults
from ptuning.errors import BackboneError, closest
from ptuning.files import sha256
from ptuning.fill import Ids, Kind

if TYPE_CHECKING:
    from transformers import Cache, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Dtype = Literal["auto", "float32", "bfloat16"]
# How many values of each weight go into the fingerprint besides the whole embedding table.
FINGERPRINT_SAMPLES = 256
# Rows without a limit of their own (tokenizers say 1e30) are bounded by this many tokens.
UNBOUNDED_TOKENS = 1 << 20

_gather: ContextVar[tuple[Tensor, Tensor] | None] = ContextVar("ptuning_gather", default=None)


class TextTokenizer:
    """A transformers tokenizer as templates need it: no special tokens added, special text in records is plain text.

    Args:
        tokenizer: The tokenizer; a copy of it is used, so the caller's stays as it is.
        max_tokens: Longest row that the model takes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int) -> None:
        self._tokenizer = tokenizer
        self.max_tokens = min(max_tokens, int(min(tokenizer.model_max_length, UNBOUNDED_TOKENS)))
        self.mask_id: int | None = tokenizer.mask_token_id
        self.stop_id: int | None = tokenizer.eos_token_id
        self.unknown_id: int | None = tokenizer.unk_token_id
        self.special_ids: Mapping[str, int] = {
            token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        self.prefix_ids, self.suffix_ids, self.segment_id = self._probe_specials()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, without special tokens."""
        if not texts:
            return []
        encoded = self._tokenizer(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return [list(ids) for ids in encoded["input_ids"]]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, without special tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def token(self, token_id: int) -> str:
        """Return a token as a person reads it: a space stays a space, other invisible characters are escaped."""
        text = str(self._tokenizer.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        written = self._tokenizer.convert_ids_to_tokens(token_id)
        return text if text.strip() or text == " " else repr(text)[1:-1] or str(written)

    def _probe_specials(self) -> tuple[Ids, Ids, int]:
        """Ask the tokenizer where it puts special tokens and which segment id a single sentence gets."""
        bare = self.encode(["a"])[0]
        whole = self._tokenizer("a", verbose=False)
        ids = list(whole["input_ids"])
        at = next((i for i in range(len(ids) - len(bare) + 1) if ids[i : i + len(bare)] == bare), None)
        if at is None:
            raise BackboneError(f"the tokenizer gives {ids} with special tokens and {bare} without; it cannot be used")
        segments = whole.get("token_type_ids", [0])
        return tuple(ids[:at]), tuple(ids[at + len(bare) :]), int(segments[min(at, len(segments) - 1)])


class Backbone:
    """A language model with its tokenizer.

    Args:
        model: A causal or masked language model of transformers with its head.
        tokenizer: The tokenizer of the model; it is copied, not changed.
        name: Known name, folder or hub id, for the record.
        revision: Commit of the hub, or None.

    Raises:
        BackboneError: If the model is neither causal nor masked, or if its inputs cannot be embeddings.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str, revision: str | None = None
    ) -> None:
        self.model = model
        self.name = name
        self.revision = revision
        self.kind: Kind = kind_of(model.config, has_mask=tokenizer.mask_token_id is not None)
        accepted = inspect.signature(model.forward).parameters
        if "inputs_embeds" not in accepted:
            raise BackboneError(
                f"{name}: {type(model).__name__} takes no embeddings as input, so slots cannot be filled"
            )
        self._takes_positions = "position_ids" in accepted
        self._takes_segments = "token_type_ids" in accepted and "token_type_ids" in tokenizer.model_input_names
        self._first_position = _first_position(model)
        self.tokenizer = TextTokenizer(tokenizer, max_tokens=_context(model.config) - self._first_position)
        self.width = int(self.embed(torch.zeros(1, 1, dtype=torch.int64, device=self.device)).shape[-1])
        self.vocabulary = len(tokenizer)
        model.base_model.register_forward_hook(_gather_hook)

    @property
    def device(self) -> torch.device:
        """Where the embedding table lies."""
        return self._table_weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return self.model.dtype

    @property
    def parameters(self) -> int:
        """Number of weights, tied ones counted once."""
        return sum(weight.numel() for weight in self.model.parameters())

    @functools.cached_property
    def fingerprint(self) -> str:
        """Two halves of 16 hexadecimal digits: the embedding table, and samples of every weight.

        Values are hashed as bfloat16, so that the same weights loaded as float32 have the same fingerprint.
        """
        table = _as_bfloat16_bytes(self._table_weight)
        samples = []
        for weight in self.model.parameters():
            step = max(1, weight.numel() // FINGERPRINT_SAMPLES)
            samples.append(sha256(_as_bfloat16_bytes(weight.detach().reshape(-1)[::step])))
        # Sorted digests, since the names and the order of weights differ between releases of transformers.
        return f"{sha256(table)[:16]}-{sha256(''.join(sorted(samples)).encode())[:16]}"

    @property
    def _embedding(self) -> nn.Module:
        return self.model.get_input_embeddings()

    @property
    def _table_weight(self) -> Tensor:
        weight = self._embedding.weight
        if not isinstance(weight, Tensor):
            raise BackboneError(f"{self.name}: the input embeddings of {type(self.model).__name__} have no weight")
        return weight

    @property
    def embedding_rows(self) -> int:
        """Number of token ids that the model can embed; at least as many as the tokenizer has."""
        return len(self._table_weight)

    def freeze(self) -> None:
        """Put the model into evaluation mode and stop its weights from taking gradients."""
        self.model.eval()
        self.model.requires_grad_(False)

    def embed(self, token_ids: Tensor) -> Tensor:
        """Return what the model sees for token ids, through its own embedding call (scaled where the model scales).

        Args:
            token_ids: (B, T) int64.

        Returns:
            (B, T, E) in the dtype of the embedding's output.
        """
        embedded: Tensor = self._embedding(token_ids)
        return embedded

    def table(self) -> Tensor:
        """Return the embeddings of all tokens of the tokenizer, (V, E) float32, without gradients."""
        with torch.no_grad():
            return self.embed(torch.arange(self.vocabulary, device=self.device)[None])[0].float()

    def run(
        self,
        embeddings: Tensor,
        *,
        mask: Tensor,
        positions: Tensor,
        rows: Tensor,
        cols: Tensor,
        cache: Cache | None = None,
        keep_cache: bool = False,
    ) -> tuple[Tensor, Cache | None]:
        """Run the model and return logits at the asked positions only.

        Args:
            embeddings: (B, T, E).
            mask: (B, T_all) int64; 1 at tokens, cached ones included.
            positions: (B, T) int64; from 0 in each row, whatever the model itself counts from.
            rows: (N,) int64; in which rows logits are wanted.
            cols: (N,) int64; and in which columns.
            cache: Keys and values of earlier tokens.
            keep_cache: Whether to return keys and values for the next call.

        Returns:
            (N, V) float32 logits over the model's vocabulary, and the cache if asked for.

        Source: docs/architecture.md, decision 7 (a hook on the body gathers before the head runs).
        """
        inputs: dict[str, object] = {"inputs_embeds": embeddings, "attention_mask": mask}
        if self._takes_positions:
            inputs["position_ids"] = positions + self._first_position
        if self._takes_segments:
            inputs["token_type_ids"] = torch.full_like(positions, self.tokenizer.segment_id)
        if self.kind == "causal":
            inputs |= {"use_cache": keep_cache, "past_key_values": cache}
        token = _gather.set((rows, cols))
        try:
            output = self.model(**inputs, return_dict=True)
        finally:
            _gather.reset(token)
        return output.logits[0].float(), output.get("past_key_values")  # (N, V)

    @staticmethod
    def reorder(cache: Cache | None, rows: Tensor) -> None:
        """Let row i of a cache hold what row ``rows[i]`` held, in place (to repeat rows, or to follow beams)."""
        if cache is None:
            raise BackboneError("this model keeps no cache of keys and values")
        cache.reorder_cache(rows)  # type: ignore[arg-type]  # any int64 tensor will do


def load_backbone(name: str | Path = defaults.BACKBONE, *, dtype: Dtype = "auto", device: str = "auto") -> Backbone:
    """Load a frozen language model.

    Args:
        name: A known name (``smollm2-135m``), a local folder, or a hub id.
        dtype: ``float32`` or ``bfloat16``; ``auto`` is bfloat16 on a GPU and float32 on a CPU, where it is the
            faster one unless the processor multiplies bfloat16 tiles.
        device: ``cpu``, ``cuda``, ``cuda:1``, ...; ``auto`` takes a GPU if there is one.

    Returns:
        The backbone, frozen and in evaluation mode.

    Raises:
        BackboneError: If there is no such backbone, or if it is damaged, unsafe or of an unknown kind.
    """
    place = _device(device)
    kind = _dtype(dtype, place)
    name = str(name)
    if name in defaults.KNOWN:
        folder, revision = str(_default_folder(name)), None
    else:
        folder, revision = find_backbone(name)
    model, tokenizer = _load(folder, name=name, dtype=kind)
    model.to(place)  # type: ignore[arg-type]  # the stub of Module.to is lost behind a decorator
    backbone = Backbone(model, tokenizer, name=name, revision=revision)
    backbone.freeze()
    return backbone


def load_tokenizer(name: str | Path = defaults.BACKBONE) -> tuple[TextTokenizer, Kind]:
    """Load what templates need of a backbone, without its weights.

    Raises:
        BackboneError: As :func:`load_backbone`.
    """
    name = str(name)
    folder = str(_default_folder(name)) if name in defaults.KNOWN else find_backbone(name)[0]
    config, tokenizer, kind = _read_tokenizer(folder, name=name)
    return TextTokenizer(tokenizer, max_tokens=_context(config)), kind


def find_backbone(name: str) -> tuple[str, str | None]:
    """Return where to load a backbone from, and its hub revision: a folder, or what the hub has under that id.

    Raises:
        BackboneError: If there is neither; says what names are known and how to use a folder.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise BackboneError(
                f"{name} is no backbone: it has no config.json; a folder must hold a model and its "
                "tokenizer as save_pretrained writes them"
            )
        return str(path), None
    advice = (
        f"known names: {', '.join(defaults.KNOWN)}; or give a folder written by save_pretrained, or a hub id "
        "such as gpt2 or owner/name"
    )
    if closest(name, defaults.KNOWN):
        raise BackboneError(f"no such backbone: {name}.{closest(name, defaults.KNOWN)} ({advice})")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or not name.strip():
        raise BackboneError(f"no such backbone folder: '{name}'; {advice}")
    return _find_on_hub(name, advice)


def kind_of(config: object, *, has_mask: bool) -> Kind:
    """Say from a model's config whether it is causal or masked.

    Raises:
        BackboneError: If it is neither.
    """
    from transformers.models.auto import modeling_auto

    if getattr(config, "is_encoder_decoder", False):
        raise BackboneError("encoder-decoder models are not supported yet; use a causal or a masked language model")
    model_type = str(getattr(config, "model_type", ""))
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    masked = modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    named = list(getattr(config, "architectures", None) or [])
    heads: dict[str, Kind] = {str(causal.get(model_type)): "causal", str(masked.get(model_type)): "masked"}
    for architecture in named:
        if architecture in heads:
            return heads[architecture]
    # No or another head is named: the family decides, and where it has both (BERT) whether there is a mask token.
    if model_type in masked and (has_mask or model_type not in causal):
        return "masked"
    if model_type in causal:
        return "causal"
    raise BackboneError(
        f"model type '{model_type}' has neither a causal nor a masked language-model head in transformers"
    )


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turn whatever transformers' readers raise into an error that says which backbone cannot be loaded."""
    with quiet():
        try:
            yield
        except BackboneError as error:
            raise BackboneError(f"{name}: {error}") from error
        except Exception as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise BackboneError(
                f"cannot load the backbone '{name}': {first} ({type(error).__name__}). The folder must hold config.json, "
                "a tokenizer and whole safetensors files"
            ) from error


def _read_tokenizer(folder: str, *, name: str) -> tuple[PretrainedConfig, PreTrainedTokenizerBase, Kind]:
    import transformers

    with _reading(name):
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        return config, tokenizer, kind_of(config, has_mask=tokenizer.mask_token_id is not None)


def _load(folder: str, *, name: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load model and tokenizer from safetensors, never from pickles, and never with code from the model's folder."""
    import transformers

    _, tokenizer, kind = _read_tokenizer(folder, name=name)
    auto = transformers.AutoModelForCausalLM if kind == "causal" else transformers.AutoModelForMaskedLM
    with _reading(name):
        model, info = auto.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )  # type: ignore[misc]  # with output_loading_info it returns a pair
    missing = sorted(info["missing_keys"])
    if missing:
        raise BackboneError(
            f"the backbone '{name}' lacks weights of {type(model).__name__}: {', '.join(missing[:3])}"
            f"{' and more' if len(missing) > 3 else ''}; it was saved without its language-model head"
        )
    return model, tokenizer


def _default_folder(name: str) -> Path:
    """Return the cached default backbone, converting it first if need be."""

    def convert(gguf: Path, target: Path) -> None:
        import transformers

        # The reader of GGUF files has a progress bar of its own that nothing else silences.
        with quiet(), contextlib.redirect_stderr(io.StringIO()):
            # Unpacked on reading: newer releases would keep the weights in GGUF blocks otherwise.
            packing = getattr(transformers, "GgufConfig", None)
            options = {"quantization_config": packing(dequantize=True)} if packing else {}
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
            read = transformers.AutoModelForCausalLM.from_pretrained(
                str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32, **options
            )
            # A model read from GGUF refuses save_pretrained, so a fresh one takes its weights.
            plain = {
                k: v for k, v in read.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")
            }
            fresh = type(read)(type(read.config)(**plain))
            fresh.load_state_dict(read.state_dict())
            fresh.bfloat16().save_pretrained(target)
            tokenizer.save_pretrained(target)

    return defaults.cached_folder(name, convert)


def _find_on_hub(name: str, advice: str) -> tuple[str, str | None]:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    reason = "the hub is switched off (HF_HUB_OFFLINE)"
    revision = None
    if not offline:
        # One short question first: the download itself would try for half a minute where there is no network.
        try:
            revision = HfApi().model_info(name, timeout=5.0).sha
        except HFValidationError as error:
            raise BackboneError(f"no such backbone: '{name}' is no hub id; {advice}") from error
        except HfHubHTTPError as error:
            reason = f"the hub says {str(error).splitlines()[0]}"
        except Exception as error:  # any failure of the network means the same here
            reason = f"the hub cannot be reached ({type(error).__name__})"
    try:
        folder = snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=revision is None)
    except (LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise BackboneError(
            f"no such backbone: '{name}' is no folder, not in the hub's cache, and {reason}; {advice}"
        ) from error
    return folder, revision or Path(folder).name


def _gather_hook(_module: nn.Module, _inputs: object, output: Mapping[str, Tensor]) -> Mapping[str, Tensor] | None:
    """Keep the asked positions of the last hidden state, so that the head runs on nothing else."""
    asked = _gather.get()
    if asked is None:
        return None
    hidden = output["last_hidden_state"]  # (B, T, H)
    output["last_hidden_state"] = hidden[asked[0], asked[1]][None]  # type: ignore[index]  # (1, N, H)
    return output


def _first_position(model: PreTrainedModel) -> int:
    """Return what the model counts positions from: RoBERTa's table keeps its first rows for padding."""
    tables = [module for name, module in model.named_modules() if name.endswith("position_embeddings")]
    padding = getattr(tables[0], "padding_idx", None) if tables else None
    return 0 if padding is None else int(padding) + 1


def _context(config: object) -> int:
    return int(getattr(config, "max_position_embeddings", None) or UNBOUNDED_TOKENS)


def _as_bfloat16_bytes(weight: Tensor) -> bytes:
    return weight.detach().to(torch.bfloat16).cpu().contiguous().view(torch.uint8).numpy().tobytes()


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


def _dtype(name: str, device: torch.device) -> torch.dtype:
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in known:
        raise BackboneError(f"unknown dtype '{name}'; use auto, {' or '.join(known)}.{closest(name, known)}")
    return known[name]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' own progress bars and notices while ptuning shows its own."""
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
