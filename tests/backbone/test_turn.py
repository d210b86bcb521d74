"""Models that read a long row, and all rows beside it, with other positions: found by asking, and never mixed.

The invariants that tests name are those of docs/invariants.md.
"""

import functools
import threading
import time
from collections.abc import Sequence
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import transformers
from torch import Tensor

import ptuning.engine.forward
from ptuning.backbone import probes
from ptuning.backbone.backbone import Backbone
from ptuning.config import TrainConfig
from ptuning.engine import prefix_cache
from ptuning.engine.forward import shared_prefix_tokens, target_logits
from ptuning.engine.prefix_cache import PrefixCache
from ptuning.engine.soft_prompt import PromptBatch
from ptuning.errors import BackboneError
from ptuning.prompt.predict import PromptModel
from ptuning.records import Record, as_records
from ptuning.template.encode import Example
from ptuning.training.trainer import Trainer
from tests.conftest import bound, items_of, learned
from tests.families import GROUPED, SMALL, tokenizer_of

TURN = 32
LONGEST = 96
LONGROPE: dict[str, Any] = {
    "max_position_embeddings": LONGEST,
    "original_max_position_embeddings": TURN,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.0, 1.5, 2.0],
        "long_factor": [1.0, 2.0, 8.0, 30.0],
        "original_max_position_embeddings": TURN,
    },
    "pad_token_id": 0,
}
DYNAMIC: dict[str, Any] = {
    "max_position_embeddings": TURN,
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
}
LONG = "The capital of Kenya is Nairobi, and the capital of France is Paris; "
# Rows of 11 to 80 tokens, on both sides of the turn and close to it.
TEXTS = [LONG * times + end for times in (0, 1, 2, 3) for end in ("Kenya", "France and Peru", "a")]
RECORDS: list[Record] = [{"x": text, "y": "yes"} for text in TEXTS]
EARLY = "[P*2] [X] is [Y]"
LATE = "The capital of {x} [P*2] is [Y]"


def made(head: str, **changes: Any) -> Backbone:
    """Return a frozen backbone of a tiny random model with large weights."""
    tokenizer = tokenizer_of("llama")
    head_class = getattr(transformers, head)
    torch.manual_seed(0)
    model = head_class(head_class.config_class(vocab_size=len(tokenizer), **{**SMALL, **changes})).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3.0)
    tokenizer.model_max_length = 10**30
    backbone = Backbone(model, tokenizer, name="some model")
    backbone.freeze()
    return backbone


def longrope(head: str = "Phi3ForCausalLM") -> Backbone:
    """Return a backbone that reads rows of more than 32 tokens with other positions."""
    return made(head, **(LONGROPE if head == "Phi3ForCausalLM" else {**LONGROPE, **GROUPED}))


def rows_of(backbone: Backbone, template: str, records: Sequence[Record] = RECORDS) -> list[Example]:
    rows = bound(backbone, template).examples(as_records(list(records)))
    lengths = [len(row.token_ids) for row in rows]
    assert min(lengths) <= TURN < max(lengths)
    return rows


def vectors_of(backbone: Backbone, template: str) -> Tensor:
    vectors = learned(backbone, template).slot_vectors
    assert vectors is not None
    return vectors.clone().requires_grad_(True)


def whole(backbone: Backbone, rows: Sequence[Example], vectors: Tensor) -> Tensor:
    """Run each row alone and whole."""
    return torch.cat([target_logits(backbone, [row], PromptBatch(vectors)) for row in rows])


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * float(other.detach().abs().max()))


@pytest.mark.parametrize("head", ["Phi3ForCausalLM", "LlamaForCausalLM"])
def test_the_turn_is_found_by_asking_the_model(head: str) -> None:
    """A row beside a long one differs from itself alone; that is what must not happen in a batch."""
    backbone = longrope(head)
    assert backbone.turn == TURN
    assert [backbone.side(length) for length in (1, TURN, TURN + 1, LONGEST)] == [False, False, True, True]
    assert backbone.copy().turn == backbone.copy(share=True).turn == TURN


