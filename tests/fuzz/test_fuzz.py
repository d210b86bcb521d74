"""Whatever comes in is accepted, or ends in one PTuningError with a message: a few inputs of every kind.

``make fuzz N=10000`` tries more of them. A kind is a function that draws an input and reads it with everything that
does; an error that is no PTuningError is a fault.
"""

import contextlib
import functools
import io
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import pandas
import pyarrow
import pyarrow.parquet
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.loading import load_backbone, load_tokenizer
from ptuning.backbone.sources import LoadOptions
from ptuning.cli.options import backbone_of, config_of, fields_of
from ptuning.cli.outputs import answer_columns, answer_row, kept_rows, write_rows
from ptuning.config import GenerationSettings, TrainConfig
from ptuning.data.checks import label_rows
from ptuning.data.conversations import read_conversations
from ptuning.data.lama import read_relations, split_relation
from ptuning.data.questions import as_questions
from ptuning.data.reading import RawRows, as_read, raw_rows
from ptuning.data.task_files import TaskFile, find_split, load_task, shipped_names
from ptuning.data.word_lists import read_words
from ptuning.doctor import Answer, CheckedPrompt, Server, check_server, read_prompts
from ptuning.errors import BackboneError, PTuningError, RecordError, TaskError
from ptuning.exchange.import_peft import import_prompt, read_adapter_folder
from ptuning.files import parse_toml, read_json, sha256, validate
from ptuning.metrics.generation import TEXT_METRICS, value_of_texts
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prediction import Candidate, Prediction
from ptuning.prompt.prompt import Prompt
from ptuning.prompt.storage import BackboneId
from ptuning.records import as_records, gathered, references_of, require_fields
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
from tests.chats import SHAPES, shaped
from tests.conftest import learned, make_model
from tests.fuzz.strange import (
    as_json,
    as_python,
    as_toml_file,
    changed_bytes,
    changed_file,
    changed_folder,
    changed_json,
    changed_text,
    texts,
    values,
)  # fmt: skip
from tests.report.conftest import a_results, write_cells
from tests.serve.conftest import prompts_of, registry_of
from tests.tiny_gguf import write_gguf

T = TypeVar("T")
Draw = Callable[[st.SearchStrategy[Any]], Any]
FAMILIES = ("llama", "bert", "gpt2")


