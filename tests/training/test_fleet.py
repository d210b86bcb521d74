"""Many prompts at once come out as each would alone: other templates, data, settings, lengths; killed and resumed.

The invariants that tests name are those of docs/invariants.md.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.loading import load_backbone
from ptuning.config import TrainConfig
from ptuning.data.reading import load_records
from ptuning.engine import prefix_cache
from ptuning.engine.evaluate import Evaluation
from ptuning.engine.prefix_cache import PrefixCache
from ptuning.errors import ConfigError, FileError, PTuningError, RecordError, TrainingError
from ptuning.names import CHECKPOINT_FILE, CHECKPOINT_FOLDER, FLEET_FILE, PROMPT_FOLDER, RUN_FILE
from ptuning.progress import Interrupted, Progress
from ptuning.prompt.predict import PromptModel
from ptuning.records import Record
from ptuning.training import fleet, step
from ptuning.training import trainer as loop
from ptuning.training.checkpoint import read_checkpoint
from ptuning.training.fleet import FleetResult, train_fleet
from ptuning.training.run import TrainResult, train
from ptuning.training.spec import FleetPrompt
from ptuning.training.step import Learner, Step
from ptuning.training.trainer import Member, Trainer, TrainingLoop
from ptuning.workers.jobs import Job, job_lock
from tests.conftest import bound, items_of, make_model, small_memory
from tests.processes import forked
from tests.training.fleets import EVERY, FACTS, FAST, TEXTS
from tests.workers.fake_ray import use_fake_ray


def alone(prompt: FleetPrompt, backbone: Backbone) -> TrainResult:
    return train(
        prompt.template, prompt.data, backbone=backbone, dev=prompt.dev, config=prompt.config, labels=prompt.labels
    )


def vectors(result: TrainResult) -> torch.Tensor:
    assert result.prompt.slot_vectors is not None
    return result.prompt.slot_vectors


def after(count: int) -> Callable[[], bool]:
    asked = iter(range(1, 1000))
    return lambda: next(asked) >= count


def history(result: TrainResult, name: str) -> list[float]:
    rows: Any = result.record["history"]
    return [row[name] for row in rows]


def starts(result: TrainResult) -> list[dict[str, float]]:
    rows: Any = result.record.get("starts", [])
    return list(rows)


@pytest.mark.parametrize(("family", "at_once"), [("gpt2", 2), ("llama", 16), ("bert", 16), ("roberta", 2)])
def test_each_comes_out_as_if_alone(backbone: Backbone, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant *Fast = slow*: prompts that train together share passes, and nothing else.

    Causal and masked, with and without a constant part, fewer at once than there are.
    Source: docs/decisions.md, decision 28.
    """
    monkeypatch.setattr(prefix_cache, "MIN_PREFIX_TOKENS", 2)
    every_alone = [alone(prompt, backbone) for prompt in EVERY]
    found = train_fleet(EVERY, backbone=backbone, at_once=at_once)
    assert not found.failed
    assert list(found.results) == [prompt.name for prompt in EVERY]
    for one, other in zip(every_alone, found.results.values(), strict=True):
        assert_alike(one, other)
        assert other.record["fleet"] == {"prompts": len(EVERY), "at_once": at_once}
    assert not any(weight.requires_grad or weight.grad is not None for weight in backbone.model.parameters())


