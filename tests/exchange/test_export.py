"""Exports are written to a temporary folder, read back and compared; they appear whole and right, or not at all."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from gguf import GGMLQuantizationType, GGUFReader
from transformers import AutoModelForCausalLM, AutoTokenizer, GemmaForCausalLM

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.loading import load_backbone
from ptuning.backbone.trained_weights import TrainedWeights
from ptuning.engine.soft_prompt import DeepParams
from ptuning.errors import ConfigError, ExchangeError, FileError
from ptuning.exchange import FORMATS, embeds, export, model_copy, peft
from ptuning.exchange.format import ExportResult
from ptuning.exchange.verify import ExportSource, made_record
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prompt import Prompt
from ptuning.template.labels import LabelWords
from tests.conftest import RECORDS, learned, plain_logits
from tests.exchange.conftest import (
    ANYWHERE,
    FIRST,
    RESERVED,
    asked,
    by_stranger,
    exported,
    loaded_by_peft,
    of_targets,
    ours,
    reserving,
    reserving_model,
    reserving_tokenizer,
)
from tests.families import backbone_of, model_of, tokenizer_of
from tests.tiny_gguf import write_gguf

# Formats for any causal model; a GGUF file is copied of one.
ANY_MODEL = [kind for kind in FORMATS if kind != "gguf"]
KEYS = [
    "format_version", "kind", "backbone", "slot_token_ids", "slot_tokens", "largest_log_prob_difference", "n",
    "example",
]  # fmt: skip
tied_and_untied = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def card(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def test_the_formats_are_those_of_the_writers() -> None:
    assert list(FORMATS) == list(export.WRITERS)


@pytest.mark.parametrize("kind", ANY_MODEL)
def test_every_format_describes_itself(kind: str, tmp_path: Path) -> None:
    backbone = reserving()
    before = {name: id(module) for name, module in backbone.model.named_modules()}
    prompt = learned(backbone, FIRST)
    about = exported(prompt, backbone, tmp_path / "out", kind)
    assert list(about) == KEYS
    assert (about["kind"], about["n"]) == (kind, len(RECORDS))
    assert about["backbone"]["fingerprint"] == backbone.fingerprint
    assert list(about["example"]) == ["record", "input_ids", "target_ids", "log_prob"]
    assert about["example"]["record"] == RECORDS[0]
    assert about["largest_log_prob_difference"] < 1e-4
    assert str(prompt.template) in card(tmp_path / "out")
    assert f"n = {len(RECORDS)} records" in card(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {name: id(module) for name, module in backbone.model.named_modules()} == before  # PEFT replaces modules


@tied_and_untied
@pytest.mark.parametrize(
    ("kind", "template", "tokens"),
    [("lora", ANYWHERE, RESERVED[:3]), ("tokens", ANYWHERE, RESERVED[:3]), ("peft", FIRST, [])],
)
def test_another_program_gives_the_log_probability_of_the_example(
    kind: str, template: str, tokens: list[str], tied: bool, tmp_path: Path
) -> None:
    backbone = reserving(tied=tied)
    prompt = learned(backbone, template)
    about = exported(prompt, backbone, tmp_path, kind)
    assert about["slot_tokens"] == tokens
    theirs = by_stranger(kind, tmp_path, reserving_model(tied=tied), about["example"])
    assert theirs == pytest.approx(about["example"]["log_prob"], abs=1e-4)
    assert theirs == pytest.approx(ours(prompt, backbone, RECORDS[0]), abs=1e-4)


@pytest.mark.parametrize("kind", ["lora", "tokens"])
def test_a_model_that_scales_its_embeddings(kind: str, tmp_path: Path) -> None:
    """Gemma multiplies rows, and slot vectors are what comes out."""
    backbone = reserving(head=GemmaForCausalLM)
    prompt = learned(backbone, ANYWHERE)
    about = exported(prompt, backbone, tmp_path, kind)
    assert about["largest_log_prob_difference"] < 1e-4
    theirs = by_stranger(kind, tmp_path, reserving_model(head=GemmaForCausalLM), about["example"])
    assert theirs == pytest.approx(ours(prompt, backbone, RECORDS[0]), abs=1e-4)


@pytest.mark.parametrize("kind", ["lora", "tokens"])
@pytest.mark.parametrize(
    "family", ["gpt2", "opt", "opt-350m", "qwen3", "gemma-3", "bloom", "phi", "gpt-neox", "falcon"]
)
def test_other_families(family: str, kind: str, tmp_path: Path) -> None:
    """Heads with a bias, embeddings narrower than layers, tables padded to a round size, whose rows are taken before
    special tokens with a use.
    """
    backbone = backbone_of(family)
    about = exported(learned(backbone, ANYWHERE), backbone, tmp_path, kind)
    first = backbone.vocabulary
    assert about["slot_token_ids"] == [first, first + 1, first + 2]
    theirs = by_stranger(kind, tmp_path, model_of(family), about["example"])
    assert theirs == pytest.approx(about["example"]["log_prob"], abs=1e-4)
    if kind == "lora":
        assert about["slot_tokens"] == [None, None, None]
        assert "no tokens" in card(tmp_path)  # their share of the probability
        assert "Give ids, not text" in card(tmp_path)


@pytest.mark.parametrize("kind", ANY_MODEL)
def test_a_model_of_16_bits(kind: str, tmp_path: Path) -> None:
    """Rows are taken as they are stored; the other program's head rounds its logits, and no more."""
    model = reserving_model().to(torch.bfloat16)  # type: ignore[arg-type]  # the stub of Module.to is lost
    backbone = Backbone.from_model(model, reserving_tokenizer(), name="tiny")
    about = exported(learned(backbone, FIRST), backbone, tmp_path, kind)
    assert about["largest_log_prob_difference"] < 0.2
    assert about["backbone"]["loaded"]["dtype"] == "bfloat16"


