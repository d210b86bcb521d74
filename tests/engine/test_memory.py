"""Counting memory: bytes of tensors once, and peaks of the process."""

from collections.abc import Sequence

import pytest
import torch

from ptuning.backbone.backbone import Backbone
from ptuning.engine.memory import PeakMemory, in_parts, peak_so_far, taken_bytes, tensor_bytes, whole_passes
from ptuning.errors import BackboneError

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


def test_what_does_not_fit_runs_in_halves_and_the_bound_is_remembered(
    causal: Backbone, caplog: pytest.LogCaptureFixture
) -> None:
    """Parts are in the order of the rows; what ran out of memory once is not tried again, and it is said once."""
    tried: list[list[int]] = []

    def run(part: Sequence[int]) -> list[int]:
        tried.append(list(part))
        if len(part) * 10 > 40:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return list(part)

    assert in_parts(run, [10] * 10, backbone=causal) == [[0, 1], [2], [3, 4], [5, 6], [7], [8, 9]]
    # The second half of five is known to be too long, and so are three rows.
    assert [len(part) for part in tried] == [10, 5, 2, 1, 2, 2, 1, 2]
    tried.clear()
    assert [at for part in in_parts(run, [10] * 10, backbone=causal) for at in part] == list(range(10))
    assert max(map(len, tried)) == 2
    assert len(caplog.records) == 2
    assert "cpu has too little memory for a pass of 100 tokens: from now on passes have at most 50" in caplog.text


def test_a_row_that_does_not_fit_alone_is_an_error_that_says_what_to_do(causal: Backbone) -> None:
    def run(part: Sequence[int]) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(BackboneError, match=r"a pass of 7 tokens does not fit into the memory of cpu; use smaller"):
        in_parts(run, [7, 7], backbone=causal)


def test_where_passes_must_stay_whole_nothing_is_halved(causal: Backbone) -> None:
    def run(part: Sequence[int]) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with whole_passes(), pytest.raises(BackboneError, match="a pass of 14 tokens does not fit"):
        in_parts(run, [7, 7], backbone=causal)
