"""Answers without candidates: greedy, sampled or beam search for generative models, filled masks for masked ones."""

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ptuning.backbone.backbone import Backbone
from ptuning.config import GenerationSettings, derived_seed
from ptuning.engine.batch import Side, batches
from ptuning.engine.decoding.decoder import (
    Decoder,
    DecodingState,
    GeneratedText,
    GenerationInput,
    Hypothesis,
    LogitsProcessor,
    OutputSequence,
    StopCriteria,
    TextStreamer,
    distinct,
    group_by_prompt,
)
from ptuning.engine.forward import target_logits
from ptuning.engine.memory import in_parts
from ptuning.engine.soft_prompt import PromptBatch
from ptuning.errors import ConfigError, TemplateError, in_a_line
from ptuning.records import Record
from ptuning.template.encode import Example, TokenizedTemplate
from ptuning.template.segments import FILLS_MASKS


@dataclass
class _BeamSearch:
    """The search for one row. A score is a log-probability; that of an ended draft is divided by a power of its length.
    Both lists have at most W entries, best first.
    """

    width: int
    length_penalty: float
    ending: StopCriteria
    running: list[tuple[float, Hypothesis]] = field(default_factory=lambda: [(0.0, Hypothesis())])
    ended: list[tuple[float, Hypothesis]] = field(default_factory=list)

    def drafts(self, rows: int) -> list[Hypothesis]:
        """Return the drafts of a search's rows; one with fewer than W drafts repeats its last one."""
        running = [draft for _, draft in self.running]
        return running + running[-1:] * (rows - len(running))

    def grow(self, found: Sequence[tuple[float, Hypothesis, bool]]) -> list[int]:
        """Go on with the likeliest continuations (score, draft, whether it ends), sorted. Returns the places of those
        that run on; none if the search is over: nothing can become better than what has ended.
        """
        for score, draft, ends in found[: self.width]:
            if ends:
                self.ended.append((score / len(draft.ids) ** self.length_penalty, draft))
        self.ended = sorted(self.ended, key=lambda one: -one[0])[: self.width]
        places = [at for at, (_, _, ends) in enumerate(found) if not ends][: self.width]
        self.running = [found[at][:2] for at in places]
        if not places:
            return []
        score, draft = self.running[0]
        best = score / len(draft.ids) ** self.length_penalty
        return [] if len(self.ended) == self.width and best <= self.ended[-1][0] else places


def beam_search(
    rows: DecodingState, endings: Sequence[StopCriteria], settings: GenerationSettings, *, width: int
) -> list[list[Hypothesis]]:
    """Return for each row up to W ended drafts, best first. Rows do not depend on each other; one that is done leaves.
    Source: ``_beam_search`` of transformers 5, with ``early_stopping=False``.
    """
    chooses = LogitsProcessor(settings)
    searches = [_BeamSearch(width, settings.length_penalty, ending) for ending in endings]
    active, beams, device = searches, 1, rows.logits.device
    while active:
        log_probs = torch.log_softmax(rows.logits, dim=-1)  # (B * W, V)
        vocabulary = log_probs.shape[-1]
        # A row with fewer than W drafts repeats its last one, which leads nowhere.
        scores = [[score for score, _ in one.running] + [-math.inf] * (beams - len(one.running)) for one in active]
        drafts = [draft for one in active for draft in one.drafts(beams)]
        totals = chooses.scores(log_probs, rows.before, drafts).reshape(len(active), -1) + torch.tensor(
            scores, device=device
        ).repeat_interleave(vocabulary, dim=1)  # (B, W * V)
        # So many that W go on even if all tokens that end a text are among them.
        kept = min(max(2, 1 + len(endings[0].ids)) * width, totals.shape[-1])
        best, places = totals.topk(kept, dim=-1)  # (B, K) each
        parents, tokens = places // vocabulary, places % vocabulary
        firsts = torch.arange(0, len(log_probs), beams, device=device)[:, None]  # (B, 1)
        own = log_probs[parents + firsts, tokens]  # (B, K)
        full, after, chosen, going = rows.full(), [], [], []
        table = zip(best.tolist(), parents.tolist(), tokens.tolist(), own.tolist(), strict=True)
        for row, (search, lists) in enumerate(zip(active, table, strict=True)):
            entries = [one for one in zip(*lists, strict=True) if one[0] > -math.inf]
            grown = [search.running[parent][1].grown(token, value) for _, parent, token, value in entries]
            ends = [full[row * beams] or search.ending.reached(draft.ids) for draft in grown]
            on = search.grow([(one[0], draft, end) for one, draft, end in zip(entries, grown, ends, strict=True)])
            if on:
                on += on[-1:] * (width - len(on))
                after += [row * beams + entries[at][1] for at in on]
                chosen += [entries[at][2] for at in on]
                going.append(search)
        active, beams = going, width
        if active:
            rows.read(torch.tensor(chosen, device=device), after=torch.tensor(after, device=device))
    return [[draft for _, draft in search.ended] for search in searches]


