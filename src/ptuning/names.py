"""Names of files that several packages write, and which files in a folder are ours. Only these are ever replaced or
removed.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ptuning.errors import FileError
from ptuning.files import (
    file_error,
    is_abandoned,
    is_temporary,
    make_folder,
    open_regular,
    read_json,
    temporary_folder,
)

RUN_FILE = "run.json"
PREDICTIONS_FILE = "predictions.jsonl"
RESULTS_FILE = "results.json"
PROMPT_FOLDER = "prompt"
CHECKPOINT_FOLDER = "checkpoint"
LOG_FOLDER = "log"
# A prompt.
VECTORS_FILE = "prompt.safetensors"
MANIFEST_FILE = "prompt.json"
CARD_FILE = "README.md"
WEIGHTS_FOLDER = "backbone"
VECTORS_KEY = "slot_vectors"
# A checkpoint: the trainings of a run or a fleet, and the backbone's best weights of a restart.
CHECKPOINT_FILE = "state.safetensors"
BEST_FILE = "best-{start}-{epoch}.safetensors"
FLEET_FILE = "fleet.json"
# A comparison: its cells, checkpoints of prompts that are trained together, and its report.
CELLS_FOLDER = "cells"
FLEETS_FOLDER = "fleets"
HTML_FILE, MARKDOWN_FILE, PICTURES_FOLDER, TABLES_FOLDER = "report.html", "report.md", "pictures", "tables"
# The identity of a cell that is not finished. With other settings, its checkpoints must not be resumed.
STARTED_FILE = "started.json"

# Stands for every method in a list of methods.
ALL_METHODS = "all"
MAJORITY, MANUAL, LEARNED = "majority", "manual", "p-tuning"
# Setting "train_backbone" -> what is added to the name of a method that trains the backbone as well.
ALONG: Mapping[str, str] = {"none": "", "head": "+head", "full": "+fine-tuning", "lora": "+lora"}
# Added to the name of a method that ran on a backbone with random weights.
RANDOM_WEIGHTS = "@random-weights"


def is_folder_name(name: str, *, spaces: bool = False) -> bool:
    """Whether a name can be a folder's on any system, without leaving its parent folder."""
    plain = name.replace(" ", "") if spaces and name == name.strip() else name
    return len(name) <= 100 and re.fullmatch(r"\w[\w.+=-]*", plain) is not None


@dataclass(frozen=True)
class OutputLayout:
    """The files of a kind of folder that we write. In names, ``#`` matches a number and ``*`` any name.

    Args:
        files: Names of files. Those whose content begins as ours does (:data:`SIGNATURES`) are ours.
        folders: Name -> layout.
        left: Folders that are left alone, whatever is in them: logs of trackers.
        is_listed: Whether our files are those that the manifest in the folder above lists, and no others may be there.
    """

    files: tuple[str, ...] = ()
    folders: Mapping[str, OutputLayout] = field(default_factory=dict)
    left: tuple[str, ...] = ()
    is_listed: bool = False

    def folder(self, name: str) -> OutputLayout | None:
        """Return the layout of a folder in it; None if we write none of this name."""
        return next((layout for pattern, layout in self.folders.items() if _fits(pattern, name)), None)


NOT_EMPTY = "{folder} exists and is not empty; choose another folder"
HEAD_BYTES = 2**16
LOCK_SECONDS = 0.2  # between two attempts to lock
MAX_MANIFEST_BYTES = 2**24  # the template, the label words and the task file of a prompt are in it
# Texts in the first lines of pages, which people may have written themselves under the same names.
PAGE_MARKS = {
    CARD_FILE: "with [ptuning](https://arxiv.org/abs/2103.10385)",
    HTML_FILE: '<meta name="generator" content="ptuning">',
    MARKDOWN_FILE: "<!-- written by ptuning -->",
    ".svg": "<!-- drawn by ptuning -->",
    ".tex": "% written by ptuning",
    ".csv": "ptuning table,",
}
# Ending -> regular expression at the beginning of our files; other files are pages.
SIGNATURES = {
    ".json": rb'\{\s*("format_version"\s*:\s*\d+\s*,\s*"(template|command|task|suite)"|"identity")\s*:',
    ".jsonl": rb'\{"record":',
    ".safetensors": rb'(?s:.{8})\{("__metadata__":\{("format":"pt",)?"(state|sha256|epoch)":|.*"slot_vectors":)',
}
PAGE_SIGNATURE = b"(?s:.*)(" + b"|".join(re.escape(mark.encode()) for mark in PAGE_MARKS.values()) + b")"

