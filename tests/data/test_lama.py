"""LAMA's relations: what is read from which file, which relations are chosen, how facts are divided, and errors."""

import contextlib
import json
import logging
import os
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptuning.backbone.backbone import Backbone
from ptuning.data.lama import Relation, Split, read_relations, split_relation
from ptuning.errors import FileError, PTuningError, RecordError
from ptuning.files import sha256
from ptuning.records import Record, Records
from ptuning.template.language import Template
from tests.conftest import bound, spoken
from tests.data.test_splits import digest

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


def divided(folder: Path, name: str, *parts: str) -> None:
    for part in parts:
        rows = [{"sub_label": f"{part} {number}", "obj_label": "a"} for number in range(6)]
        write(folder / name / f"{part}.jsonl", rows)


def names(source: Path, *which: str) -> list[str]:
    return [relation.name for relation in read_relations(source, which=which or ("all",))]


def pairs(records: Sequence[Record]) -> list[tuple[str, str]]:
    return [(record["x"], record["y"]) for record in records]


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
    assert read_relations(tmp_path / "TREx", which="P36")[0].paraphrases == ("[Y], capital of [X]",)
    assert read_relations(tmp_path / "TREx" / "P36.jsonl") == read_relations(tmp_path, which=["P36"])
    (tmp_path / "paraphrases").rename(tmp_path / "patterns")  # ParaRel's name
    assert read_relations(tmp_path, which="P36")[0].paraphrases == ("[Y], capital of [X]",)


def test_google_re(tmp_path: Path) -> None:
    """Its templates are in LAMA's code, and LAMA leaves out facts that more raters judged false than true."""
    yes, no = {"rater": "1", "judgment": "yes"}, {"rater": "2", "judgment": "no"}
    rows = [
        {"pred": "/people/person/place_of_birth", "sub": "/m/0", "sub_label": f"Ann {number}", "obj_label": "Lima",
         "judgments": judgments, "masked_sentences": ["Ann was born in [MASK] ."]}
        for number, judgments in enumerate([[yes, no], [yes, no, no], [no], [], [yes]] + [[yes]] * 10)
    ]  # fmt: skip
    for name in ("place_of_birth", "place_of_death", "date_of_birth"):
        write(tmp_path / "Google_RE" / f"{name}_test.jsonl", rows)
    assert [relation.template for relation in read_relations(tmp_path)] == [
        "[X] (born [Y]).",
        "[X] was born in [Y] .",
        "[X] died in [Y] .",
    ]
    # The hub has the same judgments as text, in Python's way of writing.
    hub = [{**row, "judgments": str(row["judgments"]), "template": "[X] was born in [Y] ."} for row in rows]
    write(tmp_path / "hub" / "TREx" / "place_of_birth.jsonl", hub)
    for birth in (read_relations(tmp_path)[1], *read_relations(tmp_path / "hub")):
        split = split_relation(birth)
        check_whole(split)
        assert split.dropped == {"judged false by its raters": 2}


SENTENCES = [
    "One of the things you do when you are alive is [MASK].",
    "[MASK] is a good film",
    'It was "[MASK]" (in 1999).',
    "They were  [MASK] , and great.",
]
SENTENCE_ROWS: Rows = [
    {"sub": f"s{index}", "obj": "x", "pred": "IsA", "masked_sentences": [text], "obj_label": "yes", "uuid": "1"}
    for index, text in enumerate(SENTENCES)
]


def test_sentences_of_facts_are_tokenised_as_if_they_were_not_cut(backbone: Backbone, tmp_path: Path) -> None:
    """The space before the mask is the target's, as in a template, and no token of its own."""
    write(tmp_path / "ConceptNet" / "test.jsonl", SENTENCE_ROWS)
    (relation,) = read_relations(tmp_path)
    assert (relation.name, relation.template) == ("ConceptNet", "{before}[Y]{after}")
    facts = relation.parts["facts"]
    assert pairs(facts)[0] == ("s0", "yes")
    for text, record in zip(SENTENCES, facts, strict=True):
        assert record["before"] + "[MASK]" + record["after"] == text
        if backbone.kind == "causal" and text.startswith("[MASK]"):
            continue  # GPT-2 has nothing before the target there
        (cut,) = bound(backbone, "{before}[Y]{after}").examples([record])
        (whole,) = bound(backbone, text.replace("[MASK]", "[Y]")).examples([record])
        assert spoken(cut, []) == spoken(whole, [])
        assert cut.target_ids == whole.target_ids


