"""The options of commands that write answers."""

from __future__ import annotations

from typing import Annotated

import typer

from ptuning.cli.options import BeamsOption, LongestOption
from ptuning.config import GenerationSettings


def writing(
    max_new_tokens: LongestOption = None,
    num_beams: BeamsOption = None,
    length_penalty: Annotated[float | None, typer.Option(metavar="F", help="Above 0 favours long beams.")] = None,
    do_sample: Annotated[bool | None, typer.Option("--do-sample", "--sample", help="Draw each token.")] = None,
    temperature: Annotated[
        float | None, typer.Option(metavar="F", help="Below 1 draws likely tokens more often.")
    ] = None,
    sampling_top_k: Annotated[int | None, typer.Option(metavar="N", help="Draw among the N likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(metavar="F", help="Draw among the likeliest that sum to F.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(metavar="F", help="Above 1 avoids repetitions.")] = None,
    stop: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="Ends an answer; repeatable.")] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Of the draws.", rich_help_panel="Answers")] = None,
) -> GenerationSettings:
    """Read the settings of writing; those that are not given have the defaults of ``GenerationSettings``."""
    given: dict[str, object] = {
        "max_new_tokens": max_new_tokens,
        "num_beams": num_beams,
        "length_penalty": length_penalty,
        "do_sample": do_sample,
        "temperature": temperature,
        "top_k": sampling_top_k,
        "top_p": top_p,
        "repetition_penalty": repetition_penalty,
        "stop_strings": stop,
        "seed": seed,
    }
    return GenerationSettings.of({name: value for name, value in given.items() if value is not None})
