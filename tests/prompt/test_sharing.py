"""Prompts on the hub: put there, found there, and used as from a folder. A stand-in answers for the hub."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from ptuning import Prompt, PromptModel
from ptuning.backbone.backbone import Backbone
from ptuning.errors import FileError
from ptuning.prompt.storage import BackboneId
from tests.conftest import learned
from tests.hub import Hub, serving

REPO = "ada/capitals"
ROWS = [{"x": "Kenya"}, {"x": "France"}]


@pytest.fixture
def prompt(causal: Backbone) -> Prompt:
    made = learned(causal, "[P*2] [X] is [P] [Y]")
    return replace(made, scores={"exact_match": 0.5, "loss": 1.25}, scored_on=36, method="p-tuning",
                   intervals={"exact_match": (0.345, 0.655)})  # fmt: skip


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "hub").mkdir()
    with serving(Hub(REPO, {"c" * 40: tmp_path / "hub"}, {"main": "c" * 40}), monkeypatch) as found:
        yield found


def test_a_saved_prompt_comes_back_and_files_beside_it_stay(causal: Backbone, prompt: Prompt, tmp_path: Path) -> None:
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "thesis.tex").write_text("mine")
    prompt.save_pretrained(tmp_path / "project")
    prompt.save_pretrained(tmp_path / "project")
    found = Prompt.from_pretrained(tmp_path / "project")
    model = PromptModel(causal)
    assert model.predict(ROWS, found) == model.predict(ROWS, prompt)
    assert found.scored_on == 36
    assert found.intervals == {"exact_match": (0.345, 0.655)}
    assert (tmp_path / "project" / "thesis.tex").read_text() == "mine"


def test_a_pushed_prompt_is_found_by_its_id(causal: Backbone, prompt: Prompt, hub: Hub) -> None:
    assert prompt.push_to_hub(REPO) == f"{hub.url}/{REPO}/commit/{'c' * 40}"
    model = PromptModel(causal)
    assert model.predict(ROWS, REPO) == model.predict(ROWS, prompt)
    hub.silent = "/"
    assert model.predict(ROWS, REPO) == model.predict(ROWS, prompt), "not read from the cache"


def test_a_hub_that_refuses_or_is_silent_is_one_message(prompt: Prompt, hub: Hub, tmp_path: Path) -> None:
    hub.token = "secret"
    with pytest.raises(FileError, match=r"cannot push the prompt to 'ada/capitals'.*log in"):
        prompt.push_to_hub(REPO)
    with pytest.raises(FileError, match="no such prompt: 'ada/other' is not a folder, not in the hub's cache"):
        Prompt.from_pretrained("ada/other")
    assert prompt.push_to_hub(REPO, token="secret")
    assert Prompt.from_pretrained(REPO, token="secret", cache_dir=tmp_path / "own").scored_on == 36


@pytest.mark.parametrize("name", ["./ada/capitals", "capitals", "a/b/c", "ada/", "~/capitals"])
def test_what_is_no_id_never_asks_the_hub(name: str, hub: Hub) -> None:
    with pytest.raises(FileError, match="is not a prompt folder"):
        Prompt.from_pretrained(name)
    assert hub.seen == []


def test_a_folder_comes_before_the_hub(
    prompt: Prompt, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    prompt.save(REPO)
    assert Prompt.from_pretrained(REPO).scored_on == 36
    assert hub.seen == []


def test_the_card_says_what_the_hub_reads(prompt: Prompt, tmp_path: Path) -> None:
    assert prompt.backbone is not None
    on_hub = replace(prompt, backbone=BackboneId("org/model", "c" * 40, prompt.backbone.fingerprint))
    on_hub.save(tmp_path / "prompt")
    found = ModelCard.load(tmp_path / "prompt" / "README.md").data
    assert (found.library_name, found.base_model, found.pipeline_tag) == ("ptuning", "org/model", "text-generation")
    scores = {one.metric_type: (one.metric_value, one.dataset_name) for one in found.eval_results}
    assert scores == {
        "exact_match": (0.5, "development part, n = 36"),
        "loss": (1.25, "development part, n = 36"),
    }


def test_a_prompt_of_a_local_backbone_names_no_base_model(prompt: Prompt, tmp_path: Path) -> None:
    prompt.save(tmp_path / "prompt")
    assert ModelCard.load(tmp_path / "prompt" / "README.md").data.base_model is None
