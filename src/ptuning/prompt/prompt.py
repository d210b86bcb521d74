"""The artifact: template, slot vectors, label words and provenance, and its files. Knows no training and no batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.trained_weights import TrainedWeights
from ptuning.data.task_files import TaskFile
from ptuning.engine.learned import Learned
from ptuning.errors import ConfigError, FileError, LabelWordError, PromptError, TaskError, TemplateError
from ptuning.files import (
    Json,
    make_folder,
    publish_folder,
    read_bytes,
    read_json,
    sha256,
    write_bytes,
    write_json,
    write_text,
)
from ptuning.provenance import VERSION, versions
from ptuning.template.fill import BoundTemplate
from ptuning.template.labels import LabelWords, Normalise, Scoring
from ptuning.template.language import Template

FORMAT_VERSION = 1
# Of a prompt with trained weights of the backbone: whoever does not know of them would answer without.
WEIGHTS_VERSION = 2
VECTORS_FILE = "prompt.safetensors"
MANIFEST_FILE = "prompt.json"
CARD_FILE = "README.md"
WEIGHTS_FOLDER = "backbone"
VECTORS_KEY = "slot_vectors"
REQUIRED_KEYS = ("format_version", "template", "label_words", "backbone", "width", "slots", "method", "vectors_sha256")
# A template without slots cannot know how long its targets are.
DEFAULT_TARGET_TOKENS = 8


@dataclass(frozen=True)
class BackboneId:
    """Which backbone a prompt belongs to.

    Args:
        name: Known name, folder or hub id.
        revision: Commit of the hub, or None.
        fingerprint: See :attr:`ptuning.backbone.backbone.Backbone.fingerprint`.
    """

    name: str
    revision: str | None
    fingerprint: str

    @classmethod
    def of(cls, backbone: Backbone) -> BackboneId:
        """Return the identity of a loaded backbone."""
        return cls(backbone.name, backbone.revision, backbone.fingerprint)


@dataclass(frozen=True, eq=False)
class Prompt:
    """A template with its slot vectors, and the backbone's own weights where they were trained along; without either it
    is a manual prompt.

    Args:
        template: The template, as a pattern or parsed.
        slot_vectors: (P, E) float32, in template order; None for a template without slots.
        backbone: Which (frozen) backbone it was trained on; None for a manual prompt, which fits any.
        label_words: For classification.
        task: The task it was made for: how rows become records, and whether they bring their own choices.
        calibrate: Whether what an empty record would score is taken off labels and choices.
        normalise: How labels and choices of several tokens are scored.
        target_tokens: Longest target seen in training; bounds what ``predict`` writes.
        multiline: Whether targets in training held line breaks; if not, a written answer ends with its line.
        method: How it was made.
        seed: Seed of the training, or None.
        scores: Scores on the development part at the time it was chosen.
        weights: Trained weights of the backbone, which :meth:`adapt` puts into a copy of it.

    Raises:
        TemplateError: If the pattern is malformed.
        PromptError: If there are slots without vectors, or vectors of a wrong shape.
    """

    template: Template
    slot_vectors: Tensor | None = None
    backbone: BackboneId | None = None
    label_words: LabelWords | None = None
    target_tokens: int = DEFAULT_TARGET_TOKENS
    multiline: bool = False
    method: str = "manual"
    seed: int | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    task: TaskFile | None = None
    calibrate: bool = False
    normalise: Normalise = "sum"
    weights: TrainedWeights | None = None

    def __post_init__(self) -> None:
        if self.weights is not None and self.backbone is None:
            raise PromptError("trained weights need to say which backbone they belong to")
        if self.slot_vectors is None:
            if self.template.has_slots:
                raise PromptError(
                    f"the template '{self.template}' has slots, and there are no vectors for them; train "
                    "it, or start from tokens with Prompt.from_token_ids"
                )
            return
        if self.slot_vectors.ndim != 2 or self.slot_vectors.dtype != torch.float32:
            raise PromptError(
                f"slot vectors must be float32 of shape (slots, width), not {self.slot_vectors.dtype} of "
                f"shape {tuple(self.slot_vectors.shape)}"
            )
        if self.backbone is None:
            raise PromptError("slot vectors need to say which backbone they belong to")

    @classmethod
    def manual(
        cls, template: str | Template, *, label_words: LabelWords | None = None, task: TaskFile | None = None
    ) -> Prompt:
        """Make a manual prompt from a template without slots; it fits any backbone. A task brings its label words, and
        how they are scored.

        Raises:
            TemplateError: If the pattern is malformed.
            PromptError: If it has slots.
        """
        if task is None:
            return cls(as_template(template), label_words=label_words)
        return cls(
            as_template(template),
            label_words=label_words or task.label_words,
            task=task,
            calibrate=task.calibrate,
            normalise=task.normalise,
        )

    @classmethod
    def from_token_ids(cls, template: str | Template, slot_token_ids: Sequence[int], backbone: Backbone) -> Prompt:
        """Make a prompt whose slots hold the embeddings of given tokens, in template order.

        Raises:
            PromptError: If there are more or fewer ids than slots, or an id is outside the vocabulary.
        """
        parsed = as_template(template)
        slots = BoundTemplate(parsed, tokenizer=backbone.tokenizer, kind=backbone.kind).slots
        if len(slot_token_ids) != slots:
            raise PromptError(
                f"the template '{parsed}' has {slots} slots for this backbone, and {len(slot_token_ids)} "
                "token ids were given"
            )
        size = backbone.embedding_rows
        outside = [token for token in slot_token_ids if not 0 <= token < size]
        if outside:
            raise PromptError(f"token ids {outside} are outside the vocabulary of {size}")
        ids = torch.tensor([list(slot_token_ids)], dtype=torch.int64, device=backbone.device)  # (1, P)
        with torch.no_grad():
            vectors = backbone.embed(ids)[0].float().cpu()  # (P, E)
        return cls(parsed, vectors, BackboneId.of(backbone), method="tokens")

    @property
    def slots(self) -> int:
        """Number of slots P."""
        return 0 if self.slot_vectors is None else len(self.slot_vectors)

    @property
    def has_choices(self) -> bool:
        """Whether it chooses among texts that each row brings."""
        return self.label_words is None and self.task is not None and self.task.has_choices

    @property
    def is_closed(self) -> bool:
        """Whether it says itself what there is to answer: label words, or choices that each row brings."""
        return self.label_words is not None or self.has_choices

    def check_open(self) -> None:
        """Check that candidates can be its answers.

        Raises:
            ConfigError: If it is closed.
        """
        if self.is_closed:
            what = "brings its own choices" if self.has_choices else "has label words, which are all its answers"
            raise ConfigError(f"the prompt {what}; leave the candidates (--candidates) out")

    def scoring(self, *, normalise: Normalise | None = None, calibrate: bool | None = None) -> Scoring:
        """Return how labels and choices are scored: as the prompt says, unless asked otherwise."""
        kept = self.task.closed_fields if self.task is not None else ()
        return Scoring(normalise or self.normalise, self.calibrate if calibrate is None else calibrate, kept)

    def learned(self, backbone: Backbone) -> Learned:
        """Return what it brings to a pass of a backbone: its slot vectors, (P, E); (0, E) of a manual prompt."""
        return Learned(self.slot_vectors) if self.slot_vectors is not None else Learned.none(backbone.width)

    def bind(self, backbone: Backbone, *, force: bool = False) -> BoundTemplate:
        """Check that the prompt fits a backbone, and return its template bound to the backbone's tokenizer.

        Args:
            backbone: The backbone to use the prompt with.
            force: Accept another backbone of the same width; the answers may be worthless.

        Raises:
            PromptError: If the prompt belongs to another backbone, or its shape does not fit.
        """
        bound = BoundTemplate(self.template, tokenizer=backbone.tokenizer, kind=backbone.kind, multiline=self.multiline)
        if self.weights is not None and not self._is_adapted(backbone):
            raise PromptError(
                f"the prompt was trained together with weights of '{backbone.name}', and those are not in it; take "
                "prompt.adapt(backbone), or leave them out with prompt.without('backbone')"
            )
        if self.slot_vectors is None:
            return bound
        if self.weights is None:
            self._check_backbone(backbone, force=force)
        if self.slot_vectors.shape[1] != backbone.width:
            raise PromptError(
                f"the prompt's vectors are {self.slot_vectors.shape[1]} wide, and the embeddings of "
                f"'{backbone.name}' {backbone.width}; it cannot be used with this backbone"
            )
        if bound.slots != self.slots:
            raise PromptError(
                f"the template '{self.template}' has {bound.slots} slots with this tokenizer, and the "
                f"prompt has {self.slots} vectors"
            )
        return bound

    def adapt(self, backbone: Backbone, *, force: bool = False) -> Backbone:
        """Return the backbone to use the prompt with: a frozen copy with the prompt's trained weights in it, or the one
        given where there are none, or where they are in it already. The one given does not change.

        Args:
            backbone: The frozen backbone that the prompt was trained on, or one with its weights in it.
            force: Accept another backbone of the same shapes; the answers may be worthless.

        Raises:
            PromptError: If the prompt belongs to another backbone, or its weights do not fit.
        """
        if self.weights is None or self._is_adapted(backbone):
            return backbone
        if backbone.trained is not None:
            raise PromptError(f"'{backbone.name}' has the trained weights of another prompt in it; give the frozen one")
        self._check_backbone(backbone, force=force)
        return self.weights.into(backbone)

    def without(self, part: str) -> Prompt:
        """Return the prompt with one part switched off, to see what the other is worth.

        Args:
            part: ``slots``: words stand where slots started at words, and slots that started at random are left out;
                ``backbone``: the backbone stays frozen.

        Raises:
            PromptError: If there is no such part.
        """
        if part == "slots" and self.slot_vectors is not None:
            return replace(self, template=self.template.without_slots(), slot_vectors=None)
        if part == "backbone" and self.weights is not None:
            return replace(self, weights=None)
        parts = [
            name for name, there in (("slots", self.slot_vectors), ("backbone", self.weights)) if there is not None
        ]
        raise PromptError(f"the prompt has no part '{part}' to leave out; it has {' and '.join(parts) or 'none'}")

    def _is_adapted(self, backbone: Backbone) -> bool:
        assert self.weights is not None
        assert self.backbone is not None
        if backbone.trained is not None:
            return backbone.trained is self.weights.mark
        # A model that was loaded from the folder of the whole weights. Weights that hardly moved have one fingerprint.
        return backbone.fingerprint == self.weights.fingerprint != self.backbone.fingerprint

    def _check_backbone(self, backbone: Backbone, *, force: bool) -> None:
        if self.backbone is None or self.backbone.fingerprint == backbone.fingerprint or force:
            return
        same_table = self.backbone.fingerprint.split("-")[0] == backbone.fingerprint.split("-")[0]
        what = "has the same embeddings and other weights (a tuned copy?)" if same_table else "is another model"
        raise PromptError(
            f"the prompt was trained on the backbone '{self.backbone.name}' "
            f"({self.backbone.fingerprint}), and '{backbone.name}' ({backbone.fingerprint}) {what}; "
            "use the right backbone (--backbone), or insist with --force"
        )

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write the prompt as a folder: vectors, trained weights, manifest and a card for people. Equal prompts give
        equal bytes.

        Raises:
            FileError: If the folder is taken and ``overwrite`` is not set, or cannot be written.
        """
        vectors = self.slot_vectors if self.slot_vectors is not None else torch.zeros(0, 0)
        data = safetensors.torch.save({VECTORS_KEY: vectors.contiguous()}, {"format": "pt"})
        with publish_folder(Path(folder), overwrite=overwrite) as temporary:
            write_bytes(temporary / VECTORS_FILE, data)
            manifest = self._manifest(sha256(data))
            if self.weights is not None:
                make_folder(temporary / WEIGHTS_FOLDER)
                about = self.weights.save(temporary / WEIGHTS_FOLDER)
                manifest |= {"format_version": WEIGHTS_VERSION, "weights": about}
            write_json(temporary / MANIFEST_FILE, manifest)
            write_text(temporary / CARD_FILE, self._card(len(data)))

    @classmethod
    def load(cls, folder: str | Path) -> Prompt:
        """Read a prompt's folder.

        Raises:
            FileError: If it is no prompt's folder or cannot be read.
            PromptError: If a file is cut off or was changed, a key is missing, or a shape is wrong.
        """
        path = Path(folder)
        if not (path / MANIFEST_FILE).is_file() and (path / "prompt" / MANIFEST_FILE).is_file():
            path = path / "prompt"  # a run's folder was named; its prompt is meant
        if not (path / MANIFEST_FILE).is_file():
            raise FileError(
                f"{folder} is no prompt: there is no {MANIFEST_FILE} in it; a prompt is a folder written by "
                "ptuning train, or write manual:TEMPLATE for a template without slots"
            )
        manifest = read_json(path / MANIFEST_FILE)
        where = path / MANIFEST_FILE
        _check_manifest(manifest, where)
        data = read_bytes(path / VECTORS_FILE)
        vectors = _read_vectors(data, path / VECTORS_FILE)
        if sha256(data) != manifest["vectors_sha256"]:
            raise PromptError(
                f"{path / VECTORS_FILE} was changed since it was saved: its sha256 is not the one in {MANIFEST_FILE}"
            )
        slots, width = manifest["slots"], manifest["width"]
        if slots and tuple(vectors.shape) != (slots, width):
            raise PromptError(
                f"{path / VECTORS_FILE}: wrong shape {tuple(vectors.shape)}, and {MANIFEST_FILE} says "
                f"({slots}, {width})"
            )
        try:
            about = manifest.get("weights")
            weights = None
            if manifest["format_version"] == WEIGHTS_VERSION:
                if not isinstance(about, Mapping):
                    raise TypeError("'weights' must be an object")
                weights = TrainedWeights.load(path / WEIGHTS_FOLDER, about)
            return _from_manifest(manifest, vectors if slots else None, weights)
        except (KeyError, TypeError, AttributeError, ValueError, TemplateError, LabelWordError, TaskError) as error:
            raise PromptError(f"{where} is damaged: {error}") from error

    def _manifest(self, vectors_sha256: str) -> dict[str, Json]:
        return {
            "format_version": FORMAT_VERSION,
            "template": str(self.template),
            "label_words": {k: list(v) for k, v in self.label_words.words.items()} if self.label_words else None,
            "task": self.task.to_json() if self.task else None,
            "choices": self.has_choices,
            "calibrate": self.calibrate,
            "normalise": self.normalise,
            "backbone": dict(vars(self.backbone)) if self.backbone else None,
            "width": None if self.slot_vectors is None else self.slot_vectors.shape[1],
            "slots": self.slots,
            "target_tokens": self.target_tokens,
            "multiline": self.multiline,
            "method": self.method,
            "seed": self.seed,
            "scores": dict(self.scores),
            "vectors_sha256": vectors_sha256,
            "versions": dict(versions()),
        }

    def _card(self, size_bytes: int) -> str:
        owner = self.backbone.name if self.backbone else "any"
        lines = [
            "# A prompt for a language model",
            "",
            f"Made by the method `{self.method}` with [ptuning](https://arxiv.org/abs/2103.10385) {VERSION}.",
            "",
            "| | |",
            "|---|---|",
            f"| template | `{str(self.template).replace('|', chr(92) + '|')}` |",
            f"| slots | {self.slots} vectors, {size_bytes / 1000:.1f} KB |",
            f"| backbone | `{owner}`" + (f", fingerprint `{self.backbone.fingerprint}` |" if self.backbone else " |"),
        ]
        if self.weights is not None:
            size = sum(weight.numel() * weight.element_size() for weight in self.weights.tensors.values())
            lines.append(
                f"| weights of the backbone | {self.weights.describe}, {size / 1e6:.1f} MB in `{WEIGHTS_FOLDER}/` |"
            )
        if self.label_words:
            listed = "; ".join(f"{label}: {', '.join(words)}" for label, words in self.label_words.words.items())
            lines.append(f"| label words | {listed} |")
        if self.task:
            lines.append(f"| task | {self.task.name}, version {self.task.version} |")
        if self.has_choices:
            lines.append("| chooses among | the choices that each row brings |")
        lines += [
            f"| {name.replace('_', ' ')} (development part) | {value:.3f} |" for name, value in self.scores.items()
        ]
        lines += [
            "| seed | " + str(self.seed) + " |",
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


def as_template(template: str | Template) -> Template:
    """Return a template, parsed if it is a pattern."""
    return Template.parse(template) if isinstance(template, str) else template


def _check_manifest(manifest: Mapping[str, Json], where: Path) -> None:
    missing = [key for key in REQUIRED_KEYS if key not in manifest]
    if missing:
        raise PromptError(f"{where}: missing key '{missing[0]}'; the file is damaged or no prompt's")
    if manifest["format_version"] not in (FORMAT_VERSION, WEIGHTS_VERSION):
        raise PromptError(
            f"{where}: format version {manifest['format_version']}, and this ptuning reads "
            f"{FORMAT_VERSION} and {WEIGHTS_VERSION}; update ptuning"
        )


def _read_vectors(data: bytes, where: Path) -> Tensor:
    try:
        tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError) as error:
        raise PromptError(f"{where} is no whole safetensors file ({error}); it is cut off or damaged") from error
    if VECTORS_KEY not in tensors:
        raise PromptError(f"{where}: missing key '{VECTORS_KEY}'; it holds {', '.join(sorted(tensors)) or 'nothing'}")
    extra = sorted(set(tensors) - {VECTORS_KEY})
    if extra:
        raise PromptError(f"{where}: extra key '{extra[0]}'; a prompt holds only '{VECTORS_KEY}'")
    return tensors[VECTORS_KEY]


