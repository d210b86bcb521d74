"""Where a backbone lies: in a local folder, or on the hub and in its cache. Knows no model."""

from __future__ import annotations

import os
from pathlib import Path

from ptuning.backbone import sources
from ptuning.errors import BackboneError, closest


def find_backbone(name: str) -> tuple[str, str | None]:
    """Return where to load a backbone from, and its hub revision: a folder, or what the hub has under that id.

    Raises:
        BackboneError: If there is neither; says what names are known and how to use a folder.
    """
    path = Path(name).expanduser()
    if name.strip() and path.is_dir():
        if not (path / "config.json").is_file():
            if any(path.glob("*.gguf")):
                raise BackboneError(_gguf(name))
            raise BackboneError(
                f"{name} is no backbone: it has no config.json; a folder must hold a model and its "
                "tokenizer as save_pretrained writes them"
            )
        return str(path), None
    if path.is_file():
        raise BackboneError(
            _gguf(name) if path.suffix == ".gguf" else f"{name} is a file; a backbone is a folder with config.json"
        )
    advice = (
        f"known names: {', '.join(sources.KNOWN)}; or give a folder written by save_pretrained, or a hub id "
        "such as gpt2 or owner/name"
    )
    if closest(name, sources.KNOWN) and "/" not in name:
        raise BackboneError(f"no such backbone: {name}.{closest(name, sources.KNOWN)} ({advice})")
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
        # One short question first: the download itself would try for half a minute where there is no network.
        try:
            revision = HfApi().model_info(name, timeout=5.0).sha
        except HFValidationError as error:
            raise BackboneError(f"no such backbone: '{name}' is no hub id; {advice}") from error
        except HfHubHTTPError as error:
            reason = f"the hub says {str(error).splitlines()[0]}"
        except Exception as error:  # noqa: BLE001 - any failure of the network means the same here
            reason = f"the hub cannot be reached ({type(error).__name__})"
    try:
        folder = snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=revision is None)
    except (LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise BackboneError(
            f"no such backbone: '{name}' is no folder, not in the hub's cache, and {reason}; {advice}"
        ) from error
    return folder, revision or Path(folder).name
