"""LAMA-style relations: their facts, templates and paraphrases in a folder, and the seeded split of their facts.

LAMA's release has ``relations.jsonl`` next to ``TREx/P36.jsonl``, ``Google_RE/place_of_birth_test.jsonl``,
``ConceptNet/test.jsonl`` and ``Squad/test.jsonl``. Other folders have a folder per relation with ``train.jsonl``,
``dev.jsonl`` and ``test.jsonl``, a file per relation, or a file whose rows name their relations;
``paraphrases/P36.jsonl`` goes with all of them. ``scripts/convert_lama.py`` converts others.
"""

import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ptuning.data.reading import SPLITS, SUFFIXES, RawRows, Row, raw_rows, renamed
from ptuning.data.splits import shuffled
from ptuning.errors import FileError, RecordError, TemplateError, closest
from ptuning.files import file_error, read_bytes
from ptuning.records import TARGET_FIELD, Record, Records, canonical_json, clean
from ptuning.template.language import Template

logger = logging.getLogger(__name__)

FACTS = "facts"  # the part of a relation whose facts are not divided yet
# A .json file among facts describes them, as the hub's dataset_infos.json does.
FACT_SUFFIXES = tuple(suffix for suffix in SUFFIXES if suffix != ".json")
PART_NAMES = {name: name for name in SPLITS} | dict.fromkeys(("val", "valid", "validation"), "dev")
FACT_FOLDERS = ("trex", "google_re", "conceptnet", "squad")  # in lower case
RELATION_LIST = "relations"
PATTERN_FOLDER = "paraphrases"
PATTERN_FOLDERS = (PATTERN_FOLDER, "patterns")  # the second is ParaRel's name
EVERYTHING = "all"
SUBJECT_FIELD = "x"
# LAMA keeps these three templates in its code. Source: facebookresearch/LAMA, scripts/run_experiments.py.
GOOGLE_RE_TEMPLATES = {
    "place_of_birth": "[X] was born in [Y] .",
    "date_of_birth": "[X] (born [Y]).",
    "place_of_death": "[X] died in [Y] .",
}
# ConceptNet and SQuAD ask each fact with its own sentence; its halves are fields around the target.
MASK = "[MASK]"
SENTENCE_FIELDS = ("before", "after")
SENTENCE_TEMPLATE = "{before}[Y]{after}"
# Fields of T-REx rows that describe the relation, or the sentence that the fact comes from.
DESCRIBING = (
    "predicate_id", "template", "template_negated", "label", "description", "type", "masked_sentence", "negated",
)  # fmt: skip
# The field that says why a fact cannot be used with any tokenizer; the split counts it.
FLAW = "flaw"
HELD_OUT = 0.2  # of a relation's subjects, for the development and for the test part

About = Mapping[str, str | None]  # template, label and type of a relation
Keeps = Callable[[Sequence[Record]], Sequence[bool]]  # for each of N facts, whether to keep it


