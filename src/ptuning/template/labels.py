"""Label words: which words mean which label (the verbalizer), and how a closed set of answers is scored."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from ptuning.errors import ConfigError, LabelWordError, RecordError, closest, shown
from ptuning.files import Json
from ptuning.records import TARGET_FIELD, Record, Records, check_text
from ptuning.template.encode import Example, TokenizedTemplate

# The score of a text of several tokens: its total log-probability, or the mean over its tokens.
Normalise = Literal["sum", "mean"]
# The fields of an empty record. Source: Zhao et al. (2021), arXiv:2102.09690, section 5 ("content-free input").
EMPTY_TEXT = "N/A"
EXAMPLE = '"positive=great,good;negative=terrible"'
SHOWN_ROWS = 5  # in one message


@dataclass(frozen=True)
class Scoring:
    """How a closed set of answers is scored: by total log-probability or its mean over tokens, less the score for an
    empty record if ``calibrate``. ``keep`` are fields that hold one of a few words, which an empty record keeps.
    """

    normalise: Normalise = "sum"
    calibrate: bool = False
    keep: Collection[str] = ()

    def __post_init__(self) -> None:
        if self.normalise not in get_args(Normalise):
            raise ConfigError(f"normalise is sum or mean, not '{self.normalise}'")

    def empty_record(self, record: Record) -> Record:
        """Return a record without content; empty fields stay empty."""
        return {name: text if name in self.keep or not text else EMPTY_TEXT for name, text in record.items()}


PLAIN = Scoring()


@dataclass(frozen=True)
class LabelWords:
    """The words of each label, a text standing for one word. Fewer than two labels, no words, or a word of two labels
    are a LabelWordError. A label that is its own word may be given by its name alone (:meth:`of`).

    >>> LabelWords({"positive": ["great", "good"], "negative": "terrible"}).words
    {'positive': ('great', 'good'), 'negative': ('terrible',)}
    """

    words: Mapping[str, Sequence[str]]

    def __post_init__(self) -> None:
        words = {str(label).strip(): _words_of(label, listed) for label, listed in self.words.items()}
        if len(words) < len(self.words):
            raise LabelWordError(f"of the labels {', '.join(map(repr, self.words))} two have the same name")
        object.__setattr__(self, "words", words)
        if len(self.words) < 2:
            raise LabelWordError(f"label words need at least two labels, with ';' between them, as in {EXAMPLE}")
        owner: dict[str, str] = {}
        for label, listed in words.items():
            if not (label and listed and all(listed)):
                raise LabelWordError(f"label '{label}' has no name, no word or an empty one; write {EXAMPLE}")
            for word in listed:
                if word in owner:
                    raise LabelWordError(
                        f"the word '{word}' is given twice, for '{owner[word]}' and '{label}'; each label "
                        "needs its own words"
                    )
                owner[word] = label

    @classmethod
    def of(cls, labels: LabelWords | Mapping[str, Sequence[str]] | Sequence[str] | str) -> LabelWords:
        """Return label words given as such, as a mapping, as a list of labels that are their own words, or as the text
        that :meth:`parse` reads.

        Raises:
            LabelWordError: If they are malformed, or nothing of the kind.
        """
        if isinstance(labels, LabelWords):
            return labels
        if isinstance(labels, str):
            return cls.parse(labels)
        if isinstance(labels, Mapping):
            return cls(labels)
        if isinstance(labels, list | tuple) and all(isinstance(label, str) for label in labels):
            _check_once(labels)
            return cls({label: label for label in labels})
        raise LabelWordError(f"label words are a mapping or a text such as {EXAMPLE}, not {labels!r}")

    @classmethod
    def parse(cls, text: str) -> LabelWords:
        """Parse ``positive=great,good;negative=terrible``, or ``positive;negative`` where labels are their own words;
        raise a LabelWordError if it is malformed.
        """
        parts = [part.partition("=") for part in filter(str.strip, text.split(";"))]
        _check_once([label for label, _, _ in parts])
        return cls({label.strip(): listed.split(",") if equals else label for label, equals, listed in parts})

    def to_json(self) -> dict[str, Json]:
        """Return the words as a manifest and a record hold them."""
        return {label: list(words) for label, words in self.words.items()}

    @property
    def labels(self) -> tuple[str, ...]:
        """Label names in the order they were given."""
        return tuple(self.words)

    @property
    def flat(self) -> tuple[tuple[int, str], ...]:
        """(index of the label, word) for every word, label by label."""
        return tuple((index, word) for index, words in enumerate(self.words.values()) for word in words)

    def label_of(self, record: Record, *, where: str) -> int:
        """Return the index of a record's label; raise a RecordError if its target is not a label."""
        label = record.get(TARGET_FIELD, "")
        if label not in self.words:
            raise RecordError(self._unknown(label, where=where))
        return self.labels.index(label)

    def _unknown(self, label: str, *, where: str) -> str:
        return f"{where}: '{label}' is not one of the labels {', '.join(self.labels)}.{closest(label, self.labels)}"

    def check_records(self, records: Records) -> None:
        """Raise a RecordError that names the records without one of the labels, if there are any."""
        given = ((number, row.get(TARGET_FIELD, "")) for number, row in enumerate(records, start=1))
        wrong = [(number, label) for number, label in given if label not in self.words]
        if not wrong:
            return
        (first, label), others = wrong[0], wrong[1:]
        also = ""
        if others:
            listed = "; ".join(f"{records.place(number)}: '{other}'" for number, other in others[:SHOWN_ROWS])
            also = f" Neither is {listed}{f'; {len(wrong)} rows in all' * (len(others) > SHOWN_ROWS)}."
        right = difflib.get_close_matches(label, self.labels, n=1, cutoff=0.5) or ["RIGHT"]
        raise RecordError(
            f"{self._unknown(label, where=records.place(first))}{also} Correct the file, name the label (labels), or "
            f'count it as another (alias_label "{label}={right[0]}")'
        )

    def examples(self, bound: TokenizedTemplate, record: Record) -> list[Example]:
        """Fill a template with a record and each word in turn, in the order of :attr:`flat`."""
        return bound.answers([record], [[word for _, word in self.flat]])[0]

    def check_known(self, examples: Sequence[Example]) -> list[str]:
        """Return a line per word with its ids, from :meth:`examples`; words that the tokenizer does not know, and equal
        ids of two labels, are a LabelWordError.
        """
        lines = []
        seen: dict[tuple[int, ...], tuple[int, str]] = {}
        for (label, word), example in zip(self.flat, examples, strict=True):
            ids = example.target_ids
            if not example.known:
                raise LabelWordError(
                    f"the word '{word}' of label '{self.labels[label]}' is unknown to the tokenizer "
                    f"(ids {list(ids)}); choose another"
                )
            other = seen.setdefault(ids, (label, word))
            if other[0] != label:
                raise LabelWordError(
                    f"the words '{other[1]}' and '{word}' of the labels '{self.labels[other[0]]}' and "
                    f"'{self.labels[label]}' have the same token ids {list(ids)}; choose others"
                )
            lines.append(f"{self.labels[label]}: '{word}' {list(ids)}")
        return lines


def _check_once(labels: Sequence[str]) -> None:
    """Raise a LabelWordError if a label is given twice."""
    given: set[str] = set()
    for label in map(str.strip, labels):
        if label in given:
            raise LabelWordError(f"label '{label}' is given twice in the label words")
        given.add(label)


def _words_of(label: object, listed: object) -> tuple[str, ...]:
    """Return the words of a label, without the space around them: the template brings it."""
    words = (listed,) if isinstance(listed, str) else listed
    if not (
        isinstance(label, str) and isinstance(words, list | tuple) and all(isinstance(item, str) for item in words)
    ):
        raise LabelWordError(
            f"label {shown(label)} has {shown(listed)}; its name is a text, and its words a text or a list of texts"
        )
    check_text(label + "".join(words), where="label words", what=f"label {label!r}", error=LabelWordError)
    return tuple(word.strip() for word in words)
