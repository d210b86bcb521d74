"""The files of a prompt: saved is what was trained, and a file that is not is an error with a text of its own.

The invariants that tests name are those of docs/invariants.md.
"""

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
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prompt import Prompt
from ptuning.prompt.storage import BackboneId, Manifest
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


def test_a_manual_prompt_with_every_piece_of_a_template_comes_back(tmp_path: Path, backbone: Backbone) -> None:
    """The pattern is stored as text; brackets, line breaks and tabs survive. A run's folder stands for its prompt."""
    template = Template.parse('Zürich [[x]] {{"\n\t {x!} is ]] [X] [Y]')
    Prompt.manual(template).save(tmp_path / "run" / "prompt")
    prompt = Prompt.load(tmp_path / "run")
    assert (prompt.template, prompt.slot_vectors, prompt.backbone) == (template, None, None)
    assert PromptModel(backbone).target_logits(RECORDS, prompt)[0].isfinite().all()


def test_a_task_travels_with_the_prompt(tmp_path: Path) -> None:
    """Whoever has the folder can read the task's rows and answer them, without the task's own file."""
    task = load_task("COPA")
    Prompt.manual(task.manual[0], task=task.model_copy(update={"calibrate": True, "normalise": "mean"})).save(
        tmp_path / "p"
    )
    found = Prompt.load(tmp_path / "p")
    assert found.task == task
    assert found.answer_space.has_choices
    assert found.answer_space.scoring == Scoring("mean", calibrate=True, keep=("question",))
    manifest = json.loads((tmp_path / "p" / MANIFEST_FILE).read_text(encoding="utf-8"))
    assert (manifest["task"]["name"], manifest["task"]["version"], manifest["choices"]) == ("COPA", "1", True)
    card = (tmp_path / "p" / "README.md").read_text(encoding="utf-8")
    assert "| task | COPA, version 1 |" in card
    assert "| chooses among | the choices that each row brings |" in card


@pytest.fixture
def deep(causal: Backbone, tmp_path: Path) -> Path:
    """The folder of a prompt with deep slots in front and in the row."""
    prompt = Prompt.from_token_ids("[D*2] [X] [D] [P] so [Y]", [5, 6, 7, 8], causal)
    assert prompt.deep is not None
    noise = torch.Generator().manual_seed(0)
    learned_deep = prompt.deep.map(lambda one: one + torch.randn(one.shape, generator=noise))
    replace(prompt, deep=learned_deep).save(tmp_path / "deep")
    return tmp_path / "deep"


def test_deep_slots_come_back(causal: Backbone, deep: Path) -> None:
    manifest = json.loads((deep / MANIFEST_FILE).read_text(encoding="utf-8"))
    assert (manifest["deep"]["slots"], manifest["deep"]["prefix_slots"], manifest["deep"]["offset_slots"]) == (
        3,
        2,
        [0],
    )
    names = set(safetensors.torch.load_file(deep / VECTORS_FILE))
    layers = causal.deep.layers
    assert names == {VECTORS_KEY} | {f"deep.{at}.{part}" for at in range(layers) for part in ("keys", "values")} | {
        f"deep.{at}.inputs" for at in range(1, layers)
    }
    whole, again = Prompt.load(deep), deep.parent / "again"
    whole.save(again)
    assert (again / VECTORS_FILE).read_bytes() == (deep / VECTORS_FILE).read_bytes()
    model = PromptModel(causal)
    assert model.predict(RECORDS[:3], whole) == model.predict(RECORDS[:3], str(again))
    assert whole.without("slots").deep is None


def test_deep_slots_of_bfloat16_take_half_and_answer_alike(causal: Backbone, deep: Path) -> None:
    whole = Prompt.load(deep)
    assert whole.deep is not None
    half = replace(whole, deep=whole.deep.rounded(torch.bfloat16))
    assert half.deep is not None
    half.save(deep.parent / "half")
    tensors = safetensors.torch.load_file(deep.parent / "half" / VECTORS_FILE)
    assert {tensor.dtype for name, tensor in tensors.items() if name != VECTORS_KEY} == {torch.bfloat16}
    assert tensors[VECTORS_KEY].dtype == torch.float32
    loaded = Prompt.load(deep.parent / "half")
    assert loaded.deep is not None
    for name, tensor in loaded.deep.tensors.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, half.deep.tensors[name])
    loaded.save(deep.parent / "again")
    assert (deep.parent / "again" / VECTORS_FILE).read_bytes() == (deep.parent / "half" / VECTORS_FILE).read_bytes()
    model = PromptModel(causal)
    exact, rounded = (model.target_logits(RECORDS, prompt)[0] for prompt in (whole, loaded))
    assert 0 < float((exact - rounded).abs().max()) < 0.05 * float(exact.abs().max())


def test_a_prompt_with_deep_slots_of_another_shape_does_not_fit(causal: Backbone, deep: Path) -> None:
    prompt = Prompt.load(deep)
    assert prompt.deep is not None
    assert prompt.deep.offsets is not None
    assert prompt.deep.prefix is not None
    for changes in (
        {"offsets": prompt.deep.offsets.repeat(1, 2, 1)},
        {"prefix": prompt.deep.prefix[1:]},
        {"prefix": prompt.deep.prefix.repeat(1, 1, 2, 1, 1)},
        {"offset_slots": (0, 1)},
    ):
        with pytest.raises(PromptError, match=r"deep|layers"):
            replace(prompt, deep=replace(prompt.deep, **changes)).bind(causal)


