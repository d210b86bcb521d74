"""Turn results of comparisons into docs/deep.json, and the tables of docs/evidence/deep.md and one of paper.md there.

Usage: python scripts/deep.py [--called PATH=NAME ...] [FOLDER ...]

Each folder holds one comparison (`ptuning compare`, `lama`, `superglue`), and its name is the run's name in the file
and on the page. Runs that are not given stay as they are in docs/deep.json. ``--called`` says what a path in the
recorded command is called on the page. Without folders, the tables are made again from docs/deep.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lama import values
from pages import fill, read_figures, write_figures
from ptuning.metrics import called
from ptuning.names import LEARNED
from ptuning.statistics import mean_difference, mean_score

DOCS = Path(__file__).resolve().parents[1] / "docs"
FIGURES, PAGE, PAPER = DOCS / "deep.json", DOCS / "evidence" / "deep.md", DOCS / "evidence" / "paper.md"
# Metrics whose values are shares; the others are shown with one decimal.
LARGE = ("bleu", "bleu-lc", "chrf")
# Metrics that say the same as another one in a table.
LEFT_OUT = ("exact_match", "p_at_10", "score")
KEPT = ("value", "low", "high", "n", "std", "seeds")
# The kind of prompt that the table of LAMA's relations compares with the others.
BEST = "hybrid"
# Share of P-tuning's best development score that has to be reached, of the goal about time.
ENOUGH = 0.95


def main(folders: Sequence[Path], names: Mapping[str, str]) -> None:
    """Write the figures, if results are given, then the tables."""
    known: dict[str, Any] = read_figures(FIGURES) if FIGURES.exists() else {}
    if folders:
        runs = {**known.get("runs", {}), **{one.name: summary(one, names) for one in folders}}
        known = {"goals": goals(runs), "runs": dict(sorted(runs.items()))}
        write_figures(FIGURES, known)
    for page in (PAGE, PAPER):
        fill(page, "deep", tables(known["runs"]))


def summary(folder: Path, names: Mapping[str, str]) -> dict[str, Any]:
    """Return the command of a comparison, its scores and paired differences, and the course of its trainings."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    command = results["command"]
    for path, name in names.items():
        command = command.replace(path, name)
    return {
        "command": command,
        "dtype": results["backbone"]["dtype"],
        "deep_lr": results["settings"].get("deep_lr"),
        "scores": {task: {name: short(one) for name, one in found.items()} for task, found in results["tasks"].items()},
        "macro": {name: short(one) for name, one in results["macro"].items()},
        "differences": {name: short(one) for name, one in results["differences"].items()},
        "courses": dict(courses(folder, results["cells"])),
        "by": {
            value: {name: short(one) for name, one in found.items()}
            for value, found in results.get("by_value", {}).items()
        },
    }


