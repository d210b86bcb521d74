"""The demo: learn country -> capital, and compare with the manual prompt and the majority answer."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

from ptuning.backbone.backbone import Backbone
from ptuning.config import TrainConfig
from ptuning.data.reading import load_records
from ptuning.errors import FileError
from ptuning.files import Json, read_json, read_json_lines, validate, write_json, write_json_lines
from ptuning.metrics import EXACT_MATCH
from ptuning.names import CHECKPOINT_FOLDER, PREDICTIONS_FILE, PROMPT_FOLDER, RUN, RUN_FILE, VECTORS_FILE
from ptuning.progress import Interrupted, OnProgress
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prompt import Prompt
from ptuning.prompt.score import score_prompt
from ptuning.provenance import described
from ptuning.records import Records
from ptuning.statistics import Score, majority, score
from ptuning.template.language import Template
from ptuning.training.prepare import prepare
from ptuning.training.run import TrainingRun, TrainResult
from ptuning.training.spec import TrainSpec

logger = logging.getLogger(__name__)

FACTS = "capitals"
MANUAL = "The capital of [X] is [Y]"
SHOWN_RECORDS = 5


class Answers(NamedTuple):
    """A test record with the answers of the manual prompt (``before``) and of the learned one (``after``)."""

    subject: str
    target: str
    before: str
    after: str


@dataclass(frozen=True)
class DemoResult:
    """The result of the demo, as it is shown: exact match on the test part by method, how each method asks
    (``described``), the content of ``run.json`` (``record``), and the size of the slot vectors on disk.
    """

    prompt: Prompt
    record: Mapping[str, Json]
    scores: Mapping[str, Score]
    described: Mapping[str, str]
    answers: Sequence[Answers]
    folder: Path
    size_bytes: int


def run_demo(
    out: Path,
    *,
    backbone: Backbone,
    config: TrainConfig | None = None,
    overwrite: bool = False,
    report: OnProgress | None = None,
    should_stop: Callable[[], bool] | None = None,
    command: str | None = None,
) -> DemoResult:
    """Train on the training part, choose on the development part, score the test part once, and leave the files.

    A stopped demo is resumed (``should_stop`` raises Interrupted), and a finished one is read back. Instead,
    ``overwrite`` replaces any run in ``out``. A FileError if ``out`` holds files of another run; a TrainingError if it
    holds another run, or a demo with other settings.
    """
    is_run = any((out / name).exists() for name in (RUN_FILE, CHECKPOINT_FOLDER))
    if not overwrite and not is_run and any((out / name).exists() for name in (*RUN.files, *RUN.folders)):
        raise FileError(f"{out} holds part of another run; choose another folder (out), or overwrite it (overwrite)")
    parts = {split: load_records(f"{FACTS}:{split}") for split in ("train", "dev", "test")}
    spec = TrainSpec(Template.from_manual(MANUAL), parts["train"], parts["dev"], config)
    # With resume, overwrite only allows for other files in the folder.
    run = TrainingRun(prepare(spec, backbone), out=out, resume=not overwrite, overwrite=True, command=command)
    result = run.train(report=report, should_stop=should_stop)
    if "scores" in result.record:
        logger.warning("%s holds this demo already; run it again with overwrite", out)
        return load_demo(out)
    if should_stop is not None and should_stop():
        raise Interrupted("stopped after training, before the test part was scored")
    return _score_test(out, result, parts, PromptModel(backbone), report)


def _score_test(
    out: Path, result: TrainResult, parts: Mapping[str, Records], model: PromptModel, report: OnProgress | None
) -> DemoResult:
    test, prompt, manual = parts["test"], result.prompt, Prompt.manual(MANUAL)
    common = majority([row["y"] for row in parts["train"]])
    before = score_prompt(model, test, manual, report=report)
    after = score_prompt(model, test, prompt, report=report)
    scores = {
        "majority": score([float(row["y"] == common) for row in test]),
        "manual": before.scores[EXACT_MATCH],
        "p-tuning": after.scores[EXACT_MATCH],
    }
    # The manual prompt does not learn where to stop, so its answers end at the length of the longest training target.
    written = model.predict(test, manual, generation={"max_new_tokens": prompt.target_tokens})
    learned = model.predict(test, prompt)
    rows: list[dict[str, Json]] = [
        {
            "record": dict(row),
            "target": row["y"],
            "prediction": new.text,
            "hit": bool(new_hit),
            "log_prob": new.log_prob,
            "manual": {"prediction": old.text, "hit": bool(old_hit), "log_prob": old.log_prob},
        }
        for row, old, old_hit, new, new_hit in zip(test, written, before.hits, learned, after.hits, strict=True)
    ]
    data = {**cast("dict[str, Json]", result.record["data"]), "test": described(test, kept=len(test), dropped=0)}
    tested = {name: {EXACT_MATCH: exact.to_json()} for name, exact in scores.items()}
    write_json_lines(out / PREDICTIONS_FILE, rows)
    write_json(out / RUN_FILE, {**result.record, "data": data, "scores": tested})
    return load_demo(out)


def load_demo(out: Path) -> DemoResult:
    """Read a finished demo from its files; a FileError if there is none in ``out``."""
    record = read_json(out / RUN_FILE)
    if record.get("scores") is None:
        raise FileError(f"the demo in {out} is not finished; run it with: ptuning demo --out {out}")
    listed = validate(dict[str, dict[str, Score]], record["scores"], f"{out / RUN_FILE} is damaged")
    scores = {name: by_metric[EXACT_MATCH] for name, by_metric in listed.items()}
    rows: list[Any] = list(read_json_lines(out / PREDICTIONS_FILE)[:SHOWN_RECORDS])
    answers = [
        Answers(row["record"]["x"], row["target"], row["manual"]["prediction"], row["prediction"]) for row in rows
    ]
    prompt = Prompt.load(out / PROMPT_FOLDER)
    common = majority([row["y"] for row in load_records(f"{FACTS}:train")])
    ways = {"majority": f"always '{common}'", "manual": MANUAL, "p-tuning": str(prompt.template)}
    size = (out / PROMPT_FOLDER / VECTORS_FILE).stat().st_size
    return DemoResult(prompt, record, scores, ways, answers, out, size)
