"""Does a service stay flat? A mixed load for a long time, with the server's memory looked at all the while.

python -m benchmarks.soak --minutes 60
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import Json, Settings, parser, say, settings_of, write_json

if TYPE_CHECKING:
    import httpx2

    from benchmarks.service import Service

PROMPTS = 64
CLIENTS = 4
LOOK_SECONDS, SAY_SECONDS = 5.0, 300.0
# The first part fills what is kept (keys and values, compiled code, the allocator's pools), and is told apart.
WARM = 0.25
NEW_TEXTS = 100_000  # texts of one's own: no run is short of them
# Of the free memory, for kept keys and values: it is full after minutes, and what is kept must make room from then on.
CACHE_MEMORY = 0.004


@dataclass
class Watched:
    """What a run has seen: the server's resident set by the second, and requests by kind and status."""

    began: float = field(default_factory=time.monotonic)
    memory: list[tuple[float, int]] = field(default_factory=list)
    requests: Counter[str] = field(default_factory=Counter)

    def look(self, resident: int) -> None:
        """Note the resident set, in bytes."""
        self.memory.append((time.monotonic() - self.began, resident))


def trend(seen: Sequence[tuple[float, int]], *, warm: float = WARM) -> dict[str, float]:
    """Return how memory went behind the first part of a run.

    Returns:
        ``first_mb`` and ``last_mb``, medians of the first and the last quarter of what is behind the warm part,
        ``most_mb``, and ``mb_per_hour``, the median slope of all pairs (Theil and Sen), which few peaks do not move.
    """
    later = [(at, size / 1e6) for at, size in seen if at >= warm * seen[-1][0]]
    quarter = max(1, len(later) // 4)
    thin = later[:: max(1, len(later) // 400)]
    slopes = [(two - one) / (b - a) for i, (a, one) in enumerate(thin) for b, two in thin[i + 1 :] if b > a]
    return {
        "first_mb": statistics.median(size for _, size in later[:quarter]),
        "last_mb": statistics.median(size for _, size in later[-quarter:]),
        "most_mb": max(size for _, size in later),
        "mb_per_hour": 3600 * statistics.median(slopes) if slopes else 0.0,
    }


class Client:
    """Somebody who asks one thing after another, each drawn anew."""

    def __init__(self, server: Service, http: httpx2.Client, names: Sequence[str], texts: Sequence[str]) -> None:
        self._url, self._http, self._names, self._texts = server.ready(), http, names, texts
        self._folder = server.folder

    def ask(self, draw: random.Random) -> tuple[str, int]:
        """Send one request; return its kind and the status of its answer."""
        kinds: dict[str, Callable[[random.Random], int]] = {
            "labels": self._labels, "many prompts on a text": self._many, "written": self._written,
            "stream": self._stream, "stream left in the middle": self._left, "unknown prompt": self._unknown,
            "broken request": self._broken, "loaded and unloaded": self._loaded, "metrics": self._metrics,
        }  # fmt: skip
        (kind,) = draw.choices(list(kinds), weights=(30, 15, 20, 10, 5, 5, 5, 5, 5))
        return kind, kinds[kind](draw)

    def _text(self, draw: random.Random) -> str:
        words = [draw.choice(self._texts) for _ in range(draw.choice((1, 1, 8, 40)))]
        return f"{draw.randrange(NEW_TEXTS)} {' '.join(words)}" if draw.random() < 0.5 else " ".join(words)

    def _post(self, path: str, body: Mapping[str, Any]) -> int:
        return self._http.post(f"{self._url}{path}", json=body).status_code

    def _labels(self, draw: random.Random) -> int:
        rows = [self._text(draw) for _ in range(draw.randint(1, 8))]
        return self._post("/v1/predict", {"model": draw.choice(self._names), "records": rows})

    def _many(self, draw: random.Random) -> int:
        return self._post("/v1/predict", {"model": draw.sample(self._names, 8), "records": [self._text(draw)]})

    def _completion(self, draw: random.Random) -> dict[str, Any]:
        from benchmarks.service import WRITES

        return {"model": WRITES, "prompt": self._text(draw), "max_tokens": draw.choice((1, 8, 32))}

    def _written(self, draw: random.Random) -> int:
        return self._post("/v1/completions", {**self._completion(draw), "temperature": draw.choice((0, 1))})

    def _stream(self, draw: random.Random, pieces: int | None = None) -> int:
        body = {**self._completion(draw), "stream": True}
        with self._http.stream("POST", f"{self._url}/v1/completions", json=body) as answer:
            for at, _ in enumerate(answer.iter_lines()):
                if pieces is not None and at >= pieces:
                    break
            return int(answer.status_code)

    def _left(self, draw: random.Random) -> int:
        return self._stream(draw, pieces=2)

    def _unknown(self, draw: random.Random) -> int:
        return self._post("/v1/predict", {"model": f"nobody-{draw.randrange(NEW_TEXTS)}", "records": ["x"]})

    def _broken(self, draw: random.Random) -> int:
        return self._post("/v1/completions", {"model": draw.choice(self._names), "prompt": [["x"]], "max_tokens": -1})

    def _loaded(self, draw: random.Random) -> int:
        name = f"new-{draw.randrange(NEW_TEXTS)}"
        path = str(self._folder / draw.choice(self._names))
        status = self._post("/v1/prompts", {"name": name, "path": path})
        if status < 300:
            self._post("/v1/predict", {"model": name, "records": [self._text(draw)]})
            status = self._http.delete(f"{self._url}/v1/prompts/{name}").status_code
        return status

    def _metrics(self, _: random.Random) -> int:
        return self._http.get(f"{self._url}/metrics").status_code


def soak(server: Service, settings: Settings, seconds: float) -> Watched:
    """Ask from several threads for so many seconds, and look at the server's memory meanwhile."""
    import httpx2
    import psutil

    from benchmarks.service import ADMIN_KEY, name_of, texts

    server.ready()
    names, over = [name_of(number) for number in range(settings.pick(PROMPTS, 8))], threading.Event()
    watched, process = Watched(), psutil.Process(server.pid)

    def work(number: int) -> None:
        draw = random.Random(f"{settings.seed} {number}")
        with httpx2.Client(headers={"Authorization": f"Bearer {ADMIN_KEY}"}, timeout=300.0) as http:
            client = Client(server, http, names, texts())
            while not over.is_set():
                kind, status = client.ask(draw)
                watched.requests[f"{kind}: {status}"] += 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    said = 0.0
    while (spent := time.monotonic() - watched.began) < seconds and all(thread.is_alive() for thread in threads):
        watched.look(process.memory_info().rss)
        if spent >= said:
            say(f"  {spent / 60:.0f} min: {watched.memory[-1][1] / 1e6:.0f} MB, {watched.requests.total()} requests")
            said += SAY_SECONDS
        over.wait(min(LOOK_SECONDS, seconds / 100))
    over.set()
    for thread in threads:
        thread.join()
    return watched


def main(settings: Settings, minutes: float) -> int:
    """Soak a service, and write down what was seen.

    Returns:
        1 if a request was answered with a server error, 0 otherwise.
    """
    from benchmarks import service
    from benchmarks.material import backbone_of

    backbone = backbone_of(settings)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "prompts")
        made = service.prompts(backbone, service.LABELS, settings.pick(PROMPTS, 8), seed=settings.seed)
        (written,) = service.prompts(backbone, service.WRITTEN, 1, seed=settings.seed, labelled=False)
        service.write_prompts(folder, made)
        written.save(folder / service.WRITES)
        with service.serving(settings, folder, Path(place), f"--cache-memory={CACHE_MEMORY}") as server:
            watched = soak(server, settings, 60 * minutes)
    found: dict[str, Json] = {
        "minutes": minutes,
        "memory": trend(watched.memory),
        "requests": dict(sorted(watched.requests.items())),
        "seen": [[round(at, 1), size] for at, size in watched.memory],
    }
    write_json(settings.out / "soak.json", found)
    say(json.dumps({name: value for name, value in found.items() if name != "seen"}, indent=2))
    return int(any(int(name.rpartition(" ")[2]) >= 500 for name in watched.requests))


if __name__ == "__main__":
    given = parser(__doc__)
    given.add_argument("--minutes", type=float, default=60.0, help="how long (default: %(default)s)")
    chosen = given.parse_args()
    sys.exit(main(settings_of(chosen), chosen.minutes))
