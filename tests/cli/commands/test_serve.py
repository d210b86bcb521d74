"""`ptuning serve`: what it refuses before anything is loaded, and one real service from its line to its end."""

import json
import os
import re
import signal
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from ptuning import PromptModel, load_backbone
from ptuning.cli.commands import serve
from ptuning.serve.engine.engine import Engine
from tests.cli.calls import fails
from tests.conftest import learned
from tests.processes import COMMAND_LINE, forked


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((), "give --prompts DIR"),
        (("capitals",), "'capitals'"),
        (("--prompts", "nowhere"), "nowhere"),
        (("--prompts", ".", "--host", "0.0.0.0"), "--host 0.0.0.0"),
        (("--prompts", ".", "--host", "no such host"), "--host"),
        (("--prompts", ".", "--api-key-file", "nowhere"), "nowhere"),
        (("--prompts", ".", "--api-key-file", "empty"), "holds no key"),
        (("--prompts", ".", "--port", "70000"), "'--port'"),
        (("--prompts", ".", "--cache-memory", "2"), "'--cache-memory'"),
    ],
)
def test_mistakes_are_errors_before_anything_is_loaded(args: tuple[str, ...], says: str) -> None:
    Path("empty").touch()
    fails("serve", *args, says=[says])


def test_a_missing_extra_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "EXTRA", ("fastapi", "not_installed"))
    fails("serve", "--prompts", ".", says=["serving needs not_installed; ", "pip install 'ptuning[serve]'"])


def test_a_prompt_is_loaded_while_a_pass_runs(llama: str) -> None:
    """Loading waits for no pass of the model; it is read and checked in the operator's own thread."""
    backbone = load_backbone(llama, dtype="float32", device="cpu")
    learned(backbone, "{x} is [P*2] [Y]").save("prompts/first")
    engine = Engine(PromptModel(backbone), queue_rows=8, cache_memory=0)
    engine.start()
    held, let_go = threading.Event(), threading.Event()

    def hold() -> None:
        held.set()
        let_go.wait(60)

    running = threading.Thread(target=lambda: engine.call(hold))
    running.start()
    assert held.wait(60)
    try:
        registry = serve.registry_of(Path("prompts"), {}, engine)
        learned(backbone, "{x} is [P*3] [Y]").save("prompts/second")
        registry.load("other", "second")
        assert sorted(registry.served) == ["first", "other"]
    finally:
        let_go.set()
        running.join()
        engine.stop()


def ask(address: str, path: str, body: dict[str, Any] | None = None, *, key: str | None = None) -> Any:
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(address + path, data, headers), timeout=60) as answer:
        return json.load(answer)


@pytest.mark.skipif(os.name != "posix", reason="ends by a signal of POSIX")
def test_a_service_from_its_line_to_its_end(llama: str, tmp_path: Path) -> None:
    backbone = load_backbone(llama, dtype="float32", device="cpu")
    prompt = learned(backbone, "[P*2] {x} is [P] [Y]")
    prompt.save("prompts/team/capitals")
    learned(backbone, "{x} [P*3] [Y]").save("elsewhere")
    Path("prompts/broken").mkdir()
    Path("prompts/broken/prompt.json").write_text("{", encoding="utf-8")
    Path("keys").write_text("# ours\nsk-123\n", encoding="utf-8")
    args = ["--prompts", "prompts", "other=elsewhere", "--port", "0", "--api-key-file", "keys", "--dtype", "float32"]
    with forked(COMMAND_LINE, "serve", *args, folder=tmp_path / "said") as process:
        process.wait_until(lambda: "\n" in process.out)
        line = process.out
        found = re.match(r"(http://127\.0\.0\.1:\d+) serves 2 prompts on llama; .*Ctrl-C ends it$", line.strip())
        assert found, line + process.err
        address = found[1]
        with pytest.raises(urllib.error.HTTPError, match="401"):
            ask(address, "/v1/models")
        assert [one["id"] for one in ask(address, "/v1/models", key="sk-123")["data"]] == [
            "llama", "other", "team/capitals"
        ]  # fmt: skip
        answer = ask(address, "/v1/predict", {"model": "team/capitals", "records": ["Kenya"]}, key="sk-123")
        (wanted,) = PromptModel(backbone).predict([{"x": "Kenya"}], prompt)
        assert answer["predictions"][0]["prediction"] == wanted.text
        process.send(signal.SIGTERM)
        assert process.wait(60) == 0, process.err
    assert process.out == line
    assert "'broken' is left out" in process.err
    assert "sk-123" not in line + process.err
