"""The files of a prompt: the manifest ``prompt.json``, ``prompt.safetensors`` with the slot vectors, the card
``README.md``, and the folder ``backbone`` where weights of the backbone were trained.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ptuning.backbone.number_format import short_name
from ptuning.backbone.trained_weights import TrainedWeights
from ptuning.engine.soft_prompt import DeepParams
from ptuning.errors import FileError, PromptError
from ptuning.files import (
    Json,
    Unchecked,
    file_error,
    is_abandoned,
    make_folder,
    read_bytes,
    read_json,
    settled,
    sha256,
    staged,
    temporary_folder,
    write_bytes,
    write_json,
    write_text,
)
from ptuning.names import (
    CARD_FILE,
    MANIFEST_FILE,
    MAX_MANIFEST_BYTES,
    PAGE_MARKS,
    PROMPT,
    PROMPT_FOLDER,
    VECTORS_FILE,
    VECTORS_KEY,
    WEIGHTS_FOLDER,
    check_writable,
    delete,
    locked,
)
from ptuning.provenance import VERSION, versions

FORMAT_VERSION = 1
# The prompt includes weights of the backbone. A reader of version 1 alone must refuse it: it would ignore the weights.
WEIGHTS_VERSION = 2
# The prompt has deep slots. A reader of the versions before must refuse it: it would ignore their vectors.
DEEP_VERSION = 3
# Number formats of what deep slots bring, in the file.
DEEP_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# A file of vectors is not larger than its header and two times its float32 numbers, nor than this.
HEADER_BYTES, MAX_VECTORS_BYTES = 2**20, 2**31
# A folder of prompts holds them so many folders deep; the path in it is a prompt's name.
NAME_PARTS = 4
# How often a prompt that does not fit together is read, since another process may be saving it.
ATTEMPTS = 3
# The whole numbers of a manifest, and the least that each may be.
NUMBERS = {"format_version": 1, "slots": 0, "width": 1, "target_tokens": 1, "seed": 0}
REQUIRED_KEYS = ("format_version", "template", "label_words", "backbone", "width", "slots", "method", "vectors_sha256")


@dataclass(frozen=True)
class Stored:
    """The content of a prompt's folder, whose files are whole and fit each other: the manifest, (P, E) slot vectors,
    what deep slots bring and trained weights if there are any, and the manifest's path for messages about its values.
    """

    manifest: Mapping[str, Json]
    vectors: Tensor | None
    weights: TrainedWeights | None
    where: Path
    deep: DeepParams | None = None


def write_prompt(
    folder: Path,
    about: Mapping[str, Json],
    *,
    vectors: Tensor | None,
    weights: TrainedWeights | None,
    deep: DeepParams | None = None,
    overwrite: bool,
) -> None:
    """Write a prompt's folder; errors are those of :meth:`ptuning.prompt.prompt.Prompt.save`.

    ``about`` is the manifest without what follows from the files: format version, checksums and versions of packages.
    """
    kept = vectors if vectors is not None else torch.zeros(0, 0)
    tensors = {VECTORS_KEY: kept.contiguous(), **(_deep_tensors(deep) if deep is not None else {})}
    data = safetensors.torch.save(tensors, {"format": "pt"})
    manifest: dict[str, Json] = {"format_version": FORMAT_VERSION, **about}
    if deep is not None:
        manifest |= {
            "format_version": DEEP_VERSION,
            "deep": deep.to_json(),
            "numbers": sum(map(Tensor.numel, tensors.values())),
        }
    manifest |= {"vectors_sha256": sha256(data), "versions": dict(versions())}
    check_writable(folder, PROMPT, overwrite=overwrite)
    is_new = not folder.exists()
    make_folder(folder)
    try:
        with locked(folder):
            before = check_writable(folder, PROMPT, overwrite=overwrite)  # another process may have been faster
            with temporary_folder(folder) as new:
                write_bytes(new / VECTORS_FILE, data)
                sums = {VECTORS_FILE: sha256(data)}
                if weights is not None:
                    make_folder(new / WEIGHTS_FOLDER)
                    saved = weights.save(new / WEIGHTS_FOLDER)
                    manifest |= {"weights": saved}
                    manifest["format_version"] = max(cast("int", manifest["format_version"]), WEIGHTS_VERSION)
                    hashes = cast("Mapping[str, str]", saved["sha256"])
                    sums |= {f"{WEIGHTS_FOLDER}/{name}": digest for name, digest in hashes.items()}
                _put(folder, new, sums, manifest)
            write_text(folder / CARD_FILE, _card(manifest, weights, len(data)))
            written = {folder / name for name in (MANIFEST_FILE, CARD_FILE, *sums)}
            left = filter(is_abandoned, before.temporary)
            delete(path for path in (*before.ours, *left) if path not in written)
            with contextlib.suppress(OSError):
                (folder / WEIGHTS_FOLDER).rmdir()  # of an earlier prompt, and empty now
    finally:
        if is_new:
            with contextlib.suppress(OSError):
                folder.rmdir()  # nothing could be written


def _put(folder: Path, new: Path, sums: Mapping[str, str], manifest: Mapping[str, Json]) -> None:
    """Move new files into a prompt's folder, so that there is a whole prompt in it at any moment: the files wait under
    names of their own until the manifest names their sums, and :func:`read_prompt` finds them there.
    """
    try:
        for name, digest in sums.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (new / name).replace(staged(folder / name, digest))
        write_json(folder / MANIFEST_FILE, manifest)
        for name, digest in sums.items():
            staged(folder / name, digest).replace(folder / name)
    except OSError as error:
        raise file_error("write", folder, error) from error


def has_prompt(folder: Path) -> bool:
    """Whether a folder holds a prompt, or the training run that made one, be it damaged or not."""
    return any(os.path.lexists(one) for one in (folder / MANIFEST_FILE, folder / PROMPT_FOLDER / MANIFEST_FILE))


def prompt_folders(folder: Path, depth: int = NAME_PARTS) -> Iterator[Path]:
    """Yield the folders that hold a prompt, in order; what is in those, hidden and deeper ones are not looked at.
    An OSError if the folder cannot be read.
    """
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())
    for name in names:
        inner = folder / name
        if has_prompt(inner):
            yield inner
        elif depth > 1 and not inner.is_symlink():
            with contextlib.suppress(OSError):  # one that cannot be read keeps nobody out
                yield from prompt_folders(inner, depth - 1)


def manifest_of(folder: str | Path) -> Path:
    """Return the path of the manifest in a prompt's folder, or in that of the training run which holds one; a FileError
    if there is none.
    """
    path = Path(folder)
    # Unlike Path.is_file, these are False for a name that cannot be a path.
    if not os.path.isfile(path / MANIFEST_FILE) and os.path.isfile(path / PROMPT_FOLDER / MANIFEST_FILE):
        path = path / PROMPT_FOLDER
    where = path / MANIFEST_FILE
    if not os.path.isfile(where):
        raise FileError(
            f"{folder} is not a prompt folder: there is no {MANIFEST_FILE} in it; give a folder written by ptuning "
            "train, or manual:TEMPLATE for a template without slots"
        )
    return where


def read_prompt(folder: str | Path) -> Stored:
    """Read a prompt's folder, or that of the training run which holds one, and check its files.

    Errors are those of :meth:`ptuning.prompt.prompt.Prompt.load`.
    """
    where = manifest_of(folder)
    path = where.parent
    for attempt in itertools.count(1):
        before = read_bytes(where, at_most=MAX_MANIFEST_BYTES)
        try:
            found = _read(path)
        except (FileError, PromptError):
            if attempt >= ATTEMPTS and read_bytes(where, at_most=MAX_MANIFEST_BYTES) == before:
                raise
            continue
        if read_bytes(where, at_most=MAX_MANIFEST_BYTES) == before:  # otherwise another one was saved meanwhile
            return found
    raise AssertionError("the attempts do not end")


def _read(path: Path) -> Stored:
    where, file = path / MANIFEST_FILE, path / VECTORS_FILE
    manifest = read_json(where, at_most=MAX_MANIFEST_BYTES)
    _check_manifest(manifest, where)
    slots, width, digest = manifest["slots"], manifest["width"], str(manifest["vectors_sha256"])
    numbers = slots * width if isinstance(slots, int) and isinstance(width, int) else 0
    has_deep = manifest["format_version"] == DEEP_VERSION
    if has_deep:
        numbers = Unchecked(manifest, f"{where} is damaged", PromptError).at("numbers").whole(least=0)
    data = read_bytes(settled(file, digest), at_most=min(HEADER_BYTES + 8 * abs(numbers), MAX_VECTORS_BYTES))
    tensors = _read_tensors(data, file)
    vectors, rest = tensors[VECTORS_KEY], {name: one for name, one in tensors.items() if name != VECTORS_KEY}
    if rest and not has_deep:
        raise PromptError(f"{file}: extra key '{min(rest)}'; a prompt holds only '{VECTORS_KEY}'")
    if sha256(data) != digest:
        raise PromptError(f"{file} was changed since it was saved: its sha256 is not the one in {MANIFEST_FILE}")
    if slots and tuple(vectors.shape) != (slots, width):
        raise PromptError(f"{file}: wrong shape {tuple(vectors.shape)}, and {MANIFEST_FILE} says ({slots}, {width})")
    about = Unchecked(manifest, f"{where} is damaged", PromptError)
    weights = deep = None
    if manifest["format_version"] == WEIGHTS_VERSION or (has_deep and "weights" in manifest):
        weights = TrainedWeights.load(path / WEIGHTS_FOLDER, about.at("weights"))
    if has_deep:
        deep = _read_deep(rest, about.at("deep"), file)
    return Stored(manifest, vectors if slots or has_deep else None, weights, where, deep)


def _check_manifest(manifest: Mapping[str, Json], where: Path) -> None:
    missing = [key for key in REQUIRED_KEYS if key not in manifest]
    if missing:
        raise PromptError(f"{where}: missing key '{missing[0]}'; the file is damaged, or not a prompt's")
    if manifest["format_version"] not in (FORMAT_VERSION, WEIGHTS_VERSION, DEEP_VERSION):
        raise PromptError(
            f"{where}: format version {manifest['format_version']}, and this ptuning reads "
            f"{FORMAT_VERSION} to {DEEP_VERSION}; update ptuning"
        )
    about = Unchecked(manifest, f"{where} is damaged", PromptError)
    for name, least in NUMBERS.items():
        about.optional(name, functools.partial(Unchecked.whole, least=least))


def _read_tensors(data: bytes, where: Path) -> dict[str, Tensor]:
    try:
        tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError) as error:
        raise PromptError(f"{where} is not a whole safetensors file ({error}); it is cut off or damaged") from error
    if VECTORS_KEY not in tensors:
        raise PromptError(f"{where}: missing key '{VECTORS_KEY}'; it holds {', '.join(sorted(tensors)) or 'nothing'}")
    return tensors


def _deep_tensors(deep: DeepParams) -> dict[str, Tensor]:
    """Return what deep slots bring as a file holds it: tensors of their own for each layer, counted from 0."""
    found: dict[str, Tensor] = {}
    for layer, (keys, values) in enumerate(deep.block if deep.block is not None else ()):
        found |= {f"deep.{layer}.keys": keys, f"deep.{layer}.values": values}  # (K, C, D)
    if deep.offsets is not None:
        for layer, offsets in enumerate(deep.offsets.unbind(dim=1), start=1):
            found[f"deep.{layer}.inputs"] = offsets  # (N, H)
    return {name: one.to(deep.dtype).contiguous() for name, one in found.items()}


def _read_deep(tensors: Mapping[str, Tensor], about: Unchecked, where: Path) -> DeepParams:
    """Put what deep slots bring together from a file's tensors; a PromptError if it is not as the manifest says."""
    lead, layers = about.at("lead").whole(least=0), about.at("layers").whole(least=1)
    in_front, slots = about.at("block").whole(least=0), tuple(one.whole(least=0) for one in about.at("of").items())
    dtype = DEEP_DTYPES[about.at("dtype", "float32").one_of(tuple(DEEP_DTYPES))]
    if layers > len(tensors) + 1:  # before names are made of any number
        raise PromptError(f"{where}: {len(tensors)} tensors of deep slots, and {MANIFEST_FILE} says {layers} layers")
    named = {f"deep.{layer}.{part}" for layer in range(layers) for part in ("keys", "values") if in_front}
    named |= {f"deep.{layer}.inputs" for layer in range(1, layers) if slots}
    if found := sorted(named ^ set(tensors)):
        what = "missing" if found[0] in named else "extra"
        raise PromptError(f"{where}: {what} key '{found[0]}'; the file is damaged, or not that of the manifest")
    for name, one in tensors.items():
        if one.dtype != dtype:
            raise PromptError(
                f"{where}: '{name}' is {short_name(one.dtype)}, and {MANIFEST_FILE} says {short_name(dtype)}"
            )
    block = offsets = None
    try:
        if in_front:
            pairs = [[tensors[f"deep.{layer}.{part}"] for part in ("keys", "values")] for layer in range(layers)]
            block = torch.stack([torch.stack(pair) for pair in pairs]).float()  # (L, 2, K, C, D)
        if slots:
            offsets = torch.stack([tensors[f"deep.{layer}.inputs"] for layer in range(1, layers)], dim=1).float()
    except RuntimeError as error:
        raise PromptError(f"{where}: the tensors of different layers do not fit each other ({error})") from error
    wrong = (block is not None and (block.ndim, block.shape[3]) != (5, lead + in_front)) or (
        offsets is not None and (offsets.ndim, len(offsets)) != (3, len(slots))
    )
    if wrong:
        raise PromptError(f"{where}: the vectors in the layers have another shape than {MANIFEST_FILE} says")
    return DeepParams(block, lead, offsets, slots, dtype)


