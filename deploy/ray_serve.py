"""Replicas of the service on Ray Serve: ``serve run ray_serve:app``, in this folder, with PTUNING_PROMPTS, a folder,
and PTUNING_API_KEYS, a file, set.
"""

import os
from pathlib import Path

from fastapi import FastAPI
from ray import serve

from ptuning import PromptModel, load_backbone
from ptuning.serve.engine.engine import Engine
from ptuning.serve.http.app import create_app
from ptuning.serve.http.keys import Keys
from ptuning.serve.http.service import Settings
from ptuning.serve.registry import Registry, base_name_of


def build() -> FastAPI:
    """Return the app of one replica, with a model, an engine and prompts of its own."""
    model = PromptModel(load_backbone(os.environ.get("PTUNING_BACKBONE", "smollm2-135m")))
    engine = Engine(model, queue_rows=256)
    engine.start()
    registry = Registry(
        Path(os.environ["PTUNING_PROMPTS"]),
        base_name=base_name_of(model.backbone.name),
        check=lambda prompt: engine.call(lambda: prompt.bind(model.backbone)),
    )
    registry.reload()
    return create_app(engine, registry, Settings(keys=Keys.read(Path(os.environ["PTUNING_API_KEYS"]))))


# Neither serve.batch nor serve.multiplexed: the engine mixes the rows of all prompts itself, and each replica has all.
app = serve.deployment(num_replicas=2, max_ongoing_requests=256)(serve.ingress(build)()).bind()