def fill_masks(
    backbone: Backbone, rows: Sequence[GenerationInput], learned: PromptBatch, *, top_k: int, pad_side: Side
) -> list[list[GeneratedText]]:
    """Fill 1, 2, ... masks with their most likely tokens; the best mean log-probability wins."""
    every: list[list[tuple[float, GeneratedText]]] = [[] for _ in rows]
    fit: Sequence[int] = range(len(rows))
    for count in range(1, max((row.max_tokens for row in rows), default=0) + 1):
        examples: dict[int, Example] = {}
        for (bound, most), places in group_by_prompt([rows[index] for index in fit]):
            if count <= most:
                records = {fit[place]: rows[fit[place]].record for place in places}
                # A row without room for one mask is an error; without room for more it has no answer of that length.
                examples |= _with_masks(bound, records, count) if count > 1 else _contexts(bound, records, count)
        fit = sorted(examples)
        for part in batches([[examples[index]] for index in fit]):
            chosen = [fit[place] for place in part]
            group = [examples[index] for index in chosen]
            logits = target_logits(backbone, group, learned.take(chosen), pad_side=pad_side)  # (B * count, V)
            log_probs = torch.log_softmax(logits, dim=-1).view(len(chosen), count, -1)
            values, tokens = log_probs.topk(min(top_k, log_probs.shape[-1]), dim=-1)  # (B, count, K)
            for row, index in enumerate(chosen):
                for answer in range(values.shape[-1]) if count == 1 else (0,):
                    text = backbone.tokenizer.decode(tokens[row, :, answer].tolist()).strip()
                    total = float(values[row, :, answer].sum())
                    every[index].append((total / count, GeneratedText(text, total, count)))
    return [[written for _, written in sorted(found, key=lambda entry: -entry[0])[:top_k]] for found in every]


def _contexts(bound: TokenizedTemplate, records: Mapping[int, Record], count: int) -> dict[int, Example]:
    return dict(zip(records, bound.contexts(list(records.values()), target_tokens=count), strict=True))


def _with_masks(bound: TokenizedTemplate, records: Mapping[int, Record], count: int) -> dict[int, Example]:
    try:
        return _contexts(bound, records, count)
    except TemplateError:
        if len(records) == 1:
            return {}
    return {
        at: example for index, one in records.items() for at, example in _with_masks(bound, {index: one}, count).items()
    }


logger = logging.getLogger(__name__)


def generate_answers(
    backbone: Backbone,
    rows: Sequence[GenerationInput],
    learned: PromptBatch,
    *,
    settings: GenerationSettings,
    top_k: int,
    pad_side: Side,
) -> list[list[GeneratedText]]:
    """Answer rows with what the model writes, each with its own prompt. Targets are ignored.

    Returns for each row up to ``top_k`` different answers. The first one is that of the settings alone. Others come
    from a search of ``top_k`` beams if the settings have fewer, or from further draws. Raises a ConfigError for
    settings of writing if the model fills masks.
    """
    if backbone.kind in FILLS_MASKS:
        _check_unused(settings)
        return fill_masks(backbone, rows, learned, top_k=top_k, pad_side=pad_side)
    examples = generation_contexts(rows)

    def write(how: GenerationSettings) -> list[list[GeneratedText]]:
        return _generate(backbone, rows, examples, learned, settings=how)

    found = write(settings)
    if top_k > settings.num_beams:
        seeds = [derived_seed(settings.seed, "alternative", number) for number in range(1, top_k)]
        ways = [settings.adapted(seed=one) for one in seeds if settings.do_sample] or [
            settings.adapted(num_beams=top_k)
        ]
        others = [write(one) for one in ways]
        found = [
            distinct([rows[0][0], *(one for row in rows[1:] for one in row)])
            for rows in zip(found, *others, strict=True)
        ]
    return [row[:top_k] for row in found]


def stream_answer(
    backbone: Backbone, row: GenerationInput, learned: PromptBatch, *, settings: GenerationSettings
) -> Iterator[str]:
    """Write the answer to one row as :func:`generate_answers` does with one beam, and yield it piece by piece."""
    ending = StopCriteria.of(backbone, row, stop_strings=settings.stop_strings)
    examples = generation_contexts([row])
    company = BatchKey.of(backbone, examples[0], row.max_tokens)
    rows = DecodingState(backbone, examples, learned, keep=not company.turns)
    text = TextStreamer(ending)
    for (line,) in Decoder(backbone, rows, [OutputSequence(ending, settings)]).steps():
        if piece := text.piece(line.draft.ids, is_whole=line.ended):
            yield piece


