"""The strongest alternative: PEFT's P-tuning with an LSTM, trained by transformers' ``Trainer``, at its best settings.
The one module that knows PEFT.

Best settings, all of which make it faster or leave it as it is:

- the same frozen weights in the same type, in the same process; no cache of keys and values while training;
- an encoder of the same width as ptuning's (LSTM of half the backbone's width per direction, two layers, then an MLP);
- the same optimizer and schedule: AdamW (torch's fused one), linear warm-up over a tenth of the steps, linear decay to
  zero, gradients clipped to 1;
- rows tokenised beforehand, batches of rows of similar length (``group_by_length``), padded to their longest row by a
  collator that does nothing else; no worker processes, which cost more than they bring on such rows;
- no logging, no saving, no evaluation, no progress bar;
- labels at the target only, without a stop token, so that its rows are no longer than ptuning's;
- its clock runs from the beginning of the first step to the end of the last: building the model, the ``Trainer`` and
  the optimizer is not counted.
"""

from __future__ import annotations

import importlib.util
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.material import synchronised
from ptuning.backbone.attention import MARK
from ptuning.backbone.backbone import Backbone, quiet
from ptuning.engine.objective import ScoringRequest
from ptuning.training.encoders import MAX_ENCODER_WIDTH

if TYPE_CHECKING:
    from transformers import TrainerState

MISSING = "peft is not installed; make bench installs it"
IGNORED = -100  # what a label is where nothing is learned
SETTINGS = (__doc__ or "").split("\n\n", 1)[1].strip()
# Rows of one forward pass without gradients.
SCORED_ROWS = 64


def with_own_attention(backbone: Backbone) -> Backbone:
    """Give a model that is loaded for the peer alone the attention that its users have: transformers' own."""
    for module in backbone.model.modules():
        setattr(module, MARK, False)
    return backbone


def is_installed() -> bool:
    """Whether there is a peer on this machine."""
    return importlib.util.find_spec("peft") is not None


@dataclass(frozen=True)
class Row:
    """Token ids of a whole row without slots, the last ``scored`` of them the target."""

    ids: tuple[int, ...]
    scored: int

    def labelled(self) -> dict[str, list[int]]:
        """Return the row as transformers trains on it."""
        own = len(self.ids) - self.scored
        return {"input_ids": list(self.ids), "labels": [IGNORED] * own + list(self.ids[own:])}


def rows_of(items: Sequence[ScoringRequest]) -> list[Row]:
    """Return the rows that teach what items teach: their text, then the target or the word of the right class."""
    rows = []
    for item in items:
        chosen = item.classes.index(item.answers[0]) if item.answers else 0
        rows.append(_row(item, chosen))
    return rows


def choice_rows(item: ScoringRequest) -> list[Row]:
    """Return one row for each candidate or label word of an item."""
    return [_row(item, number) for number in range(len(item.choices))]


def _row(item: ScoringRequest, number: int) -> Row:
    choice = item.choices[number]
    example = item.inputs[choice.input]
    slots = set(example.slot_positions)
    context = [token for at, token in enumerate(example.token_ids[: example.logit_positions[0] + 1]) if at not in slots]
    own = choice.target_ids[: choice.own_tokens]
    return Row((*context, *own), len(own))


