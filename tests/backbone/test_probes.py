"""What loading refuses: a model that does not read what it is given, found by running it, with what to do."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.loading import load_backbone
from ptuning.backbone.probes import check_reading
from ptuning.config import TrainConfig
from ptuning.errors import BackboneError
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prompt import Prompt
from ptuning.training.run import train
from tests.conftest import RECORDS, WARM, make_tokenizer
from tests.families import BART, BERT, GPT, GROUPED, POSITIONS, ROBERTA, SMALL, built, model_of, tokenizer_of


class Deaf(transformers.BertForMaskedLM):
    """Reads pads, whatever the mask says."""

    def forward(self, *, inputs_embeds: Any = None, attention_mask: Any = None, **inputs: Any) -> Any:
        return super().forward(inputs_embeds=inputs_embeds, attention_mask=torch.ones_like(attention_mask), **inputs)


class Louder(transformers.GPT2LMHeadModel):
    """Scales embeddings that it is given, and not those that it looks up."""

    def forward(self, *, inputs_embeds: Tensor | None = None, attention_mask: Any = None, **inputs: Any) -> Any:
        given = None if inputs_embeds is None else 2 * inputs_embeds
        return super().forward(inputs_embeds=given, attention_mask=attention_mask, **inputs)


class Short(transformers.GPT2LMHeadModel):
    """Looks something up by its place in the row, beyond the end of what it has."""

    def forward(self, *, inputs_embeds: Tensor | None = None, attention_mask: Any = None, **inputs: Any) -> Any:
        if inputs_embeds is not None and inputs_embeds.shape[1] > 3:
            return [0, 1, 2][inputs_embeds.shape[1]]
        return super().forward(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **inputs)


def made(head: type[Any], config: Any, tokenizer: str) -> Backbone:
    torch.manual_seed(0)
    model = head(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(5.0)
    backbone = Backbone(model, tokenizer_of(tokenizer), name="some model")
    backbone.freeze()
    return backbone


def test_a_model_that_reads_pads() -> None:
    """A masked model whose rows depend on their company."""
    config = transformers.BertConfig(vocab_size=len(tokenizer_of("bert")), **BERT)
    with pytest.raises(BackboneError, match=r"some model: Deaf reads pads in spite of its attention_mask.*use another"):
        check_reading(made(Deaf, config, "bert"))
    check_reading(made(transformers.BertForMaskedLM, config, "bert"))


def test_a_model_that_takes_embeddings_for_something_else() -> None:
    """Slots would not be what the words are that they start from."""
    config = transformers.GPT2Config(vocab_size=len(tokenizer_of("gpt2")), bos_token_id=0, eos_token_id=0, **GPT)
    with pytest.raises(BackboneError, match="Louder treats embeddings unlike"):
        check_reading(made(Louder, config, "gpt2"))


def test_a_model_that_answers_differently_at_some_positions() -> None:
    """ProphetNet predicts several tokens ahead: its head wants every position of several streams."""
    sizes: dict[str, Any] = {
        f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in (("ffn_dim", 48),)
    }
    sizes |= {f"num_{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    config = transformers.ProphetNetConfig(
        vocab_size=len(tokenizer_of("bert")), hidden_size=32, decoder_start_token_id=2, **sizes
    )
    with pytest.raises(
        BackboneError, match=r"ProphetNetForConditionalGeneration (answers differently|cannot be asked)"
    ):
        check_reading(made(transformers.ProphetNetForConditionalGeneration, config, "bert"))


@pytest.mark.parametrize(
    ("head", "tokenizer", "sizes"),
    [
        ("FunnelForMaskedLM", "bert", {"d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48, "block_sizes": [1, 1]}),
        ("ConvBertForMaskedLM", "bert", {**BERT, "embedding_size": 16}),
        ("FSMTForConditionalGeneration", "roberta", {**BART, "langs": ["a", "b"], "tgt_vocab_size": 300}),
    ],
)
def test_families_that_nobody_thought_of(head: str, tokenizer: str, sizes: dict[str, Any]) -> None:
    """Funnel pools pads with text, ConvBERT convolves over them, FSMT scales what it looks up."""
    head_class = getattr(transformers, head)
    if "langs" in sizes:
        sizes = {**sizes, "src_vocab_size": 300}
    else:
        sizes = {**sizes, "vocab_size": len(tokenizer_of(tokenizer))}
    with pytest.raises(BackboneError, match=r"(reads pads in spite|treats embeddings unlike)"):
        check_reading(made(head_class, head_class.config_class(**sizes), tokenizer))


def test_two_tables_are_refused() -> None:
    """An encoder and a decoder put together from two models have a table each."""
    bert = transformers.BertConfig(vocab_size=len(tokenizer_of("bert")), **BERT)
    decoder = transformers.BertConfig(**{**bert.to_dict(), "is_decoder": True, "add_cross_attention": True})
    config = transformers.EncoderDecoderConfig(
        encoder=bert.to_dict(), decoder=decoder.to_dict(), decoder_start_token_id=2, pad_token_id=0
    )
    with pytest.raises(BackboneError, match=r"a table for its encoder|a prompt belongs to one table"):
        check_reading(made(transformers.EncoderDecoderModel, config, "bert"))


def test_a_permuted_model_without_a_mask_token(tmp_path: Any) -> None:
    """XLNet without a token for what is not known would have to go on with a text, and sees all of it."""
    model = model_of("xlnet")
    tokenizer = make_tokenizer("llama")
    config = type(model.config)(**{**model.config.to_dict(), "vocab_size": len(tokenizer)})
    type(model)(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match="lets a position see later tokens"):
        load_backbone(str(tmp_path), device="cpu")


def test_where_pads_may_stand() -> None:
    """Asked of the model: a state that reads every column, and a side without position ids, want pads behind only."""
    assert built("llama").pads_left
    assert built("mamba").pads_left  # it takes the mask
    assert not built("rwkv").pads_left
    assert not built("bart").pads_left


def test_a_model_that_cannot_run_a_longer_row() -> None:
    """Reformer cuts rows into pieces; found on loading, and not in the middle of a training."""
    config = transformers.ReformerConfig(
        vocab_size=len(tokenizer_of("llama")),
        hidden_size=32,
        num_attention_heads=4,
        attention_head_size=8,
        feed_forward_size=48,
        attn_layers=["local", "local"],
        axial_pos_embds=False,
        max_position_embeddings=64,
        is_decoder=True,
        local_attn_chunk_length=8,
    )
    with pytest.raises(BackboneError, match=r"cannot read a row of 63 tokens: .* \(RuntimeError\); use another"):
        check_reading(made(transformers.ReformerModelWithLMHead, config, "llama"))


def test_a_model_of_few_positions_is_asked_for_no_more_than_it_has(tmp_path: Path) -> None:
    """MPT names its longest row as no other does; the longer row that is tried had 67 tokens."""
    config = transformers.MptConfig(
        vocab_size=len(tokenizer_of("llama")), d_model=32, n_heads=4, n_layers=2, max_seq_len=64
    )
    tokenizer = make_tokenizer("llama")
    tokenizer.model_max_length = 10**30
    transformers.MptForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    backbone = load_backbone(str(tmp_path), device="cpu", dtype="float32")
    assert backbone.tokenizer.max_tokens == 64
    long = PromptModel(backbone).predict([{"x": "Kenya " * 100}], Prompt.manual("[X] is [Y]"))
    assert len(long) == 1


def test_a_model_that_cannot_run_a_short_row() -> None:
    """Its own error is told, with what to do."""
    config = transformers.NystromformerConfig(vocab_size=len(tokenizer_of("bert")), num_landmarks=8, **BERT)
    with pytest.raises(BackboneError, match=r"cannot read a row of 3 tokens: .* \(RuntimeError\); use another"):
        check_reading(made(transformers.NystromformerForMaskedLM, config, "bert"))


def test_a_model_that_runs_out_of_places() -> None:
    """An IndexError in a model is a refusal like any other error."""
    config = transformers.GPT2Config(vocab_size=len(tokenizer_of("gpt2")), bos_token_id=0, eos_token_id=0, **GPT)
    with pytest.raises(BackboneError, match=r"cannot read a row of 63 tokens: list index .* \(IndexError\); use"):
        check_reading(made(Short, config, "gpt2"))


def test_a_model_that_looks_for_the_tokens_of_embeddings() -> None:
    """Gemma 4 reads every token in each layer once more: found on loading, and not when the first slot is trained."""
    config = transformers.Gemma4TextConfig(
        vocab_size=len(tokenizer_of("llama")),
        vocab_size_per_layer_input=len(tokenizer_of("llama")),
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=0,
        pad_token_id=0,
        **{**SMALL, **POSITIONS, **GROUPED, "layer_types": ["sliding_attention", "full_attention"]},
    )
    with pytest.raises(BackboneError, match=r"cannot read embeddings that are not a token's: .* use another"):
        check_reading(made(transformers.Gemma4ForCausalLM, config, "llama"))


def test_a_model_whose_embeddings_are_no_tensor() -> None:
    """I-BERT's come with a scale."""
    config = transformers.IBertConfig(vocab_size=len(tokenizer_of("roberta")), **ROBERTA)
    with pytest.raises(BackboneError, match=r"embeddings of IBertForMaskedLM are not a tensor \(tuple\).*use another"):
        made(transformers.IBertForMaskedLM, config, "roberta")


