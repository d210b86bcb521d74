"""Prompts by name: loaded, replaced, unloaded and reloaded while requests run; nothing from outside of the folder."""

import errno
import hashlib
import json
import os
import pickle
import shutil
import struct
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

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
from ptuning.template.language import Template

BACKBONE = BackboneId("some-model", None, "some-fingerprint")


def prompt_of(version: int) -> Prompt:
    """A prompt whose vectors hold its version."""
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


def loaded(folder: Path, *names: str, check: Callable[..., object] = id) -> Registry:
    """Save prompts of versions 0, 1, ..., and return a registry with them in service."""
    for version, name in enumerate(names):
        save(folder / name, version)
    registry = registry_of(folder, check=check)
    registry.reload()
    return registry


def change(folder: Path, **changes: object) -> None:
    """Write other values into a manifest."""
    manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    (folder / MANIFEST_FILE).write_text(json.dumps({**manifest, **changes}), encoding="utf-8")


def versions(registry: Registry) -> dict[str, int]:
    return {name: version_of(served.prompt) for name, served in registry.served.items()}


# Reading the folder


def test_a_prompt_is_named_by_its_path_in_the_folder(tmp_path: Path) -> None:
    """Folders with a prompt in them, training runs that hold one, and the operator's prompts from anywhere."""
    folder = tmp_path / "prompts"
    for version, path in enumerate((
        "prompts/sentiment", "prompts/team/topic.v2", "prompts/run/prompt", "prompts/.hidden",
        "prompts/a/b/c/d/too-deep", "elsewhere/x",
    )):  # fmt: skip
        save(tmp_path / path, version)
    (folder / "notes").mkdir()
    registry = registry_of(folder, {"mine": tmp_path / "elsewhere" / "x"})
    assert registry.reload() == Changes(added=("mine", "run", "sentiment", "team/topic.v2"))
    assert versions(registry) == {"mine": 5, "run": 2, "sentiment": 0, "team/topic.v2": 1}
    run = registry.get("run")
    assert (run.name, run.folder) == ("run", folder / "run")
    assert run.sha256 == hashlib.sha256((folder / "run" / "prompt" / MANIFEST_FILE).read_bytes()).hexdigest()
    paths = [registry.path_of(served.folder) for served in registry.served.values()]
    assert paths == ["x", "run", "sentiment", "team/topic.v2"]
    assert registry_of(folder / "sentiment").reload().added == ("sentiment",), "a folder that is a prompt itself"
    assert base_name_of(str(folder)) == "prompts"
    assert base_name_of("team/model") == "team/model"


def test_a_broken_prompt_never_keeps_the_others_out(tmp_path: Path) -> None:
    """Every error is reported, without the path of the folder, and can be sent as JSON."""
    for version, name in enumerate(("a", "b", "c", "d", "e", "späße", "some-model", "half")):
        save(tmp_path / name, version)
    (tmp_path / "b" / MANIFEST_FILE).write_text("{", encoding="utf-8")
    (tmp_path / "c" / VECTORS_FILE).write_bytes(b"short")
    os.rename(tmp_path / "half", os.fsencode(tmp_path) + b"/\xff\xe2\x80\xae")

    def check(prompt: Prompt) -> None:
        if version_of(prompt) == 3:
            raise PromptError("it belongs to another backbone")
        if version_of(prompt) == 4:
            raise RuntimeError("a fault of ours")

    registry = registry_of(tmp_path, check=check)
    changes = registry.reload()
    assert changes.added == ("a",)
    assert registry.failures == changes.failed
    facts = {
        "b": "b/prompt.json", "c": "c/prompt.safetensors", "d": "another backbone", "e": "RuntimeError: a fault",
        "späße": "'späße'", "some-model": "base model", "\\udcff\\u202e": "name",
    }  # fmt: skip
    assert set(changes.failed) == set(facts)
    for name, message in changes.failed.items():
        assert facts[name] in message
        assert str(tmp_path) not in message
    json.dumps(dict(changes.failed), ensure_ascii=False).encode()


