"""Other layouts of LAMA's data: the package names the script that converts them, and reads what it writes."""

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from ptuning.data.lama import Relation, read_relations, split_relation
from ptuning.errors import FileError, PTuningError, RecordError
from tests.conftest import load_script
from tests.data.test_lama import CAPITALS, COUNTRIES, LIST, Rows, divided, lama, pairs, write

script = load_script("convert_lama")


def converted(source: str | Path, out: Path, *, is_refused: bool = True) -> list[Relation]:
    """Convert, and read what is written. The package refuses the source, and says how to convert it."""
    if is_refused:
        with pytest.raises(PTuningError, match=rf"python scripts/convert_lama\.py {re.escape(str(source))}"):
            read_relations(source)
    script.convert(source, out)
    return read_relations(out)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_both_kept_layouts_stay_what_they_are(tmp_path: Path, suffix: str) -> None:
    """Fields, order, templates and paraphrases: so a seed draws the same facts before and after."""
    source = lama(tmp_path / "a", suffix)
    divided(source, "P1", "train", "dev", "test")
    write(source / "paraphrases" / "P36.jsonl", [{"pattern": "[Y] of [X]"}, {"pattern": "the [sic] [X] is [Y]"}])
    write(source / "ConceptNet" / "test.jsonl", [{"sub": "a", "masked_sentences": ["It is [MASK]."], "obj_label": "b"}])
    before, after = read_relations(source), converted(source, tmp_path / "b", is_refused=False)
    for one, other in zip(before, after, strict=True):
        assert replace(one, source="", parts={}) == replace(other, source="", parts={})
        assert one.parts == other.parts
    drawn = [split_relation(found[2]) for found in (before, after)]
    assert [one.name for one in (before[2], after[2])] == ["P17", "P17"]
    assert drawn[0].test == drawn[1].test


def test_p_tunings_own_folder(tmp_path: Path) -> None:
    divided(tmp_path / "a" / "fact-retrieval" / "original", "P36", "train", "dev", "test")
    write(tmp_path / "a" / "single_relations" / "P36.jsonl", LIST[1:2])
    (found,) = converted(tmp_path / "a", tmp_path / "b")
    assert (found.name, found.template) == ("P36", "The capital of [X] is [Y] .")


@pytest.mark.parametrize("parts", [["train"], ["train", "dev"]])
def test_optiprompt_is_tested_on_lamas_facts(tmp_path: Path, parts: list[str]) -> None:
    divided(tmp_path / "a" / "data" / "autoprompt_data", "P36", *parts)
    write(tmp_path / "a" / "data" / "LAMA-TREx" / "P36.jsonl", CAPITALS)
    write(tmp_path / "a" / "relation_metainfo" / "LAMA_relations.jsonl", LIST)
    (found,) = converted(tmp_path / "a", tmp_path / "b")
    assert list(found.parts) == [*parts, "test"]
    assert len(found.parts["test"]) == len(CAPITALS)
    assert found.label == "capital"
    script.convert(tmp_path / "a" / "data" / "autoprompt_data", tmp_path / "c")
    assert read_relations(tmp_path / "c")[0].label == "capital"  # its list is two folders up
    # A test part of its own is not replaced.
    divided(tmp_path / "a" / "data" / "autoprompt_data", "P36", "test")
    assert len(converted(tmp_path / "a", tmp_path / "d")[0].parts["test"]) == 6


@pytest.mark.parametrize("patterns", ["graphs_json", "paraphrases", "pattern_data", "pattern_data/graphs_json"])
def test_pararel(tmp_path: Path, patterns: str) -> None:
    write(tmp_path / "a" / "data" / "trex_lms_vocab" / "P36.jsonl", CAPITALS)
    write(tmp_path / "a" / "data" / "trex_lms_vocab" / "P31.jsonl", COUNTRIES)
    rows = [{"pattern": text, "lemma": "capital"} for text in ("[Y] of [X] ", "[X] has [Y]", "[Y] of [X]")]
    write(tmp_path / "a" / "data" / patterns / "P36.jsonl", rows)
    without, found = converted(tmp_path / "a", tmp_path / "b")
    assert (without.template, without.label, without.type, without.paraphrases) == (None, None, None, ())
    assert found.paraphrases == ("[Y] of [X]", "[X] has [Y]")  # without the double, stripped


def hub_rows() -> Rows:
    row = {"template": "The capital of [X] is [Y] .", "label": "capital", "type": "1-1", "masked_sentence": "[MASK] a"}
    rows: list[Mapping[str, object]] = [{**row, **fact, "predicate_id": "P36"} for fact in CAPITALS]
    rows += [{**row, **fact, "template": "", "label": "", "type": "", "predicate_id": "P17"} for fact in COUNTRIES]
    return rows


