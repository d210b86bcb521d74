"""`scripts/check_export.py`: an export's example, asked of a server."""

import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import load_script

EXAMPLE = {"record": {"x": "Kenya"}, "input_ids": [5, 6, 7], "target_ids": [8, 9], "log_prob": -1.5}


class Server(BaseHTTPRequestHandler):
    """Gives minus a tenth of each id, and a log-probability more for the token that it writes."""

    asked: Any = None

    def do_POST(self) -> None:  # the name that is called
        Server.asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        ids = Server.asked["prompt"]
        found = {"token_logprobs": [None, *(-one / 10 for one in ids[1:]), -3.0]}
        body = json.dumps({"choices": [{"logprobs": found}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.fixture
def url() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_the_target_is_scored_behind_the_input(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "export.json").write_text(json.dumps({"kind": "lora", "example": EXAMPLE}), encoding="utf-8")
    script = load_script("check_export")
    monkeypatch.setattr(sys, "argv", ["check_export.py", str(tmp_path), "--url", url, "--model", "mine"])
    assert script.main() == 1
    found = json.loads(capsys.readouterr().out)
    assert found["server"] == pytest.approx(-1.7)
    assert found["difference"] == pytest.approx(0.2)
    assert Server.asked["model"] == "mine"
    assert Server.asked["prompt"] == [5, 6, 7, 8, 9]
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--at-most", "0.21"])
    assert script.main() == 0
