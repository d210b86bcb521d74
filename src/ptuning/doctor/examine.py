"""All checks in their order: what was asked for is looked at, and the backbone is loaded once."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

from ptuning.backbone import sources
from ptuning.backbone.backbone import Backbone
from ptuning.backbone.sources import LoadOptions
from ptuning.doctor import model
from ptuning.doctor.checks import Check, Working
from ptuning.doctor.machine import check_machine, check_port
from ptuning.doctor.packages import check_extras, check_versions
from ptuning.doctor.prompts import ReadPrompt, check_exports, check_fit, read_prompts
from ptuning.doctor.remote import Remote
from ptuning.doctor.server import check_server


@dataclass(frozen=True)
class Examination:
    """What is looked at, besides this machine: prompts by their folders, a backbone (that of the first prompt, or the
    default, if none is named) and how it is loaded, a server, and a port that one could listen on.
    """

    prompts: Sequence[str] = ()
    backbone: str | None = None
    options: LoadOptions = field(default_factory=LoadOptions)
    server: Remote | None = None
    port: int = 8000


def examine(asked: Examination, working: Working | None = None) -> Iterator[Check]:
    """Yield all checks, each as soon as it is made. ``working`` shows what is waited for.

    Nothing that is wrong ends it; a ConfigError if a prompt is asked for that has no files.
    """
    show = working or _silent
    prompts = read_prompts(asked.prompts)
    yield from check_versions()
    with show("measuring number formats"):
        machine = check_machine()
    yield from machine
    yield from check_extras()
    backbone = yield from _backbone(asked, prompts, show)
    for one in prompts:
        yield from one.checks
        if backbone is not None:
            with show(f"looking at {one.name}"):
                fit = list(check_fit(one, backbone))
            yield from fit
        yield from check_exports(one)
    yield check_port(asked.port, is_served=asked.server is not None)
    if asked.server is not None:
        checks = check_server(asked.server, prompts, backbone)
        while True:
            with show("asking the server"):
                check = next(checks, None)
            if check is None:
                return
            yield check


def _backbone(
    asked: Examination, prompts: Sequence[ReadPrompt], show: Working
) -> Generator[Check, None, Backbone | None]:
    """Find and load the backbone that is named, else the first prompt's own, else the default; yield what was seen."""
    own = next((one.prompt.backbone for one in prompts if one.prompt is not None and one.prompt.backbone), None)
    name, options = asked.backbone, asked.options
    if name is None and own is not None:
        name, options = own.name, replace(options, revision=options.revision or own.revision)
    with show("looking for the backbone"):
        found = model.find(name or sources.BACKBONE, options, is_asked=name is not None)
    yield found
    if found.status != "ok":
        return None
    with show(f"loading {name or sources.BACKBONE}"):
        backbone, checks = model.load(name or sources.BACKBONE, options)
    yield from checks
    return backbone


def _silent(_: str) -> AbstractContextManager[None]:
    return nullcontext()
