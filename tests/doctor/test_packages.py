"""Versions against those that are needed and tested, and optional extras."""

from __future__ import annotations

import platform
import re
import sys
from email.message import Message
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from ptuning.doctor import packages
from ptuning.doctor.packages import TESTED, check_extras, check_versions
from tests.doctor.conftest import named

ROOT = Path(__file__).resolve().parents[2]
NEEDS = [
    "torch>=2.4",
    "transformers>=5.0",
    "safetensors>=0.4.3",
    'tomli>=2.0; python_version < "3.0"',
    'datasets>=4.0; extra == "hub"',
    'peft>=0.18; extra == "lora"',
    'fastapi>=0.100; extra == "serve"',
    'uvicorn>=0.30; extra == "serve"',
    'ptuning[hub]; extra == "dev"',
    'ruff>=0.12; extra == "dev"',
]


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The packages that seem to be installed, with their versions: all that is tested, unless a test changes it."""
    found = {**packages.tested_versions(), "ptuning": "0.1.0"}
    lists = {"ptuning": NEEDS, "transformers": ["tokenizers<0.24.0,>=0.23.1", "huggingface_hub<3.0,>=1.31.0"]}
    about = Message()
    about["Requires-Python"] = ">=3.10"
    for extra in ("hub", "lora", "serve", "dev"):
        about["Provides-Extra"] = extra

    def version(name: str) -> str:
        if name not in found:
            raise metadata.PackageNotFoundError(name)
        return found[name]

    def of(name: str) -> Message:
        version(name)
        return about if name == "ptuning" else Message()

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "requires", lambda name: version(name) and lists.get(name))
    monkeypatch.setattr(metadata, "metadata", of)
    return found


def test_the_tested_versions_are_those_of_the_constraints() -> None:
    """A wheel has no constraints.txt, so the package has these lines of it."""
    names = {Requirement(line).name for line in TESTED}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    same = [line for line in lines if re.split(r"[=<>! ]", line)[0] in names]
    assert sorted(TESTED) == sorted(same)
    assert names == {"torch", "transformers", "tokenizers", "safetensors", "peft", "huggingface-hub"}


def test_what_is_tested_is_ok(there: dict[str, str]) -> None:
    found = named(check_versions())
    assert list(found) == ["ptuning", "python", *packages.tested_versions()]
    assert {one.status for one in found.values()} == {"ok"}
    assert found["torch"].found == f"{there['torch']}, as tested"


@pytest.mark.parametrize(
    ("name", "version", "status", "said"),
    [
        ("torch", "2.13.0+cpu", "ok", "2.13.0+cpu, as tested"),
        ("torch", "2.9.1", "ok", "2.9.1 (tested: 2.13.0)"),
        ("torch", "2.14.0", "ok", "2.14.0 (tested: 2.13.0)"),
        ("torch", "3.0.0", "warning", "3.0.0 is newer than 2.13.0, which is tested"),
        ("torch", "2.3.1", "failed", "2.3.1, and >=2.4 is needed"),
        ("torch", "2.14.0.dev20260101", "ok", "2.14.0.dev20260101 (tested: 2.13.0)"),
        ("tokenizers", "0.24.1", "failed", "and <0.24.0,>=0.23.1 is needed"),
        ("huggingface-hub", "1.30.0", "failed", "and <3.0,>=1.31.0 is needed"),
        ("peft", "0.22.0", "warning", "0.22.0 is newer than 0.21.2, which is tested"),
        ("peft", "0.17.0", "failed", "0.17.0, and >=0.18 is needed"),
    ],
)
def test_a_version_is_compared_with_what_is_needed_and_tested(
    name: str, version: str, status: str, said: str, there: dict[str, str]
) -> None:
    there[name] = version
    found = named(check_versions())[name]
    assert (found.status, said in found.found) == (status, True), found
    if status != "ok":
        assert f"pip install '{name}=={packages.tested_versions()[name]}'" in found.remedy


def test_what_is_not_installed_fails_unless_it_is_optional(there: dict[str, str]) -> None:
    del there["safetensors"], there["peft"]
    found = named(check_versions())
    assert (found["safetensors"].status, found["safetensors"].found) == ("failed", "not installed")
    assert found["peft"].status == "ok"
    assert "not installed" in found["peft"].found


def test_a_python_that_is_too_old_fails(there: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "python_version", lambda: "3.9.2")
    found = named(check_versions())["python"]
    assert (found.status, found.found) == ("failed", "3.9.2, and >=3.10 is needed")


def test_run_from_its_source_it_says_that_it_does_not_know_what_is_needed(there: dict[str, str]) -> None:
    del there["ptuning"]
    found = named(check_versions())
    assert found["ptuning"].status == "warning"
    assert "pip install -e ." in found["ptuning"].remedy
    assert found["torch"].status == "ok"
    assert check_extras() == []


def test_an_extra_that_is_not_installed_is_no_fault(there: dict[str, str]) -> None:
    there |= {"datasets": "3.0", "uvicorn": "0.35"}
    found = named(check_extras())
    assert list(found) == ["hub", "lora", "serve"]  # dev collects extras
    assert (found["hub"].status, found["hub"].found) == ("warning", "datasets 3.0, and >=4.0 is needed")
    assert found["lora"].found == "peft 0.21.2"
    assert found["serve"].status == "ok"
    assert found["serve"].found == "not installed (fastapi missing): pip install 'ptuning[serve]'"
    del there["uvicorn"]
    assert named(check_extras())["serve"].found == "not installed: pip install 'ptuning[serve]'"


def test_this_installation_is_looked_at() -> None:
    """Nothing is stood in for: the real metadata can be read."""
    found = named(check_versions())
    assert found["python"].found.startswith(".".join(map(str, sys.version_info[:2])))
    assert {one.status for one in found.values()} <= {"ok", "warning"}
    assert "lora" in named(check_extras())
