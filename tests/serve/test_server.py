"""The service on real sockets: clients that are slow, go away or do not read, and its end by signals."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.loading import load_backbone
from ptuning.engine.decoding import Token
from ptuning.errors import ConfigError
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prediction import Candidate, Prediction
from ptuning.serve.engine.job import Job, Outcome, StoppedError
from ptuning.serve.http.app import create_app
from ptuning.serve.http.service import Settings
from ptuning.serve.server import address_of, is_local, listen, run
from tests.serve.http.conftest import Shelf, prompts_of

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and sockets of POSIX")
NO_REGISTRY: Any = SimpleNamespace(close=lambda: None)
WAIT = 20.0  # for something that happens at once, on a machine that is busy
ANSWER = Outcome(Prediction("an answer", (Candidate("an answer", -1.0),)))


@dataclass
class Held:
    """An engine that keeps jobs until a test says what becomes of them."""

    model: PromptModel
    queue_rows: int = 64
    is_alive: bool = True
    has_failed: bool = False
    status: object = None
    jobs: list[Job] = field(default_factory=list)
    on_job: Callable[[Job], None] = lambda _: None
    _closed: bool = False
    _left: threading.Event = field(default_factory=threading.Event)

    def submit(self, job: Job) -> None:
        if self._closed:
            raise StoppedError("the engine takes no more requests")
        self.jobs.append(job)
        self.on_job(job)

    def check_room(self) -> None:
        """There is room for all."""

    def answer(self, job: Job) -> None:
        for at in range(len(job.rows)):
            job.listener.ended(at, ANSWER)
        self._left.set()

    def drain(self, seconds: float) -> bool:
        self._closed = True
        return not self.jobs or self._left.wait(seconds)

    def stop(self) -> None:
        for job in [] if self._left.is_set() else self.jobs:
            for at in range(len(job.rows)):
                job.listener.ended(at, StoppedError("the engine was stopped"))
        self._left.set()


@dataclass
class Running:
    """A server in a thread of this process, and its engine."""

    engine: Held
    app: Any
    address: tuple[str, int]

    def connect(self) -> socket.socket:
        made = socket.create_connection(self.address, timeout=WAIT)
        made.settimeout(WAIT)
        return made

    def ask(self, body: dict[str, Any] | None = None, path: str = "/v1/completions") -> socket.socket:
        """Send a request, and return its connection."""
        made = self.connect()
        made.sendall(request_of(path, body))
        return made

    def job(self) -> Job:
        """Return the job of the request that was just sent."""
        found = waited(lambda: self.engine.jobs.pop() if self.engine.jobs else None)
        assert isinstance(found, Job)
        return found

    def is_well(self) -> bool:
        return self.status("/health") == 200

    def is_ready(self) -> bool:
        return self.status("/ready") == 200

    def status(self, path: str) -> int:
        with self.ask(path=path) as made:
            return status_of(read_all(made))


def request_of(path: str, body: dict[str, Any] | None = None) -> bytes:
    if body is None and path != "/v1/completions":
        return f"GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode()
    data = json.dumps({"model": "write", "prompt": "a", **(body or {})}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n%s" % (len(data), data)


def waited(look: Callable[[], Any]) -> Any:
    """Return what is there in the end."""
    end = time.monotonic() + WAIT
    while not (found := look()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)
    return found


def read_all(made: socket.socket) -> bytes:
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := made.recv(65536):
            parts.append(part)
    return b"".join(parts)


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer else 0


@pytest.fixture(scope="module")
def tiny(model_folder: Callable[[str], Path]) -> Backbone:
    return load_backbone(str(model_folder("gpt2")), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def server(tiny: Backbone) -> Iterator[Running]:
    """One server for all tests that need no signals."""
    engine: Any = Held(PromptModel(tiny))
    settings = Settings(body_seconds=0.3, body_bytes=10_000, keep_alive=0.05, pending_pieces=200)
    app = create_app(engine, Shelf.of(prompts_of(tiny)), settings)
    listener = listen("127.0.0.1", 0)
    ready: queue.Queue[Callable[[], None]] = queue.Queue()
    made = Running(engine, app, listener.getsockname())

    def work() -> None:
        run(app, engine, NO_REGISTRY, listener, drain=1, on_ready=ready.put)

    thread = threading.Thread(target=work)
    thread.start()
    end = ready.get(timeout=WAIT)
    yield made
    engine.jobs.clear()
    end()
    thread.join(WAIT)
    assert not thread.is_alive()


@pytest.mark.parametrize("body", [{}, {"stream": True}], ids=["whole", "stream"])
def test_a_client_that_goes_away_has_its_job_cancelled(server: Running, body: dict[str, Any]) -> None:
    """While its rows wait, in whichever form it is answered."""
    made = server.ask(body)
    job = server.job()
    assert not job.cancelled
    made.close()
    waited(lambda: job.cancelled)
    assert server.is_well()


def test_a_client_that_goes_away_in_a_stream_has_its_job_cancelled(server: Running) -> None:
    made = server.ask({"stream": True})
    job = server.job()
    job.listener.piece(0, "some text", [Token(5, "some text", -1.0)])
    found = b""
    while b"some text" not in found:
        found += made.recv(65536)
    assert not job.cancelled
    made.close()
    waited(lambda: job.cancelled)
    assert server.is_well()


def test_a_client_that_is_answered_has_nothing_cancelled(server: Running) -> None:
    with server.ask() as made:
        job = server.job()
        server.engine.answer(job)
        found = read_all(made)
    assert status_of(found) == 200
    assert b"an answer" in found
    assert not job.cancelled


def test_a_client_that_does_not_read_has_its_job_cancelled_and_others_are_unhurt(server: Running) -> None:
    """What waits for it is bounded: by the socket's buffer, and by the number of pieces."""
    made = server.ask({"stream": True})
    job = server.job()
    text = "x" * 100_000
    sent = 0
    end = time.monotonic() + WAIT
    while not job.cancelled:
        job.listener.piece(0, text, [])
        sent += 1
        time.sleep(0.01)
        assert time.monotonic() < end
    job.listener.ended(0, StoppedError("cancelled"))
    assert server.is_well()
    made.close()


