"""Files of others survive every command that writes, whatever lies in its folder: they are left alone, or the command
is refused.
"""

import contextlib
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ptuning.backbone.backbone import Backbone
from ptuning.config import TrainConfig
from ptuning.errors import FileError, PTuningError
from ptuning.experiment.compare import compare
from ptuning.experiment.suites import lama
from ptuning.files import new_path
from ptuning.names import COMPARISON, PROMPT, RUN, check_writable, fleet_layout, remove, remove_stale, scan_folder
from ptuning.progress import Interrupted
from ptuning.prompt.prompt import Prompt
from ptuning.records import Record
from ptuning.report.results_file import Cell
from ptuning.report.write import write_report
from ptuning.training.fleet import train_fleet
from ptuning.training.run import train
from ptuning.training.spec import FleetPrompt
from tests.conftest import learned

ROWS: list[Record] = [{"x": f"city {index}", "y": ("yes", "no")[index % 2]} for index in range(4)]
TEMPLATE = "[P] [X] [P:is] [Y]"
FAST = TrainConfig(epochs=1, batch_size=4, encoder="none")
# What somebody may keep in a folder, under names that are near ours, or ours.
NAMES = (
    "thesis.tex", "README.md", "run.json", "predictions.jsonl", "results.json", "report.md", "report.html",
    "fleet.json", "prompt.json", "prompt.safetensors", "prompt/llama.txt", "prompt/README.md", "prompt/prompt.json",
    "prompt/backbone/config.json", "checkpoint/llama-step-1000/model.safetensors", "checkpoint/state.safetensors",
    "checkpoint/best-model.safetensors", "checkpoint/best-0.safetensors", "checkpoint/at-0/0/state.safetensors",
    "checkpoint/start-1/notes", "backbone/config.json", "pictures/dots.svg", "pictures/holiday.svg",
    "cells/notes.md", "cells/task/manual/seed-0/thesis.tex", "cells/task/manual/seed-0/run.json",
    "cells/task/manual/seed-0/try-1/prompt/mine", "fleets/p-tuning-seed-0/at-0/mine", "a/prompt/mine", "a/run.json",
    ".run.json.12.tmp", ".run.json.backup.old", ".prompts.old/mine", ".prompt.abc.tmp/mine",
)  # fmt: skip
# Folders and files of ours that are links to something else.
LINKS = (
    "prompt", "checkpoint", "cells", "pictures", "fleets", "a", "log", "run.json", "report.html", "prompt/backbone",
    "prompt/prompt.json", "cells/task", "checkpoint/start-1",
)  # fmt: skip


def write_foreign(folder: Path, chance: random.Random, outside: Path) -> list[Path]:
    """Write some files of others, and links to what is outside, as far as there is place for them; return them."""
    made = []
    for name in chance.sample(NAMES, chance.randint(1, 4)):
        path = folder / name
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            if not os.path.lexists(path):
                path.write_text(f"mine: {name}", encoding="utf-8")
                made.append(path)
    for name in chance.sample(LINKS, chance.randint(0, 1)):
        path = folder / name
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            if not os.path.lexists(path):
                path.symlink_to(outside if "." not in path.name else outside / "thesis.tex")
                made.append(path)
    return made


def state(paths: list[Path]) -> dict[Path, object]:
    """What is at these paths: where a link points to, or the content of a file."""
    return {
        path: os.readlink(path) if path.is_symlink() else path.read_bytes() for path in paths if os.path.lexists(path)
    }


def inside(folder: Path) -> dict[Path, object]:
    return state([path for path in folder.rglob("*") if not path.is_dir()])


Command = Callable[[Backbone, Path], object]


def prompts() -> list[FleetPrompt]:
    return [FleetPrompt("a", TEMPLATE, ROWS, ROWS, config=FAST)]


def compared(backbone: Backbone, out: Path, **options: Any) -> object:
    methods = options.pop("methods", ["manual"])
    return compare(
        ROWS,
        dev=ROWS,
        test=ROWS,
        manual="[X] is [Y]",
        backbone=backbone,
        out=out,
        methods=methods,
        config=FAST,
        **options,
    )


