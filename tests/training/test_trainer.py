"""Training keeps the invariants of docs/invariants.md, above all *Frozen is frozen*, *Resume is exact*, *Seeds are
separate* and *Loss position = scored position*.
"""

import contextlib
import hashlib
import inspect
import math
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import pytest
import safetensors.torch
import torch
from torch import Tensor

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.loading import load_backbone
from ptuning.config import EncoderKind, RandomStart, TrainConfig, derived_seed
from ptuning.data.answer_space import AnswerSpace
from ptuning.data.questions import as_questions
from ptuning.engine import batch as batch_module
from ptuning.engine import evaluate, prefix_cache
from ptuning.engine.evaluate import Evaluation
from ptuning.engine.forward import target_logits
from ptuning.engine.objective import (
    ScoringRequest,
    build_requests,
    inputs_of,
    loss,
    loss_count,
    score_continuations,
    target_requests,
)
from ptuning.engine.prefix_cache import PrefixCache
from ptuning.engine.soft_prompt import DeepParams, PromptBatch
from ptuning.errors import BackboneError, TrainingError
from ptuning.files import Json
from ptuning.names import CHECKPOINT_FILE
from ptuning.progress import NUMBERS, RATES, Interrupted, Progress
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prompt import Prompt
from ptuning.prompt.storage import BackboneId
from ptuning.records import Record, as_records
from ptuning.template.encode import Example, TokenizedTemplate
from ptuning.template.labels import LabelWords
from ptuning.template.language import Template
from ptuning.template.segments import Ids
from ptuning.training import checkpoint, trainer
from ptuning.training import step as steps
from ptuning.training.checkpoint import Checkpoint, RunState
from ptuning.training.optimizer import linear_schedule
from ptuning.training.run import train
from ptuning.training.step import Chunk, Step
from ptuning.training.trainer import Trainer
from tests.backbone.test_trained_weights import experts
from tests.conftest import FAMILIES, RECORDS, bound, build_model, items_of, make_tokenizer, small_memory
from tests.families import backbone_of
from tests.processes import forked, launched
from tests.training.spread import FACTS, FAST, SPREAD, TEMPLATE, fit_spread, learned_of, spread_trainer


def make_trainer(backbone: Backbone, folder: Path | None = None, **settings: Any) -> Trainer:
    """Build a trainer with fast settings of its own."""
    config = TrainConfig.from_json({**FAST, **settings})
    identity: dict[str, Json] = {"lr": config.lr, "data": "facts"}
    return Trainer(backbone, bound(backbone, TEMPLATE), config=config, checkpoint=folder, identity=identity)


def fit(found: Trainer, *, stop_after: int | None = None, records: list[Record] | None = None) -> Trainer:
    """Train on a few facts, or stop after some steps."""
    items = items_of(found.learner.backbone, TEMPLATE, records or FACTS)
    found.fit(items, items[:4], should_stop=None if stop_after is None else lambda: found.state.step >= stop_after)
    return found


def without_seconds(found: Trainer) -> list[dict[str, float | int]]:
    """Return the history without what depends on the clock."""
    return [{name: value for name, value in row.items() if name != "seconds"} for row in found.state.history]


