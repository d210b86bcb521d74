"""`ptuning serve`: prompts over HTTP, many of them on one model."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ptuning.cli import options, terminal
from ptuning.cli.inputs import load
from ptuning.cli.options import option
from ptuning.errors import ConfigError, FileError, PTuningError
from ptuning.serve import CACHE_MEMORY, DRAIN_SECONDS, HOST, PORT, QUEUE_ROWS

if TYPE_CHECKING:
    from ptuning.prompt.prompt import Prompt
    from ptuning.serve.engine.engine import Engine
    from ptuning.serve.http.service import Settings
    from ptuning.serve.registry import Registry

EXTRA = ("fastapi", "prometheus_client", "uvicorn")
SHOWN_FAILURES = 10
PROMPTS, ADDRESS, ACCESS, LOAD = "Prompts", "Address", "Access", "Load"


def serve(
    named: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME=FOLDER]...", help="Prompts outside of DIR, with their names.")
    ] = None,
    prompts: Annotated[
        Path | None, option("Folder of prompts; a prompt's name is its path in it.", PROMPTS, metavar="DIR")
    ] = None,
    host: Annotated[str, option("Address to listen at.", ADDRESS, metavar="H")] = HOST,
    port: Annotated[int, option("Port; 0 for any that is free.", ADDRESS, metavar="N", min=0, max=65535)] = PORT,
    api_key_file: Annotated[
        Path | None, option("Keys of users, one a line; without it, anybody may ask.", ACCESS, metavar="FILE")
    ] = None,
    admin_key_file: Annotated[
        Path | None, option("Keys of operators; without it, there are no routes for them.", ACCESS, metavar="FILE")
    ] = None,
    open_to_all: Annotated[
        bool, option("Listen at an address of the network without keys.", ACCESS, "--open-to-all")
    ] = False,
    queue_rows: Annotated[int, option("Rows that may wait; more are refused.", LOAD, metavar="N", min=1)] = QUEUE_ROWS,
    drain: Annotated[float, option("For running requests, at the end.", LOAD, metavar="SEC", min=0)] = DRAIN_SECONDS,
    cache_memory: Annotated[
        float, option("Share of the free memory for the prefix cache.", LOAD, metavar="SHARE", min=0, max=1)
    ] = CACHE_MEMORY,
    access_log: Annotated[
        Path | None, option("A line of JSON a request; without it, on the error stream.", ACCESS, metavar="FILE")
    ] = None,
    backbone: options.BackboneOption = None,
    dtype: options.DtypeOption = "auto",
    device: options.DeviceOption = "auto",
    model_arg: options.ModelArgOption = None,
) -> None:
    """Answer requests over HTTP with many prompts on one model, in OpenAI's API. The backbone is that of the prompts.
    Ctrl-C or SIGTERM ends it, once the running requests are answered. Without a terminal, SIGHUP makes it read the
    folder of prompts again.

    Example: ptuning serve --prompts runs
    """
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"serving needs {', '.join(missing)}; install them with: pip install 'ptuning[serve]'")
    choice = options.backbone_of(backbone, dtype, device, model_arg)
    pairs = options.pairs_of(named, "a prompt as", "capitals=runs/capitals")
    folders = {name: Path(folder) for name, folder in pairs.items()}
    if prompts is None and not folders:
        raise ConfigError("there is nothing to serve; give --prompts DIR, or prompts as NAME=FOLDER")
    from ptuning.prompt.predict import PromptModel
    from ptuning.serve.engine.engine import Engine
    from ptuning.serve.http.app import create_app
    from ptuning.serve.http.metrics import access_log as open_access_log
    from ptuning.serve.server import address_of, listen, run

    settings = _settings(api_key_file, admin_key_file, host, open_to_all=open_to_all)
    log = open_access_log(access_log)
    with listen(host, port) as listener:  # an error about it comes before the backbone is loaded
        loaded = load(choice, prompt=_first(prompts, [*folders.values()]))
        engine = Engine(PromptModel(loaded), queue_rows=queue_rows, cache_memory=cache_memory)
        engine.start()
        registry = registry_of(prompts, folders, engine)
        app = create_app(engine, registry, settings, log=log)
        count, address = len(registry.served), address_of(listener)
        ready = (
            f"{address} serves {count} prompt{'s' * (count != 1)} on {registry.base_name}; open it in a browser, or "
            f"ask {address}/v1/models{' with a key' if settings.keys is not None else ''}; Ctrl-C ends it"
        )
        run(
            app,
            listener,
            drain=drain,
            on_ready=lambda _: typer.echo(ready),
            on_hangup=lambda: _reload(registry),
        )


def registry_of(prompts: Path | None, named: Mapping[str, Path], engine: Engine) -> Registry:
    """Return the prompts in service, each checked against the backbone; print those that are left out."""
    from ptuning.serve.registry import Registry, base_name_of

    loaded = engine.model.backbone
    registry = Registry(
        prompts,
        named,
        base_name=base_name_of(loaded.name),
        check=lambda prompt: prompt.bind(loaded),  # in the caller's thread: the engine's may be in a long pass
    )
    _show_failures(registry.reload().failed)
    return registry


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
    """Return the first prompt that can be read and records its backbone."""
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
                prompt = Prompt.load(folder)
            except PTuningError:
                continue  # the registry reports it
            if prompt.backbone is not None:
                return prompt
    return None


def _reload(registry: Registry) -> None:
    """Read the folder of prompts again, and print what has changed."""
    try:
        done = registry.reload()
    except PTuningError as error:
        terminal.complain(str(error))
        return
    _show_failures(done.failed)
    changes = {"added": done.added, "changed": done.changed, "removed": done.removed}
    listed = [f"{change} {', '.join(names)}" for change, names in changes.items() if names]
    terminal.say(f"prompts read again: {'; '.join(listed) or 'nothing has changed'}")


def _show_failures(failed: Mapping[str, str]) -> None:
    for name, why in list(failed.items())[:SHOWN_FAILURES]:
        terminal.complain(f"the prompt '{name}' is left out: {why}")
    if len(failed) > SHOWN_FAILURES:
        terminal.complain(f"{len(failed) - SHOWN_FAILURES} more prompts are left out")
