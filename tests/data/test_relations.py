"""Relations in both layouts: what is read from which file, which relations are chosen, and what is wrong with a row."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from ptuning.backbone.backbone import Backbone
from ptuning.data.relations import read_relations
from ptuning.data.splits import split_relation
from ptuning.errors import FileError, RecordError
from ptuning.files import sha256
from ptuning.template.language import Template
from tests.conftest import bound, spoken
from tests.data.test_splits import check_whole, many, pairs, parts_of, relation

Rows = Sequence[Mapping[str, object]]

CAPITALS: Rows = [{"sub_label": f"Land {number}", "obj_label": f"Town {number}"} for number in range(20)]
COUNTRIES: Rows = [{"sub_label": f"Lake {number}", "obj_label": "Kenya"} for number in range(5)]
LIST: Rows = [
    {"relation": "P103", "template": "The native language of [X] is [Y] .", "label": "native language", "type": "N-1"},
    {"relation": "P36", "template": "The capital of [X] is [Y] .", "label": "capital", "type": "1-1"},
    {"relation": "P17", "template": "[X] is located in [Y] .", "label": "country", "type": "N-1"},
]


def write(path: Path, rows: Rows) -> Path:
    """Write rows in the format that the path's ending names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([dict(row) for row in rows]), path)
    elif path.suffix == ".csv":
        lines = [",".join(f'"{row[name]}"' for name in rows[0]) for row in rows]
        path.write_text("\n".join([",".join(rows[0]), *lines]), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def lama(folder: Path, suffix: str = ".jsonl") -> Path:
    write(folder / f"relations{suffix}", LIST)
    write(folder / "TREx" / f"P36{suffix}", CAPITALS)
    write(folder / "TREx" / f"P17{suffix}", COUNTRIES)
    write(folder / "TREx" / f"P103{suffix}", [{"sub_label": "Ann", "obj_label": "Czech"}])
    return folder


# The layouts


@pytest.mark.parametrize("below", ["", "data"])
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_the_original_release(tmp_path: Path, suffix: str, below: str) -> None:
    lama(tmp_path / below, suffix)
    first, second, third = read_relations(tmp_path)
    assert [first.name, second.name, third.name] == ["P17", "P36", "P103"]
    assert (second.template, second.label, second.type) == ("The capital of [X] is [Y] .", "capital", "1-1")
    assert second.paraphrases == ()
    path = tmp_path / below / "TREx" / f"P36{suffix}"
    assert second.source == second.parts["facts"].name == str(path)
    assert second.parts["facts"].sha256 == sha256(path.read_bytes())
    assert second.parts["facts"][3] == {"sub_label": "Land 3", "obj_label": "Town 3", "x": "Land 3", "y": "Town 3"}
    assert set(second.parts) == {"facts"}


def test_a_folder_of_facts_with_its_list_above(tmp_path: Path) -> None:
    lama(tmp_path)
    write(tmp_path / "paraphrases" / "P36.jsonl", [{"pattern": "[Y], capital of [X]"}])
    assert read_relations(tmp_path / "TREx") == read_relations(tmp_path)
    assert read_relations(tmp_path / "TREx", which=["P36"])[0].paraphrases == ("[Y], capital of [X]",)
    assert read_relations(tmp_path / "TREx" / "P36.jsonl") == read_relations(tmp_path, which=["P36"])


def test_google_re(tmp_path: Path) -> None:
    """Its templates are in LAMA's code, and LAMA leaves out what more raters found false than true."""
    yes, no = {"rater": "1", "judgment": "yes"}, {"rater": "2", "judgment": "no"}
    rows = [
        {"pred": "/people/person/place_of_birth", "sub": "/m/0", "sub_label": f"Ann {number}", "obj_label": "Lima",
         "judgments": judgments, "masked_sentences": ["Ann was born in [MASK] ."]}
        for number, judgments in enumerate([[yes, no], [yes, no, no], [no], [], [yes]] + [[yes]] * 10)
    ]  # fmt: skip
    for name in ("place_of_birth", "place_of_death", "date_of_birth"):
        write(tmp_path / "Google_RE" / f"{name}_test.jsonl", rows)
    date, birth, death = read_relations(tmp_path)
    assert [date.template, birth.template, death.template] == [
        "[X] (born [Y]).",
        "[X] was born in [Y] .",
        "[X] died in [Y] .",
    ]
    split = split_relation(birth)
    check_whole(split)
    assert split.dropped == {"judged false by its raters": 2}
    # The hub has the same judgments as text, in Python's way of writing.
    hub = [{**row, "judgments": str(row["judgments"]), "template": "[X] was born in [Y] ."} for row in rows]
    write(tmp_path / "hub" / "TREx" / "place_of_birth.jsonl", hub)
    (from_hub,) = read_relations(tmp_path / "hub")
    assert split_relation(from_hub).dropped == split.dropped


SENTENCES = [
    "One of the things you do when you are alive is [MASK].",
    "[MASK] is a good film",
    'It was "[MASK]" (in 1999).',
    "They were  [MASK] , and great.",
]


def sentence_rows() -> Rows:
    return [
        {"sub": f"s{index}", "obj": "x", "pred": "IsA", "masked_sentences": [text], "obj_label": "yes", "uuid": "1"}
        for index, text in enumerate(SENTENCES)
    ]


def test_a_sentence_of_its_own_for_each_fact(tmp_path: Path) -> None:
    write(tmp_path / "ConceptNet" / "test.jsonl", sentence_rows())
    (found,) = read_relations(tmp_path)
    assert (found.name, found.template) == ("ConceptNet", "{before}[Y]{after}")
    facts = found.parts["facts"]
    assert [record["before"] + "[MASK]" + record["after"] for record in facts] == SENTENCES
    assert pairs(facts)[0] == ("s0", "yes")
    assert facts[0]["before"].endswith("alive is ")
    assert facts[0]["after"] == "."


def test_sentences_are_tokenised_as_if_nobody_had_cut_them(backbone: Backbone, tmp_path: Path) -> None:
    """The space in front of the mask is the target's, as in a template, and no token of its own."""
    write(tmp_path / "ConceptNet" / "test.jsonl", sentence_rows())
    (found,) = read_relations(tmp_path)
    assert found.template is not None
    for text, record in zip(SENTENCES, found.parts["facts"], strict=True):
        if backbone.kind == "causal" and text.startswith("[MASK]"):
            continue  # GPT-2 has nothing in front of the target there
        literal = Template.parse(text.replace("[MASK]", "[Y]"))
        (cut,) = bound(backbone, found.template).examples([record])
        (whole,) = bound(backbone, str(literal)).examples([record])
        assert spoken(cut, []) == spoken(whole, [])
        assert cut.target_ids == whole.target_ids


def test_a_subject_that_says_nothing_is_replaced_by_the_sentence(tmp_path: Path) -> None:
    """All of SQuAD's facts have the subject "Squad": split by it, they would all be in one part."""
    rows = [
        {"masked_sentences": [f"Sentence {number} is [MASK]."], "obj_label": "gold", "sub_label": "Squad"}
        for number in range(20)
    ]
    write(tmp_path / "Squad" / "test.jsonl", rows)
    write(tmp_path / "ConceptNet" / "test.jsonl", [*sentence_rows(), {**rows[0], "sub_label": ""}])
    conceptnet, squad = read_relations(tmp_path)
    assert squad.parts["facts"][3]["x"] == "Sentence 3 is [MASK]."
    assert [len(part) for part in parts_of(split_relation(squad))] == [12, 4, 4]
    assert conceptnet.parts["facts"][-1]["x"] == "Sentence 0 is [MASK]."


def test_a_sentence_needs_one_mask(tmp_path: Path) -> None:
    rows = [{"masked_sentences": [f"S{number} is", "[MASK]."], "obj_label": "gold"} for number in range(9)]
    bad = [{"masked_sentences": [text], "obj_label": "gold"} for text in ("no mask", "[MASK] or [MASK]")]
    write(tmp_path / "Squad" / "test.jsonl", [*rows, *bad])
    (found,) = read_relations(tmp_path)
    assert found.parts["facts"][0]["before"] == "S0 is "
    split = split_relation(found)
    check_whole(split)
    assert split.dropped == {"not exactly one [MASK] in the sentence": 2}


def divided(folder: Path, name: str, *parts: str) -> None:
    for part in parts:
        rows = [{"sub_label": f"{part} {number}", "obj_label": "a"} for number in range(6)]
        write(folder / name / f"{part}.jsonl", rows)


@pytest.mark.parametrize("list_folder", [".", "..", "data"])
def test_a_folder_of_parts_for_each_relation(tmp_path: Path, list_folder: str) -> None:
    """The second layout, with the list of relations beside or above, or in data/."""
    folder = tmp_path / "all"
    divided(folder, "P36", "test", "dev", "train")
    divided(folder, "P17", "train", "dev", "test")
    write(folder / "P17" / "P17.jsonl", CAPITALS)  # AutoPrompt keeps the undivided facts there, too
    write(folder / list_folder / "relations.jsonl", LIST)
    first, second = read_relations(folder)
    assert (first.name, second.name, second.label) == ("P17", "P36", "capital")
    assert list(second.parts) == ["train", "dev", "test"]
    assert list(first.parts) == ["train", "dev", "test"]
    assert second.source == str(folder / "P36")
    assert split_relation(second).how == "the parts given"
    assert [each.parts for each in read_relations(folder / "P36")] == [second.parts]  # one of these folders alone
    write(folder / "P17" / "more.jsonl", CAPITALS)
    assert [each.parts for each in read_relations(folder / "P17")] == [first.parts]
    assert [each.name for each in read_relations(folder / "P17" / "train.jsonl")] == ["P17"]


def test_facts_of_one_relation_in_two_places_are_an_error(tmp_path: Path) -> None:
    """OptiPrompt trains on other facts than LAMA's and is tested on these; the script joins them."""
    lama(tmp_path)
    divided(tmp_path, "P36", "train", "dev")
    with pytest.raises(FileError, match=r"facts of P36 are in two places, .*P36 and .*TREx; .*convert_lama\.py"):
        read_relations(tmp_path)


def test_files_that_name_no_relation_are_relations_themselves(tmp_path: Path) -> None:
    write(tmp_path / "capitals.jsonl", [{"x": "Kenya", "y": "Nairobi"}])
    write(tmp_path / "rivers.csv", [{"x": "Kenya", "y": "Tana"}])
    assert [(each.name, len(each.parts["facts"])) for each in read_relations(tmp_path)] == [
        ("capitals", 1),
        ("rivers", 1),
    ]


OWN: Rows = [
    {"relation": name, "subject": f"Land {number}", "object": f"Town {number}"}
    for number in range(6)
    for name in ("P36", "P1376")
]


def test_own_facts_in_one_file_with_own_names_of_columns(tmp_path: Path) -> None:
    """The rows name their relations, and fields are read under other names."""
    path = write(tmp_path / "facts.csv", OWN)
    write(tmp_path / "relations.jsonl", LIST)
    fields = {"sub_label": "subject", "obj_label": "object"}
    for source in (tmp_path, path):
        first, second = read_relations(source, fields=fields)
        assert (first.name, second.name) == ("P36", "P1376")
        assert first.template == "The capital of [X] is [Y] ."
        assert second.template is None
        assert pairs(second.parts["facts"]) == [(f"Land {number}", f"Town {number}") for number in range(6)]
    (only,) = read_relations(path, which=["P1376"], fields={"predicate_id": "relation", **fields})
    assert pairs(only.parts["facts"]) == pairs(second.parts["facts"])
    with pytest.raises(
        RecordError, match=r"'P63'\. Did you mean 'P36'\? Found: P36, P1376, 1-1, all\. A relation is named by"
    ):
        read_relations(path, which=["P63"], fields=fields)
    with pytest.raises(RecordError, match=r"facts\.csv, line 2: no field 'subjekt' to use as 'x'; it has object, re"):
        read_relations(path, fields={"x": "subjekt"})
    with pytest.raises(RecordError, match=r"has object, relation, subject\. Name yours with --field sub_label=NAME"):
        read_relations(path)
    path.write_text(f"{path.read_text()}\n ,Oslo,Norway\n")
    with pytest.raises(RecordError, match=r"facts\.csv, line 14: the row names no relation, and others of its file do"):
        read_relations(path, fields=fields)


def test_rows_of_one_relation_are_found_by_its_name_and_by_the_file_s(tmp_path: Path) -> None:
    write(tmp_path / "facts.csv", [row for row in OWN if row["relation"] == "P36"])
    fields = {"x": "subject", "y": "object"}
    for name in ("P36", "facts"):
        assert [one.name for one in read_relations(tmp_path, which=[name], fields=fields)] == [name]


def test_rows_that_all_say_the_same_describe_their_relation(tmp_path: Path) -> None:
    rows = [{**row, "template": "[X] is led from [Y]", "label": "not of the relation"} for row in CAPITALS]
    (found,) = read_relations(write(tmp_path / "P36.csv", rows))
    assert (found.template, found.label) == ("[X] is led from [Y]", None)
    (found,) = read_relations(write(tmp_path / "P36.csv", [*rows[1:], {**rows[0], "template": "[X], [Y]"}]))
    assert found.template is None


def test_paraphrases_in_a_folder_of_pararels_name(tmp_path: Path) -> None:
    write(tmp_path / "P36.jsonl", CAPITALS)
    write(tmp_path / "patterns" / "P36.jsonl", [{"pattern": "[Y], capital of [X]", "lemma": "capital"}])
    (found,) = read_relations(tmp_path)
    assert found.paraphrases == ("[Y], capital of [X]",)


# What is chosen, and what is wrong


def test_names_types_and_all(tmp_path: Path) -> None:
    lama(tmp_path)

    def names(*which: str) -> list[str]:
        return [each.name for each in read_relations(tmp_path, which=which)]

    assert names("all") == ["P17", "P36", "P103"]
    assert names("P103", "P36", "P36") == ["P36", "P103"]
    assert names("N-1") == ["P17", "P103"]
    assert names("P36", "N-1", "all") == ["P17", "P36", "P103"]
    assert [each.name for each in read_relations(tmp_path, which="P36")] == ["P36"]  # a lone name is no list of letters
    with pytest.raises(
        RecordError, match=r"no relation of the name 'P102'\. Did you mean 'P103'\? Found: P17, P36, P1"
    ):
        names("P102")
    with pytest.raises(RecordError, match=r"no relation of the type 'N-M'\..* Found: P17, P36, P103, 1-1, N-1, all"):
        names("N-M")
    with pytest.raises(RecordError, match="no relation is chosen; name some, or 'all'"):
        names()


def test_a_relation_without_facts_is_left_out_with_a_notice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lama(tmp_path)
    (tmp_path / "TREx" / "P103.jsonl").unlink()
    (tmp_path / "TREx" / "P17.jsonl").write_text("\n")
    with caplog.at_level(logging.WARNING):
        assert [each.name for each in read_relations(tmp_path)] == ["P36"]
    assert "listed, but without facts, and left out: P103" in caplog.text
    assert "P17: no facts in" in caplog.text
    with pytest.raises(RecordError, match="the relation P103 is listed, but there are no facts of it"):
        read_relations(tmp_path, which=["P103"])
    with pytest.raises(RecordError, match="none of the chosen relations has facts"):
        read_relations(tmp_path, which=["P17"])


def test_only_what_is_chosen_is_read(tmp_path: Path) -> None:
    lama(tmp_path)
    (tmp_path / "TREx" / "P17.jsonl").write_text('{"sub_label": "a", "obj_label": "b"}\n{"sub')
    assert [each.name for each in read_relations(tmp_path, which=["P36"])] == ["P36"]
    with pytest.raises(RecordError, match=r"P17\.jsonl, line 2: not a JSON object"):
        read_relations(tmp_path)


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(FileError, match=r"holds no relations\. Looked for: .*TREx/P36\.jsonl.* Found: a\.txt, notes/"):
        read_relations(tmp_path)
    with pytest.raises(FileError, match=r"Found: nothing"):
        read_relations(tmp_path / "notes")
    with pytest.raises(FileError, match=r"no such folder of relations: .*note\. Did you mean 'notes'\?"):
        read_relations(tmp_path / "note")
    with pytest.raises(FileError, match="no such folder"):
        read_relations("x" * 300)
    write(tmp_path / "notes" / "train.jsonl", [{"sentence": "good", "label": "1"}])
    with pytest.raises(
        RecordError, match=r"no facts; none of the rows has sub_label and obj_label .* label, sentence, y"
    ):
        read_relations(tmp_path / "notes")


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("paraphrases/P36.jsonl", {"pattern": "[X] is"}, r"P36\.jsonl, line 2: the pattern '\[X\] is' has no \[Y\]"),
        ("paraphrases/P36.jsonl", {"pattern": "is"}, r"line 2: the pattern 'is' has no \[X\] and no \[Y\]; it needs"),
        ("paraphrases/P36.jsonl", {"text": "a"}, r"line 2: a paraphrase needs the field 'pattern' with text"),
        ("relations.jsonl", {"relation": "P9", "template": "[X]"}, r"ions\.jsonl, line 2: the pattern '\[X\]' has no"),
        ("relations.jsonl", {"relation": "P9", "template": "[X][Y][Y]"}, r"ions\.jsonl, line 2: a template has ex"),
        ("relations.jsonl", {"template": "[X] [Y]"}, r"ions\.jsonl, line 2: a relation needs the field 'relation'"),
        ("relations.jsonl", {"relation": "P36"}, r"relations\.jsonl, line 2: the relation P36 is there twice"),
        ("relations.jsonl", [1], r"relations\.jsonl, line 2: a relation needs the field"),
        ("TREx/P36.jsonl", [1], r"P36\.jsonl, line 2: a record must be an object"),
        ("a.jsonl", [1], r"a\.jsonl, line 2: a record must be an object"),
    ],
)  # fmt: skip
def test_a_broken_row_is_named_with_its_line(tmp_path: Path, name: str, row: object, message: str) -> None:
    fine = {"pattern": "[X] [Y]", "relation": "P36", "sub_label": "a", "obj_label": "b"}
    if name != "a.jsonl":
        write(tmp_path / "TREx" / "P36.jsonl", CAPITALS)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(f"{json.dumps(fine)}\n{json.dumps(row)}\n")
    with pytest.raises(RecordError, match=message):
        read_relations(tmp_path)


