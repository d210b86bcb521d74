"""`ptuning plan`: what work would take on so many GPUs, on paper."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from ptuning.cli import terminal
from ptuning.cli.options import JsonOption, named_values
from ptuning.config import listed_names
from ptuning.errors import ConfigError

if TYPE_CHECKING:
    from ptuning.experiment.forecast import Paper, Planned


def plan(
    backbone_params: Annotated[str, typer.Option(metavar="N", help="Weights of the backbone, as 7e9.")] = "7e9",
    gpus: Annotated[str, typer.Option(metavar="LIST", help="Numbers of GPUs.")] = "1,8,64,1000",
    layers: Annotated[
        int | None, typer.Option(metavar="N", help="Its layers; else as of others so large.", min=1)
    ] = None,
    weight_bytes: Annotated[float, typer.Option(metavar="F", help="Bytes of a weight: 2, or 1 for int8.")] = 2.0,
    gpus_per_model: Annotated[
        int | None, typer.Option(metavar="N", help="GPUs that share a model; else as many as it needs.", min=1)
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Other constant; repeatable.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say on paper what LAMA, 10,000 prompts and one prompt take on so many GPUs. Nothing is run or loaded.

    Example: ptuning plan --backbone-params 7e9 --gpus 8,64 --set layer_seconds=0.0007 --set dollars_per_hour=2.1
    """
    from ptuning.experiment.forecast import Paper

    given = named_values(set_ or (), expected="--set NAME=VALUE, such as layer_seconds=0.0007")
    constants = {name: _number(text, name) for name, text in given.items()}
    weights = _number(backbone_params, "--backbone-params")
    found = Paper(weights, layers, weight_bytes, gpus_per_model, constants)
    counts = [_whole(text) for text in listed_names(gpus)]
    if not counts:
        raise ConfigError("--gpus names no number of GPUs; give some, such as 1,8,64")
    if as_json:
        terminal.print_json(found.to_json(counts))
        return
    show(found, counts)


def _number(text: str, name: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ConfigError(f"{name}: '{text}' is not a number, such as 7e9") from error


def _whole(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or len(text) > 9:
        raise ConfigError(f"--gpus: '{text}' is not a number of GPUs, such as 64")
    return int(text)


def show(found: Paper, gpus: list[int]) -> None:
    """Print a plan, and what it rests on."""
    from ptuning.experiment.forecast import CONSTANTS

    split = "" if found.replica == 1 else f", each copy on {found.replica} GPUs"
    terminal.heading(f"{found.weights:.3g} weights in {found.depth} layers, {found.size / 1e9:.3g} GB{split}; on paper")
    table = terminal.table("work", narrow=True)
    for name in ("units", "each", *(f"{count:,} GPUs" for count in gpus)):
        table.add_column(name, justify="right")
    for line in found.lines(gpus):
        cells = [f"{line.units:,}", terminal.duration(line.unit_seconds), *map(_cell, line.on)]
        table.add_row(escape(line.what), *cells)
    terminal.results().print(table)
    constants = terminal.table("constant", narrow=True)
    for name in ("value", "what, and where from"):
        constants.add_column(name)
    for name, one in CONSTANTS.items():
        origin = "given" if name in (found.constants or {}) else one.origin
        constants.add_row(name, f"{found[name]:.3g} {one.unit}".rstrip(), escape(f"{one.about} ({origin})"))
    terminal.results().print(constants)
    terminal.line(
        "assumed is not measured: with a GPU, measure layer_seconds and encoder_seconds first, and give them by --set"
    )


def _cell(one: Planned) -> str:
    if one.seconds is None or one.dollars is None:
        return "does not fit"
    return f"{terminal.duration(one.seconds)}, ${one.dollars:,.0f}, {one.used:,} used"
