"""LAMA-style relations: which files hold their facts, templates and paraphrases, and the facts as records.

There are two layouts. LAMA's own has ``relations.jsonl`` beside ``TREx/P36.jsonl``,
``Google_RE/place_of_birth_test.jsonl``, ``ConceptNet/test.jsonl`` and ``Squad/test.jsonl``. The other has one folder
per relation with ``train.jsonl``, ``dev.jsonl`` and ``test.jsonl``. ``paraphrases/P36.jsonl`` goes with both.
``scripts/convert_lama.py`` writes them from other layouts; :func:`ptuning.data.splits.split_relation` divides facts.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ptuning.data.reading import SPLITS, SUFFIXES, Row, raw_rows
from ptuning.errors import FileError, RecordError, TemplateError, closest
from ptuning.files import file_error, read_bytes, sha256
from ptuning.records import TARGET_FIELD, Record, Records, clean
from ptuning.template.language import Template

logger = logging.getLogger(__name__)

FACTS = "facts"  # the part of a relation whose facts are not divided yet
# A .json file beside facts describes them, as the hub's dataset_infos.json does.
FACT_SUFFIXES = tuple(suffix for suffix in SUFFIXES if suffix != ".json")
PART_NAMES = {name: name for name in SPLITS} | dict.fromkeys(("val", "valid", "validation"), "dev")
FACT_FOLDERS = ("trex", "google_re", "conceptnet", "squad")  # in lower case
RELATION_LIST = "relations"
PATTERN_FOLDER = "paraphrases"

# LAMA keeps these three templates in its code. Source: facebookresearch/LAMA, scripts/run_experiments.py.
GOOGLE_RE_TEMPLATES = {
    "place_of_birth": "[X] was born in [Y] .",
    "date_of_birth": "[X] (born [Y]).",
    "place_of_death": "[X] died in [Y] .",
}

LOOKED_FOR = (
    "relations.jsonl with TREx/P36.jsonl, Google_RE/*_test.jsonl, ConceptNet/test.jsonl or Squad/test.jsonl (LAMA); "
    "P36/train.jsonl, P36/dev.jsonl, P36/test.jsonl; each also in data/ below the folder and with one of the endings "
    f"{', '.join(FACT_SUFFIXES)}"
)

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
class About:
    """What the list of relations says about one, if anything; its type is ``1-1``, ``N-1`` or ``N-M``."""

    template: str | None = None
    label: str | None = None
    type: str | None = None


@dataclass(frozen=True)
class Layout:
    """The files of a folder: relation -> part -> file of facts, entry in the list of relations, file of paraphrases."""

    facts: Mapping[str, Mapping[str, Path]]
    about: Mapping[str, About]
    patterns: Mapping[str, Path]


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


def read_relations(folder: str | Path, *, which: Sequence[str] = (EVERYTHING,)) -> list[Relation]:
    """Read relations in one of the two layouts of this module's docstring, in natural order (P17 before P103).

    ``folder`` is a folder, or one file with the facts of one relation; ``which`` has names (``P36``), types (``1-1``,
    ``N-1``, ``N-M``) or ``all``. A relation without facts is left out with a notice. A folder without relations is a
    FileError; a row that cannot be read, or a relation of ``which`` that is not there, is a RecordError.
    """
    layout = find_layout(folder)
    relations = []
    for name in sorted(_chosen(layout, which, folder=str(folder)), key=_natural):
        relation = _relation(name, layout)
        if any(relation.parts.values()):
            relations.append(relation)
        else:
            logger.warning("%s: no facts in %s; left out", name, relation.source)
    if not relations:
        raise RecordError(f"{folder}: none of the chosen relations has facts")
    return relations


def _chosen(layout: Layout, which: Sequence[str], *, folder: str) -> set[str]:
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


def _natural(name: str) -> tuple[list[tuple[str, int, str]], str]:
    """Return a key for sorting in which numbers count as numbers, however many digits they have."""
    found = [(text, digits.lstrip("0")) for text, digits in re.findall(r"(\D*)(\d*)", name)]
    return [(text, len(digits), digits) for text, digits in found], name  # P017 before P17, on any disk


def _relation(name: str, layout: Layout) -> Relation:
    about = layout.about.get(name, About())
    template = about.template or GOOGLE_RE_TEMPLATES.get(name)
    files = layout.facts[name]
    read = {part: read_facts(path) for part, path in files.items()}
    rows = [row for part_rows, _ in read.values() for _, row in part_rows]
    file = next(iter(files.values()))
    source = str(file if len(files) == 1 else file.parent)
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
    if relation_of(row) is None:
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


def find_layout(folder: str | Path) -> Layout:
    """Find the files of a folder of relations, or of one file of facts; a FileError lists what was looked for."""
    path = Path(folder)
    is_file = os.path.isfile(path)  # unlike Path.is_file, False for a name that cannot be a path
    if not is_file and not os.path.isdir(path):
        beside = [entry.name for entry in _entries(path.parent)]
        raise FileError(f"no such folder of relations: {folder}.{closest(path.name, beside)} {convert_with(folder)}")
    base = path.parent if is_file else path
    places = (base, base / "data", base.absolute().parent)
    about = next((listed for place in places if (listed := _relation_list(place))), {})
    found = _single({}, path) if is_file else _find_facts(base) or _find_facts(base / "data")
    if not found:
        entries = [entry.name + "/" * entry.is_dir() for entry in _entries(path)]
        shown = ", ".join(entries[:12]) + (f" and {len(entries) - 12} more" if len(entries) > 12 else "")
        raise FileError(
            f"{folder} holds no relations. Looked for: {LOOKED_FOR}. Found: {shown or 'nothing'}. "
            f"{convert_with(folder)}"
        )
    patterns = next((files for place in places if (files := _data_files(place / PATTERN_FOLDER))), [])
    return Layout(found, about, {path.stem: path for path in patterns})


def convert_with(folder: object) -> str:
    """Return the command that converts the data of another layout."""
    return (
        "Other layouts (AutoPrompt, OptiPrompt, P-tuning's code, ParaRel, the hub's lama) are converted with: "
        f"python scripts/convert_lama.py {folder} NEW_FOLDER"
    )


def read_facts(path: Path) -> tuple[list[Row], str]:
    """Return the rows of a file of facts, and its SHA-256. A row that cannot be read is a RecordError."""
    data = read_bytes(path)
    rows = raw_rows(data, name=str(path))
    for where, row in rows:
        if not isinstance(row, Mapping):
            raise RecordError(f"{where}: a record must be an object with named fields, not {type(row).__name__}")
    return rows, sha256(data)


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


def as_pattern(text: str, *, where: str) -> str:
    """Return a data set's pattern as a template; brackets other than ``[X]`` and ``[Y]`` become literal text. Raise a
    RecordError if one of the two is missing, and a TemplateError if there are two ``[Y]``.
    """
    text = text.strip()
    missing = [mark for mark in ("[X]", "[Y]") if mark not in text]
    if missing:
        raise RecordError(
            f"{where}: the pattern {text!r} has no {' and no '.join(missing)}; it needs [X] for the subject and [Y] "
            "for the object"
        )
    pieces = re.split(r"(\[[XY]\])", text)
    pieces[::2] = [piece.replace("[", "[[").replace("{", "{{") for piece in pieces[::2]]
    pattern = "".join(pieces)
    Template.parse(pattern)
    return pattern


def relation_of(row: Mapping[str, object]) -> str | None:
    """Return the relation that a row names: T-REx's ``predicate_id``, Google-RE's ``/people/person/place_of_birth``."""
    predicate = row.get("predicate_id")
    if isinstance(predicate, str) and predicate.strip():
        return predicate.strip()
    last = str(row.get("pred", "")).rpartition("/")[2]
    return last if last in GOOGLE_RE_TEMPLATES else None


def _find_facts(folder: Path) -> dict[str, dict[str, Path]]:
    """Return relation -> part -> file of a folder, or of the relations in its folders."""
    found: dict[str, dict[str, Path]] = {}
    for child in _entries(folder):
        parts = {} if child.name.lower() in ("data", PATTERN_FOLDER) else _parts(child)
        if parts:
            _add(found, child.name, parts)
        elif child.name.lower() in FACT_FOLDERS:
            for path in _data_files(child):
                _single(found, path)
    if not found and (parts := _parts(folder)):
        _add(found, folder.absolute().name, parts)
    for path in () if found else _data_files(folder):
        _single(found, path)
    return found


def _single(found: dict[str, dict[str, Path]], path: Path) -> dict[str, dict[str, Path]]:
    """Add one file, named after its relation, or after a part; then its folder has the relation's name."""
    name = path.absolute().parent.name if path.stem in PART_NAMES else path.stem.removesuffix("_test")
    return _add(found, name, {FACTS: path})


