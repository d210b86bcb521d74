"""Where a folder of LAMA-style relations keeps its facts, templates and paraphrases, in any of its layouts.

LAMA's own layout has ``relations.jsonl`` beside ``TREx/P36.jsonl``, ``Google_RE/place_of_birth_test.jsonl``,
``ConceptNet/test.jsonl`` and ``Squad/test.jsonl``. Another has one folder per relation with ``train.jsonl``,
``dev.jsonl`` and ``test.jsonl``, and a third a file per relation. ``paraphrases/P36.jsonl`` goes with all of them.
``scripts/convert_lama.py`` writes them from other layouts; :mod:`ptuning.data.relations` reads the files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ptuning.data.reading import SPLITS, SUFFIXES, raw_rows
from ptuning.errors import FileError, RecordError, TemplateError, closest
from ptuning.files import file_error, read_bytes
from ptuning.template.language import Template

FACTS = "facts"  # the part of a relation whose facts are not divided yet
# A .json file beside facts describes them, as the hub's dataset_infos.json does.
FACT_SUFFIXES = tuple(suffix for suffix in SUFFIXES if suffix != ".json")
PART_NAMES = {name: name for name in SPLITS} | dict.fromkeys(("val", "valid", "validation"), "dev")
FACT_FOLDERS = ("trex", "google_re", "conceptnet", "squad")  # in lower case
RELATION_LIST = "relations"
PATTERN_FOLDER = "paraphrases"
PATTERN_FOLDERS = (PATTERN_FOLDER, "patterns")  # the second is what ParaRel calls it

LOOKED_FOR = (
    "relations.jsonl with TREx/P36.jsonl, Google_RE/*_test.jsonl, ConceptNet/test.jsonl or Squad/test.jsonl (LAMA); "
    "P36/train.jsonl, P36/dev.jsonl, P36/test.jsonl; P36.jsonl; each also in data/ below the folder and with one of "
    f"the endings {', '.join(FACT_SUFFIXES)}"
)


@dataclass(frozen=True)
class About:
    """What the list of relations says about one, if anything; its type is ``1-1``, ``N-1`` or ``N-M``."""

    template: str | None = None
    label: str | None = None
    type: str | None = None


@dataclass(frozen=True)
class Layout:
    """The files of a folder: relation -> part -> file of facts, entry in the list of relations, file of paraphrases.

    ``shared`` are the relations that share a file with others, whose rows name them.
    """

    facts: Mapping[str, Mapping[str, Path]]
    about: Mapping[str, About]
    patterns: Mapping[str, Path]
    shared: frozenset[str] = frozenset()


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
    folders = [place / name for place in places for name in PATTERN_FOLDERS]
    patterns = next((files for one in folders if (files := _data_files(one))), [])
    return Layout(found, about, {path.stem: path for path in patterns})


def convert_with(folder: object) -> str:
    """Return the command that converts the data of another layout."""
    return (
        "Other layouts (AutoPrompt, OptiPrompt, P-tuning's code, ParaRel, the hub's lama) are converted with: "
        f"python scripts/convert_lama.py {folder} NEW_FOLDER"
    )


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


def _find_facts(folder: Path) -> dict[str, dict[str, Path]]:
    """Return relation -> part -> file of a folder, or of the relations in its folders."""
    found: dict[str, dict[str, Path]] = {}
    for child in _entries(folder):
        parts = {} if child.name.lower() in ("data", *PATTERN_FOLDERS) else _parts(child)
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
        raise two_places(name, *(next(iter(one.values())).parent for one in (found[name], parts)))
    # A single part is not a division.
    found[name] = dict(parts) if len(parts) > 1 else {FACTS: next(iter(parts.values()))}
    return found


def two_places(name: str, first: Path, second: Path, *, folder: object = "FOLDER") -> FileError:
    """Return the error about a relation whose facts are found twice."""
    return FileError(f"facts of {name} are in two places, {first} and {second}; keep one. {convert_with(folder)}")


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