def _generate(
    backbone: Backbone,
    asked: Sequence[GenerationInput],
    examples: Sequence[Example],
    learned: PromptBatch,
    *,
    settings: GenerationSettings,
) -> list[list[GeneratedText]]:
    """Return for each row the different answers of its beams, best first; with one beam only one."""
    endings = [StopCriteria.of(backbone, row, stop_strings=settings.stop_strings) for row in asked]
    found: list[list[GeneratedText]] = [[]] * len(examples)
    width = min(settings.num_beams, backbone.vocabulary)

    def write(chosen: Sequence[int], *, keep: bool) -> list[list[Hypothesis]]:
        rows = DecodingState(backbone, [examples[index] for index in chosen], learned.take(chosen), keep=keep)
        own = [endings[index] for index in chosen]
        if width > 1:
            return beam_search(rows, own, settings, width=width)
        lines = [OutputSequence(ending, settings) for ending in own]
        for _ in Decoder(backbone, rows, lines).steps():
            pass
        return [[line.draft] for line in lines]

    groups: dict[BatchKey, list[int]] = {}
    for index, (row, example) in enumerate(zip(asked, examples, strict=True)):
        groups.setdefault(BatchKey.of(backbone, example, row.max_tokens), []).append(index)
    for company, same in groups.items():
        for part in batches([[examples[index]] * width for index in same]):
            chosen = [same[place] for place in part]

            def write_some(
                places: Sequence[int], own: list[int] = chosen, keep: bool = not company.turns
            ) -> list[list[Hypothesis]]:
                return write([own[place] for place in places], keep=keep)

            lengths = [width * len(examples[index].token_ids) for index in chosen]
            drafts = itertools.chain.from_iterable(in_parts(write_some, lengths, backbone=backbone))
            for index, own_drafts in zip(chosen, drafts, strict=True):
                found[index] = distinct(map(endings[index].written, own_drafts))
    return found


def _check_unused(settings: GenerationSettings) -> None:
    unused = [name for name in settings.changed if name != "max_new_tokens"]
    if unused:
        raise ConfigError(f"{' and '.join(unused)}: for models that write; this one fills masks, all at once")


class BatchKey(NamedTuple):
    """Which rows can be continued in one batch: those with equal ones.

    All can, or without pads on the left those of one length. Rows on the two sides of a length at which positions
    change are apart (:meth:`Backbone.side`). A row that may cross it while it is written (``turns``) is with those of
    its own length, and reads everything anew for each token.
    """

    turns: bool
    is_long: bool
    length: int

    @classmethod
    def of(cls, backbone: Backbone, example: Example, max_tokens: int) -> BatchKey:
        """Return the company of a row whose answer has up to ``max_tokens``."""
        own = example.length - example.encoder_tokens
        is_long = backbone.side(own)
        turns = backbone.side(own + max_tokens - 1) != is_long
        return cls(turns, is_long, own if turns or not backbone.pads_left else 0)


def generation_contexts(rows: Sequence[GenerationInput]) -> list[Example]:
    """Fill the templates with room for the answers; a record that may not be truncated gets as much room as is left."""
    found: dict[int, Example] = {}
    for (bound, room), indices in group_by_prompt(rows):
        filled = _truncated_contexts(bound, [rows[index].record for index in indices], room=room)
        if any(one.shortened for one in filled):
            _warn_truncated(str(bound.template), bound.max_length, room)
        found |= dict(zip(indices, filled, strict=True))
    return [found[index] for index in range(len(rows))]


@functools.lru_cache(maxsize=1024)
def _warn_truncated(template: str, most: int, room: int) -> None:
    """Warn once for each template."""
    text = (
        "records are longer than the %d tokens of a row allow beside an answer of %d (max_new_tokens): fields are cut, "
        "or the oldest turns left out, for '%s'"
    )
    logger.warning(text, most, room, in_a_line(template))


def _truncated_contexts(bound: TokenizedTemplate, records: Sequence[Record], *, room: int) -> list[Example]:
    try:
        return bound.contexts(records, target_tokens=room)
    except TemplateError:
        bound.contexts(records, target_tokens=1)  # raises again if a record does not fit at all
        if len(records) == 1:
            return _truncated_contexts(bound, records, room=room // 2)
    return [example for record in records for example in _truncated_contexts(bound, [record], room=room)]
