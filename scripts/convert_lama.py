"""Convert LAMA-style relation data to the layout that `ptuning compare --suite lama` reads.

    python scripts/convert_lama.py FOLDER NEW_FOLDER
    python scripts/convert_lama.py hub:NAME[:CONFIG[:SPLIT]] NEW_FOLDER

FOLDER is one of:
    P36/train.jsonl, dev.jsonl, test.jsonl, up to two folders down (AutoPrompt, P-tuning's code);
    the same with LAMA-TREx/P36.jsonl (OptiPrompt): facts that have no test part are tested on LAMA's;
    trex_lms_vocab/P36.jsonl with graphs_json/P36.jsonl (ParaRel);
    files whose rows have predicate_id, sub_label and obj_label (the hub's lama), or one such file;
each also in data/ below the folder, as JSONL, CSV or Parquet. `hub:` needs the package datasets.

NEW_FOLDER gets relations.jsonl, TREx/NAME.jsonl for facts that are not divided, NAME/train.jsonl and so on for parts,
and paraphrases/NAME.jsonl. The rows keep their fields and their order, so that the draws of a seed stay the same.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from ptuning.data.lama import (
    FACT_SUFFIXES,
    FACTS,
    GOOGLE_RE_TEMPLATES,
    PART_NAMES,
    PATTERN_FOLDER,
    RELATION_LIST,
    relation_of,
)
from ptuning.data.reading import SPLITS, SUFFIXES, raw_rows
from ptuning.errors import FileError, PTuningError, RecordError
from ptuning.files import read_bytes, write_json_lines
from ptuning.names import is_folder_name, publish_folder

Rows = Sequence[Mapping[str, object]]
Found = dict[str, dict[str, list[Mapping[str, object]]]]  # relation -> part -> rows
Table = tuple[str, str, Rows]  # the relation of rows that name none, their part, rows

# Folders of facts, in lower case. Only one of the first three may be there: they hold the same relations.
TREX_FOLDERS = ("trex", "lama-trex", "trex_lms_vocab")
OTHER_FOLDERS = ("google_re", "conceptnet", "squad")
RELATION_LISTS = (RELATION_LIST, "LAMA_relations", "relation_metainfo/LAMA_relations")
SINGLE_LISTS = "single_relations"  # one list per relation
PATTERN_FOLDERS = (PATTERN_FOLDER, "graphs_json", "pattern_data/graphs_json", "pattern_data")
DESCRIBING = ("template", "label", "type")
HUB_PREFIX = "hub:"
SAFE_DATASETS = 4  # the first major version of the package datasets that runs no code of data sets


def main() -> None:
    """Convert; what is wrong with the data is said in a line."""
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        convert(sys.argv[1], Path(sys.argv[2]))
    except PTuningError as error:
        sys.exit(f"error: {error}")


def convert(source: str | Path, out: Path) -> list[str]:
    """Write the relations of a folder, a file or the hub in the kept layout, and return their names.

    Raises:
        FileError: If there are no relations, several sets of facts for the same ones, or something at ``out``.
        RecordError: If a row cannot be read.
    """
    about: dict[str, Mapping[str, object]] = {}
    patterns: dict[str, Rows] = {}
    if str(source).startswith(HUB_PREFIX):
        found, told = grouped(hub_tables(str(source)))
    else:
        path = Path(source)
        base = path.parent if path.is_file() else path
        places = [base, base / "data", base.absolute().parent, base.absolute().parent.parent]
        about = next((listed for place in places if (listed := relation_list(place))), {})
        found, told = facts_in(base, [path], known=about) if path.is_file() else find_facts(path, known=about)
        patterns = next((read for place in places if (read := pattern_rows(place))), {})
    if not found:
        raise FileError(f"{source} holds no relations in any layout that this script reads; see its first lines")
    for name, parts in found.items():
        named = sorted({str(relation_of(row)) for rows in parts.values() for row in rows if relation_of(row)})
        if len(named) > 1:
            raise RecordError(
                f"{name}: the rows are of several relations ({', '.join(named[:5])}); give this file or its folder "
                "itself to have them told apart"
            )
    for name in (*found, *patterns):
        if not is_folder_name(name):
            raise RecordError(f"the relation '{name}' cannot be the name of a file; use letters, digits and - _ . + =")
    about = told | about
    with publish_folder(out) as folder:
        save(folder / f"{RELATION_LIST}.jsonl", [{"relation": name, **about[name]} for name in about])
        for name, parts in found.items():
            for part, facts in parts.items():
                save(folder / "TREx" / f"{name}.jsonl" if part == FACTS else folder / name / f"{part}.jsonl", facts)
        for name, rows in patterns.items():
            save(folder / PATTERN_FOLDER / f"{name}.jsonl", rows)
    return sorted(found)


def save(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Write rows as JSONL, without values that JSON does not have; the package would not read them either."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json_lines(path, ({name: value for name, value in row.items() if is_json(value)} for row in rows))  # type: ignore[misc]


def is_json(value: object) -> bool:
    """Return whether JSON can hold a value."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def find_facts(folder: Path, *, known: Iterable[str]) -> tuple[Found, dict[str, Mapping[str, object]]]:
    """Find facts: named folders of facts, folders of a relation's parts, else data files in the folder itself."""
    bases = [base for base in (folder, folder / "data") if base.is_dir()]
    named = [child for base in bases for child in folders(base) if child.name.lower() in TREX_FOLDERS + OTHER_FOLDERS]
    named = [child for child in named if data_files(child)]
    only_one([child for child in named if child.name.lower() in TREX_FOLDERS])
    found: Found = {}
    told: dict[str, Mapping[str, object]] = {}
    for child in named:
        more, more_told = facts_in(child, data_files(child), known=known)
        found |= more
        told |= more_told
    for name, parts in divided(folder).items():
        if FACTS in found.get(name, {}):  # OptiPrompt: trained on facts of its own, tested on LAMA's
            parts.setdefault("test", found[name][FACTS])
        found[name] = sole(parts)
    for base in [] if found else bases:
        more, more_told = facts_in(base, data_files(base), known=known)
        found |= more
        told |= more_told
    return found, told