class Peer:
    """A prompt of PEFT in front of the rows of one backbone, whose weights it shares.

    Args:
        backbone: The backbone; :meth:`close` puts it back as it was.
        slots: Number of virtual tokens.
        seed: Of the encoder's weights.
        vectors: (P, E) to use as they are, for prediction; without them an encoder is made for training.
    """

    def __init__(self, backbone: Backbone, *, slots: int, seed: int = 0, vectors: Tensor | None = None) -> None:
        from peft import PromptEncoderConfig

        torch.manual_seed(seed)
        config = PromptEncoderConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=slots,
            token_dim=backbone.width,
            encoder_reparameterization_type="LSTM",
            encoder_hidden_size=max(1, min(backbone.width, MAX_ENCODER_WIDTH) // 2),
            encoder_num_layers=2,
            encoder_dropout=0.0,
            inference_mode=vectors is not None,
        )
        self._put_on(backbone, config, columns=slots)
        if vectors is not None:
            with torch.no_grad():
                self.model.prompt_encoder["default"].embedding.weight.copy_(vectors)
            self.model.eval()

    def _put_on(self, backbone: Backbone, config: Any, *, columns: int) -> None:
        """Put an adapter on the backbone, whose slots take so many columns of a pass."""
        from peft import get_peft_model

        self.backbone = backbone
        self.columns = columns
        self._use_cache = backbone.model.config.use_cache
        with _calm():
            self.model: Any = get_peft_model(backbone.model, config)  # a whole model, of which stubs know little

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Put the backbone back as it was."""
        self.backbone.freeze()
        self.backbone.model.config.use_cache = self._use_cache

    def train(
        self, rows: Sequence[Row], *, epochs: int, batch_size: int, parts: int = 1, lr: float = 1e-3, seed: int = 0
    ) -> float:
        """Train on rows and return the seconds from the beginning of the first step to the end of the last."""
        from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

        device = self.backbone.device

        class Clock(TrainerCallback):
            began = ended = 0.0

            def on_step_begin(self, *_: object, **__: object) -> None:
                self.began = self.began or synchronised(device)

            def on_step_end(self, args: object, state: TrainerState, control: object, **_: object) -> None:  # noqa: ARG002
                if state.global_step == state.max_steps:
                    self.ended = synchronised(device)

        clock = Clock()
        data = [row.labelled() for row in rows]
        with _calm(), tempfile.TemporaryDirectory() as folder:
            options = TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=batch_size,
                gradient_accumulation_steps=parts,
                num_train_epochs=epochs,
                learning_rate=lr,
                lr_scheduler_type="linear",
                warmup_steps=0.1,
                weight_decay=0.0,
                max_grad_norm=1.0,
                optim="adamw_torch_fused",
                train_sampling_strategy="group_by_length",
                remove_unused_columns=False,
                dataloader_num_workers=0,
                dataloader_pin_memory=device.type == "cuda",
                logging_strategy="no",
                save_strategy="no",
                eval_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=device.type == "cpu",
                seed=seed,
            )
            trainer = Trainer(
                model=self.model,
                args=options,
                train_dataset=data,
                data_collator=_collate,
                callbacks=[clock],
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        self.model.eval()
        return clock.ended - clock.began

    @torch.no_grad()
    def score(self, rows: Sequence[Row], *, batch_rows: int = SCORED_ROWS) -> tuple[list[float], list[float]]:
        """Return the log-probability of each row's target, and 1.0 where greedy decoding would write it."""
        device = self.backbone.device
        totals, hits = [0.0] * len(rows), [0.0] * len(rows)
        order = sorted(range(len(rows)), key=lambda index: len(rows[index].ids))
        for at in range(0, len(rows), batch_rows):
            chosen = order[at : at + batch_rows]
            group = [rows[index] for index in chosen]
            batch = _collate([row.labelled() for row in group])
            logits = self.model(
                input_ids=batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device)
            ).logits  # (B, P + T, V)
            lines, places, tokens = [], [], []
            for line, row in enumerate(group):
                for place in range(len(row.ids) - row.scored, len(row.ids)):
                    lines.append(line)
                    places.append(self.columns + place - 1)
                    tokens.append(row.ids[place])
            chosen_logits = logits[lines, places].float()  # (N, V)
            token_ids = torch.tensor(tokens, device=device)
            values = chosen_logits.log_softmax(-1).gather(1, token_ids[:, None])[:, 0].tolist()
            right = (chosen_logits.argmax(-1) == token_ids).tolist()
            start = 0
            for index, row in zip(chosen, group, strict=True):
                totals[index] = sum(values[start : start + row.scored])
                hits[index] = float(all(right[start : start + row.scored]))
                start += row.scored
        return totals, hits

    def accuracy(self, items: Sequence[ScoringRequest]) -> float:
        """Return the share of label-word items whose right class is the likeliest one."""
        rows = [row for item in items for row in choice_rows(item)]
        totals, _ = self.score(rows)
        right, start = 0, 0
        for item in items:
            values = totals[start : start + len(item.choices)]
            start += len(item.choices)
            right += item.classes[values.index(max(values))] in item.answers
        return right / len(items)

    @torch.no_grad()
    def write(self, contexts: Sequence[tuple[int, ...]], *, max_tokens: int, stop_id: int | None) -> list[list[int]]:
        """Write greedily behind texts; rows of one length run together, so that no pad stands behind the slots."""
        lengths: dict[int, list[int]] = {}
        for index, ids in enumerate(contexts):
            lengths.setdefault(len(ids), []).append(index)
        answers: list[list[int]] = [[]] * len(contexts)
        for _, indices in sorted(lengths.items()):
            texts = torch.tensor([contexts[index] for index in indices], device=self.backbone.device)  # (B, T)
            with _calm():
                written = self.model.generate(
                    input_ids=texts,
                    attention_mask=torch.ones_like(texts),
                    max_new_tokens=max_tokens,
                    do_sample=False,
                    eos_token_id=stop_id,
                    pad_token_id=stop_id,
                )
            for index, row in zip(indices, written.tolist(), strict=True):
                answers[index] = row[texts.shape[1] :]
        return answers


