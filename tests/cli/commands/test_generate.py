"""`ptuning generate`: a line for each record, kept while they are written; nothing is overwritten unasked."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ptuning.backbone.backbone import Backbone
from ptuning.config import GenerationSettings
from ptuning.data.questions import Questions, as_questions
from ptuning.data.reading import load_records
from ptuning.engine import objective
from ptuning.files import Json
from ptuning.prompt import score, score_generation
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prompt import Prompt
from tests.cli.test_app import call, fails, works, write_lines

PROMPT = "manual:{x} is [Y]"
ROWS: list[dict[str, object]] = [
    {"x": word, "y": ["a film", "a movie"] if at % 2 else "a city"}
    for at, word in enumerate(("Kenya", "France and Peru", "the movie", "Lima", "a good film", "yes", "25"))
]


@pytest.fixture(autouse=True)
def _data(tmp_path: Path, llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score, "WRITTEN_ROWS", 2)
    write_lines(tmp_path / "rows.jsonl", ROWS)


def rows_of(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def test_records_need_no_target_and_shipped_data_is_read(llama: str) -> None:
    write_lines(Path("new.jsonl"), [{"x": "Kenya"}])
    works("predict", PROMPT, "--data", "new.jsonl", "--out", "new-texts.jsonl", "--backbone", llama)
    assert rows_of("new-texts.jsonl")[0]["target"] is None
    drawn = ("--do-sample", "--top-p", "0.5", "--seed", "1", "--backbone", llama)
    works("predict", "manual:[X] [Y]", "--data", "capitals:dev", "--out", "a.jsonl", *drawn)
    assert rows_of("a.jsonl")[0]["target"] == load_records("capitals:dev")[0]["y"]


def test_references_in_the_field_that_a_prompt_remembers_are_kept(llama: str, tmp_path: Path) -> None:
    """Found where a file had them under another name than y, and no --field was typed again."""
    replace(Prompt.manual("{x} is [Y]"), fields={"y": "summary"}).save(tmp_path / "prompt")
    write_lines(Path("own.jsonl"), [{"x": "a", "summary": ["b", "c"]}, {"x": "d", "summary": "e"}])
    works("predict", "prompt", "--data", "own.jsonl", "--backbone", llama, "--out", "own-texts.jsonl")
    assert [row["target"] for row in rows_of("own-texts.jsonl")] == [["b", "c"], "e"]
    args = ("eval", "prompt", "--data", "own.jsonl", "--backbone", llama, "--metrics", "exact", "--out", "scored.jsonl")
    works(*args)
    assert [row["target"] for row in rows_of("scored.jsonl")] == [["b", "c"], "e"]


def test_a_run_that_was_killed_goes_on_behind_the_finished_lines(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed without a word in the middle of a line: what is whole is kept, and the file is as without the kill."""
    args = ("predict", PROMPT, "--data", "rows.jsonl", "--backbone", llama, "--max-new-tokens", "5")
    works(*args, "--out", "whole.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        real, calls = PromptModel.predict, 0

        def dies(self: PromptModel, *given: Any, **more: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 3:
                raise ZeroDivisionError  # as good as a kill: nothing catches it
            return real(self, *given, **more)

        patch.setattr(PromptModel, "predict", dies)
        with pytest.raises(ZeroDivisionError):
            call(*args, "--out", "texts.jsonl")
    assert not Path("texts.jsonl").exists()
    assert len(Path("texts.jsonl.part").read_text(encoding="utf-8").splitlines()) == 1 + 4
    with Path("texts.jsonl.part").open("a", encoding="utf-8") as handle:
        handle.write('{"record": {"x": "the mo')
    fails(*args, "--out", "texts.jsonl", says=["texts.jsonl.part has lines of a run that was stopped", "--resume"])
    done = call(*args, "--out", "texts.jsonl", "--resume")
    assert "4 of 7 texts are there already" in done.err
    assert Path("texts.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
    assert "finished already" in call(*args, "--out", "texts.jsonl", "--resume").err
    Path("fewer.jsonl").write_text(Path("rows.jsonl").read_text(encoding="utf-8").split("\n", 1)[1], encoding="utf-8")
    fewer = [one if one != "rows.jsonl" else "fewer.jsonl" for one in args]
    fails(*fewer, "--out", "texts.jsonl", "--resume", says=["its records are not those of fewer.jsonl"])


def test_what_is_cut_is_said_wherever_a_prompt_is_used(llama: str, caplog: pytest.LogCaptureFixture) -> None:
    write_lines(Path("long.jsonl"), [{"x": "the movie was great and " * 20, "y": "good"}, {"x": "a", "y": "good"}])
    args = ("--data", "long.jsonl", "--backbone", llama)
    works("predict", "manual:{x} is cut [Y]", *args, "--out", "cut.jsonl", "--max-new-tokens", "5")
    assert "longer than the 64 tokens of a row allow beside an answer of 5" in caplog.text
    for more in ((), ("--labels", "good=good;bad=bad"), ("--metrics", "exact")):
        caplog.clear()
        objective._warn_truncated.cache_clear()
        works("eval", "manual:{x} is cut [Y]", *args, *more)
        assert "1 of 2 rows of long.jsonl are longer than 64 tokens" in caplog.text


def test_a_run_is_not_gone_on_with_as_another_one(llama: str) -> None:
    Path("texts.jsonl.part").write_text('{"lines of": {"num_beams": 4}}\n', encoding="utf-8")
    args = ("predict", PROMPT, "--data", "rows.jsonl", "--out", "texts.jsonl", "--backbone", llama)
    fails(*args, "--resume", says=["cannot resume from texts.jsonl.part", "num_beams was 4 and is 1"])
    for damaged in ("", "x\n", '{"a": 1}\n', '{"lines of": {}}\nx\n'):
        Path("texts.jsonl.part").write_text(damaged, encoding="utf-8")
        fails(*args, "--resume", says=["texts.jsonl.part is damaged; start anew with --overwrite"])
    works(*args, "--overwrite")
    assert len(rows_of("texts.jsonl")) == len(ROWS)


def test_ctrl_c_keeps_what_is_written_and_says_how_to_go_on(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = PromptModel.predict

    def interrupted(self: PromptModel, *given: Any, **more: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return real(self, *given, **more)

    args = ("predict", PROMPT, "--data", "rows.jsonl", "--out", "texts.jsonl", "--backbone", llama)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PromptModel, "predict", interrupted)
        done = call(*args)
    assert done.code == 130
    assert "stopped after 2 of 7 texts; texts.jsonl.part is kept, go on with:" in done.err
    assert "--resume" in done.err
    works(*args, "--resume")
    assert len(rows_of("texts.jsonl")) == len(ROWS)


def test_eval_scores_what_is_written(llama: str) -> None:
    """With its signature, for people and for programs; rows say why texts ended."""
    args = ("eval", PROMPT, "--data", "rows.jsonl", "--backbone", llama, "--metrics", "BLEU,exact,last-number")
    found = json.loads(works(*args, "--json", "--out", "scored.jsonl"))
    assert set(found["scores"]) == {"bleu", "exact", "last-number"}
    assert all(set(one) == {"value", "low", "high", "n"} and one["n"] == 7 for one in found["scores"].values())
    assert "tok:13a" in found["signatures"]["bleu"]
    rows = rows_of("scored.jsonl")
    assert {"record", "target", "prediction", "hit", "log_prob", "stopped", "tokens"} == set(rows[0])
    assert "nrefs:var" in works(*args)
    how = ("--max-new-tokens", "4", "--num-beams", "2")
    works("predict", PROMPT, "--data", "rows.jsonl", "--backbone", llama, "--out", "texts.jsonl", *how)
    works(*args, *how, "--out", "beams.jsonl")
    assert [row["prediction"] for row in rows_of("beams.jsonl")] == [row["predicted"] for row in rows_of("texts.jsonl")]


def test_records_that_differ_in_their_target_alone_are_gathered(llama: str) -> None:
    write_lines(Path("pairs.jsonl"), [{"x": "a", "y": "1"}, {"x": "b", "y": "2"}, {"x": "a", "y": "3"}])
    args = ("--data", "pairs.jsonl", "--backbone", llama, "--group-references")
    done = call("predict", PROMPT, *args, "--out", "texts.jsonl")
    assert "3 records have 2 different inputs" in done.err
    assert [row["target"] for row in rows_of("texts.jsonl")] == [["1", "3"], "2"]
    assert json.loads(works("eval", PROMPT, *args, "--metrics", "exact", "--json"))["scores"]["exact"]["n"] == 2


TASK = """
name = "places"
version = "1"
label = "ref"
gather = true
metrics = ["exact", "last-number"]
[[patterns]]
manual = "{x} is [Y]"
"""


def test_a_task_of_texts_is_learned_written_and_scored_by_its_metrics(llama: str) -> None:
    """With all references of an input where texts are scored, and with each on its own where they are learned."""
    Path("places.toml").write_text(TASK, encoding="utf-8")
    rows = [{"x": f"Kenya {at % 3}", "ref": word} for at, word in enumerate(("a film", "a city", "25", "a movie"))]
    write_lines(Path("places.jsonl"), rows)
    data = ("--task", "places.toml", "--data", "places.jsonl", "--backbone", llama)
    told = works("train", *data, "--dev", "places.jsonl", "--out", "run", "--epochs", "1")
    assert "epoch   train loss   dev loss   dev score   dev exact" in told  # what chooses is shown
    run = json.loads(Path("run/run.json").read_text(encoding="utf-8"))
    assert run["settings"]["metric_for_best_model"] == "exact"
    assert "dev_exact" in run["history"][0]
    assert [run["data"][part]["kept"] for part in ("train", "dev")] == [4, 3]
    works("train", *data, "--out", "aside", "--epochs", "1", "--seed", "1")
    aside = json.loads(Path("aside/run.json").read_text(encoding="utf-8"))["data"]
    assert (aside["train"]["kept"], aside["dev"]["kept"]) in ((3, 1), (2, 1))
    found = json.loads(works("eval", "run", "--data", "places.jsonl", "--backbone", llama, "--json"))
    assert {name: one["n"] for name, one in found["scores"].items()} == {"exact": 3, "last-number": 3}
    works("predict", "run", "--data", "places.jsonl", "--out", "texts.jsonl", "--backbone", llama)
    assert rows_of("texts.jsonl")[0]["target"] == ["a film", "a movie"]
    other = json.loads(works("eval", PROMPT, *data[2:], "--field", "y=ref", "--json"))
    assert list(other["scores"]) == ["exact_match"]


def test_bad_input_of_metrics(llama: str) -> None:
    args = ("eval", PROMPT, "--data", "rows.jsonl", "--backbone", llama)
    fails(*args, "--metrics", "blue", says=["unknown metric 'blue'. Did you mean 'bleu'? Known: bleu, bleu-lc, chrf"])
    fails(*args, "--metrics", "coverage", says=["no field holds them; fields: x"])
    fails(*args, "--num-beams", "2", says=["--num-beams is for texts that --metrics scores"])
    fails(*args, "--metrics", "bleu", "--candidates", "rows.jsonl", says=["leave one out"])
    write_lines(Path("new.jsonl"), [{"x": "Kenya"}])
    fails("eval", PROMPT, "--data", "new.jsonl", "--metrics", "bleu", says=["no target"])


def _loaded(llama: str) -> Any:
    from ptuning.backbone.loading import load_backbone

    return load_backbone(llama)


def test_the_settings_and_the_model_are_part_of_what_a_run_is(llama: str, model_folder: Callable[[str], Path]) -> None:
    from ptuning.backbone.loading import load_backbone

    prompt, rows, loaded = Prompt.manual("{x} [Y]"), as_questions([{"x": "a"}]), _loaded(llama)

    def of(backbone: Backbone, rows: Questions = rows, **settings: int) -> dict[str, Json]:
        return score_generation.generation_identity(prompt, rows, GenerationSettings(**settings), backbone)  # type: ignore[arg-type]

    first = of(loaded)
    assert first == of(_loaded(llama))
    json.dumps(first)
    others = [load_backbone(llama, **more) for more in ({"dtype": "bfloat16"}, {"max_length": 40})]
    others.append(load_backbone(model_folder("gpt2")))
    for other in (of(loaded, num_beams=2), of(loaded, as_questions([{"x": "b"}])), *map(of, others)):
        assert other != first


def test_what_deep_slots_learned_is_part_of_what_a_run_is(llama: str) -> None:
    rows = as_questions([{"x": "a"}])
    prompts = [Prompt.from_token_ids("[D*2] [X] is [Y]", ids, _loaded(llama)) for ids in ([5, 6], [5, 7], [5, 6])]
    one, other, same = (
        score_generation.generation_identity(prompt, rows, GenerationSettings(), _loaded(llama)) for prompt in prompts
    )
    assert one == same != other
