"""Prompts in service, by name: loaded, replaced, unloaded and reloaded from the disk while requests run.

A :class:`Served` never changes: a request gets it once and keeps it to its end. The registry does not know HTTP, and of
the model only whether it takes a prompt (``check``).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

from ptuning.errors import FileError, PromptError, PTuningError, closest, cut
from ptuning.files import Json, file_error, read_bytes, read_json, sha256
from ptuning.names import MANIFEST_FILE, MAX_MANIFEST_BYTES, PROMPT_FOLDER, VECTORS_FILE
from ptuning.prompt.prompt import Prompt
from ptuning.prompt.storage import ATTEMPTS, NAME_PARTS, has_prompt, manifest_of, prompt_folders
from ptuning.serve.engine.job import StoppedError

# ASCII only: no two names look alike, and none leads out of a folder.
PART = re.compile(r"[A-Za-z0-9][\w.-]{0,127}", re.ASCII)
PATH_PARTS = 16
NAME_RULE = "parts of 1 to 128 letters (a-z), digits, '.', '_' and '-', beginning with a letter or digit, joined by '/'"
# Slot vectors of 1,000 slots of the widest models; a larger file is refused before it is read.
MAX_VECTORS_BYTES = 2**26
COMPARED_NAMES = 200  # with an unknown one, to find a similar name


class UnknownPromptError(PTuningError):
    """No prompt of this name is in service."""


class ConflictError(PTuningError):
    """The name is already in service."""


class RefusedNameError(PTuningError):
    """A name, or a path (``param`` says which), is not allowed."""

    def __init__(self, message: str, *, param: str) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True)
class Served:
    """A prompt in service. ``sha256`` is that of its manifest, which holds the hashes of its other files;
    ``loaded_at`` is in seconds since 1970, and ``stamp`` changes when the files do.
    """

    name: str
    prompt: Prompt
    folder: Path
    sha256: str
    loaded_at: float
    stamp: tuple[int, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Changes:
    """Changes of a reload: names of prompts, and name -> message for those that cannot be loaded. A prompt that fails
    and was in service stays as it was.
    """

    added: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    failed: Mapping[str, str] = field(default_factory=dict)


class Registry:
    """Names of prompts, and the prompts in service. Methods may be called from any thread; changes are made one after
    the other.

    Args:
        folder: Holds the prompts' folders, up to :data:`NAME_PARTS` deep; a prompt's name is its path in it. Requests
            can load nothing from outside of it. None if there are only ``named`` prompts.
        named: More prompts, name -> folder anywhere, from the operator.
        base_name: Name of the base model, which no prompt may have.
        check: Raises a PTuningError if a prompt does not fit the model.

    Raises:
        RefusedNameError: If one of ``named`` has a name that is not allowed.
    """

    def __init__(
        self,
        folder: Path | None,
        named: Mapping[str, Path] | None = None,
        *,
        base_name: str,
        check: Callable[[Prompt], object],
    ) -> None:
        self._root = None if folder is None else Path(os.path.abspath(folder))
        self.base_name = base_name
        self._check = check
        self._named = {self._allowed(name): Path(os.path.abspath(path)) for name, path in (named or {}).items()}
        self._lock = threading.Lock()  # held by whoever changes something
        self._closed = False
        # Both are replaced and never changed, so that readers need no lock.
        self._served: Mapping[str, Served] = MappingProxyType({})
        self._failures: Mapping[str, str] = MappingProxyType({})

    @property
    def served(self) -> Mapping[str, Served]:
        """Prompts in service at this moment, by name; the mapping does not change afterwards."""
        return self._served

    @property
    def failures(self) -> Mapping[str, str]:
        """Prompts that could not be loaded at the last reload: name -> message."""
        return self._failures

    def get(self, name: str) -> Served:
        """Return the prompt of a name; an UnknownPromptError with a similar name if there is none."""
        served = self._served
        if name not in served:
            # Comparing takes time, and clients may send any name.
            similar = (known for known in served if known[:1].lower() == name[:1].lower())
            hint = closest(name, itertools.islice(similar, COMPARED_NAMES)) if len(name) <= 200 else ""
            broken = " Its folder is there, and could not be loaded." if name in self._failures else ""
            raise UnknownPromptError(f"there is no prompt '{cut(name)}' here.{broken}{hint}")
        return served[name]

    def path_of(self, served: Served) -> str:
        """Return a prompt's path in the folder of prompts; of one from elsewhere, only its folder's name."""
        if self._root is None or not served.folder.is_relative_to(self._root):
            return served.folder.name
        return served.folder.relative_to(self._root).as_posix()

    def load(self, name: str, path: str) -> Served:
        """Load a prompt under a new name.

        Raises:
            RefusedNameError: If the name is not allowed, or the path is not one inside of the folder of prompts.
            ConflictError: If the name is taken.
            PromptError: If the prompt cannot be read, has weights of its own, or does not fit the model.
            StoppedError: If the service is about to end.
        """
        folder = self._inside(path, name=self._allowed(name))
        with self._changing():
            if name in self._served:
                raise ConflictError(f"'{name}' is in service already; replace it (PUT), or choose another name")
            return self._put(name, path, folder)

    def replace(self, name: str, path: str) -> Served:
        """Replace the prompt of a name; running requests end with the old one.

        Raises:
            UnknownPromptError: If there is no prompt of this name.
            PTuningError: As for :meth:`load`; the prompt in service stays.
        """
        folder = self._inside(path, name=name)
        with self._changing():
            self.get(name)
            return self._put(name, path, folder)

    def unload(self, name: str) -> Served:
        """Take a prompt out of service, and return it; its files stay, and running requests go on with it.

        Raises:
            UnknownPromptError: If there is none of this name.
        """
        with self._changing():
            served = self.get(name)
            self._publish(name, None)
            return served

    def reload(self) -> Changes:
        """Make the service equal to the disk, each prompt on its own: new ones are loaded, changed ones replaced,
        and removed ones unloaded. A prompt that was loaded by name keeps to its folder.

        Raises:
            FileError: If the folder of prompts cannot be read; all stays as it was.
            StoppedError: If the service is about to end.
        """
        with self._changing():
            folders = {**self._on_disk(), **self._named}
            changes: dict[str, list[str]] = {"added": [], "changed": [], "removed": []}
            failures: dict[str, str] = {}
            for name in sorted({*folders, *self._served}):
                try:
                    change = self._reload_one(name, folders.get(name))
                    if change is not None:
                        changes[change].append(name)
                except StoppedError:
                    raise
                except Exception as error:  # noqa: BLE001 - one broken prompt must not keep the others out
                    failures[name if name.isprintable() else ascii(name)[1:-1]] = self._message(error)
            self._failures = MappingProxyType(failures)
            added, changed, removed = (tuple(names) for names in changes.values())
            return Changes(added, changed, removed, failures)

    def close(self) -> None:
        """Refuse changes from now on: the service is about to end."""
        self._closed = True

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        with self._lock:
            if self._closed:
                raise StoppedError("the service is about to end, and its prompts do not change any more")
            yield

    def _reload_one(self, name: str, folder: Path | None) -> str | None:
        """Make one prompt equal to the disk, and return the kind of change."""
        old = self._served.get(self._allowed(name))
        folder = old.folder if old is not None else folder
        if folder is None or (old is not None and old.stamp == _stamp(folder)):
            return None
        if old is not None and _is_gone(folder):
            self._publish(name, None)
            return "removed"
        new = self._read(name, folder)
        if old is not None and old.sha256 == new.sha256:  # written again, with the same content
            self._publish(name, replace(old, stamp=new.stamp))
            return None
        self._publish(name, new)
        return "added" if old is None else "changed"

    def _on_disk(self) -> dict[str, Path]:
        if self._root is None:
            return {}
        try:
            folders = list(prompts_in(self._root))
        except OSError as error:
            raise file_error("read", self._root, error) from error
        return {
            folder.name if folder == self._root else folder.relative_to(self._root).as_posix(): folder
            for folder in folders
        }

    def _put(self, name: str, path: str, folder: Path) -> Served:
        if _is_gone(folder):
            raise PromptError(f"'{name}' cannot be loaded: there is no '{path}' in the folder of prompts")
        try:
            new = self._read(name, folder)
        except StoppedError:
            raise
        except PTuningError as error:
            raise PromptError(f"'{name}' cannot be loaded: {self._message(error)}") from error
        self._publish(name, new)
        return new

    def _publish(self, name: str, new: Served | None) -> None:
        served = {**self._served, name: new}
        self._served = MappingProxyType({other: prompt for other, prompt in served.items() if prompt is not None})
        self._failures = MappingProxyType({other: why for other, why in self._failures.items() if other != name})

    def _allowed(self, name: str) -> str:
        if not _is_name(name, NAME_PARTS):
            message = f"a prompt cannot have the name {cut(repr(name))}; names have {NAME_RULE}"
            raise RefusedNameError(message, param="name")
        if name.casefold() == self.base_name.casefold():
            raise RefusedNameError(f"'{name}' is the name of the base model; choose another one", param="name")
        return name

    def _inside(self, path: str, *, name: str) -> Path:
        """Return the folder of a path in the folder of prompts."""
        if self._root is None:
            message = f"'{cut(name)}' cannot be loaded: there is no folder of prompts (--prompts)"
            raise RefusedNameError(message, param="path")
        # Tools may give the whole path; what follows the folder of prompts is checked all the same.
        inner = path.removeprefix(f"{self._root}/").rstrip("/")
        if not _is_name(inner, PATH_PARTS):
            message = f"{cut(repr(path))} is not a path in the folder of prompts; it has {NAME_RULE}"
            raise RefusedNameError(message, param="path")
        return self._root / inner

    def _read(self, name: str, folder: Path) -> Served:
        """Read and check a prompt; links, sizes and weights are checked before vectors are read."""
        manifest = manifest_of(folder)
        if self._named.get(name) != folder:
            assert self._root is not None
            root = os.path.realpath(self._root)
            for path in (folder, manifest, manifest.with_name(VECTORS_FILE)):
                if os.path.commonpath((root, os.path.realpath(path))) != root:
                    message = "is a link out of the folder of prompts, and is not followed; copy the prompt"
                    raise FileError(f"{path} {message}")
        for _ in range(ATTEMPTS):
            stamp, before = _stamp(folder), read_bytes(manifest, at_most=MAX_MANIFEST_BYTES)
            _check_files(read_json(manifest, at_most=MAX_MANIFEST_BYTES), folder, manifest.with_name(VECTORS_FILE))
            prompt = Prompt.load(folder)
            if read_bytes(manifest, at_most=MAX_MANIFEST_BYTES) == before:
                self._check(prompt)
                return Served(name, prompt, folder, sha256(before), time.time(), stamp)
        raise PromptError(f"{folder} is being written all the time; load it when it is done")

    def _message(self, error: Exception) -> str:
        """Return an error's message, with paths relative to the folder of prompts."""
        text = str(error) if isinstance(error, PTuningError) else f"{type(error).__name__}: {error}"
        return text if self._root is None else text.replace(f"{self._root}/", "")


