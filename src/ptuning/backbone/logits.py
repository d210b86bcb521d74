"""Which token a model may write next: transformers' processors of logits, by the settings of writing."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ptuning.config import GenerationSettings


def logits_processor(settings: GenerationSettings) -> Callable[[Tensor, Tensor], Tensor]:
    """Return what turns the logits (or log-probabilities) of the next token, (B, V), into those to choose from.
    It is called with the (B, T) ids that were written before, and does what transformers' ``generate`` does.
    """
    from transformers import generation

    steps = generation.LogitsProcessorList()
    if settings.repetition_penalty != 1.0:
        steps.append(generation.RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
    if settings.do_sample:
        if settings.temperature != 1.0:
            steps.append(generation.TemperatureLogitsWarper(settings.temperature))
        if settings.top_k:
            steps.append(generation.TopKLogitsWarper(settings.top_k))
        if settings.top_p < 1.0:
            steps.append(generation.TopPLogitsWarper(settings.top_p))
    return steps  # type: ignore[return-value]  # the stub asks for a LongTensor