def test_a_subject_that_says_nothing_is_replaced_by_the_sentence(tmp_path: Path) -> None:
    """All of SQuAD's facts have the subject "Squad": split by it, they would all be in one part."""
    rows = [
        {"masked_sentences": [f"Sentence {number}", "is [MASK]."], "obj_label": "gold", "sub_label": "Squad"}
        for number in range(20)
    ]
    bad = [{**rows[0], "masked_sentences": [text]} for text in ("no mask", "[MASK] or [MASK]")]
    write(tmp_path / "Squad" / "test.jsonl", [*rows, *bad])
    write(tmp_path / "ConceptNet" / "test.jsonl", [*SENTENCE_ROWS, {**rows[0], "sub_label": ""}])
    conceptnet, squad = read_relations(tmp_path)
    assert squad.parts["facts"][3]["x"] == "Sentence 3 is [MASK]."
    split = split_relation(squad)
    assert sum(map(len, parts_of(split))) == 20
    assert split.dropped == {"not exactly one [MASK] in the sentence": 2}
    assert conceptnet.parts["facts"][-1]["x"] == "Sentence 0 is [MASK]."


@pytest.mark.parametrize("list_folder", [".", "..", "data"])
def test_a_folder_of_parts_for_each_relation(tmp_path: Path, list_folder: str) -> None:
    folder = tmp_path / "all"
    divided(folder, "P36", "test", "dev", "train")
    divided(folder, "P17", "train", "dev", "test")
    write(folder / "P17" / "P17.jsonl", CAPITALS)  # AutoPrompt keeps the undivided facts there, too
    write(folder / list_folder / "relations.jsonl", LIST)
    first, second = read_relations(folder)
    assert (first.name, second.name, second.label) == ("P17", "P36", "capital")
    assert list(first.parts) == list(second.parts) == ["train", "dev", "test"]
    assert second.source == str(folder / "P36")
    assert split_relation(second).how == "the parts given"
    assert [each.parts for each in read_relations(folder / "P36")] == [second.parts]  # one of these folders alone
    write(folder / "P17" / "more.jsonl", CAPITALS)
    assert [each.parts for each in read_relations(folder / "P17")] == [first.parts]
    assert names(folder / "P17" / "train.jsonl") == ["P17"]


def test_facts_of_one_relation_in_two_places_are_an_error(tmp_path: Path) -> None:
    """OptiPrompt trains on other facts than LAMA's and is tested on these; the script joins them."""
    lama(tmp_path)
    divided(tmp_path, "P36", "train", "dev")
    with pytest.raises(FileError, match=r"P36 are in two places, .*P36 and .*TREx; .*convert_lama\.py"):
        read_relations(tmp_path)


OWN: Rows = [
    {"relation": name, "subject": f"Land {number}", "object": f"Town {number}"}
    for number in range(6)
    for name in ("P36", "P1376")
]
OWN_FIELDS = {"sub_label": "subject", "obj_label": "object"}


def test_own_facts_in_one_file_with_own_names_of_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "facts.csv", OWN)
    write(tmp_path / "relations.jsonl", LIST)
    for source in (tmp_path, path):
        first, second = read_relations(source, fields=OWN_FIELDS)
        assert (first.name, second.name) == ("P36", "P1376")
        assert first.template == "The capital of [X] is [Y] ."
        assert second.template is None
        assert pairs(second.parts["facts"]) == [(f"Land {number}", f"Town {number}") for number in range(6)]
    (only,) = read_relations(path, which=["P1376"], fields={"predicate_id": "relation", **OWN_FIELDS})
    assert pairs(only.parts["facts"]) == pairs(second.parts["facts"])
    write(path, [row for row in OWN if row["relation"] == "P36"])
    for name in ("P36", "facts"):  # rows of one relation are found by its name and by the file's
        assert [one.name for one in read_relations(path, which=[name], fields=OWN_FIELDS)] == [name]