def tried(read: Callable[..., T], *inputs: Any, **options: Any) -> T | None:
    """Read an input; None if that ends in an error of the package, which must have a message."""
    try:
        return read(*inputs, **options)
    except PTuningError as error:
        if not str(error).strip():
            raise AssertionError(f"{type(error).__name__} without a message") from error
        return None


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder and of those in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def written(files: Mapping[str, bytes], folder: Path) -> Path:
    """Write files into a folder."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@functools.cache
def made(make: Callable[[Path], object]) -> dict[str, bytes]:
    """Return the files that a function writes into a folder."""
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder))
        return files_of(Path(folder))


@functools.cache
def model_files(family: str) -> dict[str, bytes]:
    """Return the files of a tiny model."""
    return made(functools.partial(make_model, family))


@functools.cache
def tiny(family: str) -> Backbone:
    """Return a tiny random model of a family."""
    with tempfile.TemporaryDirectory() as folder:
        return load_backbone(str(written(model_files(family), Path(folder))), dtype="float32", device="cpu")


# ------------------------------------------------------------------------------------------------------ texts


def templates(draw: Draw, _: Path) -> None:
    """A pattern: parsed, printed and parsed again, made of a manual one, bound, filled and used with deep slots."""
    pattern = draw(texts)
    for parsed in (tried(Template.parse, pattern), tried(Template.from_manual, pattern, about=draw(st.none() | texts))):
        if parsed is None:
            continue
        assert Template.parse(str(parsed)) == parsed
        backbone = tiny(draw(st.sampled_from(FAMILIES)))
        record = {name: draw(texts) for name in (*parsed.fields, "y")}
        for block in {False, parsed.has_deep and backbone.reads_blocks}:
            bound = tried(TokenizedTemplate, parsed, tokenizer=backbone.tokenizer, kind=backbone.kind, block=block)
            if bound is not None:
                tried(bound.examples, [record])
                tried(bound.contexts, [record])
        if bound is not None and parsed.has_deep:
            prompt = tried(Prompt.from_token_ids, parsed, [5] * (bound.layout.prefix.slots + bound.slots), backbone)
            if prompt is not None:
                tried(PromptModel(backbone).predict, [record], prompt, ["yes", "no"])


def labels(draw: Draw, _: Path) -> None:
    """Label words as text, and as a mapping; rows whose targets are looked at for labels, with what is to be merged."""
    mapping = changed_json({"positive": ["great", "good"], "negative": ["terrible"]}).map(as_python)
    words = tried(LabelWords.of, draw(texts | changed_text("positive=great,good; negative=terrible,bad") | mapping))
    if words is not None:
        backbone = tiny(draw(st.sampled_from(FAMILIES)))
        template = Template.parse("{x} [P*2] [Y].")
        bound = TokenizedTemplate(template, tokenizer=backbone.tokenizer, kind=backbone.kind)
        tried(lambda: words.check_known(words.examples(bound, {"x": "a film"})))
    target = st.sampled_from(("billing", "Billing", "biling", "sales", "3.5", "")) | texts
    rows = draw(st.lists(st.fixed_dictionaries({"x": texts, "y": target}), max_size=12))
    more = [{"x": f"text {at}", "y": ("billing", "sales")[at % 2]} for at in range(draw(st.integers(0, 12)))]
    questions = tried(as_questions, [*rows, *more])
    if questions is not None:
        given_labels = draw(st.sampled_from((None, "auto", "billing;sales")) | texts)
        merge = draw(st.sampled_from((None, "case", ["biling=billing", "case"], {"sales": "billing"})) | values)
        parts = dict.fromkeys(draw(st.sampled_from((("train",), ("train", "test")))), questions)
        tried(label_rows, parts, given_labels, fields=("x",), merge=merge, strict=draw(st.booleans()))


def chat_templates(draw: Draw, _: Path) -> None:
    """The program that writes a model's conversations, changed; and the messages in them."""
    tokenizer = chat_tokenizer()
    tokenizer._tokenizer.chat_template = draw(changed_text(SHAPES[draw(st.sampled_from(sorted(SHAPES)))].jinja) | texts)
    template = tried(chat_template, tokenizer, draw(st.none() | texts))
    bound = tried(TokenizedTemplate, template, tokenizer=tokenizer, kind="causal") if template is not None else None
    messages = tried(read_messages, draw(texts | values.map(as_json)))
    if bound is not None and messages:
        tried(bound.examples, [{"messages": write_messages(messages), "y": draw(texts)}])


@functools.cache
def chat_tokenizer() -> Any:
    """Return a tokenizer whose chat template is another one in each test."""
    from ptuning.backbone.tokenizer import TextTokenizer

    return TextTokenizer(shaped("chatml"), max_tokens=2000)


def written_texts(draw: Draw, _: Path) -> None:
    """Strange texts with strange references and attributes, by every metric."""
    content, text = (
        "name#Kenya*capital#Nairobi*domain#.ke",
        "Kenya has Nairobi, 1,234.5 and .ke as its capital. It is 7.",
    )
    row = {"content": draw(changed_text(content)), "y": draw(st.lists(changed_text(text), max_size=3) | st.just(text))}
    records = tried(as_records, [row, {"content": content, "y": text}])
    if records is not None and all(map(references_of, records)):
        assert 1 <= len(gathered(records)) <= len(records)
        answers = [draw(changed_text(text)), text]
        for name in TEXT_METRICS:
            tried(value_of_texts, answers, records, name)


