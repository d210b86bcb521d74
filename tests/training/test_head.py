"""A classification head beside the slots: learned with them, saved, loaded and asked as any prompt is."""

from pathlib import Path

import pytest
import safetensors.torch
import torch

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.forward import HEAD
from ptuning.backbone.trained_weights import HEAD_FILE
from ptuning.config import TrainConfig
from ptuning.data.questions import as_questions
from ptuning.engine.forward import forward, target_logits
from ptuning.engine.objective import build_requests, inputs_of
from ptuning.errors import ConfigError, PromptError
from ptuning.experiment.compare import compare
from ptuning.files import sha256
from ptuning.names import MANIFEST_FILE, WEIGHTS_FOLDER
from ptuning.progress import Interrupted
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prompt import Prompt
from ptuning.prompt.score import score_prompt
from ptuning.records import Record
from ptuning.template.labels import LabelWords
from ptuning.training.run import TrainResult, train

TEXTS = ("the movie", "a film", "Kenya and Peru", "the capital of France is")
# One of the labels is no word that the tokenizers know.
LABELS = ("good", "zq#zq")
ROWS: list[Record] = [
    {"x": f"{text} {('yes', 'no')[at % 2]}", "y": LABELS[at % 2]} for at, text in enumerate(TEXTS * 4)
]
HEAD_RUN = TrainConfig(
    epochs=6, batch_size=4, lr=0.01, deep_lr=0.02, head_lr=0.05, patience=9, train_backbone="head"
).as_defaults()


def trained(
    backbone: Backbone, template: str = "[P:so] [X] [Y]", out: Path | None = None, **more: object
) -> TrainResult:
    config = HEAD_RUN.adapted(**more)
    return train(template, ROWS, dev=ROWS, labels=list(LABELS), backbone=backbone, config=config, out=out)


def test_it_learns_is_saved_and_answers_as_it_was_scored(backbone: Backbone, tmp_path: Path) -> None:
    """Labels need no words, the backbone stays as it is, and what is loaded answers as what was trained."""
    before = {name: weight.clone() for name, weight in backbone.model.state_dict().items()}
    result = trained(backbone, out=tmp_path / "run")
    assert (result.record["train_backbone"], result.record["method"]) == ("head", "p-tuning+head")
    assert result.prompt.scores["accuracy"] > 0.7
    assert all(torch.equal(weight, before[name]) for name, weight in backbone.model.state_dict().items())
    loaded = Prompt.load(tmp_path / "run")
    assert loaded.weights is not None
    assert set(loaded.weights.tensors) == {f"{HEAD}.weight", f"{HEAD}.bias"}
    model = PromptModel(backbone)
    answers = model.predict(ROWS, loaded)
    assert [one.text for one in answers] == [one.text for one in model.predict(ROWS, result.prompt)]
    hits = [one.text == row["y"] for one, row in zip(answers, ROWS, strict=True)]
    assert sum(hits) / len(hits) == result.prompt.scores["accuracy"]
    assert score_prompt(model, ROWS, loaded).scores["accuracy"].value == result.prompt.scores["accuracy"]
    assert all(sum((one.probabilities or {}).values()) == pytest.approx(1.0) for one in answers)
    manual = Prompt.manual("[X] is [Y]", label_words=LabelWords.of("good;bad"))
    beside = model.predict([ROWS[0], ROWS[1]], [loaded, manual])
    assert beside[0].text == answers[0].text


def test_logits_are_a_linear_layer_on_the_hidden_state_in_front_of_the_target(causal: Backbone) -> None:
    result = trained(causal, "[D*3] [X] so [Y]")
    prompt, weights = result.prompt, result.prompt.weights
    assert weights is not None
    assert prompt.deep is not None
    adapted = prompt.adapt(causal)
    bound, learned = prompt.bind(adapted), prompt.learned(adapted)
    items = build_requests(bound, as_questions(ROWS), prompt.answer_space)
    found = target_logits(adapted, inputs_of(items), learned)  # (N, K)
    assert found.shape == (len(ROWS), 2)
    for row, item in zip(found, items, strict=True):
        (example,) = item.inputs
        assert example.logit_positions == (len(example.token_ids) - 1,)
        hidden: list[torch.Tensor] = []
        hook = adapted.head.register_forward_pre_hook(lambda _, given, hidden=hidden: hidden.append(given[0]))
        forward(adapted, [example], learned)
        hook.remove()
        own = hidden[-1].reshape(-1, hidden[-1].shape[-1])[-1]
        expected = weights.tensors[f"{HEAD}.weight"] @ own + weights.tensors[f"{HEAD}.bias"]
        torch.testing.assert_close(row, expected.detach(), atol=1e-5, rtol=0)


