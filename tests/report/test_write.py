"""The files of a report: the same bytes for the same results, any text shown as it is, and errors for damaged files."""

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from ptuning.errors import FileError
from ptuning.report.page import build_page
from ptuning.report.results_file import read_results
from ptuning.report.write import latex, write_report
from tests.report.conftest import Page, change, page_of


def test_the_same_files_give_the_same_bytes(lama: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Another folder, the user's matplotlib settings, or a second run change no byte and leave nothing behind."""
    import matplotlib

    other = tmp_path_factory.mktemp("other") / "copy"
    shutil.copytree(lama, other)
    write_report(lama)
    with matplotlib.rc_context():
        matplotlib.rc("font", size=30.0)
        matplotlib.rc("svg", hashsalt=None)
        before = dict(matplotlib.rcParams)
        write_report(other)
        assert dict(matplotlib.rcParams) == before
    names = ["report.html", "report.md", *(f"pictures/{name}.svg" for name in ("curves", "dots"))]
    for name in names:
        assert (lama / name).read_bytes() == (other / name).read_bytes(), name
    write_report(other)
    assert sorted(path.name for path in other.iterdir()) == [
        "cells", "pictures", "report.html", "report.md", "results.json",
    ]  # fmt: skip
    assert (lama / "report.html").read_bytes() == (other / "report.html").read_bytes()


def test_the_markdown_says_the_same(lama: Path) -> None:
    """A Markdown parser finds the same tables as in the HTML page, and the pictures exist."""
    from markdown_it import MarkdownIt

    page = page_of(lama)
    text = (lama / "report.md").read_text(encoding="utf-8")
    rendered = Page(MarkdownIt("commonmark").enable("table").render(text))

    def flat(tables: list[list[list[str]]]) -> list[list[list[str]]]:
        return [[[" ".join(cell.split()) for cell in row] for row in table] for table in tables]

    assert flat(rendered.tables) == flat(page.tables)
    images = [attributes["src"] for tag, attributes in rendered.tags if tag == "img"]
    assert images == [f"pictures/{name}.svg" for name in ("dots", "curves")]
    assert all((lama / str(name)).is_file() for name in images)
    sections = [section.heading for section in build_page(read_results(lama)).sections]
    assert re.findall(r"^## (.+)$", text, flags=re.MULTILINE) == sections


def test_names_are_shown_as_text_and_never_as_markup(lama: Path) -> None:
    page = page_of(lama)
    html = (lama / "report.html").read_text(encoding="utf-8")
    assert not {tag for tag, _ in page.tags} & {"script", "i", "link", "img", "iframe", "object", "form"}
    for text in ("P103 (native <b>language</b> | $x_1$)", "city <3>", "a <script>", "'<all>'"):
        assert text in page.text
        assert text not in html
    for name in ("dots", "curves"):
        root = ElementTree.parse(lama / "pictures" / f"{name}.svg").getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "P103 (native <b>langu…" in "".join(ElementTree.parse(lama / "pictures" / "dots.svg").getroot().itertext())


def test_the_page_needs_nothing_but_itself(lama: Path) -> None:
    html = write_report(lama).read_text(encoding="utf-8")
    page = Page(html)
    ids = [str(attributes["id"]) for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "data", "action", "srcset"):
                assert str(value).startswith("#"), (tag, name, value)
                assert str(value)[1:] in ids, value
            if name == "aria-labelledby":
                assert value in ids
            assert not name.startswith("on"), (tag, name)
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?([^)]*)", html))
    assert "@import" not in html
    assert set(re.findall(r"https?://[^\"' <]+", html)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }


def test_pictures_of_an_earlier_report_do_not_stay(lama: Path) -> None:
    write_report(lama)
    change(lama, lambda results: results.update(tasks={}))
    write_report(lama)
    assert sorted(path.name for path in (lama / "pictures").iterdir()) == ["curves.svg"]


def test_a_missing_or_cut_file_is_an_error(compare: Path, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"results\.json"):
        write_report(tmp_path / "nothing")
    for path in (compare / "cells" / "P36" / "p-tuning" / "seed-0" / "predictions.jsonl", compare / "results.json"):
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(FileError, match=rf"{path.name}.*cut off"):
            write_report(compare)
    assert not (compare / "report.html").exists()


def test_matplotlib_and_jinja_are_loaded_only_when_a_report_is_made() -> None:
    code = "import sys, ptuning.report.write; print({'matplotlib', 'jinja2', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "set()"


def test_the_templates_are_part_of_the_package() -> None:
    root = Path(__file__).resolve().parents[2]
    text = (root / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.findall(r'"([^"]+)"', re.findall(r"^ptuning = \[(.+?)\]$", text, flags=re.MULTILINE | re.DOTALL)[0])
    packaged = {path for pattern in listed for path in (root / "src" / "ptuning").glob(pattern)}
    files = set((root / "src" / "ptuning" / "report" / "pages").iterdir())
    assert {path.name for path in files} == {"report.html.jinja", "report.md.jinja"}
    assert files <= packaged


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle))


@pytest.mark.usefixtures("undrawn")
def test_every_table_of_the_page_has_its_file(lama: Path) -> None:
    """The numbers are those of the page's tables, folded ones too."""
    count = len(page_of(lama).tables)
    assert not (lama / "tables").exists()
    write_report(lama, formats=["latex", "csv"])
    names = sorted(path.name for path in (lama / "tables").iterdir())
    assert len(names) == 2 * count
    assert names[0] == "table-01-scores.csv"
    assert {name[:9] for name in names} == {f"table-{number:02d}-" for number in range(1, count + 1)}
    change(lama, lambda results: results["macro"]["manual"]["p_at_1"].update(value=0.123456))
    write_report(lama)  # tables that are there are written again, and stay what the page says
    assert "0.123456" in (lama / "tables" / "table-01-scores.csv").read_text(encoding="utf-8")
    change(lama, lambda results: results.update(by_type={}))
    write_report(lama)
    assert len(list((lama / "tables").iterdir())) == 2 * len(page_of(lama).tables) < 2 * count
    (lama / "tables" / "table-1-mine.csv").write_text("a,b\n", encoding="utf-8")
    (lama / "tables" / "mine.csv").write_text("a,b\n", encoding="utf-8")
    with pytest.raises(FileError, match=r"table-1-mine\.csv is in the way"):
        write_report(lama)
    (lama / "tables" / "table-1-mine.csv").unlink()
    write_report(lama)
    assert (lama / "tables" / "mine.csv").is_file()


@pytest.mark.usefixtures("undrawn")
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


@pytest.mark.usefixtures("undrawn")
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
    best = max(scores["p_at_1"].value for scores in read_results(lama).macro.values())
    assert rf"\textbf{{{100 * best:.1f}~\%}}" in scores
    assert r"\label{tab:01-scores}" in scores
    assert build_page(read_results(lama)).sections[0].heading == "Scores"
