"""The prompt: a template with its slot vectors (a soft prompt), and everything that is needed to answer with it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.sources import LoadOptions
from ptuning.backbone.trained_weights import TrainedWeights
from ptuning.data.answer_space import AnswerSpace
from ptuning.data.task_files import TaskFile
from ptuning.engine.soft_prompt import DeepParams, PromptBatch, check_deep_params, initial_deep_params
from ptuning.errors import ConfigError, LabelWordError, PromptError, TaskError, TemplateError
from ptuning.prompt.sharing import find_prompt, push
from ptuning.prompt.storage import BackboneId, DeepEntry, Manifest, Stored, TaskEntry, read_prompt, write_prompt
from ptuning.template.encode import TokenizedTemplate
from ptuning.template.labels import LabelWords, Normalise, Scoring
from ptuning.template.language import Template

# The longest target of a prompt that was not trained.
DEFAULT_TARGET_TOKENS = 8
# Fields of a prompt that its manifest has under the same name, with the same value.
SAME_IN_MANIFEST = (
    "backbone", "target_tokens", "multiline", "method", "seed", "scores", "calibrate", "normalise", "max_length",
    "learned_to_stop", "scored_on", "intervals", "fields", "merge",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Prompt:
    """A template with its slot vectors and, if they were trained too, weights of the backbone. A manual prompt has
    neither vectors nor weights.

    Args:
        template: The template.
        slot_vectors: (P, E) float32, in template order; None for a template without slots.
        backbone: The frozen backbone it was trained on; None for a manual prompt, which fits any.
        label_words: Label -> words (the verbalizer), for classification.
        task: The task it was made for, which reads rows and may give each its own choices.
        calibrate: Whether to subtract from labels and choices their scores for an empty record.
        normalise: How labels and choices of several tokens are scored.
        target_tokens: Tokens of the longest training target. It limits the length of written answers.
        max_length: Most tokens of a row, as in training; None for as many as the model reads.
        multiline: Whether training targets had line breaks. If not, a written answer ends with its line.
        learned_to_stop: Whether it was trained to end after the target; candidates can then be scored with their end.
        method: Name of the method that made it.
        seed: Seed of the training, or None.
        scores: Scores on the development part, which chose it.
        intervals: Score -> the ends of its 95 % interval.
        scored_on: Number of records of the development part, or None.
        weights: Trained weights of the backbone, which :meth:`adapt` puts into a copy of it.
        fields: Which fields had another name in the training file: new name -> name in the file.
        merge: Labels that count as others, as ``biling=billing``, or ``case``.
        deep: What its deep slots bring to the layers; ``slot_vectors`` has no vectors of those in a block.

    Raises:
        TemplateError: If the pattern is malformed.
        PromptError: If there are slots without vectors, or vectors of a wrong shape or that are no numbers (NaN).
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
    max_length: int | None = None
    learned_to_stop: bool = False
    scored_on: int | None = None
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    fields: Mapping[str, str] = field(default_factory=dict)
    merge: tuple[str, ...] = ()
    deep: DeepParams | None = None

    def __post_init__(self) -> None:
        if self.target_tokens < 1:
            raise PromptError(f"target_tokens is {self.target_tokens}; the longest target has 1 token or more")
        if self.max_length is not None and self.max_length < 1:
            raise PromptError(f"max_length is {self.max_length}; rows have 1 token or more")
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
        self._check_deep()
        if not self.slot_vectors.isfinite().all():
            wrong = (~self.slot_vectors.isfinite()).any(dim=1).nonzero()[:, 0].tolist()
            raise PromptError(
                f"the slot vectors hold NaN or infinity (in slot {wrong[0] + 1} of {self.slots}), so every answer is "
                "NaN; train the prompt again with a lower learning rate, or in float32"
            )

    def _check_deep(self) -> None:
        if self.template.has_deep != (self.deep is not None):
            missing = "deep slots ([D]), and there are no vectors of theirs in the layers"
            raise PromptError(f"the template '{self.template}' has {missing if self.deep is None else 'no deep slots'}")
        if self.deep is not None and not all(one.isfinite().all() for one in self.deep.tensors.values()):
            raise PromptError("the deep slots hold NaN or infinity; train the prompt again with a lower deep_lr")

    @classmethod
    def manual(
        cls,
        template: str | Template,
        *,
        label_words: LabelWords | Mapping[str, Sequence[str]] | str | None = None,
        task: TaskFile | None = None,
    ) -> Prompt:
        """Make a manual prompt from a template without slots, for any backbone; with a task's label words and scoring.

        A TemplateError if the pattern is malformed; a LabelWordError if label words are; a PromptError if it has slots.
        """
        words = LabelWords.of(label_words) if label_words is not None else None
        if task is None:
            return cls(as_template(template), label_words=words)
        return cls(
            as_template(template),
            label_words=words or task.label_words,
            task=task,
            calibrate=task.calibrate,
            normalise=task.normalise,
        )

    @classmethod
    def from_token_ids(cls, template: str | Template, slot_token_ids: Sequence[int], backbone: Backbone) -> Prompt:
        """Make a prompt whose slots hold the embeddings of given tokens, in template order; deep slots are these tokens
        in every layer.

        A PromptError if there are more or fewer ids than slots, or an id is outside the vocabulary; a BackboneError if
        the model takes no deep slots.
        """
        parsed = as_template(template)
        block = parsed.has_deep and backbone.reads_blocks
        bound = TokenizedTemplate(parsed, tokenizer=backbone.tokenizer, kind=backbone.kind, block=block)
        in_front = bound.layout.prefix.slots
        slots = in_front + bound.slots
        if len(slot_token_ids) != slots:
            raise PromptError(
                f"the template '{parsed}' has {slots} slots for this backbone, and {len(slot_token_ids)} "
                "token ids were given"
            )
        size = backbone.embedding_rows
        outside = [token for token in slot_token_ids if not 0 <= token < size]
        if outside:
            raise PromptError(f"token ids {outside} are outside the vocabulary of {size}")
        ids = torch.tensor([list(slot_token_ids)[in_front:]], dtype=torch.int64, device=backbone.device)  # (1, P)
        with torch.no_grad():
            vectors = backbone.embed(ids)[0].float().cpu()  # (P, E)
        deep = None
        if parsed.has_deep:
            found = initial_deep_params(
                backbone, bound.starting(slot_token_ids), generator=torch.Generator().manual_seed(0)
            )
            deep = found[0] if found is not None else None
        return cls(parsed, vectors, BackboneId.of(backbone), method="tokens", deep=deep)

    @property
    def slots(self) -> int:
        """Number of slots P."""
        return 0 if self.slot_vectors is None else len(self.slot_vectors)

    @property
    def total_slots(self) -> int:
        """Number of slots, those of a block of deep slots in front included."""
        return self.slots + (self.deep.prefix_slots if self.deep is not None else 0)

    @property
    def answer_space(self) -> AnswerSpace:
        """The possible answers, and how they are scored."""
        kept = self.task.closed_fields if self.task is not None else ()
        has_choices = self.task is not None and self.task.answer_space.has_choices
        head = self.weights is not None and self.weights.train_backbone == "head"
        return AnswerSpace(self.label_words, has_choices, Scoring(self.normalise, self.calibrate, kept), head)

    def check_open(self) -> None:
        """Raise a ConfigError if it has a closed set of answers, and so cannot answer among candidates."""
        if self.answer_space.is_closed:
            what = "has label words, which are all its answers" if self.label_words else "brings its own choices"
            raise ConfigError(f"the prompt {what}; leave the candidates out")

    def check_stop_counts(self, *, candidates: bool) -> None:
        """Raise a ConfigError if the end of answers cannot count: without ``candidates``, or if it was not learned."""
        if not candidates:
            raise ConfigError("count_stop goes with candidates; leave it out here")
        if not self.learned_to_stop:
            raise ConfigError(
                "count_stop is for prompts that were trained to stop after the target (train_eos); leave it out"
            )

    def learned(self, backbone: Backbone) -> PromptBatch:
        """Return its slot vectors (P, E), and what its deep slots bring, as a pass of a backbone takes them; (0, E) for
        a manual prompt.
        """
        if self.slot_vectors is None:
            return PromptBatch.none(backbone.width)
        return PromptBatch.of(self.slot_vectors, self.deep)

    def bind(self, backbone: Backbone, *, force: bool = False) -> TokenizedTemplate:
        """Check that the prompt fits a backbone, and return its template bound to the backbone's tokenizer.

        ``force`` accepts another backbone of the same width; the answers may be worthless. A PromptError if the prompt
        belongs to another backbone, or its shape does not fit.
        """
        backbone.check_evaluates()
        bound = TokenizedTemplate(
            self.template,
            tokenizer=backbone.tokenizer,
            kind=backbone.kind,
            multiline=self.multiline,
            max_length=self.max_length,
            block=self.deep is not None and self.deep.prefix is not None,
        )
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
        if self.deep is not None:
            check_deep_params(self.deep, bound, backbone)
        return bound

    def adapt(self, backbone: Backbone, *, force: bool = False) -> Backbone:
        """Return the backbone to use the prompt with: a frozen copy with the prompt's trained weights, if it has any.

        A backbone that has them already is returned itself. ``force`` accepts another backbone of the same shapes; the
        answers may be worthless. A PromptError if the prompt belongs to another backbone, or its weights do not fit.
        """
        if self.weights is None or self._is_adapted(backbone):
            return backbone
        if backbone.trained is not None:
            raise PromptError(f"'{backbone.name}' has the trained weights of another prompt in it; give the frozen one")
        self._check_backbone(backbone, force=force)
        return self.weights.into(backbone)

    def without(self, part: str) -> Prompt:
        """Return the prompt without one of its parts, for an ablation; a PromptError if there is no such part.

        Without ``slots``, those that started at words become these words, and random ones are left out; without
        ``backbone``, the backbone stays frozen.
        """
        if part == "slots" and self.slot_vectors is not None:
            stops = self.learned_to_stop and self.weights is not None
            without = self.template.without_slots()
            return replace(self, template=without, slot_vectors=None, deep=None, learned_to_stop=stops)
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
        # Loaded from the prompt's folder of whole weights. Weights that hardly moved leave the fingerprint as it was.
        return backbone.fingerprint == self.weights.fingerprint != self.backbone.fingerprint

    def _check_backbone(self, backbone: Backbone, *, force: bool) -> None:
        if self.backbone is not None and not force:
            self.backbone.check(backbone)

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write the prompt's folder: vectors, trained weights, manifest, and a card for people.

        Equal prompts give equal bytes. A FileError if the folder is taken and ``overwrite`` is not set, or it cannot be
        written.
        """
        vectors, weights = self.slot_vectors, self.weights
        write_prompt(
            Path(folder), self._manifest(), vectors=vectors, weights=weights, deep=self.deep, overwrite=overwrite
        )

    def save_pretrained(self, folder: str | Path, *, push_to_hub: bool = False, repo_id: str | None = None) -> None:
        """Write the prompt into a folder; an earlier prompt in it is replaced, and files of others stay.

        With ``push_to_hub`` also upload it to ``repo_id``, by default the folder's name. A FileError if the folder
        cannot be written, or the hub refuses.
        """
        self.save(folder, overwrite=True)
        if push_to_hub:
            self.push_to_hub(repo_id or Path(folder).name)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
    ) -> Prompt:
        """Read a prompt from its folder, or as ``owner/name`` from the hub (from its cache where it does not answer).

        Args:
            name: Folder or hub id.
            revision: Branch, tag or commit on the hub; by default the newest.
            token: Of the hub; by default the one that was logged in with.
            cache_dir: The hub's cache; by default its own.

        Raises:
            FileError: If there is no such prompt; says whether the hub answered.
            PromptError: As :meth:`load`.
        """
        return cls.load(find_prompt(name, LoadOptions(revision=revision, token=token, cache_dir=cache_dir)))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload a prompt",
    ) -> str:
        """Upload the prompt to the hub, and return the address of the commit; the repository is made if needed.

        Args:
            repo_id: ``owner/name``, or a name of one's own.
            private: Whether a new repository is private; by default as the hub's settings say.
            token: As for :meth:`from_pretrained`.
            revision: Branch to upload to; by default the main one.
            commit_message: What the commit is called.

        Raises:
            FileError: If the hub refuses or does not answer.
        """
        with tempfile.TemporaryDirectory(prefix="ptuning-push-") as folder:
            made = Path(folder) / "prompt"
            self.save(made)
            return push(made, repo_id, private=private, token=token, revision=revision, message=commit_message)

    @classmethod
    def load(cls, folder: str | Path) -> Prompt:
        """Read a prompt's folder, or that of the training run which holds one.

        Raises:
            FileError: If it is not a prompt's folder or cannot be read.
            PromptError: If a file is cut off or was changed, a key is missing, or a shape is wrong.
        """
        return cls.from_stored(read_prompt(folder))

    @classmethod
    def from_stored(cls, stored: Stored) -> Prompt:
        """Make a prompt of the content of its folder; a PromptError if its manifest or its vectors are damaged."""
        manifest = stored.manifest
        try:
            return cls(
                Template.parse(manifest.template),
                stored.vectors,
                label_words=LabelWords(manifest.label_words) if manifest.label_words is not None else None,
                task=TaskFile.parse(manifest.task.file, where="its task") if manifest.task is not None else None,
                weights=stored.weights,
                deep=stored.deep,
                **{name: getattr(manifest, name) for name in SAME_IN_MANIFEST},
            )
        except (PromptError, TemplateError, LabelWordError, TaskError) as error:
            raise PromptError(f"{stored.where} is damaged: {error}") from error

    def _manifest(self) -> Manifest:
        words = self.label_words
        return Manifest(
            template=str(self.template),
            label_words=None if words is None else {label: tuple(listed) for label, listed in words.words.items()},
            task=None if self.task is None else TaskEntry.model_validate(self.task.to_json()),
            choices=self.answer_space.has_choices,
            width=None if self.slot_vectors is None else self.slot_vectors.shape[1],
            slots=self.slots,
            deep=None if self.deep is None else DeepEntry.model_validate(self.deep.to_json()),
            **{name: getattr(self, name) for name in SAME_IN_MANIFEST},
        )


# A prompt, or the folder or hub id of one.
OnePrompt = Prompt | str | Path


def as_prompt(prompt: OnePrompt) -> Prompt:
    """Return a prompt; one that is named by its folder or hub id is read."""
    return prompt if isinstance(prompt, Prompt) else Prompt.from_pretrained(prompt)


def as_template(template: str | Template) -> Template:
    """Return a template; a pattern is parsed."""
    return Template.parse(template) if isinstance(template, str) else template
