"""Scores of a prompt: what they count, that they are those of a slow loop, and that nothing is chosen by them."""

import logging
import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import pytest

import ptuning.engine.evaluate
import ptuning.engine.objective
from ptuning.backbone.backbone import Backbone
from ptuning.data.questions import Question, Questions
from ptuning.data.task_files import TaskFile, load_task
from ptuning.engine.evaluate import Evaluation, evaluate
from ptuning.engine.forward import target_logits
from ptuning.engine.objective import ScoringRequest, target_requests
from ptuning.errors import ConfigError, RecordError, TemplateError
from ptuning.metrics import Confusion
from ptuning.prompt import score as answer_module
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prediction import Candidate
from ptuning.prompt.prompt import Prompt
from ptuning.prompt.score import Result, of_any_reference, prediction_rows, score_prompt
from ptuning.records import Record, Records, as_records
from ptuning.statistics import Score
from ptuning.template.encode import Example, TokenizedTemplate
from ptuning.template.labels import LabelWords, Normalise
from tests.conftest import RECORDS, bound, learned
from tests.families import built, without_words

TEMPLATE = "[P*2] [X] is [P] [Y]"
CANDIDATES = ["yes", "no", "Nairobi", "São Tomé", "25", "great"]


def test_exact_match_is_what_greedy_decoding_would_write(backbone: Backbone) -> None:
    """Invariants *Loss position = scored position* and *Fast = slow* (docs/invariants.md): as in a plain loop.

    Hit by hit against the argmax of each target's logits, and the loss per token.
    """
    model, template = PromptModel(backbone), "[P*2] [X] is [P][Y]"
    hits: list[float] = []
    for seed in range(20):  # until a random prompt's likeliest token is one that a text can have there
        prompt = learned(backbone, template, seed=seed)
        likeliest = backbone.tokenizer.decode([int(model.target_logits(RECORDS[:1], prompt)[0][0].argmax())])
        rows: list[Record] = [*RECORDS, *([{**RECORDS[0], "y": likeliest}] if likeliest.strip() else [])]
        logits, examples = model.target_logits(rows, prompt), bound(backbone, template).examples(rows)
        guesses = [tuple(one.argmax(dim=-1).tolist()) for one in logits]
        hits = [float(guess == example.target_ids) for guess, example in zip(guesses, examples, strict=True)]
        if any(hits):
            break
    assert 0 < sum(hits) < len(hits)
    loss, count = 0.0, 0
    for one, example in zip(logits, examples, strict=True):
        loss -= sum(float(one.log_softmax(-1)[at, token]) for at, token in enumerate(example.target_ids))
        count += len(example.target_ids)
    found = score_prompt(model, as_records(rows), prompt)
    assert list(found.hits) == hits
    assert math.isclose(found.loss, loss / count, rel_tol=1e-4)
    assert found.scores["exact_match"].value == sum(hits) / len(hits)
    assert found.scores["exact_match"].n == len(rows)
    assert set(found.scores) == {"exact_match"}


def test_candidates_are_ranked(backbone: Backbone) -> None:
    """Accuracy, MRR and P@10 among a closed set; a target outside of it is a miss and is counted.

    Such scores depend on the set, so targets that it lacks are never left out unsaid.
    """
    model, prompt = PromptModel(backbone), learned(backbone, TEMPLATE)
    data = as_records([*RECORDS[:3], {"x": "Kenya", "y": "nowhere"}])
    found = score_prompt(model, data, prompt, candidates=CANDIDATES)
    ranked = model.rank(data, prompt, CANDIDATES)
    places = []
    for record, row in zip(data, ranked, strict=True):
        texts = [candidate.text for candidate in row]
        places.append(texts.index(record["y"]) + 1 if record["y"] in texts else None)
    assert found.missing == 1
    assert found.scores["accuracy"].value == sum(place == 1 for place in places) / 4
    assert found.scores["mrr"].value == pytest.approx(sum(1 / place for place in places if place) / 4)
    assert "p_at_10" not in found.scores
    many = [*CANDIDATES, *(f"city {index}" for index in range(20))]
    wide = score_prompt(model, data, prompt, candidates=many)
    assert wide.scores["accuracy"].value <= wide.scores["p_at_10"].value <= 0.75


