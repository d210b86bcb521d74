"""Prompts by name: loaded, replaced, unloaded and reloaded while requests run; nothing from outside of the folder."""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import os
import pickle
import random
import shutil
import struct
import tempfile
import threading
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from ptuning.backbone.backbone import Backbone
from ptuning.errors import FileError, PromptError, PTuningError
from ptuning.names import MANIFEST_FILE, VECTORS_FILE, VECTORS_KEY
from ptuning.prompt.prompt import Prompt
from ptuning.prompt.storage import BackboneId
from ptuning.serve.engine.job import StoppedError
from ptuning.serve.registry import (
    MAX_VECTORS_BYTES,
    Changes,
    ConflictError,
    RefusedNameError,
    Registry,
    UnknownPromptError,
    base_name_of,
)
from ptuning.template.labels import LabelWords
from ptuning.template.language import Template
from tests.conftest import learned

BACKBONE = BackboneId("some-model", None, "some-fingerprint")


def prompt_of(version: int) -> Prompt:
    """A prompt that is told from others by its vectors."""
    return Prompt(Template.parse("[P*2] {text} [Y]"), torch.full((2, 4), float(version)), BACKBONE)


def save(folder: Path, version: int = 0) -> Path:
    prompt_of(version).save(folder, overwrite=True)
    return folder


def version_of(prompt: Prompt) -> int:
    assert prompt.slot_vectors is not None
    return int(prompt.slot_vectors[0, 0])


def registry_of(
    folder: Path | None, named: dict[str, Path] | None = None, check: Callable[..., object] = id
) -> Registry:
    return Registry(folder, named, base_name="some-model", check=check)


def change(folder: Path, **changes: object) -> None:
    """Write other values into a manifest."""
    manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    (folder / MANIFEST_FILE).write_text(json.dumps({**manifest, **changes}), encoding="utf-8")


def rewrite(folder: Path, data: bytes) -> None:
    """Write another file of vectors, with the right sum in the manifest."""
    (folder / VECTORS_FILE).write_bytes(data)
    change(folder, vectors_sha256=hashlib.sha256(data).hexdigest())


def versions(registry: Registry) -> dict[str, int]:
    return {name: version_of(one.prompt) for name, one in registry.served.items()}


# Reading the folder


def test_a_prompt_is_named_by_its_path_in_the_folder(tmp_path: Path) -> None:
    """Folders with a prompt in them, training runs that hold one, and prompts of the operator's from anywhere."""
    save(tmp_path / "prompts" / "sentiment", 1)
    save(tmp_path / "prompts" / "team" / "topic.v2", 2)
    save(tmp_path / "prompts" / "run" / "prompt", 3)
    save(tmp_path / "prompts" / ".hidden", 4)
    save(tmp_path / "prompts" / "a" / "b" / "c" / "d" / "too-deep", 5)
    (tmp_path / "prompts" / "notes").mkdir()
    save(tmp_path / "elsewhere" / "x", 6)
    registry = registry_of(tmp_path / "prompts", {"mine": tmp_path / "elsewhere" / "x"})
    done = registry.reload()
    assert done == Changes(added=("mine", "run", "sentiment", "team/topic.v2"))
    assert versions(registry) == {"mine": 6, "run": 3, "sentiment": 1, "team/topic.v2": 2}
    found = registry.get("run")
    assert (found.name, found.folder) == ("run", tmp_path / "prompts" / "run")
    manifest = tmp_path / "prompts" / "run" / "prompt" / MANIFEST_FILE
    assert found.sha256 == hashlib.sha256(manifest.read_bytes()).hexdigest()
    assert [registry.path_of(one) for one in registry.served.values()] == ["x", "run", "sentiment", "team/topic.v2"]


def test_a_backbone_in_a_folder_has_no_path_in_its_name(tmp_path: Path) -> None:
    (tmp_path / "team" / "model").mkdir(parents=True)
    assert base_name_of(str(tmp_path / "team" / "model")) == "model"
    assert base_name_of("team/model") == "team/model"


def test_a_folder_that_is_a_prompt_itself_is_served_under_its_own_name(tmp_path: Path) -> None:
    registry = registry_of(save(tmp_path / "reviews", 3))
    assert registry.reload().added == ("reviews",)