COMMANDS: dict[str, Command] = {
    "save": lambda backbone, out: learned(backbone, TEMPLATE).save(out),
    "save, overwrite": lambda backbone, out: learned(backbone, TEMPLATE).save(out, overwrite=True),
    "train": lambda backbone, out: train(TEMPLATE, ROWS, dev=ROWS, backbone=backbone, out=out, config=FAST),
    "train, resume": lambda backbone, out: train(
        TEMPLATE, ROWS, dev=ROWS, backbone=backbone, out=out, config=FAST, resume=True
    ),
    "train, overwrite": lambda backbone, out: train(
        TEMPLATE, ROWS, dev=ROWS, backbone=backbone, out=out, config=FAST, overwrite=True
    ),
    "fleet, resume": lambda backbone, out: train_fleet(prompts(), backbone=backbone, out=out, resume=True),
    "fleet, overwrite": lambda backbone, out: train_fleet(prompts(), backbone=backbone, out=out, overwrite=True),
    "compare": lambda backbone, out: compared(backbone, out),
    "compare, overwrite": lambda backbone, out: compared(backbone, out, overwrite=True, seeds=2),
    "report": lambda _, out: write_report(out),
}


@pytest.fixture(scope="module")
def started(
    loaded: Callable[[str], Backbone], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Path, str], object]:
    """Fill a folder with what a command of ours leaves: nothing, a prompt, a run, a stopped run, a comparison."""
    import shutil

    root, backbone = tmp_path_factory.mktemp("started"), loaded("llama")
    (root / "nothing").mkdir()
    learned(backbone, TEMPLATE).save(root / "prompt")
    COMMANDS["train"](backbone, root / "run")
    with pytest.raises(Interrupted):
        train(TEMPLATE, ROWS, dev=ROWS, backbone=backbone, out=root / "stopped", config=FAST, should_stop=lambda: True)
    new_path(root / "stopped" / "run.json").touch()
    COMMANDS["compare"](backbone, root / "comparison")
    return lambda folder, what: shutil.copytree(root / what, folder, symlinks=True)


@pytest.mark.parametrize("seed", range(40))
def test_what_others_wrote_survives_every_command(
    loaded: Callable[[str], Backbone], started: Callable[[Path, str], None], tmp_path: Path, seed: int
) -> None:
    """Seeded draws of what is there, of foreign files and links among it, and of two commands in a row."""
    chance = random.Random(seed)
    outside, out = tmp_path / "outside", tmp_path / "out"
    started(outside, chance.choice(["run", "prompt", "stopped"]))  # ours, and behind a link it is not ours to change
    (outside / "thesis.tex").write_text("years of work", encoding="utf-8")
    started(out, chance.choice(["nothing", "prompt", "run", "stopped", "comparison"]))
    before_outside, foreign = inside(outside), write_foreign(out, chance, outside)
    before = state(foreign)
    assert foreign
    for _ in range(2):
        command = chance.choice(sorted(COMMANDS))
        with contextlib.suppress(PTuningError):
            COMMANDS[command](loaded("llama"), out)
        assert state(foreign) == before, command
        assert inside(outside) == before_outside, command


@pytest.mark.parametrize(
    ("command", "owned"),
    [
        ("save", PROMPT), ("train", RUN), ("compare", COMPARISON), ("fleet, overwrite", fleet_layout(["a"])),
    ],
)  # fmt: skip
def test_all_that_we_write_is_known_to_be_ours(causal: Backbone, tmp_path: Path, command: str, owned: Any) -> None:
    """A file that cannot be told from others' could never be replaced, and its folder never be used again."""
    COMMANDS[command](causal, tmp_path / "out")
    found = scan_folder(tmp_path / "out", owned)
    assert found.foreign == found.temporary == []
    assert sorted(found.ours) == sorted(path for path in (tmp_path / "out").rglob("*") if path.is_file())
    remove(tmp_path / "out", owned)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("train_backbone", ["lora", "full"])
