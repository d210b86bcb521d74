"""Prompt sensitivity: every wording of a LAMA relation as a manual prompt, and after learning from it.

    python -m experiments.paraphrases DATA --out FOLDER [--relations P36,P17] [--methods manual,p-tuning] ...

Wordings are read from DATA/paraphrases/P36.jsonl, {"pattern": "[X] is ruled from [Y]"} a line. FOLDER gets a comparison
with a task for each wording (P36.01, ...), and wordings.md with the spread of each relation.
Source: Liu et al. (2021), table 1 (P17); Elazar et al. (2021), ParaRel.
"""

from __future__ import annotations

import argparse
import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ptuning
from ptuning.config import listed_names
from ptuning.data.lama import Relation, read_relations
from ptuning.errors import RecordError
from ptuning.experiment.comparison import Comparison
from ptuning.experiment.suites import relation_job
from ptuning.files import write_text
from ptuning.metrics import primary
from ptuning.report.results_file import Results
from ptuning.template.language import Field, Target, Template

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wordings:
    """The wordings of a relation: task -> pattern, and method -> task -> its first score."""

    patterns: Mapping[str, str]
    scores: Mapping[str, Mapping[str, float]]


def paraphrases(
    data: str | Path,
    *,
    relations: Sequence[str] | str = "all",
    wordings: int | None = None,
    limit: int | None = None,
    split_seed: int = 0,
    fields: Mapping[str, str] | None = None,
    **options: Any,
) -> dict[str, Wordings]:
    """Run the comparison and return relation -> scores of its wordings, at most ``wordings`` of each relation.

    A relation with fewer than two usable wordings is left out with a warning; a RecordError if all are.
    """
    comparison = Comparison.of("lama", **options)
    patterns: dict[str, dict[str, str]] = {}
    jobs = []
    for relation in read_relations(data, which=listed_names(relations), fields=fields):
        usable = usable_wordings(relation, kind=comparison.backbone.kind)[:wordings]
        if len(usable) < 2:
            logger.warning(
                "%s: fewer than two wordings for a %s model; left out", relation.name, comparison.backbone.kind
            )
            continue
        patterns[relation.name] = {f"{relation.name}.{at:02d}": text for at, text in enumerate(usable, start=1)}
        # Without the relation's label, which would help every wording alike. All wordings have the same facts.
        pairs = [(Template.parse(text), Template.from_manual(text)) for text in usable]
        every = [template for pair in pairs for template in pair]
        jobs += [
            relation_job(
                relation, pair, backbone=comparison.backbone, name=name, limit=limit, seed=split_seed, templates=every
            )
            for name, pair in zip(patterns[relation.name], pairs, strict=True)
        ]
    if not jobs:
        raise RecordError(f"{data}: no relation has two wordings; they are read from paraphrases/RELATION.jsonl")
    settings = {"data": str(data), "wordings": wordings, "limit": limit, "split_seed": split_seed}
    results = comparison.run(jobs, settings=settings)
    spreads = {relation: compared(results, tasks) for relation, tasks in patterns.items()}
    write_text(comparison.out / "wordings.md", "\n".join(map(table, spreads.values())))
    return spreads


def usable_wordings(relation: Relation, *, kind: str) -> list[str]:
    """Return a relation's wordings, its own first. A causal model needs all fields before the target."""
    wordings: dict[str, str] = {}
    for pattern in (relation.template, *relation.paraphrases):
        if pattern is None:
            continue
        parsed = Template.parse(pattern)
        if kind == "causal":
            at = next(index for index, piece in enumerate(parsed.pieces) if isinstance(piece, Target))
            if any(isinstance(piece, Field) for piece in parsed.pieces[at:]):
                continue
            parsed, _ = parsed.without_tail()  # the model does not see the text after the target
        wordings.setdefault(str(parsed).strip(), pattern)
    return list(wordings.values())


def compared(results: Results, patterns: Mapping[str, str]) -> Wordings:
    """Return the scores of the wordings of one relation; ``patterns``: task -> wording."""
    scores: dict[str, dict[str, float]] = {}
    for task in patterns:
        for method, all_scores in results.tasks.get(task, {}).items():
            scores.setdefault(method, {})[task] = all_scores[primary(all_scores)].value
    return Wordings(patterns, scores)


def table(relation: Wordings) -> str:
    """Write the scores of a relation's wordings as a Markdown table, with their spread in the last row."""
    methods = list(relation.scores)
    lines = [f"| wording | {' | '.join(methods)} |", "|---|" + "---|" * len(methods)]
    for task, pattern in relation.patterns.items():
        values = (relation.scores[method].get(task) for method in methods)
        lines.append(f"| {pattern} | {' | '.join('' if value is None else f'{value:.3f}' for value in values)} |")
    spreads = []
    for method in methods:
        known = list(relation.scores[method].values())
        deviation = f", sd {statistics.stdev(known):.3f}" if len(known) > 1 else ""
        spreads.append(f"{min(known):.3f} to {max(known):.3f}{deviation}")
    return "\n".join([*lines, f"| range | {' | '.join(spreads)} |", ""])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--backbone")
    parser.add_argument("--relations", default="all")
    parser.add_argument("--methods", default="manual,p-tuning")
    parser.add_argument("--field", action="append", default=[], metavar="NEW=NAME", help="as sub_label=subject")
    for name in ("wordings", "limit", "seeds", "epochs"):
        parser.add_argument(f"--{name}", type=int)
    given = vars(parser.parse_args())
    epochs = given.pop("epochs")
    given["fields"] = dict(pair.split("=", 1) for pair in given.pop("field"))
    given["config"] = ptuning.TrainConfig(**({} if epochs is None else {"epochs": epochs}))
    given["backbone"] = ptuning.load_backbone(given["backbone"])
    for relation in paraphrases(given.pop("data"), **given).values():
        print(table(relation))
