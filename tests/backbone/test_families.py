"""Every family keeps the invariants of docs/invariants.md: *Identity*, *Alone or in company*, *Frozen is frozen*,
*Saved is what was trained* and *Fast = slow*.
"""

import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

import ptuning
import ptuning.engine.forward
from ptuning.backbone.backbone import Backbone
from ptuning.backbone.families import COLUMNS, TESTED
from ptuning.backbone.families import families as shipped
from ptuning.backbone.loading import load_backbone, load_tokenizer
from ptuning.backbone.probes import check_reading
from ptuning.config import GenerationSettings, TrainConfig
from ptuning.engine.batch import Side
from ptuning.engine.decoding import GeneratedText
from ptuning.engine.forward import shared_prefix_tokens, target_logits
from ptuning.engine.prefix_store import PreparedPrompt
from ptuning.engine.runner import generate
from ptuning.engine.soft_prompt import PromptBatch
from ptuning.errors import BackboneError, TemplateError
from ptuning.names import PREDICTIONS_FILE
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prompt import Prompt
from ptuning.prompt.storage import BackboneId
from ptuning.records import Record
from ptuning.template.encode import Example
from ptuning.template.segments import FILLS_MASKS
from ptuning.training.trainer import Trainer
from tests import families
from tests.conftest import RECORDS, bound, items_of, learned, spoken
from tests.families import FAMILIES, PADDED_ROWS, TEMPLATE, TWO_SIDED, backbone_of, built, model_of, own_copy

every_family = pytest.mark.parametrize("name", FAMILIES)


def templates(backbone: Backbone) -> list[str]:
    """The template that a family is tried with, and for two sides another with slots on both and on the decoder's."""
    return [TEMPLATE, TWO_SIDED, "[X] [>] [P*2] [Y]"] if backbone.kind == "encoder-decoder" else [TEMPLATE]