def test_one_that_is_lost_starts_anew_among_others(causal: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decision 72: as it does alone, and the others do not notice."""
    real = Trainer.evaluate

    def evaluate(self: Trainer, *args: Any, note: str = "", **named: Any) -> Evaluation:
        if note == "before training" and self.config.seed == 1:
            return Evaluation(0.0, (1.0,))  # nothing is better
        return real(self, *args, note=note, **named)

    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    prompts = [EVERY[0], EVERY[1], EVERY[3]]
    found = train_fleet(prompts, backbone=causal)
    for prompt, result in zip(prompts, found.results.values(), strict=True):
        wanted = alone(prompt, causal)
        assert_alike(wanted, result)
        assert len(cast("list[object]", result.record.get("diverged", []))) == (prompt.settings.seed == 1)
        if prompt.settings.seed == 1:
            assert result.record["diverged"] != wanted.record["history"]


def assert_alike(one: TrainResult, other: TrainResult) -> None:
    """Two trainings went the same way, but for rounding."""
    torch.testing.assert_close(vectors(other), vectors(one), rtol=0, atol=1e-4)
    assert history(other, "train_loss") == pytest.approx(history(one, "train_loss"), abs=1e-4)
    assert history(other, "dev_score") == history(one, "dev_score")
    assert other.record["chosen_epoch"] == one.record["chosen_epoch"]
    for row, wanted in zip(starts(other), starts(one), strict=True):
        assert row == pytest.approx(wanted, abs=1e-4)


def test_rows_of_several_prompts_run_in_one_pass(causal: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """One forward pass for the fleet's rows, and the gradients of each prompt as of its own."""
    sizes: list[int] = []
    real = step._run

    def spy(chunks: Any) -> Any:
        sizes.append(len(chunks))
        return real(chunks)

    monkeypatch.setattr(step, "_run", spy)
    prompts = [FleetPrompt(f"seed-{n}", "[P*2] [X] [P:is] [Y]", FACTS, config=FAST.adapted(seed=n)) for n in range(4)]
    train_fleet(prompts, backbone=causal)
    count = 2 * 3  # steps of each prompt; rows of another length may run in a pass of their own
    assert max(sizes) == 4
    assert count <= len(sizes) < 2 * count


def trainer(backbone: Backbone, template: str, records: list[Record], **settings: Any) -> tuple[Trainer, Any]:
    config = FAST.adapted(**settings)
    return Trainer(backbone, bound(backbone, template), config=config), items_of(backbone, template, records)


def step_of(one: Trainer, items: Any) -> step.Step:
    return step.Step(one.learner, items, number=0, epoch=1, rate=1.0)


def test_gradients_equal_those_alone(backbone: Backbone) -> None:
    """Invariant *Fast = slow*: gradients of prompts that train together are those of each alone, to 1e-5 in float32.

    With other templates, lengths, encoders, and targets of several tokens.
    """
    wanted: list[torch.Tensor] = []
    found: list[torch.Tensor] = []
    for together in (False, True):
        pairs = [
            trainer(backbone, "[P*2] [X] [P:is] [Y]", FACTS[:3]),
            trainer(backbone, "[P] [X] [Y] [P]", FACTS[3:6], seed=2),
            trainer(backbone, "[P] {x} [P*3] [Y]", TEXTS[:3], seed=3, encoder="none"),
        ]
        for one, _ in pairs:
            one.learner.finish = lambda *_: 0.0  # type: ignore[method-assign]  # gradients stay as they are
        for groups in [pairs] if together else [[pair] for pair in pairs]:
            step.take_steps([step_of(*pair) for pair in groups])
        gradients = [
            weight.grad for one, _ in pairs for weight in one.learner.encoder.parameters() if weight.grad is not None
        ]
        (found if together else wanted).extend(gradients)
    assert len(found) == len(wanted) > 3
    for got, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, other, rtol=0, atol=1e-5 * max(1.0, float(other.abs().max())))
    assert sum(float(got.abs().max()) > 0 for got in found) >= 3