def test_a_model_that_names_an_original_length_need_not_turn() -> None:
    """YaRN and Llama 3 scale positions once and for all."""
    scaled = {"rope_theta": 10000.0, "factor": 3.0, "original_max_position_embeddings": TURN}
    for more in ({"rope_type": "yarn"}, {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}):
        rope = {**scaled, **more}
        assert made("LlamaForCausalLM", max_position_embeddings=LONGEST, rope_parameters=rope, **GROUPED).turn is None
    equal = {**LONGROPE["rope_parameters"], "long_factor": [1.0, 1.0, 1.5, 2.0]}
    assert made("Phi3ForCausalLM", **{**LONGROPE, "rope_parameters": equal}).turn is None


def test_a_model_is_asked_in_evaluation_mode_and_keeps_its_own() -> None:
    """Dropout would look like a turn; and whoever owns the model finds it as it was."""
    rope = {**LONGROPE["rope_parameters"], "long_factor": LONGROPE["rope_parameters"]["short_factor"]}
    model = made("Phi3ForCausalLM", **{**LONGROPE, "rope_parameters": rope, "resid_pdrop": 0.9}).model
    model.train()
    model.lm_head.eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    assert Backbone(model, tokenizer_of("llama"), name="some model").turn is None
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_dynamic_positions_are_read_as_far_as_they_stay() -> None:
    """Dynamic NTK changes with the longest row beyond the model's own length; rows are shortened to that length."""
    backbone = made("LlamaForCausalLM", **DYNAMIC, **GROUPED)
    assert (backbone.turn, backbone.tokenizer.max_tokens) == (None, TURN)
    rows, vectors = bound(backbone, EARLY).examples(as_records(RECORDS)), vectors_of(backbone, EARLY)
    assert max(len(row.token_ids) for row in rows) <= TURN
    close(target_logits(backbone, rows, PromptBatch(vectors)), whole(backbone, rows, vectors))
    answers = PromptModel(backbone).predict(RECORDS, learned(backbone, EARLY))
    for record, answer in zip(RECORDS, answers, strict=True):
        assert PromptModel(backbone).predict([record], learned(backbone, EARLY))[0].text == answer.text


def test_long_rows_that_change_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pass could read two of them; the message says what to set."""
    real = probes._beside
    monkeypatch.setattr(probes, "_beside", lambda own, last, other: real(own, last, other) + 100 * other)
    with pytest.raises(
        BackboneError, match=r"some model: Phi3ForCausalLM reads rows of more than 32 tokens by the longest .* to 32"
    ):
        longrope()


@pytest.mark.parametrize("head", ["Phi3ForCausalLM", "LlamaForCausalLM"])
@pytest.mark.parametrize("template", [EARLY, LATE])
def test_rows_alone_equal_those_in_company(head: str, template: str) -> None:
    """Invariant *Alone or in company*: logits and gradients, on either side of the padding and in any order."""
    backbone = longrope(head)
    rows, vectors = rows_of(backbone, template), vectors_of(backbone, template)
    wanted = whole(backbone, rows, vectors)
    (expected,) = torch.autograd.grad(torch.logsumexp(wanted, dim=-1).sum(), vectors)
    for side in ("left", "right"):
        found = target_logits(backbone, rows, PromptBatch(vectors), pad_side=side)
        close(found, wanted)
        (got,) = torch.autograd.grad(torch.logsumexp(found, dim=-1).sum(), vectors)
        close(got, expected)
    close(target_logits(backbone, rows[::-1], PromptBatch(vectors)), wanted.flip(0))


def test_rows_of_several_prompts() -> None:
    """Invariant *Alone or in company*: each row keeps its own prompt where a batch runs in two passes."""
    backbone = longrope()
    prompts = [learned(backbone, template) for template in (EARLY, LATE)] * (len(RECORDS) // 2)
    together = PromptModel(backbone).target_logits(RECORDS, prompts)
    for record, prompt, found in zip(RECORDS, prompts, together, strict=True):
        close(found, PromptModel(backbone).target_logits([record], prompt)[0])


def test_kept_keys_and_values_serve_rows_of_their_own_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant *Fast = slow*: text that is kept from a short row's positions is read again for a long row."""
    monkeypatch.setattr(prefix_cache, "MIN_PREFIX_TOKENS", 0)
    backbone = longrope()
    rows, vectors = rows_of(backbone, LATE), vectors_of(backbone, LATE)
    wanted = whole(backbone, rows, vectors)
    with PrefixCache(backbone, memory_share=0.25) as cache:
        cache.prepare(rows)
        kept = [len(cache.ids_of(row)) for row in rows]
        assert 0 < min(count for count in kept if count) <= TURN < max(kept)
        # Behind a text that is short enough, the row goes on over the turn.
        across = [row for row in rows if row.slot_positions[0] <= TURN < len(row.token_ids)]
        assert across
        assert not any(map(cache.ids_of, across))
        close(target_logits(backbone, rows, PromptBatch(vectors), cache=cache), wanted)


