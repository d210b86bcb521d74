"""The service on real sockets: clients that are slow, go away or do not read, and its end by signals."""

import contextlib
import json
import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from ptuning.backbone.backbone import Backbone
from ptuning.engine.decoding import Token
from ptuning.errors import ConfigError
from ptuning.prompt.predict import PromptModel
from ptuning.serve.engine.job import Job, StoppedError
from ptuning.serve.http.app import create_app
from ptuning.serve.http.service import Settings
from ptuning.serve.server import address_of, is_local, listen, run
from tests.serve.conftest import FakeEngine, prompts_of, registry_of

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and sockets of POSIX")
CHUNK = b"400\r\n" + b" " * 1024 + b"\r\n"
WAIT = 20.0  # for something that happens at once, on a machine that is busy


@dataclass
class Running:
    """A server, its engine, and its address."""

    engine: FakeEngine
    address: tuple[str, int]

    def send(self, data: bytes) -> socket.socket:
        """Send bytes on a new connection, and return it."""
        connection = socket.create_connection(self.address, timeout=WAIT)
        connection.settimeout(WAIT)
        connection.sendall(data)
        return connection

    def ask(self, **body: Any) -> socket.socket:
        data = json.dumps({"model": "write", "prompt": "a", **body}).encode()
        return self.send(head_of("POST /v1/completions", f"Content-Length: {len(data)}") + data)

    def job(self) -> Job:
        """Return the job of the request that was just sent."""
        job = wait_for(lambda: self.engine.jobs.pop() if self.engine.jobs else None)
        assert isinstance(job, Job)
        return job

    def status(self, path: str) -> int:
        with self.send(head_of(f"GET {path}")) as connection:
            return status_of(read_all(connection))


def head_of(route: str, *headers: str) -> bytes:
    lines = (f"{route} HTTP/1.1", "Host: a", "Content-Type: application/json", "Connection: close", *headers, "", "")
    return "\r\n".join(lines).encode()


def wait_for(look: Callable[[], Any]) -> Any:
    """Return what is there in the end."""
    end = time.monotonic() + WAIT
    while not (value := look()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)
    return value


def read_all(connection: socket.socket) -> bytes:
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


def read_until(connection: socket.socket, text: bytes, *, times: int = 1) -> bytes:
    data = b""
    while data.count(text) < times:
        data += connection.recv(65536)
    return data


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer else 0


@pytest.fixture(scope="module")
def server(tiny: Backbone) -> Iterator[Running]:
    """One server for all tests that need no signals."""
    engine: Any = FakeEngine(PromptModel(tiny))
    settings = Settings(body_seconds=0.3, body_bytes=10_000, keep_alive=0.05, pending_pieces=200)
    app = create_app(engine, registry_of(prompts_of(tiny)), settings)
    listener = listen("127.0.0.1", 0)
    ready: queue.Queue[Callable[[], None]] = queue.Queue()
    named: dict[str, Any] = {"drain": 1, "on_ready": ready.put}
    thread = threading.Thread(target=run, args=(app, listener), kwargs=named)
    thread.start()
    end = ready.get(timeout=WAIT)
    yield Running(engine, listener.getsockname())
    engine.jobs.clear()
    end()
    thread.join(WAIT)
    assert not thread.is_alive()


@pytest.mark.parametrize("state", ["whole", "stream", "begun stream"])
def test_a_client_that_goes_away_has_its_job_cancelled(server: Running, state: str) -> None:
    connection = server.ask(stream=state != "whole")
    job = server.job()
    if state == "begun stream":
        job.listener.piece(0, "some text", [Token(5, "some text", -1.0)])
        read_until(connection, b"some text")
    assert not job.cancelled
    connection.close()
    wait_for(lambda: job.cancelled)
    assert server.status("/health") == 200


def test_a_client_that_does_not_read_has_its_job_cancelled(server: Running) -> None:
    """Unread data is bounded: by the socket's buffer, and by the number of pieces."""
    connection = server.ask(stream=True)
    job = server.job()

    def write() -> bool:
        job.listener.piece(0, "x" * 100_000, [])
        return job.cancelled

    wait_for(write)
    job.listener.ended(0, StoppedError("cancelled"))
    assert server.status("/health") == 200
    connection.close()


def test_a_quiet_stream_sends_comments(server: Running) -> None:
    with server.ask(stream=True) as connection:
        job = server.job()
        answer = read_until(connection, b": keep-alive\n\n", times=3)
        server.engine.answer(job)
        answer += read_all(connection)
    assert status_of(answer) == 200
    assert b"an answer" in answer
    assert answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert not job.cancelled


@pytest.mark.parametrize(
    ("data", "statuses"),
    [
        (head_of("POST /v1/completions", "Content-Length: 50") + b"{", {408}),  # and nothing more
        (head_of("GET /health", "X-Large: " + "x" * 100_000)[:-4], {0, 400, 431}),
        (head_of("POST /v1/completions", "Transfer-Encoding: chunked") + CHUNK * 100, {0, 413}),
        (head_of("POST /v1/completions", "Content-Length: 20000") + b" " * 20_000, {413}),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n\r\n", {400}),
        (b"hello\r\n\r\n", {400}),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost\r\n\r\n", {400}),
    ],
    ids=["slow", "large headers", "large chunks", "large body", "TLS", "text", "header without a value"],
)
def test_a_request_that_breaks_a_limit_is_refused(server: Running, data: bytes, statuses: set[int]) -> None:
    with contextlib.suppress(ConnectionError), server.send(data) as connection:
        assert status_of(read_all(connection)) in statuses
    assert server.status("/health") == 200


