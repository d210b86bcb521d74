"""`ptuning doctor`: lines that fit a terminal, JSON for programs, and its exit code; tests/doctor has the checks."""

import json
from pathlib import Path

import pytest

from ptuning.backbone.backbone import Backbone
from ptuning.cli import terminal
from tests.cli.calls import call, works
from tests.doctor.conftest import FAULTS, StandIn, prompts_of, serves, stand_in  # noqa: F401 - a fixture


@pytest.fixture
def prompts(causal: Backbone, tmp_path: Path) -> Path:
    for name, prompt in prompts_of(causal).items():
        prompt.save(tmp_path / "prompts" / name)
    return tmp_path / "prompts"


def test_checks_on_80_columns(prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    terminal.results.cache_clear()
    try:
        shown = works("doctor", prompts)
    finally:
        terminal.results.cache_clear()
    for line in ("versions", "machine", "extras", "backbone", "prompt facts", "prompt moods"):
        assert f"\n{line}\n" in f"\n{shown}"
    assert "\n  ok      tokenizer " in shown
    assert shown.endswith("failed: 0\n")
    assert max(map(len, shown.splitlines())) <= 80


def test_a_fault_is_shown_with_its_remedy_and_ends_with_1(prompts: Path, causal: Backbone) -> None:
    FAULTS["manifest"][0](prompts / "facts", causal)
    done = call("doctor", prompts)
    assert (done.code, done.err) == (1, "")
    assert "\n  failed  prompt.json " in done.out
    assert "-> copy the whole folder again" in done.out
    assert done.out.endswith("failed: 1\n")
    done = call("doctor", prompts, "--json")
    assert done.code == 1
    report = json.loads(done.out)
    assert report["failed"] == 1
    assert {tuple(check) for check in report["checks"]} == {("group", "name", "status", "detail", "remedy")}
    failed = [check for check in report["checks"] if check["status"] == "failed"]
    assert [(check["group"], check["name"]) for check in failed] == [("prompt facts", "prompt.json")]


def test_a_server_is_asked_with_the_key(prompts: Path, causal: Backbone, stand_in: StandIn) -> None:  # noqa: F811
    serves(stand_in, causal, prompts_of(causal))
    stand_in.key = "sk-1"
    Path("key").write_text("sk-1\n")
    shown = works("doctor", prompts, "--url", stand_in.url, "--api-key-file", "key")
    assert "\n  ok      answer of facts " in shown
    assert "sk-1" not in shown
    assert call("doctor", "--backbone", causal.name, "--url", stand_in.url).code == 1


def test_a_server_s_text_is_not_obeyed_by_the_terminal(causal: Backbone, stand_in: StandIn) -> None:  # noqa: F811
    stand_in.pages["GET /health"] = (500, {"error": {"message": "\x1b[2J gone"}})
    stand_in.pages["GET /v1/models"] = (200, {"data": [{"id": "a\x1b]0;x\x07[bold]"}]})
    done = call("doctor", "--backbone", causal.name, "--url", stand_in.url)
    assert done.code == 1
    assert "\x1b" not in done.out
    assert "\\x1b[2J gone" in done.out
    assert "[bold]" in done.out


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--api-key-file", "key"], 2, "--url"),
        (["--url", "http://host", "--api-key-file", "none"], 2, "none"),
        (["manual:[X] [Y]"], 2, "manual"),
        (["--device", "warp"], 1, "warp"),
    ],
)
def test_bad_input(options: list[str], code: int, says: str, llama: str) -> None:
    done = call("doctor", "--backbone", llama, *options)
    assert (done.code, says in done.err + done.out) == (code, True), done
