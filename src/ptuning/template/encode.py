"""Filling a template: record -> token ids, slot positions and scored positions, unpadded (docs/templates.md)."""

from __future__ import annotations

import copy
import functools
import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter

from ptuning.errors import RecordError, TemplateError, in_a_line
from ptuning.records import IN_MEMORY, TARGET_FIELD, Record
from ptuning.template.ambiguity import is_known
from ptuning.template.chat import ChatMarkup, own_end
from ptuning.template.language import (
    CONVERSATION_FIELD,
    Conversation,
    Field,
    Literal,
    Slots,
    Target,
    Template,
    TextSlots,
    Turn,
)
from ptuning.template.messages import ASSISTANT, USER, ChatMessage, newest, read_messages
from ptuning.template.segments import (
    ANCHOR_WORD,
    FILLS_MASKS,
    LITERAL,
    NOTHING,
    TARGET,
    Encoded,
    Ids,
    Kind,
    MarkedText,
    TextRun,
    Tokenizer,
    as_markup,
)

logger = logging.getLogger(__name__)

# The names of positions of a filled template, besides literal text, "field NAME" and the target.
SPECIAL, SLOT = "special", "slot"
# Start of the decoder's side; takes no position.
TURN = "turn"
# What an answer ends with, where the template says so.
END = "end"
# A token rarely has more.
CHARACTERS_A_TOKEN = 8


# Token id at a slot; any id would do, since the slot's vector replaces its embedding.
SLOT_PLACEHOLDER = 0


@dataclass(frozen=True)
class Example:
    """One filled template as token ids, unpadded.

    Args:
        token_ids: With :data:`SLOT_PLACEHOLDER` at the slots; the encoder's part, if any, comes first.
        slot_positions: The positions of the slots, in template order.
        logit_positions: Where the model's logits score ``target_ids``; one before each token in left-to-right models.
        target_ids: The scored ids; the last one is the stop token if the example teaches to stop.
        own_tokens: Number of ``target_ids`` without the stop token.
        shortened: Whether a field was truncated to fit.
        encoder_tokens: Number of ``token_ids`` that the encoder reads; 0 without one.
        known: Whether the tokenizer knows the target (:func:`~ptuning.template.ambiguity.is_known`); one without any
            tokens is replaced by an unknown token.
        prefix_length: Number of tokens and slots before ``token_ids`` of which the prompt brings keys and values
            (:class:`PrefixLayout`).
        unread: Which of these, counted from the row's beginning, this row does not read.
        turns_left_out: How many turns of a conversation were left out to fit.
        named_end: Whether the template names what the target ends with.
    """

    token_ids: Ids
    slot_positions: Ids
    logit_positions: Ids
    target_ids: Ids
    own_tokens: int
    shortened: bool = False
    encoder_tokens: int = 0
    known: bool = True
    prefix_length: int = 0
    unread: Ids = ()
    turns_left_out: int = 0
    named_end: bool = False

    @property
    def length(self) -> int:
        """Number of tokens and slots of the whole row."""
        return self.prefix_length + len(self.token_ids)


StartIds = tuple[int | None, ...]


@dataclass(frozen=True)
class PlacedSlots:
    """Slots by the tokens that they start from. Text after them is tokenised as after their ``tail``, if there is
    one, else as a word that begins anew.
    """

    start_ids: StartIds
    deep: bool = False
    tail: MarkedText = NOTHING


@dataclass(frozen=True)
class PrefixLayout:
    """Deep slots at the front of a template, whose keys and values a prompt brings: they are no part of rows.

    Args:
        bos_ids: The tokens before them, which open a text; none without such slots.
        start_ids: The tokens that the slots start at; None for one of the data's.
    """

    bos_ids: Ids = ()
    start_ids: StartIds = ()

    @property
    def bos(self) -> int:
        """Number of tokens before the slots."""
        return len(self.bos_ids)

    @property
    def slots(self) -> int:
        """Number of slots."""
        return len(self.start_ids)

    @property
    def length(self) -> int:
        """Number of tokens and slots before a row."""
        return self.bos + self.slots


