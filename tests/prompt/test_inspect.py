"""Looking into a prompt: what its slots are near to, and what that is worth."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.loading import load_backbone
from ptuning.errors import PromptError
from ptuning.prompt.inspect import NEAREST, inspect_prompt
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prompt import Prompt
from ptuning.prompt.score import score_prompt
from ptuning.records import as_records
from tests.conftest import RECORDS, bound, learned

TEMPLATE = "[P*2] [X] [P:is] [Y]"


def test_slots_on_tokens_are_nearest_to_them(backbone: Backbone) -> None:
    """Slots that hold tokens' embeddings are nearest to exactly those tokens, with similarity 1 and distance 0."""
    ids = list(range(5, backbone.vocabulary, 7))
    prompt = Prompt.from_token_ids(f"[P*{len(ids)}] [X] [Y]", ids, backbone)
    found = inspect_prompt(backbone, prompt)
    assert [view.by_distance[0].token_id for view in found.slots] == ids
    assert [view.by_cosine[0].token_id for view in found.slots] == ids
    for view, token in zip(found.slots, ids, strict=True):
        assert view.by_distance[0].value == 0.0
        assert view.by_cosine[0].value == pytest.approx(1.0, abs=1e-5)
        assert view.by_cosine[0].token == backbone.tokenizer.token(token)


def test_neighbours_equal_a_loop(causal: Backbone) -> None:
    """Both ways of being near, the nearest first, over the tokens that the tokenizer has."""
    prompt = learned(causal, TEMPLATE)
    assert prompt.slot_vectors is not None
    table = causal.table()
    for view, vector in zip(inspect_prompt(causal, prompt).slots, prompt.slot_vectors, strict=True):
        distances = [float((vector - row).norm()) for row in table]
        cosines = [float(torch.cosine_similarity(vector, row, dim=0)) for row in table]
        assert [n.value for n in view.by_distance] == pytest.approx(sorted(distances)[:NEAREST], abs=1e-4)
        assert [n.value for n in view.by_cosine] == pytest.approx(sorted(cosines, reverse=True)[:NEAREST], abs=1e-4)
        assert view.norm == pytest.approx(float(vector.norm()), rel=1e-5)


def test_typical_distances(causal: Backbone) -> None:
    """Beside the slots' distances stands what is usual between tokens."""
    table = causal.table()
    pairs = (table[:, None] - table[None]).norm(dim=-1)
    off = pairs[~torch.eye(len(table), dtype=torch.bool)]
    found = inspect_prompt(causal, learned(causal, TEMPLATE))
    assert found.token_distance == pytest.approx(float(off.median()), rel=1e-3)
    nearest = (pairs + torch.eye(len(table)) * 1e9).min(dim=1).values
    assert found.neighbour_distance == pytest.approx(float(nearest.median()), rel=1e-3)
    assert found.token_norm == pytest.approx(float(table.norm(dim=-1).median()), rel=1e-5)


def test_starts_are_shown(causal: Backbone) -> None:
    """The token of a warm start, nothing for a random one."""
    starts = [view.start for view in inspect_prompt(causal, learned(causal, TEMPLATE)).slots]
    last = bound(causal, TEMPLATE).slot_start_ids[-1]
    assert last is not None
    assert starts == [None, None, causal.tokenizer.token(last)]


def test_scores_with_data(backbone: Backbone) -> None:
    """The score as learned, and with the nearest tokens in the slots' place.

    Nearest tokens alone may be noise; the second score says how much of the prompt is in them.
    """
    data = as_records(RECORDS)
    prompt = Prompt.from_token_ids(TEMPLATE, [7, 8, 9], backbone)
    found = inspect_prompt(backbone, prompt, data=data).scores
    assert list(found) == ["as learned", "nearest tokens"]
    assert (
        found["as learned"]
        == found["nearest tokens"]
        == score_prompt(PromptModel(backbone), data, prompt).scores["exact_match"]
    )
    moved = learned(backbone, TEMPLATE)
    views = inspect_prompt(backbone, moved, data=data)
    nearest = Prompt.from_token_ids(TEMPLATE, [view.by_cosine[0].token_id for view in views.slots], backbone)
    assert views.scores["nearest tokens"] == score_prompt(PromptModel(backbone), data, nearest).scores["exact_match"]


def test_without_data_there_are_no_scores(causal: Backbone) -> None:
    """And the report are plain JSON."""
    found = inspect_prompt(causal, learned(causal, TEMPLATE))
    assert found.scores == {}
    plain = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert len(plain["slots"]) == 3
    assert len(plain["slots"][0]["nearest_by_cosine"]) == NEAREST
    assert set(plain["typical"]) == {"token_distance", "neighbour_distance", "token_norm"}


def test_a_manual_prompt_has_nothing_inside(causal: Backbone) -> None:
    """An error says so, instead of an empty table."""
    with pytest.raises(PromptError, match="a manual prompt has no slots to inspect"):
        inspect_prompt(causal, Prompt.manual("[X] [Y]"))


def test_a_prompt_of_another_backbone(causal: Backbone, model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """The check of every other use, and force, hold here too."""
    folder = shutil.copytree(model_folder("llama"), tmp_path / "other")
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"] += 0.5
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    other = load_backbone(str(folder), dtype="float32", device="cpu")
    prompt = learned(causal, TEMPLATE)
    with pytest.raises(PromptError, match="was trained on the backbone"):
        inspect_prompt(other, prompt, data=as_records(RECORDS))
    assert inspect_prompt(other, prompt, data=as_records(RECORDS), force=True).scores
