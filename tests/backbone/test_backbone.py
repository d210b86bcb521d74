"""Backbones: every architecture answers as transformers does, frozen is frozen, and what cannot be used says why.

The invariants that tests name are those of docs/invariants.md.
"""

import hashlib
import inspect
import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast
from unittest.mock import Mock

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

import ptuning.backbone.backbone
import ptuning.engine.forward
from ptuning.backbone.backbone import Backbone
from ptuning.backbone.loading import load_backbone, load_tokenizer
from ptuning.config import TrainConfig
from ptuning.errors import BackboneError, TemplateError
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prompt import Prompt
from ptuning.training.run import train
from tests.conftest import (
    CAUSAL,
    CONTEXT,
    RECORDS,
    bound,
    build_model,
    learned,
    make_model,
    make_tokenizer,
    plain_logits,
)
from tests.families import POSITIONS, SMALL


def sharpened(model: PreTrainedModel, tokenizer_name: str) -> Backbone:
    """Make a frozen backbone of a random model, with larger weights so that logits differ enough to compare."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(5.0)
    backbone = Backbone(model, make_tokenizer(tokenizer_name), name="test")
    backbone.freeze()
    return backbone


def digest(model: nn.Module) -> str:
    """Return a hash of every weight and buffer."""
    found = hashlib.sha256()
    for name, tensor in sorted({**dict(model.named_parameters()), **dict(model.named_buffers())}.items()):
        found.update(name.encode() + tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def test_left_padding_with_explicit_positions(backbone: Backbone) -> None:
    """Positions are given, not counted by the model: behind four pads each token answers as in the plain run.

    Many models count from the first column when they get embeddings, so that pads in front change every answer.
    """
    ids = [7, 9, 11, 13, 15]
    pads = 4
    mask = torch.tensor([[0] * pads + [1] * len(ids)])
    positions = torch.tensor([[0] * pads + list(range(len(ids)))])
    cols = torch.arange(pads, pads + len(ids))
    logits, _ = backbone.run(
        backbone.embed(torch.tensor([[0] * pads + ids])),
        mask=mask,
        positions=positions,
        rows=torch.zeros_like(cols),
        cols=cols,
    )
    torch.testing.assert_close(logits, plain_logits(backbone, ids), atol=1e-5, rtol=0)


def test_gathered_logits_equal_the_full_ones(backbone: Backbone) -> None:
    """Invariant *Fast = slow*: with a hook that gathers before the head, or none, the asked logits are the same."""
    ids = torch.tensor([[7, 9, 11, 13], [8, 6, 12, 5]])
    mask, positions = torch.ones_like(ids), torch.arange(4).expand(2, 4)
    rows, cols = torch.tensor([1, 0, 1, 1]), torch.tensor([3, 2, 0, 3])
    shapes = []
    head = backbone.model.get_output_embeddings()
    assert head is not None
    handle = head.register_forward_hook(lambda _module, inputs, _output: shapes.append(inputs[0].shape[:-1].numel()))
    gathered, _ = backbone.run(backbone.embed(ids), mask=mask, positions=positions, rows=rows, cols=cols)
    for module in backbone.model.modules():
        if module is not head:
            module._forward_hooks.clear()
    full, _ = backbone.run(backbone.embed(ids), mask=mask, positions=positions, rows=rows, cols=cols)
    handle.remove()
    assert shapes == [4, 8]  # the head read four positions, and all eight without the hook
    torch.testing.assert_close(gathered, full, atol=1e-5, rtol=0)
    plain = torch.stack([plain_logits(backbone, ids[row].tolist())[col] for row, col in zip(rows, cols, strict=True)])
    torch.testing.assert_close(gathered, plain, atol=1e-5, rtol=0)


def test_two_backbones_may_share_a_model(causal: Backbone) -> None:
    """The hook takes the asked positions once, however many backbones were made of the model."""
    twin = Backbone(causal.model, make_tokenizer("llama"), name="twin")
    prompt = learned(causal, "[P*2] [X] [Y]")
    again = learned(twin, "[P*2] [X] [Y]")
    for one, other in zip(
        PromptModel(causal).target_logits(RECORDS, prompt), PromptModel(twin).target_logits(RECORDS, again), strict=True
    ):
        assert torch.equal(one, other)


def test_frozen_backbone_is_in_evaluation_mode_without_gradients(backbone: Backbone) -> None:
    """Invariant *Frozen is frozen*: no gradients, and no dropout although the config has some.

    With dropout on, two passes over the same rows would give different logits.
    """
    rates = [module.p for module in backbone.model.modules() if isinstance(module, nn.Dropout)]
    assert getattr(backbone.model.config, "attention_dropout", 0.0) or max(rates) > 0
    assert not any(module.training for module in backbone.model.modules())
    assert not any(weight.requires_grad for weight in backbone.model.parameters())
    prompt = learned(backbone, "[P*2] [X] [Y]")
    one, two = (PromptModel(backbone).target_logits(RECORDS, prompt) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_without_a_prompt_the_model_answers_as_before(model_folder: Callable[[str], Path], family: str) -> None:
    """Invariant *Frozen is frozen*: bit-equal to the untouched model, before, between and after uses of a prompt."""
    ids = torch.tensor([[7, 9, 11, 13, 15]])
    with torch.no_grad():
        auto = transformers.AutoModelForCausalLM if family in CAUSAL else transformers.AutoModelForMaskedLM
        untouched = auto.from_pretrained(model_folder(family)).eval()(input_ids=ids).logits
        backbone = load_backbone(str(model_folder(family)), dtype="float32", device="cpu")
        for _ in range(2):
            assert torch.equal(backbone.model(input_ids=ids).logits, untouched)
            PromptModel(backbone).target_logits(RECORDS, learned(backbone, "[P*2] [X] [Y]"))
        assert torch.equal(backbone.model(input_ids=ids).logits, untouched)


def test_without_a_prompt_after_an_exception(backbone: Backbone) -> None:
    """Invariant *Frozen is frozen*: an error inside a forward pass leaves nothing behind."""
    ids = [7, 9, 11]
    before = plain_logits(backbone, ids)
    with pytest.raises((IndexError, RuntimeError)):
        backbone.run(
            backbone.embed(torch.tensor([ids])),
            mask=torch.ones(1, 3, dtype=torch.int64),
            positions=torch.arange(3)[None],
            rows=torch.tensor([5]),
            cols=torch.tensor([0]),
        )
    assert torch.equal(plain_logits(backbone, ids), before)


def test_without_a_prompt_in_another_thread(backbone: Backbone) -> None:
    """Invariant *Frozen is frozen*: a prompt in use in one thread is not seen from another.

    While one thread is in the middle of a gathered pass, another gets the plain model's full logits.
    """
    ids = [7, 9, 11]
    before = plain_logits(backbone, ids)
    inside, go_on = threading.Event(), threading.Event()
    main = threading.get_ident()

    def hold(*_: object) -> None:
        if threading.get_ident() != main:
            inside.set()
            assert go_on.wait(10)

    found: list[list[torch.Tensor]] = []
    prompt = learned(backbone, "[P*2] [X] [Y]")
    expected = PromptModel(backbone).target_logits(RECORDS, prompt)
    body = backbone.model.base_model.register_forward_pre_hook(hold)
    thread = threading.Thread(target=lambda: found.append(PromptModel(backbone).target_logits(RECORDS, prompt)))
    thread.start()
    assert inside.wait(10)
    assert torch.equal(plain_logits(backbone, ids), before)
    go_on.set()
    thread.join()
    body.remove()
    assert all(torch.equal(a, b) for a, b in zip(found[0], expected, strict=True))


def test_whether_prefixes_are_shared_is_asked_once(causal: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """By one token through the model, remembered with the backbone; nothing of the model changes."""
    run = Mock(side_effect=causal.run)
    before = digest(causal.model), causal.model.config.to_dict()
    monkeypatch.setattr(causal, "run", run)
    assert all(causal.shares_prefix for _ in range(3))
    assert run.call_count == 1
    assert (digest(causal.model), causal.model.config.to_dict()) == before


def test_a_model_with_as_many_positions_as_tokens() -> None:
    """The model is asked for its embedding table. Size does not tell: here the table of positions is as large."""
    tokenizer = make_tokenizer("gpt2")
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=len(tokenizer),
        n_embd=32,
        n_layer=2,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
    )
    backbone = sharpened(transformers.GPT2LMHeadModel(config).eval(), "gpt2")
    prompt = Prompt.from_token_ids("[P] [X] [Y]", [7], backbone)
    assert prompt.slot_vectors is not None
    weights = dict(backbone.model.named_parameters())
    assert weights["transformer.wte.weight"].shape == weights["transformer.wpe.weight"].shape
    assert torch.equal(prompt.slot_vectors[0], weights["transformer.wte.weight"][7])


def test_a_model_without_segments_is_given_none() -> None:
    """GPT-2 would add the embedding of token 0 everywhere, if its tokenizer names token_type_ids."""
    tokenizer = make_tokenizer("gpt2")
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    model = build_model("gpt2", tokenizer).eval()
    backbone = Backbone(model, tokenizer, name="test")
    backbone.freeze()
    prompt = Prompt.from_token_ids("[P] [X] [Y]", [7], backbone)
    example = bound(backbone, "[P] [X] [Y]").examples(RECORDS)[0]
    expected = plain_logits(backbone, [7, *example.token_ids[1:]])[list(example.logit_positions)]
    found = PromptModel(backbone).target_logits(RECORDS[:1], prompt)[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_an_integer_embedding_table() -> None:
    """Dtype and width come from the embedding's output. Its weight does not tell: a quantised one is int8."""

    class Quantised(nn.Module):
        def __init__(self, whole: torch.Tensor) -> None:
            super().__init__()
            self.scale = float(whole.abs().max()) / 127
            self.register_buffer("weight", (whole / self.scale).round().to(torch.int8))

        weight: torch.Tensor

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.weight[ids].float() * self.scale

    model = build_model("llama", make_tokenizer("llama")).eval()
    model.set_input_embeddings(Quantised(model.get_input_embeddings().weight.detach()))
    backbone = Backbone(model, make_tokenizer("llama"), name="int8")
    backbone.freeze()
    assert backbone.width == 32
    found = PromptModel(backbone).target_logits(RECORDS, Prompt.from_token_ids("[P*2] [X] [Y]", [7, 8], backbone))
    assert all(logits.isfinite().all() for logits in found)


