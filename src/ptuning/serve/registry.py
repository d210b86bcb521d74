"""The prompts in service, by name: loaded, replaced, unloaded and reloaded from the disk while requests run.

What is in service never changes: a request gets a :class:`Served` once and holds it to its end. It must not know HTTP,
and of the model only whether it takes a prompt (``check``).
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

# Letters of ASCII alone: two names that look alike are alike. No name of this form leads out of a folder.
PART = re.compile(r"[A-Za-z0-9][\w.-]{0,127}", re.ASCII)
PATH_PARTS = 16
NAMED = "parts of 1 to 128 letters (a-z), digits, '.', '_' and '-', the first a letter or digit, with '/' between them"
# Of slot vectors: 1,000 slots of the widest models. A larger file is refused before it is read.
MAX_VECTORS_BYTES = 2**26
COMPARED_NAMES = 200  # with an unknown one

Stamp = tuple[int, ...]  # changes when a prompt's files do


class UnknownPromptError(PTuningError):
    """No prompt of this name is in service."""


class ConflictError(PTuningError):
    """Another request got there first: the name is taken, or is just being loaded, replaced or unloaded."""


class RefusedNameError(PTuningError):
    """A name, or a path (``param`` says which), is not allowed."""

    def __init__(self, message: str, *, param: str) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True)
class Served:
    """A prompt in service. ``sha256`` is that of its manifest, which names the sums of its other files, and so stands
    for all of it; ``loaded_at`` is in seconds since 1970.
    """

    name: str
    prompt: Prompt
    folder: Path
    sha256: str
    loaded_at: float
    stamp: Stamp = field(default=(), repr=False)


@dataclass(frozen=True)
class Reloaded:
    """What reading the disk again has changed: names of prompts, and name -> message for those that cannot be loaded.
    One that was in service before it failed goes on as it was.
    """

    added: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    failed: Mapping[str, str] = field(default_factory=dict)


class Registry:
    """Names of prompts, and what is in service under them. All methods may be called from any thread.

    Args:
        folder: Holds the prompts' folders, up to :data:`NAME_PARTS` deep; a prompt's name is its path in it. Nothing
            outside of it is read for a request. None if there are only ``named`` ones.
        named: More prompts, name -> folder anywhere, which the operator vouches for.
        base_name: The name of the base model, which no prompt may have.
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
        self._named = {self._allowed(name): Path(os.path.abspath(one)) for name, one in (named or {}).items()}
        self._lock = threading.Lock()
        self._claimed: set[str] = set()
        self._reloading = False
        self._closed = False
        # Both are replaced and never changed, so that who reads them needs no lock.
        self._served: Mapping[str, Served] = MappingProxyType({})
        self._failures: Mapping[str, str] = MappingProxyType({})

    @property
    def served(self) -> Mapping[str, Served]:
        """What is in service at this moment, by name; it does not change afterwards."""
        return self._served

    @property
    def failures(self) -> Mapping[str, str]:
        """Prompts that could not be loaded when the disk was last read: name -> message."""
        return self._failures

    def get(self, name: str) -> Served:
        """Return what is in service under a name; an UnknownPromptError with a similar name if there is nothing."""
        known = self._served
        found = known.get(name)
        if found is None:
            # Comparing takes time, and anybody may ask for anything.
            alike = (one for one in known if one[:1].lower() == name[:1].lower())
            hint = closest(name, itertools.islice(alike, COMPARED_NAMES)) if len(name) <= 200 else ""
            broken = " Its folder is there, and could not be loaded." if name in self._failures else ""
            raise UnknownPromptError(f"there is no prompt '{cut(name)}' here.{broken}{hint}")
        return found

    def path_of(self, served: Served) -> str:
        """Return a prompt's path in the folder of prompts; of one from elsewhere, only its folder's name."""
        root = self._root
        is_inside = root is not None and served.folder.is_relative_to(root)
        return served.folder.relative_to(root).as_posix() if root is not None and is_inside else served.folder.name

    def load(self, name: str, path: str) -> Served:
        """Take a prompt into service under a new name.

        Raises:
            RefusedNameError: If the name is not allowed, or the path is not one inside of the folder of prompts.
            ConflictError: If the name is taken, or another request is loading it.
            PromptError: If the prompt cannot be read, has weights of its own, or does not fit the model.
            StoppedError: If the service is about to end.
        """
        return self._put(self._allowed(name), path, replaces=False)

    def replace(self, name: str, path: str) -> Served:
        """Put another prompt under a name; running requests end with the one they began with.

        Raises:
            UnknownPromptError: If there is no prompt of this name.
            PTuningError: As for :meth:`load`; the prompt in service stays.
        """
        return self._put(name, path, replaces=True)

    def unload(self, name: str) -> Served:
        """Take a prompt out of service, and return it; its files stay, and running requests go on with it.

        An UnknownPromptError if there is none of this name; a ConflictError if another request is changing it.
        """
        with self._claim(name, is_served=True):
            found = self._served[name]
            self._publish(name, None)
            return found

    def reload(self) -> Reloaded:
        """Make the service equal to the disk, each prompt on its own: what is new is loaded, what has changed is
        replaced, and what is gone is unloaded. A prompt that was loaded by name keeps to its folder.

        Raises:
            FileError: If the folder of prompts cannot be read; all stays as it was.
            ConflictError: If another request is reloading.
            StoppedError: If the service is about to end.
        """
        with self._lock:
            self._check_open()
            if self._reloading:
                raise ConflictError("another request is reloading the prompts; wait for it")
            self._reloading = True
        try:
            return self._reload()
        finally:
            self._reloading = False

    def close(self) -> None:
        """Refuse changes from now on: the service is about to end. What is in service stays."""
        with self._lock:
            self._closed = True

    def _reload(self) -> Reloaded:
        on_disk = {**self._found(), **self._named}
        told: dict[str, list[str]] = {"added": [], "changed": [], "removed": []}
        failed: dict[str, str] = {}
        failures: dict[str, str] = {}
        for name in sorted({*on_disk, *self._served}):
            try:
                done = self._reload_one(name, on_disk.get(name))
                if done is not None:
                    told[done].append(name)
            except StoppedError:
                raise
            except ConflictError as error:
                failed[name] = str(error)
            except Exception as error:  # noqa: BLE001 - whatever is wrong with one must not keep the others out
                key = name if name.isprintable() else ascii(name)[1:-1]
                failed[key] = failures[key] = self._told(error)
        self._failures = MappingProxyType(failures)
        return Reloaded(tuple(told["added"]), tuple(told["changed"]), tuple(told["removed"]), failed)

    def _reload_one(self, name: str, folder: Path | None) -> str | None:
        """Make one prompt equal to the disk, where it may be in a folder, and say what that was."""
        with self._claim(self._allowed(name)):
            old = self._served.get(name)
            folder = old.folder if old is not None else folder
            if folder is None or (old is not None and old.stamp == _stamp(folder)):
                return None
            if old is not None and _is_gone(folder):
                self._publish(name, None)
                return "removed"
            new = self._read(name, folder)
            if old is not None and old.sha256 == new.sha256:  # written again
                self._publish(name, replace(old, stamp=new.stamp))
                return None
            self._publish(name, new)
            return "added" if old is None else "changed"

    def _found(self) -> dict[str, Path]:
        """Return the prompts in the folder by what their names would be."""
        if self._root is None:
            return {}
        try:
            found = [*prompts_in(self._root)]
        except OSError as error:
            raise file_error("read", self._root, error) from error
        return {(one.relative_to(self._root).as_posix() if one != self._root else one.name): one for one in found}

    def _put(self, name: str, path: str, *, replaces: bool) -> Served:
        folder = self._inside(path)
        with self._claim(name, is_served=replaces):
            if _is_gone(folder):
                raise PromptError(f"'{name}' cannot be loaded: there is no '{path}' in the folder of prompts")
            try:
                new = self._read(name, folder)
            except StoppedError:
                raise
            except PTuningError as error:
                raise PromptError(f"'{name}' cannot be loaded: {self._told(error)}") from error
            self._publish(name, new)
            return new

    @contextlib.contextmanager
    def _claim(self, name: str, *, is_served: bool | None = None) -> Iterator[None]:
        """Let one request at a time change a name; with ``is_served``, only one that is or is not in service."""
        with self._lock:
            self._check_open()
            if name in self._claimed:
                raise ConflictError(f"another request is changing '{cut(name)}'; wait for it, and look what it did")
            if is_served:
                self.get(name)
            elif is_served is False and name in self._served:
                raise ConflictError(f"'{name}' is in service already; replace it (PUT), or choose another name")
            self._claimed.add(name)
        try:
            yield
        finally:
            with self._lock:
                self._claimed.discard(name)

    def _publish(self, name: str, new: Served | None) -> None:
        with self._lock:
            others = {other: one for other, one in self._served.items() if other != name}
            self._served = MappingProxyType(others if new is None else {**others, name: new})
            self._failures = MappingProxyType({of: why for of, why in self._failures.items() if of != name})

    def _check_open(self) -> None:
        if self._closed:
            raise StoppedError("the service is about to end, and its prompts do not change any more")

    def _allowed(self, name: str) -> str:
        if not _is_name(name, NAME_PARTS):
            raise RefusedNameError(f"a prompt cannot have the name {cut(repr(name))}; names have {NAMED}", param="name")
        if name.casefold() == self.base_name.casefold():
            raise RefusedNameError(f"'{name}' is the name of the base model; choose another one", param="name")
        return name

    def _inside(self, path: str) -> Path:
        """Return the folder that a request names, by its path in the folder of prompts."""
        if self._root is None:
            raise RefusedNameError("there is no folder of prompts (--prompts) to load from", param="path")
        # Tools that know the whole path may give it; every part behind the folder's own is checked all the same.
        inner = path.removeprefix(f"{self._root}/").rstrip("/")
        if not _is_name(inner, PATH_PARTS):
            raise RefusedNameError(
                f"{cut(repr(path))} is not a path in the folder of prompts; it has {NAMED}, as in team/prompt",
                param="path",
            )
        return self._root / inner

    def _read(self, name: str, folder: Path) -> Served:
        """Read and check a prompt; links, sizes and weights are looked at before vectors."""
        manifest = manifest_of(folder)
        if self._named.get(name) != folder:
            self._check_inside(folder, manifest, manifest.with_name(VECTORS_FILE))
        for _ in range(ATTEMPTS):
            stamp, before = _stamp(folder), read_bytes(manifest, at_most=MAX_MANIFEST_BYTES)
            _check_plausible(read_json(manifest, at_most=MAX_MANIFEST_BYTES), folder)
            prompt = Prompt.load(folder)
            if read_bytes(manifest, at_most=MAX_MANIFEST_BYTES) == before:
                self._check(prompt)
                return Served(name, prompt, folder, sha256(before), time.time(), stamp)
        raise PromptError(f"{folder} is being written all the time; load it when it is done")

    def _check_inside(self, *paths: Path) -> None:
        assert self._root is not None
        real_root = os.path.realpath(self._root)
        for path in paths:
            real = os.path.realpath(path)
            if os.path.commonpath((real_root, real)) != real_root:
                raise FileError(f"{path} is a link out of the folder of prompts, and is not followed; copy the prompt")

    def _told(self, error: Exception) -> str:
        """Return an error's message; paths are those inside of the folder of prompts, whose place is the operator's."""
        text = str(error) if isinstance(error, PTuningError) else f"{type(error).__name__}: {error}"
        return text if self._root is None else text.replace(f"{self._root}/", "")


