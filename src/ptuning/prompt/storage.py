"""The files of a prompt: the manifest ``prompt.json``, ``prompt.safetensors`` with the slot vectors, the card
``README.md``, and the folder ``backbone`` where weights of the backbone were trained.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import safetensors
import safetensors.torch
import torch
from pydantic import AllowInfNan, Field
from torch import Tensor

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.number_format import in_another_format
from ptuning.backbone.trained_weights import TrainedWeights, WeightsEntry
from ptuning.config import DeepDtype
from ptuning.engine.soft_prompt import DeepParams
from ptuning.errors import FileError, PromptError
from ptuning.files import (
    FileModel,
    Json,
    WholeNumber,
    file_error,
    is_abandoned,
    make_folder,
    read_bytes,
    read_json,
    settled,
    sha256,
    staged,
    temporary_folder,
    validate,
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
from ptuning.template.labels import Normalise

logger = logging.getLogger(__name__)

MAX_VECTORS_BYTES = 2**31
# Largest depth of a prompt in a folder of prompts; the path in it is the prompt's name.
NAME_PARTS = 4
# Number of times that a prompt whose files do not fit each other is read: another process may be saving it.
ATTEMPTS = 3


@dataclass(frozen=True)
class BackboneId:
    """The backbone that a prompt belongs to: known name, folder, GGUF file or hub id; commit on the hub, or None; and
    :attr:`~ptuning.backbone.backbone.Backbone.fingerprint`, which alone decides whether another one is the same.
    ``loaded`` says what it was loaded with (:attr:`~ptuning.backbone.backbone.Backbone.loaded`).
    """

    name: str
    revision: str | None
    fingerprint: str
    loaded: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, backbone: Backbone) -> BackboneId:
        """Return the identity of a loaded backbone."""
        return cls(backbone.name, backbone.revision, backbone.fingerprint, backbone.loaded)

    def to_json(self) -> dict[str, Json]:
        """Return the identity as JSON."""
        return {**vars(self), "loaded": dict(self.loaded)}

    @property
    def described(self) -> str:
        """A short description: the name, the revision, and what it was loaded with."""
        revision = [] if self.revision is None else [f"revision {self.revision[:12]}"]
        loaded = (f"rows of {value} tokens" if name == "max_length" else value for name, value in self.loaded.items())
        return ", ".join([self.name, *revision, *loaded])

    def check(self, backbone: Backbone) -> None:
        """Raise a PromptError if a backbone is another one. One with the same embedding table and weights in another
        format is accepted, with a warning.
        """
        if self.fingerprint == backbone.fingerprint:
            return
        same_table = self.fingerprint.split("-")[0] == backbone.fingerprint.split("-")[0]
        formats = [loaded.get("quantization") for loaded in (self.loaded, backbone.loaded)]
        difference = in_another_format(*formats)
        if same_table and difference is not None:
            trained, used = (text or "whole weights" for text in formats)
            _warn_once(f"the prompt was trained on '{self.name}' with {trained}, and is used with {used}: {difference}")
            return
        what = "has the same embeddings and other weights (a tuned copy?)" if same_table else "is another model"
        raise PromptError(
            f"the prompt was trained on the backbone '{self.name}' ({self.fingerprint}), and '{backbone.name}' "
            f"({backbone.fingerprint}) {what}; use the right backbone, or insist with force"
        )


@functools.lru_cache(maxsize=1024)
def _warn_once(text: str) -> None:
    logger.warning("%s", text)


class TaskEntry(FileModel):
    """A task in a manifest: ``file`` is the text of its file."""

    name: str
    version: str
    file: str


class DeepEntry(FileModel):
    """Deep slots in a manifest (:meth:`ptuning.engine.soft_prompt.DeepParams.to_json`)."""

    slots: WholeNumber
    prefix_slots: WholeNumber = Field(ge=0)
    bos: WholeNumber = Field(ge=0)
    offset_slots: tuple[Annotated[WholeNumber, Field(ge=0)], ...]
    layers: int = Field(ge=1, le=10_000)
    dtype: DeepDtype = "float32"


class Manifest(FileModel):
    """The content of ``prompt.json``. Keys of the name of a field of :class:`ptuning.prompt.prompt.Prompt` have its
    value; ``choices`` says whether rows bring their choices.
    """

    format_version: Literal[1] = 1
    template: str
    label_words: dict[str, tuple[str, ...]] | None = None
    task: TaskEntry | None = None
    choices: bool
    calibrate: bool
    normalise: Normalise
    backbone: BackboneId | None = None
    width: WholeNumber | None = Field(None, ge=1)
    slots: WholeNumber = Field(ge=0)
    deep: DeepEntry | None = None
    target_tokens: WholeNumber = Field(ge=1)
    max_length: WholeNumber | None = Field(None, ge=1)
    multiline: bool
    learned_to_stop: bool
    method: str
    seed: WholeNumber | None = Field(None, ge=0)
    scores: dict[str, Annotated[float, AllowInfNan(True)]]
    scored_on: WholeNumber | None = None
    intervals: dict[str, tuple[float, float]]
    fields: dict[str, str]
    merge: tuple[str, ...]
    vectors_sha256: str = ""
    weights: WeightsEntry | None = None
    versions: dict[str, str] = Field(default_factory=versions)


@dataclass(frozen=True)
class Stored:
    """The content of a prompt's folder, whose files are whole and fit each other. ``where`` is the manifest's path, and
    ``vectors`` are (P, E).
    """

    manifest: Manifest
    vectors: Tensor | None
    weights: TrainedWeights | None
    where: Path
    deep: DeepParams | None = None


def write_prompt(
    folder: Path,
    manifest: Manifest,
    *,
    vectors: Tensor | None,
    weights: TrainedWeights | None,
    deep: DeepParams | None = None,
    overwrite: bool,
) -> None:
    """Write a prompt's folder, with a manifest that lacks what follows from the files; errors are those of
    :meth:`ptuning.prompt.prompt.Prompt.save`.

    There is a whole prompt in the folder at any moment: new files wait under names of their own until the manifest
    names their hashes, and :func:`read_prompt` finds them there.
    """
    tensors = {VECTORS_KEY: (vectors if vectors is not None else torch.zeros(0, 0)).contiguous()}
    if deep is not None:
        tensors |= _deep_tensors(deep)
    data = safetensors.torch.save(tensors, {"format": "pt"})
    hashes = {VECTORS_FILE: sha256(data)}
    manifest = manifest.model_copy(update={"vectors_sha256": hashes[VECTORS_FILE]})
    check_writable(folder, PROMPT, overwrite=overwrite)
    is_new = not folder.exists()
    make_folder(folder)
    try:
        with locked(folder):
            before = check_writable(folder, PROMPT, overwrite=overwrite)  # another process may have been faster
            with temporary_folder(folder) as new:
                write_bytes(new / VECTORS_FILE, data)
                if weights is not None:
                    make_folder(new / WEIGHTS_FOLDER)
                    entry = weights.save(new / WEIGHTS_FOLDER)
                    manifest = manifest.model_copy(update={"weights": entry})
                    hashes |= {f"{WEIGHTS_FOLDER}/{name}": digest for name, digest in entry.sha256.items()}
                try:
                    for name, digest in hashes.items():
                        (folder / name).parent.mkdir(exist_ok=True)
                        (new / name).replace(staged(folder / name, digest))
                    write_json(folder / MANIFEST_FILE, manifest.model_dump(mode="json"))
                    for name, digest in hashes.items():
                        staged(folder / name, digest).replace(folder / name)
                except OSError as error:
                    raise file_error("write", folder, error) from error
            write_text(folder / CARD_FILE, _card(manifest, weights, len(data)))
            written = {folder / name for name in (MANIFEST_FILE, CARD_FILE, *hashes)}
            left = filter(is_abandoned, before.temporary)
            delete(path for path in (*before.ours, *left) if path not in written)
            with contextlib.suppress(OSError):
                (folder / WEIGHTS_FOLDER).rmdir()  # of an earlier prompt, and empty now
    finally:
        if is_new:
            with contextlib.suppress(OSError):
                folder.rmdir()  # nothing could be written


def has_prompt(folder: Path) -> bool:
    """Whether a folder holds a prompt, or the training run that made one, be it damaged or not."""
    return any(os.path.lexists(path) for path in (folder / MANIFEST_FILE, folder / PROMPT_FOLDER / MANIFEST_FILE))


def prompt_folders(folder: Path, depth: int = NAME_PARTS) -> Iterator[Path]:
    """Yield the folders in a folder that hold a prompt, in order, without hidden ones. An OSError if the folder cannot
    be read; folders in it that cannot be read are skipped.
    """
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())
    for name in names:
        inner = folder / name
        if has_prompt(inner):
            yield inner
        elif depth > 1 and not inner.is_symlink():
            with contextlib.suppress(OSError):
                yield from prompt_folders(inner, depth - 1)


def manifest_of(folder: str | Path) -> Path:
    """Return the path of the manifest in a prompt's folder, or in that of the training run which holds one; a FileError
    if there is none.
    """
    # Unlike Path.is_file, os.path.isfile is False for a name that cannot be a path.
    for path in (Path(folder) / MANIFEST_FILE, Path(folder) / PROMPT_FOLDER / MANIFEST_FILE):
        if os.path.isfile(path):
            return path
    raise FileError(
        f"{folder} is not a prompt folder: there is no {MANIFEST_FILE} in it; give a folder written by ptuning "
        "train, or manual:TEMPLATE for a template without slots"
    )


def read_prompt(folder: str | Path) -> Stored:
    """Read a prompt's folder, or that of the training run which holds one, and check its files.

    Errors are those of :meth:`ptuning.prompt.prompt.Prompt.load`.
    """
    where = manifest_of(folder)
    for attempt in itertools.count(1):
        before = read_bytes(where, at_most=MAX_MANIFEST_BYTES)
        try:
            stored = _read(where)
        except (FileError, PromptError):
            if attempt >= ATTEMPTS and read_bytes(where, at_most=MAX_MANIFEST_BYTES) == before:
                raise
            continue
        if read_bytes(where, at_most=MAX_MANIFEST_BYTES) == before:  # otherwise another one was saved meanwhile
            return stored
    raise AssertionError("the attempts do not end")


def _read(where: Path) -> Stored:
    file, folder = where.with_name(VECTORS_FILE), where.parent
    value = read_json(where, at_most=MAX_MANIFEST_BYTES)
    manifest = validate(Manifest, value, f"{where} is damaged, or of another version of ptuning", error=PromptError)
    data = read_bytes(settled(file, manifest.vectors_sha256), at_most=MAX_VECTORS_BYTES)
    if sha256(data) != manifest.vectors_sha256:
        raise PromptError(
            f"{file} was cut off or changed since it was saved: its sha256 is not the one in {MANIFEST_FILE}"
        )
    try:
        tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError) as error:
        raise PromptError(f"{file} is not a whole safetensors file ({error}); it is damaged") from error
    expected, deep = {VECTORS_KEY}, manifest.deep
    if deep is not None and deep.prefix_slots:
        expected |= {f"deep.{layer}.{part}" for layer in range(deep.layers) for part in ("keys", "values")}
    if deep is not None and deep.offset_slots:
        expected |= {f"deep.{layer}.inputs" for layer in range(1, deep.layers)}
    if wrong := sorted(expected ^ set(tensors)):
        raise PromptError(
            f"{file}: {'missing' if wrong[0] in expected else 'extra'} key '{wrong[0]}'; it is not the file of the "
            f"manifest, or is damaged"
        )
    vectors = tensors.pop(VECTORS_KEY)
    shape = (manifest.slots, manifest.width or 0)
    if tuple(vectors.shape) != shape:
        raise PromptError(f"{file}: wrong shape {tuple(vectors.shape)}, and {MANIFEST_FILE} says {shape}")
    weights = None if manifest.weights is None else TrainedWeights.load(folder / WEIGHTS_FOLDER, manifest.weights)
    params = None if deep is None else _read_deep(tensors, deep, file)
    return Stored(manifest, vectors if manifest.width is not None else None, weights, where, params)


def _deep_tensors(deep: DeepParams) -> dict[str, Tensor]:
    """Return what deep slots bring as a file holds it: tensors of their own for each layer, counted from 0."""
    tensors: dict[str, Tensor] = {}
    for layer, (keys, values) in enumerate(deep.prefix if deep.prefix is not None else ()):
        tensors |= {f"deep.{layer}.keys": keys, f"deep.{layer}.values": values}  # (K, C, D)
    if deep.offsets is not None:
        for layer, offsets in enumerate(deep.offsets.unbind(dim=1), start=1):
            tensors[f"deep.{layer}.inputs"] = offsets  # (N, H)
    return {name: tensor.to(deep.dtype).contiguous() for name, tensor in tensors.items()}


def _read_deep(tensors: Mapping[str, Tensor], entry: DeepEntry, where: Path) -> DeepParams:
    """Return the deep slots of a file's tensors; a PromptError if they are not as the manifest says."""
    dtype: torch.dtype = getattr(torch, entry.dtype)
    for name, tensor in tensors.items():
        if tensor.dtype != dtype:
            raise PromptError(f"{where}: '{name}' is {tensor.dtype}, and {MANIFEST_FILE} says {entry.dtype}")
    prefix = offsets = None
    try:
        if entry.prefix_slots:
            pairs = [[tensors[f"deep.{layer}.{part}"] for part in ("keys", "values")] for layer in range(entry.layers)]
            prefix = torch.stack([torch.stack(pair) for pair in pairs]).float()  # (L, 2, K, C, D)
        if entry.offset_slots:
            offsets = torch.stack([tensors[f"deep.{layer}.inputs"] for layer in range(1, entry.layers)], dim=1).float()
    except RuntimeError as error:
        raise PromptError(f"{where}: the tensors of different layers do not fit each other ({error})") from error
    if (prefix is not None and (prefix.ndim, prefix.shape[3]) != (5, entry.bos + entry.prefix_slots)) or (
        offsets is not None and (offsets.ndim, len(offsets)) != (3, len(entry.offset_slots))
    ):
        raise PromptError(f"{where}: the vectors in the layers have another shape than {MANIFEST_FILE} says")
    return DeepParams(prefix, entry.bos, offsets, entry.offset_slots, dtype)


