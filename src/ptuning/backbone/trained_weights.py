"""Trained weights of a backbone: which weights are trained, and how the result is saved and loaded."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import safetensors
import safetensors.torch
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ptuning.backbone import lora
from ptuning.backbone.backbone import Backbone
from ptuning.backbone.forward import HEAD
from ptuning.backbone.probes import logits_with_pads, running
from ptuning.backbone.randomness import own_draws
from ptuning.config import SaveWeights, TrainBackbone
from ptuning.errors import PromptError
from ptuning.files import (
    FileModel,
    file_error,
    file_sha256,
    open_regular,
    read_bytes,
    replacing,
    settled,
    temporary_folder,
    write_bytes,
)

PREFIX = ".weights-"
MAX_FILE_BYTES = 2**28  # of a file beside the weights: the config of an adapter, a tokenizer
DIFFERENCE_FILE = "difference.safetensors"
WHOLE_FILE = "model.safetensors"
# If only some rows of a tensor changed, those rows are saved, and their indices under its name with this suffix.
ROWS = ".rows"
HEAD_FILE = "head.safetensors"
# Standard deviation of the start values of a head. Source: most classification models of transformers.
START_SCALE = 0.02
# A choice has a single logit. This second, constant logit is so large that it alone decides the softmax's denominator:
# the log-probability of a choice is then its own logit minus this constant.
FAR_ABOVE = 100.0


class Head(nn.Linear):
    """A linear layer over classes. With one class it scores a choice, and a constant second logit is added."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Return (..., K) logits of (..., H) hidden states. K is the number of classes, or 2 for a single class."""
        logits: Tensor = super().forward(hidden.to(self.weight.dtype))
        return logits if self.out_features > 1 else torch.cat([torch.full_like(logits, FAR_ABOVE), logits], dim=-1)


def with_head(backbone: Backbone, classes: int, *, seed: int, share: bool = False) -> Backbone:
    """Return a float32 copy of a backbone, or one that shares the weights, with a new head: a logit per class, or for 1
    class a logit per choice. A BackboneError if the backbone does not expose the hidden states that its head reads.
    """
    other = backbone.copy(share=share)
    with own_draws(backbone.device):  # start values of torch's own, which ours replace
        head = Head(backbone.hidden_width, classes, device=backbone.device)
    with torch.no_grad():
        head.weight.copy_(START_SCALE * torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(seed)))
        head.bias.zero_()
    other.put_head(head)
    other.freeze()
    if share:  # under a new head it still is the same backbone
        other.__dict__["fingerprint"] = backbone.fingerprint
    return other


def trained_parameters(backbone: Backbone, train_backbone: TrainBackbone) -> dict[str, nn.Parameter]:
    """Return the weights of a backbone that are trained, by name."""
    if train_backbone == "none":
        return {}
    if train_backbone == "head":
        return {name: value for name, value in backbone.model.named_parameters() if name.startswith(f"{HEAD}.")}
    if train_backbone == "lora":
        return lora.adapter_parameters(backbone.model)
    return dict(backbone.model.named_parameters())


def with_adapters(backbone: Backbone, *, rank: int, alpha: float, targets: str, seed: int) -> Backbone:
    """Return a frozen copy that shares the weights, with new adapters (:func:`~ptuning.backbone.lora.add_adapters`).
    Raises ConfigError if peft is missing, and BackboneError if the model has no such layers, does not run with adapters
    on them, or if the adapters cannot be saved and loaded.
    """
    other = backbone.copy(share=True)
    lora.add_adapters(other.model, rank=rank, alpha=alpha, targets=targets, seed=seed)
    other.freeze()
    called = f"{backbone.name}: {type(backbone.model).__name__}"
    with running(f"{called} cannot run with adapters (lora_targets {targets})", do=lora.ADVICE):
        logits_with_pads(other)
    lora.check_restorable(other.model, backbone.copy(share=True).model, targets=targets)
    return other


def _file_of(train_backbone: TrainBackbone, keep: SaveWeights) -> str:
    """Return the name of the file that holds the tensors."""
    if train_backbone in ("lora", "head"):
        return lora.WEIGHTS_FILE if train_backbone == "lora" else HEAD_FILE
    return WHOLE_FILE if keep == "whole" else DIFFERENCE_FILE


