"""LAMA-style relations: their facts as records. :func:`ptuning.data.splits.split_relation` filters and divides them."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ptuning.data.relation_layouts import (
    GOOGLE_RE_TEMPLATES,
    About,
    Layout,
    Row,
    convert_with,
    find_layout,
    read_facts,
    read_patterns,
    relation_of,
)
from ptuning.errors import RecordError, closest
from ptuning.records import TARGET_FIELD, Record, Records, clean

logger = logging.getLogger(__name__)

EVERYTHING = "all"
TYPES = ("1-1", "N-1", "N-M")
SUBJECT_FIELD = "x"

# ConceptNet and SQuAD ask each fact with its own sentence; its halves are fields around the target.
MASK = "[MASK]"
SENTENCE_FIELDS = ("before", "after")
SENTENCE_TEMPLATE = "{before}[Y]{after}"
# Fields of T-REx rows that describe the relation, or the sentence in which the fact was found.
DESCRIBING = (
    "predicate_id", "template", "template_negated", "label", "description", "type", "masked_sentence", "negated",
)  # fmt: skip
# The field that says why a fact cannot be used with any tokenizer, so that splitting counts it.
FLAW = "flaw"
NO_MASK = f"not exactly one {MASK} in the sentence"
JUDGED_FALSE = "judged false by its raters"


@dataclass(frozen=True)
class Relation:
    """One relation and its facts.

    Args:
        name: Its name in the data, such as ``P36``, ``place_of_birth`` or ``ConceptNet``.
        template: Its manual template; None if none was found.
        label: What the relation is called, such as ``capital``; None if not known.
        type: ``1-1``, ``N-1`` or ``N-M``; None if not known.
        parts: ``{"facts": ...}`` for facts that are not divided yet, else the given ones of train, dev and test.
        paraphrases: Other templates of the same meaning, in the order of their file.
        source: The file or the folder of the facts.
    """

    name: str
    template: str | None
    label: str | None
    type: str | None
    parts: Mapping[str, Records]
    paraphrases: tuple[str, ...]
    source: str


def read_relations(folder: str | Path, *, which: Sequence[str] = (EVERYTHING,)) -> list[Relation]:
    """Read relations in LAMA's layout, or with one folder of parts for each (:mod:`ptuning.data.relation_layouts`).

    Args:
        folder: The folder, or one file with the facts of one relation.
        which: Names (``P36``), types (``1-1``, ``N-1``, ``N-M``) or ``all``.

    Returns:
        The relations, each once, in natural order: P17 before P103. A relation without facts is left out with a notice.

    Raises:
        FileError: If the folder holds no relations; it lists what was looked for and what was found.
        RecordError: If a row cannot be read (it names file and line), or if a relation of ``which`` is not there.
    """
    layout = find_layout(folder)
    chosen = _chosen(layout, which, folder=str(folder))
    relations = []
    for name in sorted(chosen, key=_natural):
        relation = _relation(name, layout)
        if any(relation.parts.values()):
            relations.append(relation)
        else:
            logger.warning("%s: no facts in %s; left out", name, relation.source)
    if not relations:
        raise RecordError(f"{folder}: none of the chosen relations has facts")
    return relations


def _chosen(layout: Layout, which: Sequence[str], *, folder: str) -> set[str]:
    """Return the names of the relations that are asked for by name or type."""
    chosen: set[str] = set()
    for name in [which] if isinstance(which, str) else which:
        of_type = {each for each in layout.facts if layout.about.get(each, About()).type == name}
        if name == EVERYTHING:
            chosen |= set(layout.facts)
        elif of_type or name in layout.facts:
            chosen |= of_type or {name}
        elif name in layout.about:
            raise RecordError(f"{folder}: the relation {name} is listed, but there are no facts of it")
        else:
            types = {about.type for each, about in layout.about.items() if about.type and each in layout.facts}
            known = [*sorted(layout.facts, key=_natural), *sorted(types), EVERYTHING]
            kind = "type" if name in TYPES else "name"
            raise RecordError(
                f"{folder}: no relation of the {kind} '{name}'.{closest(name, known)} Found: {', '.join(known)}. "
                f"{convert_with(folder)}"
            )
    if not chosen:
        raise RecordError(f"{folder}: no relation is chosen; name some, or '{EVERYTHING}'")
    missing = sorted(set(layout.about) - set(layout.facts), key=_natural)
    if missing and EVERYTHING in which:
        logger.warning("%s: listed, but without facts, and left out: %s", folder, ", ".join(missing))
    return chosen


def _natural(name: str) -> list[tuple[str, int]]:
    """Return a sort key in which P17 comes before P103."""
    return [(text, int(digits or 0)) for text, digits in re.findall(r"(\D*)(\d*)", name)]


def _relation(name: str, layout: Layout) -> Relation:
    about = layout.about.get(name, About())
    template = about.template or GOOGLE_RE_TEMPLATES.get(name)
    files = layout.facts[name]
    read = {part: read_facts(path) for part, path in files.items()}
    rows = [row for part_rows, _ in read.values() for _, row in part_rows]
    source = str(next(iter(files.values())) if len(files) == 1 else next(iter(files.values())).parent)
    named = sorted({named for row in rows if (named := relation_of(row)) is not None}, key=_natural)
    if len(named) > 1 or (template is None and named and named != [name]):
        raise RecordError(
            f"{source}: the rows are of the relations {', '.join(named[:5])}, and a file holds the facts of the "
            f"relation that it is named after. {convert_with(source)}"
        )
    if template is None and rows and all(map(_is_sentence, rows)):
        template = SENTENCE_TEMPLATE
    records = {
        part: Records(_records(part_rows, template=template), name=str(files[part]), digest=digest)
        for part, (part_rows, digest) in read.items()
    }
    facts = [record for part in records.values() for record in part]
    if facts and not any(SUBJECT_FIELD in record and TARGET_FIELD in record for record in facts):
        raise RecordError(
            f"{source}: no facts; none of the rows has sub_label and obj_label (or x and y), the first has "
            f"{', '.join(sorted(facts[0])) or 'no fields'}"
        )
    return Relation(
        name=name,
        template=template,
        label=about.label,
        type=about.type,
        parts=records,
        paraphrases=read_patterns(layout.patterns[name]) if name in layout.patterns else (),
        source=source,
    )


def _records(rows: Sequence[Row], *, template: str | None) -> list[Record]:
    """Return rows as records with a subject ``x`` and an object ``y``, and with the flaw that rules a fact out."""
    records: list[dict[str, str]] = []
    for where, row in rows:
        record = clean(_without_relation(row), where=where)
        flaw = JUDGED_FALSE if _is_judged_false(row) else None
        if template == SENTENCE_TEMPLATE:
            record.setdefault(SUBJECT_FIELD, record.get("sub", ""))  # ConceptNet's name for it
            halves = _sentence(row).split(MASK)
            flaw = flaw if len(halves) == 2 else NO_MASK
            record |= dict(zip(SENTENCE_FIELDS, halves, strict=False))
        records.append(record | ({FLAW: flaw} if flaw else {}))
    if template == SENTENCE_TEMPLATE:
        # SQuAD's facts all have the subject "Squad", and some of ConceptNet's none: there the sentence is the subject.
        has_subjects = len({record.get(SUBJECT_FIELD) for record in records}) > 1
        for record in records:
            if not (has_subjects and record.get(SUBJECT_FIELD, "").strip()):
                record[SUBJECT_FIELD] = MASK.join(record.get(name, "") for name in SENTENCE_FIELDS)
    return list(records)


def _without_relation(row: Mapping[str, object]) -> Mapping[str, object]:
    """Return a fact without the fields that describe its relation. Its ``label`` would pass for a missing object."""
    if relation_of(row) is None:
        return row
    return {name: value for name, value in row.items() if name not in DESCRIBING}


def _is_sentence(row: Mapping[str, object]) -> bool:
    """Whether a fact is asked with its own sentence. T-REx has sentences, too, in which the facts were found."""
    return "predicate_id" not in row and ("masked_sentences" in row or "masked_sentence" in row)


def _sentence(row: Mapping[str, object]) -> str:
    """Return LAMA's ``masked_sentences`` as one text, or the hub's ``masked_sentence``."""
    sentences = row.get("masked_sentences", row.get("masked_sentence"))
    return " ".join(map(str, sentences)) if isinstance(sentences, list) else str(sentences or "")


def _is_judged_false(row: Mapping[str, object]) -> bool:
    """Whether most of Google-RE's raters judged a fact false. The hub has the list of judgments as text.

    Source: facebookresearch/LAMA, scripts/batch_eval_KB_completion.py, ``filter_samples``.
    """
    judgments = re.findall(r"""judgment['"]\s*:\s*['"](\w+)""", str(row.get("judgments", "")))
    return 2 * judgments.count("yes") < len(judgments)


def subject_of(record: Record) -> str:
    """Return a fact's subject for comparison: trimmed and in small letters."""
    return record.get(SUBJECT_FIELD, "").strip().casefold()
