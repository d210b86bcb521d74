"""Worked examples before a question: as text (in-context learning), and as deep slots that start from it."""

from collections.abc import Sequence

from ptuning.errors import TemplateError
from ptuning.records import TARGET_FIELD, Record
from ptuning.template.language import Field, Literal, Piece, Target, Template, TextSlots


def example_lines(manual: Template, examples: Sequence[Record], *, kind: str) -> list[str]:
    """Return the texts of examples by a manual template, each with its end: a line for a causal model. Tokenizers of
    masked models drop line breaks, so these get spaces. A TemplateError if the template reads a conversation.
    """
    if manual.has_conversation:
        raise TemplateError("examples are for templates of one turn; a conversation ([C]) is none")
    end = "\n" if kind == "causal" else " "
    return [filled(manual.pieces, record) + end for record in examples]


def with_examples(manual: Template, examples: Sequence[Record], *, kind: str) -> Template:
    """Return a manual template with filled-in examples before it."""
    shown = "".join(example_lines(manual, examples, kind=kind))
    # Examples are whole sentences. In the question, a causal model does not see the text after the target.
    pieces = (manual.without_tail()[0] if kind == "causal" else manual).pieces
    if isinstance(pieces[0], Literal):
        return Template((Literal(shown + pieces[0].text), *pieces[1:]))
    return Template((Literal(shown), *pieces))


def manual_of(template: Template) -> Template:
    """Return the manual template by which ``[D:examples]`` of a template writes its examples: the rest of it, with
    words in place of slots.
    """
    at = template.examples
    assert at is not None
    return Template((*template.pieces[:at], *template.pieces[at + 1 :])).without_slots()


def with_deep_examples(template: Template, lines: Sequence[str]) -> Template:
    """Return a template with the texts of examples as the words of its deep slots in place of ``[D:examples]``."""
    at = template.examples
    assert at is not None
    shown = "".join(lines)
    before, after = template.pieces[:at], list(template.pieces[at + 1 :])
    space = " " if shown.endswith(" ") else ""
    if after and isinstance(after[0], Literal):
        after[0] = Literal(space + after[0].text.removeprefix(" "))
    elif space:
        after.insert(0, Literal(space))
    slots = TextSlots(shown.removesuffix(" "), deep=True)
    return Template((*before, slots, *(piece for piece in after if piece != Literal(""))))


def filled(pieces: Sequence[Piece], record: Record) -> str:
    """Return the text of a manual template filled with a record's fields and target."""
    texts = []
    for piece in pieces:
        if isinstance(piece, Literal):
            texts.append(piece.text)
        elif isinstance(piece, Field | Target):
            texts.append(record[piece.name if isinstance(piece, Field) else TARGET_FIELD])
    return "".join(texts)
