"""A tiny random LLaMA with a tokenizer as a GGUF file, as llama.cpp's converter writes it."""

import json
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import quantize
from transformers import PreTrainedTokenizerFast

from tests.conftest import CONTEXT, make_tokenizer

WIDTH, HEADS, KEPT_HEADS, INNER, LAYERS = 64, 4, 2, 96, 2


def write_gguf(
    path: Path,
    *,
    architecture: str = "llama",
    kind: str = "F32",
    blocks: int = LAYERS,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> Path:
    """Write the file; ``kind`` is how matrices are stored: F32, F16, or quantised, as Q8_0. It says that it has so many
    ``blocks``.
    """
    tokenizer = tokenizer or make_tokenizer("llama")
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(blocks)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEPT_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    _add_tokenizer(writer, tokenizer)
    tokens = len(tokenizer)
    kept = WIDTH * KEPT_HEADS // HEADS
    matrices = {"attn_q": (WIDTH, WIDTH), "attn_k": (kept, WIDTH), "attn_v": (kept, WIDTH)}
    matrices |= {"attn_output": (WIDTH, WIDTH)}
    matrices |= {"ffn_gate": (INNER, WIDTH), "ffn_up": (INNER, WIDTH), "ffn_down": (WIDTH, INNER)}
    shapes = {"token_embd": (tokens, WIDTH)}
    shapes |= {f"blk.{layer}.{name}": shape for layer in range(LAYERS) for name, shape in matrices.items()}
    generator = np.random.default_rng(0)
    for name, shape in shapes.items():
        values = generator.normal(0.0, 0.3, shape).astype(np.float32)
        packing = GGMLQuantizationType[kind]
        writer.add_tensor(f"{name}.weight", quantize(values, packing), raw_dtype=packing)
    norms = [f"blk.{layer}.{name}_norm" for layer in range(LAYERS) for name in ("attn", "ffn")]
    for name in (*norms, "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: GGUFWriter, tokenizer: PreTrainedTokenizerFast) -> None:
    ids, specials = tokenizer.get_vocab(), set(tokenizer.all_special_tokens)
    listed = sorted(ids, key=lambda word: ids[word])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_vocab_size(len(listed))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(listed)
    writer.add_token_types([TokenType.CONTROL if word in specials else TokenType.NORMAL for word in listed])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(ids["<s>"])
    writer.add_eos_token_id(ids["</s>"])
    writer.add_unk_token_id(ids["<unk>"])