def test_a_tokenizer_with_more_tokens_than_the_model() -> None:
    """A padding token that was added and never embedded is common; it must not be looked up."""
    tokenizer = make_tokenizer("llama")
    model = build_model("llama", tokenizer).eval()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    backbone = Backbone(model, tokenizer, name="test")
    backbone.freeze()
    assert backbone.vocabulary == backbone.embedding_rows == len(tokenizer) - 1
    assert backbone.table().shape == (backbone.vocabulary, 32)
    assert "[PAD]" not in backbone.tokenizer.special_ids
    assert PromptModel(backbone).predict([{"x": "[PAD]"}], Prompt.manual("[X] is [Y]"))[0].text is not None


def test_a_mask_or_an_end_that_was_never_embedded_is_none() -> None:
    """A pass looked it up and ended with an IndexError."""
    tokenizer = make_tokenizer("bert")
    model = build_model("bert", tokenizer).eval()
    tokenizer.add_special_tokens({"mask_token": "<gap>"})
    with pytest.raises(TemplateError, match="has no mask token"):
        bound(Backbone(model, tokenizer, name="test"), "[X] is [Y]")
    tokenizer = make_tokenizer("llama")
    model = build_model("llama", tokenizer).eval()
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    backbone = Backbone(model, tokenizer, name="test")
    backbone.freeze()
    assert backbone.tokenizer.stop_id is None
    rows = [{**record, "y": "yes\nor no"} for record in RECORDS]  # of several lines, so that only a token ends them
    found = train("[P] [X] is [Y]", rows, dev=rows, backbone=backbone, config=TrainConfig(epochs=1))
    assert not found.prompt.learned_to_stop


