"""Tables as files for a paper: every table, nothing rounded in CSV, and names that LaTeX prints as they are."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

from ptuning.errors import FileError
from ptuning.report.exports import latex
from ptuning.report.results_file import read_results
from ptuning.report.sections import build_page
from ptuning.report.write import write_report
from tests.report.conftest import change, page_of

pytestmark = pytest.mark.usefixtures("undrawn")


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle))


def test_every_table_of_the_page_has_its_file(lama: Path) -> None:
    """The numbers are those of the page's tables, folded ones too."""
    count = len(page_of(lama).tables)
    assert not (lama / "tables").exists()
    write_report(lama, formats=["latex", "csv"])
    names = sorted(path.name for path in (lama / "tables").iterdir())
    assert len(names) == 2 * count
    assert names[0] == "table-01-scores.csv"
    assert {name[:9] for name in names} == {f"table-{number:02d}-" for number in range(1, count + 1)}
    change(lama, lambda found: found["macro"]["manual"]["p_at_1"].update(value=0.123456))
    write_report(lama)  # tables that are there are written again, and stay what the page says
    assert "0.123456" in (lama / "tables" / "table-01-scores.csv").read_text(encoding="utf-8")
    change(lama, lambda found: found.update(by_type={}))
    write_report(lama)
    assert len(list((lama / "tables").iterdir())) == 2 * len(page_of(lama).tables) < 2 * count
    (lama / "tables" / "table-1-mine.csv").write_text("a,b\n", encoding="utf-8")
    (lama / "tables" / "mine.csv").write_text("a,b\n", encoding="utf-8")
    with pytest.raises(FileError, match=r"table-1-mine\.csv is in the way"):
        write_report(lama)
    (lama / "tables" / "table-1-mine.csv").unlink()
    write_report(lama)
    assert (lama / "tables" / "mine.csv").is_file()


def test_csv_has_the_numbers_of_the_file(lama: Path) -> None:
    write_report(lama, formats=["csv"])
    assert not list((lama / "tables").glob("*.tex"))
    macro = json.loads((lama / "results.json").read_text(encoding="utf-8"))["macro"]
    rows = rows_of(lama / "tables" / "table-01-scores.csv")
    assert [row["method"] for row in rows] == list(macro)
    assert {row["ptuning table"] for row in rows} == {"Scores"}
    for row in rows:
        for shown, name in (("P@1", "p_at_1"), ("MRR", "mrr")):
            score = macro[row["method"]].get(name, dict.fromkeys(("value", "low", "high", "n", "std")))
            own = {"": "value", " low": "low", " high": "high", " n": "n", " std": "std"}
            assert {key: row[shown + key] for key in own} == {
                key: "" if score[field] is None else str(score[field]) for key, field in own.items()
            }
    (path,) = (lama / "tables").glob("*-differences.csv")
    assert rows_of(path)[0]["P@1"] == "0.25"
    assert rows_of(path)[0]["P@1 low"] == "0.21"
    (path,) = (lama / "tables").glob("*-every-task.csv")
    assert rows_of(path)[1]["task"] == "P103 (native <b>language</b> | $x_1$)"


def test_latex_prints_names_as_they_are(lama: Path) -> None:
    r"""Special characters are escaped, and no cell begins with a bracket, which \\ would take for its argument."""
    assert latex(r"50 % of $x_1$ & {a} #1 ~ ^ \n") == (
        r"50 \% of \$x\_1\$ \& \{a\} \#1 \textasciitilde{} \textasciicircum{} \textbackslash{}n"
    )
    assert latex("[X] <b> | “a” −1.5\N{NO-BREAK SPACE}% ★\x1b") == (
        r"{[}X{]} \textless{}b\textgreater{} \textbar{} ``a'' $-$1.5~\% bold print"
    )
    write_report(lama, formats=["latex"])
    for path in (lama / "tables").iterdir():
        text = path.read_text(encoding="utf-8")
        assert text.startswith("% written by ptuning; it needs \\usepackage{booktabs}\n\\begin{table}\n")
        body = text.partition(r"\toprule")[2].partition(r"\bottomrule")[0]
        assert not re.search(r"\\\\\s*\[", body)
        assert not re.search(r"(?<!\\)[%#_^~](?!\\)", body.replace("~\\%", "")), path
        assert text.count("{") - text.count("\\{") == text.count("}") - text.count("\\}")
        row = next(line for line in body.splitlines() if line.endswith("\\\\"))
        columns = len(re.split(r"(?<!\\)&", row))
        assert all(len(re.split(r"(?<!\\)&", line)) == columns for line in body.splitlines() if line.endswith("\\\\"))
    scores = (lama / "tables" / "table-01-scores.tex").read_text(encoding="utf-8")
    best = max(one["p_at_1"].value for one in read_results(lama).macro.values())
    assert rf"\textbf{{{100 * best:.1f}~\%}}" in scores
    assert r"\label{tab:01-scores}" in scores
    assert build_page(read_results(lama)).sections[0].heading == "Scores"
