"""The report of a benchmark, made from its JSON files alone: one page, the same in Markdown, and pictures. Computes no
score.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from ptuning.files import make_folder, write_text
from ptuning.metrics import called
from ptuning.report import pictures, tables
from ptuning.report.blocks import (
    Block,
    Entry,
    Fold,
    Items,
    Page,
    Picture,
    Section,
    Table,
    Text,
    counted,
    decimal,
    percent,
    phrase,
    reading,
)
from ptuning.report.limits import caveats
from ptuning.report.results_file import Answer, CellRecord, Findings, load_findings

if TYPE_CHECKING:
    from jinja2 import Environment

HTML_FILE, MARKDOWN_FILE, PICTURES_FOLDER = "report.html", "report.md", "pictures"
TITLES = {
    "lama": "What a learned prompt recalls",
    "compare": "Methods compared",
    "paraphrases": "How much the wording matters",
    "superglue": "Methods compared on language understanding",
}
SHOWN_ANSWERS = 10
SHOWN_CHARACTERS = 120
# What could be read as markup in Markdown, in or out of a table.
MARKDOWN_SPECIAL = re.compile(r"([\\`*_{}\[\]|~$#])")


def write_report(folder: str | Path) -> Path:
    """Write ``report.html``, ``report.md`` and ``pictures/`` from the JSON files of a benchmark.

    Args:
        folder: The folder that holds ``results.json``; an earlier report in it is replaced.

    Returns:
        The path of the page, which needs no other file.

    Raises:
        FileError: If a file is missing, damaged or of another format, or nothing can be written.
    """
    findings = load_findings(folder)
    page = build_page(findings)
    environment = _environment()
    rendered = {
        file: environment.get_template(f"{file}.jinja").render(page=page, folder=PICTURES_FOLDER)
        for file in (HTML_FILE, MARKDOWN_FILE)
    }
    drawn = {
        block.name: block.svg for section in page.sections for block in section.blocks if isinstance(block, Picture)
    }
    out = findings.folder / PICTURES_FOLDER
    make_folder(out)
    for name in ("dots", "wordings", "curves"):
        if name in drawn:
            write_text(out / f"{name}.svg", f'<?xml version="1.0" encoding="utf-8"?>\n{drawn[name]}')
        else:
            (out / f"{name}.svg").unlink(missing_ok=True)  # of an earlier report on other results
    for file, text in rendered.items():
        write_text(findings.folder / file, text)
    return findings.folder / HTML_FILE


def build_page(findings: Findings) -> Page:
    """Return everything that the report says.

    Args:
        findings: As they were read.

    Raises:
        FileError: If a file of a cell is damaged.
    """
    parts: list[tuple[str, list[Block]]] = [
        ("Settings", tables.settings(findings)),
        ("Scores", tables.main(findings)),
        ("By type of relation", tables.by_type(findings)),
        ("Every task", tables.per_task(findings)),
        ("Written against learned", _dots(findings)),
        ("Random weights: what the training facts teach alone", tables.control(findings)),
        ("Differences", tables.differences(findings)),
        ("Wordings", _wordings(findings)),
        ("Development against reported score", tables.agreement(findings)),
        ("Warnings", [Items(list(findings.warnings))] if findings.warnings else []),
        ("Learning curves", _curves(findings)),
        ("Answers gained and lost", _changes(findings)),
        ("What this run cannot show", [Items(list(caveats(findings)))]),
    ]
    tasks = findings.named(*findings.tasks) if len(findings.tasks) == 1 else counted(len(findings.tasks), "task")
    about = findings.backbone.get("name")
    return Page(
        title=f"{TITLES.get(findings.suite, findings.suite)}: {tasks}" + (f", {about}" if about else ""),
        warning=_warning(findings),
        answer=" ".join(_answer(findings)),
        sections=[Section(heading, blocks) for heading, blocks in parts if blocks],
    )


def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=PackageLoader("ptuning.report", "pages"),
        autoescape=select_autoescape(["html.jinja"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["markdown"] = _markdown
    return environment


def _markdown(text: str) -> str:
    r"""Escape text so that Markdown shows it as it is, on one line.

    >>> _markdown("[X] | <b>") == r"\[X\] \| &lt;b&gt;"
    True
    """
    flat = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return MARKDOWN_SPECIAL.sub(r"\\\1", flat)


def _warning(findings: Findings) -> Fold | None:
    """What is missing from the tables, with the reasons."""
    left = [cell for cell in findings.cells if cell.status != "done"]
    if not left:
        return None
    counts = Counter(cell.status for cell in left)
    said = {"failed": "failed", "waiting": "still to run"}
    missing = [f"{counts[status]:,} {words}" for status, words in said.items() if counts[status]]
    title = (
        f"Not complete: of {counted(len(findings.cells), 'run')}, {' and '.join(missing)}. Tables and pictures hold "
        "what is done."
    )
    reasons = {"failed": "failed: {error}", "waiting": "still to run"}
    listed = [
        f"{findings.named(cell.task)}, {cell.method}, seed {cell.seed}: "
        + reasons[cell.status].format(error=cell.error or "no reason was written")
        for cell in left
    ]
    return Fold(title, [Items(listed)])


def _answer(findings: Findings) -> Iterator[str]:
    """The answer in sentences: the best method, the next one, and what learning the prompt changed."""
    score, unit = findings.primary, findings.overall_unit
    scores = {method: found[score] for method, found in findings.overall.items() if score in found}
    ranked = sorted(scores, key=lambda method: -scores[method].value)
    if not ranked:
        yield "No method has finished yet, so there is nothing to compare."
        return
    best = scores[ranked[0]]
    yield f"Of {counted(len(ranked), 'method')}, {ranked[0]} is best: {called(score)} {phrase(best, unit)}."
    if len(ranked) > 1:
        second = scores[ranked[1]]
        apart = "below the best one's" if second.high < best.low else "which overlaps the best one's"
        yield f"Next is {ranked[1]} with {phrase(second, unit)}, an interval {apart}."
    written, learned = findings.pair
    gap = findings.differences.get(f"{learned} - {written}", {}).get(score)
    if gap is not None:
        verdict = ", so this run shows no difference" if gap.low <= 0 <= gap.high else ""
        yield (
            f"The difference {learned} \N{MINUS SIGN} {written} is {phrase(gap, '', signed=True)}; its interval "
            f"{'is ' if not verdict else ''}{reading(gap)}{verdict}."
        )
    for method in findings.ordered(name for one in findings.paraphrases.values() for name in one.spread):
        wide = {task: one.spread[method] for task, one in findings.paraphrases.items() if method in one.spread}
        at = max(wide, key=lambda task: wide[task].range)
        yield (
            f"With {method}, the wordings of one relation lie up to {decimal(wide[at].range)} points apart "
            f"({findings.named(at)}: {percent(wide[at].min)} to {percent(wide[at].max)} over "
            f"{counted(wide[at].patterns, 'wording')})."
        )


def _dots(findings: Findings) -> list[Block]:
    written, learned = findings.pair
    score = findings.primary
    rows = [
        (findings.named(task), found[written][score], found[learned][score])
        for task, found in findings.tasks.items()
        if score in found.get(written, {}) and score in found.get(learned, {})
    ]
    if len(rows) < 2:
        return []
    rows.sort(key=lambda row: row[1].value - row[2].value)
    better = sum(new.value > old.value for _, old, new in rows)
    caption = (
        f"{called(score)} of {written} and {learned} on every task, sorted by the difference; {learned} is higher on "
        f"{better:,} of {counted(len(rows), 'task')}. Whiskers are 95 % intervals; the numbers, with n, stand in the "
        "table of every task."
    )
    svg = pictures.dots(rows, names=(written, learned), unit=called(score), name="dots")
    return [Picture("dots", svg, caption, f"Dot plot. {caption}")]


def _wordings(findings: Findings) -> list[Block]:
    """The spread of a relation's wordings, before and after learning."""
    if not findings.paraphrases:
        return []
    rows = []
    for task, relation in findings.paraphrases.items():
        methods = findings.ordered(name for one in relation.wordings for name in one.scores)
        strip = {m: [one.scores[m].value for one in relation.wordings if m in one.scores] for m in methods}
        rows.append((findings.named(task), strip))
    score = called(findings.primary)
    caption = (
        f"{score} of every wording of a relation, before and after learning: the shorter a strip, the less the wording "
        "matters. The numbers, with intervals and n, stand below."
    )
    svg = pictures.strips(rows, unit=score, name="wordings")
    return [Picture("wordings", svg, caption, f"Strip plot. {caption}"), *tables.wordings(findings)]


