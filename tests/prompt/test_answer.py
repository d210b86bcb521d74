"""Answers and ranks: equal to a plain loop over transformers' own logits, closed sets, ties, written answers."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from ptuning.backbone.backbone import Backbone
from ptuning.config import GenerationSettings
from ptuning.data.questions import as_questions
from ptuning.engine.soft_prompt import PromptBatch
from ptuning.errors import RecordError
from ptuning.metrics import Answer
from ptuning.prompt import score as answers
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prediction import Candidate
from ptuning.prompt.prompt import Prompt
from ptuning.prompt.rows import Answering
from ptuning.prompt.score import answer_records, answers_identity, token_ids_of
from ptuning.records import Records
from ptuning.template.encode import Example
from tests.conftest import bound, learned, plain_logits, spoken

MANUAL = "The capital of [X] is [Y] ."
SINGLE = ("yes", "good", "great", "bad", "Peru")  # one token in all four families
# Subjects of different lengths, so that batches hold pads.
FACTS = Records([{"x": "the movie " * (at % 3) + f"Kenya {at}", "y": SINGLE[at % len(SINGLE)]} for at in range(7)])


def plain_scores(backbone: Backbone, example: Example, slot_ids: Sequence[int] = ()) -> torch.Tensor:
    """The log-probabilities of all tokens at the target's place, as transformers itself gives them, (V,)."""
    logits = plain_logits(backbone, spoken(example, list(slot_ids)))[example.logit_positions[0]]
    return torch.log_softmax(logits, dim=-1)


def expected(backbone: Backbone, example: Example, allowed: Sequence[int], slot_ids: Sequence[int] = ()) -> Answer:
    scores = plain_scores(backbone, example, slot_ids)
    ordered = sorted(allowed, key=lambda token: -float(scores[token]))
    gold = example.target_ids[0]
    rank = ordered.index(gold) + 1 if gold in ordered else 0
    text = backbone.tokenizer.decode([ordered[0]]).strip()
    return Answer(text, rank == 1, rank, float(scores[ordered[0]]))


def check_same(found: Sequence[Answer], wanted: Sequence[Answer]) -> None:
    """Compare answers; log-probabilities to within rounding."""
    assert [replace(one, log_prob=None) for one in found] == [replace(one, log_prob=None) for one in wanted]
    assert [one.log_prob for one in found] == pytest.approx([one.log_prob for one in wanted], abs=1e-4)


def test_ranks_among_all_tokens_equal_a_plain_loop(backbone: Backbone) -> None:
    found = answer_records(PromptModel(backbone), Prompt.manual(MANUAL), FACTS, single_token=True)
    examples = bound(backbone, MANUAL).examples(FACTS)
    check_same(found, [expected(backbone, example, range(backbone.vocabulary)) for example in examples])
    assert len({answer.rank for answer in found}) > 1


def test_ranks_among_a_closed_set_of_tokens(backbone: Backbone) -> None:
    closed = ["good", "yes", "the movie was great", "one", "good"]  # one of several tokens, one twice
    found = answer_records(PromptModel(backbone), Prompt.manual(MANUAL), FACTS, closed=closed, single_token=True)
    example = bound(backbone, MANUAL).examples([FACTS[0]] * 3, targets=["good", "yes", "one"])
    allowed = [one.target_ids[0] for one in example]
    check_same(found, [expected(backbone, one, allowed) for one in bound(backbone, MANUAL).examples(FACTS)])
    outside = [answer for answer, row in zip(found, FACTS, strict=True) if row["y"] not in closed]
    assert outside
    assert all(answer.rank == 0 and not answer.hit for answer in outside)
    assert {answer.text for answer in found} <= {"good", "yes", "one"}