@dataclass(frozen=True)
class Relation:
    """One relation and its facts.

    ``name`` is that in the data, such as ``P36``, ``place_of_birth`` or ``ConceptNet``; ``label`` a name for people,
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
    """Read relations of a folder or of one file of facts, in natural order (P17 before P103).

    ``which`` has names (``P36``), types (``1-1``, ``N-1``, ``N-M``) or ``all``. ``fields`` maps new names of fields to
    those in the files of facts, such as ``{"sub_label": "subject"}``. A relation without facts is left out with a
    warning. A folder without relations is a FileError; a row that cannot be read, or a missing relation of ``which``,
    is a RecordError.
    """
    which = [which] if isinstance(which, str) else which
    path = Path(folder)
    is_file = os.path.isfile(path)  # unlike Path.is_file, False for a name that cannot be a path
    if not is_file and not os.path.isdir(path):
        siblings = [entry.name for entry in _entries(path.parent)]
        raise FileError(f"no such folder of relations: {folder}.{closest(path.name, siblings)} {_convert(folder)}")
    base = path.parent if is_file else path
    places = (base, base / "data", base.absolute().parent)
    about = next((listed for place in places if (listed := _relation_list(place))), {})
    files = {_named_after(path): {FACTS: path}} if is_file else _find_facts(base) or _find_facts(base / "data")
    if not files:
        entries = [entry.name + "/" * entry.is_dir() for entry in _entries(path)]
        raise FileError(
            f"{folder} holds no relations. Looked for: relations.jsonl with TREx/P36.jsonl, Google_RE/*_test.jsonl, "
            "ConceptNet/test.jsonl or Squad/test.jsonl (LAMA); P36/train.jsonl, P36/dev.jsonl, P36/test.jsonl; "
            f"P36.jsonl; each also in data/ below the folder and with one of the endings {', '.join(FACT_SUFFIXES)}. "
            f"Found: {', '.join(entries[:12]) or 'nothing'}{', ...' * (len(entries) > 12)}. {_convert(folder)}"
        )
    folders = [place / name for place in places for name in PATTERN_FOLDERS]
    pattern_files = next((paths for each in folders if (paths := _data_files(each))), [])
    patterns = {path.stem: path for path in pattern_files}

    facts: dict[str, dict[str, RawRows]] = {}
    unread = [] if EVERYTHING in which or not {*which} <= {*files} else [name for name in files if name not in which]
    for name, parts in files.items():
        if name in unread:
            continue
        first = next(iter(parts.values()))
        read = {part: _read_facts(path, fields) for part, path in parts.items()}
        named = _relations_of(row for rows in read.values() for _, row in rows)
        # Listed relations and LAMA's have files of their own.
        is_own = name in about or first.absolute().parent.name.lower() in FACT_FOLDERS
        if is_own or (len(named) < 2 and not {*named} & {*which} - {*files}):
            named = [name]
        for each in named:
            if each in facts:
                raise _two_places(each, next(iter(facts[each].values())).name, first, folder=folder)
            facts[each] = {part: rows if len(named) == 1 else _of(each, rows) for part, rows in read.items()}
    relations = []
    for name in sorted(_chosen((*facts, *unread), about, which, folder=str(folder)), key=_natural):
        relation = _relation(name, facts[name], about.get(name), patterns.get(name))
        if any(relation.parts.values()):
            relations.append(relation)
        else:
            logger.warning("%s: no facts in %s; left out", name, relation.source)
    if not relations:
        raise RecordError(f"{folder}: none of the chosen relations has facts")
    return relations


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


def subject_of(record: Record) -> str:
    """Return a fact's subject for comparison: trimmed and in small letters."""
    return record.get(SUBJECT_FIELD, "").strip().casefold()


def _relations_of(rows: Iterable[Mapping[str, object]]) -> list[str]:
    return sorted({name for row in rows if (name := relation_of(row)) is not None}, key=_natural)


def _of(relation: str, rows: RawRows) -> RawRows:
    """Return the rows of one relation of a file with several; a RecordError if a row names none."""
    names = [relation_of(row) for _, row in rows]
    if None in names:
        raise RecordError(f"{rows[names.index(None)][0]}: the row names no relation, and others of its file do")
    kept = [row for row, name in zip(rows, names, strict=True) if name == relation]
    return RawRows(kept, name=rows.name, digest=rows.sha256, format=rows.format)


