"""LAMA-style relations, read from the files of a layout: their facts as records, with templates and paraphrases.

:mod:`ptuning.data.layouts` finds the files; :func:`ptuning.data.splits.split_relation` divides the facts.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ptuning.data.layouts import FACT_FOLDERS, About, Layout, as_pattern, convert_with, find_layout, two_places
from ptuning.data.reading import Row, raw_rows, renamed
from ptuning.errors import RecordError, TemplateError, closest
from ptuning.files import read_bytes, sha256
from ptuning.records import TARGET_FIELD, Record, Records, clean

logger = logging.getLogger(__name__)

ReadFacts = Callable[[Path], tuple[list[Row], str]]

# LAMA keeps these three templates in its code. Source: facebookresearch/LAMA, scripts/run_experiments.py.
GOOGLE_RE_TEMPLATES = {
    "place_of_birth": "[X] was born in [Y] .",
    "date_of_birth": "[X] (born [Y]).",
    "place_of_death": "[X] died in [Y] .",
}

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


@dataclass(frozen=True)
class Relation:
    """One relation and its facts.

    ``name`` is that in the data, such as ``P36``, ``place_of_birth`` or ``ConceptNet``; ``label`` what it is called,
    such as ``capital``; and ``type`` one of ``1-1``, ``N-1`` and ``N-M``. ``parts`` is ``{"facts": ...}`` for facts
    that are not divided yet, else the given ones of train, dev and test. ``paraphrases`` are other templates of the
    same meaning, in the order of their file. ``source`` is the file or the folder of the facts.
    """

    name: str
    template: str | None
    label: str | None
    type: str | None
    parts: Mapping[str, Records]
    paraphrases: tuple[str, ...]
    source: str


def read_relations(
    folder: str | Path, *, which: Sequence[str] = (EVERYTHING,), fields: Mapping[str, str] | None = None
) -> list[Relation]:
    """Read relations in one of the layouts of :mod:`ptuning.data.layouts`, in natural order (P17 before P103).

    ``folder`` is a folder, or one file of facts; ``which`` has names (``P36``), types (``1-1``, ``N-1``, ``N-M``) or
    ``all``. ``fields`` maps new names of fields to those in the files of facts, such as ``{"sub_label": "subject"}``. A
    relation without facts is left out with a notice. A folder without relations is a FileError; a row that cannot be
    read, or a relation of ``which`` that is not there, is a RecordError.
    """
    which = [which] if isinstance(which, str) else which
    read = functools.cache(lambda path: read_facts(path, fields=fields))
    layout = _divided(find_layout(folder), which, read, folder=str(folder))
    relations = []
    for name in sorted(_chosen(layout, which, folder=str(folder)), key=_natural):
        relation = _relation(name, layout, read)
        if any(relation.parts.values()):
            relations.append(relation)
        else:
            logger.warning("%s: no facts in %s; left out", name, relation.source)
    if not relations:
        raise RecordError(f"{folder}: none of the chosen relations has facts")
    return relations


def _divided(layout: Layout, which: Sequence[str], read: ReadFacts, *, folder: str) -> Layout:
    """Return a layout where a file whose rows name several relations, or a chosen one, stands for each of these."""
    if EVERYTHING not in which and all(name in layout.facts for name in which):
        return layout
    facts: dict[str, Mapping[str, Path]] = {}
    shared: set[str] = set()
    for name, files in layout.facts.items():
        path = next(iter(files.values()))
        found = [name]
        # Listed relations and LAMA's have files of their own, so that only what is chosen is read.
        if not (name in layout.about or path.absolute().parent.name.lower() in FACT_FOLDERS):
            rows = [row for file in files.values() for _, row in read(file)[0]]
            named = {named for row in rows if (named := relation_of(row)) is not None}
            if len(named) > 1 or (named & set(which)):
                found = sorted(named)
                shared |= named
        for relation in found:
            if relation in facts:
                raise two_places(relation, next(iter(facts[relation].values())), path, folder=folder)
            facts[relation] = files
    return replace(layout, facts=facts, shared=frozenset(shared))


def _chosen(layout: Layout, which: Sequence[str], *, folder: str) -> set[str]:
    chosen: set[str] = set()
    for name in which:
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
                f"{folder}: no relation of the {kind} '{name}'.{closest(name, known)} Found: {', '.join(known)}. A "
                "relation is named by its file, or by the column predicate_id or relation of its facts (--field "
                f"predicate_id=NAME reads another). {convert_with(folder)}"
            )
    if not chosen:
        raise RecordError(f"{folder}: no relation is chosen; name some, or '{EVERYTHING}'")
    missing = sorted(set(layout.about) - set(layout.facts), key=_natural)
    if missing and EVERYTHING in which:
        logger.warning("%s: listed, but without facts, and left out: %s", folder, ", ".join(missing))
    return chosen


def _natural(name: str) -> tuple[list[tuple[str, int, str]], str]:
    """Return a key for sorting in which numbers count as numbers, however many digits they have."""
    found = [(text, digits.lstrip("0")) for text, digits in re.findall(r"(\D*)(\d*)", name)]
    return [(text, len(digits), digits) for text, digits in found], name  # P017 before P17, on any disk


def _relation(name: str, layout: Layout, read: ReadFacts) -> Relation:
    files = layout.facts[name]
    parts = {part: read(path) for part, path in files.items()}
    if name in layout.shared:
        parts = {part: (_of_relation(name, rows), digest) for part, (rows, digest) in parts.items()}
    rows = [row for part_rows, _ in parts.values() for _, row in part_rows]
    about = layout.about.get(name) or _described_by(rows)
    template = about.template or GOOGLE_RE_TEMPLATES.get(name)
    file = next(iter(files.values()))
    source = str(file if len(files) == 1 else file.parent)
    named = sorted({named for row in rows if (named := relation_of(row)) is not None}, key=_natural)
    if len(named) > 1:
        raise RecordError(
            f"{source}: the rows are of the relations {', '.join(named[:5])}, and a file holds the facts of the "
            f"relation that it is named after. {convert_with(source)}"
        )
    if template is None and rows and all(map(_is_sentence, rows)):
        template = SENTENCE_TEMPLATE
    records = {
        part: Records(_records(part_rows, template=template), name=str(files[part]), digest=digest)
        for part, (part_rows, digest) in parts.items()
    }
    facts = [record for part in records.values() for record in part]
    if facts and not any(SUBJECT_FIELD in record and TARGET_FIELD in record for record in facts):
        raise RecordError(
            f"{source}: no facts; none of the rows has sub_label and obj_label (or x and y), the first has "
            f"{', '.join(sorted(facts[0])) or 'no fields'}. Name yours with --field sub_label=NAME --field "
            "obj_label=NAME"
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


def _of_relation(name: str, rows: Sequence[Row]) -> list[Row]:
    """Return the rows of a relation, from a file whose rows name theirs; a RecordError if one does not."""
    for where, row in rows:
        if relation_of(row) is None:
            raise RecordError(f"{where}: the row names no relation, and others of its file do")
    return [(where, row) for where, row in rows if relation_of(row) == name]


def _described_by(rows: Sequence[Mapping[str, object]]) -> About:
    """Return what facts say about their relation, where all of them say the same, as the rows of the hub do."""
    found = {}
    for name in ("template", "label", "type"):
        values = {str(row.get(name) or "").strip() for row in rows if name == "template" or "predicate_id" in row}
        found[name] = values.pop() or None if len(values) == 1 else None
    template = found["template"] or ""
    is_pattern = "[X]" in template and "[Y]" in template
    return About(as_pattern(template, where="template") if is_pattern else None, found["label"], found["type"])


def _records(rows: Sequence[Row], *, template: str | None) -> list[Record]:
    """Return rows as records with a subject ``x`` and an object ``y``, and with the flaw that rules a fact out."""
    records: list[dict[str, str]] = []
    for where, row in rows:
        record = clean(_without_relation(row), where=where)
        flaw = "judged false by its raters" if _is_judged_false(row) else None
        if template == SENTENCE_TEMPLATE:
            record.setdefault(SUBJECT_FIELD, record.get("sub", ""))  # ConceptNet's name for it
            halves = _sentence(row).split(MASK)
            flaw = flaw if len(halves) == 2 else f"not exactly one {MASK} in the sentence"
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
    """Return a fact without the fields of its relation, whose ``label`` would pass for a missing object."""
    if "predicate_id" not in row and "pred" not in row:
        return row
    return {name: value for name, value in row.items() if name not in DESCRIBING}


def _is_sentence(row: Mapping[str, object]) -> bool:
    """Whether a fact is asked with its own sentence. In T-REx, sentences are where the facts were found."""
    return "predicate_id" not in row and ("masked_sentences" in row or "masked_sentence" in row)


def _sentence(row: Mapping[str, object]) -> str:
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


def read_facts(path: Path, *, fields: Mapping[str, str] | None = None) -> tuple[list[Row], str]:
    """Return the rows of a file of facts, with ``fields`` under new names, and its SHA-256. A row that cannot be read
    is a RecordError.
    """
    data = read_bytes(path)
    rows = raw_rows(data, name=str(path))
    for where, row in rows:
        if not isinstance(row, Mapping):
            raise RecordError(f"{where}: a record must be an object with named fields, not {type(row).__name__}")
    return [(where, renamed(row, fields, where=where)) for where, row in rows] if fields else rows, sha256(data)


def read_patterns(path: Path) -> tuple[str, ...]:
    """Read the paraphrases of a relation, each once. A malformed template is left out with a notice."""
    patterns: dict[str, None] = {}
    for where, row in raw_rows(read_bytes(path), name=str(path)):
        text = row.get("pattern") if isinstance(row, Mapping) else None
        if not isinstance(text, str):
            raise RecordError(f"{where}: a paraphrase needs the field 'pattern' with text")
        try:
            patterns[as_pattern(text, where=where)] = None
        except TemplateError as error:
            logger.warning("%s: left out the pattern %r: %s", where, text, str(error).splitlines()[0])
    return tuple(patterns)


def relation_of(row: Mapping[str, object]) -> str | None:
    """Return the relation that a row names: in T-REx's ``predicate_id`` or in ``relation``, or in Google-RE's way,
    ``/people/person/place_of_birth``.
    """
    for name in ("predicate_id", "relation"):
        predicate = row.get(name)
        if isinstance(predicate, str) and predicate.strip():
            return predicate.strip()
    last = str(row.get("pred", "")).rpartition("/")[2]
    return last if last in GOOGLE_RE_TEMPLATES else None
