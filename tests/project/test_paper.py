"""The figures of docs/evidence/paper.md are those of docs/evidence/lama.json."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.conftest import load_script


@pytest.fixture(scope="module")
def lama() -> ModuleType:
    return load_script("lama")


def test_the_documented_tables_are_those_of_the_documented_results(lama: ModuleType) -> None:
    page = lama.PAGE.read_text(encoding="utf-8")
    found = lama.read_figures(lama.FIGURES)
    assert len(found) == 31
    for text in lama.tables(found).values():
        assert text in page


def test_results_of_several_runs_are_put_together(lama: ModuleType, tmp_path: Path) -> None:
    def results(name: str, relation: str, **hits: int) -> Path:
        scores: dict[str, Any] = {
            method.replace("_", "-"): {"p_at_1": {"value": count / 7, "n": 7}} for method, count in hits.items()
        }
        whole = {"tasks": {relation: scores}, "task_info": {relation: {"label": "a", "type": "N-1"}}}
        (tmp_path / name).write_text(json.dumps(whole), encoding="utf-8")
        return tmp_path / name

    files = [results("1", "P36", manual=1), results("2", "P7", manual=2, p_tuning=7), results("3", "P36", p_tuning=5)]
    found = lama.gathered(files[:2], {})
    found = lama.gathered([results("4", "P36", manual=7), *files[2:]], found)
    assert list(found) == ["P7", "P36"]
    assert found["P36"] == {"label": "a", "type": "N-1", "hits": {"manual": 1, "p-tuning": 5}, "n": 7}
    assert lama.apart(found, "p-tuning", "manual") == pytest.approx([5 / 7, 4 / 7])
    with pytest.raises(ValueError, match="P7 has 7 test facts, and 8 elsewhere"):
        lama.gathered(files, {"P7": {"label": "a", "type": "N-1", "n": 8, "hits": {}}})


def test_prompts_in_every_layer_stand_beside_the_others_once_they_ran_on_all_relations(lama: ModuleType) -> None:
    every = {*lama.NAMES, *(name for part in lama.PARTS.values() for name in part)}
    hits = {**dict.fromkeys(every, 2), "p-tuning": 5, "p-tuning-v2": 6, "hybrid": 8}
    rows = {
        f"P{at}": {"label": "a", "type": lama.TYPES[at], "n": 10, "hits": {name: n + at for name, n in hits.items()}}
        for at in range(3)
    }
    tables = lama.tables(rows)
    assert tables["each"].splitlines()[0].endswith("| P-tuning | P-tuning v2 | hybrid |")
    assert "| hybrid, one tried setting, bfloat16 | 0.900 |" in tables["macro"]
    lines = tables["deep"].splitlines()[2:]
    assert [line.split(" | ")[:2] for line in lines] == [
        ["| hybrid − examples in context", "+0.600"], ["| hybrid − P-tuning", "+0.300"],
        ["| hybrid − P-tuning v2", "+0.200"], ["| P-tuning v2 − examples in context", "+0.400"],
        ["| P-tuning v2 − P-tuning", "+0.100"],
    ]  # fmt: skip
    del rows["P1"]["hits"]["hybrid"]
    assert "hybrid" not in "".join(lama.tables(rows).values())


def test_a_part_of_the_relations_is_compared_where_all_of_its_methods_ran(lama: ModuleType) -> None:
    both = {"label": "a", "type": "N-1", "n": 10, "hits": {"p-tuning": 6, "fine-tuning": 4}}
    one = {"label": "b", "type": "1-1", "n": 10, "hits": {"p-tuning": 6}}
    lines = lama.part({"P1": both, "P2": one}, {"fine-tuning": "FT", "p-tuning": "P-tuning"}).splitlines()
    assert len(lines) == 5
    assert lines[2].startswith("| P1 | a | N-1 | 10 | 0.400 [")
    assert "**0.400**" in lines[3]
    assert "of 1 relations" in lines[3]
    assert "+0.200" in lines[4]