def _chosen(known: Sequence[str], about: Mapping[str, About], which: Sequence[str], *, folder: str) -> set[str]:
    chosen: set[str] = set()
    types = {name: kind for name, described in about.items() if name in known and (kind := described["type"])}
    for choice in which:
        named = {name for name in known if choice in (EVERYTHING, types.get(name))} or {choice} & {*known}
        if not named and choice in about:
            raise RecordError(f"{folder}: the relation {choice} is listed, but there are no facts of it")
        if not named:
            names = [*sorted(known, key=_natural), *sorted({*types.values()}), EVERYTHING]
            raise RecordError(
                f"{folder}: no relation of the name or type '{choice}'.{closest(choice, names)} Found: "
                f"{', '.join(names)}. A relation is named by its file, or by the column predicate_id or relation of "
                f"its facts (field predicate_id=NAME reads another). {_convert(folder)}"
            )
        chosen |= named
    if not chosen:
        raise RecordError(f"{folder}: no relation is chosen; name some, or '{EVERYTHING}'")
    missing = sorted({*about} - {*known}, key=_natural)
    if missing and EVERYTHING in which:
        logger.warning("%s: listed, but without facts, and left out: %s", folder, ", ".join(missing))
    return chosen


def _natural(name: str) -> tuple[list[tuple[str, int, str]], str]:
    """Return a key for sorting in which numbers count as numbers, however many digits they have."""
    parts = [(text, digits.lstrip("0")) for text, digits in re.findall(r"(\D*)(\d*)", name)]
    return [(text, len(digits), digits) for text, digits in parts], name  # P017 before P17, on any disk


def _relation(name: str, parts: Mapping[str, RawRows], about: About | None, patterns: Path | None) -> Relation:
    rows = [row for part in parts.values() for _, row in part]
    about = about or _described_by(rows)
    template = about["template"] or GOOGLE_RE_TEMPLATES.get(name)
    path = Path(next(iter(parts.values())).name)
    source = str(path if len(parts) == 1 else path.parent)
    named = _relations_of(rows)
    if len(named) > 1:
        raise RecordError(
            f"{source}: the rows are of the relations {', '.join(named[:5])}, and a file holds the facts of the "
            f"relation that it is named after. {_convert(source)}"
        )
    # In T-REx, sentences are where the facts were found.
    is_sentences = all({"masked_sentences", "masked_sentence"} & {*row} and "predicate_id" not in row for row in rows)
    if template is None and rows and is_sentences:
        template = SENTENCE_TEMPLATE
    records = {
        part: Records(_records(part_rows, template), name=part_rows.name, digest=part_rows.sha256)
        for part, part_rows in parts.items()
    }
    facts = [record for part in records.values() for record in part]
    if facts and not any(SUBJECT_FIELD in record and TARGET_FIELD in record for record in facts):
        raise RecordError(
            f"{source}: no facts; none of the rows has sub_label and obj_label (or x and y), the first has "
            f"{', '.join(sorted(facts[0])) or 'no fields'}. Name yours with fields (sub_label=NAME, "
            "obj_label=NAME)"
        )
    paraphrases = _read_patterns(patterns) if patterns is not None else ()
    return Relation(name, template, about["label"], about["type"], records, paraphrases, source)


def _described_by(rows: Sequence[Mapping[str, object]]) -> About:
    """Return what all facts say about their relation alike, as the rows of the hub do."""
    about: dict[str, str | None] = {}
    for name in ("template", "label", "type"):
        values = {str(row.get(name) or "").strip() for row in rows if name == "template" or "predicate_id" in row}
        about[name] = values.pop() or None if len(values) == 1 else None
    template = about["template"] or ""
    is_pattern = "[X]" in template and "[Y]" in template
    return {**about, "template": as_pattern(template, where="template") if is_pattern else None}


