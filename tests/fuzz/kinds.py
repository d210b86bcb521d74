"""The kinds of inputs: how each is drawn, and everything that reads it.

The rule of all: whatever comes in is accepted, or ends in one PTuningError with a message. A kind's function raises
anything else. Files go into a temporary folder.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import date
from decimal import Decimal
from importlib import resources
from typing import Any

import numpy
import pandas
import pyarrow
import pyarrow.parquet
import safetensors.torch
import torch
from hypothesis import strategies as st
from starlette.testclient import TestClient

from ptuning.cli.options import backbone_options, config_of, fields_of, varied_by
from ptuning.cli.outputs import answers_to, kept_lines
from ptuning.config import GenerationSettings, TrainConfig
from ptuning.data.checks import label_rows
from ptuning.data.conversations import read_conversations
from ptuning.data.lama import read_relations, split_relation
from ptuning.data.questions import as_questions
from ptuning.data.reading import RawRows, as_read, raw_rows
from ptuning.data.task_files import TaskFile, find_split, load_task, shipped_names
from ptuning.data.word_lists import read_words
from ptuning.doctor import Answer, CheckedPrompt, Server, check_server, read_prompts
from ptuning.errors import TaskError
from ptuning.exchange.import_peft import import_prompt, read_adapter_folder
from ptuning.files import parse_toml, read_json, sha256, validate, write_bytes
from ptuning.metrics.generation import TEXT_METRICS, value_of_texts
from ptuning.prompt.prediction import Candidate, Prediction
from ptuning.prompt.prompt import Prompt
from ptuning.prompt.storage import BackboneId
from ptuning.records import Record, as_records, gathered, references_of, require_fields
from ptuning.records import rows_of as rows_of_data
from ptuning.report import page
from ptuning.report.results_file import read_results
from ptuning.report.write import write_report
from ptuning.serve.engine.engine import Engine
from ptuning.serve.http.app import create_app
from ptuning.serve.http.keys import Keys
from ptuning.template.chat import chat_template
from ptuning.template.encode import TokenizedTemplate
from ptuning.template.labels import LabelWords
from ptuning.template.language import Template
from ptuning.template.messages import read_messages, write_messages
from ptuning.training.fleet_file import read_fleet
from ptuning.training.run import RunRecord
from ptuning.workers.jobs import Job, WorkPart
from ptuning.workers.pool import WorkerConfig
from tests.conftest import learned
from tests.fuzz.backbones import chat_templates, gguf_files, loading_options, model_folders
from tests.fuzz.base import FAMILIES, Draw, folder, model, tiny, tried
from tests.fuzz.strange import (
    as_json,
    as_python,
    as_toml_file,
    changed_bytes,
    changed_json,
    changed_text,
    texts,
    values,
)
from tests.report.conftest import a_results, write_cells
from tests.serve.conftest import prompts_of, registry_of


def templates(draw: Draw) -> None:
    """A pattern: parsed, printed and parsed again, made of a manual one, bound to a tokenizer and filled."""
    pattern = draw(texts)
    parsed = tried(Template.parse, pattern)
    derived = tried(Template.from_manual, pattern, about=draw(st.none() | texts))
    for one in (parsed, derived):
        if one is None:
            continue
        assert Template.parse(str(one)) == one
        family = draw(st.sampled_from(FAMILIES))
        backbone = tiny(family)
        bound = tried(TokenizedTemplate, one, tokenizer=backbone.tokenizer, kind=backbone.kind)
        if bound is not None:
            record = {name: draw(texts) for name in (*one.fields, "y")}
            tried(bound.examples, [record])
            tried(bound.contexts, [record])
            if one.has_deep:
                _deep(one, family, record)


def _deep(template: Template, family: str, record: Record) -> None:
    """Use a template with deep slots, in front of the row where the model can."""
    block = tiny(family).reads_blocks
    bound = tried(TokenizedTemplate, template, tokenizer=tiny(family).tokenizer, kind=tiny(family).kind, block=block)
    if bound is not None:
        ids = [5] * (bound.layout.in_front + bound.slots)
        prompt = tried(Prompt.from_token_ids, template, ids, tiny(family))
        if prompt is not None:
            tried(model(family).predict, [record], prompt, ["yes", "no"])


def labels(draw: Draw) -> None:
    """Label words as text, and as a mapping."""
    text = draw(texts | changed_text("positive=great,good; negative=terrible,bad"))
    given: Any = draw(st.sampled_from((0, 1)))
    mapping = as_python(draw(changed_json({"positive": ["great", "good"], "negative": ["terrible"]})))
    words = tried(LabelWords.of, text if given else mapping)
    if words is not None:
        backbone = tiny(draw(st.sampled_from(FAMILIES)))
        template = Template.parse("{x} [P*2] [Y].")
        bound = TokenizedTemplate(template, tokenizer=backbone.tokenizer, kind=backbone.kind)
        tried(words.examples, bound, {"x": "a film"})
        tried(lambda: words.check_known(words.examples(bound, {"x": "a film"})))


def labelled_rows(draw: Draw) -> None:
    """Rows whose targets are looked at for labels, with what is to be merged."""
    target = st.sampled_from(("billing", "Billing", "biling", "sales", "3.5", "")) | texts
    rows = draw(st.lists(st.fixed_dictionaries({"x": texts, "y": target}), max_size=12))
    more = [{"x": f"text {at}", "y": ("billing", "sales")[at % 2]} for at in range(draw(st.integers(0, 12)))]
    questions = tried(as_questions, [*rows, *more])
    if questions is not None:
        asked = draw(st.sampled_from((None, "auto", "billing;sales")) | texts)
        merge = draw(st.sampled_from((None, "case", ["biling=billing", "case"], {"sales": "billing"})) | values)
        parts = dict.fromkeys(draw(st.sampled_from((("train",), ("train", "test")))), questions)
        tried(label_rows, parts, asked, fields=("x",), merge=merge, strict=draw(st.booleans()))


ROWS = [
    {"x": "Kenya", "y": "Nairobi", "n": 3, "text": "a film", "label": "positive", "ok": True, "who": None},
    {"x": "São Tomé", "y": '"b", a\n', "n": 0.5, "text": "two", "label": 1, "ok": False, "who": {"a": ["b"]}},
]


TALKS = [
    {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "loss": True}],
        "system": "c",
    },
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]]},
    {"prompt": "a", "response": "b", "history": [["c", "d"]]},
    {"content": "a#b", "summary": "c"},
]


def conversations(draw: Draw) -> None:
    """Rows in one of the known forms of conversations, changed; to learn from and to ask, and as turns of a record."""
    rows = draw(changed_json([draw(st.sampled_from(TALKS))]))
    listed = [("a.jsonl, line 1", row) for row in (rows if isinstance(rows, list) else [rows])]
    for ask in (False, True):
        raw = tried(RawRows, listed, name="a.jsonl", digest="", format="jsonl")
        found = tried(read_conversations, raw, ask=ask) if raw is not None else None
        for one in found.questions if found is not None else ():
            turns = read_messages(one.record["messages"])
            assert turns == read_messages(write_messages(turns))
    tried(read_messages, draw(texts | values.map(as_json)))


@functools.cache
def table(name: str) -> bytes:
    """The rows as a file of each format."""
    if name.endswith(".parquet"):
        stream = io.BytesIO()
        plain = [{name: str(value) for name, value in row.items()} | {"n": 1, "many": [1, 2]} for row in ROWS]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(plain), stream)
        return stream.getvalue()
    if name.endswith(".json"):
        return json.dumps(ROWS, ensure_ascii=False).encode()
    if name.endswith(("l", "ndjson")):
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
    mark = "\t" if name.endswith(".tsv") else ","
    return "\n".join([mark.join(ROWS[0]), *(mark.join(f'"{i}{name}"' for name in ROWS[0]) for i in range(3))]).encode()


def data_files(draw: Draw) -> None:
    """A data file with broken bytes, or strange values: as records, as rows of a task, as a list of words."""
    name = "a" + draw(st.sampled_from((".jsonl", ".ndjson", ".json", ".csv", ".tsv")))
    rows = changed_json(ROWS).map(lambda rows: as_json(rows).encode())
    data = draw(changed_bytes(table(name)) | (rows if name == "a.json" else changed_bytes(table(name))))
    _read_data(draw, name, data)


def parquet_files(draw: Draw) -> None:
    """A Parquet file with broken bytes."""
    _read_data(draw, "a.parquet", draw(changed_bytes(table("a.parquet"))))


def _read_data(draw: Draw, name: str, data: bytes) -> None:
    fields = draw(st.sampled_from((None, {"y": "label"}, {"": "x"})))
    tried(lambda: as_read(raw_rows(data, name=name), fields=fields))
    with folder() as path:
        write_bytes(path / name, data)
        tried(task(draw(st.sampled_from(shipped_names()))).read, path / name)
        tried(read_words, path / name)


def inputs_to_answer(draw: Draw) -> None:
    """What ``predict`` reads without being told the format: lines, tables with any mark, JSON; as records and, if there
    are some, written again as a CSV.
    """
    shapes = [table(name) for name in ("a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet")]
    lines = draw(st.lists(texts, max_size=4)).copy()
    shapes += ["\n".join(lines).encode(errors="replace"), table("a.csv").replace(b",", b";")]
    data = draw(changed_bytes(draw(st.sampled_from(shapes))))
    fields = draw(st.sampled_from(({"x": ("x",)}, {"x": ("text", "x")}, {"x": ("x",), "y": ("y",)}, {})))
    found = tried(
        raw_rows, data, name=draw(st.sampled_from(("standard input", "a.txt", "a.dat", "a.csv"))), columns=fields
    )
    records = tried(as_read, found) if found is not None else None
    if found is None or not records:
        return
    tried(require_fields, records, list(fields))
    with folder() as path:

        def write() -> None:
            answer = Prediction.of_classes([Candidate("a", -0.5)])
            with answers_to(path / "a.csv", found) as take:
                for (_, row), record in zip(found, records, strict=True):
                    take(row, record, answer)

        tried(write)
        if (path / "a.csv").exists() and found.delimiter in (",", ";"):
            again = raw_rows((path / "a.csv").read_bytes(), name="a.csv")
            assert len(again) in (len(found), 0) or len(found.columns) < 2


@functools.cache
def task(name: str) -> TaskFile:
    """A shipped task."""
    return load_task(name)


@functools.cache
def task_text(name: str) -> str:
    """The text of a shipped task."""
    return (resources.files("ptuning.data") / "tasks" / f"{name}.toml").read_text(encoding="utf-8")


def rows_of(one: TaskFile) -> dict[str, Any]:
    """Return a row that a task reads, as far as its paths tell."""
    row: dict[str, Any] = {}
    reader = one.reader
    paths = [*reader.fields.values(), reader.label, *reader.lists, *reader.group, *reader.idx.values()]
    if reader.choices is not None:
        paths += [*reader.choices.texts, reader.choices.right]
        paths += [path for path in (reader.choices.spans, reader.choices.of, reader.choices.phrases) if path]
    for path in paths:
        inside: Any = row
        for name in path.names[:-1]:
            key = name.removesuffix("[]")
            found = inside.setdefault(key, [{}, {}] if name.endswith("[]") else {}) if isinstance(inside, dict) else {}
            inside = found[0] if isinstance(found, list) and found else found
        if isinstance(inside, dict):
            inside.setdefault(path.names[-1].removesuffix("[]"), "a text" if "[]" not in path.names[-1] else ["a", "b"])
    return row


def task_rows(draw: Draw) -> None:
    """A row that is nearly right for a shipped task, from a file and in Python."""
    one = task(draw(st.sampled_from(shipped_names())))
    row = draw(changed_json({**rows_of(one), "label": draw(st.sampled_from((0, "0", True, *list(one.reader.labels))))}))
    labelled = draw(st.booleans())
    text = as_json(row)
    with folder() as path:
        write_bytes(path / "a.jsonl", text.encode())
        tried(one.read, path / "a.jsonl", labelled=labelled)
    tried(one.read_named, [("row 1", as_python(row))], name="here", labelled=labelled)


def task_files(draw: Draw) -> None:
    """A task file: text changed, or its values; what is accepted reads rows and looks for its parts."""
    name = draw(st.sampled_from(shipped_names()))
    values_changed = changed_json(parse_toml(task_text(name), where=name, error=TaskError).value).map(as_toml_file)
    text = draw(changed_text(task_text(name)) | values_changed)
    parsed = tried(TaskFile.parse, text)
    if parsed is None:
        return
    assert TaskFile.parse(parsed.text) == parsed
    row = draw(changed_json(rows_of(parsed)))
    tried(parsed.read_named, [("row 1", as_python(row))], name="here")
    with folder() as path:
        write_bytes(path / "train.jsonl", b"{}")
        tried(find_split, path, parsed, draw(st.sampled_from(("train", "dev", "test")) | texts))


FLEET = {
    "backbone": "somewhere", "at_once": 4, "all": {"epochs": 3, "manual": "The capital of [X] is [Y]"},
    "prompt": [
        {"name": "capitals", "data": "capitals:train", "seed": [0, 7], "encoder": ["lstm", "none"]},
        {"name": "mood", "data": "mood.jsonl", "dev": "folder:val", "template": "{text} [P:It was] [Y]",
         "labels": {"good": ["great", "fine"], "bad": "poor"}, "fields": {"y": "label"}, "epochs": 9},
    ],
}  # fmt: skip


def fleet_files(draw: Draw) -> None:
    """The file of a fleet: text changed, or its values; lists of many values too."""
    many = st.lists(st.sampled_from(("seed", "epochs", "lr", "patience", "num_restarts")), max_size=5).map(
        lambda keys: {
            **FLEET,
            "prompt": [{"name": "a", "data": "b.jsonl", **{key: list(range(1, 31)) for key in keys}}],
        }
    )
    fleet = draw(st.just(FLEET) | many)
    text = draw(changed_text(as_toml_file(fleet)) | changed_json(fleet).map(as_toml_file))
    with folder() as path:
        (path / "fleet.toml").write_bytes(text.encode("utf-8", "surrogatepass"))
        tried(read_fleet, path / "fleet.toml")


@functools.cache
def saved_prompt(kind: int) -> Mapping[str, bytes]:
    """The files of a prompt: one with slots, one with label words, one with a task, two with deep slots."""
    backbone = BackboneId("somewhere", None, "0" * 16)
    deep = Prompt.from_token_ids("[D*2] [X] [D] [P] so [Y]", [5, 6, 7, 8], tiny("llama"))
    prompt = (
        Prompt(Template.parse("[P*2] [X] [Y]"), torch.ones(2, 4), backbone),
        Prompt(Template.parse("[P*2] [X] [Y]"), torch.ones(2, 4), backbone, LabelWords.of("a=b; c=d")),
        Prompt.manual("{premise} [Y]", task=task("CB")),
        deep,
        replace(deep, deep=deep.deep.rounded(torch.bfloat16)) if deep.deep is not None else deep,
    )[kind]
    with folder() as path:
        prompt.save(path / "p")
        return {file.name: file.read_bytes() for file in (path / "p").iterdir()}


def prompt_folders(draw: Draw) -> None:
    """A prompt's folder: its manifest changed, its vectors changed with a right hash, or any file's bytes."""
    files = dict(saved_prompt(draw(st.integers(0, 4))))
    manifest = json.loads(files["prompt.json"])
    how = draw(st.integers(0, 3))
    if how == 0:
        name = draw(st.sampled_from(sorted(files)))
        files[name] = draw(changed_bytes(files[name]))
    elif how == 1:
        files["prompt.json"] = as_json(draw(changed_json(manifest))).encode()
    else:
        vectors = files["prompt.safetensors"]
        size = int.from_bytes(vectors[:8], "little")
        header = draw(changed_json(json.loads(vectors[8 : 8 + size]))) if how == 2 else None
        text = as_json(header).encode() if how == 2 else draw(changed_bytes(vectors[8 : 8 + size]))
        odd = torch.tensor(draw(st.sampled_from(([[float("nan")] * 4] * 2, [[1e38] * 4] * 2, [[1.0]], [1.0]))))
        whole = len(text).to_bytes(8, "little") + text + vectors[8 + size :]
        data = whole if draw(st.booleans()) else safetensors.torch.save({"slot_vectors": odd})
        files |= {"prompt.safetensors": data}
        files["prompt.json"] = json.dumps({**manifest, "vectors_sha256": sha256(data)}).encode()
    with folder() as path:
        for name, data in files.items():
            (path / name).write_bytes(data)
        prompt = tried(Prompt.load, path)
        (read,) = read_prompts([str(path)])
        assert (read.prompt is None) == (prompt is None)
        if prompt is not None:
            prompt.save(path / "again")
            Prompt.load(path / "again")
            tried(model("llama").predict, [{"x": "a film"}], prompt, ["yes", "no"])


def peft_folders(draw: Draw) -> None:
    """A folder of PEFT: its config changed, or its tensors, or any bytes; and a template for it."""
    backbone = tiny("gpt2")
    is_prefix = draw(st.booleans())
    config: dict[str, Any] = {"peft_type": "PREFIX_TUNING" if is_prefix else "PROMPT_TUNING", "task_type": "CAUSAL_LM"}
    config |= {"num_virtual_tokens": 2, "token_dim": 32, "num_layers": 2, "num_attention_heads": 4}
    wide = backbone.width * (2 * backbone.deep.layers if is_prefix else 1)
    data = safetensors.torch.save({"prompt_embeddings": torch.ones(2, wide)})
    how = draw(st.integers(0, 2))
    written = as_json(draw(changed_json(config)) if how == 0 else config).encode()
    if how == 1:
        size = int.from_bytes(data[:8], "little")
        header = as_json(draw(changed_json(json.loads(data[8 : 8 + size])))).encode()
        data = len(header).to_bytes(8, "little") + header + data[8 + size :]
    elif how == 2:
        written, data = draw(changed_bytes(written)), draw(changed_bytes(data))
    patterns = ("[P*2]{x} is [Y]", "[P*2] {x}[Y]", "{x} [P*2] [Y]", "[P:a b c]{x} [Y]", "[Y]", "[D*2]{x} is [Y]")
    template = draw(st.sampled_from(patterns))
    with folder() as path:
        (path / "adapter_config.json").write_bytes(written)
        (path / "adapter_model.safetensors").write_bytes(data)
        adapter = tried(read_adapter_folder, path)
        prompt = tried(import_prompt, adapter, template, backbone) if adapter is not None else None
        if prompt is not None:
            prompt.save(path / "prompt")
            Prompt.load(path / "prompt")


@functools.cache
def results() -> dict[str, Any]:
    """The content of results.json."""
    tasks = ["P36", "P103", "P17"]
    found = a_results(tasks)
    cell = {"task": "P36", "method": "manual", "seed": 0}
    found["agreement"] = {"cells": [{**cell, "dev": 0.5, "test": 0.25}], "correlation": 0.5, "mean_gap": None}
    found["warnings"] = [{**cell, "text": "stuck"}]
    found["cells"] = [one for one in found["cells"] if one["seed"] == 0 and one["task"] != "P17"]
    return found


DRAWN = ("Manual and learned prompt", "Learning curves")


def reports(draw: Draw) -> None:
    """Results and the files of a cell; with pictures now and then, since drawing takes long."""
    content = draw(changed_json(results()) | st.just(results()))
    with folder() as path:
        small = {"cells": [one for one in results()["cells"] if one["method"] in ("manual", "p-tuning")][:2]}
        write_cells(path, small)
        for cell in small["cells"]:
            record = path / cell["run"] / "run.json"
            record.write_text(as_json(draw(changed_json(json.loads(record.read_text())))), encoding="utf-8")
            answers = path / cell["run"] / "predictions.jsonl"
            lines = answers.read_text().splitlines()[:5]
            lines[0] = as_json(draw(changed_json(json.loads(lines[0]))))
            answers.write_text("\n".join(lines), encoding="utf-8")
        (path / "results.json").write_text(as_json(content), encoding="utf-8")
        found = tried(read_results, path)
        if found is None:
            return
        if draw(st.integers(0, 15)) == 0:
            tried(write_report, path)
            return
        tried(lambda: list(page._answer(found)))
        for heading, make in page.SECTIONS.items():
            if heading not in DRAWN:
                tried(make, found)


RUN = {
    "format_version": 1, "identity": {}, "train_backbone": "none", "settings": {"lr": 0.001},
    "data": {"train": {"name": "a", "sha256": "0", "rows": 3}, "dev": {"name": "b", "sha256": "1", "rows": 2}},
    "start": {"dev_loss": 1.0, "dev_score": 0.5}, "chosen_epoch": 1, "choice_rule": "highest",
    "dev_score": {"value": 0.5, "low": 0.0, "high": 1.0, "n": 2},
    "history": [{"epoch": 1, "train_loss": 1.0, "dev_loss": 1.0, "dev_score": 0.5}], "train_seconds": 0.5,
    "trainable_parameters": 5, "frozen_parameters": 7, "tokens_per_second": None,
}  # fmt: skip


def runs(draw: Draw) -> None:
    """The record of a finished run that is resumed."""
    record = draw(changed_json(RUN))
    with folder() as path:
        (path / "run.json").write_text(as_json(record), encoding="utf-8")
        tried(lambda: validate(RunRecord, read_json(path / "run.json")))


FACTS = [{"sub_label": f"Land {i}", "obj_label": f"Town {i}", "predicate_id": "P36", "pred": "/a/b"} for i in range(3)]
ASKED = [{"masked_sentences": ["It is [MASK]."], "obj_label": "a", "sub": "b", "judgments": [{"judgment": "yes"}]}]


def relation_folders(draw: Draw) -> None:
    """A folder of relations in LAMA's layout, with strange names and rows."""
    files = {
        "relations.jsonl": [{"relation": "P36", "template": "The capital of [X] is [Y] .", "type": "1-1"}],
        "TREx/P36.jsonl": FACTS,
        "Squad/test.jsonl": ASKED,
        "paraphrases/P36.jsonl": [{"pattern": "[X] has [Y]"}],
    }
    with folder() as path:
        for name, rows in files.items():
            place = path / draw(st.sampled_from((name,) * 6 + ("TREx/P17.csv", "data/a.tsv", "P36/train.jsonl")))
            place.parent.mkdir(exist_ok=True, parents=True)
            found = draw(changed_json(rows))
            lines = [as_json(row) for row in found] if isinstance(found, list) else [as_json(found)]
            place.write_bytes(draw(changed_bytes("\n".join(lines).encode())))
        found = tried(read_relations, path, which=draw(st.sampled_from((("all",), ("P36",), ("1-1",))) | texts))
        for relation in found or ():
            tried(split_relation, relation, seed=0)


