"""Tiny random models of four families with tokenizers made on the spot; everything offline, in a second.

What is heavy is loaded by the functions that need it: pytest-xdist's first process reads this file and runs no test.
"""

from __future__ import annotations

import copy
import functools
import gc
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Processes that tests start must add in the same order as this one, to the bit.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
from hypothesis import HealthCheck, settings

from tests import processes

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from ptuning.backbone.backbone import Backbone
    from ptuning.engine.objective import ScoringRequest
    from ptuning.prompt.prompt import Prompt
    from ptuning.records import Record
    from ptuning.template.encode import Example, TokenizedTemplate

# A busy machine is no failure, and neither is an example that only one run happens to draw.
settings.register_profile("steady", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")


def pytest_collection() -> None:
    """Look for no garbage among the million objects of the modules that tests import: none of them goes."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Look for garbage from now on, but not among them; and make the process that those of tests are forked of."""
    gc.freeze()
    gc.enable()
    processes.prepare()


ROOT = Path(__file__).resolve().parents[1]
FAMILIES = ("gpt2", "llama", "bert", "roberta")
CAUSAL = ("gpt2", "llama")
MASKED = ("bert", "roberta")
CONTEXT = 64

# Text for the tokenizers: enough for words of several tokens, digits, punctuation and letters beyond ASCII.
CORPUS = [
    "The capital of Kenya is Nairobi.",
    "The capital of France is Paris, and the capital of Peru is Lima.",
    "All in all, the movie was great. It was terrible; a good film and a bad one.",
    "question: is this the answer? answer: yes or no",
    "In 1999 they were 25 of 37, and 1234567890 is a number.",
    "Zürich, São Tomé, Curaçao and Łódź are cities in which people live.",
    '[P*3] {mask} [X] is located in [Y] (country) <tag> "quoted" it\'s',
] * 4

# Subjects and targets of different lengths, of one token and of several.
RECORDS: list[Record] = [
    {"x": "Kenya", "y": "Nairobi"},
    {"x": "France and Peru", "y": "yes"},
    {"x": "the movie Zürich was great", "y": "São Tomé"},
    {"x": "a", "y": "a good film and a bad one"},
    {"x": "1234567890", "y": "25"},
]
WARM = "[P:The capital of] [X] [P:is] [Y]"


def load_script(name: str) -> ModuleType:
    """Import `scripts/NAME.py` from its path; the folder is not a package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)  # a tiny model gives a second thread nothing but waiting


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    import torch

    torch.default_generator.manual_seed(0)  # torch.manual_seed takes a millisecond, to write down who called it


@pytest.fixture(autouse=True)
def _warned_anew() -> None:
    from ptuning.template import ambiguity

    ambiguity._warn_once.cache_clear()


@pytest.fixture(autouse=True, scope="session")
def _nothing_waits_for_the_disk() -> Iterator[None]:
    """No power fails while a test runs: what was written is read back from the system's memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of reports are put together, but not drawn, which takes most of the time; tests/report has those."""
    import matplotlib.figure

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda _, file, **__: file.write("<svg></svg>"))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a family's tiny random model, made once per test session."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp("models") / family
            make_model(family, folder)
            made[family] = folder
        return made[family]

    return get


@pytest.fixture(scope="session")
def raw_tokenizer() -> Callable[[str], PreTrainedTokenizerFast]:
    """Return a family's tokenizer as transformers has it, made once per test session."""
    return functools.cache(make_tokenizer)


@pytest.fixture(scope="session")
def loaded(model_folder: Callable[[str], Path]) -> Callable[[str], Backbone]:
    """Load a family's tiny model as a frozen float32 backbone, once per test session; not to be changed."""
    from ptuning.backbone.loading import load_backbone

    return functools.cache(lambda family: load_backbone(str(model_folder(family)), dtype="float32", device="cpu"))


@pytest.fixture
def make_backbone(loaded: Callable[[str], Backbone]) -> Callable[[str], Backbone]:
    """Return a family's tiny backbone, a copy of its own for each test."""
    return lambda family: copy.deepcopy(loaded(family))


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Each of the four families in turn."""
    return str(request.param)


@pytest.fixture
def backbone(family: str, make_backbone: Callable[[str], Backbone]) -> Backbone:
    """Each family's tiny backbone in turn."""
    return make_backbone(family)


@pytest.fixture
def causal(make_backbone: Callable[[str], Backbone]) -> Backbone:
    """A tiny causal backbone (LLaMA)."""
    return make_backbone("llama")


@pytest.fixture
def masked(make_backbone: Callable[[str], Backbone]) -> Backbone:
    """A tiny masked backbone (BERT)."""
    return make_backbone("bert")


