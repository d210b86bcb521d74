"""Decoding of a batch token by token: stop criteria, the decoding state (KV cache), sampling and beam search."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.forward import logits_processor
from ptuning.config import GenerationSettings
from ptuning.engine.forward import ForwardOutput
from ptuning.errors import BackboneError, TemplateError, in_a_line
from ptuning.records import Record
from ptuning.template.encode import Example, TokenizedTemplate

logger = logging.getLogger(__name__)

# A tokenizer's decoder shows this for the bytes of an unfinished character.
UNFINISHED = "\ufffd"
# Why an answer ended: at a stop token or stop string, at the end of its line, or at its maximum length.
StopReason = Literal["end", "line", "length"]
# A stop string of N characters is searched in the last tokens only: at most 4 bytes per character, and some more.
MORE_TOKENS = 8
# Pads that all rows begin with are dropped this many at a time, since that copies all keys and values.
DROPPED_PADS = 16


@dataclass(frozen=True)
class GeneratedText:
    """A generated answer: text, natural log-probability (with the stop token, if there is one), number of own tokens,
    and why it ended; filled masks end by themselves.
    """

    text: str
    log_prob: float
    tokens: int
    stopped: StopReason = "end"


@dataclass(frozen=True)
class Token:
    """A token with its natural log-probability (None for the first of a text), and the likeliest ones in its place."""

    id: int
    text: str
    log_prob: float | None
    alternatives: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Hypothesis:
    """Generated tokens, and their natural log-probability."""

    ids: tuple[int, ...] = ()
    log_prob: float = 0.0

    def extended(self, token: int, log_prob: float) -> Hypothesis:
        """Return the hypothesis with one more token."""
        return Hypothesis((*self.ids, token), self.log_prob + log_prob)


class StopCriteria:
    """Where the answer to a row ends: at a stop token of the model, at a stop string, at its maximum length and, unless
    it may have several lines (``multiline``), after its first line. A plain continuation (``as_is``) keeps the white
    space at its ends.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        max_tokens: int,
        multiline: bool,
        stop_strings: Sequence[str] = (),
        as_is: bool = False,
        end_ids: frozenset[int] = frozenset(),
    ) -> None:
        self.tokenizer = backbone.tokenizer
        self._multiline = multiline
        self.max_tokens = max_tokens
        self._as_is = as_is
        self._stop_strings = stop_strings
        self._tail = 4 * max(map(len, stop_strings), default=0) + MORE_TOKENS
        # The ends of a text and of an answer; and of a filled gap, for a model that learned to write one.
        self.ids = end_ids | self.tokenizer.end_ids | ({self.tokenizer.gap.end_id} - {None})

    @classmethod
    def of(
        cls, backbone: Backbone, bound: TokenizedTemplate, max_tokens: int, *, stop_strings: Sequence[str] = ()
    ) -> StopCriteria:
        """Return where the answer of a prompt ends."""
        return cls(
            backbone,
            max_tokens=max_tokens,
            multiline=bound.multiline,
            stop_strings=stop_strings,
            end_ids=bound.end_ids,
        )

    def reached(self, ids: Sequence[int]) -> bool:
        """Whether an answer ends with the last of its tokens."""
        return len(ids) >= self.max_tokens or self.stopped(ids) != "length"

    def stopped(self, ids: Sequence[int]) -> StopReason:
        """Return why an answer ended with the last of its tokens."""
        if ids[-1] in self.ids or self._stops(ids):
            return "end"
        return "line" if self._ends_line(ids) else "length"

    def _ends_line(self, ids: Sequence[int]) -> bool:
        # A line break before the answer does not end it.
        return not self._multiline and self.tokenizer.ends_line(ids[-1]) and bool(self.tokenizer.decode(ids).strip())

    def _stops(self, ids: Sequence[int]) -> bool:
        if not self._stop_strings:
            return False
        tail = self.tokenizer.decode(ids[-self._tail :])
        return any(text in tail for text in self._stop_strings)

    def generated(self, hypothesis: Hypothesis) -> GeneratedText:
        """Return tokens as an answer; its log-probability includes the token that ended it, its tokens do not."""
        ids = hypothesis.ids
        return GeneratedText(self.text(ids), hypothesis.log_prob, len(self._without_stop(ids)), self.stopped(ids))

    def text(self, ids: Sequence[int], *, is_whole: bool = True) -> str:
        """Return the text of an answer or, unless it ``is_whole``, the part of it that more tokens will not change."""
        text = self.tokenizer.decode(self._without_stop(ids))
        text = text[: min((at for stop in self._stop_strings if (at := text.find(stop)) >= 0), default=len(text))]
        if not is_whole:
            text = text.rstrip(UNFINISHED)
            begun = (size for stop in self._stop_strings for size in range(1, len(stop)) if text.endswith(stop[:size]))
            text = text[: len(text) - max(begun, default=0)]
        if self._as_is:
            return text
        text = text.strip()
        return text if self._multiline else text.split("\n")[0].strip()

    def _without_stop(self, ids: Sequence[int]) -> Sequence[int]:
        """Return the tokens without one that ended them and that has no text."""
        ends = ids[-1] in self.ids or (self._ends_line(ids) and not self.tokenizer.decode(ids[-1:]).strip())
        return ids[:-1] if ends else ids


