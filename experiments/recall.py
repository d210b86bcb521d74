"""A controlled-knowledge experiment: does P-tuning retrieve what a masked model has learned?

    python -m experiments.recall [--out FOLDER] [--threads N]

Trains a tiny BERT from scratch on sentences that state the shipped facts in several wordings; other wordings are held
back. It then compares, on the facts that no prompt was learned from: the held-back wordings as manual prompts, P-tuning
on the other half of the facts, and the same P-tuning on a model with random weights. docs/evidence/recall.md explains
the figures.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypedDict

import torch
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

import ptuning
from ptuning.backbone.backbone import Backbone, quiet
from ptuning.backbone.tokenizer import TextTokenizer
from ptuning.data.questions import as_questions
from ptuning.data.reading import SPLITS
from ptuning.data.splits import split_questions
from ptuning.files import Json, make_folder, write_json, write_json_lines, write_text
from ptuning.names import check_free
from ptuning.prompt.score import answer_records
from ptuning.provenance import versions
from ptuning.records import TARGET_FIELD, Records
from ptuning.statistics import Score, majority, mean_difference, score
from ptuning.template.encode import TokenizedTemplate
from ptuning.template.language import Template

WORDINGS = Path(__file__).with_suffix(".json")
MODEL_FOLDER, RESULTS_FILE, TABLE_FILE = "model", "results.json", "table.md"
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CONTEXT_TOKENS = 32  # twice the longest sentence
TEST_FRACTION, DEV_FRACTION = 0.5, 0.2  # of the facts; of those that are left
NOWHERE = -1  # the index of the object in a sentence that states no fact


class Wordings(TypedDict):
    """The wordings of a relation: those that the model is trained on, and those it is only asked with."""

    stated: list[str]
    held_back: list[str]


class Sentence(NamedTuple):
    """A sentence of the corpus as token ids, and the index of the object in it."""

    token_ids: tuple[int, ...]
    object_at: int


@dataclass(frozen=True)
class Asked:
    """The recall of several wordings, or of prompts of several seeds.

    Args:
        each: The score of each wording or seed.
        per_fact: The mean of each fact over the wordings or seeds.
    """

    each: Mapping[str, Score]
    per_fact: Sequence[float]

    def to_json(self) -> dict[str, Json]:
        """Return the scores as the results hold them."""
        return {
            "each": {name: score.to_json() for name, score in self.each.items()},
            "mean": score(self.per_fact).to_json(),
        }


@dataclass(frozen=True)
class Settings:
    """Settings of the experiment.

    Args:
        relations: Names of shipped facts.
        facts: Maximum number of facts per relation; None for all.
        width: Hidden size of the model.
        layers: Number of layers of the model.
        heads: Number of attention heads of the model.
        dropout: Dropout of the model in its own training.
        epochs: Passes of the model over the corpus.
        batch_size: Sentences per step.
        lr: Peak learning rate of the model's own training.
        object_masked_fraction: Share of the sentences in which the object is masked.
        words_masked_fraction: Share of all other tokens that is masked.
        seed: Seed of the split, of the model and of its training.
        prompt_seeds: Number of prompts learned for each relation.
        template: The template to learn.
        prompt: Settings of P-tuning.
    """

    relations: tuple[str, ...] = ("capitals", "domains", "currencies")
    facts: int | None = None
    width: int = 64
    layers: int = 2
    heads: int = 4
    dropout: float = 0.0
    epochs: int = 32
    batch_size: int = 64
    lr: float = 2e-3
    object_masked_fraction: float = 0.8
    words_masked_fraction: float = 0.15
    seed: int = 0
    prompt_seeds: int = 3
    template: str = "[P*3] [X] [P*3] [Y] [P*2]"
    prompt: ptuning.TrainConfig = field(default_factory=lambda: ptuning.TrainConfig(epochs=30, patience=10))


def load_wordings() -> tuple[dict[str, Wordings], list[str]]:
    """Return the wordings of each relation, and sentences that use the same words and state no fact."""
    read = json.loads(WORDINGS.read_text(encoding="utf-8"))
    return read["relations"], read["other"]


def load_facts(settings: Settings) -> dict[str, Records]:
    """Return the shipped facts. The parts of each relation are joined, because this experiment splits them anew."""
    return {
        name: Records(
            [row for part in SPLITS for row in ptuning.load_records(f"{name}:{part}")][: settings.facts], name=name
        )
        for name in settings.relations
    }


def make_tokenizer(facts: Mapping[str, Records]) -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words in which each subject and each object is one token, even if it has several
    words.
    """
    wordings, other = load_wordings()
    splitter = pre_tokenizers.Whitespace()
    texts = [*other, *(text for wording in wordings.values() for text in wording["stated"])]
    words = {
        word
        for text in texts
        for word, _ in splitter.pre_tokenize_str(text.lower().replace("[x]", " ").replace("[y]", " "))
    }
    raw = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate([*SPECIALS, *sorted(words)])}, unk_token="[UNK]")
    )
    raw.normalizer = normalizers.Lowercase()
    raw.pre_tokenizer = splitter
    raw.add_special_tokens(list(SPECIALS))
    names = sorted({name for rows in facts.values() for row in rows for name in (row["x"], row[TARGET_FIELD])})
    raw.add_tokens([AddedToken(name, single_word=True, normalized=False) for name in names])
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[("[CLS]", SPECIALS.index("[CLS]")), ("[SEP]", SPECIALS.index("[SEP]"))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=CONTEXT_TOKENS,
    )


