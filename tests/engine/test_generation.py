"""Writing: token by token what transformers' ``generate`` writes behind the same embeddings, with the same settings."""

import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.forward import Memory
from ptuning.config import GenerationSettings
from ptuning.engine.decoding import DecodingState, Hypothesis, StopCriteria
from ptuning.engine.forward import forward, target_logits
from ptuning.engine.prefix_store import PreparedPrompt
from ptuning.engine.runner import generate
from ptuning.errors import BackboneError, ConfigError
from ptuning.prompt.predict import PromptModel
from ptuning.prompt.prompt import Prompt
from ptuning.records import Record
from ptuning.template.encode import Example
from tests.backbone.test_turn import RECORDS as TURNING
from tests.backbone.test_turn import longrope
from tests.conftest import CAUSAL, RECORDS, bound, learned
from tests.families import backbone_of, built, own_copy

TEMPLATE = "[P*2] [X] is [P] [Y]"
TOKENS = 7
WAYS: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.7},
    {"num_beams": 2},
    {"num_beams": 4, "length_penalty": 0.0},
    {"num_beams": 3, "length_penalty": 2.0, "repetition_penalty": 1.5},
    {"do_sample": True, "seed": 3},
    {"do_sample": True, "seed": 4, "temperature": 0.7, "top_k": 9},
    {"do_sample": True, "seed": 5, "top_k": 0, "top_p": 0.8, "temperature": 1.5},
    {"do_sample": True, "seed": 6, "repetition_penalty": 2.0},
]


def model_named(name: str) -> Backbone:
    """Return a family's tiny model, with tokens that end a text often enough to matter. Rows that pad its table, which
    ``generate`` may write and we never do, are unlikely.
    """
    backbone = own_copy(name)
    backbone.tokenizer.end_ids = frozenset({2, *range(30, 60)})
    padding = torch.arange(backbone.vocabulary, backbone.embedding_rows)
    head = backbone.model.get_output_embeddings()
    assert head is not None
    head.register_forward_hook(lambda _module, _inputs, output: output.index_fill(-1, padding, -1e9))
    return backbone