def odd_texts(draw: Draw) -> None:
    """A record of strange values, answered in writing, among candidates and with label words."""
    family = draw(st.sampled_from(("llama", "bert")))
    words = draw(st.sampled_from((None, LabelWords.of("a=yes; b=no"))))
    prompt = Prompt.manual("{x} is [Y]", label_words=words)
    record = {"x": as_python(draw(values))}
    candidates = draw(st.sampled_from((None, ["yes", "no"]))) if words is None else None
    tokens = {"generation": {"max_new_tokens": 2}} if words is None and candidates is None else {}
    tried(model(family).predict, [record], prompt, candidates, **tokens)


@dataclass(frozen=True)
class Drawn:
    """Stands for a server: an answer for each page."""

    answers: Mapping[str, Answer]

    def get(self, path: str) -> Answer:
        """Answer with what was drawn."""
        return self.answers[path]

    def post(self, path: str, _: object) -> Answer:
        """Answer with what was drawn."""
        return self.answers[path]


def servers(draw: Draw) -> None:
    """The URL of a server, its keys, and what it answers to the doctor: each page changed, or something else."""
    with folder() as path:
        write_bytes(path / "keys", draw(changed_bytes(b"# a comment\nsecret-1\nsecret-2\n")))
        tried(Keys.read, path / "keys")
    tried(Server, draw(texts | changed_text("http://127.0.0.1:8000/v1")))
    prompt = Prompt.manual("{x} is [Y]", label_words=LabelWords.of("a=yes; b=no"))
    row = {"prediction": "a", "probabilities": {"a": 0.5, "b": 0.5}, "candidates": [{"text": "a", "log_prob": -0.7}]}
    right: dict[str, Any] = {
        "/health": {"status": "ok"},
        "/ready": {"status": "serving"},
        "/version": {"version": "0.1.0"},
        "/v1/models": {"data": [{"id": "one", "owned_by": "ptuning"}]},
        "/v1/predict": {"predictions": [row]},
    }
    status = st.sampled_from((200, 200, 200, 302, 401, 404, 405, 503))
    changed = draw(st.sampled_from(sorted(right)))
    pages = {
        path: Answer(draw(status), as_python(draw(changed_json(value))), seconds=0.1)
        if path == changed
        else Answer(200, value, seconds=0.1)
        for path, value in right.items()
    }
    drawn: Any = Drawn(pages)
    for check in check_server(drawn, [CheckedPrompt("one", "one", [], prompt)], tiny("llama")):
        assert check.detail
        assert bool(check.remedy) == (check.status != "ok")