def options(draw: Draw, folder: Path) -> None:
    """Settings of training, writing, loading and division, as Python and the command line give them."""
    own = TrainConfig().to_json()
    tried(TrainConfig.from_json, as_python(draw(changed_json(own))))
    generation = {"max_new_tokens": 3, "do_sample": True, "temperature": 0.5, "stop_strings": ["a"], "top_p": 0.9}
    tried(GenerationSettings.of, as_python(draw(changed_json(generation))))
    pairs = [f"{draw(st.sampled_from(sorted(own)) | texts)}={draw(texts | values.map(as_json))}"]
    pairs += draw(st.lists(texts, max_size=1))
    tried(config_of, pairs, epochs=3)
    tried(fields_of, pairs)
    device_map = draw(changed_text('{"model.layers.0": 0, "": "disk"}'))
    tried(backbone_of, None, model_arg=[f"device_map={device_map}"])
    part = tried(WorkPart.parse, draw(changed_text("3/16") | texts))
    if part is not None:
        assert WorkPart.parse(str(part)) == part
        tried(part.share, [Job(str(at), (str(at),)) for at in range(draw(st.integers(0, 20)))])
    number = st.none() | st.integers(-3, 3) | st.floats()
    tried(WorkerConfig, draw(st.none() | st.integers(-3, 10**30)), draw(st.none() | texts), draw(number))
    loading: dict[str, Any] = {
        "dtype": "float32", "device": "cpu", "device_map": "auto", "revision": "main", "token": "hf_x",
        "cache_dir": "c", "attn_implementation": "eager", "max_length": 32, "quantize": "int8", "shard": "map",
    }  # fmt: skip
    names = draw(st.lists(st.sampled_from(sorted(loading)), max_size=3, unique=True))
    chosen = {name: as_python(draw(values)) if draw(st.booleans()) else loading[name] for name in names}
    tried(LoadOptions, **chosen)
    with mock.patch("ptuning.backbone.loading._load_model", side_effect=BackboneError("weights take a while")):
        tried(load_backbone, str(written(model_files("llama"), folder)), **{"device": "cpu", **chosen})


# ------------------------------------------------------------------------------------------------------- data

ROWS = [
    {"x": "Kenya", "y": "Nairobi", "n": 3, "text": "a film", "label": "positive", "ok": True, "who": None},
    {"x": "São Tomé", "y": '"b", a\n', "n": 0.5, "text": "two", "label": 1, "ok": False, "who": {"a": ["b"]}},
]
CONVERSATIONS = [
    {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "loss": True}],
        "system": "c",
    },
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]]},
    {"prompt": "a", "response": "b", "history": [["c", "d"]]},
    {"content": "a#b", "summary": "c"},
]


def conversations(draw: Draw, _: Path) -> None:
    """Rows in one of the known forms of conversations, changed; to learn from and to ask."""
    rows = draw(changed_json([draw(st.sampled_from(CONVERSATIONS))]))
    listed = [("a.jsonl, line 1", row) for row in (rows if isinstance(rows, list) else [rows])]
    raw = tried(RawRows, listed, name="a.jsonl", digest="", format="jsonl")
    for ask in (False, True) if raw is not None else ():
        read = tried(read_conversations, raw, ask=ask)
        for question in read.questions if read is not None else ():
            messages = read_messages(question.record["messages"])
            assert messages == read_messages(write_messages(messages))


@functools.cache
def table(name: str) -> bytes:
    """Return the rows as a file of each format."""
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


def data_files(draw: Draw, folder: Path) -> None:
    """A data file of each format: as records, as rows of a task, as a list of words, and as inputs of ``predict``."""
    name = "a" + draw(st.sampled_from((".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")))
    data = draw(changed_file(name, table(name)))
    named = draw(st.sampled_from((None, {"y": "label"}, {"": "x"})))
    tried(lambda: as_read(raw_rows(data, name=name), fields=named))
    written({name: data}, folder)
    tried(task(draw(st.sampled_from(shipped_names()))).read, folder / name)
    tried(read_words, folder / name)
    fields = draw(st.sampled_from(({"x": ("x",)}, {"x": ("text", "x")}, {"x": ("x",), "y": ("y",)}, {})))
    kind = draw(st.sampled_from(("standard input", "a.txt", "a.dat", "a.csv")))
    rows = tried(
        raw_rows, draw(st.just(data) | texts.map(lambda text: text.encode(errors="replace"))), name=kind, columns=fields
    )
    records = tried(as_read, rows) if rows is not None else None
    if rows is None or not records:
        return
    tried(require_fields, records, list(fields))

    def write() -> None:
        answer, file = Prediction.of_classes([Candidate("a", -0.5)]), folder / "out.csv"
        answered = [answer_row(file, row, record, answer) for (_, row), record in zip(rows, records, strict=True)]
        write_rows(file, answered, answer_columns(file, rows), rows.delimiter or ",")

    tried(write)
    if (folder / "out.csv").exists() and rows.delimiter in (",", ";"):
        again = raw_rows((folder / "out.csv").read_bytes(), name="out.csv")
        assert len(again) in (len(rows), 0) or len(rows.columns) < 2