def test_without_the_head_the_words_answer(causal: Backbone) -> None:
    result = train(
        "[P:so] [X] [Y]", ROWS, labels="good;bad", alias_label=["zq#zq=bad"], backbone=causal, config=HEAD_RUN
    )
    words = result.prompt.without("backbone")
    assert not words.answer_space.head
    assert {one.text for one in PromptModel(causal).predict(ROWS, words)} <= {"good", "bad"}


def test_stopped_it_goes_on_where_it_was(causal: Backbone, tmp_path: Path) -> None:
    whole = trained(causal, out=tmp_path / "whole")
    seen: list[int] = []

    def stop() -> bool:
        seen.append(1)
        return len(seen) > 9

    options = {"dev": ROWS, "labels": list(LABELS), "backbone": causal, "config": HEAD_RUN}
    with pytest.raises(Interrupted):
        train("[P:so] [X] [Y]", ROWS, out=tmp_path / "parts", should_stop=stop, **options)  # type: ignore[arg-type]
    again = train("[P:so] [X] [Y]", ROWS, out=tmp_path / "parts", resume=True, **options)  # type: ignore[arg-type]
    assert whole.prompt.weights is not None
    assert again.prompt.weights is not None
    for name, one in whole.prompt.weights.tensors.items():
        assert torch.equal(one, again.prompt.weights.tensors[name])
    assert whole.record["history"][-1]["dev_loss"] == again.record["history"][-1]["dev_loss"]  # type: ignore[index,call-overload]


def test_what_a_head_cannot_do_is_refused(causal: Backbone, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a classification head \(train_backbone head\) chooses among labels"):
        train("[P:so] [X] [Y]", ROWS, backbone=causal, config=HEAD_RUN)
    with pytest.raises(ConfigError, match="calibration is for words of labels"):
        train("[P:so] [X] [Y]", ROWS, labels="auto", calibrate=True, backbone=causal, config=HEAD_RUN)
    trained(causal, out=tmp_path / "run", epochs=1)
    file = tmp_path / "run" / "prompt" / WEIGHTS_FOLDER / HEAD_FILE
    tensors = safetensors.torch.load_file(file)
    manifest = file.parents[1] / MANIFEST_FILE
    for name, shape, says in ((f"{HEAD}.weight", (2, 5), "wrong shape"), (f"{HEAD}.bias", (3,), "wrong shape")):
        before = sha256(file.read_bytes())
        safetensors.torch.save_file({**tensors, name: torch.zeros(shape)}, file)
        manifest.write_text(manifest.read_text("utf-8").replace(before, sha256(file.read_bytes())), encoding="utf-8")
        with pytest.raises(PromptError, match=says):
            PromptModel(causal).predict(ROWS[:1], Prompt.load(tmp_path / "run"))


def test_p_tuning_v2_with_its_head_is_compared(causal: Backbone, tmp_path: Path) -> None:
    """Beside label words; a cell of a task without labels says why it failed."""
    options = {"test": ROWS, "dev": ROWS, "backbone": causal, "manual": "[X] so [Y]"}
    config = TrainConfig(epochs=3, batch_size=4, deep_lr=0.02, head_lr=0.05).as_defaults()
    names = "p-tuning-v2,p-tuning-v2+head,p-tuning+head"
    found = compare(ROWS, labels="good;bad", merge=["zq#zq=bad"], methods=names, config=config, out=tmp_path, **options)  # type: ignore[arg-type]
    assert not found.failed
    assert found.tasks["task"]["p-tuning-v2+head"]["accuracy"].n == len(ROWS)
    assert found.methods["p-tuning-v2+head"].describe.endswith("backbone frozen, classification head")
    other = compare(ROWS, methods="p-tuning+head", config=config, out=tmp_path / "open", **options)  # type: ignore[arg-type]
    assert "chooses among labels" in str(other.failed[0].error)


def test_a_head_learns_beside_no_slots(causal: Backbone) -> None:
    """On a manual template it is a linear probe of the backbone."""
    result = trained(causal, "[X] so [Y]")
    assert result.record["method"] == "manual+head"
    assert result.prompt.slot_vectors is None
    assert result.prompt.scores["accuracy"] > 0.7
