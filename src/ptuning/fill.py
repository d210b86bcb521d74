"""Filling a template: record -> token ids, slot positions and scored positions, unpadded. Knows tokenizers only as
the :class:`Tokenizer` protocol, and no model.

The rules (docs/templates.md): text between two slots is tokenised as one string; a space belongs to the piece that
follows it; the target's ids are those it has in the filled sentence; a special token is one only where the template
itself writes it, never in a record; only fields without ``!`` are shortened.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal as OneOf
from typing import Protocol

from ptuning.errors import RecordError, TemplateError
from ptuning.records import TARGET_FIELD, Record
from ptuning.template import Field, Literal, Piece, Slots, Target, Template, TextSlots, render

logger = logging.getLogger(__name__)

Kind = OneOf["causal", "masked"]
Ids = tuple[int, ...]

# What stands at a slot's place until its vector is written in; any id would do, since its embedding is overwritten.
SLOT_PLACEHOLDER = 0
# A word put at the target's place when the target is unknown, to see how the text behind it is tokenised there.
ANCHOR_WORD = "a"


class Tokenizer(Protocol):
    """What filling needs of a tokenizer. ``encode`` adds no special tokens and treats special text as plain text."""

    prefix_ids: Ids  # what the tokenizer puts in front of a sentence, such as BOS or CLS
    suffix_ids: Ids  # what it puts behind one, such as SEP
    mask_id: int | None
    stop_id: int | None  # what ends a text; a prompt for a causal model learns to give it after the target
    special_ids: Mapping[str, int]  # special tokens by their text
    max_tokens: int  # longest row the model takes

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text."""
        ...


@dataclass(frozen=True)
class Example:
    """One filled template as token ids, unpadded.

    Args:
        token_ids: The row; :data:`SLOT_PLACEHOLDER` at the slots.
        slot_positions: Where slot vectors are written, in template order.
        logit_positions: Where the model's logits score ``target_ids`` (for a causal model one before each token).
        target_ids: The scored ids, followed by the stop token if the example teaches to stop.
        own_tokens: How many of ``target_ids`` are the target's own, without the stop token.
        shortened: Whether a field was shortened to fit.
    """

    token_ids: Ids
    slot_positions: Ids
    logit_positions: Ids
    target_ids: Ids
    own_tokens: int
    shortened: bool = False


@dataclass(frozen=True)
class _Text:
    text: str


@dataclass(frozen=True)
class _Ids:
    ids: Ids


@dataclass(frozen=True)
class _Slots:
    start_ids: tuple[int | None, ...]


@dataclass(frozen=True)
class _Gap:
    """The target with the text it is tokenised together with."""

    before: str
    target: str | None
    after: str


_Part = _Text | _Ids | _Slots | _Gap