def divided(folder: Path) -> Found:
    """Find folders that hold a relation's parts, up to two folders down; the relation is the folder's name."""
    outer = [folder, *folders(folder)]
    outer += [child for above in outer[1:] for child in folders(above)]
    holders: dict[Path, Found] = {}
    for holder in outer:
        for child in folders(holder):
            is_relation = child.name.lower() not in (*TREX_FOLDERS, *OTHER_FOLDERS, "data")
            parts = parts_of(data_files(child)) if is_relation else {}
            if parts:
                read = {part: [row for path in paths for row in rows_of(path)] for part, paths in parts.items()}
                holders.setdefault(holder, {})[child.name] = read
    only_one(holders)
    return next(iter(holders.values()), {})


def facts_in(
    folder: Path, files: Sequence[Path], *, known: Iterable[str]
) -> tuple[Found, dict[str, Mapping[str, object]]]:
    """Return the facts in files: of the relation that a file is named after, or of those that its rows name."""
    found: Found = {}
    tables: list[Table] = []
    is_divided = bool(parts_of(files))
    for path in files:
        part = part_of(path)
        name = path.stem.removesuffix("_test")
        if part is None and is_divided:
            continue  # AutoPrompt keeps the undivided facts beside a relation's parts
        if part is None and (re.fullmatch(r"P\d+", name) or name in GOOGLE_RE_TEMPLATES or name in known):
            found[name] = {FACTS: rows_of(path)}
        else:
            name = path.stem if part is None else folder.absolute().name
            tables.append((name, part or FACTS, rows_of(path)))
    grouped_rows, told = grouped(tables)
    twice = sorted(found.keys() & grouped_rows.keys())
    if twice:
        raise FileError(f"{folder}: facts of {', '.join(twice)} are in a file of their own and in another; keep one")
    return found | grouped_rows, told


def grouped(tables: Iterable[Table]) -> tuple[Found, dict[str, Mapping[str, object]]]:
    """Group rows by the relation they name, and take what they say about it."""
    found: Found = {}
    told: dict[str, Mapping[str, object]] = {}
    for default, part, rows in tables:
        for row in rows:
            name = relation_of(row)
            if name is not None and name not in told:
                told[name] = {key: row[key] for key in DESCRIBING if str(row.get(key) or "").strip()}
            found.setdefault(name or default, {}).setdefault(part, []).append(row)
    return {name: sole(parts) for name, parts in found.items()}, told


