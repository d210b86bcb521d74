"""Rows behind one beginning in a single row: the logits of each whole row, whatever stands beside it."""

from dataclasses import replace

import pytest
import torch

from ptuning.backbone.backbone import Backbone
from ptuning.engine.forward import forward_packed, keys_and_values, target_logits
from ptuning.engine.prefix_cache import drop_prefix
from ptuning.engine.soft_prompt import PromptBatch
from ptuning.template.encode import Example
from tests.conftest import bound, learned

TEMPLATES = ("{x} [P*2] so [Y]", "{x} [P:It was] a good [P] [Y]", "{x} is [Y]", "{x} [P*3] [Y]")


def prefix_of(backbone: Backbone, example: Example) -> torch.Tensor:
    """Return the keys and values of a row."""
    return keys_and_values(backbone, example, PromptBatch.none(backbone.width))


@torch.no_grad()
def test_rows_side_by_side_are_whole_rows(causal: Backbone) -> None:
    """Rows of four prompts behind one text, of different lengths, with slots and targets of several tokens."""
    record = {"x": "the movie Zürich was great in 1999", "y": "a good film"}
    prompts = [learned(causal, t, seed=at) for at, t in enumerate(TEMPLATES) if "[P" in t]
    examples = [bound(causal, str(prompt.template)).examples([record])[0] for prompt in prompts]
    plain = bound(causal, TEMPLATES[2]).examples([record])[0]
    shared = min(example.slot_positions[0] for example in examples)
    brought = PromptBatch.join(
        [*(prompt.learned(causal) for prompt in prompts), PromptBatch.none(causal.width)], rows=[0, 1, 2, 3]
    )
    rows = [*examples, plain]
    assert len({row.token_ids[:shared] for row in rows}) == 1
    beginning = Example(rows[0].token_ids[:shared], (), (shared - 1,), (), 0)
    prefix = prefix_of(causal, beginning)
    left = [drop_prefix(row, shared) for row in rows]
    found = forward_packed(causal, left, brought, prefix)
    expected = torch.cat([target_logits(causal, [row], brought.take([at])) for at, row in enumerate(rows)])
    assert torch.allclose(found, expected, atol=1e-4)


@torch.no_grad()
def test_a_row_does_not_read_its_neighbour(causal: Backbone) -> None:
    """Other tokens in one row change nothing in the other."""
    nothing = PromptBatch.none(causal.width)
    prefix = prefix_of(causal, Example((5, 6, 7), (), (2,), (), 0))
    one, other = Example((8, 9), (), (1,), (), 0), Example((10, 11, 12), (), (2,), (), 0)
    first = forward_packed(causal, [one, other], nothing, prefix)
    second = forward_packed(causal, [one, replace(other, token_ids=(13, 14, 12))], nothing, prefix)
    assert torch.allclose(first[0], second[0], atol=1e-5)
    assert first[1].tolist() != pytest.approx(second[1].tolist(), abs=1e-4)