@functools.cache
def service() -> TestClient:
    """A service on a tiny model, asked in process."""
    backbone = tiny("gpt2")
    backbone.tokenizer._tokenizer.chat_template = CHAT
    prompts = {**prompts_of(backbone), "talk": learned(backbone, str(chat_template(backbone.tokenizer, "it")))}
    engine = Engine(model("gpt2"))
    engine.start()
    return TestClient(create_app(engine, registry_of(prompts)))


# What a route takes; the values are right for one prompt or another.
CHAT = "{% for m in messages %}{{ ('is ' if m.role == 'assistant' else 'the ') + m.content + ' ' }}{% endfor %}"
TURNS = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
COPA = {"premise": "a", "choice1": "b", "choice2": "c", "question": "d"}
MESSAGE = {"role": "user", "content": [{"type": "text", "text": "a"}]}
BODIES: tuple[tuple[str, Any], ...] = (
    ("/v1/predict", {"model": ["mood", "write"], "records": ["a", {"x": "b"}], "top_k": 2, "min_probability": None,
                     "normalise": "mean", "calibrate": False, "count_stop": False, "candidates": None,
                     "generation": {"max_new_tokens": 2, "stop_strings": ["a"], "temperature": 0.5, "do_sample": True,
                                    "num_beams": 1}}),
    ("/v1/predict", {"model": "write", "records": [{"x": "b"}], "candidates": ["yes", "no"], "top_k": 2}),
    ("/v1/predict", {"model": "choose", "records": [COPA]}),
    ("/v1/completions", {"model": "write", "prompt": ["a", "b"], "max_tokens": 2, "temperature": 0.5, "top_p": 0.9,
                         "n": 2, "seed": 1, "stop": ["a"], "stream": True, "stream_options": {"include_usage": True},
                         "logprobs": 2, "user": "me", "logit_bias": {}, "best_of": 1}),
    ("/v1/completions", {"model": "tiny", "prompt": [[5, 6], [7, 8]], "max_tokens": 1, "echo": True, "logprobs": 1}),
    ("/v1/completions", {"model": "pair", "fields": {"x": "a", "z": "b"}, "logprobs": 1}),
    ("/v1/chat/completions", {"model": "write", "messages": [MESSAGE], "max_completion_tokens": 2, "logprobs": True,
                              "top_logprobs": 2, "tools": []}),
    ("/v1/chat/completions", {"model": "talk", "messages": TURNS, "max_tokens": 2, "stream": True, "stop": "a"}),
    ("/v1/predict", {"model": "talk", "records": [{"messages": TURNS}], "generation": {"max_new_tokens": 1}}),
    ("/v1/classify", {"model": "mood", "input": ["a", {"x": "b"}]}),
    ("/tokenize", {"model": "tiny", "prompt": "a", "add_special_tokens": True, "return_token_strs": True}),
    ("/detokenize", {"tokens": [5, 6]}),
)  # fmt: skip