@dataclass(eq=False)
class OutputSequence:
    """An answer that is being generated: where it ends, how its tokens are chosen, and its tokens so far.
    With ``alternatives`` it keeps the log-probability of each token, and as many of the likeliest tokens in its place.
    """

    ending: StopCriteria
    settings: GenerationSettings
    alternatives: int | None = None
    hypothesis: Hypothesis = field(default_factory=Hypothesis)
    ended: bool = False
    log_probs: list[float] = field(default_factory=list)
    likeliest: list[list[tuple[int, float]]] = field(default_factory=list)
    _streamed: str = ""

    def extend(self, token: int, log_probs: Tensor, value: float) -> None:
        """Append a token of this log-probability, out of those of all tokens, (V,)."""
        self.hypothesis = self.hypothesis.extended(token, value)
        if self.alternatives is not None:
            self.log_probs.append(value)
            best = log_probs.topk(min(self.alternatives, len(log_probs)))
            self.likeliest.append(list(zip(best.indices.tolist(), best.values.tolist(), strict=True)))

    def tokens(self, first: int = 0) -> tuple[Token, ...]:
        """Return the tokens from one on, with their ``alternatives``, if these were asked for."""
        decode = self.ending.tokenizer.decode
        return tuple(
            Token(token, decode([token]), value, tuple((decode([other]), each) for other, each in likeliest))
            for token, value, likeliest in zip(
                self.hypothesis.ids[first:], self.log_probs[first:], self.likeliest[first:], strict=False
            )
        )

    def finished(self) -> list[Hypothesis]:
        """Return the answers, best first."""
        return [self.hypothesis]

    def piece(self) -> str:
        """Return the new text since the last call, as far as more tokens will not change it; joined, pieces are the
        whole text.
        """
        text = self.ending.text(self.hypothesis.ids, is_whole=self.ended)
        if not text.startswith(self._streamed) or (len(text) <= len(self._streamed) and not self.ended):
            return ""
        new, self._streamed = text[len(self._streamed) :], text
        return new


