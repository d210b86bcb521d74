"""Inference inputs: questions built from the rows of a file or a request, or from typed texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ptuning.data.conversations import read_conversations
from ptuning.data.questions import Question, Questions, as_questions
from ptuning.data.reading import RawRows, Row, as_read, with_fields
from ptuning.errors import RecordError
from ptuning.records import TARGET_FIELD, Records, check_text, require_fields
from ptuning.template.language import CONVERSATION_FIELD
from ptuning.template.messages import USER, ChatMessage, write_messages

if TYPE_CHECKING:
    from ptuning.prompt.prompt import Prompt  # torch, which --help must not wait for


@dataclass(frozen=True)
class InferenceInputs:
    """Questions to answer, each with the row that it was built from (with file and line), and all rows of the file with
    their columns.
    """

    questions: Questions
    rows: Sequence[Row]
    raw: RawRows

    @classmethod
    def typed(
        cls, prompt: Prompt, texts: Mapping[str, str], *, where: str, before: Sequence[ChatMessage] = ()
    ) -> InferenceInputs:
        """Take the texts of a record's fields as a user typed them; a task's fields are filled as from its file. In a
        conversation, the typed text is the user's next turn, after those ``before``.
        """
        for text in texts.values():
            check_text(text, where=where, what="it")
        record = dict(texts) if prompt.task is None else prompt.task.typed(texts, where=where)
        if prompt.template.has_conversation:
            turns = [*before, ChatMessage(USER, record[CONVERSATION_FIELD].strip())]
            record = {**record, CONVERSATION_FIELD: write_messages(turns)}
        questions, row = Questions([Question(record)], name=where), (where, texts)
        raw = RawRows([row], name=where, digest=questions.sha256, format="text", columns=list(texts))
        return cls(questions, [row], raw)

    @classmethod
    def of(cls, prompt: Prompt, rows: RawRows, *, fields: Mapping[str, str] | None = None) -> InferenceInputs:
        """Take rows, read by the prompt's task where it has one, which may find several questions in a row; else with
        ``fields`` renamed (new name -> name in the file). A RecordError if one does not fit.
        """
        task = prompt.task
        if prompt.template.has_conversation:
            read = read_conversations(rows, fields={**prompt.fields, **(fields or {})}, ask=True)
            require_fields(read.questions.records, prompt.template.fields)
            return cls(read.questions, read.rows, rows)
        if task is None:
            records = with_prompt_fields(as_read(rows, fields=fields, target=prompt.fields.get(TARGET_FIELD)), prompt)
            require_fields(records, prompt.template.fields)
            return cls(as_questions(records), rows, rows)
        if rows.format != "text":
            pairs = [(question, row) for row in rows for question in task.reader.read([row], labelled=False)]
            own = Questions([question for question, _ in pairs], name=rows.name, digest=rows.sha256)
            return cls(own, [row for _, row in pairs], rows)
        names = typed_fields(prompt)
        if len(names) > 1:
            raise RecordError(f"{rows.name} holds lines of text, and rows of the task have {', '.join(names)}")
        typed = [task.typed({names[0]: str(text)}, where=where) for where, row in rows for text in row.values()]
        questions = [Question(record, where=where) for record, (where, _) in zip(typed, rows, strict=True)]
        return cls(Questions(questions, name=rows.name, digest=rows.sha256), rows, rows)

    def empty_fields(self, fields: Sequence[str]) -> list[tuple[str, str]]:
        """Return (file and line, field) of each field of a template that has no text in a record."""
        pairs = zip(self.questions, self.rows, strict=True)
        return [(where, name) for question, (where, _) in pairs for name in fields if not question.record[name].strip()]


def typed_fields(prompt: Prompt) -> Sequence[str]:
    """Return the fields of a record that a user types; a RecordError if rows of the task have more than fields."""
    if prompt.task is None:
        return prompt.template.fields
    if prompt.answer_space.has_choices:
        raise RecordError(
            f"a TEXT is not enough for the task {prompt.task.name}, whose rows have choices of their own; give "
            "data as JSONL or CSV"
        )
    return prompt.task.fields


def with_prompt_fields(records: Records, prompt: Prompt | None) -> Records:
    """Return records with the names of fields that a prompt remembers, but for those that were read by other names."""
    own = prompt.fields if prompt is not None else {}
    return with_fields(records, {new: old for new, old in own.items() if new not in records.fields})