def test_a_stream_that_is_quiet_says_that_it_lives(server: Running) -> None:
    with server.ask({"stream": True}) as made:
        job = server.job()
        found = b""
        while found.count(b": keep-alive\n\n") < 3:
            found += made.recv(65536)
        assert status_of(found) == 200
        server.engine.answer(job)
        found += read_all(made)
    assert b"an answer" in found
    assert b"data: [DONE]" in found


def test_a_slow_body_is_told_so(server: Running) -> None:
    with server.connect() as made:
        made.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 50\r\n\r\n{")
        assert server.is_well()
        found = read_all(made)
    assert status_of(found) == 408
    assert b"timeout" in found


def test_large_headers_and_bodies_are_refused(server: Running) -> None:
    with server.connect() as made:
        with contextlib.suppress(ConnectionError):
            made.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\nX-Large: " + b"x" * 100_000)
        assert status_of(read_all(made)) in (0, 400, 431)
    with server.connect() as made:
        made.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            for _ in range(100):
                made.sendall(b"400\r\n" + b" " * 1024 + b"\r\n")
        assert status_of(read_all(made)) in (0, 413)
    with server.connect() as made:
        made.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 20000\r\nConnection: close\r\n\r\n")
        made.sendall(b" " * 20_000)
        assert status_of(read_all(made)) == 413
    assert server.is_well()


def test_what_is_no_http_ends(server: Running) -> None:
    for begun in (
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n\r\n",
        b"hello\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost\r\n\r\n",
    ):
        with server.connect() as made:
            made.sendall(begun)
            assert status_of(read_all(made)) == 400
    assert server.is_well()


# ---------------------------------------------------------------------------------------------------- signals


@dataclass
class Forked:
    """A server in a process of its own: its id, and the ends of pipes from and to it."""

    child: int
    server: Running
    told: int
    tell: int

    def has_a_job(self) -> None:
        """Wait until it has the request that was just sent."""
        assert os.read(self.told, 1) == b"j"

    def answer(self) -> None:
        """Let it answer."""
        os.write(self.tell, b"!")

    def kill(self, number: int) -> None:
        os.kill(self.child, number)


@pytest.fixture
def forked(tiny: Backbone) -> Iterator[Callable[..., Forked]]:
    """Start servers in processes of their own, and see that none is left."""
    children: list[int] = []
    pipes: list[int] = []

    def start(*, drain: float, before: Callable[[Held], None] = lambda _: None) -> Forked:
        engine: Any = Held(PromptModel(tiny))
        app = create_app(engine, Shelf.of(prompts_of(tiny)))
        listener = listen("127.0.0.1", 0)
        reads, writes = os.pipe()
        asked, tell = os.pipe()
        pipes.extend((reads, writes, asked, tell))
        made = Running(engine, app, listener.getsockname())

        def told(_: object) -> None:
            os.write(writes, b"!")

        def answer(job: Job) -> None:
            os.read(asked, 1)
            engine.answer(job)

        def begun(job: Job) -> None:
            os.write(writes, b"j")
            threading.Thread(target=answer, args=[job], daemon=True).start()

        engine.on_job = begun
        child = os.fork()
        if not child:
            code = 1
            try:
                before(engine)
                run(app, engine, NO_REGISTRY, listener, drain=drain, on_ready=told)
                code = 0
            except StoppedError:
                code = 17
            finally:
                os._exit(code)
        children.append(child)
        listener.close()
        assert os.read(reads, 1) == b"!"
        return Forked(child, made, reads, tell)

    yield start
    for child in children:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    for end in pipes:
        os.close(end)


def ended(child: int) -> int:
    """Return the exit code of a process."""
    ends: list[int] = []

    def look() -> bool:
        found, code = os.waitpid(child, os.WNOHANG)
        ends.append(code)
        return found == child

    waited(look)
    return os.waitstatus_to_exitcode(ends[-1])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains(forked: Callable[..., Forked], number: int) -> None:
    """What runs is answered; the service says that it is not ready, takes no new request, and exits with 0."""
    found = forked(drain=20)
    server = found.server
    with server.ask() as made:
        found.has_a_job()
        found.kill(number)
        waited(lambda: not server.is_ready())
        assert server.is_well(), "it lives until its end"
        with server.ask() as other:
            late = read_all(other)
        assert status_of(late) == 503
        assert b"not_serving" in late
        found.answer()
        assert status_of(read_all(made)) == 200
    assert ended(found.child) == 0


def test_what_does_not_end_in_time_is_told_so(forked: Callable[..., Forked]) -> None:
    found = forked(drain=0.1)
    with found.server.ask() as made:
        found.has_a_job()
        found.kill(signal.SIGTERM)
        said = read_all(made)
    assert status_of(said) == 503
    assert ended(found.child) == 0


def test_a_second_signal_ends_it_at_once(forked: Callable[..., Forked]) -> None:
    found = forked(drain=60)
    with found.server.ask():
        found.has_a_job()
        found.kill(signal.SIGTERM)
        waited(lambda: not found.server.is_ready())  # two signals at once would be one
        found.kill(signal.SIGTERM)
        assert ended(found.child) == 128 + signal.SIGTERM


def test_an_engine_that_fails_ends_the_process(forked: Callable[..., Forked]) -> None:
    """Abuse case 14: what waits is told so, and whoever watches the process sees that it has ended, with an error."""

    def fail_later(engine: Held) -> None:
        threading.Timer(0.5, setattr, (engine, "has_failed", True)).start()
        threading.Timer(0.5, engine.stop).start()

    found = forked(drain=60, before=fail_later)
    with found.server.ask() as made:
        assert status_of(read_all(made)) == 503
    assert ended(found.child) == 17


def test_a_kill_leaves_nothing_behind(forked: Callable[..., Forked]) -> None:
    """Abuse case 13: clients are told by the end of their connections, and the port is free at once."""
    found = forked(drain=60)
    with found.server.ask() as made:
        found.has_a_job()
        found.kill(signal.SIGKILL)
        assert read_all(made) == b""
    assert ended(found.child) == -signal.SIGKILL
    with listen(*found.server.address) as again:
        again.listen()


def test_a_service_without_file_handles_answers_again_when_there_are_some(
    forked: Callable[..., Forked],
) -> None:
    """Abuse case 23: connections wait until others are closed."""

    def few(_: Held) -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 12, 4096))

    found = forked(drain=1, before=few)
    server = found.server
    made = [server.connect() for _ in range(30)]
    time.sleep(0.3)
    for one in made:
        one.close()
    waited(server.is_well)
    found.answer()
    with server.ask() as last:
        assert status_of(read_all(last)) == 200


# ---------------------------------------------------------------------------------------------------- addresses


def test_a_port_that_is_taken_is_one_error() -> None:
    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(ConfigError, match=r"port \d+: .*--port"):
            listen("127.0.0.1", taken.getsockname()[1])
        assert address_of(taken) == f"http://127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(ConfigError, match="--host"):
        listen("no such host", 0)


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
     ("192.168.1.5", False), ("example.org", False), ("127.0.0.1.example.org", False)],
)  # fmt: skip
def test_which_addresses_are_this_machines_alone(host: str, local: bool) -> None:
    assert is_local(host) is local