# Names


def test_an_unknown_name_is_an_error_and_never_the_base(tmp_path: Path) -> None:
    registry = loaded(tmp_path, "sentiment", "topic", "broken")
    registry.unload("broken")
    (tmp_path / "broken" / MANIFEST_FILE).write_text("{}", encoding="utf-8")
    registry.reload()
    for name, fact in (
        ("sentimnt", "'sentimnt'.*'sentiment'"), ("broken", "could not be loaded"),
        *((name, "no prompt") for name in ("", "some-model", "Sentiment", "x" * 10_000, "../topic")),
    ):  # fmt: skip
        with pytest.raises(UnknownPromptError, match=fact) as error:
            registry.get(name)
        assert len(str(error.value)) < 200
    with pytest.raises(UnknownPromptError, match="'topic'"):
        registry.unload("topik")
    with pytest.raises(UnknownPromptError, match="'topic'"):
        registry.load("topik", "topic", replaces=True)


BAD_PARTS = [
    "..", ".", "%2e%2e", "%2E%2E", "a\0b", "a\nb", "a b", "a\\b", "\u202ea", "cafe\u0301", "caf\u00e9", "\u0430",
    "x" * 129, "~root", "-x", "_x", ".x", "x" * 10_000,
]  # fmt: skip
BAD_PATHS = [*BAD_PARTS, "/etc", "../x", "a/../../b", "a//b", "/a", "a/..", "a/" * 5_000]
BAD_NAMES = [*BAD_PATHS, "", "/", "a/", "a/b/c/d/e"]


def test_names_and_paths_that_are_not_allowed_are_refused(tmp_path: Path) -> None:
    """Abuse case 4: no way out of the folder, no two names that look alike, and no name of the base model."""
    for place in ("a", "b", "x", "etc", "prompts/good", "prompts/team/a"):
        save(tmp_path / place, 5)
    registry = registry_of(tmp_path / "prompts")
    for name in [*BAD_NAMES, "some-model", "Some-Model"]:
        with pytest.raises(RefusedNameError) as error:
            registry.load(name, "good")
        assert error.value.param == "name"
        assert len(str(error.value)) < 300
        with pytest.raises(RefusedNameError):
            registry_of(None, {name: tmp_path / "prompts" / "good"})
    for path in BAD_PATHS:
        for given in (path, f"a/{path}", f"{tmp_path}/{path}", str(tmp_path / "a"), "", "/"):
            with pytest.raises(RefusedNameError) as error:
                registry.load("fine", given)
            assert error.value.param == "path"
    with pytest.raises(RefusedNameError, match="no folder of prompts"):
        registry_of(None).load("fine", "good")
    assert not registry.served
    # Tools that load LoRA adapters name them by their absolute path.
    registry.load("x", str(tmp_path / "prompts" / "team" / "a"))
    registry.load("y", "team/a/")
    assert versions(registry) == {"x": 5, "y": 5}


def test_links_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    """Abuse case 4: of the prompt's folder and of each of its files; a link inside of the folder is fine."""
    save(tmp_path / "outside", 1)
    prompts = tmp_path / "prompts"
    for name in ("inside", "manifest", "vectors"):
        save(prompts / name, 2)
    (prompts / "run").mkdir()
    for link, target in (
        ("link", tmp_path / "outside"), ("current", "inside"), ("loop", "."), ("run/prompt", tmp_path / "outside"),
        (f"manifest/{MANIFEST_FILE}", tmp_path / "outside" / MANIFEST_FILE),
        (f"vectors/{VECTORS_FILE}", tmp_path / "outside" / VECTORS_FILE),
    ):  # fmt: skip
        (prompts / link).unlink(missing_ok=True)
        (prompts / link).symlink_to(target)
    registry = registry_of(prompts)
    changes = registry.reload()
    assert changes.added == ("current", "inside")
    assert sorted(changes.failed) == ["link", "manifest", "run", "vectors"]
    assert all("is a link" in message for message in changes.failed.values())
    with pytest.raises(PromptError, match="link"):
        registry.load("x", "link")
    assert registry_of(None, {"x": prompts / "link"}).reload().added == ("x",), "the operator may"