def base_name_of(backbone: str) -> str:
    """Return the name in service of a backbone: of a folder only its last part."""
    return Path(backbone).name if Path(backbone).exists() else backbone


def prompts_in(root: Path) -> Iterator[Path]:
    """Yield the folders of prompts in a folder, which may be a prompt's itself."""
    yield from ([root] if has_prompt(root) else prompt_folders(root))


def _check_files(manifest: Mapping[str, Json], folder: Path, vectors: Path) -> None:
    with contextlib.suppress(OSError):
        if vectors.stat().st_size > MAX_VECTORS_BYTES:
            raise PromptError(
                f"{vectors} is larger than the {MAX_VECTORS_BYTES:,} bytes of a prompt in service; it is damaged"
            )
    if manifest.get("weights") is not None:
        raise PromptError(
            f"{folder} has trained weights of the backbone in it, and one model in memory serves all prompts; "
            "train its slots alone (--train-backbone none), or use it by itself (ptuning predict)"
        )


def _is_name(name: str, max_parts: int) -> bool:
    parts = name.split("/") if len(name) <= max_parts * 129 else []
    return 0 < len(parts) <= max_parts and all(PART.fullmatch(part) for part in parts)


def _is_gone(folder: Path) -> bool:
    """Whether a folder no longer exists; one that cannot be looked at may exist."""
    try:
        folder.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def _stamp(folder: Path) -> tuple[int, ...]:
    stamp: list[int] = []
    for inner in (folder, folder / PROMPT_FOLDER):
        for name in (MANIFEST_FILE, VECTORS_FILE):
            with contextlib.suppress(OSError):
                status = (inner / name).stat()
                stamp += status.st_ino, status.st_size, status.st_mtime_ns
    return tuple(stamp)
