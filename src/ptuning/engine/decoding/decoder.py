"""Token-by-token decoding of a batch: stop criteria, the decoding state (KV cache), token choice and text streaming."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.forward import logits_processor
from ptuning.config import GenerationSettings
from ptuning.engine.forward import ForwardOutput, forward
from ptuning.engine.soft_prompt import PromptBatch
from ptuning.errors import BackboneError
from ptuning.records import Record
from ptuning.template.encode import Example, TokenizedTemplate

# What a tokenizer's decoder shows for the bytes of a letter that is not whole yet.
UNFINISHED = "\ufffd"
# Why an answer ended: at a token or a text that ends it, at the end of its line, or since there may be no more of it.
StopReason = Literal["end", "line", "length"]
# A stop string of N letters is looked for in the last tokens only: at most 4 bytes a letter, and some more.
MORE_TOKENS = 8


@dataclass(frozen=True)
class GenerationInput:
    """A row to be answered by writing: the prompt's template, the record, and the most tokens of the answer."""

    bound: TokenizedTemplate
    record: Record
    max_tokens: int


@dataclass(frozen=True)
class GeneratedText:
    """A written answer: text, natural log-probability (with the stop token, if there is one), number of own tokens, and
    why it ended; masks that are filled have an end by themselves.
    """

    text: str
    log_prob: float
    tokens: int
    stopped: StopReason = "end"


@dataclass(frozen=True)
class Hypothesis:
    """Tokens that were written, and their natural log-probability."""

    ids: tuple[int, ...] = ()
    log_prob: float = 0.0

    def grown(self, token: int, log_prob: float) -> Hypothesis:
        """Return the draft with a token more."""
        return Hypothesis((*self.ids, token), self.log_prob + log_prob)