@torch.no_grad()
def generated(backbone: Backbone, prompt: Prompt, records: Sequence[Record], way: dict[str, Any]) -> list[list[int]]:
    """Return what ``generate`` writes behind the same embeddings, the tokens of each row without pads."""
    examples = bound(backbone, str(prompt.template)).contexts(records, target_tokens=TOKENS)
    first = forward(backbone, examples, prompt.learned(backbone), pad_side="left")
    start, split = first.batch.mask.shape[1], first.batch.encoder_tokens
    inputs: dict[str, Any] = {"inputs_embeds": first.embeddings, "attention_mask": first.batch.mask}
    if split:
        inputs = {name: value[:, :split] for name, value in inputs.items()}
        inputs["decoder_input_ids"] = first.batch.token_ids[:, split:]
    settings = {name: value for name, value in way.items() if name != "seed"}
    config = GenerationConfig(
        **{**GenerationConfig._get_default_generation_params(), "max_length": None, **settings},
        max_new_tokens=TOKENS,
        eos_token_id=sorted(backbone.tokenizer.end_ids),
        pad_token_id=0,
        decoder_start_token_id=(*backbone.tokenizer.decoder_ids, None)[0],
    )
    backbone.model.generation_config = GenerationConfig()  # nothing of the model's own settings
    torch.manual_seed(way.get("seed", 0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the prompt is not punished for repetitions
        model: Any = backbone.model
        rows = model.generate(**inputs, generation_config=config).tolist()
    skip = start - split if split else 0
    return [until_end(row[skip:], backbone) for row in rows]


def until_end(ids: list[int], backbone: Backbone) -> list[int]:
    """Return the tokens up to the one that ends the text."""
    ends = [at for at, token in enumerate(ids) if token in backbone.tokenizer.end_ids]
    return ids[: ends[0] + 1] if ends else ids


def written(
    backbone: Backbone,
    prompt: Prompt,
    records: Sequence[Record],
    way: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> list[list[int]]:
    """Return the tokens of our first answers."""
    filled = bound(backbone, str(prompt.template))
    filled.multiline = True  # generate knows no lines
    seen: dict[str, list[int]] = {}
    plain = StopCriteria.generated

    def kept(self: StopCriteria, draft: Hypothesis) -> Any:
        found = plain(self, draft)
        seen.setdefault(f"{found.text}/{found.log_prob}", list(draft.ids))
        return found

    monkeypatch.setattr(StopCriteria, "generated", kept)
    ready = PreparedPrompt(prompt.learned(backbone), filled)
    found = generate(backbone, ready, records, max_tokens=TOKENS, settings=GenerationSettings(**way))
    return [seen[f"{row[0].text}/{row[0].log_prob}"] for row in found]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(f"{k}={v}" for k, v in way.items()) or "greedy")
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "bart"])
def test_what_is_written_is_what_generate_writes(
    name: str, way: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy, beams and draws with a seed, token by token; each row of ours stands beside two others."""
    backbone, records = model_named(name), RECORDS[1:4]
    prompt = learned(backbone, TEMPLATE)
    ours = written(backbone, prompt, records, way, monkeypatch)
    theirs = [generated(backbone, prompt, [record], way)[0] for record in records]
    assert ours == theirs
    assert len({tuple(ids) for ids in ours}) > 1 or name not in CAUSAL  # tiny random encoders say little


def test_the_defaults_are_those_of_generate() -> None:
    """Whoever knows ``GenerationConfig`` knows these settings."""
    theirs = GenerationConfig._get_default_generation_params()
    ours = vars(GenerationSettings())
    assert {name: ours[name] for name in ours if name in theirs} == {
        name: theirs[name] for name in ours if name in theirs
    }
    assert ours.keys() - theirs.keys() == {"max_new_tokens", "stop_strings", "seed"}
    assert all(hasattr(GenerationConfig(), name) for name in ours if name != "seed")


def forced(backbone: Backbone, tokens: Sequence[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the model write these tokens one after another, in every row."""
    plain = Backbone.run
    steps: list[int] = []

    def run(self: Backbone, *given: Any, **more: Any) -> tuple[torch.Tensor, Memory | None]:
        logits, memory = plain(self, *given, **more)
        if more.get("keep"):
            logits = torch.full_like(logits, -50.0)
            logits[:, tokens[min(len(steps), len(tokens) - 1)]] = 50.0
            steps.append(len(logits))
        return logits, memory

    monkeypatch.setattr(Backbone, "run", run)


@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_an_answer_ends_at_each_token_that_ends_the_model_s_texts(
    name: str, num_beams: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model for chats lists several in its generation config; the second one ends a text, too, for every prompt."""
    backbone = backbone_of(name)
    backbone.model.generation_config.eos_token_id = [2, 41]
    backbone = Backbone(backbone.model, backbone.tokenizer._tokenizer, name="x")
    assert backbone.tokenizer.end_ids == {backbone.tokenizer.stop_id, 2, 41}
    for prompt in (learned(backbone, TEMPLATE), Prompt.manual("[X] is [Y]")):
        with monkeypatch.context() as patched:
            forced(backbone, [40, 41, 42, 43], patched)
            found = PromptModel(backbone).predict(
                RECORDS, prompt, generation={"max_new_tokens": 8, "num_beams": num_beams}
            )
        assert {one.tokens for one in found} == {1}
        assert {one.text for one in found} == {backbone.tokenizer.decode([40]).strip()}


def test_a_greedy_batch_copies_its_cache_only_when_a_row_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at each token. A row that has ended is not run any more."""
    backbone = model_named("llama")
    prompt, copies, sizes = learned(backbone, TEMPLATE), [], []
    backbone.tokenizer.end_ids = frozenset()
    ids = written(backbone, prompt, RECORDS, {}, monkeypatch)
    plain, read = Memory.reorder, DecodingState.read

    def reorder(self: Memory, rows: torch.Tensor) -> None:
        copies.append(len(rows))
        plain(self, rows)

    def counted(self: DecodingState, tokens: torch.Tensor, **more: Any) -> None:
        sizes.append(len(tokens))
        read(self, tokens, **more)

    monkeypatch.setattr(Memory, "reorder", reorder)
    monkeypatch.setattr(DecodingState, "read", counted)
    assert written(backbone, prompt, RECORDS, {}, monkeypatch) == ids
    assert (copies, sizes) == ([], [len(RECORDS)] * (TOKENS - 1))
    sizes.clear()
    first = next(row for row in ids if row[2] not in {*ids[0][:2], *ids[1][:2], *ids[2][:2], *ids[3][:2], *ids[4][:2]})
    backbone.tokenizer.end_ids = frozenset({first[2]})
    assert written(backbone, prompt, RECORDS, {}, monkeypatch) == [until_end(row, backbone) for row in ids]
    assert 1 <= len(copies) <= len(RECORDS)
    assert sizes[0] == len(RECORDS) > sizes[-1]


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_draws_do_not_depend_on_company_or_on_the_global_generator(name: str) -> None:
    """Invariant *Alone or in company* holds for sampling: each row is drawn as it would be alone, in any order."""
    backbone = own_copy(name)
    prompt, model = learned(backbone, TEMPLATE), PromptModel(backbone)
    how = {"do_sample": True, "max_new_tokens": 5, "seed": 7}
    before = torch.get_rng_state()
    together = model.predict(RECORDS, prompt, generation=how)
    assert torch.equal(torch.get_rng_state(), before)
    alone = [model.predict([record], prompt, generation=how)[0].text for record in RECORDS[::-1]]
    assert [one.text for one in together] == alone[::-1]
    other = model.predict(RECORDS, prompt, generation={**how, "seed": 8})
    assert [one.text for one in other] != [one.text for one in together]


@pytest.mark.parametrize(
    ("how", "multiline"),
    [({}, True), ({"do_sample": True, "seed": 2}, False), ({"stop_strings": "e"}, True)],
    ids=str,
)
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "bart", "mamba"])
def test_streamed_pieces_are_the_answer(name: str, how: dict[str, Any], multiline: bool) -> None:
    """Joined they are what ``predict`` returns; none is empty, and several come before the end."""
    backbone = built(name)
    prompt, model = learned(backbone, TEMPLATE), PromptModel(backbone)
    object.__setattr__(prompt, "multiline", multiline)
    how = {"max_new_tokens": 12, **how}
    counts = set()
    for record, answer in zip(RECORDS, model.predict(RECORDS, prompt, generation=how), strict=True):
        pieces = list(model.stream(record, prompt, generation=how))
        assert all(pieces)
        assert "".join(pieces) == answer.text
        counts.add(len(pieces))
    assert max(counts) > 1 or "stop_strings" in how or name == "bart"  # which has nothing but special tokens to say