def _add(found: dict[str, dict[str, Path]], name: str, parts: Mapping[str, Path]) -> dict[str, dict[str, Path]]:
    if name in found:
        first, second = (next(iter(one.values())).parent for one in (found[name], parts))
        raise FileError(f"facts of {name} are in two places, {first} and {second}; keep one. {convert_with('FOLDER')}")
    # A single part is not a division.
    found[name] = dict(parts) if len(parts) > 1 else {FACTS: next(iter(parts.values()))}
    return found


def _parts(folder: Path) -> dict[str, Path]:
    parts = {PART_NAMES[path.stem]: path for path in _data_files(folder) if path.stem in PART_NAMES}
    return dict(sorted(parts.items(), key=lambda item: SPLITS.index(item[0])))


def _relation_list(folder: Path) -> dict[str, About]:
    path = next((one for suffix in SUFFIXES if (one := folder / f"{RELATION_LIST}{suffix}").is_file()), None)
    about: dict[str, About] = {}
    for where, row in raw_rows(read_bytes(path), name=str(path)) if path is not None else ():
        name = row.get("relation") if isinstance(row, Mapping) else None
        if not isinstance(name, str) or not name.strip():
            raise RecordError(f"{where}: a relation needs the field 'relation' with its name, such as P36")
        if name in about:
            raise RecordError(f"{where}: the relation {name} is there twice; leave one of the rows")
        about[name] = _about(row, where)
    return about


def _about(row: Mapping[str, object], where: str) -> About:
    template, label, kind = (
        text.strip() if isinstance(text := row.get(name), str) and text.strip() else None
        for name in ("template", "label", "type")
    )
    try:
        return About(None if template is None else as_pattern(template, where=where), label, kind)
    except TemplateError as error:
        raise RecordError(f"{where}: {error}") from error


def _data_files(folder: Path) -> list[Path]:
    """Return a folder's data files by name. Of a name in two formats, the first format's."""
    files: dict[str, Path] = {}
    for suffix in FACT_SUFFIXES:
        for path in _entries(folder):
            if path.suffix.lower() == suffix and path.stem != RELATION_LIST and path.is_file():
                files.setdefault(path.stem, path)
    return [files[stem] for stem in sorted(files)]


def _entries(folder: Path) -> Iterable[Path]:
    if not os.path.isdir(folder):
        return []
    try:
        return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise file_error("read", folder, error) from error