@torch.no_grad()
def plain(backbone: Backbone, example: Example, ids: Sequence[int]) -> Tensor:
    """What transformers itself answers to an example's token ids at its scored positions, (N, V)."""
    at = torch.tensor(example.logit_positions)
    row, split = torch.tensor([ids]), example.encoder_tokens
    if backbone.kind == "encoder-decoder":
        logits = backbone.model(input_ids=row[:, :split], decoder_input_ids=row[:, split:]).logits[0, at - split]
    elif backbone.kind == "permuted":
        hidden = torch.zeros(1, len(ids), len(ids))
        hidden[:, :, at] = 1.0
        asked = torch.nn.functional.one_hot(at, len(ids))[None].float()
        logits = backbone.model(input_ids=row, perm_mask=hidden, target_mapping=asked).logits[0]
    else:
        logits = backbone.model(input_ids=row).logits[0, at]
    return logits[:, : backbone.vocabulary].float()  # type: ignore[no-any-return]


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def digest(backbone: Backbone) -> str:
    """Return a hash of every weight and buffer."""
    found = hashlib.sha256()
    named = {**dict(backbone.model.named_parameters()), **dict(backbone.model.named_buffers())}
    for name, tensor in named.items():
        found.update(name.encode() + tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def check_identity(backbone: Backbone) -> None:
    for template in templates(backbone):
        examples = bound(backbone, template).examples(RECORDS)
        ids = [20, 21, 22][: len(examples[0].slot_positions)]
        found = PromptModel(backbone).target_logits(RECORDS, Prompt.from_token_ids(template, ids, backbone))
        for example, logits in zip(examples, found, strict=True):
            close(logits, plain(backbone, example, spoken(example, ids)))


@every_family
def test_identity(name: str) -> None:
    """Invariant *Identity*: slots holding token embeddings equal the plain run, and loading finds nothing to refuse.

    The head reads what is scored and nothing else (docs/decisions.md, decision 6).
    """
    backbone = built(name)
    check_reading(backbone)
    assert backbone.branches in (True, False)  # which takes runs of its own
    read: list[int] = []
    head = backbone.model.get_output_embeddings()
    assert head is not None
    handle = head.register_forward_hook(lambda _module, inputs, _output: read.append(inputs[0].shape[:-1].numel()))
    found = PromptModel(backbone).target_logits(RECORDS, Prompt.manual("[X] is [Y]"))
    handle.remove()
    assert read == [sum(map(len, found))]
    check_identity(backbone)


# The switch that unties their head gives the encoder and the decoder tables of their own as well.
ONE_SWITCH = ("bart", "mbart", "pegasus", "m2m100", "led")


@every_family
def test_identity_with_the_other_head(name: str) -> None:
    """Tied heads where the family has untied ones, and the other way round."""
    backbone = backbone_of(name, tie_word_embeddings=not built(name).model.config.get_text_config().tie_word_embeddings)
    if name in ONE_SWITCH:
        with pytest.raises(BackboneError, match="a prompt belongs to one table"):
            check_reading(backbone)
        return
    check_identity(backbone)


@every_family
def test_alone_or_in_company(name: str) -> None:
    """Invariant *Alone or in company*: a row's logits are its own.

    Neither the rows beside it, nor pads on either side, nor the batch's order change them.
    """
    backbone = built(name)
    for template in templates(backbone):
        prompt = learned(backbone, template)
        alone = [PromptModel(backbone).target_logits([record], prompt)[0] for record in RECORDS]
        examples = prompt.bind(backbone).examples(RECORDS)
        sides: tuple[Side, ...] = ("left", "right") if backbone.pads_left else ("right",)
        for side, step in itertools.product(sides, (1, -1)):
            rows = examples[::step]
            logits = target_logits(backbone, rows, prompt.learned(backbone), pad_side=side)
            together = logits.split([len(row.logit_positions) for row in rows])[::step]
            for single, batched in zip(alone, together, strict=True):
                close(single, batched)


@every_family
def test_saved_is_what_was_trained_and_frozen_is_frozen(name: str, tmp_path: Path) -> None:
    """Invariants *Frozen is frozen* and *Saved is what was trained*: training leaves the backbone bit-identical and
    learns; backbone and prompt, saved and loaded, give bit-equal logits.
    """
    backbone = own_copy(name)
    before = digest(backbone)
    template = templates(backbone)[-1]
    config = TrainConfig.from_json({"epochs": 2, "batch_size": 3, "lr": 0.01, "patience": 99})
    filled = bound(backbone, template)
    trainer = Trainer(backbone, filled, config=config)
    start = trainer.learner.vectors().detach().clone()
    items = items_of(backbone, template, RECORDS)
    trainer.fit(items, items[:2])
    vectors = trainer.learner.vectors().detach()
    assert trainer.state.step == 4
    assert bool((vectors != start).any(dim=1).all())
    assert digest(backbone) == before
    assert all(weight.grad is None for weight in backbone.model.parameters())
    assert not any(module.training for module in backbone.model.modules())

    prompt = Prompt(filled.template, vectors, BackboneId.of(backbone))
    prompt.save(tmp_path / "prompt")
    backbone.model.save_pretrained(tmp_path / "backbone")
    families.tokenizer_of(FAMILIES[name].tokenizer).save_pretrained(tmp_path / "backbone")
    loaded = load_backbone(str(tmp_path / "backbone"), dtype="float32", device="cpu")
    assert (loaded.kind, loaded.fingerprint) == (backbone.kind, backbone.fingerprint)
    again = PromptModel(loaded).target_logits(RECORDS, Prompt.load(tmp_path / "prompt"))
    for one, other in zip(PromptModel(backbone).target_logits(RECORDS, prompt), again, strict=True):
        assert torch.equal(one, other)
    tokenizer, kind = load_tokenizer(str(tmp_path / "backbone"))
    assert kind == backbone.kind
    for part in ("prefix_ids", "suffix_ids", "gap", "decoder_ids", "end_ids", "max_tokens"):
        assert getattr(tokenizer, part) == getattr(backbone.tokenizer, part), part


@every_family
def test_gathered_logits_equal_plain_ones(name: str) -> None:
    """Invariant *Fast = slow*: without the hook the head reads every position, and the asked ones are the same."""
    backbone = own_copy(name)
    prompt = learned(backbone, templates(backbone)[-1])
    gathered = PromptModel(backbone).target_logits(RECORDS, prompt)
    for module in backbone.model.modules():
        module._forward_hooks.clear()
    for one, other in zip(gathered, PromptModel(backbone).target_logits(RECORDS, prompt), strict=True):
        close(one, other)


def slow_answer(backbone: Backbone, prompt: Prompt, record: dict[str, str], *, tokens: int) -> list[int]:
    """Write greedily, running the whole row for every token."""
    assert prompt.slot_vectors is not None
    filled = bound(backbone, str(prompt.template))
    context = filled.contexts([record])[0]
    ends = {*backbone.tokenizer.end_ids, backbone.tokenizer.gap.end_id}
    ids: list[int] = []
    while len(ids) < tokens and not ends & set(ids):
        row = (*context.token_ids, *ids)
        example = Example(row, context.slot_positions, (len(row) - 1,), (), 0, encoder_tokens=context.encoder_tokens)
        logits = target_logits(backbone, [example], prompt.learned(backbone))
        ids.append(int(logits[0].argmax()))
    return [token for token in ids if token not in ends]


@every_family
def test_written_answers(name: str) -> None:
    """Invariants *Fast = slow* and *Alone or in company*: with the cache and in company a model writes what it writes
    alone without one, on every template, and nothing from the table's padded rows, however likely they are.

    Users of other tools got the text of a model without a prompt as soon as the cache was on.
    """
    backbone = own_copy(name)
    head = backbone.model.get_output_embeddings()
    assert head is not None
    assert backbone.embedding_rows == backbone.vocabulary + PADDED_ROWS
    if backbone.model.config.get_text_config().tie_word_embeddings is False:
        with torch.no_grad():
            head.weight[backbone.vocabulary :].mul_(30.0)
    for template in templates(backbone):
        prompt = learned(backbone, template)
        model = PromptModel(backbone)
        if backbone.kind in FILLS_MASKS:
            for one, row in zip(
                model.predict(RECORDS, prompt, top_k=3, generation={"max_new_tokens": 2}), RECORDS, strict=True
            ):
                again = model.predict([row], prompt, top_k=3, generation={"max_new_tokens": 2})[0]
                assert (one.text, one.tokens) == (again.text, again.tokens)
            continue
        filled = bound(backbone, template)
        assert prompt.slot_vectors is not None
        found = generate(
            backbone,
            PreparedPrompt(prompt.learned(backbone), filled),
            RECORDS,
            max_tokens=5,
            settings=GenerationSettings(),
            top_k=1,
        )
        for record, answers in zip(RECORDS, found, strict=True):
            ids = slow_answer(backbone, prompt, dict(record), tokens=5)
            assert answers[0].text == backbone.tokenizer.decode(ids).split("\n")[0].strip()
        # Beams are those of each record alone.
        beams = generate(
            backbone,
            PreparedPrompt(prompt.learned(backbone), filled),
            RECORDS,
            max_tokens=4,
            settings=GenerationSettings(num_beams=3),
            top_k=3,
        )
        for record, answers in list(zip(RECORDS, beams, strict=True))[:3]:
            alone = generate(
                backbone,
                PreparedPrompt(prompt.learned(backbone), filled),
                [record],
                max_tokens=4,
                settings=GenerationSettings(num_beams=3),
                top_k=3,
            )[0]
            assert [one.text for one in answers] == [one.text for one in alone]


@every_family
def test_candidates_and_their_order(name: str) -> None:
    """Candidates of one and of several tokens are scored as their targets are; where a row can hold several
    continuations, with one row for all.
    """
    backbone = built(name)
    assert backbone.branches == (name in set(PREFIX) - {"bloom", "gpt-j", "xglm"})  # which make positions or masks anew
    names = ["Nairobi", "yes", "a good film", "a good film and a bad one", "no"]
    for template in templates(backbone):
        prompt = learned(backbone, template)
        model = PromptModel(backbone)
        ranked = {one.text: one.log_prob for one in model.rank(RECORDS[:1], prompt, names)[0]}
        for text in names:
            record = {**RECORDS[0], "y": text}
            logits = model.target_logits([record], prompt)[0]
            ids = bound(backbone, template).examples([record])[0].target_ids
            total = torch.log_softmax(logits, dim=-1)[torch.arange(len(ids)), torch.tensor(ids)].sum()
            assert ranked[text] == pytest.approx(float(total), abs=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "bert", "xlnet"])
