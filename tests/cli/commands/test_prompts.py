"""`ptuning eval` and `inspect`: scores, errors and nearest tokens, on the terminal, in JSON and in a file."""

import csv
import io
import json
import shutil
from pathlib import Path

import pytest

from ptuning.prompt.prompt import Prompt
from tests.cli.calls import FACTS, WARM, call, fails, lines_of, works, write_lines

LABELS = {"positive": ["great", "good"], "negative": ["terrible"], "none": ["25"]}
ROWS = [("a good film", "positive"), ("a bad one, all in all", "negative"), ("great", "positive"), ("terrible", "none")]
ALIASES = ("positive=good", "negative=bad", "none=bad")
MANUAL = "manual:{message} It was [Y]"


@pytest.fixture(autouse=True)
def _files(tmp_path: Path) -> None:
    Prompt.manual("{message} It was [Y]", label_words=LABELS).save(tmp_path / "moods")
    Path("mail.csv").write_text("message;y\n" + "".join(f"{x};{y}\n" for x, y in ROWS), encoding="utf-8")


def test_eval_prints_a_table_or_json(run_folder: Path, data: Path) -> None:
    args = ("eval", run_folder, "--data", data / "dev.jsonl")
    printed = works(*args)
    assert f"{run_folder} on {data}/dev.jsonl, n = 4\n" in printed
    assert "exact match" in printed
    found = json.loads(works(*args, "--json"))
    assert set(found) == {"prompt", "data", "scores", "loss", "targets_not_among_candidates"}
    (exact,) = found["scores"].values()
    assert 0 <= exact["low"] <= exact["value"] <= exact["high"] <= 1
    assert (exact["n"], found["data"]["rows"]) == (4, 4)


def test_eval_among_candidates_of_every_kind(run_folder: Path, data: Path) -> None:
    Path("some.txt").write_text("\ufeffNairobi\n\n Paris \nParis\n", encoding="utf-8")  # as editors leave it
    write_lines("all.jsonl", [{"y": y} for _, y in FACTS])
    args = ("eval", run_folder, "--data", data / "train.jsonl", "--candidates")
    some, every, train = (json.loads(works(*args, name, "--json")) for name in ("some.txt", "all.jsonl", "train"))
    assert some["targets_not_among_candidates"] == len(FACTS) - 2
    assert list(some["scores"]) == ["exact_match", "accuracy", "mrr"]
    assert every["targets_not_among_candidates"] == 0
    assert list(every["scores"]) == ["exact_match", "accuracy", "mrr", "p_at_10"]
    assert train == every  # the training data of the run has all of the answers
    mean = json.loads(works(*args, "all.jsonl", "--json", "--normalise", "mean"))
    assert mean["scores"]["mrr"] != every["scores"]["mrr"]
    assert f"{len(FACTS) - 2} of {len(FACTS)} targets" in works(*args, "some.txt")


def test_labels_and_the_worst_errors(llama: str) -> None:
    args = ("eval", "moods", "--data", "mail.csv", "--backbone", llama)
    found = json.loads(works(*args, "--json"))
    answers = works("predict", "moods", "--data", "mail.csv", "--backbone", llama).splitlines()
    pairs = list(zip([y for _, y in ROWS], answers, strict=True))
    assert list(found["labels"]) == list(LABELS)
    assert found["confusion"] == [[pairs.count((own, other)) for other in LABELS] for own in LABELS]
    wrong = [at for at, (target, answer) in enumerate(pairs) if target != answer]
    assert sorted(error["place"] for error in found["errors"]) == [f"mail.csv, line {at + 2}" for at in wrong]
    assert {"record", "target", "prediction", "hit", "probabilities"} <= set(found["errors"][0])
    assert len(json.loads(works(*args, "--json", "--errors", "1"))["errors"]) == 1
    printed = works(*args)
    for text in ("precision", "confusion", f"{len(wrong)} worst of {len(wrong)} errors"):
        assert text in printed
    assert "errors" not in works(*args, "--errors", "0")


def test_labels_of_a_manual_prompt(llama: str) -> None:
    args = ("eval", MANUAL, "--data", "mail.csv", "--backbone", llama, "--json")
    found = json.loads(works(*args, "--labels", "good;bad", *(f"--alias-label={pair}" for pair in ALIASES)))
    assert ([*found["scores"]], list(found["labels"])) == (["accuracy"], ["good", "bad"])
    plain = call(*args)
    assert [*json.loads(plain.out)["scores"]] == ["exact_match"]
    fails(*args, "--labels", "auto", says=["3 different targets"])
    fails(*args, "--labels", "negative;none;positive", "--candidates", "mail.csv", says=["label words"])


def test_the_answers_in_a_file(llama: str) -> None:
    args = ("eval", "moods", "--data", "mail.csv", "--backbone", llama)
    works(*args, "--out", "scored.jsonl")
    rows = lines_of(Path("scored.jsonl"))
    assert [row["record"] for row in rows] == [{"message": x, "y": y} for x, y in ROWS]
    for row in rows:
        assert row["hit"] == (row["target"] == row["prediction"])
        assert max(row["probabilities"], key=row["probabilities"].get) == row["prediction"]
    fails(*args, "--out", "scored.jsonl", says=["scored.jsonl exists"])
    works(*args, "--out", "scored.csv")
    table = list(csv.DictReader(io.StringIO(Path("scored.csv").read_text(encoding="utf-8"))))
    assert list(table[0]) == ["message", "y", "prediction", "probability", "hit"]
    assert [row["prediction"] for row in table] == [row["prediction"] for row in rows]
    Path("some.txt").write_text("positive\nnegative\n", encoding="utf-8")
    args = ("eval", MANUAL, "--data", "mail.csv", "--backbone", llama)
    works(*args, "--candidates", "some.txt", "--out", "ranked.jsonl")
    ranked = lines_of(Path("ranked.jsonl"))
    assert {row["prediction"] for row in ranked} <= {"positive", "negative"}
    assert ranked[3]["rank"] == 0
    assert "log-prob" in works(*args, "--errors", "2")