def make_corpus(facts: Mapping[str, Records], tokenizer: PreTrainedTokenizerFast) -> list[Sentence]:
    """Return every fact in every wording that is not held back, and the sentences that state no fact."""
    wordings, other = load_wordings()
    text_tokenizer = TextTokenizer(tokenizer, max_tokens=CONTEXT_TOKENS)
    corpus = []
    for relation, rows in facts.items():
        for wording in wordings[relation]["stated"]:
            bound = TokenizedTemplate(Template.parse(wording), tokenizer=text_tokenizer, kind="masked")
            for example in bound.examples(rows):
                ((at,), (target,)) = example.logit_positions, example.target_ids
                corpus.append(Sentence((*example.token_ids[:at], target, *example.token_ids[at + 1 :]), at))
    countries = sorted({row["x"] for rows in facts.values() for row in rows})
    corpus += [
        Sentence(tuple(tokenizer(text.replace("[X]", name))["input_ids"]), NOWHERE)
        for text in other
        for name in countries
    ]
    return corpus


def new_model(tokenizer: PreTrainedTokenizerFast, settings: Settings) -> BertForMaskedLM:
    """Return an untrained BERT."""
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=settings.width,
            intermediate_size=4 * settings.width,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            max_position_embeddings=CONTEXT_TOKENS,
            type_vocab_size=1,
            initializer_range=settings.width**-0.5,
            hidden_dropout_prob=settings.dropout,
            attention_probs_dropout_prob=settings.dropout,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.set_attn_implementation("eager")  # at this size twice as fast as fused attention
    # Small position embeddings at first: a model of this size then finds the subject by its word, not by its position.
    with torch.no_grad():
        model.bert.embeddings.position_embeddings.weight.mul_(0.1)
    return model


