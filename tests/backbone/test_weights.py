"""Weights: of models that others own, over several devices and on the disk; and their fingerprint."""

import contextlib
import copy
import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.forward import _Wanted
from ptuning.backbone.layers import recomputing
from ptuning.backbone.loading import load_backbone
from ptuning.backbone.weights import _unpacked, devices_of, is_offloaded, is_packed, number_of_weights, stored_tensors
from ptuning.config import TrainConfig
from ptuning.engine.batch import collate
from ptuning.engine.forward import embed_inputs, forward_embeddings
from ptuning.engine.memory import tensor_bytes
from ptuning.engine.soft_prompt import PromptBatch
from ptuning.errors import BackboneError
from ptuning.prompt.predict import PromptModel
from ptuning.training import step as steps
from ptuning.training.run import train
from tests.conftest import FAMILIES, RECORDS, WARM, build_model, items_of, learned, make_tokenizer
from tests.processes import forked

SPLIT = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.rotary_emb": "cpu"}
SPLIT |= {"model.layers.1": "disk", "model.norm": "cpu", "lm_head": "cpu"}
ALL_ON_DISK = dict.fromkeys(SPLIT, "disk") | {"model.rotary_emb": "cpu"}


def state(model: PreTrainedModel) -> dict[str, object]:
    """Everything about a model that its owner could miss."""
    return {
        "training": {name: module.training for name, module in model.named_modules()},
        "requires_grad": {name: weight.requires_grad for name, weight in model.named_parameters()},
        "objects": {name: id(weight) for name, weight in model.named_parameters()},
        "hooks": {name: (len(one._forward_hooks), len(one._forward_pre_hooks)) for name, one in model.named_modules()},
        "attributes": {name: sorted(vars(one)) for name, one in model.named_modules()},
        "values": [hashlib.sha256(one.detach().numpy().tobytes()).hexdigest() for one in model.state_dict().values()],
    }