def tables(draw: Draw, _: Path) -> None:
    """Data in memory: a data frame or a list of mappings, with whatever columns hold there; and a record to answer."""
    cells = st.sampled_from((pandas.NaT, pandas.NA, pandas.Timestamp("2026-11-27"), torch.tensor(3), b"a", {1}, 1j))
    columns = draw(st.lists(st.sampled_from(("x", "y", "label", "day")) | texts, min_size=1, max_size=4))
    rows = draw(
        st.lists(st.lists(cells | values.map(as_python), min_size=len(columns), max_size=len(columns)), max_size=3)
    )
    data: list[Any] = [[dict(zip(columns, cells, strict=True)) for cells in rows]]
    with contextlib.suppress(UnicodeError, OverflowError, ValueError, TypeError):  # of pandas: there is no such frame
        data.append(pandas.DataFrame(rows, columns=columns))
    for table_of_rows in data:
        records = tried(as_records, table_of_rows)
        if records is not None:
            tried(as_questions, records)
    words = draw(st.sampled_from((None, LabelWords.of("a=yes; b=no"))))
    prompt = Prompt.manual("{x} is [Y]", label_words=words)
    candidates = draw(st.sampled_from((None, ["yes", "no"]))) if words is None else None
    tokens = {"generation": {"max_new_tokens": 2}} if words is None and candidates is None else {}
    model = PromptModel(tiny(draw(st.sampled_from(("llama", "bert")))))
    tried(model.predict, [{"x": as_python(draw(values))}], prompt, candidates, **tokens)


@functools.cache
def task(name: str) -> TaskFile:
    """Return a shipped task."""
    return load_task(name)


def row_of(task_file: TaskFile) -> dict[str, Any]:
    """Return a row that a task reads, as far as its paths show."""
    row: dict[str, Any] = {}
    reader = task_file.reader
    paths = [*reader.fields.values(), reader.label, *reader.lists, *reader.group, *reader.idx.values()]
    if reader.choices is not None:
        paths += [*reader.choices.texts, reader.choices.right]
        paths += [path for path in (reader.choices.spans, reader.choices.of, reader.choices.phrases) if path]
    for path in paths:
        inside: Any = row
        for name in path.names[:-1]:
            key = name.removesuffix("[]")
            inner = inside.setdefault(key, [{}, {}] if name.endswith("[]") else {}) if isinstance(inside, dict) else {}
            inside = inner[0] if isinstance(inner, list) and inner else inner
        if isinstance(inside, dict):
            inside.setdefault(path.names[-1].removesuffix("[]"), "a text" if "[]" not in path.names[-1] else ["a", "b"])
    return row


def tasks(draw: Draw, folder: Path) -> None:
    """A task file, changed; and a row that is nearly right for a task, from a file and in Python."""
    name = draw(st.sampled_from(shipped_names()))
    text = (resources.files("ptuning.data") / "tasks" / f"{name}.toml").read_text(encoding="utf-8")
    toml = changed_json(parse_toml(text, where=name, error=TaskError)).map(as_toml_file)
    parsed = tried(TaskFile.parse, draw(st.just(text) | changed_text(text) | toml))
    if parsed is None:
        return
    assert TaskFile.parse(parsed.text) == parsed
    label = draw(st.sampled_from((0, "0", True, *parsed.reader.labels)))
    row = draw(changed_json({**row_of(parsed), "label": label}))
    labelled = draw(st.booleans())
    tried(parsed.read_named, [("row 1", as_python(row))], name="here", labelled=labelled)
    written({"train.jsonl": as_json(row).encode()}, folder)
    tried(parsed.read, folder / "train.jsonl", labelled=labelled)
    tried(find_split, folder, parsed, draw(st.sampled_from(("train", "dev", "test")) | texts))


FLEET = {
    "backbone": "somewhere", "at_once": 4, "all": {"epochs": 3, "manual": "The capital of [X] is [Y]"},
    "prompt": [
        {"name": "capitals", "data": "capitals:train", "seed": [0, 7], "encoder": ["lstm", "none"]},
        {"name": "mood", "data": "mood.jsonl", "dev": "folder:val", "template": "{text} [P:It was] [Y]",
         "labels": {"good": ["great", "fine"], "bad": "poor"}, "fields": {"y": "label"}, "epochs": 9},
    ],
}  # fmt: skip


