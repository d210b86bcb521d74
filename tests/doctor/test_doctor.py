"""The doctor: each fault is found by one check, which says what to do, and hides no other."""

import itertools
import os
import platform
import re
import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from email.message import Message
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from ptuning import doctor
from ptuning.backbone import sources
from ptuning.backbone.backbone import Backbone
from ptuning.backbone.sources import LoadOptions
from ptuning.backbone.trained_weights import TrainedWeights
from ptuning.data.task_files import load_task
from ptuning.doctor import (
    TIMED_REQUESTS,
    Check,
    CheckedPrompt,
    Server,
    check_backbone,
    check_fit,
    check_machine,
    check_packages,
    check_server,
    find_backbone,
    read_prompts,
    run_checks,
)  # fmt: skip
from ptuning.errors import ConfigError
from ptuning.names import PROMPT_FOLDER
from ptuning.prompt.prompt import Prompt
from ptuning.template.labels import LabelWords
from tests.conftest import WARM, learned
from tests.doctor.conftest import FAULTS, Page, StandIn, named, prompts_of, serves
from tests.hub import Hub, serving
from tests.serve.conftest import Api, api, tiny  # noqa: F401 - fixtures

PLAIN = LoadOptions(dtype="float32", device="cpu")
NEEDS = ["torch>=2.4", 'tomli>=2 ; python_version < "3"', 'peft>=0.18; extra == "lora"',
         'fastapi>=0.100; extra == "serve"', 'ptuning[serve]; extra == "dev"']  # fmt: skip


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Versions of the packages that seem to be installed."""
    versions = {"ptuning": "0.1.0", "torch": "2.13.0+cpu", "peft": "0.21.2"}
    about = Message()
    about["Requires-Python"] = ">=3.10"
    for extra in ("lora", "serve", "dev"):
        about["Provides-Extra"] = extra

    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "requires", lambda name: version(name) and NEEDS)
    monkeypatch.setattr(metadata, "metadata", lambda name: version(name) and about)
    return versions


def test_versions_and_extras(packages: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    checks = named(list(check_packages()))
    assert list(checks) == ["ptuning", "python", "torch", "lora", "serve"]
    assert {check.status for check in checks.values()} == {"ok"}
    assert (checks["lora"].detail, "fastapi" in checks["serve"].detail) == ("installed", True)
    for name, version in (("torch", "2.3.1"), ("peft", "0.17.0"), ("torch", None)):
        kept = packages.pop(name)
        packages |= {} if version is None else {name: version}
        failed = [check.name for check in check_packages() if check.status == "failed"]
        assert failed == [name], (name, version)
        packages[name] = kept
    monkeypatch.setattr(platform, "python_version", lambda: "3.9.2")
    assert named(list(check_packages()))["python"].status == "failed"
    del packages["ptuning"]
    assert [(check.name, check.status) for check in check_packages()] == [("ptuning", "warning")]


def test_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "CGROUP", tmp_path)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    checks = named(list(check_machine()))
    assert {"cores", "threads", "memory", "disk", "units"} < set(checks)
    assert checks["threads"].status == "ok"
    (tmp_path / "cpu.max").write_text("150000 1000000\n")
    assert doctor.usable_cores() == 0.15
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert doctor.usable_cores() >= 1


@pytest.mark.parametrize("fault", ["threads", "memory", "disk", "rights", "unreadable"])
def test_a_fault_of_the_machine_is_a_warning(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise OSError(5, "broken")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "new" / "cache"))
    monkeypatch.setattr(doctor, "usable_cores", lambda: 4.0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 9 if fault == "threads" else 1)
    memory = SimpleNamespace(available=10**8 if fault == "memory" else 10**10, total=10**10)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    usage = SimpleNamespace(free=10**8 if fault == "disk" else 10**10)
    monkeypatch.setattr(shutil, "disk_usage", fail if fault == "unreadable" else lambda _: usage)
    monkeypatch.setattr(os, "access", lambda *_: fault != "rights")
    checks = named(list(check_machine()))
    warnings = [name for name, check in checks.items() if check.status != "ok"]
    assert warnings == [fault if fault in checks else "disk"]
    assert not (tmp_path / "new").exists()


def test_a_backbone_is_found_loaded_and_described(model_folder: Callable[[str], Path]) -> None:
    folder = str(model_folder("bert"))
    assert find_backbone(folder, PLAIN).status == "ok"
    backbone, checks = check_backbone(folder, PLAIN)
    assert backbone is not None
    found = named(checks)
    assert found["fingerprint"].detail == backbone.fingerprint
    assert "masked" in found["kind"].detail
    assert "fills masks" in found["slots"].detail


@pytest.mark.parametrize(("is_default", "status"), [(False, "failed"), (True, "warning")])
def test_a_missing_backbone(is_default: bool, status: str, tmp_path: Path) -> None:
    check = find_backbone(str(tmp_path / "none"), PLAIN, is_default=is_default)
    assert (check.status, "backbone" in check.remedy) == (status, True)


def test_the_default_backbone_and_one_of_the_hub(
    model_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources.PackagedWeights, "find", lambda *_: tmp_path / "weights.gguf")
    monkeypatch.setattr(sources, "is_cached", lambda _: False)
    assert str(tmp_path / "weights.gguf") in find_backbone(sources.BACKBONE, PLAIN).detail
    monkeypatch.setattr(sources, "is_cached", lambda _: True)
    assert "cached in" in find_backbone(sources.BACKBONE, PLAIN).detail
    assert find_backbone(sources.BACKBONE, LoadOptions(revision="main")).status == "failed"
    commit = "a" * 40
    with serving(Hub("owner/tiny", {commit: model_folder("llama")}, {"main": commit}), monkeypatch):
        assert commit[:12] in find_backbone("owner/tiny", LoadOptions(cache_dir=tmp_path)).detail


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("out of memory"), ConfigError("cut off")])
def test_a_backbone_that_does_not_load(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(doctor, "load_backbone", load)
    backbone, (check,) = check_backbone("big", PLAIN)
    assert (backbone, check.status) == (None, "failed")


@pytest.fixture
def folder(causal: Backbone, tmp_path: Path) -> Path:
    """A folder of sound prompts, one of them in the folder of its training run, and one a folder deeper."""
    parent, prompts = tmp_path / "prompts", prompts_of(causal)
    prompts["facts"].save(parent / "facts")
    prompts["moods"].save(parent / "moods" / PROMPT_FOLDER)
    prompts["facts"].save(parent / "team" / "facts")
    (parent / "notes").mkdir()
    return parent


def checks_of(read: CheckedPrompt, backbone: Backbone) -> dict[str, Check]:
    return named([*read.checks, *check_fit(read, backbone)])


def test_sound_prompts_of_a_folder(folder: Path, causal: Backbone) -> None:
    read = read_prompts([str(folder)])
    assert [prompt.name for prompt in read] == ["facts", "moods", "team/facts"]  # as a server names them
    for prompt in read:
        checks = checks_of(prompt, causal)
        assert list(checks) == ["files", "prompt.json", "backbone", "tokenizer", "norm", "answers"]
        assert {check.status for check in checks.values()} == {"ok"}
    # Two of one name are told apart by their folders.
    folders = [str(folder / "facts"), str(folder / "moods"), str(folder / "moods" / PROMPT_FOLDER)]
    assert [prompt.name for prompt in read_prompts(folders)] == ["facts", folders[1], folders[2]]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_a_prompt_is_found_and_hides_no_other(fault: str, folder: Path, causal: Backbone) -> None:
    damage, name, detail = FAULTS[fault]
    damage(folder / "facts", causal)
    broken, sound, _ = read_prompts([str(folder)])
    failed = [check for check in checks_of(broken, causal).values() if check.status == "failed"]
    assert [check.name for check in failed] == [name], failed
    assert detail in failed[0].detail
    assert {check.status for check in checks_of(sound, causal).values()} == {"ok"}


def test_no_prompt_and_a_manual_one(tmp_path: Path, causal: Backbone) -> None:
    for source in (str(tmp_path), str(tmp_path / "none"), "a\0b"):
        (read,) = read_prompts([source])
        assert (read.prompt, read.checks[0].status) == (None, "failed"), source
    with pytest.raises(ConfigError, match="has no files"):
        read_prompts(["manual:[X] is [Y]"])
    Prompt.manual("{x} is [Y]").save(tmp_path / "words")
    (read,) = read_prompts([str(tmp_path / "words")])
    assert {check.status for check in checks_of(read, causal).values()} == {"ok"}


def test_another_backbone_names_the_right_one(folder: Path, causal: Backbone, masked: Backbone) -> None:
    (check,) = check_fit(read_prompts([str(folder / "facts")])[0], masked)
    assert (check.name, check.status) == ("backbone", "failed")
    assert f"--backbone {causal.name}" in check.remedy


@pytest.mark.parametrize(("factor", "status"), [(1.0, "ok"), (0.01, "warning"), (50.0, "warning")])
def test_vectors_far_from_the_norm_of_tokens_are_a_warning(factor: float, status: str, causal: Backbone) -> None:
    prompt = learned(causal, "[P*3] {x} [Y]")
    assert prompt.slot_vectors is not None
    vectors = prompt.slot_vectors.clone()
    vectors[1] *= factor
    read = CheckedPrompt("one", "one", [], replace(prompt, slot_vectors=vectors))
    assert named(list(check_fit(read, causal)))["norm"].status == status


@pytest.mark.parametrize(("word", "status"), [("\u4f60", "failed"), ("gre at", "ok")])
def test_label_words_that_the_tokenizer_does_not_know(word: str, status: str, masked: Backbone) -> None:
    prompt = replace(learned(masked, "{x} [P*2] [Y]"), label_words=LabelWords({"good": ["great"], "bad": [word]}))
    assert named(list(check_fit(CheckedPrompt("one", "one", [], prompt), masked)))["answers"].status == status


def test_trained_weights_are_put_into_a_copy(causal: Backbone, tmp_path: Path) -> None:
    tuned = causal.copy()
    with torch.no_grad():
        next(iter(tuned.model.parameters())).add_(0.01)
    weights = TrainedWeights.of(tuned, causal, train_backbone="full", keep="difference")
    replace(learned(causal, WARM), weights=weights).save(tmp_path / "tuned")
    (read,) = read_prompts([str(tmp_path / "tuned")])
    before = causal.fingerprint
    checks = checks_of(read, causal)
    assert {check.status for check in checks.values()} == {"ok"}
    assert re.search("sha256 [0-9a-f]{12}, [0-9a-f]{12} ", checks["files"].detail)
    assert causal.fingerprint == before


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://localhost:8000/v1/", "http://localhost:8000"),
        ("https://prompts.example.org/team", "https://prompts.example.org/team"),
        ("", None), ("127.0.0.1:8000", None), ("ftp://host", None), ("http://", None), ("http://host:99999", None),
        ("http://host/?a=b", None), ("http://host\n.org", None), ("http://[::1", None), ("file:///etc/passwd", None),
        ("http://host#x", None), ("http://me:secret@host", None),
    ],
)  # fmt: skip
def test_the_url_of_a_server(url: str, base: str | None) -> None:
    if base is not None:
        assert Server(url).url == base
        return
    with pytest.raises(ConfigError, match="URL") as caught:
        Server(url)
    assert "secret" not in str(caught.value)


def test_requests_end_and_the_key_goes_nowhere_else(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SECONDS", 0.3)
    stand_in.pages |= {
        "POST /v1/predict": lambda body: (200, {"got": body}),
        "GET /missing": (404, {"error": {"message": "no such model"}}),
        "GET /html": (200, b"<html>", {}),
        "GET /moved": (302, b"", {"Location": f"{stand_in.url}/elsewhere"}),
        "GET /slow": (200, b"x" * 50, {}),
    }
    stand_in.slow = "/slow"
    server = Server(stand_in.url + "/v1", "sk-1")
    answer = server.request("/v1/predict", {"model": "a"})
    assert (answer.is_ok, answer.body) == (True, {"got": {"model": "a"}})
    assert stand_in.seen == [("POST /v1/predict", "Bearer sk-1")]
    for page, status, description in (
        ("/missing", 404, "no such model"), ("/html", 200, "no JSON"), ("/moved", 302, "elsewhere"),
        ("/slow", 0, "0.3 s"),
    ):  # fmt: skip
        answer = server.request(page)
        assert (answer.status, answer.is_ok, description in answer.description) == (status, False, True), answer
    assert "GET /elsewhere" not in [page for page, _ in stand_in.seen]
    stand_in.released.set()
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
    assert "no answer" in Server(address).request("/health").description


@pytest.fixture
def prompts(causal: Backbone) -> dict[str, Prompt]:
    return prompts_of(causal)


def server_checks(
    stand_in: StandIn, backbone: Backbone | None, prompts: dict[str, Prompt], key: str | None = None
) -> dict[str, Check]:
    read = [CheckedPrompt(name, name, [], prompt) for name, prompt in prompts.items()]
    return named(list(check_server(Server(stand_in.url, key), read, backbone)))


def test_a_server_with_the_same_answers(stand_in: StandIn, causal: Backbone, prompts: dict[str, Prompt]) -> None:
    serves(stand_in, causal, prompts)
    checks = server_checks(stand_in, causal, prompts)
    assert list(checks) == [
        "health", "ready", "version", "models", "answer of facts", "answer of moods", "latency"
    ]  # fmt: skip
    assert {check.status for check in checks.values()} == {"ok"}
    assert [page for page, _ in stand_in.seen].count("POST /v1/predict") == 2 + TIMED_REQUESTS
    stand_in.key = "sk-secret"
    checks = server_checks(stand_in, causal, prompts)
    assert (checks["models"].status, "key" in checks["models"].remedy) == ("failed", True)
    checks = server_checks(stand_in, None, prompts, key="sk-secret")  # without a backbone nothing is compared
    assert list(checks) == ["health", "ready", "version", "models", "latency"]
    assert "sk-secret" not in str(checks)


@pytest.mark.parametrize(
    "changed",
    [
        {"prediction": "Nairobi!"}, {"prediction": None}, {"candidates": []}, {"candidates": "x"},
        {"candidates": [{"text": "Nairobi!", "log_prob": -1.0}]}, {"candidates": [{"text": "a"}]},
    ],
)  # fmt: skip
def test_another_answer_is_a_fault(
    changed: dict[str, Any], stand_in: StandIn, causal: Backbone, prompts: dict[str, Prompt]
) -> None:
    serves(stand_in, causal, {"facts": prompts["facts"]}, **changed)
    assert server_checks(stand_in, causal, {"facts": prompts["facts"]})["answer of facts"].status == "failed"


@pytest.mark.parametrize(("gap", "status"), [(5e-4, "ok"), (2e-3, "failed"), (float("nan"), "failed")])
def test_log_probabilities_may_differ_by_rounding(
    gap: float, status: str, stand_in: StandIn, causal: Backbone, prompts: dict[str, Prompt]
) -> None:
    """Every candidate counts, not only the answer."""
    serves(stand_in, causal, {"moods": prompts["moods"]})
    real: Any = stand_in.pages["POST /v1/predict"]

    def predict(body: Any) -> Page:
        _, answer = real(body)
        answer["predictions"][0]["candidates"][1]["log_prob"] += gap
        return 200, answer

    stand_in.pages["POST /v1/predict"] = predict
    assert server_checks(stand_in, causal, {"moods": prompts["moods"]})["answer of moods"].status == status


def test_a_server_that_went_away_is_not_asked_again(
    stand_in: StandIn, causal: Backbone, prompts: dict[str, Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "ANSWER_SECONDS", 0.3)
    serves(stand_in, causal, prompts)
    stand_in.slow = "/v1/predict"
    assert list(server_checks(stand_in, causal, prompts))[-1] == "answer of facts"


def test_prompts_that_are_not_compared(stand_in: StandIn, causal: Backbone, prompts: dict[str, Prompt]) -> None:
    served = {
        "moods": prompts["moods"],
        "one": Prompt.manual("{text} It was [Y]", task=load_task("sentiment")),
        "several": Prompt.manual("{premise}? [Y], {hypothesis}", task=load_task("RTE")),
        "choices": replace(learned(causal, "{premise} [P*2] [Y]"), task=load_task("COPA")),
    }
    serves(stand_in, causal, served)
    checks = server_checks(stand_in, causal, {**served, "facts": prompts["facts"]})
    assert checks["answer of facts"].status == "warning"  # not served
    compared = [name for name, check in checks.items() if "as in process" in check.detail]
    assert compared == ["answer of moods", "answer of one"]
    assert "not compared" in checks["answer of several"].detail + checks["answer of choices"].detail


@pytest.mark.parametrize(
    ("page", "answer", "name"),
    [
        ("GET /health", (500, None), "health"),
        ("GET /health", (307, b"", {"Location": "http://elsewhere.example"}), "health"),
        ("GET /ready", (503, {"error": {"message": "loading"}}), "ready"),
        ("GET /version", (500, None), "version"),
        ("GET /v1/models", (500, None), "models"),
        ("GET /v1/models", (200, {"data": 3}), "models"),
        ("GET /v1/models", (200, [1]), "models"),
        ("GET /v1/models", (200, b"<html>", {}), "models"),
        ("POST /v1/predict", (500, {"error": {"message": "the engine has ended"}}), "answer of facts"),
    ],
)
def test_each_page_that_is_wrong_is_a_fault(
    page: str, answer: Page, name: str, stand_in: StandIn, causal: Backbone, prompts: dict[str, Prompt]
) -> None:
    serves(stand_in, causal, {"facts": prompts["facts"]})
    stand_in.pages[page] = answer
    checks = server_checks(stand_in, causal, {"facts": prompts["facts"]}).values()
    assert [check.name for check in checks if check.status == "failed" and check.name != "latency"] == [name]


def test_all_checks_in_order(
    causal: Backbone, model_folder: Callable[[str], Path], folder: Path, tmp_path: Path, stand_in: StandIn
) -> None:
    FAULTS["cut off"][0](folder / "facts", causal)
    serves(stand_in, causal, {"moods": prompts_of(causal)["moods"]})
    paths = [str(folder / "facts"), str(folder / "moods")]
    checks = list(run_checks(paths, options=PLAIN, server=Server(stand_in.url)))
    groups = [group for group, _ in itertools.groupby(checks, lambda check: check.group)]
    assert groups == ["versions", "extras", "machine", "backbone", "prompt facts", "prompt moods", "server"]
    # The backbone is that of the first prompt that can be read.
    assert next(check for check in checks if check.name == "found").detail.startswith(str(model_folder("llama")))
    assert [(check.group, check.name) for check in checks if check.status == "failed"] == [("prompt facts", "files")]
    for backbone, failed in ((str(model_folder("bert")), "prompt moods"), (str(tmp_path / "none"), "backbone")):
        checks = list(run_checks(paths[1:], backbone=backbone, options=PLAIN))
        assert [check.group for check in checks if check.status == "failed"] == [failed]


def test_the_service_itself(api: Api, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    def forward(page: str, key: str | None, body: bytes) -> Page:
        method, path = page.split()
        headers = {"Content-Type": "application/json"} if body else {}
        answer = api.client.request(method, path, content=body, headers=headers)
        return answer.status_code, answer.content, {}

    monkeypatch.setattr(stand_in, "answer", forward)
    checks = server_checks(stand_in, api.model.backbone, api.prompts)
    assert {check.status for check in checks.values()} == {"ok"}, checks
    compared = [name for name, check in checks.items() if "as in process" in check.detail]
    assert compared == [f"answer of {name}" for name in ("write", "mood", "pair", "renamed", "kept")]