def test_encoders_do_not_fill_the_memory(causal: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide ones are trained with fewer others beside them; one always is."""
    most: list[int] = []
    real = step.take_steps

    def spy(groups: Any) -> Any:
        most.append(len(groups))
        return real(groups)

    monkeypatch.setattr(loop, "take_steps", spy)
    weights = trainer(causal, "[P*2] [X] [Y]", FACTS)[0].learner.trainable_parameters
    prompts = [FleetPrompt(f"seed-{n}", "[P*2] [X] [Y]", FACTS, config=FAST.adapted(seed=n)) for n in range(5)]
    for room, expected in ((2.5, 2), (0.5, 1), (99, 5)):
        total = room * weights * loop.BYTES_PER_WEIGHT / loop.STATE_SHARE
        monkeypatch.setattr(loop, "total_bytes", lambda _, total=total: total)
        most.clear()
        assert len(train_fleet(prompts, backbone=causal).results) == 5
        assert max(most) == expected


def test_little_is_padded_and_a_shared_prefix_stays_shared(causal: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short rows do not wait for long ones, and a prompt whose rows begin alike for long runs alone."""
    monkeypatch.setattr(step, "JOINT_TOKENS", {"cpu": 500})
    short = [trainer(causal, "[P] [X] [Y]", FACTS, seed=seed) for seed in range(3)]
    long = [trainer(causal, "[P] {x} [P] [Y]", TEXTS, seed=seed) for seed in range(2)]
    prefix = trainer(causal, "[P*50] [X] [Y]", FACTS)
    groups = [long[0], short[0], prefix, short[1], long[1], short[2]]
    chunks = [chunk for one, items in groups for chunk in step_of(one, items[:2]).chunks()]
    found = [[chunk.learner for chunk in together] for together in step.joined(chunks)]
    assert found == [[prefix[0].learner], [one.learner for one, _ in short], [one.learner for one, _ in long]]


def test_a_shared_prefix_does_not_cost_a_pass_where_launches_cost_more(
    causal: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU runs a few thousand tokens in the time that the launches of a pass take."""
    groups = [trainer(causal, "[P*50] [X] [Y]", FACTS, seed=seed) for seed in range(3)]
    chunks = [chunk for one, items in groups for chunk in step_of(one, items[:2]).chunks()]
    saved = chunks[0].saved_tokens
    assert saved > 50
    assert [len(together) for together in step.joined(chunks)] == [1, 1, 1]
    for most, expected in ((saved, [1, 1, 1]), (saved + 1, [3])):
        monkeypatch.setattr(step, "ALONE_TOKENS", {"cpu": most})
        assert [len(together) for together in step.joined(chunks)] == expected


def test_one_prompts_bad_loss_does_not_end_the_others(causal: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Learner.finish

    def finish(self: Learner, step: Step, losses: Sequence[torch.Tensor]) -> float:
        return real(
            self, step, [one * float("nan") for one in losses] if (self.config.seed, step.number) == (7, 2) else losses
        )

    monkeypatch.setattr(Learner, "finish", finish)
    prompts = [FleetPrompt(f"seed-{n}", "[P*2] [X] [Y]", FACTS, config=FAST.adapted(seed=n)) for n in (0, 7, 1)]
    told: dict[str, object] = {}
    found = train_fleet(prompts, backbone=causal, on_prompt=told.__setitem__)
    assert list(found.results) == ["seed-0", "seed-1"]
    assert "learning rate" in found.failed["seed-7"]
    assert isinstance(told["seed-7"], TrainingError)
    listed: Any = found.record["prompts"]
    assert [row["status"] for row in listed] == ["done", "failed", "done"]


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Every prompt's vectors and card, byte by byte."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.glob(f"*/{PROMPT_FOLDER}/*.safetensors"))
    }


def test_callbacks_get_the_numbers_of_every_prompt(causal: Backbone) -> None:
    """Under its name, and beside them the progress of the whole fleet."""
    seen: list[Progress] = []
    found = train_fleet(EVERY[:2], backbone=causal, report=seen.append)
    for name, result in found.results.items():
        own = [one for one in seen if one.name == name and one.numbers]
        steps = [one.numbers["step"] for one in own if one.stage == "train"]
        assert steps == list(range(1, len(steps) + 1))
        assert [one.numbers["train_loss"] for one in own if one.stage == "epoch" and one.done] == history(
            result, "train_loss"
        )
    done = [one.done for one in seen if one.stage == "train"]
    assert done == sorted(done)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_that_are_off_outside(mode: Callable[[], Any], causal: Backbone) -> None:
    """As in a single training; and what calls a fleet has its own mode between two prompts."""
    seen: list[bool] = []
    with mode():
        found = train_fleet(EVERY[:2], backbone=causal)
        seen.append(torch.is_grad_enabled())
    assert seen == [False]
    for one in EVERY[:2]:
        torch.testing.assert_close(vectors(found.results[one.name]), vectors(alone(one, causal)), rtol=0, atol=1e-4)


def test_a_backbone_loaded_under_inference_mode_trains_as_any_other(causal: Backbone, tmp_path: Path) -> None:
    make_model("llama", tmp_path)
    with torch.inference_mode():
        backbone = load_backbone(str(tmp_path), dtype="float32", device="cpu")
        PromptModel(backbone).predict(FACTS[:2], alone(EVERY[3], causal).prompt)
    for one in (EVERY[0], replace(EVERY[0], config=FAST.adapted(train_backbone="full"))):
        assert torch.equal(vectors(alone(one, backbone)), vectors(alone(one, causal)))


def test_a_fleet_whose_passes_do_not_fit_is_trained_in_smaller_ones(
    causal: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Joint passes shrink, too; the result is the same up to rounding."""
    prompts = [replace(one, config=one.settings.adapted(cache_memory=0.0)) for one in (EVERY[0], EVERY[3], EVERY[4])]
    wanted = train_fleet(prompts, backbone=causal)
    ran = small_memory(monkeypatch, 30)
    found = train_fleet(prompts, backbone=causal)
    assert found.failed == {}
    assert max(ran) <= 30
    for name, one in wanted.results.items():
        torch.testing.assert_close(vectors(found.results[name]), vectors(one), rtol=0, atol=1e-4)


def test_a_prompt_whose_record_does_not_fit_fails_alone(causal: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [replace(one, config=one.settings.adapted(cache_memory=0.0)) for one in EVERY[:2]]
    monkeypatch.setattr(prefix_cache, "MIN_PREFIX_TOKENS", 1000)
    small_memory(monkeypatch, 20)
    found = train_fleet([replace(prompts[1], dev=FACTS), prompts[0]], backbone=causal)
    assert list(found.results) == ["plain"]
    assert "does not fit into the memory of cpu" in found.failed["late"]


Whole = Callable[[float], tuple[list[FleetPrompt], Path, FleetResult]]


@pytest.fixture(scope="module")
def undisturbed(loaded: Callable[[str], Backbone], tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """The prompts with a pause between checkpoints, and the folder and result of their fleet; made once each."""

    @cache
    def get(pause: float) -> tuple[list[FleetPrompt], Path, FleetResult]:
        prompts = [replace(one, config=one.settings.adapted(checkpoint_seconds=pause)) for one in EVERY]
        out = tmp_path_factory.mktemp("fleet") / "whole"
        return prompts, out, train_fleet(prompts, backbone=loaded("llama"), out=out, at_once=3)

    return get


@pytest.mark.parametrize("stop", [1, 8, 11])
def test_a_stopped_fleet_goes_on_exactly(
    stop: int, causal: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Whole
) -> None:
    """Invariant *Resume is exact*, in the middle of a fleet: equal bytes, and prompts end and begin in between."""
    monkeypatch.setattr(prefix_cache, "MIN_PREFIX_TOKENS", 2)
    prompts, out, whole = undisturbed(0.0 if stop % 2 else 60.0)
    with pytest.raises(Interrupted, match="prompts done"):
        train_fleet(prompts, backbone=causal, out=tmp_path / "parts", at_once=3, should_stop=after(stop))
    parts = train_fleet(prompts, backbone=causal, out=tmp_path / "parts", at_once=3, resume=True)
    assert bytes_of(tmp_path / "parts") == bytes_of(out) != {}
    assert list(parts.results) == list(whole.results)
    for name in whole.results:
        assert history(parts.results[name], "train_loss") == history(whole.results[name], "train_loss")


def test_a_fleet_stops_between_passes_that_fill_the_prefix_cache(
    causal: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompt that was about to begin is no failure, and the others go on from where they stood."""
    monkeypatch.setattr(prefix_cache, "MIN_PREFIX_TOKENS", 2)
    train_fleet(EVERY, backbone=causal, out=tmp_path / "whole", at_once=3)
    seen: list[str] = []

    def watch(progress: Progress) -> None:
        seen.append(progress.note)

    def stops() -> bool:  # the fourth, which begins when one of the first three has ended
        return bool(seen) and seen[-1].startswith("free: text in front of the slots, 0.")

    with pytest.raises(Interrupted, match=r"stopped with 1 of 8 prompts done and 3 in training"):
        train_fleet(EVERY, backbone=causal, out=tmp_path / "parts", at_once=3, report=watch, should_stop=stops)
    parts = train_fleet(EVERY, backbone=causal, out=tmp_path / "parts", at_once=3, resume=True)
    assert bytes_of(tmp_path / "parts") == bytes_of(tmp_path / "whole") != {}
    assert not parts.failed


def test_a_large_fleet_is_cut_and_its_parts_leave_the_same_bytes(
    causal: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which prompts train together decides rounding, so it follows from the prompts, and not from who trains them."""
    monkeypatch.setattr(fleet, "JOB_PROMPTS", 3)
    units = fleet.fleet_jobs(EVERY, at_once=3)
    assert [unit.folders for unit in units] == [("plain", "late", "labels"), ("free", "parts"), ("starts", "dev")]
    train_fleet(EVERY, backbone=causal, out=tmp_path / "whole", at_once=3)
    for part in ("3/3", "1/3", "2/3"):
        found = train_fleet(EVERY, backbone=causal, out=tmp_path / "parts", at_once=3, part=part)
        assert list(found.results) == list(units[int(part[0]) - 1].folders)
        assert not (tmp_path / "parts" / FLEET_FILE).exists()
    with pytest.raises(FileError, match="resume"):
        train_fleet(EVERY, backbone=causal, out=tmp_path / "parts", at_once=3, part="1/3")
    with pytest.raises(ConfigError, match="only 3 jobs to share"):
        train_fleet(EVERY, backbone=causal, out=tmp_path / "parts", at_once=3, part="1/4")
    collected = train_fleet(EVERY, backbone=causal, out=tmp_path / "parts", at_once=3, resume=True)
    assert list(collected.results) == [prompt.name for prompt in EVERY]
    assert bytes_of(tmp_path / "parts") == bytes_of(tmp_path / "whole") != {}
    assert not list((tmp_path / "parts").glob("checkpoint*"))


def test_workers_leave_the_same_prompts(causal: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "JOB_PROMPTS", 3)
    whole = train_fleet(EVERY, backbone=causal, out=tmp_path / "whole", at_once=3)
    use_fake_ray(monkeypatch, causal, fleet_2=1)
    seen: list[str] = []
    options: dict[str, Any] = {"workers": 2, "on_prompt": lambda name, _: seen.append(name)}
    found = train_fleet(EVERY, backbone=causal, out=tmp_path / "workers", at_once=3, **options)
    assert sorted(seen) == sorted(whole.results)
    assert list(found.results) == list(whole.results)
    assert {result.record["worker"]["engine"] for result in found.results.values()} == {"fake"}  # type: ignore[call-overload,index]
    assert bytes_of(tmp_path / "workers") == bytes_of(tmp_path / "whole") != {}
    with pytest.raises(FileError, match="resume"):
        train_fleet(EVERY, backbone=causal, out=tmp_path / "workers", at_once=3, workers=2)
    with pytest.raises(ConfigError, match="workers need a folder"):
        train_fleet(EVERY, backbone=causal, workers=2)
    other = [replace(EVERY[0], config=EVERY[0].settings.adapted(lr=0.02))]
    changed = train_fleet(other, backbone=causal, out=tmp_path / "workers", workers=2, overwrite=True)
    assert not torch.equal(vectors(changed.results["plain"]), vectors(whole.results["plain"]))


def test_two_processes_do_not_train_the_same_prompts(causal: Backbone, tmp_path: Path) -> None:
    other, busy = Job("other", ("plain",)), pytest.raises(TrainingError, match="another process trains prompts in")
    with job_lock(tmp_path, other, lambda: None), busy:
        train_fleet(EVERY[:1], backbone=causal, out=tmp_path, part="1/1")
    assert list(train_fleet(EVERY[:1], backbone=causal, out=tmp_path, part="1/1").results) == ["plain"]


def test_overwriting_a_stopped_fleet_begins_anew(causal: Backbone, tmp_path: Path) -> None:
    """Nothing of its checkpoint is gone on from, whatever the settings."""
    with pytest.raises(Interrupted):
        train_fleet(EVERY[:1], backbone=causal, out=tmp_path, should_stop=after(2))
    other = [replace(EVERY[0], config=EVERY[0].settings.adapted(lr=0.02))]
    found = train_fleet(other, backbone=causal, out=tmp_path, overwrite=True)
    torch.testing.assert_close(vectors(found.results["plain"]), vectors(alone(other[0], causal)), rtol=0, atol=0)


def test_a_fleet_that_cannot_start_replaces_nothing(causal: Backbone, tmp_path: Path) -> None:
    train_fleet(EVERY[:1], backbone=causal, out=tmp_path)
    before = bytes_of(tmp_path)
    for wrong in (
        replace(EVERY[1], template="no target"),
        replace(EVERY[1], config=TrainConfig(train_backbone="full")),
    ):
        with pytest.raises(PTuningError, match=f"prompt '{wrong.name}'"):
            train_fleet([EVERY[0], wrong], backbone=causal, out=tmp_path, overwrite=True)
    assert bytes_of(tmp_path) == before != {}


def test_a_killed_fleet_goes_on_exactly(tmp_path: Path) -> None:
    """kill -9 at two moments in a row: prompts that were written after the last checkpoint come out the same."""
    make_model("llama", tmp_path / "model")
    script = tmp_path / "fleet.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
        "from pathlib import Path\n"
        "from dataclasses import replace\n"
        "from ptuning.backbone.loading import load_backbone\n"
        "from ptuning.training.fleet import train_fleet\n"
        "from tests.training.fleets import EVERY\n"
        "from ptuning.training import trainer\n"
        "trainer.SAVING_PAUSE = 0.0\n"
        f"backbone = load_backbone({str(tmp_path / 'model')!r}, dtype='float32', device='cpu')\n"
        "prompts = [replace(one, config=one.settings.adapted(checkpoint_seconds=0.0, epochs=2)) for one in EVERY]\n"
        "train_fleet(prompts, backbone=backbone, out=Path(sys.argv[1]), at_once=3, resume=True)\n"
    )

    def here(out: str) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [str(script), str(tmp_path / out)])
            patch.setattr(sys, "path", list(sys.path))
            patch.setattr(loop, "SAVING_PAUSE", 0.0)  # the script sets it, too
            exec(script.read_text(), {})

    here("whole")
    state = tmp_path / "killed" / CHECKPOINT_FOLDER / CHECKPOINT_FILE
    for moment in range(2):
        seen = {state.stat().st_mtime_ns if state.exists() else 0}
        with forked(script.read_text(), tmp_path / "killed", folder=tmp_path / "said") as process:
            while len(seen) <= 4 + 3 * moment:
                process.wait_until(lambda: state.exists() and state.stat().st_mtime_ns not in seen)  # noqa: B023 - now
                seen.add(state.stat().st_mtime_ns)
            process.kill()
    here("killed")
    assert bytes_of(tmp_path / "killed") == bytes_of(tmp_path / "whole") != {}


def test_what_is_left(causal: Backbone, tmp_path: Path) -> None:
    """A folder for each prompt as `ptuning train` leaves it, a table of all, and no checkpoint's tensors."""
    found = train_fleet(EVERY[:2], backbone=causal, out=tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [FLEET_FILE, "late", "plain"]
    saved = json.loads((tmp_path / "out" / FLEET_FILE).read_text())
    assert saved == found.record
    assert [row["name"] for row in saved["prompts"]] == ["plain", "late"]
    assert json.loads((tmp_path / "out" / "plain" / RUN_FILE).read_text())["fleet"]["prompts"] == 2
    again = train_fleet(EVERY[:2], backbone=causal, out=tmp_path / "out", resume=True)
    assert torch.equal(vectors(again.results["plain"]), vectors(found.results["plain"]))
    more = train_fleet(EVERY[:4], backbone=causal, out=tmp_path / "out", resume=True)
    assert len(more.results) == 4
    with pytest.raises(PTuningError, match="not empty"):
        train_fleet(EVERY[:2], backbone=causal, out=tmp_path / "out")
    other = [replace(EVERY[0], config=FAST.adapted(lr=0.02)), EVERY[1]]
    with pytest.raises(TrainingError, match=r"prompt 'plain'.*lr was 0.01"):
        train_fleet(other, backbone=causal, out=tmp_path / "out", resume=True)
    anew = train_fleet(other, backbone=causal, out=tmp_path / "out", overwrite=True)
    assert not torch.equal(vectors(anew.results["plain"]), vectors(found.results["plain"]))


def test_errors_name_the_prompt_and_write_nothing(causal: Backbone, tmp_path: Path) -> None:
    good = EVERY[0]
    for bad, error, what in (
        (replace(good, name="bad", data=[{"x": "a", "y": ""}]), RecordError, "prompt 'bad'"),
        (replace(good, name="bad", template="[P] {z} [Y]"), PTuningError, "prompt 'bad'.*'z'"),
        (replace(good, name="a/b"), ConfigError, "'a/b' is not a name"),
        (good, ConfigError, "two prompts of the fleet are named 'plain'"),
        (
            replace(good, name="bad", config=FAST.adapted(train_backbone="full")),
            ConfigError,
            "'bad': train_backbone is full",
        ),
    ):
        with pytest.raises(error, match=what):
            train_fleet([good, bad], backbone=causal, out=tmp_path / "out")
        assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="no prompts"):
        train_fleet([], backbone=causal)
    with pytest.raises(ConfigError, match="1 or more"):
        train_fleet([good], backbone=causal, at_once=0)


def test_what_ended_prompts_had_in_front_of_their_slots_is_dropped(
    causal: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hundreds of prompts must not fill the memory with texts that nobody reads any more."""
    monkeypatch.setattr(prefix_cache, "MIN_PREFIX_TOKENS", 2)
    kept: list[int] = []
    real = PrefixCache.keep_only

    def spy(self: PrefixCache, examples: Any) -> None:
        real(self, examples)
        kept.append(self.tokens)

    monkeypatch.setattr(PrefixCache, "keep_only", spy)
    texts = [[{"x": f"{word} {row['x']}", "y": row["y"]} for row in TEXTS] for word in ("First", "Then", "Last")]
    prompts = [
        FleetPrompt(f"late-{n}", "{x} [P:It was] [Y]", rows, config=FAST.adapted(epochs=1 + n))
        for n, rows in enumerate(texts)
    ]
    train_fleet(prompts, backbone=causal)
    assert len(kept) == 2
    assert kept[0] > kept[1] > 0


def test_shipped_facts_of_two_kinds(causal: Backbone) -> None:
    """As a user would: two tasks of the shipped facts over one backbone."""
    few = FAST.adapted(epochs=1)
    prompts = [
        FleetPrompt(name, "[P:The] [X] [P:is] [Y]", load_records(f"{name}:train")[:20], config=few)
        for name in ("capitals", "continents")
    ]
    found: FleetResult = train_fleet(prompts, backbone=causal)
    assert list(found.results) == ["capitals", "continents"]


def test_a_trained_prompt_is_released_once_it_is_written(causal: Backbone, tmp_path: Path) -> None:
    """A prompt whose result was not written is trained to its end again, and not lost."""
    items = items_of(causal, "[P] [X] [Y]", FACTS)
    member = Member("one", lambda: trainer(causal, "[P] [X] [Y]", FACTS)[0], items, items[:3], FAST.epochs)

    def new_loop() -> TrainingLoop:
        cache, resumed = PrefixCache(causal, memory_share=0.0), read_checkpoint(tmp_path)
        return TrainingLoop([member], prefix_cache=cache, at_once=2, checkpoint=tmp_path, resumed=resumed)

    for release in (False, True):
        last = new_loop()
        for name, _ in last.run():
            assert name == "one"
            if release:
                last.release(name)
        last.save()
    assert list(new_loop().run()) == []


def test_a_setting_of_all_prompts_acts_on_one_of_them(causal: Backbone) -> None:
    config = TrainConfig(epochs=1, deep_lr=0.1)
    frozen, deep = (
        FleetPrompt(name, template, FACTS, config=config, common=frozenset({"deep_lr"}))
        for name, template in (("plain", "[P] [X] [Y]"), ("deep", "[D] [X] [Y]"))
    )
    assert len(train_fleet([frozen, deep], backbone=causal).results) == 2
    with pytest.raises(ConfigError, match="deep_lr"):
        train_fleet([frozen], backbone=causal)