def short(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return metric -> its value, interval, n and seeds."""
    return {
        name: {key: round(one[key], 4) if isinstance(one[key], float) else one[key] for key in KEPT if key in one}
        for name, one in metrics.items()
    }


def courses(folder: Path, cells: Iterable[Mapping[str, Any]]) -> Iterable[tuple[str, dict[str, Any]]]:
    """Yield the name of each trained cell, and its development score and loss at the start and after each epoch."""
    for cell in cells:
        path = folder / cell["run"] / "run.json"
        record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if "history" not in record:
            continue
        yield (
            f"{cell['task']}/{cell['method']}/{cell['seed']}",
            {
                "scores": [round(one["dev_score"], 4) for one in (record["start"], *record["history"])],
                "losses": [round(one["dev_loss"], 4) for one in (record["start"], *record["history"])],
                "seconds": [round(one["seconds"], 2) for one in record["history"]],
                "chosen": record["chosen_epoch"],
                "test": {name: round(value, 4) for name, value in cell["scores"].items()},
            },
        )


def tables(runs: Mapping[str, Any]) -> dict[str, str]:
    """Return name on the page -> table: the scores of each run, and what some goals ask of several."""
    made = {name.replace("-", "_"): scores_of(run) for name, run in runs.items()}
    special: Mapping[str, tuple[Sequence[str], Callable[..., str]]] = {
        "differences": (("relations",), differences),
        "spread": (("draws",), spread),
        "seconds": (("time", "draws"), time_to_enough),
        "digits": (("arithmetic",), digits),
        "digits_tuned": (("arithmetic-tuned",), digits),
        "encoders": (("words", "random"), encoders),
    }
    made["goals"] = of_goals(goals(runs))
    return made | {
        name: make(*(runs[one] for one in needed))
        for name, (needed, make) in special.items()
        if all(one in runs for one in needed)
    }


@dataclass(frozen=True)
class Goal:
    """One figure that a goal asks for: of which run, and at least (or ``most``) how much."""

    name: str
    what: str
    asked: float
    run: str
    figure: Callable[[Mapping[str, Any]], Mapping[str, Any] | None]
    most: bool = False

    def met(self, run: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return what docs/deep.json says of it; None if the run has no figure for it."""
        found = self.figure(run)
        if found is None:
            return None
        value = found["value"]
        asked = f"{'at most' if self.most else 'at least'} {self.asked:g}"
        reached = value <= self.asked if self.most else value >= self.asked
        return {"what": self.what, "asked": asked, **found, "reached": reached, "run": self.run}


def score(method: str, metric: str) -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
    """Return how to read a score off a run with one task."""

    def found(run: Mapping[str, Any]) -> dict[str, Any]:
        one = next(iter(run["scores"].values()))[method][metric]
        return {key: one[key] for key in ("value", "low", "high", "n")}

    return found


def lead(left: str, right: str, metric: str) -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
    """Return how to read the paired difference of two methods off a run: over tasks, or over the records of one."""

    def found(run: Mapping[str, Any]) -> dict[str, Any]:
        tasks = list(run["scores"].values())
        if len(tasks) == 1:
            forth, back = f"{left} - {right}", f"{right} - {left}"
            turned = forth not in run["differences"]
            one = run["differences"][back if turned else forth][metric]
            value, low, high = (one[key] for key in ("value", "low", "high"))
            value, low, high = (-value, -high, -low) if turned else (value, low, high)
            return {"value": value, "low": low, "high": high, "n": one["n"]}
        gaps = mean_difference([task[left][metric]["value"] - task[right][metric]["value"] for task in tasks])
        return {key: round(value, 6) for key, value in gaps.to_json().items()}

    return found


def at(value: str, method: str, metric: str) -> Callable[[Mapping[str, Any]], Mapping[str, Any] | None]:
    """Return how to read a score of the records with one value of a field off a run."""

    def found(run: Mapping[str, Any]) -> dict[str, Any] | None:
        one = run["by"][value].get(method)
        return None if one is None else {key: one[metric][key] for key in ("value", "low", "high", "n")}

    return found


def shrunk(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return the mean spread over draws after training, as a share of that in context."""
    before, after = spreads(run)
    share = statistics.mean(after) / statistics.mean(before)
    return {"value": round(share, 4), "low": None, "high": None, "n": len(before)}


def on_superglue(method: str) -> Callable[[Mapping[str, Any]], Mapping[str, Any] | None]:
    """Return how to read a method's mean over all tasks off docs/evidence/superglue.json: none if one is missing."""

    def found(_: Mapping[str, Any]) -> dict[str, Any] | None:
        tasks = [one["methods"].get(method) for one in read_figures(DOCS / "evidence" / "superglue.json").values()]
        scores = [one["metrics"]["score"]["value"] for one in tasks if one is not None]
        if len(scores) < len(tasks):
            return None
        return {key: round(value, 6) for key, value in mean_score(scores).to_json().items()}

    return found


def ahead_on_lama(method: str, other: str) -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
    """Return how to read by how much a method of a run is ahead of one of docs/evidence/lama.json: the same facts."""

    def found(run: Mapping[str, Any]) -> dict[str, Any]:
        facts = read_figures(DOCS / "evidence" / "lama.json")
        others = dict(zip(facts, values(facts, other), strict=True))
        gaps = [one[method]["p_at_1"]["value"] - others[relation] for relation, one in run["scores"].items()]
        return {key: round(value, 6) for key, value in mean_difference(gaps).to_json().items()}

    return found


V2, RANDOM, CONTEXT, TUNED, LORA = "p-tuning-v2", " deep_start=random", "context-tuning", "fine-tuning", "manual+lora"
IN_CONTEXT = "in-context"
GOALS = (
    Goal("Q1", "LAMA, hybrid less examples in context, P@1", 0.08, "relations-all", ahead_on_lama(BEST, IN_CONTEXT)),
    Goal(
        "Q1",
        "LAMA, 92 facts or fewer, hybrid less examples in context, P@1",
        0.08,
        "relations",
        lead(BEST, IN_CONTEXT, "p_at_1"),
    ),
    Goal("Q3", "spread over draws of the examples, trained, as a share of in context", 0.5, "draws", shrunk, most=True),
    Goal("Q4", "FewGLUE, seven tasks, context tuning", 0.53, "few-deep", on_superglue(CONTEXT)),
    Goal("Q6", "SST-2, text start less random start, accuracy", 0.05, "sst2", lead(LEARNED, LEARNED + RANDOM, "score")),
    Goal("Q6", "TREC, text start less random start, accuracy", 0.05, "trec", lead(LEARNED, LEARNED + RANDOM, "score")),
    Goal("Q6", "E2E, text start less random start, BLEU", 5, "e2e-320", lead(V2, V2 + RANDOM, "bleu-lc")),
    Goal("Q6", "E2E, deep less shallow, BLEU", 5, "e2e-320-deep", lead(V2, "prompt-tuning", "bleu-lc")),
    Goal("G1", "E2E, 1,000 texts, BLEU", 58, "e2e-1000-context", score(CONTEXT, "bleu-lc")),
    Goal("G1", "E2E, 1,000 texts, coverage", 0.85, "e2e-1000-context", score(CONTEXT, "coverage")),
    Goal("G2", "E2E, 100 texts, deep less fine-tuning, BLEU", 0, "e2e-100-context", lead(CONTEXT, TUNED, "bleu-lc")),
    Goal("G2", "E2E, 320 texts, deep less fine-tuning, BLEU", 0, "e2e-320-context", lead(CONTEXT, TUNED, "bleu-lc")),
    Goal("G2", "E2E, 1,000 texts, deep less LoRA, BLEU", -3, "e2e-1000", lead(CONTEXT, LORA, "bleu-lc")),
    Goal("G3", "countries, coverage", 0.97, "countries-beams", score(V2, "coverage")),
    Goal("G3", "countries, invented", 0.02, "countries-beams", score(V2, "invented"), most=True),
    Goal("G4", "arithmetic, frozen, 1+1 digits", 0.80, "arithmetic", at("1+1", V2, "last-number")),
    Goal("G4", "arithmetic, LoRA, 2+2 digits", 0.90, "arithmetic", at("2+2", LORA, "last-number")),
)


def goals(runs: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Return goal -> the figures that it asks for whose runs there are."""
    found: dict[str, list[dict[str, Any]]] = {}
    for one in GOALS:
        if one.run in runs and (figure := one.met(runs[one.run])) is not None:
            found.setdefault(one.name, []).append(figure)
    return found


def of_goals(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return the table of the goals."""
    rows = ["| | figure | asked | measured | n | | run |", "|---" * 7 + "|"]
    for name, one in ((name, one) for name, figures in found.items() for one in figures):
        metric = "bleu" if "BLEU" in one["what"] else ""
        sign = "+" if " less " in one["what"] else ""
        bare = one["low"] is None
        value = number(one["value"], metric, sign) if bare else with_interval(one, metric, sign)
        end = "**reached**" if one["reached"] else "missed"
        rows.append(f"| {name} | {one['what']} | {one['asked']} | {value} | {one['n']} | {end} | `{one['run']}` |")
    return "\n".join(rows)


def number(value: float, metric: str, sign: str = "") -> str:
    """Write a score: BLEU and chrF with one decimal, shares with three."""
    return f"{value:{sign}.{1 if metric in LARGE else 3}f}"


def with_interval(one: Mapping[str, Any], metric: str, sign: str = "") -> str:
    """Write a score with its interval."""
    value, low, high = (number(one[key], metric, sign) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def scores_of(run: Mapping[str, Any]) -> str:
    """Return the table of a run: a row for each task and method, or for each method's mean over several tasks."""
    several = len(run["scores"]) > 1
    found = {"mean": run["macro"]} if several else run["scores"]
    metrics = list(dict.fromkeys(name for methods in found.values() for one in methods.values() for name in one))
    metrics = [name for name in metrics if name not in LEFT_OUT]
    rows = [f"| method | {' | '.join(map(called, metrics))} | n | seeds |", "|---" * (len(metrics) + 3) + "|"]
    for methods in found.values():
        for method, scores in methods.items():
            shown = [with_interval(scores[name], name) if name in scores else "" for name in metrics]
            first = next(iter(scores.values()))
            count = f"{first['n']} tasks" if several else first["n"]
            rows.append(f"| `{method}` | {' | '.join(shown)} | {count} | {first.get('seeds') or 1} |")
    return "\n".join(rows)


def differences(run: Mapping[str, Any]) -> str:
    """Return by how much the hybrid is ahead of each other method, paired over relations."""
    by_name = {
        name: {task: [found[name]["p_at_1"]["value"]] for task, found in run["scores"].items()} for name in run["macro"]
    }
    rows = ["| paired over relations | P@1 |", "|---|---|"]
    rows += [
        f"| `{BEST}` - `{name}` | {gap(by_name[BEST], found)} |" for name, found in by_name.items() if name != BEST
    ]
    return "\n".join(rows)


def course(run: Mapping[str, Any], method: str) -> dict[str, list[Mapping[str, Any]]]:
    """Return task -> the courses of a method's trainings, one for each seed."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for name, one in run["courses"].items():
        task, own, _ = name.split("/")
        if own == method:
            found.setdefault(task, []).append(one)
    return found


def spreads(run: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """Return for each relation the standard deviation over draws of the examples at the start, and at the end."""
    found = course(run, "context-tuning").values()
    before, after = ([statistics.stdev(one["scores"][end] for one in draws) for draws in found] for end in (0, -1))
    return before, after


def spread(run: Mapping[str, Any]) -> str:
    """Return the scores of each draw of the examples: in context (the start), and after the last epoch."""
    rows = ["| relation | in context, each draw | sd | trained, each draw | sd |", "|---" * 5 + "|"]
    before, after = spreads(run)
    for (task, draws), *sds in zip(course(run, "context-tuning").items(), before, after, strict=True):
        left, right = (" ".join(f"{one['scores'][end]:.3f}" for one in draws) for end in (0, -1))
        rows.append(f"| {task} | {left} | {sds[0]:.3f} | {right} | {sds[1]:.3f} |")
    apart = mean_difference([one - other for one, other in zip(after, before, strict=True)])
    rows.append(f"| mean | | **{statistics.mean(before):.3f}** | | **{statistics.mean(after):.3f}** |")
    rows.append(f"| paired | | | {apart.value:+.3f} [{apart.low:+.3f}, {apart.high:+.3f}] | |")
    return "\n".join(rows)


def seconds_to(one: Mapping[str, Any], enough: float) -> float | None:
    """Return the seconds of training until a development score is reached; None if it never is."""
    passed = 0.0
    seconds: float
    for found, seconds in zip(one["scores"], (0.0, *one["seconds"]), strict=True):
        passed += seconds
        if float(found) >= enough:
            return float(passed)
    return None


def time_to_enough(run: Mapping[str, Any], other_run: Mapping[str, Any]) -> str:
    """Return the time to 95 % of P-tuning's best development score: P-tuning's own, and context tuning's."""
    rows = [
        "| relation | P-tuning: best score, seconds to 95 % of it | context tuning: seconds, share |",
        "|---|---|---|",
    ]
    shares = list[float]()
    tuned = course(other_run, "context-tuning")
    for task, found in course(run, LEARNED).items():
        one, other = found[0], tuned[task][0]
        enough = ENOUGH * max(one["scores"])
        own, reached = seconds_to(one, enough), seconds_to(other, enough)
        assert own is not None
        if reached is None:
            told = f"not reached (best {max(other['scores']):.3f})"
        elif not reached:
            told = "reached before the first step"
        else:
            shares.append(reached / own)
            told = f"{reached:.0f}, {shares[-1]:.2f}"
        rows.append(f"| {task} | {max(one['scores']):.3f}, {own:.0f} | {told} |")
    mean = f"{statistics.geometric_mean(shares):.2f}" if shares else ""
    rows.append(f"| geometric mean | | **{mean}**, of the {len(shares)} that have one |")
    return "\n".join(rows)


def gap(left: Mapping[str, Sequence[float]], right: Mapping[str, Sequence[float]]) -> str:
    """Return the paired difference of means over tasks."""
    found = mean_difference([statistics.mean(left[task]) - statistics.mean(right[task]) for task in left])
    return f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def digits(run: Mapping[str, Any]) -> str:
    """Return the share of right results by the digits of the numbers."""
    methods = list(next(iter(run["by"].values())))
    rows = [f"| digits | n | {' | '.join(f'`{name}`' for name in methods)} |", "|---" * (2 + len(methods)) + "|"]
    for value, found in run["by"].items():
        scores = [found[name]["last-number"] for name in methods]
        shown = [with_interval(one, "last-number") for one in scores]
        rows.append(f"| {value} | {scores[0]['n']} | {' | '.join(shown)} |")
    return "\n".join(rows)


def encoders(words: Mapping[str, Any], random: Mapping[str, Any]) -> str:
    """Return P@1 of each encoder from words and from random starts, means over relations and seeds, and the paired
    differences that the paper's two reasons for an encoder ask for.
    """
    kinds = {LEARNED: "`lstm`", f"{LEARNED} encoder=mlp": "`mlp`", f"{LEARNED} encoder=none": "`none`"}
    means = {(start, kind): by_task(run, kind) for start, run in (("w", words), ("r", random)) for kind in kinds}
    rows = [
        "| encoder | from words | from random starts | words - random | sd over draws: words, random |",
        "|---" * 5 + "|",
    ]
    for kind, name in kinds.items():
        left, right = means["w", kind], means["r", kind]
        shown = (mean_score([statistics.mean(one) for one in found.values()]) for found in (left, right))
        told = (f"{one.value:.3f} [{one.low:.3f}, {one.high:.3f}]" for one in shown)
        spreads = (statistics.mean(statistics.stdev(one) for one in found.values()) for found in (left, right))
        rows.append(
            f"| {name} | {' | '.join(told)} | {gap(left, right)} | {', '.join(f'{one:.3f}' for one in spreads)} |"
        )
    plain = f"{LEARNED} encoder=none"
    for kind, name in list(kinds.items())[:2]:
        told = (gap(means[start, kind], means[start, plain]) for start in "wr")
        rows.append(f"| {name} - `none` | {' | '.join(told)} | | |")
    return "\n".join(rows)


def by_task(run: Mapping[str, Any], method: str) -> dict[str, list[float]]:
    """Return task -> P@1 on the test part with each seed."""
    return {task: [one["test"]["p_at_1"] for one in found] for task, found in course(run, method).items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--called", action="append", default=[], metavar="PATH=NAME")
    given = parser.parse_args()
    main(given.folders, dict(one.split("=", 1) for one in given.called))
