"""The card of an export: what it is, how exact it is, and how to use it in the other program."""

from __future__ import annotations

from ptuning.exchange.form import Exported, Form
from ptuning.exchange.rows import Comparison, Source, template_text
from ptuning.names import CARD_FILE, PAGE_MARKS
from ptuning.prompt.storage import in_cell
from ptuning.provenance import VERSION

# Probability that another program may give to rows without a token before the card mentions it.
MENTIONED = 1e-6


def card_of(kind: str, form: Form, source: Source, written: Exported, found: Comparison) -> str:
    """Return the card, in Markdown."""
    backbone, prompt = source.backbone, source.prompt
    rows = [
        ("form", f"{kind}: {form.about}"),
        ("template", in_cell(str(prompt.template))),
        ("backbone", f"{in_cell(backbone.name)}, fingerprint `{backbone.fingerprint}`"),
        ("slots", str(prompt.every_slot)),
        (
            "largest difference of a log-probability",
            f"{found.largest:.2g}, n = {source.records} records of {source.data}, {backbone.loaded['dtype']}",
        ),
    ]
    if written.tokens.ids:
        names = ["no text" if text is None else in_cell(text) for text in written.tokens.texts]
        listed = ", ".join(f"{index} ({name})" for index, name in zip(written.tokens.ids, names, strict=True))
        rows.append(("token ids of the slots", listed))
    asks = any("MODEL" in line for line in written.usage)
    lines = [
        "# A prompt, exported",
        "",
        f"Exported {PAGE_MARKS[CARD_FILE]} {VERSION}. It was read back and gave the answers of the prompt.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {text} |" for name, text in rows),
        "",
        "`export.json` has an example: the program that reads its `input_ids`, followed by its `target_ids`, gives the",
        "target the `log_prob`.",
        "",
        *(["MODEL is the backbone above: the other program must load the same weights.", ""] if asks else []),
        *written.usage,
        "",
        *_about_text(source, written),
        *_about_rows(found),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _about_text(source: Source, written: Exported) -> list[str]:
    if not written.tokens.ids:
        return []
    if written.text is None:
        return [f"Give ids, not text: {written.why_no_text}.", ""]
    return [
        "The template as text has the same ids in every row that was compared:",
        "",
        "```",
        template_text(source, written.text),
        "```",
        "",
        "The text of a slot's token in a user's text is a slot as well: take it out of what strangers send.",
        "",
    ]


def _about_rows(found: Comparison) -> list[str]:
    if found.beyond < MENTIONED:
        return []
    return [
        f"The other program gives up to {found.beyond:.2g} of the probability to rows of the table that are no tokens",
        f"of the model's own; among those that are, the difference is {found.within:.2g} per token of a target.",
        "",
    ]