def base_name_of(backbone: str) -> str:
    """Return the name in service of a backbone: of a folder its own, without the path, which is nobody's business."""
    return Path(backbone).name if Path(backbone).exists() else backbone


def _check_plausible(manifest: Mapping[str, Json], folder: Path) -> None:
    slots, width = manifest.get("slots"), manifest.get("width")
    if isinstance(slots, int) and isinstance(width, int) and 4 * slots * width > MAX_VECTORS_BYTES:
        raise PromptError(
            f"{folder} says that it has {slots} slots of width {width}, more than the {MAX_VECTORS_BYTES:,} bytes of a "
            "prompt in service; it is damaged"
        )
    if manifest.get("weights") is not None:
        raise PromptError(
            f"{folder} has trained weights of the backbone in it, and one model in memory serves all prompts; "
            "train its slots alone (--train-backbone none), or use it by itself (ptuning predict)"
        )


def _is_name(name: str, most_parts: int) -> bool:
    if len(name) > most_parts * 129:
        return False
    parts = name.split("/")
    return len(parts) <= most_parts and all(PART.fullmatch(part) for part in parts)


def _is_gone(folder: Path) -> bool:
    """Whether a folder is there no more; one that cannot be looked at may be."""
    try:
        folder.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def _stamp(folder: Path) -> Stamp:
    found: list[int] = []
    for inner in (folder, folder / PROMPT_FOLDER):
        for name in (MANIFEST_FILE, VECTORS_FILE):
            with contextlib.suppress(OSError):
                about = (inner / name).stat()
                found += about.st_ino, about.st_size, about.st_mtime_ns
    return tuple(found)


def prompts_in(root: Path) -> Iterator[Path]:
    """Yield the folders of prompts that a registry finds in a folder, which may be a prompt's itself."""
    yield from ([root] if has_prompt(root) else prompt_folders(root))