def _metadata(manifest: Mapping[str, Json], where: str) -> list[str]:
    """Return the lines in front of the card, which the hub reads (YAML; quoted as JSON, which is YAML, too)."""
    backbone = cast("Mapping[str, Json] | None", manifest["backbone"])
    task = cast("Mapping[str, Json] | None", manifest["task"])
    closed = bool(manifest["label_words"] or manifest["choices"])
    kind = "text-classification" if closed else "text-generation"
    lines = ["---", "library_name: ptuning", f"pipeline_tag: {kind}", "tags: [p-tuning, prompt-tuning, soft-prompt]"]
    if backbone is not None and backbone["revision"] is not None:  # on the hub
        lines.append(f"base_model: {json.dumps(backbone['name'])}")
    scores = cast("Mapping[str, float]", manifest["scores"])
    metrics = [(name, value) for name, value in scores.items() if math.isfinite(value)]
    if metrics:
        about = json.dumps(task["name"]) if task else kind
        lines += [
            "model-index:",
            f"- name: {json.dumps(manifest['method'])}",
            "  results:",
            f"  - task: {{type: {kind}, name: {about}}}",
            f"    dataset: {{type: other, name: {json.dumps(where)}}}",
            "    metrics:",
            *(
                f"    - {{type: {json.dumps(name)}, value: {value:.4g}, name: {json.dumps(name)}}}"
                for name, value in metrics
            ),
        ]
    return [*lines, "---", ""]