class BoundTemplate:
    """A template together with the tokenizer and kind of one backbone.

    Args:
        template: The template; for a causal model everything behind the target is dropped with a notice.
        tokenizer: The backbone's tokenizer.
        kind: ``causal`` or ``masked``.

    Raises:
        TemplateError: If the words of ``[P:words]`` have no tokens, or a masked model has no mask token.
    """

    def __init__(self, template: Template, *, tokenizer: Tokenizer, kind: Kind) -> None:
        if kind == "causal":
            template, dropped = template.without_tail()
            _notice_dropped(str(template), dropped.strip())
        elif tokenizer.mask_id is None:
            raise TemplateError("this masked model's tokenizer has no mask token, so [Y] has no place in its input")
        self.template = template
        self.tokenizer = tokenizer
        self.kind = kind
        self._pieces = _spaces_to_followers(template.pieces)
        self._slot_starts = self._tokenise_slots()

    @property
    def slot_start_ids(self) -> tuple[int | None, ...]:
        """For each slot, in template order, the token whose embedding it starts at; None for a random start."""
        return tuple(start for starts in self._slot_starts for start in starts)

    @property
    def slots(self) -> int:
        """Number of slots P."""
        return sum(map(len, self._slot_starts))

    def check_fields(self, record: Record, *, where: str = "the record") -> None:
        """Check that the record has every field of the template.

        Raises:
            TemplateError: At the first field it lacks; names the record's fields.
        """
        for piece in self.template.pieces:
            if isinstance(piece, Field) and piece.name not in record:
                have = ", ".join(sorted(record)) or "none"
                raise TemplateError(
                    f"no field '{piece.name}' in {where}; its fields: {have}",
                    pattern=str(self.template),
                    column=_column(self.template, piece),
                )

    def examples(
        self,
        records: Sequence[Record],
        *,
        targets: Sequence[str] | None = None,
        with_stop: bool = False,
        source: str = "record",
    ) -> list[Example]:
        """Fill the template with records and their targets.

        Args:
            records: N records.
            targets: N targets; by default each record's own.
            with_stop: Whether a causal model's stop token follows the target among the scored tokens.
            source: What the records are called in messages.

        Returns:
            N examples, in the order of the records.

        Raises:
            TemplateError: If a record lacks a field, or slots, literals, target and kept fields do not fit.
            RecordError: If a target is missing or has no tokens.
        """
        if targets is None:
            targets = [record.get(TARGET_FIELD, "") for record in records]
        for number, target in enumerate(targets, start=1):
            if not target.strip():
                raise RecordError(f"{source} {number} has no target (field '{TARGET_FIELD}')")
        return self._build(records, targets, with_stop=with_stop, masks=0, source=source)

    def contexts(self, records: Sequence[Record], *, target_tokens: int = 1, source: str = "record") -> list[Example]:
        """Fill the template without targets: for a causal model up to the target, for a masked one with
        ``target_tokens`` masks at its place. ``target_ids`` is empty.

        Raises:
            TemplateError: As for :meth:`examples`.
        """
        return self._build(records, [None] * len(records), with_stop=False, masks=target_tokens, source=source)

    def describe(self, record: Record) -> list[tuple[str, int | None]]:
        """Return (part, token id) for each position of the filled record, parts being ``special``, ``slot``,
        ``literal``, ``field NAME`` or ``target``. The id of a slot is its start's, None if it starts at random.
        """
        example = (self.examples if record.get(TARGET_FIELD, "").strip() else self.contexts)([record])[0]
        ids = list(example.token_ids)
        shift = 1 if self.kind == "causal" else 0
        targets = {position + shift for position in example.logit_positions}
        if self.kind == "causal" and example.target_ids:
            ids.append(example.target_ids[-1])  # scored, never read
        slots = dict(zip(example.slot_positions, self.slot_start_ids, strict=True))
        names = self._names_by_position(record, len(ids), slots, targets)
        shown: list[tuple[str, int | None]] = []
        for position, token_id in enumerate(ids):
            if position in slots:
                shown.append(("slot", slots[position]))
            else:
                shown.append((names[position], token_id))
        return shown

    def _names_by_position(
        self, record: Record, length: int, slots: Mapping[int, int | None], targets: set[int]
    ) -> dict[int, str]:
        # A position's name follows from how many text tokens stand before it: fill ever longer prefixes of the pieces.
        names = dict.fromkeys(targets, "target")
        body = [p for p in range(len(self.tokenizer.prefix_ids), length) if p not in slots and p not in targets]
        names |= {position: "special" for position in range(length) if position not in names and position not in slots}
        text = [self._piece_text(piece, record) for piece in self._pieces]
        at, run, run_start = 0, "", 0
        for piece, written in zip(self._pieces, text, strict=True):
            if isinstance(piece, Slots | TextSlots | Target):
                run, run_start = "", at
                continue
            run += written
            end = run_start + sum(len(ids) for ids in self._encode_literal_parts(run))
            name = f"field {piece.name}" if isinstance(piece, Field) else "literal"
            for position in body[at:end]:
                names[position] = name
            at = max(at, end)
        return names

    def _piece_text(self, piece: Piece, record: Record) -> str:
        if isinstance(piece, Literal):
            return piece.text
        return record[piece.name] if isinstance(piece, Field) else ""

    def _encode_literal_parts(self, text: str) -> list[Ids]:
        parts = self._split_specials(text)
        encoded = iter(self.tokenizer.encode([part.text for part in parts if isinstance(part, _Text)]))
        return [part.ids if isinstance(part, _Ids) else tuple(next(encoded)) for part in parts]

    def _tokenise_slots(self) -> list[tuple[int | None, ...]]:
        starts: list[tuple[int | None, ...]] = []
        for piece in self._pieces:
            if isinstance(piece, Slots):
                starts.append((None,) * piece.count)
            elif isinstance(piece, TextSlots):
                ids = self.tokenizer.encode([piece.text])[0]
                if not ids:
                    raise TemplateError(
                        "the words of this piece have no tokens", pattern=str(self.template), column=piece.column
                    )
                starts.append(tuple(ids))
        return starts

    def _build(
        self, records: Sequence[Record], targets: Sequence[str | None], *, with_stop: bool, masks: int, source: str
    ) -> list[Example]:
        for number, record in enumerate(records, start=1):
            self.check_fields(record, where=f"{source} {number}")
        parts = [self._parts(record, target) for record, target in zip(records, targets, strict=True)]
        encoded = self._encode_all(parts)
        examples = []
        for number, (record, target, row) in enumerate(zip(records, targets, parts, strict=True), start=1):
            example = self._assemble(row, encoded, with_stop=with_stop, masks=masks, where=f"{source} {number}")
            if self._length(example) > self.tokenizer.max_tokens:
                example = self._shorten(record, target, with_stop=with_stop, masks=masks, where=f"{source} {number}")
            examples.append(example)
        return examples

    def _length(self, example: Example) -> int:
        # The stop token is scored but never read, so the target's last token needs no room of its own.
        return len(example.token_ids)

    def _encode_all(self, rows: Iterable[list[_Part]]) -> dict[str, list[int]]:
        texts: dict[str, None] = {}
        for part in (part for row in rows for part in row):
            if isinstance(part, _Text):
                texts[part.text] = None
            elif isinstance(part, _Gap):
                texts |= dict.fromkeys(_gap_texts(part))
        wanted = list(texts)
        return dict(zip(wanted, self.tokenizer.encode(wanted), strict=True)) if wanted else {}

    def _parts(self, record: Record, target: str | None) -> list[_Part]:
        """Cut a filled record at its slots, at special tokens of the template, and at the target."""
        parts: list[_Part] = []
        text = ""
        starts = iter(self._slot_starts)
        gap: tuple[int, str] | None = None  # index among parts, and the text in front of the target
        for piece in self._pieces:
            if isinstance(piece, Literal):
                *fixed, last = self._split_specials(piece.text) or [_Text("")]
                for part in fixed:
                    if isinstance(part, _Text):
                        text += part.text
                    else:
                        parts, text, gap = self._close(parts, text, target, gap)
                        parts.append(part)
                if isinstance(last, _Text):
                    text += last.text
                else:
                    parts, text, gap = self._close(parts, text, target, gap)
                    parts.append(last)
            elif isinstance(piece, Field):
                text += record[piece.name]
            elif isinstance(piece, Target):
                gap = (len(parts), text)
                text = ""
            else:
                parts, text, gap = self._close(parts, text, target, gap)
                parts.append(_Slots(next(starts)))
        return self._close(parts, text, target, gap)[0]

    def _close(
        self, parts: list[_Part], text: str, target: str | None, gap: tuple[int, str] | None
    ) -> tuple[list[_Part], str, None]:
        if gap is not None:
            parts.append(_Gap(gap[1], target, text))
        elif text:
            parts.append(_Text(text))
        return parts, "", None

    def _split_specials(self, text: str) -> list[_Text | _Ids]:
        found: list[_Text | _Ids] = []
        while text:
            hits = [(text.find(token), -len(token), token) for token in self.tokenizer.special_ids if token in text]
            if not hits:
                return [*found, _Text(text)]
            at, _, token = min(hits)
            if at:
                found.append(_Text(text[:at]))
            found.append(_Ids((self.tokenizer.special_ids[token],)))
            text = text[at + len(token) :]
        return found

    def _assemble(
        self, parts: Sequence[_Part], encoded: Mapping[str, list[int]], *, with_stop: bool, masks: int, where: str
    ) -> Example:
        ids: list[int] = list(self.tokenizer.prefix_ids)
        slots: list[int] = []
        positions: list[int] = []
        target_ids: Ids = ()
        own = 0
        for part in parts:
            if isinstance(part, _Ids):
                ids += part.ids
            elif isinstance(part, _Text):
                ids += encoded[part.text]
            elif isinstance(part, _Slots):
                slots += range(len(ids), len(ids) + len(part.start_ids))
                ids += [SLOT_PLACEHOLDER] * len(part.start_ids)
            else:
                before, target_ids, after = _cut_target(part, encoded)
                if part.target is not None and not target_ids:
                    raise RecordError(f"{where}: the target {part.target!r} has no tokens of its own there")
                own = len(target_ids)
                ids += before
                if self.kind == "causal":
                    if not ids:
                        raise TemplateError(
                            "a causal model needs something in front of [Y]; put text, a field or a slot there",
                            pattern=str(self.template),
                            column=0,
                        )
                    if with_stop and self.tokenizer.stop_id is not None:
                        target_ids = (*target_ids, self.tokenizer.stop_id)
                    positions = list(range(len(ids) - 1, len(ids) - 1 + max(1, len(target_ids))))
                    ids += target_ids[: len(target_ids) - 1] if target_ids else ()
                else:
                    assert self.tokenizer.mask_id is not None
                    count = own or masks
                    positions = list(range(len(ids), len(ids) + count))
                    ids += [self.tokenizer.mask_id] * count
                    ids += after
        if self.kind == "masked":
            ids += self.tokenizer.suffix_ids
        return Example(tuple(ids), tuple(slots), tuple(positions), target_ids, own)

    def _shorten(self, record: Record, target: str | None, *, with_stop: bool, masks: int, where: str) -> Example:
        """Cut every shortenable field to the same number of characters, the largest that fits."""
        names = {piece.name for piece in self._pieces if isinstance(piece, Field) and not piece.keep}

        def attempt(characters: int) -> Example:
            cut = {name: text[:characters] if name in names else text for name, text in record.items()}
            parts = self._parts(cut, target)
            return self._assemble(parts, self._encode_all([parts]), with_stop=with_stop, masks=masks, where=where)

        best = attempt(0)
        if self._length(best) > self.tokenizer.max_tokens:
            kept = sorted({piece.name for piece in self._pieces if isinstance(piece, Field)} - names)
            raise TemplateError(
                f"{where} does not fit: slots ({self.slots}), literal text, target ({max(best.own_tokens, masks)} tokens)"
                f"{' and kept fields ' + ', '.join(kept) if kept else ''} take {self._length(best)} tokens, and the "
                f"model reads {self.tokenizer.max_tokens}; "
                + ("write {field} instead of {field!} to let it be shortened" if kept else "use fewer of them")
            )
        low, high = 0, max(len(record[name]) for name in names)
        while high - low > 1:
            middle = (low + high) // 2
            example = attempt(middle)
            if self._length(example) <= self.tokenizer.max_tokens:
                low, best = middle, example
            else:
                high = middle
        return Example(
            best.token_ids, best.slot_positions, best.logit_positions, best.target_ids, best.own_tokens, shortened=True
        )


