"""Counting memory: bytes of tensors once, the most that were alive, and peaks of the process."""

from __future__ import annotations

import torch

from ptuning.training.memory import LiveTensors, PeakMemory, peak_so_far, tensor_bytes

CPU = torch.device("cpu")


def test_shared_bytes_are_counted_once() -> None:
    one = torch.zeros(10, 4)
    assert tensor_bytes([one, one[2:], one.view(-1), torch.zeros(3)]) == 4 * (40 + 3)


def test_the_most_that_was_alive_at_a_time() -> None:
    weight = torch.ones(100, 100, requires_grad=True)
    with LiveTensors() as live:
        first = weight * 2.0  # 40 kB; the gradient will have as many
        second = first.reshape(-1).exp()
        assert live.now == 80_000
        second.sum().backward()
        del first, second
        assert live.now == 40_000  # the gradient
    assert 120_000 <= live.peak <= 200_000


def test_the_peak_of_the_process_is_seen() -> None:
    before = peak_so_far(CPU)
    with PeakMemory(CPU) as watched:
        found = torch.ones(50_000_000)
    size = found.nbytes
    assert watched.bytes >= size
    assert watched.bytes <= peak_so_far(CPU) + 2**20
    assert peak_so_far(CPU) >= before
