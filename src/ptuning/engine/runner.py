"""Runner: rows of any prompts on one backbone, batched; scores classes and candidates, fills masks and decodes."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, cast

import torch
from torch import Tensor

from ptuning.backbone.backbone import Backbone
from ptuning.config import GenerationSettings, derived_seed
from ptuning.engine import batch as bounds
from ptuning.engine import prefix_store
from ptuning.engine.batch import Side, batches, collate, cut_by_length
from ptuning.engine.candidates import tree_log_probs
from ptuning.engine.decoding import (
    BatchKey,
    BeamDecoder,
    BeamSequence,
    Decoder,
    DecodingState,
    GeneratedText,
    OutputSequence,
    StopCriteria,
    Token,
    generation_contexts,
)
from ptuning.engine.forward import (
    MIN_SAVED_TOKENS,
    ForwardOutput,
    forward_batch,
    forward_packed,
    logits_in_parts,
    shared_prefix_tokens,
)
from ptuning.engine.memory import in_parts
from ptuning.engine.objective import ScoringRequest, class_scores, score_continuations
from ptuning.engine.prefix_store import ModelRow, PrefixStore, PreparedPrompt, rest_of
from ptuning.errors import ConfigError, TemplateError
from ptuning.records import Record
from ptuning.template.encode import Example
from ptuning.template.segments import FILLS_MASKS

# Rows that share a prefix are packed into one sequence from this many on, up to this many tokens; fewer are padded
# together with other rows.
PACKED_ROWS, PACKED_TOKENS = 4, 2048


@dataclass(eq=False)
class Work:
    """A record to answer: the ``rows`` that the model reads for it, how many of their tokens were ``cached``, and the
    ``error`` if it has failed. ``kind``: work of one kind shares passes.
    """

    rows: tuple[ModelRow, ...]
    cached: int = field(default=0, init=False)
    error: Exception | None = field(default=None, init=False)
    is_done: bool = field(default=False, init=False)

    @property
    def kind(self) -> tuple[object, ...]:
        """Work of one kind shares passes."""
        return (type(self),)

    @property
    def tokens(self) -> int:
        """Number of tokens that the model reads."""
        return sum(len(row.example.token_ids) for row in self.rows)


@dataclass(eq=False)
class Scoring(Work):
    """Scores the classes of a request, whose probabilities add up to 1, or its candidates each on its own, filled in
    as ``candidates``. ``names`` are those of the classes or candidates, and ``log_probs`` the result.
    """

    request: ScoringRequest
    names: Sequence[str]
    candidates: tuple[Example, ...] = ()
    log_probs: list[float] = field(default_factory=list, init=False)

    @classmethod
    def of(
        cls, request: ScoringRequest, prompt: PreparedPrompt, names: Sequence[str], candidates: Sequence[Example] = ()
    ) -> Scoring:
        """Return the work for a request, filled with a prompt."""
        return cls(tuple(ModelRow(example, prompt) for example in request.inputs), request, names, tuple(candidates))

    @property
    def kind(self) -> tuple[object, ...]:
        """Classes apart from candidates."""
        return Scoring, bool(self.candidates)


@dataclass(eq=False)
class TextScoring(Work):
    """Scores each token of the one row's ``target_ids`` by those before it, with the likeliest ``alternatives`` in its
    place; a token with nothing before it has no log-probability. ``result`` has the tokens.
    """

    alternatives: int
    result: tuple[Token, ...] = field(default=(), init=False)


@dataclass(eq=False)
class MaskFilling(Work):
    """Fills 1, 2, ... masks with their likeliest tokens; the best mean log-probability wins. ``answers`` are the
    result, the best first.
    """

    record: Record
    max_tokens: int
    top_k: int
    answers: list[GeneratedText] = field(default_factory=list, init=False)


@dataclass(eq=False)
class Generation(Work):
    """Decodes up to ``top_k`` different answers, the first one with the settings alone, others with more beams or more
    samples; ``answers`` are the result. ``alternatives`` as for :class:`OutputSequence`.
    """

    ending: StopCriteria
    settings: GenerationSettings
    key: BatchKey
    width: int
    top_k: int = 1
    alternatives: int | None = None
    sequences: list[OutputSequence] = field(default_factory=list, init=False)
    answers: list[GeneratedText] = field(default_factory=list, init=False)

    @property
    def kind(self) -> tuple[object, ...]:
        """Rows that can be decoded in one batch."""
        return Generation, self.key

    @property
    def lanes(self) -> int:
        """Number of sequences that are decoded at a time, each with its own keys and values."""
        others = 0 if self.top_k <= self.width else self.top_k - int(self.settings.do_sample)
        return self.width + others

    @property
    def sequence(self) -> OutputSequence:
        """The sequence of the first answer."""
        return self.sequences[0]


def generation_work(
    backbone: Backbone,
    prompt: PreparedPrompt,
    records: Sequence[Record],
    *,
    max_tokens: int,
    settings: GenerationSettings,
    top_k: int = 1,
    alternatives: int | None = None,
) -> list[Work]:
    """Return the work of answering records, whose targets are ignored, with up to ``max_tokens`` tokens: filled masks
    for a model that fills them, else decoded texts. A ConfigError for settings of decoding if the model fills masks.
    """
    bound = prompt.bound
    if backbone.kind in FILLS_MASKS:
        unused = [name for name in settings.changed if name != "max_new_tokens"]
        if unused:
            raise ConfigError(f"{' and '.join(unused)}: for models that write; this one fills masks, all at once")
        contexts = bound.contexts(records)
        filled = zip(contexts, records, strict=True)
        return [MaskFilling((ModelRow(example, prompt),), record, max_tokens, top_k) for example, record in filled]
    ending = StopCriteria.of(backbone, bound, max_tokens, stop_strings=settings.stop_strings)
    return [
        decoding_work(backbone, ModelRow(example, prompt), ending, settings, top_k=top_k, alternatives=alternatives)
        for example in generation_contexts(bound, records, max_tokens)
    ]


def decoding_work(
    backbone: Backbone,
    row: ModelRow,
    ending: StopCriteria,
    settings: GenerationSettings,
    *,
    top_k: int = 1,
    alternatives: int | None = None,
) -> Generation:
    """Return the work of decoding the answer to a row."""
    key = BatchKey.of(backbone, row.example, ending.max_tokens)
    width = min(settings.num_beams, backbone.vocabulary)
    return Generation((row,), ending, settings, key, width, top_k, alternatives)


class Runner:
    """Runs work on one backbone, with a ``store`` of prefixes that come again: :meth:`complete` in one go, or
    :meth:`begin` and :meth:`step`, so that other work can join while answers are decoded.

    Batches hold rows of any prompts, and of any work of one kind.
    """

    def __init__(self, backbone: Backbone, store: PrefixStore | None = None) -> None:
        self.backbone = backbone
        self.store = PrefixStore(backbone, memory_share=0) if store is None else store
        self.passes = self.tokens_written = 0
        self._read = self._cached = 0  # tokens after cached prefixes, and of these
        self._decoders: list[tuple[Hashable, Decoder | BeamDecoder]] = []
        self.running: dict[OutputSequence, Generation] = {}

    @property
    def tokens_read(self) -> int:
        """Number of tokens that the model has read."""
        return self._read + self.store.tokens_read

    @property
    def cached_tokens(self) -> int:
        """Number of tokens that were not computed again, since they were stored or shared with other rows."""
        return self._cached - self.store.tokens_read

    @torch.no_grad()
    def complete(self, works: Sequence[Work]) -> None:
        """Run work until all of it has its result."""
        for group in by_kind(works):
            if not isinstance(group[0], Generation):
                self.begin(group)
                continue
            generations = cast("Sequence[Generation]", group)
            for chosen in batches([[work.rows[0].example] * work.lanes for work in generations]):
                part = [generations[index] for index in chosen]
                lengths = [work.lanes * work.tokens for work in part]
                in_parts(functools.partial(self._decode, part), lengths, backbone=self.backbone)

    def _decode(self, works: Sequence[Generation], places: Sequence[int]) -> None:
        self.fail_all()
        self.begin([works[place] for place in places])
        while self.running:
            self.step()

    def begin(self, works: Sequence[Work]) -> None:
        """Run work of one kind: to its end, or up to the first token of what is decoded. If it raises, no answer is
        begun.
        """
        if isinstance(works[0], Generation):
            self._prefill(cast("Sequence[Generation]", works))
            return
        if isinstance(works[0], Scoring):
            self._score(cast("Sequence[Scoring]", works))
        elif isinstance(works[0], MaskFilling):
            self._fill_masks(cast("Sequence[MaskFilling]", works))
        else:
            for text in cast("Sequence[TextScoring]", works):
                self._score_text(text)
        for work in works:
            work.is_done = True
        self._count(works)

    def _count(self, works: Sequence[Work]) -> None:
        cached = sum(work.cached for work in works)
        self._cached += cached
        self._read += sum(work.tokens for work in works) - cached

    def _score(self, works: Sequence[Scoring]) -> None:
        """Score classes or candidates, in parts whose logits over the vocabulary fit into a pass."""
        if works[0].candidates and self.backbone.branches:
            totals = tree_log_probs(self.backbone, [(work.candidates, work.rows[0].prompt) for work in works])
            for work, values in zip(works, totals, strict=True):
                work.log_probs = values
            return
        for work in works:
            work.cached, work.log_probs = 0, [0.0] * len(work.names)
        units = [unit for work in works for unit in _units(work)]
        for part in _score_parts(sorted(units, key=lambda unit: max(len(row.example.token_ids) for row in unit.rows))):
            logits, cached = self.logits([row for unit in part for row in unit.rows])
            requests, left = [unit.request for unit in part], iter(cached)
            scores = score_continuations(requests, logits)
            if works[0].candidates:
                table = [values.tolist() for values in scores.all_log_probs.split(scores.per_item)]
            else:
                table = torch.log_softmax(class_scores(requests, scores), dim=-1).tolist()  # (I, K)
            for unit, values in zip(part, table, strict=True):
                unit.work.cached += sum(itertools.islice(left, len(unit.rows)))
                # A row may have fewer classes than others of the batch.
                for place, value in zip(unit.places, values, strict=False):
                    unit.work.log_probs[place] = value

    def _score_text(self, work: TextScoring) -> None:
        (row,), decode = work.rows, self.backbone.tokenizer.decode
        ids = row.example.target_ids
        unscored = len(ids) - len(row.example.logit_positions)
        logits, (work.cached,) = self.logits([row])
        log_probs = torch.log_softmax(logits, dim=-1)  # (N, V)
        scored = torch.tensor(ids[unscored:], device=log_probs.device)
        own = log_probs.gather(1, scored[:, None])[:, 0].tolist()
        best = log_probs.topk(min(work.alternatives, log_probs.shape[-1]), dim=-1)
        tokens = [Token(token, decode([token]), None) for token in ids[:unscored]]
        table = zip(ids[unscored:], own, best.indices.tolist(), best.values.tolist(), strict=True)
        for token, value, others, values in table:
            alternatives = tuple((decode([other]), each) for other, each in zip(others, values, strict=True))
            tokens.append(Token(token, decode([token]), value, alternatives))
        work.result = tuple(tokens)

    def _fill_masks(self, works: Sequence[MaskFilling]) -> None:
        answers: dict[MaskFilling, list[tuple[float, GeneratedText]]] = {work: [] for work in works}
        rows = {work: work.rows[0] for work in works}
        for count in itertools.count(1):
            if count > 1:
                rows = _with_masks(list(rows), count)
            if not rows:
                break
            fitting = list(rows)
            for chosen in batches([[rows[work].example] for work in fitting]):
                part = [fitting[index] for index in chosen]
                logits, _ = self.logits([rows[work] for work in part])  # (B * count, V)
                log_probs = torch.log_softmax(logits, dim=-1).view(len(part), count, -1)
                best = log_probs.topk(min(max(work.top_k for work in part), log_probs.shape[-1]), dim=-1)
                for row, work in enumerate(part):
                    values, tokens = best.values[row], best.indices[row]  # (count, K) each
                    for answer in range(min(work.top_k, values.shape[-1])) if count == 1 else (0,):
                        text = self.backbone.tokenizer.decode(tokens[:, answer].tolist()).strip()
                        total = float(values[:, answer].sum())
                        answers[work].append((total / count, GeneratedText(text, total, count)))
        for work, ranked in answers.items():
            work.answers = [answer for _, answer in sorted(ranked, key=lambda entry: -entry[0])[: work.top_k]]

    def _prefill(self, works: Sequence[Generation]) -> None:
        """Compute the rows of answers of one kind, to be decoded together with those that are running."""
        groups: dict[Hashable, list[tuple[Generation, OutputSequence]]] = {}
        for work in works:
            work.sequences = list(self._sequences(work))
            for sequence in work.sequences:
                how = sequence.settings if isinstance(sequence, BeamSequence) else None
                groups.setdefault(how, []).append((work, sequence))
        key, begun = works[0].key, list[tuple[Decoder | BeamDecoder, list[tuple[Generation, OutputSequence]]]]()
        for group in groups.values():
            rows = [work.rows[0] for work, _ in group]
            # A row whose length may cross a change of positions is computed whole for each token.
            for plan in self.plan(rows, whole=key.turns):
                chosen = [rows[at] for at in plan.places]
                output = self._forward(chosen, plan, pad_side="left", keep=not key.turns)
                state = DecodingState(self.backbone, [row.example for row in chosen], output)
                opened = [group[at] for at in plan.places]
                beams = [sequence for _, sequence in opened if isinstance(sequence, BeamSequence)]
                sequences = [sequence for _, sequence in opened]
                begun.append((BeamDecoder(state, beams) if beams else Decoder(self.backbone, state, sequences), opened))
                for (work, _), cached in zip(opened, plan.cached, strict=True):
                    work.cached = cached
        for decoder, opened in begun:
            self.running |= {sequence: work for work, sequence in opened}
            for other_key, other in self._decoders:
                if other_key == key and isinstance(other, Decoder) and other.can_join(decoder):
                    other.join(decoder)  # type: ignore[arg-type]  # beams cannot join
                    break
            else:
                self._decoders.append((key, decoder))
        self._count(works)

    def _sequences(self, work: Generation) -> Iterator[OutputSequence]:
        """Return the first answer's sequence, and those of others if there are to be more answers than beams."""
        settings = [work.settings]
        if work.top_k > work.settings.num_beams:
            seeds = [derived_seed(work.settings.seed, "alternative", number) for number in range(1, work.top_k)]
            settings += [work.settings.adapted(seed=seed) for seed in seeds if work.settings.do_sample] or [
                work.settings.adapted(num_beams=work.top_k)
            ]
        for own in settings:
            width = min(own.num_beams, self.backbone.vocabulary)
            if width > 1:
                yield BeamSequence(work.ending, own, width=width)
            else:
                yield OutputSequence(work.ending, own, alternatives=work.alternatives)

    def step(self, *, isolated: bool = False) -> list[Generation]:
        """Decode a token of each running answer; return those that have grown, have ended or, if they are ``isolated``
        instead of raising their error, have failed.
        """
        grown: dict[Generation, None] = {}
        for entry in list(self._decoders):
            decoder = entry[1]
            works = dict.fromkeys(self.running[sequence] for sequence in decoder.sequences)
            if not works:  # all have failed
                continue
            grown |= works
            try:
                self.tokens_written += len(decoder.step())
            except Exception as error:
                if not isolated:
                    raise
                self.drop(works)
                for work in works:
                    work.error = error
                continue
            if not decoder.sequences:
                self._decoders.remove(entry)
        for work in grown:
            if work.error is None and all(sequence.ended for sequence in work.sequences):
                try:
                    self._finish(work)
                except Exception as error:
                    if not isolated:
                        raise
                    work.error = error
        return list(grown)

    def _finish(self, work: Generation) -> None:
        for sequence in work.sequences:
            del self.running[sequence]
        first, *others = ([work.ending.generated(each) for each in one.finished()] for one in work.sequences)
        answers: dict[str, GeneratedText] = {}
        for answer in [*(first[:1] if others else first), *itertools.chain(*others)]:
            answers.setdefault(answer.text, answer)  # the same text can end in different ways
        work.answers, work.is_done = list(answers.values())[: work.top_k], True

    def drop(self, works: Collection[Work]) -> None:
        """Stop to decode answers."""
        sequences = {sequence for sequence, work in self.running.items() if work in works}
        for sequence in sequences:
            del self.running[sequence]
        for entry in list(self._decoders):
            entry[1].drop(sequences)
            if not entry[1].sequences:
                self._decoders.remove(entry)

    def fail_all(self) -> list[Generation]:
        """Drop all running answers, and return them."""
        works = list(dict.fromkeys(self.running.values()))
        self._decoders.clear()
        self.running.clear()
        return works

    def logits(self, rows: Sequence[ModelRow]) -> tuple[Tensor, list[int]]:
        """Return the logits at the scored positions of rows, (N, V) float32, row by row; and how many tokens of each
        were cached.
        """
        cached = [0] * len(rows)

        def run(part: Sequence[int]) -> Tensor:
            own = [rows[at] for at in part]
            parts: dict[int, Tensor] = {}
            for plan in self.plan(own, scored=True):
                chosen = [own[at] for at in plan.places]
                for place, size in zip(plan.places, plan.cached, strict=True):
                    cached[part[place]] = size
                logits = self._forward_packed(chosen, plan) if plan.packed else self._forward(chosen, plan).logits
                counts = [len(row.example.logit_positions) for row in chosen]
                parts |= dict(zip(plan.places, logits.split(counts), strict=True))
            return torch.cat([parts[at] for at in range(len(own))])

        return logits_in_parts(self.backbone, [row.example for row in rows], run), cached

    def plan(self, rows: Sequence[ModelRow], *, scored: bool = False, whole: bool = False) -> list[BatchPlan]:
        """Return which rows run in one pass each: those with different cached prefixes, and those with short ones or
        none. Rows to be ``scored`` with one long prefix are packed, if they are many; ``whole`` ones run from their
        first token on.
        """
        cached = [0] * len(rows) if whole else self.store.lengths(rows)
        keys = [
            row.key(size) if size >= prefix_store.MIN_TOKENS else b"" for row, size in zip(rows, cached, strict=True)
        ]
        groups: dict[bytes, list[int]] = {}
        for at, key in enumerate(keys):
            is_packed = scored and self.backbone.branches and key and keys.count(key) >= PACKED_ROWS
            groups.setdefault(key if is_packed else b"kept" if key else b"", []).append(at)
        plans = []
        for key, places in groups.items():
            packed = key not in (b"", b"kept")
            own, sizes = [rows[at] for at in places], [cached[at] for at in places]
            parts = self._packed(own, sizes) if packed else self._padded(own, sizes, scored=scored)
            for part in parts:
                chosen = [places[at] for at in part]
                plans.append(BatchPlan(chosen, [cached[at] for at in chosen], packed))
        return plans

    @staticmethod
    def _packed(rows: Sequence[ModelRow], cached: Sequence[int]) -> list[list[int]]:
        parts: list[list[int]] = [[]]
        tokens = 0
        for at, (row, size) in enumerate(zip(rows, cached, strict=True)):
            length = len(row.example.token_ids) - size
            if parts[-1] and tokens + length > PACKED_TOKENS:
                parts.append([])
                tokens = 0
            parts[-1].append(at)
            tokens += length
        return parts

    def _padded(self, rows: Sequence[ModelRow], cached: Sequence[int], *, scored: bool) -> list[list[int]]:
        """Return the rows of each pass whose rows are padded to one length, by their places. A CPU, which takes as long
        for pads as for tokens, gets more passes where that saves more pads than a pass costs.
        """
        groups = [list(range(len(rows)))]
        if scored and self.backbone.device.type == "cpu":
            left = [len(row.example.token_ids) - size for row, size in zip(rows, cached, strict=True)]
            groups = cut_by_length(left, pass_tokens=MIN_SAVED_TOKENS)
        parts = []
        for group in groups:
            prefix = min(cached[at] for at in group)
            if scored and not any(cached) and len({rows[at].prompt for at in group}) == 1:
                prefix = shared_prefix_tokens(self.backbone, [rows[at].example for at in group])
            parts += [
                [group[at] for at in part] for part in batches([[rows[at].example] for at in group], prefix=prefix)
            ]
        return parts

    def _forward(
        self, rows: Sequence[ModelRow], plan: BatchPlan, *, pad_side: Side = "right", keep: bool = False
    ) -> ForwardOutput:
        """Run rows of one side in one pass, each after its cached prefix."""
        examples, learned = rest_of(rows, plan.cached)
        prefixes = self.store.prefixes(rows, plan.cached)
        self.passes += 1
        wants = self.store.wants(rows)
        batch = collate(examples, learned, pad_side=pad_side)
        output = forward_batch(self.backbone, batch, learned, prefixes=prefixes, keep=keep or wants)
        if wants:
            self.store.store(rows, output)
        return output if keep else replace(output, memory=None)

    def _forward_packed(self, rows: Sequence[ModelRow], plan: BatchPlan) -> Tensor:
        examples, learned = rest_of(rows, plan.cached)
        (prefix,) = self.store.prefixes(rows[:1], plan.cached[:1])
        assert prefix is not None
        self.passes += 1
        return forward_packed(self.backbone, examples, learned, prefix)


