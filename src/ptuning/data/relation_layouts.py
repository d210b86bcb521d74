"""The two layouts of LAMA-style relation data: which files hold which relation's facts, templates and paraphrases.

LAMA's own: ``relations.jsonl`` beside ``TREx/P36.jsonl``, ``Google_RE/place_of_birth_test.jsonl``,
``ConceptNet/test.jsonl`` and ``Squad/test.jsonl``. Or one folder per relation with ``train.jsonl``, ``dev.jsonl`` and
``test.jsonl``. ``paraphrases/P36.jsonl`` goes with both. ``scripts/convert_lama.py`` writes them from other layouts.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ptuning.data.reading import SPLITS, SUFFIXES, raw_rows
from ptuning.errors import FileError, RecordError, TemplateError, closest
from ptuning.files import file_error, read_bytes, sha256
from ptuning.template.language import Template

logger = logging.getLogger(__name__)

Row = tuple[str, Mapping[str, object]]  # file and line, and the row as the file has it

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


@dataclass(frozen=True)
class About:
    """What the list of relations says about a relation; None if it does not say.

    Args:
        template: Its manual template.
        label: What the relation is called.
        type: ``1-1``, ``N-1`` or ``N-M``.
    """

    template: str | None = None
    label: str | None = None
    type: str | None = None


@dataclass(frozen=True)
class Layout:
    """The files of a folder.

    Args:
        facts: Relation -> part -> the file of its facts. They are not read yet.
        about: Relation -> its entry in the list of relations.
        patterns: Relation -> the file of its paraphrases.
    """

    facts: Mapping[str, Mapping[str, Path]]
    about: Mapping[str, About]
    patterns: Mapping[str, Path]


def find_layout(folder: str | Path) -> Layout:
    """Find the files of a folder of relations; the files of facts are not opened.

    Args:
        folder: A folder, or one file with the facts of one relation.

    Raises:
        FileError: If there are no relations (it lists what was looked for and what was found), or if a relation's
            facts are in two places.
        RecordError: If the list of relations cannot be read.
    """
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
    """Return the rows of a file of facts, and its SHA-256.

    Raises:
        FileError: If the file cannot be read.
        RecordError: If a row cannot be read; it names file and line.
    """
    data = read_bytes(path)
    rows = raw_rows(data, name=str(path))
    for where, row in rows:
        if not isinstance(row, Mapping):
            raise RecordError(f"{where}: a record must be an object with named fields, not {type(row).__name__}")
    return rows, sha256(data)


def read_patterns(path: Path) -> tuple[str, ...]:
    """Read the paraphrases of a relation, each once. A malformed template is left out with a notice.

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


def as_pattern(text: str, *, where: str) -> str:
    """Return a data set's pattern as a template. Brackets other than ``[X]`` and ``[Y]`` become literal text.

    Raises:
        RecordError: If ``[X]`` or ``[Y]`` is missing.
        TemplateError: If it is still not a template (two ``[Y]``).
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
    """Add one file. Its name is that of the relation; a file named after a part belongs to its folder's relation."""
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
    """Read a folder's list of relations; empty if there is none."""
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
