"""`ptuning doctor`: check the installation, and name what to do where something is wrong."""

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from ptuning.cli import options, terminal
from ptuning.cli.options import DATA, option
from ptuning.errors import ConfigError

STYLES = {"ok": "green", "warning": "yellow", "failed": "bold red"}


def doctor(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PROMPT]...", help="Folders of prompts, or of many prompts; none are needed."),
    ] = None,
    url: Annotated[str | None, option("Check a server, and compare its answers.", DATA, metavar="URL")] = None,
    api_key_file: Annotated[Path | None, option("File with the server's key.", DATA, metavar="FILE")] = None,
    as_json: options.JsonOption = False,
    backbone: options.BackboneOption = None,
    dtype: options.DtypeOption = "auto",
    device: options.DeviceOption = "auto",
    model_arg: options.ModelArgOption = None,
) -> None:
    """Check packages, this machine, a backbone, prompts and a server; exit code 1 if something fails.

    Nothing is changed. Every line that is not ok names what to do.

    Example: ptuning doctor capitals --url http://127.0.0.1:8000
    """
    choice = options.backbone_of(backbone, dtype, device, model_arg)
    with terminal.waiting("starting"):
        from ptuning.doctor import Server, run_checks
        from ptuning.serve.http.keys import read_keys

    if api_key_file is not None and url is None:
        raise ConfigError("--api-key-file is for a server; name it with --url")
    server = None if url is None else Server(url, None if api_key_file is None else read_keys(api_key_file)[0])
    checks = run_checks(
        prompts or (), backbone=choice.name, options=choice.options, server=server, progress=terminal.waiting
    )
    counts: Counter[str] = Counter()
    if as_json:
        listed = list(checks)
        counts.update(check.status for check in listed)
        terminal.print_json({"checks": [vars(check) for check in listed], "failed": counts["failed"]})
    else:
        group = ""
        for check in checks:  # each is printed when it is done
            if check.group != group:
                group = check.group
                terminal.results().print(group, markup=False, style="bold", soft_wrap=True)
            row = Table(box=None, show_header=False, padding=(0, 1, 0, 0))
            row.add_column(width=9, style=STYLES[check.status])
            row.add_column(width=17)
            row.add_column(overflow="fold")
            remedy = f"\n-> {check.remedy}" if check.remedy else ""
            row.add_row(f"  {check.status}", escape(check.name), escape(f"{check.detail}{remedy}"))
            terminal.results().print(row)
            counts[check.status] += 1
        terminal.line(f"\n{counts['ok']} ok, warnings: {counts['warning']}, failed: {counts['failed']}")
    if counts["failed"]:
        raise typer.Exit(1)
