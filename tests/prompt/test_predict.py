"""Using prompts: the invariants *Fast = slow* and *Alone or in company* (docs/invariants.md), and what a user may do
wrong or strangely.
"""

import itertools
import pickle
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.forward import Memory
from ptuning.backbone.lora import add_adapters
from ptuning.backbone.trained_weights import TrainedWeights, trained_parameters
from ptuning.config import TrainBackbone
from ptuning.data.task_files import TaskFile
from ptuning.engine import batch as batch_module
from ptuning.engine.decoding import DecodingState
from ptuning.engine.forward import target_logits
from ptuning.errors import BackboneError, ConfigError, PromptError, RecordError, TemplateError
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prediction import Candidate, Prediction
from ptuning.prompt.prompt import Prompt
from ptuning.prompt.storage import BackboneId
from ptuning.records import Record
from ptuning.template.encode import Example
from ptuning.template.labels import LabelWords, Normalise
from tests.conftest import CAUSAL, CONTEXT, MASKED, RECORDS, bound, learned, small_memory

TEMPLATE = "[P*2] [X] is [P] [Y]"
CANDIDATES = ["yes", "no", "Nairobi", "São Tomé", "a good film and a bad one", "25", "great"]
WORDS = LabelWords({"good": ("great", "a good film"), "bad": ("terrible",), "none": ("25", "no", "Paris and Lima")})


def with_labels(prompt: Prompt) -> Prompt:
    """Return a prompt with this file's label words."""
    return Prompt(prompt.template, prompt.slot_vectors, prompt.backbone, label_words=WORDS, method="test")


@torch.no_grad()
def next_log_probs(backbone: Backbone, prompt: Prompt, context: Example, written: Sequence[int]) -> Tensor:
    """Return the log-probabilities after a context and some written tokens, without a cache and alone."""
    ids = (*context.token_ids, *written)
    row = Example(ids, context.slot_positions, (len(ids) - 1,), (), 0)
    logits = target_logits(backbone, [row], prompt.learned(backbone))[0]
    return logits.log_softmax(-1)[: backbone.vocabulary]


def text_of(backbone: Backbone, ids: Sequence[int]) -> str:
    """Return a beam's text."""
    return backbone.tokenizer.decode([token for token in ids if token not in backbone.tokenizer.end_ids]).strip()


def same(one: Sequence[Prediction], other: Sequence[Prediction]) -> None:
    """Check that predictions are equal up to rounding."""
    assert [found.text for found in one] == [found.text for found in other]
    assert [found.tokens for found in one] == [found.tokens for found in other]
    for a, b in zip(one, other, strict=True):
        assert [c.text for c in a.candidates] == [c.text for c in b.candidates]
        assert [c.log_prob for c in a.candidates] == pytest.approx([c.log_prob for c in b.candidates], abs=1e-3)


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"do_sample": True}], ids=str)
def test_more_alternatives_do_not_change_the_answer(backbone: Backbone, settings: dict[str, object]) -> None:
    """The first answer is that of the settings alone, however many others are asked for; all of them differ."""
    prompt, model = learned(backbone, TEMPLATE), PromptModel(backbone)
    settings = {"max_new_tokens": 4, **settings}
    alone = model.predict(RECORDS, prompt, generation=settings)
    for top_k in (2, 5):
        wide = model.predict(RECORDS, prompt, top_k=top_k, generation=settings)
        assert [(one.text, one.log_prob) for one in wide] == [(one.text, one.log_prob) for one in alone]
        assert any(len(answer.candidates) > 1 for answer in wide)
        for answer in wide:
            texts = [candidate.text for candidate in answer.candidates]
            assert len(set(texts)) == len(texts) <= top_k


@pytest.mark.parametrize("top_k", [1, 3])
def test_written_answers_alone_equal_those_in_company(backbone: Backbone, top_k: int) -> None:
    """Invariant *Alone or in company*: what is written depends neither on the rows beside it nor on their order."""
    prompt = learned(backbone, TEMPLATE)
    model = PromptModel(backbone)
    how: dict[str, Any] = {"top_k": top_k, "generation": {"max_new_tokens": 8}}
    together = model.predict(RECORDS, prompt, **how)
    same(together, [model.predict([record], prompt, **how)[0] for record in RECORDS])
    order = random.Random(0).sample(range(len(RECORDS)), len(RECORDS))
    shuffled = model.predict([RECORDS[index] for index in order], prompt, **how)
    same(shuffled, [together[index] for index in order])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("top_k", [1, 3])