def _slots(manifest: Mapping[str, Json]) -> str:
    deep = cast("Mapping[str, Json] | None", manifest.get("deep"))
    vectors = f"{manifest['slots']} vectors"
    return vectors if deep is None else f"{vectors}, {deep['slots']} deep slots with vectors in {deep['layers']} layers"


def in_cell(text: str) -> str:
    r"""Return code for a cell of a table in Markdown, which takes one line.

    >>> in_cell("a|b\nc")
    '`a\\|b↵c`'
    """
    return f"`{text.replace('|', chr(92) + '|').replace(chr(10), '↵')}`"


def _card(manifest: Mapping[str, Json], weights: TrainedWeights | None, size_bytes: int) -> str:
    backbone = cast("Mapping[str, Json] | None", manifest["backbone"])
    words = cast("Mapping[str, list[str]] | None", manifest["label_words"])
    task = cast("Mapping[str, Json] | None", manifest["task"])
    owner = f"`{backbone['name']}`, fingerprint `{backbone['fingerprint']}`" if backbone else "`any`"
    rows = [
        ("template", in_cell(str(manifest["template"]))),
        ("slots", f"{_slots(manifest)}, {size_bytes / 1000:.1f} KB"),
        ("backbone", owner),
    ]
    if weights is not None:
        size = sum(weight.numel() * weight.element_size() for weight in weights.tensors.values())
        rows.append(("weights of the backbone", f"{weights.describe}, {size / 1e6:.1f} MB in `{WEIGHTS_FOLDER}/`"))
    if words:
        rows.append(("label words", "; ".join(f"{label}: {', '.join(listed)}" for label, listed in words.items())))
    if task:
        rows.append(("task", f"{task['name']}, version {task['version']}"))
    if manifest["choices"]:
        rows.append(("chooses among", "the choices that each row brings"))
    scores = cast("Mapping[str, float]", manifest["scores"])
    where = "development part" + (f", n = {manifest['scored_on']}" if manifest["scored_on"] else "")
    ends = cast("Mapping[str, list[float]]", manifest["intervals"])
    shown = {name: f" [{low:.3f}, {high:.3f}]" for name, (low, high) in ends.items()}
    rows += [
        (f"{name.replace('_', ' ')} ({where})", f"{value:.3f}{shown.get(name, '')}") for name, value in scores.items()
    ]
    rows.append(("seed", str(manifest["seed"])))
    lines = [
        *_metadata(manifest, where),
        "# A prompt for a language model",
        "",
        f"Made by the method `{manifest['method']}` {PAGE_MARKS[CARD_FILE]} {VERSION}.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {text} |" for name, text in rows),
        "",
        "Use it:",
        "",
        "```",
        'ptuning predict THIS_FOLDER "some text"',
        "ptuning inspect THIS_FOLDER",
        "```",
        "",
        "Scores on the development part chose this prompt and are therefore a little too good; "
        "score it on data that chose nothing with `ptuning eval`.",
        "",
    ]
    return "\n".join(lines)
