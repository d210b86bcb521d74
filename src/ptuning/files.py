"""Atomic writing (a temporary file is renamed), reading, and checks of values of JSON or TOML against models."""

import contextlib
import functools
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import stat
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, BinaryIO, TypeVar

import pydantic

from ptuning.errors import FileError, PTuningError, closest, cut

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# A half-made file or folder of another machine that is older than this is of a killed process.
STALE_SECONDS = 3600.0
HASHED_BYTES = 2**22  # how much of a large file is read at a time

Json = str | int | float | bool | None | list["Json"] | Mapping[str, "Json"]
T = TypeVar("T")
MAX_JSON_BYTES = 2**30  # of a file of JSON that we wrote
DEEPEST = 100  # lists and tables inside of each other in a file that is read; Python's own limit depends on the caller
MOST_DOTS = 500  # in a line of TOML: a dotted key takes time that is quadratic in its parts
LARGEST = 2**63 - 1  # of whole numbers in files; larger ones overflow where they become float


class FileModel(pydantic.BaseModel):
    """Base of the models of files: unchangeable. Unknown keys are ignored; with ``class Name(FileModel,
    extra="forbid")`` they are errors.
    """

    model_config = pydantic.ConfigDict(frozen=True, allow_inf_nan=False, populate_by_name=True)


# Whole numbers in files: larger ones overflow where they become float.
WholeNumber = Annotated[int, pydantic.Field(ge=-(2**63) + 1, le=2**63 - 1)]


def validate(
    model: type[T], value: object, where: str = "", *, error: type[PTuningError] = FileError, advice: str = ""
) -> T:
    """Check a value from JSON or TOML against a pydantic model, or any type that pydantic knows, and return it as such.

    Types are checked strictly, as those of JSON: a list fits a tuple, a whole number a float, and the text "3" no
    number. The first mistake is an ``error`` with file (``where``), key and value. A PTuningError that a validator
    raises is passed on.

    >>> validate(dict[str, list[int]], {"rte": [1, "x"]}, "seeds.toml")
    Traceback (most recent call last):
    ptuning.errors.FileError: seeds.toml: 'rte #2' must be a valid integer, and is "x"
    """
    try:
        text = json.dumps(value, default=lambda _: {})  # a date, as TOML has it, becomes no text
        return pydantic.TypeAdapter(model).validate_json(text, strict=True)
    except pydantic.ValidationError as wrong:
        # A mistyped key comes first: it is the reason why another one is missing.
        mistakes = sorted(wrong.errors(include_url=False), key=lambda mistake: mistake["type"] != "extra_forbidden")
        message = _mistake(model, value, mistakes[0])
        chained: Exception = wrong
    except (ValueError, RecursionError) as wrong:
        message, chained = f"it cannot be read ({wrong})", wrong
    raise error(f"{f'{where}: ' if where else ''}{message}{f'; {advice}' if advice else ''}") from chained


def _mistake(model: type, value: object, mistake: Mapping[str, Any]) -> str:
    """Return a mistake that pydantic reports as a message with key and value."""
    keys = ""
    for part in mistake["loc"]:
        if isinstance(value, Mapping) and isinstance(part, str) and (part in value or mistake["type"] == "missing"):
            keys, value = f"{keys}.{part}" if keys else part, value.get(part)
        elif isinstance(value, list | tuple) and isinstance(part, int) and part < len(value):
            keys, value = f"{keys} #{part + 1}".strip(), value[part]
        # What else is in a location is the name of a member of a union.
    if mistake["type"] == "missing":
        return f"the key '{keys}' is missing"
    if mistake["type"] == "extra_forbidden":
        fields: Mapping[str, Any] = getattr(model, "model_fields", {}) if len(mistake["loc"]) == 1 else {}
        known = [item.alias or name for name, item in fields.items()]
        listed = f" Known: {', '.join(known)}" if known else ""
        return f"unknown key '{keys}'.{closest(keys, known)}{listed}"
    text = mistake["msg"].removeprefix("Value error, ")
    name = repr(keys) if keys else "it"
    if not text.startswith("Input should be "):
        return f"{name}: {text}" if keys else text
    shown = cut(json.dumps(value, ensure_ascii=False, default=str))
    return f"{name} must be {text.removeprefix('Input should be ')}, and is {shown}"


