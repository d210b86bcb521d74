"""A prompt as PEFT's PROMPT_TUNING: all up to the last slot becomes virtual tokens, which stand in front of a text.

That is the same wherever no slot stands behind a field: what is in front of the last slot, the tokenizer's own first
token (BOS) and literal words included, is then the same in every row.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ptuning.backbone.backbone import Backbone
from ptuning.engine.batch import collate
from ptuning.engine.forward import embed_inputs
from ptuning.engine.soft_prompt import PromptBatch
from ptuning.errors import ExchangeError
from ptuning.exchange.form import Exported, Form
from ptuning.exchange.peft_files import check_peft, logits_at, read_adapter, write_adapter
from ptuning.exchange.reserved import SlotTokens
from ptuning.exchange.rows import Reader, Source
from ptuning.template.encode import Example
from ptuning.template.language import Field, Slots, Template, TextSlots

VECTORS_KEY = "prompt_embeddings"


def write(source: Source, folder: Path) -> Exported:
    """Write the adapter. An ExchangeError if what stands behind the slots has other ids as a text."""
    check_peft()
    first = source.rows[0].example
    taken = max(first.slot_positions) + 1  # the same in every row
    check_rest(source, taken)
    vectors = _virtual_tokens(source.backbone, first, source.vectors, taken)
    write_adapter(
        source,
        folder,
        {
            "peft_type": "PROMPT_TUNING",
            "num_virtual_tokens": taken,
            "token_dim": source.backbone.width,
            "num_transformer_submodules": 1,
            "prompt_tuning_init": "RANDOM",
        },
        {VECTORS_KEY: vectors},
    )
    return Exported(
        SlotTokens(),
        lambda: _reader(source, folder, taken),
        lambda example: example.token_ids[taken:],
        usage=usage_of(
            source,
            f"{taken} virtual tokens: {len(source.vectors)} slots, and what else stands in front of the last one.",
        ),
    )


def _check_in_front(template: Template) -> None:
    fields = [at for at, piece in enumerate(template.pieces) if isinstance(piece, Field)]
    slots = [at for at, piece in enumerate(template.pieces) if isinstance(piece, Slots | TextSlots)]
    if fields and slots and max(slots) > fields[0]:
        raise ExchangeError(
            f"PEFT puts virtual tokens in front of a text, and a slot of the template '{template}' stands behind a "
            "field; take --as lora, which keeps slots anywhere"
        )


def check_rest(source: Source, taken: int) -> None:
    """Raise an ExchangeError if a row has other ids behind its first ``taken`` ones than the text there, or none."""
    for row in source.rows:
        rest = list(row.input_ids[taken:])
        if not rest:
            raise ExchangeError(
                f"the template '{source.bound.template}' has nothing behind its slots for PEFT to read; take --as lora"
            )
        text = source.bound.texts(row.record)[-1]
        found = source.backbone.tokenizer.read(text, add_special_tokens=False)
        if not row.example.shortened and found != rest:
            raise ExchangeError(
                f"behind its slots the template has the ids {rest}, and the tokenizer gives the text {text!r} the ids "
                f"{found}, so PEFT would read another text; take --as lora, which is given ids"
            )


@torch.no_grad()
def _virtual_tokens(backbone: Backbone, example: Example, vectors: Tensor, taken: int) -> Tensor:
    """Return the vectors of the first tokens of a row, (taken, E) float32: embeddings, and slot vectors at slots."""
    words = backbone.vectors_of(torch.tensor(example.token_ids)).cpu()  # (T, E)
    return embed_inputs(words[None], vectors, collate([example], PromptBatch(vectors)))[0, :taken]


def _reader(source: Source, folder: Path, taken: int) -> Reader:
    model = read_adapter(source, folder)

    def read(example: Example) -> Tensor:
        ids = list(example.token_ids[taken:])
        return logits_at(model, ids, example.logit_positions, source.backbone.device)

    return read


def usage_of(source: Source, about: str) -> list[str]:
    """Return lines of a card: what the virtual tokens are, and how PEFT reads them."""
    fields = {name: f"{{{name}}}" for name in source.prompt.template.fields}
    rest = source.bound.texts(fields)[-1]
    return [
        about,
        "What follows is tokenised without special tokens: the first token of a text, if the tokenizer has one, is a",
        "virtual token already.",
        "",
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'tokenizer = AutoTokenizer.from_pretrained("MODEL")',
        'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("MODEL"), "THIS_FOLDER")',
        f"text = {rest!r}  # with the fields filled in",
        'given = tokenizer(text, add_special_tokens=False, return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**given, max_new_tokens=8)[0]))",
        "```",
        "",
        "lm-eval reads it as `--model hf --model_args pretrained=MODEL,peft=THIS_FOLDER`.",
    ]


FORM = Form(
    "prompt tuning of PEFT; for templates whose slots stand in front of the first field", write, _check_in_front
)