def make_model(family: str, folder: Path, *, seed: int = 0) -> None:
    """Write a tiny random model and its tokenizer as ``save_pretrained`` does."""
    import torch

    tokenizer = make_tokenizer(family)
    torch.manual_seed(seed)
    model = build_model(family, tokenizer)
    # Random models are far too sure of nothing: larger weights make logits differ enough to compare.
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(5.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def build_model(family: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Build a tiny model with random weights and dropout in its config (which a frozen backbone must not use)."""
    from transformers import (
        BertConfig,
        BertForMaskedLM,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        RobertaConfig,
        RobertaForMaskedLM,
    )

    size = len(tokenizer)
    if family == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=size,
                n_positions=CONTEXT,
                n_embd=32,
                n_layer=2,
                n_head=4,
                bos_token_id=0,
                eos_token_id=0,
            )
        )
    if family == "llama":
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=size,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=CONTEXT,
                attention_dropout=0.1,
                tie_word_embeddings=True,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
    shared = {
        "vocab_size": size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if family == "bert":
        return BertForMaskedLM(BertConfig(**shared, max_position_embeddings=CONTEXT))
    return RobertaForMaskedLM(RobertaConfig(**shared, max_position_embeddings=CONTEXT + 2, type_vocab_size=1))


def make_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """Train a family's kind of tokenizer: GPT-2's without and LLaMA's with a BOS, BERT's WordPiece, RoBERTa's pair."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if family == "bert":
        return _word_piece()
    specials = {
        "gpt2": ["<|endoftext|>"],
        "llama": ["<unk>", "<s>", "</s>"],
        "roberta": ["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
    }[family]
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=specials,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    raw.train_from_iterator(CORPUS, trainer)
    if family == "gpt2":
        return PreTrainedTokenizerFast(
            tokenizer_object=raw,
            bos_token=specials[0],
            eos_token=specials[0],
            unk_token=specials[0],
            model_max_length=CONTEXT,
        )
    if family == "llama":
        raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        return PreTrainedTokenizerFast(
            tokenizer_object=raw,
            bos_token="<s>",
            eos_token="</s>",
            unk_token="<unk>",
            model_input_names=["input_ids", "attention_mask"],
            model_max_length=CONTEXT,
        )
    raw.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        cls_token="<s>",
        sep_token="</s>",
        mask_token="<mask>",
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=CONTEXT,
    )


def _word_piece() -> PreTrainedTokenizerFast:
    """Make WordPiece of the text's letters and short words: the library's trainer breaks ties anew in every process."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    normalizer, splitter = normalizers.BertNormalizer(lowercase=False), pre_tokenizers.BertPreTokenizer()
    words = sorted({word for text in CORPUS for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))})
    letters = sorted(set("".join(words)))
    pieces = [*letters, *(f"##{letter}" for letter in letters), *(word[:8] for word in words)]
    vocabulary = dict.fromkeys([*specials, *pieces])
    raw = Tokenizer(models.WordPiece({piece: at for at, piece in enumerate(vocabulary)}, unk_token="[UNK]"))
    raw.normalizer, raw.pre_tokenizer = normalizer, splitter
    raw.decoder = decoders.WordPiece()
    raw.add_special_tokens(specials)
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        model_max_length=CONTEXT,
    )


def bound(backbone: Backbone, template: str) -> TokenizedTemplate:
    """Bind a pattern to a backbone."""
    from ptuning.template.encode import TokenizedTemplate
    from ptuning.template.language import Template

    return TokenizedTemplate(Template.parse(template), tokenizer=backbone.tokenizer, kind=backbone.kind)


def learned(backbone: Backbone, template: str, *, seed: int = 0) -> Prompt:
    """Return a prompt whose slots hold random vectors on the scale of the backbone's embeddings."""
    import torch

    from ptuning.prompt.prompt import Prompt

    slots = bound(backbone, template).slots
    base = Prompt.from_token_ids(template, [5] * slots, backbone)
    noise = torch.randn(slots, backbone.width, generator=torch.Generator().manual_seed(seed))
    return Prompt(base.template, noise * float(backbone.table().std()), base.backbone, method="test")


def items_of(
    backbone: Backbone, template: str, records: list[Record], *, with_stop: bool = True
) -> list[ScoringRequest]:
    """Return target items of records, as training makes them."""
    from ptuning.engine.objective import target_requests
    from ptuning.records import as_records

    return target_requests(bound(backbone, template), as_records(records), with_stop=with_stop)


def spoken(example: Example, slot_ids: list[int]) -> list[int]:
    """Return an example's ids with token ids where its slots are."""
    ids = list(example.token_ids)
    for position, token in zip(example.slot_positions, slot_ids, strict=True):
        ids[position] = token
    return ids


def small_memory(monkeypatch: pytest.MonkeyPatch, tokens: int, *, backward: bool = False) -> list[int]:
    """Let passes of more than so many tokens run out of memory, forward or in their backward; return those that ran."""
    import torch

    from ptuning.backbone.backbone import Backbone

    ran: list[int] = []
    real = Backbone.run

    def fail(_: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    def run(self: Backbone, embeddings: torch.Tensor, **named: Any) -> Any:
        size = embeddings.shape[0] * embeddings.shape[1]
        fits = size <= tokens
        if not (fits or backward):
            fail(None)
        if not fits and embeddings.requires_grad:
            embeddings.register_hook(fail)  # behind the gradients of all layers
        elif fits:
            ran.append(size)
        return real(self, embeddings, **named)

    monkeypatch.setattr(Backbone, "run", run)
    return ran


def plain_logits(backbone: Backbone, token_ids: list[int]) -> torch.Tensor:
    """Return what transformers itself answers to token ids and nothing else, (T, V)."""
    import torch

    with torch.no_grad():
        logits: torch.Tensor = backbone.model(input_ids=torch.tensor([token_ids], device=backbone.device)).logits[0]
    return logits
