"""LAMA-style relations: their facts as records, filtered and split so that no subject stands in two parts. Knows no
tokenizer: whoever calls says which facts to keep.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ptuning.data.relation_layouts import (
    GOOGLE_RE_TEMPLATES,
    About,
    Facts,
    Layout,
    Row,
    find_layout,
    read_patterns,
    relation_of,
)
from ptuning.errors import RecordError, closest
from ptuning.records import TARGET_FIELD, Record, Records, clean

logger = logging.getLogger(__name__)

EVERYTHING = "all"
TYPES = ("1-1", "N-1", "N-M")
SUBJECT_FIELD = "x"

# ConceptNet and SQuAD have a sentence of its own for each fact; its halves are fields around the target.
MASK = "[MASK]"
SENTENCE_FIELDS = ("before", "after")
SENTENCE_TEMPLATE = "{before}[Y]{after}"
# What a row that names its relation says of that relation, or of the sentence in which the fact was found.
DESCRIBING = (
    "predicate_id", "template", "template_negated", "label", "description", "type", "masked_sentence", "negated",
)  # fmt: skip
# Why a fact cannot be used whatever the tokenizer: a field of the record, so that splitting counts it.
FLAW = "flaw"
NO_MASK = f"not exactly one {MASK} in the sentence"
JUDGED_FALSE = "judged false by its raters"


@dataclass(frozen=True)
class Relation:
    """One relation and its facts.

    Args:
        name: Its name in the data, such as ``P36``, ``place_of_birth`` or ``ConceptNet``.
        template: Its manual template; None if none was found.
        label: What it is called, such as ``capital``; None if not known.
        type: ``1-1``, ``N-1`` or ``N-M``; None if not known.
        parts: ``{"facts": ...}`` for facts that are not divided yet, else those of train, dev and test that are there.
        paraphrases: Other templates of the same meaning, in the order of their file.
        source: Where the facts were read from.
    """

    name: str
    template: str | None
    label: str | None
    type: str | None
    parts: Mapping[str, Records]
    paraphrases: tuple[str, ...]
    source: str


def read_relations(folder: str | Path, *, which: Sequence[str] = (EVERYTHING,)) -> list[Relation]:
    """Read relations in one of the layouts that LAMA, AutoPrompt, OptiPrompt, P-tuning, ParaRel and the hub have.

    Args:
        folder: The folder, one file whose rows name their relations, or ``hub:NAME[:CONFIG[:SPLIT]]``.
        which: Names (``P36``), types (``1-1``, ``N-1``, ``N-M``) or ``all``.

    Returns:
        The relations, each once, in natural order: P17 before P103. A relation that is listed and has no facts is left
        out with a notice.

    Raises:
        FileError: If the folder holds no relations; says what was looked for and what was found.
        RecordError: If a row cannot be read (names file and line), or if ``which`` names what is not there.
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
    """Return the names that ``which`` names."""
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
                f"{folder}: no relation of the {kind} '{name}'.{closest(name, known)} Found: {', '.join(known)}"
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
    read = {part: facts.read() for part, facts in layout.facts[name].items()}
    rows = [row for part_rows, _ in read.values() for _, row in part_rows]
    if template is None and rows and all(isinstance(row, Mapping) and _is_sentence(row) for row in rows):
        template = SENTENCE_TEMPLATE
    records = {
        part: Records(_records(part_rows, template=template), name=layout.facts[name][part].name, digest=digest)
        for part, (part_rows, digest) in read.items()
    }
    source = _source(layout.facts[name].values())
    _check_facts([record for part in records.values() for record in part], rows, source=source)
    return Relation(
        name=name,
        template=template,
        label=about.label,
        type=about.type,
        parts=records,
        paraphrases=read_patterns(layout.patterns[name]) if name in layout.patterns else (),
        source=source,
    )


def _check_facts(records: Sequence[Record], rows: Sequence[Mapping[str, object]], *, source: str) -> None:
    """Check that there are facts among the rows, and those of one relation only."""
    if records and not any(SUBJECT_FIELD in record and TARGET_FIELD in record for record in records):
        raise RecordError(
            f"{source}: no facts; none of the rows has sub_label and obj_label (or x and y), the first has "
            f"{', '.join(sorted(records[0])) or 'no fields'}"
        )
    named = sorted({named for row in rows if (named := relation_of(row)) is not None}, key=_natural)
    if len(named) > 1:
        raise RecordError(
            f"{source}: the rows are of several relations ({', '.join(named[:5])}), where those of one are expected; "
            "name this file or its folder itself to have them told apart"
        )


def _source(parts: Iterable[Facts]) -> str:
    """Return the one file that the facts are in, or the folder of the parts."""
    names = list(dict.fromkeys(facts.name for facts in parts))
    folders = {str(path.parent) for facts in parts for path in facts.paths}
    return folders.pop() if len(names) > 1 and len(folders) == 1 else ", ".join(names)


def _records(rows: Sequence[Row], *, template: str | None) -> list[Record]:
    """Return rows as records with a subject ``x`` and an object ``y``, and with what is wrong with them."""
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
    """Return a fact without what its row says of the relation, whose label would else pass for a missing object."""
    if not isinstance(row, Mapping) or relation_of(row) is None:
        return row
    return {name: value for name, value in row.items() if name not in DESCRIBING}


def _is_sentence(row: Mapping[str, object]) -> bool:
    """Whether a fact is asked with a sentence of its own; T-REx's sentences are only where a fact was found."""
    return "predicate_id" not in row and ("masked_sentences" in row or "masked_sentence" in row)


def _sentence(row: Mapping[str, object]) -> str:
    """Return LAMA's ``masked_sentences`` as one text, or the hub's ``masked_sentence``."""
    sentences = row.get("masked_sentences", row.get("masked_sentence"))
    return " ".join(map(str, sentences)) if isinstance(sentences, list) else str(sentences or "")


def _is_judged_false(row: Mapping[str, object]) -> bool:
    """Whether more of Google-RE's raters said that a fact is not so; the hub has the list of judgments as text.

    Source: facebookresearch/LAMA, scripts/batch_eval_KB_completion.py, ``filter_samples``.
    """
    judgments = re.findall(r"""judgment['"]\s*:\s*['"](\w+)""", str(row.get("judgments", "")))
    return 2 * judgments.count("yes") < len(judgments)


def subject_of(record: Record) -> str:
    """Return a fact's subject as it is compared: without spaces around it, in small letters."""
    return record.get(SUBJECT_FIELD, "").strip().casefold()
