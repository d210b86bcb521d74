"""Atomic writing (a temporary file is renamed), reading, and :class:`Unchecked` for values of JSON or TOML."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import socket
import stat
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, BinaryIO, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

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
Word = TypeVar("Word", bound=str)
MAX_JSON_BYTES = 2**30  # of a file of JSON that we wrote
DEEPEST = 100  # lists and tables inside of each other in a file that is read; Python's own limit depends on the caller
MOST_DOTS = 500  # in a line of TOML: a dotted key takes time that is quadratic in its parts
LARGEST = 2**63 - 1  # of whole numbers in files; larger ones overflow where they become float


@dataclass(frozen=True)
class Unchecked:
    """A value from JSON or TOML before any check. Each method checks it and returns it with its type. Messages begin
    with ``where`` and end with ``advice``; ``path`` has the keys to the value, ``#2`` for the second one of a list.

    >>> found = Unchecked({"name": "RTE", "files": {"dev": ["dev32"]}}, where="rte.toml")
    >>> found.at("name").text(), found.at("files").at("dev").texts()
    ('RTE', ['dev32'])
    >>> found.at("files").at("dev").whole()
    Traceback (most recent call last):
    ptuning.errors.FileError: rte.toml: 'files.dev' must be a whole number, and is ["dev32"]
    """

    value: object
    where: str = ""
    error: type[PTuningError] = FileError
    advice: str = ""
    path: str = ""

    def failure(self, message: str) -> PTuningError:
        """Return an error about this value."""
        start = f"{self.where}: " if self.where else ""
        return self.error(f"{start}{message}{f'; {self.advice}' if self.advice else ''}")

    def wrong(self, wanted: str) -> PTuningError:
        """Return the error that says what the value must be, and what it is."""
        shown = cut(json.dumps(self.value, ensure_ascii=False, default=str))
        return self.failure(f"{repr(self.path) if self.path else 'it'} must be {wanted}, and is {shown}")

    def at(self, key: str, default: object = None) -> Unchecked:
        """Return the value at a key; ``default`` if there is none, or null."""
        found = self.mapping().get(key)
        return self._part(default if found is None else found, f"{self.path}.{key}" if self.path else key)

    def optional(self, key: str, read: Callable[[Unchecked], T]) -> T | None:
        """Read the value at a key; None if there is none, or null."""
        found = self.at(key)
        return None if found.value is None else read(found)

    def mapping(self) -> Mapping[str, Json]:
        """Return a mapping of names to values that stay unchecked."""
        if not isinstance(self.value, Mapping):
            raise self.wrong("a table of names and values")
        return self.value

    def table(self, *, known: Collection[str] | None = None) -> dict[str, Unchecked]:
        """Return a mapping of names to values; with ``known``, names that are not among them are errors."""
        for name in self.mapping():
            if known is not None and name not in known:
                key = f"{self.path}.{name}" if self.path else name
                raise self.failure(f"unknown key '{key}'.{closest(name, known)} Known: {', '.join(known)}")
        return {name: self.at(name) for name in self.mapping()}

    def items(self) -> list[Unchecked]:
        """Return the values of a list."""
        if not isinstance(self.value, list):
            raise self.wrong("a list")
        return [self._part(one, f"{self.path} #{number}") for number, one in enumerate(self.value, start=1)]

    def text(self, *, blank: bool = True) -> str:
        """Return a text; one that is empty or all spaces only if ``blank``."""
        if not isinstance(self.value, str) or not (blank or self.value.strip()):
            raise self.wrong("text in quotation marks")
        return self.value

    def texts(self) -> list[str]:
        """Return a list of texts."""
        if not isinstance(self.value, list) or not all(isinstance(one, str) for one in self.value):
            raise self.wrong('a list of texts, ["...", "..."]')
        return self.value

    def one_of(self, allowed: Sequence[Word]) -> Word:
        """Return one of the texts that are allowed."""
        found = next((word for word in allowed if word == self.value), None)
        if found is None:
            raise self.wrong(f"one of {', '.join(allowed)}")
        return found

    def flag(self) -> bool:
        """Return true or false."""
        if not isinstance(self.value, bool):
            raise self.wrong("true or false")
        return self.value

    def whole(self, *, least: int | None = None) -> int:
        """Return a whole number, which is not below ``least``."""
        found, lowest = self.value, -LARGEST if least is None else least
        if not isinstance(found, int) or isinstance(found, bool) or not lowest <= found <= LARGEST:
            raise self.wrong("a whole number" if least is None else f"a whole number from {least}")
        return found

    def number(self, *, finite: bool = True) -> float:
        """Return a number; one that is infinite or NaN only if not ``finite``."""
        found = self.value
        if isinstance(found, int) and not isinstance(found, bool) and abs(found) <= LARGEST:
            found = float(found)
        if not isinstance(found, float) or (finite and not math.isfinite(found)):
            raise self.wrong("a number")
        return found

    def to(self, kind: type[T], **given: object) -> T:
        """Read a data class, without the fields that are ``given``. What is missing or null is its default. Fields may
        be texts, numbers, flags, ``Literal``, ``Json``, data classes, and mappings, lists and ``| None`` of these.
        """
        hints = _hints(kind)  # type: ignore[arg-type]  # a class has a hash
        for item in dataclasses.fields(kind):  # type: ignore[arg-type]  # a data class
            one = self.at(item.name)
            has_default = item.default is not MISSING or item.default_factory is not MISSING
            if item.name not in given and not (has_default and one.value is None):
                given[item.name] = one._as(hints[item.name])
        return kind(**given)

    def _as(self, kind: Any) -> Any:
        origin, of = get_origin(kind), [one for one in get_args(kind) if one is not NoneType]
        if origin in (Union, UnionType):
            # A union of several types is Json, which may be anything.
            return self.value if self.value is None or len(of) > 1 else self._as(of[0])
        if origin is Literal:
            return self.one_of(of)
        if origin is Mapping:
            return {name: one._as(of[1]) for name, one in self.table().items()}
        if origin is Sequence:
            return [one._as(of[0]) for one in self.items()]
        plain: dict[type, Callable[[], object]] = {str: self.text, bool: self.flag, int: self.whole, float: self.number}
        return plain[kind]() if kind in plain else self.to(kind)

    def _part(self, value: object, path: str) -> Unchecked:
        return Unchecked(value, self.where, self.error, self.advice, path)


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


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


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


def is_temporary(name: str, of: str) -> bool:
    """Whether a name has exactly the form of :func:`new_path`, or that of older releases, for a path whose name matches
    a regular expression.
    """
    return re.fullmatch(rf"\.({of})\.([0-9a-f]{{8}}-)?[0-9a-f]{{16}}\.tmp", name) is not None


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
    """Read a whole file; with ``at_most``, a regular file that has not more bytes, since a larger one is damaged."""
    try:
        if at_most is None:
            return path.read_bytes()
        with open_regular(path) as handle:
            data = handle.read(at_most + 1)
    except OSError as error:
        raise file_error("read", path, error) from error
    except ValueError as error:
        raise FileError(f"cannot read {str(path)!r}: it is no path ({error})") from error
    if len(data) > at_most:
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


def parse_toml(text: str, *, where: str, error: type[PTuningError]) -> Unchecked:
    """Read TOML; ``where`` starts the messages of all errors about it, and ``error`` is their class."""
    try:
        if max(line.count(".") for line in text.split("\n")) > MOST_DOTS:
            raise RecursionError
        value = tomllib.loads(text)
        _check_depth(value)
    except RecursionError as wrong:
        raise error(
            f"{where} is nested too deeply: lists and tables go {DEEPEST} deep, and a line has at most {MOST_DOTS} dots"
        ) from wrong
    except ValueError as wrong:  # also of numbers that are too long to read
        raise error(f"{where} is not a valid TOML file: {wrong}") from wrong
    return Unchecked(value, where, error)


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