def test_slots_of_every_family_get_gradients(backbone: Backbone) -> None:
    """Nothing about the model changes while it is tried, not even the numbers that are drawn next."""
    before = torch.random.get_rng_state()
    with torch.no_grad():
        assert backbone.passes_gradients
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(weight.grad is None and not weight.requires_grad for weight in backbone.model.parameters())


@pytest.mark.parametrize(
    ("spoilt", "message"),
    [
        (torch.round, "gives the first token of a row no gradient, so slots would stay as they start"),
        (lambda one: one * float("nan"), "NaN or infinite"),
    ],
)
def test_a_model_whose_layers_pass_no_gradient(causal: Backbone, spoilt: Any, message: str) -> None:
    """Rounded products (weights and activations in 8 bits) have a gradient that is zero everywhere. At the position
    that is scored it is not: the residual stream goes past the layers. Nothing said so, and slots stayed as they were.
    """
    for layer in causal.model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            part.register_forward_hook(
                lambda _module, _inputs, found: (
                    (spoilt(found[0]), *found[1:]) if isinstance(found, tuple) else spoilt(found)
                )
            )
    with pytest.raises(BackboneError, match=message):
        _ = causal.passes_gradients
    with pytest.raises(BackboneError, match=message):
        train(WARM, RECORDS, backbone=causal, config=TrainConfig(epochs=1))


def test_a_model_that_detaches_what_it_returns(causal: Backbone) -> None:
    causal.model.model.norm.register_forward_hook(lambda _module, _inputs, found: found.detach())
    with pytest.raises(BackboneError, match=r"llama: LlamaForCausalLM cannot be trained through: .*quantize"):
        _ = causal.passes_gradients
