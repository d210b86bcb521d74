"""``--help``: options in groups, on 80 columns."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from rich.text import Text

from ptuning.cli import terminal

# The groups of options, in the order of every command's help. A test finds an option that has none.
OPTION_GROUPS: Mapping[str, Sequence[str]] = {
    "What to learn": (
        "template", "manual", "template_file", "about", "pattern", "labels", "merge", "tune", "keep", "encoder",
        "starts", "methods", "method", "chat", "system", "examples", "vocabulary",
    ),
    "Data": (
        "data", "suite", "arg", "dev", "test", "task", "field", "record", "candidates",
        "gather", "strict", "train_size", "split", "max_length", "config",
    ),
    "Training": (
        "epochs", "batch_size", "lr", "backbone_lr", "seed", "seeds", "set", "vary", "resume", "at_once",
        "measure_ceiling",
    ),
    "Answers": (
        "top_k", "min_probability", "stream", "max_new_tokens", "num_beams", "length_penalty", "do_sample",
        "temperature", "sampling_top_k", "top_p", "repetition_penalty", "stop", "normalise", "calibrate", "count_stop",
        "without", "force", "metrics", "by",
    ),
    "Output": ("as", "out", "overwrite", "errors", "json", "log_to", "dry_run", "open", "latex", "csv"),
    "Server": (
        "prompts", "url", "host", "port", "api_key_file", "admin_key_file", "open_to_all", "queue_rows", "drain",
        "access_log", "engine", "engine_url", "engine_key_file",
    ),
    "Machine": (
        "backbone", "dtype", "device", "device_map", "quantize", "shard", "revision", "attn_implementation",
        "trust_remote_code", "cache_memory", "cache_disk",
        "part", "workers", "ray", "gpus_per_worker",
        "gpus", "gpus_per_model", "backbone_params", "layers", "weight_bytes",
    ),
}  # fmt: skip
ARGUMENTS, GENERAL = "Arguments", "General"
# Options that every command has, or the program alone.
ALWAYS = ("help", "version", "verbose", "install_completion", "show_completion")
# Wider names and values of options go on a line of their own.
NAME_WIDTH = 30
WIDTH = 80
# What the program ends with (docs/files.md says it, too).
EXIT_CODES = (
    ("0", "all is well"),
    ("1", "cells of a comparison, prompts of a fleet or checks of doctor failed; the rest is done"),
    ("2", "an error; one message says what is wrong and what to do"),
    ("130", "stopped by Ctrl-C (143: by a termination signal); the same command goes on"),
)


def group_of(option: Any) -> str:
    """Return the group of an option: the one that it names itself, else by its name without dashes."""
    if getattr(option, "rich_help_panel", None):
        return str(option.rich_help_panel)
    names = {name.lstrip("-").replace("-", "_") for name in option.opts if name.startswith("--")}
    return next((title for title, listed in OPTION_GROUPS.items() if names & {*listed}), GENERAL)


def print_help(command: Any, context: Any, commands: Mapping[str, Sequence[str]]) -> None:
    """Print the help of a command, or of a group whose ``commands`` stand under titles."""
    pieces = [
        piece.replace("{", "").replace("}", "").replace("[[", "[").replace("]]", "]")
        for piece in command.collect_usage_pieces(context)
    ]
    _print(f"Usage: {' '.join([context.command_path, *pieces])}\n")
    for paragraph in re.split(r"\n\s*\n", (command.help or "").strip()):
        _print(textwrap.fill(paragraph, WIDTH, break_on_hyphens=False, break_long_words=False) + "\n")
    sections: dict[str, list[tuple[str, str]]] = {
        title: [] for title in (ARGUMENTS, *commands, *OPTION_GROUPS, GENERAL)
    }
    for parameter in command.get_params(context):
        if parameter.param_type_name == "argument":
            sections[ARGUMENTS].append((parameter.metavar or parameter.name.upper(), _about(parameter)))
        elif not parameter.hidden:
            sections[group_of(parameter)].append((_name(parameter), _about(parameter)))
    for title, names in commands.items():
        sections[title] = [(name, _summary(command.get_command(context, name).help)) for name in names]
    width = max((len(name) for rows in sections.values() for name, _ in rows if len(name) <= NAME_WIDTH), default=0)
    for title, rows in sections.items():
        if rows:
            _print(title, style="bold")
            for name, about in rows:
                _print_row(name, about, width)
            _print("")
    if context.parent is None:
        _print("Exit codes", style="bold")
        for code, about in EXIT_CODES:
            _print_row(code, about, width)


def _print(text: str, style: str = "") -> None:
    terminal.results().print(text, markup=False, style=style, soft_wrap=True)


def _print_row(name: str, about: str, width: int) -> None:
    """Print a name and what it is, wrapped behind it; a wide name stands on a line of its own."""
    lines = textwrap.wrap(about, WIDTH - width - 4, break_on_hyphens=False) or [""]
    first = f"  {name.ljust(width)}"
    if len(name) > width:
        _print(first, style="cyan")
        first = " " * (width + 2)
    terminal.results().print(Text.assemble((first, "cyan"), "  ", lines[0]), soft_wrap=True)
    for line in lines[1:]:
        _print(" " * (width + 4) + line)


def _name(option: Any) -> str:
    """Return an option as it is typed: ``--calibrate/--no-calibrate``, or ``--lr F``."""
    names = ", ".join(sorted(option.opts, key=len))
    if option.secondary_opts:
        names += f"/{option.secondary_opts[0]}"
    return names if option.is_flag else f"{names} {option.metavar or 'VALUE'}"


def _about(parameter: Any) -> str:
    about = parameter.help or ""
    if parameter.required:
        return f"{about} [required]"
    has_default = parameter.param_type_name == "option" and not parameter.is_flag
    return f"{about} [{parameter.default}]" if has_default and parameter.default not in (None, ()) else about


def _summary(text: str | None) -> str:
    """Return the first paragraph of a command's help, on one line."""
    return " ".join((text or "").strip().split("\n\n")[0].split())
