"""Read a prompt that PEFT trained: PROMPT_TUNING and P_TUNING write the same one tensor, of virtual tokens, and
PREFIX_TUNING one of their keys and values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.lora import CONFIG_FILE, WEIGHTS_FILE
from ptuning.errors import ExchangeError
from ptuning.exchange.prefix_tuning import deep_of
from ptuning.exchange.prompt_tuning import VECTORS_KEY
from ptuning.files import Unchecked, read_bytes, read_json
from ptuning.prompt.prompt import Prompt
from ptuning.prompt.storage import BackboneId
from ptuning.records import Record
from ptuning.template.encode import TokenizedTemplate
from ptuning.template.labels import LabelWords
from ptuning.template.language import Template
from ptuning.template.segments import Ids

MAX_CONFIG_BYTES, MAX_WEIGHTS_BYTES = 2**20, 2**31
MOST_VIRTUAL_TOKENS = 2**16
PREFIX = "prefix tuning"
READ = {"PROMPT_TUNING": "prompt tuning", "P_TUNING": "p-tuning", "PREFIX_TUNING": PREFIX}
# What others hold, and why that is no prompt.
ADAPTERS = (
    "holds adapters on layers of the model and no virtual tokens; merge it into the model, and load that as a backbone"
)
OTHERS: Mapping[str, str] = {
    "CARTRIDGE": "holds keys and values in a form of its own; save them as PREFIX_TUNING",
    "MULTITASK_PROMPT_TUNING": "holds a prompt for each of its tasks in factors; save the product for one task as "
    "PROMPT_TUNING",
    "CPT": "projects its vectors anew in every step; save what it ends with as PROMPT_TUNING",
    "ADAPTION_PROMPT": "holds prompts for single layers, and a prompt holds vectors of the input alone",
    "TRAINABLE_TOKENS": "changes tokens wherever they stand, also as answers",
}


@dataclass(frozen=True)
class Adapter:
    """What a folder of PEFT holds: the name of its method and of its model, and (N, E) float32 vectors, or for prefix
    tuning the numbers of all layers.
    """

    method: str
    base_model: str | None
    vectors: Tensor


def read_adapter_folder(folder: str | Path) -> Adapter:
    """Read a folder of PEFT. A FileError if a file is missing, and an ExchangeError if it is damaged, a pickle, or of a
    method that trains something else than vectors of the input.
    """
    path = Path(folder)
    config = Unchecked(read_json(path / CONFIG_FILE, at_most=MAX_CONFIG_BYTES), str(path / CONFIG_FILE), ExchangeError)
    kind = config.at("peft_type").text()
    if kind not in READ:
        why = OTHERS.get(kind, ADAPTERS)
        raise ExchangeError(f"{path} is {kind} of PEFT, which {why}; read are {' and '.join(READ)}")
    if config.at("num_transformer_submodules", 1).whole() != 1 or config.at("task_type", "CAUSAL_LM").text() not in (
        "CAUSAL_LM",
        "FEATURE_EXTRACTION",
    ):
        raise ExchangeError(
            f"{path} was trained for the task type {config.at('task_type').value}; virtual tokens of causal models "
            "(CAUSAL_LM) are read"
        )
    number = config.at("num_virtual_tokens").whole(least=1)
    if number > MOST_VIRTUAL_TOKENS:
        raise ExchangeError(f"{path / CONFIG_FILE} has {number} virtual tokens; at most {MOST_VIRTUAL_TOKENS} are read")
    vectors = _read_vectors(path)
    if vectors.ndim != 2 or len(vectors) != number:
        raise ExchangeError(
            f"{path / WEIGHTS_FILE}: '{VECTORS_KEY}' has the shape {tuple(vectors.shape)}, and {CONFIG_FILE} says "
            f"{number} virtual tokens"
        )
    return Adapter(READ[kind], config.optional("base_model_name_or_path", Unchecked.text), vectors)


def _read_vectors(path: Path) -> Tensor:
    file = path / WEIGHTS_FILE
    if not file.exists() and file.with_suffix(".bin").exists():
        raise ExchangeError(
            f"{file.with_suffix('.bin')} is a pickle, which could run code and is not read; save the adapter with "
            "safe_serialization=True (PEFT's default)"
        )
    try:
        found = safetensors.torch.load(read_bytes(file, at_most=MAX_WEIGHTS_BYTES))
    except (safetensors.SafetensorError, ValueError) as error:
        raise ExchangeError(f"{file} is not a whole safetensors file ({error}); it is cut off or damaged") from error
    if set(found) != {VECTORS_KEY}:
        raise ExchangeError(f"{file} holds {', '.join(sorted(found)) or 'nothing'}, and should hold '{VECTORS_KEY}'")
    vectors = found[VECTORS_KEY]
    if not vectors.is_floating_point():
        raise ExchangeError(f"{file}: '{VECTORS_KEY}' holds {vectors.dtype}, and no vectors")
    return vectors.float()


def import_prompt(
    adapter: Adapter, template: str | Template, backbone: Backbone, *, label_words: LabelWords | None = None
) -> Prompt:
    """Return a prompt that reads what PEFT reads: the virtual tokens, and then the text of the template.

    Args:
        adapter: What :func:`read_adapter_folder` returned.
        template: Begins with a slot for each virtual token, ``[P*n]``, and goes on with the text that the adapter was
            trained on. With a tokenizer that begins texts with a token (BOS), PEFT puts virtual tokens in front of
            that: ``[P*n]<s>``. If this token is the first virtual one, as in our exports, it has no slot.
        backbone: The model that it was trained on.
        label_words: Label -> words, for classification.

    Raises:
        ExchangeError: If the width is another one, the slots do not match, or the text would be read differently.
        TemplateError: If the template is malformed.
    """
    parsed = Template.parse(template) if isinstance(template, str) else template
    if adapter.method == PREFIX:
        return _import_prefix(adapter, parsed, backbone, label_words)
    if adapter.vectors.shape[1] != backbone.width:
        raise ExchangeError(
            f"the virtual tokens are {adapter.vectors.shape[1]} wide, and the embeddings of '{backbone.name}' "
            f"{backbone.width}; name the model that they were trained on with --backbone"
        )
    bound = TokenizedTemplate(parsed, tokenizer=backbone.tokenizer, kind=backbone.kind)
    if bound.kind != "causal":
        raise ExchangeError(
            f"'{backbone.name}' is a model of the kind {bound.kind}; virtual tokens of causal models are read"
        )
    opening = backbone.tokenizer.prefix_ids
    is_given = bound.slots == len(adapter.vectors) - len(opening) and _begins_with(adapter.vectors, opening, backbone)
    skipped = len(opening) if is_given else 0
    record = {name: name for name in parsed.fields}
    row = bound.contexts([record])[0]
    _check_slots(bound, row.slot_positions, len(adapter.vectors), skipped)
    _check_text(bound, backbone, record, list(row.token_ids[len(adapter.vectors) :]))
    return Prompt(
        parsed,
        adapter.vectors[skipped:].clone(),
        BackboneId.of(backbone),
        label_words,
        method=f"{adapter.method} of PEFT",
    )


def _import_prefix(adapter: Adapter, template: Template, backbone: Backbone, label_words: LabelWords | None) -> Prompt:
    """Return a prompt whose deep slots in front, ``[D*n]``, are PEFT's prefix."""
    deep = deep_of(adapter.vectors, backbone, opening=backbone.tokenizer.prefix_ids)
    bound = TokenizedTemplate(template, tokenizer=backbone.tokenizer, kind=backbone.kind, block=True)
    layout = bound.layout
    if (layout.in_front, len(layout.slot_start_ids)) != (deep.in_front, 0):
        raise ExchangeError(
            f"the prefix has {deep.in_front} virtual tokens in front of all text, and the template '{template}' has "
            f"{layout.in_front} deep slots in front and {len(layout.slot_start_ids)} other slots; begin it with "
            f"[D*{deep.in_front}], and leave others out"
        )
    if layout.lead != deep.lead:
        name = "".join(text for text, index in bound.tokenizer.special_ids.items() if index in layout.lead_ids)
        raise ExchangeError(
            f"PEFT puts its prefix in front of {name}, with which this tokenizer begins a text; write it behind the "
            f"slots: [D*{deep.in_front}]{name}"
        )
    record = {name: name for name in template.fields}
    _check_text(bound, backbone, record, list(bound.contexts([record])[0].token_ids))
    return Prompt(
        template,
        torch.zeros(0, backbone.width),
        BackboneId.of(backbone),
        label_words,
        method=f"{adapter.method} of PEFT",
        deep=deep,
    )


