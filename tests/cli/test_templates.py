"""Templates as a shell passes them on, and as it should be told to."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from ptuning.cli.templates import as_shell_text


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
@pytest.mark.parametrize("pattern", [r"user\n[X]\nIt's [Y]", "a\n[X] [Y]", r"50\% of [X] is [Y]"])
def test_bash_reads_a_template_as_it_is_meant(pattern: str) -> None:
    shown = as_shell_text(pattern)
    done = subprocess.run(["bash", "-c", f"printf %s {shown}"], capture_output=True, text=True, check=True)
    assert done.stdout == pattern.replace(r"\n", "\n")
