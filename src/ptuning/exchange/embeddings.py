"""A prompt as slot vectors and their positions: for engines that take embeddings, such as vLLM's prompt_embeds."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from ptuning.exchange.form import Exported, Form
from ptuning.exchange.reserved import SlotTokens
from ptuning.exchange.rows import Reader, Source
from ptuning.files import read_bytes, write_bytes
from ptuning.template.encode import Example

FILE = "prompt_embeds.safetensors"
VECTORS, POSITIONS, IDS = "slot_vectors", "slot_positions", "input_ids"


def write(source: Source, folder: Path) -> Exported:
    """Write the vectors, and of the example its ids (0 at the slots) and the positions of its slots."""
    row = source.rows[0]
    tensors = {
        VECTORS: source.vectors.contiguous(),
        POSITIONS: torch.tensor(row.example.slot_positions),
        IDS: torch.tensor(row.input_ids),
    }
    write_bytes(folder / FILE, safetensors.torch.save(tensors, {"format": "pt"}))
    return Exported(
        SlotTokens(), lambda: _reader(source, folder), lambda example: example.token_ids, usage=_usage(source)
    )


def _reader(source: Source, folder: Path) -> Reader:
    vectors = safetensors.torch.load(read_bytes(folder / FILE))[VECTORS]
    model = source.backbone.copy(share=True).model
    table = source.backbone.table_of(model)

    def read(example: Example) -> Tensor:
        ids = torch.tensor([example.token_ids], device=source.backbone.device)
        embedded = table(ids)  # (1, T, E)
        embedded[0, list(example.slot_positions)] = vectors.to(embedded.device, embedded.dtype)
        logits: Tensor = model(inputs_embeds=embedded, attention_mask=torch.ones_like(ids)).logits[0]  # (T, V)
        return logits[list(example.logit_positions)]

    return read


def _usage(source: Source) -> list[str]:
    fields = ", ".join(f'"{name}": "..."' for name in source.prompt.template.fields)
    return [
        f"`{FILE}` holds `{VECTORS}`, and of the example its `{IDS}` (0 at the slots) and `{POSITIONS}`. The",
        "vectors are what the model's own embedding call returns, behind its scale if it has one.",
        "",
        "For vLLM (`vllm serve MODEL --enable-prompt-embeds`), the payload of the example:",
        "",
        "```python",
        "import base64",
        "import io",
        "",
        "import requests",
        "import torch",
        "from safetensors.torch import load_file",
        "from transformers import AutoModelForCausalLM",
        "",
        f'prompt = load_file("THIS_FOLDER/{FILE}")',
        'table = AutoModelForCausalLM.from_pretrained("MODEL").get_input_embeddings()',
        "with torch.no_grad():",
        f'    embedded = table(prompt["{IDS}"])',
        f'embedded[prompt["{POSITIONS}"]] = prompt["{VECTORS}"].to(embedded.dtype)',
        "buffer = io.BytesIO()",
        "torch.save(embedded, buffer)",
        'body = {"model": "MODEL", "prompt_embeds": base64.b64encode(buffer.getvalue()).decode(), "max_tokens": 8}',
        'print(requests.post("http://localhost:8000/v1/completions", json=body, timeout=60).json())',
        "```",
        "",
        "Ids and positions of other records, from the prompt itself:",
        "",
        "```python",
        "import ptuning",
        "",
        'prompt = ptuning.Prompt.load("PROMPT")',
        'bound = prompt.bind(ptuning.load_backbone("MODEL"))',
        f"row = bound.contexts([{{{fields}}}])[0]",
        "row.token_ids, row.slot_positions",
        "```",
    ]


FORM = Form("slot vectors and positions; for vLLM's prompt_embeds", write)