def train_model(
    corpus: Sequence[Sentence],
    tokenizer: PreTrainedTokenizerFast,
    settings: Settings,
    *,
    report: Callable[[str], None] | None = None,
) -> BertForMaskedLM:
    """Train a BERT from scratch to fill masks in the sentences of the corpus."""
    torch.manual_seed(settings.seed)
    model = new_model(tokenizer, settings)
    draws = torch.Generator().manual_seed(settings.seed)
    steps_per_epoch = math.ceil(len(corpus) / settings.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.lr, total_steps=settings.epochs * steps_per_epoch, pct_start=0.1, cycle_momentum=False
    )
    model.train()
    for epoch in range(1, settings.epochs + 1):
        loss_sum, masked_tokens = 0.0, 0
        for chosen in torch.randperm(len(corpus), generator=draws).split(settings.batch_size):
            sentences = [corpus[index] for index in chosen.tolist()]
            token_ids, is_token = padded(sentences)  # (B, T), (B, T)
            is_masked = masks(sentences, is_token, settings, draws=draws)  # (B, T)
            inputs = token_ids.masked_fill(is_masked, tokenizer.mask_token_id)  # (B, T)
            # Sentences begin at random positions, as in a document, so that the model does not learn from positions.
            starts = torch.randint(CONTEXT_TOKENS - token_ids.shape[1] + 1, (len(token_ids), 1), generator=draws)
            positions = starts + torch.arange(token_ids.shape[1])  # (B, T)
            hidden = model.bert(
                input_ids=inputs, attention_mask=is_token.long(), position_ids=positions
            ).last_hidden_state  # (B, T, E)
            # The head runs at the masks only; on all tokens it would cost more than the rest of the model.
            logits = model.cls(hidden[is_masked])  # (M, V)
            loss = cross_entropy(logits, token_ids[is_masked])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            loss_sum += float(loss.detach()) * len(logits)
            masked_tokens += len(logits)
        if report is not None:
            report(f"epoch {epoch}/{settings.epochs}: loss {loss_sum / masked_tokens:.3f}")
    model.eval()
    return model


def padded(sentences: Sequence[Sentence]) -> tuple[Tensor, Tensor]:
    """Return the token ids of B sentences, (B, T) int64, and where they are tokens, (B, T) bool."""
    token_ids = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(sentence.token_ids) for sentence in sentences], batch_first=True, padding_value=-1
    )  # (B, T)
    return token_ids.clamp(min=SPECIALS.index("[PAD]")), token_ids >= 0


def masks(sentences: Sequence[Sentence], is_token: Tensor, settings: Settings, *, draws: torch.Generator) -> Tensor:
    """Draw the masked tokens, (B, T) bool: most objects, and some of the other tokens. Special tokens stay."""
    rows = torch.arange(len(sentences))
    lengths = is_token.sum(dim=1)  # (B,)
    is_masked = is_token & (torch.rand(is_token.shape, generator=draws) < settings.words_masked_fraction)
    is_masked[rows, 0] = is_masked[rows, lengths - 1] = False
    object_at = torch.tensor([sentence.object_at for sentence in sentences])
    stating = rows[object_at != NOWHERE]
    is_masked[stating, object_at[stating]] = torch.rand(len(stating), generator=draws) < settings.object_masked_fraction
    # A sentence without a mask would not contribute to the loss, so its first word is masked.
    is_masked[~is_masked.any(dim=1), 1] = True
    return is_masked


def hits(model: ptuning.PromptModel, prompt: ptuning.Prompt, facts: Records, *, closed: bool = False) -> list[float]:
    """Return 1.0 for each fact that the prompt recalls, else 0.0.

    Args:
        model: The model to ask.
        prompt: A learned or a manual prompt.
        facts: N facts.
        closed: Choose among the objects of these facts instead of among all tokens.
    """
    objects = sorted({row[TARGET_FIELD] for row in facts}) if closed else None
    return [float(answer.hit) for answer in answer_records(model, prompt, facts, closed=objects, single_token=True)]


def per_fact(rows: Sequence[Sequence[float]]) -> list[float]:
    """Return each fact's mean over several wordings or seeds."""
    return [sum(values) / len(values) for values in zip(*rows, strict=True)]


def ask(model: ptuning.PromptModel, wordings: Sequence[str], facts: Records, *, closed: bool = False) -> Asked:
    """Ask for facts with each of several wordings."""
    rows = [hits(model, ptuning.Prompt.manual(wording), facts, closed=closed) for wording in wordings]
    return Asked(dict(zip(wordings, map(score, rows), strict=True)), per_fact(rows))


