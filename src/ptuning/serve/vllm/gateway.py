"""The engine that a vLLM server computes for: rows are filled here, and run there."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import torch
from torch import Tensor

from ptuning.engine.objective import Item, candidate_item, score_choices
from ptuning.engine.writing.ending import Growing
from ptuning.errors import BackboneError, ConfigError, RecordError
from ptuning.prompt.predict import PromptModel, check_listed, classes_of
from ptuning.prompt.prediction import Candidate, Prediction
from ptuning.serve.engine.base import BaseEngine, EngineStatus
from ptuning.serve.engine.beginnings import PassRow
from ptuning.serve.engine.filling import Filling, WrittenRow, pass_row
from ptuning.serve.engine.job import CallRow, EchoRow, Outcome, PromptRow, StoppedError, TextRow, Token, Usage
from ptuning.serve.engine.scoring import checked
from ptuning.serve.engine.waiting import Waiting
from ptuning.serve.vllm.remote import Read, VllmServer
from ptuning.template.fill import TooLongError
from ptuning.template.known import rivals_of
from ptuning.template.segments import Ids

logger = logging.getLogger(__name__)

# Each candidate may cost a request for each of its tokens.
MOST_CANDIDATES = 100
# The server has this model if the likeliest token after a text is as likely there, up to the rounding of its numbers.
PROBE, PROBE_GAP = "The capital of France is", 0.5

Work = Callable[[], Outcome]


class Gateway(BaseEngine):
    """Answers rows as :class:`~ptuning.serve.engine.engine.Engine` does, computed by a vLLM server.

    The tokenizer and the embeddings are those of the model here; the rows travel as embeddings (``prompt_embeds``), so
    slots may stand anywhere. Written answers end here, token by token, by the same rules. Answers of labels, choices
    and candidates take a request for each scored position, which vLLM runs together.

    Args:
        model: The same model as that of the server; a ConfigError if the server's answers say that it is another one.
        remote: The server, started with ``--enable-prompt-embeds``; the gateway closes it.
        queue_rows: Most rows that wait.
        connections: Most rows that are asked for at a time.
    """

    def __init__(self, model: PromptModel, remote: VllmServer, *, queue_rows: int = 256, connections: int = 64) -> None:
        super().__init__(model, queue_rows=queue_rows)
        self._remote, self._backbone = remote, model.backbone
        self._filling = Filling(model)
        self._connections = connections
        self._running = self._read = self._written = 0
        try:
            self._check_same_model()
        except BaseException:
            remote.close()
            raise

    def stop(self) -> None:
        """End the thread once the rows that vLLM runs are answered, and close the connections."""
        super().stop()
        self._remote.close()

    @torch.no_grad()
    def _check_same_model(self) -> None:
        if self._backbone.kind != "causal":
            raise BackboneError(f"vLLM serves causal models, and '{self._backbone.name}' is {self._backbone.kind}")
        row = self._filling.echoed(EchoRow(PROBE))
        ids = torch.tensor([row.example.token_ids], device=self._backbone.device)
        at = torch.zeros(1, dtype=torch.int64, device=ids.device)
        logits, _ = self._backbone.run(
            self._backbone.embed(ids),
            mask=torch.ones_like(ids),
            positions=torch.arange(ids.shape[1], device=ids.device)[None],
            rows=at,
            cols=at + ids.shape[1] - 1,
        )
        value, token = logits.log_softmax(-1)[0].max(dim=-1)
        there = self._remote.log_probs(Read(self._embedded(row)), [int(token)])[int(token)]
        if not abs(there - float(value)) < PROBE_GAP:
            raise ConfigError(
                f"vLLM at {self._remote.url} serves '{self._remote.model}', which answers otherwise than "
                f"'{self._backbone.name}'; start it with the model of the prompts"
            )

    @property
    def status(self) -> EngineStatus:
        """What it is doing, and has done; tokens that vLLM kept are not known here."""
        return EngineStatus(
            rows_waiting=len(self._queue),
            rows_writing=self._running,
            rows_done=self._tally.done,
            rows_failed=self._tally.failed,
            rows_cancelled=self._tally.cancelled,
            passes=0,
            tokens_read=self._read,
            tokens_written=self._written,
            cached_tokens=0,
            kept_texts=0,
            kept_bytes=0,
        )

    @torch.no_grad()
    def _run(self) -> None:
        with ThreadPoolExecutor(self._connections, thread_name_prefix="ptuning-vllm") as pool:
            while (one := self._next()) is not None:
                try:
                    work = self._filled(one)
                except Exception as error:  # noqa: BLE001 - of this row
                    self._end(one, error)
                else:
                    pool.submit(self._finish, one, work)
        for one in self._queue.take_all():
            one.fail(StoppedError("the engine was stopped before this row was answered"))
        with self._changed:
            self._unanswered = 0
            self._changed.notify_all()

    def _next(self) -> Waiting | None:
        """Return the next row once there is a connection for it; None at the end."""
        while True:
            with self._changed:
                while not self._stopped and (not self._queue or self._running >= self._connections):
                    self._tick()
                    self._changed.wait()
                if self._stopped:
                    return None
                self._tick()
                gone = self._queue.take_cancelled()
                one = self._queue.take()
                self._unanswered = len(self._queue) + self._running + (one is not None)
                self._running += one is not None
                self._changed.notify_all()
            for each in gone:
                each.drop()
            if one is not None:
                one.taken()
                return one

    def _finish(self, one: Waiting, work: Work) -> None:
        try:
            if one.job.cancelled:
                one.drop()
                self._end(one, None)
                return
            outcome = work()
        except Exception as error:  # noqa: BLE001 - of this row
            self._end(one, error)
            return
        if one.job.cancelled:
            one.drop()
            self._end(one, None)
            return
        self._read += outcome.usage.prompt_tokens
        self._written += outcome.usage.completion_tokens
        self._end(one, outcome)

    def _end(self, one: Waiting, found: Outcome | Exception | None) -> None:
        """Tell what has become of a row, and make room for the next."""
        if isinstance(found, Exception):
            one.fail(found)
        elif found is not None:
            one.answer(found)
        with self._changed:
            self._running -= 1
            self._unanswered = len(self._queue) + self._running
            self._tick()
            self._changed.notify_all()

    def _filled(self, one: Waiting) -> Work:
        """Fill a row, and return what answers it; that runs in another thread, and without the tokenizer."""
        row = one.row
        if isinstance(row, CallRow):
            value = row.call()
            return lambda: Outcome(value=value)
        if isinstance(row, EchoRow):
            if row.prompt is not None:  # vLLM scores no text behind embeddings
                raise ConfigError("with --engine vllm, echo is for the base model alone")
            ids, alternatives = self._filling.echoed(row).example.token_ids, row.alternatives
            self._room(len(ids))
            return lambda: self._echo(ids, alternatives)
        if isinstance(row, TextRow):
            filled = self._filling.continued(row)
            read = Read(self._embedded(filled.row)) if row.prompt else Read(ids=filled.row.example.token_ids)
            return self._writes(one, filled, read)
        answers = self._filling.answers(row)
        if row.how.candidates is not None:
            return self._ranks(row, row.how.candidates)
        if answers.is_closed:
            scored = self._filling.scored(row, answers)
            embedded = [self._embedded(each) for each in scored.rows]
            return lambda: self._classify(row, scored.item, scored.names, embedded)
        if row.how.top_k > 1 or row.how.generation.num_beams > 1 or row.how.generation.repetition_penalty != 1.0:
            raise ConfigError("with --engine vllm, written answers have no top_k, beams or penalties; leave them out")
        filled = self._filling.written(row)
        return self._writes(one, filled, Read(self._embedded(filled.row)))

    def _room(self, tokens: int) -> int | None:
        """Return how many tokens vLLM can write behind so many, None if it has not told; a TooLongError if none."""
        most = self._remote.max_tokens
        if most is not None and tokens >= most:
            raise TooLongError(
                f"the row has {tokens} tokens, and vLLM reads and writes {most} together, as it was started "
                "(--max-model-len)"
            )
        return None if most is None else most - tokens

    def _embedded(self, row: PassRow) -> Tensor:
        """Return what the model reads of a row, (T, E): its tokens' embeddings, and slot vectors at its slots."""
        if row.learned.deep:
            raise ConfigError(
                "the prompt has deep slots ([D]), which are vectors in every layer, and vLLM takes vectors of the "
                "input only; serve it with --engine embedded"
            )
        self._room(len(row.example.token_ids))
        ids = torch.tensor([row.example.token_ids], device=self._backbone.device)
        embedded = self._backbone.embed(ids)[0]  # (T, E)
        slots = list(row.example.slot_positions)
        if slots:
            embedded[slots] = row.learned.vectors.to(embedded.dtype)
        return embedded.cpu()

    def _classify(self, row: PromptRow, item: Item, names: Sequence[str], embedded: Sequence[Tensor]) -> Outcome:
        (found,) = classes_of([item], [names], self._logits(item, embedded))
        how = row.how
        prediction = Prediction.of_classes(checked(found), top_k=how.top_k, min_probability=how.min_probability)
        return Outcome(prediction, Usage(item.tokens))

    def _ranks(self, row: PromptRow, candidates: Sequence[str]) -> Work:
        """Return what ranks candidates, as :meth:`PromptModel.rank` does."""
        check_listed(candidates)
        if len(candidates) > MOST_CANDIDATES:
            raise RecordError(f"{len(candidates)} candidates; with --engine vllm at most {MOST_CANDIDATES}")
        ready, how = self._filling.ready(row.prompt), row.how
        (examples,) = ready.bound.answers([row.question.record], [candidates], with_stop=how.count_stop)
        item, scoring = candidate_item(examples), self._filling.answers(row).scoring
        embedded = [self._embedded(pass_row(example, ready)) for example in item.inputs]

        def rank() -> Outcome:
            scored = score_choices([item], self._logits(item, embedded))
            values = scored.all_log_probs.tolist()
            if scoring.normalise == "mean":
                values = [one / len(example.target_ids) for one, example in zip(values, examples, strict=True)]
            known = [(one.token_ids, one.target_ids) if one.known else None for one in examples]
            ranked = checked(Candidate.ranked(candidates, values, rivals_of(known, range(len(known)))))
            return Outcome(Prediction(ranked[0].text, tuple(ranked[: how.top_k])), Usage(item.tokens))

        return rank

    def _logits(self, item: Item, embedded: Sequence[Tensor]) -> Tensor:
        """Return logits at the scored positions of an item's inputs, (N, V), whose softmax is right for the tokens that
        the item needs; all the rest has the place of one other token.
        """
        wanted: list[set[int]] = []
        starts = []
        for example in item.inputs:
            starts.append(len(wanted))
            wanted += [set() for _ in example.logit_positions]
        for choice in (*item.choices, *item.empty):
            for at, token in enumerate(choice.target_ids):
                wanted[starts[choice.input] + at].add(token)
        logits = torch.full((len(wanted), self._backbone.vocabulary), -torch.inf)
        asked: dict[tuple[Ids, Ids, Ids], dict[int, float]] = {}
        for example, vectors, start in zip(item.inputs, embedded, starts, strict=True):
            for at, position in enumerate(example.logit_positions):
                tokens = tuple(sorted(wanted[start + at]))
                key = example.token_ids[: position + 1], example.slot_positions, tokens
                if tokens and key not in asked:
                    asked[key] = self._remote.log_probs(Read(vectors[: position + 1]), tokens)
                for token, value in asked.get(key, {}).items():
                    logits[start + at, token] = value
                _fill_up(logits[start + at], tokens)
        return logits

    def _writes(self, one: Waiting, filled: WrittenRow, read: Read) -> Work:
        row = cast("PromptRow | TextRow", one.row)
        line, how = filled.line, row.how
        text, decode = Growing(line.ending), self._backbone.tokenizer.decode
        alternatives = how.alternatives or 0
        most = min(line.ending.most, self._room(filled.tokens) or line.ending.most)

        def write() -> Outcome:
            tokens: list[Token] = []
            written = self._remote.write(read, how.generation, most=most, alternatives=alternatives)
            with contextlib.closing(written):  # whoever stops reading ends it there as well
                for token, log_prob, likeliest in written:
                    line.draft = line.draft.grown(token, log_prob)
                    line.ended = line.ending.reached(line.draft.ids)
                    best = tuple((decode([other]), value) for other, value in likeliest)
                    tokens.append(Token(token, decode([token]), log_prob, best))
                    if how.pieces:
                        shown = tokens[-1:] if how.alternatives is not None else []
                        one.piece(text.piece(line.draft.ids, is_whole=line.ended), shown)
                    if line.ended or one.job.cancelled:
                        break
            if not line.draft.ids:
                raise RecordError("vLLM has written no token for this row")
            if how.pieces and not line.ended:
                one.piece(text.piece(line.draft.ids, is_whole=True), ())
            answer = line.ending.written(line.draft)
            found = checked([Candidate(answer.text, answer.log_prob)])
            return Outcome(
                Prediction(answer.text, tuple(found), tokens=answer.tokens),
                Usage(filled.tokens, len(line.draft.ids)),
                "stop" if line.ending.is_own(line.draft.ids) else "length",
                tuple(tokens) if how.alternatives is not None else (),
            )

        return write

    def _echo(self, ids: Ids, alternatives: int) -> Outcome:
        decode = self._backbone.tokenizer.decode
        found = self._remote.echo(ids, alternatives=alternatives)
        tokens = [
            Token(token, decode([token]), value, tuple((decode([other]), each) for other, each in best))
            for token, (value, best) in zip(ids, found, strict=True)
        ]
        return Outcome(usage=Usage(len(ids)), tokens=tuple(tokens))


def _fill_up(logits: Tensor, tokens: Sequence[int]) -> None:
    """Give what the log-probabilities of some tokens leave of 1 to one other token, (V,)."""
    rest = 1.0 - float(logits[list(tokens)].exp().sum()) if tokens else 1.0
    other = next(token for token in range(len(logits)) if token not in tokens)
    logits[other] = torch.tensor(max(rest, 1e-30)).log()
