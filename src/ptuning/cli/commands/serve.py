"""`ptuning serve`: prompts over HTTP, many of them on one model."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ptuning.cli import options, terminal
from ptuning.cli.inputs import load
from ptuning.errors import ConfigError, FileError, PTuningError
from ptuning.serve import CACHE_MEMORY, DRAIN_SECONDS, HOST, PORT, QUEUE_ROWS

if TYPE_CHECKING:
    from ptuning.prompt.prompt import Prompt
    from ptuning.serve.engine.engine import Engine
    from ptuning.serve.http.service import Settings
    from ptuning.serve.registry import Registry


EXTRA = ("fastapi", "prometheus_client", "uvicorn")
SHOWN_FAILURES = 10


@options.takes(backbone=options.backbone_options)
def serve(
    named: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME=FOLDER]...", help="Prompts outside of DIR, with their names.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of prompts; a prompt's name is its path in it.")
    ] = None,
    host: Annotated[str, typer.Option(metavar="H", help="Address to listen at.")] = HOST,
    port: Annotated[int, typer.Option(metavar="N", help="Port; 0 for any that is free.", min=0, max=65535)] = PORT,
    api_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keys of users, one a line; without it, anybody may ask.")
    ] = None,
    admin_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keys of operators; without it, there are no routes for them.")
    ] = None,
    open_to_all: Annotated[
        bool, typer.Option("--open-to-all", help="Listen at an address of the network without --api-key-file.")
    ] = False,
    queue_rows: Annotated[
        int, typer.Option(metavar="N", help="Rows that may wait; more are refused.", min=1)
    ] = QUEUE_ROWS,
    drain: Annotated[
        float, typer.Option(metavar="SEC", help="For running requests, at the end.", min=0)
    ] = DRAIN_SECONDS,
    cache_memory: Annotated[
        float, typer.Option(metavar="SHARE", help="Share of the free memory for the prefix cache.", min=0, max=1)
    ] = CACHE_MEMORY,
    access_log: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A line of JSON a request; without it, on the error stream.")
    ] = None,
    *,
    backbone: options.AskedBackbone,
) -> None:
    """Answer requests over HTTP with many prompts on one model, as OpenAI's clients ask. The backbone is that of the
    prompts. Ctrl-C or SIGTERM ends it, once the requests that run are answered. Without a terminal, SIGHUP has it read
    the folder of prompts again.

    Example: ptuning serve --prompts runs
    """
    _check_extra()
    folders = options.named_values(named or (), expected="NAME=FOLDER, such as capitals=runs/capitals")
    if prompts is None and not folders:
        raise ConfigError("there is nothing to serve; give --prompts DIR, or prompts as NAME=FOLDER")
    from ptuning.prompt.predict import PromptModel
    from ptuning.serve.engine.engine import Engine
    from ptuning.serve.http.app import create_app
    from ptuning.serve.http.metrics import Metrics
    from ptuning.serve.http.metrics import access_log as open_access_log
    from ptuning.serve.server import address_of, listen, run

    settings = _settings(api_key_file, admin_key_file, host, open_to_all=open_to_all)
    log = open_access_log(access_log)
    with listen(host, port) as listener:  # an error about it comes before the backbone is loaded
        loaded = load(backbone, prompt=_first(prompts, [Path(folder) for folder in folders.values()]))
        engine = Engine(PromptModel(loaded), queue_rows=queue_rows, cache_memory=cache_memory)
        engine.start()
        registry = _registry(prompts, folders, engine)
        metrics = Metrics(registry, status=lambda: engine.status, log=log)
        app = create_app(engine, registry, settings, metrics=metrics)
        ready = _ready(address_of(listener), registry, has_key=settings.keys is not None)
        reload = functools.partial(_reload, registry)
        run(app, engine, registry, listener, drain=drain, on_ready=lambda _: typer.echo(ready), on_hangup=reload)


def _registry(prompts: Path | None, named: Mapping[str, str], engine: Engine) -> Registry:
    """Return the prompts in service, each checked against the backbone; those that are left out are told."""
    from ptuning.serve.registry import Registry, base_name_of

    loaded = engine.model.backbone
    registry = Registry(
        prompts,
        {name: Path(one) for name, one in named.items()},
        base_name=base_name_of(loaded.name),
        check=lambda prompt: prompt.bind(loaded),  # in the caller's thread: the engine's may be in a long pass
    )
    _show_failures(registry.reload().failed)
    return registry


def _check_extra() -> None:
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"serving needs {', '.join(missing)}; install them with: pip install 'ptuning[serve]'")


def _settings(keys: Path | None, admin_keys: Path | None, host: str, *, open_to_all: bool) -> Settings:
    from ptuning.serve.http.keys import Keys
    from ptuning.serve.http.service import Settings
    from ptuning.serve.server import is_local

    local = is_local(host)
    if not local and keys is None and not open_to_all:
        raise ConfigError(
            f"--host {host} lets others in, and there are no keys; give --api-key-file FILE, or insist with "
            "--open-to-all"
        )
    names = frozenset({"localhost", "127.0.0.1", "::1", host.lower()})
    return Settings(
        keys=None if keys is None else Keys.read(keys),
        admin_keys=None if admin_keys is None else Keys.read(admin_keys),
        open_metrics=local,
        hosts=names if local and keys is None else None,
    )


def _first(prompts: Path | None, named: Sequence[Path]) -> Prompt | None:
    """Return the first prompt that can be read and says which backbone it belongs to."""
    with terminal.waiting("reading prompts"):
        from ptuning.prompt.prompt import Prompt
        from ptuning.serve.registry import prompts_in

        folders: Iterable[Path] = named
        if prompts is not None:
            if not prompts.is_dir():
                raise FileError(f"no such folder of prompts: {prompts}")
            folders = [*named, *prompts_in(prompts)]
        for folder in folders:
            try:
                found = Prompt.load(folder)
            except PTuningError:
                continue  # the registry tells what is wrong with it
            if found.backbone is not None:
                return found
    return None


def _reload(registry: Registry) -> None:
    """Read the folder of prompts again, and say what has changed."""
    try:
        done = registry.reload()
    except PTuningError as error:
        terminal.complain(str(error))
        return
    _show_failures(done.failed)
    told = {"added": done.added, "changed": done.changed, "removed": done.removed}
    listed = [f"{what} {', '.join(names)}" for what, names in told.items() if names]
    terminal.say(f"prompts read again: {'; '.join(listed) or 'nothing has changed'}")


def _show_failures(failed: Mapping[str, str]) -> None:
    for name, why in list(failed.items())[:SHOWN_FAILURES]:
        terminal.complain(f"the prompt '{name}' is left out: {why}")
    if len(failed) > SHOWN_FAILURES:
        terminal.complain(f"{len(failed) - SHOWN_FAILURES} more prompts are left out")


def _ready(address: str, registry: Registry, *, has_key: bool) -> str:
    count = len(registry.served)
    served = f"{count} prompt{'s' * (count != 1)} on {registry.base_name}"
    key = " with a key" if has_key else ""
    return f"{address} serves {served}; open it in a browser, or ask {address}/v1/models{key}; Ctrl-C ends it"