@dataclass(eq=False)
class BeamSequence(OutputSequence):
    """The beam search for one answer. A score is a log-probability; that of an ended hypothesis is divided by a power
    of its length. Both lists have at most ``width`` entries, best first.
    """

    width: int = 1
    running: list[tuple[float, Hypothesis]] = field(default_factory=lambda: [(0.0, Hypothesis())])
    done: list[tuple[float, Hypothesis]] = field(default_factory=list)

    def hypotheses(self, rows: int) -> list[Hypothesis]:
        """Return the hypotheses of a search's rows; one with fewer than W hypotheses repeats its last one."""
        running = [hypothesis for _, hypothesis in self.running]
        return running + running[-1:] * (rows - len(running))

    def finished(self) -> list[Hypothesis]:
        """Return up to W answers, best first."""
        return [hypothesis for _, hypothesis in self.done]

    def advance(self, best: Sequence[tuple[float, Hypothesis, bool]]) -> list[int]:
        """Go on with the likeliest continuations (score, hypothesis, whether it ends), sorted. Returns the indices of
        those that go on; none if the search is over: nothing can become better than the ended ones.
        """
        power = self.settings.length_penalty
        for score, hypothesis, ends in best[: self.width]:
            if ends:
                self.done.append((score / len(hypothesis.ids) ** power, hypothesis))
        self.done = sorted(self.done, key=lambda entry: -entry[0])[: self.width]
        indices = [at for at, (_, _, ends) in enumerate(best) if not ends][: self.width]
        self.running = [best[at][:2] for at in indices]
        if indices:
            score, hypothesis = self.running[0]
            likeliest = score / len(hypothesis.ids) ** power
            if len(self.done) < self.width or likeliest > self.done[-1][0]:
                return indices
        self.ended = True
        return []


class DecodingState:
    """B rows after a forward pass with pads on the left. ``logits`` are those of the next token, (B, V) float32.

    ``before`` has for each row the tokens that count as generated before the answer: those of a decoder's side. Rows
    without a KV cache are computed whole for each token. Raises a BackboneError if an encoder-decoder model has none.
    """

    def __init__(self, backbone: Backbone, examples: Sequence[Example], first: ForwardOutput) -> None:
        batch = first.batch
        if first.memory is None and batch.encoder_tokens:
            raise BackboneError(
                "this model has no KV cache, so it cannot write answers; give candidates to choose from"
            )
        self._backbone = backbone
        self._memory, self._embeddings, self._positions = first.memory, first.embeddings, batch.positions
        self._mask = first.mask[:, batch.encoder_tokens :]  # (B, T)
        self._offsets = first.offsets if first.memory is None else None  # deep slots are computed with whole rows
        self.logits = first.logits
        self.before = [_decoder_ids(example) for example in examples]

    def __len__(self) -> int:
        return len(self.logits)

    def can_join(self, other: DecodingState) -> bool:
        """Whether rows of both can be continued in one batch: if both have keys and values, and nothing else."""
        return all(state._memory is not None and state._memory.is_plain for state in (self, other))

    def join(self, other: DecodingState) -> None:
        """Append the rows of another state, with pads on the left of the shorter ones."""
        assert self._memory is not None
        assert other._memory is not None
        width = max(self._mask.shape[1], other._mask.shape[1])
        self._memory = self._memory.join(other._memory, width=width)
        masks = [torch.nn.functional.pad(mask, (width - mask.shape[1], 0)) for mask in (self._mask, other._mask)]
        self._mask = torch.cat(masks)
        self.before = [*self.before, *other.before]
        self.logits = torch.cat([self.logits, other.logits])

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only."""
        chosen = torch.tensor(rows, dtype=torch.int64, device=self.logits.device)
        self._select(chosen)
        self.logits = self.logits[chosen]

    def full(self) -> list[bool]:
        """Return for each row whether the model can read no more tokens."""
        full: list[bool] = (self._mask.sum(dim=1) >= self._backbone.tokenizer.max_tokens).tolist()
        return full

    def read(self, tokens: Tensor, *, after: Tensor | None = None) -> None:
        """Append a token, (B,) int64, to each row, or to copies of the rows ``after``, (B,) int64."""
        if after is not None:
            self._select(after)
        at = self._mask.sum(dim=1, keepdim=True)  # (B, 1)
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=1)  # (B, T + 1)
        new = self._backbone.embed(tokens[:, None])  # (B, 1, E)
        if self._memory is None:
            self._embeddings = new = torch.cat([self._embeddings, new], dim=1)  # (B, T + 1, E)
            self._positions = at = torch.cat([self._positions, at], dim=1)  # (B, T + 1)
        every = torch.arange(len(tokens), device=tokens.device)
        self.logits, self._memory = self._backbone.run(
            new,
            mask=self._mask,
            positions=at,
            rows=every,
            cols=torch.full_like(every, new.shape[1] - 1),
            memory=self._memory,
            keep=self._memory is not None,
            offsets=self._offsets,
        )

    def _select(self, rows: Tensor) -> None:
        self.before, self._mask = [self.before[row] for row in rows.tolist()], self._mask[rows]
        if self._memory is None:
            self._embeddings, self._positions = self._embeddings[rows], self._positions[rows]
            self._offsets = self._offsets if self._offsets is None else self._offsets.take(rows)
            return
        self._memory.reorder(rows)
        # Columns that are pads in every row that is left are dropped once they are enough to pay for the copy.
        pads = int(self._mask.any(dim=0).int().argmax())
        if pads >= DROPPED_PADS and self._memory.is_plain:
            self._memory, self._mask = self._memory.drop_first(pads), self._mask[:, pads:]


def _decoder_ids(example: Example) -> list[int]:
    """Return the tokens of a row's decoder side without slots; nothing if the model has only one side."""
    if not example.encoder_tokens:
        return []
    slots = set(example.slot_positions)
    return [token for at, token in enumerate(example.token_ids) if at >= example.encoder_tokens and at not in slots]