def test_batches_that_do_not_fit_into_memory_are_halved_with_the_same_answers(
    backbone: Backbone, top_k: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Written answers, ranks and logits; it is said, and a row that does not fit alone is an error."""
    prompt, model = learned(backbone, "[P*2] [X] [P:is] [Y]"), PromptModel(backbone)

    def answers() -> tuple[list[Prediction], list[list[Candidate]], list[Tensor]]:
        return (
            model.predict(RECORDS, prompt, top_k=top_k, generation={"max_new_tokens": 3}),
            model.rank(RECORDS, prompt, ["yes", "no", "a good film"]),
            model.target_logits(RECORDS, prompt),
        )

    wanted = answers()
    longest = max(len(row.token_ids) for row in bound(backbone, "[P*2] [X] [P:is] [Y]").examples(RECORDS))
    ran = small_memory(monkeypatch, 4 * longest)
    found = answers()
    assert max(ran) <= 4 * longest
    assert [[one.text for one in row.candidates] for row in found[0]] == [
        [one.text for one in row.candidates] for row in wanted[0]
    ]
    for rows, others in zip(found[1], wanted[1], strict=True):
        assert [one.text for one in rows] == [one.text for one in others]
        assert [one.log_prob for one in rows] == pytest.approx([one.log_prob for one in others], abs=1e-4)
    for one, other in zip(found[2], wanted[2], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4 * float(other.abs().max()))
    assert "too little memory for a pass" in caplog.text
    small_memory(monkeypatch, 2)
    with pytest.raises(BackboneError, match="does not fit into the memory of cpu"):
        answers()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_row_near_the_end_of_the_context_does_not_stop_its_neighbours(backbone: Backbone) -> None:
    """Invariant *Alone or in company*: each row writes until its own context is full."""
    prompt = learned(backbone, "[P] [X] [Y]")
    long = "a" * 200
    rows: list[Record] = [{"x": long[: CONTEXT * 4]}, {"x": "Kenya"}]
    lengths = [len(example.token_ids) for example in bound(backbone, "[P] [X] [Y]").contexts(rows)]
    assert lengths[0] > 8 * lengths[1]
    model = PromptModel(backbone)
    how = {"max_new_tokens": 12, "num_beams": 2}
    together = model.predict(rows, prompt, generation=how, top_k=2)
    same(together, [model.predict([row], prompt, generation=how, top_k=2)[0] for row in rows])


@pytest.mark.parametrize("family", ["gpt2"])
def test_answers_end_at_the_end_of_the_context(backbone: Backbone) -> None:
    """No position beyond the table is asked for; the last token needs no position of its own."""
    prompt = Prompt.manual("{x!} [Y]")
    backbone.tokenizer.end_ids = frozenset()
    rows: list[Record] = [{"x": "'" * (CONTEXT - spare)} for spare in (0, 1, 3, 60)]
    lengths = [len(example.token_ids) for example in bound(backbone, "{x!} [Y]").contexts(rows)]
    assert lengths[0] == CONTEXT
    found = PromptModel(backbone).predict(rows, prompt, generation={"max_new_tokens": 20})
    assert [answer.tokens for answer in found] == [min(20, CONTEXT - length + 1) for length in lengths]
    with pytest.raises(TemplateError, match="record 2 does not fit"):
        PromptModel(backbone).predict([{"x": "a"}, {"x": "'" * (CONTEXT + 1)}], prompt)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_long_text_leaves_room_for_the_answer(backbone: Backbone) -> None:
    """Invariant *Only marked fields shrink*: a field is cut until the whole answer fits, not its first token alone."""
    backbone.tokenizer.end_ids = frozenset()
    found = PromptModel(backbone).predict(
        [{"x": "Nairobi 25 " * 100}], Prompt.manual("[X] is [Y]"), generation={"max_new_tokens": 9}
    )
    assert found[0].tokens == 9


def test_an_answer_may_end_at_once(causal: Backbone) -> None:
    """A beam whose first token is the stop token is an empty answer; other beams go on beside it."""
    prompt = learned(causal, TEMPLATE)
    first = bound(causal, TEMPLATE).contexts(RECORDS[:1])[0]
    causal.tokenizer.end_ids = frozenset({int(next_log_probs(causal, prompt, first, []).argmax())})
    found = PromptModel(causal).predict(RECORDS[:1], prompt)[0]
    assert (found.text, found.tokens) == ("", 0)
    how = {"max_new_tokens": 4, "num_beams": 3}
    assert len(PromptModel(causal).predict(RECORDS[:1], prompt, top_k=3, generation=how)[0].candidates) > 1


@pytest.mark.parametrize("family", CAUSAL)
def test_an_answer_of_one_line_ends_with_its_line(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line break ends an answer, but not before it has begun; a prompt whose targets have several lines goes on."""
    prompt = learned(backbone, TEMPLATE)
    whole = PromptModel(backbone).predict(
        RECORDS[:1], replace(prompt, multiline=True), generation={"max_new_tokens": 6}
    )[0]
    context, ids = bound(backbone, TEMPLATE).contexts(RECORDS[:1])[0], list[int]()
    for _ in range(3):
        ids.append(int(next_log_probs(backbone, prompt, context, ids).argmax()))
    plain = backbone.tokenizer.decode

    def broken(tokens: Sequence[int]) -> str:
        """Let the third token written be a line break, and the first one, too."""
        return "".join("\n" if token in (ids[0], ids[2]) else f"<{plain([token])}>" for token in tokens)

    monkeypatch.setattr(backbone.tokenizer, "decode", broken)
    short = PromptModel(backbone).predict(RECORDS[:1], prompt, generation={"max_new_tokens": 6})[0]
    several = PromptModel(backbone).predict(
        RECORDS[:1], replace(prompt, multiline=True), generation={"max_new_tokens": 6}
    )[0]
    assert whole.tokens == several.tokens == 6
    assert "\n" not in short.text
    if len({*ids[:3]}) == 3:
        assert short.text == f"<{plain([ids[1]])}>"
        assert several.text.startswith(short.text + "\n")


@pytest.mark.parametrize("family", MASKED)
def test_masks_are_filled_as_by_hand(backbone: Backbone) -> None:
    """A masked model takes the number of masks whose likeliest tokens are likeliest on average."""
    prompt = learned(backbone, "[P*2] [X] is [P] [Y] .")
    filled = bound(backbone, str(prompt.template))
    found = PromptModel(backbone).predict(RECORDS, prompt, top_k=3, generation={"max_new_tokens": 4})
    for record, answer in zip(RECORDS, found, strict=True):
        tried: list[tuple[float, str, int]] = []
        for count in (1, 2, 3, 4):
            context = filled.contexts([record], target_tokens=count)[0]
            with torch.no_grad():
                logits = target_logits(backbone, [context], prompt.learned(backbone))
            values, tokens = logits.log_softmax(-1)[:, : backbone.vocabulary].topk(3, dim=-1)
            for place in range(3) if count == 1 else (0,):
                text = backbone.tokenizer.decode(tokens[:, place].tolist()).strip()
                tried.append((float(values[:, place].mean()), text, count))
        tried.sort(key=lambda entry: -entry[0])
        assert [c.text for c in answer.candidates] == [text for _, text, _ in tried[:3]]
        assert (answer.text, answer.tokens) == (tried[0][1], tried[0][2])


@pytest.mark.parametrize("family", MASKED)
def test_masks_that_do_not_fit_are_not_tried(backbone: Backbone) -> None:
    """A nearly full context leaves room for one mask only, which is an answer and no error."""
    text = "a " * (CONTEXT - 4)
    filled = bound(backbone, "{x!} [Y]")
    room = CONTEXT - len(filled.contexts([{"x": text.strip()}])[0].token_ids)
    assert 0 <= room < 8
    found = PromptModel(backbone).predict(
        [{"x": text.strip()}], Prompt.manual("{x!} [Y]"), generation={"max_new_tokens": 20}
    )[0]
    assert found.tokens is not None
    assert found.tokens <= room + 1
    rows: list[Record] = [{"x": "a"}, {"x": text.strip()}]
    together = PromptModel(backbone).predict(rows, Prompt.manual("{x!} [Y]"), generation={"max_new_tokens": 20})
    same(
        together,
        [
            PromptModel(backbone).predict([row], Prompt.manual("{x!} [Y]"), generation={"max_new_tokens": 20})[0]
            for row in rows
        ],
    )
    with pytest.raises(TemplateError, match="record 2 does not fit"):
        PromptModel(backbone).predict([{"x": "a"}, {"x": "a " * 2 * CONTEXT}], Prompt.manual("{x!} [Y]"))


@torch.no_grad()
def log_probs_of(backbone: Backbone, prompt: Prompt, record: Record, text: str) -> list[float]:
    """Return a text's log-probability token by token, alone."""
    example = bound(backbone, str(prompt.template)).examples([record], targets=[text])[0]
    logits = target_logits(backbone, [example], prompt.learned(backbone)).log_softmax(-1)
    return [float(logits[at, token]) for at, token in enumerate(example.target_ids)]


@pytest.mark.parametrize("normalise", ["sum", "mean"])
def test_ranks_equal_one_forward_per_candidate(backbone: Backbone, normalise: str) -> None:
    """Invariant *Fast = slow*: all records at once rank as with one forward pass per candidate.

    Candidates of one and several tokens, by total and by mean.
    """
    prompt = learned(backbone, TEMPLATE)
    found = PromptModel(backbone).rank(RECORDS, prompt, CANDIDATES, normalise=normalise)  # type: ignore[arg-type]
    for record, row in zip(RECORDS, found, strict=True):
        expected = {}
        for text in CANDIDATES:
            each = log_probs_of(backbone, prompt, record, text)
            expected[text] = sum(each) / (len(each) if normalise == "mean" else 1)
        assert {c.text: c.log_prob for c in row} == pytest.approx(expected, abs=1e-4)
        assert [c.log_prob for c in row] == sorted(expected.values(), reverse=True) or [c.text for c in row] == sorted(
            CANDIDATES, key=lambda text: -expected[text]
        )


@pytest.mark.parametrize("normalise", ["sum", "mean"])
def test_the_end_of_each_candidate_counts_if_asked_for(backbone: Backbone, normalise: Normalise) -> None:
    """Else a candidate that begins another could never lose to it. A masked model has no end to learn."""
    names, prompt = ["a good film", "a good film and a bad one", "yes"], learned(backbone, TEMPLATE)
    found = PromptModel(backbone).rank(
        RECORDS[:2], replace(prompt, learned_to_stop=True), names, normalise=normalise, count_stop=True
    )
    for record, row in zip(RECORDS, found, strict=False):
        for one in row:
            fill = bound(backbone, TEMPLATE)
            example = fill.examples([record], targets=[one.text], with_stop=True)[0]
            assert (example.target_ids[-1] == fill.stop_id) == (backbone.kind == "causal")
            logits = target_logits(backbone, [example], prompt.learned(backbone)).log_softmax(-1)
            each = [float(logits[at, token]) for at, token in enumerate(example.target_ids)]
            assert one.log_prob == pytest.approx(sum(each) / (len(each) if normalise == "mean" else 1), abs=1e-4)
    with pytest.raises(ConfigError, match=r"count_stop is for prompts that were trained to stop"):
        PromptModel(backbone).rank(RECORDS[:2], prompt, names, count_stop=True)
    plain = PromptModel(backbone).rank(RECORDS[:2], prompt, names, normalise=normalise)
    assert (found == plain) == (backbone.kind == "masked")


def test_predict_takes_the_first_candidates(backbone: Backbone) -> None:
    """``top_k`` of the ranked ones; more than there are is all of them."""
    prompt = learned(backbone, TEMPLATE)
    model = PromptModel(backbone)
    ranked = model.rank(RECORDS, prompt, CANDIDATES)
    for top_k in (1, 3, 100):
        found = model.predict(RECORDS, prompt, CANDIDATES, top_k=top_k)
        assert [answer.candidates for answer in found] == [tuple(row[:top_k]) for row in ranked]
        assert [answer.text for answer in found] == [row[0].text for row in ranked]
        assert {answer.tokens for answer in found} == {None}


def test_equal_scores_keep_the_order_given(causal: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tie rule of ``rank``."""

    def level(_: object, records: Sequence[tuple[Sequence[Example], object]]) -> list[list[float]]:
        return [[-1.0 * len(example.target_ids) for example in own] for own, _ in records]

    monkeypatch.setattr("ptuning.engine.runner.tree_log_probs", level)
    for order in itertools.permutations(["yes", "no", "25"]):
        mean = PromptModel(causal).rank(RECORDS, learned(causal, TEMPLATE), order, normalise="mean")
        assert [c.text for c in mean[0]] == list(order)


def test_many_candidates_of_many_lengths_in_bounded_passes(causal: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's 300 candidates: no forward pass outgrows its bounds, however many one record has."""
    letters = "abcdefgh"
    candidates = ["".join(letters[(i // 8**k) % 8] for k in range(1 + i % 12)) + str(i) for i in range(300)]
    sizes = []
    real = causal.run

    def spy(embeddings: Tensor, **named: Any) -> tuple[Tensor, Memory | None]:
        sizes.append((embeddings.shape[:2].numel(), len(named["rows"])))
        return real(embeddings, **named)

    monkeypatch.setattr(causal, "run", spy)
    monkeypatch.setattr(batch_module, "MAX_BATCH_TOKENS", 400)
    monkeypatch.setattr(batch_module, "MAX_BATCH_POSITIONS", 100)
    prompt = learned(causal, TEMPLATE)
    found = PromptModel(causal).rank(RECORDS[:2], prompt, candidates)
    assert max(tokens for tokens, _ in sizes) <= 400
    assert max(positions for _, positions in sizes) <= 100
    for record, row in zip(RECORDS, found, strict=False):
        assert sorted(c.text for c in row) == sorted(candidates)
        for candidate in (row[0], row[150], row[-1]):
            expected = sum(log_probs_of(causal, prompt, record, candidate.text))
            assert candidate.log_prob == pytest.approx(expected, abs=1e-3)


def test_predict_chooses_a_label(backbone: Backbone) -> None:
    """A prompt with label words answers with a label; candidates given by the caller win over them."""
    prompt = with_labels(learned(backbone, TEMPLATE))
    model = PromptModel(backbone)
    found = model.predict(RECORDS, prompt, top_k=2)
    assert [answer.candidates for answer in found] == [tuple(row[:2]) for row in model.classify(RECORDS, prompt)]
    assert {answer.text for answer in model.predict(RECORDS, prompt, ["yes", "no"])} <= {"yes", "no"}


def test_mixed_prompts_equal_single_ones(backbone: Backbone) -> None:
    """Invariants *Alone or in company* and *Fast = slow*: each row is answered with its own prompt, or with none.

    Rows [A, B, none, A, labels] in one call, by every way of using them.
    """
    a, b = learned(backbone, "[P*3] [X] [P*3] [Y]", seed=1), learned(backbone, "[P:about] {x} [P] so [Y]", seed=2)
    prompts = [a, b, Prompt.manual("The capital of [X] is [Y]"), a, with_labels(b)]
    model = PromptModel(backbone)
    for candidates, top_k in ((None, 1), (CANDIDATES, 3)):
        together = model.predict(RECORDS, prompts, candidates, top_k=top_k)
        alone = [
            model.predict([row], [prompt], candidates, top_k=top_k)[0]
            for row, prompt in zip(RECORDS, prompts, strict=True)
        ]
        same(together, alone)
    ranked = model.rank(RECORDS, prompts, CANDIDATES)
    for row, prompt, found in zip(RECORDS, prompts, ranked, strict=True):
        single = model.rank([row], prompt, CANDIDATES)[0]
        assert {c.text: c.log_prob for c in found} == pytest.approx({c.text: c.log_prob for c in single}, abs=1e-4)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"do_sample": True, "temperature": 0.8}], ids=str)
def test_prompts_of_one_batch_write_together(
    causal: Backbone, settings: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Invariant *Alone or in company*: rows of several prompts, and of none, are written in the same passes, each up to
    its own prompt's length and with its own rule for line breaks.
    """
    long = replace(learned(causal, "[P*3] [X] [P*3] [Y]", seed=1), target_tokens=5, multiline=True)
    short = replace(learned(causal, "[P:about] {x} [P] so [Y]", seed=2), target_tokens=1)
    prompts = [long, short, Prompt.manual("The capital of [X] is [Y]"), long, short]
    model = PromptModel(causal)
    alone = [model.predict([row], prompt, generation=settings)[0] for row, prompt in zip(RECORDS, prompts, strict=True)]
    passes = []
    run = DecodingState.__init__

    def counted(self: DecodingState, backbone: Backbone, examples: Sequence[Example], *args: Any, **named: Any) -> None:
        passes.append(len(examples))
        run(self, backbone, examples, *args, **named)

    monkeypatch.setattr(DecodingState, "__init__", counted)
    together = model.predict(RECORDS, prompts, generation=settings)
    same(together, alone)
    assert passes == [len(RECORDS)]
    assert max(one.tokens or 0 for one in (together[1], together[4])) <= 3


def test_targets_are_not_looked_at(backbone: Backbone) -> None:
    """Prediction reads the fields of the template only."""
    prompt = learned(backbone, TEMPLATE)
    model = PromptModel(backbone)
    bare: list[Record] = [{"x": record["x"]} for record in RECORDS]
    same(model.predict(RECORDS, prompt), model.predict(bare, prompt))
    same(model.predict(RECORDS, prompt, CANDIDATES), model.predict(bare, prompt, CANDIDATES))


def test_zero_records(backbone: Backbone) -> None:
    """Nothing in, nothing out."""
    prompt = with_labels(learned(backbone, TEMPLATE))
    model = PromptModel(backbone)
    assert model.predict([], prompt) == model.predict([], prompt, CANDIDATES) == []
    assert model.rank([], prompt, CANDIDATES) == model.classify([], prompt) == model.target_logits([], prompt) == []


@pytest.mark.parametrize(
    ("use", "error", "fact"),
    [
        (lambda m, p: m.predict(RECORDS, p, []), RecordError, "no candidates"),
        (lambda m, p: m.rank(RECORDS, p, ["yes", " "]), RecordError, "empty"),
        (lambda m, p: m.rank(RECORDS, p, ["a", "\ud800"]), RecordError, "ud800"),
        (lambda m, p: m.rank(RECORDS, p, [1999, 2000]), RecordError, "1999"),
        (lambda m, p: m.rank(RECORDS, p, "yes"), RecordError, "'yes'"),
        (lambda m, p: m.rank(RECORDS, p, ["yes", "no", "yes"]), RecordError, "'yes'"),
        (lambda m, p: m.predict(RECORDS, p, ["yes", "no"], normalise="avg"), ConfigError, "'avg'"),
        (lambda m, p: m.predict(RECORDS, p, ["yes", "no"], calibrate=True), ConfigError, "label words"),
        (lambda m, p: m.predict(RECORDS, p, normalise="mean"), ConfigError, "closed set"),
        (lambda m, p: m.predict(RECORDS, p, calibrate=True), ConfigError, "label words"),
        (lambda m, p: m.classify(RECORDS, with_labels(p), normalise="avg"), ConfigError, "'avg'"),
        (lambda m, p: m.predict(RECORDS, p, top_k=0), RecordError, "top_k is 0"),
        (lambda m, p: m.predict(RECORDS, p, generation={"top_p": 2.0}), ConfigError, "'top_p' is 2.0"),
        (lambda m, p: m.stream(RECORDS[0], with_labels(p)), PromptError, "labels"),
        (lambda m, p: m.stream(RECORDS[0], p, generation={"num_beams": 2}), ConfigError, "num_beams is 2"),
        (lambda m, p: m.predict(RECORDS, p, ["a"], generation={"num_beams": 2}), ConfigError, "num_beams"),
        (lambda m, p: m.predict(RECORDS, with_labels(p), generation={"num_beams": 2}), ConfigError, "num_beams"),
        (lambda m, p: m.predict(RECORDS, [p]), PromptError, "1 prompts for 5"),
        (lambda m, p: m.classify(RECORDS, p), PromptError, "no label words"),
        (lambda m, p: m.target_logits([{"x": "a"}], p), RecordError, "no target"),
        (lambda m, p: m.target_logits([{"y": "a"}], p), TemplateError, "'x'"),
        (lambda m, p: m.predict([{"z": "a"}], p), TemplateError, "'x'"),
        (lambda m, p: m.rank([{"x": "a"}], p, ["yes", "1 " * CONTEXT]), TemplateError, "does not fit"),
    ],
)
def test_what_a_user_may_do_wrong(
    causal: Backbone, use: Callable[[PromptModel, Prompt], object], error: type[Exception], fact: str
) -> None:
    with pytest.raises(error, match=fact):
        use(PromptModel(causal), learned(causal, TEMPLATE))


@pytest.mark.parametrize(
    "template",
    [
        "[P] [Y]",
        "[P:Zürich, São Tomé:] [Y]",
        "{a} [P] {b!} [Y]",
        "[X][X][P][Y]",
        "{{[[[P]]] [X] [Y] .",
        "   [P]   [X]\n\n[Y]",
        "[P*40] [Y]",
        "[X] [P] [Y] . And then [X] again, twice.",
    ],
)
def test_strange_templates(backbone: Backbone, template: str) -> None:
    """Without fields, with many, with [Y] in the middle: everything that parses can be used, alone as in company."""
    prompt = learned(backbone, template)
    model = PromptModel(backbone)
    rows: list[Record] = [
        {"x": text, "a": "", "b": "ß\t東京", "y": "yes"} for text in ("", "東京", "a  b", "[P*3] [Y]")
    ]
    short = {"max_new_tokens": 3}
    same(
        model.predict(rows, prompt, top_k=2, generation=short),
        [model.predict([row], prompt, top_k=2, generation=short)[0] for row in rows],
    )
    same(
        model.predict(rows, prompt, ["yes", "東京", "no"]),
        [model.predict([row], prompt, ["yes", "東京", "no"])[0] for row in rows],
    )


def test_a_target_in_front(backbone: Backbone) -> None:
    """[Y] first: a masked model can, a causal one says why not unless its tokenizer starts with a BOS."""
    model = PromptModel(backbone)
    rows: list[Record] = [{"x": "Kenya", "y": "yes"}]
    if backbone.kind == "causal" and not backbone.tokenizer.prefix_ids:
        with pytest.raises(TemplateError, match=r"a causal model needs something before \[Y\]"):
            model.predict(rows, Prompt.manual("[Y] is the capital of [X]"))
        return
    assert model.predict(rows, Prompt.manual("[Y] is the capital of [X]"))[0].text is not None
    assert model.target_logits(rows, Prompt.manual("[Y] is the capital of [X]"))[0].isfinite().all()


def test_a_long_text_is_shortened_and_answered(backbone: Backbone) -> None:
    """Invariant *Only marked fields shrink*: slots and literals survive a text of thousands of tokens."""
    prompt = learned(backbone, "[P*2] {x} is [P] [Y]")
    model = PromptModel(backbone)
    rows: list[Record] = [{"x": "Nairobi 25 " * 700, "y": "yes"}, {"x": "a", "y": "no"}]
    short = {"max_new_tokens": 4}
    alone = [model.predict([row], prompt, generation=short)[0] for row in rows]
    same(model.predict(rows, prompt, generation=short), alone)
    assert model.target_logits(rows, prompt)[0].isfinite().all()


def test_more_beams_than_words(causal: Backbone) -> None:
    """A beam per token of the vocabulary is the most there can be."""
    found = PromptModel(causal).predict(
        RECORDS[:1], learned(causal, TEMPLATE), top_k=10_000, generation={"max_new_tokens": 1}
    )[0]
    every = {text_of(causal, [token]) for token in range(causal.vocabulary)}
    assert {candidate.text for candidate in found.candidates} == every - {"\n"}


def test_a_vocabulary_padded_in_the_model(backbone: Backbone) -> None:
    """Rows of the embedding table that no token has are never written, and take their share of probability."""
    backbone.vocabulary -= 40
    prompt = learned(backbone, TEMPLATE)
    allowed = {backbone.tokenizer.decode([token]).strip() for token in range(backbone.vocabulary)}
    single = PromptModel(backbone).predict(RECORDS, prompt, generation={"max_new_tokens": 1})
    assert all(answer.text in allowed for answer in single)


def with_weights(
    backbone: Backbone, prompt: Prompt, *, train_backbone: TrainBackbone = "lora", scale: float = 0.1
) -> Prompt:
    """Return a prompt with trained weights of its own."""
    other = backbone.copy(share=train_backbone == "lora")
    if train_backbone == "lora":
        add_adapters(other.model, rank=2, alpha=4.0, targets="all-linear", seed=0)
    with torch.no_grad():
        for weight in trained_parameters(other, train_backbone).values():
            weight.add_(scale)
    other.freeze()
    return replace(
        prompt,
        backbone=prompt.backbone or BackboneId.of(backbone),
        weights=TrainedWeights.of(other, backbone, train_backbone=train_backbone, keep="difference"),
    )


def test_prompts_with_trained_weights_of_their_own_in_one_batch(backbone: Backbone) -> None:
    """Invariant *Fast = slow*: each row is answered by its own prompt's weights.

    Where the prompt has none, the frozen backbone answers.
    """
    plain = learned(backbone, TEMPLATE)
    prompts = [
        plain,
        with_weights(backbone, plain),
        with_weights(backbone, plain, scale=0.2),
        with_weights(backbone, plain, train_backbone="full"),
        with_weights(backbone, Prompt.manual("[X] is [Y]")),
        Prompt.manual("[X] is [Y]"),
    ]
    model = PromptModel(backbone)
    data = [{"x": "Kenya", "y": "Nairobi"}] * len(prompts)
    before = {name: weight.clone() for name, weight in backbone.model.state_dict().items()}
    together, ranked = model.target_logits(data, prompts), model.rank(data, prompts, CANDIDATES)
    written = model.predict(data, prompts, generation={"max_new_tokens": 2})
    for index, prompt in enumerate(prompts):
        alone = PromptModel(backbone)
        torch.testing.assert_close(together[index], alone.target_logits(data[:1], prompt)[0], atol=1e-5, rtol=0)
        scores = {one.text: one.log_prob for one in alone.rank(data[:1], prompt, CANDIDATES)[0]}
        assert {one.text: one.log_prob for one in ranked[index]} == pytest.approx(scores, abs=1e-4)
        assert alone.predict(data[:1], prompt, generation={"max_new_tokens": 2})[0].text == written[index].text
    for one, other in itertools.combinations(together, 2):
        assert not torch.allclose(one, other, atol=1e-3)
    assert all(torch.equal(weight, before[name]) for name, weight in backbone.model.state_dict().items())


def test_a_model_is_adapted_once_for_each_prompt_in_use(causal: Backbone) -> None:
    prompt = with_weights(causal, learned(causal, TEMPLATE))
    model = PromptModel(causal)
    first = model.for_prompt(prompt)
    assert model.for_prompt(replace(prompt, method="other")) is first
    assert first.for_prompt(prompt) is first
    assert model.for_prompt(learned(causal, TEMPLATE)) is model
    assert len(model._adapted) == 1
    del prompt
    assert len(model._adapted) == 0


# ------------------------------------------------------------------------------------------- choices, calibration

CHOICE_TASK = TaskFile.parse(
    """
name = "choose"
version = "1"
normalise = "mean"
[choices]
from = ["first", "second", "more[]"]
[[patterns]]
manual = "[X] is [Y]"
"""
)
ROWS = [
    {"x": "Kenya", "first": "Nairobi", "second": "a good film and a bad one", "more": ["yes", "25"], "label": 0},
    {"x": "the movie", "first": "great", "second": "São Tomé", "more": [], "label": 1},
]


def choosing(backbone: Backbone) -> Prompt:
    """Return a learned prompt that chooses among what rows bring."""
    return replace(learned(backbone, TEMPLATE), task=CHOICE_TASK)


@pytest.mark.parametrize("normalise", ["sum", "mean"])
@pytest.mark.parametrize("calibrate", [False, True])
def test_choices_of_rows_equal_a_loop(backbone: Backbone, normalise: str, calibrate: bool) -> None:
    """Rows with different numbers of choices in one batch; what a record of "N/A" scores may be taken off."""
    prompt, asked = choosing(backbone), CHOICE_TASK.read_rows(ROWS, labelled=False)
    found = PromptModel(backbone).classify(asked, prompt, normalise=normalise, calibrate=calibrate)  # type: ignore[arg-type]
    for question, row in zip(asked, found, strict=True):
        scores = []
        for text in question.choices:
            each = log_probs_of(backbone, prompt, question.record, text)
            value = sum(each) / (len(each) if normalise == "mean" else 1)
            if calibrate:
                empty = log_probs_of(backbone, prompt, {"x": "N/A"}, text)
                value -= sum(empty) / (len(empty) if normalise == "mean" else 1)
            scores.append(value)
        expected = torch.tensor(scores).log_softmax(0).tolist()
        assert {c.text: c.log_prob for c in row} == pytest.approx(
            dict(zip(question.choices, expected, strict=True)), abs=1e-3
        )
        assert row == sorted(row, key=lambda candidate: -candidate.log_prob)


def test_predict_chooses_among_what_each_row_brings_as_the_prompt_says(causal: Backbone) -> None:
    model, prompt, asked = PromptModel(causal), choosing(causal), CHOICE_TASK.read_rows(ROWS, labelled=False)
    by_mean = model.classify(asked, replace(prompt, normalise="mean"))
    found = model.predict(asked, replace(prompt, normalise="mean", calibrate=False), top_k=2)
    assert [one.candidates for one in found] == [tuple(row[:2]) for row in by_mean]
    assert by_mean != model.classify(asked, prompt)  # the sum
    calibrated = model.predict(asked, replace(prompt, calibrate=True), top_k=9)
    assert [len(one.candidates) for one in calibrated] == [4, 2]
    assert [one.candidates for one in calibrated] == [
        tuple(row) for row in model.classify(asked, prompt, calibrate=True)
    ]


def test_a_prompt_of_choices_needs_rows_that_bring_them(causal: Backbone) -> None:
    for rows in (RECORDS, CHOICE_TASK.read_rows(ROWS).records):
        with pytest.raises(RecordError, match="has no choices to choose among; read the rows with their task"):
            PromptModel(causal).predict(rows, choosing(causal))


def test_a_prediction_as_json() -> None:
    """Texts and log-probabilities, and the number of tokens where the answer was written."""
    found = Prediction("Nairobi", (Candidate("Nairobi", -0.5), Candidate("Lima", -2.0)))
    rows = [{"text": "Nairobi", "log_prob": -0.5}, {"text": "Lima", "log_prob": -2.0}]
    assert found.to_json() == {"prediction": "Nairobi", "candidates": rows}
    assert replace(found, tokens=3).to_json() == {"prediction": "Nairobi", "candidates": rows, "tokens": 3}


def test_a_model_in_training_mode_is_refused(causal: Backbone) -> None:
    """Its dropout would answer differently every time; also if only one of its modules was turned, and later."""
    prompt, model = learned(causal, "[P*2] [X] [Y]"), PromptModel(causal)
    next(module for module in causal.model.modules() if isinstance(module, torch.nn.Linear)).train()
    for ask in (lambda: PromptModel(causal), lambda: model.predict(RECORDS, prompt)):
        with pytest.raises(BackboneError, match=r"is in training mode, so its dropout .* call the backbone's freeze"):
            ask()
    causal.model.eval()
    assert len(model.predict(RECORDS, prompt)) == len(RECORDS)


def test_a_model_in_use_can_be_pickled(causal: Backbone) -> None:
    """For pools of processes: it answers as before, and makes the models of trained prompts again."""
    trained = with_weights(causal, learned(causal, TEMPLATE))
    model = PromptModel(causal, force=True)
    before = model.target_logits(RECORDS, trained)
    again = pickle.loads(pickle.dumps(model))
    assert again.force
    for one, other in zip(again.target_logits(RECORDS, trained), before, strict=True):
        assert torch.equal(one, other)
