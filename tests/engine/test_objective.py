"""Losses and scores against loops written by hand over plain log-probabilities."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ptuning.backbone.backbone import Backbone
from ptuning.data.answer_space import AnswerSpace
from ptuning.data.questions import Question, Questions, as_questions
from ptuning.engine.forward import target_logits
from ptuning.engine.objective import (
    NAME_TOKENS,
    STOP_WEIGHT,
    ContinuationScores,
    ScoringRequest,
    build_requests,
    class_scores,
    hits,
    inputs_of,
    loss,
    loss_count,
    score_continuations,
    score_parts,
    share_inputs,
    target_requests,
    truncate_target,
)
from ptuning.engine.soft_prompt import PromptBatch
from ptuning.errors import LabelWordError, RecordError, TemplateError
from ptuning.records import Record, Records, as_records
from ptuning.template.encode import Example, TooLongError
from ptuning.template.labels import LabelWords, Scoring
from tests.conftest import RECORDS, bound, items_of, learned

TEMPLATE = "[P*2] [X] [P] [Y] ."
CANDIDATES = ["yes", "no", "Nairobi", "São Tomé", "a good film and a bad one", "25", "great"]
WORDS = LabelWords({"good": ("great", "a good film"), "bad": ("terrible",), "none": ("25", "no", "Paris and Lima")})


def vectors_of(backbone: Backbone) -> Tensor:
    """Return the slot vectors that this file's items are scored with."""
    vectors = learned(backbone, TEMPLATE).slot_vectors
    assert vectors is not None
    return vectors


@torch.no_grad()
def scored_by(backbone: Backbone, items: list[ScoringRequest]) -> ContinuationScores:
    """Score items in one batch."""
    return score_continuations(items, target_logits(backbone, inputs_of(items), PromptBatch(vectors_of(backbone))))


@torch.no_grad()
def by_hand(backbone: Backbone, example: Example) -> list[float]:
    """Return the log-probability of each own token of one example, run alone."""
    log_probs = target_logits(backbone, [example], PromptBatch(vectors_of(backbone))).log_softmax(-1)
    return [float(log_probs[at, token]) for at, token in enumerate(example.target_ids)]


def weights(item: ScoringRequest) -> list[float]:
    """Return what each scored token of a target counts: the stop token a fifth."""
    choice = item.choices[0]
    return [1.0 if at < choice.own_tokens else 0.2 for at in range(len(choice.target_ids))]


def test_the_end_of_a_long_target_weighs_as_one_of_its_tokens(causal: Backbone) -> None:
    """The end of a name is learned easily, and that of a text is one token of many; lengths may be mixed in a batch."""
    rows: list[Record] = [*RECORDS, {"x": "a", "y": "a good film and a bad one, all in all, in which people live"}]
    items = items_of(causal, TEMPLATE, rows)
    lengths = [item.choices[0].own_tokens for item in items]
    assert max(lengths[:-1]) <= NAME_TOKENS + 1 < NAME_TOKENS + 5 <= lengths[-1]
    whole, count = loss(items, scored_by(causal, items))
    each = [[*weights(item)[:-1], 1.0 if item is items[-1] else 0.2] for item in items]
    expected = sum(
        weight * log_prob
        for item, own in zip(items, each, strict=True)
        for weight, log_prob in zip(own, by_hand(causal, item.inputs[0]), strict=True)
    )
    assert math.isclose(float(whole), -expected, rel_tol=1e-5)
    assert count == loss_count(items) == pytest.approx(sum(map(sum, each)))
    scored = scored_by(causal, items[:-1])
    short, number = loss(items[:-1], scored)
    own, everything = scored.log_probs.sum(), scored.all_log_probs.sum()
    assert torch.equal(short, -own - STOP_WEIGHT * (everything - own))  # as ever, to the bit
    assert number == sum(lengths[:-1]) + STOP_WEIGHT * len(lengths[:-1])


def test_a_cut_target_is_the_beginning_of_the_whole_one(causal: Backbone) -> None:
    items = items_of(causal, TEMPLATE, RECORDS)
    for item in items:
        own = item.choices[0].own_tokens
        for most in range(1, own):
            cut = truncate_target(item, most)
            assert cut.choices[0].target_ids == item.choices[0].target_ids[:most]
            assert cut.choices[0].own_tokens == most
            assert by_hand(causal, cut.inputs[0]) == pytest.approx(by_hand(causal, item.inputs[0])[:most], abs=1e-5)
        assert truncate_target(item, own) is item