def requests(draw: Draw) -> None:
    """The body of a request, changed in a few values or bytes: answered, or refused in the one shape of errors."""
    path, body = draw(st.sampled_from(BODIES))
    text = as_json(draw(changed_json(body)))
    data = text.encode() if draw(st.integers(0, 3)) else draw(changed_bytes(json.dumps(body).encode()))
    found = service().post(path, content=data, headers={"content-type": "application/json"})
    if found.headers["content-type"].startswith("text/event-stream"):
        assert found.text.endswith("data: [DONE]\n\n")
        assert '"internal_error"' not in found.text, found.text
        return
    assert found.status_code in (200, 400, 404), (found.status_code, found.text, data[:500])
    if found.status_code != 200:
        error = found.json()["error"]
        assert error["message"].strip()
        assert set(error) == {"message", "type", "code", "param"}
    assert '"internal_error"' not in found.text, (found.text, data[:500])


CONTENT, TEXT = "name#Kenya*capital#Nairobi*domain#.ke", "Kenya has Nairobi, 1,234.5 and .ke as its capital. It is 7."


def written_texts(draw: Draw) -> None:
    """Strange texts beside strange references and attributes, with every metric."""
    row = {"content": draw(changed_text(CONTENT)), "y": draw(st.lists(changed_text(TEXT), max_size=3) | st.just(TEXT))}
    records = tried(as_records, [row, {"content": CONTENT, "y": TEXT}])
    if records is None:
        return
    assert 1 <= len(gathered(records)) <= len(records)
    if not all(map(references_of, records)):
        return
    written = [draw(changed_text(TEXT)), TEXT]
    for name in TEXT_METRICS:
        tried(value_of_texts, written, records, name)