@dataclass(frozen=True)
class BatchPlan:
    """Rows of one pass, by their places, and how many tokens of each are ``cached``; ``packed`` if all have one cached
    prefix, and run in one sequence.
    """

    places: list[int]
    cached: list[int]
    packed: bool = False


def by_kind(works: Sequence[Work]) -> list[list[Work]]:
    """Group work that shares passes."""
    kinds: dict[tuple[object, ...], list[Work]] = {}
    for work in works:
        kinds.setdefault(work.kind, []).append(work)
    return list(kinds.values())


class _Unit(NamedTuple):
    """Rows of a request that are scored together: those of all classes, or of one input of candidates; ``places`` are
    those of the scores in the result.
    """

    work: Scoring
    request: ScoringRequest
    rows: Sequence[ModelRow]
    places: Sequence[int]


def _units(work: Scoring) -> Iterator[_Unit]:
    if not work.candidates:
        yield _Unit(work, work.request, work.rows, range(len(work.names)))
        return
    places: list[list[int]] = [[] for _ in work.rows]
    for place, choice in enumerate(work.request.choices):
        places[choice.input].append(place)
    for row, own in zip(work.rows, places, strict=True):
        choices = tuple(replace(work.request.choices[place], input=0) for place in own)
        yield _Unit(work, ScoringRequest((row.example,), choices), (row,), own)


