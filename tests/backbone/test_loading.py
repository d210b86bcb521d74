"""Loading with options: each is passed on, recorded, or refused with its value and what is allowed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.loading import load_backbone, load_tokenizer
from ptuning.backbone.sources import LoadOptions, check_folder
from ptuning.config import TrainConfig
from ptuning.errors import BackboneError
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prompt import Prompt
from ptuning.records import Record
from ptuning.training.run import train
from tests.conftest import CONTEXT, RECORDS, bound, learned, make_tokenizer, plain_logits

# A model whose classes come with it: a causal LLaMA under a name that transformers does not know.
CODE = """
import pathlib
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "nobody-knows-me"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
pathlib.Path({trace!r}).touch()
"""


@pytest.fixture
def llama(model_folder: Callable[[str], Path]) -> str:
    """Folder of a tiny LLaMA."""
    return str(model_folder("llama"))


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_dtypes_and_devices_are_torchs_or_their_names(name: str, llama: str) -> None:
    loaded = [load_backbone(llama, dtype=name, device="cpu")]
    loaded.append(load_backbone(llama, dtype=getattr(torch, name), device=torch.device("cpu")))
    assert [backbone.dtype for backbone in loaded] == [getattr(torch, name)] * 2
    assert loaded[0].fingerprint == load_backbone(llama).fingerprint


def test_auto_takes_cuda_then_apples_gpu_then_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    from ptuning.backbone import loading

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    found = []
    for cuda, apple in ((True, True), (False, True), (False, False)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=cuda: there)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda there=apple: there)
        found.append(loading._device("auto"))
    assert [str(device) for device in found] == ["cuda:0", "mps", "cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for rank, device in (("3", "cuda:1"), ("abc", "cuda:0")):  # what an earlier launcher left there
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert str(loading._device("auto")) == device


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float23"}, "unknown dtype 'float23'; use auto, float32, bfloat16, float16. Did you mean"),
        ({"dtype": torch.int8}, "unknown dtype 'int8'"),
        ({"device": "cuba"}, "device 'cuba' cannot be used: "),
        ({"device": "cuda:77"}, "; use auto, cpu"),
        ({"device": "mps"}, "backend; use auto, cpu"),
        ({"device_map": "blanced"}, "unknown device_map 'blanced'; use auto, balanced, balanced_low_0, sequential, or"),
        ({"device_map": "auto", "device": "cpu"}, "device 'cpu' and device_map"),
        ({"attn_implementation": "sdap"}, "unknown attn_implementation 'sdap'; use eager, "),
        ({"attn_implementation": "somebody/attention"}, "'somebody/attention' is code on the hub, which runs only if"),
        ({"max_length": 3}, "max_length is 3; it is a number of tokens, 4 or more"),
        ({"max_length": "many"}, "max_length is 'many'; it is a number of tokens"),
        ({"max_length": 65}, "max_length is 65, and the model reads 64 tokens at most"),
        ({"revision": "v2"}, "revision 'v2' names a version on the hub, and "),
        ({"quantize": 8}, "unknown quantize '8'; use int8, nf4, int8-bnb."),
        ({"attn_implementation": True}, "attn_implementation is True; it is a text"),
        ({"revision": 3}, "revision is 3; it is a text"),
        ({"shard": True}, "unknown shard 'True'; use tp, map, layers."),
        ({"shard": "map", "device_map": "auto"}, "shard 'map' and device_map"),
        ({"shard": "tp", "quantize": "int8"}, "quantised weights are not spread over processes"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(options: dict[str, object], message: str, llama: str) -> None:
    with pytest.raises(BackboneError) as caught:
        load_backbone(llama, **options)  # type: ignore[arg-type]
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


ODD = {
    "generation_config.json": ("[]", "not json", '{"eos_token_id": "two"}'),
    "config.json": (
        {"max_position_embeddings": "many"}, {"eos_token_id": [[2]]}, {"dtype": 32}, {"quantization_config": ["int8"]},
        {"rope_parameters": 3}, {"hidden_act": None}, {"architectures": 7},
    ),
    "tokenizer_config.json": ({"model_max_length": "long"}, {"added_tokens_decoder": {"0": 1}}),
}  # fmt: skip


@pytest.mark.parametrize(
    ("file", "content"), [(file, content) for file, contents in ODD.items() for content in contents]
)
def test_whatever_its_files_hold_is_one_message(file: str, content: object, llama: str, tmp_path: Path) -> None:
    """Values of wrong types were errors of Python; where transformers does not mind, the model is used."""
    folder = Path(shutil.copytree(llama, tmp_path / "model"))
    given = json.loads((folder / file).read_text(encoding="utf-8"))
    text = content if isinstance(content, str) else json.dumps({**given, **content})  # type: ignore[dict-item]
    (folder / file).write_text(text, encoding="utf-8")
    messages = []
    for read in (load_backbone, load_tokenizer):
        try:
            read(str(folder))
        except BackboneError as error:
            messages.append(str(error))
    assert all(str(folder) in message and "\n" not in message for message in messages)
    if file == "generation_config.json":  # it has the ends of a text, so it is not ignored silently
        assert len(messages) == 2
    if content == {"max_position_embeddings": "many"}:
        assert "'max_position_embeddings'" in messages[0]


def test_a_model_that_does_not_fit_into_the_gpu_says_what_to_do(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(transformers.LlamaForCausalLM, "to", full)
    with pytest.raises(BackboneError, match=r"does not fit into the GPU's memory; take fewer bits .*quantize"):
        load_backbone(llama)


def test_a_prompt_says_what_its_backbone_was_loaded_with(llama: str, tmp_path: Path) -> None:
    """Another dtype or attention is the same backbone: the fingerprint decides, and the prompt is used."""
    half = load_backbone(llama, dtype="bfloat16", attn_implementation="eager")
    learned(half, "[P*2] [X] is [Y]").save(tmp_path / "prompt")
    manifest = json.loads((tmp_path / "prompt" / "prompt.json").read_text())
    assert manifest["backbone"]["loaded"] == {"dtype": "bfloat16", "attn_implementation": "eager"}
    prompt = Prompt.load(tmp_path / "prompt")
    assert prompt.backbone is not None
    assert prompt.backbone.described == f"{llama}, bfloat16, eager"
    PromptModel(load_backbone(llama, dtype="float32")).predict(RECORDS[:2], prompt)


def test_rows_are_as_long_as_asked_for(llama: str, tmp_path: Path) -> None:
    """By training, answers and the tokenizer alone; records and prompts say so, and a prompt keeps to it."""
    short, whole = load_backbone(llama, max_length=20), load_backbone(llama)
    assert (short.tokenizer.max_tokens, whole.tokenizer.max_tokens) == (20, CONTEXT)
    assert load_tokenizer(llama, LoadOptions(max_length=20))[0].max_tokens == 20
    assert short.copy().tokenizer.max_tokens == 20
    assert short.to_json()["max_length"] == "20"
    assert "max_length" not in whole.loaded
    long: Record = {"x": "the movie was great and so was the answer " * 3, "y": "yes"}
    cut = bound(short, "[X] is [Y]").examples([long])[0]
    assert cut.shortened
    assert len(cut.token_ids) == 20
    assert not bound(whole, "[X] is [Y]").examples([long])[0].shortened
    found = train(
        "[P:The capital of] [X] [P:is] [Y]",
        [long, *RECORDS],
        dev=RECORDS[:2],
        backbone=short,
        config=TrainConfig(epochs=1),
        out=tmp_path / "run",
    )
    assert found.record["settings"]["max_length"] == 20  # type: ignore[index,call-overload]
    prompt = Prompt.load(tmp_path / "run")
    assert prompt.max_length == 20
    assert prompt.backbone is not None
    assert prompt.backbone.described == f"{llama}, float32, sdpa, rows of 20 tokens"
    # Loaded without it, the backbone is the same, and the prompt goes on cutting rows as it learned to.
    answers = [PromptModel(one).predict([long], prompt)[0].text for one in (short, whole)]
    assert answers[0] == answers[1]


def test_attention_is_the_one_asked_for(llama: str) -> None:
    """Heads are packed inside ``sdpa`` alone; both attend to the same."""
    eager, packed = (load_backbone(llama, attn_implementation=name) for name in ("eager", "sdpa"))
    assert eager.loaded["attn_implementation"] == "eager"
    torch.testing.assert_close(plain_logits(eager, [7, 8, 9]), plain_logits(packed, [7, 8, 9]), rtol=1e-4, atol=1e-4)


@pytest.fixture
def own_code(llama: str, tmp_path: Path) -> tuple[Path, Path]:
    """A folder with code of its own, and the file that the code writes when it runs."""
    folder, trace = tmp_path / "own", tmp_path / "trace"
    backbone = load_backbone(llama)
    backbone.model.save_pretrained(folder)
    make_tokenizer("llama").save_pretrained(folder)
    (folder / "own.py").write_text(CODE.format(trace=str(trace)))
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    config |= {"model_type": "nobody-knows-me", "auto_map": names, "architectures": ["OwnModel"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, trace


def test_code_of_a_model_runs_only_if_asked_for(own_code: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the option nothing of it runs, and the message says how to ask."""
    folder, trace = own_code
    for load in (load_backbone, load_tokenizer):
        with pytest.raises(BackboneError, match=r"it brings code of its own.*trust_remote_code=true"):
            load(str(folder))
    assert not trace.exists()
    backbone = load_backbone(str(folder), trust_remote_code=True)
    assert trace.exists()
    assert backbone.kind == "causal"
    assert type(backbone.model).__name__ == "OwnModel"
    prompt = learned(backbone, "[P*2] [X] is [Y]")
    assert PromptModel(backbone).predict(RECORDS[:2], prompt)