def test_the_callers_tokenizer_is_left_alone(family: str) -> None:
    """The caller's objects stay as they are: special text is plain text for templates, and special for the caller."""
    tokenizer = make_tokenizer(family)
    special = tokenizer.all_special_tokens[-1]
    before = tokenizer(f"a {special} b")["input_ids"]
    state = tokenizer.backend_tokenizer.encode_special_tokens
    backbone = Backbone(build_model(family, tokenizer), tokenizer, name="test")
    own = backbone.tokenizer.encode([f"a {special} b"])[0]
    assert tokenizer.convert_tokens_to_ids(special) not in own
    assert tokenizer.backend_tokenizer.encode_special_tokens == state
    assert tokenizer(f"a {special} b")["input_ids"] == before
    assert tokenizer.convert_tokens_to_ids(special) in before


def test_encode_of_nothing_and_round_trips(backbone: Backbone) -> None:
    """The tokenizer of templates: no special tokens, empty lists, readable tokens."""
    tokenizer = backbone.tokenizer
    assert tokenizer.encode([]) == []
    assert tokenizer.encode([""]) == [[]]
    ids = tokenizer.encode(["Zürich is great"])[0]
    assert tokenizer.decode(ids).strip() == "Zürich is great"
    assert not set(ids) & set(tokenizer.special_ids.values())
    assert all(tokenizer.token(token) for token in range(backbone.vocabulary))
    assert tokenizer.max_tokens == CONTEXT


