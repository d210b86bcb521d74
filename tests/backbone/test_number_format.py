"""The number format of ``auto``, and the warning of a slow one."""

from __future__ import annotations

import logging

import pytest
import torch

from ptuning.backbone.number_format import automatic, has_units, warn_if_slow

CPU = torch.device("cpu")


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A processor with units for bfloat16."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    return monkeypatch


@pytest.mark.parametrize("units", [{}, {"avx512_bf16": True}, {"amx_bf16": True}])
def test_a_processor_takes_float32_whatever_its_units(processor: pytest.MonkeyPatch, units: dict[str, bool]) -> None:
    """Scores in bfloat16 were not shown to be the same (decision 9), so results do not depend on the processor."""
    processor.setattr(torch.cpu, "get_capabilities", lambda: units)
    assert automatic(CPU).dtype == torch.float32


@pytest.mark.usefixtures("processor")
def test_a_processor_with_units_says_how_to_use_them() -> None:
    assert "--dtype bfloat16" in automatic(CPU).reason


def test_a_processor_without_units_says_so(processor: pytest.MonkeyPatch) -> None:
    processor.setattr(torch.cpu, "get_capabilities", dict)
    assert automatic(CPU) == (torch.float32, "the processor has no units for bfloat16")


def test_a_format_without_units_warns_with_the_figure(
    processor: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        warn_if_slow(torch.bfloat16, CPU)
        warn_if_slow(torch.float32, CPU)
        assert not caplog.records
        processor.setattr(torch.cpu, "get_capabilities", dict)
        assert not has_units()
        warn_if_slow(torch.bfloat16, CPU)
    assert "5 to 40 times as long as in float32" in caplog.text
