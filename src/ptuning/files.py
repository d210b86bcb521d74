"""Files that are whole or not there: written beside and renamed, hashed, never overwritten unasked."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from ptuning.errors import FileError

HASHED_BYTES = 2**22  # how much of a large file is read at a time

Json = str | int | float | bool | None | list["Json"] | Mapping[str, "Json"]


def file_error(action: str, path: Path, error: OSError) -> FileError:
    """Turn an operating system's error into one that says what to do."""
    reason = error.strerror or str(error)
    hint = "free some space or choose another folder" if "space" in reason.lower() else "check the path and its rights"
    return FileError(f"cannot {action} {path}: {reason}; {hint}")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the name of a file beside ``path`` to be written; it takes its place when the block ends well, so that a
    reader or a kill never sees half of it.

    Raises:
        FileError: If it cannot be written; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
    except OSError as error:
        raise file_error("write", path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole, as :func:`replacing` does.

    Raises:
        FileError: If it cannot be written; nothing is left behind.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file as :func:`write_bytes` does."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Json) -> None:
    """Write indented JSON with a final line break, as :func:`write_bytes` does."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Json]]) -> None:
    """Write one JSON object per line, as :func:`write_bytes` does."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_bytes(path: Path) -> bytes:
    """Read a whole file.

    Raises:
        FileError: If it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise file_error("read", path, error) from error


def read_json(path: Path) -> dict[str, Json]:
    """Read a JSON object.

    Raises:
        FileError: If the file cannot be read or holds no JSON object.
    """
    try:
        value = json.loads(read_bytes(path).decode("utf-8"))
    except ValueError as error:
        raise FileError(f"{path} is not valid JSON ({error}); it is damaged or was cut off") from error
    if not isinstance(value, dict):
        raise FileError(f"{path} must hold a JSON object, and holds {type(value).__name__}")
    return value


def read_json_lines(path: Path) -> list[dict[str, Json]]:
    """Read what :func:`write_json_lines` wrote.

    Raises:
        FileError: If the file cannot be read, or a line holds no JSON object.
    """
    try:
        # Only "\n" ends a line: JSON strings may hold other line separators, which str.splitlines would cut at.
        rows = [json.loads(line) for line in read_bytes(path).decode("utf-8").split("\n") if line]
    except ValueError as error:
        raise FileError(f"{path} is not valid JSONL ({error}); it is damaged or was cut off") from error
    if not all(isinstance(row, dict) for row in rows):
        raise FileError(f"{path} must hold a JSON object on each line")
    return rows


def sweep(folder: Path, names: Iterable[str], *, older_seconds: float = 0.0) -> None:
    """Remove what killed writers of this module left in a folder.

    Args:
        folder: The folder, if there is one.
        names: What they wrote: the beginnings of its names.
        older_seconds: How old something must be to be nobody's.
    """
    beginnings = tuple(f".{name}" for name in names)
    for path in folder.glob(".*") if folder.is_dir() else ():
        if not (path.name.startswith(beginnings) and path.suffix in (".tmp", ".old")):
            continue
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime >= older_seconds:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def sha256(data: bytes) -> str:
    """Return the SHA-256 of ``data`` as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file that may be larger than memory.

    Raises:
        FileError: If it cannot be read.
    """
    found = hashlib.sha256()
    try:
        with path.open("rb") as handle:
            while block := handle.read(HASHED_BYTES):
                found.update(block)
    except OSError as error:
        raise file_error("read", path, error) from error
    return found.hexdigest()


def check_free(folder: Path, *, overwrite: bool) -> None:
    """Check that ``folder`` may be written: it does not exist, is empty, or ``overwrite`` is set.

    Raises:
        FileError: If something stands there and ``overwrite`` is not set, or if it is no folder.
    """
    try:
        is_folder = folder.is_dir()
        in_the_way = folder.exists() and not is_folder
        is_empty = not is_folder or not any(folder.iterdir())
    except OSError as error:
        raise file_error("write", folder, error) from error
    if in_the_way:
        raise FileError(f"{folder} exists and is no folder; choose another output folder")
    if not overwrite and not is_empty:
        raise FileError(
            f"{folder} exists and is not empty; choose another folder, go on with a stopped run in it (--resume), or "
            "replace what a run left in it (--overwrite)"
        )


def check_room(folder: Path, needed_bytes: int) -> None:
    """Check that the disk that will hold ``folder`` has room, before any work is done.

    Raises:
        FileError: If fewer than ``needed_bytes`` are free.
    """
    parent = folder
    while not os.path.exists(parent):
        parent = parent.parent
    free_bytes = shutil.disk_usage(parent).free
    if free_bytes < needed_bytes:
        raise FileError(
            f"no room on disk for {folder}: {needed_bytes / 1e6:.0f} MB are needed and {free_bytes / 1e6:.0f} MB are "
            "free; free some space or choose another folder"
        )


def make_folder(folder: Path) -> None:
    """Create a folder and its parents.

    Raises:
        FileError: If it cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise file_error("create", folder, error) from error


@contextlib.contextmanager
def publish_folder(folder: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside ``folder`` that takes its place when the block ends well.

    If the block raises, the temporary folder is removed and whatever stood at ``folder`` is untouched.

    Raises:
        FileError: If ``folder`` is taken and ``overwrite`` is not set, or if it cannot be written.
    """
    if folder.is_symlink():
        folder = folder.resolve()
    check_free(folder, overwrite=overwrite)
    make_folder(folder.parent)
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
        temporary.chmod(0o755)
    except OSError as error:
        raise file_error("write beside", folder, error) from error
    try:
        yield temporary
        check_free(folder, overwrite=overwrite)  # again: another process may have been faster
        aside = temporary.with_suffix(".old")
        try:
            if folder.exists():
                folder.rename(aside)
            temporary.rename(folder)
        except OSError as error:
            if aside.exists():
                aside.rename(folder)
            raise file_error("write", folder, error) from error
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