def _records(rows: RawRows, template: str | None) -> list[Record]:
    """Return rows as records with a subject ``x`` and an object ``y``, and with the flaw that rules a fact out."""
    records: list[dict[str, str]] = []
    for where, row in rows:
        # The label of a relation would pass for a missing object.
        has_relation = "predicate_id" in row or "pred" in row
        record = clean(
            {name: value for name, value in row.items() if not has_relation or name not in DESCRIBING}, where=where
        )
        # Most of Google-RE's raters judged the fact false; the hub has the list of judgments as text.
        # Source: facebookresearch/LAMA, scripts/batch_eval_KB_completion.py, ``filter_samples``.
        judgments = re.findall(r"""judgment['"]\s*:\s*['"](\w+)""", str(row.get("judgments", "")))
        flaw = "judged false by its raters" if 2 * judgments.count("yes") < len(judgments) else None
        if template == SENTENCE_TEMPLATE:
            record.setdefault(SUBJECT_FIELD, record.get("sub", ""))  # ConceptNet's name for it
            sentences = row.get("masked_sentences", row.get("masked_sentence"))
            halves = (" ".join(map(str, sentences)) if isinstance(sentences, list) else str(sentences or "")).split(
                MASK
            )
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


# Files


def _find_facts(folder: Path) -> dict[str, dict[str, Path]]:
    """Return relation -> part -> file of a folder, or of the relations in its folders."""
    facts: dict[str, dict[str, Path]] = {}

    def add(name: str, parts: Mapping[str, Path]) -> None:
        if name in facts:
            raise _two_places(
                name, *(next(iter(files.values())).parent for files in (facts[name], parts)), folder=folder
            )
        # A single part is not a division.
        facts[name] = dict(parts) if len(parts) > 1 else {FACTS: next(iter(parts.values()))}

    for child in _entries(folder):
        parts = {} if child.name.lower() in ("data", *PATTERN_FOLDERS) else _parts(child)
        if parts:
            add(child.name, parts)
        elif child.name.lower() in FACT_FOLDERS:
            for path in _data_files(child):
                add(_named_after(path), {FACTS: path})
    if not facts and (parts := _parts(folder)):
        add(folder.absolute().name, parts)
    for path in () if facts else _data_files(folder):
        add(_named_after(path), {FACTS: path})
    return facts


def _named_after(path: Path) -> str:
    """Return the relation of a file: its name, or that of its folder if the file is named after a part."""
    return path.absolute().parent.name if path.stem in PART_NAMES else path.stem.removesuffix("_test")


def _two_places(name: str, first: object, second: object, *, folder: object) -> FileError:
    return FileError(f"facts of {name} are in two places, {first} and {second}; keep one. {_convert(folder)}")


def _convert(folder: object) -> str:
    return (
        "Other layouts (AutoPrompt, OptiPrompt, P-tuning's code, ParaRel, the hub's lama) are converted with: "
        f"python scripts/convert_lama.py {folder} NEW_FOLDER"
    )


def _parts(folder: Path) -> dict[str, Path]:
    parts = {PART_NAMES[path.stem]: path for path in _data_files(folder) if path.stem in PART_NAMES}
    return dict(sorted(parts.items(), key=lambda item: SPLITS.index(item[0])))


def _read_facts(path: Path, fields: Mapping[str, str] | None) -> RawRows:
    rows = raw_rows(read_bytes(path), name=str(path))
    named: list[Row] = [(where, renamed(row, fields, where=where)) for where, row in rows] if fields else rows
    return RawRows(named, name=rows.name, digest=rows.sha256, format=rows.format)


def _relation_list(folder: Path) -> dict[str, About]:
    path = next((path for suffix in SUFFIXES if (path := folder / f"{RELATION_LIST}{suffix}").is_file()), None)
    about: dict[str, About] = {}
    for where, row in raw_rows(read_bytes(path), name=str(path)) if path is not None else ():
        texts = {
            key: value.strip() or None if isinstance(value := row.get(key), str) else None
            for key in ("relation", "template", "label", "type")
        }
        name, template = texts.pop("relation"), texts["template"]
        if name is None:
            raise RecordError(f"{where}: a relation needs the field 'relation' with its name, such as P36")
        if name in about:
            raise RecordError(f"{where}: the relation {name} is there twice; leave one of the rows")
        try:
            about[name] = {**texts, "template": as_pattern(template, where=where) if template is not None else None}
        except TemplateError as error:
            raise RecordError(f"{where}: {error}") from error
    return about


