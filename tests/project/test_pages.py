"""The commands of the README and of the pages that the docs open with run as they stand, on a tiny random model."""

import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import ptuning
from ptuning.backbone import sources
from ptuning.backbone.loading import load_backbone, load_tokenizer
from tests.cli.calls import call
from tests.conftest import ROOT

PAGES = ("README.md", "docs/messages.md", "docs/facts.md", "docs/table.md")
# Commands that train get one epoch, and those that compare few facts: a random model learns nothing in six either.
EPOCH = ("--set", "epochs=1")
QUICK = {
    "train": EPOCH,
    "compare": (*EPOCH, "--train-size", "20"),
    "demo": EPOCH,
}
# Files that a page calls the reader's own, and where the reader has them from here.
OWN = {"mine.jsonl": "capitals/train.jsonl", "test.jsonl": "capitals/test.jsonl"}
# How lines begin that a page shows of what a command says, and how many there are.
SHOWN = ("target: ", "train: ", "warning: ", "slots come ", "continents: ", "currencies: ")
SHOWN_LINES = {"docs/messages.md": 6, "docs/facts.md": 2}


def commands(page: str) -> Iterator[str]:
    """Yield the command lines of a page's blocks of code; a line that ends with a backslash goes on in the next."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for block in re.findall(r"^```(?:sh|console)?\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            if re.match(r"(?:echo .* \| )?ptuning (?!serve )", line):  # tests/serve has the service
                yield line.partition("   #")[0]


def scripts(page: str) -> list[str]:
    """Return the Python of a page, with one epoch of training."""
    text = (ROOT / page).read_text(encoding="utf-8")
    code = re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    quick = [one.replace("dev=dev)", "dev=dev, config=ptuning.TrainConfig(epochs=1))") for one in code]
    return [one for one in quick if "from openai" not in one]  # tests/serve has the clients


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def run(line: str) -> str:
    """Run one command line of a page, with what an ``echo`` in front of it says on its input; return what it says."""
    said, _, command = line.rpartition("ptuning ")
    words = shlex.split(command)
    stdin = " ".join(shlex.split(said.rpartition("|")[0])[1:]).encode() + b"\n" if said else b""
    quick = () if "--dry-run" in words else QUICK.get(words[0], ())  # a dry run counts everything
    done = call(*words, *quick, stdin=stdin)
    assert done.code == 0, done.err
    return done.out + done.err


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with the default backbone's tokenizer, so that words are cut as the pages say."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = load_tokenizer()[0]._tokenizer
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Path) -> Path:
    """The folder of somebody who follows a page, whose default backbone is the tiny one."""
    monkeypatch.setattr(sources, "BACKBONE", str(tiny))
    monkeypatch.setattr(ptuning, "load_backbone", lambda _="": load_backbone(str(tiny)), raising=False)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    for name, source in OWN.items():
        shutil.copy(ROOT / "src" / "ptuning" / "data" / "facts" / source, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.usefixtures("reader")
def test_every_command_of_a_page_runs(page: str) -> None:
    """And its Python; what it shows of counts and warnings, which no weights decide, is what the commands say."""
    lines, said = list(commands(page)), ""
    assert len(lines) > 1, f"{page} has no commands"
    for line in lines:
        try:
            said += run(line)
        except AssertionError as error:
            raise AssertionError(f"{page}: {line}\n{error}") from error
    for script in scripts(page):
        exec(compile(script, page, "exec"), {"__name__": "page"})
    shown = [line for line in (ROOT / page).read_text(encoding="utf-8").splitlines() if line.startswith(SHOWN)]
    assert len(shown) == SHOWN_LINES.get(page, 0)
    assert [line for line in shown if line.removesuffix("...") not in said] == []


def test_commands_that_prose_names_exist() -> None:
    named: dict[str, str] = {}
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        named |= dict.fromkeys(re.findall(r"`ptuning ([a-z]+)", prose(page)), page.name)
    assert len(named) > 10
    for command, where in named.items():
        assert call(command, "--help").code == 0, f"{where} names ptuning {command}"


HUGGINGFACE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_the_script_of_the_page_for_transformers(
    model_folder: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = (ROOT / "docs" / "huggingface.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert HUGGINGFACE_MODEL in script
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(script.replace(HUGGINGFACE_MODEL, str(model_folder("llama"))), names)
    assert names["backbone"].model.config == names["model"].config
    assert all(weight.requires_grad for weight in names["model"].parameters()), "it was frozen"
    assert "exact_match" in capsys.readouterr().out
    assert list((tmp_path / "capitals" / "log").glob("**/events.out.tfevents.*"))
    assert (tmp_path / "prompts" / "capitals" / "prompt.json").is_file()