def test_files_and_rows_describe_their_relation(tmp_path: Path) -> None:
    write(tmp_path / "more" / "capitals.jsonl", [{"x": "Kenya", "y": "Nairobi"}])
    write(tmp_path / "more" / "rivers.csv", [{"x": "Kenya", "y": "Tana"}])
    assert names(tmp_path / "more") == ["capitals", "rivers"]
    rows = [{**row, "template": "[X] is led from [Y]", "label": "not of the relation"} for row in CAPITALS]
    (relation,) = read_relations(write(tmp_path / "P36.csv", rows))
    assert (relation.template, relation.label) == ("[X] is led from [Y]", None)
    (relation,) = read_relations(write(tmp_path / "P36.csv", [*rows[1:], {**rows[0], "template": "[X], [Y]"}]))
    assert relation.template is None


# What is chosen, and errors


@pytest.mark.parametrize(
    ("which", "chosen"),
    [
        (["all"], ["P17", "P36", "P103"]),
        (["P103", "P36", "P36"], ["P36", "P103"]),
        (["N-1"], ["P17", "P103"]),
        (["P36", "N-1", "all"], ["P17", "P36", "P103"]),
        (["P102"], r"'P102'\. Did you mean 'P103'\? Found: P17, P36, P103, 1-1, N-1, all"),
        (["N-M"], r"'N-M'\..* Found: P17, P36, P103, 1-1, N-1, all"),
        ([], "no relation is chosen"),
    ],
)
def test_names_types_and_all(tmp_path: Path, which: list[str], chosen: list[str] | str) -> None:
    lama(tmp_path)
    if isinstance(chosen, str):
        with pytest.raises(RecordError, match=chosen):
            read_relations(tmp_path, which=which)
    else:
        assert names(tmp_path, *which) == chosen


def test_a_relation_without_facts_is_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lama(tmp_path)
    (tmp_path / "TREx" / "P103.jsonl").unlink()
    (tmp_path / "TREx" / "P17.jsonl").write_text("\n")
    with caplog.at_level(logging.WARNING):
        assert names(tmp_path) == ["P36"]
    assert "left out: P103" in caplog.text
    assert "P17: no facts in" in caplog.text
    for which, message in (("P103", "P103 is listed, but there are no facts"), ("P17", "none of the chosen")):
        with pytest.raises(RecordError, match=message):
            read_relations(tmp_path, which=[which])


def test_only_what_is_chosen_is_read(tmp_path: Path) -> None:
    lama(tmp_path)
    (tmp_path / "TREx" / "P17.jsonl").write_text('{"sub_label": "a", "obj_label": "b"}\n{"sub')
    assert names(tmp_path, "P36") == ["P36"]
    with pytest.raises(RecordError, match=r"P17\.jsonl, line 2"):
        read_relations(tmp_path)


def test_numbers_in_names_are_ordered_as_numbers(tmp_path: Path) -> None:
    for name in ["P103", "P17", "P1" + "0" * 60, "P017", "a2", "a10"]:
        write(tmp_path / f"{name}.jsonl", CAPITALS)
    assert names(tmp_path) == ["P017", "P17", "P103", "P1" + "0" * 60, "a2", "a10"]


TEMPLATE = {"relation": "P9", "template": "[X]"}


