"""Turn results of LAMA into docs/evidence/lama.json, and the tables and picture of docs/evidence/paper.md.

Usage: python scripts/lama.py RESULTS.JSON [RESULTS.JSON ...]

Several results must have the same settings; they may cover different relations, or different methods on the same
relations. Entries of docs/evidence/lama.json are kept; delete the file to start anew. Without results, tables and
picture are made again from docs/evidence/lama.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pages import Figures, fill, read_figures, write_figures
from ptuning.names import LEARNED, RANDOM_WEIGHTS
from ptuning.report.pictures import dots
from ptuning.statistics import Score, mean_difference, mean_score, score

DOCS = Path(__file__).resolve().parents[1] / "docs" / "evidence"
FIGURES, PAGE, PICTURE = DOCS / "lama.json", DOCS / "paper.md", DOCS / "lama.svg"
NAMES: Mapping[str, str] = {
    "majority": "majority answer of the training part",
    "manual": "manual prompt",
    "manual-restricted": "manual prompt, choosing among the relation's objects only",
    "in-context": "examples in context, twelve tried settings",
    LEARNED: "**P-tuning**, one tried setting",
}
SHORT = ("majority", "manual", "manual, objects only", "in context", "P-tuning")
# Prompts in every layer, which ran in bfloat16. They stand beside the others, and have paired differences of their own.
DEEP: Mapping[str, str] = {"p-tuning-v2": "P-tuning v2", "hybrid": "hybrid"}
# Tables of the relations on which all of some methods ran: name on the page -> method -> heading of its column.
PARTS: Mapping[str, Mapping[str, str]] = {
    "trained": {
        "manual": "manual",
        "fine-tuning": "fine-tuning (FT)",
        "manual+fine-tuning": "manual + fine-tuning (MP+FT)",
        LEARNED: "P-tuning, frozen",
    },
    "control": {
        "majority": "majority",
        f"{LEARNED}{RANDOM_WEIGHTS}": "P-tuning, random weights",
        LEARNED: "P-tuning",
    },
}
TYPES = ("1-1", "N-1", "N-M")


def main(files: Sequence[Path]) -> None:
    """Write the figures, if results are given, then the tables and the picture."""
    if files:
        known = read_figures(FIGURES) if FIGURES.exists() else {}
        write_figures(FIGURES, gathered(files, known))
    found = read_figures(FIGURES)
    made = tables(found)
    fill(PAGE, "lama", made)
    PICTURE.write_text(picture(found), encoding="utf-8")
    print("\n\n".join(made.values()))


def gathered(files: Sequence[Path], known: Figures) -> dict[str, dict[str, Any]]:
    """Return relation -> its type, the number of its test facts, and the number of correct answers of each method.

    Args:
        files: Files of results.
        known: The figures so far, which stay.

    Raises:
        ValueError: If the number of test facts of a relation differs between files.
    """
    found: dict[str, dict[str, Any]] = {name: {**one, "hits": dict(one["hits"])} for name, one in known.items()}
    for path in files:
        results = json.loads(path.read_text(encoding="utf-8"))
        for name, methods in results["tasks"].items():
            info = results["task_info"][name]
            one = found.setdefault(name, {"label": info["label"], "type": info["type"], "hits": {}})
            for method, scores in methods.items():
                hit = scores["p_at_1"]
                if one.setdefault("n", hit["n"]) != hit["n"]:
                    raise ValueError(f"{path}: {name} has {hit['n']} test facts, and {one['n']} elsewhere")
                one["hits"].setdefault(method, round(hit["value"] * hit["n"]))
    return dict(sorted(found.items(), key=lambda entry: int(entry[0][1:])))


def values(relations: Figures, method: str) -> list[float]:
    """Return a method's P@1 on each relation."""
    return [one["hits"][method] / one["n"] for one in relations.values()]


def apart(relations: Figures, left: str, right: str) -> list[float]:
    """Return the difference in P@1 of two methods on each relation."""
    return [one - other for one, other in zip(values(relations, left), values(relations, right), strict=True)]