def test_options_have_one_default() -> None:
    """Those of the function are those of the object that carries them."""
    import dataclasses
    import inspect

    carried = {field.name: field.default for field in dataclasses.fields(LoadOptions)}
    parameters = inspect.signature(load_backbone).parameters.values()
    assert {parameter.name: parameter.default for parameter in parameters if parameter.name != "name"} == carried
    assert carried["trust_remote_code"] is False


def test_float16_learns(llama: str) -> None:
    """Gradients reach the slots, and are finite."""
    backbone = load_backbone(llama, dtype=torch.float16)
    assert isinstance(backbone, Backbone)
    embeddings = backbone.embed(torch.tensor([[7, 8, 9]])).clone().requires_grad_()
    at = torch.tensor([0])
    logits, _ = backbone.run(
        embeddings,
        mask=torch.ones(1, 3, dtype=torch.int64),
        positions=torch.arange(3)[None],
        rows=at,
        cols=at + 2,
    )
    torch.nn.functional.cross_entropy(logits, at + 5).backward()
    assert embeddings.grad is not None
    assert embeddings.grad.isfinite().all()
    assert embeddings.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"num_hidden_layers": 10**6}, r"asks for 1,000,000 layers, and the weights are \d+ tensors"),
        ({"num_hidden_layers": 1e12}, "layers, and the weights are"),
        ({"text_config": {"n_layer": 10**6}}, "asks for 1,000,000 layers"),
        ({"num_hidden_layers": 900}, r"asks for 900 layers with sizes up to 32 and 48, and there are [\d,]+ weights"),
        ({"hidden_size": 10**5}, "sizes up to 48 and 100,000"),
        ({"num_attention_heads": 10**9}, "sizes up to 48 and 1,000,000,000"),
        ({"vocab_size": 10**8}, r"a vocabulary of 100,000,000, and the longest table of weights has \d+ rows"),
    ],
)
def test_a_config_that_no_weights_can_fill_is_refused_before_a_model_is_made(
    changed: dict[str, object],
    says: str,
    llama: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A million layers take minutes to make, and already their list of kinds takes the memory."""
    folder = shutil.copytree(llama, tmp_path / "huge")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changed}))
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", pytest.fail)
    for load in (load_backbone, load_tokenizer):
        with pytest.raises(BackboneError, match=says):
            load(str(folder))


def test_layers_that_share_their_weights_may_be_more_than_tensors(tmp_path: Path) -> None:
    """ALBERT has one layer of weights, however often it runs."""
    config = transformers.AlbertConfig(
        vocab_size=400,
        embedding_size=16,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=40,
        num_attention_heads=4,
    )
    transformers.AlbertForMaskedLM(config).save_pretrained(tmp_path)
    check_folder(tmp_path, "albert", LoadOptions())


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("wrap", [lambda one: one, lambda one: {"": one}, lambda one: {"text": {"config": one}}])
def test_a_config_runs_no_code_of_the_hub(
    key: str, wrap: Callable[[str], object], llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would fetch and run the attention that a config.json names, where the package kernels is there."""
    folder = shutil.copytree(llama, tmp_path / "hostile")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: wrap("somebody/attention")}))
    with monkeypatch.context() as patched:
        patched.setattr(transformers.AutoConfig, "from_pretrained", pytest.fail)
        with pytest.raises(BackboneError, match=r"'somebody/attention' is code on the hub, which runs only if you ask"):
            load_backbone(str(folder))
    check_folder(folder, "hostile", LoadOptions(trust_remote_code=True))