VECTORS = torch.zeros(3, 32)
NAN = torch.cat([torch.zeros(1, 32), torch.full((1, 32), torch.nan), torch.zeros(1, 32)])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"other": VECTORS}, "other"),
        ({VECTORS_KEY: VECTORS, "extra": VECTORS + 1}, "extra"),
        ({VECTORS_KEY: VECTORS[:, :31].contiguous()}, r"\(3, 31\)"),
        ({VECTORS_KEY: VECTORS.half()}, "float16"),
        ({VECTORS_KEY: NAN}, "slot 2 of 3"),
    ],
)
def test_wrong_tensors(saved: Path, tensors: dict[str, Tensor], message: str) -> None:
    """Invariant *Saved is what was trained*."""
    rewrite(saved, tensors)
    with pytest.raises(PromptError, match=message):
        Prompt.load(saved)


def test_damaged_layers_of_deep_slots(deep: Path) -> None:
    tensors = safetensors.torch.load_file(deep / VECTORS_FILE)
    for name in ("deep.0.keys", "deep.1.values", "deep.1.inputs"):
        damaged: list[tuple[dict[str, Tensor], str]] = [
            ({key: value for key, value in tensors.items() if key != name}, f"missing.*{name}"),
            ({**tensors, name: tensors[name][..., :-1, :].contiguous()}, "fit each other|shape"),
            ({**tensors, name: tensors[name] * torch.nan}, "NaN"),
            ({**tensors, name: tensors[name].to(torch.int32)}, f"{name}.*int32"),
            ({**tensors, "deep.99.keys": tensors["deep.0.keys"].clone()}, r"extra.*deep\.99\.keys"),
        ]
        for changed, message in damaged:
            rewrite(deep, changed)
            with pytest.raises(PromptError, match=message):
                Prompt.load(deep)


REQUIRED = [(name, ...) for name, field in Manifest.model_fields.items() if field.is_required()]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *REQUIRED,
        ("format_version", 2), ("slots", 4), ("slots", "3"), ("slots", -3), ("slots", 0), ("width", 31), ("width", 0),
        ("vectors_sha256", "0" * 64), ("template", "[P*2] [X] [P:is]"), ("template", "[D*2] [X] [P] [Y]"),
        ("backbone", "llama"), ("backbone", {"name": "x"}), ("backbone", None), ("weights", {}),
        ("label_words", {"a": "great", "b": ["bad"]}), ("label_words", {"a": ["great"]}), ("seed", "one"),
        ("seed", -1), ("target_tokens", -7), ("target_tokens", "many"), ("scores", {"accuracy": "high"}),
        ("intervals", {"accuracy": [0.5]}), ("task", "COPA"), ("task", {"name": "COPA"}), ("normalise", "max"),
        ("task", {"name": "COPA", "version": "1", "file": "name = 3"}), ("deep", {"layers": 10**15}),
        ("deep", {"slots": 1, "prefix_slots": 0, "bos": 0, "offset_slots": [0], "layers": 2, "dtype": "int8"}),
    ],
)  # fmt: skip
def test_a_changed_manifest(saved: Path, key: str, value: object) -> None:
    """Invariant *Saved is what was trained*: the error names the file."""
    change(saved, **{key: value})
    with pytest.raises(PromptError, match=r"prompt\.(json|safetensors)"):
        Prompt.load(saved)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (VECTORS_FILE, lambda data: data[:-7]),
        (VECTORS_FILE, lambda _: b""),
        (VECTORS_FILE, lambda data: data[:-7] + bytes([data[-7] ^ 1]) + data[-6:]),
        (MANIFEST_FILE, lambda data: data[: len(data) // 2]),
        (MANIFEST_FILE, lambda _: b"[]"),
    ],
)
def test_damaged_files(saved: Path, name: str, damage: Callable[[bytes], bytes]) -> None:
    """Invariant *Saved is what was trained*: a cut-off file, one changed byte, a missing file."""
    (saved / name).write_bytes(damage((saved / name).read_bytes()))
    with pytest.raises((FileError, PromptError), match=name):
        Prompt.load(saved)
    (saved / name).unlink()
    with pytest.raises(FileError, match=name):
        Prompt.load(saved)


def test_vectors_that_are_no_safetensors_file(saved: Path) -> None:
    """With the right sum in the manifest."""
    (saved / VECTORS_FILE).write_bytes(b"text")
    change(saved, vectors_sha256=hashlib.sha256(b"text").hexdigest())
    with pytest.raises(PromptError, match=VECTORS_FILE):
        Prompt.load(saved)


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
    with pytest.raises(FileError, match=r"exists and is not empty.*overwrite"):
        other.save(saved)
    assert (saved / VECTORS_FILE).read_bytes() == before
    other.save(saved, overwrite=True)
    left = sorted((VECTORS_FILE, MANIFEST_FILE, CARD_FILE, "notes.txt"))
    assert sorted(path.name for path in saved.iterdir()) == left
    assert (saved / VECTORS_FILE).read_bytes() != before


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
