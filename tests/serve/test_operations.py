"""A service as an operator runs it: a process of its own, with keys, a folder of prompts, metrics and a log."""

import json
import signal
import urllib.request
from collections.abc import Callable
from pathlib import Path
from urllib.error import HTTPError

import pytest

from ptuning.backbone.backbone import Backbone
from tests.conftest import learned
from tests.processes import COMMAND_LINE, forked

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no such signals here")


def ask(address: str, key: str | None = None, body: object = None) -> tuple[int, str]:
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(address, data, headers), timeout=60) as answer:
            return answer.status, answer.read().decode()
    except HTTPError as error:
        return error.code, error.read().decode()


def test_the_life_of_a_service(tmp_path: Path, causal: Backbone, model_folder: Callable[[str], Path]) -> None:
    """Started with a broken prompt next to a good one, asked, reloaded by SIGHUP, measured, and ended by SIGTERM."""
    prompts, log = tmp_path / "prompts", tmp_path / "access.log"
    learned(causal, "[P*2] {x} It was [Y]", seed=1).save(prompts / "first")
    (prompts / "broken").mkdir()
    (prompts / "broken" / "prompt.json").write_text("{", encoding="utf-8")
    for name in ("user", "boss"):
        (tmp_path / name).write_text(f"{name}-key\n", encoding="utf-8")
    command = [
        "serve", "--prompts", str(prompts), "--port", "0", "--access-log", str(log),
        "--backbone", str(model_folder("llama")), "--api-key-file", str(tmp_path / "user"),
        "--admin-key-file", str(tmp_path / "boss"), "--device", "cpu", "--dtype", "float32",
    ]  # fmt: skip
    listens = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)"  # also where nohup runs the tests
    with forked(f"{listens}\n{COMMAND_LINE}", *command, folder=tmp_path / "said") as process:
        process.wait_until(lambda: "\n" in process.out)
        address = process.out.split()[0]
        assert "the prompt 'broken' is left out: broken/prompt.json is not valid JSON" in process.err
        body = {"model": "first", "records": [{"x": "Kenya"}, {"x": "Peru"}]}
        assert ask(f"{address}/v1/predict", "user-key", body)[0] == 200
        assert ask(f"{address}/v1/predict", "user-key", {**body, "model": "second"})[0] == 404
        learned(causal, "[P*2] {x} is [Y]", seed=2).save(prompts / "second")
        process.send(signal.SIGHUP)
        process.wait_until(lambda: "prompts read again: added second" in process.err)
        assert ask(f"{address}/v1/predict", "user-key", {**body, "model": ["first", "second"]})[0] == 200
        assert ask(f"{address}/v1/prompts", "user-key")[0] == 403
        loaded = {"name": "third", "path": "second"}
        assert ask(f"{address}/v1/prompts", "boss-key", loaded)[0] == 201
        metrics = ask(f"{address}/metrics", "boss-key")[1]
        for line in (
            'ptuning_model_rows_total{model="first"} 4.0',
            'ptuning_model_rows_total{model="second"} 2.0',
            'ptuning_model_requests_total{model="(unknown)"} 1.0',
            "ptuning_rows_total 6.0",
            "ptuning_prompts_loaded 3.0",
            "ptuning_prompts_failed 1.0",
            'ptuning_refusals_total{reason="model_not_found"} 1.0',
            "ptuning_request_queue_time_seconds_count 2.0",
        ):
            assert line in metrics
        process.send(signal.SIGTERM)
        assert process.wait(60) == 0
    lines = [json.loads(line) for line in log.read_text(encoding="ascii").splitlines()]
    assert [(line["route"], line["status"], line["rows"]) for line in lines] == [
        ("/v1/predict", 200, 2), ("/v1/predict", 404, 0), ("/v1/predict", 200, 4), ("(unknown)", 403, 0),
        ("/v1/prompts", 201, 0), ("/metrics", 200, 0),
    ]  # fmt: skip
    assert lines[2]["models"] == ["first", "second"]
    assert lines[0]["prompt_tokens"] > 0
    written = log.read_text() + process.err
    for secret in ("user-key", "boss-key", "Kenya", "Traceback"):
        assert secret not in written