@pytest.mark.parametrize("wrong", [0.05, float("nan")])
def test_an_export_that_answers_differently_does_not_appear(
    wrong: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever made it wrong: the other program's answer with the files that were written counts."""

    def damaged(source: ExportSource, folder: Path) -> ExportResult:
        result = peft.write_embedding_lora(source, folder)
        file = folder / "adapter_model.safetensors"
        tensors = safetensors.torch.load(file.read_bytes())
        name = next(name for name in tensors if name.endswith("_B"))
        file.write_bytes(safetensors.torch.save({**tensors, name: tensors[name] + wrong}))
        return result

    monkeypatch.setattr(export, "WRITERS", {**export.WRITERS, "lora": damaged})
    backbone = reserving()
    with pytest.raises(ExchangeError, match="not written"):
        exported(learned(backbone, ANYWHERE), backbone, tmp_path / "out", "lora")
    assert list(tmp_path.iterdir()) == []


def test_every_word_of_every_label_is_compared(tmp_path: Path) -> None:
    backbone = reserving()
    words = LabelWords({"good": ["great", "yes"], "bad": ["terrible"]})
    prompt = replace(learned(backbone, ANYWHERE), label_words=words)
    about = exported(prompt, backbone, tmp_path, "lora", [{"x": "the movie", "y": "bad"}])
    ranked = PromptModel(backbone).rank([{"x": "the movie"}], prompt, ["great", "yes", "terrible"])[0]
    assert about["example"]["log_prob"] in [pytest.approx(candidate.log_prob, abs=1e-4) for candidate in ranked]
    assert about["n"] == 1


def test_without_data_a_record_is_made_of_the_template() -> None:
    prompt = learned(reserving(), ANYWHERE)
    assert list(made_record(prompt)) == [{"x": "x", "y": "answer"}]
    labelled = replace(prompt, label_words=LabelWords({"good": ["great"], "bad": ["terrible"]}))
    assert list(made_record(labelled)) == [{"x": "x", "y": "good"}]


def unigram() -> Backbone:
    """A model whose tokenizer puts a space before every text, also after special tokens."""
    return Backbone.from_model(model_of("llama"), tokenizer_of("t5"), name="unigram")


def deep(template: str) -> Prompt:
    return Prompt.from_token_ids(template, [7, 8], reserving())


def with_weights() -> Prompt:
    return replace(learned(reserving(), ANYWHERE), weights=TrainedWeights("full", "difference", "x", {}))


def with_offsets() -> Prompt:
    """Deep slots that are added to the inputs of layers."""
    backbone = reserving()
    params = DeepParams(None, 0, torch.zeros(2, backbone.deep.layers - 1, backbone.width), (0, 1))
    return replace(deep("[D*2] {x} is [Y]"), deep=params, slot_vectors=torch.zeros(2, backbone.width))


@pytest.mark.parametrize(
    ("prompt", "kind", "facts"),
    [
        (lambda: Prompt.manual("{x} is [Y]"), "lora", ["no slots"]),
        (lambda: learned(reserving(), ANYWHERE), "lara", ["'lara'", "'lora'"]),
        (with_weights, "lora", ["train_backbone=none"]),
        (lambda: learned(reserving(), "[P*6] {x} [Y]"), "lora", ["6 slots", "5 rows", "tokens"]),
        (lambda: learned(reserving(), ANYWHERE), "peft", ["after a field", "lora"]),
        (lambda: learned(reserving(), "is it [P] [Y]"), "peft", ["nothing after its slots"]),
        (lambda: learned(reserving(), ANYWHERE), "gguf", ["not a GGUF file", "convert_hf_to_gguf.py"]),
        (lambda: deep("[D] {x} is [D] [Y]"), "peft", ["other slots", "p-tuning-v2"]),
        (with_offsets, "peft", ["added to the inputs of layers"]),
        *((lambda: deep("[D*2] {x} is [Y]"), kind, ["peft"]) for kind in ("lora", "tokens", "gguf", "embeds")),
    ],
)
def test_what_cannot_be_exported(prompt: Any, kind: str, facts: list[str], tmp_path: Path) -> None:
    with pytest.raises(ExchangeError) as caught:
        exported(prompt(), reserving(), tmp_path / "out", kind)
    assert all(fact in str(caught.value) for fact in facts), caught.value
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("kind", "template"), [("tokens", "[P*2], {x} is [P] [Y]"), ("peft", "[P*2], {x} is [Y]")])
def test_a_text_that_has_other_ids_is_refused(kind: str, template: str, tmp_path: Path) -> None:
    backbone = unigram()
    with pytest.raises(ExchangeError, match=r" ids \[.*lora"):
        exported(learned(backbone, template), backbone, tmp_path / "out", kind, RECORDS[:1])
    assert list(tmp_path.iterdir()) == []


