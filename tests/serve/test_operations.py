"""A service as an operator has it: a process of its own, with keys, a folder of prompts, metrics and a log."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest

from ptuning.backbone.backbone import Backbone
from tests.conftest import learned

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no such signals here")


def ask(address: str, key: str | None = None, body: object = None) -> tuple[int, str]:
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(address, data, headers), timeout=60) as answer:
            return answer.status, answer.read().decode()
    except HTTPError as error:
        return error.code, error.read().decode()


def until(found: Callable[[], Any]) -> Any:
    """Wait for what a process does in its own time."""
    for _ in range(600):
        if value := found():
            return value
        time.sleep(0.05)
    raise AssertionError("it did not happen")


def test_the_life_of_a_service(tmp_path: Path, causal: Backbone, model_folder: Callable[[str], Path]) -> None:
    """Started with a broken prompt beside a good one, asked, reloaded by SIGHUP, measured, and ended by SIGTERM."""
    prompts, log, errors = tmp_path / "prompts", tmp_path / "access.log", tmp_path / "errors"
    learned(causal, "[P*2] {x} It was [Y]", seed=1).save(prompts / "first")
    (prompts / "broken").mkdir()
    (prompts / "broken" / "prompt.json").write_text("{", encoding="utf-8")
    for name in ("user", "boss"):
        (tmp_path / name).write_text(f"{name}-key\n", encoding="utf-8")
    command = [
        sys.executable, "-m", "ptuning", "serve", "--prompts", str(prompts), "--port", "0", "--access-log", str(log),
        "--backbone", str(model_folder("llama")), "--api-key-file", str(tmp_path / "user"),
        "--admin-key-file", str(tmp_path / "boss"), "--device", "cpu", "--dtype", "float32",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    with errors.open("wb") as stream:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stream, text=True, env=environment
        )
    try:
        assert process.stdout is not None
        address = process.stdout.readline().split()[0]
        assert "the prompt 'broken' is left out: broken/prompt.json is not valid JSON" in errors.read_text()
        asked = {"model": "first", "records": [{"x": "Kenya"}, {"x": "Peru"}]}
        assert ask(f"{address}/v1/predict", "user-key", asked)[0] == 200
        assert ask(f"{address}/v1/predict", "user-key", {**asked, "model": "second"})[0] == 404
        learned(causal, "[P*2] {x} is [Y]", seed=2).save(prompts / "second")
        process.send_signal(signal.SIGHUP)
        until(lambda: "prompts read again: added second" in errors.read_text())
        assert ask(f"{address}/v1/predict", "user-key", {**asked, "model": ["first", "second"]})[0] == 200
        assert ask(f"{address}/v1/prompts", "user-key")[0] == 403
        loaded = {"name": "third", "path": "second"}
        assert ask(f"{address}/v1/prompts", "boss-key", loaded)[0] == 201
        measured = ask(f"{address}/metrics", "boss-key")[1]
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
            assert line in measured
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
    lines = [json.loads(line) for line in log.read_text(encoding="ascii").splitlines()]
    assert [(line["route"], line["status"], line["rows"]) for line in lines] == [
        ("/v1/predict", 200, 2), ("/v1/predict", 404, 0), ("/v1/predict", 200, 4), ("(unknown)", 403, 0),
        ("/v1/prompts", 201, 0), ("/metrics", 200, 0),
    ]  # fmt: skip
    assert lines[2]["models"] == ["first", "second"]
    assert lines[0]["prompt_tokens"] > 0
    said = log.read_text() + errors.read_text()
    for secret in ("user-key", "boss-key", "Kenya", "Traceback"):
        assert secret not in said
