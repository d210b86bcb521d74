"""What the questions of the service have in common: the prompts, a real ``ptuning serve`` and loads on it."""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import load as loads
from benchmarks.common import ROOT, Settings, write_json
from benchmarks.material import CONTINENTS, every
from benchmarks.startup import folder_of
from ptuning.backbone.backbone import Backbone
from ptuning.prompt.prompt import Prompt

if TYPE_CHECKING:
    import httpx2

# Slots late, label words, rows of a dozen tokens whose texts are too short to be kept.
LABELS = "{x} is a country. Its continent is [P*6] [Y]"
WRITTEN = "{x} is a country. Its capital is [P*6] [Y]"
SLOTS = 6
WRITES = "capital"
ADMIN_KEY = "for-the-benchmark"
NEEDED = ("fastapi", "httpx2", "prometheus_client", "pydantic", "uvicorn")
MODELS_AT_ONCE = 128


def missing() -> str | None:
    """Return why there can be no service here, None if there can be one."""
    gone = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    return f"{', '.join(gone)} not installed; make bench installs it" if gone else None


def prompts(backbone: Backbone, template: str, count: int, *, seed: int, labelled: bool = True) -> list[Prompt]:
    """Return prompts of one template whose slots hold the embeddings of different tokens."""
    made = []
    for number in range(count):
        draw = random.Random(f"prompt {seed} {number}")
        ids = [draw.randrange(backbone.vocabulary) for _ in range(SLOTS)]
        prompt = Prompt.from_token_ids(template, ids, backbone)
        made.append(replace(prompt, label_words=CONTINENTS) if labelled else prompt)
    return made


def name_of(number: int) -> str:
    """Return the name of a prompt in the folder."""
    return f"p{number:04d}"


def write_prompts(folder: Path, made: Sequence[Prompt]) -> None:
    """Write prompts side by side."""
    for number, prompt in enumerate(made):
        prompt.save(folder / name_of(number))


def texts() -> list[str]:
    """Return what is asked about: the countries of the shipped facts."""
    return [record["x"] for record in every("continents")]


@contextmanager
def serving(settings: Settings, folder: Path, workplace: Path, *options: str) -> Iterator[Service]:
    """Start a server if there can be one here, and end it."""
    server = Service(settings, folder, workplace, options)
    if missing() is None:
        server.start()
    try:
        yield server
    finally:
        server.close()


class Service:
    """A real ``ptuning serve`` in a process of its own, with further ``options``; :meth:`ready` waits for it."""

    def __init__(self, settings: Settings, folder: Path, workplace: Path, options: Sequence[str] = ()) -> None:
        self._settings, self.folder, self._workplace = settings, folder, workplace
        self._url = ""
        self._options = options
        self._said = workplace / "service.log"
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start it, and do not wait."""
        settings, key = self._settings, self._workplace / "admin-keys"
        key.write_text(f"{ADMIN_KEY}\n", encoding="utf-8")
        command = [sys.executable, "-m", "ptuning", "serve", f"--prompts={self.folder}", "--port=0"]
        command += [f"--admin-key-file={key}", f"--backbone={folder_of(settings)}"]
        command += [f"--dtype={settings.dtype}", f"--device={settings.device}", *self._options]
        environment = dict(os.environ)
        if settings.threads is not None:
            environment["OMP_NUM_THREADS"] = str(settings.threads)
        with self._said.open("wb") as said:
            self._process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=said, text=True
            )

    @property
    def pid(self) -> int:
        """The process's id."""
        assert self._process is not None
        return self._process.pid

    def ready(self) -> str:
        """Return the address, once requests are taken."""
        assert self._process is not None
        assert self._process.stdout is not None
        if not self._url:
            line = self._process.stdout.readline()
            if not line.startswith("http"):
                raise SystemExit(f"serving, ptuning serve:\n{self._said.read_text(encoding='utf-8')}")
            self._url = line.split()[0]
        return self._url

    def close(self) -> None:
        """End it."""
        if self._process is None:
            return
        self._client.close()
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(60)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    @functools.cached_property
    def _client(self) -> httpx2.Client:
        """One for all requests: to make one takes as long as some answers."""
        import httpx2

        return httpx2.Client(headers={"Authorization": f"Bearer {ADMIN_KEY}"}, timeout=300.0)

    def material(self) -> loads.Material:
        """Return what loads ask."""
        count = self._settings.pick(512, 8)
        return loads.Material(self.ready(), tuple(name_of(number) for number in range(count)), tuple(texts()))

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Send one request, and return its answer."""
        found = self._client.post(f"{self.ready()}{path}", json=body)
        if not found.is_success:
            raise SystemExit(f"serving, POST {path}: {found.status_code} {found.text}")
        answer: dict[str, Any] = found.json()
        return answer

    def warm(self) -> None:
        """Ask each prompt once: what is done for a prompt at its first request is no part of any load."""
        material = self.material()
        for start in range(0, len(material.names), MODELS_AT_ONCE):
            names = list(material.names[start : start + MODELS_AT_ONCE])
            self.post("/v1/predict", {"model": names, "records": [material.texts[0]]})

    def run(self, load: loads.Load) -> loads.Run:
        """Send a load from a process of its own (of a smoke run from this one), and wait for its end."""
        if self._settings.smoke:
            return asyncio.run(loads.send(load, self.material()))
        with self.running(load) as found:
            pass
        return found[0]

    @contextmanager
    def running(self, load: loads.Load) -> Iterator[list[loads.Run]]:
        """Send a load while something else is done; what became of it is in the list behind the end."""
        given, out = self._workplace / "material.json", self._workplace / "load.json"
        write_json(given, asdict(self.material()))
        command = [sys.executable, "-m", "benchmarks.load", *loads.arguments(load, given, out)]
        found: list[loads.Run] = []
        with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
            yield found
            _, said = process.communicate()
        if process.returncode:
            raise SystemExit(f"serving, load:\n{said}")
        found.append(loads.Run.of(json.loads(out.read_text(encoding="utf-8"))))