def _curves(findings: Findings) -> list[Block]:
    panels = {}
    for method in findings.ordered(cell.method for cell in findings.cells):
        found = [findings.curve_of(cell) for cell in findings.done(method)]
        trainings = [curve for curve in found if curve]
        if trainings:
            panels[method] = trainings
    if not panels:
        return []
    caption = (
        "Development score per epoch. A thin line is a training (a task with a seed), the one with markers is their "
        "mean, n is their number. Epoch 0 is the start; a training that stopped early keeps its last score in the mean."
    )
    return [Picture("curves", pictures.curves(panels, name="curves"), caption, f"Learning curves. {caption}")]


def _changes(findings: Findings) -> list[Block]:
    """Some answers that learning the prompt mended, and some that it broke, of every task."""
    written, learned = findings.pair
    folds: list[Block] = []
    for task in findings.tasks:
        before, after = (_by_record(findings, next(iter(findings.done(name, task)), None)) for name in findings.pair)
        same = sorted(before.keys() & after.keys(), key=lambda key: sha256(key.encode("utf-8")).digest())
        gained = [(before[key], after[key]) for key in same if after[key].hit and not before[key].hit]
        lost = [(before[key], after[key]) for key in same if before[key].hit and not after[key].hit]
        if not same:
            continue
        title = (
            f"{findings.named(task)}: {len(gained):,} gained and {len(lost):,} lost of {len(same):,} {findings.unit}"
        )
        blocks = [
            _changed(pairs, f"{findings.named(task)}: {{shown}} {what} by {learned} against {written}.", findings.pair)
            for what, pairs in (("gained", gained), ("lost", lost))
        ]
        folds.append(Fold(title, blocks))
    if not folds:
        return []
    rule = (
        f"Right with {learned} and wrong with {written}, or the other way round, each with its lowest seed. Nobody "
        f"chose the {SHOWN_ANSWERS} shown: they come first when the records are ordered by their SHA-256."
    )
    return [Text(rule), *folds]


