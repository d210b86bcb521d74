"""Where LAMA-style relation data lies: which files of a folder hold which relation's facts, templates and paraphrases.
Knows nothing of what is a usable fact.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ptuning.data.reading import SPLITS, SUFFIXES, raw_rows
from ptuning.errors import FileError, RecordError, TemplateError, closest
from ptuning.files import file_error, read_bytes, sha256
from ptuning.template.language import Template

logger = logging.getLogger(__name__)

Row = tuple[str, Mapping[str, object]]  # file and line, and the row as it stands there

FACTS = "facts"  # the part of a relation whose facts are not divided yet
# A .json file beside facts describes them, as the hub's dataset_infos.json does.
FACT_SUFFIXES = tuple(suffix for suffix in SUFFIXES if suffix != ".json")
PART_NAMES = {name: name for name in SPLITS} | dict.fromkeys(("val", "valid", "validation"), "dev")
HUB_PREFIX = "hub:"

# Folders of facts, in lower case. Only one of the first three may be there: they hold the same relations.
TREX_FOLDERS = ("trex", "lama-trex", "trex_lms_vocab")
OTHER_FOLDERS = ("google_re", "conceptnet", "squad")
RELATION_LISTS = ("relations", "LAMA_relations", "relation_metainfo/LAMA_relations")
SINGLE_LISTS = "single_relations"  # one list per relation
PATTERN_FOLDERS = ("paraphrases", "graphs_json", "pattern_data/graphs_json", "pattern_data")

# LAMA keeps these three templates in its code. Source: facebookresearch/LAMA, scripts/run_experiments.py.
GOOGLE_RE_TEMPLATES = {
    "place_of_birth": "[X] was born in [Y] .",
    "date_of_birth": "[X] (born [Y]).",
    "place_of_death": "[X] died in [Y] .",
}

LOOKED_FOR = (
    "relations.jsonl with TREx/P36.jsonl, Google_RE/*_test.jsonl, ConceptNet/test.jsonl or Squad/test.jsonl (LAMA); "
    "P36/train.jsonl, P36/dev.jsonl, P36/test.jsonl (AutoPrompt, OptiPrompt); trex_lms_vocab/P36.jsonl (ParaRel); "
    "files whose rows have predicate_id, sub_label and obj_label (the hub's lama); each also in data/ below the folder "
    f"and with one of the endings {', '.join(FACT_SUFFIXES)}"
)


@dataclass(frozen=True)
class About:
    """What is said of a relation beside its facts; None is not known."""

    template: str | None = None
    label: str | None = None
    type: str | None = None


@dataclass(frozen=True)
class Facts:
    """The facts of one relation and part: whole files that are read when asked for, or rows that were read already.

    Args:
        name: The files' paths, or what the rows are a part of.
        paths: The files; empty if the rows are given.
        rows: The rows, if they are only a part of a file or come from no file.
    """

    name: str
    paths: tuple[Path, ...] = ()
    rows: tuple[Row, ...] = ()

    def read(self) -> tuple[list[Row], str | None]:
        """Return the rows, and the SHA-256 of the file if they are one whole file.

        Raises:
            FileError: If a file cannot be read.
            RecordError: If a row cannot be read; it names file and line.
        """
        rows, digest = list(self.rows), None
        for path in self.paths:
            data = read_bytes(path)
            rows += raw_rows(data, name=str(path))
            digest = sha256(data)
        return rows, digest if len(self.paths) == 1 else None


Found = dict[str, dict[str, Facts]]  # relation -> part -> facts
Table = tuple[str, str, Sequence[Row]]  # the relation of rows that name none, their part, rows


@dataclass(frozen=True)
class Layout:
    """All that a folder holds.

    Args:
        facts: Relation -> part -> where its facts are.
        about: Relation -> what the list of relations says of it.
        patterns: Relation -> the file of its paraphrases.
    """

    facts: Found
    about: Mapping[str, About]
    patterns: Mapping[str, Path]


def find_layout(folder: str | Path) -> Layout:
    """Find out how a folder of relations is laid out; files of a single relation are not opened.

    Args:
        folder: A folder, one file whose rows name their relations, or ``hub:NAME[:CONFIG[:SPLIT]]``.

    Raises:
        FileError: If there is nothing of that kind (it lists what was looked for and what was found), if it holds
            several sets of facts for the same relations, or if the hub cannot be asked.
        RecordError: If the list of relations cannot be read.
    """
    if str(folder).startswith(HUB_PREFIX):
        found, told = _grouped(_hub_tables(str(folder)))
        return Layout(found, told, {})
    path = Path(folder)
    is_file = os.path.isfile(path)  # unlike Path.is_file, False for whatever can be no path
    if not is_file and not os.path.isdir(path):
        beside = [entry.name for entry in _entries(path.parent)]
        raise FileError(f"no such folder of relations: {folder}.{closest(path.name, beside)}")
    base = path.parent if is_file else path
    places = [base, base / "data", base.absolute().parent, base.absolute().parent.parent]
    about = _relation_lists(places)
    found, told = _facts_in(base, [path], known=about) if is_file else _find_facts(path, known=about)
    if not found:
        entries = [entry.name + "/" * entry.is_dir() for entry in _entries(path)]
        shown = ", ".join(entries[:12]) + (f" and {len(entries) - 12} more" if len(entries) > 12 else "")
        raise FileError(f"{folder} holds no relations. Looked for: {LOOKED_FOR}. Found: {shown or 'nothing'}")
    patterns = next((files for place in places if (files := _pattern_files(place))), {})
    return Layout(found, told | about, patterns)


def as_pattern(text: str, *, where: str) -> str:
    """Return a pattern of a data set as a template: brackets other than ``[X]`` and ``[Y]`` are literal there.

    Raises:
        RecordError: If ``[X]`` or ``[Y]`` is missing.
        TemplateError: If it is no template all the same (two ``[Y]``).
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