def tables(relations: Figures) -> dict[str, str]:
    """Return name on the page -> table."""
    kinds = {kind: {name: one for name, one in relations.items() if one["type"] == kind} for kind in TYPES}
    counts = [f"{kind} ({len(part)})" for kind, part in kinds.items()]
    macro = [f"| P@1, mean over relations | all {len(relations)} | 95 % over relations | {' | '.join(counts)} |"]
    macro.append("|---" * 6 + "|")
    deep = {name: called for name, called in DEEP.items() if all(name in one["hits"] for one in relations.values())}
    described_deep = {name: f"{called}, one tried setting, bfloat16" for name, called in deep.items()}
    for method, described in {**NAMES, **described_deep}.items():
        all_of = mean_score(values(relations, method))
        means = [f"{sum(values(part, method)) / len(part):.3f}" for part in kinds.values()]
        macro.append(f"| {described} | {all_of.value:.3f} | {reach(all_of)} | {' | '.join(means)} |")
    paired = ["| paired difference | P@1 | 95 % over relations |", "|---|---|---|"]
    for method, described in reversed(list(NAMES.items())):
        if method != LEARNED:
            gap = mean_difference(apart(relations, LEARNED, method))
            paired.append(f"| P-tuning − {described.split(', twelve')[0]} | {gap.value:+.3f} | {reach(gap, '+')} |")
    each = [f"| relation | | type | n | {' | '.join((*SHORT, *deep.values()))} |", "|---" * (9 + len(deep)) + "|"]
    for name, one in relations.items():
        shares = {method: f"{one['hits'][method] / one['n']:.3f}" for method in (*NAMES, *deep)}
        shares[LEARNED] += f" {reach(of(one, LEARNED))}"
        each.append(f"| {name} | {one['label']} | {one['type']} | {one['n']} | {' | '.join(shares.values())} |")
    made = {"macro": macro, "paired": paired, "each": each, "deep": leads_of(relations, deep)}
    parts = {name: part(relations, methods) for name, methods in PARTS.items()}
    return {name: "\n".join(rows) for name, rows in made.items()} | parts


def leads_of(relations: Figures, deep: Mapping[str, str]) -> list[str]:
    """Return a table of by how much prompts in every layer are ahead of other methods, paired over relations."""
    rows = ["| paired difference | P@1 | 95 % over relations |", "|---|---|---|"]
    others = {"in-context": "examples in context", LEARNED: "P-tuning", **deep}
    for method, described in reversed(list(deep.items())):
        del others[method]
        for other, name in others.items():
            gap = mean_difference(apart(relations, method, other))
            rows.append(f"| {described} − {name} | {gap.value:+.3f} | {reach(gap, '+')} |")
    return rows


def part(relations: Figures, methods: Mapping[str, str]) -> str:
    """Return a table of the relations on which all methods ran, with means and the lead of P-tuning."""
    chosen = {name: one for name, one in relations.items() if all(method in one["hits"] for method in methods)}
    rows = [f"| relation | | type | n | {' | '.join(methods.values())} |", "|---" * (4 + len(methods)) + "|"]
    for name, one in chosen.items():
        shares = [f"{of(one, method).value:.3f} {reach(of(one, method))}" for method in methods]
        rows.append(f"| {name} | {one['label']} | {one['type']} | {one['n']} | {' | '.join(shares)} |")
    means = [mean_score(values(chosen, method)) for method in methods]
    ahead = [mean_difference(apart(chosen, LEARNED, method)) for method in methods if method != LEARNED]
    shown = [f"**{mean.value:.3f}** {reach(mean)}" for mean in means]
    rows.append(f"| mean | of {len(chosen)} relations | | | {' | '.join(shown)} |")
    shown = [*(f"{gap.value:+.3f} {reach(gap, '+')}" for gap in ahead), ""]
    rows.append(f"| P-tuning ahead by | paired, over relations | | | {' | '.join(shown)} |")
    return "\n".join(rows)


def of(one: Mapping[str, Any], method: str) -> Score:
    """Return a method's P@1 on one relation, with Wilson's interval."""
    hits = one["hits"][method]
    return score([1.0] * hits + [0.0] * (one["n"] - hits))


def reach(found: Score, sign: str = "") -> str:
    """Write an interval."""
    return f"[{found.low:{sign}.3f}, {found.high:{sign}.3f}]"


def picture(relations: Figures) -> str:
    """Draw the manual prompt and P-tuning on every relation, the largest gain first."""
    gains = dict(zip(relations, apart(relations, LEARNED, "manual"), strict=True))
    rows = [
        (f"{name} {relations[name]['label']}", of(relations[name], "manual"), of(relations[name], LEARNED))
        for name in sorted(gains, key=lambda name: -gains[name])
    ]
    return dots(rows, names=("manual prompt", "P-tuning"), unit="P@1", name="lama")


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