def test_load_tokenizer_reads_no_weights(model_folder: Callable[[str], Path], family: str, tmp_path: Path) -> None:
    """A template can be looked at before gigabytes are loaded."""
    folder = shutil.copytree(model_folder(family), tmp_path / "copy")
    (folder / "model.safetensors").unlink()
    tokenizer, kind = load_tokenizer(str(folder))
    whole = load_backbone(str(model_folder(family)), dtype="float32", device="cpu")
    assert kind == whole.kind
    assert tokenizer.encode(["Kenya is"]) == whole.tokenizer.encode(["Kenya is"])
    assert (tokenizer.prefix_ids, tokenizer.suffix_ids) == (whole.tokenizer.prefix_ids, whole.tokenizer.suffix_ids)


def test_fingerprint_knows_weights_and_not_dtypes(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Invariant *Saved is what was trained*: a prompt knows its backbone again.

    The same weights in another dtype are the same backbone, other weights are another one.
    """
    make_model("llama", tmp_path / "other", seed=1)
    one, half = (
        load_backbone(str(model_folder("llama")), dtype=kind, device="cpu") for kind in ("float32", "bfloat16")
    )
    assert half.dtype == torch.bfloat16
    assert one.fingerprint == half.fingerprint
    other = load_backbone(str(tmp_path / "other"), dtype="float32", device="cpu")
    assert not set(one.fingerprint.split("-")) & set(other.fingerprint.split("-"))
    with torch.no_grad():
        one.model.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    changed = Backbone(one.model, make_tokenizer("llama"), name="changed")
    assert changed.fingerprint.split("-")[0] == half.fingerprint.split("-")[0]
    assert changed.fingerprint.split("-")[1] != half.fingerprint.split("-")[1]


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    """A folder of something else is told from a backbone."""
    with pytest.raises(BackboneError, match=r"is not a backbone: it has no config.json"):
        load_backbone(str(tmp_path))


def test_a_folder_with_a_pickle_only(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """No pickle is ever read: reading one can run any code."""
    folder = shutil.copytree(model_folder("llama"), tmp_path / "pickled")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(BackboneError, match="whole safetensors files"):
        load_backbone(str(folder), device="cpu")


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2"])
def test_a_checkpoint_without_a_head(family: str, tmp_path: Path) -> None:
    """A body saved alone would get a random head; tied heads (GPT-2) are whole without one."""
    tokenizer = make_tokenizer(family)
    model = build_model(family, tokenizer)
    cast("PreTrainedModel", model.base_model).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    if family == "gpt2":
        loaded = load_backbone(str(tmp_path), dtype="float32", device="cpu")
        whole = Backbone(model, tokenizer, name="whole")
        whole.freeze()
        torch.testing.assert_close(plain_logits(loaded, [7, 8]), plain_logits(whole, [7, 8]))
        return
    with pytest.raises(BackboneError, match="saved without its language-model head"):
        load_backbone(str(tmp_path), device="cpu")


def test_an_untied_checkpoint_without_a_head(tmp_path: Path) -> None:
    """The same for a causal model whose head is its own."""
    tokenizer = make_tokenizer("llama")
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=False, **SMALL, **POSITIONS)
    transformers.LlamaModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match=r"lacks weights of LlamaForCausalLM: lm_head.weight"):
        load_backbone(str(tmp_path), device="cpu")


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_cut_off_file(model_folder: Callable[[str], Path], tmp_path: Path, file: str) -> None:
    """Half a download is an error of one line, not a traceback."""
    folder = shutil.copytree(model_folder("llama"), tmp_path / "cut")
    data = (folder / file).read_bytes()
    (folder / file).write_bytes(data[: len(data) // 2])
    with pytest.raises(BackboneError) as caught:
        load_backbone(str(folder), device="cpu")
    assert "cut" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_encoder_decoder_that_hears(tmp_path: Path) -> None:
    """A speech model's decoder writes text, but there is no text for its encoder; said before weights are read."""
    make_tokenizer("bert").save_pretrained(tmp_path)
    transformers.WhisperConfig(vocab_size=300, d_model=32).save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match="model type 'whisper' has an encoder and a decoder, and no language-model"):
        load_backbone(str(tmp_path), device="cpu")


