"""Using prompts: logits of targets, ranked candidates, label words and written answers, many prompts in one batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ptuning.backbone import Backbone
from ptuning.batch import Side, collate
from ptuning.errors import PromptError, RecordError
from ptuning.fill import BoundTemplate, Example
from ptuning.model import inject, target_logits
from ptuning.objective import Item, Normalise, candidate_item, class_scores, score_choices
from ptuning.prompt import Prompt
from ptuning.records import Record, as_records

# Bounds of one forward pass: tokens read, and (rows x vocabulary) of float32 logits kept.
MAX_BATCH_TOKENS = 4096
MAX_BATCH_POSITIONS = 256


@dataclass(frozen=True)
class Candidate:
    """A possible answer with its total natural log-probability."""

    text: str
    log_prob: float


@dataclass(frozen=True)
class Prediction:
    """The answer to one record.

    Args:
        text: The likeliest candidate, label or written answer.
        candidates: The likeliest candidates, best first; the first is the answer.
        tokens: Number of tokens of a written answer, which a masked model chose; None for candidates and labels.
    """

    text: str
    candidates: tuple[Candidate, ...]
    tokens: int | None = None

    @property
    def log_prob(self) -> float:
        """Log-probability of the answer."""
        return self.candidates[0].log_prob


class PromptModel:
    """A backbone in use with prompts.

    Args:
        backbone: The language model; nothing of it changes, and without a prompt it answers as before.
        force: Accept prompts of another backbone of the same width.
        pad_side: Where pads stand in a batch; answers do not depend on it.

    Example:
        >>> model = PromptModel(load_backbone())                                            # doctest: +SKIP
        >>> model.predict([{"x": "Kenya"}], Prompt.load("capitals"))[0].text                # doctest: +SKIP
        'Nairobi'
    """

    def __init__(self, backbone: Backbone, *, force: bool = False, pad_side: Side = "right") -> None:
        self.backbone = backbone
        self.force = force
        self.pad_side: Side = pad_side

    @torch.no_grad()
    def target_logits(self, records: Sequence[Record], prompts: Prompt | Sequence[Prompt]) -> list[Tensor]:
        """Return the logits that score each record's target.

        Args:
            records: N records with targets.
            prompts: One prompt for all rows, or one per row; a prompt without slots is a manual prompt.

        Returns:
            N tensors of shape (target tokens, V), float32, on the CPU.

        Raises:
            PromptError: If a prompt belongs to another backbone, or there is not one prompt per record.
            RecordError: If a record has no target.
        """
        table = _Table(self.backbone, _per_row(prompts, len(records)), force=self.force)
        rows: list[Example] = [Example((), (), (), (), 0)] * len(records)
        for bound, indices in table.groups():
            found = bound.examples([as_records(records)[index] for index in indices])
            for index, example in zip(indices, found, strict=True):
                rows[index] = example
        logits: list[Tensor] = [torch.empty(0)] * len(rows)
        for chosen in _batches([[row] for row in rows]):
            found_logits = self._run([rows[index] for index in chosen], list(chosen), table)
            parts = found_logits.cpu().split([len(rows[index].logit_positions) for index in chosen])
            for index, part in zip(chosen, parts, strict=True):
                logits[index] = part  # (target tokens, V)
        return logits

    @torch.no_grad()
    def rank(
        self,
        records: Sequence[Record],
        prompts: Prompt | Sequence[Prompt],
        candidates: Sequence[str],
        *,
        normalise: Normalise = "sum",
    ) -> list[list[Candidate]]:
        """Score a closed set of answers for each record.

        Args:
            records: N records; their targets are not looked at.
            prompts: One for all rows, or one per row.
            candidates: C different texts.
            normalise: Rank by total log-probability (``sum``), or by its mean over a candidate's tokens (``mean``).

        Returns:
            N lists of C candidates, best first; equal ones in the order given.

        Raises:
            RecordError: If there are no candidates, or two that are equal.
        """
        _check_candidates(candidates)
        table = _Table(self.backbone, _per_row(prompts, len(records)), force=self.force)
        items = self._items(as_records(records), table, list(candidates))
        ranked: list[list[Candidate]] = [[]] * len(items)
        for chosen in _batches([item.inputs for item in items]):
            group = [items[index] for index in chosen]
            examples = [example for item in group for example in item.inputs]
            owners = [index for index in chosen for _ in items[index].inputs]
            scored = score_choices(group, self._run(examples, owners, table))
            scores = scored.log_probs / scored.lengths if normalise == "mean" else scored.log_probs
            for index, values in zip(chosen, scores.cpu().split(scored.per_item), strict=True):
                listed = [Candidate(text, value) for text, value in zip(candidates, values.tolist(), strict=True)]
                ranked[index] = sorted(listed, key=lambda candidate: -candidate.log_prob)
        return ranked

    @torch.no_grad()
    def classify(
        self, records: Sequence[Record], prompt: Prompt, *, normalise: Normalise = "sum"
    ) -> list[list[Candidate]]:
        """Score the labels of a prompt with label words; log-probabilities are normalised over the labels.

        Returns:
            N lists of the labels, best first.

        Raises:
            PromptError: If the prompt has no label words.
        """
        labels = prompt.label_words
        if labels is None:
            raise PromptError("the prompt has no label words; give candidates instead")
        table = _Table(self.backbone, [prompt] * len(records), force=self.force)
        words = [word for _, word in labels.flat]
        owners = tuple(label for label, _ in labels.flat)
        items = [Item(item.inputs, item.choices, owners, 0) for item in self._items(as_records(records), table, words)]
        found: list[list[Candidate]] = [[]] * len(items)
        for chosen in _batches([item.inputs for item in items]):
            group = [items[index] for index in chosen]
            examples = [example for item in group for example in item.inputs]
            scored = score_choices(group, self._run(examples, [i for i in chosen for _ in items[i].inputs], table))
            scores = torch.log_softmax(class_scores(group, scored, normalise=normalise), dim=-1).cpu()  # (I, K)
            for index, values in zip(chosen, scores.tolist(), strict=True):
                listed = [Candidate(label, value) for label, value in zip(labels.labels, values, strict=True)]
                found[index] = sorted(listed, key=lambda candidate: -candidate.log_prob)
        return found

    @torch.no_grad()
    def predict(
        self,
        records: Sequence[Record],
        prompt: Prompt | Sequence[Prompt],
        candidates: Sequence[str] | None = None,
        *,
        top_k: int = 1,
        max_tokens: int | None = None,
        normalise: Normalise = "sum",
    ) -> list[Prediction]:
        """Answer records.

        With candidates or label words the likeliest is chosen. Without, a causal model writes until it stops (beam
        search of width ``top_k``); a masked model fills 1, 2, ... masks and takes the length whose tokens are likeliest
        on average.

        Args:
            records: N records; targets are not needed and not looked at.
            prompt: One for all rows, or one per row.
            candidates: A closed set of answers.
            top_k: How many candidates to keep.
            max_tokens: Longest written answer; by default a little more than the longest target seen in training.
            normalise: How candidates and label words of several tokens are scored.

        Returns:
            N predictions.
        """
        if not records:
            return []
        if top_k < 1:
            raise RecordError(f"top_k is {top_k}; it must be 1 or more")
        if candidates is not None:
            ranked = self.rank(records, prompt, candidates, normalise=normalise)
            return [Prediction(row[0].text, tuple(row[:top_k])) for row in ranked]
        prompts = _per_row(prompt, len(records))
        answers: dict[int, Prediction] = {}
        for one, indices in _by_prompt(prompts):
            rows = [as_records(records)[index] for index in indices]
            if one.label_words is not None:
                found = [
                    Prediction(row[0].text, tuple(row[:top_k])) for row in self.classify(rows, one, normalise=normalise)
                ]
            else:
                found = self._write(rows, one, top_k=top_k, max_tokens=max_tokens or one.target_tokens + 2)
            answers |= dict(zip(indices, found, strict=True))
        return [answers[index] for index in range(len(records))]

    def _write(self, records: Sequence[Record], prompt: Prompt, *, top_k: int, max_tokens: int) -> list[Prediction]:
        bound = prompt.bind(self.backbone, force=self.force)
        if self.backbone.kind == "masked":
            return self._fill_masks(records, prompt, bound, top_k=top_k, max_tokens=max_tokens)
        examples = bound.contexts(records)
        found: list[Prediction] = [Prediction("", ())] * len(records)
        for chosen in _batches([[example] * top_k for example in examples]):
            written = self._beams([examples[index] for index in chosen], prompt, width=top_k, max_tokens=max_tokens)
            for index, beams in zip(chosen, written, strict=True):
                found[index] = Prediction(beams[0][0].text, tuple(beam for beam, _ in beams), tokens=beams[0][1])
        return found

    def _beams(
        self, examples: Sequence[Example], prompt: Prompt, *, width: int, max_tokens: int
    ) -> list[list[tuple[Candidate, int]]]:
        """Beam search over cached keys and values; the slots enter once, with the text (width 1 is greedy decoding).

        Returns:
            For each of B rows ``width`` answers with their number of tokens, best first.
        """
        backbone, rows = self.backbone, len(examples)
        stop = backbone.tokenizer.stop_id
        batch = collate(examples, slots=[prompt.slots] * rows, pad_side="left").to(backbone.device)
        embeddings = inject(backbone.embed(batch.token_ids), _vectors(prompt), batch)
        mask, positions = batch.mask, batch.mask.sum(dim=1)  # (B, T), (B,)
        logits, cache = backbone.run(
            embeddings,
            mask=mask,
            positions=batch.positions,
            rows=batch.logit_rows,
            cols=batch.logit_cols,
            keep_cache=True,
        )
        scores = torch.log_softmax(logits[:, : backbone.vocabulary], dim=-1)  # (B, V)
        best, tokens = scores.topk(width, dim=-1)  # (B, W)
        texts = [[[int(token)] for token in row] for row in tokens.tolist()]
        assert cache is not None
        backbone.reorder(cache, torch.arange(rows, device=backbone.device).repeat_interleave(width))
        mask, positions = (value.repeat_interleave(width, dim=0) for value in (mask, positions))
        ended = tokens == stop if stop is not None else torch.zeros_like(tokens, dtype=torch.bool)  # (B, W)
        for _ in range(max_tokens - 1):
            if bool(ended.all()) or mask.shape[1] >= backbone.tokenizer.max_tokens:
                break
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)  # (B * W, T + 1)
            every = torch.arange(len(mask), device=backbone.device)
            logits, cache = backbone.run(
                backbone.embed(tokens.reshape(-1, 1)),
                mask=mask,
                positions=positions[:, None],
                rows=every,
                cols=torch.zeros_like(every),
                cache=cache,
                keep_cache=True,
            )
            positions = positions + 1
            step = torch.log_softmax(logits[:, : backbone.vocabulary], dim=-1).view(rows, width, -1)  # (B, W, V)
            # An ended beam goes on as itself: one continuation (the stop token again) at no cost.
            step = step.masked_fill(ended[..., None], -torch.inf)
            if stop is not None:
                step[..., stop] = step[..., stop].masked_fill(ended, 0.0)
            best, flat = (best[..., None] + step).flatten(1).topk(width, dim=-1)  # (B, W)
            parents, tokens = flat // step.shape[-1], flat % step.shape[-1]  # (B, W)
            ended = ended.gather(1, parents)
            texts = [
                [
                    texts[row][int(parent)] + ([] if over else [int(token)])
                    for parent, token, over in zip(parents[row], tokens[row], ended[row], strict=True)
                ]
                for row in range(rows)
            ]
            if stop is not None:
                ended = ended | (tokens == stop)
            assert cache is not None
            backbone.reorder(cache, (parents + torch.arange(rows, device=parents.device)[:, None] * width).flatten())
        return [
            [self._finished(ids, float(value), stop) for ids, value in zip(texts[row], best[row].tolist(), strict=True)]
            for row in range(rows)
        ]

    def _finished(self, ids: Sequence[int], log_prob: float, stop: int | None) -> tuple[Candidate, int]:
        own = [token for token in ids if token != stop]
        return Candidate(self.backbone.tokenizer.decode(own).strip(), log_prob), len(own)

    def _fill_masks(
        self, records: Sequence[Record], prompt: Prompt, bound: BoundTemplate, *, top_k: int, max_tokens: int
    ) -> list[Prediction]:
        """Fill 1 to ``max_tokens`` masks, each with its likeliest token, and keep the likeliest length on average."""
        every: list[list[tuple[float, Candidate, int]]] = [[] for _ in records]
        for count in range(1, max_tokens + 1):
            examples = bound.contexts(records, target_tokens=count)
            table = _Table(self.backbone, [prompt] * len(records), force=self.force)
            for chosen in _batches([[example] for example in examples]):
                logits = self._run([examples[index] for index in chosen], chosen, table)  # (B * count, V)
                log_probs = torch.log_softmax(logits[:, : self.backbone.vocabulary], dim=-1).view(
                    len(chosen), count, -1
                )
                values, tokens = log_probs.topk(min(top_k, log_probs.shape[-1]), dim=-1)  # (B, count, K)
                for row, index in enumerate(chosen):
                    for answer in range(values.shape[-1]) if count == 1 else (0,):
                        text = self.backbone.tokenizer.decode(tokens[row, :, answer].tolist()).strip()
                        total = float(values[row, :, answer].sum())
                        every[index].append((total / count, Candidate(text, total), count))
        best = [sorted(found, key=lambda entry: -entry[0])[:top_k] for found in every]
        return [Prediction(row[0][1].text, tuple(entry[1] for entry in row), tokens=row[0][2]) for row in best]

    def _items(self, records: Sequence[Record], table: _Table, candidates: Sequence[str]) -> list[Item]:
        items: dict[int, Item] = {}
        width = len(candidates)
        for bound, indices in table.groups():
            repeated = [records[index] for index in indices for _ in candidates]
            examples = bound.examples(repeated, targets=list(candidates) * len(indices), source="candidate")
            items |= {
                index: candidate_item(examples[at * width : (at + 1) * width]) for at, index in enumerate(indices)
            }
        return [items[index] for index in range(len(records))]

    def _run(self, examples: Sequence[Example], owners: Sequence[int], table: _Table) -> Tensor:
        """Run rows of any mix of prompts in one forward pass; ``owners`` are the records they belong to."""
        batch = collate(
            examples,
            slots=[table.slots[owner] for owner in owners],
            offsets=[table.offsets[owner] for owner in owners],
            pad_side=self.pad_side,
        )
        return target_logits(self.backbone, batch, table.vectors)


class _Table:
    """The slot vectors of all prompts of a call, one below the other, and where each row's begin."""

    def __init__(self, backbone: Backbone, prompts: Sequence[Prompt], *, force: bool) -> None:
        self.prompts = prompts
        self.bound: dict[int, BoundTemplate] = {}
        starts: dict[int, int] = {}
        parts = []
        total = 0
        for prompt in prompts:
            if id(prompt) not in starts:
                self.bound[id(prompt)] = prompt.bind(backbone, force=force)
                starts[id(prompt)] = total
                parts.append(_vectors(prompt, width=backbone.width))
                total += prompt.slots
        self.vectors = torch.cat(parts).to(backbone.device) if parts else torch.zeros(0, backbone.width)  # (P, E)
        self.offsets = [starts[id(prompt)] for prompt in prompts]
        self.slots = [prompt.slots for prompt in prompts]

    def groups(self) -> Iterator[tuple[BoundTemplate, list[int]]]:
        """Yield each different prompt's bound template and the rows that use it."""
        for prompt, indices in _by_prompt(self.prompts):
            yield self.bound[id(prompt)], indices


