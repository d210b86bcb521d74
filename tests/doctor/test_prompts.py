"""Every fault of a prompt is found by one check, which says what to do; and no fault hides another prompt."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.trained_weights import TrainedWeights
from ptuning.doctor.checks import Check
from ptuning.doctor.prompts import ReadPrompt, check_exports, check_fit, read_prompts
from ptuning.errors import ConfigError
from ptuning.exchange.export import FORMS
from ptuning.names import PROMPT_FOLDER
from ptuning.prompt.prompt import Prompt
from ptuning.template.labels import LabelWords
from tests.conftest import WARM, learned
from tests.doctor.conftest import FAULTS, named, prompts_of


@pytest.fixture
def folder(causal: Backbone, tmp_path: Path) -> Path:
    """A folder of sound prompts, one of them in the folder of its training run, and one a folder deeper."""
    found = tmp_path / "prompts"
    prompts = prompts_of(causal)
    prompts["facts"].save(found / "facts")
    prompts["moods"].save(found / "moods" / PROMPT_FOLDER)
    prompts["facts"].save(found / "team" / "facts")
    (found / "notes").mkdir()
    (found / "readme.txt").write_text("none of ours")
    return found


def looked_at(read: ReadPrompt, backbone: Backbone) -> dict[str, Check]:
    return named([*read.checks, *check_fit(read, backbone), *check_exports(read)])


def test_sound_prompts_of_a_folder(folder: Path, causal: Backbone) -> None:
    read = read_prompts([str(folder)])
    # By the names that a server gives them.
    assert [one.name for one in read] == ["facts", "moods", "team/facts"]
    for one in read:
        found = named([*one.checks, *check_fit(one, causal)])
        assert list(found) == ["files", "vectors", "prompt.json", "backbone", "tokenizer", "norm", "answers"]
        assert {check.status for check in found.values()} == {"ok"}
        assert {check.group for check in found.values()} == {f"prompt {one.name}"}
        assert "format 1, sha256 " in found["files"].found
        assert causal.fingerprint in found["backbone"].found
        if one.name == "moods":
            assert "2 labels with 3 words" in found["answers"].found


def test_a_prompt_may_be_named_by_itself_its_run_or_the_folder_of_both(folder: Path) -> None:
    asked = [str(folder / "facts"), str(folder / "moods"), str(folder / "moods" / PROMPT_FOLDER)]
    read = read_prompts(asked)
    # Two of one name are told apart by their places.
    assert [one.name for one in read] == ["facts", asked[1], asked[2]]
    assert all(one.prompt is not None for one in read)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_where_it_is_and_other_prompts_are_looked_at(
    fault: str, folder: Path, causal: Backbone
) -> None:
    make, name, said = FAULTS[fault]
    make(folder / "facts", causal)
    broken, sound, _ = read_prompts([str(folder)])
    found = looked_at(broken, causal)
    failed = [check for check in found.values() if check.status == "failed"]
    assert [check.name for check in failed] == [name], failed
    assert said in failed[0].found
    assert {check.status for check in looked_at(sound, causal).values()} == {"ok"}


def test_what_is_no_prompt_is_a_finding_and_a_manual_prompt_has_no_files(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for source in (str(tmp_path / "empty"), str(tmp_path / "none"), "a\0b"):
        (read,) = read_prompts([source])
        assert (read.prompt, read.checks[0].status) == (None, "failed"), source
        assert "not a prompt folder" in read.checks[0].found
        assert read.checks[0].remedy.startswith("name the folder of a prompt")
    with pytest.raises(ConfigError, match="has no files"):
        read_prompts(["manual:[X] is [Y]"])


def test_another_backbone_names_the_right_one(folder: Path, causal: Backbone, masked: Backbone) -> None:
    read = read_prompts([str(folder / "facts")])[0]
    found = named(list(check_fit(read, masked)))
    assert list(found) == ["backbone"]
    assert found["backbone"].status == "failed"
    assert f"--backbone {causal.name}" in found["backbone"].remedy
    assert named(list(check_exports(read)))


@pytest.mark.parametrize(("factor", "status"), [(1.0, "ok"), (0.01, "warning"), (50.0, "warning")])
def test_vectors_far_from_the_norm_of_tokens_are_a_warning(factor: float, status: str, causal: Backbone) -> None:
    prompt = learned(causal, "[P*3] {x} [Y]")
    assert prompt.slot_vectors is not None
    vectors = prompt.slot_vectors.clone()
    vectors[1] *= factor  # one of them is enough
    read = ReadPrompt("one", "one", [], replace(prompt, slot_vectors=vectors))
    found = named(list(check_fit(read, causal)))["norm"]
    assert found.status == status, found
    assert ("0.1 to 10 is usual" in found.remedy) == (status == "warning")


def test_label_words_that_the_tokenizer_does_not_know_or_tell_apart(masked: Backbone) -> None:
    for words, said in (
        ({"good": ["great"], "bad": ["\u4f60"]}, "unknown to the tokenizer"),
        ({"good": ["great"], "bad": ["gre at"]}, ""),
    ):
        prompt = replace(learned(masked, "{x} [P*2] [Y]"), label_words=LabelWords(words))
        read = ReadPrompt("one", "one", [], prompt)
        found = named(list(check_fit(read, masked)))["answers"]
        assert (found.status == "failed") == bool(said), found
        assert said in found.found


def test_exports_say_what_is_possible_and_why_the_rest_is_not(causal: Backbone) -> None:
    def exports(prompt: Prompt) -> list[str]:
        return [f"{check.name}: {check.found}" for check in check_exports(ReadPrompt("one", "ONE", [], prompt))]

    everything = "|".join(FORMS)
    assert exports(learned(causal, "[P*2] {x} is [Y]")) == [f"exports: ptuning export ONE --as {everything}"]
    can, cannot = exports(learned(causal, WARM))
    assert can == "exports: ptuning export ONE --as lora|tokens|gguf|embeds"
    assert cannot.startswith("not as peft: PEFT puts virtual tokens in front of a text")
    (no_slots,) = exports(Prompt.manual("{x} is [Y]"))
    assert no_slots.startswith("exports: none: the prompt has no slots")


def test_a_prompt_without_slots_fits_any_backbone(causal: Backbone, tmp_path: Path) -> None:
    Prompt.manual("{x} is [Y]").save(tmp_path / "words")
    read = read_prompts([str(tmp_path / "words")])[0]
    found = looked_at(read, causal)
    assert {check.status for check in found.values()} == {"ok"}
    assert "any: it has no slots" in found["backbone"].found


def test_trained_weights_are_put_into_a_copy(causal: Backbone, tmp_path: Path) -> None:
    """A prompt with weights of its own is bound to them; the backbone stays as it is."""
    tuned = causal.copy()
    with torch.no_grad():
        next(iter(tuned.model.parameters())).add_(0.01)
    weights = TrainedWeights.of(tuned, causal, tune="tuned", keep="difference")
    replace(learned(causal, WARM), weights=weights).save(tmp_path / "tuned")
    read = read_prompts([str(tmp_path / "tuned")])[0]
    before = causal.fingerprint
    found = looked_at(read, causal)
    assert {check.status for check in found.values()} == {"ok"}
    assert re.search("format 2, sha256 [0-9a-f]{12}, [0-9a-f]{12} as prompt.json says", found["files"].found)
    assert "trained together with weights" in found["exports"].found
    assert causal.fingerprint == before
    shutil.rmtree(tmp_path / "tuned" / "backbone")
    assert read_prompts([str(tmp_path / "tuned")])[0].checks[0].status == "failed"