@pytest.mark.parametrize("asked", [None, "sum", "mean"])
def test_the_score_is_that_of_the_answers_given(causal: Backbone, asked: Normalise | None) -> None:
    """Candidates are scored by one rule, the prompt's unless another is asked for: by ``rank``, ``predict``, scores."""
    model, candidates = PromptModel(causal), ["a good film and a bad one", "yes", "São Tomé", "25"]
    prompt = replace(learned(causal, TEMPLATE), normalise="mean")
    ranked = model.rank(RECORDS, prompt, candidates, normalise="mean" if asked is None else asked)
    answers = model.predict(RECORDS, prompt, candidates, normalise=asked, top_k=4)
    assert [list(one.candidates) for one in answers] == ranked
    assert model.rank(RECORDS, [prompt] * len(RECORDS), candidates, normalise=asked) == ranked
    seconds = [{**record, "y": one.candidates[1].text} for record, one in zip(RECORDS, answers, strict=True)]
    found = score_prompt(model, as_records(seconds), prompt, candidates=candidates, normalise=asked)
    assert found.scores["mrr"].value == 1 / 2
    other = model.rank(RECORDS, prompt, candidates, normalise="sum" if asked != "sum" else "mean")
    assert [[one.text for one in row] for row in other] != [[one.text for one in row] for row in ranked]


def test_the_end_of_candidates_counts_in_answers_and_their_score(causal: Backbone) -> None:
    """If asked for, by ``rank``, ``predict`` and scores alike; it is refused where it would change nothing."""
    model, names = PromptModel(causal), ["a good film", "a good film and a bad one", "yes"]
    prompt = replace(learned(causal, TEMPLATE), learned_to_stop=True)
    ranked = model.rank(RECORDS, prompt, names, count_stop=True)
    assert ranked != model.rank(RECORDS, prompt, names)
    answers = model.predict(RECORDS, prompt, names, top_k=3, count_stop=True)
    assert [list(one.candidates) for one in answers] == ranked
    lasts = [{**record, "y": row[2].text} for record, row in zip(RECORDS, ranked, strict=True)]
    found = score_prompt(model, as_records(lasts), prompt, candidates=names, count_stop=True)
    assert found.scores["mrr"].value == 1 / 3
    for asked in (model.predict, lambda rows, one, **how: score_prompt(model, rows, one, **how)):
        with pytest.raises(ConfigError, match=r"count_stop goes with candidates"):
            asked(lasts, prompt, count_stop=True)
        with pytest.raises(ConfigError, match="trained to stop after the target"):
            asked(lasts, replace(prompt, learned_to_stop=False), candidates=names, count_stop=True)


def test_a_closed_prompt_takes_no_candidates(causal: Backbone) -> None:
    """Its targets are labels, or a row's choices; they used to be left out without a word, or to hide its accuracy."""
    model, words = PromptModel(causal), LabelWords.parse("good=great;bad=poor")
    task = load_task("COPA")
    for prompt, says in (
        (Prompt.manual("[X] is [Y]", label_words=words), "has label words"),
        (Prompt.manual(task.manual[0], task=task), "brings its own choices"),
    ):
        with pytest.raises(ConfigError, match=f"the prompt {says}.*; leave the candidates"):
            score_prompt(model, Records([{"x": "a", "y": "good"}]), prompt, candidates=["a", "b"])