# Signals


@dataclass
class Forked(Running):
    """A server in a process of its own: its id, and the ends of pipes from and to it."""

    child: int
    events: int
    commands: int

    def wait_for_job(self) -> None:
        assert os.read(self.events, 1) == b"j"

    def answer(self) -> None:
        os.write(self.commands, b"!")

    def kill(self, number: int) -> None:
        os.kill(self.child, number)

    def exit_code(self) -> int:
        ends: list[int] = []

        def look() -> bool:
            child, code = os.waitpid(self.child, os.WNOHANG)
            ends.append(code)
            return child == self.child

        wait_for(look)
        return os.waitstatus_to_exitcode(ends[-1])


@pytest.fixture
def forked(tiny: Backbone) -> Iterator[Callable[..., Forked]]:
    """Start servers in processes of their own, and see that none is left."""
    children: list[int] = []
    pipes: list[int] = []

    def start(*, drain: float, before: Callable[[FakeEngine], None] = lambda _: None) -> Forked:
        engine: Any = FakeEngine(PromptModel(tiny))
        app = create_app(engine, registry_of(prompts_of(tiny)))
        listener = listen("127.0.0.1", 0)
        events, to_parent = os.pipe()
        from_parent, commands = os.pipe()
        pipes.extend((events, to_parent, from_parent, commands))

        def answer(job: Job) -> None:
            os.read(from_parent, 1)
            engine.answer(job)

        def on_job(job: Job) -> None:
            os.write(to_parent, b"j")
            threading.Thread(target=answer, args=[job], daemon=True).start()

        engine.on_job = on_job
        address = listener.getsockname()
        child = os.fork()
        if not child:
            code = 1
            try:
                before(engine)
                run(app, listener, drain=drain, on_ready=lambda _: os.write(to_parent, b"!"))
                code = 0
            except StoppedError:
                code = 17
            finally:
                os._exit(code)
        children.append(child)
        listener.close()
        assert os.read(events, 1) == b"!"
        return Forked(engine, address, child, events, commands)

    yield start
    for child in children:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    for end in pipes:
        os.close(end)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains(forked: Callable[..., Forked], number: int) -> None:
    """Running requests are answered, new ones are refused, ``/ready`` is 503, and the exit code is 0."""
    server = forked(drain=20)
    with server.ask() as connection:
        server.wait_for_job()
        server.kill(number)
        wait_for(lambda: server.status("/ready") == 503)
        assert server.status("/health") == 200
        with server.ask() as other:
            late = read_all(other)
        assert status_of(late) == 503
        assert b"not_serving" in late
        server.answer()
        assert status_of(read_all(connection)) == 200
    assert server.exit_code() == 0


def test_a_request_that_does_not_end_in_time_is_refused(forked: Callable[..., Forked]) -> None:
    server = forked(drain=0.1)
    with server.ask() as connection:
        server.wait_for_job()
        server.kill(signal.SIGTERM)
        assert status_of(read_all(connection)) == 503
    assert server.exit_code() == 0


def test_a_second_signal_ends_it_at_once(forked: Callable[..., Forked]) -> None:
    server = forked(drain=60)
    with server.ask():
        server.wait_for_job()
        server.kill(signal.SIGTERM)
        wait_for(lambda: server.status("/ready") == 503)  # two signals at once would be one
        server.kill(signal.SIGTERM)
        assert server.exit_code() == 128 + signal.SIGTERM


def test_an_engine_that_fails_ends_the_process(forked: Callable[..., Forked]) -> None:
    """Abuse case 14: waiting requests get an error, and the process ends with one."""

    def fail_at_a_job(engine: FakeEngine) -> None:
        def fail(_: Job) -> None:
            engine.has_failed = True
            engine.stop()

        engine.on_job = fail

    server = forked(drain=60, before=fail_at_a_job)
    with server.ask() as connection:
        assert status_of(read_all(connection)) == 503
    assert server.exit_code() == 17


def test_a_kill_leaves_nothing_behind(forked: Callable[..., Forked]) -> None:
    """Abuse case 13: connections end, and the port is free at once."""
    server = forked(drain=60)
    with server.ask() as connection:
        server.wait_for_job()
        server.kill(signal.SIGKILL)
        assert read_all(connection) == b""
    assert server.exit_code() == -signal.SIGKILL
    with listen(*server.address) as again:
        again.listen()


def test_a_service_without_file_handles_answers_again_when_there_are_some(forked: Callable[..., Forked]) -> None:
    """Abuse case 23: connections wait until others are closed."""

    def few(_: FakeEngine) -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 12, 4096))

    server = forked(drain=1, before=few)
    connections = [server.send(b"") for _ in range(30)]
    with server.send(head_of("GET /health")) as last:
        last.settimeout(0.3)
        with pytest.raises(TimeoutError):
            last.recv(1)
        for connection in connections:
            connection.close()
        last.settimeout(WAIT)
        assert status_of(read_all(last)) == 200


# Addresses


def test_a_port_that_is_taken_is_one_error() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"{port}.*another port"):
            listen("127.0.0.1", port)
        assert address_of(taken) == f"http://127.0.0.1:{port}"
    with pytest.raises(ConfigError, match="address to listen at"):
        listen("no such host", 0)


def test_local_addresses() -> None:
    hosts = ("127.0.0.1", "127.1.2.3", "::1", "localhost", "0.0.0.0", "::", "192.168.1.5", "127.0.0.1.example.org")
    assert [is_local(host) for host in hosts] == [True] * 4 + [False] * 4
