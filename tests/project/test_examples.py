"""The files of ``examples/`` are those that the script builds."""

from pathlib import Path

from tests.conftest import ROOT, load_script


def test_rebuilding_gives_the_same_bytes(tmp_path: Path) -> None:
    load_script("build_examples").build(tmp_path)
    built, kept = (
        {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path, ROOT / "examples")
    )
    assert built == kept
