"""Sends requests to a service at times that are fixed beforehand, whether or not earlier ones are answered (an open
loop), and notes when each is answered.

It runs in a process of its own, loads no torch, and says how much processor time it took itself.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import random
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from benchmarks.common import write_json

Choice = Literal["uniform", "zipf", "one"]
OK, REFUSED, NO_ANSWER = 200, 429, 0
MOST_SECONDS = 300.0  # until an answer
LENGTH = re.compile(rb"\r\ncontent-length: (\d+)\r\n")


@dataclass(frozen=True)
class Load:
    """What is sent: so many requests a second on average, at random times, for so many seconds.

    ``prompts`` of the material's are asked, chosen ``uniform``, by Zipf's law (the k-th as often as 1/k says) or always
    the first ``one``. The seed gives times, texts and prompts each a row of draws of its own: two loads that differ in
    their prompts alone send the same texts at the same times.
    """

    rate: float
    seconds: float
    prompts: int = 1
    choice: Choice = "uniform"
    seed: int = 0


@dataclass(frozen=True)
class Material:
    """Whom to ask what: a service's address, names of prompts, texts, and the longest answer where it is written."""

    url: str
    names: tuple[str, ...]
    texts: tuple[str, ...]
    route: Literal["/v1/predict", "/v1/completions"] = "/v1/predict"
    max_tokens: int = 8

    def body(self, prompt: int, text: int) -> dict[str, Any]:
        """Return a request of one record."""
        asked: dict[str, Any] = {"model": self.names[prompt]}
        if self.route == "/v1/predict":
            return {**asked, "records": [self.texts[text]]}
        return {**asked, "prompt": self.texts[text], "max_tokens": self.max_tokens}


@dataclass(frozen=True)
class Arrival:
    """A request: when it is sent, in seconds from the start, and what it asks, by places in the material."""

    at: float
    prompt: int
    text: int


@dataclass(frozen=True)
class Sent:
    """A request that was answered: ``latency`` counts from when it was due (``scheduled``), not from when it left.
    ``status`` is HTTP's, 0 if there was no answer.
    """

    scheduled: float
    latency: float
    status: int

    @property
    def ended(self) -> float:
        """When it was answered, in seconds from the start."""
        return self.scheduled + self.latency


@dataclass(frozen=True)
class Run:
    """What became of a load. ``late`` is how long after its time a request left at worst; ``cpu_seconds`` is what the
    sender took itself, of ``wall_seconds``.
    """

    requests: tuple[Sent, ...]
    late: float
    cpu_seconds: float
    wall_seconds: float

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Run:
        """Read what a sender has written."""
        return cls(**{**found, "requests": tuple(Sent(**one) for one in found["requests"])})

    def of_status(self, status: int) -> list[Sent]:
        """Return the requests that were answered with a status."""
        return [one for one in self.requests if one.status == status]

    def per_second(self, until: float = math.inf) -> float:
        """Return the rate of good answers up to the last one that came before ``until``, from the start on.

        It ends with an answer since a service gives them in groups, a pass each: a window that cuts a group in two
        would count too few or too many.
        """
        ends = sorted(one.ended for one in self.of_status(OK))
        counted = [end for end in ends if end <= until] or ends
        return len(counted) / counted[-1] if counted else 0.0

    def latency(self, share: float, status: int = OK) -> float | None:
        """Return the latency that a share of the answers keeps within (nearest rank); None if there are none."""
        found = sorted(one.latency for one in self.of_status(status))
        return found[math.ceil(share * len(found)) - 1] if found else None


def plan(load: Load, texts: int) -> list[Arrival]:
    """Return the requests of a load in the order of their times."""
    times, chosen, read = (random.Random(f"{what} {load.seed}") for what in ("times", "prompts", "texts"))
    count = 1 if load.choice == "one" else load.prompts
    weights = list(itertools.accumulate(1 / (rank + 1) if load.choice == "zipf" else 1.0 for rank in range(count)))
    found: list[Arrival] = []
    at = times.expovariate(load.rate)
    while at < load.seconds or not found:
        (prompt,) = chosen.choices(range(count), cum_weights=weights)
        found.append(Arrival(at, prompt, read.randrange(texts)))
        at += times.expovariate(load.rate)
    return found


