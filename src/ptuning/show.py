"""What the command line prints: tables and JSON of results. Computes nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ptuning.files import Json
from ptuning.metrics import Score

if TYPE_CHECKING:
    from ptuning.backbone import TextTokenizer
    from ptuning.demo import DemoResult
    from ptuning.evaluate import Result
    from ptuning.inspection import Inspection, Neighbour
    from ptuning.predict import Prediction
    from ptuning.prompt import Prompt
    from ptuning.records import Records
    from ptuning.runs import TrainResult


def interval(score: Score) -> str:
    """Return a score with its interval and its n."""
    return f"{score.value:.3f}  [{score.low:.3f}, {score.high:.3f}]"


def training(result: TrainResult) -> None:
    """Print what a training run left."""
    record, console = result.record, _console()
    history = cast("Sequence[Mapping[str, float]]", record["history"])
    start = cast("Mapping[str, float]", record["start"])
    data = cast("Mapping[str, Mapping[str, Json] | None]", record["data"])
    dev = data["dev"] or {}
    chosen = cast("int", record["chosen_epoch"])
    table = Table(box=box.SIMPLE_HEAD, title=f"development part: {dev.get('rows')} records", title_justify="left")
    for name in ("epoch", "train loss", "dev loss", "dev score"):
        table.add_column(name, justify="right")
    table.add_row("start", "", f"{start['dev_loss']:.3f}", f"{start['dev_score']:.3f}", style=_mark(chosen == 0))
    for row in history:
        table.add_row(
            str(row["epoch"]),
            f"{row['train_loss']:.3f}",
            f"{row['dev_loss']:.3f}",
            f"{row['dev_score']:.3f}",
            style=_mark(row["epoch"] == chosen),
        )
    console.print(table)
    console.print(f"chosen: {'the start' if chosen == 0 else f'epoch {chosen}'} ({record['choice_rule']})")
    console.print(_parameters(record))
    if record.get("ceiling_tokens_per_second"):
        speed, ceiling = cast("float", record["tokens_per_second"]), cast("float", record["ceiling_tokens_per_second"])
        console.print(f"speed: {speed:.0f} tokens/s, {speed / ceiling:.0%} of the bare backbone's {ceiling:.0f}")
    console.print(
        f"prompt: [bold]{escape(str(result.folder))}/prompt[/]   record: {escape(str(result.folder))}/run.json"
    )
    console.print(f"next:   ptuning eval {escape(str(result.folder))} --data FILE")


def evaluation(name: str, data: Records, found: Result, *, as_json: bool) -> None:
    """Print scores with their intervals."""
    if as_json:
        _print_json(
            {
                "prompt": name,
                "data": {"name": data.name, "sha256": data.sha256, "rows": len(data)},
                "scores": {metric: score.to_json() for metric, score in found.scores.items()},
                "loss": found.loss,
                "targets_not_among_candidates": found.missing,
            }
        )
        return
    console = _console()
    table = Table(box=box.SIMPLE_HEAD, title=escape(f"{name} on {data.name}, n = {len(data)}"), title_justify="left")
    table.add_column("score")
    table.add_column("value  [95 % interval]")
    for metric, score in found.scores.items():
        table.add_row(metric.replace("_", " "), escape(interval(score)))
    console.print(table)
    console.print(f"loss {found.loss:.3f}")
    if found.missing:
        console.print(f"{found.missing} of {len(data)} targets are no candidates; they count as misses")


def predictions(data: Records, found: Sequence[Prediction], *, as_json: bool, masked: bool) -> None:
    """Print one answer per line, or one JSON object per line."""
    for record, prediction in zip(data, found, strict=True):
        if as_json:
            listed = [{"text": one.text, "log_prob": one.log_prob} for one in prediction.candidates]
            row: dict[str, Json] = {
                "record": dict(record),
                "prediction": prediction.text,
                "candidates": cast("Json", listed),
            }
            if masked and prediction.tokens is not None:
                row["tokens"] = prediction.tokens
            typer.echo(json.dumps(row, ensure_ascii=False))
        elif len(prediction.candidates) > 1:
            typer.echo("\t".join(f"{_one_line(one.text)} ({one.log_prob:.2f})" for one in prediction.candidates))
        elif masked and prediction.tokens is not None:
            typer.echo(f"{_one_line(prediction.text)}\t({prediction.tokens} tokens)")
        else:
            typer.echo(_one_line(prediction.text))


def inspection(prompt: Prompt, found: Inspection, *, as_json: bool) -> None:
    """Print the nearest tokens of each slot."""
    if as_json:
        _print_json({"template": str(prompt.template), **found.to_json()})
        return
    console = _console()
    table = Table(box=box.SIMPLE_HEAD, title=escape(str(prompt.template)), title_justify="left")
    for name in ("slot", "started at", "norm", "nearest by cosine", "nearest by distance"):
        table.add_column(name)
    for index, view in enumerate(found.slots):
        start = "random" if view.start is None else f"'{view.start}'"
        table.add_row(str(index), escape(start), f"{view.norm:.2f}", _listed(view.by_cosine), _listed(view.by_distance))
    console.print(table)
    console.print(
        f"For scale: two tokens lie {found.token_distance:.2f} apart (median), a token and its nearest "
        f"{found.neighbour_distance:.2f}; a token's norm is {found.token_norm:.2f}."
    )
    if found.scores:
        learned, nearest = found.scores["as learned"], found.scores["nearest tokens"]
        console.print(
            f"score as learned {escape(interval(learned))}, with the nearest tokens in the slots "
            f"{escape(interval(nearest))}, n = {learned.n}"
        )
        if nearest.high < learned.value:
            console.print("The nearest tokens do not do what the slots do: read no meaning into them.")
    else:
        console.print(
            "Give --data to see what the nearest tokens score in the slots' place, before reading meaning into them."
        )


def template(positions: Sequence[tuple[str, int | None]], tokenizer: TextTokenizer, *, as_json: bool) -> None:
    """Print each position of a filled template."""
    rows = [
        (index, part, token, None if token is None else tokenizer.token(token))
        for index, (part, token) in enumerate(positions)
    ]
    if as_json:
        _print_json(
            [{"position": index, "part": part, "token_id": token, "token": text} for index, part, token, text in rows]
        )
        return
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("position", "part", "id", "token"):
        table.add_column(name)
    for index, part, token, text in rows:
        shown = "random start" if token is None else f"'{text}'" + (" (start)" if part == "slot" else "")
        table.add_row(
            str(index),
            part,
            "" if token is None else str(token),
            escape(shown),
            style={"slot": "green", "target": "bold"}.get(part, ""),
        )
    _console().print(table)


def facts(known: Mapping[str, Mapping[str, object]]) -> None:
    """Print the shipped facts."""
    table = Table(
        box=box.SIMPLE_HEAD, title="shipped facts: use NAME:train, NAME:dev or NAME:test as data", title_justify="left"
    )
    for name in ("name", "what", "train/dev/test", "manual template", "about"):
        table.add_column(name)
    for name, entry in known.items():
        rows = cast("Mapping[str, int]", entry["rows"])
        table.add_row(
            name,
            str(entry["title"]),
            "/".join(str(rows[split]) for split in ("train", "dev", "test")),
            escape(str(entry["manual"])),
            str(entry["about"]),
        )
    _console().print(table)


def demo(result: DemoResult) -> None:
    """Print what the demo found."""
    console, record = _console(), result.record
    n = result.scores["manual"].n
    table = Table(
        box=box.SIMPLE_HEAD, title=f"country -> capital: exact match on {n} test countries", title_justify="left"
    )
    table.add_column("method")
    table.add_column("prompt")
    table.add_column("exact match  [95 % interval]")
    prompts = {
        "majority": "the most frequent training answer",
        "manual": "The capital of [X] is [Y]",
        "p-tuning": str(result.prompt.template),
    }
    for name, score in result.scores.items():
        table.add_row(name, escape(prompts[name]), escape(interval(score)), style=_mark(name == "p-tuning"))
    console.print(table)
    shown = Table(box=box.SIMPLE_HEAD, title="five of them", title_justify="left")
    for name in ("country", "capital", "manual prompt says", "learned prompt says"):
        shown.add_column(name)
    for answer in result.answers:
        shown.add_row(*(escape(text) for text in (answer.subject, answer.target, answer.before, answer.after)))
    console.print(shown)
    console.print(f"prompt: {result.prompt.slots} vectors, {result.size_bytes / 1000:.1f} KB")
    console.print(_parameters(record))
    console.print(f"files:  [bold]{escape(str(result.folder))}[/]  (prompt/, run.json, predictions.jsonl)")
    console.print(
        f"next:   ptuning predict {escape(str(result.folder))} Kenya   (in the environment that make set up: "
        f".venv/bin/ptuning)"
    )


def _one_line(text: str) -> str:
    """Return an answer on one line: records and answers stay side by side."""
    return text.replace("\n", "\\n")


def _parameters(record: Mapping[str, Json]) -> str:
    trainable, frozen = cast("int", record["trainable_parameters"]), cast("int", record["frozen_parameters"])
    return (
        f"trained {trainable:,} parameters of the prompt encoder, backbone frozen with {frozen:,}; "
        f"{cast('float', record['train_seconds']):.0f} s of training, {cast('float', record['seconds']):.0f} s in all"
    )


def _listed(neighbours: Sequence[Neighbour]) -> str:
    return escape(", ".join(f"'{one.token}' {one.value:.2f}" for one in neighbours))


def _mark(on: bool) -> str:
    return "bold green" if on else ""


def _console() -> Console:
    return Console(soft_wrap=False, highlight=False)


def _print_json(value: Json | Sequence[Mapping[str, Json]]) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False, indent=2))
