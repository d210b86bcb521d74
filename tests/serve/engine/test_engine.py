"""The engine: each answer is that of PromptModel for the row alone, whatever shares its passes."""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from ptuning.backbone.backbone import Backbone
from ptuning.config import GenerationSettings
from ptuning.data.questions import Question, Questions
from ptuning.engine import prefix_store as beginnings
from ptuning.engine.decoding import Token
from ptuning.engine.objective import build_requests, candidate_request
from ptuning.errors import ConfigError, PromptError, PTuningError, RecordError
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prediction import Prediction
from ptuning.prompt.prompt import Prompt
from ptuning.prompt.rows import Answering, EchoRow, PromptRow, TextRow
from ptuning.serve.engine import engine as engine_module
from ptuning.serve.engine.engine import Engine
from ptuning.serve.engine.job import CancelledError, Job, Listener, Outcome, QueueFullError, Row, StoppedError
from ptuning.serve.engine.scheduler import Scheduler
from ptuning.template.labels import LabelWords
from ptuning.template.segments import FILLS_MASKS
from tests.backbone.test_turn import longrope
from tests.conftest import RECORDS, learned
from tests.families import built

LABELS = {"positive": ["great", "good"], "negative": ["terrible"]}
CANDIDATES = ("yes", "no", "Nairobi", "São Tomé")


class Heard(Listener):
    """A listener that notes what it hears."""

    def __init__(self, rows: int) -> None:
        super().__init__(rows)
        self.pieces: list[list[str]] = [[] for _ in range(rows)]
        self.first = threading.Event()

    def piece(self, row: int, text: str, tokens: Sequence[Token]) -> None:
        self.pieces[row].append(text)
        self.first.set()

    def ended(self, row: int, outcome: Outcome | Exception) -> None:
        assert self.outcomes[row] is None, "a row is reported once"
        super().ended(row, outcome)


@pytest.fixture
def serve() -> Iterator[Callable[..., Engine]]:
    """Start engines that end with the test."""
    started: list[Engine] = []

    def start(backbone: Backbone, **named: object) -> Engine:
        engine = Engine(PromptModel(backbone), **named)  # type: ignore[arg-type]
        engine.start()
        started.append(engine)
        return engine

    yield start
    for engine in started:
        engine.stop()


def prompts_of(backbone: Backbone) -> list[Prompt]:
    """Prompts with slots in front, in the middle, behind and nowhere; with labels and without."""
    front = learned(backbone, "[P*3] The answer for {x} is [Y]", seed=1)
    middle = learned(backbone, "about {x} [P*2] so [Y]", seed=2)
    late = learned(backbone, "{x} [P:It was] [Y]", seed=3)
    return [
        replace(front, target_tokens=4),
        replace(middle, label_words=Prompt.manual("{x} [Y]", label_words=LABELS).label_words),
        replace(late, label_words=Prompt.manual("{x} [Y]", label_words=LABELS).label_words, calibrate=True),
        replace(middle, target_tokens=2),
        Prompt.manual("The capital of {x} is [Y]", label_words=LABELS),
        Prompt.manual("The capital of {x} is [Y]"),
        replace(deep(backbone, "[D*3] The answer for {x} is [Y]", [5, 6, 7]), target_tokens=3),
        replace(deep(backbone, "[D] about {x} [D] so [P] [Y]", [5, 6, 7]), label_words=front_words()),
    ]


def front_words() -> LabelWords | None:
    return Prompt.manual("{x} [Y]", label_words=LABELS).label_words


def deep(backbone: Backbone, template: str, tokens: list[int]) -> Prompt:
    """A prompt with deep slots that has learned."""
    prompt, noise = Prompt.from_token_ids(template, tokens, backbone), torch.Generator().manual_seed(4)
    assert prompt.deep is not None
    moved = prompt.deep.map(lambda one: one + 0.3 * torch.randn(one.shape, generator=noise))
    return replace(prompt, deep=moved)


def alike(one: Prediction, other: Prediction) -> None:
    assert one.text == other.text
    assert [each.text for each in one.candidates] == [each.text for each in other.candidates]
    assert [each.log_prob for each in one.candidates] == pytest.approx(
        [each.log_prob for each in other.candidates], abs=1e-4
    )


