"""Requests end: in time, at a size, at a redirect; and the key goes nowhere else."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from ptuning.doctor import remote
from ptuning.doctor.remote import Remote, read_key
from ptuning.errors import ConfigError, FileError
from tests.doctor.conftest import StandIn


@pytest.mark.parametrize(
    ("url", "host", "port", "base"),
    [
        ("http://127.0.0.1:8000", "127.0.0.1", 8000, ""),
        ("http://localhost:8000/v1/", "localhost", 8000, ""),
        ("https://prompts.example.org/team", "prompts.example.org", 443, "/team"),
        ("http://[::1]:80", "::1", 80, ""),
    ],
)
def test_a_url_of_a_server(url: str, host: str, port: int, base: str) -> None:
    found = Remote.of(url)
    assert (found.host, found.port, found.base, found.is_secure) == (host, port, base, url.startswith("https"))


@pytest.mark.parametrize(
    "url",
    [
        "", "127.0.0.1:8000", "ftp://host", "http://", "http://host:99999", "http://host:0", "http://host/?a=b",
        "http://host\n.org", "http://ho st", "http://host/a b", "http://[::1", "file:///etc/passwd", "http://host#x",
    ],
)  # fmt: skip
def test_what_is_no_url_of_a_server_is_an_error(url: str) -> None:
    with pytest.raises(ConfigError, match="--url"):
        Remote.of(url)


def test_a_password_in_a_url_is_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError, match="--api-key-file") as caught:
        Remote.of("http://me:secret@host")
    assert "secret" not in str(caught.value)
    assert "secret" not in repr(Remote.of("http://host", "secret"))


def test_a_key_is_the_first_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_bytes(b"# of the team\n\n sk-1234 \nanother\n")
    assert read_key(file) == "sk-1234"
    for wrong in (b"", b"  \n", b"two words", "sch\u00f6n".encode(), b"\xff\xfe", b"a\x00b"):
        file.write_bytes(wrong)
        with pytest.raises(ConfigError, match="holds no key"):
            read_key(file)
    file.write_bytes(b"k" * 10**5)
    with pytest.raises(FileError):
        read_key(file)
    with pytest.raises(FileError, match="cannot read"):
        read_key(tmp_path / "none")


def test_json_is_read_with_the_key(stand_in: StandIn) -> None:
    stand_in.pages["POST /v1/predict"] = lambda asked: (200, {"got": asked})
    found = Remote.of(stand_in.url + "/v1", "sk-1").post("/v1/predict", {"model": "a"})
    assert (found.is_ok, found.value, found.told) == (True, {"got": {"model": "a"}}, "")
    assert 0 < found.seconds < 60
    assert stand_in.seen == [("POST /v1/predict", "Bearer sk-1")]
    Remote.of(stand_in.url).get("/health")
    assert stand_in.seen[-1] == ("GET /health", None)


def test_the_servers_own_message_is_told(stand_in: StandIn) -> None:
    error = {"error": {"message": "no model of this name", "type": "not_found_error", "code": None, "param": None}}
    stand_in.pages |= {"GET /a": (404, error), "GET /b": (500, b"<html>", {}), "GET /c": (200, b"<html>", {})}
    one = Remote.of(stand_in.url)
    assert one.get("/a").told == "status 404: no model of this name"
    assert one.get("/b").told == "status 500 and the answer is no JSON"
    assert not one.get("/c").is_ok
    assert one.get("/c").told == "and the answer is no JSON"


def test_a_redirect_is_not_followed(stand_in: StandIn) -> None:
    stand_in.pages["GET /health"] = (302, b"", {"Location": f"{stand_in.url}/elsewhere"})
    found = Remote.of(stand_in.url, "sk-1").get("/health")
    assert found.told == f"status 302 leads to {stand_in.url}/elsewhere, which is not followed"
    assert [page for page, _ in stand_in.seen] == ["GET /health"]


def test_an_answer_that_never_ends_is_given_up(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte now and then would keep a socket's own timeout from ever running out."""
    monkeypatch.setattr(remote, "SECONDS", 0.3)
    stand_in.pages["GET /slow"] = (200, b"x" * 10**6, {})
    stand_in.slow = "/slow"
    found = Remote.of(stand_in.url).get("/slow")
    assert (found.status, found.told) == (0, "no whole answer in 0.3 s")


def test_one_that_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "SECONDS", 0.2)
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.listen()
        found = Remote.of(f"http://127.0.0.1:{one.getsockname()[1]}").get("/health")
    assert (found.status, found.told) == (0, "no whole answer in 0.2 s")


def test_nobody_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    found = Remote.of(f"http://127.0.0.1:{port}").get("/health")
    assert (found.status, found.told) == (0, "no answer: Connection refused")


def test_an_answer_that_is_too_large_is_not_read(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "MOST_BYTES", 100)
    stand_in.pages["GET /large"] = (200, ["x" * 200])
    assert Remote.of(stand_in.url).get("/large").told == "an answer of more than 100 bytes"
    # What is too much is not waited for.
    monkeypatch.setattr(remote, "MOST_BYTES", 10)
    monkeypatch.setattr(remote, "SECONDS", 3)
    stand_in.pages["GET /large"] = (200, ["x" * 10**5])
    stand_in.slow = "/large"
    assert Remote.of(stand_in.url).get("/large").told == "an answer of more than 10 bytes"