def _from_manifest(manifest: Mapping[str, Json], vectors: Tensor | None, weights: TrainedWeights | None) -> Prompt:
    words, backbone, scores = manifest["label_words"], manifest["backbone"], manifest.get("scores") or {}
    seed, task, normalise = manifest.get("seed"), manifest.get("task"), manifest.get("normalise", "sum")
    if not isinstance(words, Mapping | None) or not isinstance(backbone, Mapping | None):
        raise TypeError("'label_words' and 'backbone' must be objects or null")
    if words and not all(isinstance(listed, list) for listed in words.values()):
        raise TypeError("'label_words' must hold a list of words for each label")
    if not isinstance(task, Mapping | None) or normalise not in ("sum", "mean"):
        raise TypeError("'task' must be an object or null, and 'normalise' \"sum\" or \"mean\"")
    if not isinstance(scores, Mapping) or not isinstance(seed, int | None):
        raise TypeError("'scores' must be an object and 'seed' a number")
    return Prompt(
        Template.parse(str(manifest["template"])),
        vectors,
        BackboneId(
            str(backbone["name"]),
            None if backbone["revision"] is None else str(backbone["revision"]),
            str(backbone["fingerprint"]),
        )
        if backbone
        else None,
        LabelWords({str(label): tuple(map(str, listed)) for label, listed in words.items() if isinstance(listed, list)})
        if words
        else None,
        target_tokens=int(str(manifest.get("target_tokens", DEFAULT_TARGET_TOKENS))),
        multiline=manifest.get("multiline") is True,
        method=str(manifest["method"]),
        seed=seed,
        scores={str(name): float(str(value)) for name, value in scores.items()},
        task=TaskFile.parse(str(task["file"]), where="its task") if task else None,
        calibrate=manifest.get("calibrate") is True,
        normalise="mean" if normalise == "mean" else "sum",
        weights=weights,
    )
