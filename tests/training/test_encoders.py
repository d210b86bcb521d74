"""The prompt encoder: it starts at its starts, follows the paper's equation, and stays small.

The invariants that tests name are those of docs/invariants.md.
"""

from typing import get_args

import pytest
import torch
from torch import Tensor

from ptuning.config import DeepEncoderKind, EncoderKind, RandomStart
from ptuning.engine.soft_prompt import DeepParams
from ptuning.training.encoders import (
    MAX_ENCODER_WIDTH,
    MOVED_BY_A_STEP,
    DeepEncoder,
    PromptEncoder,
    start_vectors,
)

KINDS = get_args(EncoderKind)


def make(start: Tensor, kind: EncoderKind, *, reach: float = 2.0, dropout: float = 0.0, seed: int = 0) -> PromptEncoder:
    """Build an encoder from a seed of its own."""
    generator = torch.Generator().manual_seed(seed)
    return PromptEncoder(start, reach=reach, kind=kind, dropout=dropout, generator=generator)


def shaken(encoder: PromptEncoder) -> PromptEncoder:
    """Give an encoder random weights everywhere, as after some training."""
    with torch.no_grad():
        for weight in encoder.parameters():
            weight.copy_(torch.randn(weight.shape) * 0.3)
    return encoder.eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
def test_before_the_first_step_the_vectors_are_their_starts(kind: EncoderKind, scale: float) -> None:
    """Invariant *Identity*: before the first step vectors are exactly their starts, on whatever scale."""
    start = torch.randn(5, 16) * scale
    encoder = make(start, kind, dropout=0.5)
    for training in (True, False):
        assert torch.equal(encoder.train(training)(), start)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("slots", "width"), [(1, 2), (1, 7), (3, 16), (200, 8)])
def test_shapes(kind: EncoderKind, slots: int, width: int) -> None:
    """(P, E) float32 for one slot and for many, for odd widths too."""
    encoder = shaken(make(torch.randn(slots, width), kind))
    assert encoder().shape == (slots, width)
    assert encoder().dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_the_callers_start_is_copied(kind: EncoderKind) -> None:
    """What the caller does to its tensor later changes nothing, and a start in half precision becomes float32.

    Slot vectors in bfloat16 would lose small steps: a 0.5 never moves under steps of 0.0009.
    """
    start = torch.randn(3, 8).bfloat16()
    encoder = make(start, kind)
    before = encoder().detach().clone()
    start.zero_()
    assert encoder.start.dtype == torch.float32
    assert torch.equal(encoder(), before)


@pytest.mark.parametrize("kind", ["lstm", "mlp"])
def test_width_is_bounded(kind: EncoderKind) -> None:
    """Beyond a bound the number of weights grows with the backbone's width, not with its square.

    Without a bound, the encoder of a large backbone has hundreds of millions of weights, to make a few thousand numbers
    per slot.
    """
    widths = (MAX_ENCODER_WIDTH, 2 * MAX_ENCODER_WIDTH, 3 * MAX_ENCODER_WIDTH)
    counts = [sum(weight.numel() for weight in make(torch.zeros(2, width), kind).parameters()) for width in widths]
    assert counts[2] - counts[1] == counts[1] - counts[0]
    paper = 2 * (4 * 1536 * (3072 + 1536 + 2) + 4 * 1536 * (3072 + 1536 + 2)) + 2 * 3072 * 3073
    assert counts[2] < paper / 5


def test_the_papers_sizes_below_the_bound() -> None:
    """Source: Liu et al. (2021), section 3.2: two bidirectional layers of width/2 per direction, a two-layer MLP."""
    encoder = make(torch.zeros(3, 64), "lstm")
    assert (encoder.lstm.hidden_size, encoder.lstm.num_layers, encoder.lstm.bidirectional) == (32, 2, True)
    assert (encoder.first.in_features, encoder.first.out_features) == (64, 64)
    assert (encoder.last.in_features, encoder.last.out_features) == (64, 64)