def test_a_model_without_a_decoders_side_refuses_to_turn(name: str) -> None:
    """With a caret at [>], and what to do."""
    with pytest.raises(TemplateError, match=r"has only one side; leave it out\n.*\n +\^ column 5"):
        bound(built(name), "[X] [>] [Y]")


# Causal, and no windows (Gemma 2 and 3, Mistral) or recurrent states (Mamba, RWKV): their caches hold all of a prefix.
PREFIX = (
    *("gpt2", "opt", "opt-350m", "gpt-neox", "llama", "qwen3", "bloom", "glm-4", "falcon", "phi"),
    *("gpt-j", "gemma", "xglm", "stablelm", "cohere", "ctrl"),
)


@every_family
def test_a_shared_prefix(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant *Fast = slow*: with a shared prefix (docs/decisions.md, decision 16) logits and gradients are equal.

    A cache of windows or states is found, and not shared.
    """
    backbone = own_copy(name)
    assert backbone.shares_prefix == (name in PREFIX)
    template = "The capital of [P*3] [X] is [Y]"
    examples = bound(backbone, template).examples(RECORDS[:4])
    assert (shared_prefix_tokens(backbone, examples) > 5) == backbone.shares_prefix  # longer than the windows of 4
    vectors = learned(backbone, template).slot_vectors
    assert vectors is not None
    found = []
    run_prefix = Mock(side_effect=backbone.run_prefix)
    monkeypatch.setattr(backbone, "run_prefix", run_prefix)
    for least in (1, 10**9):
        monkeypatch.setattr(ptuning.engine.forward, "MIN_SAVED_TOKENS", least)
        leaf = vectors.clone().requires_grad_(True)
        logits = target_logits(backbone, examples, PromptBatch(leaf))
        torch.log_softmax(logits, dim=-1)[:, 7].sum().backward()
        assert leaf.grad is not None
        found.append((logits.detach(), leaf.grad))
    assert run_prefix.call_count == int(backbone.shares_prefix)
    (logits, gradient), (plain_logits, plain_gradient) = found
    close(logits, plain_logits)
    assert float((gradient - plain_gradient).norm()) <= 1e-5 * float(plain_gradient.norm())


def test_a_window_that_is_switched_off_is_no_window() -> None:
    """The cache is asked, not the family: the same classes without their window share prefixes."""
    assert backbone_of("mistral", sliding_window=None).shares_prefix
    assert not built("mistral").shares_prefix


@pytest.mark.parametrize("first", [0, 1])
def test_one_layer_with_a_window_is_enough(first: int) -> None:
    """Every layer is looked at, wherever the one with a window stands."""
    kinds = ["full_attention", "sliding_attention"]
    assert not backbone_of("gemma-3", layer_types=[kinds[first], kinds[1 - first]]).shares_prefix
    assert backbone_of("gemma-3", layer_types=["full_attention", "full_attention"]).shares_prefix


def test_the_table_says_what_the_models_do() -> None:
    """The package's data and the docs page are what scripts/build_backbones.py makes of these models."""
    rows = [families.examine(name) for name in FAMILIES]
    assert shipped() == rows, "run scripts/build_backbones.py"
    page = (Path(__file__).resolve().parents[2] / "docs" / "backbones.md").read_text(encoding="utf-8")
    assert families.as_markdown(rows) in page, "run scripts/build_backbones.py"
    assert all(len(row.cells) == len(COLUMNS) for row in rows)
    assert len({row.family for row in rows}) == len(rows)


def test_every_check_of_the_table_is_a_test_of_every_family() -> None:
    """What the table calls tested is."""
    names = {
        "identity": test_identity,
        "alone or in company": test_alone_or_in_company,
        "saved is what was trained": test_saved_is_what_was_trained_and_frozen_is_frozen,
        "frozen is frozen": test_saved_is_what_was_trained_and_frozen_is_frozen,
        "gathered logits": test_gathered_logits_equal_plain_ones,
        "written answers": test_written_answers,
        "candidates": test_candidates_and_their_order,
        "shared prefix": test_a_shared_prefix,
    }
    assert tuple(names) == TESTED
    for test in names.values():
        assert every_family.mark in test.pytestmark  # type: ignore[attr-defined]  # pytest puts it there


SUBJECTS = ("Kenya", "France", "Peru", "the movie", "a film", "1999", "the capital", "people")


@pytest.mark.parametrize(
    ("name", "template", "targets"),
    [
        ("t5", "[P*2] [X] [>] [P] [Y]", ("Paris", "Lima", "yes", "no")),  # slots on both sides
        ("xlnet", "[P*2] [X] [P] [Y]", ("the", "a")),
    ],
)
def test_facts_are_learned_by_heart_on_the_way_a_user_goes(
    name: str, template: str, targets: Sequence[str], tmp_path: Path
) -> None:
    """Loaded, trained along with its prompt, saved, loaded by another backbone: every fact is answered, in seconds."""
    facts = [{"x": text, "y": targets[at % len(targets)]} for at, text in enumerate(SUBJECTS)]
    folder = tmp_path / "backbone"
    model_of(name, **{"t5": {"dropout_rate": 0.0}, "xlnet": {"dropout": 0.0}}[name]).save_pretrained(folder)
    families.tokenizer_of(FAMILIES[name].tokenizer).save_pretrained(folder)
    config = TrainConfig(train_backbone="full", epochs=4, batch_size=2, backbone_lr=0.01, lr=0.01)
    out, rows = tmp_path / "run", facts * 10  # an epoch ends with scoring and writing files
    found = ptuning.train(template, rows, dev=facts, backbone=ptuning.load_backbone(folder), config=config, out=out)
    assert found.prompt.scores["exact_match"] == 1.0

    model, prompt = PromptModel(load_backbone(folder)), Prompt.load(out)
    before = PromptModel(load_backbone(folder)).predict(facts, Prompt.manual("[X] is [Y]"))
    longest = None if model.backbone.kind == "encoder-decoder" else prompt.target_tokens  # it learned no ends
    assert [answer.text for answer in model.predict(facts, prompt, generation={"max_new_tokens": longest})] == [
        row["y"] for row in facts
    ]
    assert [answer.text for answer in before] != [row["y"] for row in facts]


def test_a_run_without_a_cache_is_written_down(tmp_path: Path) -> None:
    """Its development part is answered in the end; a model that keeps no keys and values lost the run there."""
    data: list[Record] = [{"x": row["x"], "y": "yes"} for row in RECORDS]
    found = ptuning.train("[P*2] [X] [Y]", data, backbone=built("mamba"), config=TrainConfig(epochs=1), out=tmp_path)
    assert found.prompt.scores
    assert (tmp_path / PREDICTIONS_FILE).is_file()


def test_beams_without_a_cache_are_those_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole rows are read again, and each beam goes on from its own."""
    backbone = built("llama")
    prompt = learned(backbone, TEMPLATE)

    def beams() -> list[list[GeneratedText]]:
        assert prompt.slot_vectors is not None
        filled = bound(backbone, TEMPLATE)
        return generate(
            backbone,
            PreparedPrompt(prompt.learned(backbone), filled),
            RECORDS,
            max_tokens=6,
            settings=GenerationSettings(num_beams=3),
            top_k=3,
        )

    kept = beams()
    real = Backbone.run
    monkeypatch.setattr(Backbone, "run", lambda *given, **more: (real(*given, **more)[0], None))
    found = beams()
    assert [[one.text for one in row] for row in found] == [[one.text for one in row] for row in kept]
    for one, other in zip(itertools.chain(*found), itertools.chain(*kept), strict=True):
        assert one.log_prob == pytest.approx(other.log_prob, abs=1e-3)