def in_cell(text: str) -> str:
    r"""Return code for a cell of a table in Markdown, which takes one line.

    >>> in_cell("a|b\nc")
    '`a\\|b↵c`'
    """
    return f"`{text.replace('|', chr(92) + '|').replace(chr(10), '↵')}`"


def _card(manifest: Manifest, weights: TrainedWeights | None, size_bytes: int) -> str:
    """Return the card: the lines that the hub reads (YAML; quoted as JSON, which is YAML, too), and a table."""
    backbone, deep, task = manifest.backbone, manifest.deep, manifest.task
    kind = "text-classification" if manifest.label_words or manifest.choices else "text-generation"
    where = "development part" + (f", n = {manifest.scored_on}" if manifest.scored_on else "")
    metadata = ["library_name: ptuning", f"pipeline_tag: {kind}", "tags: [p-tuning, prompt-tuning, soft-prompt]"]
    if backbone is not None and backbone.revision is not None:  # on the hub
        metadata.append(f"base_model: {json.dumps(backbone.name)}")
    metrics = [(json.dumps(name), value) for name, value in manifest.scores.items() if math.isfinite(value)]
    if metrics:
        metadata += [
            "model-index:",
            f"- name: {json.dumps(manifest.method)}",
            "  results:",
            f"  - task: {{type: {kind}, name: {json.dumps(task.name) if task else kind}}}",
            f"    dataset: {{type: other, name: {json.dumps(where)}}}",
            "    metrics:",
            *(f"    - {{type: {name}, value: {value:.4g}, name: {name}}}" for name, value in metrics),
        ]
    slots = f"{manifest.slots} vectors"
    if deep is not None:
        slots += f", {deep.slots} deep slots with vectors in {deep.layers} layers"
    rows = {
        "template": in_cell(manifest.template),
        "slots": f"{slots}, {size_bytes / 1000:.1f} KB",
        "backbone": f"`{backbone.name}`, fingerprint `{backbone.fingerprint}`" if backbone else "`any`",
    }
    if weights is not None:
        size = sum(weight.numel() * weight.element_size() for weight in weights.tensors.values())
        rows["weights of the backbone"] = f"{weights.describe}, {size / 1e6:.1f} MB in `{WEIGHTS_FOLDER}/`"
    if manifest.label_words:
        rows["label words"] = "; ".join(f"{label}: {', '.join(words)}" for label, words in manifest.label_words.items())
    if task:
        rows["task"] = f"{task.name}, version {task.version}"
    if manifest.choices:
        rows["chooses among"] = "the choices that each row brings"
    for name, value in manifest.scores.items():
        ends = manifest.intervals.get(name)
        interval = f" [{ends[0]:.3f}, {ends[1]:.3f}]" if ends else ""
        rows[f"{name.replace('_', ' ')} ({where})"] = f"{value:.3f}{interval}"
    rows["seed"] = str(manifest.seed)
    head = "\n".join(["---", *metadata, "---"])
    table = "\n".join(["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows.items())])
    return f"""{head}

# A prompt for a language model

Made by the method `{manifest.method}` {PAGE_MARKS[CARD_FILE]} {VERSION}.

{table}

Use it:

```
ptuning predict THIS_FOLDER "some text"
ptuning inspect THIS_FOLDER
```

Scores on the development part chose this prompt and are therefore a little too good; score it on data that chose \
nothing with `ptuning eval`.
"""
