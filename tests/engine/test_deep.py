"""Deep slots keep the invariants of docs/invariants.md on every family: before training a deep slot is its token."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ptuning.backbone.backbone import Backbone
from ptuning.engine.batch import collate
from ptuning.engine.decoding import DecodingState
from ptuning.engine.forward import forward, forward_batch, target_logits
from ptuning.engine.prefix_cache import PrefixCache
from ptuning.engine.soft_prompt import DeepParams, PromptBatch, initial_deep_params
from ptuning.template.encode import Example, TokenizedTemplate
from ptuning.template.language import Template
from tests.backbone.test_families import close, every_family, plain
from tests.conftest import RECORDS
from tests.families import backbone_of

WORDS = "[D:the capital of] [X] [D:is] so [Y]"
TWO_SIDED = "[D:the capital of] [X] is [>] [D:the city] so [Y]"
# The families whose deep slots in front are keys and values; asking each would build all models while collecting.
BLOCKS = ["gpt2", "opt", "opt-350m", "gpt-neox", "llama", "qwen3", "bloom", "glm-4", "falcon", "phi", "gpt-j", "gemma"]
BLOCKS += ["xglm", "stablelm", "cohere", "ctrl"]
WINDOWS_AND_STATES = ("mistral", "gemma-2", "gemma-3", "mamba", "rwkv")
every_block = pytest.mark.parametrize("name", BLOCKS)


def templates(backbone: Backbone) -> list[str]:
    return [WORDS, TWO_SIDED] if backbone.kind == "encoder-decoder" else [WORDS]


def bind(backbone: Backbone, template: str, *, block: bool = False) -> TokenizedTemplate:
    return TokenizedTemplate(Template.parse(template), tokenizer=backbone.tokenizer, kind=backbone.kind, block=block)


def start_of(backbone: Backbone, bound: TokenizedTemplate, *, noise: float = 0.0) -> PromptBatch:
    """What a prompt brings before training, or with noise as if it had learned."""
    generator = torch.Generator().manual_seed(1)
    starts = torch.tensor([start or 0 for start in bound.slot_start_ids], dtype=torch.int64)
    vectors = backbone.vectors_of(starts).cpu()
    found = initial_deep_params(backbone, bound, generator=generator)
    deep = found[0] if found is not None else None
    if deep is not None:
        deep = deep.map(lambda one: one + noise * torch.randn(one.shape, generator=generator))
    return PromptBatch.of(vectors, deep)


def tokens_of(bound: TokenizedTemplate, example: Example) -> list[int]:
    """The row with the tokens that its slots start at."""
    starts = [*bound.layout.prefix.bos_ids, *bound.layout.prefix.start_ids, *example.token_ids]
    for position, start in zip(example.slot_positions, bound.slot_start_ids, strict=True):
        assert start is not None
        starts[example.prefix_length + position] = start
    return [token or 0 for token in starts]


def whole(example: Example) -> Example:
    """The row with what its prompt brings in front as part of it, for its scored positions."""
    return replace(example, logit_positions=tuple(example.prefix_length + at for at in example.logit_positions))


@every_family
def test_before_training_a_deep_slot_is_its_token(name: str) -> None:
    backbone = backbone_of(name)
    for template in templates(backbone):
        for block in {False, backbone.reads_blocks}:
            bound = bind(backbone, template, block=block)
            assert bool(bound.layout.prefix.length) == block
            assert backbone.reads_blocks == (name in BLOCKS)
            examples = bound.examples(RECORDS[:3])
            assert len({len(one.token_ids) for one in examples}) > 1, (
                "rows of different lengths, so that some have pads"
            )
            wanted = torch.cat([plain(backbone, whole(one), tokens_of(bound, one)) for one in examples])
            with torch.no_grad():
                for side in ("right", "left") if backbone.pads_left else ("right",):
                    close(target_logits(backbone, examples, start_of(backbone, bound), pad_side=side), wanted)


@every_family
def test_what_a_deep_slot_learned_reaches_its_own_row_and_from_every_layer(name: str) -> None:
    backbone = backbone_of(name)
    bound = bind(backbone, WORDS)
    examples = bound.examples(RECORDS[:2])
    start = start_of(backbone, bound)
    deep = start.deep[0]
    assert deep is not None
    assert deep.offsets is not None
    with torch.no_grad():
        before = target_logits(backbone, examples, start)
        for layer in range(deep.offsets.shape[1]):
            moved = deep.offsets.clone()
            moved[-1, layer] += 3 * torch.linspace(-1, 1, moved.shape[2])
            found = target_logits(backbone, examples, PromptBatch.of(start.vectors, replace(deep, offsets=moved)))
            assert not torch.equal(found, before), layer
    values = deep.offsets.clone().requires_grad_(True)
    logits = target_logits(backbone, examples, PromptBatch.of(start.vectors, replace(deep, offsets=values)))
    logits.logsumexp(-1).sum().backward()
    assert values.grad is not None
    assert bool(values.grad.isfinite().all())
    assert (values.grad.abs().amax(dim=(0, 2)) > 0).all(), "gradients reach every layer"


@every_block
def test_keys_and_values_in_front_are_what_the_same_tokens_are_in_the_row(name: str) -> None:
    backbone = backbone_of(name)
    inside, front = (bind(backbone, "[D:the capital of] [X] is [Y]", block=block) for block in (False, True))
    rows = [bound.examples(RECORDS[:3]) for bound in (inside, front)]
    with torch.no_grad():
        one, other = (
            target_logits(backbone, own, start_of(backbone, bound))
            for own, bound in zip(rows, (inside, front), strict=True)
        )
    close(one, other)


def prompts(backbone: Backbone) -> list[tuple[TokenizedTemplate, PromptBatch]]:
    """Prompts that have learned: blocks of two lengths, deep slots in the row, both, shallow ones, and none."""
    patterns = ["[D:the capital of] [X] is [Y]", "[D:city] [X] [D:is in] so [Y]", "so [X] [D:is] [Y]"]
    patterns += ["[P*2] [X] is [P] [Y]", "[X] is [Y]"]
    found = []
    for pattern in patterns:
        bound = bind(backbone, pattern, block=backbone.reads_blocks)
        own = start_of(backbone, bound, noise=0.2)
        found.append((bound, own if bound.slots or bound.layout.prefix.length else PromptBatch.none(backbone.width)))
    return found


@every_family
@torch.no_grad()
def test_alone_or_in_company_of_other_prompts(name: str) -> None:
    backbone = backbone_of(name)
    made = [(bound.examples([record])[0], own) for record in RECORDS[:2] for bound, own in prompts(backbone)]
    together = PromptBatch.join([own for _, own in made], rows=range(len(made)))
    examples = [example for example, _ in made]
    sides: Sequence[str] = ("right", "left") if backbone.pads_left else ("right",)
    for side in sides:
        company = target_logits(backbone, examples, together, pad_side=side)  # type: ignore[arg-type]
        counts = [len(example.logit_positions) for example in examples]
        for (example, own), logits in zip(made, company.split(counts), strict=True):
            close(logits, target_logits(backbone, [example], own))


@pytest.mark.parametrize("name", [*BLOCKS, *WINDOWS_AND_STATES])
@torch.no_grad()
def test_written_on_from_the_cache_as_from_whole_rows(name: str) -> None:
    backbone = backbone_of(name)
    made = [(bound.contexts(RECORDS[at : at + 1])[0], own) for at, (bound, own) in enumerate(prompts(backbone)[:3])]
    together = PromptBatch.join([own for _, own in made], rows=range(len(made)))
    if not backbone.pads_left:
        made, together = made[:1], made[0][1]
    examples = [example for example, _ in made]
    rows = DecodingState(backbone, examples, forward(backbone, examples, together, pad_side="left", keep=True))
    tokens = torch.tensor([7, 8, 9][: len(made)])
    rows.read(tokens)
    for place, ((example, own), token) in enumerate(zip(made, tokens.tolist(), strict=True)):
        longer = replace(
            example, token_ids=(*example.token_ids, token), logit_positions=(len(example.token_ids),), target_ids=()
        )
        close(rows.logits[place : place + 1], target_logits(backbone, [longer], own))


@every_block
def test_gradients_of_a_shared_block_are_those_of_repeated_rows(name: str) -> None:
    backbone = backbone_of(name)
    bound = bind(backbone, "[D:the capital of] [X] is [Y]", block=True)
    examples, start = bound.examples(RECORDS[:3]), start_of(backbone, bound)
    deep = start.deep[0]
    assert deep is not None
    assert deep.prefix is not None

    def gradient(learned: PromptBatch, block: Tensor) -> Tensor:
        forward_batch(backbone, collate(examples, learned), learned).logits.logsumexp(-1).sum().backward()
        assert block.grad is not None
        return block.grad

    shared = deep.prefix.clone().requires_grad_(True)
    one = gradient(PromptBatch.of(start.vectors, replace(deep, prefix=shared)), shared)
    own = deep.prefix.clone().requires_grad_(True)
    copies = [PromptBatch.of(start.vectors, replace(deep, prefix=own * 1.0)) for _ in examples]
    torch.testing.assert_close(
        one, gradient(PromptBatch.join(copies, rows=range(len(copies))), own), atol=1e-5, rtol=1e-4
    )


@torch.no_grad()
def test_a_row_does_not_read_what_is_hidden_from_it() -> None:
    backbone = backbone_of("llama")
    for block in (False, True):
        bound = bind(backbone, "[D:the capital of] [X] is [Y]", block=block)
        example, own = bound.examples(RECORDS[:1])[0], start_of(backbone, bound)
        hidden = replace(example, unread=(bound.layout.places(example.slot_positions)[1],))
        found = [target_logits(backbone, [row], own) for row in (example, hidden)]
        assert not torch.equal(*found)
        company = target_logits(backbone, [example, hidden], own)
        close(company, torch.cat(found))
        slot = 1 if block else example.slot_positions[1]
        deep = own.deep[0]
        assert deep is not None
        if deep.prefix is not None:
            moved = deep.prefix.clone()
            moved[:, :, :, deep.bos + slot] += 5
            other = PromptBatch.of(own.vectors, replace(deep, prefix=moved))
            close(target_logits(backbone, [hidden], other), found[1])


@torch.no_grad()
def test_text_in_front_of_late_deep_slots_is_read_once() -> None:
    backbone = backbone_of("llama")
    bound = bind(backbone, "a city by the sea and its capital , {x} [D:is] so [Y]", block=True)
    examples, own = bound.examples(RECORDS), start_of(backbone, bound, noise=0.2)
    cache = PrefixCache(backbone, memory_share=0.1)
    assert cache.prepare(examples)
    close(
        forward(backbone, examples, own, cache=cache).logits,
        torch.cat([forward(backbone, [one], own).logits for one in examples]),
    )


def test_parts_of_what_is_learned_belong_to_their_slots() -> None:
    deep = DeepParams(torch.zeros(2, 2, 1, 3, 4), 1, torch.arange(3.0)[:, None, None].expand(3, 1, 2), (0, 2, 3))
    first, rest = PromptBatch.of(torch.arange(4.0)[:, None], deep).parts(2)
    (one, other) = (part.deep[0] for part in (first, rest))
    assert one is not None
    assert other is not None
    assert (one.offset_slots, other.offset_slots, one.prefix_slots, other.prefix_slots, other.count) == (
        (0,),
        (0, 1),
        2,
        0,
        2,
    )
    assert first.vectors[:, 0].tolist() == [0.0, 1.0]
    assert other.offsets is not None
    assert other.offsets[:, 0, 0].tolist() == [1.0, 2.0]
