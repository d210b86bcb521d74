"""`ptuning export` and `import`: take a prompt to another program, and take one over from PEFT."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ptuning.cli import options, terminal
from ptuning.cli.inputs import data_of, development_records, load, prompt_of, text_or_file
from ptuning.cli.options import DATA, OUTPUT, TEMPLATE, option
from ptuning.errors import ConfigError
from ptuning.exchange import FORMATS

OutOption = Annotated[str, option("New folder.", OUTPUT, metavar="DIR")]


def export(
    prompt: options.PromptArgument,
    kind: Annotated[str, option("Export format.", OUTPUT, "--as", metavar="|".join(FORMATS), complete=FORMATS)],
    out: OutOption,
    data: Annotated[
        str | None, option("Records to compare answers on [default: the run's validation data].", DATA, metavar="FILE")
    ] = None,
    field: options.FieldOption = None,
    as_json: options.JsonOption = False,
    backbone: options.BackboneOption = None,
    dtype: options.DtypeOption = "auto",
    device: options.DeviceOption = "auto",
    model_arg: options.ModelArgOption = None,
) -> None:
    """Write a prompt in the format of another program, read it back, and compare the answers.

    Example: ptuning export capitals --as lora --out capitals-lora
    """
    # The number format of training is for speed; here rounding would hide differences.
    choice = options.backbone_of(backbone, "float32" if dtype == "auto" else dtype, device, model_arg)
    with terminal.waiting("starting"):
        from ptuning.exchange.export import EXPORT_FILE, check_exportable, check_format, export_prompt
        from ptuning.exchange.verify import made_record
        from ptuning.names import check_free

    check_format(kind)
    check_free(Path(out))
    chosen = prompt_of(prompt)
    check_exportable(chosen, kind)
    if data is None and field:
        raise ConfigError("--field renames columns of --data; leave it out")
    if data is None and chosen.answer_space.has_choices:
        raise ConfigError("the prompt chooses among choices that each row brings; name rows to compare on with --data")
    if data is not None:
        rows = data_of(data, field, chosen.task, part="val", prompt=chosen)
    else:
        rows = development_records(prompt) or made_record(chosen)
    loaded = load(choice, prompt=chosen)
    with terminal.waiting("writing, reading back, comparing"):
        about = export_prompt(chosen, loaded, rows, out, kind=kind)
    if as_json:
        terminal.print_json(about)
        return
    terminal.heading(f"{out}: {FORMATS[kind]}")
    difference = about["largest_log_prob_difference"]
    terminal.line(f"read back; log-probabilities differ by {difference:.2g} at most, n = {about['n']} ({rows.name})")
    terminal.line(f"{out}/README.md says how to use it, {out}/{EXPORT_FILE} has an example")


def import_prompt(
    folder: Annotated[str, typer.Argument(metavar="PEFT_FOLDER", help="Folder of an adapter of PEFT.")],
    template: Annotated[str, option('As "[P*20]{text} Label: [Y]".', TEMPLATE, metavar="T|@FILE")],
    out: OutOption,
    labels: Annotated[str | None, option('As "good=great,fine; bad=poor".', TEMPLATE, metavar="LIST")] = None,
    backbone: options.BackboneOption = None,
    dtype: options.DtypeOption = "auto",
    device: options.DeviceOption = "auto",
    model_arg: options.ModelArgOption = None,
) -> None:
    """Make a prompt of virtual tokens that PEFT trained (prompt tuning, p-tuning, prefix tuning), by default for its
    model.

    Example: ptuning import peft-folder --template "[P*20]{text} Label: [Y]" --out mine
    """
    choice = options.backbone_of(backbone, dtype, device, model_arg)
    with terminal.waiting("starting"):
        from ptuning.exchange import import_peft
        from ptuning.names import check_free
        from ptuning.template.labels import LabelWords
        from ptuning.template.language import Template

    parsed = Template.parse(text_or_file(template) or "")
    words = LabelWords.of(labels) if labels is not None else None
    check_free(Path(out))
    adapter = import_peft.read_adapter_folder(folder)
    loaded = load(choice if choice.name is not None else replace(choice, name=adapter.base_model))
    prompt = import_peft.import_prompt(adapter, parsed, loaded, label_words=words)
    prompt.save(out)
    terminal.heading(f"{out}: {prompt.total_slots} slots, {prompt.method}, for {loaded.name}")
    terminal.line(f"next: {terminal.program()} eval {out} --data FILE")