def test_candidates_that_score_the_same_rank_before_the_target(
    causal: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    def same(*_: object, **__: object) -> list[list[Candidate]]:
        return [[Candidate("yes", -1.0), Candidate("no", -1.0)]]

    monkeypatch.setattr(PromptModel, "rank", same)
    found = score_prompt(
        PromptModel(causal), Records([{"x": "a", "y": "yes"}]), Prompt.manual("[X] is [Y]"), candidates=["yes", "no"]
    )
    assert (found.scores["accuracy"].value, found.scores["mrr"].value) == (0.0, 0.5)


def test_label_words_are_scored_by_class(backbone: Backbone) -> None:
    """Accuracy agrees with what prediction answers."""
    words = LabelWords({"good": ("great", "a good film"), "bad": ("terrible",)})
    base = learned(backbone, TEMPLATE)
    prompt = Prompt(base.template, base.slot_vectors, base.backbone, label_words=words)
    rows: list[Record] = [{**record, "y": ("good", "bad")[index % 2]} for index, record in enumerate(RECORDS)]
    found = score_prompt(PromptModel(backbone), as_records(rows), prompt)
    answers = [answer.text for answer in PromptModel(backbone).predict(rows, prompt)]
    assert list(found.hits) == [float(answer == row["y"]) for answer, row in zip(answers, rows, strict=True)]
    assert set(found.scores) == {"accuracy"}
    assert [row["prediction"] for row in found.rows] == answers
    assert [row["hit"] for row in found.rows] == [bool(hit) for hit in found.hits]
    for row, answer in zip(found.rows, PromptModel(backbone).predict(rows, prompt), strict=True):
        assert row["probabilities"] == pytest.approx(answer.probabilities, abs=1e-5)
    confusion = found.confusion
    assert confusion is not None
    assert confusion.labels == ("good", "bad")
    assert confusion.counts == tuple(
        tuple(
            sum(row["y"] == own and answer == other for row, answer in zip(rows, answers, strict=True))
            for other in words.labels
        )
        for own in words.labels
    )
    worst = found.worst(9)
    assert [found.rows[at]["hit"] for at in worst] == [False] * found.hits.count(0.0)
    sure = [float(str(found.rows[at]["log_prob"])) for at in worst]
    assert sure == sorted(sure, reverse=True)
    assert found.worst(1) == worst[:1]


def test_answers_that_are_written_come_if_they_are_asked_for(causal: Backbone) -> None:
    """They take a pass of their own; candidates are ranked anyway."""
    model, prompt = PromptModel(causal), learned(causal, TEMPLATE)
    assert score_prompt(model, RECORDS, prompt).rows == []
    found = score_prompt(model, RECORDS, prompt, with_rows=True)
    assert [row["prediction"] for row in found.rows] == [one.text for one in model.predict(RECORDS, prompt)]
    assert [row["hit"] for row in found.rows] == [bool(hit) for hit in found.hits]
    assert found.confusion is None
    ranked = score_prompt(model, RECORDS, prompt, candidates=CANDIDATES)
    best = [one[0].text for one in model.rank(RECORDS, prompt, CANDIDATES)]
    assert [row["prediction"] for row in ranked.rows] == best
    assert [row["hit"] for row in ranked.rows] == [row["rank"] == 1 for row in ranked.rows]


def test_a_manual_prompt_is_scored_like_a_learned_one(causal: Backbone) -> None:
    """Invariant *Identity* (docs/invariants.md), in scores: words score the same as slots and as text."""
    filled = bound(causal, "[P:The capital of] [X] [P:is] [Y]")
    ids = [token for token in filled.slot_start_ids if token is not None]
    warm = Prompt.from_token_ids(filled.template, ids, causal)
    one = score_prompt(PromptModel(causal), as_records(RECORDS), warm)
    other = score_prompt(PromptModel(causal), as_records(RECORDS), Prompt.manual("The capital of [X] is [Y]"))
    assert one.hits == other.hits
    assert math.isclose(one.loss, other.loss, abs_tol=1e-4)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "in memory holds no records, so there is nothing to score"),
        ([{"x": "a", "y": "b"}, {"x": "c"}], "in memory, record 2: no target"),
    ],
)
def test_records_that_cannot_be_scored(causal: Backbone, rows: list[Record], message: str) -> None:
    """The error names the data and the record at fault."""
    with pytest.raises(RecordError, match=message):
        score_prompt(PromptModel(causal), Records(rows), learned(causal, TEMPLATE))


def test_rows_of_predictions(make_backbone: Callable[[str], Backbone]) -> None:
    """One row per record for the file beside the run."""
    backbone = make_backbone("bert")
    data = as_records(RECORDS)
    answers = PromptModel(backbone).predict(data, learned(backbone, TEMPLATE))
    rows = prediction_rows(data, answers, [1.0, 0.0, 0.0, 0.0, 1.0])
    assert [row["target"] for row in rows] == [record["y"] for record in RECORDS]
    assert [row["prediction"] for row in rows] == [answer.text for answer in answers]
    assert [row["hit"] for row in rows] == [True, False, False, False, True]
    assert rows[0]["record"] == RECORDS[0]


CHOICE_TASK = TaskFile.parse('name="c"\nversion="1"\n[choices]\nfrom=["a","b"]\n[[patterns]]\nmanual="[X] is [Y]"')