def divisions(draw: Draw) -> None:
    """How a command is divided: parts, workers and addresses."""
    part = tried(WorkPart.parse, draw(changed_text("3/16") | texts))
    if part is not None:
        assert WorkPart.parse(str(part)) == part
        tried(part.share, [Job(str(at), (str(at),)) for at in range(draw(st.integers(0, 20)))])
    number = st.integers(-3, 3) | st.floats()
    count = draw(st.none() | st.integers(-3, 10**30))
    tried(WorkerConfig, count, draw(st.none() | texts), draw(st.none() | number))


def settings(draw: Draw) -> None:
    """Settings of training and of writing: from a file, from Python, and as --set, --vary and --field have them."""
    own = TrainConfig().to_json()
    tried(TrainConfig.from_json, as_python(draw(changed_json(own))))
    generation = {"max_new_tokens": 3, "do_sample": True, "temperature": 0.5, "stop_strings": ["a"], "top_p": 0.9}
    tried(GenerationSettings.of, as_python(draw(changed_json(generation))))
    pairs = [f"{draw(st.sampled_from(sorted(own)) | texts)}={draw(texts | values.map(as_json))}"]
    pairs += draw(st.lists(texts, max_size=1))
    config = tried(config_of, pairs, epochs=3)
    tried(varied_by, pairs, config or TrainConfig())
    tried(fields_of, pairs)
    device_map = draw(changed_text('{"model.layers.0": 0, "": "disk"}'))
    tried(backbone_options, model_arg=[f"device_map={device_map}"])


