"""Closed sets of answers: lists of words from files, and which records' targets belong to them. Knows no method."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ptuning.backbone.backbone import Backbone
from ptuning.data.reading import TARGET_FIELD, Record
from ptuning.errors import FileError, RecordError, TemplateError
from ptuning.files import read_bytes
from ptuning.template.fill import BoundTemplate
from ptuning.template.language import Template


class OneToken:
    """Says which records have a target of one known token in every one of some templates, as LAMA keeps its facts.

    Args:
        backbone: Whose tokens are meant.
        templates: In each of them the target must be one token.
        words: Texts one of which it must be.
    """

    def __init__(
        self, backbone: Backbone, templates: Sequence[Template], *, words: Sequence[str] | None = None
    ) -> None:
        self._bound = [
            BoundTemplate(template, tokenizer=backbone.tokenizer, kind=backbone.kind) for template in templates
        ]
        self._words = frozenset(words) if words is not None else None
        self._unknown_id = backbone.tokenizer.unknown_id

    def __call__(self, records: Sequence[Record]) -> list[bool]:
        """Return for each record whether it is kept."""
        keep = [self._words is None or row[TARGET_FIELD].strip() in self._words for row in records]
        for bound in self._bound if records else ():
            for number, record in enumerate(records, start=1):
                bound.check_fields(record, where=f"record {number}")
            try:
                examples = bound.examples(records)
            except (RecordError, TemplateError):
                if len(records) == 1:
                    return [False]  # its target has no tokens there, or does not fit
                return [self([record])[0] for record in records]
            # The token that stands for unknown text is in no vocabulary.
            known = [example.target_ids != (self._unknown_id,) for example in examples]
            keep = [
                kept and example.own_tokens == 1 and is_known
                for kept, example, is_known in zip(keep, examples, known, strict=True)
            ]
        return keep


class Listed:
    """Says which records have a target that stands in a list of words."""

    def __init__(self, words: Sequence[str]) -> None:
        self._words = frozenset(words)

    def __call__(self, records: Sequence[Record]) -> list[bool]:
        """Return for each record whether it is kept."""
        return [row[TARGET_FIELD].strip() in self._words for row in records]


def read_vocabulary(path: Path) -> tuple[str, ...]:
    """Read a list of possible answers: a text file with one per line, or JSON: a list, or the lists of several models,
    of which those words are taken that all have (as the files of LAMA-29k and LAMA-34k come).

    Raises:
        FileError: If it cannot be read, or holds no words.
    """
    try:
        text = read_bytes(path).decode("utf-8-sig")
        listed = json.loads(text) if path.suffix.lower() == ".json" else [line.strip() for line in text.splitlines()]
    except ValueError as error:
        raise FileError(f"{path} is no list of words ({error}); give a .txt with one per line, or .json") from error
    lists = list(listed.values()) if isinstance(listed, dict) else [listed]
    if isinstance(listed, dict) and all(isinstance(one, int) for one in lists):
        lists = [listed]  # one model's token -> id
    if not all(isinstance(one, list | dict) and all(isinstance(word, str | int) for word in one) for one in lists):
        raise FileError(f"{path} holds other JSON than a list of words, or the lists of several models")
    # Byte-level and SentencePiece vocabularies write the space in front of a word as a sign of their own.
    words = [dict.fromkeys(str(word).lstrip("\u0120\u2581").strip() for word in one) for one in lists]
    common = tuple(word for word in (words[0] if words else ()) if word and all(word in other for other in words))
    if not common:
        raise FileError(f"{path} holds no words" + (" that all its models share" if len(words) > 1 else ""))
    return common