def test_lstm_encoder_equals_the_equations_by_hand() -> None:
    """h_i = start_i + bent MLP([forward LSTM : backward LSTM]), against a loop over slots, layers and directions."""
    slots, width, half = 4, 6, 3
    encoder = shaken(make(torch.randn(slots, width), "lstm"))
    weights = dict(encoder.lstm.named_parameters())

    def direction(inputs: list[Tensor], layer: int, suffix: str) -> list[Tensor]:
        hidden, cell, outputs = torch.zeros(half), torch.zeros(half), []
        for vector in inputs:
            gates = (
                weights[f"weight_ih_l{layer}{suffix}"] @ vector
                + weights[f"bias_ih_l{layer}{suffix}"]
                + weights[f"weight_hh_l{layer}{suffix}"] @ hidden
                + weights[f"bias_hh_l{layer}{suffix}"]
            )
            in_gate, forget, new, out = gates.split(half)
            cell = forget.sigmoid() * cell + in_gate.sigmoid() * new.tanh()
            hidden = out.sigmoid() * cell.tanh()
            outputs.append(hidden)
        return outputs

    row = list(encoder.inputs)
    for layer in (0, 1):
        forward = direction(row, layer, "")
        backward = direction(row[::-1], layer, "_reverse")[::-1]
        row = [torch.cat(pair) for pair in zip(forward, backward, strict=True)]
    expected = []
    for start, hidden in zip(encoder.start, row, strict=True):
        first = (encoder.first.weight @ hidden + encoder.first.bias).relu()
        unit = first / first.square().mean().sqrt()
        moved = 2 * MOVED_BY_A_STEP / (width * width**0.5) * (encoder.last.weight @ unit + encoder.last.bias)
        expected.append(start + 2.0 * moved / (1.0 + moved @ moved).sqrt())
    torch.testing.assert_close(encoder(), torch.stack(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_no_slot_gets_further_from_its_start_than_the_reach(kind: EncoderKind) -> None:
    """A slot that ran away on one split of P36, to ten times the length of an embedding, never came back."""
    encoder = make(torch.randn(4, 16), kind, reach=3.0)
    last = encoder.free if kind == "none" else encoder.last.weight
    with torch.no_grad():
        last.fill_(1e4)
    assert ((encoder() - encoder.start).norm(dim=-1) <= 3.0 + 1e-4).all()
    with torch.no_grad():
        last.fill_(0.0)
        (encoder.free if kind == "none" else encoder.last.bias).fill_(1e-3)
    # Near the start the bend is straight. A network adds up over its 16 features, half of which are zero.
    small = torch.full((4, 16), 3.0 * MOVED_BY_A_STEP / 4.0 * 1e-3 * (1.0 if kind == "none" else 2.0 / 16))
    torch.testing.assert_close(encoder() - encoder.start, small, rtol=1e-2, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_lstm_lets_slots_know_of_each_other(kind: EncoderKind) -> None:
    """The paper's association: with the LSTM every vector depends on every slot's input, with the others on its own."""
    encoder = shaken(make(torch.randn(4, 6), kind))
    leaf = encoder.free if kind == "none" else encoder.inputs
    for slot in range(4):
        (gradient,) = torch.autograd.grad(encoder()[slot].sum(), leaf)
        reached = (gradient.abs().sum(dim=-1) > 0).tolist()
        assert reached == ([True] * 4 if kind == "lstm" else [index == slot for index in range(4)])


def test_order_matters_to_the_lstm_only() -> None:
    """The LSTM reads slots as a sequence, in template order, so it is the one encoder to which their order matters."""
    for kind in KINDS:
        encoder = shaken(make(torch.randn(4, 6), kind))
        before = encoder().detach()
        with torch.no_grad():
            for tensor in (encoder.start, encoder.free if kind == "none" else encoder.inputs):
                tensor.copy_(tensor.flip(0))
        same = torch.allclose(encoder(), before.flip(0), atol=1e-5)
        assert same == (kind != "lstm")


@pytest.mark.parametrize("kind", ["lstm", "mlp"])
def test_dropout_is_off_in_evaluation(kind: EncoderKind) -> None:
    """Saved vectors are those of evaluation mode, in which the encoder gives the same ones each time."""
    encoder = shaken(make(torch.randn(4, 16), kind, dropout=0.5))
    assert torch.equal(encoder(), encoder())
    encoder.train()
    assert not torch.equal(encoder(), encoder())


@pytest.mark.parametrize("kind", KINDS)
def test_weights_come_from_the_generator_alone(kind: EncoderKind) -> None:
    """Invariant *Seeds are separate*: the global generator has no say, the seed has."""
    start = torch.randn(3, 8)

    def weights(seed: int, disturb: int) -> Tensor:
        torch.manual_seed(disturb)
        return torch.cat([weight.detach().flatten() for weight in make(start, kind, seed=seed).parameters()])

    assert torch.equal(weights(0, 1), weights(0, 2))
    assert kind == "none" or not torch.equal(weights(0, 1), weights(1, 1))


def table(rows: int = 400, width: int = 12) -> Tensor:
    """Return an embedding table whose dimensions differ in mean and spread."""
    generator = torch.Generator().manual_seed(3)
    spread = torch.linspace(0.01, 3.0, width)
    return torch.randn(rows, width, generator=generator) * spread + torch.linspace(-2, 2, width)


def starts(ids: list[int | None], how: RandomStart = "random", seed: int = 0) -> Tensor:
    """Draw start vectors from a seed of their own."""
    one = table()
    draw = torch.Generator().manual_seed(seed)
    return start_vectors(
        ids,
        vectors_of=lambda token_ids: one[token_ids],
        vocabulary=len(one),
        mean=one.mean(dim=0),
        std=one.std(dim=0),
        how=how,
        generator=draw,
    )


def test_text_starts_are_the_tokens_embeddings() -> None:
    """A slot with a word starts at exactly its token's embedding, token 0 included, whatever is random beside it."""
    found = starts([0, 7, None, 7, None])
    assert torch.equal(found[[0, 1, 3]], table()[[0, 7, 7]])
    assert not any(torch.equal(found[2], row) for row in table())


def test_random_starts_are_the_tables_mean_with_a_tenth_of_its_spread() -> None:
    """Per dimension, so that no slot is an outlier in a narrow one; little, so that it does not drown the text."""
    found = starts([None] * 1000)
    torch.testing.assert_close(found.mean(dim=0), table().mean(dim=0), atol=0.035, rtol=0.0)
    torch.testing.assert_close(10 * found.std(dim=0), table().std(dim=0), atol=0.0, rtol=0.1)


def test_vocabulary_starts_are_embeddings_of_tokens() -> None:
    """Another start of the paper's baselines."""
    found = starts([None] * 20, "vocabulary")
    rows = {tuple(row.tolist()) for row in table()}
    assert {tuple(row.tolist()) for row in found} <= rows
    assert len({tuple(row.tolist()) for row in found}) > 10


@pytest.mark.parametrize("how", get_args(RandomStart))
def test_starts_come_from_the_generator(how: RandomStart) -> None:
    """Invariant *Seeds are separate*: equal seeds give equal starts, other seeds give others."""
    assert torch.equal(starts([None] * 3, how, seed=1), starts([None] * 3, how, seed=1))
    assert not torch.equal(starts([None] * 3, how, seed=1), starts([None] * 3, how, seed=2))


@pytest.mark.parametrize("kind", ["lstm", "mlp"])
def test_steps_do_not_grow_with_the_features(kind: EncoderKind) -> None:
    """Features that grew made every step larger than the last, until one threw the prompt back to nothing."""
    encoder = make(torch.randn(4, 16), kind)
    with torch.no_grad():
        encoder.last.weight.normal_()
        before = encoder().clone()
        encoder.first.weight.mul_(100.0)
        encoder.first.bias.mul_(100.0)
    torch.testing.assert_close(encoder(), before, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["mlp", "none"])
@pytest.mark.parametrize("width", [16, 96, MAX_ENCODER_WIDTH + 128])
def test_a_step_is_as_long_for_every_width_with_a_network_and_without(width: int, kind: EncoderKind) -> None:
    """Adam moves every weight alike, so that a wider layer would move a slot further, and a network further than free
    vectors: one learning rate would be ten times too low for these.
    """
    encoder = make(torch.zeros(2, width), kind, reach=1.0)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=1e-3)
    encoder().sum().backward()
    optimizer.step()
    # MOVED_BY_A_STEP times the learning rate is 0.125, bent to 0.124.
    assert ((encoder() - encoder.start).norm(dim=-1) - 0.13).abs().max() < 0.05


@pytest.mark.parametrize("kind", ["none", "mlp"])
@pytest.mark.parametrize("width", [4, 64, 1024])
def test_a_step_moves_deep_slots_by_about_the_learning_rate(width: int, kind: DeepEncoderKind) -> None:
    """In shares of what tokens measure, with a network or without, for every width: one rate serves all kinds."""
    start = DeepParams(None, 0, torch.zeros(3, 2, width), (0, 1, 2))
    reach = {"offsets": torch.tensor([1.0, 50.0])}
    generator = torch.Generator().manual_seed(0)
    encoder = DeepEncoder(start, reach=reach, kind=kind, values_only=False, generator=generator)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=1e-2)
    offsets = encoder().offsets
    assert offsets is not None
    offsets.sum().backward()
    optimizer.step()
    moved = encoder().offsets
    assert moved is not None
    shares = (moved / reach["offsets"][:, None]).mean(dim=-1)
    assert ((shares.abs() > 0.002) & (shares.abs() < 0.016)).all(), shares  # slots share a network, and pull apart