def test_a_masked_model_is_refused(tmp_path: Path, masked: Backbone) -> None:
    with pytest.raises(ExchangeError, match="kind masked"):
        exported(learned(masked, ANYWHERE), masked, tmp_path / "out", "lora")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(FileError, match="not empty"):
        exported(learned(reserving(), ANYWHERE), reserving(), tmp_path, "embeds")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = reserving()
    monkeypatch.setattr(peft, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'ptuning\[lora\]'"):
        exported(learned(backbone, ANYWHERE), backbone, tmp_path / "out", "lora")
    exported(learned(backbone, ANYWHERE), backbone, tmp_path / "out", "embeds")


@pytest.mark.filterwarnings("ignore")  # of PEFT and transformers, as a reader of the card would see them
@pytest.mark.parametrize("kind", ["lora", "peft", "tokens"])
def test_the_python_of_the_card_runs(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backbone = reserving()
    exported(learned(backbone, FIRST), backbone, tmp_path / "out", kind)
    reserving_model().save_pretrained(tmp_path / "model")
    reserving_tokenizer().save_pretrained(tmp_path / "model")
    (code,) = re.findall(r"```python\n(.*?)```", card(tmp_path / "out"), flags=re.DOTALL)
    exec(code.replace("THIS_FOLDER", str(tmp_path / "out")).replace("MODEL", str(tmp_path / "model")), {})
    assert capsys.readouterr().out.strip()


# embeds


def test_the_embeddings_of_the_snippet_give_the_log_probability(tmp_path: Path) -> None:
    backbone = reserving()
    prompt = learned(backbone, ANYWHERE)
    example = exported(prompt, backbone, tmp_path, "embeds")["example"]
    tensors = safetensors.torch.load_file(tmp_path / embeds.FILE)
    assert tensors["input_ids"].tolist() == example["input_ids"]
    model = reserving_model()
    table, target = model.get_input_embeddings(), example["target_ids"]
    with torch.no_grad():
        embedded = table(tensors["input_ids"])
        embedded[tensors["slot_positions"]] = tensors["slot_vectors"]
        embedded = torch.cat([embedded, table(torch.tensor(target))])
        logits = model(inputs_embeds=embedded[None]).logits[0][-len(target) - 1 : -1]
    assert of_targets(logits, target) == pytest.approx(ours(prompt, backbone, RECORDS[0]), abs=1e-4)


# lora


def test_a_reserved_token_that_the_template_writes_is_no_slot(tmp_path: Path) -> None:
    """Nor is one of the chat template, which a conversation would have."""
    backbone = reserving()
    about = exported(learned(backbone, f"[P] {{x}} {RESERVED[0]} is [Y]"), backbone, tmp_path, "lora")
    assert about["slot_tokens"] == [RESERVED[1]]
    assert "<|turn|>" not in backbone.tokenizer.reserved_ids.values()


@pytest.mark.parametrize(("slots", "rank"), [(2, 8), (4, 8)])
def test_the_rank_is_one_that_vllm_takes(slots: int, rank: int, tmp_path: Path) -> None:
    exported(learned(reserving(), f"[P*{slots}] {{x}} [Y]"), reserving(), tmp_path, "lora")
    assert f"--max-lora-rank {rank} " in card(tmp_path)


# tokens


@torch.no_grad()
@tied_and_untied
def test_a_copy_answers_other_texts_as_before(tied: bool, tmp_path: Path) -> None:
    backbone = reserving(tied=tied)
    about = exported(learned(backbone, ANYWHERE), backbone, tmp_path, "tokens")
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1  # safetensors would write for its owner only
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert torch.equal(model.get_output_embeddings().weight, backbone.model.get_output_embeddings().weight)
    assert len(model.get_input_embeddings().weight) == backbone.embedding_rows
    ids = tokenizer("The capital of Kenya is Nairobi")["input_ids"]
    torch.testing.assert_close(model(torch.tensor([ids])).logits[0], plain_logits(backbone, ids))
    text = f"{RESERVED[0]}{RESERVED[1]} {{x}} is{RESERVED[2]}"
    assert tokenizer(text.replace("{x}", RECORDS[0]["x"]))["input_ids"] == about["example"]["input_ids"]
    assert text in card(tmp_path)


@tied_and_untied
def test_tokens_are_added_where_there_are_too_few(tied: bool, tmp_path: Path) -> None:
    """Model and tokenizer agree on their number, and the new ones are as unlikely as the least likely of the old."""
    backbone = reserving(tied=tied)
    prompt = learned(backbone, "[P*4] {x} is [P*3] [Y]")
    about = exported(prompt, backbone, tmp_path / "out", "tokens")
    size = backbone.embedding_rows
    assert about["slot_token_ids"] == list(range(size, size + 7))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == model.config.vocab_size == size + 7
    theirs = asked(model, about["example"])
    assert theirs == pytest.approx(about["example"]["log_prob"], abs=1e-4)
    assert theirs == pytest.approx(ours(prompt, backbone, RECORDS[0]), abs=0.1)  # new tokens take a little
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([about["example"]["input_ids"]])).logits[0, -1]
    assert logits[size:].max() <= logits[:size].median()
    assert "no tokens" in card(tmp_path / "out")
    # The same prompt gives the same names, and another prompt others.
    again, other = (
        exported(learned(backbone, "[P*4] {x} is [P*3] [Y]", seed=seed), backbone, tmp_path / str(seed), "tokens")
        for seed in (0, 1)
    )
    assert about["slot_tokens"] == again["slot_tokens"]
    assert not set(about["slot_tokens"]) & set(other["slot_tokens"])


# gguf


@pytest.fixture
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.mark.usefixtures("_own_cache")
@pytest.mark.parametrize(("kind", "rounding"), [("F32", 1e-4), ("Q8_0", 0.5)])
def test_a_copy_of_a_gguf_file(kind: str, rounding: float, tmp_path: Path) -> None:
    """A tied head gets the table as it was, and all other weights keep their bytes; packed weights are rounded in the
    backbone and not in the copy.
    """
    original = write_gguf(tmp_path / "tiny.gguf", kind=kind, tokenizer=reserving_tokenizer())
    backbone = load_backbone(str(original), dtype="float32", device="cpu")
    prompt = learned(backbone, ANYWHERE)
    about = exported(prompt, backbone, tmp_path / "out", "gguf")
    assert about["slot_tokens"] == RESERVED[:3]
    file = tmp_path / "out" / model_copy.GGUF_FILE
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    theirs = asked(model, about["example"])
    assert theirs == pytest.approx(about["example"]["log_prob"], abs=1e-4)
    assert theirs == pytest.approx(ours(prompt, backbone, RECORDS[0]), abs=rounding)
    before, after = (GGUFReader(path) for path in (original, file))
    fields = {name: field.contents() for name, field in before.fields.items() if not name.startswith("GGUF.")}
    assert {name: after.fields[name].contents() for name in fields} == fields
    old, new = ({tensor.name: tensor for tensor in reader.tensors} for reader in (before, after))
    assert new.keys() - old.keys() == {"output.weight"}
    assert all(
        np.array_equal(new[name].data, tensor.data) for name, tensor in old.items() if name != "token_embd.weight"
    )
    assert np.array_equal(new["output.weight"].data, old["token_embd.weight"].data)
    wanted = GGMLQuantizationType.F32 if kind == "F32" else GGMLQuantizationType.F16
    assert new["token_embd.weight"].tensor_type == wanted


@pytest.mark.usefixtures("_own_cache")
def test_a_gguf_file_that_cannot_be_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = write_gguf(tmp_path / "tiny.gguf", tokenizer=reserving_tokenizer())
    backbone = load_backbone(str(original), dtype="float32", device="cpu")
    with pytest.raises(ExchangeError, match=r"7 slots, .* 6 reserved tokens"):
        exported(learned(backbone, "[P*7] {x} [Y]"), backbone, tmp_path / "out", "gguf")
    monkeypatch.setattr(model_copy, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install gguf"):
        exported(learned(backbone, ANYWHERE), backbone, tmp_path / "out", "gguf")
    assert not (tmp_path / "out").exists()


# peft


@pytest.mark.filterwarnings("ignore:Position ids are not supported")  # of PEFT; they count from the first virtual token
def test_peft_generates_the_same_answer(tmp_path: Path) -> None:
    """Given the text after the slots as a user gives it."""
    backbone = reserving()
    prompt = learned(backbone, FIRST)
    exported(prompt, backbone, tmp_path, "peft")
    model = loaded_by_peft(tmp_path, reserving_model())
    row = prompt.bind(backbone).examples(RECORDS[:1])[0]
    # BOS and literal words before the slots are virtual tokens, too.
    assert model.peft_config["default"].num_virtual_tokens == row.slot_positions[-1] + 1 > prompt.slots + 1
    ids = torch.tensor([backbone.tokenizer.read(" Kenya is", add_special_tokens=False)])
    output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)[0]
    expected = PromptModel(backbone).predict([{"x": "Kenya"}], prompt, generation={"max_new_tokens": 5})[0].text
    assert expected
    assert backbone.tokenizer.decode(output[ids.shape[1] :].tolist()).strip().startswith(expected)