# Files


class Bomb:
    """Leaves a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def header(about: dict[str, object], *, length: int | None = None) -> bytes:
    text = json.dumps(about).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(32)


GOOD = {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]}
BAD_VECTORS = {
    "header of an exabyte": header({VECTORS_KEY: GOOD}, length=2**60),
    "shape that overflows": header({VECTORS_KEY: {**GOOD, "shape": [2**63, 2**63]}}),
    "NaN": safetensors.torch.save({VECTORS_KEY: torch.full((2, 4), float("nan"))}),
    "nothing": b"",
}


def test_files_that_lie_are_refused_and_pickles_never_read(tmp_path: Path) -> None:
    """Abuse cases 2, 3 and 10, with the right checksum in the manifest; the others stay."""
    exploded, torch_file = tmp_path / "exploded", tmp_path / "saved"
    torch.save({"vectors": torch.zeros(2, 4), "bomb": Bomb(exploded)}, torch_file)
    pickles = {"pickle": pickle.dumps(Bomb(exploded)), "torch": torch_file.read_bytes()}
    folder = tmp_path / "prompts"
    for name, data in {**BAD_VECTORS, **pickles}.items():
        path = save(folder / name.replace(" ", "-"))
        (path / VECTORS_FILE).write_bytes(data)
        change(path, vectors_sha256=hashlib.sha256(data).hexdigest())
    change(save(folder / "sum"), vectors_sha256="0" * 64)
    change(save(folder / "weights"), weights={"kind": "lora", "sha256": {"a.safetensors": "0"}})
    for name, data in pickles.items():
        (save(folder / f"manifest-{name}") / MANIFEST_FILE).write_bytes(data)
        (save(folder / f"next-to-{name}") / "prompt.bin").write_bytes(data)
        (folder / f"alone-{name}").mkdir()
        (folder / f"alone-{name}" / "prompt.pt").write_bytes(data)
    registry = registry_of(folder)
    changes = registry.reload()
    assert changes.added == ("next-to-pickle", "next-to-torch")
    assert len(changes.failed) == len(BAD_VECTORS) + 6
    assert "train its slots alone" in changes.failed["weights"]
    for name in [*changes.failed, "alone-pickle"]:
        with pytest.raises(PromptError, match="'x' cannot be loaded"):
            registry.load("x", name)
        with pytest.raises(PromptError, match="'next-to-torch' cannot be loaded"):
            registry.load("next-to-torch", name, replaces=True)
    assert versions(registry) == {"next-to-pickle": 0, "next-to-torch": 0}
    assert not exploded.exists()


def test_a_huge_file_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Abuse case 3 (here, the file has holes)."""
    monkeypatch.setattr("ptuning.prompt.storage.read_bytes", lambda *_, **__: pytest.fail("it was read"))
    with (save(tmp_path / "bomb") / VECTORS_FILE).open("wb") as handle:
        handle.truncate(2**40)
    with pytest.raises(PromptError, match=f"{MAX_VECTORS_BYTES:,}"):
        registry_of(tmp_path).load("x", "bomb")