@functools.lru_cache(maxsize=1024)
def _notice_dropped(pattern: str, dropped: str) -> None:
    """Say once per template what a causal model does not get to see; a lone full stop is no news to anybody."""
    if dropped:
        level = logging.WARNING if any(map(str.isalnum, dropped)) else logging.INFO
        logger.log(level, "a causal model cannot see what stands behind [Y]; dropped '%s' from '%s'", dropped, pattern)


def _spaces_to_followers(pieces: Sequence[Piece]) -> tuple[Piece, ...]:
    """Move a space in front of slots to them: into the words of text slots, away before random ones."""
    moved: list[Piece] = []
    for piece in pieces:
        last = moved[-1] if moved else None
        if isinstance(piece, Slots | TextSlots) and isinstance(last, Literal) and last.text.endswith(" "):
            moved.pop()
            if last.text != " ":
                moved.append(Literal(last.text[:-1], last.column))
            if isinstance(piece, TextSlots):
                piece = TextSlots(" " + piece.text, piece.column)
        moved.append(piece)
    return tuple(moved)


def _column(template: Template, wanted: Piece) -> int:
    """Return where a piece stands in the template as it is written."""
    before = template.pieces[: next(i for i, piece in enumerate(template.pieces) if piece is wanted)]
    return len(render(before))


