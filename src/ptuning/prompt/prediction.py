"""Predictions: the answer to a record, and the possible answers with their probabilities."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ptuning.files import Json

if TYPE_CHECKING:
    from ptuning.engine.decoding import StopReason


@dataclass(frozen=True)
class Candidate:
    """A possible answer with its total natural log-probability. ``collisions`` are others with the same
    tokens; None if it does not know the answer (:func:`ptuning.template.ambiguity.collisions_of`).
    """

    text: str
    log_prob: float
    collisions: tuple[str, ...] | None = ()

    @classmethod
    def ranked(
        cls, texts: Sequence[str], log_probs: Sequence[float], collisions: Sequence[frozenset[int] | None]
    ) -> list[Candidate]:
        """Return candidates, best first, on a tie in the given order; ``collisions`` are places among the texts."""
        named = [None if own is None else tuple(texts[at].strip() for at in sorted(own)) for own in collisions]
        return sorted(map(cls, texts, log_probs, named), key=lambda candidate: -candidate.log_prob)

    def to_json(self) -> dict[str, Json]:
        """Return the candidate as ``predict --json`` prints it."""
        return {"text": self.text, "log_prob": self.log_prob}

    @property
    def probability(self) -> float:
        """Its probability, in [0, 1]."""
        return math.exp(self.log_prob)


@dataclass(frozen=True)
class Prediction:
    """The answer to one record: the first of ``candidates``, best first. Written answers have ``tokens``, and
    ``stopped`` says why they ended (:data:`~ptuning.engine.decoding.StopReason`); labels and choices have the
    ``probabilities`` of all of them. If the likeliest is not likely enough to be given as the answer (``abstained``),
    ``text`` is empty.
    """

    text: str
    candidates: tuple[Candidate, ...]
    tokens: int | None = None
    probabilities: Mapping[str, float] | None = None
    abstained: bool = False
    stopped: StopReason | None = None

    @classmethod
    def of_classes(
        cls, ranked: Sequence[Candidate], *, top_k: int | None = None, min_probability: float | None = None
    ) -> Prediction:
        """Return the prediction of labels or choices, best first, whose probabilities add up to 1."""
        probabilities = {candidate.text: candidate.probability for candidate in ranked}
        abstained = min_probability is not None and not ranked[0].probability >= min_probability
        text = "" if abstained else ranked[0].text
        return cls(text, tuple(ranked[:top_k]), probabilities=probabilities, abstained=abstained)

    @property
    def log_prob(self) -> float:
        """Log-probability of the answer, or of the likeliest one that was not given."""
        return self.candidates[0].log_prob

    @property
    def probability(self) -> float:
        """Probability of the answer, or of the likeliest one that was not given."""
        return self.candidates[0].probability

    def to_json(self) -> dict[str, Json]:
        """Return the prediction as ``predict --json`` prints it."""
        row: dict[str, Json] = {"prediction": None if self.abstained else self.text}
        if self.abstained:
            row["abstained"] = True
        if self.probabilities is not None:
            row["probabilities"] = dict(self.probabilities)
        row["candidates"] = [candidate.to_json() for candidate in self.candidates]
        return row if self.tokens is None else {**row, "tokens": self.tokens}
