"""The script of docs/huggingface.md runs as it stands, here with a tiny random model under the name of the real one."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "huggingface.md"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_the_script_trains_streams_logs_and_shares(
    model_folder: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (script,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert MODEL in script
    monkeypatch.chdir(tmp_path)
    found: dict[str, object] = {}
    exec(script.replace(MODEL, str(model_folder("llama"))), found)
    assert found["backbone"].model.config == found["model"].config  # type: ignore[attr-defined]
    assert all(weight.requires_grad for weight in found["model"].parameters()), "it was frozen"  # type: ignore[attr-defined]
    assert "exact_match" in capsys.readouterr().out
    assert list((tmp_path / "capitals" / "log").glob("**/events.out.tfevents.*"))
    assert (tmp_path / "prompts" / "capitals" / "prompt.json").is_file()
