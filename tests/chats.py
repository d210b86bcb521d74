"""Twelve chat templates in the shapes of well-known models, and a tokenizer that knows the markup of all of them."""

import copy
import functools
from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ptuning.backbone.tokenizer import TextTokenizer
from tests.conftest import CORPUS


@dataclass(frozen=True)
class ChatShape:
    """A chat template.

    Args:
        jinja: The program.
        end: What ends the assistant's turn.
        header: What stands between the user's text and the answer.
        system: How a system text is taken: ``turn`` (a place of its own in front), ``own`` (the same, and the template
            has one of its own), or ``none``.
    """

    jinja: str
    end: str
    header: str
    system: str = "turn"


def _each(body: str, begin: str = "", ask: str = "") -> str:
    asked = "{% if add_generation_prompt %}{{ '" + ask + "' }}{% endif %}" if ask else ""
    return "".join((begin, "{% for m in messages %}", body, "{% endfor %}", asked)).replace("\n", "\\n")


REFUSES_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn here') }}{% endif %}"
OWN_SYSTEM = (
    "{% if messages[0].role != 'system' %}"
    "{{ '<|im_start|>system\nYou are Tiny, made for tests.<|im_end|>\n' }}{% endif %}"
)
IN_USER = (  # a system text in front of the first user's
    "{% if messages[0].role == 'system' %}{% set sys = messages[0].content %}{% set rest = messages[1:] %}"
    "{% else %}{% set sys = '' %}{% set rest = messages %}{% endif %}"
)
ROLES_ALTERNATE = (
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
)
SHAPES: dict[str, ChatShape] = {
    "chatml": ChatShape(
        _each(
            "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}",
            OWN_SYSTEM,
            "<|im_start|>assistant\n",
        ),
        "<|im_end|>",
        "<|im_end|>\n<|im_start|>assistant\n",
        "own",
    ),
    "llama-2": ChatShape(
        (
            IN_USER + "{% for m in rest %}" + ROLES_ALTERNATE + "{% if loop.index0 == 0 and sys %}"
            "{% set text = '<<SYS>>\\n' + sys + '\\n<</SYS>>\\n\\n' + m.content %}{% else %}{% set text = m.content %}"
            "{% endif %}{% if m.role == 'user' %}{{ '<s>' + '[INST] ' + text.strip() + ' [/INST]' }}{% else %}"
            "{{ ' ' + text.strip() + ' ' + '</s>' }}{% endif %}{% endfor %}"
        ),
        " </s>",
        " [/INST] ",
    ),
    "llama-3": ChatShape(
        _each(
            "{% set head = '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' %}"
            "{% set part = head + m.content | trim + '<|eot_id|>' %}"
            "{% if loop.index0 == 0 %}{% set part = '<|begin_of_text|>' + part %}{% endif %}{{ part }}",
            "",
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        "<|eot_id|>",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "mistral": ChatShape(  # a system text stands in the last turn of the user
        (
            "{{ '<s>' }}" + IN_USER + "{% for m in rest %}{% if m.role == 'user' %}{{ '[INST]' }}"
            "{% if loop.last and sys %}{{ sys + '\\n\\n' }}{% endif %}{{ m.content + '[/INST]' }}{% else %}"
            "{{ ' ' + m.content + '</s>' }}{% endif %}{% endfor %}"
        ),
        "</s>",
        "[/INST] ",
        "none",
    ),
    "gemma": ChatShape(
        _each(
            "{% if m.role == 'assistant' %}{% set who = 'model' %}{% else %}{% set who = m.role %}{% endif %}"
            "{{ '<start_of_turn>' + who + '\n' + m.content | trim + '<end_of_turn>\n' }}",
            "{{ '<bos>' }}" + REFUSES_SYSTEM,
            "<start_of_turn>model\n",
        ),
        "<end_of_turn>",
        "<end_of_turn>\n<start_of_turn>model\n",
        "none",
    ),
    "qwen": ChatShape(  # thoughts of earlier answers are cut out, and the last answer gets empty ones
        _each(
            "{% set text = m.content %}{% if m.role == 'assistant' %}{% set text = m.content.split('</think>')[-1] %}"
            "{% if loop.last %}{% set text = '<think>\n\n</think>\n\n' + text.lstrip('\n') %}{% endif %}{% endif %}"
            "{{ '<|im_start|>' + m.role + '\n' + text + '<|im_end|>\n' }}",
            "",
            "<|im_start|>assistant\n",
        ),
        "<|im_end|>",
        "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    ),
    "glm-4": ChatShape(  # nothing ends an answer but the next turn
        _each("{{ '<|' + m.role + '|>\n' + m.content }}", "{{ '[gMASK]<sop>' }}", "<|assistant|>\n"),
        "<|user|>",
        "<|assistant|>\n",
    ),
    "phi": ChatShape(
        _each("{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}")
        + "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}",
        "<|end|>",
        "<|end|>\n<|assistant|>\n",
    ),
    "zephyr": ChatShape(
        _each(
            "{{ '<|' + m['role'] + '|>\n' + m['content'] + '</s>\n' }}"
            "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
        ),
        "</s>",
        "</s>\n<|assistant|>\n",
    ),
    "command": ChatShape(
        _each(
            "{% if m.role == 'assistant' %}{% set who = 'CHATBOT' %}{% else %}{% set who = m.role | upper %}{% endif %}"
            "{{ '<|START_OF_TURN_TOKEN|><|' + who + '_TOKEN|>' + m.content.strip() + '<|END_OF_TURN_TOKEN|>' }}",
            "{{ '<BOS_TOKEN>' }}",
            "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        ),
        "<|END_OF_TURN_TOKEN|>",
        "<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
    ),
    "falcon": ChatShape(  # no markup but words, and no end
        _each(
            "{% if not loop.first %}{{ '\n\n' }}{% endif %}{{ m.role | capitalize + ': ' + m.content.strip() }}",
            "",
            "\n\nAssistant:",
        ),
        "<|endoftext|>",
        "\n\nAssistant: ",
    ),
    "deepseek": ChatShape(
        (
            IN_USER + "{{ '<begin>' + sys }}{% for m in rest %}{% if m.role == 'user' %}{{ '<User>' + m.content }}"
            "{% else %}{{ '<Assistant>' + m.content + '<end>' }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<Assistant>' }}{% endif %}"
        ),
        "<end>",
        "<Assistant>",
    ),
}
SPECIALS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "<|begin_of_text|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>", "[INST]", "[/INST]", "<bos>", "<start_of_turn>", "<end_of_turn>", "[gMASK]",
    "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>",
    "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>", "<begin>", "<end>",
)  # fmt: skip
PLAIN = ("<think>", "</think>", "<User>", "<Assistant>")  # added, and not called special


@functools.cache
def _bare_tokenizer() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(CORPUS, trainer)
    raw.add_tokens([AddedToken(token, special=False, normalized=False) for token in PLAIN])
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|endoftext|>")


@functools.cache
def shaped(name: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer with a chat template, as transformers has it."""
    made = copy.deepcopy(_bare_tokenizer())
    made.chat_template = SHAPES[name].jinja
    return made


@functools.cache
def chat_tokenizer(name: str) -> TextTokenizer:
    """Return the tokenizer with a chat template, as templates need it."""
    return TextTokenizer(shaped(name), max_tokens=2000)