def test_a_shared_prefix_serves_rows_of_its_own_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant *Fast = slow*: a short prefix of long rows runs with them, whole."""
    monkeypatch.setattr(ptuning.engine.forward, "MIN_SAVED_TOKENS", 1)
    backbone = longrope()
    runs = Mock(side_effect=backbone.run_prefix)
    monkeypatch.setattr(backbone, "run_prefix", runs)
    for front, ends, called in (
        ("", ("Kenya", "a"), True),
        (LONG, ("Kenya", "a"), False),
        (LONG * 2, ("Kenya", "a"), True),
    ):
        template = f"The capital of {front} [P*2] [X] is [Y]"
        rows = bound(backbone, template).examples(as_records([{"x": end, "y": "yes"} for end in ends]))
        vectors = vectors_of(backbone, template)
        assert (shared_prefix_tokens(backbone, rows) > 0) == called
        runs.reset_mock()
        found = target_logits(backbone, rows, PromptBatch(vectors))
        assert bool(runs.call_count) == called
        close(found, whole(backbone, rows, vectors))


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_training_reads_every_row_as_if_alone(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant *Alone or in company*: batches of rows of both sides teach what batches of one row do."""
    monkeypatch.setattr(prefix_cache, "MIN_PREFIX_TOKENS", 0)
    backbone, found = longrope(), []
    for size in (1, 6):
        config = TrainConfig(
            epochs=2, batch_size=size, accumulation_steps=6 // size, cache_memory=share, encoder="none", lr=0.01
        )
        trainer = Trainer(backbone, bound(backbone, LATE), config=config)
        items = items_of(backbone, LATE, RECORDS)
        trainer.fit(items, items)
        found.append((trainer.learner.vectors(), trainer.state.history[-1]["dev_loss"]))
    (one, one_loss), (other, other_loss) = found
    torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
    assert one_loss == pytest.approx(other_loss, abs=1e-4)


def test_threads_do_not_turn_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant *Alone or in company*: the positions in use are one tensor of the model, so passes wait in turn."""
    backbone = longrope()
    prompt, real = learned(backbone, EARLY), backbone.model.forward
    running: list[int] = []

    def slowly(*given: Any, **more: Any) -> Any:
        running.append(running[-1] + 1 if running else 1)
        time.sleep(0.01)
        found = real(*given, **more)
        running.append(running[-1] - 1)
        return found

    monkeypatch.setattr(backbone.model, "forward", slowly)
    ask = functools.partial(PromptModel(backbone).target_logits, RECORDS, prompt)
    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(running) == 1


def test_candidates_on_both_sides_of_the_turn() -> None:
    """Invariant *Fast = slow*: candidates that share the text in front of them are read as each one alone, where a
    short one ends before the turn and a long one behind it.
    """
    backbone = longrope()
    prompt = learned(backbone, EARLY)
    candidates = ["yes", "no", "Nairobi", LONG * 2 + "no", LONG * 2 + "yes"]
    records = RECORDS[:3]
    ranked = PromptModel(backbone).rank(records, prompt, candidates)
    for record, found in zip(records, ranked, strict=True):
        scores = {one.text: one.log_prob for one in found}
        rows = bound(backbone, EARLY).examples(as_records([{**record, "y": text} for text in candidates]))
        assert {backbone.side(len(row.token_ids)) for row in rows} == {False, True}
        for text, row in zip(candidates, rows, strict=True):
            logits = target_logits(backbone, [row], prompt.learned(backbone)).log_softmax(dim=-1)
            total = logits[torch.arange(len(row.target_ids)), torch.tensor(row.target_ids)].sum()
            assert scores[text] == pytest.approx(float(total), abs=1e-3)