def test_a_broken_prompt_never_keeps_the_others_out(tmp_path: Path) -> None:
    """Each is read alone, and every error is reported, without the path of the folder."""
    for number, name in enumerate(("a", "b", "c", "d", "e")):
        save(tmp_path / name, number)
    (tmp_path / "b" / MANIFEST_FILE).write_text("{", encoding="utf-8")
    (tmp_path / "c" / VECTORS_FILE).write_bytes(b"short")
    save(tmp_path / "späße")
    save(tmp_path / "some-model")

    def check(prompt: Prompt) -> None:
        if version_of(prompt) == 3:
            raise PromptError("it belongs to another backbone")
        if version_of(prompt) == 4:
            raise RuntimeError("a fault of ours")

    registry = registry_of(tmp_path, check=check)
    done = registry.reload()
    assert done.added == ("a",)
    assert registry.failures == done.failed
    assert {name: why for name, why in done.failed.items() if name in "de"} == {
        "d": "it belongs to another backbone",
        "e": "RuntimeError: a fault of ours",
    }
    assert "b/prompt.json is not valid JSON" in done.failed["b"]
    assert "c/prompt.safetensors was cut off" in done.failed["c"]
    assert "cannot have the name 'späße'" in done.failed["späße"]
    assert "is the name of the base model" in done.failed["some-model"]
    assert len(done.failed) == 6
    assert not any(str(tmp_path) in why for why in done.failed.values())


def test_a_name_of_half_a_character_can_be_told(tmp_path: Path) -> None:
    """What is reported can be sent: names on the disk may be no text at all."""
    folder = save(tmp_path / "x")
    os.rename(folder, os.fsencode(tmp_path) + b"/\xff\xe2\x80\xae")
    failed = registry_of(tmp_path).reload().failed
    assert list(failed) == ["\\udcff\\u202e"]
    json.dumps(failed, ensure_ascii=False).encode()


def test_the_folder_must_be_there(tmp_path: Path) -> None:
    """A disk that is gone for a moment takes no prompt out of service."""
    save(tmp_path / "prompts" / "a")
    registry = registry_of(tmp_path / "prompts")
    registry.reload()
    (tmp_path / "prompts").rename(tmp_path / "away")
    with pytest.raises(FileError, match=r"cannot read .*prompts: No such file"):
        registry.reload()
    assert list(registry.served) == ["a"]


def test_reload_reads_only_what_has_changed(tmp_path: Path) -> None:
    seen: list[int] = []
    for number, name in enumerate(("a", "b", "c")):
        save(tmp_path / name, number)
    registry = registry_of(tmp_path, check=lambda prompt: seen.append(version_of(prompt)))
    registry.reload()
    before = registry.served
    seen.clear()
    assert registry.reload() == Changes()
    assert seen == []
    save(tmp_path / "b", 7)
    save(tmp_path / "new", 8)
    save(tmp_path / "c", 2)  # the same again
    shutil.rmtree(tmp_path / "a")
    assert registry.reload() == Changes(added=("new",), changed=("b",), removed=("a",))
    assert seen == [7, 2, 8]
    assert registry.get("c").prompt is before["c"].prompt
    assert {name: version_of(one.prompt) for name, one in before.items()} == {"a": 0, "b": 1, "c": 2}
    seen.clear()
    registry.reload()
    assert seen == []


def test_a_prompt_that_breaks_on_the_disk_goes_on_as_it_was(tmp_path: Path) -> None:
    save(tmp_path / "a", 1)
    registry = registry_of(tmp_path)
    registry.reload()
    (tmp_path / "a" / VECTORS_FILE).write_bytes(b"damaged")
    assert "a" in registry.reload().failed
    (tmp_path / "a" / MANIFEST_FILE).unlink()
    assert "a" in registry.reload().failed
    assert versions(registry) == {"a": 1}
    save(tmp_path / "a", 2)
    assert registry.reload() == Changes(changed=("a",))
    assert registry.failures == {}


def test_a_loaded_prompt_keeps_to_its_folder(tmp_path: Path) -> None:
    """Replaced by another folder, a name stays with it; what was only loaded comes back after a reload, too."""
    for number, name in enumerate(("a", "b", "c")):
        save(tmp_path / name, number)
    registry = registry_of(tmp_path)
    registry.reload()
    registry.replace("a", "b")
    registry.load("other", "c")
    registry.unload("c")
    assert registry.reload() == Changes(added=("c",))
    assert versions(registry) == {"a": 1, "b": 1, "c": 2, "other": 2}


