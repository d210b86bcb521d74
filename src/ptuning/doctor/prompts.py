"""Prompts: whether files are whole and vectors sound, whether they fit a backbone, and what they can be exported as."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.sources import LoadOptions
from ptuning.doctor.checks import Check, Group
from ptuning.errors import ConfigError, ExchangeError, PTuningError
from ptuning.exchange.export import FORMS, check_exportable
from ptuning.exchange.rows import made_record
from ptuning.names import MANIFEST_FILE, PROMPT_FOLDER
from ptuning.prompt.prompt import Prompt
from ptuning.prompt.sharing import find_prompt
from ptuning.prompt.storage import Stored, has_prompt, prompt_folders, read_prompt
from ptuning.template.fill import BoundTemplate

# The norm of a slot beside the mean norm of a token. 28 prompts that were trained on the default backbone have 0.6 to
# 1.2; virtual tokens of PEFT with a high learning rate have several times as much.
SMALLEST_NORM, LARGEST_NORM = 0.1, 10.0
NAME_A_PROMPT = "name the folder of a prompt, of its training run, or of many prompts"
COPY_AGAIN = "copy the whole folder again, or train the prompt again"


@dataclass(frozen=True, eq=False)
class ReadPrompt:
    """A prompt that was asked for: its name and the place of its folder, what was found in its files, and the prompt
    itself if they are sound.
    """

    name: str
    place: str
    checks: Sequence[Check]
    prompt: Prompt | None = None

    @property
    def group(self) -> Group:
        """The group of its checks."""
        return Group(f"prompt {self.name}")


def read_prompts(asked: Iterable[str]) -> list[ReadPrompt]:
    """Read prompts by their folders, or by a folder of such folders; a ConfigError for what has no files."""
    places: list[tuple[str, str]] = []
    for source in asked:
        if source.startswith("manual:"):
            raise ConfigError(f"'{source}' has no files that could be damaged; name folders of prompts")
        places += _named(source)
    names = [name for name, _ in places]
    return [_read(name if names.count(name) == 1 else place, place) for name, place in places]


def _named(source: str) -> list[tuple[str, str]]:
    """Return (name, place) of a prompt, or of every prompt in a folder of prompts."""
    folder = Path(source)
    if os.path.isdir(source) and not has_prompt(folder):
        with contextlib.suppress(OSError):
            found = list(prompt_folders(folder))
            if found:
                return [(one.relative_to(folder).as_posix(), str(one)) for one in found]
    path = Path(os.path.abspath(source))
    own = path.parent.name if path.name == PROMPT_FOLDER else path.name
    return [(own or source, source)]


def _read(name: str, place: str) -> ReadPrompt:
    group = Group(f"prompt {name}")
    try:
        stored = read_prompt(find_prompt(place, LoadOptions()))
    except PTuningError as error:
        remedy = COPY_AGAIN if has_prompt(Path(place)) else NAME_A_PROMPT
        return ReadPrompt(name, place, [group.failed("files", error, remedy)])
    checks = [group.ok("files", _files(stored, place))]
    vectors = stored.vectors
    if vectors is not None and vectors.dtype == torch.float32:  # another type is a fault that the prompt itself finds
        wrong = (~vectors.isfinite()).any(dim=1).nonzero()[:, 0].tolist()
        if wrong:
            found = f"NaN or infinity in slot {wrong[0] + 1} of {len(vectors)}, so every answer is NaN"
            remedy = "train the prompt again with a lower learning rate, or in float32"
            return ReadPrompt(name, place, [*checks, group.failed("vectors", found, remedy)])
        checks.append(group.ok("vectors", f"{len(vectors)} slots, {vectors.shape[1]} wide, all finite"))
    try:
        prompt = Prompt.from_stored(stored)
    except PTuningError as error:
        return ReadPrompt(name, place, [*checks, group.failed(MANIFEST_FILE, error, COPY_AGAIN)])
    checks.append(group.ok(MANIFEST_FILE, f"template {prompt.template}"))
    return ReadPrompt(name, place, checks, prompt)


def _files(stored: Stored, place: str) -> str:
    manifest = stored.manifest
    about = manifest.get("weights")
    hashed = about["sha256"] if stored.weights is not None and isinstance(about, Mapping) else {}
    sums = [str(manifest["vectors_sha256"]), *cast("Mapping[str, str]", hashed).values()]
    found = ", ".join(one[:12] for one in sums)
    return f"{place}: format {manifest['format_version']}, sha256 {found} as {MANIFEST_FILE} says"


def check_fit(read: ReadPrompt, backbone: Backbone) -> Iterator[Check]:
    """Look whether a prompt belongs to a backbone, and what its tokenizer makes of it."""
    prompt, group = read.prompt, read.group
    if prompt is None:
        return
    own = prompt.backbone
    try:
        adapted = prompt.adapt(backbone)
        bound = prompt.bind(adapted)
    except PTuningError as error:
        if own is not None and own.fingerprint != backbone.fingerprint:
            found = f"learned on {own.described} ({own.fingerprint}), and this is {backbone.name}"
            remedy = f"look at it with its own: ptuning doctor {read.place} --backbone {own.name}"
            yield group.failed("backbone", f"{found} ({backbone.fingerprint})", remedy)
        else:
            remedy = "take the tokenizer that it was trained with, or train it again"
            yield group.failed("tokenizer", error, remedy)
        return
    yield group.ok("backbone", "any: it has no slots" if own is None else f"this one ({own.fingerprint})")
    deep = (
        "" if prompt.deep is None else f", {prompt.deep.count} deep slots in {prompt.deep.to_json()['layers']} layers"
    )
    yield group.ok("tokenizer", f"{bound.slots} slots, as it has vectors{deep}")
    if prompt.slots:
        yield _norms(prompt, group, backbone)
    yield _answers(prompt, group, bound)


def _norms(prompt: Prompt, group: Group, backbone: Backbone) -> Check:
    assert prompt.slot_vectors is not None
    ratios = prompt.slot_vectors.norm(dim=-1) / backbone.table_statistics.norm  # (P,)
    least, most = float(ratios.min()), float(ratios.max())
    found = f"{least:.2f} to {most:.2f} times the mean norm of a token"
    if least < SMALLEST_NORM or most > LARGEST_NORM:
        usual = f"{SMALLEST_NORM:g} to {LARGEST_NORM:g} is usual"
        return group.warning("norm", found, f"{usual}: score it (ptuning eval), or train it with a lower learning rate")
    return group.ok("norm", found)


def _answers(prompt: Prompt, group: Group, bound: BoundTemplate) -> Check:
    words = prompt.label_words
    if words is None:
        if prompt.answer_space.has_choices:
            return group.ok("answers", "the choices that each row brings")
        return group.ok("answers", f"written; the longest target had {prompt.target_tokens} tokens")
    try:
        with torch.no_grad():
            lines = words.check_known(words.examples(bound, made_record(prompt)[0]))
    except PTuningError as error:
        return group.failed("answers", error, "train it again with other label words (--labels)")
    count = len(words.labels)
    return group.ok("answers", f"{count} labels with {len(lines)} words, which the tokenizer knows and tells apart")


def check_exports(read: ReadPrompt) -> Iterator[Check]:
    """Look in which forms of other programs a prompt can be written, as far as the prompt alone decides it."""
    prompt, group = read.prompt, read.group
    if prompt is None:
        return
    can: list[str] = []
    cannot: dict[str, list[str]] = {}
    for kind in FORMS:
        try:
            check_exportable(prompt, kind)
            can.append(kind)
        except ExchangeError as error:
            cannot.setdefault(str(error), []).append(kind)
    if can:
        yield group.ok("exports", f"ptuning export {read.place} --as {'|'.join(can)}")
    for why, kinds in cannot.items():
        yield group.ok(f"not as {', '.join(kinds)}", why) if can else group.ok("exports", f"none: {why}")
