"""Inference with prompts: logits of targets, ranked candidates, labels and written answers; many prompts in a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.trained_weights import TrainedWeights
from ptuning.config import GenerationSettings
from ptuning.data.answer_space import AnswerSpace
from ptuning.data.questions import Questions, as_questions
from ptuning.engine import objective
from ptuning.engine.batch import Side, batches
from ptuning.engine.candidates import candidate_log_probs
from ptuning.engine.decoding.decoder import GenerationInput
from ptuning.engine.decoding.generate import generate_answers, stream_answer
from ptuning.engine.forward import shared_prefix_tokens, target_logits
from ptuning.engine.objective import (
    ScoringRequest,
    class_scores,
    inputs_of,
    request_parts,
    score_continuations,
    warn_truncated_parts,
)
from ptuning.engine.soft_prompt import PromptBatch
from ptuning.errors import BackboneError, ConfigError, PromptError, RecordError, shown
from ptuning.prompt.prediction import Candidate, Prediction
from ptuning.prompt.prompt import OnePrompt, Prompt, as_prompt
from ptuning.records import Record, Rows, as_records
from ptuning.template.ambiguity import check_candidates, collisions_of, warn
from ptuning.template.encode import Example, TokenizedTemplate
from ptuning.template.labels import Normalise
from ptuning.template.segments import FILLS_MASKS

Found = TypeVar("Found")

# Records whose candidates are filled in and scored together have about so many rows: what bounds the memory.
RANKED_ROWS = 2048
# A written answer may be so much longer than the longest target that was learned.
MORE_TOKENS = 2


class PromptModel:
    """A backbone that answers with prompts, any of them in one batch.

    ``force`` accepts prompts of another backbone of the same width. ``pad_side`` is the side of a batch's padding, if
    the backbone allows both; answers do not depend on it.

    Example:
        >>> model = PromptModel(load_backbone())                                            # doctest: +SKIP
        >>> model.predict([{"x": "Kenya"}], Prompt.load("capitals"))[0].text                # doctest: +SKIP
        'Nairobi'
    """

    def __init__(self, backbone: Backbone, *, force: bool = False, pad_side: Side = "right") -> None:
        backbone.check_evaluates()
        self.backbone = backbone
        self.force = force
        self.pad_side: Side = pad_side if pad_side == "right" or backbone.pads_left else "right"
        # A model for each prompt with trained weights, kept as long as the prompt is.
        self._adapted: WeakKeyDictionary[TrainedWeights, PromptModel] = WeakKeyDictionary()

    def __getstate__(self) -> dict[str, object]:
        """Return what is pickled: all but models with trained weights, which are made anew."""
        return {**vars(self), "_adapted": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Take what was pickled."""
        vars(self).update(state, _adapted=WeakKeyDictionary())

    def for_prompt(self, prompt: Prompt) -> PromptModel:
        """Return the model for a prompt: one with the prompt's trained weights, if it has any, else this one."""
        if prompt.weights is None:
            return self
        if prompt.weights not in self._adapted:
            backbone = prompt.adapt(self.backbone, force=self.force)
            if backbone is self.backbone:
                return self
            self._adapted[prompt.weights] = PromptModel(backbone, force=self.force, pad_side=self.pad_side)
        return self._adapted[prompt.weights]

    def _spread(self, prompts: Sequence[Prompt], work: Callable[[PromptModel, list[int]], list[Found]]) -> list[Found]:
        """Run ``work`` once for each model that the prompts of the rows need, and return the results row by row."""
        rows: dict[int, tuple[PromptModel, list[int]]] = {}
        for index, prompt in enumerate(prompts):
            model = self.for_prompt(prompt)
            rows.setdefault(id(model), (model, []))[1].append(index)
        found: dict[int, Found] = {}
        for model, indices in rows.values():
            found |= dict(zip(indices, work(model, indices), strict=True))
        return [found[index] for index in range(len(prompts))]

    @torch.no_grad()
    def target_logits(self, records: Rows, prompts: OnePrompt | Sequence[OnePrompt]) -> list[Tensor]:
        """Return the logits that score the targets of N records: N float32 tensors (target tokens, V) on the CPU.

        A PromptError if a prompt belongs to another backbone, or there is not one prompt per record; a RecordError if a
        record has no target.
        """
        data = as_records(records)
        each = _per_row(prompts, len(data))
        return self._spread(each, lambda model, at: model._target_logits([data[i] for i in at], [each[i] for i in at]))

    def _target_logits(self, data: Sequence[Record], prompts: Sequence[Prompt]) -> list[Tensor]:
        groups, learned = self._bind(prompts)
        rows: list[Example] = [Example((), (), (), (), 0)] * len(data)
        for bound, indices in groups:
            found = bound.examples([data[index] for index in indices])
            for index, example in zip(indices, found, strict=True):
                rows[index] = example
        logits: list[Tensor] = [torch.empty(0)] * len(rows)
        for chosen in batches([[row] for row in rows], prefix=self._prefix(rows, learned)):
            found_logits = self._run([rows[index] for index in chosen], learned.take(chosen))
            parts = found_logits.cpu().split([len(rows[index].logit_positions) for index in chosen])
            for index, part in zip(chosen, parts, strict=True):
                logits[index] = part  # (target tokens, V)
        return logits

    @torch.no_grad()
    def rank(
        self,
        records: Rows,
        prompts: OnePrompt | Sequence[OnePrompt],
        candidates: Sequence[str],
        *,
        normalise: Normalise | None = None,
        count_stop: bool = False,
    ) -> list[list[Candidate]]:
        """Score a closed set of C different answers for each of N records, whose targets are not read.

        Answers are ranked by total log-probability (``sum``), or by its mean over the tokens of an answer (``mean``);
        by default as each record's prompt says. Returns N lists of C candidates, best first; on a tie in the given
        order.

        ``count_stop`` counts the stop token as a token of each answer: without it, an answer can never lose to one that
        it begins. Only a prompt that has learned to stop (:attr:`Prompt.learned_to_stop`) has an opinion on that.

        A RecordError if there are no candidates, or two that are equal; a ConfigError if ``normalise`` is neither, or a
        prompt has not learned to stop.
        """
        check_listed(candidates)
        data = as_records(records)
        each = _per_row(prompts, len(data))
        for one, _ in _by_prompt(each) if count_stop else ():
            one.check_stop_counts(candidates=True)
        how = {id(one): one.answer_space.scored(normalise=normalise, candidates=True).scoring for one in each}
        return self._spread(
            each,
            lambda model, at: model._rank(
                [data[i] for i in at],
                [each[i] for i in at],
                candidates,
                [how[id(each[i])].normalise for i in at],
                count_stop=count_stop,
            ),
        )

    def _rank(
        self,
        data: Sequence[Record],
        prompts: Sequence[Prompt],
        candidates: Sequence[str],
        normalise: Sequence[Normalise],
        *,
        count_stop: bool,
    ) -> list[list[Candidate]]:
        groups, learned = self._bind(prompts)
        bound = {index: one for one, indices in groups for index in indices}
        ranked = []
        at_once, every = max(1, RANKED_ROWS // len(candidates)), range(len(candidates))
        for start in range(0, len(data), at_once):
            part = range(start, min(start + at_once, len(data)))
            examples = [bound[index].answers([data[index]], [candidates], with_stop=count_stop)[0] for index in part]
            totals = candidate_log_probs(self.backbone, examples, learned.take(part), pad_side=self.pad_side)
            for index, filled, values in zip(part, examples, totals, strict=True):
                if normalise[index] == "mean":
                    values = [one / len(example.target_ids) for one, example in zip(values, filled, strict=True)]
                collisions = collisions_of(
                    [(one.token_ids, one.target_ids) if one.known else None for one in filled], every
                )
                warn(check_candidates(collisions, candidates))
                ranked.append(Candidate.ranked(candidates, values, collisions))
        return ranked

    @torch.no_grad()
    def classify(
        self,
        records: Rows | Questions,
        prompt: OnePrompt | Sequence[OnePrompt],
        *,
        normalise: Normalise | None = None,
        calibrate: bool | None = None,
    ) -> list[list[Candidate]]:
        """Score the labels of a prompt, or the choices that each question brings, for N records or questions, with one
        prompt for all or one per row; rows of different prompts share passes.

        The defaults of ``normalise`` (see :meth:`rank`) and ``calibrate`` (subtract the scores for an empty record) are
        those of each prompt. Returns N lists of the labels or choices, best first, whose probabilities add up to 1.

        A PromptError if a prompt has neither label words nor choices; a RecordError if a row lacks its choices.
        """
        questions = as_questions(records)
        each = _per_row(prompt, len(questions))
        how = {
            id(one): one.answer_space.scored(normalise=normalise, calibrate=calibrate) for one, _ in _by_prompt(each)
        }
        if not all(answers.is_closed for answers in how.values()):
            raise PromptError("the prompt has no label words; give candidates instead")
        return self._spread(
            each,
            lambda model, at: model._classify(
                Questions((questions[i] for i in at), name=questions.name),
                [each[i] for i in at],
                [how[id(each[i])] for i in at],
            ),
        )

    def _classify(
        self, questions: Questions, prompts: Sequence[Prompt], answers: Sequence[AnswerSpace]
    ) -> list[list[Candidate]]:
        groups, learned = self._bind(prompts)
        found: dict[int, list[Candidate]] = {}
        items: dict[int, ScoringRequest] = {}

        def rank() -> None:
            chosen = list(items)
            owners = learned.take([index for index in chosen for _ in items[index].inputs])
            prefix = self._prefix(inputs_of(items.values()), owners)
            ranked = rank_classes(
                list(items.values()),
                [answers[index].names(questions[index]) for index in chosen],
                lambda at: self._run_items(
                    [items[chosen[one]] for one in at], learned.take([chosen[one] for one in at])
                ),
                prefix=prefix,
            )
            found.update(zip(chosen, ranked, strict=True))
            items.clear()

        for bound, indices in groups:
            own, left = Questions((questions[index] for index in indices), name=questions.name), iter(indices)
            parts = request_parts(bound, own, answers[indices[0]], labelled=False)
            for part in warn_truncated_parts(parts, own.name, bound.max_length):
                items.update({index: item for item, index in zip(part, left, strict=False)})
                del part  # while the next one is made
                if sum(len(item.choices) for item in items.values()) >= objective.TEXTS_AT_ONCE // 2:
                    rank()
        if items:
            rank()
        return [found[index] for index in range(len(questions))]

    def _run_items(self, items: Sequence[ScoringRequest], learned: PromptBatch) -> Tensor:
        rows = [place for place, item in enumerate(items) for _ in item.inputs]
        return self._run(inputs_of(items), learned.take(rows))

    @torch.no_grad()
    def predict(
        self,
        records: Rows | Questions,
        prompt: OnePrompt | Sequence[OnePrompt],
        candidates: Sequence[str] | None = None,
        *,
        top_k: int = 1,
        generation: GenerationSettings | Mapping[str, object] | None = None,
        normalise: Normalise | None = None,
        calibrate: bool | None = None,
        count_stop: bool = False,
        min_probability: float | None = None,
    ) -> list[Prediction]:
        """Answer N records, or questions of a task, whose targets are not read, with one prompt for all or one per row.

        With candidates, labels or choices, the answer is the likeliest of them. Else a causal or encoder-decoder model
        writes text, as ``generation`` says (settings, or their names and values; greedily by default), and a masked
        model fills 1, 2, ... masks and takes the length whose tokens are likeliest on average.

        ``candidates`` replace the prompt's own answers. ``top_k`` different answers are returned, the answer first;
        asking for more does not change it. ``normalise``, ``count_stop`` and ``calibrate`` are as in :meth:`rank` and
        :meth:`classify`. With ``min_probability``, a label or choice is only given as the answer if it is at least so
        likely. A ConfigError if one of these settings would change nothing, since answers are not written, or are
        written, or candidates would be calibrated.
        """
        data = records.records if isinstance(records, Questions) else as_records(records)
        if not data:
            return []
        if top_k < 1:
            raise RecordError(f"top_k is {top_k}; it must be 1 or more")
        prompts, settings = _per_row(prompt, len(data)), GenerationSettings.of(generation)
        for one, _ in _by_prompt(prompts):
            check_answering(
                one,
                candidates=candidates,
                normalise=normalise,
                calibrate=calibrate,
                count_stop=count_stop,
                min_probability=min_probability,
            )
        if settings.changed and (candidates is not None or all(one.answer_space.is_closed for one in prompts)):
            raise ConfigError(f"{settings.changed[0]} is for answers that are written, not for candidates or labels")
        if candidates is not None:
            ranked = self.rank(data, prompts, candidates, normalise=normalise, count_stop=count_stop)
            return [Prediction(row[0].text, tuple(row[:top_k])) for row in ranked]
        answers: dict[int, Prediction] = {}
        closed = [index for index in range(len(data)) if prompts[index].answer_space.is_closed]
        if closed:
            asked: Rows | Questions = [data[index] for index in closed]
            if isinstance(records, Questions):
                asked = Questions(records[index] for index in closed)
            own = [prompts[index] for index in closed]
            ranked = self.classify(asked, own, normalise=normalise, calibrate=calibrate)
            chosen = [Prediction.of_classes(row, top_k=top_k, min_probability=min_probability) for row in ranked]
            answers |= dict(zip(closed, chosen, strict=True))
        open_rows = [index for index in range(len(data)) if index not in answers]
        written = self._spread(
            [prompts[index] for index in open_rows],
            lambda model, at: model._write(
                [data[open_rows[i]] for i in at], [prompts[open_rows[i]] for i in at], top_k=top_k, settings=settings
            ),
        )
        answers |= dict(zip(open_rows, written, strict=True))
        return [answers[index] for index in range(len(data))]

    def stream(
        self,
        record: Record,
        prompt: OnePrompt,
        *,
        generation: GenerationSettings | Mapping[str, object] | None = None,
    ) -> Iterator[str]:
        """Write the answer to one record, and yield its text piece by piece; joined it is that of :meth:`predict`.

        A PromptError if the answers are labels or choices; a ConfigError with several beams, whose texts change until
        the end; a BackboneError if the model fills masks.

        Example:
            >>> for piece in model.stream({"x": "Kenya"}, prompt):                           # doctest: +SKIP
            ...     print(piece, end="", flush=True)
        """
        prompt = as_prompt(prompt)
        settings, model = GenerationSettings.of(generation), self.for_prompt(prompt)
        if prompt.answer_space.is_closed:
            raise PromptError("the prompt chooses among labels or choices, and only written answers are streamed")
        if settings.num_beams > 1:
            raise ConfigError(f"num_beams is {settings.num_beams}; only an answer of one beam can be streamed")
        if self.backbone.kind in FILLS_MASKS:
            raise BackboneError("this model fills masks all at once, so there is nothing to stream; use predict")
        bound = prompt.bind(model.backbone, force=self.force)
        row = GenerationInput(bound, as_records([record])[0], longest_answer(settings, prompt))
        pieces = stream_answer(model.backbone, row, prompt.learned(model.backbone), settings=settings)
        return _without_gradients(pieces)

    def _write(
        self, data: Sequence[Record], prompts: Sequence[Prompt], *, top_k: int, settings: GenerationSettings
    ) -> list[Prediction]:
        groups, learned = self._bind(prompts)
        bound = {index: one for one, indices in groups for index in indices}
        rows = [
            GenerationInput(bound[index], record, longest_answer(settings, prompt))
            for index, (record, prompt) in enumerate(zip(data, prompts, strict=True))
        ]
        written = generate_answers(self.backbone, rows, learned, settings=settings, top_k=top_k, pad_side=self.pad_side)
        return [
            Prediction(
                row[0].text,
                tuple(Candidate(one.text, one.log_prob) for one in row),
                tokens=row[0].tokens,
                stopped=row[0].stopped,
            )
            for row in written
        ]

    def _bind(self, prompts: Sequence[Prompt]) -> tuple[list[tuple[TokenizedTemplate, list[int]]], PromptBatch]:
        """Return each prompt's bound template with the rows that use it, and the vectors of all prompts."""
        groups = _by_prompt(prompts)
        number = {id(prompt): place for place, (prompt, _) in enumerate(groups)}
        bound = [(prompt.bind(self.backbone, force=self.force), indices) for prompt, indices in groups]
        brought = [prompt.learned(self.backbone) for prompt, _ in groups]
        learned = PromptBatch.join(brought, rows=[number[id(prompt)] for prompt in prompts])
        return bound, learned.to(self.backbone.device)

    def _prefix(self, examples: Sequence[Example], learned: PromptBatch) -> int:
        """Return the number of leading tokens that the rows share, which run once per batch; 0 with pads in front."""
        return 0 if self.pad_side == "left" else shared_prefix_tokens(self.backbone, examples, learned)

    def _run(self, examples: Sequence[Example], learned: PromptBatch) -> Tensor:
        return target_logits(self.backbone, examples, learned, pad_side=self.pad_side)


@torch.no_grad()
def rank_classes(
    items: Sequence[ScoringRequest],
    names: Sequence[Sequence[str]],
    run: Callable[[Sequence[int]], Tensor],
    *,
    prefix: int = 0,
) -> list[list[Candidate]]:
    """Return the classes of each of N items with their log-probabilities, best first.

    ``names`` are those of each item's classes. ``run`` gets the indices of items that share a pass, and returns the
    logits of their inputs, (M, V) at their M scored positions. ``prefix`` is the number of leading tokens that all
    inputs share.
    """
    found: list[list[Candidate]] = [[]] * len(items)
    for chosen in batches([item.inputs for item in items], prefix=prefix):
        ranked = classes_of([items[index] for index in chosen], [names[index] for index in chosen], run(chosen))
        for index, row in zip(chosen, ranked, strict=True):
            found[index] = row
    return found


def classes_of(
    items: Sequence[ScoringRequest], names: Sequence[Sequence[str]], logits: Tensor
) -> list[list[Candidate]]:
    """Return the classes of items as :func:`rank_classes` does, from the (M, V) logits of their inputs."""
    scores = torch.log_softmax(class_scores(items, score_continuations(items, logits)), dim=-1).cpu()  # (I, K)
    # An item with fewer classes than others of the batch has no names for those that it lacks.
    return [
        Candidate.ranked(own, values, item.collisions)
        for item, own, values in zip(items, names, scores.tolist(), strict=True)
    ]


def check_answering(
    prompt: Prompt,
    *,
    candidates: Sequence[str] | None,
    normalise: Normalise | None,
    calibrate: bool | None,
    count_stop: bool,
    min_probability: float | None,
) -> AnswerSpace:
    """Return the answers of a prompt as :meth:`PromptModel.predict` scores them; a ConfigError if a setting would
    change nothing.
    """
    is_listed = candidates is not None
    answers = prompt.answer_space.scored(normalise=normalise, calibrate=calibrate, candidates=is_listed)
    prompt.answer_space.check_threshold(min_probability, candidates=is_listed)
    if count_stop:
        prompt.check_stop_counts(candidates=is_listed)
    return answers


def longest_answer(settings: GenerationSettings, prompt: Prompt) -> int:
    """Return the most tokens of an answer that a prompt writes."""
    return settings.max_new_tokens or prompt.target_tokens + MORE_TOKENS


@torch.no_grad()
def _without_gradients(pieces: Iterator[str]) -> Iterator[str]:
    yield from pieces


def _by_prompt(prompts: Sequence[Prompt]) -> list[tuple[Prompt, list[int]]]:
    rows: dict[int, tuple[Prompt, list[int]]] = {}
    for index, prompt in enumerate(prompts):
        rows.setdefault(id(prompt), (prompt, []))[1].append(index)
    return list(rows.values())


def _per_row(prompts: OnePrompt | Sequence[OnePrompt], rows: int) -> list[Prompt]:
    """Return one prompt per row; a folder that is named several times is read once."""
    if isinstance(prompts, OnePrompt):
        return [as_prompt(prompts)] * rows
    if len(prompts) != rows:
        raise PromptError(f"{len(prompts)} prompts for {rows} records; give one prompt for all, or one per record")
    read = {str(one): as_prompt(one) for one in prompts if not isinstance(one, Prompt)}
    return [one if isinstance(one, Prompt) else read[str(one)] for one in prompts]


def check_listed(candidates: Sequence[str]) -> None:
    """Raise a RecordError unless candidates are texts, not empty, and different."""
    if isinstance(candidates, str):
        raise RecordError(f"candidates are a list of texts, and not the text '{candidates}'")
    if not candidates:
        raise RecordError("there are no candidates to choose from")
    seen: set[str] = set()
    for text in candidates:
        if not isinstance(text, str):
            raise RecordError(f"candidates are texts, and one is {shown(text)}")
        if not text.strip():
            raise RecordError("a candidate is empty")
        if text in seen:
            raise RecordError(f"the candidate '{text}' is given twice; candidates must differ")
        seen.add(text)
