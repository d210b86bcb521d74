"""Rows that join and leave while others are written."""

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from ptuning.backbone.backbone import Backbone
from ptuning.config import GenerationSettings
from ptuning.engine import decoding as decoder
from ptuning.engine.decoding import Decoder, DecodingState, OutputSequence, StopCriteria
from ptuning.engine.forward import forward
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prompt import Prompt
from ptuning.records import Record
from tests.conftest import CAUSAL, RECORDS, learned
from tests.families import built

WAYS: tuple[dict[str, object], ...] = (
    {},
    {"repetition_penalty": 1.7},
    {"do_sample": True, "temperature": 0.7, "seed": 3},
    {"do_sample": True, "repetition_penalty": 1.3, "top_k": 5},
    {"max_new_tokens": 2},
)
TEXTS: Sequence[Record] = (*RECORDS, {"x": "a much longer text that was written for nobody in particular, " * 3})


def prompts(backbone: Backbone) -> list[Prompt]:
    long = replace(learned(backbone, "[P*3] [X] [P*3] [Y]", seed=1), target_tokens=6, multiline=True)
    return [long, learned(backbone, "[P:about] {x} [P] so [Y]", seed=2), Prompt.manual("The capital of [X] is [Y]")]


def writer(backbone: Backbone, record: Record, prompt: Prompt, way: dict[str, object]) -> Decoder:
    """Return a writer of one row, as ``predict`` would write it."""
    settings = GenerationSettings.of(way)
    bound = prompt.bind(backbone)
    most = settings.max_new_tokens or prompt.target_tokens + 2
    examples = bound.contexts([record], target_tokens=most)
    first = forward(backbone, examples, prompt.learned(backbone), pad_side="left", keep=True)
    ending = StopCriteria.of(backbone, bound, most)
    return Decoder(backbone, DecodingState(backbone, examples, first), [OutputSequence(ending, settings)])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("family", CAUSAL)
def test_lines_that_join_and_leave_are_written_as_alone(
    backbone: Backbone, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Invariant *Alone or in company*: whatever joins a line, between which steps, by which prompt and settings."""
    monkeypatch.setattr(decoder, "DROPPED_PADS", 2)
    choose, model = random.Random(seed), PromptModel(backbone)
    waiting = [(record, choose.choice(prompts(backbone)), choose.choice(WAYS)) for record in TEXTS for _ in range(2)]
    choose.shuffle(waiting)
    asked: dict[OutputSequence, tuple[Record, Prompt, dict[str, object]]] = {}
    together, widest = None, 0
    with torch.no_grad():
        while waiting or (together is not None and together.sequences):
            for _ in range(choose.randrange(3) if waiting else 0):
                if not waiting:
                    break
                row = waiting.pop()
                new = writer(backbone, *row)
                asked[new.sequences[0]] = row
                if together is None or not together.sequences:
                    together = new
                else:
                    assert together.can_join(new)
                    together.join(new)
            if together is not None and together.sequences:
                widest = max(widest, len(together.sequences))
                together.step()
    assert widest > 3
    for line, (record, prompt, way) in asked.items():
        alone = model.predict([record], prompt, generation=way)[0]
        found = line.ending.generated(line.hypothesis)
        assert (found.text, found.tokens) == (alone.text, alone.tokens)
        assert found.log_prob == pytest.approx(alone.log_prob, abs=1e-3)


def test_pads_that_nobody_needs_are_dropped(causal: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the long row has left, the short ones no longer carry its width."""
    monkeypatch.setattr(decoder, "DROPPED_PADS", 4)
    with torch.no_grad():
        one = writer(causal, RECORDS[0], prompts(causal)[0], {"max_new_tokens": 30})
        one.join(writer(causal, TEXTS[-1], prompts(causal)[0], {"max_new_tokens": 1}))
        wide = one._state._mask.shape[1]
        one.step()
    assert len(one.sequences) == 1
    assert one._state._mask.shape[1] < wide / 2
    assert bool(one._state._mask[:, 0].all())


@pytest.mark.parametrize("name", ["t5", "mamba", "gemma-3"])
def test_rows_whose_memory_holds_more_are_written_apart(name: str) -> None:
    """An encoder's output, a state, or windows: what cannot be joined says so."""
    backbone = built(name)
    with torch.no_grad():
        one, two = (writer(backbone, record, Prompt.manual("[X] is [Y]"), {}) for record in RECORDS[:2])
    assert not one.can_join(two)


def test_prompts_with_different_words_on_the_decoders_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant *Alone or in company*: what counts as written differs in length from row to row."""
    backbone = built("t5")
    two = [Prompt.manual("[X] [>] so it is [Y]"), Prompt.manual("[X] is [>] [Y]")]
    model, rows = PromptModel(backbone), [two[at % 2] for at in range(len(RECORDS))]
    for way in ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5, "num_beams": 2}, {}):
        way = {"max_new_tokens": 4, **way}
        together = model.predict(RECORDS, rows, generation=way)
        for record, prompt, found in zip(RECORDS, rows, together, strict=True):
            alone = model.predict([record], prompt, generation=way)[0]
            assert (found.text, found.tokens) == (alone.text, alone.tokens)