@pytest.mark.parametrize("calibrate", [False, True])
def test_choices_of_rows_are_scored_as_they_are_predicted(backbone: Backbone, calibrate: bool) -> None:
    """Accuracy is that of the answers, and the loss minus the log of what the right choices have."""
    rows = [{"x": word, "a": "Nairobi", "b": "a good film", "label": at % 2} for at, word in enumerate(CANDIDATES)]
    asked, model = CHOICE_TASK.read_rows(rows), PromptModel(backbone)
    prompt = replace(learned(backbone, TEMPLATE), task=CHOICE_TASK, calibrate=calibrate)
    found, answers = score_prompt(model, asked, prompt), model.classify(asked, prompt)
    right = [question.choices[question.answers[0]] for question in asked]
    assert found.hits == tuple(float(row[0].text == text) for row, text in zip(answers, right, strict=True))
    assert found.scores["accuracy"].value == pytest.approx(sum(found.hits) / len(rows))
    losses = [-next(c.log_prob for c in row if c.text == text) for row, text in zip(answers, right, strict=True)]
    assert found.loss == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    with pytest.raises(RecordError, match="has no choices to choose among"):
        score_prompt(model, asked.records, prompt)


def test_a_task_has_scores_of_its_own_metrics(causal: Backbone) -> None:
    """Macro F1 as a loop over the answers has it; a group counts as right if all of its rows are."""
    text = (
        'name="m"\nversion="1"\nmetrics=["macro_f1","exact_match"]\ngroup="g"\n[labels]\ngood=["great"]\nbad=["25"]\n'
        '[[patterns]]\nmanual="[X] is [Y]"'
    )
    task = TaskFile.parse(text)
    rows = [{"x": f"city {at}", "label": ("good", "bad")[at % 2], "g": at // 2} for at in range(12)]
    asked, prompt = task.read_rows(rows), replace(learned(causal, TEMPLATE), label_words=task.label_words, task=task)
    found = score_prompt(PromptModel(causal), asked, prompt)
    assert list(found.scores) == ["accuracy", "macro_f1", "exact_match"]
    said = [one.text for one in PromptModel(causal).predict(asked, prompt)]
    f1 = []
    for label in ("good", "bad"):
        both = sum(one == row["label"] == label for one, row in zip(said, rows, strict=True))
        either = said.count(label) + sum(row["label"] == label for row in rows)
        f1.append(2 * both / either)
    assert found.scores["macro_f1"].value == pytest.approx(sum(f1) / 2)
    pairs = [found.hits[at] * found.hits[at + 1] for at in range(0, 12, 2)]
    assert found.scores["exact_match"].value == pytest.approx(sum(pairs) / 6)


def test_a_result_as_json() -> None:
    result = Result({"accuracy": Score(0.5, 0.2, 0.8, 4)}, 1.25, (1.0, 0.0, 1.0, 0.0), missing=1)
    assert result.to_json() == {
        "scores": {"accuracy": {"value": 0.5, "low": 0.2, "high": 0.8, "n": 4}},
        "loss": 1.25,
        "targets_not_among_candidates": 1,
    }
    found = Result({}, 1.0, (), confusion=Confusion(("a", "b"), ((1, 1), (0, 0)))).to_json()
    assert found["confusion"] == [[1, 1], [0, 0]]
    assert found["labels"] == {
        "a": {"precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3), "n": 2},
        "b": {"precision": 0.0, "recall": 0.0, "f1": 0.0, "n": 0},
    }


@pytest.mark.parametrize("calibrate", [False, True])
def test_a_few_questions_are_filled_in_at_a_time(
    causal: Backbone, calibrate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers and scores of 40 questions with 3 choices take the memory of 4, and are those of all at once."""
    rows = [Question({"x": f"{number} a film", "y": "yes"}, ("yes", "no", "25"), (number % 3,)) for number in range(40)]
    questions, model = Questions(rows, name="film.jsonl"), PromptModel(causal)
    prompt = replace(learned(causal, TEMPLATE), task=load_task("COPA"))
    answers = prompt.answer_space
    assert answers.has_choices
    at_once = (
        model.classify(questions, prompt, calibrate=calibrate),
        score_prompt(model, questions, prompt, calibrate=calibrate),
    )
    alive: list[weakref.ref[Example]] = []
    most: list[int] = []
    real, run = TokenizedTemplate.answers, causal.run

    def filled(*given: Any, **named: Any) -> list[list[Example]]:
        found = real(*given, **named)
        alive.extend(weakref.ref(example) for row in found for example in row)
        return found

    def counted(*given: Any, **named: Any) -> Any:
        most.append(sum(one() is not None for one in alive))
        return run(*given, **named)

    monkeypatch.setattr(TokenizedTemplate, "answers", filled)
    monkeypatch.setattr(causal, "run", counted)
    monkeypatch.setattr(ptuning.engine.objective, "TEXTS_AT_ONCE", 12)
    progress: list[tuple[int, int]] = []
    few = (
        model.classify(questions, prompt, calibrate=calibrate),
        score_prompt(
            model, questions, prompt, calibrate=calibrate, report=lambda one: progress.append((one.done, one.total))
        ),
    )
    assert max(most) <= 2 * 12 * (1 + calibrate)
    assert len(most) >= 20
    for one, other in zip(at_once[0], few[0], strict=True):
        assert [a.text for a in one] == [b.text for b in other]
        assert [a.log_prob for a in one] == pytest.approx([b.log_prob for b in other], abs=1e-5)
    assert few[1].hits == at_once[1].hits
    assert few[1].loss == pytest.approx(at_once[1].loss, abs=1e-5)
    assert progress[-1] == (40, 40)
    assert [done for done, _ in progress] == sorted(done for done, _ in progress)


def test_a_record_that_does_not_fit_is_named_in_any_part(causal: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its number in the data, not in the part that is filled in with it."""
    monkeypatch.setattr(ptuning.engine.objective, "TEXTS_AT_ONCE", 4)
    rows: list[Record] = [{"x": "a film", "z": "a", "y": "good"} for _ in range(9)]
    rows[7] = {**rows[7], "z": "a film " * 80}
    prompt = Prompt.manual("{z!} [X] is [Y]", label_words="good=great;bad=poor")
    with pytest.raises(TemplateError, match=r"in memory, record 8, answer \d does not fit"):
        PromptModel(causal).classify(rows, prompt)


@pytest.mark.parametrize("name", ["bert", "roberta", "t5", "xlnet", "gpt2"])
def test_a_vocabulary_that_knows_no_answer_is_an_error(name: str) -> None:
    """A random BERT whose vocabulary was lost scored 0.903: every target was the unknown token, as was every guess."""
    backbone = without_words(name)
    prompt = Prompt.from_token_ids("[P*2] [X] [P] [Y]", [5, 5, 5], backbone)
    with pytest.raises(RecordError, match=r"5 of 5 targets of in memory are unknown .*: the vocabulary does not fit"):
        score_prompt(PromptModel(backbone), RECORDS, prompt)


@pytest.mark.parametrize("name", ["bert", "t5", "xlnet"])
def test_an_unknown_answer_is_a_miss_and_not_part_of_the_loss(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Even for a model that writes nothing but the unknown token."""
    backbone = built(name)
    rare = [{"x": "Kenya", "y": "\U0001f642"}, {"x": "Peru", "y": "東京"}]
    prompt = Prompt.from_token_ids("[P*2] [X] [P] [Y]", [5, 5, 5], backbone)
    known = score_prompt(PromptModel(backbone), RECORDS, prompt)
    real = target_logits

    def says_unknown(*given: Any, **named: Any) -> Any:
        logits = real(*given, **named)
        logits[:, backbone.tokenizer.unknown_id] = 1e4
        return logits

    found = score_prompt(PromptModel(backbone), [*rare, *RECORDS], prompt)
    assert math.isclose(found.loss, known.loss, rel_tol=1e-4)
    assert "2 of 7 targets of in memory are unknown to the tokenizer, such as '\U0001f642' (in memory, record 1)" in (
        caplog.text
    )
    monkeypatch.setattr(ptuning.engine.evaluate, "target_logits", says_unknown)
    assert set(score_prompt(PromptModel(backbone), [*rare, *RECORDS], prompt).hits) == {0.0}


def test_a_byte_level_vocabulary_knows_every_answer(caplog: pytest.LogCaptureFixture) -> None:
    backbone = built("gpt2")
    prompt = Prompt.from_token_ids("[P*2] [X] [P] [Y]", [5, 5, 5], backbone)
    with caplog.at_level(logging.WARNING):
        score_prompt(PromptModel(backbone), [{"x": "\U0001f642", "y": "\U0001f642"}], prompt)
    assert not caplog.records


def test_candidates_that_the_tokenizer_does_not_know_or_tell_apart_are_never_hits(
    masked: Backbone, caplog: pytest.LogCaptureFixture
) -> None:
    """Their order in the list must not decide: "a film" and "a  film" are the same tokens."""
    targets = ["a film", "a  film", "\U0001f642", "\U0001f643"]
    rows = [{"x": "Kenya", "y": text} for text in targets]
    for candidates in (targets, targets[::-1]):
        for seed in range(5):
            prompt = learned(masked, TEMPLATE, seed=seed)
            found = score_prompt(PromptModel(masked), rows, prompt, candidates=[*candidates, "yes"])
            assert found.scores["accuracy"].value == 0.0
    assert (
        "4 of 5 possible answers, such as 'a film', are unknown to the tokenizer or have the tokens of" in caplog.text
    )


def test_any_reference_is_a_hit_and_the_loss_is_that_of_the_first(backbone: Backbone) -> None:
    """References are right wherever answers are scored; what is learned is the first."""
    model = PromptModel(backbone)
    prompt, rows = next(
        (prompt, RECORDS[:1] and [{**RECORDS[0], "y": likeliest}])
        for seed in range(40)
        if (
            likeliest := backbone.tokenizer.decode(
                [
                    int(
                        model.target_logits(RECORDS[:1], prompt := learned(backbone, "[P*2] [X] is [P][Y]", seed=seed))[
                            0
                        ][0].argmax()
                    )
                ]
            )
        ).strip()
        and score_prompt(model, [{**RECORDS[0], "y": likeliest}], prompt).hits == (1.0,)
    )
    right = rows[0]["y"]
    wrong = score_prompt(model, [{**RECORDS[0], "y": "Nairobi film"}], prompt)
    found = score_prompt(model, [{**RECORDS[0], "y": ["Nairobi film", right]}], prompt, with_rows=True)
    assert (wrong.hits, found.hits, found.loss) == ((0.0,), (1.0,), wrong.loss)
    assert found.rows[0]["target"] == ["Nairobi film", right.strip()]
    ranked = score_prompt(model, [{**RECORDS[0], "y": ["Nairobi film", right]}], prompt, candidates=["yes", right])
    assert ranked.missing == 0


def test_only_references_like_the_text_that_is_written_are_scored(
    causal: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text of many references would else take as many passes; the hits are the same."""
    model, prompt = PromptModel(causal), learned(causal, "[P*2] [X] is [P][Y]", seed=1)
    texts = [one.text for one in model.predict(RECORDS, prompt)]
    encode, decode = causal.tokenizer.encode, causal.tokenizer.decode
    halves = [decode(ids[: len(ids) // 2]) for ids in encode(texts)]
    own = [[half or text, f"{text} and more", "Zz", "Nairobi film"] for half, text in zip(halves, texts, strict=True)]
    data = as_records([{**record, "y": ["wrong", *some]} for record, some in zip(RECORDS, own, strict=True)])
    filled, slots = prompt.bind(causal), prompt.learned(causal)
    found = evaluate(causal, [target_requests(filled, data, with_stop=False)], slots)
    every = of_any_reference(causal, filled, data, slots, found)
    scored: list[int] = []
    whole = evaluate

    def counted(backbone: Backbone, parts: Iterable[Sequence[ScoringRequest]], *rest: Any, **named: Any) -> Evaluation:
        items = [item for part in parts for item in part]
        scored.append(len(items))
        return whole(backbone, [items], *rest, **named)

    monkeypatch.setattr(answer_module, "evaluate", counted)
    assert of_any_reference(causal, filled, data, slots, found, written=texts) == every
    assert 1.0 in every.hits
    assert score_prompt(model, data, prompt).hits == every.hits
    assert len(scored) == 3
    assert max(scored) < 4 * len(RECORDS)  # a text without a letter begins like any


def test_a_label_is_no_list_of_references(backbone: Backbone) -> None:
    prompt = replace(learned(backbone, TEMPLATE), label_words=LabelWords.of({"good": ["great"], "bad": ["no"]}))
    with pytest.raises(RecordError, match="row 1 has a list of targets"):
        score_prompt(PromptModel(backbone), [{"x": "a", "y": ["good", "bad"]}], prompt)
