"""The controlled-knowledge experiment: its sentences say what they should, and its whole path runs at a toy size."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import ptuning
from experiments import recall
from ptuning.errors import FileError
from ptuning.template.examples import filled
from ptuning.template.language import Template
from tests.conftest import ROOT

TOY = recall.Settings(
    relations=("capitals", "domains"),
    facts=16,
    width=16,
    layers=1,
    heads=2,
    epochs=1,
    prompt_seeds=2,
    prompt=ptuning.TrainConfig(epochs=1),
)
WORDINGS, OTHER = recall.load_wordings()
FACTS = recall.load_facts(recall.Settings())
TOKENIZER = recall.make_tokenizer(FACTS)


@cache
def corpus() -> list[Any]:
    """The sentences of all facts, made once."""
    return list(recall.make_corpus(FACTS, TOKENIZER))


def words(text: str) -> list[int]:
    """Token ids of a text without the special ones."""
    return list(TOKENIZER(text, add_special_tokens=False)["input_ids"])


def test_names_are_one_token_wherever_they_stand() -> None:
    """Targets must be single tokens to be ranked, and a name inside of another one must not be cut out of it."""
    for rows in FACTS.values():
        for row in rows:
            for name in row.values():
                assert len(words(name)) == 1, name
    assert len(words("Niger Nigeria Guinea Guinea-Bissau Dominica Dominican Republic")) == 6
    assert TOKENIZER.decode(words("The capital of Panama is Panama City .")[5]) == "Panama City"


def test_every_word_that_is_held_back_in_one_wording_stands_in_a_sentence() -> None:
    """A held-back wording with a word that the model never saw would fail for a reason of its own."""
    for wordings in WORDINGS.values():
        for wording in wordings["held_back"]:
            text = filled(Template.parse(wording).pieces, {"x": "Kenya", "y": "Nairobi"})
            assert TOKENIZER.unk_token_id not in words(text), wording


def test_the_corpus_states_every_fact_in_every_wording_but_those_held_back() -> None:
    said = {sentence.token_ids[1:-1] for sentence in corpus()}
    for relation, rows in FACTS.items():
        assert not set(WORDINGS[relation]["stated"]) & set(WORDINGS[relation]["held_back"])
        for wordings, states in ((WORDINGS[relation]["stated"], True), (WORDINGS[relation]["held_back"], False)):
            for wording in wordings:
                for row in rows[::10]:
                    text = filled(Template.parse(wording).pieces, row)
                    assert (tuple(words(text)) in said) is states, text


def test_the_object_is_where_the_corpus_says() -> None:
    objects = {words(row["y"])[0] for rows in FACTS.values() for row in rows}
    stating = [sentence for sentence in corpus() if sentence.object_at != recall.NOWHERE]
    assert len(stating) == sum(len(rows) * len(WORDINGS[name]["stated"]) for name, rows in FACTS.items())
    assert all(sentence.token_ids[sentence.object_at] in objects for sentence in stating)
    assert len(corpus()) - len(stating) == len(OTHER) * len({row["x"] for rows in FACTS.values() for row in rows})


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_masks(fraction: float) -> None:
    """Objects as often as asked for, never a special token or a pad, and something in every sentence."""
    settings = replace(TOY, object_masked_fraction=fraction, words_masked_fraction=0.3)
    sentences = [*corpus()[:40], *corpus()[-40:]]
    token_ids, is_token = recall.padded(sentences)
    is_masked = recall.masks(sentences, is_token, settings, draws=torch.Generator().manual_seed(0))
    assert is_masked.any(dim=1).all()
    assert not (is_masked & ~is_token).any()
    for special in (TOKENIZER.cls_token_id, TOKENIZER.sep_token_id):
        assert not is_masked[token_ids == special].any()
    assert 0.2 < float(is_masked[40:].sum() / is_token[40:].sum()) < 0.35
    for row, sentence in enumerate(sentences[:40]):
        assert is_masked[row, sentence.object_at] == bool(fraction), sentence


def test_the_whole_path_at_a_toy_size(tmp_path: Path) -> None:
    out = tmp_path / "recall"
    recall.run(TOY, out=out, report=lambda _: None)
    results = recall.read_results(out / recall.RESULTS_FILE)
    for name, result in results.items():
        assert result["facts"] == {"train": 6, "dev": 2, "test": 8}
        assert set(result["held_back"]["each"]) == set(WORDINGS[name]["held_back"])
        assert set(result["p_tuning"]["each"]) == set(result["p_tuning_random_weights"]["each"]) == {"seed 0", "seed 1"}
        assert result["p_tuning"]["mean"]["n"] == 8
    assert (out / recall.TABLE_FILE).read_text(encoding="utf-8") == recall.tables(results)
    # What is left can be used as any other backbone, prompt and data.
    backbone = ptuning.load_backbone(out / recall.MODEL_FOLDER)
    prompt = ptuning.Prompt.load(out / "prompts" / "capitals" / "seed-0" / "prompt")
    test = ptuning.load_records(out / "facts" / "capitals" / "test.jsonl")
    hits = recall.hits(ptuning.PromptModel(backbone), prompt, test)
    assert sum(hits) / len(hits) == results["capitals"]["p_tuning"]["each"]["seed 0"]["value"]
    with pytest.raises(FileError, match="not empty"):
        recall.run(TOY, out=out, report=lambda _: None)


def test_the_documented_tables_are_those_of_the_documented_results() -> None:
    docs = ROOT / "docs" / "evidence"
    assert recall.tables(recall.read_results(docs / "recall.json")) in (docs / "recall.md").read_text(encoding="utf-8")
