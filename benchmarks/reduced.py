"""How many bytes does a step of data parallelism send around?

Nothing is timed: a step is taken as one of two processes, and what it hands to the all-reduce is counted.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

from torch import Tensor

from benchmarks.common import Json, Settings, answer, parser, settings_of, write_result
from benchmarks.material import FACTS_TEMPLATE, backbone_of, bind, every, items_of, repeated
from ptuning.config import TrainConfig
from ptuning.engine.processes import DataRanks
from ptuning.training.step import Step, take_steps
from ptuning.training.trainer import Trainer

BATCH = 16
METHOD = (
    f"One step of a batch of {BATCH} facts with {FACTS_TEMPLATE}, as the first of two processes; the bytes of the "
    "tensors that it hands to the all-reduce, and how often it does. The weights of the encoder are what would be sent "
    "if its gradients were added up instead of those of the slots."
)


def main(settings: Settings) -> None:
    """Count for each encoder."""
    began = time.monotonic()
    backbone = backbone_of(replace(settings, dtype="float32"))
    bound = bind(backbone, FACTS_TEMPLATE)
    items = repeated(items_of(bound, every("capitals")), BATCH)
    cells: list[dict[str, Json]] = []
    for encoder in ("lstm", "mlp", "none"):
        config = TrainConfig.from_json({"encoder": encoder, "batch_size": BATCH})
        trainer = Trainer(backbone, bound, config=config)
        trainer.learner.ranks = DataRanks(0, 2)
        with sent() as tensors:
            (outcome,) = take_steps([Step(trainer.learner, items, number=0, epoch=1, rate=1.0)])
        if isinstance(outcome, Exception):
            raise outcome
        cells.append(
            {
                "cell": encoder,
                "contestant": "ptuning",
                "calls": len(tensors),
                "bytes": sum(tensors),
                "bytes_of_the_encoder": sum(4 * one.numel() for one in trainer.learner.encoder.parameters()),
            }
        )
    write_result(
        settings,
        "reduced",
        question=(__doc__ or "").splitlines()[0],
        cells=cells,
        answers={"reduced-bytes": answer([float(str(cells[0]["bytes"]))], settings.backbone_name)},
        method=METHOD,
        seconds=time.monotonic() - began,
    )


@contextmanager
def sent() -> Iterator[Sequence[int]]:
    """Yield the bytes of each tensor that is added up over the processes in this block; there are no others."""
    found: list[int] = []

    def reduce(tensor: Tensor, **_: object) -> None:
        found.append(tensor.nbytes)

    with mock.patch("torch.distributed.all_reduce", reduce):
        yield found


if __name__ == "__main__":
    main(settings_of(parser(__doc__).parse_args()))
