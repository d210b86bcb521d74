"""What do weights in fewer bits save, and what does a prompt that is trained on them score?

Each format loads the same weights; a prompt is trained on whole bfloat16 weights and on int8 ones, and answers the
reported facts on what it was trained on.
"""

from __future__ import annotations

import time
from importlib.util import find_spec

from benchmarks.common import Json, Settings, answer, no_answer, parser, settings_of, write_result
from benchmarks.material import backbone_of
from ptuning.backbone.backbone import Backbone
from ptuning.backbone.loading import load_backbone
from ptuning.backbone.weights import stored_tensors
from ptuning.config import TrainConfig
from ptuning.data.reading import load_records
from ptuning.engine.memory import tensor_bytes
from ptuning.prompt.predict import PromptModel
from ptuning.training.run import train

TEMPLATE = "[P:The capital of] [X] [P:is] [Y]"
EPOCHS, SEEDS = 4, 3
WHOLE, HALF, INT8 = "float32", "bfloat16", "int8"
METHOD = (
    f"Bytes of the tensors that are loaded. Scores: {TEMPLATE}, {EPOCHS} epochs on the shipped capitals, {SEEDS} "
    "seeds; share of the reported facts that greedy decoding answers right. The entry is the distance of the means "
    "over seeds, in points; each format is used with the prompts that were trained on it."
)


def main(settings: Settings) -> None:
    """Measure memory and scores."""
    began = time.monotonic()
    formats = {WHOLE: (WHOLE, None), HALF: (HALF, None), INT8: (HALF, INT8)}
    cells: list[dict[str, Json]] = []
    memory: dict[str, int] = {}
    scores: dict[str, list[float]] = {}
    if find_spec("torchao") is None:
        del formats[INT8]
    for name, (dtype, quantize) in formats.items():
        backbone = loaded(settings, dtype=dtype, quantize=quantize)
        memory[name] = tensor_bytes(stored_tensors(backbone.model))
        if name != WHOLE:
            scores[name] = [score(backbone, settings, seed=seed) for seed in range(settings.pick(SEEDS, 1))]
        cells.append({"cell": name, "contestant": "ptuning", "bytes": memory[name], "scores": scores.get(name)})
    missing = no_answer("torchao is not installed: pip install 'ptuning[quantized]'")
    answers = {"int8-memory": missing, "int8-score": missing}
    if INT8 in memory:
        means = {name: sum(values) / len(values) for name, values in scores.items()}
        answers = {
            "int8-memory": answer([memory[INT8] / memory[WHOLE]], settings.backbone_name),
            "int8-score": answer(
                [100 * abs(means[INT8] - means[HALF])], f"{means[INT8]:.3f}, and {means[HALF]:.3f} in bfloat16"
            ),
        }
    write_result(
        settings,
        "formats",
        question=(__doc__ or "").splitlines()[0],
        cells=cells,
        answers=answers,
        method=METHOD,
        seconds=time.monotonic() - began,
    )


def loaded(settings: Settings, *, dtype: str, quantize: str | None) -> Backbone:
    """Load the backbone of the settings in a format."""
    name = backbone_of(settings).name if settings.smoke else settings.backbone  # the tiny one is written first
    return load_backbone(name, dtype=dtype, device=settings.device, quantize=quantize)


def score(backbone: Backbone, settings: Settings, *, seed: int) -> float:
    """Train a prompt, and return the share of the reported facts that it answers right."""
    parts = {name: load_records(f"capitals:{name}") for name in ("train", "dev", "test")}
    config = TrainConfig.from_json({"epochs": settings.pick(EPOCHS, 1), "seed": seed, "patience": 99})
    found = train(TEMPLATE, parts["train"], dev=parts["dev"], backbone=backbone, config=config)
    answers = PromptModel(backbone).predict(parts["test"], found.prompt)
    return sum(one.text == row["y"] for one, row in zip(answers, parts["test"], strict=True)) / len(answers)


if __name__ == "__main__":
    main(settings_of(parser(__doc__).parse_args()))