def test_streaming_needs_no_gradients_and_leaves_the_caller_s_as_they_are(causal: Backbone) -> None:
    """Between two pieces gradients are on again."""
    weight = next(causal.model.parameters()).requires_grad_(True)
    pieces = PromptModel(causal).stream(RECORDS[0], learned(causal, TEMPLATE), generation={"max_new_tokens": 6})
    for _ in pieces:
        assert torch.is_grad_enabled()
        assert (weight * 2).requires_grad


def ending_of(backbone: Backbone, *stops: str) -> StopCriteria:
    """Return the ending of long answers of several lines."""
    filled = bound(backbone, TEMPLATE)
    filled.multiline = True
    return StopCriteria.of(backbone, filled, 999, stop_strings=stops)


def test_an_answer_ends_before_a_stop_string(causal: Backbone) -> None:
    """Wherever its tokens are cut; the text in front of it is the answer."""
    ending = ending_of(causal, "was gr", "\n\n")
    ids = causal.tokenizer.encode(["the movie was great and so on"])[0]
    at = next(count for count in range(1, len(ids) + 1) if ending.reached(ids[:count]))
    assert "was gr" in causal.tokenizer.decode(ids[:at])
    assert "was gr" not in causal.tokenizer.decode(ids[: at - 1])
    assert ending.text(ids[:at]) == "the movie"
    # What could become a stop string is held back.
    assert ending.text(causal.tokenizer.encode(["the movie was g"])[0], is_whole=False) == "the movie"
    assert ending.text(causal.tokenizer.encode(["the movie was g"])[0]) == "the movie was g"


def test_half_a_letter_is_held_back(causal: Backbone) -> None:
    """A letter beyond the vocabulary is several tokens; no piece shows a part of it."""
    ending = ending_of(causal)
    ids = causal.tokenizer.encode(["a 東"])[0]
    shown = [ending.text(ids[:count], is_whole=False) for count in range(1, len(ids) + 1)]
    assert len(ids) > 3
    assert not any("\ufffd" in one for one in shown)
    assert shown[-1] == "a 東"


@pytest.mark.parametrize(
    ("values", "fact"),
    [
        ({"max_new_tokens": 0}, "'max_new_tokens' is 0"),
        ({"max_new_tokens": 2.5}, "'max_new_tokens' is 2.5"),
        ({"num_beams": True}, "'num_beams' is True"),
        ({"do_sample": 1}, "'do_sample' is 1"),
        ({"do_sample": True, "temperature": float("nan")}, "'temperature' is nan"),
        ({"do_sample": True, "temperature": "hot"}, "'temperature' is 'hot'"),
        ({"do_sample": True, "top_k": -1}, "'top_k' is -1"),
        ({"do_sample": True, "top_p": 0.0}, "'top_p' is 0.0"),
        ({"do_sample": True, "seed": -1}, "'seed' is -1"),
        ({"repetition_penalty": 0}, "'repetition_penalty' is 0"),
        ({"num_beams": 2, "length_penalty": float("inf")}, "'length_penalty' is inf"),
        ({"stop_strings": ["a", ""]}, "stop_strings"),
        ({"stop_strings": 5}, "stop_strings"),
        ({"temperature": 0.5}, "temperature is 0.5"),
        ({"top_p": 0.5, "num_beams": 2}, "top_p is 0.5"),
        ({"seed": 5}, "seed is 5"),
        ({"length_penalty": 0.0}, "length_penalty is 0.0"),
        ({"do_sample": True, "num_beams": 2}, "num_beams is 2"),
        ({"temprature": 0.5}, "'temperature'"),
    ],
)
def test_settings_that_make_no_sense(values: dict[str, object], fact: str) -> None:
    with pytest.raises(ConfigError, match=fact):
        GenerationSettings.of(values)


