"""Templates as a shell passes them on, and as it should be told to."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from ptuning.cli.templates import as_shell_text
from ptuning.data.rules import arithmetic
from tests.cli.test_app import call


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
@pytest.mark.parametrize("pattern", [r"user\n[X]\nIt's [Y]", "a\n[X] [Y]", r"50\% of [X] is [Y]"])
def test_bash_reads_a_template_as_it_is_meant(pattern: str) -> None:
    shown = as_shell_text(pattern)
    done = subprocess.run(["bash", "-c", f"printf %s {shown}"], capture_output=True, text=True, check=True)
    assert done.stdout == pattern.replace(r"\n", "\n")


def test_data_by_rule_has_a_template_of_its_own(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--data arithmetic:train` needs no template; one that is given goes first, and other data needs one."""
    monkeypatch.setattr(arithmetic, "MOST", {"train": 4, "dev": 2, "test": 3})
    args = ("--test", "arithmetic:dev", "--methods", "majority", "--out", "out", "--dry-run", "--backbone", llama)
    told = 'manual template: "{input}, step by step: [Y]" (--manual for another)'
    for words in (("compare", "--data", "arithmetic:train", *args), ("estimate", "--data", "arithmetic:train")):
        assert told in call(*words, "--backbone", llama).err
    assert told not in call("compare", "--data", "arithmetic:train", "--manual", "{input} = [Y]", *args).err
    assert "give the manual template" in call("compare", "--data", "capitals:train", *args).err
    assert "give either --template" in call("train", "--data", "capitals:train", "--out", "out").err
