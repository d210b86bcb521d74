"""Task files: the shipped ones read the layouts they are for, and every mistake is an error that says what to do."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from ptuning.data.task_files import TaskFile, find_split, load_task, shipped_names, shipped_tasks
from ptuning.errors import FileError, RecordError, TaskError
from ptuning.records import references_of

SUPERGLUE = ("BoolQ", "CB", "COPA", "MultiRC", "ReCoRD", "RTE", "WiC", "WSC")
# One row of each layout, as the data files have it.
ROWS: dict[str, Mapping[str, object]] = {
    "BoolQ": {"question": "is it so", "passage": "It is.", "idx": 1, "label": True},
    "CB": {"premise": "It rained.", "hypothesis": "it rained.", "idx": 2, "label": "entailment"},
    "COPA": {
        "premise": "The vase broke.",
        "choice1": "It fell.",
        "choice2": "Mary sang.",
        "question": "cause",
        "idx": 3,
        "label": 0,
    },
    "MultiRC": {
        "idx": 4,
        "passage": {
            "text": "p",
            "questions": [{"question": "who?", "idx": 5, "answers": [{"text": "Bob.", "idx": 6, "label": 1}]}],
        },
    },
    "ReCoRD": {
        "idx": 7,
        "passage": {
            "text": "Bob met Eve.\n@highlight\nThey met",
            "entities": [{"start": 0, "end": 2}, {"start": 8, "end": 10}],
        },
        "qas": [{"query": "So @placeholder met Bob.", "idx": 8, "answers": [{"start": 8, "end": 10, "text": "Eve"}]}],
    },
    "RTE": {"premise": "It rained.", "hypothesis": "It was dry.", "idx": 9, "label": "not_entailment"},
    "WiC": {"word": "run", "sentence1": "I run.", "sentence2": "A long run.", "idx": 10, "label": False, "start1": 2},
    "WSC": {
        "text": "The man lifted Bob because he was strong.",
        "target": {"span1_text": "Bob", "span2_text": "he", "span1_index": 3, "span2_index": 5},
        "idx": 11,
        "label": False,
    },
    "sentiment": {"text": "fine", "label": "positive"},
    "topic": {"text": "How far is it ?", "label": "5"},
}
MINIMAL = """
name = "mine"
version = "1"
[labels]
good = ["great", "fine"]
bad = ["poor"]
[[patterns]]
manual = "{text} It was [Y]."
"""


@pytest.mark.parametrize("name", shipped_names())
def test_a_shipped_task_is_short_whole_and_reads_its_layout(name: str) -> None:
    task = load_task(name)
    assert task.name == name
    assert len(task.text.splitlines()) <= 25
    assert all((task.source, task.about, task.version))
    assert len(task.manual) == len(task.learned) >= 2
    for manual, learned in zip(task.manual, task.learned, strict=True):
        assert (manual.has_slots, learned.has_slots) == (False, True)
        assert set(manual.fields) == set(learned.fields)
    (found,) = task.read_rows([ROWS[name]])
    assert tuple(found.record) == (*task.fields, "y")
    (bare,) = task.read_rows([ROWS[name]], labelled=False)
    assert (bare.record, bare.choices, bare.answers) == (
        {field: text for field, text in found.record.items() if field != "y"}, found.choices, ()
    )  # fmt: skip


def test_what_is_shipped() -> None:
    assert shipped_names() == ["BoolQ", "CB", "COPA", "MultiRC", "ReCoRD", "RTE", "sentiment", "topic", "WiC", "WSC"]
    assert [task.name for task in shipped_tasks()] == shipped_names()
    assert set(ROWS) == set(shipped_names())


def test_questions_and_hypotheses_are_never_shortened_and_passages_may_be() -> None:
    kept = {"BoolQ": "question", "CB": "hypothesis", "RTE": "hypothesis", "MultiRC": "question", "ReCoRD": "before"}
    for name, field in kept.items():
        for template in (*load_task(name).manual, *load_task(name).learned):
            assert f"{{{field}!}}" in str(template)
            assert "{passage}" in str(template) or "{premise}" in str(template)


def test_values_and_choices_of_the_shipped_tasks() -> None:
    copa = load_task("COPA").read_rows([ROWS["COPA"], {**ROWS["COPA"], "question": "effect", "label": 1}])
    assert [one.record["question"] for one in copa] == ["because", "so"]
    assert copa[1].choices == ("it fell", "mary sang")
    assert [one.answers for one in copa] == [(0,), (1,)]
    (record,) = load_task("ReCoRD").read_rows([ROWS["ReCoRD"]])
    assert (record.choices, record.answers, record.group) == (("Bob", "Eve"), (1,), "7/8")
    assert (record.record["before"], record.record["after"]) == ("So ", " met Bob.")
    assert "@" not in record.record["passage"]
    (multi,) = load_task("MultiRC").read_rows([ROWS["MultiRC"]])
    assert (multi.record["y"], multi.group, multi.idx) == ("true", "4/5", {"passage": 4, "question": 5, "answer": 6})
    (wsc,) = load_task("WSC").read_rows([ROWS["WSC"]])
    assert (wsc.choices, wsc.answers) == (("Bob", "The man"), (1,))
    assert wsc.record["text"] == "The man lifted Bob because *he* was strong."


def test_a_minimal_file_gets_its_learned_template_from_the_manual_one() -> None:
    task = TaskFile.parse(MINIMAL)
    assert [str(one) for one in task.learned] == ["{text} [P:It was] [Y]."]
    assert (task.metrics, task.calibrate, task.normalise) == (("accuracy",), False, "sum")
    assert task.read_rows([{"text": "a", "label": "bad", "other": [1]}])[0].record == {"text": "a", "y": "bad"}


WRITES = """
name = "mine"
version = "1"
label = "ref"
gather = true
metrics = ["bleu", "coverage", "bleu"]
[[patterns]]
manual = "{text} In a sentence: [Y]"
"""


def test_a_task_of_texts_has_their_metrics_and_several_references() -> None:
    task = TaskFile.parse(WRITES)
    assert (task.text_metrics, task.answer_metrics) == (("bleu", "coverage"), ())
    assert (TaskFile.parse(MINIMAL).text_metrics, TaskFile.parse(MINIMAL).answer_metrics) == ((), ("accuracy",))
    rows = task.read_rows([{"text": "a", "ref": one} for one in ("A.", "The a.")] + [{"text": "b", "ref": "B."}])
    scored = task.to_score(rows)
    assert [references_of(row.record) for row in rows] == [("A.",), ("The a.",), ("B.",)]
    assert [references_of(row.record) for row in scored] == [("A.", "The a."), ("B.",)]
    plain = TaskFile.parse(WRITES.replace("gather = true\n", ""))
    assert plain.to_score(rows) is rows
    listed = TaskFile.parse(WRITES.replace('"ref"', '"refs[]"'))
    found = listed.read_rows([{"text": "a", "refs": ["A. ", "The a.", "A."]}, {"text": "b", "refs": ["B."]}])
    assert [references_of(row.record) for row in found] == [("A.", "The a."), ("B.",)]


CHOICES = 'name="m"\nversion="1"\n[choices]\nfrom=["a", "b"]\n[[patterns]]\nmanual="{x} [Y]"'


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("version", "verson", "'verson'. Did you mean 'version'"),
        ('version = "1"', "", "'version' is missing"),
        ('"1"', "1", "'version' .* 1"),
        ("[labels]", "[labels", "not a valid TOML file"),
        ('["poor"]', '["great"]', "'great' is given twice"),
        ('["poor"]', "[]", "label 'bad' has no name, no word"),
        ('["poor"]', "3", "'labels.bad' .* 3"),
        ('bad = ["poor"]', "", "two labels"),
        ("manual", "manuel", "'patterns #1.manuel'"),
        ("{text} It", "{text It", "expected {field}"),
        ("{text} It", "[P*3] {text} It", "pattern 1: .*slots"),
        ('[Y]."', '[Y]."\nlearned = "{text} [Y]"', "pattern 1: .*slots"),
        ('manual = "{text} It was [Y]."', "", "'patterns #1.manual' is missing"),
        ("[[patterns]]", "[patterns]", "'patterns'"),
        ("[labels]", 'metrics = ["acuracy"]\n[labels]', "'acuracy'. Did you mean 'accuracy'"),
        ("[labels]", 'metrics = ["bleu"]\n[labels]', "labels or choices writes no texts"),
        ("[labels]", "metrics = []\n[labels]", "'metrics' is empty"),
        ("[labels]", 'metrics = ["f1a"]\n[labels]', "'f1a' needs the label 'true'"),
        ("[labels]", "calibrate = 1\n[labels]", "'calibrate' .* 1"),
        ("[labels]", "gather = true\n[labels]", "'gather'"),
        ("[labels]", 'normalise = "max"\n[labels]', "'normalise' must be 'sum' or 'mean'"),
        ("[labels]", 'rows = "a.b"\n[labels]', "must end with a list"),
        ("[labels]", '[fields]\ntxt = "t"\n[labels]', "'txt'. Did you mean 'text'"),
        ("[labels]", '[fields]\ny = "t"\n[labels]', "the target has the key 'label'"),
        ("[labels]", '[fields]\ntext = "t|lower"\n[labels]', "unknown repair 'lower'"),
        ("[labels]", '[fields]\ntext = "a|mark a[b"\n[labels]', "not a path into a row"),
        ("[labels]", '[fields]\ntext = "label|lower_first"\n[labels]', "'text' of a pattern holds the answer"),
        ("{text} It", "{label} It", "'label' of a pattern holds the answer"),
        ("[labels]", '[values.label]\n0 = "god"\n[labels]', "'god'.* Did you mean 'good'"),
        ("[labels]", '[choices]\nfrom = ["a"]\n[labels]', r"both \[labels\] and \[choices\]"),
        ('"mine"', '"../mine"', "'../mine' cannot be the name"),
        ('"mine"', f'"{"m" * 101}"', "cannot be the name"),
        ("[labels]", '[files]\ndve = ["a"]\n[labels]', "'files.dve'. Did you mean 'dev'"),
        ("[labels]", '[files]\ndev = ["a.jsonl"]\n[labels]', "leave its ending out: 'a'"),
        (MINIMAL, WRITES.replace('"coverage"', '"f1"'), "'metrics' mix"),
        (MINIMAL, WRITES.replace('"coverage"', '"coverag"'), "'coverag'. Did you mean 'coverage'"),
        (MINIMAL, CHOICES.replace('from=["a", "b"]', ""), "need from ="),
        (MINIMAL, CHOICES.replace('from=["a", "b"]', 'spans = "a[]"'), "'spans' and 'of' go together"),
        (MINIMAL, CHOICES.replace("from", "form"), "'choices.form'"),
        (MINIMAL, CHOICES.replace('manual="{x}', 'manual="{label}'), "holds the answer"),
    ],
)
def test_mistakes_in_a_file(old: str, new: str, message: str) -> None:
    with pytest.raises(TaskError, match=f"mine.toml.*{message}"):
        TaskFile.parse(MINIMAL.replace(old, new, 1), where="mine.toml")


def test_files_are_found_by_name_or_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(MINIMAL, encoding="utf-8")
    assert load_task(path).name == load_task(str(path)).name == "mine"
    assert load_task("rte").name == "RTE"
    with pytest.raises(FileError, match=r"no shipped task 'RTEE'. Did you mean 'RTE'"):
        load_task("RTEE")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(TaskError, match="is not UTF-8 text"):
        load_task(path)


def test_parts_are_found_in_both_layouts(tmp_path: Path) -> None:
    task = load_task("RTE")
    inner = tmp_path / "RTE"
    inner.mkdir()
    for name in ("train.jsonl", "dev32.jsonl", "val.jsonl", "extra.csv"):
        (inner / name).write_text(json.dumps(ROWS["RTE"]) + "\n", encoding="utf-8")
    for split, name in (("train", "train.jsonl"), ("dev", "dev32.jsonl"), ("val", "val.jsonl"), ("extra", "extra.csv")):
        assert find_split(tmp_path, task, split) == find_split(inner, task, split) == inner / name
    with pytest.raises(FileError, match=r"no 'test' part of the task RTE.*looked for test with.*there is.*dev32.jsonl"):
        find_split(inner, task, "test")
    with pytest.raises(FileError, match="no such data folder"):
        find_split(tmp_path / "no", task, "train")


def test_a_task_says_what_its_files_are_called(tmp_path: Path) -> None:
    task = TaskFile.parse(MINIMAL.replace("[labels]", '[files]\ntrain = ["learn"]\n[labels]'))
    (tmp_path / "learn.tsv").write_text("text\tlabel\na\tgood\n", encoding="utf-8")
    path = find_split(tmp_path, task, "train")
    assert [one.record for one in task.read(path)] == [{"text": "a", "y": "good"}]


def test_reading_a_file_names_it_and_hashes_it(tmp_path: Path) -> None:
    task, path = TaskFile.parse(MINIMAL), tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "label": "good"}\n', encoding="utf-8")
    first = task.read(path)
    assert (first.name, len(first.sha256)) == (str(path), 64)
    path.write_text('{"text": "b", "label": "goood"}\n', encoding="utf-8")
    with pytest.raises(RecordError, match=r"a.jsonl, line 1: the label 'goood' is outside.*Did you mean 'good'"):
        task.read(path)
    path.write_text("\n", encoding="utf-8")
    with pytest.raises(RecordError, match="holds no rows of the task mine"):
        task.read(path)
    (tmp_path / "a.txt").touch()
    with pytest.raises(FileError, match="cannot tell the format"):
        task.read(tmp_path / "a.txt")
