"""Tiny random models of every family in the table of docs/backbones.md, and what each of them can do."""

import copy
import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.families import COLUMNS
from ptuning.backbone.families import Family as Row
from ptuning.prompt.predict import PromptModel
from tests.conftest import CONTEXT, CORPUS, RECORDS, learned, make_tokenizer

# Rows of the embedding table beyond the tokenizer's, as tables that are padded to round sizes have.
PADDED_ROWS = 7
TEMPLATE = "[P*2] [X] is [P] [Y]"
TWO_SIDED = "[P*2] [X] is [>] [P] so [Y]"

SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
POSITIONS: dict[str, Any] = {"max_position_embeddings": CONTEXT}
GROUPED: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 8}
GPT: dict[str, Any] = {"n_positions": CONTEXT, "n_embd": 32, "n_layer": 2, "n_head": 4}
BERT: dict[str, Any] = {**SMALL, **POSITIONS, "type_vocab_size": 2}
ROBERTA: dict[str, Any] = {**SMALL, "max_position_embeddings": CONTEXT + 2, "pad_token_id": 1}
T5: dict[str, Any] = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
SIDE: dict[str, Any] = {"layers": 2, "attention_heads": 4, "ffn_dim": 48}
BART: dict[str, Any] = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in SIDE.items()}
BART |= {
    **POSITIONS,
    "d_model": 32,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}


@dataclass(frozen=True)
class Family:
    """A family of backbones.

    Args:
        title: What it is called in the table.
        head: The class in transformers.
        tokenizer: Kind of tokenizer (:func:`tokenizer_of`).
        sizes: Its config.
        listed: Whether it was asked for; the others show that a family nobody thought of works.
        note: What is special about it.
    """

    title: str
    head: str
    tokenizer: str
    sizes: Mapping[str, Any] = field(default_factory=dict)
    listed: bool = True
    note: str = ""