class LogitsProcessor:
    """Temperature, top-k, top-p and repetition penalty of some settings."""

    def __init__(self, settings: GenerationSettings) -> None:
        self._process = logits_processor(settings)
        self._looks_back = settings.repetition_penalty != 1.0

    def scores(self, logits: Tensor, before: Sequence[Sequence[int]], hypotheses: Sequence[Hypothesis]) -> Tensor:
        """Return the logits (or log-probabilities), (B, V), to choose the next token of each row from. ``before`` are
        the tokens that count as generated before the hypotheses.
        """
        if not self._looks_back:
            return self._process(logits.new_empty(len(logits), 0, dtype=torch.int64), logits)
        rows = [[*first, *hypothesis.ids] for first, hypothesis in zip(before, hypotheses, strict=True)]
        lengths = sorted(set(map(len, rows)))
        scores = logits if len(lengths) == 1 else logits.clone()
        for length in lengths:
            places = [place for place, row in enumerate(rows) if len(row) == length]
            ids = torch.tensor([rows[place] for place in places], dtype=torch.int64, device=logits.device)
            if len(lengths) == 1:
                return self._process(ids.reshape(len(rows), -1), logits)
            scores[places] = self._process(ids.reshape(len(places), -1), logits[places])
        return scores


class Decoder:
    """Generates an answer for each of B rows, by the likeliest tokens or by sampling.

    A sequence that samples has a generator of its own with its settings' seed, so that it does not depend on others.
    ``sequences`` are those that have not ended, in the order of the rows.
    """

    def __init__(self, backbone: Backbone, state: DecodingState, sequences: Sequence[OutputSequence]) -> None:
        self._width, self._state = backbone.embedding_rows, state
        self.sequences = list(sequences)
        device = state.logits.device
        self._generators = {
            sequence: torch.Generator(device).manual_seed(sequence.settings.seed)
            for sequence in sequences
            if sequence.settings.do_sample
        }
        self._processors: dict[GenerationSettings, LogitsProcessor] = {}

    def step(self) -> Sequence[OutputSequence]:
        """Append a token to each sequence, and return the sequences. Those that have ended leave."""
        extended, state = self.sequences, self._state
        tokens = self._choose()
        log_probs = torch.log_softmax(state.logits, dim=-1)  # (B, V)
        values = log_probs.gather(1, tokens[:, None])[:, 0].tolist()
        table = zip(extended, tokens.tolist(), log_probs, values, state.full(), strict=True)
        for sequence, token, row, value, full in table:
            sequence.extend(token, row, value)
            sequence.ended = full or sequence.ending.reached(sequence.hypothesis.ids)
        rows = [row for row, sequence in enumerate(extended) if not sequence.ended]
        after = None if len(rows) == len(extended) else torch.tensor(rows, device=tokens.device)
        self.sequences = [extended[row] for row in rows]
        if rows:
            state.read(tokens if after is None else tokens[after], after=after)
        return extended

    def can_join(self, other: Decoder | BeamDecoder) -> bool:
        """Whether the sequences of another decoder can be generated with these."""
        return isinstance(other, Decoder) and self._state.can_join(other._state)

    def join(self, other: Decoder) -> None:
        """Take over the sequences of another decoder."""
        self._state.join(other._state)
        self.sequences += other.sequences
        self._generators |= other._generators

    def drop(self, sequences: Collection[OutputSequence]) -> None:
        """Stop to generate some sequences."""
        rows = [row for row, sequence in enumerate(self.sequences) if sequence not in sequences]
        self.sequences = [self.sequences[row] for row in rows]
        if rows and len(rows) < len(self._state):
            self._state.keep(rows)

    def _choose(self) -> Tensor:
        """Return the next token of each row, (B,)."""
        groups: dict[GenerationSettings, list[int]] = {}
        for row, sequence in enumerate(self.sequences):
            groups.setdefault(sequence.settings, []).append(row)
        logits, tokens = self._state.logits, None
        for settings, rows in groups.items():
            if settings not in self._processors:
                self._processors[settings] = LogitsProcessor(settings)
            chosen = [self.sequences[row] for row in rows]
            scores = self._processors[settings].scores(
                logits if len(groups) == 1 else logits[rows],
                [self._state.before[row] for row in rows],
                [sequence.hypothesis for sequence in chosen],
            )  # (B, V)
            if settings.do_sample:
                generators = [self._generators[sequence] for sequence in chosen]
                own = _sample(scores, generators, width=self._width)
            else:
                own = scores.argmax(dim=-1)
            if len(groups) == 1:
                return own
            tokens = logits.new_empty(len(logits), dtype=torch.int64) if tokens is None else tokens
            tokens[rows] = own
        assert tokens is not None
        return tokens