# Names


def test_an_unknown_name_is_an_error_and_never_the_base(tmp_path: Path) -> None:
    for name in ("sentiment", "topic"):
        save(tmp_path / name)
    save(tmp_path / "broken")
    (tmp_path / "broken" / MANIFEST_FILE).write_text("{}", encoding="utf-8")
    registry = registry_of(tmp_path)
    registry.reload()
    with pytest.raises(UnknownPromptError, match=r"no prompt 'sentimnt' here\. Did you mean 'sentiment'\?"):
        registry.get("sentimnt")
    with pytest.raises(UnknownPromptError, match="Its folder is there, and could not be loaded"):
        registry.get("broken")
    for name in ("", "some-model", "Sentiment", "x" * 10_000, "../topic"):
        with pytest.raises(UnknownPromptError) as error:
            registry.get(name)
        assert len(str(error.value)) < 200
    with pytest.raises(UnknownPromptError, match=r"Did you mean 'topic'\?"):
        registry.unload("topik")
    with pytest.raises(UnknownPromptError, match=r"Did you mean 'topic'\?"):
        registry.replace("topik", "topic")


BAD_PARTS = [
    "..", ".", "%2e%2e", "%2E%2E", "a\0b", "a\nb", "a b", "a\\b", "\u202ea", "cafe\u0301", "caf\u00e9", "\u0430",
    "x" * 129, "~root", "-x", "_x", ".x", "x" * 10_000,
]  # fmt: skip
BAD_PATHS = [*BAD_PARTS, "/etc", "../x", "a/../../b", "a//b", "/a", "a/..", "a/" * 5_000]
BAD_NAMES = [*BAD_PATHS, "", "/", "a/", "a/b/c/d/e"]


def test_a_name_that_is_not_allowed_is_refused(tmp_path: Path) -> None:
    """Abuse case 4: no way out of the folder, and no two names that look alike."""
    save(tmp_path / "prompts" / "good")
    registry = registry_of(tmp_path / "prompts")
    for name in BAD_NAMES:
        with pytest.raises(RefusedNameError, match="cannot have the name") as error:
            registry.load(name, "good")
        assert error.value.param == "name"
        assert len(str(error.value)) < 300
        with pytest.raises(RefusedNameError):
            registry_of(None, {name: tmp_path / "prompts" / "good"})
    assert not registry.served


@pytest.mark.parametrize("name", ["some-model", "Some-Model"])
def test_the_name_of_the_base_model_is_not_for_prompts(name: str, tmp_path: Path) -> None:
    save(tmp_path / "good")
    with pytest.raises(RefusedNameError, match="name of the base model"):
        registry_of(tmp_path).load(name, "good")


def test_a_path_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    """Abuse case 4: whatever the path, nothing is opened outside of the folder of prompts."""
    for place in ("a", "b", "x", "etc"):
        save(tmp_path / place)
    (tmp_path / "prompts").mkdir()
    registry = registry_of(tmp_path / "prompts")
    for path in BAD_PATHS:
        for given in (path, f"a/{path}", f"{tmp_path}/{path}", str(tmp_path / "a"), "", "/"):
            with pytest.raises(RefusedNameError, match="not a path in the folder of prompts") as error:
                registry.load("fine", given)
            assert error.value.param == "path"
    assert not registry.served


def test_a_path_in_the_folder_may_be_given_whole(tmp_path: Path) -> None:
    """Tools that load LoRA adapters name them by their whole path."""
    save(tmp_path / "prompts" / "team" / "a", 5)
    registry = registry_of(tmp_path / "prompts")
    registry.load("x", str(tmp_path / "prompts" / "team" / "a"))
    registry.load("y", "team/a/")
    assert versions(registry) == {"x": 5, "y": 5}