def loss_of(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The loss and the gradients of all weights, as one tensor."""
    model.zero_grad()
    torch.manual_seed(0)  # of dropout
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    loss.backward()
    gradients = [weight.grad.reshape(-1) for weight in model.parameters() if weight.grad is not None]
    return torch.cat([loss.detach()[None], *gradients])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_in_memory_stays_its_owners(family: str, tmp_path: Path) -> None:
    """Logits, loss, gradients, mode, hooks and objects are the same before, during and after; in training mode, too."""
    tokenizer = make_tokenizer(family)
    torch.manual_seed(1)
    model = build_model(family, tokenizer)
    model.train()
    next(iter(model.parameters())).requires_grad_(False)
    ids = torch.tensor([[7, 8, 9, 10, 11], [12, 13, 14, 15, 16]])
    before, gradients = state(model), loss_of(model, ids)
    backbone = Backbone.from_model(model, tokenizer)
    assert state(model) == before
    assert torch.equal(loss_of(model, ids), gradients)
    model.zero_grad()
    found = train(WARM, RECORDS, backbone=backbone, out=tmp_path / "run", config=TrainConfig(epochs=1))
    PromptModel(backbone).predict(RECORDS, found.prompt)
    assert all(weight.grad is None for weight in model.parameters())
    assert state(model) == before
    assert torch.equal(loss_of(model, ids), gradients)


def test_a_model_in_memory_writes_as_before() -> None:
    """``generate`` gives the same tokens while the backbone is in use."""
    tokenizer = make_tokenizer("llama")
    model = build_model("llama", tokenizer).eval()
    ids = torch.tensor([[1, 7, 8, 9]])
    before = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=2)
    backbone = Backbone.from_model(model, tokenizer)
    PromptModel(backbone).predict(RECORDS, learned(backbone, "[P*2] [X] is [Y]"))
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=2), before)


def test_a_model_in_memory_is_the_backbone_of_its_folder(model_folder: Callable[[str], Path]) -> None:
    """The same fingerprint and logits, so prompts of one are used with the other; no weight is copied."""
    folder = str(model_folder("llama"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = make_tokenizer("llama")
    backbone, loaded = Backbone.from_model(model, tokenizer), load_backbone(folder, dtype="float32", device="cpu")
    assert backbone.name == folder
    assert backbone.revision is None
    assert backbone.fingerprint == loaded.fingerprint
    prompt = learned(loaded, "[P*2] [X] is [Y]")
    assert PromptModel(backbone).predict(RECORDS, prompt) == PromptModel(loaded).predict(RECORDS, prompt)
    own = {weight.data_ptr() for weight in model.parameters()}
    assert {weight.data_ptr() for weight in backbone.model.parameters()} == own
    assert backbone.parameters == loaded.parameters


def test_two_prompts_with_adapters_on_a_model_in_memory(tmp_path: Path) -> None:
    """Adapters go on modules of the backbone's own."""
    tokenizer = make_tokenizer("llama")
    model = build_model("llama", tokenizer)
    before = state(model)
    backbone = Backbone.from_model(model, tokenizer, name="mine")
    for train_backbone in ("lora", "full"):
        config = TrainConfig(epochs=1, train_backbone=train_backbone)
        found = train(WARM, RECORDS, backbone=backbone, out=tmp_path / train_backbone, config=config)
        assert found.prompt.backbone is not None
        assert found.prompt.backbone.name == "mine"
    assert state(model) == before


def test_what_is_no_model_of_transformers_is_refused() -> None:
    """With what to do; a tokenizer and a model that changed places, too."""
    tokenizer = make_tokenizer("llama")
    model = build_model("llama", tokenizer)
    with pytest.raises(BackboneError, match=r"and DataParallel is no PreTrainedModel; unwrap it"):
        Backbone.from_model(torch.nn.DataParallel(model), tokenizer)  # type: ignore[arg-type]
    with pytest.raises(BackboneError, match=r"is no PreTrainedModel"):
        Backbone.from_model(tokenizer, model)  # type: ignore[arg-type]


@pytest.mark.parametrize("placed", [SPLIT, ALL_ON_DISK, {"": "cpu"}], ids=["one layer on disk", "all on disk", "cpu"])
def test_layers_on_the_disk_give_the_same_numbers(
    placed: dict[str, str], model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Fingerprint, number of weights, predictions and a whole training are those of the model in memory."""
    folder = str(model_folder("llama"))
    whole = load_backbone(folder, dtype="float32", device="cpu")
    split = load_backbone(folder, dtype="float32", device_map=placed)
    assert is_offloaded(split.model) is (placed != {"": "cpu"})
    assert str(split.device) == "cpu"
    assert (split.fingerprint, split.parameters) == (whole.fingerprint, whole.parameters)
    prompt = learned(whole, "[P*2] [X] is [Y]")
    assert PromptModel(split).predict(RECORDS, prompt) == PromptModel(whole).predict(RECORDS, prompt)
    for checkpointing in (False, True):
        config = TrainConfig(epochs=2, checkpointing=checkpointing)
        one, other = (
            train(WARM, RECORDS, backbone=backbone, out=tmp_path / f"{name}{checkpointing}", config=config)
            for name, backbone in (("whole", whole), ("split", split))
        )
        assert one.prompt.slot_vectors is not None
        assert other.prompt.slot_vectors is not None
        assert torch.equal(one.prompt.slot_vectors, other.prompt.slot_vectors)


def test_what_offloaded_weights_cannot_do_is_refused(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Training the weights themselves, before a step is run."""
    split = load_backbone(str(model_folder("llama")), device_map=SPLIT)
    for train_backbone in ("lora", "full"):
        with pytest.raises(BackboneError, match="weights are offloaded, so only a prompt's slots"):
            train(
                WARM,
                RECORDS,
                backbone=split,
                out=tmp_path / train_backbone,
                config=TrainConfig(train_backbone=train_backbone),
            )
    with pytest.raises(BackboneError, match="offloaded"):
        split.with_random_weights(seed=0)


def test_a_model_in_memory_with_layers_on_the_disk(model_folder: Callable[[str], Path]) -> None:
    """Its hooks read the weights for the backbone as for its owner."""
    folder = str(model_folder("llama"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map=dict(SPLIT))
    ids = torch.tensor([[7, 8, 9]])
    before = model(input_ids=ids).logits
    backbone = Backbone.from_model(model, make_tokenizer("llama"))
    whole = load_backbone(folder, dtype="float32", device="cpu")
    prompt = learned(whole, "[P*2] [X] is [Y]")
    assert PromptModel(backbone).predict(RECORDS, prompt) == PromptModel(whole).predict(RECORDS, prompt)
    assert torch.equal(model(input_ids=ids).logits, before)


def test_a_map_that_names_no_device_is_an_error(model_folder: Callable[[str], Path]) -> None:
    for place, named in (("cuba", "cuba"), (7, "cuda:7")):
        with pytest.raises(BackboneError, match=rf"device '{named}' cannot be used: .*; use auto, cpu"):
            load_backbone(str(model_folder("llama")), device_map={"": place})


def test_asked_positions_follow_the_last_layers_device() -> None:
    """Indices lie where embeddings are looked up, and hidden states of a split model where its last layer is."""
    at = torch.tensor([0, 1])
    hidden = _Wanted(at, at).of(torch.empty(2, 3, 4, device="meta"))
    assert (hidden.device.type, tuple(hidden.shape)) == ("meta", (2, 4))


def test_rows_share_no_prefix_over_several_devices(causal: Backbone) -> None:
    """Keys and values of all layers are put together, which needs one device."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    assert causal.shares_prefix
    split = copy.deepcopy(causal)
    del split.__dict__["shares_prefix"]
    for layer, device in zip(split.model.model.layers, ("cpu", "meta"), strict=True):
        hook = AlignDevicesHook()
        add_hook_to_module(layer, hook)
        hook.execution_device = torch.device(device)
    assert len(devices_of(split.model)) == 2
    assert not split.shares_prefix


def test_tied_weights_count_once(causal: Backbone) -> None:
    assert number_of_weights(causal.model) == sum(weight.numel() for weight in causal.model.parameters())


def test_offloaded_weights_are_let_go_of_within_a_step(
    causal: Backbone, model_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass with gradients held all that it had read until its backward pass, unless checkpointing was asked for."""
    runs: list[str] = []

    def spy(model: PreTrainedModel, *, name: str) -> contextlib.AbstractContextManager[None]:
        runs.append(name)
        return recomputing(model, name=name)

    monkeypatch.setattr(steps, "recomputing", spy)
    split = load_backbone(str(model_folder("llama")), dtype="float32", device_map=SPLIT)
    for backbone, expected in ((causal, 0), (split, 2)):
        train(WARM, RECORDS[:4], dev=RECORDS[:2], backbone=backbone, config=TrainConfig(epochs=1, batch_size=2))
        assert len(runs) == expected


def over_two_devices(here: str, there: str) -> None:
    """Run a step of a model whose last layer is on another device, without numbers: each operation checks its devices,
    as a GPU would. The name of the device stays in the process, which is one of its own.
    """
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend("pretend")
    tokenizer = make_tokenizer("llama")
    backbone = Backbone.from_model(build_model("llama", tokenizer), tokenizer)
    backbone.freeze()
    items = items_of(backbone, "[P] [X] [Y]", RECORDS[:1])
    model = backbone.model
    places = {"model.embed_tokens": here, "model.rotary_emb": here, "model.layers.0": here}
    places |= {"model.layers.1": there, "model.norm": there, "lm_head": there}
    with FakeTensorMode():
        for name, place in places.items():
            for module in model.get_submodule(name).modules():
                for key, value in module.named_parameters(recurse=False):
                    pretended = torch.empty(value.shape, dtype=value.dtype, device=place)
                    module._parameters[key] = torch.nn.Parameter(pretended, requires_grad=False)
                for key, buffer in module.named_buffers(recurse=False):
                    module._buffers[key] = torch.empty(buffer.shape, dtype=buffer.dtype, device=place)
            add_hook_to_module(model.get_submodule(name), AlignDevicesHook(place))
        backbone.__dict__.pop("shares_prefix", None)
        vectors = torch.zeros(1, backbone.width, requires_grad=True)
        batch = collate(items[0].inputs, PromptBatch.of(vectors, None))
        # Where the one slot stands is read as a number, which only a constant on the processor has.
        none = batch.token_ids[:0, 0]
        moved = replace(batch, slot_rows=none, slot_cols=none, slot_index=none).to(backbone.device)
        batch = replace(moved, slot_rows=batch.slot_rows, slot_cols=batch.slot_cols, slot_index=batch.slot_index)
        embeddings = embed_inputs(backbone.embed(batch.token_ids), vectors, batch)
        logits, _ = forward_embeddings(backbone, embeddings, batch)
        logits.logsumexp(dim=-1).sum().backward()
    assert {str(device) for device in devices_of(model)} == {here, there}
    assert not backbone.shares_prefix
    assert vectors.grad is not None
    print(*(one.device for one in (embeddings, logits, vectors.grad)))


@pytest.mark.parametrize("places", [("cpu", "pretend:0"), ("pretend:0", "cpu")])
def test_a_step_over_two_devices_without_a_gpu(places: tuple[str, str], tmp_path: Path) -> None:
    """Slots, gathered positions, logits and gradients follow the devices of a split model."""
    try:
        from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: F401
        from torch.utils.backend_registration import _setup_privateuseone_for_python_backend  # noqa: F401
    except ImportError as error:
        pytest.skip(f"this torch pretends no second device in the way that the test knows: {error}")
    program = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
        "import tests.backbone.test_weights as t\n"
        "t.over_two_devices(*sys.argv[1:])\n"
    )
    with forked(program, *places, folder=tmp_path) as process:
        assert process.wait() == 0, process.err[-3000:]
        assert process.out.split() == [places[0], places[0], "cpu"]


def in_bfloat16(weight: Tensor) -> bytes:
    return weight.detach().to(torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes()


def test_the_fingerprint_of_plain_weights_is_the_one_that_prompts_have(backbone: Backbone) -> None:
    """Prompts of every release say which backbone is theirs by it: it is written down here once more."""
    (rows,) = backbone.model.get_input_embeddings().parameters()
    table = hashlib.sha256(in_bfloat16(rows)).hexdigest()
    samples = sorted(
        hashlib.sha256(in_bfloat16(weight.reshape(-1)[:: max(1, weight.numel() // 256)])).hexdigest()
        for weight in backbone.model.parameters()
    )
    assert backbone.fingerprint == f"{table[:16]}-{hashlib.sha256(''.join(samples).encode()).hexdigest()[:16]}"


class Packed:
    """A weight of codes and scales, as packages for quantised weights make them."""

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        self.codes, self.scales = codes, scales

    def __tensor_flatten__(self) -> tuple[list[str], object]:
        return ["codes", "scales"], None


def test_a_packed_weight_is_opened() -> None:
    codes, scales = torch.ones(4, 2, dtype=torch.int8), torch.ones(4)
    inner: Any = Packed(codes, scales)
    assert list(_unpacked(inner)) == [codes, scales]
    outer: Any = Packed(inner, scales)
    assert list(_unpacked(outer)) == [codes, scales, scales]


def test_the_bytes_of_a_plain_model_are_those_of_its_weights(backbone: Backbone) -> None:
    weights = [*backbone.model.parameters(), *backbone.model.buffers()]
    assert tensor_bytes(stored_tensors(backbone.model)) == tensor_bytes(weights)


def test_only_weights_that_are_codes_are_packed(causal: Backbone) -> None:
    """A model that was made whole again on loading keeps the config of its folder."""
    assert not is_packed(causal.model)
    before = causal.fingerprint
    causal.model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    assert not is_packed(causal.model)
    del causal.__dict__["fingerprint"]
    assert causal.fingerprint == before
    codes = torch.ones(2, dtype=torch.uint8)
    causal.model.register_buffer("codes", codes)
    assert is_packed(causal.model)
    del causal.__dict__["fingerprint"]
    packed = causal.fingerprint
    assert packed.split("-")[0] == before.split("-")[0]
    assert packed != before
    codes += 1
    del causal.__dict__["fingerprint"]
    assert causal.fingerprint not in (before, packed)