def _by_prompt(prompts: Sequence[Prompt]) -> list[tuple[Prompt, list[int]]]:
    rows: dict[int, tuple[Prompt, list[int]]] = {}
    for index, prompt in enumerate(prompts):
        rows.setdefault(id(prompt), (prompt, []))[1].append(index)
    return list(rows.values())


def _per_row(prompts: Prompt | Sequence[Prompt], rows: int) -> list[Prompt]:
    if isinstance(prompts, Prompt):
        return [prompts] * rows
    if len(prompts) != rows:
        raise PromptError(f"{len(prompts)} prompts for {rows} records; give one prompt for all, or one per record")
    return list(prompts)


def _vectors(prompt: Prompt, *, width: int = 0) -> Tensor:
    return prompt.slot_vectors if prompt.slot_vectors is not None else torch.zeros(0, width)


def _check_candidates(candidates: Sequence[str]) -> None:
    if not candidates:
        raise RecordError("there are no candidates to choose from")
    seen: set[str] = set()
    for text in candidates:
        if not text.strip():
            raise RecordError("a candidate is empty")
        if text in seen:
            raise RecordError(f"the candidate '{text}' stands twice; candidates must differ")
        seen.add(text)


def _batches(inputs: Sequence[Sequence[Example]]) -> Iterator[list[int]]:
    """Yield indices of rows to run together, of similar length and within the bounds of one forward pass."""
    longest = [max((len(example.token_ids) for example in row), default=0) for row in inputs]
    chosen: list[int] = []
    rows = positions = width = 0
    for index in sorted(range(len(inputs)), key=lambda i: longest[i]):
        add = sum(len(example.logit_positions) for example in inputs[index])
        wide = max(width, longest[index])
        full = (rows + len(inputs[index])) * wide > MAX_BATCH_TOKENS or positions + add > MAX_BATCH_POSITIONS
        if chosen and full:
            yield chosen
            chosen, rows, positions, wide = [], 0, 0, longest[index]
        chosen.append(index)
        rows, positions, width = rows + len(inputs[index]), positions + add, wide
    if chosen:
        yield chosen