def read_patterns(path: Path) -> tuple[str, ...]:
    """Read the paraphrases of a relation, without those that are there twice or are no template (with a notice).

    Raises:
        RecordError: If a row has no pattern, or a pattern no ``[X]`` or no ``[Y]``; it names file and line.
    """
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


def _find_facts(folder: Path, *, known: Iterable[str]) -> tuple[Found, dict[str, About]]:
    """Find facts: named folders of facts, folders of a relation's parts, else data files in the folder itself."""
    bases = [base for base in (folder, folder / "data") if base.is_dir()]
    named = [child for base in bases for child in _folders(base) if child.name.lower() in TREX_FOLDERS + OTHER_FOLDERS]
    named = [child for child in named if _data_files(child)]
    _only_one([child for child in named if child.name.lower() in TREX_FOLDERS])
    found: Found = {}
    told: dict[str, About] = {}
    for child in named:
        more, more_told = _facts_in(child, _data_files(child), known=known)
        found |= more
        told |= more_told
    for name, parts in _divided(folder).items():
        whole = found.get(name, {}).get(FACTS)
        if whole is not None and "test" in parts:
            logger.info("%s has a test part of its own; left out %s", name, whole.name)
        elif whole is not None:  # OptiPrompt: trained on facts of its own, tested on LAMA's
            parts["test"] = whole
        found[name] = _sole(parts)
    for base in [] if found else bases:
        more, more_told = _facts_in(base, _data_files(base), known=known)
        found |= more
        told |= more_told
    return found, told


def _divided(folder: Path) -> Found:
    """Find folders that hold a relation's parts, up to two folders down; the relation is the folder's name."""
    outer = [folder, *_folders(folder)]
    outer += [child for above in outer[1:] for child in _folders(above)]
    holders: dict[Path, Found] = {}
    for holder in outer:
        for child in _folders(holder):
            is_relation = child.name.lower() not in (*TREX_FOLDERS, *OTHER_FOLDERS, "data")
            parts = _parts(_data_files(child)) if is_relation else {}
            if parts:
                facts = {part: Facts(", ".join(map(str, paths)), tuple(paths)) for part, paths in parts.items()}
                holders.setdefault(holder, {})[child.name] = facts
    _only_one(holders)
    return next(iter(holders.values()), {})


def _facts_in(folder: Path, files: Sequence[Path], *, known: Iterable[str]) -> tuple[Found, dict[str, About]]:
    """Return the facts in files: of the relation that a file is named after, or of those that its rows name."""
    found: Found = {}
    tables: list[Table] = []
    is_divided = bool(_parts(files))
    for path in files:
        part = _part(path)
        name = path.stem.removesuffix("_test")
        if part is None and is_divided:
            logger.info("%s stands beside a relation's parts; left out", path)
        elif part is None and (re.fullmatch(r"P\d+", name) or name in GOOGLE_RE_TEMPLATES or name in known):
            found[name] = {FACTS: Facts(str(path), (path,))}
        else:
            name = path.stem if part is None else folder.absolute().name
            tables.append((name, part or FACTS, raw_rows(read_bytes(path), name=str(path))))
    grouped, told = _grouped(tables)
    twice = sorted(found.keys() & grouped.keys())
    if twice:
        raise FileError(f"{folder}: facts of {', '.join(twice)} are in a file of their own and in another; keep one")
    return found | grouped, told


def _grouped(tables: Iterable[Table]) -> tuple[Found, dict[str, About]]:
    """Group rows by the relation they name, and take what they say of it."""
    rows: dict[str, dict[str, list[Row]]] = {}
    told: dict[str, About] = {}
    for default, part, table in tables:
        for where, row in table:
            if not isinstance(row, Mapping):
                raise RecordError(f"{where}: a record must be an object with named fields, not {type(row).__name__}")
            name = relation_of(row)
            if name is not None and name not in told:
                told[name] = _about(row, where)
            rows.setdefault(name or default, {}).setdefault(part, []).append((where, row))
    found = {
        name: {
            part: Facts(f"{same[0][0].rpartition(', ')[0]} ({name})", rows=tuple(same)) for part, same in parts.items()
        }
        for name, parts in rows.items()
    }
    return {name: _sole(parts) for name, parts in found.items()}, told


