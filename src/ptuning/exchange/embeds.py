"""Slot vectors and their positions, for engines that take embeddings, such as vLLM's prompt_embeds."""

from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from ptuning.exchange.format import ExportResult
from ptuning.exchange.verify import ExportSource, Reader
from ptuning.files import read_bytes, write_bytes
from ptuning.template.encode import Example

FILE = "prompt_embeds.safetensors"
VECTORS, POSITIONS, IDS = "slot_vectors", "slot_positions", "input_ids"
USAGE = f"""\
`{FILE}` holds `{VECTORS}`, and of the example its `{IDS}` (0 at the slots) and `{POSITIONS}`. The
vectors are what the model's own embedding call returns, already scaled if the model scales its embeddings.

For vLLM (`vllm serve MODEL --enable-prompt-embeds`), the payload of the example:

```python
import base64
import io

import requests
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

prompt = load_file("THIS_FOLDER/{FILE}")
table = AutoModelForCausalLM.from_pretrained("MODEL").get_input_embeddings()
with torch.no_grad():
    embedded = table(prompt["{IDS}"])
embedded[prompt["{POSITIONS}"]] = prompt["{VECTORS}"].to(embedded.dtype)
buffer = io.BytesIO()
torch.save(embedded, buffer)
body = {{"model": "MODEL", "prompt_embeds": base64.b64encode(buffer.getvalue()).decode(), "max_tokens": 8}}
print(requests.post("http://localhost:8000/v1/completions", json=body, timeout=60).json())
```

Ids and positions of other records, from the prompt itself:

```python
import ptuning

prompt = ptuning.Prompt.load("PROMPT")
row = prompt.bind(ptuning.load_backbone("MODEL")).contexts([RECORD])[0]
row.token_ids, row.slot_positions
```
"""


def write(source: ExportSource, folder: Path) -> ExportResult:
    """Write the vectors, and of the example its ids and the positions of its slots."""
    example, backbone = source.rows[0].example, source.backbone
    tensors = {
        VECTORS: source.vectors.contiguous(),
        POSITIONS: torch.tensor(example.slot_positions),
        IDS: torch.tensor(example.token_ids[: example.logit_positions[0] + 1]),
    }
    write_bytes(folder / FILE, safetensors.torch.save(tensors, {"format": "pt"}))

    def load() -> Reader:
        vectors = safetensors.torch.load(read_bytes(folder / FILE))[VECTORS]
        model = backbone.copy(share=True).model
        table = backbone.table_of(model)

        def read(example: Example) -> Tensor:
            ids = torch.tensor([example.token_ids], device=backbone.device)
            embedded = table(ids)  # (1, T, E)
            embedded[0, list(example.slot_positions)] = vectors.to(embedded.device, embedded.dtype)
            logits: Tensor = model(inputs_embeds=embedded, attention_mask=torch.ones_like(ids)).logits[0]  # (T, V)
            return logits[list(example.logit_positions)]

        return read

    record = "{" + ", ".join(f'"{name}": "..."' for name in source.prompt.template.fields) + "}"
    return ExportResult(load, lambda example: example.token_ids, USAGE.replace("RECORD", record))