@pytest.mark.parametrize(
    ("name", "rows", "error", "message"),
    [
        ("paraphrases/P36.jsonl", [{"pattern": "[X] is"}], RecordError, r"P36\.jsonl, line 1: .* has no \[Y\]"),
        ("paraphrases/P36.jsonl", [{"pattern": "is"}], RecordError, r"line 1: .* no \[X\] and no \[Y\]"),
        ("paraphrases/P36.jsonl", [{"text": "a"}], RecordError, "line 1: .*'pattern'"),
        ("relations.jsonl", [TEMPLATE], RecordError, r"relations\.jsonl, line 1: .* has no \[Y\]"),
        ("relations.jsonl", [{**TEMPLATE, "template": "[X][Y][Y]"}], RecordError, r"line 1: .*exactly one \[Y\]"),
        ("relations.jsonl", [{"template": "[X] [Y]"}], RecordError, "line 1: .*'relation'"),
        ("relations.jsonl", [LIST[0], LIST[0]], RecordError, "line 2: .*P103 is there twice"),
        ("relations.jsonl", [1], RecordError, "line 1: a record must be an object"),
        ("TREx/P36.jsonl", [CAPITALS[0], [1]], RecordError, r"P36\.jsonl, line 2: a record must be an object"),
        (
            "notes/train.jsonl",
            [{"label": "1"}],
            RecordError,
            "none of the rows has sub_label and obj_label .* label, y",
        ),
        ("facts.jsonl", [*OWN, {"x": "a", "y": "b"}], RecordError, r"facts\.jsonl, line 13: the row names no relation"),
        ("TREx/P36.jsonl", OWN, RecordError, "the rows are of the relations P36, P1376"),
        ("a.txt", [], FileError, r"TREx/P36\.jsonl.* Found: a\.txt"),
        ("relations.jsonl", [LIST[0]], FileError, "holds no relations"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, rows: Rows, error: type[PTuningError], message: str) -> None:
    if name.startswith(("paraphrases", "relations")) and rows != [LIST[0]]:
        write(tmp_path / "TREx" / "P36.jsonl", CAPITALS)
    write(tmp_path / name, rows)
    with pytest.raises(error, match=message):
        read_relations(tmp_path)


def test_missing_folders_and_fields(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    for folder, message in ((tmp_path / "note", "'notes'"), (Path("x" * 300), "no such"), (tmp_path, "Found: notes/")):
        with pytest.raises(FileError, match=message):
            read_relations(folder)
    path = write(tmp_path / "facts.csv", OWN)
    with pytest.raises(RecordError, match=r"line 2: no field 'subjekt' to use as 'x'; it has object, re"):
        read_relations(path, fields={"x": "subjekt"})


def test_brackets_in_a_pattern_are_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    texts = ["[X] [sic] {is} [[Y]]", "[P*3] [X] is [Y]", "[X] {x} [Y]", "[X] or [X] is [Y]", "[X] [Y] [Y]"]
    write(tmp_path / "TREx" / "P36.jsonl", CAPITALS)
    write(tmp_path / "paraphrases" / "P36.jsonl", [{"pattern": text} for text in texts])
    write(tmp_path / "relations.jsonl", [{"relation": "P36", "template": texts[0]}])
    (relation,) = read_relations(tmp_path)
    assert relation.paraphrases == (
        "[X] [[sic] {{is} [[[Y]]",
        "[[P*3] [X] is [Y]",
        "[X] {{x} [Y]",
        "[X] or [X] is [Y]",
    )
    assert relation.template == relation.paraphrases[0]
    assert not any(Template.parse(pattern).has_slots for pattern in relation.paraphrases)
    assert {Template.parse(pattern).fields for pattern in relation.paraphrases} == {("x",)}
    assert "P36.jsonl, line 5" in caplog.text


def test_the_published_data() -> None:
    """The real files, where they are."""
    folder = os.environ.get("PTUNING_LAMA")
    if not folder:
        pytest.skip("PTUNING_LAMA names no folder of LAMA relations")
    for relation in read_relations(folder):
        for pattern in (relation.template, *relation.paraphrases):
            assert pattern is None or "x" in Template.parse(pattern).fields or "before" in pattern
        with contextlib.suppress(RecordError):  # a relation may be too small to be divided
            check_whole(split_relation(relation))


# Splits


def relation(*facts: tuple[str, str], **parts: Iterable[tuple[str, str]]) -> Relation:
    """A relation in memory: facts in one file, or in the parts given."""
    own = {part: Records([{"x": x, "y": y} for x, y in rows]) for part, rows in (parts or {"facts": facts}).items()}
    return Relation("P1", "[X] is [Y]", None, None, own, (), "here")


def subjects(records: Sequence[Record]) -> set[str]:
    return {record["x"].strip().casefold() for record in records}


def parts_of(split: Split) -> list[Records]:
    return [split.train, split.dev, split.test]


def check_whole(split: Split) -> None:
    """Every fact read is in one part or counted as dropped, and no subject is in two."""
    parts = parts_of(split)
    assert sum(map(len, parts)) + sum(split.dropped.values()) == split.rows
    assert sum(len(subjects(part)) for part in parts) == len(set().union(*map(subjects, parts)))


def many(count: int = 50, facts_each: int = 2) -> list[tuple[str, str]]:
    return [(f"s{number}", f"o{number}-{each}") for number in range(count) for each in range(facts_each)]


def test_one_file_is_divided_by_subject() -> None:
    split = split_relation(relation(*many()), seed=3)
    check_whole(split)
    assert [len(part) for part in parts_of(split)] == [60, 20, 20]
    assert (split.rows, split.dropped, split.how) == (100, {}, "60/20/20 by subject, seed 3")
    assert split.test.name == "here (test, 60/20/20 by subject, seed 3)"
    assert pairs(split.test) != pairs(split_relation(relation(*many()), seed=4).test)
    # Three subjects are enough for three parts.
    assert [len(part) for part in parts_of(split_relation(relation(*many(3))))] == [2, 2, 2]
    # Published scores name a seed and mean these facts.
    assert digest(*parts_of(split_relation(relation(*many()), seed=7, limit=40))) == "48f3bfe40a4c"


def test_a_subject_is_the_same_in_other_letters() -> None:
    facts = [(f" {name} ", obj) for name, obj in many(10, 1)]
    split = split_relation(relation(*many(10, 1), *[(x.upper(), y + "!") for x, y in facts], ("S1", "o1-0 ")))
    check_whole(split)
    assert split.dropped == {"twice the same fact": 1}


@settings(max_examples=40, deadline=None)
@given(
    facts=st.lists(st.tuples(st.sampled_from("abcdefgh "), st.sampled_from("uvw ")), min_size=12, max_size=40),
    limit=st.sampled_from([None, 3, 5, 9]),
    seed=st.integers(0, 9),
    data=st.data(),
)
def test_the_order_of_the_file_changes_nothing(
    facts: list[tuple[str, str]], limit: int | None, seed: int, data: st.DataObject
) -> None:
    turned = data.draw(st.permutations(facts))
    try:
        split = split_relation(relation(*facts), limit=limit, seed=seed)
    except RecordError:
        with pytest.raises(RecordError):
            split_relation(relation(*turned), limit=limit, seed=seed)
        return
    check_whole(split)
    assert split_relation(relation(*turned), limit=limit, seed=seed) == split


def test_the_objects_do_not_choose_the_parts() -> None:
    facts = many(60, 1)
    objects = [y for _, y in facts]
    random.Random(1).shuffle(objects)
    permuted = [(x, y) for (x, _), y in zip(facts, objects, strict=True)]
    first, other = (split_relation(relation(*each)) for each in (facts, permuted))
    assert [subjects(part) for part in parts_of(first)] == [subjects(part) for part in parts_of(other)]
    assert first.test != other.test


def test_facts_that_are_not_kept_do_not_move_the_rest() -> None:
    """Two backbones with other tokenizers are scored on the same facts, as far as both can be."""

    def even(rows: Sequence[Record]) -> list[bool]:
        return [row["y"].endswith("0") and "7" not in row["x"] for row in rows]

    whole = split_relation(relation(*many()))
    kept = split_relation(relation(*many()), keeps=even, reason="too long")
    check_whole(kept)
    assert kept.dropped == {"too long": 100 - 45}
    for part, of_whole in zip(parts_of(kept), parts_of(whole), strict=True):
        assert list(part) == [row for row in of_whole if even([row])[0]]


def test_dropped_facts_are_counted_by_reason() -> None:
    facts = relation(*many(), ("", "a"), ("a", ""), (" ", "b"), *many()[:3])
    facts.parts["facts"].append({"x": "only a subject"})
    before = [dict(record) for record in facts.parts["facts"]]
    checked: list[Record] = []

    def keeps(rows: Sequence[Record]) -> list[bool]:
        checked.extend(rows)
        return [row["x"] != "s7" for row in rows]

    split = split_relation(facts, keeps=keeps)
    check_whole(split)
    assert split.dropped == {"no subject or object": 4, "twice the same fact": 3, "object is not one token": 2}
    assert len(checked) == 100  # whole facts only
    assert list(facts.parts["facts"]) == before  # the caller's records are left alone


@pytest.mark.parametrize("limit", [3, 4, 7, 50, 99, 100, 1000])
def test_a_limit_keeps_the_proportions(limit: int) -> None:
    split = split_relation(relation(*many()), limit=limit)
    check_whole(split)
    sizes = [len(part) for part in parts_of(split)]
    assert sum(sizes) == min(limit, 100)
    for size, share in zip(sizes, (0.6, 0.2, 0.2), strict=True):
        assert abs(size - share * sum(sizes)) <= 1
    assert split.dropped.get("over the limit", 0) == max(0, 100 - limit)
    assert ("at most" in split.how) == (limit < 100)
    for part, of_whole in zip(parts_of(split), parts_of(split_relation(relation(*many()))), strict=True):
        assert subjects(part) <= subjects(of_whole)
    other = split_relation(relation(*many()), limit=limit, seed=1)
    assert limit >= 100 or pairs(other.train) != pairs(split.train)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 1, 9), (97, 1, 1), (3, 1, 1), (20, 20, 20)])
