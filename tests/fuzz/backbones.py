"""Kinds of inputs that make a backbone: folders of models, GGUF files, chat templates, and how a backbone is loaded."""

from __future__ import annotations

import functools
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import gguf
import pytest
from hypothesis import strategies as st

from ptuning.backbone.loading import load_backbone, load_tokenizer
from ptuning.backbone.sources import LoadOptions
from ptuning.backbone.tokenizer import TextTokenizer
from ptuning.errors import BackboneError
from ptuning.files import write_bytes
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prompt import Prompt
from ptuning.template.chat import chat_template
from ptuning.template.encode import TokenizedTemplate
from ptuning.template.messages import ASSISTANT, USER, ChatMessage, write_messages
from tests.chats import SHAPES, shaped
from tests.conftest import make_model
from tests.fuzz.base import FAMILIES, Draw, folder, tried
from tests.fuzz.strange import as_json, as_python, changed_bytes, changed_json, changed_text, texts, values
from tests.tiny_gguf import write_gguf


@functools.cache
def files_of(family: str) -> Mapping[str, bytes]:
    """The files of a tiny model."""
    with folder() as path:
        make_model(family, path)
        return {file.name: file.read_bytes() for file in path.iterdir()}


# Keys that change how a folder is read; each with what is nearly right.
ASKED: Mapping[str, Any] = {
    "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
    "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    "auto_map": {"AutoConfig": "config.Config"},
    "text_config": {"vocab_size": 420},
    "is_encoder_decoder": True,
    "num_labels": 3,
    "max_seq_len": 64,
}


def model_folders(draw: Draw) -> None:
    """The folder of a model, of which one file is changed: loaded, its tokenizer alone as well, and asked something."""
    files = dict(files_of(draw(st.sampled_from(FAMILIES))))
    name = draw(st.sampled_from(sorted(files)))
    if name.endswith(".json") and draw(st.integers(0, 4)):
        content = json.loads(files[name])
        asked = draw(st.sampled_from((*ASKED, None, None))) if name == "config.json" else None
        content |= {} if asked is None else {asked: ASKED[asked]}
        files[name] = as_json(draw(changed_json(content))).encode()
    elif name.endswith(".safetensors") and draw(st.integers(0, 2)):
        size = int.from_bytes(files[name][:8], "little")
        header = as_json(draw(changed_json(json.loads(files[name][8 : 8 + size])))).encode()
        files[name] = len(header).to_bytes(8, "little") + header + files[name][8 + size :]
    else:
        files[name] = draw(changed_bytes(files[name]))
    with folder() as path:
        for name, data in files.items():
            write_bytes(path / name, data)
        tried(load_tokenizer, str(path))
        backbone = tried(load_backbone, str(path), dtype="float32", device="cpu")
        if backbone is not None:
            for candidates in (["yes", "no"], None):
                tried(PromptModel(backbone).predict, [{"x": "a film"}], Prompt.manual("{x} is [Y]"), candidates)


@functools.cache
def gguf_file() -> tuple[bytes, int]:
    """A tiny model as a GGUF file, and where its weights begin."""
    with folder() as path:
        file = write_gguf(path / "tiny.gguf")
        weights = min(int(tensor.data_offset) for tensor in gguf.GGUFReader(file).tensors)
        return file.read_bytes(), weights


def gguf_files(draw: Draw) -> None:
    """A GGUF file with broken bytes, most of all in its header."""
    data, weights = gguf_file()
    changed = (
        draw(changed_bytes(data[:weights])) + data[weights:] if draw(st.integers(0, 7)) else draw(changed_bytes(data))
    )
    with folder() as path, mock.patch.dict(os.environ, {"XDG_CACHE_HOME": str(path / "cache")}):
        write_bytes(path / "tiny.gguf", changed)
        if changed != data:
            tried(load_backbone, path / "tiny.gguf", dtype="float32", device="cpu")


@functools.cache
def chat_tokenizer() -> TextTokenizer:
    """A tokenizer whose chat template is another one in each test."""
    return TextTokenizer(shaped("chatml"), max_tokens=2000)


def chat_templates(draw: Draw) -> None:
    """The program that writes a model's conversations, changed; and what is said in them."""
    tokenizer = chat_tokenizer()
    tokenizer._tokenizer.chat_template = draw(changed_text(SHAPES[draw(st.sampled_from(sorted(SHAPES)))].jinja) | texts)
    template = tried(chat_template, tokenizer, draw(st.none() | texts))
    bound = tried(TokenizedTemplate, template, tokenizer=tokenizer, kind="causal") if template is not None else None
    if bound is not None:
        roles = draw(st.lists(st.sampled_from((USER, ASSISTANT, "system")), min_size=1, max_size=4))
        record = {"messages": write_messages([ChatMessage(role, draw(texts)) for role in roles]), "y": draw(texts)}
        tried(bound.examples, [record])
        tried(bound.contexts, [record])


OPTIONS: Mapping[str, Any] = {
    "dtype": "float32", "device": "cpu", "device_map": "auto", "revision": "main", "token": "hf_x", "cache_dir": "c",
    "attn_implementation": "eager", "trust_remote_code": False, "max_length": 32, "quantize": "int8", "shard": "map",
}  # fmt: skip


def loading_options(draw: Draw) -> None:
    """How a backbone is loaded, as a caller in Python may have it."""
    chosen = draw(st.lists(st.sampled_from(sorted(OPTIONS)), max_size=3, unique=True))
    given = {name: as_python(draw(values)) if draw(st.booleans()) else OPTIONS[name] for name in chosen}
    if given.get("trust_remote_code"):
        del given["trust_remote_code"]
    tried(LoadOptions, **given)
    with pytest.MonkeyPatch.context() as patch:  # all but the weights, which take a while
        patch.setattr("ptuning.backbone.loading._load", _nothing)
        tried(load_backbone, saved_model().name, **{"device": "cpu", **given})


def _nothing(*_: object, **__: object) -> object:
    raise BackboneError("no weights are read here")


@functools.cache
def saved_model() -> tempfile.TemporaryDirectory[str]:
    """The folder of a tiny model, kept as long as the process."""
    made = tempfile.TemporaryDirectory(prefix="fuzz-")
    make_model("llama", Path(made.name))
    return made