def test_brackets_in_a_pattern_are_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    texts = ["[X] [sic] {is} [[Y]]", "[P*3] [X] is [Y]", "[X] {x} [Y]", "[X] or [X] is [Y]", "[X] [Y] [Y]"]
    write(tmp_path / "TREx" / "P36.jsonl", CAPITALS)
    write(tmp_path / "paraphrases" / "P36.jsonl", [{"pattern": text} for text in texts])
    write(tmp_path / "relations.jsonl", [{"relation": "P36", "template": texts[0]}])
    (found,) = read_relations(tmp_path)
    assert found.paraphrases == (
        "[X] [[sic] {{is} [[[Y]]",
        "[[P*3] [X] is [Y]",
        "[X] {{x} [Y]",
        "[X] or [X] is [Y]",
    )
    assert found.template == found.paraphrases[0]
    assert not any(Template.parse(pattern).has_slots for pattern in found.paraphrases)
    assert {Template.parse(pattern).fields for pattern in found.paraphrases} == {("x",)}
    assert "P36.jsonl, line 5: left out the pattern '[X] [Y] [Y]'" in caplog.text


def test_one_part_alone_is_divided_and_a_training_part_is_needed(tmp_path: Path) -> None:
    divided(tmp_path, "P36", "test")
    (found,) = read_relations(tmp_path)
    assert list(found.parts) == ["facts"]
    with pytest.raises(RecordError, match=r"P1: there is no training part among dev, test in here; add train\.jsonl"):
        split_relation(relation(dev=many(), test=many()))