class Sender:
    """Posts to one address over connections that it keeps, with no more than HTTP needs: what the sender takes of the
    machine is missing there, and a whole client takes more than the service does to refuse a request.
    """

    def __init__(self, url: str, route: str) -> None:
        where = urlsplit(url)
        self._host, self._port = where.hostname or "", where.port or 80
        self._head = f"POST {route} HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: application/json\r\n".encode()
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def post(self, body: bytes) -> int:
        """Send a request, and return its status; :data:`NO_ANSWER` if there is none."""
        try:
            reader, writer = await self._connection()
        except OSError:
            return NO_ANSWER
        try:
            writer.write(b"%bContent-Length: %d\r\n\r\n%b" % (self._head, len(body), body))
            head = await asyncio.wait_for(_answer(reader), MOST_SECONDS)
        except (OSError, EOFError, IndexError, asyncio.LimitOverrunError, asyncio.TimeoutError):
            writer.close()
            return NO_ANSWER
        if b"\r\nconnection: close" in head:
            writer.close()
        else:
            self._idle.append((reader, writer))
        return int(head.split(None, 2)[1])

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while self._idle:
            reader, writer = self._idle.pop()
            if not reader.at_eof():
                return reader, writer
            writer.close()
        return await asyncio.open_connection(self._host, self._port)

    def close(self) -> None:
        """Close the connections."""
        for _, writer in self._idle:
            writer.close()


async def _answer(reader: asyncio.StreamReader) -> bytes:
    """Read an answer, and return its head."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    await reader.readexactly(int(LENGTH.findall(head)[0]))
    return head


async def send(load: Load, material: Material) -> Run:
    """Send a load, and wait for all answers."""
    arrivals = plan(load, len(material.texts))
    # Bodies are made beforehand: what the sender does meanwhile, the service has to wait for.
    bodies = [json.dumps(material.body(one.prompt, one.text)).encode() for one in arrivals]
    late = 0.0
    sender = Sender(material.url, material.route)
    began, cpu = time.perf_counter(), time.process_time()

    async def one(arrival: Arrival, body: bytes) -> Sent:
        nonlocal late
        late = max(late, time.perf_counter() - began - arrival.at)
        status = await sender.post(body)
        return Sent(arrival.at, time.perf_counter() - began - arrival.at, status)

    tasks = []
    for arrival, body in zip(arrivals, bodies, strict=True):
        await asyncio.sleep(max(0.0, began + arrival.at - time.perf_counter()))
        tasks.append(asyncio.create_task(one(arrival, body)))
    found = await asyncio.gather(*tasks)
    sender.close()
    return Run(tuple(found), late, time.process_time() - cpu, time.perf_counter() - began)


def write(path: Path, run: Run) -> None:
    """Write what became of a load."""
    write_json(path, asdict(run))


def arguments(load: Load, material: Path, out: Path) -> list[str]:
    """Return the command line that sends a load."""
    return [f"--{name}={value}" for name, value in {**asdict(load), "material": material, "out": out}.items()]


def main(given: Sequence[str] | None = None) -> None:
    """Send one load."""
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    options.add_argument("--material", type=Path, required=True, help="JSON of Material")
    options.add_argument("--out", type=Path, required=True, help="JSON file to write")
    options.add_argument("--rate", type=float, required=True, help="requests a second")
    options.add_argument("--seconds", type=float, required=True)
    options.add_argument("--prompts", type=int, default=1)
    options.add_argument("--choice", choices=("uniform", "zipf", "one"), default="uniform")
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args(given)
    load = Load(chosen.rate, chosen.seconds, chosen.prompts, chosen.choice, chosen.seed)
    material = Material(**json.loads(chosen.material.read_text(encoding="utf-8")))
    write(chosen.out, asyncio.run(send(load, material)))


if __name__ == "__main__":
    main()
