"""Names of what several rooms write, and which files in a folder are ours. Only these are ever replaced or removed."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ptuning.errors import FileError
from ptuning.files import (
    file_error,
    is_abandoned,
    is_temporary,
    make_folder,
    open_regular,
    parse_json,
    read_bytes,
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
# Answers to rows without labels, such as the test split of SuperGLUE.

# Means every method where a list of methods is asked for.
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
        files: Name -> regular expression at the beginning of what we write there. A file is ours if its content begins
            so, or if that of another file in the folder does: a damaged one is still ours.
        pages: The same for pages that people read and may have written themselves. Each must show that it is ours.
        folders: Name -> layout.
        listed: The place of a JSON file and the keys in it that lead to a mapping. The names in this mapping are our
            files, and no other files may be in the folder.
        left: Folders that are left alone, whatever is in them: logs of trackers.
    """

    files: Mapping[str, bytes] = field(default_factory=dict)
    pages: Mapping[str, bytes] = field(default_factory=dict)
    folders: Mapping[str, OutputLayout] = field(default_factory=dict)
    listed: tuple[str, ...] = ()
    left: tuple[str, ...] = ()

    def folder(self, name: str) -> OutputLayout | None:
        """Return the layout of a folder in it; None if we write none of this name."""
        return next((layout for pattern, layout in self.folders.items() if _fits(pattern, name)), None)


NOT_EMPTY = "{folder} exists and is not empty; choose another folder"
HEAD_BYTES = 2**16
LOCK_SECONDS = 0.2  # between two looks at a lock
MAX_MANIFEST_BYTES = 2**24  # the template, the label words and the task file of a prompt are in it
# What pages begin with, somewhere in their first lines.
PAGE_MARKS = {
    CARD_FILE: "with [ptuning](https://arxiv.org/abs/2103.10385)",
    HTML_FILE: '<meta name="generator" content="ptuning">',
    MARKDOWN_FILE: "<!-- written by ptuning -->",
    ".svg": "<!-- drawn by ptuning -->",
    ".tex": "% written by ptuning",
    ".csv": "ptuning table,",
}


def _keys(*keys: str) -> bytes:
    """Return how a JSON object with these first keys begins, if all values but the last are numbers."""
    return rb"\{\s*" + rb"\s*:\s*\d+\s*,\s*".join(f'"{key}"'.encode() for key in keys) + rb"\s*:"


def _tensors(*texts: str) -> bytes:
    """Return how a safetensors file begins that has one of these texts in its header."""
    return rb'(?s:.{8})\{"__metadata__":\{("format":"pt",)?"(' + "|".join(texts).encode() + rb')":'


def _page(name: str) -> bytes:
    return b"(?s:.*)" + re.escape(PAGE_MARKS[name]).encode()


_ROWS = rb'\{"record":'
PROMPT = OutputLayout(
    {
        MANIFEST_FILE: _keys("format_version", "template"),
        VECTORS_FILE: rb'(?s:.{8})\{"__metadata__":\{"format":"pt"\},"' + VECTORS_KEY.encode() + b'"',
    },
    {CARD_FILE: _page(CARD_FILE)},
    {WEIGHTS_FOLDER: OutputLayout(listed=(f"../{MANIFEST_FILE}", "weights", "sha256"))},
)
CHECKPOINT = OutputLayout(
    {CHECKPOINT_FILE: _tensors("state", "sha256"), BEST_FILE.format(start="#", epoch="#"): _tensors("epoch")}
)
RUN = OutputLayout(
    {RUN_FILE: _keys("format_version", "command"), PREDICTIONS_FILE: _ROWS},
    folders={PROMPT_FOLDER: PROMPT, CHECKPOINT_FOLDER: CHECKPOINT},
    left=(LOG_FOLDER,),
)
CELL = OutputLayout(
    {
        RUN_FILE: _keys("format_version", "task"),
        STARTED_FILE: _keys("identity"),
        PREDICTIONS_FILE: _ROWS,
    },
    folders={"try-#": RUN},
)
_PICTURES = ("dots", "wordings", "curves", "confusion-#")
REPORT = OutputLayout(
    pages={HTML_FILE: _page(HTML_FILE), MARKDOWN_FILE: _page(MARKDOWN_FILE)},
    folders={
        PICTURES_FOLDER: OutputLayout(pages={f"{name}.svg": _page(".svg") for name in _PICTURES}),
        TABLES_FOLDER: OutputLayout(pages={f"table-#-*{ending}": _page(ending) for ending in (".tex", ".csv")}),
    },
)
COMPARISON = OutputLayout(
    {RESULTS_FILE: _keys("format_version", "suite")},
    REPORT.pages,
    {
        **REPORT.folders,
        CELLS_FOLDER: OutputLayout(folders={"*": OutputLayout(folders={"*": OutputLayout(folders={"seed-#": CELL})})}),
        FLEETS_FOLDER: OutputLayout(folders={"*": CHECKPOINT}),
    },
    left=(LOG_FOLDER,),
)