def digest(backbone: Backbone) -> str:
    """Return a hash of every weight and buffer."""
    found = hashlib.sha256()
    for name, tensor in {**dict(backbone.model.named_parameters()), **dict(backbone.model.named_buffers())}.items():
        found.update(name.encode() + tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@pytest.mark.parametrize("kind", get_args(EncoderKind))
def test_training_leaves_the_backbone_alone(backbone: Backbone, kind: str) -> None:
    """Invariant *Frozen is frozen*: bit-identical weights and buffers, no gradient, evaluation mode.

    Nor does the embedding table get rows for slots: they would join the softmax, and be trained with the others.
    """
    ids = torch.tensor([[7, 9, 11, 13]])
    with torch.no_grad():
        answer = backbone.model(input_ids=ids).logits
    before, rows = digest(backbone), backbone.embedding_rows
    found = fit(make_trainer(backbone, encoder=kind, dropout=0.5, epochs=1))
    assert found.state.step == 3
    assert digest(backbone) == before
    assert backbone.embedding_rows == rows
    assert all(weight.grad is None for weight in backbone.model.parameters())
    assert not any(module.training for module in backbone.model.modules())
    with torch.no_grad():
        assert torch.equal(backbone.model(input_ids=ids).logits, answer)


def test_a_backbone_that_is_not_frozen_is_an_error(causal: Backbone) -> None:
    """Invariant *Frozen is frozen*: with dropout on, or gradients on, training would be something else."""
    causal.model.train()
    with pytest.raises(TrainingError, match="is not frozen; call its freeze"):
        make_trainer(causal)
    causal.freeze()
    causal.model.requires_grad_(True)
    with pytest.raises(TrainingError, match="is not frozen"):
        make_trainer(causal)


@pytest.mark.parametrize("kind", get_args(EncoderKind))
def test_before_the_first_step_a_warm_prompt_is_the_manual_one(backbone: Backbone, kind: str) -> None:
    """Invariant *Identity*: with every encoder, a prompt started from words is at first the manual one."""
    template = "[P:The capital of] [X] [P:is] [Y]"
    config = TrainConfig.from_json({"encoder": kind})
    filled = bound(backbone, template)
    vectors = Trainer(backbone, filled, config=config).learner.vectors()
    prompt = Prompt(filled.template, vectors, BackboneId.of(backbone))
    model = PromptModel(backbone)
    manual = model.target_logits(RECORDS, Prompt.manual("The capital of [X] is [Y]"))
    for one, other in zip(model.target_logits(RECORDS, prompt), manual, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", get_args(EncoderKind))
@pytest.mark.parametrize("start", get_args(RandomStart))
def test_one_step_with_every_encoder_and_start(causal: Backbone, kind: str, start: str) -> None:
    """Every value of these settings trains: after one small step every vector has moved, and is float32."""
    found = make_trainer(causal, encoder=kind, start=start, lr=1e-4, epochs=1, batch_size=16, warmup_fraction=0.0)
    before = found.learner.vectors()
    fit(found)
    moved = (found.learner.vectors() - before).abs().amax(dim=-1)
    assert found.state.step == 1
    assert (moved > 0).all()
    assert found.learner.vectors().dtype == torch.float32


def test_one_small_step_under_a_bfloat16_backbone(model_folder: Callable[[str], Path]) -> None:
    """Vectors are float32 under a bfloat16 backbone: in bfloat16 a step of 1e-4 would be lost."""
    backbone = load_backbone(str(model_folder("llama")), dtype="bfloat16", device="cpu")
    found = make_trainer(backbone, encoder="none", lr=1e-4, epochs=1, batch_size=16, warmup_fraction=0.0)
    before = found.learner.vectors()
    fit(found)
    assert found.best_vectors.dtype == torch.float32
    assert ((found.learner.vectors() - before).abs().amax(dim=-1) > 0).all()


def test_a_trainer_takes_the_rows_of_the_table_that_its_slots_start_at(
    causal: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a float32 copy of the whole table for each prompt of a fleet, which takes gigabytes with large models."""
    asked: list[int] = []
    real = Backbone.vectors_of
    make_trainer(causal)  # the statistics of the table are found once

    def counted(own: Backbone, ids: Tensor) -> Tensor:
        asked.append(len(ids))
        return real(own, ids)

    monkeypatch.setattr(Backbone, "vectors_of", counted)
    for start in ("random", "vocabulary"):
        found = make_trainer(causal, start=start)
        assert sum(asked) == found.learner.bound.slots
        asked.clear()


def slot_gradient(backbone: Backbone, start: Tensor) -> Tensor:
    """Return the gradient of the loss in the slot vectors."""
    vectors = start.clone().requires_grad_(True)
    items = items_of(backbone, TEMPLATE, FACTS)
    value, count = loss(
        items, score_continuations(items, target_logits(backbone, inputs_of(items), PromptBatch(vectors)))
    )
    (value / count).backward()
    assert vectors.grad is not None
    return vectors.grad


def test_the_gradient_reaches_every_slot(backbone: Backbone) -> None:
    """Invariant *Loss position = scored position*: the loss reaches the slot in front of the target, too."""
    gradient = slot_gradient(backbone, make_trainer(backbone).learner.vectors())
    assert (gradient.abs().amax(dim=-1) > 1e-6).all()


def test_gradients_do_not_depend_on_checkpointing(causal: Backbone) -> None:
    """Checkpointing in transformers hooks into the embedding layer, and ready-made embeddings pass it by."""
    start = make_trainer(causal).learner.vectors()
    one = slot_gradient(causal, start)
    enable = getattr(causal.model, "activation_checkpointing_enable", causal.model.gradient_checkpointing_enable)
    for reentrant in (True, False):
        enable({"use_reentrant": reentrant})
        torch.testing.assert_close(slot_gradient(causal, start), one, atol=1e-6, rtol=0)


def teachable(family: str) -> Backbone:
    """Return a random backbone in which slots have much to say: large weights, small positions."""
    tokenizer = make_tokenizer(family)
    torch.manual_seed(0)
    model = build_model(family, tokenizer).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and not any(part in name for part in ("wpe", "position", "token_type")):
                weight.mul_(15.0 if "embed" in name or "wte" in name else 10.0)
    backbone = Backbone(model, tokenizer, name="teachable")
    backbone.freeze()
    return backbone


def learn(
    backbone: Backbone, template: str, items: list[ScoringRequest], *, enough: Callable[[Trainer], bool]
) -> Trainer:
    """Train free vectors on items, and choose by the same ones, until it is enough."""
    config = TrainConfig.from_json(
        {"epochs": 150, "patience": 150, "lr": 0.1, "encoder": "none", "warmup_fraction": 0.0, "batch_size": 12}
    )
    found = Trainer(backbone, bound(backbone, template), config=config)
    with pytest.raises(Interrupted):
        found.fit(items, items, should_stop=lambda: enough(found))
    return found


@pytest.mark.parametrize(
    ("family", "target", "tokens"),
    [("gpt2", "São Tomé", 5), ("llama", "São Tomé", 5), ("bert", "São Tomé", 2), ("roberta", "yes", 1)],
)
def test_one_fact_is_learned_to_an_exact_match(family: str, target: str, tokens: int) -> None:
    """Invariant *Loss position = scored position*: what the loss trains is what scores read and what is written.

    Where the loss trains another position, one fact can be trained on and on without ever being answered.
    """
    backbone, template = teachable(family), "[P*4] [X] [P*4] [Y]"
    items = items_of(backbone, template, [{"x": "Kenya", "y": target}])
    assert items[0].choices[0].own_tokens == tokens
    found = learn(backbone, template, items, enough=lambda found: found.state.best_score == 1.0)
    assert found.state.start["dev_score"] == 0.0
    prompt = Prompt(found.learner.bound.template, found.best_vectors, BackboneId.of(backbone))
    answer = PromptModel(backbone).predict([{"x": "Kenya"}], prompt, generation={"max_new_tokens": tokens})[0]
    if backbone.kind == "causal":
        assert answer.text == target
    else:
        logits = PromptModel(backbone).target_logits([{"x": "Kenya", "y": target}], prompt)[0]
        assert backbone.tokenizer.decode(logits.argmax(dim=-1).tolist()).strip() == target


def test_a_causal_prompt_learns_to_stop() -> None:
    """Setting train_eos: trained long enough, the answer ends where the target does."""
    backbone, template = teachable("llama"), "[P*4] [X] [P*4] [Y]"
    items = items_of(backbone, template, [{"x": "Kenya", "y": "yes"}])
    answers: list[str] = []

    def enough(found: Trainer) -> bool:
        prompt = Prompt(found.learner.bound.template, found.learner.vectors(), BackboneId.of(backbone))
        answers.append(PromptModel(backbone).predict([{"x": "Kenya"}], prompt)[0].text)
        return answers[-1] == "yes"

    learn(backbone, template, items, enough=enough)
    assert answers[0] != answers[-1]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rule_is_learned_with_label_words(family: str) -> None:
    """Label words of one and of several tokens train a rule to more than 95 %.

    A part that training or scoring leaves out shows here, as a score that stays at the majority's.
    """
    words = LabelWords({"good": ("great", "good film"), "bad": ("terrible",)})
    names = ("Kenya", "Paris", "Peru", "Lima", "25", "France")
    rows: list[Record] = [
        {"x": f"{word} {name}", "y": label} for word, label in (("great", "good"), ("bad", "bad")) for name in names
    ]
    backbone, template = teachable(family), "[P*4] [X] [P*4] [Y]"
    items = build_requests(bound(backbone, template), as_questions(rows), AnswerSpace(words))
    found = learn(backbone, template, items, enough=lambda found: found.state.best_score > 0.95)
    assert found.state.start["dev_score"] < 0.95
    assert found.state.best_loss < found.state.start["dev_loss"]


@dataclass(frozen=True)
class Resumed:
    """A training that is stopped and resumed: its settings, its template, the backbone, and whether it diverges."""

    settings: dict[str, Any] = field(default_factory=dict)
    template: str = TEMPLATE
    backbone: str = "llama"
    diverges: bool = False


DEEP = "[D:the city of] [P] [X] [D:is] so [Y]"
RESUMED = {
    "lstm": Resumed({"dropout": 0.3}),
    "mlp": Resumed({"encoder": "mlp", "dropout": 0.3}),
    "none": Resumed({"encoder": "none"}),
    "several batches a step": Resumed({"batch_size": 1, "accumulation_steps": 3, "dropout": 0.2}),
    "prefix cache": Resumed(template="{x} and {x} [P:is] [P*2] [Y]"),
    "diverged": Resumed({"encoder": "mlp", "dropout": 0.3}, diverges=True),
    "block": Resumed({"deep_lr": 0.05}, DEEP),
    "block of a network": Resumed({"deep_encoder": "mlp", "deep_lr": 0.05}, DEEP),
    "offsets": Resumed({"deep_lr": 0.05}, DEEP, "bert"),
    "offsets of a network": Resumed({"deep_encoder": "mlp", "deep_lr": 0.05}, DEEP, "t5"),
}


@pytest.mark.parametrize("stops", [(1,), (3, 4), (5,), (1, 2, 3, 4, 5, 6)], ids=str)
@pytest.mark.parametrize("case", RESUMED)
def test_resume_is_exact(case: str, stops: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariants *Resume is exact* and *Frozen is frozen*: stopped within an epoch, at its end, and again and again."""
    monkeypatch.setattr(prefix_cache, "MIN_PREFIX_TOKENS", 2)
    one = RESUMED[case]
    if one.diverges:
        let_diverge(monkeypatch)
    backbone = backbone_of(one.backbone)
    blocks = backbone.reads_blocks if "D" in one.template else False
    filled = TokenizedTemplate(
        Template.parse(one.template), tokenizer=backbone.tokenizer, kind=backbone.kind, block=blocks, max_length=60
    )
    items = target_requests(filled, as_records(FACTS), with_stop=True)
    config, before = TrainConfig.from_json({**FAST, **one.settings}), digest(backbone)

    def trained(stop: int | None, folder: Path | None = None) -> Trainer:
        torch.manual_seed(stop or 123)  # whatever else the process drew
        found = Trainer(backbone, filled, config=config, checkpoint=folder, identity={"data": "facts"})
        found.load()
        with contextlib.nullcontext() if stop is None else pytest.raises(Interrupted, match=f"after {stop} steps"):
            found.fit(items, items[:4], should_stop=lambda: found.state.step == stop)
        return found

    whole = trained(None)
    for stop in stops:
        trained(stop, tmp_path)
    again = trained(None, tmp_path)
    first = Trainer(backbone, filled, config=config).learner
    for wanted, ended, start in zip(
        (*whole.learner.learned().tensors, whole.best_vectors, *(whole.best_deep or DeepParams()).tensors.values()),
        (*again.learner.learned().tensors, again.best_vectors, *(again.best_deep or DeepParams()).tensors.values()),
        (*first.learned().tensors, first.vectors(), *(first.deep() or DeepParams()).tensors.values()),
        strict=True,
    ):
        assert torch.equal(wanted, ended)
        assert one.diverges or not torch.equal(start, ended)
    assert without_seconds(again) == without_seconds(whole)
    assert (again.state.start, again.state.chosen_epoch) == (whole.state.start, whole.state.chosen_epoch)
    assert len(again.state.diverged) == one.diverges
    assert (again.cached["tokens"] > 0) == (case == "prefix cache")
    assert digest(backbone) == before


def test_checkpointing_with_a_block_of_deep_slots_has_the_same_result(causal: Backbone) -> None:
    filled = TokenizedTemplate(
        Template.parse("[D:the city of] [X] is [Y]"), tokenizer=causal.tokenizer, kind=causal.kind, block=True
    )
    items = target_requests(filled, as_records(FACTS), with_stop=True)
    found = []
    for checkpointing in (False, True):
        one = Trainer(causal, filled, config=TrainConfig.from_json({**FAST, "checkpointing": checkpointing}))
        one.fit(items, items[:4])
        found.append(one.learner.deep())
    plain, saved = found
    assert plain is not None
    assert saved is not None
    assert plain.prefix is not None
    assert torch.equal(plain.prefix, saved.prefix)  # type: ignore[arg-type]


def test_keys_stay_where_only_values_learn(causal: Backbone) -> None:
    filled = TokenizedTemplate(
        Template.parse("[D:the city of] [X] is [Y]"), tokenizer=causal.tokenizer, kind=causal.kind, block=True
    )
    items = target_requests(filled, as_records(FACTS), with_stop=True)
    found = Trainer(causal, filled, config=TrainConfig.from_json({**FAST, "values_only": True}))
    start = found.learner.deep()
    found.fit(items, items[:4])
    end = found.learner.deep()
    assert start is not None
    assert end is not None
    assert start.prefix is not None
    assert end.prefix is not None
    assert torch.equal(start.prefix[:, 0], end.prefix[:, 0])
    assert not torch.equal(start.prefix[:, 1], end.prefix[:, 1])


@pytest.mark.parametrize("text", ["[D:the city of] [X] is [Y]", "[X] [D:is in] [Y]"])
def test_deep_slots_start_at_random_where_asked(causal: Backbone, text: str) -> None:
    """A control: the same draw with the same seed, and no longer the words."""
    filled = TokenizedTemplate(Template.parse(text), tokenizer=causal.tokenizer, kind=causal.kind, block=True)

    def start(how: str, seed: int) -> torch.Tensor:
        settings = TrainConfig.from_json({**FAST, "deep_start": how, "seed": seed})
        deep = Trainer(causal, filled, config=settings).learner.deep()
        assert deep is not None
        found = deep.prefix[:, :, :, deep.bos :] if deep.prefix is not None else deep.offsets
        assert found is not None
        return found

    drawn = start("random", 0)
    assert torch.equal(drawn, start("random", 0))
    assert not torch.equal(drawn, start("random", 1))
    assert 0.7 < float(drawn.std()) < 1.3
    assert torch.equal(start("text", 0), start("text", 1))
    assert float((start("text", 0) - drawn).abs().max()) > 0.1


def test_dropout_changes_what_is_learned(causal: Backbone) -> None:
    """Invariant *Resume is exact* would hold for a dropout that is never on."""
    assert not torch.equal(
        fit(make_trainer(causal, dropout=0.3)).learner.vectors(), fit(make_trainer(causal)).learner.vectors()
    )


def test_the_choice_survives_a_resume(causal: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant *Resume is exact*: the best vectors so far are part of the checkpoint."""
    outcomes = [(0.1, 5.0), (0.9, 5.0), (0.2, 5.0), (0.2, 5.0)]
    vectors = []
    for name, stops in (("whole", [99]), ("cut", [5, 99])):
        for stop in stops:
            found = make_trainer(causal, tmp_path / name, epochs=3)
            done = len(found.state.history) if found.load() else -1
            script_evaluations(monkeypatch, found, outcomes[len(found.state.history) + (done >= 0) :])
            try:
                fit(found, stop_after=stop)
            except Interrupted:
                assert found.state.chosen_epoch == 1
        vectors.append(found.best_vectors)
        assert found.state.chosen_epoch == 1
    assert torch.equal(*vectors)


MODES: list[dict[str, Any]] = [
    {"dropout": 0.3},
    {"train_backbone": "full"},
    {"accumulation_steps": 2, "encoder": "none"},
]


@pytest.mark.parametrize("kind", ["lstm", "none"])
def test_a_batch_of_many_tokens_runs_in_several_passes_with_the_gradients_of_one(
    causal: Backbone, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long its rows are: only a single row is never cut."""
    items = items_of(causal, TEMPLATE, FACTS)
    gradients, passes = [], []
    for tokens in (10_000, 40, 1):
        monkeypatch.setattr(steps, "PASS_TOKENS", {"cpu": tokens})
        learner = make_trainer(causal, encoder=kind, batch_size=7, max_grad_norm=1e9).learner
        step = Step(learner, items, 0, 1, 1.0)
        (taken,) = steps.take_steps([step])
        assert isinstance(taken, steps.Taken)
        passes.append([chunk.tokens for chunk in step.chunks()])
        gradients.append([taken.loss_sum, *(weight.grad for weight in learner.parameters())])
    assert (len(passes[0]), len(passes[2])) == (1, len(items))
    assert len(passes[1]) > 1
    assert max(passes[1]) <= 40
    for found in gradients[1:]:
        torch.testing.assert_close(found[0], gradients[0][0], rtol=1e-6, atol=0)
        for one, whole in zip(found[1:], gradients[0][1:], strict=True):
            torch.testing.assert_close(one, whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("settings", MODES, ids=str)
def test_a_pass_that_does_not_fit_is_halved_with_the_same_result(
    causal: Backbone,
    settings: dict[str, Any],
    backward: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A GPU that is too small costs time, not the run: losses and vectors are those of whole passes, up to rounding.

    Also where the backward pass breaks off and has left a part of its gradients. Without the backbone's own dropout.
    """
    causal.model.config.attention_dropout = 0.0
    for layer in causal.model.model.layers:
        layer.self_attn.attention_dropout = 0.0
    wanted = fit(make_trainer(causal, cache_memory=0.0, **settings))
    ran = small_memory(monkeypatch, 20, backward=backward)
    found = fit(make_trainer(causal, cache_memory=0.0, **settings))
    assert max(ran) <= 20
    assert [row["train_loss"] for row in found.state.history] == pytest.approx(
        [row["train_loss"] for row in wanted.state.history], rel=1e-5
    )
    torch.testing.assert_close(found.learner.vectors(), wanted.learner.vectors(), rtol=0, atol=1e-4)
    said = [record.message for record in caplog.records if "too little memory" in record.message]
    assert 0 < len(said) == len(set(said)) <= 3


def test_a_record_that_does_not_fit_alone_ends_training_with_what_to_do(
    causal: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = make_trainer(causal, cache_memory=0.0)
    items = items_of(causal, TEMPLATE, FACTS)
    small_memory(monkeypatch, 1)
    (outcome,) = steps.take_steps([Step(found.learner, items, 0, 1, 1.0)])
    assert isinstance(outcome, TrainingError)
    assert "does not fit into the memory of cpu; use smaller batches, shorter rows" in str(outcome)


@pytest.mark.parametrize(
    "settings",
    [
        {"dropout": 0.3, "checkpointing": True},
        {"train_backbone": "full"},
        {"train_backbone": "full", "checkpointing": True},
        {"train_backbone": "lora", "dropout": 0.3},
        {"encoder": "none"},
    ],
    ids=str,
)
def test_trainings_in_threads_follow_their_seeds(masked: Backbone, settings: dict[str, Any]) -> None:
    """Invariant *Seeds are separate*: threads share torch's global generator, and each training is as if it were alone.

    BERT's own dropout is on where its weights are trained, and checkpointing sets generators back in backward passes.
    """
    if settings.get("train_backbone") == "lora":
        pytest.importorskip("peft")
    seeds = range(3)

    def learn(seed: int) -> Tensor:
        return fit(make_trainer(masked, seed=seed, epochs=1, **settings)).learner.vectors()

    wanted = [learn(seed) for seed in seeds]
    before, interval = torch.get_rng_state(), sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(len(seeds)) as threads:
            found = list(threads.map(learn, seeds))
    finally:
        sys.setswitchinterval(interval)
    assert [torch.equal(*pair) for pair in zip(found, wanted, strict=True)] == [True] * len(seeds)
    assert torch.equal(torch.get_rng_state(), before)


def test_every_pass_has_a_dropout_of_its_own(causal: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant *Seeds are separate*: dropout is seeded by step and by place in the step."""
    seeds = []
    real = derived_seed

    def spy(seed: int, purpose: str, step: int = 0) -> int:
        if purpose == "dropout":
            seeds.append(real(seed, purpose, step))
        return real(seed, purpose, step)

    monkeypatch.setattr(steps, "derived_seed", spy)
    fit(make_trainer(causal, dropout=0.2, batch_size=2, accumulation_steps=2))
    assert len(seeds) == len(set(seeds)) == 8


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda _: b"",
    "flipped": lambda data: data[:-5] + bytes([data[-5] ^ 1]) + data[-4:],
    "text": lambda _: b"hello" * 100,
    "header": lambda data: data.replace(b'"sha256"', b'"sha255"'),
    "another encoder": lambda data: data,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint(causal: Backbone, tmp_path: Path, damage: str) -> None:
    """Invariant *Resume is exact*: an error names the file, and no run goes on from garbage."""
    encoder = "mlp" if damage == "another encoder" else "lstm"
    assert make_trainer(causal, tmp_path).load() is False
    with pytest.raises(Interrupted):
        fit(make_trainer(causal, tmp_path, epochs=1, encoder=encoder), stop_after=1)
    path = tmp_path / CHECKPOINT_FILE
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with pytest.raises(TrainingError, match=r"(?s)state.safetensors is damaged .*overwrite"):
        make_trainer(causal, tmp_path, epochs=1).load()


def test_a_checkpoint_is_whole_or_not_there(causal: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that fails half-way leaves the earlier checkpoint."""
    fit(make_trainer(causal, tmp_path, epochs=1))
    before = (tmp_path / CHECKPOINT_FILE).read_bytes()

    def fail(path: Path, *_: object, **__: object) -> None:
        path.with_name(".half.tmp").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "write_tensors", fail)
    with pytest.raises(KeyboardInterrupt):
        fit(make_trainer(causal, tmp_path, epochs=1))
    assert (tmp_path / CHECKPOINT_FILE).read_bytes() == before


def test_checkpoints_inside_an_epoch(causal: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Setting checkpoint_seconds: after every step at 0, at the ends of epochs otherwise."""
    written: list[int] = []

    def write(_: Path, saved: Checkpoint) -> None:
        written.extend(one.state.step for one in saved.trainings.values())

    monkeypatch.setattr(trainer, "write_checkpoint", write)
    monkeypatch.setattr(trainer, "SAVING_PAUSE", 0.0)
    fit(make_trainer(causal, tmp_path, checkpoint_seconds=0.0))
    assert sorted(set(written)) == [1, 2, 3, 4, 5, 6]
    written.clear()
    fit(make_trainer(causal, tmp_path, checkpoint_seconds=1000.0))
    assert written == [3, 6]


def test_same_seed_same_vectors(backbone: Backbone) -> None:
    """Invariant *Seeds are separate*: bit-equal, whatever the global generator did; another seed differs."""
    one = fit(make_trainer(backbone, dropout=0.2)).learner.vectors()
    torch.manual_seed(99)
    assert torch.equal(fit(make_trainer(backbone, dropout=0.2)).learner.vectors(), one)
    assert not torch.equal(fit(make_trainer(backbone, dropout=0.2, seed=1)).learner.vectors(), one)


def test_training_leaves_the_global_generator_alone(causal: Backbone) -> None:
    """Invariant *Seeds are separate*: the caller's own draws are not moved."""
    state = torch.get_rng_state()
    fit(make_trainer(causal, dropout=0.3))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_length_of_the_template_leaves_the_data_order_unchanged(
    causal: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Invariant *Seeds are separate*: the order is the seed's and the epoch's alone.

    Every record comes once per epoch.
    """
    orders: list[list[str]] = []
    real = Step.chunks

    def spy(self: Step) -> list[Chunk]:
        orders[-1].extend(names[id(item)] for item in self.items)
        return real(self)

    monkeypatch.setattr(Step, "chunks", spy)
    for template, settings in (
        ("[P] [X] [Y]", {}),
        ("[P*9] [X] [P:is] [Y]", {}),
        ("[P] [X] [Y]", {"encoder": "none"}),
        ("[P] [X] [Y]", {"seed": 1}),
    ):
        items = items_of(causal, template, FACTS)
        names = {id(item): record["x"] for item, record in zip(items, FACTS, strict=True)}
        orders.append([])
        config = TrainConfig.from_json({**FAST, **settings})
        Trainer(causal, bound(causal, template), config=config).fit(items, items[:2])
    assert orders[0] == orders[1] == orders[2] != orders[3]
    first, second = orders[0][:7], orders[0][7:]
    assert sorted(first) == sorted(second) == sorted(record["x"] for record in FACTS)
    assert first != second


def test_seeds_of_purposes_differ() -> None:
    """Invariant *Seeds are separate*: each purpose and step has a seed of its own."""
    seeds = {derived_seed(seed, purpose, step) for seed in (0, 1) for purpose in ("a", "b") for step in (0, 1, 2)}
    assert len(seeds) == 12
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    "settings", [{"batch_size": 2, "accumulation_steps": 2}, {"batch_size": 1, "accumulation_steps": 4}]
)
def test_accumulation_does_not_change_the_loss(backbone: Backbone, settings: dict[str, Any]) -> None:
    """Invariant *Loss position = scored position*: accumulation does not change the loss, 1x4 = 2x2 = 4x1.

    With a short last group of three and targets of different lengths.
    """
    whole = fit(make_trainer(backbone, batch_size=4))
    parts = fit(make_trainer(backbone, **settings))
    assert whole.state.step == parts.state.step == 4
    for one, other in zip(whole.state.history, parts.state.history, strict=True):
        assert math.isclose(one["train_loss"], other["train_loss"], abs_tol=1e-5)
        assert math.isclose(one["dev_loss"], other["dev_loss"], abs_tol=1e-5)
    torch.testing.assert_close(whole.learner.vectors(), parts.learner.vectors(), atol=1e-5, rtol=0)


def test_the_loss_of_a_step_is_per_token(backbone: Backbone) -> None:
    """The first epoch's loss in one batch is the loss of the start, in nats per token."""
    found = make_trainer(backbone, batch_size=7, epochs=1)
    expected = found.evaluate(items_of(backbone, TEMPLATE, FACTS)).loss
    fit(found)
    assert math.isclose(found.state.history[0]["train_loss"], expected, abs_tol=1e-5)


def test_two_processes_learn_what_one_learns(
    causal: Backbone, tmp_path: Path, model_folder: Callable[[str], Path]
) -> None:
    """Invariant *Loss position = scored position*: the number of processes does not change what is learned.

    With groups that do not divide among them, batches of which one gets no row, dropout, and deep slots. They tell each
    other the loss and the gradients of the slots, once a step: kilobytes, however large the encoder.
    """
    program = (
        f"import sys, pathlib; sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
        "from tests.training.spread import spread\n"
        "spread(*map(pathlib.Path, sys.argv[1:]))\n"
    )
    told = launched(2)
    with contextlib.ExitStack() as stack:
        running = [
            stack.enter_context(
                forked(program, model_folder("llama"), tmp_path, folder=tmp_path / f"said-{rank}", environment=one)
            )
            for rank, one in enumerate(told)
        ]
        assert [process.wait() for process in running] == [0, 0], [process.err[-3000:] for process in running]
    both = [safetensors.torch.load_file(tmp_path / f"{rank}.safetensors") for rank in range(2)]
    for name, value in both[0].items():
        assert torch.equal(value, both[1][name]), f"{name}: ranks must agree to the bit"
    for case, (_, _, numbers) in SPREAD.items():
        alone = learned_of(fit_spread(causal, case))
        torch.testing.assert_close(both[0][case], alone, atol=1e-5, rtol=0, msg=case)
        assert float((alone - learned_of(spread_trainer(causal, case))).abs().max()) > 1e-3
        assert max(both[0][f"{case}, sent"].tolist()) == 1 + numbers


def script_evaluations(monkeypatch: pytest.MonkeyPatch, found: Trainer, outcomes: list[tuple[float, float]]) -> None:
    """Let development results be (score, loss) pairs, the start's first."""
    results = iter([Evaluation(loss_, (score,)) for score, loss_ in outcomes])
    monkeypatch.setattr(found, "evaluate", lambda *_, **__: next(results))


@pytest.mark.parametrize(
    ("outcomes", "chosen"),
    [
        ([(0.1, 5.0), (0.2, 6.0), (0.4, 9.0), (0.3, 1.0)], 2),  # the highest score, whatever its loss
        ([(0.1, 5.0), (0.2, 6.0), (0.2, 4.0), (0.2, 5.0)], 2),  # of equal scores the lowest loss
        ([(0.1, 5.0), (0.2, 4.0), (0.2, 4.0), (0.2, 4.0)], 1),  # of equal ones the earliest
        ([(0.5, 5.0), (0.2, 1.0), (0.4, 1.0), (0.3, 1.0)], 0),  # the start may be the best
        ([(0.0, 5.0), (0.0, 4.0), (0.0, 3.0), (0.0, 2.0)], 3),
    ],
)
def test_the_choice_rule(
    causal: Backbone, monkeypatch: pytest.MonkeyPatch, outcomes: list[tuple[float, float]], chosen: int
) -> None:
    """The development part chooses by the rule that the record gives, ties included, and the vectors are that epoch's.

    So everyone can tell which part of the data chose the prompt.
    """
    found = make_trainer(causal, epochs=3)
    script_evaluations(monkeypatch, found, outcomes)
    vectors: list[Tensor] = []  # those of the start, which is reported as epoch 0, and of each epoch
    items = items_of(causal, TEMPLATE, FACTS)
    found.fit(items, items, report=lambda p: vectors.append(found.learner.vectors()) if p.stage == "epoch" else None)
    assert found.state.chosen_epoch == chosen
    assert (found.state.best_score, found.state.best_loss) == outcomes[chosen]
    assert torch.equal(found.best_vectors, vectors[chosen])


@pytest.mark.parametrize(
    ("outcomes", "values", "chosen"),
    [
        ([(0.1, 5.0), (0.2, 6.0), (0.4, 9.0), (0.3, 4.0)], None, 3),  # the lowest loss, whatever its score
        ([(0.1, 5.0), (0.2, 5.0), (0.4, 5.0), (0.3, 5.0)], None, 2),  # of equal losses the highest score
        ([(0.1, 5.0), (0.2, 6.0), (0.4, 9.0), (0.3, 4.0)], [3.0, 9.0, 8.0, 7.0], 1),  # the metric
        ([(0.1, 5.0), (0.2, 6.0), (0.4, 4.0), (0.3, 4.0)], [0.0, 0.0, 0.0, 0.0], 2),  # of equal ones the lowest loss
    ],
)
def test_the_choice_by_loss_or_by_a_metric(
    causal: Backbone,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    outcomes: list[tuple[float, float]],
    values: list[float] | None,
    chosen: int,
) -> None:
    """The score and loss that the record gives are those of the chosen epoch, also after a resume."""
    by = "loss" if values is None else "bleu"
    config = TrainConfig.from_json({**FAST, "epochs": 3, "metric_for_best_model": by})
    left = iter(values or ())

    def judge(*_: object) -> float:
        return next(left)

    def again(folder: Path | None = None) -> Trainer:
        one = None if values is None else judge
        return Trainer(causal, bound(causal, TEMPLATE), config=config, checkpoint=folder, judge=one)

    found = again(tmp_path / "checkpoint")
    script_evaluations(monkeypatch, found, outcomes[:2])
    items = items_of(causal, TEMPLATE, FACTS)
    with contextlib.suppress(StopIteration, RuntimeError):  # in the second epoch, as good as a kill
        found.fit(items, items)
    found = again(tmp_path / "checkpoint")
    assert found.load()
    left = iter((values or [0.0] * 4)[2:])
    script_evaluations(monkeypatch, found, outcomes[2:])
    found.fit(items, items)
    assert found.state.chosen_epoch == chosen
    assert (found.state.best_score, found.state.best_loss) == outcomes[chosen]
    if values is not None:
        told = [found.state.start, *found.state.history]
        assert [one["dev_bleu"] for one in told] == values


LOST = [(0.3, 2.0), (0.0, 6.0), (0.3, 4.0), (0.1, 3.0)]  # the start, and three epochs that are worse


@pytest.mark.parametrize(
    ("outcomes", "restarts", "lost", "chosen"),
    [
        ([*LOST, (0.2, 3.0), (0.4, 3.0), (0.3, 1.0)], 1, 1, 2),  # the second attempt is better than the start
        ([*LOST, *LOST[1:]], 1, 1, 0),  # it is lost, too
        ([*LOST, *LOST[1:], (0.5, 3.0), (0.2, 3.0), (0.2, 3.0)], 2, 2, 1),
        (LOST, 0, 0, 0),  # not asked for
        ([(0.3, 2.0), (0.0, 6.0), (0.3, 1.5), (0.1, 3.0)], 1, 0, 2),  # the loss of an epoch was lower
        ([(0.3, 2.0), (0.0, 6.0), (0.2, 1.5), (0.1, 3.0)], 1, 0, 0),  # ... though its score was not higher
        ([(0.3, 2.0), (0.4, 6.0), (0.3, 4.0), (0.1, 3.0)], 1, 0, 1),  # the score of an epoch was higher
    ],
)
def test_a_training_that_is_lost_starts_anew_with_half_the_rate(
    causal: Backbone,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    outcomes: list[tuple[float, float]],
    restarts: int,
    lost: int,
    chosen: int,
) -> None:
    """Decision 72. The new attempt begins at the same values, and what it reports is its own."""
    found = make_trainer(causal, epochs=3, retries_on_divergence=restarts)
    first = found.learner.vectors()
    script_evaluations(monkeypatch, found, outcomes)
    rates: list[float] = []
    begun: list[Tensor] = []

    def watch(progress: Progress) -> None:
        if progress.stage == "epoch" and progress.done == 0:
            begun.append(found.learner.vectors())
        if progress.stage == "train":
            rates.append(found.numbers["lr"])

    items = items_of(causal, TEMPLATE, FACTS)
    found.fit(items, items, report=watch)
    assert len(found.state.diverged) == lost
    assert [[row["dev_loss"] for row in rows] for rows in found.state.diverged] == [[6.0, 4.0, 3.0]] * lost
    assert [row["epoch"] for row in found.state.history] == [1, 2, 3]
    assert found.state.chosen_epoch == chosen
    each = len(rates) // (1 + lost)
    for number in range(1 + lost):
        assert rates[number * each : (number + 1) * each] == pytest.approx(
            [rate * 0.5**number for rate in rates[:each]]
        )
    assert all(torch.equal(vectors, first) for vectors in begun)
    assert ("restarting with 0.5 of the learning rates" in caplog.text) == (lost > 0)
    assert ("the initialization is kept. Lower the learning rate" in caplog.text) == (
        found.state.has_diverged and chosen == 0 and outcomes[2][1] > 2.0
    )


def let_diverge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing be better than the initialization."""
    real = Trainer.evaluate

    def evaluate(self: Trainer, *args: Any, note: str = "", **named: Any) -> Evaluation:
        if note == "before training":
            return Evaluation(0.0, (1.0,))
        return real(self, *args, note=note, **named)

    monkeypatch.setattr(Trainer, "evaluate", evaluate)


def test_one_that_overfits_is_not_lost() -> None:
    """The loss of what it learns from falls."""
    history: list[dict[str, float | int]] = [{"epoch": 1, "train_loss": 1.9, "dev_loss": 2.1}]
    assert not RunState(start={"dev_loss": 2.0}, history=history).has_diverged
    history[0]["train_loss"] = 2.05
    assert RunState(start={"dev_loss": 2.0}, history=history).has_diverged


def test_a_restarted_training_is_that_of_half_the_rate(causal: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the attempt that diverged is left in the next one."""
    let_diverge(monkeypatch)
    found = fit(make_trainer(causal, encoder="none", lr=0.02, retries_on_divergence=1))
    wanted = fit(make_trainer(causal, encoder="none", lr=0.01, retries_on_divergence=0))
    assert len(found.state.diverged) == 1
    assert torch.equal(found.learner.vectors(), wanted.learner.vectors())
    assert without_seconds(found) == without_seconds(wanted)
    assert found.state.step == 2 * wanted.state.step


def test_a_training_of_the_backbone_does_not_start_anew(causal: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Comparisons try other learning rates there."""
    found = make_trainer(causal, epochs=3, train_backbone="full")
    script_evaluations(monkeypatch, found, LOST)
    fit(found)
    assert not found.state.diverged


EVEN = [(0.1, 5.0), (0.2, 5.0), (0.3, 5.0)] + [(0.3, 6.0)] * 7
# Few records tie in their score while the loss still falls; the chosen epoch has the highest score.
FALLING = [(0.1, 9.0), (0.3, 8.0), (0.2, 7.0), (0.2, 6.0), (0.2, 5.0), (0.2, 5.5), (0.2, 5.5)] + [(0.2, 1.0)] * 3


@pytest.mark.parametrize(
    ("outcomes", "patience", "epochs", "chosen"),
    [(EVEN, 1, 3, 2), (EVEN, 2, 4, 2), (EVEN, 9, 9, 2), (FALLING, 2, 6, 1)],
)
def test_early_stopping(
    causal: Backbone,
    monkeypatch: pytest.MonkeyPatch,
    outcomes: list[tuple[float, float]],
    patience: int,
    epochs: int,
    chosen: int,
) -> None:
    """Training ends after ``patience`` epochs without a better result."""
    found = make_trainer(causal, epochs=9, patience=patience)
    script_evaluations(monkeypatch, found, outcomes)
    fit(found)
    assert len(found.state.history) == epochs
    assert found.state.chosen_epoch == chosen
    assert found.state.done


def test_a_loss_that_is_no_number(causal: Backbone) -> None:
    """Training stops at once, and says what may help."""
    found = make_trainer(causal)
    with torch.no_grad():
        found.learner.encoder.start.fill_(torch.nan)
    items = items_of(causal, TEMPLATE, FACTS)
    with pytest.raises(TrainingError, match=r"development loss became nan in epoch 0; use a lower learning rate"):
        found.fit(items, items)
    found.state.start = {"dev_loss": 1.0}
    with pytest.raises(TrainingError, match=r"the loss became nan in epoch 1; use a lower learning rate than 0.01"):
        found.fit(items, items)


def test_vectors_that_become_no_numbers_are_not_chosen(causal: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that breaks the vectors at the end of an epoch is seen before they are saved."""
    found = make_trainer(causal, encoder="none", epochs=1, batch_size=7)
    before = found.learner.vectors()
    monkeypatch.setattr(found.learner.optimizer, "step", lambda: found.learner.encoder.free.data.fill_(torch.inf))
    with pytest.raises(TrainingError, match=r"development loss became nan in epoch 1"):
        fit(found)
    assert torch.equal(found.best_vectors, before)


def test_fit_takes_train_and_dev_only() -> None:
    """The test part is asked once, by a call of its own after training: its data cannot come near ``fit``."""
    assert list(inspect.signature(Trainer.fit).parameters) == ["self", "train", "dev", "report", "should_stop"]


def test_the_learning_rate_rises_and_falls() -> None:
    """Linear warm-up, linear decay, never zero at a step that is taken."""
    factors = [linear_schedule(step, 20, warmup_fraction=0.25) for step in range(20)]
    assert factors[5] == max(factors) == 1.0
    assert factors[:6] == sorted(factors[:6])
    assert factors[5:] == sorted(factors[5:], reverse=True)
    assert min(factors) > 0
    assert linear_schedule(0, 1, warmup_fraction=0.0) == 1.0
    assert linear_schedule(0, 1, warmup_fraction=0.1) == 0.5


def test_gradients_are_clipped(causal: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Setting max_grad_norm."""
    norms = []
    found = make_trainer(causal, max_grad_norm=1e-3, encoder="none")

    def note() -> None:
        assert found.learner.encoder.free.grad is not None
        norms.append(float(found.learner.encoder.free.grad.norm()))

    monkeypatch.setattr(found.learner.optimizer, "step", note)
    fit(found)
    assert max(norms) <= 1e-3 * 1.001


@pytest.mark.parametrize(
    ("template", "settings", "names"),
    [
        (TEMPLATE, {}, {"lr"}),
        ("[D*2] [X] [Y]", {}, {"deep_lr"}),
        ("[X] [Y]", {"train_backbone": "full"}, {"backbone_lr"}),
        (TEMPLATE, {"train_backbone": "lora"}, {"lr", "lora_lr"}),
    ],
)
def test_the_learning_rates_of_what_is_trained_are_logged(
    causal: Backbone, template: str, settings: dict[str, Any], names: set[str]
) -> None:
    config = TrainConfig(epochs=1, warmup_fraction=0.0, batch_size=100, **settings)
    seen: list[Progress] = []
    train(template, FACTS, backbone=causal, dev=FACTS, config=config, report=seen.append)
    (numbers,) = [now.numbers for now in seen if now.stage == "train"]
    assert {name: numbers[name] for name in RATES if name in numbers} == {name: getattr(config, name) for name in names}


def test_callbacks_get_numbers(causal: Backbone) -> None:
    """Of every step and every evaluation, so that nobody has to read them out of the text."""
    seen: list[Progress] = []
    found = make_trainer(causal, lr=0.5)
    items = items_of(causal, TEMPLATE, FACTS)
    found.fit(items, items, report=seen.append)
    steps = [p.numbers for p in seen if p.stage == "train"]
    assert [(one["step"], one["epoch"]) for one in steps] == [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 2)]
    assert [one["lr"] for one in steps] == [0.5 * linear_schedule(step, 6, warmup_fraction=0.1) for step in range(6)]
    assert all(one["loss"] > 0 and one["tokens_per_second"] > 0 for one in steps)
    assert all(set(one) <= set(NUMBERS) for one in steps)
    assert [p.done for p in seen if p.stage == "train"] == [3, 6, 7, 10, 13, 14]
    assert {p.total for p in seen if p.stage == "train"} == {14}
    start, *epochs = [p.numbers for p in seen if p.stage == "epoch"]
    assert start == {"step": 0, "epoch": 0, **found.state.start}
    for number, (one, row) in enumerate(zip(epochs, found.state.history, strict=True), start=1):
        losses = {name: row[name] for name in ("train_loss", "dev_loss", "dev_score")}
        assert one == {"step": 3 * number, "epoch": number, **losses}


def test_evaluation_does_not_depend_on_batches(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant *Fast = slow*: items in batches score as each item alone, with hits in the order of the items."""
    items = items_of(backbone, TEMPLATE, FACTS)
    found = make_trainer(backbone)
    whole, single = found.evaluate(items), [found.evaluate([item]) for item in items]
    counts = [loss_count([item]) for item in items]
    mean = sum(one.loss * count for one, count in zip(single, counts, strict=True)) / sum(counts)
    assert math.isclose(whole.loss, mean, abs_tol=1e-5)
    assert whole.hits == tuple(one.hits[0] for one in single)
    assert whole.score == sum(whole.hits) / len(items)
    mixed = items_of(backbone, TEMPLATE, RECORDS)
    own = [float(item.choices[0].own_tokens) for item in mixed]
    monkeypatch.setattr(evaluate, "hits", lambda group, _: [float(item.choices[0].own_tokens) for item in group])
    assert list(found.evaluate(mixed).hits) == own != sorted(own)


LATE = "{x} and {x} [P:is] [P*2] [Y]"


def fit_late(
    backbone: Backbone, folder: Path | None = None, *, stop_after: int | None = None, **settings: Any
) -> Trainer:
    """Train slots that stand behind the text."""
    config = TrainConfig.from_json({**FAST, **settings})
    found = Trainer(backbone, bound(backbone, LATE), config=config, checkpoint=folder, identity={"data": "facts"})
    found.load()
    items = items_of(backbone, LATE, FACTS)
    with contextlib.suppress(Interrupted):
        found.fit(items, items[:4], should_stop=lambda: stop_after is not None and found.state.step >= stop_after)
    return found


def test_the_prefix_cache_changes_nothing_but_rounding(causal: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant *Fast = slow*: training from the first slot onwards learns what training over whole rows learns."""
    monkeypatch.setattr(prefix_cache, "MIN_PREFIX_TOKENS", 2)
    kept, whole = fit_late(causal), fit_late(causal, cache_memory=0.0)
    assert kept.cached["tokens"] > 0
    assert not any(whole.cached.values())
    assert not torch.equal(kept.learner.vectors(), kept.learner.encoder.start)
    torch.testing.assert_close(kept.learner.vectors(), whole.learner.vectors(), rtol=0, atol=1e-4)
    assert [row["dev_loss"] for row in kept.state.history] == pytest.approx(
        [row["dev_loss"] for row in whole.state.history], abs=1e-4
    )
    assert not kept.learner.prefix_cache.is_used  # and nothing is kept beyond the run


def test_stops_between_passes_that_fill_the_prefix_cache(
    causal: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who asks to stop does not wait for the rest of a long pass, and what was to come is done by the next run."""
    monkeypatch.setattr(prefix_cache, "MIN_PREFIX_TOKENS", 2)
    whole = fit_late(causal)
    monkeypatch.setattr(batch_module, "MAX_BATCH_TOKENS", 1)
    passes: list[int] = []
    real = PrefixCache._run

    def watch(parts: PrefixCache, group: Sequence[Ids]) -> list[Tensor]:
        passes.append(len(group))
        return real(parts, group)

    monkeypatch.setattr(PrefixCache, "_run", watch)
    asked = iter([False, False, True])
    found = Trainer(
        causal, bound(causal, LATE), config=TrainConfig.from_json(FAST), checkpoint=tmp_path, identity={"data": "facts"}
    )
    items = items_of(causal, LATE, FACTS)
    with pytest.raises(Interrupted, match="after 0 steps"):
        found.fit(items, items[:4], should_stop=lambda: next(asked))
    assert passes == [1, 1, 1]
    assert (tmp_path / CHECKPOINT_FILE).is_file()
    assert not found.learner.prefix_cache.tokens
    monkeypatch.setattr(batch_module, "MAX_BATCH_TOKENS", 4096)
    resumed = fit_late(causal, tmp_path)
    assert torch.equal(resumed.best_vectors, whole.best_vectors)
    assert without_seconds(resumed) == without_seconds(whole)


@pytest.mark.parametrize("train_backbone", ["none", "full", "lora"])
def test_dropout_is_the_backbones_own_where_it_learns(
    masked: Backbone, monkeypatch: pytest.MonkeyPatch, train_backbone: str
) -> None:
    """BERT's dropout of 0.1 is on in training where the backbone is trained, and off in frozen mode."""
    assert masked.model.config.hidden_dropout_prob == 0.1
    seen: list[tuple[bool, int]] = []
    real = target_logits

    def watch(backbone: Backbone, examples: list[Example], learned: PromptBatch, **more: Any) -> Tensor:
        dropping = {one.training for one in backbone.model.modules() if isinstance(one, torch.nn.Dropout) and one.p}
        taking = sum(weight.requires_grad for weight in backbone.model.parameters())
        if torch.is_grad_enabled():
            seen.append((dropping == {True}, taking))
        return real(backbone, examples, learned, **more)

    monkeypatch.setattr(steps, "target_logits", watch)
    found = fit(make_trainer(masked, train_backbone=train_backbone, epochs=1))
    assert set(seen) == {(train_backbone != "none", len(found.learner.weights))}
    assert {"none": 0, "full": len(list(masked.model.parameters()))}.get(train_backbone, 26) == len(
        found.learner.weights
    )
    assert (found.learner.backbone is masked) == (train_backbone == "none")
    assert not any(one.training for one in found.learner.backbone.model.modules())


@pytest.mark.parametrize("train_backbone", ["full", "lora"])
def test_the_backbone_learns_at_a_rate_of_its_own(causal: Backbone, train_backbone: str) -> None:
    """With decay for its matrices only, and nothing of it for the encoder."""
    settings: dict[str, Any] = {
        "backbone_lr": 0.25,
        "lora_lr": 0.5,
        "backbone_weight_decay": 0.125,
        "weight_decay": 0.75,
    }
    found = make_trainer(causal, train_backbone=train_backbone, **settings)
    groups = [(group["lr"], group["weight_decay"]) for group in found.learner.optimizer.param_groups]
    assert groups == [(0.01, 0.75), *([(0.25, 0.125), (0.25, 0.0)] if train_backbone == "full" else [(0.5, 0.0)])]
    assert all(weight.ndim > 1 for weight in found.learner.optimizer.param_groups[1]["params"])


def test_a_damaged_file_of_the_best_weights(causal: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Interrupted):
        fit(make_trainer(causal, tmp_path, train_backbone="full"), stop_after=4)
    best = next(tmp_path.glob("best-*.safetensors"))
    best.write_bytes(best.read_bytes()[:-9])
    again = make_trainer(causal, tmp_path, train_backbone="full", epochs=2)
    again.load()
    monkeypatch.setattr(again, "_rank", lambda *_: (0.0, 0.0))  # nothing better is found any more
    with pytest.raises(TrainingError, match=r"best-.* is not a whole safetensors file .*; start again with overwrite"):
        fit(again)


def test_adapters_that_do_not_work_are_found_before_training() -> None:
    """A run of hours must not end with a traceback, nor with a prompt that cannot be loaded."""
    with pytest.raises(BackboneError, match="cannot run with adapters"):
        make_trainer(experts("PhimoeForCausalLM"), train_backbone="lora")
