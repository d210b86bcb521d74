"""A prompt: which backbones it fits, its trained weights, and its parts.

The invariants that tests name are those of docs/invariants.md.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.loading import load_backbone
from ptuning.backbone.trained_weights import TrainedWeights
from ptuning.data.answer_space import AnswerSpace
from ptuning.data.task_files import load_task
from ptuning.errors import FileError, PromptError, TemplateError
from ptuning.names import MANIFEST_FILE
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prompt import Prompt
from ptuning.template.labels import LabelWords
from tests.conftest import RECORDS, learned, make_model

TEMPLATE = "[P*2] [X] [P:is] [Y]"


def test_a_task_brings_its_label_words_unless_others_are_given() -> None:
    task, words = load_task("RTE"), LabelWords({"entailment": ("true",), "not_entailment": ("false",)})
    assert Prompt.manual(task.manual[0], task=task).label_words == task.label_words
    assert Prompt.manual(task.manual[0], task=task, label_words=words).label_words == words
    assert not Prompt.manual(task.manual[0], task=task).answer_space.has_choices
    assert Prompt.manual("[X] is [Y]").answer_space == AnswerSpace()


def test_another_backbone(causal: Backbone, tmp_path: Path) -> None:
    """Invariant *Saved is what was trained*: the backbone must be the one that the prompt was learned on.

    Another seed makes another model, although its width fits; ``force`` uses it anyway.
    """
    make_model("llama", tmp_path / "other", seed=1)
    other = load_backbone(str(tmp_path / "other"), dtype="float32", device="cpu")
    prompt = learned(causal, TEMPLATE)
    with pytest.raises(PromptError, match=r"was trained on the backbone .* is another model; use the right backbone"):
        PromptModel(other).target_logits(RECORDS, prompt)
    assert PromptModel(other, force=True).target_logits(RECORDS, prompt)[0].isfinite().all()


def test_a_tuned_copy_of_the_backbone(causal: Backbone, tmp_path: Path, model_folder: Callable[[str], Path]) -> None:
    """Invariant *Saved is what was trained*: the same embeddings over another body are another backbone, too."""
    folder = shutil.copytree(model_folder("llama"), tmp_path / "full")
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] *= 1.5
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    tuned = load_backbone(str(folder), dtype="float32", device="cpu")
    with pytest.raises(PromptError, match=r"has the same embeddings and other weights \(a tuned copy\?\)"):
        PromptModel(tuned).target_logits(RECORDS, learned(causal, TEMPLATE))


def test_force_skips_the_backbone_check_only(causal: Backbone, make_backbone: Callable[[str], Backbone]) -> None:
    """Other widths and other numbers of slots stay errors."""
    prompt = learned(causal, TEMPLATE)
    assert prompt.slot_vectors is not None
    wide = replace(prompt, slot_vectors=torch.zeros(3, 33))
    with pytest.raises(PromptError, match=r"vectors are 33 wide, and the embeddings of .* 32"):
        wide.bind(causal, force=True)
    many = replace(prompt, slot_vectors=torch.zeros(4, 32))
    with pytest.raises(PromptError, match=r"has 3 slots with this tokenizer, and the prompt has 4 vectors"):
        many.bind(causal, force=True)
    words = learned(causal, "[P:The capital of Łódź] [X] [Y]")
    with pytest.raises(PromptError, match=r"slots with this tokenizer"):
        words.bind(make_backbone("bert"), force=True)


def test_from_token_ids_checks_its_ids(causal: Backbone) -> None:
    """Too few, too many, outside the vocabulary."""
    for ids in ([1, 2], [1, 2, 3, 4]):
        with pytest.raises(PromptError, match=rf"has 3 slots for this backbone, and {len(ids)} token ids were given"):
            Prompt.from_token_ids(TEMPLATE, ids, causal)
    with pytest.raises(PromptError, match=rf"token ids \[{causal.embedding_rows}, -1\] are outside the vocabulary"):
        Prompt.from_token_ids(TEMPLATE, [causal.embedding_rows, 1, -1], causal)


def test_a_template_with_slots_needs_vectors() -> None:
    """Slots without vectors are an error of the prompt, and a malformed pattern is one of the template."""
    with pytest.raises(PromptError, match="has slots, and there are no vectors for them"):
        Prompt.manual(TEMPLATE)
    with pytest.raises(TemplateError):
        Prompt.manual("[X] without a target")


def test_vectors_are_float32_matrices(causal: Backbone) -> None:
    """Vectors are float32: in bfloat16 they would lose small steps, as a 0.5 never moves under steps of 0.0009."""
    prompt = learned(causal, TEMPLATE)
    for vectors in (torch.zeros(3, 32).bfloat16(), torch.zeros(96)):
        with pytest.raises(PromptError, match=r"slot vectors must be float32 of shape \(slots, width\)"):
            replace(prompt, slot_vectors=vectors)


def test_vectors_are_numbers_and_targets_have_tokens(causal: Backbone) -> None:
    """Checked wherever a prompt is made, so that one that answers nothing is neither saved nor used."""
    prompt = learned(causal, TEMPLATE)
    for wrong in (float("nan"), float("-inf")):
        vectors = torch.zeros(3, 32)
        vectors[2, 0] = wrong
        with pytest.raises(PromptError, match=r"hold NaN or infinity \(in slot 3 of 3\)"):
            replace(prompt, slot_vectors=vectors)
    with pytest.raises(PromptError, match="target_tokens is 0; the longest target has 1 token or more"):
        replace(prompt, target_tokens=0)


def test_vectors_are_float32_under_a_bfloat16_backbone(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Vectors are float32 on disk, too; and a prompt learned in bfloat16 fits the same backbone in float32."""
    folder = str(model_folder("llama"))
    half, whole = (load_backbone(folder, dtype=kind, device="cpu") for kind in ("bfloat16", "float32"))
    Prompt.from_token_ids(TEMPLATE, [7, 8, 9], half).save(tmp_path / "p")
    found = Prompt.load(tmp_path / "p")
    assert found.slot_vectors is not None
    assert found.slot_vectors.dtype == torch.float32
    for backbone in (half, whole):
        assert PromptModel(backbone).target_logits(RECORDS, found)[0].dtype == torch.float32