def _read_patterns(path: Path) -> tuple[str, ...]:
    """Read the paraphrases of a relation, each once. A malformed template is left out with a warning."""
    patterns: dict[str, None] = {}
    for where, row in raw_rows(read_bytes(path), name=str(path)):
        text = row.get("pattern")
        if not isinstance(text, str):
            raise RecordError(f"{where}: a paraphrase needs the field 'pattern' with text")
        try:
            patterns[as_pattern(text, where=where)] = None
        except TemplateError as error:
            logger.warning("%s: left out the pattern %r: %s", where, text, str(error).splitlines()[0])
    return tuple(patterns)


def _data_files(folder: Path) -> list[Path]:
    """Return a folder's data files by name. Of a name in two formats, the first format's."""
    files: dict[str, Path] = {}
    for suffix in FACT_SUFFIXES:
        for path in _entries(folder):
            if path.suffix.lower() == suffix and path.stem != RELATION_LIST and path.is_file():
                files.setdefault(path.stem, path)
    return [files[stem] for stem in sorted(files)]


def _entries(folder: Path) -> list[Path]:
    if not os.path.isdir(folder):
        return []
    try:
        return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise file_error("read", folder, error) from error


# Splits


@dataclass(frozen=True)
class Split:
    """A relation's facts, filtered and divided; subjects of the test part are in no other part.

    ``rows`` is the number of facts that were read, ``dropped`` maps a reason to the number that was dropped for it, and
    ``how`` says in words how the parts were made.
    """

    train: Records
    dev: Records
    test: Records
    rows: int
    dropped: Mapping[str, int]
    how: str


def split_relation(
    relation: Relation,
    *,
    keeps: Keeps | None = None,
    reason: str = "object is not one token",
    seed: int = 0,
    limit: int | None = None,
) -> Split:
    """Filter a relation's facts and divide them.

    Facts in one file are divided 60/20/20 by subject, drawn before any fact is dropped: the part of a fact depends on
    the subjects and the seed alone, and is the same for every tokenizer and every order of the file. Given parts stay
    as they are, but a fact is dropped if its subject is in a later part too. A missing part is drawn from the training
    part's subjects.

    ``keeps`` decides for N facts which to keep, and ``reason`` is why it drops the others. ``limit`` is the largest
    number of facts in all, of drawn subjects and in the proportions of the parts. Without a training part, or with an
    empty part, it raises a RecordError that says why.
    """
    if limit is not None and limit < len(SPLITS):
        raise RecordError(f"{relation.name}: a limit of {limit} facts; the three parts need at least one each")
    parts, how = _divide(relation, seed=seed)
    dropped: Counter[str] = Counter()
    whole: list[tuple[str, Record]] = []  # facts that lack nothing, each once
    for part in SPLITS:
        seen = set()
        for record in parts[part]:
            target = record.get(TARGET_FIELD, "").strip()
            fact = (subject_of(record), target, *(record.get(name) for name in SENTENCE_FIELDS))
            if not (subject_of(record) and target):
                dropped["no subject or object"] += 1
            elif FLAW in record:
                dropped[record[FLAW]] += 1
            elif fact in seen:
                dropped["twice the same fact"] += 1
            else:
                seen.add(fact)
                whole.append((part, record))
    is_kept = [True] * len(whole) if keeps is None else keeps([record for _, record in whole])
    dropped[reason] += len(whole) - sum(is_kept)
    kept = [fact for fact, keep in zip(whole, is_kept, strict=True) if keep]
    parts = {name: [record for part, record in kept if part == name] for name in SPLITS}
    for part, later in (("dev", "test"), ("train", "test"), ("train", "dev")):  # the test part is never touched
        subjects = {subject_of(record) for record in parts[later]}
        apart = [record for record in parts[part] if subject_of(record) not in subjects]
        dropped[f"{part} fact with a subject of the {later} part"] += len(parts[part]) - len(apart)
        parts[part] = apart
    total = sum(map(len, parts.values()))
    if limit is not None and total > limit:
        dropped["over the limit"] = total - limit
        parts = _limited(parts, limit, seed=seed)
        how += f", at most {limit} facts"
    dropped = +dropped
    rows = sum(map(len, relation.parts.values()))
    for part in SPLITS:
        if not parts[part]:
            why = ", ".join(f"{count} {text}" for text, count in dropped.items()) or "none"
            raise RecordError(
                f"{relation.name}: the part {part} is empty. {rows} facts were read from {relation.source} and divided "
                f"({how}); dropped: {why}. Leave this relation out, or give it more facts"
            )
    train, dev, test = (Records(parts[part], name=f"{relation.source} ({part}, {how})") for part in SPLITS)
    return Split(train, dev, test, rows, dict(dropped), how)