class StopCriteria:
    """Where the answer to a row ends: at a token that ends the model's texts, at a stop string, at its most tokens and,
    unless it may have several lines (``multiline``), after its first line. A text that only goes on (``as_is``) keeps
    the white space at its ends.
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
        self._tokenizer = backbone.tokenizer
        self._multiline = multiline
        self.most = max_tokens
        self._as_is = as_is
        self._stop_strings = stop_strings
        self._tail = 4 * max(map(len, stop_strings), default=0) + MORE_TOKENS
        # The ends of a text and of an answer; and of a filled gap, for a model that learned to write one.
        self.ids = end_ids | self._tokenizer.end_ids | ({self._tokenizer.gap.end_id} - {None})

    @classmethod
    def of(cls, backbone: Backbone, row: GenerationInput, *, stop_strings: Sequence[str] = ()) -> StopCriteria:
        """Return where the answer of a prompt ends."""
        bound, most = row.bound, row.max_tokens
        return cls(
            backbone, max_tokens=most, multiline=bound.multiline, stop_strings=stop_strings, end_ids=bound.end_ids
        )

    def reached(self, ids: Sequence[int]) -> bool:
        """Whether an answer ends with the last of its tokens."""
        return len(ids) >= self.most or self.is_own(ids)

    def is_own(self, ids: Sequence[int]) -> bool:
        """Whether the last token of an answer ends it by itself, and not only since there may be no more."""
        return ids[-1] in self.ids or self._ends_line(ids) or self._stops(ids)

    def _ends_line(self, ids: Sequence[int]) -> bool:
        # A line break before the answer does not end it.
        return not self._multiline and self._tokenizer.ends_line(ids[-1]) and bool(self._tokenizer.decode(ids).strip())

    def _stops(self, ids: Sequence[int]) -> bool:
        if not self._stop_strings:
            return False
        tail = self._tokenizer.decode(ids[-self._tail :])
        return any(one in tail for one in self._stop_strings)

    def written(self, draft: Hypothesis) -> GeneratedText:
        """Return a draft as an answer; its log-probability includes the token that ended it, its tokens do not."""
        return GeneratedText(self.text(draft.ids), draft.log_prob, len(self._own(draft.ids)), self.stopped(draft.ids))

    def stopped(self, ids: Sequence[int]) -> StopReason:
        """Return why an answer ended with the last of its tokens."""
        if ids[-1] in self.ids or self._stops(ids):
            return "end"
        return "line" if self._ends_line(ids) else "length"

    def text(self, ids: Sequence[int], *, is_whole: bool = True) -> str:
        """Return the text of an answer or, unless it ``is_whole``, the part of it that more tokens will not change."""
        text = self._tokenizer.decode(self._own(ids))
        text = text[: min((at for one in self._stop_strings if (at := text.find(one)) >= 0), default=len(text))]
        if not is_whole:
            text = text.rstrip(UNFINISHED)
            begun = (size for one in self._stop_strings for size in range(1, len(one)) if text.endswith(one[:size]))
            text = text[: len(text) - max(begun, default=0)]
        if self._as_is:
            return text
        text = text.strip()
        return text if self._multiline else text.split("\n")[0].strip()

    def _own(self, ids: Sequence[int]) -> Sequence[int]:
        """Return the tokens without one that ended them and that has no text."""
        ends = ids[-1] in self.ids or (self._ends_line(ids) and not self._tokenizer.decode(ids[-1:]).strip())
        return ids[:-1] if ends else ids


class TextStreamer:
    """The text of an answer while it is written, told in pieces that joined are the whole."""

    def __init__(self, ending: StopCriteria) -> None:
        self._ending = ending
        self._told = ""

    def piece(self, ids: Sequence[int], *, is_whole: bool) -> str:
        """Return what is new of the text, as far as more tokens will not change it; all of it if it ``is_whole``."""
        text = self._ending.text(ids, is_whole=is_whole)
        if not text.startswith(self._told) or (len(text) <= len(self._told) and not is_whole):
            return ""
        new, self._told = text[len(self._told) :], text
        return new


def group_by_prompt(rows: Sequence[GenerationInput]) -> Iterator[tuple[tuple[TokenizedTemplate, int], list[int]]]:
    """Group rows by prompt and by the most tokens of their answers; yield both with the indices of the rows."""
    groups: dict[tuple[int, int], list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault((id(row.bound), row.max_tokens), []).append(index)
    for indices in groups.values():
        yield (rows[indices[0]].bound, rows[indices[0]].max_tokens), indices


def distinct(written: Iterable[GeneratedText]) -> list[GeneratedText]:
    """Keep the first of the answers with the same text, which can end in different ways."""
    kept: dict[str, GeneratedText] = {}
    for one in written:
        kept.setdefault(one.text, one)
    return list(kept.values())


# Pads in front of all rows are dropped by so many at a time, since that copies all keys and values.
DROPPED_PADS = 16


class DecodingState:
    """B rows with what the model has read of each. ``logits`` are those of the next token, (B, V) float32.

    ``before`` has for each row the tokens that count as written before the answer: those of a decoder's side, which
    rows of one batch have equally many of. Without ``keep`` no keys and values are kept. Raises a BackboneError if an
    encoder-decoder model keeps none.
    """

    def __init__(
        self, backbone: Backbone, examples: Sequence[Example], learned: PromptBatch, *, keep: bool = True
    ) -> None:
        self._begin(backbone, examples, forward(backbone, examples, learned, pad_side="left", keep=keep))

    @classmethod
    def behind(cls, backbone: Backbone, examples: Sequence[Example], first: ForwardOutput) -> DecodingState:
        """Return the rows behind a pass that has read them, with pads on the left."""
        rows = cls.__new__(cls)
        rows._begin(backbone, examples, first)
        return rows

    def _begin(self, backbone: Backbone, examples: Sequence[Example], first: ForwardOutput) -> None:
        batch = first.batch
        if first.memory is None and batch.encoder_tokens:
            raise BackboneError(
                "this model has no KV cache, so it cannot write answers; give candidates to choose from"
            )
        self._backbone = backbone
        self._memory, self._embeddings, self._positions = first.memory, first.embeddings, batch.positions
        self._mask = first.mask[:, batch.encoder_tokens :]  # (B, T)
        self._offsets = first.offsets if first.memory is None else None  # deep slots are read anew with whole rows
        self.logits = first.logits
        self.before = [_decoder_ids(one) for one in examples]

    def __len__(self) -> int:
        return len(self.logits)

    def joins(self, other: DecodingState) -> bool:
        """Whether rows of both can be read in one batch from now on: if both keep keys and values, and nothing else."""
        return all(one._memory is not None and one._memory.is_plain for one in (self, other))

    def join(self, other: DecodingState) -> None:
        """Take in the rows of another continuation below one's own, with pads on the left of the shorter ones."""
        assert self._memory is not None
        assert other._memory is not None
        width = max(self._mask.shape[1], other._mask.shape[1])
        self._memory = self._memory.join(other._memory, width=width)
        self._mask = torch.cat([_padded(one._mask, width) for one in (self, other)])
        self.before = [*self.before, *other.before]
        self.logits = torch.cat([self.logits, other.logits])

    def keep(self, places: Sequence[int]) -> None:
        """Go on with the rows at these places only."""
        rows = torch.tensor(places, dtype=torch.int64, device=self.logits.device)
        self._follow(rows)
        self.logits = self.logits[rows]

    def full(self) -> list[bool]:
        """Return for each row whether the model can read no token more."""
        full: list[bool] = (self._mask.sum(dim=1) >= self._backbone.tokenizer.max_tokens).tolist()
        return full

    def read(self, tokens: Tensor, *, after: Tensor | None = None) -> None:
        """Read one token more, (B,) int64: in each row, or (``after``, (B,) int64) behind what row ``after[i]`` has."""
        if after is not None:
            self._follow(after)
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

    def _follow(self, rows: Tensor) -> None:
        self.before, self._mask = [self.before[row] for row in rows.tolist()], self._mask[rows]
        if self._memory is not None:
            self._memory.reorder(rows)
            self._drop_pads()
        else:
            self._embeddings, self._positions = self._embeddings[rows], self._positions[rows]
            self._offsets = self._offsets if self._offsets is None else self._offsets.take(rows)

    def _drop_pads(self) -> None:
        """Forget the first positions once they are pads in every row that is left, and enough of them to pay."""
        assert self._memory is not None
        pads = int(self._mask.any(dim=0).int().argmax())
        if pads >= DROPPED_PADS and self._memory.is_plain:
            self._memory, self._mask = self._memory.drop_first(pads), self._mask[:, pads:]