def file_error(action: str, path: Path, error: OSError) -> FileError:
    """Return an error of the operating system as one that says what to do."""
    reason = error.strerror or str(error)
    hint = "free some space or choose another folder" if "space" in reason.lower() else "check the path and its rights"
    return FileError(f"cannot {action} {path}: {reason}; {hint}")


@functools.cache
def _host() -> str:
    """Return eight digits that identify this machine: several may write into one folder that they share."""
    return sha256(socket.gethostname().encode())[:8]


def new_path(path: Path) -> Path:
    """Return a temporary path next to a path, with this machine and what nobody can guess in its name, which
    :func:`is_temporary` knows.
    """
    return path.with_name(f".{path.name}.{_host()}-{secrets.token_hex(8)}.tmp")


def is_temporary(name: str) -> bool:
    """Whether a name has exactly the form of :func:`new_path` or :func:`staged`."""
    return re.fullmatch(r"\..+\.([0-9a-f]{8}-[0-9a-f]{16}\.tmp|[0-9a-f]{16}\.new)", name) is not None


def is_abandoned(path: Path) -> bool:
    """Whether a temporary file or folder was left by a killed process: what another machine made may still be written,
    until it is old.
    """
    match = re.search(r"\.([0-9a-f]{8})-[0-9a-f]{16}\.tmp$", path.name)
    if match is None or match[1] == _host():
        return True
    try:
        return time.time() - path.lstat().st_mtime >= STALE_SECONDS
    except OSError:  # it is gone
        return False


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a new, empty temporary file next to ``path``, which replaces ``path`` if the block succeeds.
    A link in the place of either is not followed: ``path`` becomes a file.
    """
    temporary = new_path(path)
    try:
        # Not by the module tempfile, whose files only their owner can read: new files have the rights of the umask.
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        yield temporary
        with temporary.open("rb+") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
    except OSError as error:
        raise file_error("write", path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def temporary_folder(folder: Path, name: str = "files") -> Iterator[Path]:
    """Yield a new folder in ``folder``, which is removed after the block unless the block has renamed it."""
    try:
        temporary = new_path(folder / name)
        temporary.mkdir()
    except OSError as error:
        raise file_error("write into", folder, error) from error
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically, with :func:`replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Json) -> None:
    """Write indented JSON with a final line break, atomically."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Json]]) -> None:
    """Write one JSON object per line (JSONL), atomically."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading. A device or a pipe, which might never end, is an error, and is not waited for."""
    try:
        handle = open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))  # noqa: SIM115
        if stat.S_ISREG(os.fstat(handle.fileno()).st_mode):
            return handle
    except OSError as error:
        raise file_error("read", path, error) from error
    except ValueError as error:
        raise FileError(f"cannot read {str(path)!r}: it is no path ({error})") from error
    handle.close()
    raise FileError(f"cannot read {path}: it is not a regular file")


def read_bytes(path: Path, *, at_most: int | None = None) -> bytes:
    """Read a whole file; with ``at_most``, a regular file of at most that many bytes: a larger one is damaged."""
    try:
        if at_most is None:
            return path.read_bytes()
        with open_regular(path) as handle:
            size = os.fstat(handle.fileno()).st_size
            data = handle.read(at_most + 1) if size <= at_most else b""
    except OSError as error:
        raise file_error("read", path, error) from error
    except ValueError as error:
        raise FileError(f"cannot read {str(path)!r}: it is no path ({error})") from error
    if max(size, len(data)) > at_most:
        raise FileError(f"{path} is larger than the {at_most:,} bytes that it can have; it is damaged")
    return data