@dataclass(frozen=True)
class SlotLayout:
    """The slots of a template.

    Args:
        prefix: Those with keys and values before rows.
        slot_start_ids: The tokens that the other slots start at, in template order; None for a random start.
        offset_slots: Which of these are deep, by their index: they have offsets in every layer.
    """

    prefix: PrefixLayout
    slot_start_ids: StartIds
    offset_slots: Ids

    @classmethod
    def of(cls, pieces: Sequence[object], bos_ids: Ids, *, block: bool) -> SlotLayout:
        """Return the layout of a template's pieces; with ``block``, deep slots at the front are a prefix."""
        front = _front(pieces) if block else 0
        every = [piece for piece in pieces if isinstance(piece, PlacedSlots)]
        own = [(start, piece.deep) for piece in every[front:] for start in piece.start_ids]
        prefix = PrefixLayout(bos_ids, tuple(start for piece in every[:front] for start in piece.start_ids))
        return cls(
            prefix if front else PrefixLayout(),
            tuple(start for start, _ in own),
            tuple(index for index, (_, is_deep) in enumerate(own) if is_deep),
        )

    @property
    def start_ids(self) -> StartIds:
        """The tokens that all slots start at, in template order, those of the prefix included."""
        return (*self.prefix.start_ids, *self.slot_start_ids)

    def filled_up(self, tokens: Iterator[int]) -> StartIds:
        """Return what all slots start at, with the next of some tokens for each deep slot that has none."""
        slots = self.prefix.slots
        deep = {*range(slots), *(slots + slot for slot in self.offset_slots)}
        starts = enumerate(self.start_ids)
        return tuple(next(tokens) if start is None and index in deep else start for index, start in starts)

    def places(self, slot_positions: Sequence[int]) -> list[int]:
        """Return where all slots are in a row with these positions of its own slots."""
        length = self.prefix.length
        return [*range(self.prefix.bos, length), *(length + position for position in slot_positions)]


class TooLongError(TemplateError, RecordError):
    """The fixed parts of a row are longer than the model's context."""


@dataclass(frozen=True)
class _Row:
    """A record to fill in; without a target, ``target_tokens`` tokens are reserved for it."""

    record: Record
    target: str | None
    where: str = "the record"
    with_stop: bool = False
    target_tokens: int = 1


_Fixed = Turn | PlacedSlots  # text is cut at these
_Piece = MarkedText | Field | Target | _Fixed
_Part = TextRun | _Fixed