def _padded(mask: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(mask, (width - mask.shape[1], 0))


def _decoder_ids(example: Example) -> list[int]:
    """Return the tokens of a row's decoder side without slots; nothing if the model has only one side."""
    if not example.encoder_tokens:
        return []
    slots = set(example.slot_positions)
    return [token for at, token in enumerate(example.token_ids) if at >= example.encoder_tokens and at not in slots]


class LogitsProcessor:
    """What the settings make of the logits of the next token."""

    def __init__(self, settings: GenerationSettings) -> None:
        self._process = logits_processor(settings)
        self._looks_back = settings.repetition_penalty != 1.0

    def scores(self, logits: Tensor, before: Sequence[Sequence[int]], drafts: Sequence[Hypothesis]) -> Tensor:
        """Return the logits (or log-probabilities), (B, V), to choose the next token of each row from. ``before`` are
        the tokens that count as written before the drafts.
        """
        if not self._looks_back:
            return self._process(logits.new_empty(len(logits), 0, dtype=torch.int64), logits)
        rows = [[*own, *draft.ids] for own, draft in zip(before, drafts, strict=True)]
        lengths = sorted(set(map(len, rows)))
        scores = logits if len(lengths) == 1 else logits.clone()
        for length in lengths:
            places = [place for place, row in enumerate(rows) if len(row) == length]
            ids = torch.tensor([rows[place] for place in places], dtype=torch.int64, device=logits.device)
            if len(lengths) == 1:
                return self._process(ids.reshape(len(rows), -1), logits)
            scores[places] = self._process(ids.reshape(len(places), -1), logits[places])
        return scores


@dataclass(eq=False)
class OutputSequence:
    """An answer that is being written: where it ends, how its tokens are chosen, and what there is of it.
    With ``alternatives`` it notes for each token its log-probability, and so many of the likeliest tokens there.
    """

    ending: StopCriteria
    settings: GenerationSettings
    draft: Hypothesis = field(default_factory=Hypothesis)
    ended: bool = False
    alternatives: int | None = None
    log_probs: list[float] = field(default_factory=list)
    likeliest: list[list[tuple[int, float]]] = field(default_factory=list)

    def grow(self, token: int, log_probs: Tensor, value: float) -> None:
        """Write a token of this log-probability, out of those of all tokens, (V,)."""
        self.draft = self.draft.grown(token, value)
        if self.alternatives is not None:
            self.log_probs.append(value)
            best = log_probs.topk(min(self.alternatives, len(log_probs)))
            self.likeliest.append(list(zip(best.indices.tolist(), best.values.tolist(), strict=True)))


class Decoder:
    """Writes a line for each of B rows, by the likeliest tokens or by drawn ones.

    A line that draws has a generator of its own with its settings' seed, so that it is written as it would be alone.
    ``lines`` are those that have not ended, in the order of the rows.
    """

    def __init__(self, backbone: Backbone, rows: DecodingState, lines: Sequence[OutputSequence]) -> None:
        self._backbone, self._rows = backbone, rows
        self.lines = list(lines)
        self._draws = {line: self._generator(line.settings) for line in lines if line.settings.do_sample}
        self._choices: dict[GenerationSettings, LogitsProcessor] = {}

    def steps(self) -> Iterator[list[OutputSequence]]:
        """Write until every line has ended; yield those that a step has lengthened."""
        while self.lines:
            yield self.step()

    def step(self) -> list[OutputSequence]:
        """Write one token of each line, and return the lines. Those that have ended leave."""
        lengthened, rows = self.lines, self._rows
        tokens = self._choose()
        log_probs = torch.log_softmax(rows.logits, dim=-1)  # (B, V)
        values = log_probs.gather(1, tokens[:, None])[:, 0].tolist()
        table = zip(lengthened, tokens.tolist(), log_probs, values, rows.full(), strict=True)
        for line, token, of_all, value, full in table:
            line.grow(token, of_all, value)
            line.ended = full or line.ending.reached(line.draft.ids)
        self._keep([place for place, line in enumerate(lengthened) if not line.ended], tokens)
        return lengthened

    def joins(self, other: Decoder) -> bool:
        """Whether the lines of another writer can be written with these."""
        return self._rows.joins(other._rows)

    def join(self, other: Decoder) -> None:
        """Take over the lines of another writer."""
        self._rows.join(other._rows)
        self.lines += other.lines
        self._draws |= other._draws

    def drop(self, lines: Collection[OutputSequence]) -> None:
        """Write some lines no further."""
        places = [place for place, line in enumerate(self.lines) if line not in lines]
        if len(places) < len(self.lines):
            self.lines = [self.lines[place] for place in places]
            self._rows.keep(places)

    def _keep(self, places: list[int], tokens: Tensor) -> None:
        """Go on behind the chosen tokens, (B,), with the rows at these places."""
        after = None if len(places) == len(self.lines) else torch.tensor(places, device=tokens.device)
        self.lines = [self.lines[place] for place in places]
        if places:
            self._rows.read(tokens if after is None else tokens[after], after=after)

    def _choose(self) -> Tensor:
        """Return the next token of each row, (B,)."""
        groups: dict[GenerationSettings, list[int]] = {}
        for place, line in enumerate(self.lines):
            groups.setdefault(line.settings, []).append(place)
        if len(groups) == 1:
            return self._choose_some(self._rows.logits, range(len(self.lines)), *groups)
        tokens = self._rows.logits.new_empty(len(self.lines), dtype=torch.int64)
        for settings, places in groups.items():
            tokens[places] = self._choose_some(self._rows.logits[places], places, settings)
        return tokens

    def _choose_some(self, logits: Tensor, places: Sequence[int], settings: GenerationSettings) -> Tensor:
        if settings not in self._choices:
            self._choices[settings] = LogitsProcessor(settings)
        lines = [self.lines[place] for place in places]
        before = [self._rows.before[place] for place in places]
        scores = self._choices[settings].scores(logits, before, [line.draft for line in lines])  # (B, V)
        if not settings.do_sample:
            return scores.argmax(dim=-1)
        return _sample(scores, [self._draws[line] for line in lines], width=self._backbone.embedding_rows)

    def _generator(self, settings: GenerationSettings) -> torch.Generator:
        return torch.Generator(self._rows.logits.device).manual_seed(settings.seed)


def _sample(scores: Tensor, generators: Sequence[torch.Generator], *, width: int) -> Tensor:
    """Draw a token for each row of (B, V) scores, (B,). Rows that pad the model's table are never drawn, but count as
    tokens (``width``), so that the draws are those of transformers' ``generate``.
    """
    padded = torch.nn.functional.pad(scores, (0, width - scores.shape[-1]), value=-torch.inf)
    chances = padded.softmax(dim=-1)
    drawn = [torch.multinomial(row, 1, generator=own) for row, own in zip(chances, generators, strict=True)]
    return torch.cat(drawn)
