"""The file of a fleet: TOML with default settings and a table for each prompt. docs/scale.md describes the keys."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ptuning.config import TrainConfig
from ptuning.errors import ConfigError
from ptuning.files import Unchecked, parse_toml, read_text

KEYS = ("backbone", "at_once", "all", "prompt")
# A few lists in one file are a product of thousands of prompts.
MOST_PROMPTS = 10_000
SETTINGS = tuple(TrainConfig.model_fields)


def _label_words(value: Unchecked) -> str | dict[str, tuple[str, ...]]:
    """Return label words as text, or as label -> words; one word alone is a list of one."""
    if isinstance(value.value, str):
        return value.value
    if not isinstance(value.value, dict):
        raise value.wrong("text or a table")
    words = value.table().items()
    return {label: (one.value,) if isinstance(one.value, str) else tuple(one.texts()) for label, one in words}


def _merges(value: Unchecked) -> str | Mapping[str, str]:
    """Return labels that count as others: ``WRONG=RIGHT`` or ``case`` as text, or several as a table."""
    if not isinstance(value.value, str | dict):
        raise value.wrong('text such as "biling=billing" or "case", or a table')
    return value.value if isinstance(value.value, str) else {old: new.text() for old, new in value.table().items()}


# The keys of a prompt besides its settings -> how they are read.
INPUTS: Mapping[str, Callable[[Unchecked], object]] = {
    **dict.fromkeys(("data", "dev", "template", "manual", "about", "task", "system"), Unchecked.text),
    "pattern": Unchecked.whole, "labels": _label_words, "alias_label": _merges, "strict": Unchecked.flag,
    "calibrate": Unchecked.flag, "chat": Unchecked.flag, "fields": Unchecked.mapping,
}  # fmt: skip
# A key that says which template is learned -> the defaults in [all] that it replaces. Rows and label words of a task go
# with any template; the task's own templates have numbers ("pattern").
RIVALS: Mapping[str, Sequence[str]] = {
    "template": ("manual", "about", "pattern", "chat", "system"),
    "manual": ("template", "about", "pattern", "chat", "system"),
    "pattern": ("template", "manual", "about", "chat", "system"),
    "task": ("template", "manual", "about", "pattern", "chat", "system"),
    "chat": ("template", "manual", "about", "pattern", "task"),
}
# Keys that name files, which may be beside the fleet's file.
PATHS = ("data", "dev", "task")


@dataclass(frozen=True)
class FleetEntry:
    """One prompt: its name, the keys of :data:`INPUTS` that are given, and the settings that are given."""

    name: str
    inputs: Mapping[str, object]
    settings: Mapping[str, object]


@dataclass(frozen=True)
class FleetFile:
    """The content of the file. Without a backbone or ``at_once`` the defaults apply."""

    entries: Sequence[FleetEntry]
    backbone: str | None = None
    at_once: int | None = None


def read_fleet(path: Path) -> FleetFile:
    """Read the file of a fleet.

    ``[all]`` holds the defaults of every ``[[prompt]]``. A list makes one prompt for each of its values; there are
    :data:`MOST_PROMPTS` at most.

    Raises:
        FileError: If it cannot be read.
        ConfigError: If it is not valid TOML, or a key or value is wrong; names the prompt and the key.
    """
    file = parse_toml(read_text(path, error=ConfigError), where=str(path), error=ConfigError)
    file.table(known=KEYS)
    common, prompts = file.at("all", {}).table(), file.at("prompt", [])
    if not isinstance(prompts.value, list) or not all(isinstance(one, dict) for one in prompts.value):
        raise file.failure("each prompt begins with [[prompt]]")
    if not prompts.value:
        raise ConfigError(f"{path} names no prompts; each begins with [[prompt]]")
    if "name" in common:
        raise file.failure("a name in [all] would be that of every prompt; give each its own")
    entries: list[FleetEntry] = []
    for number, prompt in enumerate(prompts.items(), start=1):
        name = prompt.at("name").value
        if not isinstance(name, str) or not name:
            raise file.failure(f'prompt {number} has no name, as in name = "capitals"; it becomes its folder')
        own = {key: one.value for key, one in prompt.table().items() if key != "name"}
        defaults = {key: one.value for key, one in common.items() if key not in _replaced(own)}
        given = Unchecked({**defaults, **own}, f"{path}: prompt '{name}'", ConfigError)
        entries += _entries(name, given, path.parent, most=MOST_PROMPTS - len(entries))
    backbone = file.optional("backbone", lambda one: _located(one.text(), path.parent))
    return FleetFile(entries, backbone, file.optional("at_once", lambda one: one.whole(least=1)))


def _replaced(own: Mapping[str, object]) -> Sequence[str]:
    """Return the keys of [all] that a prompt does not take, because it says itself which template it learns."""
    return RIVALS.get(next((key for key in RIVALS if key in own), ""), ())


def _entries(name: str, given: Unchecked, folder: Path, *, most: int) -> Iterator[FleetEntry]:
    table = given.table(known=(*INPUTS, *SETTINGS))
    if "data" not in table:
        raise given.failure('it has no data to learn from, as in data = "train.jsonl"')
    listed = {key: one.items() for key, one in table.items() if isinstance(one.value, list)}
    for key, values in listed.items():
        if not values:
            raise given.failure(f"'{key}' is an empty list; a list makes one prompt for each of its values")
    count = math.prod(map(len, listed.values()))
    if count > most:
        raise given.failure(
            f"its lists make {count:,} prompts, one for each combination of their values; a fleet has {MOST_PROMPTS:,} "
            "at most, so shorten the lists or divide the fleet"
        )
    for numbers in itertools.product(*(range(len(values)) for values in listed.values())):
        chosen = {key: values[at] for (key, values), at in zip(listed.items(), numbers, strict=True)}
        suffix = "".join(f"-{key}={_short(chosen[key].value, at)}" for key, at in zip(listed, numbers, strict=True))
        one = {**table, **chosen}
        inputs = {key: read(one[key]) for key, read in INPUTS.items() if key in one}
        inputs |= {key: _located(str(inputs[key]), folder) for key in PATHS if key in inputs}
        yield FleetEntry(name + suffix, inputs, {key: value.value for key, value in one.items() if key in SETTINGS})


def _short(value: object, at: int) -> str:
    """Return how a prompt's name shows a value of a list: by its number where a folder name forbids the value."""
    text = str(value)
    return text if text.replace(".", "").replace("-", "").isalnum() and len(text) <= 16 else str(at + 1)


def _located(source: str, folder: Path) -> str:
    """Return the path of data beside the fleet's file if it is there, else the source as it is."""
    head, colon, part = source.rpartition(":")
    if os.path.exists(folder / source):  # unlike Path.exists, False for a name that cannot be a path
        return str(folder / source)
    return f"{folder / head}:{part}" if colon and head and os.path.isdir(folder / head) else source