@pytest.mark.parametrize("share", [0.0, 0.01], ids=["anew", "kept"])
def test_answers_are_those_of_each_row_alone(
    backbone: Backbone, serve: Callable[..., Engine], share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of all prompts in the same passes, twice, so that kept beginnings are used; written, scored and ranked."""
    monkeypatch.setattr(beginnings, "MIN_TOKENS", 2)
    prompts, model = prompts_of(backbone), PromptModel(backbone)
    engine = serve(backbone, cache_memory=share)
    rows, expected = [], []
    for record in RECORDS:
        for prompt in prompts:
            how = Answering(candidates=CANDIDATES) if record is RECORDS[0] else Answering()
            rows.append(PromptRow(prompt, Question({"x": record["x"]}), how))
            expected.append(model.predict([record], prompt, how.candidates)[0])
    for _ in range(2):
        for outcome, wanted in zip(engine.ask(rows), expected, strict=True):
            assert outcome.prediction is not None
            alike(outcome.prediction, wanted)
    if share and backbone.shares_prefix:
        assert engine.status.cached_tokens > 0
        assert engine.status.kept_texts > 0
    else:
        assert engine.status.cached_tokens == 0


def test_several_answers_and_beams(backbone: Backbone, serve: Callable[..., Engine]) -> None:
    """``top_k`` and beams are those of PromptModel; settings of writing do nothing to labels."""
    prompts, model, engine = prompts_of(backbone), PromptModel(backbone), serve(backbone)
    beams = GenerationSettings() if backbone.kind in FILLS_MASKS else GenerationSettings(num_beams=2)
    for prompt in prompts:
        how = Answering(top_k=2, generation=beams)
        (outcome,) = engine.ask([PromptRow(prompt, Question(RECORDS[1]), how)])
        own = None if prompt.answer_space.is_closed else beams
        assert outcome.prediction is not None
        alike(outcome.prediction, model.predict([RECORDS[1]], prompt, top_k=2, generation=own)[0])


def test_sampling_and_stops_stay_with_their_rows(causal: Backbone, serve: Callable[..., Engine]) -> None:
    """Rows with settings of their own write together as each would alone, and the pieces make the text."""
    prompt, model, engine = prompts_of(causal)[0], PromptModel(causal), serve(causal)
    ways = [
        GenerationSettings(max_new_tokens=6),
        GenerationSettings(max_new_tokens=9, do_sample=True, seed=3),
        GenerationSettings(max_new_tokens=9, do_sample=True, seed=4, temperature=0.7),
        GenerationSettings(max_new_tokens=5, repetition_penalty=1.5),
        GenerationSettings(max_new_tokens=12, stop_strings=("a", "e")),
    ]
    rows = [
        PromptRow(prompt, Question(record), Answering(generation=way, pieces=True, alternatives=2))
        for way, record in zip(ways, RECORDS, strict=True)
    ]
    heard = Heard(len(rows))
    engine.submit(Job(rows, heard))
    assert heard.ready.wait(60)
    for way, record, outcome, pieces in zip(ways, RECORDS, heard.outcomes, heard.pieces, strict=True):
        assert isinstance(outcome, Outcome)
        assert outcome.prediction is not None
        alike(outcome.prediction, model.predict([record], prompt, generation=way)[0])
        assert "".join(pieces) == outcome.prediction.text
        assert len(outcome.tokens) == outcome.usage.completion_tokens
        assert sum(token.log_prob or 0 for token in outcome.tokens) == pytest.approx(
            outcome.prediction.log_prob, abs=1e-4
        )
        assert all(len(token.alternatives) == 2 for token in outcome.tokens)
        is_cut = outcome.usage.completion_tokens == way.max_new_tokens
        assert outcome.finish == ("length" if is_cut else "stop") or outcome.finish == "stop"


def test_the_base_model_goes_on_and_scores_a_text(causal: Backbone, serve: Callable[..., Engine]) -> None:
    """A TextRow is greedy decoding of the bare model, an EchoRow its log-probabilities."""
    engine = serve(causal)
    text = "The capital of Kenya is"
    ids = (*causal.tokenizer.prefix_ids, *causal.tokenizer.encode([text])[0])
    given = torch.tensor([ids])
    with torch.no_grad():
        written = causal.model.generate(  # type: ignore[operator]
            given, max_new_tokens=5, do_sample=False, eos_token_id=list(causal.tokenizer.end_ids), pad_token_id=0
        )[0, len(ids) :].tolist()
        output = causal.model.forward(given)
        logits = output.logits[0, :, : causal.vocabulary].log_softmax(-1)
    how = Answering(generation=GenerationSettings(max_new_tokens=5), alternatives=1)
    by_text, by_ids = engine.ask([TextRow(text, how), TextRow(ids, how)])
    assert [token.id for token in by_text.tokens] == written == [token.id for token in by_ids.tokens]
    (scored,) = engine.ask([EchoRow(ids, alternatives=3)])
    assert scored.tokens[0].log_prob is None
    assert [token.log_prob for token in scored.tokens[1:]] == pytest.approx(
        [float(logits[at, token]) for at, token in enumerate(ids[1:])], abs=1e-4
    )
    assert [token.alternatives[0][1] for token in scored.tokens[1:]] == pytest.approx(
        logits[:-1].amax(-1).tolist(), abs=1e-4
    )
    for wrong in (TextRow((causal.vocabulary,)), TextRow(()), EchoRow((1,))):
        with pytest.raises(RecordError):
            engine.ask([wrong])


def test_usage_is_what_is_read(backbone: Backbone, serve: Callable[..., Engine]) -> None:
    """Of labels, candidates, beams and written answers; the sum is what the metrics tell."""
    prompts, engine = prompts_of(backbone), serve(backbone)
    record = {"x": "the capital of Kenya"}
    hows = [(prompts[0], Answering()), (prompts[1], Answering()), (prompts[1], Answering(candidates=CANDIDATES))]
    hows.append((prompts[0], Answering(top_k=2)))
    found = engine.ask([PromptRow(prompt, Question(record), how) for prompt, how in hows])
    written, labels, candidates, several = (one.usage.prompt_tokens for one in found)
    bound = prompts[1].bind(backbone)
    (examples,) = bound.answers([record], [CANDIDATES])
    assert candidates == candidate_request(examples).tokens
    items = build_requests(bound, Questions([Question(record)]), prompts[1].answer_space, labelled=False)
    assert labels == items[0].tokens
    assert written == several
    assert engine.status.prompt_tokens == sum(one.usage.prompt_tokens for one in found)


def test_a_failed_row_fails_alone(backbone: Backbone, serve: Callable[..., Engine]) -> None:
    """A record without the field, a row that is too long, a prompt of another model, and a setting without meaning."""
    closed, kept = prompts_of(backbone)[1], Prompt.manual("{x!} is [Y]")
    other = replace(closed, backbone=replace(closed.backbone, fingerprint="0-0"))  # type: ignore[type-var]
    rows: list[Row] = [
        PromptRow(closed, Question(RECORDS[0])),
        PromptRow(closed, Question({"z": "Kenya"})),
        PromptRow(kept, Question({"x": "word " * 999})),
        PromptRow(other, Question(RECORDS[0])),
        PromptRow(kept, Question(RECORDS[0]), Answering(min_probability=0.5)),
        PromptRow(closed, Question(RECORDS[1])),
    ]
    heard, engine = Heard(len(rows)), serve(backbone)
    engine.submit(Job(rows, heard))
    assert heard.ready.wait(60)
    failed = [type(one) for one in heard.outcomes if isinstance(one, Exception)]
    assert len(failed) == 4
    assert all(issubclass(one, PTuningError) for one in failed)
    assert [failed[2], failed[3]] == [PromptError, ConfigError]
    assert engine.status.rows_failed == 4
    model = PromptModel(backbone)
    for at in (0, 5):
        found = heard.outcomes[at]
        assert isinstance(found, Outcome)
        assert found.prediction is not None
        alike(found.prediction, model.predict([RECORDS[at % 4]], closed)[0])


def test_no_numbers_are_a_fault_of_the_row(causal: Backbone, serve: Callable[..., Engine]) -> None:
    """NaN logits of one prompt's rows fail these rows, not those beside them."""
    closed, front = prompts_of(causal)[1], prompts_of(causal)[0]
    model, engine = PromptModel(causal), serve(causal)
    bad, bad_text = replace(closed), replace(closed, label_words=None)
    bad.slot_vectors[0, 0] = float("nan")  # type: ignore[index]
    good = replace(prompts_of(causal)[1])
    rows = [
        PromptRow(bad, Question(RECORDS[0])),
        PromptRow(good, Question(RECORDS[0])),
        PromptRow(front, Question(RECORDS[0])),
        PromptRow(bad_text, Question(RECORDS[1])),
    ]
    heard = Heard(len(rows))
    engine.submit(Job(rows, heard))
    assert heard.ready.wait(60)
    assert [isinstance(one, Exception) for one in heard.outcomes] == [True, False, False, True]
    assert engine.is_alive
    found = heard.outcomes[1]
    assert isinstance(found, Outcome)
    assert found.prediction is not None
    alike(found.prediction, model.predict([RECORDS[0]], good)[0])


def test_a_full_queue_refuses_whole_jobs(causal: Backbone, serve: Callable[..., Engine]) -> None:
    """Rows are counted, not requests; calls go in always, and a job that can never fit says so."""
    engine, held, let_go = serve(causal, queue_rows=3), threading.Event(), threading.Event()
    prompt = prompts_of(causal)[1]

    def hold() -> None:
        held.set()
        let_go.wait(60)

    waiting = threading.Thread(target=lambda: engine.call(hold))
    waiting.start()
    assert held.wait(60)
    row = PromptRow(prompt, Question(RECORDS[0]))
    first = Heard(2)
    engine.submit(Job([row] * 2, first))
    with pytest.raises(QueueFullError) as refused:
        engine.submit(Job([row] * 2, Heard(2)))
    assert 1 <= refused.value.retry_after <= 60
    with pytest.raises(RecordError, match="at most 3"):
        engine.submit(Job([row] * 4, Heard(4)))
    engine.check_room()
    last = Heard(1)
    engine.submit(Job([row], last))
    with pytest.raises(QueueFullError, match="3 rows wait"):
        engine.check_room()
    let_go.set()
    waiting.join()
    assert first.ready.wait(60)
    assert last.ready.wait(60)
    assert len(engine.ask([row] * 3)) == 3


def test_rows_are_cut_by_length_on_a_processor(causal: Backbone, serve: Callable[..., Engine]) -> None:
    """Many short rows do not wait for the pads of a long one; few do, since a pass of its own costs more."""
    prompt = prompts_of(causal)[4]
    short, long = (PromptRow(prompt, Question({"x": text})) for text in ("a", "the capital of Kenya and of Peru"))
    for count, wanted in ((12, 2), (1, 1)):
        engine = serve(causal)
        rows = [short] * count + [long]
        found = engine.ask(rows)
        assert engine.status.passes == wanted
        for row, outcome in zip((short, long), (found[0], found[-1]), strict=True):
            assert outcome.prediction is not None
            alike(outcome.prediction, PromptModel(causal).predict([row.question.record], prompt)[0])


def test_cancelled_rows_leave(causal: Backbone, serve: Callable[..., Engine]) -> None:
    """A row that waits, and one that is written, are dropped; the one beside it goes on to the same answer."""
    engine, model = serve(causal), PromptModel(causal)
    prompt = replace(prompts_of(causal)[0], multiline=True)
    most = Answering(generation=GenerationSettings(max_new_tokens=30, stop_strings=("never",)), pieces=True)
    gone, stays = Heard(2), Heard(1)
    job = Job([PromptRow(prompt, Question(RECORDS[0]), most)] * 2, gone)
    engine.submit(job)
    engine.submit(Job([PromptRow(prompt, Question(RECORDS[2]), most)], stays))
    assert gone.first.wait(60)
    job.cancel()
    assert gone.ready.wait(60)
    assert stays.ready.wait(60)
    found = stays.outcomes[0]
    assert isinstance(found, Outcome)
    assert found.prediction is not None
    alike(found.prediction, model.predict([RECORDS[2]], prompt, generation=most.generation)[0])
    late = Job([PromptRow(prompt, Question(RECORDS[0]))], heard := Heard(1))
    late.cancel()
    engine.submit(late)
    assert heard.ready.wait(60)
    assert isinstance(heard.outcomes[0], CancelledError)
    assert engine.status.rows_cancelled >= 1


def test_drain_and_stop(causal: Backbone, serve: Callable[..., Engine]) -> None:
    """A drained engine has answered all and takes nothing more; a stopped one fails what is left."""
    engine, prompt = serve(causal), prompts_of(causal)[0]
    heard = Heard(5)
    engine.submit(Job([PromptRow(prompt, Question(record)) for record in RECORDS], heard))
    assert engine.drain(60)
    assert all(isinstance(one, Outcome) for one in heard.outcomes)
    with pytest.raises(StoppedError):
        engine.ask([PromptRow(prompt, Question(RECORDS[0]))])
    engine.stop()
    assert not engine.is_alive
    other, left = serve(causal), Heard(5)
    held, let_go = threading.Event(), threading.Event()

    def hold() -> None:
        held.set()
        let_go.wait(60)

    threading.Thread(target=lambda: other.call(hold), daemon=True).start()
    assert held.wait(60)
    other.submit(Job([PromptRow(prompt, Question(record)) for record in RECORDS], left))
    stopping = threading.Thread(target=other.stop)
    stopping.start()
    let_go.set()
    stopping.join(60)
    assert left.ready.wait(60)
    assert all(isinstance(one, Outcome | StoppedError) for one in left.outcomes)


def test_a_fault_of_the_engine_ends_it_and_fails_what_waits(
    causal: Backbone, serve: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for ever for an engine that has ended."""

    def broken(*_: object) -> None:
        raise RuntimeError("a fault")

    monkeypatch.setattr(Scheduler, "_take", broken)
    engine, heard = serve(causal), Heard(1)
    engine.submit(Job([PromptRow(prompts_of(causal)[1], Question(RECORDS[0]))], heard))
    assert heard.ready.wait(60)
    assert isinstance(heard.outcomes[0], StoppedError)
    engine._thread.join(60)
    assert not engine.is_alive
    assert engine.has_failed
    with pytest.raises(StoppedError):
        engine.ask([PromptRow(prompts_of(causal)[1], Question(RECORDS[0]))])


def test_a_thread_that_hangs_is_not_alive(
    causal: Backbone, serve: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Abuse case 14: rows wait and nothing happens; without rows nothing need happen, and who goes on lives again."""
    engine, clock = serve(causal), [0.0]
    monkeypatch.setattr(engine_module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    engine.call(int)
    clock[0] += 2 * engine_module.HUNG_SECONDS
    assert engine.is_alive
    held, let_go = threading.Event(), threading.Event()

    def hold() -> None:
        held.set()
        let_go.wait(60)

    thread = threading.Thread(target=lambda: engine.call(hold))
    thread.start()
    assert held.wait(60)
    engine.submit(Job([PromptRow(prompts_of(causal)[1], Question(RECORDS[0]))], heard := Heard(1)))
    assert engine.is_alive
    clock[0] += 1.1 * engine_module.HUNG_SECONDS
    is_alive = engine.is_alive
    let_go.set()
    thread.join()
    assert not is_alive
    assert heard.ready.wait(60)
    engine.call(int)
    assert engine.is_alive
    assert not engine.has_failed


def test_many_prompts_on_one_text_read_it_once(
    causal: Backbone, serve: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixteen prompts whose slots stand behind the text: it is read once, for this request and the next ones."""
    monkeypatch.setattr(beginnings, "MIN_TOKENS", 4)
    words = Prompt.manual("{x} [Y]", label_words=LABELS).label_words
    prompts = [
        replace(learned(causal, f"{{x}} [P*{1 + number % 3}] so [Y]", seed=number), label_words=words)
        for number in range(16)
    ]
    question = Question({"x": "the movie Zürich was great, and the film in 1999 a bad one"})
    engine, model = serve(causal), PromptModel(causal)
    text = len(causal.tokenizer.prefix_ids) + len(causal.tokenizer.encode([question.record["x"]])[0])
    inputs = 0
    for prompt in prompts:
        items = build_requests(prompt.bind(causal), Questions([question]), prompt.answer_space, labelled=False)
        inputs += len(items[0].inputs)
    for turn in (1, 2):
        found = engine.ask([PromptRow(prompt, question) for prompt in prompts])
        for prompt, outcome in zip(prompts, found, strict=True):
            assert outcome.prediction is not None
            alike(outcome.prediction, model.predict([question.record], prompt)[0])
        assert engine.status.cached_tokens == turn * inputs * text - text
        assert engine.status.passes == turn
    assert engine.status.kept_texts == 1


def test_a_replaced_prompt_finds_nothing_of_the_earlier_one(
    causal: Backbone, serve: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beginnings with slots are kept by what they hold: the same template with other vectors is read anew."""
    monkeypatch.setattr(beginnings, "MIN_TOKENS", 2)
    engine, model = serve(causal), PromptModel(causal)
    for seed in (1, 2, 1):
        prompt = learned(causal, "[P*4] The answer for {x} is [Y]", seed=seed)
        for _ in range(3):
            (outcome,) = engine.ask([PromptRow(prompt, Question(RECORDS[0]))])
            assert outcome.prediction is not None
            alike(outcome.prediction, model.predict([RECORDS[0]], prompt)[0])
    assert engine.status.kept_texts == 2


def test_kept_beginnings_have_a_bound(
    causal: Backbone, serve: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The least used go first, and what is larger than all room is not kept; answers stay the same."""
    monkeypatch.setattr(beginnings, "MIN_TOKENS", 2)
    engine, model, prompt = serve(causal), PromptModel(causal), prompts_of(causal)[2]
    kept = engine._runner.store
    records = [{"x": f"the movie {number} was great"} for number in range(6)]
    kept.limit = 0
    for record in records[:1] * 3:
        engine.ask([PromptRow(prompt, Question(record))])
    assert (kept.bytes, len(kept)) == (0, 0)
    kept.limit = 1 << 30
    for record in records:
        engine.ask([PromptRow(prompt, Question(record))] * 2)
        kept.limit = min(kept.limit, 3 * kept.bytes)
    assert 1 <= len(kept) < len(records)
    assert 0 < kept.bytes <= kept.limit
    for record in records:
        (outcome,) = engine.ask([PromptRow(prompt, Question(record))])
        assert outcome.prediction is not None
        alike(outcome.prediction, model.predict([record], prompt)[0])


def test_a_few_slots_in_front_are_kept_and_go_with_rows_without(causal: Backbone, serve: Callable[..., Engine]) -> None:
    """A prompt's own beginning, however short, is read no more than twice; its rows need no pass of their own."""
    prompts = [replace(learned(causal, "[P*6] {x} is [Y]", seed=seed), target_tokens=3) for seed in range(2)]
    engine, model = serve(causal), PromptModel(causal)
    cached = []
    for turn, records in enumerate((RECORDS[:1], RECORDS[1:2], RECORDS[2:4], RECORDS[:2])):
        rows = [PromptRow(prompts[at], Question(record)) for at, record in enumerate(records)]
        for row, outcome in zip(rows, engine.ask(rows), strict=True):
            assert outcome.prediction is not None
            alike(outcome.prediction, model.predict([row.question.record], row.prompt)[0])
            cached.append(outcome.usage.cached_tokens)
        assert engine.status.passes == turn + 1
        assert engine.status.kept_texts == (0, 1, 1, 2)[turn]
    assert [one > 0 for one in cached] == [False, False, True, False, True, False]
    assert cached[2] == cached[4] == 6 + len(causal.tokenizer.prefix_ids)
    assert engine.status.cached_tokens == sum(cached)


def test_an_instruction_is_kept_though_the_text_behind_it_is_new(
    causal: Backbone, serve: Callable[..., Engine]
) -> None:
    """What all rows of a prompt begin with comes again, also where a text stands between it and the slots."""
    instruction = " ".join(["the capital of Kenya is Nairobi and of Peru Lima"] * 2)
    prompt = replace(learned(causal, f"{instruction} {{x}} [P*2] so [Y]"), target_tokens=2)
    engine, model = serve(causal), PromptModel(causal)
    cached = []
    for record in [*RECORDS[:4], RECORDS[3], RECORDS[3]]:
        (outcome,) = engine.ask([PromptRow(prompt, Question(record))])
        assert outcome.prediction is not None
        alike(outcome.prediction, model.predict([record], prompt)[0])
        cached.append(outcome.usage.cached_tokens)
    assert cached[:2] == [0, 0]
    assert 32 <= cached[2] == cached[3] == cached[4] < cached[5]


@pytest.mark.parametrize("words", [0, 5])
def test_kept_beginnings_of_a_model_that_turns(words: int, serve: Callable[..., Engine]) -> None:
    """An answer that may cross the length at which positions change reads its whole row anew, kept beginning or not."""
    backbone = longrope()
    prompt = learned(backbone, "[P*6] the capital of {x} is [Y]")
    engine, model = serve(backbone), PromptModel(backbone)
    record = {"x": "Kenya " * words + "Peru"}
    cached = []
    for tokens in (2, 2, 2, 30):
        how = GenerationSettings(max_new_tokens=tokens, stop_strings=("never",))
        (outcome,) = engine.ask([PromptRow(prompt, Question(record), Answering(generation=how))])
        assert outcome.prediction is not None
        alike(outcome.prediction, model.predict([record], prompt, generation=how)[0])
        cached.append(outcome.usage.cached_tokens)
    assert cached == [0, 0, cached[2], 0]
    assert cached[2] >= 6


class Traffic(RuleBasedStateMachine):
    """Jobs of any rows come, are cancelled, fail and are answered, in any order and at any time: each row is told once,
    and each answer is that of the row alone.
    """

    backbone: Backbone
    prompts: list[Prompt]
    known: dict[tuple[int, int, int], Prediction]

    def __init__(self) -> None:
        super().__init__()
        self.engine = Engine(PromptModel(self.backbone), queue_rows=64, cache_memory=0.01)
        self.engine.start()
        self.asked: list[tuple[Job, Heard, list[tuple[int, int, int] | None]]] = []

    def expected(self, prompt: int, record: int, tokens: int) -> Prediction:
        key = prompt, record, tokens
        if key not in self.known:
            chosen = self.prompts[prompt]
            how = None if chosen.answer_space.is_closed else GenerationSettings(max_new_tokens=tokens)
            self.known[key] = PromptModel(self.backbone).predict([RECORDS[record]], chosen, generation=how)[0]
        return self.known[key]

    @rule(rows=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4), st.integers(1, 6)), min_size=1, max_size=8))
    def ask(self, rows: list[tuple[int, int, int]]) -> None:
        own: list[Row] = [
            PromptRow(
                self.prompts[prompt],
                Question({"x": RECORDS[record]["x"]}),
                Answering(generation=GenerationSettings(max_new_tokens=tokens), pieces=tokens > 3),
            )
            for prompt, record, tokens in rows
        ]
        self.submit(own, list(rows))

    @rule(prompt=st.integers(0, 5))
    def ask_what_fails(self, prompt: int) -> None:
        good = PromptRow(self.prompts[prompt], Question(RECORDS[0]))
        how = GenerationSettings(max_new_tokens=self.prompts[prompt].target_tokens + 2)
        self.submit(
            [PromptRow(self.prompts[prompt], Question({"no": "field"})), good],
            [None, (prompt, 0, how.max_new_tokens or 0)],
        )

    def submit(self, rows: list[Row], wanted: list[tuple[int, int, int] | None]) -> None:
        job = Job(rows, heard := Heard(len(rows)))
        try:
            self.engine.submit(job)
        except QueueFullError:
            return
        self.asked.append((job, heard, wanted))

    @rule(which=st.integers(0, 99))
    def cancel(self, which: int) -> None:
        if self.asked:
            self.asked[which % len(self.asked)][0].cancel()

    @rule()
    def wait(self) -> None:
        if self.asked:
            assert self.asked[-1][1].ready.wait(60)

    def teardown(self) -> None:
        assert self.engine.drain(60)
        self.engine.stop()
        for job, heard, wanted in self.asked:
            for key, found in zip(wanted, heard.outcomes, strict=True):
                if isinstance(found, Outcome):
                    assert key is not None
                    assert found.prediction is not None
                    alike(found.prediction, self.expected(*key))
                else:
                    assert isinstance(found, CancelledError if job.cancelled else RecordError) or key is None
                    assert key is None or job.cancelled


@pytest.mark.parametrize(("kind", "least"), [("causal", 3), ("causal", 32), ("masked", 3), ("encoder-decoder", 3)])
def test_traffic_of_any_kind(
    kind: str, least: int, make_backbone: Callable[[str], Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What must hold of the service: every answer equals the one-row loop, whatever shares its batch."""
    monkeypatch.setattr(beginnings, "MIN_TOKENS", least)
    backbone = built("t5") if kind == "encoder-decoder" else make_backbone("llama" if kind == "causal" else "bert")
    own = type("Own", (Traffic,), {"backbone": backbone, "prompts": prompts_of(backbone), "known": {}})
    run_state_machine_as_test(own, settings=settings(max_examples=8, stateful_step_count=12, deadline=None))
