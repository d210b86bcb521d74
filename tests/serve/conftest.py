"""A service on a tiny model, called in process: on a real engine (``api``), or on a fake one (``fake_api``)."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.loading import load_backbone
from ptuning.data.task_files import load_task
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prediction import Candidate, Prediction
from ptuning.prompt.prompt import Prompt
from ptuning.serve.engine.engine import Engine, EngineStatus
from ptuning.serve.engine.job import Job, Outcome, QueueFullError, StoppedError, Usage
from ptuning.serve.http.app import create_app
from ptuning.serve.http.service import Service, Settings
from ptuning.serve.registry import Registry, Served
from tests.conftest import learned

BASE = "tiny"
LABELS = {"positive": ["great", "good"], "negative": ["terrible"]}
STATUS = EngineStatus(
    rows_waiting=3, rows_writing=2, rows_done=10, rows_failed=2, rows_cancelled=1, passes=5, tokens_read=100,
    tokens_written=20, cached_tokens=40, kept_texts=1, kept_bytes=4096,
)  # fmt: skip
ANSWER = Outcome(Prediction("an answer", (Candidate("an answer", -1.0),)), Usage(10, 2, 4), waited=0.5)


def prompts_of(backbone: Backbone) -> dict[str, Prompt]:
    """Prompts of all kinds: generated answers, labels, two fields, a renamed field, a task with choices."""
    mood = learned(backbone, "[P*2] {x} It was [Y]", seed=2)
    return {
        "write": replace(learned(backbone, "[P*3] about {x} [Y]", seed=1), target_tokens=6),
        "mood": replace(mood, label_words=Prompt.manual("{x} [Y]", label_words=LABELS).label_words),
        "pair": Prompt.manual("{x} in {z} is [Y]", label_words=LABELS),
        "renamed": replace(Prompt.manual("{x} is [Y]", label_words=LABELS), fields={"x": "country"}),
        "kept": Prompt.manual("the capital of France and Peru: {x!} is [Y]", label_words=LABELS),
        "choose": Prompt.manual("{premise} so [Y]", task=load_task("copa")),
    }


def registry_of(prompts: Mapping[str, Prompt]) -> Registry:
    """Return a registry of prompts that are on no disk."""
    registry = Registry(None, base_name=BASE, check=id)
    for name, prompt in prompts.items():
        registry._publish(name, Served(name, prompt, Path("/secret/place") / name, "ab" * 32, time.time()))
    return registry


@dataclass
class FakeEngine:
    """Keeps jobs; ``on_job`` decides what becomes of them."""

    model: Any
    on_job: Callable[[Job], None] = lambda job: None
    queue_rows: int = 64
    is_alive: bool = True
    is_full: bool = False
    has_failed: bool = False
    status: EngineStatus = STATUS
    jobs: list[Job] = field(default_factory=list)
    _closed: bool = False
    _answered: threading.Event = field(default_factory=threading.Event)

    def submit(self, job: Job) -> None:
        if self._closed:
            raise StoppedError("the engine takes no more requests")
        self.jobs.append(job)
        self.on_job(job)

    def check_room(self) -> None:
        if self.is_full:
            raise QueueFullError("the queue is full", retry_after=2)

    def answer(self, job: Job) -> None:
        job.is_begun = True
        for row in range(len(job.rows)):
            job.listener.ended(row, ANSWER)
        self._answered.set()

    def drain(self, seconds: float) -> bool:
        self._closed = True
        return not self.jobs or self._answered.wait(seconds)

    def stop(self) -> None:
        for job in [] if self._answered.is_set() else self.jobs:
            fails_with(StoppedError("the engine was stopped"))(job)
        self._answered.set()


def fails_with(error: Exception) -> Callable[[Job], None]:
    """Return a function that fails all rows of a job."""

    def fail(job: Job) -> None:
        for row in range(len(job.rows)):
            job.listener.ended(row, error)

    return fail


@dataclass
class Api:
    """A client, and the service that it calls."""

    client: TestClient
    service: Service
    prompts: dict[str, Prompt]

    @property
    def engine(self) -> Any:
        return self.service.engine

    @property
    def model(self) -> PromptModel:
        return self.service.engine.model

    def post(self, path: str, **body: Any) -> Any:
        return self.client.post(path, json=body)

    def predict(self, name: str, record: dict[str, str], **how: Any) -> Prediction:
        """Return what a prompt answers without the server."""
        return self.model.predict([record], self.prompts[name], **how)[0]


def api_of(engine: Any, prompts: dict[str, Prompt], settings: Settings | None = None, **named: Any) -> Api:
    """Return a client of a service on an engine."""
    app = create_app(engine, registry_of(prompts), settings, **named)
    return Api(TestClient(app), app.state.service, prompts)


@pytest.fixture(scope="session")
def tiny(model_folder: Callable[[str], Path]) -> Backbone:
    return load_backbone(str(model_folder("gpt2")), dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def api(tiny: Backbone) -> Iterator[Api]:
    """A service on a real engine; tests leave it as it is."""
    engine = Engine(PromptModel(tiny))
    engine.start()
    yield api_of(engine, prompts_of(tiny))
    engine.stop()


@pytest.fixture
def fake_api(tiny: Backbone) -> Callable[..., Api]:
    """Make services whose engine does with jobs what a test says."""

    def make(on_job: Callable[[Job], None] = lambda job: None, settings: Settings | None = None) -> Api:
        return api_of(FakeEngine(PromptModel(tiny), on_job), prompts_of(tiny), settings)

    return make