class PrefixPeer(Peer):
    """A prefix of PEFT in front of the rows of one backbone: keys and values that start where ours do (PREFIX_TUNING
    without its network).

    Args:
        backbone: The backbone; :meth:`close` puts it back as it was.
        block: (L, 2, K, C, D) the keys and values that it starts at.
        seed: Of the order of rows.
    """

    def __init__(self, backbone: Backbone, *, block: Tensor, seed: int = 0) -> None:
        from peft import PrefixTuningConfig

        layers, _, heads, slots, width = block.shape
        torch.manual_seed(seed)
        config = PrefixTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=slots,
            token_dim=heads * width,
            num_layers=layers,
            num_attention_heads=heads,
            encoder_hidden_size=heads * width,
            prefix_projection=False,
        )
        self._put_on(backbone, config, columns=0)
        with torch.no_grad():
            start = block.permute(3, 0, 1, 2, 4).reshape(slots, -1)
            self.model.prompt_encoder["default"].embedding.weight.copy_(start)


class Peers:
    """Many prompts of PEFT in front of the rows of one backbone: an adapter each, of which one is active at a time.

    At its best: rows of one prompt run in one pass, a context that several choices have in common runs once, and logits
    are computed where they are read.

    Args:
        backbone: The backbone; :meth:`close` puts it back as it was.
        vectors: (P, E) of each prompt.
    """

    def __init__(self, backbone: Backbone, vectors: Sequence[Tensor]) -> None:
        from peft import PromptTuningConfig, get_peft_model

        self.backbone = backbone
        self.slots = len(vectors[0])
        config = PromptTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=self.slots, token_dim=backbone.width, inference_mode=True
        )
        self._use_cache = backbone.model.config.use_cache
        backbone.model.config.use_cache = False  # nothing is written behind these rows
        with _calm():
            self.model: Any = get_peft_model(backbone.model, config, adapter_name="0")
            for number in range(1, len(vectors)):
                self.model.add_adapter(str(number), config)
        with torch.no_grad():
            for number, own in enumerate(vectors):
                self.model.prompt_encoder[str(number)].embedding.weight.copy_(own)
        self.model.eval()

    def __enter__(self) -> Peers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Put the backbone back as it was."""
        self.backbone.freeze()
        self.backbone.model.config.use_cache = self._use_cache

    @torch.no_grad()
    def score(self, asked: Sequence[Sequence[Row]], owners: Sequence[int]) -> list[list[float]]:
        """Return the log-probabilities of the targets of each question's rows; ``owners`` are the numbers of the
        questions' prompts.
        """
        found: list[list[float]] = [[] for _ in asked]
        for owner in sorted(set(owners)):
            places = [place for place, one in enumerate(owners) if one == owner]
            self.model.set_adapter(str(owner))
            rows = [row for place in places for row in asked[place]]
            values = iter(self._pass(rows))
            for place in places:
                found[place] = [next(values) for _ in asked[place]]
        return found

    def _pass(self, rows: Sequence[Row]) -> list[float]:
        device = self.backbone.device
        contexts = list(dict.fromkeys(row.ids[:-1] for row in rows))
        line_of = {ids: line for line, ids in enumerate(contexts)}
        batch = _collate([{"input_ids": list(ids), "labels": []} for ids in contexts])
        scored = [
            (line_of[row.ids[:-1]], self.slots + len(row.ids) - 2 - back, row.ids[len(row.ids) - 1 - back], at)
            for at, row in enumerate(rows)
            for back in range(row.scored)
        ]
        columns = sorted({column for _, column, _, _ in scored})
        logits = self.model(
            input_ids=batch["input_ids"].to(device),
            attention_mask=batch["attention_mask"].to(device),
            logits_to_keep=torch.tensor(columns, device=device),
        ).logits  # (B, columns, V)
        lines = [line for line, _, _, _ in scored]
        places = [columns.index(column) for _, column, _, _ in scored]
        token_ids = torch.tensor([token for _, _, token, _ in scored], device=device)
        values = logits[lines, places].float().log_softmax(-1).gather(1, token_ids[:, None])[:, 0].tolist()
        totals = [0.0] * len(rows)
        for (_, _, _, at), value in zip(scored, values, strict=True):
            totals[at] += value
        return totals


def _collate(rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Pad rows to the longest of them."""
    width = max(len(row["input_ids"]) for row in rows)

    def padded(values: list[int], pad: int) -> list[int]:
        return values + [pad] * (width - len(values))

    return {
        "input_ids": torch.tensor([padded(row["input_ids"], 0) for row in rows]),
        "labels": torch.tensor([padded(row["labels"], IGNORED) for row in rows]),
        "attention_mask": torch.tensor([padded([1] * len(row["input_ids"]), 0) for row in rows]),
    }


@contextmanager
def _calm() -> Iterator[None]:
    """Silence the notices of both libraries."""
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
