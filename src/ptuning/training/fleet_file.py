"""The file of a fleet: TOML with default settings and a table for each prompt. docs/scale.md describes the keys."""

import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from ptuning.config import Count, TrainConfig
from ptuning.errors import ConfigError, closest
from ptuning.files import FileModel, parse_toml, read_text, validate
from ptuning.training.spec import FleetPrompt, TrainingInputs

# A few lists in one file are a product of thousands of prompts.
MAX_PROMPTS = 10_000
# A key that says which template is learned -> the defaults in [all] that it replaces. Rows and label words of a task go
# with any template; the task's own templates have numbers ("pattern").
RIVALS: Mapping[str, Sequence[str]] = {
    "template": ("manual", "about", "pattern", "chat", "system"),
    "manual": ("template", "about", "pattern", "chat", "system"),
    "pattern": ("template", "manual", "about", "chat", "system"),
    "task": ("template", "manual", "about", "pattern", "chat", "system"),
    "chat": ("template", "manual", "about", "pattern", "task"),
}
# Keys that name files, which may be next to the fleet's file.
PATHS = ("data", "dev", "task")


class _Tables(FileModel, extra="forbid"):
    backbone: str | None = None
    at_once: Count | None = None
    all: dict[str, Any] = Field(default_factory=dict)
    prompt: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class FleetFile:
    """The content of the file. Without a backbone or ``at_once`` the defaults apply."""

    prompts: Sequence[FleetPrompt]
    backbone: str | None = None
    at_once: int | None = None


def read_fleet(path: Path) -> FleetFile:
    """Read the file of a fleet.

    ``[all]`` holds the defaults of every ``[[prompt]]``. A list makes one prompt for each of its values; there are
    :data:`MAX_PROMPTS` at most.

    Raises:
        FileError: If it cannot be read.
        ConfigError: If it is not valid TOML, or a key or value is wrong; names the prompt and the key.
    """
    text = parse_toml(read_text(path, error=ConfigError), where=str(path), error=ConfigError)
    tables = validate(_Tables, text, str(path), error=ConfigError)
    if not tables.prompt:
        raise ConfigError(f"{path} has no prompts; each begins with [[prompt]]")
    if "name" in tables.all:
        raise ConfigError(f"{path}: a name in [all] would be that of every prompt; give each its own")
    prompts: list[FleetPrompt] = []
    for number, table in enumerate(tables.prompt, start=1):
        name = table.get("name")
        if not isinstance(name, str) or not name:
            raise ConfigError(f'{path}: prompt {number} has no name, as in name = "capitals"; it becomes its folder')
        own = {key: value for key, value in table.items() if key != "name"}
        # A prompt that says which template it learns takes no other from [all].
        replaced = RIVALS.get(next((key for key in RIVALS if key in own), ""), ())
        values = {**{key: value for key, value in tables.all.items() if key not in replaced}, **own}
        common = frozenset(TrainConfig.model_fields).intersection(values).difference(own)
        prompts += _prompts(name, values, path, common=common, limit=MAX_PROMPTS - len(prompts))
    backbone = None if tables.backbone is None else _located(tables.backbone, path.parent)
    return FleetFile(prompts, backbone, tables.at_once)


def _prompts(
    name: str, values: Mapping[str, Any], path: Path, *, common: frozenset[str], limit: int
) -> Iterator[FleetPrompt]:
    where = f"{path}: prompt '{name}'"
    known = (*TrainingInputs.model_fields, *TrainConfig.model_fields)
    for key in values:
        if key not in known:
            raise ConfigError(f"{where}: unknown key '{key}'.{closest(key, known)} Known: {', '.join(known)}")
    lists = {key: value for key, value in values.items() if isinstance(value, list)}
    for key, value in lists.items():
        if not value:
            raise ConfigError(f"{where}: '{key}' is an empty list; a list makes one prompt for each of its values")
    count = math.prod(map(len, lists.values()))
    if count > limit:
        raise ConfigError(
            f"{where}: its lists make {count:,} prompts, one for each combination of their values; a fleet has "
            f"{MAX_PROMPTS:,} at most, so shorten the lists or divide the fleet"
        )
    for numbers in itertools.product(*(range(len(value)) for value in lists.values())):
        chosen = {key: value[at] for (key, value), at in zip(lists.items(), numbers, strict=True)}
        suffix = "".join(f"-{key}={_short(chosen[key], at)}" for key, at in zip(lists, numbers, strict=True))
        given = {**values, **chosen}
        settings = {key: value for key, value in given.items() if key in TrainConfig.model_fields}
        inputs = {key: value for key, value in given.items() if key not in settings}
        for key in PATHS:
            if isinstance(inputs.get(key), str):
                inputs[key] = _located(inputs[key], path.parent)
        checked = validate(TrainingInputs, inputs, where, error=ConfigError)
        try:
            spec = checked.spec(TrainConfig.from_json(settings))
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
        yield FleetPrompt(name + suffix, **{**vars(spec), "common": common})


def _short(value: object, at: int) -> str:
    """Return how a prompt's name shows a value of a list: by its number where a folder name forbids the value."""
    text = str(value)
    return text if text.replace(".", "").replace("-", "").isalnum() and len(text) <= 16 else str(at + 1)


def _located(source: str, folder: Path) -> str:
    """Return the path of data next to the fleet's file if it is there, else the source as it is."""
    head, colon, part = source.rpartition(":")
    if os.path.exists(folder / source):  # unlike Path.exists, False for a name that cannot be a path
        return str(folder / source)
    return f"{folder / head}:{part}" if colon and head and os.path.isdir(folder / head) else source
