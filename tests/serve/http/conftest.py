"""A service on a tiny model, asked in process."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.loading import load_backbone
from ptuning.data.task_files import load_task
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prompt import Prompt
from ptuning.serve.engine.engine import Engine
from ptuning.serve.engine.job import Job, QueueFullError
from ptuning.serve.http.app import create_app
from ptuning.serve.http.metrics import Metrics, RequestStats
from ptuning.serve.http.service import Service, Settings
from ptuning.serve.registry import Served, UnknownPromptError
from tests.conftest import learned

BASE = "tiny"
LABELS = {"positive": ["great", "good"], "negative": ["terrible"]}


def prompts_of(backbone: Backbone) -> dict[str, Prompt]:
    """Prompts of all kinds: written answers, labels, two fields, a task, a task with choices."""
    open_one = dataclasses.replace(learned(backbone, "[P*3] about {x} [Y]", seed=1), target_tokens=6)
    mood = learned(backbone, "[P*2] {x} It was [Y]", seed=2)
    return {
        "write": open_one,
        "mood": dataclasses.replace(mood, label_words=Prompt.manual("{x} [Y]", label_words=LABELS).label_words),
        "pair": Prompt.manual("{x} in {z} is [Y]", label_words=LABELS),
        "renamed": dataclasses.replace(Prompt.manual("{x} is [Y]", label_words=LABELS), fields={"x": "country"}),
        "kept": Prompt.manual("the capital of France and Peru: {x!} is [Y]", label_words=LABELS),
        "choose": Prompt.manual("{premise} so [Y]", task=load_task("copa")),
    }


@dataclass
class Shelf:
    """Prompts by name, as the registry has them."""

    served: dict[str, Any]
    base_name: str = BASE
    failures: dict[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, prompts: dict[str, Prompt]) -> Any:
        return cls(
            {
                name: Served(name, prompt, Path("/secret/place") / name, "ab" * 32, time.time())
                for name, prompt in prompts.items()
            }
        )

    def get(self, name: str) -> Any:
        if name not in self.served:
            raise UnknownPromptError(f"there is no prompt '{name}' here")
        return self.served[name]


class NotedMetrics(Metrics):
    """Notes the requests that are done."""

    def __init__(self, shelf: Any) -> None:
        super().__init__(shelf, status=lambda: None)
        self.requests: list[tuple[str, list[str], int]] = []

    def end(self, stats: RequestStats, *, route: str) -> None:
        super().end(stats, route=route)
        self.requests.append((route, [*stats.usage], stats.status))


class Stub:
    """Stands for the engine where a test decides what becomes of jobs."""

    def __init__(self, model: PromptModel, take: Callable[[Job], None], queue_rows: int = 64) -> None:
        self.model, self.take, self.queue_rows, self.is_alive = model, take, queue_rows, True
        self.is_full = False
        self.status = None

    def submit(self, job: Job) -> None:
        self.take(job)

    def check_room(self) -> None:
        if self.is_full:
            raise QueueFullError("the queue is full", retry_after=2)


@dataclass
class Asked:
    """A client and what stands behind it."""

    client: TestClient
    service: Service
    watch: NotedMetrics
    prompts: dict[str, Prompt]
    model: PromptModel

    def post(self, path: str, **body: Any) -> Any:
        return self.client.post(path, json=body)


def served(engine: Any, prompts: dict[str, Prompt], settings: Settings | None = None) -> Asked:
    """Return a client of a service on an engine."""
    shelf = Shelf.of(prompts)
    watch = NotedMetrics(shelf)
    app = create_app(engine, shelf, settings, metrics=watch)
    return Asked(TestClient(app), app.state.service, watch, prompts, engine.model)


@pytest.fixture(scope="session")
def tiny(model_folder: Callable[[str], Path]) -> Backbone:
    return load_backbone(str(model_folder("gpt2")), dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def engine(tiny: Backbone) -> Iterator[Engine]:
    made = Engine(PromptModel(tiny))
    made.start()
    yield made
    made.stop()


@pytest.fixture
def asked(engine: Engine, tiny: Backbone) -> Asked:
    """A service on a real engine."""
    return served(engine, prompts_of(tiny))


@pytest.fixture
def stubbed(tiny: Backbone) -> Callable[..., Asked]:
    """Make services whose engine does with jobs what a test says."""

    def make(take: Callable[[Job], None], settings: Settings | None = None, **named: Any) -> Asked:
        return served(Stub(PromptModel(tiny), take, **named), prompts_of(tiny), settings)

    return make