def test_metrics_of_generated_texts(llama: str) -> None:
    """With their signature, for people and for programs; rows say why texts ended."""
    pairs = [("a", "a film"), ("b", "a city"), ("a", "a movie")]
    write_lines("rows.jsonl", [{"x": x, "y": y} for x, y in pairs])
    args = ("eval", "manual:{x} is [Y]", "--data", "rows.jsonl", "--backbone", llama)
    how = ("--metrics", "BLEU,exact,last-number", "--group-references")
    done = call(*args, *how, "--json", "--out", "scored.jsonl")
    found = json.loads(done.out)
    assert "3 records have 2 different inputs" in done.err
    assert {name: score["n"] for name, score in found["scores"].items()} == {"bleu": 2, "exact": 2, "last-number": 2}
    assert "tok:13a" in found["signatures"]["bleu"]
    rows = lines_of(Path("scored.jsonl"))
    assert {"record", "target", "prediction", "hit", "log_prob", "stopped", "tokens"} == set(rows[0])
    assert rows[0]["target"] == ["a film", "a movie"]
    beams = ("--max-new-tokens", "4", "--num-beams", "2")
    works("predict", *args[1:], "--out", "texts.jsonl", *beams)
    works(*args, "--metrics", "bleu", *beams, "--out", "beams.jsonl")
    texts = [[row["prediction"] for row in lines_of(Path(name))] for name in ("beams.jsonl", "texts.jsonl")]
    assert texts[0] == texts[1]


def test_references_in_the_field_that_a_prompt_remembers(llama: str) -> None:
    Prompt.manual("{x} is [Y]").save(Path("prompt"))
    manifest = json.loads(Path("prompt/prompt.json").read_text(encoding="utf-8"))
    Path("prompt/prompt.json").write_text(json.dumps({**manifest, "fields": {"y": "summary"}}), encoding="utf-8")
    write_lines("own.jsonl", [{"x": "a", "summary": ["b", "c"]}, {"x": "d", "summary": "e"}])
    args = ("--data", "own.jsonl", "--backbone", llama)
    works("eval", "prompt", *args, "--metrics", "exact", "--out", "scored.jsonl")
    assert [row["target"] for row in lines_of(Path("scored.jsonl"))] == [["b", "c"], "e"]


def test_bad_input_of_eval(llama: str) -> None:
    write_lines("new.jsonl", [{"message": "Kenya"}])
    Path("other.csv").write_text("msg;y\na;positive\n", encoding="utf-8")
    for prompt, data, more, says in (
        (MANUAL, "mail.csv", ("--metrics", "blue"), ["'blue'", "'bleu'"]),
        (MANUAL, "mail.csv", ("--metrics", "bleu", "--candidates", "mail.csv"), ["--metrics", "--candidates"]),
        (MANUAL, "new.jsonl", ("--metrics", "bleu"), ["new.jsonl, line 1"]),
        ("moods", "other.csv", (), ["other.csv, line 2", "'message'", "message=msg"]),
        ("moods", "mail.csv", ("--group-references",), ["--group-references"]),
        ("moods", "mail.csv", ("--normalise", "max"), ["'max'"]),
    ):
        fails("eval", prompt, "--data", data, "--backbone", llama, *more, says=says)


def test_inspect_shows_the_nearest_tokens(run_folder: Path, data: Path) -> None:
    found = json.loads(works("inspect", run_folder, "--json"))
    assert set(found) == {"template", "backbone", "slots", "typical", "scores"}
    assert (found["template"], found["scores"]) == (WARM, {})
    assert [slot["start"] for slot in found["slots"]] == ["The", " capital", " of", " is"]
    for slot in found["slots"]:  # two epochs move no slot far from the token it started at
        assert slot["nearest_by_cosine"][0]["token"] == slot["nearest_by_distance"][0]["token"] == slot["start"]
    scored = json.loads(works("inspect", run_folder, "--data", data / "dev.jsonl", "--json"))
    assert set(scored["scores"]) == {"as learned", "nearest tokens"}
    printed = works("inspect", run_folder)
    assert "--data FILE" in printed
    assert "' capital'" in printed
    assert "score of the slots as learned" in works("inspect", run_folder, "--data", data / "dev.jsonl")


def test_inspect_shows_deep_slots(llama: str, data: Path) -> None:
    args = ("train", "--data", data / "dev.jsonl", "--template", "[D:The capital] [D] [X] is [Y]", "--epochs", "1")
    works(*args, "--backbone", llama, "--out", "deep")
    printed = works("inspect", "deep")
    assert "deep slot" in printed
    assert "' capital'" in printed


@pytest.mark.parametrize("command", [("eval", "--data", "capitals:dev"), ("inspect",)])
def test_a_prompt_that_does_not_fit(command: tuple[str, ...], run_folder: Path, llama: str, other_llama: str) -> None:
    name, *more = command
    fails(name, run_folder, *more, "--backbone", other_llama, says=[llama, other_llama, "force"])
    works(name, run_folder, *more, "--backbone", other_llama, "--force")
    shutil.copytree(run_folder, "out")
    vectors = Path("out/prompt/prompt.safetensors")
    vectors.write_bytes(vectors.read_bytes()[:-10])
    fails(name, "out", *more, "--backbone", llama, "--force", says=["prompt.safetensors"])
