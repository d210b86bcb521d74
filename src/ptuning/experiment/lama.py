"""Which facts LAMA keeps."""

from __future__ import annotations

from collections.abc import Sequence

from ptuning.backbone.backbone import Backbone
from ptuning.errors import RecordError, TemplateError
from ptuning.records import TARGET_FIELD, Record
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