@pytest.mark.parametrize(
    "names",
    [["train.jsonl"], ["a.csv"], ["a.parquet"], ["trex/train.parquet"], ["a.jsonl", "b.csv"],
     ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]],
)  # fmt: skip
def test_the_hubs_files(tmp_path: Path, names: list[str]) -> None:
    """One file or several, whose rows say which relation they are of and what it is."""
    rows = hub_rows()
    for index, name in enumerate(names):
        write(tmp_path / "a" / name, rows[index :: len(names)])
    write(tmp_path / "a" / "dataset_infos.json", [{"no": "facts"}])
    is_read = len(names) == 1 and "/" not in names[0]  # one file needs no conversion
    country, capital = converted(tmp_path / "a", tmp_path / "b", is_refused=not is_read)
    assert (country.name, country.template, country.label, country.type) == ("P17", None, None, None)
    assert (capital.template, capital.label, capital.type) == ("The capital of [X] is [Y] .", "capital", "1-1")
    assert sorted(pairs(capital.parts["facts"])) == sorted((str(f["sub_label"]), str(f["obj_label"])) for f in CAPITALS)
    assert "template" not in capital.parts["facts"][0]
    assert [each.name for each in read_relations(tmp_path / "b", which=["1-1"])] == ["P36"]
    if is_read:
        direct = [replace(one, source="", parts={}) for one in read_relations(tmp_path / "a")]
        assert direct == [replace(one, source="", parts={}) for one in (country, capital)]
    else:
        with pytest.raises(PTuningError, match="python scripts/convert_lama"):
            read_relations(tmp_path / "a", which=["P36"])
    if len(names) == 1:
        assert len(converted(tmp_path / "a" / names[0], tmp_path / "c", is_refused=not is_read)) == 2


def fake_datasets(monkeypatch: pytest.MonkeyPatch, load: Callable[..., object], version: str = "4.0.0") -> None:
    module = ModuleType("datasets")
    module.__version__ = version  # type: ignore[attr-defined]
    module.load_dataset = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []

    def load(name: str, config: str | None, *, split: str | None) -> object:
        asked.append((name, config, split))
        rows = hub_rows() if config != "squad" else [{"masked_sentence": "It is [MASK].", "obj_label": "a"}]
        return rows if split else {"train": rows, "validation": rows} if config == "both" else {"train": rows}

    fake_datasets(monkeypatch, load)
    assert [each.name for each in converted("hub:facebook/lama:trex", tmp_path / "1")] == ["P17", "P36"]
    assert [each.name for each in converted("hub:lama", tmp_path / "2")] == ["P17", "P36"]
    assert list(converted("hub:lama:both", tmp_path / "3")[0].parts) == ["train", "dev"]
    (squad,) = converted("hub:lama:squad:train", tmp_path / "4")
    assert (squad.name, squad.template) == ("squad", "{before}[Y]{after}")
    assert asked == [
        ("facebook/lama", "trex", None),
        ("lama", None, None),
        ("lama", "both", None),
        ("lama", "squad", "train"),
    ]
    converted("hub:lama::train[:9]", tmp_path / "5")
    assert asked[-1] == ("lama", None, "train[:9]")
    with pytest.raises(FileError, match="'hub::trex' names no data set; write hub:NAME"):
        converted("hub::trex", tmp_path / "6")


def test_what_cannot_be_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("autoprompt_data", "cmp_lms_data"):
        divided(tmp_path / "several" / name, "P36", "train")
    write(tmp_path / "twice" / "a.jsonl", hub_rows())
    write(tmp_path / "twice" / "P36.jsonl", CAPITALS)
    write(tmp_path / "mixed" / "download" / "train.jsonl", hub_rows())
    (tmp_path / "empty").mkdir()
    for name in ("several", "twice", "mixed", "empty"):
        with pytest.raises((FileError, RecordError)):
            script.convert(tmp_path / name, tmp_path / "out")
    lama(tmp_path / "a")
    with pytest.raises(FileError, match="not empty"):
        script.convert(tmp_path / "a", tmp_path / "several")
    fake_datasets(monkeypatch, lambda *_, **__: pytest.fail("it was asked"), version="3.6.0")  # runs code of data sets
    with pytest.raises(FileError, match="datasets>=4"):
        script.convert("hub:lama", tmp_path / "out")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(FileError, match="pip install datasets"):
        script.convert("hub:lama", tmp_path / "out")