def _changed(pairs: list[tuple[Answer, Answer]], caption: str, names: tuple[str, str]) -> Table | Text:
    if not pairs:
        return Text(caption.replace("{shown}", "none"))
    shown = f"{min(len(pairs), SHOWN_ANSWERS)} of {len(pairs):,}"
    rows = []
    for before, after in pairs[:SHOWN_ANSWERS]:
        fields = {name: text for name, text in after.fields.items() if name != "y"}
        record = fields.get("x") or "; ".join(f"{name}: {text}" for name, text in fields.items())
        answers = [Entry(_cut(one.prediction), _ranked(one)) for one in (before, after)]
        rows.append([Entry(_cut(record)), Entry(_cut(after.target)), *answers])
    return Table(caption.replace("{shown}", shown), ["record", "target", *names], rows, numbers=False)


def _by_record(findings: Findings, cell: CellRecord | None) -> dict[str, Answer]:
    """A cell's answers by their record; equal records are told apart by their order."""
    seen: Counter[str] = Counter()
    found = {}
    for answer in findings.answers_of(cell) if cell is not None else []:
        key = json.dumps(answer.fields, sort_keys=True, ensure_ascii=False)
        seen[key] += 1
        found[f"{key} {seen[key]}"] = answer
    return found


def _ranked(answer: Answer) -> list[str]:
    if answer.rank == 0:
        return ["target is none of the answers"]
    return [] if answer.rank is None else [f"target has rank {answer.rank:,}"]


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 1]}…"