def with_weights(backbone: Backbone, template: str = "[P:is] [X] [P] [Y]", *, factor: float = 1.5) -> Prompt:
    """Return a prompt with all weights of a backbone made larger; by a little, its norms only."""
    trained = backbone.copy()
    with torch.no_grad():
        for weight in trained.model.parameters():
            if factor > 1.1 or weight.ndim == 1:
                weight.mul_(factor)
    prompt = learned(backbone, template)
    return replace(prompt, weights=TrainedWeights.of(trained, backbone, train_backbone="full", keep="whole"))


def test_an_unadapted_backbone_is_refused(causal: Backbone, make_backbone: Callable[[str], Backbone]) -> None:
    """Trained weights are never silently left out: whoever binds a prompt needs the backbone with its weights in it."""
    prompt = with_weights(causal)
    for force in (False, True):
        with pytest.raises(PromptError, match=r"trained together with weights of .*, and those are not in it; take"):
            prompt.bind(causal, force=force)
    adapted = prompt.adapt(causal)
    assert prompt.bind(adapted).slots == prompt.slots
    assert prompt.adapt(adapted) is adapted
    assert prompt.without("backbone").adapt(causal) is causal
    with pytest.raises(PromptError, match=r"has the same embeddings and other weights|is another model"):
        prompt.without("backbone").bind(adapted)
    other = with_weights(causal, factor=2.0)
    with pytest.raises(PromptError, match="has the trained weights of another prompt in it; give the frozen one"):
        other.adapt(adapted)
    with pytest.raises(PromptError, match="is another model"):
        prompt.adapt(make_backbone("gpt2"))


def test_weights_that_hardly_moved_are_not_taken_for_the_frozen_ones(causal: Backbone) -> None:
    """The fingerprint is of bfloat16 values, and the difference may be smaller."""
    prompt = with_weights(causal, factor=1.0 + 1e-6)
    assert prompt.weights is not None
    assert prompt.weights.fingerprint == causal.fingerprint
    with pytest.raises(PromptError, match="those are not in it"):
        prompt.bind(causal)
    adapted = prompt.adapt(causal)
    assert adapted is not causal
    prompt.bind(adapted)
    assert not all(map(torch.equal, adapted.model.parameters(), causal.model.parameters()))


def test_the_folder_of_whole_weights_is_a_backbone_too(causal: Backbone, tmp_path: Path) -> None:
    prompt = with_weights(causal)
    prompt.save(tmp_path / "p")
    alone = load_backbone(tmp_path / "p" / "backbone", dtype="float32", device="cpu")
    loaded = Prompt.load(tmp_path / "p")
    assert loaded.adapt(alone) is alone
    loaded.bind(alone)


def test_a_prompt_with_weights_comes_back_whole_or_not_at_all(causal: Backbone, tmp_path: Path) -> None:
    prompt = with_weights(causal)
    prompt.save(tmp_path / "p")
    manifest = json.loads((tmp_path / "p" / MANIFEST_FILE).read_text())
    assert set(manifest["weights"]["sha256"]) == {path.name for path in (tmp_path / "p" / "backbone").iterdir()}
    loaded = Prompt.load(tmp_path / "p")
    assert loaded.weights is not None
    assert loaded.weights.train_backbone == "full"
    file = tmp_path / "p" / "backbone" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(PromptError, match="is cut off or damaged"):
        Prompt.load(tmp_path / "p")
    file.unlink()
    with pytest.raises(FileError, match="cannot read"):
        Prompt.load(tmp_path / "p")


def test_parts_can_be_left_out(causal: Backbone, make_backbone: Callable[[str], Backbone]) -> None:
    prompt = with_weights(causal, "[P*2] [X] [P:is] [P] [Y]")
    words = prompt.without("slots")
    assert (str(words.template), words.slots, words.weights, words.backbone) == (
        "[X] is [Y]", 0, prompt.weights, prompt.backbone,
    )  # fmt: skip
    vectors = prompt.without("backbone")
    assert (vectors.weights, vectors.slot_vectors) == (None, prompt.slot_vectors)
    manual = words.without("backbone")
    assert (manual.slots, manual.weights, manual.backbone) == (0, None, prompt.backbone)
    manual.bind(make_backbone("gpt2"))  # nothing is left that only one backbone understands
    for part in ("slots", "backbone"):
        with pytest.raises(PromptError, match=f"the prompt has no part '{part}' to leave out; it has none"):
            manual.without(part)
    with pytest.raises(PromptError, match="trained weights need to say which backbone they belong to"):
        replace(prompt, backbone=None)
