"""An export is written beside, read back and compared; it appears whole and right, or not at all."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.trained_weights import TrainedWeights
from ptuning.errors import ExchangeError, FileError
from ptuning.exchange import embedding_lora, peft_files
from ptuning.exchange.export import EXPORT_FILE, FORMS
from ptuning.exchange.form import Exported
from ptuning.exchange.rows import Source, made_record
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prompt import Prompt
from ptuning.template.labels import LabelWords
from tests.conftest import RECORDS, learned
from tests.exchange.conftest import ANYWHERE, IN_FRONT, exported, reserving, reserving_model, reserving_tokenizer

KEYS = [
    "format_version", "kind", "backbone", "slot_token_ids", "slot_tokens", "largest_log_prob_difference", "n",
    "example",
]  # fmt: skip
# The forms that any causal model has; a GGUF file is copied of one.
ANY_MODEL = [kind for kind in FORMS if kind != "gguf"]


@pytest.mark.parametrize("kind", ANY_MODEL)
def test_every_form_says_the_same_of_itself(kind: str, tmp_path: Path) -> None:
    backbone = reserving()
    prompt = learned(backbone, IN_FRONT)
    about = exported(prompt, backbone, tmp_path / "out", kind)
    assert list(about) == KEYS
    assert about["kind"] == kind
    assert about["backbone"]["fingerprint"] == backbone.fingerprint
    assert list(about["example"]) == ["record", "input_ids", "target_ids", "log_prob"]
    assert about["largest_log_prob_difference"] < 1e-4
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert str(prompt.template) in card
    assert f"n = {len(RECORDS)} records" in card
    assert [path for path in tmp_path.iterdir() if path.name != "out"] == []


@pytest.mark.parametrize("wrong", [0.05, float("nan")])
def test_what_answers_differently_does_not_appear(
    wrong: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever made it wrong: what counts is what the other program answers with the files that were written."""
    real = embedding_lora.write

    def damaged(source: Source, folder: Path) -> Exported:
        written = real(source, folder)
        file = folder / "adapter_model.safetensors"
        tensors = safetensors.torch.load(file.read_bytes())
        name = next(name for name in tensors if name.endswith("_B"))
        file.write_bytes(safetensors.torch.save({**tensors, name: tensors[name] + wrong}))
        return written

    monkeypatch.setitem(FORMS, "lora", replace(FORMS["lora"], write=damaged))
    backbone = reserving()
    with pytest.raises(ExchangeError, match="more than rounding, so it is not written"):
        exported(learned(backbone, ANYWHERE), backbone, tmp_path / "out", "lora")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ANY_MODEL)
def test_a_model_of_16_bits(kind: str, tmp_path: Path) -> None:
    """Rows are taken as they are stored; the other program's head rounds its logits, and no more."""
    model = reserving_model().to(torch.bfloat16)  # type: ignore[arg-type]  # the stub of Module.to is lost
    backbone = Backbone.from_model(model, reserving_tokenizer(), name="tiny")
    about = exported(learned(backbone, IN_FRONT), backbone, tmp_path / "out", kind)
    assert about["largest_log_prob_difference"] < 0.2
    assert about["backbone"]["loaded"]["dtype"] == "bfloat16"


def test_every_word_of_every_label_is_compared(tmp_path: Path) -> None:
    backbone = reserving()
    words = LabelWords({"good": ["great", "yes"], "bad": ["terrible"]})
    prompt = replace(learned(backbone, ANYWHERE), label_words=words)
    about = exported(prompt, backbone, tmp_path / "out", "lora", [{"x": "the movie", "y": "bad"}])
    found = PromptModel(backbone).rank([{"x": "the movie"}], prompt, ["great", "yes", "terrible"])[0]
    assert about["example"]["log_prob"] in [pytest.approx(one.log_prob, abs=1e-4) for one in found]
    assert about["n"] == 1


def test_without_data_a_record_is_made_of_the_template() -> None:
    backbone = reserving()
    assert list(made_record(learned(backbone, ANYWHERE))) == [{"x": "x", "y": "answer"}]
    labelled = replace(learned(backbone, ANYWHERE), label_words=LabelWords({"good": ["great"], "bad": ["terrible"]}))
    assert list(made_record(labelled)) == [{"x": "x", "y": "good"}]


def test_what_cannot_be_exported_says_why(tmp_path: Path, masked: Backbone) -> None:
    backbone = reserving()
    prompt = learned(backbone, ANYWHERE)
    cases = [
        (Prompt.manual("{x} is [Y]"), backbone, "lora", "has no slots"),
        (prompt, backbone, "lara", "not as 'lara'. Did you mean 'lora'"),
        (
            replace(prompt, weights=TrainedWeights("full", "difference", "x", {})),
            backbone,
            "lora",
            "--train-backbone none",
        ),
        (learned(masked, ANYWHERE), masked, "lora", "of the kind masked; prompts of causal models"),
    ]
    for one, on, kind, says in cases:
        with pytest.raises(ExchangeError) as caught:
            exported(one, on, tmp_path / "out", kind)
        assert says in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    backbone = reserving()
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(FileError, match="not empty"):
        exported(learned(backbone, ANYWHERE), backbone, tmp_path, "embeds")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_without_peft_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft_files, "find_spec", lambda name: None)
    backbone = reserving()
    with pytest.raises(Exception, match=r"pip install 'ptuning\[lora\]'"):
        exported(learned(backbone, ANYWHERE), backbone, tmp_path / "out", "lora")
    exported(learned(backbone, ANYWHERE), backbone, tmp_path / "out", "embeds")


def test_the_backbone_is_as_it_was(tmp_path: Path) -> None:
    """PEFT replaces modules, and does so in a copy."""
    backbone = reserving()
    prompt, before = learned(backbone, IN_FRONT), {name: id(one) for name, one in backbone.model.named_modules()}
    for kind in ANY_MODEL:
        exported(prompt, backbone, tmp_path / kind, kind, RECORDS[:1])
    assert {name: id(one) for name, one in backbone.model.named_modules()} == before
    fresh = json.loads((tmp_path / "lora" / EXPORT_FILE).read_text(encoding="utf-8"))
    assert torch.isfinite(torch.tensor(fresh["example"]["log_prob"]))


@pytest.mark.filterwarnings("ignore")  # of PEFT and transformers, as a reader of the card would see them
@pytest.mark.parametrize("kind", ["lora", "peft", "tokens"])
def test_the_python_of_the_card_runs(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backbone = reserving()
    exported(learned(backbone, IN_FRONT), backbone, tmp_path / "out", kind)
    reserving_model().save_pretrained(tmp_path / "model")
    reserving_tokenizer().save_pretrained(tmp_path / "model")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    exec(code.replace("THIS_FOLDER", str(tmp_path / "out")).replace("MODEL", str(tmp_path / "model")), {})
    assert capsys.readouterr().out.strip()