class TokenizedTemplate:
    """One backbone's template. Text after the target is dropped (with a notice) for a causal model or after ``[>]``.

    A special token after a causal model's target is what answers end with, such as ``<|im_end|>``. Without one, unless
    targets are ``multiline``, a causal model's answer ends with its line: models tend to write a line break there
    anyway, so a prompt learns it in fewer steps than the end of the text. Rows that are longer than the model's limit
    or ``max_length`` tokens are truncated. With ``block``, deep slots at the very front are no part of rows: the prompt
    brings their keys and values (:class:`PrefixLayout`). Raises a TemplateError if the words of ``[P:words]`` have no
    tokens, a masked model has no mask token, or a model without a decoder's side gets ``[>]``.
    """

    def __init__(
        self,
        template: Template,
        *,
        tokenizer: Tokenizer,
        kind: Kind,
        multiline: bool = False,
        max_length: int | None = None,
        block: bool = False,
    ) -> None:
        if template.turn is not None and kind != "encoder-decoder":
            raise template.error(
                f"[>] turns to a decoder's side, and this {kind} model has only one side; leave it out", template.turn
            )
        self._end = NOTHING
        if kind == "causal" or template.turn is not None:
            whole, (template, dropped), reader = template, template.without_tail(), "decoder"
            if kind == "causal":
                (self._end, dropped), reader = own_end(whole, tokenizer), "causal model"
            _notice_dropped(in_a_line(str(template)), dropped.strip(), reader)
        elif kind in FILLS_MASKS and tokenizer.mask_id is None:
            raise TemplateError(f"this {kind} model's tokenizer has no mask token, so [Y] has no place in its input")
        # The template as it is remembered: with the end of answers, which is no part of what is read.
        self.template = Template((*template.pieces, Literal(self._end.characters))) if self._end.markup else template
        self._read = template
        self.tokenizer = tokenizer
        self.kind = kind
        self.multiline = multiline or bool(self._end.markup)
        self._chat = ChatMarkup(tokenizer)
        if template.has_conversation:
            self._chat.around([USER])  # an error without a chat template
        self.max_length = min(max_length or tokenizer.max_tokens, tokenizer.max_tokens)
        self._fills_gap = kind == "encoder-decoder" and template.turn is None
        self.stop_id = self._stop_id()  # what a target is taught to end with, unless the template says it
        self._pieces = self._prepare()
        self._prefix_ids = self._opening()
        self.layout = self._lay_out(block=block)

    def _lay_out(self, *, block: bool) -> SlotLayout:
        return SlotLayout.of(self._pieces, self._prefix_ids, block=block)

    @property
    def end_ids(self) -> frozenset[int]:
        """The special token that ends an answer, where the template names one."""
        name = self._end.characters.strip()
        return frozenset({self.tokenizer.special_ids[name]}) if name else frozenset()

    def _stop_id(self) -> int | None:
        if self._fills_gap and self.tokenizer.gap.end_id is not None:
            return self.tokenizer.gap.end_id
        if self.kind != "causal" or self.multiline or self.tokenizer.line_end_id is None:
            return self.tokenizer.stop_id
        return self.tokenizer.line_end_id

    @property
    def slot_start_ids(self) -> tuple[int | None, ...]:
        """For each slot of a row, in template order, the token that it starts from; None for a random start."""
        return self.layout.slot_start_ids

    @property
    def slots(self) -> int:
        """Number of slots P of a row: those with a vector in place of an embedding."""
        return len(self.layout.slot_start_ids)

    def starting(self, tokens: Sequence[int | None]) -> TokenizedTemplate:
        """Return the same with slots that start at other tokens, one for each slot of the whole template."""
        other, left = copy.copy(self), iter(tokens)
        other._pieces = tuple(
            replace(piece, start_ids=tuple(itertools.islice(left, len(piece.start_ids))))
            if isinstance(piece, PlacedSlots)
            else piece
            for piece in self._pieces
        )
        other.layout = other._lay_out(block=bool(self.layout.prefix.length))
        return other

    def slots_of_lines(self, piece: int, lines: Sequence[str]) -> list[range]:
        """Return which slots, counted from the first one of the whole template, belong to each of the lines that the
        words of the piece at an index are made of.
        """
        before = sum(isinstance(item, Slots | TextSlots) for item in self.template.pieces[:piece])
        own = [item for item in self._pieces if isinstance(item, PlacedSlots)]
        start = sum(len(item.start_ids) for item in own[:before])
        texts = itertools.accumulate(lines)
        ends = [min(len(self._starts(text, after=None)), len(own[before].start_ids)) for text in texts]
        return [range(start + low, start + high) for low, high in itertools.pairwise([0, *ends])]

    def check_fields(self, record: Record, *, where: str = "the record") -> None:
        """Raise a TemplateError at the first field of the template that the record lacks; it names those it has."""
        for index, piece in enumerate(self.template.pieces):
            if isinstance(piece, Field) and piece.name not in record:
                place, have = where.removeprefix(f"{IN_MEMORY}, "), ", ".join(sorted(record)) or "none"
                raise self.template.error(f"no field '{piece.name}' in {place}; its fields: {have}", index)

    def examples(
        self,
        records: Sequence[Record],
        *,
        targets: Sequence[str] | None = None,
        with_stop: bool = False,
        source: str = "record",
    ) -> list[Example]:
        """Fill the template with N records and their targets; by default each record's own. ``with_stop`` scores the
        stop token as well. Raises a TemplateError if a record lacks a field, or slots, literals, target and kept fields
        do not fit; a RecordError with the name of the ``source`` if a target is missing.
        """
        if targets is None:
            targets = [record.get(TARGET_FIELD, "") for record in records]
        return self._build(
            [_Row(record, target, f"{source} {number}", with_stop=with_stop)]
            for number, (record, target) in enumerate(zip(records, targets, strict=True), start=1)
        )

    def answers(
        self,
        records: Sequence[Record],
        texts: Sequence[Sequence[str]],
        *,
        with_stop: bool = False,
        source: str = "record",
        first: int = 1,
    ) -> list[list[Example]]:
        """Fill the template with each of N records and each of its own ``texts`` in turn as the target.

        All texts of a record have the same context: a record that is too long for its longest text is truncated
        alike for all of them. Errors as for :meth:`examples`; they name record, counted from ``first``, and answer.
        """
        groups = [
            [
                _Row(record, text, f"{source} {number}, answer {place}", with_stop=with_stop)
                for place, text in enumerate(listed, start=1)
            ]
            for number, (record, listed) in enumerate(zip(records, texts, strict=True), start=first)
        ]
        examples = iter(self._build(groups))
        return [list(itertools.islice(examples, len(group))) for group in groups]

    def contexts(self, records: Sequence[Record], *, target_tokens: int = 1, source: str = "record") -> list[Example]:
        """Fill the template without targets, with room for ``target_tokens`` tokens: for a causal model up to the
        target (as for a decoder), for a masked one with that many masks. ``target_ids`` is empty; errors as for
        :meth:`examples`.
        """
        named = [(f"{source} {number}", record) for number, record in enumerate(records, start=1)]
        return self._build([_Row(record, None, where, target_tokens=target_tokens)] for where, record in named)

    def describe(self, record: Record) -> list[tuple[str, int | None]]:
        """Return (part, token id) for each position of the filled record, parts being ``special``, ``slot``,
        ``literal``, ``field NAME``, ``target`` or the ``end`` of the target, and in a conversation ``user`` or
        ``assistant``, who said it. A token that a field shares with the text in front is the field's. The id of a slot
        is its start's, None if it starts at random. Errors as for :meth:`examples`.
        """
        target = record.get(TARGET_FIELD, "")
        row = _Row(record, target if target.strip() else None, with_stop=bool(self._end.markup))
        limit = self._limit([row]) if self._build([[row]])[0].shortened else None
        starts = iter(self.layout.start_ids)
        written = "".join(piece.text for piece in self._read.pieces if isinstance(piece, Literal))
        special = self.tokenizer.special_ids.items()
        markup = {index for name, index in special if index != self.tokenizer.unknown_id or name in written}
        positions: list[tuple[str, int | None]] = []
        for part, ids in self._spans([row], limit, named=True)[0]:
            if part == TARGET and self.kind in FILLS_MASKS:
                positions += [(part, self.tokenizer.mask_id)] * (len(ids) or row.target_tokens)
            elif part == SLOT:
                positions += [(part, next(starts)) for _ in ids]
            else:
                positions += [(SPECIAL if part == LITERAL and index in markup else part, index) for index in ids]
        return positions

    def texts(self, record: Record) -> tuple[str, ...]:
        """Return the filled template up to the target as text, without truncation: before, between and after its P
        slots, P + 1 texts. A space before the target is the target's.
        """
        texts = [""]
        for piece in self._pieces:
            if isinstance(piece, Target):
                break
            if isinstance(piece, PlacedSlots):
                texts += [""] * len(piece.start_ids)
            elif isinstance(piece, Conversation):
                texts[-1] += "".join(
                    text.characters for _, text in self._chat.between(read_messages(record[piece.name]))
                )
            elif isinstance(piece, Field):
                texts[-1] += record[piece.name]
            elif isinstance(piece, MarkedText):
                texts[-1] += piece.characters
        texts[-1] = texts[-1].removesuffix(" ")
        return tuple(texts)

    def _prepare(self) -> tuple[_Piece, ...]:
        """Tokenise the words of slots, find markup, and move spaces to the piece after them."""
        prepared: list[_Piece] = []
        for index, piece in enumerate(self._read.pieces):
            last = prepared[-1] if prepared else None
            if isinstance(piece, Literal):
                text = piece.text.removeprefix(" ") if isinstance(last, Turn) else piece.text
                prepared += [as_markup(text, self.tokenizer)] if text else []
            elif isinstance(piece, Turn):
                _take_space(prepared)  # a space on either side belongs to the mark
                prepared.append(piece)
            elif isinstance(piece, Slots):
                _take_space(prepared)
                prepared.append(PlacedSlots((None,) * piece.count, piece.deep))
            elif isinstance(piece, TextSlots):
                words = _take_space(prepared) + piece.text
                starts = self._starts(words, after=prepared[-1] if prepared else None)
                if not starts:
                    raise self.template.error("the words of this piece have no tokens", index)
                # Deep slots are their words before training, so that what follows is tokenised as after these.
                tail = MarkedText(words[-1]) if piece.deep and not words[-1].isalnum() else NOTHING
                prepared.append(PlacedSlots(starts, piece.deep, tail))
            else:
                prepared.append(piece)
        return tuple(prepared)

    def _starts(self, words: str, *, after: _Piece | None) -> Ids:
        """Return the ids of the words of slots as they are after another piece; a word glued to a word begins anew."""
        run = TextRun(((LITERAL, MarkedText(words)),))
        if isinstance(after, MarkedText) and not (after.characters[-1:].isalnum() and words[:1].isalnum()):
            run = replace(run, lead=after)
        elif after is not None and not isinstance(after, Turn):
            run = run.after_slots(after.tail if isinstance(after, PlacedSlots) else NOTHING)
        return Encoded(self.tokenizer, [run]).cut(run)[0][1]

    def _opening(self) -> Ids:
        """Return the tokens that open a text. A template that begins with it itself gets it once, also
        after slots that the template begins with. A chat template writes all of it itself.
        """
        if self.template.has_conversation:
            return ()
        ids = self.tokenizer.prefix_ids
        first = next((piece for piece in self._pieces if not isinstance(piece, PlacedSlots)), None)
        written = Encoded(self.tokenizer, [])[first] if isinstance(first, MarkedText) and first.markup else ()
        return () if written[: len(ids)] == ids else ids

    def _build(self, groups: Iterable[Sequence[_Row]]) -> list[Example]:
        """Fill rows; those of a group are truncated alike, if one of them does not fit."""
        groups = list(groups)
        rows = [row for group in groups for row in group]
        for row in rows:
            self.check_fields(row.record, where=row.where)
            if row.target is not None and not row.target.strip():
                raise RecordError(f"{row.where} has no target (field '{TARGET_FIELD}')")
            if self.template.has_conversation:
                turns = [*read_messages(row.record[CONVERSATION_FIELD], where=row.where)]
                turns += [] if row.target is None else [ChatMessage(ASSISTANT, row.target.strip())]
                self._chat.check(turns, answer_next=row.target is None, where=row.where)
        whole = iter(self._fill(rows))
        examples: list[Example] = []
        for group in groups:
            own = list(itertools.islice(whole, len(group)))
            if not all(map(self._fits, group, own)):
                limit, left_out = self._limit(group), 0
                if self.template.has_conversation:
                    said = read_messages(group[0].record[CONVERSATION_FIELD])
                    left_out = len(said) - len(newest(said, limit))
                own = [
                    replace(example, shortened=True, turns_left_out=left_out) for example in self._fill(group, limit)
                ]
            examples += own
        return examples

    def _fill(self, rows: Sequence[_Row], limit: int | None = None) -> list[Example]:
        """Fill rows, whose fields without ``!`` are cut to ``limit`` characters."""
        return [self._example(row, spans) for row, spans in zip(rows, self._spans(rows, limit), strict=True)]

    def _spans(
        self, rows: Sequence[_Row], limit: int | None = None, *, named: bool = False
    ) -> list[list[tuple[str, Ids]]]:
        """Return (part, ids) of whole rows, special tokens included; all texts are encoded in one call."""
        filled = [self._parts(row, limit=limit, named=named) for row in rows]
        encoded = Encoded(self.tokenizer, (part for parts in filled for part in parts if isinstance(part, TextRun)))
        return [self._row_spans(parts, encoded) for parts in filled]

    def _parts(self, row: _Row, *, limit: int | None = None, named: bool = False) -> list[_Part]:
        """Cut a record, truncated to ``limit``, at slots and the target; if ``named``, at fields, too."""
        parts: list[_Part] = []
        for is_fixed, pieces in itertools.groupby(self._pieces, lambda piece: isinstance(piece, _Fixed)):
            if is_fixed:
                parts += [piece for piece in pieces if isinstance(piece, _Fixed)]
                continue
            segments: list[tuple[str, MarkedText]] = []
            for piece in pieces:
                if isinstance(piece, MarkedText):
                    segments.append((LITERAL, piece))
                elif isinstance(piece, Conversation):
                    said = read_messages(row.record[piece.name])
                    said = said if limit is None else newest(said, limit)
                    segments += [(part if named else LITERAL, text) for part, text in self._chat.between(said)]
                elif isinstance(piece, Field):
                    text = row.record[piece.name]
                    text = text if piece.keep else text[:limit]
                    segments.append((f"field {piece.name}" if named else LITERAL, MarkedText(text)))
                else:
                    segments.append((TARGET, MarkedText(ANCHOR_WORD if row.target is None else row.target)))
                    if row.target is not None and self._end.markup:
                        segments.append((END, self._end))
            joined = tuple(
                (part, sum((text for _, text in same), start=NOTHING))
                for part, same in itertools.groupby(segments, itemgetter(0))
            )
            run = TextRun(joined, is_open=row.target is None)
            before = parts[-1] if parts else None
            parts.append(run.after_slots(before.tail) if isinstance(before, PlacedSlots) else run)
        return parts

    def _row_spans(self, parts: Iterable[_Part], encoded: Encoded) -> list[tuple[str, Ids]]:
        tokenizer = self.tokenizer
        spans: list[tuple[str, Ids]] = [(SPECIAL, self._prefix_ids)]
        turn: list[tuple[str, Ids]] = [(SPECIAL, tokenizer.suffix_ids), (TURN, ()), (SPECIAL, tokenizer.decoder_ids)]
        for part in parts:
            if isinstance(part, TextRun):
                spans += encoded.cut(part)
            elif isinstance(part, Turn):
                spans += turn
            else:
                spans.append((SLOT, (SLOT_PLACEHOLDER,) * len(part.start_ids)))
        if self.kind in FILLS_MASKS:
            return [*spans, (SPECIAL, tokenizer.suffix_ids)]
        if not self._fills_gap:
            return spans
        at = next(index for index, (part, _) in enumerate(spans) if part == TARGET)
        target, spans[at] = spans[at], (SPECIAL, tokenizer.gap.encoder_ids)
        return [*spans, *turn, (SPECIAL, tokenizer.gap.decoder_ids), target]

    def _example(self, row: _Row, spans: Iterable[tuple[str, Ids]]) -> Example:
        ids: list[int] = []
        slots: list[int] = []
        positions: range = range(0)
        target_ids: Ids = ()
        own = encoder_tokens = 0
        known = True
        spans = list(spans)
        end = next((span for part, span in spans if part == END), None)
        for part, span in spans:
            if part == END:
                continue
            if part == TURN:
                if not ids:
                    message = "the encoder needs something to read; put text, a field or a slot before [>]"
                    raise self.template.error(message, self.template.turn or 0)
                encoder_tokens = len(ids)
            if part == SLOT:
                slots += range(len(ids), len(ids) + len(span))
            if part != TARGET:
                ids += span
                continue
            if row.target is not None:
                known = is_known(span, self.tokenizer.unknown_id)
                span = span or (self.tokenizer.unknown_id or 0,)
            target_ids, own = span, len(span)
            if self.kind in FILLS_MASKS:
                assert self.tokenizer.mask_id is not None
                positions = range(len(ids), len(ids) + (own or row.target_tokens))
                ids += [self.tokenizer.mask_id] * len(positions)
                continue
            if len(ids) <= self.layout.prefix.length:
                message = "a causal model needs something before [Y]; put text, a field or a slot there"
                raise self.template.error(message, len(self.template.pieces) - 1)
            if row.with_stop and end is not None:
                target_ids = (*target_ids, *end)
            elif row.with_stop and self.stop_id is not None:
                target_ids = (*target_ids, self.stop_id)
            # The logits one position before a token score it, so the last token is never read.
            positions = range(len(ids) - 1, len(ids) - 1 + max(1, len(target_ids)))
            ids += target_ids[:-1]
        prefix = self.layout.prefix.length  # none of an encoder-decoder model's
        return Example(
            tuple(ids[prefix:]),
            tuple(position - prefix for position in slots if position >= prefix),
            tuple(position - prefix for position in positions),
            target_ids,
            own,
            encoder_tokens=encoder_tokens,
            known=known,
            prefix_length=prefix,
            named_end=end is not None,
        )

    def _fits(self, row: _Row, example: Example) -> bool:
        ahead = row.target_tokens - 1 if self.kind not in FILLS_MASKS and row.target is None else 0
        own = example.length - example.encoder_tokens
        return max(own + ahead, example.encoder_tokens) <= self.max_length

    def _limit(self, rows: Sequence[_Row]) -> int:
        """Return the most characters to which fields without ``!`` can be truncated so that all rows of a record fit.

        Mostly the limit of the longest row is that of all. But fewer characters may be more tokens, so all are checked.
        """
        fields = [piece for piece in self._pieces if isinstance(piece, Field)]
        limit = max((len(rows[0].record[piece.name]) for piece in fields if not piece.keep), default=0)
        while True:
            pairs = zip(rows, self._fill(rows, limit), strict=True)
            misfits = [(example.length, row) for row, example in pairs if not self._fits(row, example)]
            if not misfits:
                return limit
            limit = self._limit_of(max(misfits, key=itemgetter(0))[1], limit)

    def _limit_of(self, row: _Row, high: int) -> int:
        """Return the most characters, fewer than ``high``, with which one row fits."""
        bare = self._fill([row], 0)[0]
        if not self._fits(row, bare):
            kept = sorted({piece.name for piece in self._pieces if isinstance(piece, Field) and piece.keep})
            raise TooLongError(
                f"{row.where} does not fit: slots ({self.slots + self.layout.prefix.slots}), literal text, target "
                f"({bare.own_tokens or row.target_tokens} tokens)"
                f"{' and kept fields ' + ', '.join(kept) if kept else ''} take {bare.length} tokens, and "
                f"a row has room for {self.max_length} (max_length, or what the model reads)"
                f"{' on either side' if bare.encoder_tokens else ''}; "
                + ("write {field} instead of {field!} to let it be shortened" if kept else "shorten them")
            )
        low, tried = 0, CHARACTERS_A_TOKEN * self.max_length  # most of a far longer text is never looked at
        while high - low > 1:
            middle = tried if low < tried and 2 * tried < high else (low + high) // 2
            if self._fits(row, self._fill([row], middle)[0]):
                low = middle
            else:
                high = middle
        return low


@functools.lru_cache(maxsize=1024)
def _notice_dropped(pattern: str, dropped: str, reader: str) -> None:
    """Warn once per template about text that the model will not see. A lone full stop is logged at INFO only."""
    if dropped:
        level = logging.WARNING if any(map(str.isalnum, dropped)) else logging.INFO
        logger.log(level, "a %s cannot see what comes after [Y]; dropped '%s' from '%s'", reader, dropped, pattern)


def _take_space(pieces: list[_Piece]) -> str:
    """Remove the space at the end of the last literal and return it."""
    last = pieces[-1] if pieces else None
    if not isinstance(last, MarkedText) or not last.characters.endswith(" "):
        return ""
    pieces[-1:] = [last.removesuffix(" ")] if last.characters != " " else []
    return " "


def _front(pieces: Sequence[object]) -> int:
    """Return the number of pieces of deep slots at the front; 0 if nothing but a space, which is the target's, is
    between them and the target.
    """
    for count, piece in enumerate(pieces):
        if not (isinstance(piece, PlacedSlots) and piece.deep):
            return 0 if isinstance(pieces[count + (piece == MarkedText(" "))], Target) else count
    return 0