CELLS: tuple[Any, ...] = (
    "a film", "", 3, 0.5, True, None, pandas.NaT, pandas.NA, pandas.Timestamp("2026-11-27 10:30"), date(2026, 11, 27),
    Decimal("3.50"), Decimal("sNaN"), numpy.datetime64("NaT"), numpy.datetime64("2026-11-27", "ns"), numpy.int8(3),
    numpy.array([1, 2]), torch.tensor(3), b"a", {1}, object(), 1j,
)  # fmt: skip


def tables(draw: Draw) -> None:
    """Data in memory: a data frame or a list of mappings, with whatever columns hold there."""
    cells = st.sampled_from(CELLS) | values.map(as_python)
    columns = draw(st.lists(st.sampled_from(("x", "y", "label", "day")) | texts, min_size=1, max_size=4))
    rows = [[draw(cells) for _ in columns] for _ in range(draw(st.integers(0, 3)))]
    listed: Any = [dict(zip(columns, row, strict=True)) for row in rows]
    frame = listed
    with contextlib.suppress(UnicodeError, OverflowError, ValueError, TypeError):  # of pandas: there is no such frame
        frame = pandas.DataFrame(rows, columns=columns)
    for data in (listed, frame):
        found = tried(as_records, data)
        if found is not None:
            tried(as_questions, found)
        tried(lambda: task("CB").read_rows(rows_of_data(data)))  # noqa: B023  # called at once


def kept_texts(draw: Draw) -> None:
    """What a stopped run of `generate` has left, damaged."""
    lines = [{"lines of": {"records": 2}}, {"record": {"x": "Kenya"}, "predicted": "Nairobi"}]
    data = draw(changed_bytes("".join(json.dumps(line) + "\n" for line in lines).encode()))
    with folder() as path:
        write_bytes(path / "texts.jsonl.part", data)

        def resumed() -> None:
            with kept_lines(path / "texts.jsonl", {"records": 2}, resume=True, overwrite=False) as kept:
                kept.write([{"record": {}}])
                kept.finish()

        tried(resumed)


KINDS: Mapping[str, Callable[[Draw], None]] = {
    one.__name__: one
    for one in (
        templates, labels, labelled_rows, conversations, data_files, parquet_files, inputs_to_answer, task_rows,
        task_files, fleet_files, prompt_folders, peft_folders, reports, runs, relation_folders, odd_texts, requests,
        servers, written_texts, kept_texts, divisions, settings, tables, model_folders, gguf_files,
        chat_templates, loading_options,
    )
}  # fmt: skip
