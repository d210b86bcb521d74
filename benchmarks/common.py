"""What all benchmark scripts share: settings, rounds in random order, spreads, the machine, JSON files. Loads no torch
by itself, so that a script that starts others stays small.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SMOKE_RESULTS = ROOT / "runs" / "bench-smoke"
PACKAGES = ("ptuning", "torch", "transformers", "accelerate", "peft", "numpy")

# What JSON can hold.
Json = object
T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """How the benchmarks are run.

    Args:
        smoke: Whether to run everything in seconds on a tiny random model: shows that scripts work, measures nothing.
        out: Folder of the JSON files.
        backbone: Known name, folder or hub id; the tiny random model in smoke runs.
        dtype: ``auto``, ``float32`` or ``bfloat16``, for all that is compared.
        device: ``auto``, ``cpu``, ``cuda``.
        threads: Threads of torch; None for its own default.
        seed: Of the data and of the order in which contestants run.
        data: Facts for the question of scores instead of the shipped ones, such as LAMA's ``P36.jsonl``.
        manual: The manual template of ``data``.
        sentences: Labelled sentences (fields ``text`` and ``label``) for the question of late slots instead of those
            made of the shipped facts, such as SST-2.
        words: Their label words.
        ending: The words behind them, in front of the label.
    """

    smoke: bool = False
    out: Path = RESULTS
    backbone: str = "smollm2-135m"
    dtype: str = "auto"
    device: str = "auto"
    threads: int | None = None
    seed: int = 0
    data: str | None = None
    manual: str = "The capital of [X] is [Y]"
    sentences: str | None = None
    words: str = "positive=great;negative=terrible"
    ending: str = "All in all, the movie was"

    def pick(self, full: T, tiny: T) -> T:
        """Return a size: the one that measures, or the one that only shows that a script works."""
        return tiny if self.smoke else full

    @property
    def backbone_name(self) -> str:
        """The backbone's name; of a folder its own, without where it lies."""
        return Path(self.backbone).name if Path(self.backbone).is_dir() else self.backbone

    def arguments(self) -> list[str]:
        """Return the command line that gives these settings."""
        named = {"--out": self.out, "--backbone": self.backbone, "--dtype": self.dtype, "--device": self.device}
        named |= {"--threads": self.threads, "--seed": self.seed, "--data": self.data, "--manual": self.manual}
        named |= {"--sentences": self.sentences, "--words": self.words, "--ending": self.ending}
        return [*(["--smoke"] if self.smoke else []), *(f"{key}={value}" for key, value in named.items() if value)]


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of the options of :class:`Settings`."""
    options = argparse.ArgumentParser(description=(description or "").split("\n\n")[0])
    options.add_argument("--smoke", action="store_true", help="tiny sizes and a tiny random model: only shows it works")
    options.add_argument("--out", type=Path, help="folder of the JSON files (default: benchmarks/results)")
    options.add_argument("--backbone", help=f"known name, folder or hub id (default: {Settings.backbone})")
    options.add_argument("--dtype", default=Settings.dtype, help="auto, float32 or bfloat16 (default: %(default)s)")
    options.add_argument("--device", default=Settings.device, help="auto, cpu, cuda (default: %(default)s)")
    options.add_argument("--threads", type=int, help="threads of torch (default: torch's own)")
    options.add_argument("--seed", type=int, default=Settings.seed, help="of data and order (default: %(default)s)")
    options.add_argument("--data", help="facts for time-to-score, such as LAMA's P36.jsonl (default: shipped capitals)")
    options.add_argument("--manual", default=Settings.manual, help="manual template of --data (default: %(default)s)")
    options.add_argument("--sentences", help="labelled sentences for late slots, such as SST-2 (default: of facts)")
    options.add_argument("--words", default=Settings.words, help="label words of --sentences (default: %(default)s)")
    options.add_argument("--ending", default=Settings.ending, help="words behind --sentences (default: %(default)s)")
    return options


def settings_of(options: argparse.Namespace) -> Settings:
    """Return the settings given on the command line."""
    values = {name: value for name, value in vars(options).items() if name in Settings.__dataclass_fields__}
    values["out"] = values["out"] or (SMOKE_RESULTS if values["smoke"] else RESULTS)
    values["out"] = values["out"].resolve()
    for name in ("data", "sentences"):  # scripts run in the project's folder
        if values[name] and Path(values[name]).exists():
            values[name] = str(Path(values[name]).resolve())
    values["backbone"] = values["backbone"] or ("tiny" if values["smoke"] else Settings.backbone)
    return Settings(**values)


def child(script: str, settings: Settings, *options: str) -> Any:
    """Run one of the scripts in a process of its own.

    A smoke run forks this process instead, which spares the seconds of all imports.

    Returns:
        What the last line says that it printed, read as JSON.

    Raises:
        SystemExit: It failed; with what it said.
    """
    words = [*settings.arguments(), *options]
    if settings.smoke:
        code, said, complaints = _forked(script, words)
    else:
        command = [sys.executable, "-m", f"benchmarks.{script}", *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        code, said, complaints = done.returncode, done.stdout, done.stderr
    if code:
        raise SystemExit(f"{script} {' '.join(options)}:\n{complaints}")
    return json.loads(said.splitlines()[-1])


def _forked(script: str, words: Sequence[str]) -> tuple[int, str, str]:
    """Run a script as the main module of a fork; return its exit code, its output and its errors."""
    with tempfile.TemporaryFile("w+b") as out, tempfile.TemporaryFile("w+b") as err:
        sys.stdout.flush()
        sys.stderr.flush()
        process = os.fork()
        if not process:
            code = 1
            try:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                sys.argv = [script, *words]
                runpy.run_module(f"benchmarks.{script}", run_name="__main__", alter_sys=True)
                code = 0
            finally:
                if code:
                    traceback.print_exc()
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    return code, texts[0], texts[1]


def interleave(
    contestants: Mapping[str, Callable[[int], T]], *, repeats: int, seconds: float, seed: int, note: str = ""
) -> dict[str, list[T]]:
    """Run all contestants in rounds, in a new random order each, so that what else the machine does meets all alike.

    Args:
        contestants: Name -> what to run; it is told the number of the round and returns its own measurement.
        repeats: Rounds at most.
        seconds: No further round begins if it would probably end after so many seconds; one is always run.
        seed: Of the orders.
        note: What is measured, for the terminal.

    Returns:
        Name -> one measurement per round.
    """
    order, draw = list(contestants), random.Random(seed)
    found: dict[str, list[T]] = {name: [] for name in contestants}
    began = time.monotonic()
    for number in range(repeats):
        spent = time.monotonic() - began
        if number and spent * (number + 1) / number > seconds:
            break
        draw.shuffle(order)
        for name in order:
            found[name].append(contestants[name](number))
    rounds = len(found[order[0]])
    say(f"  {note}: {rounds} round{'s' if rounds != 1 else ''} in {time.monotonic() - began:.1f} s")
    return found


def spread(values: Sequence[float]) -> dict[str, Json]:
    """Return median, lowest and highest of repeats, and the repeats themselves."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "values": list(values)}


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Divide measurements of the same round, so that a slow minute of the machine touches both."""
    return [one / other for one, other in zip(over, under, strict=True)]


def answer(values: Sequence[float], note: str = "") -> dict[str, Json]:
    """Return an entry of ``summary.json``: the median of repeats with the lowest and the highest."""
    rounds = f"{len(values)} round{'s' if len(values) != 1 else ''}"
    return {
        "measured": statistics.median(values),
        "low": min(values),
        "high": max(values),
        "note": f"{note}; {rounds}" if note else rounds,
    }


def no_answer(reason: str) -> dict[str, Json]:
    """Return the entry of a question that this run cannot answer."""
    return {"measured": None, "low": None, "high": None, "note": reason}


def write_result(
    settings: Settings,
    name: str,
    *,
    question: str,
    cells: Sequence[Mapping[str, Json]],
    answers: Mapping[str, Mapping[str, Json]],
    method: str,
    seconds: float,
    peer: str | None = None,
) -> None:
    """Write what one script found as ``NAME.json``.

    Args:
        settings: How it was run.
        name: Of the script.
        question: What it asks, in words.
        cells: What was measured, a flat row each.
        answers: Entries for ``summary.json``, by their names there.
        method: How it was measured, in words.
        seconds: How long all of it took.
        peer: The settings of the peer, in words, where it was trained.
    """
    write_json(
        settings.out / f"{name}.json",
        {
            "name": name,
            "question": question,
            "method": method,
            "peer": peer,
            "smoke": settings.smoke,
            "written": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "seconds": seconds,
            "machine": machine(),
            "versions": versions(),
            "settings": {key: value for key, value in asdict(settings).items() if key not in ("out", "smoke")}
            # Names, not the places where they lie on this machine.
            | {"backbone": settings.backbone_name}
            | {key: Path(file).name for key in ("data", "sentences") if (file := getattr(settings, key))},
            "cells": list(cells),
            "answers": dict(answers),
        },
    )
    say(f"{name}: {seconds:.0f} s")


def write_json(path: Path, value: Json) -> None:
    """Write JSON whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def machine() -> dict[str, Json]:
    """Describe the machine; of a GPU and of threads only what a loaded torch says."""
    import psutil

    found: dict[str, Json] = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "load_at_the_end": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "gpu": None,
    }
    torch = sys.modules.get("torch")
    if torch is not None:
        found["threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            found["gpu"] = torch.cuda.get_device_name()
    return found


def versions() -> dict[str, str | None]:
    """Return the versions of Python and of what is compared."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or "unknown"


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)