def fixed_logits(rows: torch.Tensor) -> object:
    """A stand-in for the model that gives every record the same logits."""

    def target_logits(_: Backbone, examples: list[Example], __: PromptBatch) -> torch.Tensor:
        return rows.expand(len(examples), -1)

    return target_logits


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_equal_scores_rank_before_the_target(causal: Backbone, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that tells nothing apart, or is broken, gets no point."""
    monkeypatch.setattr(answers, "target_logits", fixed_logits(torch.full((causal.vocabulary,), value)))
    found = answer_records(PromptModel(causal), Prompt.manual(MANUAL), FACTS, single_token=True)
    assert {answer.rank for answer in found} == {causal.vocabulary}
    assert not any(answer.hit for answer in found)
    found = answer_records(PromptModel(causal), Prompt.manual(MANUAL), FACTS, closed=SINGLE, single_token=True)
    assert {answer.rank for answer in found} == {len(SINGLE)}


def test_a_target_that_shares_the_first_place_is_not_the_answer(
    causal: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = torch.zeros(causal.vocabulary)
    good, yes = (int(token_ids_of(bound(causal, MANUAL), FACTS, [text])[0]) for text in ("good", "yes"))
    logits[[good, yes]] = 5.0
    monkeypatch.setattr(answers, "target_logits", fixed_logits(logits))
    records = Records([{"x": "a", "y": "good"}, {"x": "a", "y": "yes"}])
    found = answer_records(PromptModel(causal), Prompt.manual(MANUAL), records, single_token=True)
    assert [(answer.text, answer.rank) for answer in found] == [("yes", 2), ("good", 2)]


def test_a_target_of_several_tokens_cannot_be_ranked_among_tokens(causal: Backbone) -> None:
    records = Records([{"x": "Kenya", "y": "a good film"}])
    with pytest.raises(RecordError, match=r"a target takes \d tokens, and only targets of one token"):
        answer_records(PromptModel(causal), Prompt.manual(MANUAL), records, single_token=True)


def test_tokens_of_texts(masked: Backbone) -> None:
    at = bound(masked, MANUAL)
    ids = token_ids_of(at, FACTS, ["good", "\u2603", "good", "film noir"])
    assert masked.tokenizer.decode(ids.tolist()) == "good"
    with pytest.raises(RecordError, match="none of the 1 possible answers, such as '\u2603', is one token"):
        token_ids_of(at, FACTS, ["\u2603"])


def test_a_closed_set_of_longer_texts_is_ranked_by_their_log_probability(backbone: Backbone) -> None:
    closed = ["a good film", "yes", "São Tomé", "Nairobi"]
    records = Records([{"x": "Kenya", "y": "Nairobi"}, {"x": "France", "y": " yes "}, {"x": "Chad", "y": "Lima"}])
    model, prompt = PromptModel(backbone), learned(backbone, "[P*2] [X] [Y]")
    found = answer_records(model, prompt, records, closed=closed)
    for answer, row, ranked in zip(found, records, model.rank(records, prompt, closed), strict=True):
        texts = [candidate.text for candidate in ranked]
        target = row["y"].strip()
        assert answer.rank == (texts.index(target) + 1 if target in texts else 0)
        assert (answer.text, answer.log_prob) == (texts[0], ranked[0].log_prob)
        assert answer.hit == (answer.rank == 1)
    assert found[2].rank == 0


@pytest.mark.parametrize(
    ("row", "gold", "rank"),
    [
        ([0.1, 0.9, 0.5], 1, 1),
        ([0.1, 0.9, 0.5], 2, 2),
        ([0.1, 0.9, 0.5], 0, 3),
        ([0.5, 0.5, 0.1], 0, 2),
        ([0.5, 0.5, 0.5], 1, 3),
        ([-math.inf, -math.inf], 0, 2),
        ([0.3], 0, 1),
        # What is no number is never in one's favour.
        ([math.nan, math.nan, math.nan], 1, 3),
        ([0.1, math.nan, 0.2], 1, 3),
        ([0.9, math.nan, 0.2], 0, 2),
    ],
)
def test_equal_scores_rank_behind(row: list[float], gold: int, rank: int) -> None:
    found = sorted((Candidate(str(at), value) for at, value in enumerate(row)), key=lambda one: -one.log_prob)
    answer = answers.among_candidates((str(gold),), found)
    assert (answer.rank, answer.hit) == (rank, rank == 1)


def test_candidates_with_the_targets_score_are_the_answer_before_it() -> None:
    found = [Candidate("yes", -1.0), Candidate("no", -1.0), Candidate("one", -2.0)]
    assert answers.among_candidates(("yes",), found) == Answer("no", False, 2, -1.0)
    assert answers.among_candidates(("no",), found) == Answer("yes", False, 2, -1.0)
    assert answers.among_candidates(("one",), found) == Answer("yes", False, 3, -1.0)
    assert answers.among_candidates(("two",), found).rank == 0


def test_written_answers_are_compared_as_a_whole_and_not_ranked(backbone: Backbone) -> None:
    """A hit is what greedy decoding would write: the target's own tokens are each the likeliest where they stand."""
    model, prompt = PromptModel(backbone), Prompt.manual("[X] is [Y]")
    targets = [backbone.tokenizer.decode([token]).strip() for token in range(40, backbone.vocabulary, 9)]
    subjects = ("Kenya", "France", "Peru", "the movie", "a number")
    written = model.predict([{"x": subject} for subject in subjects], prompt, generation={"max_new_tokens": 1})
    # A random model may write a special token, which no target holds.
    subject, said = next((subject, one) for subject, one in zip(subjects, written, strict=True) if one.text)
    records = Records([{"x": subject, "y": text} for text in ("a good film", *targets) if text.isalnum()])
    records.append({"x": subject, "y": said.text})
    found = answer_records(model, prompt, records, max_tokens=1)
    assert {answer.text for answer in found} == {said.text}
    assert {answer.rank for answer in found} == {None}
    assert found[0].log_prob == pytest.approx(said.log_prob, abs=1e-5)
    examples = bound(backbone, "[X] is [Y]").examples(records)
    best = [plain_logits(backbone, list(example.token_ids)).argmax(dim=-1) for example in examples]
    assert [answer.hit for answer in found] == [
        all(int(row[at]) == token for at, token in zip(example.logit_positions, example.target_ids, strict=True))
        for row, example in zip(best, examples, strict=True)
    ]
    assert not found[0].hit
    assert found[-1].hit or backbone.kind == "masked"  # a piece of a word is another token than the same word


def test_an_unknown_target_is_never_the_answer(masked: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Among tokens, where the unknown token is one as well; among a closed set; and written."""
    logits = torch.zeros(masked.vocabulary)
    logits[masked.tokenizer.unknown_id] = 9.0
    monkeypatch.setattr(answers, "target_logits", fixed_logits(logits))
    records = Records([{"x": "a", "y": "\u2603"}, {"x": "a", "y": "yes"}])
    model, prompt = PromptModel(masked), Prompt.manual(MANUAL)
    among_tokens = answer_records(model, prompt, records, single_token=True)
    assert [(one.hit, one.known) for one in among_tokens] == [(False, False), (False, True)]
    assert [one.rank == 0 for one in among_tokens] == [True, False]
    closed = answer_records(model, prompt, records, closed=["\u2603", "yes", "no"])
    assert [(one.rank == 0, one.known) for one in closed] == [(True, False), (False, True)]
    assert closed[0].text != "\u2603"
    written = answer_records(model, prompt, records, max_tokens=1)
    assert (written[0].hit, written[0].known) == (False, False)


def test_a_target_with_the_token_of_another_answer_shares_its_place(masked: Backbone) -> None:
    records = Records([{"x": "a", "y": text} for text in ("yes", "y\u200bes", "good")])
    found = answer_records(
        PromptModel(masked), Prompt.manual(MANUAL), records, closed=["yes", "y\u200bes", "good"], single_token=True
    )
    assert [one.known for one in found] == [False, False, True]
    assert not any(one.hit for one in found[:2])
    assert min(found[0].rank or 0, found[1].rank or 0) >= 2


def test_right_answers_may_be_the_same_tokens() -> None:
    found = [Candidate("US", -1.0, ("us",)), Candidate("us", -1.0, ("US",)), Candidate("UK", -2.0)]
    assert answers.among_candidates(("US", "us"), found) == Answer("US", True, 1, -1.0)
    assert answers.among_candidates(("US",), found) == Answer("us", False, 2, -1.0, known=False)
    assert answers.among_candidates(("UK",), found) == Answer("US", False, 3, -1.0)
    # On a graphics card their sums may differ in the last bit.
    found[1] = Candidate("us", -1.0000001, ("US",))
    assert answers.among_candidates(("US",), found) == Answer("us", False, 2, -1.0000001, known=False)
    assert answers.among_candidates(("UK",), [Candidate("UK", -1.0, None)]) == Answer("UK", False, 0, -1.0, known=False)


def test_answers_of_one_run_have_one_identity(make_backbone: Callable[[str], Backbone]) -> None:
    """Prompt, slots, settings, data and model are part of it."""
    llama, rows = make_backbone("llama"), as_questions([{"x": "a"}])
    prompts = [Prompt.from_token_ids("[D*2] [X] is [Y]", ids, llama) for ids in ([5, 6], [5, 7], [5, 6])]
    first = answers_identity(prompts[0], rows, Answering(), llama)
    assert first == answers_identity(prompts[2], rows, Answering(), llama)
    json.dumps(first)
    others = [
        answers_identity(prompts[1], rows, Answering(), llama),
        answers_identity(prompts[0], as_questions([{"x": "b"}]), Answering(), llama),
        answers_identity(prompts[0], rows, Answering(), make_backbone("gpt2")),
        answers_identity(prompts[0], rows, Answering(generation=GenerationSettings(num_beams=2)), llama),
        answers_identity(prompts[0], rows, Answering(candidates=["a"]), llama),
    ]
    assert first not in others