def test_the_beginning_of_a_target_that_does_not_fit(backbone: Backbone) -> None:
    """Only of it, as much as half of what the model reads, and without an end; any other one is as it was."""
    own, long = bound(backbone, TEMPLATE), "the capital of Peru is Lima and " * 12
    records = Records([*RECORDS, {**RECORDS[0], "y": long}])
    *others, cut = target_requests(own, records, with_stop=True, cut=True)
    assert others == target_requests(own, Records(RECORDS), with_stop=True)
    most, (example,) = own.max_length // 2, cut.inputs
    assert most - 3 <= cut.choices[0].own_tokens <= most
    if backbone.kind == "causal":  # a masked one may read another word at the end
        whole = backbone.tokenizer.encode([f" {long}"])[0]
        assert example.target_ids == tuple(whole[: len(example.target_ids)])
    assert len(example.target_ids) == cut.choices[0].own_tokens
    with pytest.raises(TooLongError, match="record 6 does not fit"):
        target_requests(own, records, with_stop=True)
    with pytest.raises(TemplateError, match="no field 'x' in record 2"):
        target_requests(own, Records([RECORDS[0], {"y": long}]), with_stop=True, cut=True)


def test_a_target_that_fits_without_its_end_alone(causal: Backbone) -> None:
    own, word = bound(causal, TEMPLATE), "yes "
    for count in range(40, 70):  # one of these leaves no room for the end
        (item,) = target_requests(own, Records([{"x": "a", "y": (word * count).strip()}]), with_stop=True, cut=True)
        assert item.inputs[0].length <= own.max_length


def test_log_probs_of_targets_equal_a_loop(backbone: Backbone) -> None:
    """Total log-probability of each target, with and without the stop token, in a batch of all records."""
    items = items_of(backbone, TEMPLATE, RECORDS)
    scored = scored_by(backbone, items)
    for index, item in enumerate(items):
        each, own = by_hand(backbone, item.inputs[0]), item.choices[0].own_tokens
        assert math.isclose(float(scored.all_log_probs[index]), sum(each), abs_tol=1e-4)
        assert math.isclose(float(scored.log_probs[index]), sum(each[:own]), abs_tol=1e-4)
        assert (len(each) == own + 1) == (backbone.kind == "causal")
        assert int(scored.lengths[index]) == own
    assert math.isclose(scored.token_count, sum(sum(weights(item)) for item in items))


def test_loss_is_sum_and_count(backbone: Backbone) -> None:
    """Sums are divided once, by tokens: so the loss is the same however the items are cut into batches.

    A mean of the batches' means would give a short last batch too much weight.
    """
    items = items_of(backbone, TEMPLATE, RECORDS)
    whole, count = loss(items, scored_by(backbone, items))
    assert count == loss_count(items)
    expected = sum(
        weight * log_prob
        for item in items
        for weight, log_prob in zip(weights(item), by_hand(backbone, item.inputs[0]), strict=True)
    )
    assert math.isclose(float(whole), -expected, rel_tol=1e-5)
    parts = [loss(part, scored_by(backbone, part)) for part in (items[:2], items[2:])]
    assert math.isclose(float(whole), sum(float(value) for value, _ in parts), rel_tol=1e-5)
    assert math.isclose(count, sum(number for _, number in parts))


def test_parts_that_are_scored_at_once_have_the_scores_of_each(causal: Backbone) -> None:
    """Targets that end otherwise, choices with classes, and calibration stand beside each other."""
    named = items_of(causal, "[P*2] [X] is [Y]</s>", RECORDS[:2])
    plain = items_of(causal, TEMPLATE, RECORDS)
    scoring = Scoring(calibrate=True)
    rows = as_questions([{"x": "Kenya", "y": "good"}, {"x": "Mali", "y": "none"}])
    labelled = build_requests(bound(causal, TEMPLATE), rows, AnswerSpace(WORDS, scoring=scoring))
    parts = [plain[:1], labelled, named, plain[1:]]
    sizes = [sum(len(example.logit_positions) for example in inputs_of(part)) for part in parts]
    logits = torch.randn(sum(sizes), causal.vocabulary)
    alone = [score_continuations(part, own) for part, own in zip(parts, logits.split(sizes), strict=True)]
    found = score_parts(parts, logits)
    for part, one, other in zip(parts, alone, found, strict=True):
        torch.testing.assert_close(vars(other), vars(one), rtol=0, atol=1e-6)
        torch.testing.assert_close(loss(part, other), loss(part, one), rtol=1e-6, atol=1e-6)
    assert found[2].more_stop != found[0].more_stop == ()


