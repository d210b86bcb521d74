"""`ptuning doctor`: say whether everything is in order, and what to do where it is not."""

from __future__ import annotations

import itertools
import textwrap
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from ptuning.cli import options, terminal

if TYPE_CHECKING:
    from ptuning.doctor.checks import Check
    from ptuning.files import Json

STYLES = {"ok": "green", "warning": "yellow", "failed": "bold red"}
STATUS_WIDTH, NAME_WIDTH = 7, 16
# The groups of prompts, and how many sound ones are shown line by line.
PROMPT, SHOWN_PROMPTS = "prompt ", 3
# Wider lines are hard to read.
MOST_COLUMNS = 110


@options.takes(backbone=options.limited_backbone_options)
def doctor(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PROMPT]...", help="Folders of prompts, or of many prompts; none are needed."),
    ] = None,
    url: Annotated[str | None, typer.Option(metavar="URL", help="Look at a server, and compare its answers.")] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(metavar="F", help="File with the key that the server asks for.")
    ] = None,
    port: Annotated[int, typer.Option(metavar="N", help="A port to serve on: is it free?", min=1, max=65535)] = 8000,
    as_json: options.JsonOption = False,
    *,
    backbone: options.AskedBackbone,
) -> None:
    """Look whether packages, this machine, a backbone, prompts and a server are in order; exit code 1 if not.

    Nothing is changed. Every line that is not ok says what to do.

    Example: ptuning doctor capitals --url http://127.0.0.1:8000
    """
    with terminal.waiting("starting"):
        from ptuning.doctor.examine import Examination, examine
        from ptuning.doctor.remote import Remote, read_key
        from ptuning.errors import ConfigError

    if api_key_file is not None and url is None:
        raise ConfigError("--api-key-file is for a server; name it with --url")
    key = read_key(api_key_file) if api_key_file is not None else None
    server = Remote.of(url, key) if url is not None else None
    asked = Examination(prompts or (), backbone.name, backbone.options, server, port)
    checks = examine(asked, terminal.waiting)
    found = list(checks) if as_json else _shown(checks)
    failed = sum(one.status == "failed" for one in found)
    if as_json:
        listed: list[Json] = [one.to_json() for one in found]
        terminal.print_json({"checks": listed, "failed": failed})
    if failed:
        raise typer.Exit(1)


def _shown(checks: Iterable[Check]) -> list[Check]:
    """Print checks as they come, and return them. Of many prompts, those that are sound are a line each."""
    found: list[Check] = []
    sound = 0
    for name, group in itertools.groupby(checks, lambda one: one.group):
        own = list(group) if name.startswith(PROMPT) else group  # noqa: B031 - one of the two
        is_sound = isinstance(own, list) and all(one.status == "ok" for one in own)
        sound += is_sound
        if isinstance(own, list) and is_sound and sound > SHOWN_PROMPTS:
            terminal.line(f"{name}: {len(own)} checks, all ok")
            found += own
            continue
        terminal.results().print(name, markup=False, style="bold", soft_wrap=True)
        for one in own:
            _show(one)
            found.append(one)
    counts = Counter(one.status for one in found)
    terminal.line(f"\n{counts['ok']} ok, warnings: {counts['warning']}, failed: {counts['failed']}")
    return found


def _show(check: Check) -> None:
    """Print a check, wrapped behind its name, and below it what to do."""
    console = terminal.results()
    indent = " " * (STATUS_WIDTH + NAME_WIDTH + 4)
    width = max(min(console.width, MOST_COLUMNS) - len(indent), 20)
    first, *others = _wrapped(check.found, width) or [""]
    if len(check.name) > NAME_WIDTH:
        first, others = "", [first, *others]
    arrows = ["-> ", *["   "] * len(check.remedy)]
    others += [arrow + line for arrow, line in zip(arrows, _wrapped(check.remedy, width - 3), strict=False)]
    name = terminal.visible(check.name).ljust(NAME_WIDTH)
    status = (check.status.ljust(STATUS_WIDTH), STYLES[check.status])
    head = Text.assemble("  ", status, " ", name, " ", first)
    head.rstrip()
    console.print(head, soft_wrap=True)
    for text in others:
        terminal.line(f"{indent}{text}")


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(terminal.visible(text), width, break_long_words=False, break_on_hyphens=False)
