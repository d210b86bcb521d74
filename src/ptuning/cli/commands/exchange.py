"""`ptuning export` and `import`: take a prompt along to another program, and take one over from PEFT."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ptuning.cli import options, terminal
from ptuning.cli.inputs import data_of, development_records, load, prompt_of
from ptuning.cli.options import DATA, OUTPUT, TEMPLATE, option
from ptuning.errors import ConfigError
from ptuning.exchange import FORMATS

if TYPE_CHECKING:
    from ptuning.data.questions import Questions
    from ptuning.prompt.prompt import Prompt
    from ptuning.records import Records


@options.takes(backbone=options.backbone_options)
def export(
    prompt: options.PromptArgument,
    kind: Annotated[
        str, option("--as", metavar="|".join(FORMATS), panel=OUTPUT, about="Export format.", complete=tuple(FORMATS))
    ],
    out: Annotated[str, option(metavar="DIR", panel=OUTPUT, about="New folder.")],
    data: Annotated[
        str | None,
        option(
            metavar="FILE", panel=DATA, about="Records to compare answers on [default: validation data of the run]."
        ),
    ] = None,
    field: options.FieldOption = None,
    as_json: options.JsonOption = False,
    *,
    backbone: options.AskedBackbone,
) -> None:
    """Write a prompt in the format of another program, read it back, and compare the answers.

    Example: ptuning export capitals --as lora --out capitals-lora
    """
    with terminal.waiting("starting"):
        from ptuning.exchange.export import EXPORT_FILE, check_exportable, check_format, export_prompt
        from ptuning.names import check_free

    check_format(kind)
    check_free(Path(out))
    chosen = prompt_of(prompt)
    check_exportable(chosen, kind)
    rows = _compared_on(chosen, prompt, data, field)
    # The number format of training is for speed; here rounding would hide what is compared.
    exact = replace(backbone, options=replace(backbone.options, dtype="float32"))
    loaded = load(exact if backbone.options.dtype == "auto" else backbone, prompt=chosen)
    with terminal.waiting("writing, reading back, comparing"):
        about = export_prompt(chosen, loaded, rows, out, kind=kind)
    if as_json:
        terminal.print_json(about)
        return
    terminal.heading(f"{out}: {FORMATS[kind]}")
    difference = about["largest_log_prob_difference"]
    terminal.line(f"read back; log-probabilities differ by {difference:.2g} at most, n = {about['n']} ({rows.name})")
    terminal.line(f"{out}/README.md says how to use it, {out}/{EXPORT_FILE} has an example")


def _compared_on(chosen: Prompt, name: str, data: str | None, field: list[str] | None) -> Records | Questions:
    if data is not None:
        return data_of(data, field, chosen.task, part="val", prompt=chosen)
    if field:
        raise ConfigError("--field renames columns of --data; leave it out")
    from ptuning.exchange.verify import made_record

    if chosen.answer_space.has_choices:
        raise ConfigError("the prompt chooses among choices that each row brings; name rows to compare on with --data")
    return development_records(name) or made_record(chosen)


@options.takes(backbone=options.backbone_options)
def import_prompt(
    folder: Annotated[str, typer.Argument(metavar="PEFT_FOLDER", help="Folder of an adapter of PEFT.")],
    template: Annotated[str, option(metavar="T", panel=TEMPLATE, about='As "[P*20]{text} Label: [Y]".')],
    out: Annotated[str, option(metavar="DIR", panel=OUTPUT, about="New folder.")],
    labels: Annotated[
        str | None, option(metavar="WORDS", panel=TEMPLATE, about='As "good=great,fine; bad=poor".')
    ] = None,
    *,
    backbone: options.AskedBackbone,
) -> None:
    """Make a prompt of virtual tokens that PEFT trained (prompt tuning, p-tuning, prefix tuning). Its model is
    the default backbone.

    Example: ptuning import peft-folder --template "[P*20]{text} Label: [Y]" --out mine
    """
    with terminal.waiting("starting"):
        from ptuning.exchange.import_peft import import_prompt, read_adapter_folder
        from ptuning.names import check_free
        from ptuning.template.labels import LabelWords
        from ptuning.template.language import Template

    parsed, words = Template.parse(template), LabelWords.of(labels) if labels is not None else None
    check_free(Path(out))
    adapter = read_adapter_folder(folder)
    loaded = load(backbone if backbone.name is not None else replace(backbone, name=adapter.base_model))
    prompt = import_prompt(adapter, parsed, loaded, label_words=words)
    prompt.save(out)
    terminal.heading(f"{out}: {prompt.every_slot} slots, {prompt.method}, for {loaded.name}")
    terminal.line(f"next: ptuning eval {out} --data FILE")
