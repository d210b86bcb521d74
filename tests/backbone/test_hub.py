"""Backbones from the hub, with a stand-in for it: revisions, tokens, a hub that is silent, and its cache without it."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ptuning.backbone import sources
from ptuning.backbone.backbone import Backbone
from ptuning.backbone.loading import load_backbone
from ptuning.errors import BackboneError
from tests.conftest import make_model
from tests.hub import Hub, serving

NEW, OLD = "a" * 40, "b" * 40


@pytest.fixture
def hub(
    model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Hub]:
    """A model in two versions with other weights."""
    old = tmp_path_factory.mktemp("old")
    make_model("llama", old, seed=1)
    found = Hub("owner/tiny", {NEW: model_folder("llama"), OLD: old}, {"main": NEW, "v1": OLD})
    with serving(found, monkeypatch):
        yield found


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Backbone]:
    """Load the model into a cache of the test's own."""
    return lambda **options: load_backbone("owner/tiny", device="cpu", cache_dir=tmp_path / "hub", **options)


def test_the_newest_version_is_the_default(hub: Hub, load: Callable[..., Backbone], tmp_path: Path) -> None:
    """What was downloaded lies in ``cache_dir``, and the commit is recorded."""
    backbone = load()
    assert backbone.revision == NEW
    assert (tmp_path / "hub" / "models--owner--tiny").is_dir()
    assert backbone.fingerprint == load_backbone(str(hub.commits[NEW])).fingerprint


@pytest.mark.parametrize("revision", ["v1", OLD])
def test_a_revision_is_a_tag_a_branch_or_a_commit(revision: str, hub: Hub, load: Callable[..., Backbone]) -> None:
    backbone = load(revision=revision)
    assert backbone.revision == OLD
    assert backbone.fingerprint == load_backbone(str(hub.commits[OLD])).fingerprint


def test_an_unknown_revision(hub: Hub, load: Callable[..., Backbone]) -> None:
    """It is an error, and not the newest version."""
    with pytest.raises(BackboneError, match=r"'owner/tiny' has no revision 'v7' on the hub; give a branch, a tag or a"):
        load(revision="v7")


def test_a_token_opens_what_is_closed(hub: Hub, load: Callable[..., Backbone]) -> None:
    hub.token = "secret"
    with pytest.raises(BackboneError, match=r"the hub says 401.* needs a token: hf auth login") as caught:
        load(token=False)
    assert "\n" not in str(caught.value)
    assert load(token="secret").revision == NEW


def test_a_hub_that_does_not_answer(hub: Hub, load: Callable[..., Backbone], monkeypatch: pytest.MonkeyPatch) -> None:
    """It says so within the time limit; with a copy in the cache it works, at the revision that is asked for."""
    monkeypatch.setattr(sources, "HUB_SECONDS", 0.2)
    hub.silent = "/"
    began = time.monotonic()
    with pytest.raises(BackboneError, match=r"not in the hub's cache, and the hub cannot be reached \(ReadTimeout\)"):
        load()
    assert time.monotonic() - began < 10
    hub.silent = None
    for revision in (None, "v1"):
        load(revision=revision)
    hub.silent = "/"
    assert load().revision == NEW
    assert load(revision="v1").revision == OLD
    assert load(revision=OLD).revision == OLD
    with pytest.raises(BackboneError, match=r"not in the hub's cache at the revision 'v7', and the hub cannot be"):
        load(revision="v7")


def test_a_hub_that_is_switched_off(hub: Hub, load: Callable[..., Backbone], monkeypatch: pytest.MonkeyPatch) -> None:
    """No request is made."""
    load()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.seen.clear()
    assert load().revision == NEW
    assert hub.seen == []


def test_a_download_that_stops(hub: Hub, load: Callable[..., Backbone], monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is one line and says how to go on."""

    def stopped(name: str, **_: object) -> str:
        raise RuntimeError("the connection was lost\nwith a long explanation")

    monkeypatch.setattr("huggingface_hub.snapshot_download", stopped)
    with pytest.raises(
        BackboneError, match=r"cannot download 'owner/tiny' from the hub: the connection.*goes on"
    ) as caught:
        load()
    assert "\n" not in str(caught.value)


def test_a_commit_in_the_cache_is_not_asked_for(hub: Hub, load: Callable[..., Backbone]) -> None:
    """A commit never changes, so what is there in whole needs no hub."""
    load(revision=OLD)
    hub.seen.clear()
    assert load(revision=OLD).revision == OLD
    assert not any("resolve" in path for path in hub.seen)


@pytest.mark.parametrize("name", ["owner/model-that-is-nowhere", "not a hub id!"])
def test_a_name_that_the_hub_does_not_know(name: str, hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"no such backbone: .*known names"):
        load_backbone(name, cache_dir=tmp_path)
