"""`ptuning generate`: a text for each record of a file, kept while they are written."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ptuning.cli import options, terminal
from ptuning.cli.inputs import data_to_write, load, prompt_of, task_of
from ptuning.cli.outputs import check_file, is_finished, is_table, kept_lines
from ptuning.cli.signals import stoppable
from ptuning.cli.writing import writing as writing_options
from ptuning.config import GenerationSettings
from ptuning.errors import ConfigError, FileError
from ptuning.progress import Interrupted
from ptuning.records import plain

if TYPE_CHECKING:
    from ptuning.data.questions import Questions


@options.takes(writing=writing_options, backbone=options.limited_backbone_options)
def generate(
    prompt: options.PromptArgument,
    data: Annotated[
        str,
        typer.Option(
            metavar="FILE|-",
            help="Records; with targets, these are kept.",
            autocompletion=options.shipped_parts,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="A .jsonl file, a line for each record.")],
    task: options.TaskOption = None,
    field: options.FieldOption = None,
    gather: options.GatherOption = False,
    without: options.WithoutOption = None,
    force: options.ForceOption = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on behind the lines that are finished.")] = False,
    overwrite: options.ReplaceOption = False,
    *,
    writing: GenerationSettings,
    backbone: options.AskedBackbone,
) -> None:
    """Write a text for each record, as {"record", "predicted", "target", "stopped", "tokens"} on a line.

    "stopped" is end, line or length. The likeliest tokens are written unless --num-beams or --do-sample is given. Lines
    are kept as they are finished: a run that was killed goes on with --resume.

    Example: ptuning generate helper --data new.jsonl --out texts.jsonl
    """
    chosen = prompt_of(prompt, task_of(task), without=without)
    from ptuning.prompt.answer import check_writes, written_parts
    from ptuning.prompt.written import identity_of_texts, text_row

    check_writes(chosen)
    if is_table(out):
        raise ConfigError(f"{out}: a text has a line of its own; let --out end in .jsonl")
    check_file(out, overwrite=overwrite or resume, data=data)
    questions = data_to_write(chosen, data, field, gather=gather)
    if resume and not overwrite and is_finished(out):
        _check_finished(out, questions)
        terminal.say(f"{out} is finished already; --overwrite writes it anew")
        return
    loaded = load(backbone, prompt=chosen)
    from ptuning.prompt.predict import PromptModel

    identity = identity_of_texts(chosen, questions, writing, loaded)
    with kept_lines(out, identity, resume=resume, overwrite=overwrite) as kept:
        if kept.done:
            terminal.say(f"{kept.done} of {len(questions)} texts are there already")
        with stoppable(out, again="--resume", kept=kept.path) as (report, should_stop):
            model, done = PromptModel(loaded, force=force), kept.done
            for part in written_parts(model, questions, chosen, settings=writing, done=done, report=report):
                records = [one.record for one in questions[done : done + len(part)]]
                kept.write([text_row(record, one) for record, one in zip(records, part, strict=True)])
                done += len(part)
                if should_stop() and done < len(questions):
                    raise Interrupted(f"stopped after {done} of {len(questions)} texts")
        kept.finish()
    _show_ends(out)


def _check_finished(out: Path, questions: Questions) -> None:
    """Raise a FileError if a finished file is not about these records. What wrote its texts, it does not say."""
    asked = [plain(one.record) for one in questions]
    try:
        with out.open(encoding="utf-8") as lines:
            is_same = [json.loads(line)["record"] for line in lines] == asked
    except (ValueError, TypeError, KeyError):
        is_same = False
    if not is_same:
        raise FileError(
            f"{out} is there, and its records are not those of {questions.name}; use --overwrite, or name another --out"
        )


def _show_ends(out: Path) -> None:
    """Say how many texts were written, and how many of them were cut by their length."""
    with out.open(encoding="utf-8") as lines:
        ends = Counter(str(json.loads(line)["stopped"]) for line in lines)
    total = sum(ends.values())
    terminal.say(f"{total} text{'s' * (total != 1)} written to {out}")
    if ends["length"]:
        terminal.say(
            f"warning: {ends['length']} of {total} reached their most tokens and may not be whole; --max-new-tokens N "
            "allows more"
        )