def _sample(scores: Tensor, generators: Sequence[torch.Generator], *, width: int) -> Tensor:
    """Sample a token for each row of (B, V) scores, (B,). Rows that pad the model's table are never drawn, but count as
    tokens (``width``), so that the samples are those of transformers' ``generate``.
    """
    padded = torch.nn.functional.pad(scores, (0, width - scores.shape[-1]), value=-torch.inf)
    probabilities = padded.softmax(dim=-1)
    rows = zip(probabilities, generators, strict=True)
    return torch.cat([torch.multinomial(row, 1, generator=generator) for row, generator in rows])


class BeamDecoder:
    """Beam search for N rows with the same settings; rows do not depend on each other, and leave when they are done.
    Source: ``_beam_search`` of transformers 5, with ``early_stopping=False``.
    """

    def __init__(self, state: DecodingState, sequences: Sequence[BeamSequence]) -> None:
        self._state = state
        self.sequences = list(sequences)
        self._beams = 1  # rows of the state for each sequence: one at first, and then its width
        self._processor = LogitsProcessor(sequences[0].settings)

    def step(self) -> Sequence[OutputSequence]:
        """Append a token to each beam of each sequence, and return the sequences. Those that have ended leave."""
        state, beams, active, width = self._state, self._beams, self.sequences, self.sequences[0].width
        device = state.logits.device
        log_probs = torch.log_softmax(state.logits, dim=-1)  # (N * W, V)
        vocabulary = log_probs.shape[-1]
        # A sequence with fewer than W hypotheses repeats its last one, which leads nowhere.
        scores = [[score for score, _ in one.running] + [-math.inf] * (beams - len(one.running)) for one in active]
        hypotheses = [hypothesis for sequence in active for hypothesis in sequence.hypotheses(beams)]
        totals = self._processor.scores(log_probs, state.before, hypotheses).reshape(len(active), -1) + torch.tensor(
            scores, device=device
        ).repeat_interleave(vocabulary, dim=1)  # (N, W * V)
        # So many that W go on even if all stop tokens are among them.
        kept = min(max(2, 1 + len(active[0].ending.ids)) * width, totals.shape[-1])
        best, places = totals.topk(kept, dim=-1)  # (N, K) each
        parents, tokens = places // vocabulary, places % vocabulary
        firsts = torch.arange(0, len(log_probs), beams, device=device)[:, None]  # (N, 1)
        own = log_probs[parents + firsts, tokens]  # (N, K)
        full, after, chosen = state.full(), [], []
        table = zip(best.tolist(), parents.tolist(), tokens.tolist(), own.tolist(), strict=True)
        for row, (sequence, lists) in enumerate(zip(active, table, strict=True)):
            entries = [entry for entry in zip(*lists, strict=True) if entry[0] > -math.inf]
            grown = [sequence.running[parent][1].extended(token, value) for _, parent, token, value in entries]
            ends = [full[row * beams] or sequence.ending.reached(hypothesis.ids) for hypothesis in grown]
            goes_on = sequence.advance(
                [(entry[0], hypothesis, end) for entry, hypothesis, end in zip(entries, grown, ends, strict=True)]
            )
            if goes_on:
                goes_on += goes_on[-1:] * (width - len(goes_on))
                after += [row * beams + entries[at][1] for at in goes_on]
                chosen += [entries[at][2] for at in goes_on]
        self.sequences, self._beams = [sequence for sequence in active if not sequence.ended], width
        if self.sequences:
            state.read(torch.tensor(chosen, device=device), after=torch.tensor(after, device=device))
        return active

    def can_join(self, _: Decoder | BeamDecoder) -> bool:
        """Whether other sequences can be generated with these."""
        return False

    def drop(self, sequences: Collection[OutputSequence]) -> None:
        """Stop to generate some sequences."""
        rows = [row for row, sequence in enumerate(self.sequences) if sequence not in sequences]
        if rows and len(rows) < len(self.sequences):
            self._state.keep([row * self._beams + beam for row in rows for beam in range(self._beams)])
        self.sequences = [self.sequences[row] for row in rows]