def fleet_files(draw: Draw, folder: Path) -> None:
    """The file of a fleet: text changed, or its values; lists of many values too."""
    keys = draw(st.lists(st.sampled_from(("seed", "epochs", "lr", "patience", "num_restarts")), max_size=5))
    many = {**FLEET, "prompt": [{"name": "a", "data": "b.jsonl", **{key: list(range(1, 31)) for key in keys}}]}
    fleet = draw(st.sampled_from((FLEET, many)))
    text = draw(changed_text(as_toml_file(fleet)) | changed_json(fleet).map(as_toml_file))
    written({"fleet.toml": text.encode("utf-8", "surrogatepass")}, folder)
    tried(read_fleet, folder / "fleet.toml")


RELATIONS: Mapping[str, list[dict[str, Any]]] = {
    "relations.jsonl": [{"relation": "P36", "template": "The capital of [X] is [Y] .", "type": "1-1"}],
    "TREx/P36.jsonl": [{"sub_label": f"Land {i}", "obj_label": f"Town {i}", "predicate_id": "P36"} for i in range(3)],
    "Squad/test.jsonl": [{"masked_sentences": ["It is [MASK]."], "obj_label": "a", "sub": "b"}],
    "paraphrases/P36.jsonl": [{"pattern": "[X] has [Y]"}],
}


def relation_folders(draw: Draw, folder: Path) -> None:
    """A folder of relations in LAMA's layout, with strange names and rows."""
    files = {name: "\n".join(map(json.dumps, rows)).encode() for name, rows in RELATIONS.items()}
    moved = draw(st.sampled_from(("TREx/P36.jsonl", "TREx/P17.csv", "data/a.tsv", "P36/train.jsonl")))
    files[moved] = files.pop("TREx/P36.jsonl")
    written(draw(changed_folder(files)), folder)
    for relation in tried(read_relations, folder, which=draw(st.sampled_from((("all",), ("P36",))) | texts)) or ():
        tried(split_relation, relation, seed=0)


# ------------------------------------------------------------------------------------------- files that we wrote


@functools.cache
def saved_prompt(kind: int) -> dict[str, bytes]:
    """Return the files of a prompt: with slots, with label words, with a task, two with deep slots."""
    backbone = BackboneId("somewhere", None, "0" * 16)
    deep = Prompt.from_token_ids("[D*2] [X] [D] [P] so [Y]", [5, 6, 7, 8], tiny("llama"))
    assert deep.deep is not None
    prompts = (
        Prompt(Template.parse("[P*2] [X] [Y]"), torch.ones(2, 4), backbone),
        Prompt(Template.parse("[P*2] [X] [Y]"), torch.ones(2, 4), backbone, LabelWords.of("a=b; c=d")),
        Prompt.manual("{premise} [Y]", task=task("CB")),
        deep,
        replace(deep, deep=deep.deep.rounded(torch.bfloat16)),
    )
    return made(lambda folder: prompts[kind].save(folder))


def prompt_folders(draw: Draw, folder: Path) -> None:
    """A prompt's folder with a changed file; often with the right hash of changed vectors."""
    files = draw(changed_folder(saved_prompt(draw(st.integers(0, 4)))))
    if draw(st.booleans()):
        odd = torch.tensor(draw(st.sampled_from(([[float("nan")] * 4] * 2, [[1e38] * 4] * 2, [[1.0]], [1.0]))))
        saved = safetensors.torch.save({"slot_vectors": odd})
        files["prompt.safetensors"] = draw(st.sampled_from((files["prompt.safetensors"], saved)))
        with contextlib.suppress(ValueError, TypeError, RecursionError):  # the manifest is broken already
            manifest = json.loads(files["prompt.json"])
            manifest["vectors_sha256"] = sha256(files["prompt.safetensors"])
            files["prompt.json"] = json.dumps(manifest).encode()
    prompt = tried(Prompt.load, written(files, folder))
    (read,) = read_prompts([str(folder)])
    assert (read.prompt is None) == (prompt is None)
    if prompt is not None:
        prompt.save(folder / "again")
        Prompt.load(folder / "again")
        tried(PromptModel(tiny("llama")).predict, [{"x": "a film"}], prompt, ["yes", "no"])