def fleet_layout(names: Iterable[str]) -> OutputLayout:
    """Return the layout of the folder of a fleet with prompts of these names."""
    checkpoints = dict.fromkeys((CHECKPOINT_FOLDER, f"{CHECKPOINT_FOLDER}-#"), CHECKPOINT)
    folders = {**checkpoints, **dict.fromkeys(names, RUN)}
    return OutputLayout({FLEET_FILE: _keys("format_version", "command")}, folders=folders, left=(LOG_FOLDER,))


def _fits(pattern: str, name: str) -> bool:
    return re.fullmatch(_expression(pattern), name) is not None


def _expression(pattern: str) -> str:
    return re.escape(pattern).replace(r"\#", r"\d+").replace(r"\*", ".+")


@dataclass(frozen=True)
class FolderScan:
    """What is in a folder: files that are ours, those that killed processes left half-written, everything else, and
    what of the latter has the name of something that we would write; folders of ours come before those in them.
    """

    ours: list[Path] = field(default_factory=list)
    temporary: list[Path] = field(default_factory=list)
    foreign: list[Path] = field(default_factory=list)
    in_the_way: list[Path] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)


def scan_folder(folder: Path, layout: OutputLayout) -> FolderScan:
    """Return what is in a folder, which may be missing, and in its folders. Links in it are not followed, and are
    foreign whatever they point to.
    """
    scan = FolderScan()
    if folder.is_dir():
        try:
            _survey(folder, layout, scan)
        except OSError as error:
            raise file_error("read", folder, error) from error
    return scan


def _survey(folder: Path, layout: OutputLayout, scan: FolderScan) -> None:
    listed = _listed(folder, layout)
    named = {**layout.files, **layout.pages, **dict.fromkeys(listed, b"")}
    of = "|".join(map(_expression, named)) if not layout.listed else ".+"  # the list may be an older one
    staged = rf"\.({of})\.[0-9a-f]{{16}}\.new"
    marked: list[Path] = []
    likely: list[Path] = []
    inside: list[tuple[Path, OutputLayout]] = []
    with os.scandir(folder) as entries:
        listing = sorted(entries, key=lambda entry: entry.name)
    for entry in listing:
        path = folder / entry.name
        pattern = next((name for name in named if _fits(name, entry.name)), None)
        inner = layout.folder(entry.name)
        is_file, is_folder = entry.is_file(follow_symlinks=False), entry.is_dir(follow_symlinks=False)
        is_half = is_temporary(entry.name, rf"{of}|{staged}") or re.fullmatch(staged, entry.name) is not None
        if is_folder and entry.name in layout.left:
            continue
        if is_folder and inner is not None:
            inside.append((path, inner))
        elif (is_file and is_half) or (is_folder and is_temporary(entry.name, "files")):
            scan.temporary.append(path)
        elif is_file and pattern is not None and _begins(path, named[pattern]):
            marked.append(path)
        elif is_file and pattern in layout.files:
            likely.append(path)
        else:
            scan.foreign.append(path)
            is_taken = inner is not None and (not is_file or entry.name in layout.folders)
            if pattern is not None or is_taken or entry.name in layout.left or layout.listed:
                scan.in_the_way.append(path)
    if not marked:
        scan.foreign.extend(likely)
        scan.in_the_way.extend(likely)
        likely = []
    order = list(named)
    scan.ours.extend(sorted((*marked, *likely), key=lambda path: [not _fits(name, path.name) for name in order]))
    for path, inner in inside:
        scan.folders.append(path)
        _survey(path, inner, scan)


def _listed(folder: Path, layout: OutputLayout) -> Collection[str]:
    if not layout.listed:
        return ()
    file, *keys = layout.listed
    with contextlib.suppress(FileError, ValueError, LookupError, TypeError):
        value = parse_json(read_bytes(folder / file, at_most=MAX_MANIFEST_BYTES).decode())
        for key in keys:
            value = value[key]
        return [name for name in value if Path(name).name == name]
    return ()


