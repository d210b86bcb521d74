"""Why an answer ended: at an end, at the end of its line, or since there may be no more of it."""

from __future__ import annotations

from ptuning.backbone.backbone import Backbone
from ptuning.engine.decoding import Hypothesis, StopCriteria


def ids_of(backbone: Backbone, text: str) -> tuple[int, ...]:
    (ids,) = backbone.tokenizer.encode([text])
    return tuple(ids)


def test_why_an_answer_ended(causal: Backbone) -> None:
    tokenizer, own = causal.tokenizer, ids_of(causal, " a good film")
    end, line = next(iter(tokenizer.end_ids)), ids_of(causal, "\n")[-1]
    ending = StopCriteria(causal, max_tokens=len(own) + 1, multiline=False, stop_strings=("film",))
    assert ending.stopped((*own, end)) == "end"  # also at its most tokens
    assert ending.stopped((*own[:1], line)) == "line"
    assert ending.stopped(own) == "end"  # a stop string
    assert ending.stopped(own[:1]) == "length"
    many = StopCriteria(causal, max_tokens=2, multiline=True)
    assert many.stopped((*own[:1], line)) == "length"  # a text of several lines goes on behind a line
    assert many.generated(Hypothesis((*own[:1], end), -1.0)).stopped == "end"
