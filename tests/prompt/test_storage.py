"""The files of a prompt: saved is what was trained, and a file that is not is an error with a text of its own.

The invariants that tests name are those of docs/invariants.md.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.loading import load_backbone
from ptuning.config import TrainConfig
from ptuning.data.task_files import load_task
from ptuning.errors import FileError, PromptError
from ptuning.names import CARD_FILE, MANIFEST_FILE, VECTORS_FILE, VECTORS_KEY
from ptuning.prompt.backbone_id import BackboneId
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prompt import Prompt
from ptuning.prompt.storage import DEEP_VERSION, REQUIRED_KEYS
from ptuning.template.labels import LabelWords, Scoring
from ptuning.template.language import Template
from ptuning.training.run import train
from tests.conftest import FAMILIES, RECORDS, learned
from tests.processes import forked

TEMPLATE = "[P*2] [X] [P:is] [Y]"


@pytest.fixture
def saved(causal: Backbone, tmp_path: Path) -> Path:
    """The folder of a saved prompt with everything in it."""
    words = LabelWords({"größer": ("great", "São"), "bad": ("terrible",)})
    prompt = replace(
        learned(causal, TEMPLATE), label_words=words, seed=3, target_tokens=5, scores={"accuracy": 0.5, "loss": 1.25}
    )
    prompt.save(tmp_path / "prompt")
    return tmp_path / "prompt"


def change(folder: Path, **changes: object) -> None:
    """Write other values into a manifest; None in place of a value is null, ``...`` takes the key out."""
    manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    manifest = {key: value for key, value in {**manifest, **changes}.items() if value is not ...}
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest), encoding="utf-8")


def rewrite(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write other tensors, with the right sum in the manifest."""
    data = safetensors.torch.save(tensors)
    (folder / VECTORS_FILE).write_bytes(data)
    change(folder, vectors_sha256=hashlib.sha256(data).hexdigest())


def test_saved_and_loaded_in_a_new_process(tmp_path: Path, model_folder: Callable[[str], Path]) -> None:
    """Invariant *Saved is what was trained*: bit-equal logits in every family, in a process that never trained."""
    expected = {}
    for family in FAMILIES:
        backbone = load_backbone(str(model_folder(family)), dtype="float32", device="cpu")
        prompt = learned(backbone, TEMPLATE)
        prompt.save(tmp_path / family)
        logits = torch.cat(PromptModel(backbone).target_logits(RECORDS, prompt))
        expected[family] = hashlib.sha256(logits.numpy().tobytes()).hexdigest()
    folders = {family: (str(model_folder(family)), str(tmp_path / family)) for family in FAMILIES}
    code = (
        "import hashlib, json, torch\n"
        "from ptuning import Prompt, PromptModel, load_backbone\n"
        "torch.set_num_threads(1)\n"
        f"records = {RECORDS!r}\n"
        f"for family, (model, folder) in {folders!r}.items():\n"
        "    backbone = load_backbone(model, dtype='float32', device='cpu')\n"
        "    logits = torch.cat(PromptModel(backbone).target_logits(records, Prompt.load(folder)))\n"
        "    print(family, hashlib.sha256(logits.numpy().tobytes()).hexdigest())\n"
    )
    with forked(code, folder=tmp_path / "said") as process:
        assert process.wait() == 0, process.err
    assert dict(line.split() for line in process.out.splitlines()) == expected


def test_everything_comes_back(saved: Path, causal: Backbone) -> None:
    """Invariant *Saved is what was trained*: every part, letters beyond ASCII and the labels' order included."""
    found = Prompt.load(saved)
    original = learned(causal, TEMPLATE)
    assert original.slot_vectors is not None
    assert found.slot_vectors is not None
    assert torch.equal(found.slot_vectors, original.slot_vectors)
    assert (found.template, found.backbone) == (original.template, BackboneId.of(causal))
    assert found.label_words is not None
    assert list(found.label_words.words.items()) == [("größer", ("great", "São")), ("bad", ("terrible",))]
    assert (found.seed, found.target_tokens, found.scores) == (3, 5, {"accuracy": 0.5, "loss": 1.25})
    assert (found.method, found.slots) == ("test", 3)