@pytest.mark.parametrize("named", ["../other/model.safetensors", "/etc/passwd", "sub/../../model.safetensors"])
def test_an_index_of_weights_stays_in_its_folder(named: str, llama: str, tmp_path: Path) -> None:
    """transformers would read what it names, and weights of another folder would be taken for the model's own."""
    folder = shutil.copytree(llama, tmp_path / "split")
    shutil.copytree(llama, tmp_path / "other")
    (folder / "model.safetensors").unlink()
    listed = {"model.embed_tokens.weight": named}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    with pytest.raises(BackboneError, match=r"model.safetensors.index.json names the file '.*', which is not in the"):
        load_backbone(str(folder))


def test_a_model_in_several_files_is_read(llama: str, tmp_path: Path) -> None:
    """Its index names files of the folder."""
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    shutil.copytree(llama, tmp_path / "split", ignore=shutil.ignore_patterns("*.safetensors"))
    model.save_pretrained(tmp_path / "split", max_shard_size="40KB")
    assert len([*(tmp_path / "split").glob("*.safetensors")]) > 1
    assert load_backbone(tmp_path / "split").fingerprint == load_backbone(llama).fingerprint


@pytest.mark.parametrize("head", [b"", b"\xff" * 8, b"\x02" + b"\0" * 7 + b"[]", b"\x04" + b"\0" * 7 + b'{"a"'])
def test_weights_without_a_head_of_safetensors(head: bytes, llama: str, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "damaged")
    (folder / "model.safetensors").write_bytes(head)
    with pytest.raises(BackboneError, match=r"model.safetensors is not a whole safetensors file, but cut off or"):
        load_backbone(str(folder))
