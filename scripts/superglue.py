"""Turn results of SuperGLUE into docs/evidence/superglue.json and the tables of docs/evidence/superglue.md.

Usage: python scripts/superglue.py RESULTS.JSON [RESULTS.JSON ...]

Several results must have the same settings; they may cover different tasks, or different methods on the same tasks. For
each task and method the last result counts; other entries of docs/evidence/superglue.json are kept. Without results,
the tables are made again from docs/evidence/superglue.json.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pages import Figures, fill, read_figures, write_figures
from ptuning.metrics import called, in_order
from ptuning.names import ALONG, LEARNED
from ptuning.statistics import mean_difference

DOCS = Path(__file__).resolve().parents[1] / "docs" / "evidence"
FIGURES, PAGE = DOCS / "superglue.json", DOCS / "superglue.md"
NAMES: Mapping[str, str] = {
    "majority": "majority",
    "manual": "manual",
    "in-context": "in context",
    "fine-tuning": "fine-tuning",
    "manual+fine-tuning": "manual + fine-tuning",
    "context-tuning": "context tuning, frozen",
    LEARNED: "P-tuning, frozen",
    LEARNED + ALONG["full"]: "P-tuning, tuned",
}
# Methods that do not depend on the seed. For others, the tables name the number of seeds if it is below the least.
SEEDLESS, LEAST_SEEDS = ("majority", "manual"), 3
# Tables of mean scores over the tasks on which all of some methods ran: name on the page -> methods.
PARTS: Mapping[str, Sequence[str]] = {
    "none": ("majority", "manual", "in-context", "context-tuning", LEARNED),
    "trained": tuple(name for name in NAMES if name != "manual+fine-tuning"),
    "every": tuple(NAMES),
}


def main(files: Sequence[Path]) -> None:
    """Write the figures, if results are given, then the tables."""
    if files:
        known = read_figures(FIGURES) if FIGURES.exists() else {}
        write_figures(FIGURES, gathered(files, known))
    made = tables(read_figures(FIGURES))
    fill(PAGE, "superglue", made)
    print("\n\n".join(made.values()))


def gathered(files: Sequence[Path], known: Figures) -> dict[str, dict[str, Any]]:
    """Return task -> the number of reported rows and, for each method, its metrics and its score by seed.

    Args:
        files: Files of results.
        known: The figures so far. They stay unless a file has newer ones.

    Raises:
        ValueError: If the number of reported rows of a task differs between files.
    """
    found: dict[str, dict[str, Any]] = {name: {**one, "methods": dict(one["methods"])} for name, one in known.items()}
    for path in files:
        results = json.loads(path.read_text(encoding="utf-8"))
        for task, methods in results["tasks"].items():
            for method, metrics in methods.items():
                n = metrics["score"]["n"]
                one = found.setdefault(task, {"n": n, "methods": {}})
                if one["n"] != n:
                    raise ValueError(f"{path}: {task} has {n} reported rows, and {one['n']} elsewhere")
                cells = [cell for cell in results["cells"] if (cell["task"], cell["method"]) == (task, method)]
                done = [cell for cell in cells if cell["status"] == "done"]
                one["methods"][method] = {
                    "metrics": metrics,
                    "scores": {str(cell["seed"]): cell["scores"]["score"] for cell in done},
                }
    return dict(sorted(found.items()))


def tables(tasks: Figures) -> dict[str, str]:
    """Return name on the page -> table."""
    return {"each": each(tasks)} | {name: means(tasks, methods) for name, methods in PARTS.items()}


def each(tasks: Figures) -> str:
    """Return a table of every metric of every task: means over seeds, with intervals and spread."""
    lines = [f"| task | n | {' | '.join(NAMES.values())} |", "|---" * (2 + len(NAMES)) + "|"]
    for task, one in tasks.items():
        metrics = [name for name in in_order(one["methods"]["majority"]["metrics"]) if name != "score"]
        for metric in metrics:
            name = task if len(metrics) == 1 else f"{task}, {called(metric)}"
            shown = [written(method, one["methods"].get(method), metric) for method in NAMES]
            lines.append(f"| {name} | {one['n']} | {' | '.join(shown)} |")
    return "\n".join(lines)


def written(name: str, method: Mapping[str, Any] | None, metric: str) -> str:
    """Write one metric of one method: mean, interval, spread over seeds, and the number of seeds if it is low."""
    if method is None:
        return ""
    found = method["metrics"][metric]
    text = f"{found['value']:.3f}"
    if found["low"] < found["high"]:  # equal values have no interval
        text += f" [{found['low']:.3f}, {found['high']:.3f}]"
    if found["std"] is not None:
        text += f", sd {found['std']:.3f}, lowest {found['lowest']:.3f}"
    if name in SEEDLESS or found["seeds"] >= LEAST_SEEDS:
        return text
    return f"{text} ({found['seeds']} seed{'s' if found['seeds'] > 1 else ''})"


def means(tasks: Figures, methods: Sequence[str]) -> str:
    """Return a table of mean scores over the tasks on which all of some methods ran.

    The spread is the standard deviation, over seeds, of the mean over tasks. Differences are paired by task.
    """
    chosen = {task: one["methods"] for task, one in tasks.items() if all(name in one["methods"] for name in methods)}
    ahead_of = f"{NAMES[LEARNED]}, ahead by (95 % over tasks)"
    lines = [
        f"| mean score of {', '.join(chosen)} | mean | sd over seeds | lowest seed | {ahead_of} |",
        "|---" * 5 + "|",
    ]
    ours = task_scores(chosen, LEARNED)
    for method in methods:
        mean = statistics.mean(task_scores(chosen, method))
        seeds = seed_means(chosen, method)
        sd, lowest = (f"{statistics.stdev(seeds):.3f}", f"{min(seeds):.3f}") if len(seeds) > 1 else ("", "")
        ahead = ""
        if method != LEARNED:
            gap = mean_difference([one - other for one, other in zip(ours, task_scores(chosen, method), strict=True)])
            ahead = f"{gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]"
        name = f"**{NAMES[method]}**" if method == LEARNED else NAMES[method]
        lines.append(f"| {name} | {mean:.3f} | {sd} | {lowest} | {ahead} |")
    return "\n".join(lines)


def task_scores(chosen: Mapping[str, Mapping[str, Any]], method: str) -> list[float]:
    """Return a method's score on each task, the mean over its seeds."""
    return [methods[method]["metrics"]["score"]["value"] for methods in chosen.values()]


def seed_means(chosen: Mapping[str, Mapping[str, Any]], method: str) -> list[float]:
    """Return a method's mean over tasks for each seed that all tasks have."""
    by_task = [methods[method]["scores"] for methods in chosen.values()]
    shared = [seed for seed in by_task[0] if all(seed in scores for scores in by_task)]
    return [statistics.mean(scores[seed] for scores in by_task) for seed in shared]


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