def _score_parts(units: Sequence[_Unit]) -> Iterator[list[_Unit]]:
    """Cut rows into parts whose scored positions, with their logits over the vocabulary, fit into a pass."""
    part: list[_Unit] = []
    positions = 0
    for unit in units:
        own = sum(len(row.example.logit_positions) for row in unit.rows)
        if part and positions + own > bounds.MAX_BATCH_POSITIONS:
            yield part
            part, positions = [], 0
        part.append(unit)
        positions += own
    yield part


def _with_masks(works: Sequence[MaskFilling], count: int) -> dict[MaskFilling, ModelRow]:
    """Return rows with some masks, of the records that have room for so many."""
    rows: dict[MaskFilling, ModelRow] = {}
    groups: dict[PreparedPrompt, list[MaskFilling]] = {}
    for work in works:
        if count <= work.max_tokens:
            groups.setdefault(work.rows[0].prompt, []).append(work)
    for prompt, group in groups.items():
        try:
            examples = prompt.bound.contexts([work.record for work in group], target_tokens=count)
        except TemplateError:
            if len(group) > 1:
                for work in group:
                    rows |= _with_masks([work], count)
            continue
        rows |= {work: ModelRow(example, prompt) for work, example in zip(group, examples, strict=True)}
    return rows


@torch.no_grad()
def generate(
    backbone: Backbone,
    prompt: PreparedPrompt,
    records: Sequence[Record],
    *,
    max_tokens: int,
    settings: GenerationSettings | None = None,
    top_k: int = 1,
) -> list[list[GeneratedText]]:
    """Return up to ``top_k`` answers to each record, the best first."""
    works = generation_work(
        backbone, prompt, records, max_tokens=max_tokens, settings=settings or GenerationSettings(), top_k=top_k
    )
    Runner(backbone).complete(works)
    return [work.answers for work in works if isinstance(work, Generation | MaskFilling)]
