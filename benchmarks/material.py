"""What is measured on: the backbone, facts, sentences and long records made of the shipped facts, and training steps of
ptuning and of the bare backbone. Knows no peer.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.common import Settings
from ptuning.backbone.backbone import Backbone
from ptuning.backbone.loading import load_backbone
from ptuning.config import TrainConfig
from ptuning.data.answer_space import AnswerSpace
from ptuning.data.questions import as_questions
from ptuning.data.reading import SPLITS, load_records, shipped_facts
from ptuning.engine.batch import collate
from ptuning.engine.objective import ScoringRequest, build_requests, inputs_of, target_requests
from ptuning.engine.soft_prompt import PromptBatch
from ptuning.progress import Progress
from ptuning.records import Record, Records
from ptuning.template.encode import TokenizedTemplate
from ptuning.template.labels import LabelWords
from ptuning.template.language import Template
from ptuning.training.trainer import Trainer

# Three slots in front and three behind, as in the paper; the peer has all six in front.
FACTS_TEMPLATE = "[P*3] [X] [P*3] [Y]"
TEXT_TEMPLATE = "[P*3] {text} [P*3] [Y]"
SLOTS = 6
# Tokens of one forward and backward pass, for everything that is compared: larger batches are gathered from several,
# since the activations of 64 rows of 512 tokens would take more memory than most machines have.
PASS_TOKENS = 4096
# What the countries of a sentence are sorted into, and what each is made of.
CONTINENTS = LabelWords({name: (name,) for name in ("Africa", "Asia", "Europe")})
FRAMES = (
    "{x} is a country whose capital is {capitals}; people there pay with the {currencies}, and their web addresses end "
    "in {domains}.",
    "Travellers who fly to {capitals}, the capital of {x}, change their money into the {currencies} before they leave.",
    "In {x}, where the {currencies} is the money and {domains} the domain, the offices of the government stand in "
    "{capitals}.",
    "The new office in {capitals} serves all of {x}; write to {domains} and pay in the {currencies}.",
)


def backbone_of(settings: Settings) -> Backbone:
    """Load the backbone of the settings, and set the number of threads."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    name = settings.backbone
    if name == "tiny":
        folder = settings.out / "tiny-backbone"
        if not (folder / "config.json").is_file():
            write_tiny_backbone(folder)
        name = str(folder)
    return load_backbone(name, dtype=settings.dtype, device=settings.device)


