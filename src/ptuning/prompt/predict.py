"""Inference with prompts: logits of targets, ranked candidates, labels and generated text; many prompts in a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.trained_weights import TrainedWeights
from ptuning.config import GenerationSettings
from ptuning.data.questions import Questions, as_questions
from ptuning.engine import objective
from ptuning.engine.batch import batches
from ptuning.engine.forward import shared_prefix_tokens
from ptuning.engine.prefix_store import ModelRow
from ptuning.engine.runner import Generation, Runner, Scoring, Work
from ptuning.errors import BackboneError, ConfigError, PromptError
from ptuning.prompt.prediction import Candidate, Prediction
from ptuning.prompt.prompt import OnePrompt, Prompt, as_prompt
from ptuning.prompt.rows import Answering, Preprocessor, candidates_of, check_listed, prediction_of
from ptuning.records import Record, Rows, as_records
from ptuning.template.labels import Normalise
from ptuning.template.segments import FILLS_MASKS

T = TypeVar("T")


class PromptModel:
    """A backbone that answers with prompts, any of them in one batch.

    ``force`` accepts prompts of another backbone of the same width.

    Example:
        >>> model = PromptModel(load_backbone())                                            # doctest: +SKIP
        >>> model.predict([{"x": "Kenya"}], Prompt.load("capitals"))[0].text                # doctest: +SKIP
        'Nairobi'
    """

    def __init__(self, backbone: Backbone, *, force: bool = False) -> None:
        backbone.check_evaluates()
        self.backbone = backbone
        self.force = force
        self.preprocessor = Preprocessor(backbone, force=force)
        # A model for each prompt with trained weights, kept as long as the prompt is.
        self._adapted: WeakKeyDictionary[TrainedWeights, PromptModel] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle the backbone and settings: prepared prompts, and models with trained weights, are made anew."""
        return _model, (self.backbone, self.force)

    def for_prompt(self, prompt: Prompt) -> PromptModel:
        """Return the model for a prompt: one with the prompt's trained weights, if it has any, else this one."""
        if prompt.weights is None:
            return self
        if prompt.weights not in self._adapted:
            backbone = prompt.adapt(self.backbone, force=self.force)
            if backbone is self.backbone:
                return self
            self._adapted[prompt.weights] = PromptModel(backbone, force=self.force)
        return self._adapted[prompt.weights]

    def _by_model(self, prompts: Sequence[Prompt]) -> Iterator[tuple[PromptModel, dict[Prompt, list[int]]]]:
        """Yield the models that the prompts of rows need, each with its prompts and the indices of their rows."""
        models: dict[int, tuple[PromptModel, dict[Prompt, list[int]]]] = {}
        for index, prompt in enumerate(prompts):
            model = self.for_prompt(prompt)
            groups = models.setdefault(id(model), (model, {}))[1]
            groups.setdefault(prompt, []).append(index)
        yield from models.values()

    def _answers(
        self, questions: Questions, prompts: Sequence[Prompt], how: Answering, result: Callable[[Work], T]
    ) -> list[T]:
        """Return the ``result`` of each question, with the prompt of each."""
        results: dict[int, T] = {}
        for model, groups in self._by_model(prompts):
            waiting, choices = dict[int, Work](), 0
            for prompt, indices in groups.items():
                own, left = Questions((questions[at] for at in indices), name=questions.name), iter(indices)
                for part in model.preprocessor.works(prompt, own, how):
                    for work, index in zip(part, left, strict=False):
                        waiting[index] = work
                        if isinstance(work, Scoring):
                            choices += len(work.request.choices)
                    del part, work  # while the next one is made
                    if choices >= objective.TEXTS_AT_ONCE // 2:
                        results |= model._completed(waiting, result)
                        choices = 0
            results |= model._completed(waiting, result)
        return [results[index] for index in range(len(questions))]

    @torch.no_grad()
    def target_logits(self, records: Rows, prompts: OnePrompt | Sequence[OnePrompt]) -> list[Tensor]:
        """Return the logits that score the targets of N records: N float32 tensors (target tokens, V) on the CPU.

        A PromptError if a prompt belongs to another backbone, or there is not one prompt per record; a RecordError if a
        record has no target.
        """
        data = as_records(records)
        each, logits = _per_row(prompts, len(data)), dict[int, Tensor]()
        for model, groups in self._by_model(each):
            rows: dict[int, ModelRow] = {}
            for prompt, indices in groups.items():
                prepared = model.preprocessor.prepared(prompt)
                examples = prepared.bound.examples([data[index] for index in indices])
                rows |= {index: ModelRow(example, prepared) for index, example in zip(indices, examples, strict=True)}
            order = list(rows)
            one_prompt = len(groups) == 1
            prefix = shared_prefix_tokens(model.backbone, [row.example for row in rows.values()]) if one_prompt else 0
            for places in batches([[row.example] for row in rows.values()], prefix=prefix):
                chosen = [order[place] for place in places]
                values, _ = Runner(model.backbone).logits([rows[index] for index in chosen])
                parts = values.cpu().split([len(rows[index].example.logit_positions) for index in chosen])
                logits |= dict(zip(chosen, parts, strict=True))  # (target tokens, V) each
        return [logits[index] for index in range(len(data))]

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
        how = Answering(candidates=candidates, normalise=normalise, count_stop=count_stop)
        return self._answers(as_questions(data), _per_row(prompts, len(data)), how, candidates_of)

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
        prompts, how = _per_row(prompt, len(questions)), Answering(normalise=normalise, calibrate=calibrate)
        for own in dict.fromkeys(prompts):
            if not how.check(own).is_closed:
                raise PromptError("the prompt has no label words; give candidates instead")
        return self._answers(questions, prompts, how, candidates_of)

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
        questions = as_questions(records)
        if not questions:
            return []
        how = Answering(
            candidates=candidates,
            top_k=top_k,
            generation=GenerationSettings.of(generation),
            normalise=normalise,
            calibrate=calibrate,
            count_stop=count_stop,
            min_probability=min_probability,
        )
        prompts = _per_row(prompt, len(questions))
        closed = [how.check(own).is_closed for own in dict.fromkeys(prompts)]
        changed = how.generation.changed
        if changed and (candidates is not None or all(closed)):
            raise ConfigError(f"{changed[0]} is for answers that are written, not for candidates or labels")
        return self._answers(questions, prompts, how, lambda work: prediction_of(work, how))

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
        question = as_questions([record])
        (works,) = model.preprocessor.works(prompt, question, Answering(generation=settings))
        return _pieces(model.backbone, works[0])

    def _completed(self, waiting: dict[int, Work], result: Callable[[Work], T]) -> dict[int, T]:
        """Run work, and return its results; none of it waits any longer."""
        Runner(self.backbone).complete(list(waiting.values()))
        results = {index: result(work) for index, work in waiting.items()}
        waiting.clear()
        return results


def _model(backbone: Backbone, force: bool) -> PromptModel:
    return PromptModel(backbone, force=force)


@torch.no_grad()
def _pieces(backbone: Backbone, work: Work) -> Iterator[str]:
    """Decode an answer, and yield its text piece by piece."""
    assert isinstance(work, Generation)
    runner = Runner(backbone)
    runner.begin([work])
    while runner.running:
        runner.step()
        if piece := work.sequence.piece():
            yield piece


def _per_row(prompts: OnePrompt | Sequence[OnePrompt], rows: int) -> list[Prompt]:
    """Return one prompt per row; a folder that is named several times is read once."""
    if isinstance(prompts, OnePrompt):
        return [as_prompt(prompts)] * rows
    if len(prompts) != rows:
        raise PromptError(f"{len(prompts)} prompts for {rows} records; give one prompt for all, or one per record")
    read = {str(prompt): as_prompt(prompt) for prompt in prompts if not isinstance(prompt, Prompt)}
    return [prompt if isinstance(prompt, Prompt) else read[str(prompt)] for prompt in prompts]
