"""The commands of the README and of the pages that the docs open with run as they stand, on a tiny random model."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ptuning.backbone import sources
from ptuning.backbone.loading import load_tokenizer
from tests.cli.test_app import call, works

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "docs/messages.md", "docs/facts.md", "docs/table.md")
# Commands that train get one epoch: a random model learns nothing in six either.
TRAINING = ("train", "compare", "lama", "paraphrases", "demo", "superglue")
# Files that a page calls the reader's own, and where the reader has them from here.
OWN = {"mine.jsonl": "capitals/train.jsonl", "test.jsonl": "capitals/test.jsonl"}


def commands(page: str) -> Iterator[str]:
    """Yield the command lines of a page's blocks of code; a line that ends with a backslash goes on in the next."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for block in re.findall(r"^```(?:sh|console)?\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            if re.match(r"(?:echo .* \| )?ptuning ", line):
                yield line.partition("   #")[0]


def run(line: str) -> str:
    """Run one command line of a page, with what an ``echo`` in front of it says on its input."""
    said, _, command = line.rpartition("ptuning ")
    words = shlex.split(command)
    stdin = " ".join(shlex.split(said.rpartition("|")[0])[1:]).encode() + b"\n" if said else b""
    quick = ("--set", "epochs=1") if words[0] in TRAINING else ()
    return works(*words, *quick, stdin=stdin)


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
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    for name, source in OWN.items():
        shutil.copy(ROOT / "src" / "ptuning" / "data" / "facts" / source, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.usefixtures("reader")
def test_every_command_of_a_page_runs(page: str) -> None:
    lines = list(commands(page))
    assert len(lines) > 1, f"{page} has no commands"
    for line in lines:
        try:
            run(line)
        except AssertionError as error:
            raise AssertionError(f"{page}: {line}\n{error}") from error


def test_a_command_that_fails_is_seen(reader: Path) -> None:
    assert call("eval", "nothing", "--data", reader / "test.jsonl").code == 2
    with pytest.raises(AssertionError):
        run("ptuning eval nothing --data test.jsonl")