@pytest.mark.parametrize("limit", [3, 4, 5, 30])
def test_a_limit_is_exact_for_given_parts_of_any_size_and_keeps_their_order(
    sizes: tuple[int, int, int], limit: int
) -> None:
    parts = {name: [(f"{name} {i}", "a") for i in range(size)] for name, size in zip(("train", "dev", "test"), sizes)}
    split = split_relation(relation(**parts), limit=limit)
    check_whole(split)
    assert sum(map(len, parts_of(split))) == min(limit, sum(sizes))
    assert all(parts_of(split))
    for name, part in zip(parts, parts_of(split), strict=True):
        numbers = [parts[name].index(pair) for pair in pairs(part)]
        assert numbers == sorted(numbers)
        assert len(numbers) < 10 or numbers != list(range(10)) or limit > sum(sizes)


def test_no_subject_of_the_test_part_is_trained_on() -> None:
    split = split_relation(
        relation(
            train=[("a", "1"), ("B ", "1"), ("c", "1"), ("d", "1"), ("d", "1")],
            dev=[("b", "2"), ("c", "2"), ("e", "2")],
            test=[("c", "3"), ("f", "3"), ("c", "4")],
        )
    )
    check_whole(split)
    assert [pairs(part) for part in parts_of(split)] == [
        [("a", "1"), ("d", "1")],
        [("b", "2"), ("e", "2")],
        [("c", "3"), ("f", "3"), ("c", "4")],
    ]
    assert split.how == "the parts given"
    assert split.dropped == {
        "twice the same fact": 1,
        "dev fact with a subject of the test part": 1,
        "train fact with a subject of the test part": 1,
        "train fact with a subject of the dev part": 1,
    }