def test_a_task_travels_with_the_prompt(tmp_path: Path) -> None:
    """Whoever has the folder can read the task's rows and answer them, without the task's own file."""
    task = load_task("COPA")
    Prompt.manual(task.manual[0], task=replace(task, calibrate=True, normalise="mean")).save(tmp_path / "p")
    found = Prompt.load(tmp_path / "p")
    assert found.task == task
    assert found.answer_space.has_choices
    assert found.answer_space.scoring == Scoring("mean", calibrate=True, keep=("question",))
    manifest = json.loads((tmp_path / "p" / MANIFEST_FILE).read_text(encoding="utf-8"))
    assert (manifest["task"]["name"], manifest["task"]["version"], manifest["choices"]) == ("COPA", "1", True)
    card = (tmp_path / "p" / "README.md").read_text(encoding="utf-8")
    assert "| task | COPA, version 1 |" in card
    assert "| chooses among | the choices that each row brings |" in card


def test_a_prompt_that_says_nothing_of_stopping_has_not_learned_it(tmp_path: Path) -> None:
    """As those that were saved before the manifest said so."""
    replace(Prompt.manual("[X] is [Y]"), learned_to_stop=True).save(tmp_path / "p")
    assert Prompt.load(tmp_path / "p").learned_to_stop
    manifest = json.loads((tmp_path / "p" / MANIFEST_FILE).read_text(encoding="utf-8"))
    del manifest["learned_to_stop"]
    (tmp_path / "p" / MANIFEST_FILE).write_text(json.dumps(manifest), encoding="utf-8")
    assert not Prompt.load(tmp_path / "p").learned_to_stop


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "COPA"}, "is damaged: 'task' must be a table of names and values"),
        ({"normalise": "max"}, "'normalise' must be one of sum, mean, and is .max"),
        ({"task": {"name": "COPA"}}, "is damaged: 'task.file' must be text"),
        ({"task": {"file": "name = 3"}}, "is damaged: its task: 'name' must be"),
    ],
)
def test_a_damaged_task_is_an_error_of_the_prompt(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    Prompt.manual("[X] is [Y]").save(tmp_path / "p")
    change(tmp_path / "p", **changes)
    with pytest.raises(PromptError, match=message):
        Prompt.load(tmp_path / "p")


def test_a_template_of_every_piece_comes_back(causal: Backbone, tmp_path: Path) -> None:
    """The pattern is stored as text; brackets, line breaks and tabs survive."""
    pattern = 'Zürich [[x]] {{"\n\t {a!} [P*2]{b}[P: is ]]] [X] [P] [Y]'
    prompt = learned(causal, pattern)
    prompt.save(tmp_path / "p")
    assert Prompt.load(tmp_path / "p").template == Template.parse(pattern)


def test_a_manual_prompt_comes_back(tmp_path: Path, backbone: Backbone) -> None:
    """Without vectors and without a backbone; it fits any."""
    Prompt.manual("[X] is [Y]").save(tmp_path / "p")
    found = Prompt.load(tmp_path / "p")
    assert found.slot_vectors is None
    assert found.backbone is None
    assert PromptModel(backbone).target_logits(RECORDS, found)[0].isfinite().all()


@pytest.fixture
def deep(causal: Backbone, tmp_path: Path) -> Path:
    """The folder of a prompt with deep slots in front and in the row."""
    prompt = Prompt.from_token_ids("[D*2] [X] [D] [P] so [Y]", [5, 6, 7, 8], causal)
    assert prompt.deep is not None
    noise = torch.Generator().manual_seed(0)
    learned_deep = prompt.deep.map(lambda one: one + torch.randn(one.shape, generator=noise))
    replace(prompt, deep=learned_deep).save(tmp_path / "deep")
    return tmp_path / "deep"


def test_deep_slots_come_back_in_a_format_of_their_own(causal: Backbone, deep: Path) -> None:
    manifest = json.loads((deep / MANIFEST_FILE).read_text(encoding="utf-8"))
    assert manifest["format_version"] == DEEP_VERSION
    layers = causal.deep.layers
    assert manifest["deep"] == {"slots": 3, "block": 2, "lead": manifest["deep"]["lead"], "of": [0], "layers": layers}
    names = set(safetensors.torch.load_file(deep / VECTORS_FILE))
    assert names == {VECTORS_KEY} | {f"deep.{at}.{part}" for at in range(layers) for part in ("keys", "values")} | {
        f"deep.{at}.inputs" for at in range(1, layers)
    }
    found = Prompt.load(deep)
    assert found.deep is not None
    again = deep.parent / "again"
    found.save(again)
    assert (again / VECTORS_FILE).read_bytes() == (deep / VECTORS_FILE).read_bytes()
    model = PromptModel(causal)
    assert model.predict(RECORDS[:3], found) == model.predict(RECORDS[:3], str(again))
    assert found.without("slots").deep is None


def test_deep_slots_of_bfloat16_take_half_and_answer_alike(causal: Backbone, deep: Path) -> None:
    whole = Prompt.load(deep)
    assert whole.deep is not None
    half = replace(whole, deep=whole.deep.rounded(torch.bfloat16))
    half.save(deep.parent / "half")
    manifest = json.loads((deep.parent / "half" / MANIFEST_FILE).read_text(encoding="utf-8"))
    assert (manifest["format_version"], manifest["deep"]["dtype"]) == (DEEP_VERSION, "bfloat16")
    tensors = safetensors.torch.load_file(deep.parent / "half" / VECTORS_FILE)
    assert {one.dtype for name, one in tensors.items() if name != VECTORS_KEY} == {torch.bfloat16}
    assert tensors[VECTORS_KEY].dtype == torch.float32
    found = Prompt.load(deep.parent / "half")
    assert found.deep is not None
    assert half.deep is not None
    for name, one in found.deep.tensors.items():
        assert one.dtype == torch.float32
        assert torch.equal(one, half.deep.tensors[name])
    found.save(deep.parent / "again")
    assert (deep.parent / "again" / VECTORS_FILE).read_bytes() == (deep.parent / "half" / VECTORS_FILE).read_bytes()
    model = PromptModel(causal)
    exact, rounded = (model.target_logits(RECORDS, one)[0] for one in (whole, found))
    assert 0 < float((exact - rounded).abs().max()) < 0.05 * float(exact.abs().max())
    change(deep.parent / "half", deep={**manifest["deep"], "dtype": "int8"})
    with pytest.raises(PromptError, match="float32, bfloat16"):
        Prompt.load(deep.parent / "half")


def test_a_damaged_layer_of_deep_slots(deep: Path) -> None:
    tensors = safetensors.torch.load_file(deep / VECTORS_FILE)
    for name in ("deep.0.keys", "deep.1.values", "deep.1.inputs"):
        rewrite(deep, {key: value for key, value in tensors.items() if key != name})
        with pytest.raises(PromptError, match=f"missing key '{name}'"):
            Prompt.load(deep)
        rewrite(deep, {**tensors, name: tensors[name][..., :-1, :].contiguous()})
        with pytest.raises(PromptError, match=r"do not fit each other|another shape"):
            Prompt.load(deep)
        rewrite(deep, {**tensors, name: tensors[name] * torch.nan})
        with pytest.raises(PromptError, match="the deep slots hold NaN"):
            Prompt.load(deep)
    rewrite(deep, {**tensors, "deep.99.keys": tensors["deep.0.keys"].clone()})
    with pytest.raises(PromptError, match=r"extra key 'deep\.99\.keys'"):
        Prompt.load(deep)
    rewrite(deep, {**tensors, "deep.1.keys": tensors["deep.1.keys"].to(torch.int32)})
    with pytest.raises(PromptError, match=r"'deep\.1\.keys' is int32, and prompt\.json says float32"):
        Prompt.load(deep)
    rewrite(deep, tensors)
    about = json.loads((deep / MANIFEST_FILE).read_text(encoding="utf-8"))["deep"]
    change(deep, deep={**about, "layers": 10**15})  # no names are made of so many
    with pytest.raises(PromptError, match=r"tensors of deep slots, and prompt\.json says 10{15} layers"):
        Prompt.load(deep)
    change(deep, deep=about)
    change(deep, template="[P*2] [X] [P] [P] so [Y]")
    with pytest.raises(PromptError, match="has no deep slots"):
        Prompt.load(deep)


def test_a_prompt_with_deep_slots_of_another_shape_does_not_fit(causal: Backbone, deep: Path) -> None:
    found = Prompt.load(deep)
    assert found.deep is not None
    assert found.deep.offsets is not None
    wider = replace(found.deep, offsets=found.deep.offsets.repeat(1, 2, 1))
    with pytest.raises(PromptError, match=r"are for \d+ layers of width \d+, and"):
        replace(found, deep=wider).bind(causal)
    assert found.deep.block is not None
    for other in (found.deep.block[1:], found.deep.block.repeat(1, 1, 2, 1, 1)):  # fewer layers, more heads
        with pytest.raises(PromptError, match=r"has \d layers with \d heads of \d+ numbers, where theirs are of \d "):
            replace(found, deep=replace(found.deep, block=other)).bind(causal)
    with pytest.raises(PromptError, match=r"deep slots in front and 1 elsewhere .* has 2 and 2"):
        replace(found, deep=replace(found.deep, slots=(0, 1))).bind(causal)


def test_a_run_folder_stands_for_its_prompt(saved: Path) -> None:
    """``out`` of a run holds ``prompt/``; either may be named."""
    assert Prompt.load(saved.parent).template == Prompt.load(saved).template


def test_equal_prompts_give_equal_bytes(causal: Backbone, tmp_path: Path) -> None:
    """Invariant *Seeds are separate*: equal prompts give equal files, and another seed gives others."""
    for name in ("one", "two"):
        learned(causal, TEMPLATE).save(tmp_path / name)
    for file in (VECTORS_FILE, MANIFEST_FILE, CARD_FILE):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    learned(causal, TEMPLATE, seed=1).save(tmp_path / "other")
    assert (tmp_path / "one" / VECTORS_FILE).read_bytes() != (tmp_path / "other" / VECTORS_FILE).read_bytes()


def test_a_prompt_is_three_small_files(saved: Path) -> None:
    """A prompt has no pickle and nothing of the encoder, leaves nothing beside it, and its card says how to use it."""
    assert sorted(path.name for path in saved.iterdir()) == sorted((VECTORS_FILE, MANIFEST_FILE, CARD_FILE))
    assert [path.name for path in saved.parent.iterdir()] == ["prompt"]
    tensors = safetensors.torch.load_file(saved / VECTORS_FILE)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == {
        VECTORS_KEY: (torch.float32, (3, 32))
    }
    card = (saved / CARD_FILE).read_text(encoding="utf-8")
    assert TEMPLATE in card
    assert "größer: great, São" in card
    assert "| accuracy (development part) | 0.500 |" in card


def test_saving_does_not_overwrite_unasked(saved: Path, causal: Backbone) -> None:
    """Saving over a prompt is an error, and the old one stays; with ``overwrite`` it goes, and files of others stay."""
    (saved / "notes.txt").write_text("mine")
    before = (saved / VECTORS_FILE).read_bytes()
    other = learned(causal, TEMPLATE, seed=9)
    with pytest.raises(FileError, match=r"exists and is not empty.*--overwrite"):
        other.save(saved)
    assert (saved / VECTORS_FILE).read_bytes() == before
    other.save(saved, overwrite=True)
    left = sorted((VECTORS_FILE, MANIFEST_FILE, CARD_FILE, "notes.txt"))
    assert sorted(path.name for path in saved.iterdir()) == left
    assert (saved / VECTORS_FILE).read_bytes() != before


@pytest.mark.parametrize("key", REQUIRED_KEYS)
def test_a_missing_manifest_key(saved: Path, key: str) -> None:
    """Invariant *Saved is what was trained*: a key that is missing is named, and no default takes its place."""
    change(saved, **{key: ...})
    with pytest.raises(PromptError, match=rf"prompt.json: missing key '{key}'"):
        Prompt.load(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 4}, r"format version 4, and this ptuning reads 1 to 3; update ptuning"),
        ({"format_version": 2}, r"prompt.json is damaged: 'weights' must be a table"),
        ({"slots": 4}, r"wrong shape \(3, 32\), and prompt.json says \(4, 32\)"),
        ({"width": 31}, r"wrong shape \(3, 32\), and prompt.json says \(3, 31\)"),
        ({"slots": "3"}, r"prompt.json is damaged: 'slots' must be a whole number from 0, and is \"3\""),
        ({"slots": -3}, r"prompt.json is damaged: 'slots' must be a whole number from 0, and is -3"),
        ({"width": 0}, r"prompt.json is damaged: 'width' must be a whole number from 1, and is 0"),
        ({"slots": 0}, r"has slots, and there are no vectors for them"),
        ({"vectors_sha256": "0" * 64}, r"was changed since it was saved"),
        ({"template": "[P*2] [X] [P:is]"}, r"prompt.json is damaged: a template needs one \[Y\]"),
        ({"backbone": "llama"}, r"prompt.json is damaged: 'backbone' must be a table of names and values"),
        ({"backbone": {"name": "x"}}, r"prompt.json is damaged: 'backbone.fingerprint' must be text"),
        ({"backbone": None}, r"slot vectors need to say which backbone they belong to"),
        (
            {"label_words": {"a": "great", "b": ["bad"]}},
            r"is damaged: 'label_words.a' must be a list of texts",
        ),
        ({"label_words": {"a": ["great"]}}, r"prompt.json is damaged: label words need at least two labels"),
        ({"seed": "one"}, r"prompt.json is damaged: 'seed' must be a whole number"),
        ({"seed": -1}, r"prompt.json is damaged: 'seed' must be a whole number from 0, and is -1"),
        ({"target_tokens": -7}, r"prompt.json is damaged: 'target_tokens' must be a whole number from 1, and is -7"),
        ({"target_tokens": "many"}, r"prompt.json is damaged: 'target_tokens' must be a whole number"),
        ({"scores": {"accuracy": "high"}}, r"prompt.json is damaged: 'scores.accuracy' must be a number"),
    ],
)
def test_a_changed_manifest(saved: Path, changes: dict[str, object], message: str) -> None:
    """Invariant *Saved is what was trained*: each change is an error with a text of its own."""
    change(saved, **changes)
    with pytest.raises(PromptError, match=message):
        Prompt.load(saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_saved_vectors_that_are_no_numbers(saved: Path, value: float) -> None:
    """Every answer would be NaN, and the first candidate would win."""
    vectors = torch.zeros(3, 32)
    vectors[1, 5] = value
    rewrite(saved, {VECTORS_KEY: vectors})
    with pytest.raises(PromptError, match=r"prompt.json is damaged: .*NaN or infinity \(in slot 2 of 3\).*train"):
        Prompt.load(saved)


def test_wrong_tensors(saved: Path) -> None:
    """Invariant *Saved is what was trained*: a missing key, an extra one, a wrong shape, a wrong type are errors."""
    vectors = torch.zeros(3, 32)
    cases = {
        rf"missing key '{VECTORS_KEY}'; it holds other": {"other": vectors},
        rf"extra key 'extra'; a prompt holds only '{VECTORS_KEY}'": {VECTORS_KEY: vectors, "extra": vectors.clone()},
        r"wrong shape \(3, 31\)": {VECTORS_KEY: vectors[:, :31].contiguous()},
        r"must be float32 of shape \(slots, width\), not torch.float16": {VECTORS_KEY: vectors.half()},
    }
    for message, tensors in cases.items():
        rewrite(saved, tensors)
        with pytest.raises(PromptError, match=message):
            Prompt.load(saved)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-7], "is not a whole safetensors file .* it is cut off or damaged"),
        (lambda data: data[:6], "is not a whole safetensors file"),
        (lambda data: b"", "is not a whole safetensors file"),
        (lambda data: data[:-7] + bytes([data[-7] ^ 1]) + data[-6:], "was changed since it was saved"),
    ],
)
def test_damaged_vectors(saved: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    """Invariant *Saved is what was trained*: a cut-off file and one changed byte are errors."""
    path = saved / VECTORS_FILE
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(PromptError, match=message):
        Prompt.load(saved)


def test_missing_files_and_broken_json(saved: Path, tmp_path: Path) -> None:
    """A folder of something else, half a prompt, half a manifest."""
    with pytest.raises(FileError, match=r"is not a prompt folder: there is no prompt.json in it"):
        Prompt.load(tmp_path / "nothing")
    text = (saved / MANIFEST_FILE).read_text(encoding="utf-8")
    (saved / MANIFEST_FILE).write_text(text[: len(text) // 2], encoding="utf-8")
    with pytest.raises(FileError, match="is not valid JSON"):
        Prompt.load(saved)
    (saved / MANIFEST_FILE).write_text(text, encoding="utf-8")
    (saved / VECTORS_FILE).unlink()
    with pytest.raises(FileError, match=r"cannot read .*prompt.safetensors"):
        Prompt.load(saved)


def test_a_kill_at_any_moment_of_saving_leaves_a_whole_prompt(
    saved: Path, causal: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old one or the new one; it used to be gone from its place between two renames. The next save tidies up."""
    old, new = Prompt.load(saved), learned(causal, TEMPLATE, seed=9)
    operations = [(Path, "replace"), (Path, "unlink"), (Path, "mkdir"), (os, "open"), (os, "fsync")]
    seen: list[int] = []
    for last in itertools.count():
        left = [last]

        def dying(real: Callable[..., Any], left: list[int] = left) -> Callable[..., Any]:
            def call(*given: Any, **named: Any) -> Any:
                left[0] -= 1
                if left[0] < 0:
                    raise SystemExit  # from now on nothing is done any more, as after kill -9
                return real(*given, **named)

            return call

        with monkeypatch.context() as patch:
            for place, name in operations:
                patch.setattr(place, name, dying(getattr(place, name)))
            patch.setattr("shutil.rmtree", lambda *_, **__: None)
            with contextlib.suppress(SystemExit):
                new.save(saved, overwrite=True)
        found = Prompt.load(saved)
        assert found.slot_vectors is not None
        assert old.slot_vectors is not None
        assert new.slot_vectors is not None
        seen.append(int(torch.equal(found.slot_vectors, new.slot_vectors)))
        assert seen[-1] or torch.equal(found.slot_vectors, old.slot_vectors)
        old.save(saved, overwrite=True)
        assert sorted(path.name for path in saved.iterdir()) == sorted((VECTORS_FILE, MANIFEST_FILE, CARD_FILE))
        if left[0] > 0:
            break
    assert seen == sorted(seen)
    assert 0 in seen
    assert len(seen) > 8


def test_readers_meet_a_whole_prompt_while_others_save(saved: Path, causal: Backbone) -> None:
    """Several threads save over each other; no reader finds it gone or mixed, and no writer an error."""
    prompts = [learned(causal, TEMPLATE, seed=seed) for seed in range(3)]
    vectors = [prompt.slot_vectors for prompt in prompts]
    prompts[0].save(saved, overwrite=True)
    with ThreadPoolExecutor(4) as pool:
        writers = [pool.submit(prompts[at % 3].save, saved, overwrite=True) for at in range(24)]
        while not all(writer.done() for writer in writers):
            found = Prompt.load(saved).slot_vectors
            assert any(found is not None and one is not None and torch.equal(found, one) for one in vectors)
        for writer in writers:
            writer.result()
    assert sorted(path.name for path in saved.iterdir()) == sorted((VECTORS_FILE, MANIFEST_FILE, CARD_FILE))


@pytest.mark.parametrize("name", [VECTORS_FILE, MANIFEST_FILE, "backbone/adapter_model.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "device", "hole"])
def test_devices_pipes_and_holes_are_not_read(causal: Backbone, tmp_path: Path, name: str, kind: str) -> None:
    """They would fill the memory, or never end."""
    config = TrainConfig(epochs=1, train_backbone="lora", encoder="none")
    train(TEMPLATE, [{"x": "a", "y": "yes"}], dev=[{"x": "b", "y": "no"}], backbone=causal, out=tmp_path, config=config)
    path = tmp_path / "prompt" / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with path.open("wb") as handle:
            handle.truncate(2**32)
    with pytest.raises((FileError, PromptError)) as caught:
        Prompt.load(tmp_path / "prompt")
    assert re.search("not a regular file|is larger than|not a whole safetensors file|no prompt.json", str(caught.value))


def test_the_folder_of_a_prompt_has_the_rights_of_the_umask(causal: Backbone, tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        learned(causal, TEMPLATE).save(tmp_path / "p")
    finally:
        os.umask(before)
    assert (tmp_path / "p").stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "p").iterdir()} == {0o600}
