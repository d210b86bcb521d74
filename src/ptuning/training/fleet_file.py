"""The file that names the prompts of a fleet: TOML with defaults and a table per prompt. Reads no data and no model.

docs/fleets.md says what each key means.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import cast

from ptuning.config import TrainConfig
from ptuning.errors import ConfigError, closest
from ptuning.files import read_bytes

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KEYS = ("backbone", "at_once", "all", "prompt")
SETTINGS = tuple(item.name for item in fields(TrainConfig))
# What a prompt is given besides its settings, and what that must be.
INPUTS: Mapping[str, tuple[type, ...]] = {
    "data": (str,), "dev": (str,), "template": (str,), "manual": (str,), "about": (str,), "task": (str,),
    "pattern": (int,), "labels": (str, dict), "calibrate": (bool,), "fields": (dict,),
}  # fmt: skip
# What says which template is learned -> the defaults that this takes the place of. A task's rows and label words go
# with any template; its own template has a number.
RIVALS: Mapping[str, Sequence[str]] = {
    "template": ("manual", "about", "pattern"),
    "manual": ("template", "about", "pattern"),
    "pattern": ("template", "manual", "about"),
    "task": ("template", "manual", "about", "pattern"),
}
# These name files, which may stand beside the fleet's.
PATHS = ("data", "dev", "task")
TYPE_NAMES: Mapping[type, str] = {str: "text", int: "a whole number", bool: "true or false", dict: "a table"}


@dataclass(frozen=True)
class Entry:
    """One prompt as the file asks for it.

    Args:
        name: Its name.
        inputs: Key of :data:`INPUTS` -> value, those that are given.
        settings: Of :class:`~ptuning.config.TrainConfig`, those that are given.
    """

    name: str
    inputs: Mapping[str, object]
    settings: Mapping[str, object]


@dataclass(frozen=True)
class FleetFile:
    """What the file says.

    Args:
        entries: The prompts, in their order.
        backbone: The backbone, or None for the default one.
        at_once: How many are in training at the same time, or None for the default.
    """

    entries: Sequence[Entry]
    backbone: str | None = None
    at_once: int | None = None


def read_fleet(path: Path) -> FleetFile:
    """Read the file of a fleet.

    Each ``[[prompt]]`` is given what stands in ``[all]`` unless it says otherwise. A list makes one prompt for each of
    its values.

    Raises:
        FileError: If it cannot be read.
        ConfigError: If it is no TOML, or a key or a value is not what it must be; names the prompt and the key.
    """
    try:
        found = tomllib.loads(read_bytes(path).decode("utf-8-sig"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} is no TOML: {error}") from error
    for key in found:
        if key not in KEYS:
            raise ConfigError(f"{path}: unknown key '{key}'.{closest(key, KEYS)} Known: {', '.join(KEYS)}")
    backbone, at_once = found.get("backbone"), found.get("at_once")
    if backbone is not None and not isinstance(backbone, str):
        raise ConfigError(f"{path}: backbone is {backbone!r}; it must be text")
    if at_once is not None and (not isinstance(at_once, int) or isinstance(at_once, bool) or at_once < 1):
        raise ConfigError(f"{path}: at_once is {at_once!r}; it must be a whole number from 1")
    common, prompts = found.get("all", {}), found.get("prompt", [])
    if not isinstance(common, dict) or not isinstance(prompts, list) or not all(isinstance(p, dict) for p in prompts):
        raise ConfigError(f"{path}: [all] is a table, and each prompt begins with [[prompt]]")
    if not prompts:
        raise ConfigError(f"{path} names no prompts; each begins with [[prompt]]")
    entries: list[Entry] = []
    for number, prompt in enumerate(prompts, start=1):
        where = f"{path}: prompt {number}"
        name = prompt.get("name")
        if not isinstance(name, str) or not name:
            raise ConfigError(f'{where} has no name, as in name = "capitals"; it becomes its folder')
        if "name" in common:
            raise ConfigError(f"{path}: a name in [all] would be that of every prompt; give each its own")
        given = {**_without_rivals(common, prompt), **{key: value for key, value in prompt.items() if key != "name"}}
        entries += _entries(name, given, path.parent, where=f"{path}: prompt '{name}'")
    located = None if backbone is None else _located(backbone, path.parent)
    return FleetFile(entries, located, at_once)


def _without_rivals(common: Mapping[str, object], prompt: Mapping[str, object]) -> dict[str, object]:
    """Return the defaults that a prompt takes: where it says what template it learns, no other one comes from there."""
    own = next((key for key in RIVALS if key in prompt), None)
    dropped = RIVALS[own] if own is not None else ()
    return {key: value for key, value in common.items() if key not in dropped}


def _entries(name: str, given: Mapping[str, object], folder: Path, *, where: str) -> Iterator[Entry]:
    """Yield the prompts of one table: several if a value is a list."""
    known = (*INPUTS, *SETTINGS)
    for key in given:
        if key not in known:
            raise ConfigError(f"{where}: unknown key '{key}'.{closest(key, known)} Known: name, {', '.join(known)}")
    if "data" not in given:
        raise ConfigError(f'{where} has no data to learn from, as in data = "train.jsonl"')
    listed = {key: cast("list[object]", value) for key, value in given.items() if isinstance(value, list)}
    for key, values in listed.items():
        if not values:
            raise ConfigError(f"{where}: {key} is an empty list; it makes one prompt for each value")
    for numbers in itertools.product(*(range(len(values)) for values in listed.values())):
        chosen = {key: values[at] for (key, values), at in zip(listed.items(), numbers, strict=True)}
        suffix = "".join(f"-{key}={_short(chosen[key], at)}" for key, at in zip(listed, numbers, strict=True))
        one = {**given, **chosen}
        for key, kinds in INPUTS.items():
            _check(one, key, kinds, where)
        inputs = {key: one[key] for key in INPUTS if key in one}
        inputs |= {key: _located(cast("str", inputs[key]), folder) for key in PATHS if key in inputs}
        yield Entry(name + suffix, inputs, {key: value for key, value in one.items() if key in SETTINGS})


def _check(values: Mapping[str, object], key: str, kinds: Sequence[type], where: str) -> None:
    """Check a value's type; true is no whole number."""
    value = values.get(key)
    if key in values and (not isinstance(value, tuple(kinds)) or (isinstance(value, bool) and bool not in kinds)):
        allowed = " or ".join(TYPE_NAMES[kind] for kind in kinds)
        raise ConfigError(f"{where}: {key} is {value!r}; it must be {allowed}")


def _short(value: object, at: int) -> str:
    """Return what a value of a list is called in a prompt's name: itself, if it can stand in the name of a folder."""
    text = str(value)
    return text if text.replace(".", "").replace("-", "").isalnum() and len(text) <= 16 else str(at + 1)


def _located(source: str, folder: Path) -> str:
    """Return where data lies: beside the fleet's file if it is there, else what it names by itself."""
    head, colon, part = source.rpartition(":")
    if (folder / source).exists():
        return str(folder / source)
    return f"{folder / head}:{part}" if colon and head and (folder / head).is_dir() else source