def test_reload_reads_only_what_has_changed_and_keeps_what_breaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Abuse case 23: without file handles or the disk, no prompt is lost; the clock may jump back."""
    checked: list[int] = []
    folder = tmp_path / "prompts"
    registry = loaded(folder, "a", "b", "c", check=lambda prompt: checked.append(version_of(prompt)))
    before = registry.served
    assert registry.reload() == Changes()
    save(folder / "b", 7)
    save(folder / "c", 2)  # the same again

    def fail(*_: object, **__: object) -> Any:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr("ptuning.files.open", fail, raising=False)
        patch.setattr("time.time", lambda: -1.0)
        assert sorted(registry.reload().failed) == ["b", "c"]
        with pytest.raises(PromptError, match="Too many open files"):
            registry.load("d", "a")
        patch.setattr("os.scandir", fail)
        with pytest.raises(FileError, match="prompts"):
            registry.reload()
    (folder / "a" / VECTORS_FILE).write_bytes(b"damaged")
    assert sorted(registry.reload().failed) == ["a"]
    assert registry.get("c").prompt is before["c"].prompt
    assert versions(registry) == {"a": 0, "b": 7, "c": 2}
    shutil.rmtree(folder / "a")
    save(folder / "new", 8)
    assert registry.reload() == Changes(added=("new",), removed=("a",))
    assert checked == [0, 1, 2, 7, 2, 8]
    assert {name: version_of(served.prompt) for name, served in before.items()} == {"a": 0, "b": 1, "c": 2}
    folder.rename(tmp_path / "away")
    with pytest.raises(FileError, match="prompts"):
        registry.reload()
    assert len(registry.served) == 3


# While requests run


def test_changes_are_made_one_after_the_other(tmp_path: Path) -> None:
    """Abuse case 12: of two that load one name, one wins; readers do not wait."""
    for version, name in enumerate(("a", "b", "c")):
        save(tmp_path / name, version)
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
        with pytest.raises(ConflictError, match="'x'"):
            second.result(30)
        assert reloaded.result(30).added == ("a", "b", "c")
    assert versions(registry) == {"a": 0, "b": 1, "c": 2, "x": 0}


def test_nothing_changes_while_the_service_ends(tmp_path: Path) -> None:
    """Abuse case 12: what is in service goes on. An engine that has failed says nothing about the prompts."""

    def check(prompt: Prompt) -> None:
        if version_of(prompt):
            raise StoppedError("the engine has failed")

    registry = loaded(tmp_path, "a", check=check)
    calls: list[Callable[[], object]] = [
        lambda: registry.load("b", "a"),
        lambda: registry.load("a", "a", replaces=True),
        registry.reload,
    ]
    save(tmp_path / "a", 1)
    for call in calls:
        with pytest.raises(StoppedError):
            call()
    save(tmp_path / "a", 0)
    registry.close()
    for call in [*calls, lambda: registry.unload("a")]:
        with pytest.raises(StoppedError):
            call()
    assert not registry.failures
    assert versions(registry) == {"a": 0}


NAMES = st.sampled_from(["a", "b", "c", "team/d", "e"])


class Prompts(RuleBasedStateMachine):
    """A registry against a dictionary: whatever happens to the folder and to the service, both agree."""

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
            self.fails(UnknownPromptError, self.registry.load, name, path, replaces=True)
        elif version is None:
            self.fails(PromptError, self.registry.load, name, path, replaces=True)
        else:
            self.registry.load(name, path, replaces=True)
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
        expected: dict[str, list[str]] = {"added": [], "changed": [], "removed": [], "failed": []}
        for name in sorted({*self.disk, *self.expected}):
            before = self.expected.get(name)
            path = before[1] if before else name
            version = self.loads(path)
            if before and path not in self.disk:
                del self.expected[name]
                expected["removed"].append(name)
            elif version is None:
                expected["failed"].append(name)
            else:
                self.expected[name] = version, path
                if before is None or before[0] != version:
                    expected["changed" if before else "added"].append(name)
        changes = self.registry.reload()
        assert {name: list(getattr(changes, name)) for name in expected} == expected

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

    def fails(self, kind: type[PTuningError], call: Callable[..., object], *given: str, **named: bool) -> None:
        with pytest.raises(kind):
            call(*given, **named)

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)


Prompts.TestCase.settings = settings(max_examples=25, stateful_step_count=30)
test_a_registry_is_a_dictionary = Prompts.TestCase