def test_links_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    """Abuse case 4: of the prompt's folder and of each of its files; a link inside of the folder is fine."""
    save(tmp_path / "outside", 1)
    prompts = tmp_path / "prompts"
    for name in ("inside", "manifest", "vectors", "run"):
        save(prompts / name, 2)
    (prompts / "link").symlink_to(tmp_path / "outside")
    (prompts / "current").symlink_to("inside")
    (prompts / "loop").symlink_to(".")
    for name, file in (("manifest", MANIFEST_FILE), ("vectors", VECTORS_FILE)):
        (prompts / name / file).unlink()
        (prompts / name / file).symlink_to(tmp_path / "outside" / file)
    shutil.rmtree(prompts / "run")
    (prompts / "run").mkdir()
    (prompts / "run" / "prompt").symlink_to(tmp_path / "outside")
    registry = registry_of(prompts)
    done = registry.reload()
    assert done.added == ("current", "inside")
    assert sorted(done.failed) == ["link", "manifest", "run", "vectors"]
    assert all("is a link out of the folder of prompts" in why for why in done.failed.values())
    with pytest.raises(PromptError, match="link out of the folder"):
        registry.load("x", "link")
    assert versions(registry_of(None, {"x": prompts / "link"})) == {}
    trusted = registry_of(None, {"x": prompts / "link"})
    assert trusted.reload().added == ("x",)


# Files


class Bomb:
    """Leaves a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_pickle_is_never_read(tmp_path: Path) -> None:
    """Abuse case 2: in the place of the manifest, of the vectors, or beside them."""
    exploded = tmp_path / "exploded"
    torch_file = tmp_path / "saved"
    torch.save({"vectors": torch.zeros(2, 4), "bomb": Bomb(exploded)}, torch_file)
    for number, data in enumerate((pickle.dumps(Bomb(exploded)), torch_file.read_bytes())):
        rewrite(save(tmp_path / f"vectors-{number}"), data)
        (save(tmp_path / f"manifest-{number}") / MANIFEST_FILE).write_bytes(data)
        (tmp_path / f"alone-{number}").mkdir()
        (tmp_path / f"alone-{number}" / "prompt.pt").write_bytes(data)
        (save(tmp_path / f"beside-{number}") / "prompt.bin").write_bytes(data)
    registry = registry_of(tmp_path)
    done = registry.reload()
    assert done.added == ("beside-0", "beside-1")
    assert sorted(done.failed) == ["manifest-0", "manifest-1", "vectors-0", "vectors-1"]
    with pytest.raises(PromptError, match=r"'x' cannot be loaded: .*not a prompt folder"):
        registry.load("x", "alone-0")
    assert not exploded.exists()


def header(about: dict[str, object], *, length: int | None = None, data: bytes = bytes(32)) -> bytes:
    text = json.dumps(about).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


GOOD = {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]}
LIES = {
    "header of an exabyte": header({VECTORS_KEY: GOOD}, length=2**60),
    "header behind the end": header({VECTORS_KEY: GOOD}, length=10_000),
    "huge shape": header({VECTORS_KEY: {**GOOD, "shape": [2**40, 2**20]}}),
    "shape that overflows": header({VECTORS_KEY: {**GOOD, "shape": [2**63, 2**63]}}),
    "offsets that overlap": header({VECTORS_KEY: GOOD, "other": {**GOOD, "data_offsets": [0, 32]}}),
    "offsets behind the end": header({VECTORS_KEY: {**GOOD, "shape": [2, 400], "data_offsets": [0, 3200]}}),
    "an extra key": safetensors.torch.save({VECTORS_KEY: torch.zeros(2, 4), "other": torch.zeros(1)}),
    "another key": safetensors.torch.save({"other": torch.zeros(2, 4)}),
    "another shape": safetensors.torch.save({VECTORS_KEY: torch.zeros(4, 2)}),
    "another type": safetensors.torch.save({VECTORS_KEY: torch.zeros(2, 4, dtype=torch.float16)}),
    "NaN": safetensors.torch.save({VECTORS_KEY: torch.full((2, 4), float("nan"))}),
    "nothing": b"",
}


@pytest.mark.parametrize("lie", LIES)
def test_vectors_that_lie_are_refused(lie: str, tmp_path: Path) -> None:
    """Abuse cases 3 and 10; the others stay."""
    save(tmp_path / "good", 1)
    rewrite(save(tmp_path / "bad"), LIES[lie])
    registry = registry_of(tmp_path)
    assert list(registry.reload().failed) == ["bad"]
    with pytest.raises(PromptError, match="'x' cannot be loaded"):
        registry.load("x", "bad")
    with pytest.raises(PromptError, match="'good' cannot be loaded"):
        registry.replace("good", "bad")
    assert versions(registry) == {"good": 1}


def test_vectors_with_another_sum_are_refused(tmp_path: Path) -> None:
    """Abuse case 3."""
    change(save(tmp_path / "bad"), vectors_sha256="0" * 64)
    with pytest.raises(PromptError, match="sha256"):
        registry_of(tmp_path).load("x", "bad")


def test_a_huge_file_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Abuse case 3 (here, of holes)."""
    monkeypatch.setattr("ptuning.prompt.storage.read_bytes", lambda *_, **__: pytest.fail("it was read"))
    folder = save(tmp_path / "bomb")
    with (folder / VECTORS_FILE).open("wb") as handle:
        handle.truncate(2**40)
    with pytest.raises(PromptError, match=f"{MAX_VECTORS_BYTES:,} bytes"):
        registry_of(tmp_path).load("x", "bomb")