def learn(backbone: Backbone, parts: Mapping[str, Records], settings: Settings, out: Path | None) -> Asked:
    """Learn a prompt per seed on the training part, chosen on the development part, and ask for the test part's facts.

    Args:
        backbone: The frozen model.
        parts: ``train``, ``dev`` and ``test``.
        settings: Settings of the experiment.
        out: Folder for the run of each seed; None for nowhere.
    """
    rows, scores = [], {}
    for seed in range(settings.prompt_seeds):
        result = ptuning.train(
            settings.template,
            parts["train"],
            dev=parts["dev"],
            backbone=backbone,
            config=settings.prompt.with_settings({"seed": seed}),
            out=out / f"seed-{seed}" if out is not None else None,
        )
        rows.append(hits(ptuning.PromptModel(backbone), result.prompt, parts["test"]))
        scores[f"seed {seed}"] = score(rows[-1])
    return Asked(scores, per_fact(rows))


def split(facts: Records, settings: Settings) -> dict[str, Records]:
    """Split the facts of a relation: one half to test, the other to learn a prompt from and to choose by."""
    known, test = split_questions(as_questions(facts), fraction=TEST_FRACTION, seed=settings.seed)
    train, dev = split_questions(known, fraction=DEV_FRACTION, seed=settings.seed)
    return {"train": train.records, "dev": dev.records, "test": test.records}


def run_relation(backbone: Backbone, facts: Records, settings: Settings, *, out: Path) -> dict[str, Json]:
    """Measure everything about one relation on the test half of its facts.

    Args:
        backbone: The trained model.
        facts: All facts of the relation; the model has read all of them.
        settings: Settings of the experiment.
        out: Folder of the experiment.
    """
    parts = split(facts, settings)
    for name, part in parts.items():
        make_folder(out / "facts" / facts.name)
        write_json_lines(out / "facts" / facts.name / f"{name}.jsonl", part)
    test, model, wordings = parts["test"], ptuning.PromptModel(backbone), load_wordings()[0][facts.name]
    guess = majority([row[TARGET_FIELD] for part in ("train", "dev") for row in parts[part]])
    held_back = ask(model, wordings["held_back"], test)
    learned = learn(backbone, parts, settings, out / "prompts" / facts.name)
    control = learn(backbone.with_random_weights(seed=settings.seed), parts, settings, None)
    gains = [ours - theirs for ours, theirs in zip(learned.per_fact, held_back.per_fact, strict=True)]
    return {
        "facts": {name: len(part) for name, part in parts.items()},
        "majority": score([float(row[TARGET_FIELD] == guess) for row in test]).to_json(),
        "stated": ask(model, wordings["stated"], test).to_json(),
        "stated_learning_half": ask(model, wordings["stated"], Records([*parts["train"], *parts["dev"]])).to_json(),
        "held_back": held_back.to_json(),
        "held_back_among_objects": ask(model, wordings["held_back"], test, closed=True).to_json(),
        "p_tuning": learned.to_json(),
        "p_tuning_random_weights": control.to_json(),
        "p_tuning_minus_held_back": mean_difference(gains).to_json(),
    }


def run(settings: Settings, *, out: Path, report: Callable[[str], None]) -> dict[str, Json]:
    """Run the experiment and write its model, facts, prompts and results.

    Raises:
        PTuningError: If ``out`` is not empty, or a setting does not fit.
    """
    began, began_cpu = time.monotonic(), time.process_time()
    check_free(out)
    facts = load_facts(settings)
    tokenizer = make_tokenizer(facts)
    corpus = make_corpus(facts, tokenizer)
    report(f"{sum(map(len, facts.values()))} facts, {len(corpus)} sentences, {len(tokenizer)} tokens")
    model = train_model(corpus, tokenizer, settings, report=report)
    with quiet():
        model.save_pretrained(out / MODEL_FOLDER)
    tokenizer.save_pretrained(out / MODEL_FOLDER)
    model_seconds = time.monotonic() - began
    backbone = ptuning.load_backbone(out / MODEL_FOLDER, dtype="float32", device="cpu")
    relations: dict[str, Json] = {}
    for name, rows in facts.items():
        relations[name] = run_relation(backbone, rows, settings, out=out)
        report(f"{name}: done after {time.monotonic() - began:.0f} s")
    results: dict[str, Json] = {
        "settings": {**vars(settings), "relations": list(settings.relations), "prompt": settings.prompt.to_json()},
        "versions": dict(versions()),
        "sentences": len(corpus),
        "tokens": len(tokenizer),
        "parameters": backbone.parameters,
        "model_seconds": round(model_seconds),
        "seconds": round(time.monotonic() - began),
        "cpu_seconds": round(time.process_time() - began_cpu),
        "relations": relations,
    }
    write_json(out / RESULTS_FILE, results)
    write_text(out / TABLE_FILE, tables(read_results(out / RESULTS_FILE)))
    return results