FAMILIES: dict[str, Family] = {
    "gpt2": Family("GPT-2", "GPT2LMHeadModel", "gpt2", GPT),
    "opt": Family("OPT", "OPTForCausalLM", "llama", {**POSITIONS, **SMALL, "word_embed_proj_dim": 32, "ffn_dim": 48}),
    "opt-350m": Family(
        "OPT-350m",
        "OPTForCausalLM",
        "llama",
        {**POSITIONS, **SMALL, "word_embed_proj_dim": 16, "ffn_dim": 48, "do_layer_norm_before": False},
        note="embeddings narrower than the layers",
    ),
    "gpt-neox": Family("GPT-NeoX, Pythia", "GPTNeoXForCausalLM", "llama", {**SMALL, **POSITIONS}, note="untied head"),
    "llama": Family("LLaMA, SmolLM2", "LlamaForCausalLM", "llama", {**SMALL, **POSITIONS, **GROUPED}),
    "mistral": Family(
        "Mistral",
        "MistralForCausalLM",
        "llama",
        {**SMALL, **POSITIONS, "num_key_value_heads": 2, "sliding_window": 4},
        note="sliding window",
    ),
    "qwen3": Family("Qwen3", "Qwen3ForCausalLM", "llama", {**SMALL, **POSITIONS, **GROUPED}),
    "gemma-2": Family(
        "Gemma 2",
        "Gemma2ForCausalLM",
        "llama",
        {
            **SMALL,
            **POSITIONS,
            **GROUPED,
            "sliding_window": 4,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
            "attn_implementation": "eager",
        },
        note="scaled embeddings, soft-capped logits",
    ),
    "gemma-3": Family(
        "Gemma 3",
        "Gemma3ForCausalLM",
        "llama",
        {**SMALL, **POSITIONS, **GROUPED, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
        note="scaled embeddings, layers with a window",
    ),
    "bloom": Family("BLOOM", "BloomForCausalLM", "llama", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "glm-4": Family("GLM-4", "Glm4ForCausalLM", "llama", {**SMALL, **POSITIONS, **GROUPED, "pad_token_id": 0}),
    "falcon": Family(
        "Falcon", "FalconForCausalLM", "llama", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    ),
    "phi": Family("Phi", "PhiForCausalLM", "llama", {**SMALL, **POSITIONS}, note="head with a bias"),
    "bert": Family("BERT", "BertForMaskedLM", "bert", BERT),
    "roberta": Family("RoBERTa", "RobertaForMaskedLM", "roberta", ROBERTA),
    "xlm-r": Family(
        "XLM-R",
        "XLMRobertaForMaskedLM",
        "roberta",
        ROBERTA,
    ),
    "albert": Family(
        "ALBERT",
        "AlbertForMaskedLM",
        "bert",
        {**BERT, "embedding_size": 16},
        note="embeddings narrower than the layers",
    ),
    "distilbert": Family(
        "DistilBERT",
        "DistilBertForMaskedLM",
        "bert",
        {**POSITIONS, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
    ),
    "mpnet": Family("MPNet", "MPNetForMaskedLM", "bert", {**SMALL, "max_position_embeddings": CONTEXT + 2}),
    "electra": Family(
        "ELECTRA",
        "ElectraForMaskedLM",
        "bert",
        {**BERT, "embedding_size": 16},
        note="the generator; embeddings narrower than the layers",
    ),
    "deberta-v2": Family(
        "DeBERTa-v2, v3",
        "DebertaV2ForMaskedLM",
        "bert",
        {**BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        note="relative positions",
    ),
    "modernbert": Family(
        "ModernBERT",
        "ModernBertForMaskedLM",
        "bert",
        {
            **SMALL,
            **POSITIONS,
            **dict.fromkeys(("bos_token_id", "cls_token_id"), 2),
            **dict.fromkeys(("eos_token_id", "sep_token_id"), 3),
            "pad_token_id": 0,
            "local_attention": 8,
        },
        note="layers with a window",
    ),
    "xlnet": Family(
        "XLNet",
        "XLNetLMHeadModel",
        "xlnet",
        {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
        note="target hidden by perm_mask, asked for by target_mapping",
    ),
    "t5": Family("T5, Flan-T5", "T5ForConditionalGeneration", "t5", T5, note="sentinel at the target's place"),
    "mt5": Family(
        "mT5",
        "MT5ForConditionalGeneration",
        "mt5",
        {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        note="untied head",
    ),
    "bart": Family("BART", "BartForConditionalGeneration", "roberta", BART, note="mask at the target's place"),
    # Not asked for, and nothing is written for them.
    "gpt-j": Family("GPT-J", "GPTJForCausalLM", "llama", {**GPT, "rotary_dim": 4}, listed=False),
    "gemma": Family("Gemma", "GemmaForCausalLM", "llama", {**SMALL, **POSITIONS, **GROUPED}, listed=False),
    "xglm": Family(
        "XGLM",
        "XGLMForCausalLM",
        "llama",
        {**POSITIONS, "d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4},
        listed=False,
    ),
    "stablelm": Family(
        "StableLM", "StableLmForCausalLM", "llama", {**SMALL, **POSITIONS, "num_key_value_heads": 2}, listed=False
    ),
    "cohere": Family("Cohere", "CohereForCausalLM", "llama", {**SMALL, **POSITIONS, "logit_scale": 0.5}, listed=False),
    "ctrl": Family("CTRL", "CTRLLMHeadModel", "llama", {**GPT, "dff": 48}, listed=False),
    "mamba": Family(
        "Mamba",
        "MambaForCausalLM",
        "llama",
        {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
        listed=False,
    ),
    "rwkv": Family(
        "RWKV",
        "RwkvForCausalLM",
        "llama",
        {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32, "context_length": CONTEXT},
        listed=False,
    ),
    "xlm": Family(
        "XLM",
        "XLMWithLMHeadModel",
        "bert",
        {**POSITIONS, "emb_dim": 32, "n_layers": 2, "n_heads": 4, "pad_index": 0, "unk_index": 1, "mask_index": 4},
        listed=False,
    ),
    "bigbird": Family("BigBird", "BigBirdForMaskedLM", "bert", {**BERT, "block_size": 4}, listed=False),
    "longformer": Family(
        "Longformer",
        "LongformerForMaskedLM",
        "roberta",
        {**SMALL, "max_position_embeddings": CONTEXT + 2, "attention_window": [8, 8], "pad_token_id": 1},
        listed=False,
    ),
    "megatron-bert": Family("Megatron-BERT", "MegatronBertForMaskedLM", "bert", BERT, listed=False),
    "mbart": Family("mBART", "MBartForConditionalGeneration", "roberta", BART, listed=False),
    "pegasus": Family("Pegasus", "PegasusForConditionalGeneration", "t5", {**BART, "pad_token_id": 0}, listed=False),
    "umt5": Family("UMT5", "UMT5ForConditionalGeneration", "t5", T5, listed=False),
    "m2m100": Family("M2M-100, NLLB", "M2M100ForConditionalGeneration", "roberta", BART, listed=False),
    "led": Family(
        "LED",
        "LEDForConditionalGeneration",
        "roberta",
        {
            **{name: value for name, value in BART.items() if name != "max_position_embeddings"},
            "max_encoder_position_embeddings": CONTEXT,
            "max_decoder_position_embeddings": CONTEXT,
            "attention_window": [8, 8],
        },
        listed=False,
    ),
}


def of_kind(*kinds: str) -> list[str]:
    """Return the names of families of these kinds."""
    return [name for name in FAMILIES if built(name).kind in kinds]


def model_of(name: str, **changes: Any) -> PreTrainedModel:
    """Build a tiny random model whose weights all have one scale, large enough for logits to differ.

    Args:
        name: The family.
        changes: What its config has otherwise than the family.
    """
    family = FAMILIES[name]
    rows = len(tokenizer_of(family.tokenizer)) + PADDED_ROWS
    head = getattr(transformers, family.head)
    torch.manual_seed(0)
    model: PreTrainedModel = head(head.config_class(**{"vocab_size": rows, **family.sizes, **changes})).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Embedding | Conv1D):
                module.weight.normal_(std=0.1)
    return model


@functools.cache
def built(name: str) -> Backbone:
    """Return a family's frozen backbone, made once; not to be changed."""
    return backbone_of(name)


def backbone_of(name: str, **changes: Any) -> Backbone:
    """Return a frozen backbone of a family's tiny model, a new one each time; as for :func:`model_of`."""
    backbone = Backbone(model_of(name, **changes), tokenizer_of(FAMILIES[name].tokenizer), name=name)
    backbone.freeze()
    return backbone


@functools.cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """Train a tokenizer: those of conftest, and SentencePiece's unigram with what T5, mT5 and XLNet put around it."""
    if kind in ("gpt2", "llama", "bert", "roberta"):
        return make_tokenizer(kind)
    sentinels = [f"<extra_id_{number}>" for number in range(5)]
    if kind == "t5":
        made = unigram(["<pad>", "</s>", "<unk>"], single="$A </s>", unk_token="<unk>")
        made.add_special_tokens({"extra_special_tokens": sentinels})
    elif kind == "mt5":  # its sentinels are pieces like others, with a space's mark
        made = unigram(["<pad>", "</s>", "<unk>"], single="$A </s>", unk_token="<unk>")
        made.add_tokens([AddedToken(f"▁{name}", normalized=False) for name in sentinels])
    else:
        made = unigram(
            ["<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>", "<mask>"],
            single="$A:0 <sep>:0 <cls>:2",
            unk_token="<unk>",
            cls_token="<cls>",
            sep_token="<sep>",
            mask_token="<mask>",
            model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        )
    return made


def unigram(
    specials: list[str], *, single: str, scheme: str = "always", by_word: bool = True, unk_token: str, **names: Any
) -> PreTrainedTokenizerFast:
    """Make a unigram tokenizer as SentencePiece does, of letters and pieces of words with made-up log-probabilities:
    the library's trainer adds in another order in every process.

    Args:
        specials: Special tokens, in the order of their ids.
        single: What stands around a sentence.
        scheme: Whether a space is put in front of a text (``always``), of its beginning only (``first``), or ``never``.
        by_word: Whether a text is first cut at its spaces, so that more than one counts as one.
        unk_token: The token for what is unknown.
        names: What else the tokenizer of transformers takes.
    """
    words = sorted({word for line in CORPUS for word in re.findall(r"\w+", line)})
    scores = dict.fromkeys(specials, 0.0) | dict.fromkeys(["▁", *sorted({*"".join(CORPUS)} - {" "})], -9.0)
    for at, word in enumerate(words):
        for score, piece in ((-4.0, f"▁{word[:5]}"), (-6.0, word[:5]), (-5.0, word[5:])):
            if piece:
                scores.setdefault(piece, score - at / 1000)  # no two alike, so that no two ways to cut a word tie
    raw = Tokenizer(models.Unigram(list(scores.items()), specials.index(unk_token)))
    marks = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme)
    raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), marks]) if by_word else marks
    raw.decoder = decoders.Metaspace(replacement="▁", prepend_scheme=scheme)
    raw.add_special_tokens(specials)
    around = [token for token in specials if token in single]
    raw.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(token, specials.index(token)) for token in around]
    )
    given = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": unk_token, **names}
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        model_max_length=CONTEXT,
        **{name: value for name, value in given.items() if not isinstance(value, str) or value in specials},
    )


