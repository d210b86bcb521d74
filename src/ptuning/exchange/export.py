"""Write a prompt in the form of another program: beside, read back, compared, and only then in its place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.probes import running
from ptuning.data.questions import Questions
from ptuning.errors import ExchangeError, closest
from ptuning.exchange import added_tokens, embedding_lora, embeddings, gguf_copy, prefix_tuning, prompt_tuning
from ptuning.exchange.card import card_of
from ptuning.exchange.form import Exported, Form
from ptuning.exchange.rows import Comparison, Source, compare, source_of
from ptuning.files import Json, write_json, write_text
from ptuning.names import CARD_FILE, publish_folder
from ptuning.prompt.prompt import Prompt
from ptuning.prompt.storage import BackboneId
from ptuning.records import Rows

FORMAT_VERSION = 1
EXPORT_FILE = "export.json"
FORMS: Mapping[str, Form] = {
    "lora": embedding_lora.FORM,
    "peft": prompt_tuning.FORM,
    "tokens": added_tokens.FORM,
    "gguf": gguf_copy.FORM,
    "embeds": embeddings.FORM,
}


def form_of(kind: str) -> Form:
    """Return a form by its name; an ExchangeError names all of them."""
    if kind not in FORMS:
        raise ExchangeError(f"a prompt is exported as {', '.join(FORMS)}, not as '{kind}'.{closest(kind, FORMS)}")
    return FORMS[kind]


def check_exportable(prompt: Prompt, kind: str) -> Form:
    """Return the form of a name. An ExchangeError if there is none, or if it is clear without a backbone that it cannot
    hold the prompt.
    """
    form = form_of(kind)
    if prompt.slot_vectors is None:
        raise ExchangeError(
            f"the prompt has no slots ('{prompt.template}'), so there is nothing to take along but its words"
        )
    if prompt.weights is not None:
        raise ExchangeError(
            "the prompt was trained together with weights of its backbone, and the export holds slots alone, which "
            "mean nothing without them; train it with --train-backbone none"
        )
    if prompt.deep is not None:
        if kind != "peft":
            raise ExchangeError(
                "the prompt has deep slots ([D]), which are vectors in every layer, and this form holds vectors of the "
                "input alone; take --as peft, or train it with [P] in their place"
            )
        prefix_tuning.check_prefix(prompt)
        return prefix_tuning.FORM
    form.check(prompt.template)
    return form


def export_prompt(
    prompt: Prompt, backbone: Backbone, data: Rows | Questions, out: str | Path, *, kind: str
) -> dict[str, Json]:
    """Write a prompt into a new folder in a form of :data:`FORMS`, and return the content of its ``export.json``.

    The folder appears when all is written, was read back, and gives the log-probabilities that the prompt gives to the
    targets of ``data``. An ExchangeError if the form cannot hold the prompt, or gives others; a FileError if the folder
    is taken.
    """
    form = check_exportable(prompt, kind)
    with publish_folder(Path(out)) as folder:
        source = source_of(prompt, backbone, data)
        written = form.write(source, folder)
        with running(f"'{backbone.name}' cannot be read back with the export", do="take another form (--as)"):
            found = compare(source, written.open(), at_most=written.max_difference or source.rounding)
        about = _described(kind, source, written, found)
        write_json(folder / EXPORT_FILE, about)
        write_text(folder / CARD_FILE, card_of(kind, form, source, written, found))
    return about


def _described(kind: str, source: Source, written: Exported, found: Comparison) -> dict[str, Json]:
    row = source.rows[0]
    ids: list[Json] = [*written.ids(row.example)]
    target: list[Json] = [*row.example.target_ids]
    return {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "backbone": BackboneId.of(source.backbone).to_json(),
        "slot_token_ids": [*written.tokens.ids],
        "slot_tokens": [*written.tokens.texts],
        "largest_log_prob_difference": found.largest,
        "n": source.records,
        "example": {
            "record": dict(row.record),
            # The last token of the target is scored and never read.
            "input_ids": ids[: len(ids) - len(target) + 1],
            "target_ids": target,
            "log_prob": found.first,
        },
    }