def sole(parts: dict[str, list[Mapping[str, object]]]) -> dict[str, list[Mapping[str, object]]]:
    """Return parts, the only one as facts that are not divided yet."""
    return {FACTS: next(iter(parts.values()))} if len(parts) == 1 else parts


def rows_of(path: Path) -> list[Mapping[str, object]]:
    """Return the rows of a file."""
    return [row for _, row in raw_rows(read_bytes(path), name=str(path))]


def relation_list(place: Path) -> dict[str, Mapping[str, object]]:
    """Read a list of relations."""
    paths = [place / f"{name}{suffix}" for name in RELATION_LISTS for suffix in SUFFIXES]
    paths = [path for path in paths if path.is_file()][:1] or data_files(place / SINGLE_LISTS)
    rows = [row for path in paths for row in rows_of(path)]
    return {str(row["relation"]): {key: row[key] for key in DESCRIBING if row.get(key)} for row in rows}


def pattern_rows(place: Path) -> dict[str, Rows]:
    """Read the first folder of paraphrases."""
    for name in PATTERN_FOLDERS:
        files = data_files(place / name)
        if files:
            return {path.stem: rows_of(path) for path in files}
    return {}


def hub_tables(source: str) -> list[Table]:
    """Read ``hub:NAME[:CONFIG[:SPLIT]]``; rows that name no relation are those of the configuration."""
    name, config, split, *_ = [*source.removeprefix(HUB_PREFIX).split(":", 2), "", ""]
    if not name:
        raise FileError(f"'{source}' names no data set; write hub:NAME, hub:NAME:CONFIG or hub:NAME:CONFIG:SPLIT")
    try:
        from datasets import __version__, load_dataset  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError as error:
        raise FileError(
            f"reading {source} needs the package datasets; install it with: pip install datasets"
        ) from error
    if int(__version__.partition(".")[0]) < SAFE_DATASETS:
        raise FileError(
            f"datasets {__version__} runs the code of a data set if someone says yes; install a version that does not: "
            f"pip install 'datasets>={SAFE_DATASETS}'"
        )
    try:
        loaded = load_dataset(name, config or None, split=split or None)
        tables = loaded if isinstance(loaded, dict) else {split: loaded}
        default = config or name.rpartition("/")[2]
        return [(default, PART_NAMES.get(part, FACTS), list(table)) for part, table in tables.items()]
    except (OSError, ValueError, RuntimeError) as error:  # not there, not reached, a config to choose, a script
        raise FileError(
            f"cannot read {source}: {error}. Check name and config, or download the data and name the folder"
        ) from error


def only_one(places: Iterable[Path]) -> None:
    """Check that there is one set of facts."""
    names = sorted(map(str, places))
    if len(names) > 1:
        raise FileError(f"several sets of facts for the same relations: {', '.join(names)}; name one of these folders")


def part_of(path: Path) -> str | None:
    """Return the part that a file is named after; ``train-00000-of-00002.parquet`` is one piece of it."""
    match = re.fullmatch(r"([a-z]+)(-\d+-of-\d+)?", path.stem)
    return PART_NAMES.get(match[1]) if match else None


def parts_of(files: Iterable[Path]) -> dict[str, list[Path]]:
    """Return part -> files."""
    parts: dict[str, list[Path]] = {}
    for path in files:
        part = part_of(path)
        if part is not None:
            parts.setdefault(part, []).append(path)
    return dict(sorted(parts.items(), key=lambda item: SPLITS.index(item[0])))


def data_files(folder: Path) -> list[Path]:
    """Return a folder's data files without a list of relations; of a name in two formats, the first format's."""
    files: dict[str, Path] = {}
    lists = {Path(name).name for name in RELATION_LISTS}
    for suffix in FACT_SUFFIXES:
        for path in entries(folder):
            if path.suffix.lower() == suffix and path.stem not in lists and path.is_file():
                files.setdefault(path.stem, path)
    return [files[stem] for stem in sorted(files)]


def folders(folder: Path) -> Iterator[Path]:
    """Yield the folders in a folder."""
    return (entry for entry in entries(folder) if entry.is_dir())


def entries(folder: Path) -> list[Path]:
    """Return what is in a folder, by name; nothing if it is not one."""
    return sorted(one for one in folder.iterdir() if not one.name.startswith(".")) if folder.is_dir() else []


if __name__ == "__main__":
    main()