PROMPT = OutputLayout((MANIFEST_FILE, VECTORS_FILE, CARD_FILE), {WEIGHTS_FOLDER: OutputLayout(is_listed=True)})
CHECKPOINT = OutputLayout((CHECKPOINT_FILE, BEST_FILE.format(start="#", epoch="#")))
RUN = OutputLayout(
    (RUN_FILE, PREDICTIONS_FILE), {PROMPT_FOLDER: PROMPT, CHECKPOINT_FOLDER: CHECKPOINT}, left=(LOG_FOLDER,)
)
CELL = OutputLayout((RUN_FILE, STARTED_FILE, PREDICTIONS_FILE), {"try-#": RUN})
REPORT = OutputLayout(
    (HTML_FILE, MARKDOWN_FILE),
    {
        PICTURES_FOLDER: OutputLayout(("dots.svg", "wordings.svg", "curves.svg", "confusion-#.svg")),
        TABLES_FOLDER: OutputLayout(("table-#-*.tex", "table-#-*.csv")),
    },
)
COMPARISON = OutputLayout(
    (RESULTS_FILE, *REPORT.files),
    {
        **REPORT.folders,
        CELLS_FOLDER: OutputLayout((), {"*": OutputLayout((), {"*": OutputLayout((), {"seed-#": CELL})})}),
        FLEETS_FOLDER: OutputLayout((), {"*": CHECKPOINT}),
    },
    left=(LOG_FOLDER,),
)


def fleet_layout(names: Iterable[str]) -> OutputLayout:
    """Return the layout of the folder of a fleet with prompts of these names."""
    checkpoints = dict.fromkeys((CHECKPOINT_FOLDER, f"{CHECKPOINT_FOLDER}-#"), CHECKPOINT)
    folders = {**checkpoints, **dict.fromkeys(names, RUN)}
    return OutputLayout((FLEET_FILE,), folders, left=(LOG_FOLDER,))


def _fits(pattern: str, name: str) -> bool:
    return re.fullmatch(re.escape(pattern).replace(r"\#", r"\d+").replace(r"\*", ".+"), name) is not None


@dataclass(frozen=True)
class FolderScan:
    """The content of a folder: files that are ours, those that killed processes left half-written, everything else
    (``foreign``), the part of the latter that has a name of ours, and folders of ours, outer ones first.
    """

    ours: list[Path] = field(default_factory=list)
    temporary: list[Path] = field(default_factory=list)
    foreign: list[Path] = field(default_factory=list)
    in_the_way: list[Path] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)


def scan_folder(folder: Path, layout: OutputLayout) -> FolderScan:
    """Return the content of a folder, which may be missing, and of the folders in it. Links in it are not followed, and
    are foreign whatever they point to.
    """
    scan = FolderScan()
    if folder.is_dir():
        try:
            _scan(folder, layout, scan)
        except OSError as error:
            raise file_error("read", folder, error) from error
    return scan


def _scan(folder: Path, layout: OutputLayout, scan: FolderScan) -> None:
    names = layout.files
    if layout.is_listed:
        with contextlib.suppress(FileError, LookupError, TypeError):
            manifest: Any = read_json(folder.parent / MANIFEST_FILE, at_most=MAX_MANIFEST_BYTES)
            names = tuple(manifest["weights"]["sha256"])
    with os.scandir(folder) as entries:
        listing = sorted(entries, key=lambda entry: entry.name)
    ours: list[tuple[int, Path]] = []
    inside: list[tuple[Path, OutputLayout]] = []
    for entry in listing:
        path, inner = folder / entry.name, layout.folder(entry.name)
        fits = str.__eq__ if layout.is_listed else _fits
        place = next((place for place, name in enumerate(names) if fits(name, entry.name)), None)
        is_file, is_folder = entry.is_file(follow_symlinks=False), entry.is_dir(follow_symlinks=False)
        if is_folder and entry.name in layout.left:
            continue
        if is_folder and inner is not None:
            inside.append((path, inner))
        elif (is_file or is_folder) and is_temporary(entry.name):
            scan.temporary.append(path)
        elif is_file and place is not None and (layout.is_listed or _is_ours(path)):
            ours.append((place, path))
        else:
            scan.foreign.append(path)
            is_taken = inner is not None and (not is_file or entry.name in layout.folders)
            if place is not None or is_taken or entry.name in layout.left or layout.is_listed:
                scan.in_the_way.append(path)
    scan.ours.extend(path for _, path in sorted(ours))
    for path, inner in inside:
        scan.folders.append(path)
        _scan(path, inner, scan)


def _is_ours(path: Path) -> bool:
    try:
        with open_regular(path) as handle:
            head = handle.read(HEAD_BYTES)
    except (OSError, FileError):  # it cannot be known
        return False
    return re.match(SIGNATURES.get(path.suffix, PAGE_SIGNATURE), head) is not None