def without_words(name: str) -> Backbone:
    """Return a family's backbone with a tokenizer that has its special tokens alone, as if its vocabulary was lost."""
    whole = tokenizer_of(FAMILIES[name].tokenizer)
    written = json.loads(whole.backend_tokenizer.to_str())
    model, specials = written["model"], [token["content"] for token in written["added_tokens"]]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {token: model["vocab"][token] for token in specials}
    else:
        model["vocab"] = [one for one in model["vocab"] if one[0] in (*specials, "▁")]
    if "merges" in model:
        model["merges"] = []
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(written)),
        model_max_length=CONTEXT,
        **{key: token for key, token in whole.special_tokens_map.items() if isinstance(token, str)},
    )
    backbone = Backbone(model_of(name), tokenizer, name=name)
    backbone.freeze()
    return backbone


def examine(name: str) -> Row:
    """Return a family's row of the table, found by running its tiny model."""
    family, backbone = FAMILIES[name], built(name)
    hidden = backbone.model.config.get_text_config().hidden_size
    PromptModel(backbone).predict(RECORDS[:1], learned(backbone, TEMPLATE), generation={"max_new_tokens": 2})
    return Row(
        family=family.title,
        head=family.head,
        kind=backbone.kind,
        listed=family.listed,
        slots="on either side" if backbone.kind == "encoder-decoder" else "anywhere",
        answers="fills masks" if backbone.kind in ("masked", "permuted") else "writes",
        shared_prefix=backbone.shares_prefix,
        own_width=backbone.width != hidden,
        pads="either side" if backbone.pads_left else "right side",
        note=family.note,
    )


def own_copy(name: str) -> Backbone:
    """Return a copy of a family's backbone, to be changed."""
    return copy.deepcopy(built(name))


def as_markdown(rows: Sequence[Row]) -> str:
    """Return the table of docs/backbones.md."""
    lines = [COLUMNS, ("---",) * len(COLUMNS)]
    lines += [(name, f"`{head}`", *rest) for name, head, *rest in (row.cells for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"
