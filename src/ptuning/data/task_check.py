"""Check a task with its data and a tokenizer, before a model runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from ptuning.data.answer_space import AnswerSpace
from ptuning.data.labelling import Findings, empty_fields, repeated
from ptuning.data.questions import Question, Questions
from ptuning.data.task_files import TaskFile
from ptuning.errors import PTuningError
from ptuning.records import TARGET_FIELD
from ptuning.template.ambiguity import check_fields, check_targets
from ptuning.template.encode import TokenizedTemplate
from ptuning.template.example import Example
from ptuning.template.language import Field, Template
from ptuning.template.segments import Kind, Tokenizer

# Rows of each part that are filled in to see whether they fit. Tokenising every row of a large part takes long.
FILLED_ROWS = 500


def check_data(task: TaskFile, parts: Mapping[str, Questions]) -> Findings:
    """Count rows, choices, labels and groups of a task's data. Missing labels, empty fields, and rows of two parts with
    the same text are doubts.
    """
    facts, doubts = [], []
    for name, questions in parts.items():
        labels = Counter(row.record[TARGET_FIELD] for row in questions if TARGET_FIELD in row.record)
        line = f"{name}: {len(questions)} rows of {questions.name}"
        if task.answer_space.has_choices and questions:
            counts = sorted(len(row.choices) for row in questions)
            line += f"; {counts[0]} to {counts[-1]} choices, {counts[len(counts) // 2]} in the middle"
        elif task.label_words is not None and labels:
            line += "; " + ", ".join(f"{label} {labels[label]}" for label in task.label_words.labels)
            missing = [label for label in task.label_words.labels if not labels[label]]
            if missing:
                doubts.append(f"{name}: no row has the label {' or '.join(missing)}")
        groups = {row.group for row in questions if row.group is not None}
        facts.append(line + (f"; {len(groups)} groups" if groups else ""))
        doubts += empty_fields(name, questions, task.fields)
    again = repeated(parts, task.fields, labelled=task.label_words is not None)
    return Findings(tuple(facts), tuple(doubts)) + again


def check_words(
    task: TaskFile, tokenizer: Tokenizer, kind: Kind, *, parts: Mapping[str, Questions] | None = None
) -> Findings:
    """Fill every pattern of a task; report the tokens of its label words and the rows that get truncated.

    Without data (``parts``), a record whose fields hold their own names is filled in.
    """
    given = [questions for questions in (parts or {}).values() if questions]
    sample = given[0][0] if given else Question({name: name for name in task.fields}, choices=("this", "that"))
    found = Findings()
    for number, pair in enumerate(zip(task.manual, task.learned, strict=True), start=1):
        for what, template in zip(("manual", "learned"), pair, strict=True):
            found += _check_template(f"pattern {number}, {what}", task, template, tokenizer, kind, sample, given)
    # Words are mostly the same tokens in all patterns, and mistakes in them the same mistakes.
    return Findings(*(tuple(dict.fromkeys(lines)) for lines in vars(found).values()))


def check_known(bound: TokenizedTemplate, answers: AnswerSpace, parts: Iterable[Questions]) -> list[str]:
    """Return warnings about text in the parts of a task that the tokenizer does not know. Each different target is
    tokenised once, beside fields that hold their own names.

    Raises LabelWordError if it does not know a label's word, or not from that of another; RecordError if it knows
    hardly any target of a part.
    """
    bare = {name: name for name in bound.template.fields}  # a template may begin with a field, which must not be empty
    warnings = []
    if answers.words is not None:
        answers.words.check_known(answers.words.examples(bound, bare))
    for questions in parts:
        records = questions.records
        if answers.words is None and all(row.right for row in questions):
            texts = list(dict.fromkeys(text for row in questions for text in row.right))
            examples = bound.examples([bare] * len(texts), targets=texts)
            known = {text for text, example in zip(texts, examples, strict=True) if example.known}
            distinguishable = [not known.isdisjoint(row.right) for row in questions]
            warnings += check_targets(distinguishable, records, is_choice=answers.has_choices)
        warnings += check_fields(bound.tokenizer, records, bound.template.fields)
    return warnings


def _check_template(
    name: str,
    task: TaskFile,
    template: Template,
    tokenizer: Tokenizer,
    kind: Kind,
    sample: Question,
    parts: Sequence[Questions],
) -> Findings:
    facts, doubts = [], []
    try:
        bound = TokenizedTemplate(template, tokenizer=tokenizer, kind=kind)
        if task.label_words is not None:
            lines = task.label_words.check_known(task.label_words.examples(bound, sample.record))
            facts.append(f"label words and their tokens: {'; '.join(lines)}")
        filled: list[Example] = []
        for questions in parts:
            chosen = questions[:FILLED_ROWS]
            texts = [max(task.answer_space.texts(row) or ("a",), key=len) for row in chosen]
            records = [row.record for row in chosen]
            filled += bound.examples(records, targets=texts, source=f"{questions.name}, row")
        doubts += check_known(bound, task.answer_space, parts)
        short = sum(example.shortened for example in filled)
        if short:
            fields = [piece for piece in template.pieces if isinstance(piece, Field)]
            shrinking = dict.fromkeys(piece.name for piece in fields if not piece.keep)
            doubts.append(
                f"{name}: {short} of {len(filled)} rows are shortened to {tokenizer.max_tokens} tokens, in the fields "
                f"without '!': {', '.join(shrinking) or 'none'}"
            )
    except PTuningError as error:
        return Findings(tuple(facts), tuple(doubts), (f"{name}: {error}",))
    return Findings(tuple(facts), tuple(doubts))