@pytest.mark.parametrize(("own", "missing"), [("dev", "test"), ("test", "dev")])
def test_a_missing_part_is_taken_from_the_training_part(own: str, missing: str) -> None:
    other = [*((f"s{number}", "z") for number in range(30)), ("t", "z")]
    split = split_relation(relation(train=many(), **{own: other}), seed=5)
    check_whole(split)
    assert pairs(getattr(split, own)) == other
    taken = getattr(split, missing)
    assert (len(taken), len(split.train)) == (8, 32)  # of the 20 subjects that are not the other part's
    assert split.how == f"train and {own} given, {missing} taken from 20% of the subjects of train, seed 5"
    again = split_relation(relation(train=many()[::-1], **{own: other}), seed=5)
    assert sorted(pairs(getattr(again, missing))) == sorted(pairs(taken))


def test_an_empty_part_and_its_reasons(tmp_path: Path) -> None:
    message = r"train is empty\. 102 .*1 no subject or object, 1 twice the same fact, 100 object is not one token"
    with pytest.raises(RecordError, match=message):
        split_relation(relation(*many(), many()[0], ("", "")), keeps=lambda rows: [False] * len(rows))
    for parts, message in (
        ({"facts": many(2)}, r"train is empty\. 4 facts .* dropped: none"),
        ({"train": many(), "dev": [], "test": [("a", "b")]}, "dev is empty"),
        ({"dev": many(), "test": many()}, "no training part among dev, test"),
    ):
        with pytest.raises(RecordError, match=message):
            split_relation(relation(**parts))
    with pytest.raises(RecordError, match="a limit of 2 facts"):
        split_relation(relation(*many()), limit=2)
    divided(tmp_path, "P36", "test")  # one part alone is divided
    assert [list(each.parts) for each in read_relations(tmp_path)] == [["facts"]]
