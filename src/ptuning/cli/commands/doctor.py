"""`ptuning doctor`: check the installation, and say what to do where something is wrong."""

from __future__ import annotations

import textwrap
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from ptuning.cli import options, terminal

if TYPE_CHECKING:
    from ptuning.doctor import Check

STYLES = {"ok": "green", "warning": "yellow", "failed": "bold red"}
STATUS_WIDTH, NAME_WIDTH, MAX_WIDTH = 7, 16, 110


@options.takes(backbone=options.backbone_options)
def doctor(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PROMPT]...", help="Folders of prompts, or of many prompts; none are needed."),
    ] = None,
    url: Annotated[str | None, typer.Option(metavar="URL", help="Check a server, and compare its answers.")] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(metavar="F", help="File with the key that the server asks for.")
    ] = None,
    as_json: options.JsonOption = False,
    *,
    backbone: options.AskedBackbone,
) -> None:
    """Check packages, this machine, a backbone, prompts and a server; exit code 1 if something fails.

    Nothing is changed. Every line that is not ok says what to do.

    Example: ptuning doctor capitals --url http://127.0.0.1:8000
    """
    with terminal.waiting("starting"):
        from ptuning.doctor import Server, run_checks
        from ptuning.errors import ConfigError
        from ptuning.serve.http.keys import read_keys

    if api_key_file is not None and url is None:
        raise ConfigError("--api-key-file is for a server; name it with --url")
    key = None if api_key_file is None else read_keys(api_key_file)[0]
    server = None if url is None else Server(url, key)
    checks = run_checks(
        prompts or (), backbone=backbone.name, options=backbone.options, server=server, progress=terminal.waiting
    )
    counts: Counter[str] = Counter()
    if as_json:
        listed = list(checks)
        counts.update(check.status for check in listed)
        terminal.print_json({"checks": [check.to_json() for check in listed], "failed": counts["failed"]})
    else:
        group = ""
        for check in checks:
            if check.group != group:
                group = check.group
                terminal.results().print(terminal.visible(group), markup=False, style="bold", soft_wrap=True)
            _show(check)
            counts[check.status] += 1
        terminal.line(f"\n{counts['ok']} ok, warnings: {counts['warning']}, failed: {counts['failed']}")
    if counts["failed"]:
        raise typer.Exit(1)


def _show(check: Check) -> None:
    """Print a check, wrapped after its name, and below it what to do."""
    indent = " " * (STATUS_WIDTH + NAME_WIDTH + 4)
    width = max(min(terminal.results().width, MAX_WIDTH) - len(indent), 20)
    first, *others = _wrapped(check.detail, width) or [""]
    if len(check.name) > NAME_WIDTH:
        first, others = "", [first, *others]
    for number, line in enumerate(_wrapped(check.remedy, width - 3)):
        others.append(f"{'   ' if number else '-> '}{line}")
    name = terminal.visible(check.name).ljust(NAME_WIDTH)
    head = Text.assemble("  ", (check.status.ljust(STATUS_WIDTH), STYLES[check.status]), " ", name, " ", first)
    head.rstrip()
    terminal.results().print(head, soft_wrap=True)
    for line in others:
        terminal.line(f"{indent}{line}")


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(terminal.visible(text), width, break_long_words=False, break_on_hyphens=False)