def _begins(path: Path, mark: bytes) -> bool:
    try:
        with open_regular(path) as handle:
            return re.match(mark, handle.read(HEAD_BYTES)) is not None
    except (OSError, FileError):  # it cannot be read: whose it is cannot be known
        return False


def check_writable(folder: Path, layout: OutputLayout, *, overwrite: bool = False, resume: bool = False) -> FolderScan:
    """Check that we may write into a folder, by trying to and by looking at what is in it, and return the latter.

    A new or empty folder may be written. With ``overwrite`` files of ours may be replaced; with ``resume`` they may if
    some of them are there, or nothing else. Whatever is not ours stays, and is an error where it is in the way.
    """
    check_output(folder)
    scan = scan_folder(folder, layout)
    if scan.in_the_way:
        raise FileError(
            f"{scan.in_the_way[0]} is in the way: it is not what ptuning writes there, or is damaged, or is a link; "
            "it is neither replaced nor followed; move it away, or choose another folder"
        )
    if not (overwrite or not (scan.ours or scan.foreign) or (resume and (scan.ours or not scan.foreign))):
        raise FileError(NOT_EMPTY.format(folder=folder) + _remedies(scan, layout, resume=resume))
    return scan


def _remedies(scan: FolderScan, layout: OutputLayout, *, resume: bool) -> str:
    """Return what may be done, besides choosing another folder, where a folder is not empty."""
    if resume:
        return "; nothing in it is a run's, so there is nothing to go on with"
    if not scan.ours:
        return ", or write next to what is in it, of which nothing is ours (--overwrite)"
    go_on = "go on with a stopped run in it (--resume), or " if CHECKPOINT_FOLDER in layout.folders else "or "
    return f", {go_on}replace what we left in it (--overwrite)"


def clear(folder: Path, layout: OutputLayout) -> None:
    """Remove what we wrote into a folder, in the order of its layout, and folders in it that are empty then."""
    scan = scan_folder(folder, layout)
    delete((*scan.ours, *scan.temporary))
    for path in reversed(scan.folders):
        with contextlib.suppress(OSError):
            path.rmdir()


def remove(folder: Path, layout: OutputLayout) -> None:
    """Clear a folder, and remove it if it is empty then. A link stays, and so does what it points to."""
    if not folder.is_symlink():
        clear(folder, layout)
        with contextlib.suppress(OSError):
            folder.rmdir()


def remove_stale(folder: Path, layout: OutputLayout) -> None:
    """Remove half-written files that killed processes left in a folder and in its folders; those that another machine
    may still write stay.
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
    """Check that ``folder``, or what is above it, is a folder that a file can be written into, by writing one."""
    try:
        str(folder).encode("utf-8")
    except UnicodeEncodeError as error:
        raise FileError(f"the path {folder!r} is not UTF-8 text; choose another output folder") from error
    try:
        if _is_there(folder) and not folder.is_dir():
            raise FileError(f"{folder} exists and is not a folder; choose another output folder")
        there = next(filter(_is_there, (folder, *folder.parents)))
        with tempfile.TemporaryFile(dir=there) as handle:
            handle.write(b"1")
    except OSError as error:
        raise file_error("write into", folder, error) from error


def _is_there(path: Path) -> bool:
    """Whether a path is taken, also by a link that points nowhere; an OSError if that cannot be known."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    return True


def check_free(folder: Path) -> None:
    """Check that a folder can be written into (:func:`check_output`), and that nothing is in it."""
    check_output(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise FileError(NOT_EMPTY.format(folder=folder))


@contextlib.contextmanager
def locked(folder: Path, *, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Let one thread of one process at a time into the block, where the system can lock a folder. ``waiting`` is called
    again and again while another one is in it; what it raises ends the waiting.
    """
    handle = None
    with contextlib.suppress(ImportError, OSError):
        import fcntl  # noqa: F401  # Windows has none

        handle = os.open(folder, os.O_RDONLY)
    try:
        if handle is not None:
            _lock(handle, waiting)
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _lock(handle: int, waiting: Callable[[], None] | None) -> None:
    import fcntl

    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (fcntl.LOCK_NB if waiting is not None else 0))
            return
        except BlockingIOError:
            assert waiting is not None
            waiting()
            time.sleep(LOCK_SECONDS)
        except OSError:  # a file system without locks
            return


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
