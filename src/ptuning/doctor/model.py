"""A backbone: whether it is found and loads, which one it is, and what it can do."""

from __future__ import annotations

import time
from collections.abc import Iterator

from ptuning.backbone import sources
from ptuning.backbone.backbone import Backbone
from ptuning.backbone.families import families
from ptuning.backbone.loading import load_backbone
from ptuning.backbone.placement.stored import stored_tensors
from ptuning.backbone.sources import LoadOptions
from ptuning.doctor.checks import Check, Group
from ptuning.engine.memory import tensor_bytes
from ptuning.errors import PTuningError
from ptuning.template.segments import FILLS_MASKS

BACKBONE = Group("backbone")
NAME_ANOTHER = "say which one, and where it lies, with --backbone"


def find(name: str, options: LoadOptions, *, is_asked: bool) -> Check:
    """Look where a backbone comes from. One of the hub is downloaded, if its cache has none. That one is missing which
    nobody has asked for, the default, is a warning.
    """
    try:
        return BACKBONE.ok("found", f"{name}: {_place(name, options)}")
    except PTuningError as error:
        if is_asked:
            return BACKBONE.failed("found", error, NAME_ANOTHER)
        return BACKBONE.warning("found", error, f"install it, or {NAME_ANOTHER}")


def load(name: str, options: LoadOptions) -> tuple[Backbone | None, list[Check]]:
    """Load a backbone that was found, and look at it."""
    began = time.perf_counter()
    try:
        backbone = load_backbone(name, **vars(options))
    except (MemoryError, RuntimeError) as error:  # of a device, too
        remedy = "free memory, or take a smaller backbone, --dtype bfloat16 or --device-map auto"
        return None, [BACKBONE.failed("loads", f"it does not fit: {str(error) or type(error).__name__}", remedy)]
    except PTuningError as error:
        return None, [BACKBONE.failed("loads", error, f"mend its files, or {NAME_ANOTHER}")]
    return backbone, list(_described(backbone, time.perf_counter() - began))


def _place(name: str, options: LoadOptions) -> str:
    weights = sources.gguf_weights(name)
    if weights is None:
        folder, revision = sources.find_backbone(name, options)
        return "the folder" if revision is None else f"from the hub, commit {revision[:12]}, in {folder}"
    sources.check_no_revision(name, options)
    if sources.is_cached(weights):
        return f"its converted copy, {sources.cache_root() / weights.copy}"
    return f"{weights.find()}, which is converted the first time"


def _described(backbone: Backbone, seconds: float) -> Iterator[Check]:
    how = ", ".join(backbone.loaded.values())
    reason = f" ({backbone.dtype_reason})" if backbone.dtype_reason else ""
    yield BACKBONE.ok("loads", f"in {seconds:.1f} s on {backbone.device}: {how}{reason}")
    yield BACKBONE.ok("fingerprint", backbone.fingerprint)
    head = type(backbone.model).__name__
    taken = tensor_bytes(stored_tensors(backbone.model)) / 1e6
    yield BACKBONE.ok("kind", f"{backbone.kind}, {head}, {backbone.parameters / 1e6:,.1f} M weights in {taken:,.1f} MB")
    sizes = f"width {backbone.width:,}, vocabulary {backbone.vocabulary:,}"
    yield BACKBONE.ok("sizes", f"{sizes}, rows of {backbone.tokenizer.max_tokens:,} tokens at most")
    known = next((one for one in families() if one.head == head), None)
    slots = (
        known.slots if known is not None else ("on either side" if backbone.kind == "encoder-decoder" else "anywhere")
    )
    writes = "fills masks" if backbone.kind in FILLS_MASKS else "writes"
    tested = "" if known is not None else "; no family that the tests run"
    yield BACKBONE.ok("slots", f"{slots}; it {writes} answers{tested}")
