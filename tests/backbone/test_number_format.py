"""The number format of ``auto``: what loses nothing, and is faster where it runs."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import LlamaConfig, PretrainedConfig

from ptuning.backbone import number_format
from ptuning.backbone.number_format import automatic, has_units, speed_up, warn_if_slow

CPU = torch.device("cpu")


def config(stored: torch.dtype | None = torch.bfloat16) -> PretrainedConfig:
    return LlamaConfig(hidden_size=32, dtype=stored)


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A processor with units for bfloat16 in which it is fast."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    monkeypatch.setattr(number_format, "speed_up", lambda _: 2.0)
    return monkeypatch


@pytest.mark.usefixtures("processor")
def test_a_processor_that_is_faster_in_it_takes_bfloat16_and_says_so() -> None:
    assert automatic(CPU, config()) == (torch.bfloat16, "bfloat16 is 2.0 times as fast here")


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, None])
def test_weights_that_bfloat16_would_round_stay_float32(stored: torch.dtype | None) -> None:
    found = automatic(CPU, config(stored))
    assert found.dtype == torch.float32
    assert "round" in found.reason


def test_units_alone_do_not_decide(processor: pytest.MonkeyPatch) -> None:
    processor.setattr(number_format, "speed_up", lambda _: 1.1)
    found = automatic(CPU, config())
    assert found == (torch.float32, "bfloat16 is 1.1 times as fast here, too little to pay")


def test_without_units_nothing_is_measured(processor: pytest.MonkeyPatch) -> None:
    """So the choice on such a machine is the same every time."""
    processor.setattr(torch.cpu, "get_capabilities", dict)
    processor.setattr(number_format, "speed_up", lambda _: pytest.fail("measured"))
    assert automatic(CPU, config()) == (torch.float32, "the processor has no units for bfloat16")


def test_the_check_times_both_formats_at_the_width_of_the_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[torch.dtype, tuple[int, ...]]] = []

    def seconds(rows: torch.Tensor, weight: torch.Tensor) -> float:
        seen.append((rows.dtype, tuple(weight.shape)))
        return {torch.float32: 3.0, torch.bfloat16: 2.0}[rows.dtype]

    monkeypatch.setattr(number_format, "_seconds", seconds)
    assert speed_up(config()) == 1.5
    assert {shape for _, shape in seen} == {(32, 128)}
    assert {dtype for dtype, _ in seen} == {torch.float32, torch.bfloat16}


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