def read_text(path: Path, *, error: type[PTuningError] = FileError) -> str:
    """Read a whole UTF-8 text file, with or without a byte order mark; ``error`` is raised if it is not UTF-8."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as wrong:
        raise error(f"{path} is not UTF-8 text ({wrong.reason}); save it as UTF-8") from wrong


def parse_json(text: str) -> Any:
    """Parse JSON. A ValueError if it is malformed, nested deeper than :data:`DEEPEST`, has a number that is too long to
    read, or a text with half a character (a lone surrogate), which neither tokenizers nor files take.
    """
    try:
        value = json.loads(text)
        if text.count("[") + text.count("{") > DEEPEST:
            _check_depth(value)
    except RecursionError as error:
        raise ValueError(f"nested deeper than {DEEPEST}") from error
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("it holds half a character (a lone surrogate)") from error
    return value


def _check_depth(value: Json) -> None:
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [
            inner
            for item in level
            if isinstance(item, dict | list)
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return
    raise RecursionError


def read_json(path: Path, *, at_most: int = MAX_JSON_BYTES) -> dict[str, Json]:
    """Read a JSON object from a regular file of ``at_most`` bytes."""
    try:
        value = parse_json(read_bytes(path, at_most=at_most).decode("utf-8"))
    except ValueError as error:
        raise FileError(f"{path} is not valid JSON ({error}); it is damaged or was cut off") from error
    if not isinstance(value, dict):
        raise FileError(f"{path} must hold a JSON object, and holds {type(value).__name__}")
    return value


def parse_toml(text: str, *, where: str, error: type[PTuningError]) -> dict[str, Any]:
    """Parse TOML; ``where`` begins the message of an error, and ``error`` is its class."""
    try:
        if max(line.count(".") for line in text.split("\n")) > MOST_DOTS:
            raise RecursionError
        value: dict[str, Any] = tomllib.loads(text)
        _check_depth(value)
    except RecursionError as wrong:
        raise error(
            f"{where} is nested too deeply: lists and tables go {DEEPEST} deep, and a line has at most {MOST_DOTS} dots"
        ) from wrong
    except ValueError as wrong:  # also of numbers that are too long to read
        raise error(f"{where} is not a valid TOML file: {wrong}") from wrong
    return value


def read_json_lines(path: Path) -> list[dict[str, Json]]:
    """Read what :func:`write_json_lines` wrote."""
    try:
        # Only "\n" ends a line: JSON strings may hold other line separators, which str.splitlines would cut at.
        lines = read_bytes(path, at_most=MAX_JSON_BYTES).decode("utf-8").split("\n")
        rows = [parse_json(line) for line in lines if line]
    except ValueError as error:
        raise FileError(f"{path} is not valid JSONL ({error}); it is damaged or was cut off") from error
    if not all(isinstance(row, dict) for row in rows):
        raise FileError(f"{path} must hold a JSON object on each line")
    return rows


def sha256(data: bytes) -> str:
    """Return the SHA-256 of ``data`` as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file that may be larger than memory."""
    digest = hashlib.sha256()
    try:
        with open_regular(path) as handle:
            while block := handle.read(HASHED_BYTES):
                digest.update(block)
    except OSError as error:
        raise file_error("read", path, error) from error
    return digest.hexdigest()


def check_room(folder: Path, needed_bytes: int) -> None:
    """Check that the disk of ``folder`` has enough free space, before any work is done."""
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
    """Create a folder and its parents."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise file_error("create", folder, error) from error


def staged(path: Path, digest: str) -> Path:
    """Return where a file waits for its place: it was written, and what names its SHA-256 may have been, too."""
    return path.with_name(f".{path.name}.{digest[:16]}.new")


def settled(path: Path, digest: str) -> Path:
    """Return where the file with this SHA-256 is: in its place, or still :func:`staged` since a writer was killed."""
    waiting = staged(path, digest) if re.fullmatch("[0-9a-f]{64}", digest) else path
    return waiting if waiting.is_file() and not (path.is_file() and file_sha256(path) == digest) else path