def test_trained_weights_are_known_to_be_ours(causal: Backbone, tmp_path: Path, train_backbone: Any) -> None:
    """While they are trained and when they are saved; by the prompt's manifest, since their files do not say it."""
    config = TrainConfig(epochs=2, batch_size=2, encoder="none", train_backbone=train_backbone, checkpoint_seconds=0.0)
    asked = iter([False, False, True])
    with pytest.raises(Interrupted):
        train(
            TEMPLATE, ROWS, dev=ROWS, backbone=causal, out=tmp_path / "a", config=config,
            should_stop=lambda: next(asked, True),
        )  # fmt: skip
    train(TEMPLATE, ROWS, dev=ROWS, backbone=causal, out=tmp_path / "b", config=config)
    for name in ("a", "b"):
        found = scan_folder(tmp_path / name, RUN)
        assert found.foreign == []
        assert found.ours
    (tmp_path / "b/prompt/backbone/mine").touch()
    with pytest.raises(FileError, match=r"backbone/mine is in the way"):
        check_writable(tmp_path / "b", RUN, overwrite=True)


def test_resuming_is_no_consent_to_overwrite(causal: Backbone, tmp_path: Path) -> None:
    """A fleet used to remove all of a folder `checkpoint` in a folder where no fleet ever ran, and a run, too."""
    (tmp_path / "checkpoint/llama").mkdir(parents=True)
    (tmp_path / "checkpoint/llama/model.safetensors").write_bytes(b"months of work")
    for command in ("train, resume", "fleet, resume"):
        with pytest.raises(FileError, match="exists and is not empty"):
            COMMANDS[command](causal, tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["checkpoint", "llama", "model.safetensors"]


def test_only_names_of_exactly_our_form_are_swept(tmp_path: Path) -> None:
    mine = [".run.json.12.tmp", ".run.json.backup.old", ".prompts.old", ".run.json.0123456789abcdef.tmp.bak"]
    for name in mine:
        (tmp_path / name).touch()
    new_path(tmp_path / "run.json").touch()
    (tmp_path / ".run.json.0123456789abcdef.tmp").symlink_to(tmp_path / ".prompts.old")
    remove_stale(tmp_path, RUN)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*mine, ".run.json.0123456789abcdef.tmp"])


@pytest.mark.parametrize("name", ["../../../up", "a/b", "..", "", "a\\b", "a\0b", "x" * 101])
def test_no_name_from_data_leads_out_of_the_output_folder(causal: Backbone, tmp_path: Path, name: str) -> None:
    """A row's `predicate_id` used to decide where results were written and what `--overwrite` removed."""
    with pytest.raises(FileError, match="cannot be the name of a task or a method"):
        _ = Cell(name, "manual", 0).folder
    if not name:
        return  # a row that names no relation is one of the file's
    rows = [
        {"sub_label": f"Kenya {i}", "obj_label": "yes", "predicate_id": relation, "template": "[X] is [Y]"}
        for i in range(9)
        for relation in ("P36", name)
    ]
    import json

    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(PTuningError):
        lama(tmp_path / "facts.jsonl", backbone=causal, out=tmp_path / "in/out", methods=["majority"], targets="any")
    assert [path.name for path in tmp_path.rglob("*")] == ["facts.jsonl"]


def test_a_comparison_killed_in_its_first_write_goes_on(causal: Backbone, tmp_path: Path) -> None:
    """It was refused: the folder held files, and no results. What a kill left in finished cells goes as well."""
    new_path(tmp_path / "results.json").touch()
    compared(causal, tmp_path)
    cell = tmp_path / "cells/task/manual/seed-0"
    left = [cell / "started.json", new_path(cell / "run.json"), new_path(tmp_path / "report.md")]
    for path in left:
        path.write_text('{"identity": {}}', encoding="utf-8")
    compared(causal, tmp_path)
    assert [path for path in left if path.exists()] == []


def test_a_checkpoint_left_by_a_kill_after_the_record_goes(causal: Backbone, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(TEMPLATE, ROWS, dev=ROWS, backbone=causal, out=tmp_path / "a", config=FAST, should_stop=lambda: True)
    COMMANDS["train"](causal, tmp_path / "b")
    (tmp_path / "a/checkpoint").rename(tmp_path / "b/checkpoint")
    COMMANDS["train, resume"](causal, tmp_path / "b")
    assert not (tmp_path / "b/checkpoint").exists()


def test_an_output_folder_may_itself_be_a_link(causal: Backbone, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    COMMANDS["train"](causal, tmp_path / "out")
    COMMANDS["train, overwrite"](causal, tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    assert Prompt.load(tmp_path / "disk").slots == 2
