"""Prompts in service, by name: loaded, replaced, unloaded and reloaded from the disk while requests run.

A :class:`Served` never changes: a request gets it once and keeps it to its end. The registry does not know HTTP, and of
the model only whether it takes a prompt (``check``).
"""

import contextlib
import itertools
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from ptuning.errors import FileError, PromptError, PTuningError, closest, cut
from ptuning.files import file_error, read_bytes, read_json, sha256
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
        # Name -> prompt in service, and name -> message of those that could not be loaded at the last reload. Both are
        # replaced and never changed, so that readers need no lock.
        self.served: Mapping[str, Served] = {}
        self.failures: Mapping[str, str] = {}

    def get(self, name: str) -> Served:
        """Return the prompt of a name; an UnknownPromptError with a similar name if there is none."""
        served = self.served
        if name not in served:
            # Comparing takes time, and clients may send any name.
            similar = (known for known in served if known[:1].lower() == name[:1].lower())
            hint = closest(name, itertools.islice(similar, COMPARED_NAMES)) if len(name) <= 200 else ""
            broken = " Its folder is there, and could not be loaded." if name in self.failures else ""
            raise UnknownPromptError(f"there is no prompt '{cut(name)}' here.{broken}{hint}")
        return served[name]

    def load(self, name: str, path: str, *, replaces: bool = False) -> Served:
        """Load a prompt under a new name, or in the place of another one, with which running requests end.

        Raises:
            RefusedNameError: If the name is not allowed, or the path is not one inside of the folder of prompts.
            ConflictError: If the name is taken.
            UnknownPromptError: If there is none to replace.
            PromptError: If the prompt cannot be read, has weights of its own, or does not fit the model; the one in
                service stays.
            StoppedError: If the service is about to end.
        """
        if self._root is None:
            message = f"'{cut(name)}' cannot be loaded: there is no folder of prompts"
            raise RefusedNameError(message, param="path")
        # Tools may give the absolute path; what follows the folder of prompts is checked all the same.
        inner = path.removeprefix(f"{self._root}/").rstrip("/")
        if not replaces:
            self._allowed(name)
        if not _is_name(inner, PATH_PARTS):
            message = f"{cut(repr(path))} is not a path in the folder of prompts; it has {NAME_RULE}"
            raise RefusedNameError(message, param="path")
        with self._changing():
            if replaces:
                self.get(name)
            elif name in self.served:
                raise ConflictError(f"'{name}' is in service already; replace it (PUT), or choose another name")
            if _is_gone(self._root / inner):
                raise PromptError(f"'{name}' cannot be loaded: there is no '{path}' in the folder of prompts")
            try:
                new = self._read(name, self._root / inner)
            except StoppedError:
                raise
            except PTuningError as error:
                raise PromptError(f"'{name}' cannot be loaded: {self._message(error)}") from error
            self._publish(name, new)
            return new

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
            try:
                listed = [] if self._root is None else list(prompts_in(self._root))
            except OSError as error:
                raise file_error("read", Path(str(self._root)), error) from error
            folders = {self.path_of(folder): folder for folder in listed} | self._named
            changes: dict[str, list[str]] = {"added": [], "changed": [], "removed": []}
            failures: dict[str, str] = {}
            for name in sorted({*folders, *self.served}):
                try:
                    change = self._reload_one(name, folders.get(name))
                    if change is not None:
                        changes[change].append(name)
                except StoppedError:
                    raise
                except Exception as error:  # noqa: BLE001 - one broken prompt must not keep the others out
                    failures[name if name.isprintable() else ascii(name)[1:-1]] = self._message(error)
            self.failures = failures
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
        old = self.served.get(self._allowed(name))
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

    def _publish(self, name: str, new: Served | None) -> None:
        others = {other: served for other, served in self.served.items() if other != name}
        self.served = others if new is None else {**self.served, name: new}
        self.failures = {other: message for other, message in self.failures.items() if other != name}

    def path_of(self, folder: Path) -> str:
        """Return a prompt's path in the folder of prompts; of one from elsewhere, only its folder's name."""
        is_inside = self._root is not None and self._root in folder.parents
        return folder.relative_to(str(self._root)).as_posix() if is_inside else folder.name

    def _allowed(self, name: str) -> str:
        if not _is_name(name, NAME_PARTS):
            message = f"a prompt cannot have the name {cut(repr(name))}; names have {NAME_RULE}"
            raise RefusedNameError(message, param="name")
        if name.casefold() == self.base_name.casefold():
            raise RefusedNameError(f"'{name}' is the name of the base model; choose another one", param="name")
        return name

    def _read(self, name: str, folder: Path) -> Served:
        """Read and check a prompt; links, sizes and weights are checked before vectors are read."""
        manifest = manifest_of(folder)
        vectors = manifest.with_name(VECTORS_FILE)
        if self._named.get(name) != folder:
            root = os.path.realpath(str(self._root))
            for path in (folder, manifest, vectors):
                if os.path.commonpath((root, os.path.realpath(path))) != root:
                    message = "is a link out of the folder of prompts, and is not followed; copy the prompt"
                    raise FileError(f"{path} {message}")
        for _ in range(ATTEMPTS):
            stamp, before = _stamp(folder), read_bytes(manifest, at_most=MAX_MANIFEST_BYTES)
            if os.path.exists(vectors) and os.path.getsize(vectors) > MAX_VECTORS_BYTES:
                limit = f"{MAX_VECTORS_BYTES:,} bytes of a prompt in service"
                raise PromptError(f"{vectors} is larger than the {limit}; it is damaged")
            if read_json(manifest, at_most=MAX_MANIFEST_BYTES).get("weights") is not None:
                raise PromptError(
                    f"{folder} has trained weights of the backbone in it, and one model in memory serves all prompts; "
                    "train its slots alone (train_backbone=none), or use it by itself (ptuning predict)"
                )
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


def _is_name(name: str, max_parts: int) -> bool:
    parts = name.split("/") if len(name) <= max_parts * 129 else []
    return 0 < len(parts) <= max_parts and all(PART.fullmatch(part) for part in parts)


def _is_gone(folder: Path) -> bool:
    """Whether a folder no longer exists; one that cannot be looked at may exist."""
    try:
        folder.lstat()
    except OSError as error:
        return isinstance(error, FileNotFoundError | NotADirectoryError)
    return False


def _stamp(folder: Path) -> tuple[int, ...]:
    stamp: list[int] = []
    for path in itertools.product((folder, folder / PROMPT_FOLDER), (MANIFEST_FILE, VECTORS_FILE)):
        with contextlib.suppress(OSError):
            status = Path(*path).stat()
            stamp += status.st_ino, status.st_size, status.st_mtime_ns
    return tuple(stamp)