def test_weights_of_its_own_are_refused_with_what_to_do(tmp_path: Path) -> None:
    """They are not even read."""
    change(save(tmp_path / "full"), format_version=2, weights={"kind": "lora", "sha256": {"a.safetensors": "0"}})
    with pytest.raises(PromptError, match="one model in memory serves all prompts; train its slots alone"):
        registry_of(tmp_path).load("x", "full")


def test_a_prompt_that_does_not_fit_the_model_is_refused(causal: Backbone, tmp_path: Path) -> None:
    """Abuse case 9: of another backbone, another width, or with other slots for this tokenizer; the others stay."""
    good = learned(causal, "[P*2] {text} [P:is] [Y]")
    assert good.backbone is not None
    assert good.slot_vectors is not None
    good.save(tmp_path / "good")
    replace(good, backbone=replace(good.backbone, fingerprint="x-y")).save(tmp_path / "backbone")
    replace(good, slot_vectors=torch.zeros(3, 8)).save(tmp_path / "width")
    replace(good, slot_vectors=torch.zeros(5, causal.width)).save(tmp_path / "slots")
    registry = registry_of(tmp_path, check=lambda prompt: prompt.bind(causal))
    done = registry.reload()
    assert done.added == ("good",)
    assert {name: why.split("(")[0].strip() for name, why in done.failed.items()} == {
        "backbone": f"the prompt was trained on the backbone '{causal.name}'",
        "slots": "the template '[P*2] {text} [P:is] [Y]' has 3 slots with this tokenizer, and the prompt has 5 vectors",
        "width": f"the prompt's vectors are 8 wide, and the embeddings of '{causal.name}' 32; it cannot be used with "
        "this backbone",
    }
    for name in done.failed:
        with pytest.raises(PromptError, match=f"'{name}' cannot be loaded"):
            registry.load(name, name)
    assert list(registry.served) == ["good"]