def check_writable(folder: Path, layout: OutputLayout, *, overwrite: bool = False, resume: bool = False) -> FolderScan:
    """Check that we may write into a folder, by trying to and by scanning it, and return its content.

    A new or empty folder may be written. With ``overwrite`` files of ours may be replaced; with ``resume`` they may if
    some of them are there, or nothing else. Files that are not ours stay; in the place of ours, they are an error.
    """
    check_output(folder)
    scan = scan_folder(folder, layout)
    if scan.in_the_way:
        raise FileError(
            f"{scan.in_the_way[0]} is in the way: ptuning did not write it, or it is damaged, or a link; move it away, "
            "or choose another folder"
        )
    if overwrite or not (scan.ours or scan.foreign) or (resume and (scan.ours or not scan.foreign)):
        return scan
    remedy = "; it holds no run to resume"
    if not resume and scan.ours:
        go_on = "resume the run in it (resume), or " if CHECKPOINT_FOLDER in layout.folders else "or "
        remedy = f", {go_on}replace what ptuning wrote into it (overwrite)"
    elif not resume:
        remedy = ", or write next to the files in it, of which none is from ptuning (overwrite)"
    raise FileError(NOT_EMPTY.format(folder=folder) + remedy)


def clear(folder: Path, layout: OutputLayout) -> None:
    """Remove our files from a folder, in the order of its layout, and folders in it that are empty then."""
    scan = scan_folder(folder, layout)
    delete((*scan.ours, *scan.temporary))
    for path in reversed(scan.folders):
        with contextlib.suppress(OSError):
            path.rmdir()


def remove(folder: Path, layout: OutputLayout) -> None:
    """Clear a folder, and remove it if it is empty then. A link stays, and so does its target."""
    if not folder.is_symlink():
        clear(folder, layout)
        with contextlib.suppress(OSError):
            folder.rmdir()


def remove_stale(folder: Path, layout: OutputLayout) -> None:
    """Remove half-written files that killed processes left in a folder and in its folders, except those that another
    machine may still write.
    """
    delete(path for path in scan_folder(folder, layout).temporary if path.suffix == ".tmp" and is_abandoned(path))


def delete(paths: Iterable[Path]) -> None:
    """Remove files, which may be gone already, and temporary folders."""
    for path in paths:
        try:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        except OSError as error:
            raise file_error("remove", path, error) from error


def check_output(folder: Path) -> None:
    """Check that ``folder``, or the nearest folder above it, is a folder that can be written into, by trying to."""
    try:
        str(folder).encode("utf-8")
    except UnicodeEncodeError as error:
        raise FileError(f"the path {folder!r} is not UTF-8 text; choose another output folder") from error

    def exists(path: Path) -> bool:
        """Whether a path is taken, also by a link that points nowhere."""
        try:
            path.lstat()
        except FileNotFoundError:
            return False
        return True

    try:
        if exists(folder) and not folder.is_dir():
            raise FileError(f"{folder} exists and is not a folder; choose another output folder")
        with tempfile.TemporaryFile(dir=next(filter(exists, (folder, *folder.parents)))) as handle:
            handle.write(b"1")
    except OSError as error:
        raise file_error("write into", folder, error) from error


def check_free(folder: Path) -> None:
    """Check that a folder can be written into (:func:`check_output`), and that nothing is in it."""
    check_output(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise FileError(NOT_EMPTY.format(folder=folder))


@contextlib.contextmanager
def locked(folder: Path, *, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Let one thread of one process at a time into the block, where the system can lock a folder. ``waiting`` is called
    repeatedly while another one is in it; an exception that it raises ends the waiting.
    """
    handle = None
    try:
        with contextlib.suppress(ImportError, OSError):  # Windows, or a file system without locks
            import fcntl

            handle = os.open(folder, os.O_RDONLY)
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | (fcntl.LOCK_NB if waiting is not None else 0))
                    break
                except BlockingIOError:
                    assert waiting is not None
                    waiting()
                    time.sleep(LOCK_SECONDS)
        yield
    finally:
        if handle is not None:
            os.close(handle)


@contextlib.contextmanager
def publish_folder(folder: Path, *, last: str | None = None) -> Iterator[Path]:
    """Yield a temporary folder next to ``folder``, which must be missing or empty. If the block succeeds, the new one
    takes its place. With ``last``, the new files go into a folder that is not empty one by one, this one at the end.
    """
    if folder.is_symlink():
        folder = folder.resolve()
    check = check_free if last is None else check_output
    check(folder)
    make_folder(folder.parent)
    with temporary_folder(folder.parent, folder.name) as temporary:
        yield temporary
        check(folder)  # again: another process may have been faster
        try:
            if not folder.is_dir() or not any(folder.iterdir()):
                temporary.replace(folder)
                return
            for path in sorted(temporary.iterdir(), key=lambda path: path.name == last):
                path.replace(folder / path.name)
        except OSError as error:
            raise file_error("write", folder, error) from error