def test_hits_are_exact_matches_of_the_own_tokens(backbone: Backbone) -> None:
    """Each own token must be the likeliest; the stop token has no say."""
    items = items_of(backbone, TEMPLATE, RECORDS)
    sizes = [len(item.inputs[0].logit_positions) for item in items]
    logits = torch.zeros(sum(sizes), backbone.embedding_rows)
    start = 0
    for item, size in zip(items, sizes, strict=True):
        own = item.choices[0].own_tokens
        for at, token in enumerate(item.choices[0].target_ids[:own]):
            logits[start + at, token] = 9.0
        logits[start + own : start + size, 3] = 9.0  # anything but the stop token
        start += size
    assert hits(items, score_continuations(items, logits)) == [1.0] * len(items)
    logits[0, 4] = 10.0  # the first record's first token is now another one
    assert hits(items, score_continuations(items, logits)) == [0.0] + [1.0] * (len(items) - 1)


def test_candidates_of_one_length_share_their_input(masked: Backbone, causal: Backbone) -> None:
    """Single-token candidates cost one forward pass together; longer ones one each for a causal model."""
    for backbone in (masked, causal):
        filled = bound(backbone, TEMPLATE)
        examples = filled.examples([RECORDS[0]] * len(CANDIDATES), targets=CANDIDATES)
        inputs, choices = share_inputs(examples)
        single = [choice for choice in choices if len(choice.target_ids) == 1]
        assert len(single) >= 3
        assert len({choice.input for choice in single}) == 1
        assert len(inputs) < len(CANDIDATES)
        if backbone.kind == "masked":
            assert len(inputs) == len({len(choice.target_ids) for choice in choices})


@pytest.mark.parametrize("normalise", ["sum", "mean"])
def test_class_scores_equal_a_loop(backbone: Backbone, normalise: str) -> None:
    """Label words: the log of the mean probability of a label's words, several words and tokens each."""
    rows = as_records([{**record, "y": label} for record, label in zip(RECORDS, ["bad", "good", "none"], strict=False)])
    scoring = Scoring("mean" if normalise == "mean" else "sum")
    items = build_requests(bound(backbone, TEMPLATE), as_questions(rows), AnswerSpace(WORDS, scoring=scoring))
    assert [item.answers for item in items] == [(1,), (0,), (2,)]
    scored = scored_by(backbone, items)
    found = class_scores(items, scored)
    filled = bound(backbone, TEMPLATE)
    lengths = set()
    for row, record in enumerate(rows):
        for label, words in enumerate(WORDS.words.values()):
            probabilities = []
            for word in words:
                each = by_hand(backbone, filled.examples([record], targets=[word])[0])
                lengths.add(len(each))
                probabilities.append(math.exp(sum(each) / (len(each) if normalise == "mean" else 1)))
            expected = math.log(sum(probabilities) / len(probabilities))
            assert math.isclose(float(found[row, label]), expected, abs_tol=1e-4)
    assert len(lengths) > 1


def test_label_loss_is_the_cross_entropy_over_classes(backbone: Backbone) -> None:
    """Counted in items; hits follow the likeliest class."""
    rows = as_records([{**record, "y": label} for record, label in zip(RECORDS, ["bad", "good", "none"], strict=False)])
    items = build_requests(bound(backbone, TEMPLATE), as_questions(rows), AnswerSpace(WORDS))
    scored = scored_by(backbone, items)
    scores = class_scores(items, scored).double()
    expected = sum(float(scores[row].logsumexp(0) - scores[row, gold]) for row, gold in enumerate((1, 0, 2)))
    value, count = loss(items, scored)
    assert math.isclose(float(value), expected, rel_tol=1e-5)
    assert count == loss_count(items) == 3
    assert hits(items, scored) == [float(int(scores[row].argmax()) == gold) for row, gold in enumerate((1, 0, 2))]


