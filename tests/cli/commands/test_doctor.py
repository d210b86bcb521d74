"""`ptuning doctor` as a user sees it: lines that fit a terminal, JSON for programs, and its exit code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ptuning.backbone.backbone import Backbone
from ptuning.cli import terminal
from tests.cli.test_app import call, works
from tests.doctor.conftest import FAULTS, StandIn, prompts_of, serves, stand_in  # noqa: F401 - a fixture


@pytest.fixture
def prompts(causal: Backbone, tmp_path: Path) -> Path:
    for name, prompt in prompts_of(causal).items():
        prompt.save(tmp_path / "prompts" / name)
    return tmp_path / "prompts"


def test_what_is_in_order_ends_well(prompts: Path) -> None:
    shown = works("doctor", prompts)
    for line in ("versions", "machine", "extras", "backbone", "prompt facts", "prompt moods"):
        assert f"\n{line}\n" in f"\n{shown}"
    assert "\n  ok      tokenizer        " in shown
    assert shown.endswith("failed: 0\n")


def test_a_fault_is_shown_with_what_to_do_and_ends_with_1(prompts: Path, causal: Backbone) -> None:
    FAULTS["NaN"][0](prompts / "facts", causal)
    done = call("doctor", prompts)
    assert done.code == 1
    assert done.err == ""
    assert "\n  failed  vectors          NaN or infinity in slot 2 of " in done.out
    assert "-> train the prompt again with a lower" in done.out
    assert "\n  ok      answers          2 labels" in done.out
    assert done.out.endswith("failed: 1\n")


def test_lines_fit_80_columns(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a path or a command that cannot be broken may be longer."""
    monkeypatch.setenv("COLUMNS", "80")
    terminal.results.cache_clear()
    try:
        shown = works("doctor", "--backbone", llama)
    finally:
        terminal.results.cache_clear()
    long = [line for line in shown.splitlines() if len(line) > 80]
    assert all(len(line.split()) <= 4 for line in long), long


def test_json_is_for_programs(prompts: Path, causal: Backbone) -> None:
    FAULTS["cut off"][0](prompts / "facts", causal)
    done = call("doctor", prompts, "--json")
    assert done.code == 1
    found = json.loads(done.out)
    assert list(found) == ["checks", "failed"]
    assert found["failed"] == 1
    assert {tuple(one) for one in found["checks"]} == {("group", "name", "status", "detail", "remedy")}
    wrong = [one for one in found["checks"] if one["status"] != "ok"]
    assert [(one["group"], one["name"]) for one in wrong if one["status"] == "failed"] == [("prompt facts", "files")]
    assert all(one["remedy"] for one in wrong)


def test_a_server_is_asked_with_the_key(prompts: Path, causal: Backbone, stand_in: StandIn) -> None:  # noqa: F811
    serves(stand_in, causal, prompts_of(causal))
    stand_in.key = "sk-1"
    Path("key").write_text("sk-1\n")
    shown = works("doctor", prompts, "--url", stand_in.url, "--api-key-file", "key")
    assert "\n  ok      answer of facts  " in shown
    assert "sk-1" not in shown
    done = call("doctor", "--backbone", causal.name, "--url", stand_in.url)
    assert done.code == 1
    assert "-> give the key that the server was started with: --api-key-file FILE" in " ".join(done.out.split())


def test_what_a_server_says_is_not_obeyed_by_the_terminal(
    causal: Backbone,
    stand_in: StandIn,  # noqa: F811
) -> None:
    stand_in.pages["GET /health"] = (500, {"error": {"message": "\x1b[2J gone"}})
    stand_in.pages["GET /v1/models"] = (200, {"data": [{"id": "a\x1b]0;x\x07[bold]"}]})
    done = call("doctor", "--backbone", causal.name, "--url", stand_in.url)
    assert done.code == 1
    assert "\x1b" not in done.out
    assert "\\x1b[2J gone" in done.out
    assert "[bold]" in done.out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--api-key-file", "key"], "name it with --url"),
        (["--url", "127.0.0.1:8000"], "--url"),
        (["--url", "http://host", "--api-key-file", "none"], "cannot read none"),
        (["manual:[X] [Y]"], "has no files"),
        (["--device", "warp"], ""),
    ],
)
def test_what_is_asked_for_wrongly(options: list[str], said: str, model_folder: Callable[[str], Path]) -> None:
    done = call("doctor", "--backbone", model_folder("llama"), *options)
    assert (done.code, said in done.err + done.out) == (1 if options[0] == "--device" else 2, True), done
