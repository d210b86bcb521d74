"""Counting memory: bytes of tensors once, and peaks of the process."""

from __future__ import annotations

import torch

from ptuning.training.memory import PeakMemory, peak_so_far, taken_bytes, tensor_bytes

CPU = torch.device("cpu")


def test_shared_bytes_are_counted_once() -> None:
    one = torch.zeros(10, 4)
    assert tensor_bytes([one, one[2:], one.view(-1), torch.zeros(3)]) == 4 * (40 + 3)


def test_the_peak_of_the_process_is_seen() -> None:
    before = peak_so_far(CPU)
    with PeakMemory(CPU) as watched:
        found = torch.ones(50_000_000)
    size = found.nbytes
    assert taken_bytes(CPU) >= size
    assert watched.bytes >= size
    assert watched.bytes <= peak_so_far(CPU) + 2**20
    assert peak_so_far(CPU) >= before