class BatchKey(NamedTuple):
    """Rows with equal keys can be decoded in one batch.

    All can, or without pads on the left those of one length. Rows on the two sides of a length at which positions
    change are apart (:meth:`Backbone.side`). A row that may cross it during decoding (``turns``) is with those of its
    own length, and is computed whole for each token.
    """

    turns: bool
    is_long: bool
    length: int

    @classmethod
    def of(cls, backbone: Backbone, example: Example, max_tokens: int) -> BatchKey:
        """Return the key of a row whose answer has up to ``max_tokens``."""
        length = example.length - example.encoder_tokens
        is_long = backbone.side(length)
        turns = backbone.side(length + max_tokens - 1) != is_long
        return cls(turns, is_long, length if turns or not backbone.pads_left else 0)


def generation_contexts(bound: TokenizedTemplate, records: Sequence[Record], max_tokens: int) -> list[Example]:
    """Fill a template, leaving ``max_tokens`` for the answer; a record that may not be truncated leaves as many as
    there are.
    """
    examples = _contexts(bound, records, max_tokens)
    if any(example.shortened for example in examples):
        _warn_truncated(str(bound.template), bound.max_length, max_tokens)
    return examples


@functools.lru_cache(maxsize=1024)
def _warn_truncated(template: str, length: int, max_tokens: int) -> None:
    """Warn once for each template."""
    text = (
        "records are longer than the %d tokens of a row allow beside an answer of %d (max_new_tokens): fields are cut, "
        "or the oldest turns left out, for '%s'"
    )
    logger.warning(text, length, max_tokens, in_a_line(template))


def _contexts(bound: TokenizedTemplate, records: Sequence[Record], max_tokens: int) -> list[Example]:
    try:
        return bound.contexts(records, target_tokens=max_tokens)
    except TemplateError:
        bound.contexts(records, target_tokens=1)  # raises again if a record does not fit at all
        if len(records) == 1:
            return _contexts(bound, records, max_tokens // 2)
    return [example for record in records for example in _contexts(bound, [record], max_tokens)]