class ScoreJson(TypedDict):
    """A score in the results."""

    value: float
    low: float
    high: float
    n: int


class AskedJson(TypedDict):
    """The recall of several wordings or seeds in the results."""

    each: dict[str, ScoreJson]
    mean: ScoreJson


class RelationJson(TypedDict):
    """What was measured about a relation."""

    facts: dict[str, int]
    majority: ScoreJson
    stated: AskedJson
    stated_learning_half: AskedJson
    held_back: AskedJson
    held_back_among_objects: AskedJson
    p_tuning: AskedJson
    p_tuning_random_weights: AskedJson
    p_tuning_minus_held_back: ScoreJson


def read_results(path: Path) -> dict[str, RelationJson]:
    """Read the relations of a results file."""
    relations: dict[str, RelationJson] = json.loads(path.read_text(encoding="utf-8"))["relations"]
    return relations


def tables(relations: Mapping[str, RelationJson]) -> str:
    """Write the results as two Markdown tables: what is compared, and the held-back wordings one by one."""
    rows: list[tuple[str, Callable[[RelationJson], str]]] = [
        ("facts to learn from / choose by / test", lambda row: " / ".join(str(n) for n in row["facts"].values())),
        ("majority answer of the learning half", lambda row: interval(row["majority"])),
        ("held-back wordings, mean", lambda row: interval(row["held_back"]["mean"])),
        ("held-back wordings, best", lambda row: interval(extreme(row["held_back"], max))),
        ("held-back, among the objects only, mean", lambda row: interval(row["held_back_among_objects"]["mean"])),
        ("held-back, among the objects only, best", lambda row: interval(extreme(row["held_back_among_objects"], max))),
        ("**P-tuning, mean over seeds**", lambda row: f"**{interval(row['p_tuning']['mean'])}**"),
        ("P-tuning, lowest seed", lambda row: interval(extreme(row["p_tuning"], min))),
        ("P-tuning minus mean of held-back", lambda row: interval(row["p_tuning_minus_held_back"])),
        ("P-tuning on random weights, mean", lambda row: interval(row["p_tuning_random_weights"]["mean"])),
        (
            "P-tuning on random weights, highest seed",
            lambda row: interval(extreme(row["p_tuning_random_weights"], max)),
        ),
        ("wordings the model was trained on, mean", lambda row: interval(row["stated"]["mean"])),
    ]
    lines = [f"| | {' | '.join(relations)} |", "|---|" + "---|" * len(relations)]
    lines += [f"| {name} | {' | '.join(write(row) for row in relations.values())} |" for name, write in rows]
    lines += ["", "| relation | held-back wording | among all tokens | among the objects |", "|---|---|---|---|"]
    for name, row in relations.items():
        closed = row["held_back_among_objects"]["each"]
        lines += [
            f"| {name} | {wording} | {interval(score)} | {interval(closed[wording])} |"
            for wording, score in row["held_back"]["each"].items()
        ]
    return "\n".join(lines) + "\n"


def extreme(scores: AskedJson, choose: Callable[..., ScoreJson]) -> ScoreJson:
    """Return the score of the best or the worst wording or seed."""
    return choose(scores["each"].values(), key=lambda row: row["value"])


def interval(score: ScoreJson) -> str:
    """Write a score with its 95 % interval."""
    return f"{score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}]"


def main() -> None:
    """Parse the command line, run, and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/recall"), help="new folder (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of split, model and training (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    try:
        run(Settings(seed=given.seed), out=given.out, report=lambda line: print(line, flush=True))
    except ptuning.PTuningError as error:
        sys.exit(f"{error}")
    print((given.out / TABLE_FILE).read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