class WeightsEntry(FileModel):
    """Trained weights in the manifest of a prompt, with the SHA-256 of each of their files."""

    train_backbone: Literal["head", "full", "lora"]
    keep: SaveWeights
    fingerprint: str
    sha256: dict[Annotated[str, Field(pattern=r"^\w[\w.+-]*$")], str]

    @model_validator(mode="after")
    def _check_files(self) -> WeightsEntry:
        config = (lora.CONFIG_FILE,) if self.train_backbone == "lora" else ()
        for name in (_file_of(self.train_backbone, self.keep), *config):
            if name not in self.sha256:
                raise ValueError(f"the sha256 of {name} is missing")
        return self


@dataclass(frozen=True, eq=False)
class TrainedWeights:
    """Trained weights by name, float32, and all that is needed to put them into the frozen backbone again.
    ``keep`` says for tuned weights whether only those that changed are saved. ``fingerprint`` is that of the backbone
    with these weights. ``files`` are the adapter config, or the config and tokenizer of a whole model.
    """

    train_backbone: TrainBackbone
    keep: SaveWeights
    fingerprint: str
    tensors: Mapping[str, Tensor]
    files: Mapping[str, bytes] = field(default_factory=dict)
    # Marks a backbone that has these weights, without keeping them in memory.
    mark: object = field(default_factory=object)

    @classmethod
    def of(
        cls, trained: Backbone, frozen: Backbone, *, train_backbone: TrainBackbone, keep: SaveWeights
    ) -> TrainedWeights:
        """Return the trained weights of a backbone that was a copy of ``frozen``, sharing its memory."""
        tensors = {name: weight.detach() for name, weight in trained_parameters(trained, train_backbone).items()}
        if train_backbone == "lora":
            files = {lora.CONFIG_FILE: lora.adapter_config(trained.model, backbone=frozen.name)}
            return cls(train_backbone, keep, trained.fingerprint, tensors, files)
        if train_backbone == "head":
            return cls(train_backbone, keep, trained.fingerprint, tensors)
        if keep == "difference":
            return cls(
                train_backbone, keep, trained.fingerprint, _changed(tensors, dict(frozen.model.named_parameters()))
            )
        return cls(train_backbone, keep, trained.fingerprint, _saved_tensors(trained), _model_files(trained))

    @property
    def file(self) -> str:
        """Name of the file that holds the tensors."""
        return _file_of(self.train_backbone, self.keep)

    @property
    def describe(self) -> str:
        """A short description."""
        if self.train_backbone in ("lora", "head"):
            return "adapters (LoRA)" if self.train_backbone == "lora" else "a classification head"
        return "all of them" if self.keep == "whole" else "those that changed"

    def into(self, backbone: Backbone) -> Backbone:
        """Return a frozen copy of a backbone with these weights; the given one does not change.

        With adapters or a head the copy shares all other weights; with tuned weights it is a full copy in float32.
        Raises PromptError if a key is missing or unknown, or a shape does not fit this backbone.
        """
        if self.train_backbone == "lora":
            other = backbone.copy(share=True)
            lora.restore_adapters(other.model, self.files[lora.CONFIG_FILE], self.tensors)
            other.freeze()
        elif self.train_backbone == "head":
            weight = self.tensors.get(f"{HEAD}.weight")
            classes = 1 if weight is None or weight.ndim != 2 else len(weight)
            other = with_head(backbone, classes, seed=0, share=True)
            self._put_into(other, trained_parameters(other, "head"))
        else:
            other = backbone.copy()
            self._put_into(other, _saved_tensors(other))
        other.trained = self.mark
        return other

    def _put_into(self, backbone: Backbone, own: Mapping[str, Tensor]) -> None:
        wanted, rows_of = dict(own), {}
        if self.train_backbone == "full" and self.keep == "difference":
            wanted = {name: weight for name, weight in own.items() if name in self.tensors}
            for name, weight in own.items():
                rows = self.tensors.get(name + ROWS)
                if rows is None or rows.ndim != 1 or rows.dtype != torch.int64:
                    continue
                if 0 <= int(rows.min()) <= int(rows.max()) < len(weight):
                    rows_of[name] = rows.to(weight.device)
                    wanted |= {name: weight[rows_of[name]], name + ROWS: rows}
        lora.check_fits(self.tensors, wanted, model=backbone.model)
        with torch.no_grad():
            for name, weight in own.items():
                if name in self.tensors:
                    weight[rows_of.get(name, ...)] = self.tensors[name].to(weight.device, weight.dtype)

    def save(self, folder: Path) -> WeightsEntry:
        """Write the weights into a folder, and return the entry for the manifest that :meth:`load` needs.
        Raises FileError if a file cannot be written.
        """
        assert self.train_backbone != "none"
        for name, data in self.files.items():
            write_bytes(folder / name, data)
        write_tensors(folder / self.file, self.tensors)
        hashes = {name: file_sha256(folder / name) for name in sorted((*self.files, self.file))}
        return WeightsEntry(
            train_backbone=self.train_backbone, keep=self.keep, fingerprint=self.fingerprint, sha256=hashes
        )

    @classmethod
    def load(cls, folder: Path, entry: WeightsEntry) -> TrainedWeights:
        """Read what :meth:`save` wrote; values are read when they are used.
        Raises FileError if a file cannot be read, and PromptError if one is cut off or was changed.
        """
        file = _file_of(entry.train_backbone, entry.keep)
        places = {name: settled(folder / name, digest) for name, digest in entry.sha256.items()}
        tensors = read_tensors(places[file])  # first: "cut off" says more than "changed"
        for name, digest in entry.sha256.items():
            if file_sha256(places[name]) != digest:
                raise PromptError(
                    f"{folder / name} was changed since it was saved: its sha256 is not the one in the manifest"
                )
        files = {name: read_bytes(places[name], at_most=MAX_FILE_BYTES) for name in entry.sha256 if name != file}
        return cls(entry.train_backbone, entry.keep, entry.fingerprint, tensors, files)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], *, texts: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file with ``texts`` in its header, without a copy of it in memory.
    Raises FileError if it cannot be written; nothing is left behind.
    """
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    # safetensors writes a file of another name first, which a kill would leave: in a folder that is swept.
    with replacing(path) as temporary, temporary_folder(path.parent) as folder:
        try:
            safetensors.torch.save_file(plain, folder / path.name, {"format": "pt", **(texts or {})})
        except safetensors.SafetensorError as error:
            raise OSError(str(error)) from error
        (folder / path.name).chmod(temporary.stat().st_mode)  # safetensors' file is for its owner only
        (folder / path.name).replace(temporary)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file; values are read from disk when they are used.
    Raises FileError if it cannot be read, and PromptError if it is cut off or damaged.
    """
    try:
        with open_regular(path), safetensors.safe_open(path, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
    except OSError as error:
        raise file_error("read", path, error) from error
    except (safetensors.SafetensorError, ValueError) as error:
        raise PromptError(f"{path} is not a whole safetensors file ({error}); it is cut off or damaged") from error


def _saved_tensors(backbone: Backbone) -> dict[str, Tensor]:
    """Return the weights of a model, tied ones once, and the buffers that are saved with it."""
    weights = {name: weight.detach() for name, weight in backbone.model.named_parameters()}
    buffers = dict(backbone.model.named_buffers())
    return weights | {name: value for name, value in backbone.model.state_dict().items() if name in buffers}


def _changed(trained: Mapping[str, Tensor], frozen: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that changed; if only some rows of a tensor changed, these rows."""
    changed: dict[str, Tensor] = {}
    for name, weight in trained.items():
        if weight.ndim == 0:
            changed[name] = weight
            continue
        # Compared as bits: a change from 0 to -0 counts, too.
        before = frozen[name].detach().float().view(torch.int32)
        moved = (weight.view(torch.int32) != before).reshape(len(weight), -1).any(dim=-1)  # (rows,)
        rows = moved.nonzero()[:, 0]  # (changed rows,)
        if len(rows) == len(weight):
            changed[name] = weight
        elif len(rows):
            changed |= {name: weight[rows], name + ROWS: rows}
    return changed


def _model_files(backbone: Backbone) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory(prefix=PREFIX) as name:
        folder = Path(name)
        config = copy.deepcopy(backbone.model.config)
        config.dtype = torch.float32
        config.save_pretrained(folder)
        generation = getattr(backbone.model, "generation_config", None)  # only models that write have one
        if generation is not None:
            generation.save_pretrained(folder)
        backbone.tokenizer.save(folder)
        return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