def write_tiny_backbone(folder: Path) -> None:
    """Write a random model of two layers and a tokenizer for it, to run scripts in seconds."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    raw.train_from_iterator(["\n", *itertools.islice(fact_sentences(), 400)], trainer)
    end = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=end, eos_token=end, unk_token=end)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def every(name: str) -> list[Record]:
    """Return the records of all parts of shipped facts."""
    return [record for part in SPLITS for record in load_records(f"{name}:{part}")]


def fact_sentences() -> list[str]:
    """Return all shipped facts as sentences, in the order of the files."""
    return [
        str(facts["manual"]).replace("[X]", record["x"]).replace("[Y]", record["y"]) + "."
        for name, facts in shipped_facts().items()
        for record in every(name)
    ]


def passages(backbone: Backbone, lengths: Sequence[int], *, seed: int) -> list[Record]:
    """Return records whose ``text`` has the given numbers of tokens (give or take one), made of facts in random order;
    the target is a continent.
    """
    draw = random.Random(f"passages {seed}")
    sentences, countries = fact_sentences(), every("continents")
    records: list[Record] = []
    for length in lengths:
        text = ""
        while len(ids := backbone.tokenizer.encode([text])[0]) < length:
            text = " ".join([text, *draw.sample(sentences, 1 + length // 16)]).strip()
        records.append({"text": backbone.tokenizer.decode(ids[:length]), "y": draw.choice(countries)["y"]})
    return records


def country_sentences(*, train: int, dev: int, seed: int) -> tuple[Records, Records]:
    """Return sentences about countries, labelled with the continent; no country stands in both parts."""
    draw = random.Random(f"sentences {seed}")
    facts = {name: {row["x"]: row["y"] for row in every(name)} for name in ("capitals", "currencies", "domains")}
    countries = [row for row in every("continents") if row["y"] in CONTINENTS.words]
    countries = [row for row in countries if all(row["x"] in values for values in facts.values())]
    draw.shuffle(countries)
    cut = round(len(countries) * train / (train + dev))
    parts = []
    for chosen, count in ((countries[:cut], train), (countries[cut:], dev)):
        rows: list[Record] = []
        for row in chosen:
            known = {name: values[row["x"]] for name, values in facts.items()}
            texts = [frame.format(x=row["x"], **known) for frame in draw.sample(FRAMES, len(FRAMES))]
            # One wording or two of them: 20 to 60 tokens.
            rows += [
                {"text": " ".join(texts[start:end]), "y": row["y"]} for start, end in ((0, 1), (1, 3), (2, 4), (3, 4))
            ]
        draw.shuffle(rows)
        parts.append(Records(rows[:count], name="sentences about countries"))
    return parts[0], parts[1]


def bind(backbone: Backbone, template: str) -> TokenizedTemplate:
    """Bind a pattern to a backbone."""
    parsed = Template.parse(template)
    block = parsed.has_deep and backbone.reads_blocks
    return TokenizedTemplate(parsed, tokenizer=backbone.tokenizer, kind=backbone.kind, block=block)


def items_of(
    bound: TokenizedTemplate, records: Sequence[Record], *, labels: LabelWords | None = None
) -> list[ScoringRequest]:
    """Return items to train on: targets, or classes where there are label words."""
    rows = Records(records, name="benchmark")
    if labels is None:
        return target_requests(bound, rows, with_stop=True)
    return build_requests(bound, as_questions(rows), AnswerSpace(labels))


def repeated(items: Sequence[ScoringRequest], count: int) -> list[ScoringRequest]:
    """Return ``count`` items, from the beginning again where there are not so many."""
    return list(itertools.islice(itertools.cycle(items), count))


def passes(batch_size: int, tokens: float) -> tuple[int, int]:
    """Cut a batch so that no pass reads many more than :data:`PASS_TOKENS` tokens: rows per pass, passes per step."""
    parts = 1
    while batch_size % (2 * parts) == 0 and batch_size / parts * tokens > 1.25 * PASS_TOKENS:
        parts *= 2
    return batch_size // parts, parts


def mean_tokens(items: Sequence[ScoringRequest]) -> float:
    """Return the mean number of tokens and slots of a row."""
    return sum(item.tokens for item in items) / sum(len(item.inputs) for item in items)


class StepClock:
    """Times the steps of a training run from the outside, by what it reports: from the end of the first development
    pass to the end of the last step.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.began = self.ended = time.perf_counter()
        self.is_training = False

    def __call__(self, progress: Progress) -> None:
        """Take note of a report."""
        if progress.stage == "train":
            self.is_training = True
            self.ended = synchronised(self.device)
        elif not self.is_training:
            self.began = synchronised(self.device)

    @property
    def seconds(self) -> float:
        """Seconds of all steps of the first epoch."""
        return self.ended - self.began


def train_seconds(
    backbone: Backbone,
    bound: TokenizedTemplate,
    items: Sequence[ScoringRequest],
    *,
    batch_size: int,
    parts: int = 1,
    seed: int = 0,
) -> float:
    """Train on items for one epoch as ``ptuning train`` does, and return the seconds of its steps."""
    config = TrainConfig(epochs=1, batch_size=batch_size, accumulation_steps=parts, seed=seed)
    clock = StepClock(backbone.device)
    Trainer(backbone, bound, config=config).fit(items, items[:1], report=clock)
    return clock.seconds


def bare_seconds(
    backbone: Backbone, items: Sequence[ScoringRequest], *, batch_size: int, slots: int, backward: bool = True
) -> float:
    """Run the bare backbone forward over the same rows, and backward where asked for, and return the seconds.

    The embeddings are the leaves: no encoder, nothing written in, no optimizer. Every row runs whole, and logits are
    computed at the scored positions only.
    """
    began = synchronised(backbone.device)
    with torch.set_grad_enabled(backward):
        for at in range(0, len(items), batch_size):
            found = torch.logsumexp(bare_logits(backbone, items[at : at + batch_size], slots=slots), dim=-1).sum()
            if backward:
                found.backward()
    return synchronised(backbone.device) - began


def bare_logits(backbone: Backbone, items: Sequence[ScoringRequest], *, slots: int) -> torch.Tensor:
    """Run whole rows in one pass and return the logits at their scored positions, (N, V); where gradients are on, they
    end at the embeddings.
    """
    batch = collate(inputs_of(items), PromptBatch(torch.zeros(slots, backbone.width))).to(backbone.device)
    embeddings = backbone.embed(batch.token_ids).detach().requires_grad_(torch.is_grad_enabled())  # (B, T, E)
    logits, _ = backbone.run(
        embeddings, mask=batch.mask, positions=batch.positions, rows=batch.logit_rows, cols=batch.logit_cols
    )
    return logits


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Run something and return its seconds."""
    began = synchronised(device)
    work()
    return synchronised(device) - began


def synchronised(device: torch.device) -> float:
    """Return the time once a GPU has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