def test_a_model_that_is_no_language_model(tmp_path: Path) -> None:
    """A vision model's folder is refused by kind."""
    make_tokenizer("bert").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(BackboneError, match="model type 'vit' has neither a causal nor a masked"):
        load_backbone(str(tmp_path), device="cpu")


def test_a_model_that_ignores_the_mask() -> None:
    """FNet mixes all positions, pads included, so its rows would depend on their company."""
    config = transformers.FNetConfig(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=1)
    with pytest.raises(BackboneError, match="FNetForMaskedLM takes no attention_mask"):
        Backbone(transformers.FNetForMaskedLM(config), make_tokenizer("bert"), name="fnet")


def test_kinds_come_from_the_config(backbone: Backbone, family: str) -> None:
    """What kind a model is comes from its config, and never from part of its name."""
    assert backbone.kind == ("causal" if family in CAUSAL else "masked")
    for module in Path(inspect.getfile(ptuning.backbone.backbone)).parent.glob("*.py"):
        assert "in name.lower()" not in module.read_text()


def test_tests_run_offline() -> None:
    """The rest of this file must not reach for a network."""
    assert os.environ["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize(
    ("head", "sizes"),
    [
        ("BertLMHeadModel", {**POSITIONS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}),
    ],
)
def test_a_model_that_reads_ahead_is_refused(head: str, sizes: Mapping[str, int], tmp_path: Path) -> None:
    """A causal head over attention that sees the whole row would be shown the target; its scores would be too good."""
    tokenizer = make_tokenizer("bert")
    head_class = getattr(transformers, head)
    torch.manual_seed(0)
    model = head_class(head_class.config_class(vocab_size=len(tokenizer), **sizes))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(5.0)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match="lets a position see later tokens"):
        load_backbone(str(tmp_path))