def test_a_machine_without_file_handles_or_disk_loses_no_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Abuse case 23: reading fails for a while, also in the middle; the clock may jump back."""
    save(tmp_path / "a", 1)
    save(tmp_path / "b", 2)
    registry = registry_of(tmp_path)
    registry.reload()
    save(tmp_path / "a", 3)
    (tmp_path / "b" / VECTORS_FILE).touch()

    def fail(*given: object, **named: object) -> Any:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr("ptuning.files.open", fail, raising=False)
        patch.setattr("time.time", lambda: -1.0)
        done = registry.reload()
        assert sorted(done.failed) == ["a", "b"]
        with pytest.raises(PromptError, match="Too many open files"):
            registry.load("c", "a")
        patch.setattr("os.scandir", fail)
        with pytest.raises(FileError, match="Too many open files"):
            registry.reload()
        assert versions(registry) == {"a": 1, "b": 2}
    monkeypatch.setattr("time.time", lambda: 0.0)
    assert registry.reload() == Changes(changed=("a",))
    assert versions(registry) == {"a": 3, "b": 2}


def test_a_prompt_in_service_takes_little_more_than_its_files(tmp_path: Path) -> None:
    """A thousand of them are in memory at once: what they hold is counted here, their few numbers included."""
    words = LabelWords({"positive": ["great", "good"], "negative": ["terrible"]})
    for number in range(40):
        prompt = replace(
            prompt_of(number), label_words=words, scores={"accuracy": 0.5}, seed=1, fields={"text": "body"}
        )
        prompt.save(tmp_path / f"p{number}")
    registry = registry_of(tmp_path)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        registry.reload()
        gc.collect()
        held = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert len(registry.served) == 40
    assert held / 40 < 10_000


# While requests run


def test_a_request_ends_with_the_prompt_it_began_with(tmp_path: Path) -> None:
    """Abuse case 12: what a request holds is neither changed nor taken away."""
    for number, name in enumerate(("a", "b")):
        save(tmp_path / name, number)
    registry = registry_of(tmp_path)
    registry.reload()
    held, all_held = registry.get("a"), registry.served
    new = registry.replace("a", "b")
    assert registry.get("a") is new
    assert (version_of(held.prompt), version_of(new.prompt)) == (0, 1)
    assert registry.unload("a") is new
    with pytest.raises(UnknownPromptError):
        registry.get("a")
    assert (version_of(held.prompt), list(all_held)) == (0, ["a", "b"])
    with pytest.raises(AttributeError):
        held.prompt = new.prompt  # type: ignore[misc]
    with pytest.raises(TypeError):
        all_held["a"] = new  # type: ignore[index]


def test_changes_are_made_one_after_the_other(tmp_path: Path) -> None:
    """Abuse case 12: of two that load one name, one wins; readers do not wait."""
    for number, name in enumerate(("a", "b", "c")):
        save(tmp_path / name, number)
    inside, go_on = threading.Event(), threading.Event()

    def check(prompt: Prompt) -> None:
        if version_of(prompt) == 0:
            inside.set()
            assert go_on.wait(30)

    registry = registry_of(tmp_path, check=check)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(registry.load, "x", "a")
        assert inside.wait(30)
        second, reloaded = pool.submit(registry.load, "x", "b"), pool.submit(registry.reload)
        assert not registry.served
        go_on.set()
        assert first.result(30).name == "x"
        with pytest.raises(ConflictError, match="'x' is in service already"):
            second.result(30)
        assert reloaded.result(30).added == ("a", "b", "c")
    assert versions(registry) == {"a": 0, "b": 1, "c": 2, "x": 0}


def test_nothing_changes_while_the_service_ends(tmp_path: Path) -> None:
    """Abuse case 12: a load during the drain is refused; what is in service goes on."""
    save(tmp_path / "a")
    registry = registry_of(tmp_path)
    registry.reload()
    registry.close()
    for change_it in (
        lambda: registry.load("b", "a"),
        lambda: registry.replace("a", "a"),
        lambda: registry.unload("a"),
        lambda: registry.reload(),
    ):
        with pytest.raises(StoppedError, match="about to end"):
            change_it()
    assert registry.get("a").name == "a"


def test_an_engine_that_ends_ends_a_reload(tmp_path: Path) -> None:
    """It says nothing about the prompts."""
    save(tmp_path / "a")

    def check(prompt: Prompt) -> None:
        raise StoppedError("the engine has failed")

    registry = registry_of(tmp_path, check=check)
    with pytest.raises(StoppedError):
        registry.reload()
    with pytest.raises(StoppedError):
        registry.load("a", "a")
    assert not registry.failures


def test_many_threads_at_once(tmp_path: Path) -> None:
    """However calls interleave: of each name as many loads as unloads succeed, give or take the one in service, and
    a reader finds whole prompts.
    """
    for number in range(3):
        save(tmp_path / f"p{number}", number)
    registry = registry_of(tmp_path)
    counts = {"x": [0, 0], "y": [0, 0]}
    lock = threading.Lock()

    def work(seed: int) -> None:
        draw = random.Random(seed)
        for step in range(30):
            name, kind = draw.choice("xy"), draw.randrange(4)
            try:
                if kind == 0:
                    registry.load(name, f"p{step % 3}")
                elif kind == 1:
                    registry.replace(name, f"p{(step + seed) % 3}")
                elif kind == 2:
                    registry.unload(name)
                else:
                    for found in registry.served.values():
                        assert found.prompt.slots == 2
                        assert len(set(found.prompt.slot_vectors.flatten().tolist())) == 1  # type: ignore[union-attr]
                    continue
            except (ConflictError, UnknownPromptError):
                continue
            with lock:
                counts[name][0] += kind == 0
                counts[name][1] += kind == 2

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(work, seed) for seed in range(8)]:
            done.result(60)
    assert sum(map(sum, counts.values())) > 2
    for name, (loads, unloads) in counts.items():
        assert loads - unloads == (name in registry.served)


NAMES = st.sampled_from(["a", "b", "c", "team/d", "e"])


class Prompts(RuleBasedStateMachine):
    """A registry against a dictionary: whatever is done to the folder and to the service, both say the same."""

    held = Bundle("held")

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="prompts-"))
        self.disk: dict[str, int | None] = {}  # None is broken
        self.expected: dict[str, tuple[int, str]] = {}  # version, folder
        self.registry = registry_of(self.folder, check=self.check)

    def check(self, prompt: Prompt) -> None:
        if version_of(prompt) % 10 == 9:
            raise PromptError("it does not fit")

    def loads(self, path: str) -> int | None:
        """The version that loading a folder gives; None if it fails."""
        version = self.disk.get(path)
        return None if version is None or version % 10 == 9 else version

    @rule(name=NAMES, version=st.integers(0, 30))
    def write(self, name: str, version: int) -> None:
        shutil.rmtree(self.folder / name, ignore_errors=True)
        save(self.folder / name, version)
        self.disk[name] = version

    @rule(name=NAMES, how=st.sampled_from(["manifest", "vectors", "pickle", "width"]))
    def spoil(self, name: str, how: str) -> None:
        folder = self.folder / name
        if self.disk.get(name) is None:
            return
        if how == "manifest":
            (folder / MANIFEST_FILE).write_text("{", encoding="utf-8")
        elif how == "vectors":
            (folder / VECTORS_FILE).unlink()
        elif how == "pickle":
            (folder / VECTORS_FILE).write_bytes(pickle.dumps([1.0]))
        else:
            change(folder, width=5)
        self.disk[name] = None

    @rule(name=NAMES)
    def remove(self, name: str) -> None:
        shutil.rmtree(self.folder / name, ignore_errors=True)
        self.disk.pop(name, None)

    @rule(name=NAMES, path=NAMES)
    def load(self, name: str, path: str) -> None:
        version = self.loads(path)
        if name in self.expected:
            self.fails(ConflictError, self.registry.load, name, path)
        elif version is None:
            self.fails(PromptError, self.registry.load, name, path)
        else:
            assert version_of(self.registry.load(name, path).prompt) == version
            self.expected[name] = version, path

    @rule(name=NAMES, path=NAMES)
    def replace(self, name: str, path: str) -> None:
        version = self.loads(path)
        if name not in self.expected:
            self.fails(UnknownPromptError, self.registry.replace, name, path)
        elif version is None:
            self.fails(PromptError, self.registry.replace, name, path)
        else:
            self.registry.replace(name, path)
            self.expected[name] = version, path

    @rule(name=NAMES)
    def unload(self, name: str) -> None:
        if name in self.expected:
            self.registry.unload(name)
            del self.expected[name]
        else:
            self.fails(UnknownPromptError, self.registry.unload, name)

    @rule()
    def reload(self) -> None:
        told: dict[str, list[str]] = {"added": [], "changed": [], "removed": [], "failed": []}
        for name in sorted({*self.disk, *self.expected}):
            before = self.expected.get(name)
            path = before[1] if before else name
            version = self.loads(path)
            if before and path not in self.disk:
                del self.expected[name]
                told["removed"].append(name)
            elif version is None:
                told["failed"].append(name)
            else:
                self.expected[name] = version, path
                if before is None or before[0] != version:
                    told["changed" if before else "added"].append(name)
        done = self.registry.reload()
        assert {name: list(getattr(done, name)) for name in told} == told

    @rule(target=held, name=NAMES)
    def begin_request(self, name: str) -> tuple[Prompt, int] | None:
        if name not in self.expected:
            self.fails(UnknownPromptError, self.registry.get, name)
            return None
        return self.registry.get(name).prompt, self.expected[name][0]

    @rule(request=consumes(held))
    def end_request(self, request: tuple[Prompt, int] | None) -> None:
        if request is not None:
            assert version_of(request[0]) == request[1]

    @invariant()
    def the_same_is_in_service(self) -> None:
        if hasattr(self, "registry"):
            assert versions(self.registry) == {name: version for name, (version, _) in self.expected.items()}

    def fails(self, kind: type[PTuningError], call: Callable[..., object], *given: str) -> None:
        with pytest.raises(kind):
            call(*given)

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)


Prompts.TestCase.settings = settings(max_examples=25, stateful_step_count=30)
test_a_registry_is_a_dictionary = Prompts.TestCase
