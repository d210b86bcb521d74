"""Answers without candidates: greedy, by beam search or by sampling for models that write, filled masks for others."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ptuning.backbone.backbone import Backbone
from ptuning.config import GenerationSettings, derived_seed
from ptuning.engine.batch import Side, batches
from ptuning.engine.learned import Learned
from ptuning.engine.memory import in_parts
from ptuning.engine.writing.beams import beam_search
from ptuning.engine.writing.continuation import Continuation
from ptuning.engine.writing.ending import Draft, Ending, Growing, OpenRow, Written, alike, different
from ptuning.engine.writing.masks import fill_masks
from ptuning.engine.writing.writer import Line, Writer
from ptuning.errors import ConfigError, TemplateError, in_a_line
from ptuning.records import Record
from ptuning.template.encode import Example, TokenizedTemplate
from ptuning.template.segments import FILLS_MASKS

logger = logging.getLogger(__name__)


def write_answers(
    backbone: Backbone,
    rows: Sequence[OpenRow],
    learned: Learned,
    *,
    settings: GenerationSettings,
    top_k: int,
    pad_side: Side,
) -> list[list[Written]]:
    """Answer rows with what the model writes, each with its own prompt. Targets are ignored.

    Returns for each row up to ``top_k`` different answers. The first one is that of the settings alone. Others come
    from a search of ``top_k`` beams if the settings have fewer, or from further draws. Raises a ConfigError for
    settings of writing if the model fills masks.
    """
    if backbone.kind in FILLS_MASKS:
        _check_unused(settings)
        return fill_masks(backbone, rows, learned, top_k=top_k, pad_side=pad_side)
    examples = contexts(rows)

    def write(how: GenerationSettings) -> list[list[Written]]:
        return _write(backbone, rows, examples, learned, settings=how)

    found = write(settings)
    if top_k > settings.num_beams:
        seeds = [derived_seed(settings.seed, "alternative", number) for number in range(1, top_k)]
        ways = [settings.adapted(seed=one) for one in seeds if settings.do_sample] or [
            settings.adapted(num_beams=top_k)
        ]
        others = [write(one) for one in ways]
        found = [
            different([rows[0][0], *(one for row in rows[1:] for one in row)])
            for rows in zip(found, *others, strict=True)
        ]
    return [row[:top_k] for row in found]


def stream_answer(backbone: Backbone, row: OpenRow, learned: Learned, *, settings: GenerationSettings) -> Iterator[str]:
    """Write the answer to one row as :func:`write_answers` does with one beam, and yield it piece by piece."""
    ending = Ending.of(backbone, row, stop_strings=settings.stop_strings)
    examples = contexts([row])
    company = Company.of(backbone, examples[0], row.max_tokens)
    rows = Continuation(backbone, examples, learned, keep=not company.turns)
    text = Growing(ending)
    for (line,) in Writer(backbone, rows, [Line(ending, settings)]).steps():
        if piece := text.piece(line.draft.ids, is_whole=line.ended):
            yield piece


def _write(
    backbone: Backbone,
    asked: Sequence[OpenRow],
    examples: Sequence[Example],
    learned: Learned,
    *,
    settings: GenerationSettings,
) -> list[list[Written]]:
    """Return for each row the different answers of its beams, best first; with one beam only one."""
    endings = [Ending.of(backbone, row, stop_strings=settings.stop_strings) for row in asked]
    found: list[list[Written]] = [[]] * len(examples)
    width = min(settings.num_beams, backbone.vocabulary)

    def write(chosen: Sequence[int], *, keep: bool) -> list[list[Draft]]:
        rows = Continuation(backbone, [examples[index] for index in chosen], learned.take(chosen), keep=keep)
        own = [endings[index] for index in chosen]
        if width > 1:
            return beam_search(rows, own, settings, width=width)
        lines = [Line(ending, settings) for ending in own]
        for _ in Writer(backbone, rows, lines).steps():
            pass
        return [[line.draft] for line in lines]

    groups: dict[Company, list[int]] = {}
    for index, (row, example) in enumerate(zip(asked, examples, strict=True)):
        groups.setdefault(Company.of(backbone, example, row.max_tokens), []).append(index)
    for company, same in groups.items():
        for part in batches([[examples[index]] * width for index in same]):
            chosen = [same[place] for place in part]

            def write_some(
                places: Sequence[int], own: list[int] = chosen, keep: bool = not company.turns
            ) -> list[list[Draft]]:
                return write([own[place] for place in places], keep=keep)

            lengths = [width * len(examples[index].token_ids) for index in chosen]
            drafts = itertools.chain.from_iterable(in_parts(write_some, lengths, backbone=backbone))
            for index, own_drafts in zip(chosen, drafts, strict=True):
                found[index] = different(map(endings[index].written, own_drafts))
    return found


def _check_unused(settings: GenerationSettings) -> None:
    unused = [name for name in settings.changed if name != "max_new_tokens"]
    if unused:
        raise ConfigError(f"{' and '.join(unused)}: for models that write; this one fills masks, all at once")


class Company(NamedTuple):
    """Which rows can be continued in one batch: those with equal ones.

    All can, or without pads on the left those of one length. Rows on the two sides of a length at which positions
    change are apart (:meth:`Backbone.side`). A row that may cross it while it is written (``turns``) is with those of
    its own length, and reads everything anew for each token.
    """

    turns: bool
    is_long: bool
    length: int

    @classmethod
    def of(cls, backbone: Backbone, example: Example, max_tokens: int) -> Company:
        """Return the company of a row whose answer has up to ``max_tokens``."""
        own = example.length - example.encoder_tokens
        is_long = backbone.side(own)
        turns = backbone.side(own + max_tokens - 1) != is_long
        return cls(turns, is_long, own if turns or not backbone.pads_left else 0)


def contexts(rows: Sequence[OpenRow]) -> list[Example]:
    """Fill the templates with room for the answers; a record that may not be truncated gets as much room as is left."""
    found: dict[int, Example] = {}
    for (bound, room), indices in alike(rows):
        filled = _with_room(bound, [rows[index].record for index in indices], room=room)
        if any(one.shortened for one in filled):
            _say_shortened(str(bound.template), bound.max_length, room)
        found |= dict(zip(indices, filled, strict=True))
    return [found[index] for index in range(len(rows))]


@functools.lru_cache(maxsize=1024)
def _say_shortened(template: str, most: int, room: int) -> None:
    """Warn once for each template."""
    text = (
        "records are longer than the %d tokens of a row allow beside an answer of %d (max_new_tokens): fields are cut, "
        "or the oldest turns left out, for '%s'"
    )
    logger.warning(text, most, room, in_a_line(template))


def _with_room(bound: TokenizedTemplate, records: Sequence[Record], *, room: int) -> list[Example]:
    try:
        return bound.contexts(records, target_tokens=room)
    except TemplateError:
        bound.contexts(records, target_tokens=1)  # raises again if a record does not fit at all
        if len(records) == 1:
            return _with_room(bound, records, room=room // 2)
    return [example for record in records for example in _with_room(bound, [record], room=room)]