def _check_text(bound: TokenizedTemplate, backbone: Backbone, record: Record, rest: Sequence[int]) -> None:
    """Raise an ExchangeError if the text behind the slots has other ids than the row has there."""
    text = bound.texts(record)[-1]
    found = backbone.tokenizer.read(text, add_special_tokens=False)
    if found != list(rest):
        raise ExchangeError(
            f"behind the slots the template '{bound.template}' has the ids {list(rest)}, and the tokenizer gives the "
            f"text {text!r} the ids {found}, so PEFT reads another text; leave out the space behind the slots, or put "
            "one there"
        )


def _begins_with(vectors: Tensor, ids: Ids, backbone: Backbone) -> bool:
    """Whether the first virtual tokens are the embeddings of some tokens."""
    if not ids:
        return False
    own = backbone.vectors_of(torch.tensor(ids)).cpu()
    rounding = 1e-5 if backbone.dtype == torch.float32 else 2e-2
    return bool((vectors[: len(ids)] - own).abs().max() <= rounding * own.abs().max())


def _check_slots(bound: TokenizedTemplate, positions: Ids, number: int, skipped: int) -> None:
    """Check that the slots stand where the virtual tokens do; the tokenizer itself puts those in front that are
    ``skipped``.
    """
    slots, opening = number - skipped, bound.tokenizer.prefix_ids
    if positions == tuple(range(skipped, number)):
        return
    if opening and positions == tuple(range(len(opening), len(opening) + number)):
        name = "".join(text for text, index in bound.tokenizer.special_ids.items() if index in opening)
        raise ExchangeError(
            f"PEFT puts virtual tokens in front of {name}, with which this tokenizer begins a text, and the template "
            f"'{bound.template}' has {name} in front of its slots; write it behind them: [P*{number}]{name}"
        )
    begins = positions == tuple(range(positions[0], positions[0] + len(positions))) if positions else True
    raise ExchangeError(
        f"the adapter has {slots} virtual tokens in front of all text, and the template '{bound.template}' has "
        f"{len(positions)} slots{'' if begins else ', not all in front'}; begin it with [P*{slots}]"
    )