def test_a_label_that_is_none_of_the_labels(causal: Backbone) -> None:
    """The error names the record and the labels."""
    rows = as_records([{"x": "a", "y": "goood"}])
    with pytest.raises(
        RecordError, match=r"record 1: 'goood' is not one of the labels good, bad, none. Did you mean 'good'"
    ):
        build_requests(bound(causal, TEMPLATE), as_questions(rows), AnswerSpace(WORDS))


CHOICES = AnswerSpace(own_choices=True)
QUESTIONS = Questions(
    [
        Question(RECORDS[0], ("yes", "no", "a good film and a bad one"), (1,)),
        Question(RECORDS[1], ("Nairobi", "great"), (0,)),
        Question(RECORDS[2], ("25", "yes", "no", "São Tomé"), (1, 3)),
    ]
)


def choices_by_hand(backbone: Backbone, question: Question, *, mean: bool, empty: dict[str, str] | None) -> list[float]:
    """Return the log-probability of each choice of a question, each run alone."""
    filled, found = bound(backbone, TEMPLATE), []
    for text in question.choices:
        each = by_hand(backbone, filled.examples([question.record], targets=[text])[0])
        value = sum(each) / (len(each) if mean else 1)
        if empty is not None:
            without = by_hand(backbone, filled.examples([empty], targets=[text])[0])
            value -= sum(without) / (len(without) if mean else 1)
        found.append(value)
    return found


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("calibrate", [False, True])
def test_choices_of_rows_equal_a_loop(backbone: Backbone, mean: bool, calibrate: bool) -> None:
    """Rows with different numbers of choices, of one and of several tokens, some with several right ones; calibrated by
    a record without content."""
    scoring = Scoring("mean" if mean else "sum", calibrate)
    items = build_requests(bound(backbone, TEMPLATE), QUESTIONS, replace(CHOICES, scoring=scoring))
    scored = scored_by(backbone, items)
    found = class_scores(items, scored)
    assert found.shape == (3, 4)
    expected_loss, expected_hits = 0.0, []
    for row, question in enumerate(QUESTIONS):
        values = choices_by_hand(backbone, question, mean=mean, empty={"x": "N/A"} if calibrate else None)
        torch.testing.assert_close(found[row, : len(values)], torch.tensor(values), atol=2e-4, rtol=1e-4)
        assert torch.isneginf(found[row, len(values) :]).all()
        whole = torch.tensor(values).softmax(0)
        expected_loss -= math.log(float(whole[list(question.answers)].sum()))
        expected_hits.append(float(int(whole.argmax()) in question.answers))
    value, count = loss(items, scored)
    assert math.isclose(float(value), expected_loss, rel_tol=1e-3)
    assert count == loss_count(items) == 3
    assert hits(items, scored) == expected_hits


def test_the_loss_of_ragged_choices_has_whole_gradients(causal: Backbone) -> None:
    """Classes that an item does not have are minus infinity, and no gradient may become a NaN from them."""
    items = build_requests(bound(causal, TEMPLATE), QUESTIONS, replace(CHOICES, scoring=Scoring(calibrate=True)))
    vectors = vectors_of(causal).requires_grad_(True)
    value, _ = loss(items, score_continuations(items, target_logits(causal, inputs_of(items), PromptBatch(vectors))))
    value.backward()
    assert vectors.grad is not None
    assert vectors.grad.isfinite().all()
    assert vectors.grad.abs().sum() > 0


def test_fields_that_hold_no_content_stay_in_an_empty_record() -> None:
    record = {"premise": "The vase broke", "question": "because", "after": ""}
    assert Scoring(keep=("question",)).empty_record(record) == {"premise": "N/A", "question": "because", "after": ""}


def test_an_empty_record_is_filled_once_for_all_rows(causal: Backbone) -> None:
    rows = as_records([{**record, "y": "bad"} for record in RECORDS])
    items = build_requests(
        bound(causal, TEMPLATE), as_questions(rows), AnswerSpace(WORDS, scoring=Scoring(calibrate=True))
    )
    last = [item.inputs[item.empty[0].input] for item in items]
    assert all(one is last[0] for one in last)
    assert all(len(item.empty) == len(item.choices) for item in items)