def _subjects(records: Iterable[Record], *, seed: int) -> list[str]:
    return shuffled({subject_of(record) for record in records} - {""}, f"relation {seed}")


def _divide(relation: Relation, *, seed: int) -> tuple[dict[str, list[Record]], str]:
    """Return the facts of each part, and how they were made."""
    if {*relation.parts} == {FACTS}:
        facts = relation.parts[FACTS]
        subjects = _subjects(facts, seed=seed)
        count = max(1, round(len(subjects) * HELD_OUT))
        place = dict.fromkeys(subjects[:count], "test") | dict.fromkeys(subjects[count : 2 * count], "dev")
        order = {subject: number for number, subject in enumerate(subjects)}
        parts: dict[str, list[Record]] = {part: [] for part in SPLITS}
        for record in sorted(facts, key=lambda row: (order.get(subject_of(row), -1), canonical_json(row))):
            parts[place.get(subject_of(record), "train")].append(record)
        return parts, f"60/20/20 by subject, seed {seed}"
    parts = {part: list(records) for part, records in relation.parts.items()}
    given, missing = ([part for part in SPLITS if (part in parts) == has] for has in (True, False))
    if "train" in missing:
        raise RecordError(
            f"{relation.name}: there is no training part among {', '.join(parts)} in {relation.source}; add train.jsonl"
        )
    if not missing:
        return parts, "the parts given"
    others = {subject_of(record) for part in given[1:] for record in parts[part]}
    subjects = _subjects((record for record in parts["train"] if subject_of(record) not in others), seed=seed)
    drawn = {*subjects[: max(1, round(len(subjects) * HELD_OUT))]}
    parts[missing[0]] = [record for record in parts["train"] if subject_of(record) in drawn]
    parts["train"] = [record for record in parts["train"] if subject_of(record) not in drawn]
    how = f"{' and '.join(given)} given, {missing[0]} taken from {HELD_OUT:.0%} of the subjects of train, seed {seed}"
    return parts, how


def _limited(parts: Mapping[str, list[Record]], limit: int, *, seed: int) -> dict[str, list[Record]]:
    """Return at most ``limit`` facts of drawn subjects; each part keeps its share, and at least one fact."""
    total = sum(map(len, parts.values()))
    sizes = {part: min(len(parts[part]), max(1, limit * len(parts[part]) // total)) for part in SPLITS}
    while sum(sizes.values()) < limit:  # shares were rounded down
        sizes[max(SPLITS, key=lambda part: len(parts[part]) - sizes[part])] += 1
    while sum(sizes.values()) > limit:  # small parts were given a whole fact
        sizes[max(SPLITS, key=lambda part: sizes[part])] -= 1
    kept = {}
    for part, records in parts.items():
        order = {subject: number for number, subject in enumerate(_subjects(records, seed=seed))}
        first = sorted(range(len(records)), key=lambda index: order[subject_of(records[index])])[: sizes[part]]
        kept[part] = [records[index] for index in sorted(first)]
    return kept