def _gap_texts(gap: _Gap) -> list[str]:
    before, middle, after = _gap_strings(gap)
    return [before, before + middle, before + middle + after, after]


def _gap_strings(gap: _Gap) -> tuple[str, str, str]:
    space = " " if gap.before.endswith(" ") else ""
    before = gap.before[: len(gap.before) - len(space)]
    return before, space + (gap.target if gap.target is not None else ANCHOR_WORD), gap.after


def _cut_target(gap: _Gap, encoded: Mapping[str, list[int]]) -> tuple[Ids, Ids, Ids]:
    """Return the ids before, of and behind the target.

    The cuts are found by tokenising ever longer prefixes of the sentence rather than by character offsets, which
    tokenizers trim and normalise in different ways.
    """
    before, middle, after = _gap_strings(gap)
    full = encoded[before + middle + after]
    start = _common(encoded[before], full) if before else 0
    end = _common(encoded[before + middle], full) if after else len(full)
    if gap.target is None:
        behind = full[end:] if end > start else encoded[after]
        return tuple(encoded[before]) if before else (), (), tuple(behind)
    if end <= start:
        # The target's last token runs on into the text behind it, as in "[Y]s"; then that whole token is the target.
        end = len(full) - _common(encoded[after][::-1], full[start:][::-1])
    return tuple(full[:start]), tuple(full[start:end]), tuple(full[end:])


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many ids two sequences share from their beginning."""
    for index, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return index
    return min(len(one), len(other))