def _sole(parts: dict[str, Facts]) -> dict[str, Facts]:
    """Return parts, the only one as facts that are not divided yet."""
    return {FACTS: next(iter(parts.values()))} if len(parts) == 1 else parts


def _about(row: Mapping[str, object], where: str) -> About:
    """Return what a row of a list of relations, or a fact that names its relation, says of it; empty text is nothing.

    Raises:
        RecordError: If its template is none; it names file and line.
    """
    template, label, kind = (
        text.strip() if isinstance(text := row.get(name), str) and text.strip() else None
        for name in ("template", "label", "type")
    )
    if template is not None:
        try:
            template = as_pattern(template, where=where)
        except TemplateError as error:
            raise RecordError(f"{where}: {error}") from error
    return About(template, label, kind)


def _relation_lists(places: Iterable[Path]) -> dict[str, About]:
    """Read the first list of relations that is there."""
    for place in places:
        paths = [place / f"{name}{suffix}" for name in RELATION_LISTS for suffix in SUFFIXES]
        found = [path for path in paths if path.is_file()][:1] or _data_files(place / SINGLE_LISTS)
        about: dict[str, About] = {}
        for path in found:
            for where, row in raw_rows(read_bytes(path), name=str(path)):
                name = row.get("relation") if isinstance(row, Mapping) else None
                if not isinstance(name, str) or not name.strip():
                    raise RecordError(f"{where}: a relation needs the field 'relation' with its name, such as P36")
                if name in about:
                    raise RecordError(f"{where}: the relation {name} stands there twice; leave one of the rows")
                about[name] = _about(row, where)
        if found:
            return about
    return {}


def _pattern_files(place: Path) -> dict[str, Path]:
    for name in PATTERN_FOLDERS:
        files = {path.stem: path for path in _data_files(place / name)}
        if files:
            return files
    return {}


def _hub_tables(source: str) -> list[Table]:
    """Read ``hub:NAME[:CONFIG[:SPLIT]]``; rows that name no relation are those of the configuration."""
    name, config, split, *_ = [*source.removeprefix(HUB_PREFIX).split(":", 2), "", ""]
    if not name:
        raise FileError(f"'{source}' names no data set; write hub:NAME, hub:NAME:CONFIG or hub:NAME:CONFIG:SPLIT")
    try:
        from datasets import load_dataset  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise FileError(
            f"reading {source} needs the package datasets; install it with: pip install datasets"
        ) from error
    try:
        loaded = load_dataset(name, config or None, split=split or None)
        return [
            (
                config or name.rpartition("/")[2],
                PART_NAMES.get(part, FACTS),
                [(f"{source}, row {number}", row) for number, row in enumerate(table, start=1)],
            )
            for part, table in (loaded if isinstance(loaded, dict) else {split: loaded}).items()
        ]
    except (OSError, ValueError, RuntimeError) as error:  # not there, not reached, a config to choose, a script
        raise FileError(
            f"cannot read {source}: {error}. Check name and config, or download the data and name the folder"
        ) from error


def _only_one(folders: Iterable[Path]) -> None:
    names = sorted(map(str, folders))
    if len(names) > 1:
        raise FileError(f"several sets of facts for the same relations: {', '.join(names)}; name one of these folders")


def _part(path: Path) -> str | None:
    """Return the part that a file is named after; ``train-00000-of-00002.parquet`` is one piece of it."""
    match = re.fullmatch(r"([a-z]+)(-\d+-of-\d+)?", path.stem)
    return PART_NAMES.get(match[1]) if match else None


def _parts(files: Iterable[Path]) -> dict[str, list[Path]]:
    parts: dict[str, list[Path]] = {}
    for path in files:
        part = _part(path)
        if part is not None:
            parts.setdefault(part, []).append(path)
    return dict(sorted(parts.items(), key=lambda item: SPLITS.index(item[0])))


def _data_files(folder: Path) -> list[Path]:
    """Return a folder's data files without a list of relations; of the same name in two formats, the first format's."""
    files: dict[str, Path] = {}
    lists = {Path(name).name for name in RELATION_LISTS}
    for suffix in FACT_SUFFIXES:
        for path in _entries(folder):
            if path.suffix.lower() == suffix and path.stem not in lists and path.is_file():
                files.setdefault(path.stem, path)
    return [files[stem] for stem in sorted(files)]


def _folders(folder: Path) -> Iterator[Path]:
    return (entry for entry in _entries(folder) if entry.is_dir())


def _entries(folder: Path) -> list[Path]:
    if not os.path.isdir(folder):
        return []
    try:
        return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise file_error("read", folder, error) from error
