"""One optimizer step of one prompt or of several. Read :func:`take_steps` first."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.layers import layers_of, recomputing
from ptuning.backbone.randomness import own_draws, seed_draws
from ptuning.backbone.trained_weights import TrainedWeights, trained_parameters
from ptuning.backbone.weights import is_offloaded
from ptuning.config import TrainConfig, derived_seed
from ptuning.engine.batch import shared_tokens
from ptuning.engine.forward import shares_prefix, target_logits
from ptuning.engine.memory import OutOfMemory, half
from ptuning.engine.objective import ScoringRequest, inputs_of, loss, loss_count, score_continuations, score_parts
from ptuning.engine.prefix_cache import PrefixCache
from ptuning.engine.processes import DataRanks
from ptuning.engine.soft_prompt import DeepParams, PromptBatch
from ptuning.errors import BackboneError, TrainingError
from ptuning.template.encode import Example, TokenizedTemplate
from ptuning.training.encoders import (
    StackedEncoders,
    adamw_step,
    make_encoders,
    stacked_where_it_helps,
    works_together,
)
from ptuning.training.optimizer import make_optimizer, overflows, to_train

# Tokens of one pass with gradients over the rows of several prompts. More tokens are no faster on a processor and take
# more memory; a GPU is not busy with so few. Source: docs/decisions.md, decision 28.
JOINT_TOKENS = {"cpu": 1024}
JOINT_TOKENS_ELSEWHERE = 16_384
# Rows of different prompts share a pass while padding adds at most 25 % to the tokens of each prompt's rows.
JOINT_PADDING = 1.25
# Rows of a prompt run alone if what they begin with saves so many tokens: a GPU runs fewer in the time of the launches.
# Source: docs/scale.md, "On a GPU".
ALONE_TOKENS = {"cpu": 0}
ALONE_TOKENS_ELSEWHERE = 4096
# The most tokens of a pass over several records, pads included: a batch of long rows runs in several passes with the
# same loss, whatever its size. 4,096 tokens take 5 GB with the default backbone in float32, and fill a processor.
PASS_TOKENS = {"cpu": 4096}
PASS_TOKENS_ELSEWHERE = 16_384


class Learner:
    """What learns: a prompt encoder, one of deep slots if there are any, weights of the backbone if they are trained
    too, and the optimizer of them.

    Args:
        frozen: A frozen backbone; it does not change. :attr:`backbone` is this one, or the copy that is trained.
        prefix_cache: KV cache that several prompts share; by default its own.

    Attributes:
        weights: Weights of the backbone that are trained, by name; none of a frozen one.
        ranks: The processes over which the rows of each step are spread.
        recomputes: Whether activations are computed again in the backward pass.
        uses_prefix_cache: Whether rows run from their first slot onwards.
        stacked: In a step together with others, what computes the slot vectors of all, and this prompt's.
        pass_tokens: The most tokens of a pass of several records, pads included; fewer after one did not fit.

    Raises:
        TrainingError: If the backbone is not frozen, or the variables that a launcher left do not fit.
    """

    def __init__(
        self,
        frozen: Backbone,
        bound: TokenizedTemplate,
        *,
        config: TrainConfig,
        prefix_cache: PrefixCache | None = None,
    ) -> None:
        if frozen.model.training or any(weight.requires_grad for weight in frozen.model.parameters()):
            raise TrainingError(f"the backbone '{frozen.name}' is not frozen; call its freeze() first")
        self.frozen, self.bound, self.config = frozen, bound, config
        self.backbone = to_train(frozen, config)
        self.weights = trained_parameters(self.backbone, config.train_backbone)
        self.ranks = DataRanks.of(frozen)
        self._encoded: dict[int, tuple[PromptBatch, PromptBatch]] = {}
        self.stacked: tuple[StackedEncoders, Tensor] | None = None
        self._fresh = functools.partial(make_encoders, frozen, bound, config, self.generator)
        self.encoder, self.deep_encoder = self._fresh()
        encoders = [encoder for encoder in (self.encoder, self.deep_encoder) if encoder is not None]
        self.optimizer = make_optimizer(encoders, self.weights, config)
        self.peaks = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.prefix_cache = prefix_cache or PrefixCache(
            self.backbone, memory_share=config.prefix_cache_share, disk_bytes=config.prefix_cache_bytes
        )
        self.uses_prefix_cache = False
        # A pass with gradients would hold all offloaded weights until its backward pass.
        self.recomputes = config.checkpointing or (is_offloaded(frozen.model) and bool(layers_of(frozen.model)))
        self.pass_tokens = PASS_TOKENS.get(frozen.device.type, PASS_TOKENS_ELSEWHERE)

    def generator(self, purpose: str, step: int = 0) -> torch.Generator:
        """Return the random generator of one purpose, independent of all others and of what was drawn before."""
        return torch.Generator().manual_seed(derived_seed(self.config.seed, purpose, step))

    def start_anew(self) -> None:
        """Give the prompt encoders their first weights back, and the optimizer nothing to remember."""
        for own, first in zip((self.encoder, self.deep_encoder), self._fresh(), strict=True):
            if own is not None and first is not None:
                own.load_state_dict(first.state_dict())
        self.optimizer.state.clear()

    @property
    def trainable_parameters(self) -> int:
        """Number of weights of the prompt encoder, and of those of the backbone that are trained."""
        return sum(weight.numel() for weight in self.parameters())

    @property
    def cache(self) -> PrefixCache | None:
        """The KV cache, if rows run with it."""
        return self.prefix_cache if self.uses_prefix_cache else None

    def parameters(self) -> list[nn.Parameter]:
        """Return the weights that the optimizer moves."""
        deep = self.deep_encoder.parameters() if self.deep_encoder is not None else ()
        return [*self.encoder.parameters(), *deep, *self.weights.values()]

    def trained_weights(self) -> TrainedWeights | None:
        """Return what training has made of the backbone's weights; None if the backbone stayed frozen."""
        if self.config.train_backbone == "none":
            return None
        trained = TrainedWeights.of(
            self.backbone, self.frozen, train_backbone=self.config.train_backbone, keep=self.config.save_weights
        )
        self.backbone.trained = trained.mark
        return trained

    def vectors(self) -> Tensor:
        """Return the slot vectors as they would be saved: (P, E) float32 on the CPU, dropout off."""
        self.encoder.eval()
        with torch.no_grad():
            vectors: Tensor = self.encoder()  # (P, E)
        return vectors.detach().float().cpu().clone()

    def deep(self) -> DeepParams | None:
        """Return the deep slots as they would be saved, on the CPU; None without any."""
        if self.deep_encoder is None:
            return None
        with torch.no_grad():
            deep: DeepParams = self.deep_encoder()
        return deep.map(lambda tensor: tensor.detach().float().cpu().clone())

    def learned(self) -> PromptBatch:
        """Return the prompt as it would be saved."""
        return PromptBatch.of(self.vectors(), self.deep())

    def begin(self, rate: float) -> None:
        """Set the learning rates to this share of their peaks, and drop the gradients of the last step."""
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * rate
        self.encoder.train()
        self._encoded.clear()
        self.stacked = None
        self.optimizer.zero_grad(set_to_none=True)

    def encoded(self, at: int) -> PromptBatch:
        """Return the prompt for the passes of the batch at ``at`` in its step, with gradients. With several processes,
        these stay in a copy until :meth:`finish` has added them up.
        """
        # Encoders give the same to all batches of a step, unless dropout is drawn.
        key = at if self.config.dropout else 0
        if key in self._encoded:
            return self._encoded[key][1]
        vectors = self.encoder() if self.stacked is None else self.stacked[1]
        prompt = PromptBatch.of(vectors, self.deep_encoder() if self.deep_encoder is not None else None)
        if self.ranks.size == 1:
            return prompt
        self._encoded[key] = prompt, prompt.apart()
        return self._encoded[key][1]

    def finish(self, step: Step, losses: Sequence[Tensor]) -> float:
        """Add up the losses of a step's passes and the gradients over all processes, move the weights, return the loss.

        Raises:
            TrainingError: If the loss is NaN or infinite, or the step overflows.
        """
        summed = torch.stack(list(losses)).sum() if losses else torch.zeros((), device=self.backbone.device)
        if self.ranks.size > 1:
            summed = self._add_up(step, summed)
        loss_sum = float(summed)
        step.check(loss_sum)
        torch.nn.utils.clip_grad_norm_(self.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        return loss_sum

    def _add_up(self, step: Step, summed: Tensor) -> Tensor:
        """Add up a step's loss and gradients over all processes, and return the loss. The gradients of what encoders
        gave are a few kilobytes, whatever the size of the encoders: they go in one all-reduce, and then every process
        runs the same backward pass through its encoders. Weights of the backbone are added up one by one.
        """
        for at in range(0, len(step.items), self.config.batch_size):
            if (at if self.config.dropout else 0) not in self._encoded:  # this process had no rows of the batch
                with own_draws(self.backbone.device):
                    Chunk(step, (), at).learned()
        pairs = [self._encoded[key] for key in sorted(self._encoded)]
        outputs, leaves = ([tensor for pair in pairs for tensor in pair[side].tensors] for side in (0, 1))
        own = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
        summed, *gradients = self.ranks.sum([summed, *own])
        torch.autograd.backward(outputs, gradients)
        for weight in self.weights.values():
            (weight.grad,) = self.ranks.sum([torch.zeros_like(weight) if weight.grad is None else weight.grad])
        return summed

    def check_loss(self, value: float, what: str) -> None:
        """Raise a TrainingError if a loss is NaN or infinite; ``what`` says what happened then."""
        if not math.isfinite(value):
            raise TrainingError(
                f"{what}; use a lower learning rate than {' and '.join(map(str, self.peaks))} (lr), or float32 (dtype)"
            )


@dataclass(frozen=True, eq=False)
class Step:
    """An optimizer step of one learner. ``number``, from 0, seeds its dropout; ``rate`` is a share of the peaks."""

    learner: Learner
    items: Sequence[ScoringRequest]
    number: int
    epoch: int
    rate: float

    def check(self, loss_sum: float) -> None:
        """Raise a TrainingError if the loss is NaN or infinite, or weights would move further than float32 reaches."""
        self.learner.check_loss(loss_sum, f"the loss became {loss_sum} in epoch {self.epoch}")
        if overflows(self.learner.optimizer):
            raise TrainingError(f"step {self.number + 1} overflows float32; lower the learning rate")

    def chunks(self) -> list[Chunk]:
        """Return the passes of this step (gradient accumulation), with the rows of this process."""
        size, own = self.learner.config.batch_size, self.learner.ranks.own
        parts = {at: own(self.items[at : at + size]) for at in range(0, len(self.items), size)}
        return [part for at, items in parts.items() if items for part in Chunk(self, items, at).cut()]


@dataclass(frozen=True, eq=False)
class Chunk:
    """Records that one prompt runs in one pass, or ``behind`` others of a batch that was cut into several passes.
    ``at``, the index of the batch's first record in its step, seeds its dropout.
    """

    step: Step
    items: Sequence[ScoringRequest]
    at: int
    behind: int = 0

    def cut(self) -> Iterator[Chunk]:
        """Yield it whole, or in halves that have at most :attr:`Learner.pass_tokens` tokens or are a single record."""
        if len(self.items) == 1 or self.tokens <= self.learner.pass_tokens:
            yield self
            return
        middle = len(self.items) // 2
        for start, items in ((0, self.items[:middle]), (middle, self.items[middle:])):
            yield from Chunk(self.step, items, self.at, self.behind + start).cut()

    @property
    def learner(self) -> Learner:
        """Whose rows they are."""
        return self.step.learner

    @functools.cached_property
    def examples(self) -> list[Example]:
        """The rows, each without the columns of the block in front that it does not read in this step."""
        rows, learner = inputs_of(self.items), self.learner
        if not (learner.config.column_dropout and any(row.prefix_length for row in rows)):
            return rows
        first = max(1, learner.bound.layout.prefix.bos)
        examples: list[Example] = []
        for place, row in enumerate(rows, start=self.step.number * 65_536 + self.at + self.behind):
            generator = learner.generator("column dropout", place)  # each row draws its own
            dropped = torch.rand(row.prefix_length, generator=generator)[first:] < learner.config.column_dropout
            columns = (first + dropped.nonzero()[:, 0]).tolist()
            examples.append(replace(row, unread=tuple(sorted({*row.unread, *columns}))))
        return examples

    @property
    def width(self) -> int:
        """Tokens of the longest row, without those that come from the KV cache."""
        cached = self.learner.uses_prefix_cache
        ids_of = self.learner.prefix_cache.ids_of
        return max(len(row.token_ids) - (len(ids_of(row)) if cached else 0) for row in self.examples)

    @property
    def tokens(self) -> int:
        """Tokens of its pass, pads included, without those that come from the KV cache."""
        return len(self.examples) * self.width

    @property
    def saved_tokens(self) -> int:
        """Tokens less of its pass where what its rows begin with is computed once."""
        return (len(self.examples) - 1) * shared_tokens(self.examples)

    @property
    def shares_prefix(self) -> bool:
        """Whether its rows share a prefix that is computed once, so that rows of another prompt cannot join them."""
        rows = self.examples
        if self.learner.uses_prefix_cache or self.learner.bound.layout.prefix.length:
            return False
        longest = max(len(row.token_ids) for row in rows)
        return shares_prefix(self.learner.backbone, rows=len(rows), shared=shared_tokens(rows), longest=longest)

    @property
    def draws(self) -> bool:
        """Whether its pass draws random numbers (dropout), or sets a generator back to compute activations again."""
        config = self.learner.config
        return bool(config.dropout) or self.learner.recomputes or self.learner.backbone.model.training

    def learned(self) -> PromptBatch:
        """Return the slot vectors with gradients. Dropout is drawn from this pass's own seed; that of the encoder from
        its batch's, so that a batch that was cut has the same slot vectors in all parts.
        """
        self._seed(self.at)
        prompt = self.learner.encoded(self.at)
        if self.behind:
            self._seed(self.at + self.behind)
        return prompt

    def _seed(self, at: int) -> None:
        if self.draws:
            seed = derived_seed(self.learner.config.seed, "dropout", self.step.number * 65_536 + at)
            seed_draws(seed, self.learner.backbone.device)


@dataclass(frozen=True)
class Taken:
    """An optimizer step that was taken: its summed loss, and what that is divided by for the mean.

    ``tokens`` are those of all rows that this process ran; ``seconds`` is its share of the time of the joint steps.
    """

    loss_sum: float
    loss_count: float
    tokens: int
    seconds: float


def take_steps(steps: Sequence[Step]) -> list[Taken | TrainingError]:
    """Take one optimizer step of every learner; return what each step did, or the error that ended it.

    The loss of each is the sum over all of its tokens divided once by their number, however its records are cut into
    passes, spread over processes, or joined with those of others. Prompts that are trained together have one frozen
    backbone and one KV cache.
    """
    began = time.monotonic()
    losses, failed = run_passes(steps)
    weights = [sum(item.tokens for item in step.items) for step in steps]
    chunks = {step: [chunk for chunk in losses if chunk.step is step] for step in steps}
    ends: dict[Step, float | TrainingError] = {**failed}
    if len(steps) > 1 and works_together(steps[0].learner.backbone.device):
        ends |= _finish_together({step: own for step, own in chunks.items() if step not in failed}, losses)
    outcomes: list[Taken | TrainingError] = []
    for step, weight in zip(steps, weights, strict=True):
        seconds = (time.monotonic() - began) * weight / sum(weights)
        tokens = sum(len(row.token_ids) for chunk in chunks[step] for row in chunk.examples)
        try:
            end = ends[step] if step in ends else step.learner.finish(step, [losses[chunk] for chunk in chunks[step]])
        except TrainingError as error:
            end = error
        taken = end if isinstance(end, TrainingError) else Taken(end, loss_count(step.items), tokens, seconds)
        outcomes.append(taken)
    return outcomes


def _finish_together(
    chunks: Mapping[Step, Sequence[Chunk]], losses: Mapping[Chunk, Tensor]
) -> dict[Step, float | TrainingError]:
    """Finish steps of several prompts, as :meth:`Learner.finish` does, with one call of the optimizer; return the loss
    of each, or its error.
    """
    for stacked in dict.fromkeys(step.learner.stacked[0] for step in chunks if step.learner.stacked is not None):
        stacked.backward()
    values = dict(zip(losses, torch.stack(list(losses.values())).tolist(), strict=True)) if losses else {}
    ends: dict[Step, float | TrainingError] = {}
    for step, own in chunks.items():
        ends[step] = loss_sum = float(sum(values[chunk] for chunk in own))
        try:
            step.check(loss_sum)
        except TrainingError as error:
            ends[step] = error
    moved = [step.learner for step, end in ends.items() if not isinstance(end, TrainingError)]
    adamw_step([learner.optimizer for learner in moved], [learner.config.max_grad_norm for learner in moved])
    return ends


def run_passes(steps: Sequence[Step]) -> tuple[dict[Chunk, Tensor], dict[Step, TrainingError]]:
    """Run the passes of steps forward and backward; return the summed loss of each, and errors of steps that do not fit
    into memory. Where a pass does not fit, all of them are run again in smaller ones: a backward pass that was broken
    off has left a part of its gradients.
    """
    failed: dict[Step, TrainingError] = {}
    while True:
        going = [step for step in steps if step not in failed]
        for step in going:
            step.learner.begin(step.rate)
        if len(going) > 1 and works_together(going[0].learner.backbone.device):
            stacked = stacked_where_it_helps([step.learner.encoder for step in going])
            for step in going:
                step.learner.stacked = stacked.get(step.learner.encoder)
        losses: dict[Chunk, Tensor] = {}
        for together in joined([chunk for step in going for chunk in step.chunks()]):
            try:
                losses |= _run(together)
            except OutOfMemory:
                break
        else:
            return losses, failed
        tokens = sum(len(chunk.examples) for chunk in together) * max(chunk.width for chunk in together)
        cuttable = len(together) > 1 or len(together[0].items) > 1
        try:
            bound = half(tokens, can_be_cut=cuttable, device=together[0].learner.backbone.device)
            for step in going:
                step.learner.pass_tokens = bound
        except BackboneError as error:
            failed |= {chunk.step: TrainingError(str(error)) for chunk in together}


def joined(chunks: Sequence[Chunk]) -> Iterator[list[Chunk]]:
    """Group chunks into passes. Those of one prompt run one by one; those of several prompts share a pass while little
    is padded (:data:`JOINT_PADDING`). A chunk whose rows share a prefix runs alone, so that it is computed once.
    """
    if len({id(chunk.learner) for chunk in chunks}) == 1:
        yield from ([chunk] for chunk in chunks)
        return
    waiting: dict[bool, list[Chunk]] = {True: [], False: []}
    for chunk in chunks:
        if chunk.shares_prefix and chunk.saved_tokens >= ALONE_TOKENS.get(
            chunk.learner.backbone.device.type, ALONE_TOKENS_ELSEWHERE
        ):
            yield [chunk]
        else:
            waiting[chunk.learner.uses_prefix_cache].append(chunk)
    for group in waiting.values():
        together: list[Chunk] = []
        rows = unpadded = 0
        for chunk in sorted(group, key=lambda chunk: chunk.width):
            own, width, device = len(chunk.examples), chunk.width, chunk.learner.backbone.device.type
            limit = min(JOINT_TOKENS.get(device, JOINT_TOKENS_ELSEWHERE), chunk.learner.pass_tokens)
            padded = (rows + own) * width
            if together and (padded > limit or padded > JOINT_PADDING * (unpadded + own * width)):
                yield together
                together, rows, unpadded = [], 0, 0
            together.append(chunk)
            rows, unpadded = rows + own, unpadded + own * width
        if together:
            yield together


def _run(chunks: Sequence[Chunk]) -> dict[Chunk, Tensor]:
    """Run chunks forward and backward in one pass; return the summed loss of each."""
    first = chunks[0].learner
    backbone, rows = first.backbone, [chunk.examples for chunk in chunks]
    with contextlib.ExitStack() as stack:
        if any(chunk.draws for chunk in chunks):
            stack.enter_context(own_draws(backbone.device))
        prompts = [chunk.learned() for chunk in chunks]
        learned = PromptBatch.join(prompts, rows=[number for number, part in enumerate(rows) for _ in part])
        recomputes = any(chunk.learner.recomputes for chunk in chunks)
        with recomputing(backbone.model, name=backbone.name) if recomputes else contextlib.nullcontext():
            logits = target_logits(backbone, [row for part in rows for row in part], learned, cache=first.cache)
        if len(chunks) > 1 and works_together(backbone.device):
            scored = score_parts([chunk.items for chunk in chunks], logits)
        else:
            sizes = [sum(len(example.logit_positions) for example in part) for part in rows]
            parts = zip(chunks, logits.split(sizes), strict=True)
            scored = [score_continuations(chunk.items, own) for chunk, own in parts]
        losses = {chunk: loss(chunk.items, own)[0] for chunk, own in zip(chunks, scored, strict=True)}
        torch.stack([value / loss_count(chunk.step.items) for chunk, value in losses.items()]).sum().backward()
    return {chunk: value.detach() for chunk, value in losses.items()}
