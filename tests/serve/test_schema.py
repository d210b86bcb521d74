"""Requests generated from /openapi.json: none is a fault of the server, and every status is documented."""

import contextlib
import sys
from pathlib import Path
from typing import Any
from unittest import SkipTest

import pytest

if sys.version_info < (3, 11):
    pytest.skip("schemathesis is for Python 3.11 and later", allow_module_level=True)

import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import load_all_checks, not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import content_type_conformance, status_code_conformance

from ptuning.backbone.backbone import Backbone
from ptuning.prompt.predict import PromptModel
from ptuning.serve.engine.engine import Engine
from ptuning.serve.http.app import create_app
from ptuning.serve.http.keys import Keys
from ptuning.serve.http.service import Settings
from ptuning.serve.registry import Registry
from tests.serve.conftest import prompts_of

EXAMPLES = 2
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance]


@pytest.fixture(scope="module")
def app(tiny: Backbone, tmp_path_factory: pytest.TempPathFactory):
    folder: Path = tmp_path_factory.mktemp("prompts")
    for name, prompt in prompts_of(tiny).items():
        prompt.save(folder / name)
    engine = Engine(PromptModel(tiny))
    engine.start()
    registry = Registry(folder, base_name="tiny", check=lambda prompt: engine.call(lambda: prompt.bind(tiny)))
    registry.reload()
    yield create_app(engine, registry, Settings(admin_keys=Keys("sk-admin")))
    engine.stop()


def test_generated_requests(app) -> None:
    """Whatever fits the schema, and much that does not: no 5xx, and only documented statuses and types."""
    load_all_checks()
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    operations = [operation.ok() for operation in schema.get_all_operations()]
    assert len(operations) >= 18
    for operation in operations:
        for mode in GenerationMode:

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
            def ask(case: Any) -> None:
                case.call_and_validate(headers={"Authorization": "Bearer sk-admin"}, checks=CHECKS)

            with contextlib.suppress(Unsatisfiable, SkipTest):  # an address without parameters has no wrong ones
                ask()
