"""Where does the time of a training step go?

The steps are those of ptuning's own Trainer, under torch's profiler; its stages are marked from the outside.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.common import Json, Settings, parser, say, settings_of, write_result
from benchmarks.material import (
    FACTS_TEMPLATE,
    StepClock,
    backbone_of,
    bind,
    every,
    items_of,
    mean_tokens,
    repeated,
    synchronised,
    train_seconds,
)
from ptuning.backbone.backbone import Backbone
from ptuning.config import TrainConfig
from ptuning.engine import forward as forward_module
from ptuning.training import encoders as encoder
from ptuning.training import step as steps
from ptuning.training.trainer import Trainer

MARK = "stage: "
# In the order of a step; the body runs inside of "backbone", and what else happens there is the head.
COLLATE, EMBED, ENCODER, RUN, BODY, LOSS, BACKWARD, OPTIMIZER = (
    "collate", "embed and inject", "encoder", "backbone", "body forward", "loss", "backward", "optimizer",
)  # fmt: skip
HEAD, OTHER = "head and loss", "Python and other"
OPERATIONS = 8
METHOD = (
    "Steps of ptuning's Trainer on short facts under torch.profiler, after warm-up steps without it. Stages are "
    "marked around the functions that do them; what is left of the wall time of the steps is 'Python and other'. The "
    "share of operations is of their own processor time. Seconds without the profiler stand beside, to show what it "
    "costs."
)


def main(settings: Settings) -> None:
    """Profile steps in batches of 16 and of 64."""
    began = time.monotonic()
    backbone = backbone_of(settings)
    cells: list[dict[str, Json]] = []
    for batch_size in settings.pick((16, 64), (4,)):
        cells += profiled(backbone, batch_size, settings.pick(64 // batch_size, 2))
    write_result(
        settings,
        "stages",
        question=(__doc__ or "").splitlines()[0],
        cells=cells,
        answers={},
        method=METHOD,
        seconds=time.monotonic() - began,
    )


def profiled(backbone: Backbone, batch_size: int, steps: int) -> list[dict[str, Json]]:
    """Return one row per stage and one per operation."""
    bound = bind(backbone, FACTS_TEMPLATE)
    items = repeated(items_of(bound, every("capitals")), batch_size * steps)
    train_seconds(backbone, bound, items[: 2 * batch_size], batch_size=batch_size)
    plain = train_seconds(backbone, bound, items, batch_size=batch_size)
    clock = StepClock(backbone.device)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if backbone.device.type == "cuda" else [])
    with profile(activities=activities) as found, marked(backbone):
        Trainer(backbone, bound, config=TrainConfig(epochs=1, batch_size=batch_size)).fit(
            items, items[:1], report=clock
        )
    averages: Any = found.key_averages()
    marks = {
        event.key.removeprefix(MARK): event.cpu_time_total / 1e6 for event in averages if event.key.startswith(MARK)
    }
    marks |= dict.fromkeys({COLLATE, EMBED, ENCODER, RUN, BODY, LOSS, BACKWARD, OPTIMIZER} - marks.keys(), 0.0)
    stages = {name: marks[name] for name in (COLLATE, EMBED, ENCODER, BODY)}
    stages[HEAD] = marks[RUN] - marks[BODY] + marks[LOSS]
    stages |= {name: marks[name] for name in (BACKWARD, OPTIMIZER)}
    stages[OTHER] = clock.seconds - sum(stages.values())
    shared: dict[str, Json] = {"batch_size": batch_size, "tokens_per_row": mean_tokens(items), "contestant": "ptuning"}
    rows: list[dict[str, Json]] = [
        {
            **shared,
            "cell": "stage",
            "stage": name,
            "seconds_per_step": seconds / steps,
            "share": seconds / clock.seconds,
            "step_seconds_without_profiler": plain / steps,
        }
        for name, seconds in stages.items()
    ]
    named = ", ".join(f"{name} {seconds / clock.seconds:.0%}" for name, seconds in stages.items())
    say(f"  batch of {batch_size}, {plain / steps:.3f} s a step: {named}")
    own = [event for event in averages if not event.key.startswith((MARK, "ProfilerStep"))]
    total = sum(event.self_cpu_time_total for event in own) or 1
    largest = sorted(own, key=lambda event: -event.self_cpu_time_total)[:OPERATIONS]
    return rows + [
        {
            **shared,
            "cell": "operation",
            "operation": event.key,
            "calls_per_step": event.count / steps,
            "share": event.self_cpu_time_total / total,
        }
        for event in largest
    ]


@contextmanager
def marked(backbone: Backbone) -> Iterator[None]:
    """Mark the stages of a step: of all that runs with gradients meanwhile, which development passes do not."""

    def mark(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def run(*values: Any, **named: Any) -> Any:
            if not torch.is_grad_enabled():
                return function(*values, **named)
            with record_function(MARK + name):
                result = function(*values, **named)
                synchronised(backbone.device)
            return result

        return run

    body = backbone.model.base_model
    with ExitStack() as stack:
        for owner, attribute, name in (
            (forward_module, "collate", COLLATE),
            (forward_module, "embed_inputs", EMBED),
            (backbone, "embed", EMBED),
            (encoder.PromptEncoder, "forward", ENCODER),
            (backbone, "run", RUN),
            (body, "forward", BODY),
            (steps, "score_continuations", LOSS),
            (steps, "loss", LOSS),
            (torch.Tensor, "backward", BACKWARD),
            (torch.optim.AdamW, "step", OPTIMIZER),
            (torch.nn.utils, "clip_grad_norm_", OPTIMIZER),
            (torch.optim.AdamW, "zero_grad", OPTIMIZER),
        ):
            stack.enter_context(patch.object(owner, attribute, mark(getattr(owner, attribute), name)))
        yield


if __name__ == "__main__":
    main(settings_of(parser(__doc__).parse_args()))