@pytest.mark.parametrize("calibrate", [False, True])
def test_the_words_of_a_long_record_are_scored_behind_one_context(causal: Backbone, calibrate: bool) -> None:
    """Cut for the longest word: otherwise a label would win because its words leave more of the record."""
    rows = as_questions([{"x": "a film " * 60, "y": "bad"}])
    words = LabelWords({"good": ("great", "a good film and not a bad one"), "bad": ("terrible",)})
    item = build_requests(bound(causal, TEMPLATE), rows, AnswerSpace(words, scoring=Scoring(calibrate=calibrate)))[0]
    inputs = [item.inputs[choice.input] for choice in item.choices]
    assert all(one.shortened for one in inputs)
    assert len({one.token_ids[: one.logit_positions[0] + 1] for one in inputs}) == 1


def test_errors_name_the_row_and_not_its_place_among_all_choices(causal: Backbone) -> None:
    asked = Questions([*QUESTIONS, Question({"y": "a"}, ("a", "b"), (0,))], name="f.jsonl")
    with pytest.raises(TemplateError, match=r"no field 'x' in f.jsonl, record 4, answer 1"):
        build_requests(bound(causal, TEMPLATE), asked, CHOICES)
    with pytest.raises(RecordError, match="in memory, row 2 has no choices"):
        build_requests(bound(causal, TEMPLATE), Questions([QUESTIONS[0], Question({"x": "a", "y": "b"})]), CHOICES)


def test_choices_that_the_tokenizer_does_not_tell_apart_are_no_hits(masked: Backbone) -> None:
    """Whichever comes first; two right ones with the same tokens are as good as one."""

    def question(*choices: str, right: int = 0, also: int | None = None) -> Question:
        answers = (right,) if also is None else (right, also)
        return Question({"x": "Kenya", "y": choices[right]}, choices, answers)

    asked = [
        question("a film", "a  film", "yes"),
        question("a film", "a  film", "yes", right=1),
        question("a film", "a  film", "yes", also=1),
        question("a film", "a  film", "yes", right=2),
        question("\U0001f642", "yes"),
        question("\U0001f642", "yes", right=1),
    ]
    items = build_requests(bound(masked, TEMPLATE), Questions(asked), AnswerSpace(own_choices=True))
    assert [sorted(item.distinguishable) for item in items] == [[], [], [0, 1], [2], [], [1]]
    right = [float(place in item.answers) for item in items for place in range(len(item.choices))]
    sure = replace(scored_by(masked, items), log_probs=torch.tensor(right))  # of all right choices
    assert hits(items, sure) == [0.0, 0.0, 1.0, 1.0, 0.0, 1.0]


def test_a_target_that_the_tokenizer_does_not_know_is_no_hit_though_its_token_is_written(masked: Backbone) -> None:
    items = items_of(masked, TEMPLATE, [{"x": "Kenya", "y": "yes"}, {"x": "Kenya", "y": "\U0001f642"}])
    sure = replace(scored_by(masked, items), correct=torch.tensor([True, True]))
    assert hits(items, sure) == [1.0, 0.0]


def test_label_words_that_are_the_same_tokens_are_refused_wherever_they_are_scored(masked: Backbone) -> None:
    words = LabelWords({"a": "a film", "b": "a  film"})
    asked = as_questions([{"x": "Kenya", "y": "a"}])
    for labelled in (True, False):
        with pytest.raises(LabelWordError, match="have the same token ids"):
            build_requests(bound(masked, "[X] is [Y]"), asked, AnswerSpace(words), labelled=labelled)


def test_an_end_that_the_template_names_weighs_as_any_token(causal: Backbone) -> None:
    """As a chat's does: who does not write it goes on to speak for the user."""
    records: list[Record] = [{"x": "Kenya", "y": "Nairobi"}]
    (plain,), (named,) = (items_of(causal, f"[P*2] [X] is [Y]{end}", records) for end in ("", "</s>"))
    assert named.choices[0].target_ids[-1] == causal.tokenizer.special_ids["</s>"]
    own = named.choices[0].own_tokens
    assert (loss_count([plain]), loss_count([named])) == (own + STOP_WEIGHT, own + 1)
    logits = torch.randn(len(named.inputs[0].logit_positions), causal.vocabulary)
    scored = score_continuations([named], logits)
    total, count = loss([named], scored)
    torch.testing.assert_close(total, -scored.all_log_probs.sum())
    assert count == own + 1
