"""Export of a prompt to another program: written, read back there, compared, and only then moved to its place."""

from collections.abc import Callable, Mapping
from pathlib import Path

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.probes import running
from ptuning.data.questions import Questions
from ptuning.errors import ExchangeError, closest
from ptuning.exchange import FORMATS, embeds, model_copy, peft
from ptuning.exchange.format import ExportResult
from ptuning.exchange.verify import Comparison, ExportSource, compare, source_of
from ptuning.files import Json, write_json, write_text
from ptuning.names import CARD_FILE, PAGE_MARKS, publish_folder
from ptuning.prompt.prompt import Prompt
from ptuning.prompt.storage import BackboneId, in_cell
from ptuning.provenance import VERSION
from ptuning.records import Rows

FORMAT_VERSION = 1
EXPORT_FILE = "export.json"
WRITERS: Mapping[str, Callable[[ExportSource, Path], ExportResult]] = {
    "lora": peft.write_embedding_lora,
    "peft": peft.write_virtual_tokens,
    "tokens": model_copy.write_folder,
    "gguf": model_copy.write_gguf,
    "embeds": embeds.write,
}
# Probability of rows without a token, in the other program, from which on the card mentions it.
MENTIONED = 1e-6


def check_format(kind: str) -> None:
    """Raise an ExchangeError that names all formats if there is none of this name."""
    if kind not in FORMATS:
        raise ExchangeError(f"a prompt is exported as {', '.join(FORMATS)}, not as '{kind}'.{closest(kind, FORMATS)}")


def check_exportable(prompt: Prompt, kind: str) -> None:
    """Raise an ExchangeError if it is clear without a backbone that a format cannot hold a prompt, or is unknown."""
    check_format(kind)
    if prompt.slot_vectors is None:
        raise ExchangeError(f"the prompt '{prompt.template}' has no slots, so there is nothing to export but its words")
    if prompt.weights is not None:
        raise ExchangeError(
            "the prompt was trained together with weights of its backbone, and an export holds slots alone; train it "
            "with train_backbone=none"
        )
    if prompt.deep is not None and kind != "peft":
        raise ExchangeError(
            "the prompt has deep slots ([D]), which are vectors in every layer, and this format holds vectors of the "
            "input alone; take the format peft, or train it with [P] instead"
        )
    if kind == "peft":
        peft.check_virtual_tokens(prompt)


def export_prompt(
    prompt: Prompt, backbone: Backbone, data: Rows | Questions, out: str | Path, *, kind: str
) -> dict[str, Json]:
    """Write a prompt into a new folder in one of :data:`~ptuning.exchange.FORMATS`, and return the content of its
    ``export.json``.

    The folder appears when all is written, was read back, and gives the log-probabilities that the prompt gives to the
    targets of ``data``. Raises ExchangeError if the format cannot hold the prompt, or gives others; FileError if the
    folder is taken.
    """
    check_exportable(prompt, kind)
    with publish_folder(Path(out)) as folder:
        source = source_of(prompt, backbone, data)
        result = WRITERS[kind](source, folder)
        with running(f"'{backbone.name}' cannot be read back with the export", do="take another format"):
            comparison = compare(source, result.load(), max_difference=result.max_difference)
        row = source.rows[0]
        ids, target = result.input_ids(row.example), row.example.target_ids
        about: dict[str, Json] = {
            "format_version": FORMAT_VERSION,
            "kind": kind,
            "backbone": BackboneId.of(backbone).to_json(),
            "slot_token_ids": [*result.tokens.ids],
            "slot_tokens": [*result.tokens.texts],
            "largest_log_prob_difference": comparison.largest,
            "n": source.records,
            "example": {
                "record": dict(row.record),
                # The last token of the target is scored and never read.
                "input_ids": [*ids[: len(ids) - len(target) + 1]],
                "target_ids": [*target],
                "log_prob": comparison.first,
            },
        }
        write_json(folder / EXPORT_FILE, about)
        write_text(folder / CARD_FILE, _card(kind, source, result, comparison))
    return about


def _card(kind: str, source: ExportSource, result: ExportResult, comparison: Comparison) -> str:
    """Return the card, in Markdown: what the export is, how exact it is, and how to use it."""
    backbone, prompt = source.backbone, source.prompt
    rows = [
        f"| format | {kind}: {FORMATS[kind]} |",
        f"| template | {in_cell(str(prompt.template))} |",
        f"| backbone | {in_cell(backbone.name)}, fingerprint `{backbone.fingerprint}` |",
        f"| slots | {prompt.total_slots} |",
        f"| largest difference of a log-probability | {comparison.largest:.2g}, n = {source.records} records of "
        f"{source.data}, {backbone.loaded['dtype']} |",
    ]
    if result.tokens.ids:
        names = ["no text" if text is None else in_cell(text) for text in result.tokens.texts]
        listed = ", ".join(f"{index} ({name})" for index, name in zip(result.tokens.ids, names, strict=True))
        rows.append(f"| token ids of the slots | {listed} |")
    parts = [
        f"# A prompt, exported\n\nExported {PAGE_MARKS[CARD_FILE]} {VERSION}. It was read back and gave the answers of "
        "the prompt.\n",
        "\n".join(["| | |", "|---|---|", *rows, ""]),
        "`export.json` has an example: the program that reads its `input_ids`, followed by its `target_ids`, gives the "
        "target\nthe `log_prob`.\n",
        result.usage,
    ]
    if "MODEL" in result.usage:
        parts.insert(3, "MODEL is the backbone above: the other program must load the same weights.\n")
    if result.tokens.ids and result.text is None:
        parts.append(f"Give ids, not text: {result.why_no_text}.\n")
    elif result.text is not None:
        parts.append(
            "The template as text has the same ids in every row that was compared:\n\n"
            f"```\n{source.template_text(result.text)}\n```\n\n"
            "The text of a slot's token in a user's text is a slot as well: remove it from untrusted input.\n"
        )
    if comparison.beyond >= MENTIONED:
        parts.append(
            f"The other program gives up to {comparison.beyond:.2g} of the probability to rows of the table that are "
            f"no tokens\nof the model's own; among those that are, the difference is {comparison.within:.2g} per token "
            "of a target.\n"
        )
    return "\n".join(parts)