def test_the_published_data() -> None:
    """The real files, where somebody has them."""
    folder = os.environ.get("PTUNING_LAMA")
    if not folder:
        pytest.skip("PTUNING_LAMA names no folder of LAMA relations")
    for found in read_relations(folder):
        for pattern in (found.template, *found.paraphrases):
            assert pattern is None or "x" in Template.parse(pattern).fields or "before" in pattern
        with contextlib.suppress(RecordError):  # a relation may be too small to be divided
            check_whole(split_relation(found))


def test_a_relation_may_have_a_number_of_any_length(tmp_path: Path) -> None:
    facts = [{"sub_label": "a", "obj_label": "b", "predicate_id": f"P{digit * 5000}"} for digit in "98"]
    write(tmp_path / "P36.jsonl", facts)
    assert [relation.name[:3] for relation in read_relations(tmp_path)] == ["P88", "P99"]
    write(tmp_path / "relations.jsonl", [{"relation": "P36"}])
    with pytest.raises(RecordError, match="the rows are of the relations P888"):
        read_relations(tmp_path)
    (tmp_path / "relations.jsonl").unlink()
    names = ["P103", "P17", "P1" + "0" * 60, "P017", "a2", "a10"]
    for name in names:
        write(tmp_path / "many" / f"{name}.jsonl", CAPITALS)
    found = [relation.name for relation in read_relations(tmp_path / "many")]
    assert found == ["P017", "P17", "P103", "P1" + "0" * 60, "a2", "a10"]