def test_why_an_answer_ended(causal: Backbone) -> None:
    tokenizer = causal.tokenizer
    own, (*_, line) = (tuple(tokenizer.encode([text])[0]) for text in (" a good film", "\n"))
    end = next(iter(tokenizer.end_ids))
    ending = StopCriteria(causal, max_tokens=len(own) + 1, multiline=False, stop_strings=("film",))
    assert ending.stopped((*own, end)) == "end"  # also at its most tokens
    assert ending.stopped((*own[:1], line)) == "line"
    assert ending.stopped(own) == "end"  # a stop string
    assert ending.stopped(own[:1]) == "length"
    many = StopCriteria(causal, max_tokens=2, multiline=True)
    assert many.stopped((*own[:1], line)) == "length"  # a text of several lines goes on after a line
    assert many.generated(Hypothesis((*own[:1], end), -1.0)).stopped == "end"


def test_a_model_that_fills_masks_writes_nothing(masked: Backbone) -> None:
    """It takes the length of its answers, and no other setting of writing; it cannot be streamed."""
    model, prompt = PromptModel(masked), Prompt.manual("[X] is [Y]")
    assert model.predict(RECORDS, prompt, generation={"max_new_tokens": 2})
    with pytest.raises(ConfigError, match="num_beams: for models that write; this one fills masks"):
        model.predict(RECORDS, prompt, generation={"num_beams": 2})
    with pytest.raises(BackboneError, match="nothing to stream"):
        model.stream(RECORDS[0], prompt)


def test_rows_that_pad_the_table_are_never_drawn() -> None:
    """Neither are they chosen, however likely they are; the draws are those over the whole table."""
    backbone = own_copy("llama")
    head = backbone.model.get_output_embeddings()
    assert backbone.embedding_rows > backbone.vocabulary
    assert head is not None
    prompt, model = learned(backbone, TEMPLATE), PromptModel(backbone)
    with torch.no_grad():
        head.weight[backbone.vocabulary :].mul_(30.0)
    found = model.predict(RECORDS, prompt, generation={"do_sample": True, "top_k": 0, "temperature": 3.0})
    assert all(one.log_prob > -200 for one in found)


def test_the_context_of_a_decoder_counts_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an encoder reads and what slots hold is not punished for repetition; words on the decoder's side are."""
    backbone = own_copy("t5")
    filled = bound(backbone, "[X] is [>] so [P] [Y]")
    examples: list[Example] = filled.contexts(RECORDS)
    own = learned(backbone, "[X] is [>] so [P] [Y]").learned(backbone)
    rows = DecodingState(backbone, examples, forward(backbone, examples, own, pad_side="left", keep=True))
    ids = rows.before[0]
    assert ids == [*backbone.tokenizer.decoder_ids, *backbone.tokenizer.encode(["so"])[0]]


@pytest.mark.parametrize("num_beams", [1, 2])
def test_answers_that_grow_past_a_turn_of_positions(num_beams: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariants *Fast = slow* and *Alone or in company*: each token is read as in a whole row alone, where a row grows
    past the length at which its positions change as well.
    """
    backbone = longrope()
    assert backbone.turn is not None
    prompt = learned(backbone, TEMPLATE)
    contexts = bound(backbone, TEMPLATE).contexts(TURNING, target_tokens=TOKENS)
    lengths = [len(one.token_ids) for one in contexts]
    assert any(length <= backbone.turn < length + TOKENS - 1 for length in lengths)
    assert min(lengths) + TOKENS < backbone.turn < max(lengths)
    ours = written(backbone, prompt, TURNING, {"num_beams": num_beams}, monkeypatch)
    for record, context, ids in zip(TURNING, contexts, ours, strict=True):
        alone = written(backbone, prompt, [record], {"num_beams": num_beams}, monkeypatch)
        assert alone == [ids]
        for count in range(len(ids) if num_beams == 1 else 0):
            row = (*context.token_ids, *ids[:count])
            example = Example(row, context.slot_positions, (len(row) - 1,), (), 0)
            with torch.no_grad():
                logits = target_logits(backbone, [example], prompt.learned(backbone))
            assert int(logits[0].argmax()) == ids[count]