def peft_folders(draw: Draw, folder: Path) -> None:
    """A folder of PEFT, changed, and a template for it."""
    backbone = tiny("gpt2")
    is_prefix = draw(st.booleans())
    config: dict[str, Any] = {"peft_type": "PREFIX_TUNING" if is_prefix else "PROMPT_TUNING", "task_type": "CAUSAL_LM"}
    config |= {"num_virtual_tokens": 2, "token_dim": 32, "num_layers": 2, "num_attention_heads": 4}
    wide = backbone.width * (2 * backbone.deep.layers if is_prefix else 1)
    tensors = safetensors.torch.save({"prompt_embeddings": torch.ones(2, wide)})
    files = {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": tensors}
    adapter = tried(read_adapter_folder, written(draw(changed_folder(files)), folder))
    patterns = ("[P*2]{x} is [Y]", "[P*2] {x}[Y]", "{x} [P*2] [Y]", "[P:a b c]{x} [Y]", "[Y]", "[D*2]{x} is [Y]")
    template = draw(st.sampled_from(patterns))
    prompt = tried(import_prompt, adapter, template, backbone) if adapter is not None else None
    if prompt is not None:
        prompt.save(folder / "prompt")
        Prompt.load(folder / "prompt")


def _comparison(folder: Path) -> None:
    results = a_results(["P36", "P103"])
    cell = {"task": "P36", "method": "manual", "seed": 0}
    results["agreement"] = {"cells": [{**cell, "dev": 0.5, "test": 0.25}], "correlation": 0.5, "mean_gap": None}
    results["warnings"] = [{**cell, "text": "stuck"}]
    results["cells"] = [item for item in results["cells"] if item["seed"] == 0]
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    write_cells(folder, {"cells": [item for item in results["cells"] if item["method"] in ("manual", "p-tuning")][:2]})


def reports(draw: Draw, folder: Path) -> None:
    """Results and the files of a cell; with pictures now and then, since drawing takes long."""
    results = tried(read_results, written(draw(changed_folder(made(_comparison))), folder))
    if results is None:
        return
    if draw(st.integers(0, 15)) == 0:
        tried(write_report, folder)
        return
    tried(lambda: list(page._answer(results)))
    for heading, make in page.SECTIONS.items():
        if heading not in ("Manual and learned prompt", "Learning curves"):
            tried(make, results)


RUN = {
    "format_version": 1, "identity": {}, "train_backbone": "none", "settings": {"lr": 0.001},
    "data": {"train": {"name": "a", "sha256": "0", "rows": 3}, "dev": {"name": "b", "sha256": "1", "rows": 2}},
    "start": {"dev_loss": 1.0, "dev_score": 0.5}, "chosen_epoch": 1, "choice_rule": "highest",
    "dev_score": {"value": 0.5, "low": 0.0, "high": 1.0, "n": 2},
    "history": [{"epoch": 1, "train_loss": 1.0, "dev_loss": 1.0, "dev_score": 0.5}], "train_seconds": 0.5,
    "trainable_parameters": 5, "frozen_parameters": 7, "tokens_per_second": None,
}  # fmt: skip


def runs(draw: Draw, folder: Path) -> None:
    """The record of a finished run that is resumed, and the texts that a stopped ``predict`` has left."""
    lines = [{"lines of": {"records": 2}}, {"record": {"x": "Kenya"}, "predicted": "Nairobi"}]
    left = "".join(json.dumps(line) + "\n" for line in lines).encode()
    files = {"run.json": json.dumps(RUN).encode(), "texts.jsonl.part": left}
    written(draw(changed_folder(files)), folder)
    tried(lambda: validate(RunRecord, read_json(folder / "run.json")))

    def resumed() -> None:
        with kept_rows(folder / "texts.jsonl", {"records": 2}, resume=True, overwrite=False) as kept:
            kept.write([{"record": {}}])
            kept.finish((), ",")

    tried(resumed)


# --------------------------------------------------------------------------------------------- models and servers

# Keys that change how the folder of a model is read; each with what is nearly right.
MODEL_KEYS: Mapping[str, Any] = {
    "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
    "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    "auto_map": {"AutoConfig": "config.Config"}, "text_config": {"vocab_size": 420}, "is_encoder_decoder": True,
    "num_labels": 3, "max_seq_len": 64,
}  # fmt: skip


def model_folders(draw: Draw, folder: Path) -> None:
    """The folder of a model, of which one file is changed: loaded, its tokenizer alone as well, and used."""
    files = dict(model_files(draw(st.sampled_from(FAMILIES))))
    key = draw(st.sampled_from((None, *MODEL_KEYS)))
    if key is not None:
        config = {**json.loads(files["config.json"]), key: draw(changed_json(MODEL_KEYS[key]))}
        files["config.json"] = as_json(config).encode()
    else:
        files = draw(changed_folder(files))
    written(files, folder)
    tried(load_tokenizer, str(folder))
    backbone = tried(load_backbone, str(folder), dtype="float32", device="cpu")
    if backbone is not None:
        for candidates in (["yes", "no"], None):
            tried(PromptModel(backbone).predict, [{"x": "a film"}], Prompt.manual("{x} is [Y]"), candidates)


def gguf_files(draw: Draw, folder: Path) -> None:
    """A GGUF file with broken bytes, most of all in its header."""
    data = made(lambda path: write_gguf(path / "tiny.gguf"))["tiny.gguf"]
    header = draw(st.sampled_from((4000, 4000, 4000, len(data))))
    changed = draw(changed_bytes(data[:header])) + data[header:]
    with mock.patch.dict(os.environ, {"XDG_CACHE_HOME": str(folder / "cache")}):
        written({"tiny.gguf": changed}, folder)
        if changed != data:
            tried(load_backbone, folder / "tiny.gguf", dtype="float32", device="cpu")


def servers(draw: Draw, folder: Path) -> None:
    """The URL of a server, its keys, and its answers to the doctor: one page is changed."""
    written({"keys": draw(changed_bytes(b"# a comment\nsecret-1\nsecret-2\n"))}, folder)
    tried(Keys.read, folder / "keys")
    tried(Server, draw(texts | changed_text("http://127.0.0.1:8000/v1")))
    row = {"prediction": "a", "probabilities": {"a": 0.5, "b": 0.5}, "candidates": [{"text": "a", "log_prob": -0.7}]}
    bodies: dict[str, Any] = {
        "/health": {"status": "ok"}, "/ready": {"status": "serving"}, "/version": {"version": "0.1.0"},
        "/v1/models": {"data": [{"id": "one", "owned_by": "ptuning"}]}, "/v1/predict": {"predictions": [row]},
    }  # fmt: skip
    pages = {path: Answer(200, body, seconds=0.1) for path, body in bodies.items()}
    path = draw(st.sampled_from(sorted(bodies)))
    status = draw(st.sampled_from((200, 200, 200, 302, 401, 404, 405, 503)))
    pages[path] = Answer(status, as_python(draw(changed_json(bodies[path]))), seconds=0.1)
    prompt = Prompt.manual("{x} is [Y]", label_words=LabelWords.of("a=yes; b=no"))
    server = mock.Mock(request=lambda path, _=None: pages[path])
    for check in check_server(server, [CheckedPrompt("one", "one", [], prompt)], tiny("llama")):
        assert check.detail
        assert bool(check.remedy) == (check.status != "ok")


@functools.cache
def service() -> TestClient:
    """Return a service on a tiny model, asked in process."""
    backbone = tiny("gpt2")
    backbone.tokenizer._tokenizer.chat_template = CHAT
    prompts = {**prompts_of(backbone), "talk": learned(backbone, str(chat_template(backbone.tokenizer, "it")))}
    engine = Engine(PromptModel(backbone))
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


def requests(draw: Draw, _: Path) -> None:
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


KINDS = (
    templates, labels, chat_templates, written_texts, options, conversations, data_files, tables, tasks, fleet_files,
    relation_folders, prompt_folders, peft_folders, reports, runs, model_folders, gguf_files, servers, requests,
)  # fmt: skip
# Number of examples of kinds that take long.
EXAMPLES: Mapping[Callable[..., None], int] = {
    tables: 10, reports: 4, relation_folders: 15, tasks: 15, model_folders: 6, gguf_files: 8, options: 15
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_whatever_comes_in_is_accepted_or_ends_in_one_error(kind: Callable[[Draw, Path], None]) -> None:
    examples = int(os.environ.get("FUZZ_EXAMPLES") or EXAMPLES.get(kind, 25))

    @settings(max_examples=examples, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def check(data: st.DataObject) -> None:
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            kind(data.draw, Path(folder))

    check()


def test_any_other_exception_is_a_fault() -> None:
    assert tried(int, "3") == 3
    assert tried(mock.Mock(side_effect=RecordError("row 3 has no target"))) is None
    with pytest.raises(ValueError, match="three"):
        tried(int, "three")
    with pytest.raises(AssertionError):
        tried(mock.Mock(side_effect=RecordError("")))
