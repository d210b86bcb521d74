"""Prompt encoders, which compute slot vectors during training and are dropped afterwards, and their initial values.

Encoders of several prompts run at once on a GPU: slot vectors by one batched product, and one step of AdamW for all
weights. A step there is as long as its launches, and each prompt's encoder and optimizer would launch as much as a
layer. A processor gains nothing by it, so prompts go one after another there.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from ptuning.backbone.backbone import Backbone
from ptuning.backbone.randomness import own_draws
from ptuning.config import DeepEncoderKind, EncoderKind, RandomStart, TrainConfig
from ptuning.engine.soft_prompt import DeepParams, initial_deep_params
from ptuning.template.encode import TokenizedTemplate

# Up to this width the paper's sizes hold; beyond it they would train hundreds of millions of weights for a few vectors.
MAX_ENCODER_WIDTH = 1024
# Share of the embedding table's spread in a random start: more drowns the text (docs/decisions.md, decision 3).
RANDOM_START_NOISE = 0.1
# How far a slot moves in a step of Adam, in lengths of the reach and of the learning rate: with a network about as far,
# if all weights of its last layer pull the same way. Source: docs/decisions.md, decisions 3 and 75.
MOVED_BY_A_STEP = 125.0
# The most numbers of the middle layer of a network that makes deep slots.
DEEP_MIDDLE = 512

# Types of devices on which encoders work together. Source: docs/scale.md, "On a GPU".
DEVICES = frozenset({"cuda"})
# Encoders whose products can be batched. An LSTM is one call of the device's own library for each prompt.
BATCHED = ("none", "mlp")
# A batched product holds a copy of each weight until its backward pass, in float32.
COPY_BYTES = 4
# Weights of an encoder that have a row for each slot.
BY_SLOT = ("start", "inputs", "free")
# The least that torch adds to the norm of gradients before it divides by it.
NORM_EPS = 1e-6


class PromptEncoder(nn.Module):
    r"""h_i = start_i + reach * bend(scale * W unit(f_i)), f_i = ReLU(V [LSTM forward(e_0..e_i) : backward(e_i..e_m)]).

    The slots of one template are one sequence in template order. The last layer starts at zero, so that before the
    first step the slot vectors are exactly their starts. Free vectors take the place of W unit(f_i) where there is no
    network, and one learning rate serves both. ``bend(u) = u / sqrt(1 + |u|^2)`` keeps every slot within
    ``reach`` of its start and makes steps alike for all backbones; ``unit`` gives the features of a slot a root mean
    square of 1, so that steps do not grow with them.

    Args:
        start: (P, E) float32; what the slots start at.
        reach: How far a slot can get from its start: the mean norm of the backbone's embeddings.
        kind: ``lstm`` (the paper's), ``mlp`` (each slot alone), or ``none`` (free vectors).
        dropout: Probability, between the LSTM's layers and before the MLP.
        generator: Draws the initial weights.

    Source: Liu et al. (2021), section 3.2, equation 5: two bidirectional LSTM layers of E/2 per direction and a
    two-layer MLP with ReLU. The residual from the start, the zero last layer, unit and bend are ours.
    """

    def __init__(
        self, start: Tensor, *, reach: float, kind: EncoderKind, dropout: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        slots, width = start.shape
        self.kind = kind
        self.reach = reach
        self.register_buffer("start", start.detach().float().clone(), persistent=True)
        if kind == "none":
            # Adam moves each number of a vector alike.
            self.free, self.scale = nn.Parameter(torch.zeros(slots, width)), MOVED_BY_A_STEP / width**0.5
            return
        inner = min(width, MAX_ENCODER_WIDTH)
        half = max(1, inner // 2)
        # One learned input per slot, drawn alike for every backbone: embedding tables differ in scale by a factor of a
        # hundred, and inputs made of the starts got stuck on some data (docs/decisions.md, decision 3).
        self.inputs = nn.Parameter(torch.randn(slots, width, generator=generator))
        self.dropout = nn.Dropout(dropout)
        if kind == "lstm":
            self.lstm = nn.LSTM(width, half, num_layers=2, bidirectional=True, batch_first=True, dropout=dropout)
        self.first = nn.Linear(2 * half if kind == "lstm" else width, inner)
        self.last = nn.Linear(inner, width)
        # A step of Adam adds up over the layer's inputs (half of them, after a ReLU), and its length over its outputs.
        self.scale = 2 * MOVED_BY_A_STEP / (inner * width**0.5)
        self._initialise(generator)

    start: Tensor

    @property
    def drops(self) -> bool:
        """Whether dropout is drawn in training."""
        return self.kind != "none" and self.dropout.p > 0

    def _initialise(self, generator: torch.Generator) -> None:
        for name, weight in self.named_parameters():
            if name == "inputs":
                continue
            bound = weight.shape[-1] ** -0.5
            with torch.no_grad():
                weight.copy_(torch.empty(weight.shape).uniform_(-bound, bound, generator=generator))
        with torch.no_grad():
            self.last.weight.zero_()
            self.last.bias.zero_()

    def forward(self) -> Tensor:
        """Return the slot vectors, (P, E) float32."""
        moved: Tensor = self.scale * (self.free if self.kind == "none" else self._network())  # (P, E)
        return self.start + self.reach * moved / (1.0 + moved.square().sum(dim=-1, keepdim=True)).sqrt()

    def _network(self) -> Tensor:
        """Return the output of the network for the learned inputs, (P, E)."""
        hidden = self.inputs[None]  # (1, P, E)
        if self.kind == "lstm":
            hidden = self.lstm(hidden)[0]  # (1, P, 2 * half)
        hidden = torch.relu(self.first(self.dropout(hidden)))  # (1, P, inner)
        vectors: Tensor = self.last(functional.rms_norm(hidden, hidden.shape[-1:]))[0]
        return vectors


def start_vectors(
    start_ids: Sequence[int | None],
    *,
    vectors_of: Callable[[Tensor], Tensor],
    vocabulary: int,
    mean: Tensor,
    std: Tensor,
    how: RandomStart,
    generator: torch.Generator,
) -> Tensor:
    """Return the initial values of slots, (P, E) float32.

    Args:
        start_ids: P token ids; None where a slot starts at random.
        vectors_of: Returns the embeddings of (N,) token ids, (N, E) float32. The whole table is not needed.
        vocabulary: Number of the tokenizer's tokens.
        mean: (E,) the mean of their embeddings.
        std: (E,) their standard deviation.
        how: ``random`` draws each vector around the table's mean, with :data:`RANDOM_START_NOISE` of its spread per
            dimension; ``vocabulary`` takes the embedding of a random token.
        generator: Draws the random starts.
    """
    random = [index for index, token in enumerate(start_ids) if token is None]
    ids = torch.tensor([token or 0 for token in start_ids], dtype=torch.int64)  # (P,)
    if random and how == "vocabulary":
        ids[random] = torch.randint(vocabulary, (len(random),), generator=generator)
    vectors = vectors_of(ids).cpu()  # (P, E)
    if random and how == "random":
        noise = torch.randn(len(random), vectors.shape[1], generator=generator)
        vectors[random] = mean + RANDOM_START_NOISE * std * noise
    return vectors


class DeepEncoder(nn.Module):
    r"""Deep slots in the layers: start + reach * learned, with a reach for each layer.

    Layers differ in scale by far more than a factor of ten, and a step of Adam is absolute, so what is learned counts
    in the root mean square that tokens have there (for the keys and the values of a block apart). It starts at zero:
    before the first step a deep slot is its start.

    Args:
        start: Deep slots as they start, on the CPU; ``offsets`` are zeros.
        reach: The root mean square of what tokens give: (L, 2) for keys and values, (L - 1,) for inputs of layers.
        kind: ``none`` learns the numbers themselves (P-tuning v2), ``mlp`` one vector for each slot, of which a small
            network makes them (prefix tuning).
        values_only: Whether the keys of a block stay as they start.
        generator: Draws the initial weights of the network.

    Source: Li and Liang (2021), arXiv:2101.00190, section 4.3, for the network; Liu et al. (2022), arXiv:2110.07602,
    section 3.2, for learning without it; docs/decisions.md, decision 63.
    """

    def __init__(
        self,
        start: DeepParams,
        *,
        reach: Mapping[str, Tensor],
        kind: DeepEncoderKind,
        values_only: bool,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.kind, self.bos, self.offset_slots = kind, start.bos, start.offset_slots
        if start.prefix is not None:
            self._add(
                "prefix", start.prefix.permute(3, 0, 1, 2, 4), reach["prefix"][:, :, None, None]
            )  # (C, L, 2, K, D)
            if values_only:
                self.prefix_reach[:, 0] = 0.0
        if start.offsets is not None:
            self._add("offsets", start.offsets, reach["offsets"][:, None])  # (N, L - 1, H)
        for name, at in self._parts().items():
            count, numbers = len(at), at[0].numel()
            if kind == "none":
                self.register_parameter(f"{name}_free", nn.Parameter(torch.zeros_like(at)))
                continue
            middle = min(DEEP_MIDDLE, numbers)
            inputs = torch.randn(count, middle, generator=generator)
            first = torch.empty(middle, middle).uniform_(-(middle**-0.5), middle**-0.5, generator=generator)
            self.register_parameter(f"{name}_inputs", nn.Parameter(inputs))
            self.register_parameter(f"{name}_first", nn.Parameter(first))
            self.register_parameter(f"{name}_last", nn.Parameter(torch.zeros(numbers, middle)))

    prefix_reach: Tensor

    def _add(self, name: str, start: Tensor, reach: Tensor) -> None:
        self.register_buffer(f"{name}_start", start.detach().float().clone())
        self.register_buffer(f"{name}_reach", reach.detach().float().clone())

    def _parts(self) -> dict[str, Tensor]:
        """Return the learned tensors by name, a slot in each row, as they start."""
        prefix = {"prefix": self.prefix_start[self.bos :]} if hasattr(self, "prefix_start") else {}
        return prefix | ({"offsets": self.offsets_start} if hasattr(self, "offsets_start") else {})

    prefix_start: Tensor
    offsets_start: Tensor

    def forward(self) -> DeepParams:
        """Return the deep slots now."""
        parts = {
            name: start + getattr(self, f"{name}_reach") * self._moved(name).view(start.shape)
            for name, start in self._parts().items()
        }
        prefix = parts.get("prefix")
        if prefix is not None:
            prefix = torch.cat([self.prefix_start[: self.bos], prefix]).permute(1, 2, 3, 0, 4)  # (L, 2, K, C, D)
        return DeepParams(prefix, self.bos, parts.get("offsets"), self.offset_slots)

    def _moved(self, name: str) -> Tensor:
        if self.kind == "none":
            free: Tensor = getattr(self, f"{name}_free")
            return free
        inputs, first, last = (getattr(self, f"{name}_{part}") for part in ("inputs", "first", "last"))
        hidden = torch.tanh(inputs @ first.T)  # (N, middle)
        # A step of Adam adds up over the middle layer, whose numbers are about a half: it moves what is made by about
        # the learning rate, as it moves free vectors.
        vectors: Tensor = 2.0 / hidden.shape[1] * hidden @ last.T
        return vectors


def make_encoders(
    frozen: Backbone, bound: TokenizedTemplate, config: TrainConfig, generator: Callable[[str], torch.Generator]
) -> tuple[PromptEncoder, DeepEncoder | None]:
    """Return the encoder of a template's slots on a backbone, and that of deep slots, if there are any; ``generator``
    returns the random generator of a purpose.
    """
    table = frozen.table_statistics
    start = start_vectors(
        bound.slot_start_ids,
        vectors_of=frozen.vectors_of,
        vocabulary=frozen.vocabulary,
        mean=table.mean,
        std=table.std,
        how=config.start,
        generator=generator("slot starts"),
    )
    with own_draws():  # torch's modules draw weights of their own before ours are written
        encoder = PromptEncoder(
            start,
            reach=table.norm,
            kind=config.encoder if bound.slots else "none",
            dropout=config.dropout,
            generator=generator("encoder weights"),
        ).to(frozen.device)
    initial = initial_deep_params(
        frozen, bound, generator=generator("deep slots"), random=config.deep_start == "random"
    )
    if initial is None:
        return encoder, None
    params, reach = initial
    deep = DeepEncoder(
        params,
        reach=reach,
        kind=config.deep_encoder,
        values_only=config.values_only,
        generator=generator("deep encoder weights"),
    )
    return encoder, deep.to(frozen.device)


def works_together(device: torch.device) -> bool:
    """Whether encoders of several prompts work together on a device."""
    return device.type in DEVICES


def copied_bytes(encoder: PromptEncoder, device: torch.device) -> int:
    """Return the bytes for each weight of an encoder that a step together with others takes on a device besides."""
    return COPY_BYTES if works_together(device) and encoder.kind in BATCHED else 0


class StackedEncoders:
    """Slot vectors of several encoders of one kind and one backbone, by one product for each layer.

    Each prompt gets its own (P, E) vectors of it in :attr:`parts`, where gradients end; :meth:`backward` brings them to
    the weights of the encoders.

    Args:
        encoders: Of a kind in :data:`BATCHED`, without dropout; they may have different numbers of slots.
    """

    def __init__(self, encoders: Sequence[PromptEncoder]) -> None:
        slots = max(len(encoder.start) for encoder in encoders)

        def padded(weight: Tensor, name: str) -> Tensor:
            missing = slots - len(weight) if name in BY_SLOT else 0  # slots do not see each other
            return functional.pad(weight, (0, 0, 0, missing)) if missing else weight

        named = [{**dict(encoder.named_parameters()), **dict(encoder.named_buffers())} for encoder in encoders]
        stacked = {name: torch.stack([padded(weights[name], name) for weights in named]) for name in named[0]}
        first = encoders[0]

        def run(own: Mapping[str, Tensor]) -> Tensor:
            vectors: Tensor = functional_call(first, dict(own), ())
            return vectors

        vectors: Tensor = torch.vmap(run, randomness="different")(stacked)  # (N, P, E) of N encoders
        rows = zip(vectors.unbind(), (len(encoder.start) for encoder in encoders), strict=True)
        self._vectors = [own if count == slots else own[:count] for own, count in rows]
        # Each is a leaf of its own, so that a pass of one prompt touches nothing of the others.
        self.parts = [own.detach().requires_grad_(True) for own in self._vectors]

    def backward(self) -> None:
        """Bring the gradients of the vectors to the weights."""
        pairs = [(own, part.grad) for own, part in zip(self._vectors, self.parts, strict=True) if part.grad is not None]
        if pairs:
            torch.autograd.backward([own for own, _ in pairs], [gradient for _, gradient in pairs])


def stacked_where_it_helps(encoders: Sequence[PromptEncoder]) -> dict[PromptEncoder, tuple[StackedEncoders, Tensor]]:
    """Return encoder -> its batch with others and its slot vectors there, for encoders whose product can be batched."""
    batched: dict[PromptEncoder, tuple[StackedEncoders, Tensor]] = {}
    for kind in BATCHED:
        own = [encoder for encoder in encoders if encoder.kind == kind and not encoder.drops and len(encoder.start)]
        if len(own) > 1:
            stacked = StackedEncoders(own)
            batched |= {encoder: (stacked, part) for encoder, part in zip(own, stacked.parts, strict=True)}
    return batched


def adamw_step(optimizers: Sequence[torch.optim.Optimizer], max_norms: Sequence[float]) -> None:
    """Clip the gradients of each optimizer of AdamW to its largest norm and move its weights, in one call for all.

    States are those that torch's own step would leave. Gradients are used up.
    Source: Loshchilov and Hutter (2019), arXiv:1711.05101, algorithm 2, as ``torch.optim.AdamW`` has it.
    """
    moved: list[tuple[int, dict[str, Any], nn.Parameter]] = [
        (owner, group, weight)
        for owner, optimizer in enumerate(optimizers)
        for group in optimizer.param_groups
        for weight in group["params"]
        if weight.grad is not None
    ]
    if not moved:
        return
    owners, groups = [owner for owner, _, _ in moved], [group for _, group, _ in moved]
    weights = [weight.detach() for _, _, weight in moved]
    gradients = [weight.grad for _, _, weight in moved if weight.grad is not None]
    states: list[dict[str, Tensor]] = [optimizers[owner].state[weight] for owner, _, weight in moved]
    for state, weight in zip(states, weights, strict=True):
        if not state:
            state |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(weight)}
            state["exp_avg_sq"] = torch.zeros_like(weight)
    firsts, seconds, steps = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))
    (beta, second_beta), eps = groups[0]["betas"], float(groups[0]["eps"])  # no setting changes them
    with torch.no_grad():
        squares = torch.stack(torch._foreach_norm(gradients)).square()
        norms = squares.new_zeros(len(max_norms)).index_add_(0, torch.tensor(owners, device=squares.device), squares)
        factors = [limit / (norm + NORM_EPS) for limit, norm in zip(max_norms, norms.sqrt().tolist(), strict=True)]
        # A number that is no number stays one.
        torch._foreach_mul_(gradients, [1.0 if factors[owner] >= 1.0 else factors[owner] for owner in owners])
        torch._foreach_add_(steps, 1)
        counts = [int(step) for step in steps]
        torch._foreach_mul_(weights, [1.0 - group["lr"] * group["weight_decay"] for group in groups])
        torch._foreach_lerp_(firsts, gradients, 1.0 - beta)
        torch._foreach_mul_(seconds, second_beta)
        torch._foreach_addcmul_(seconds, gradients, gradients, 1.0 - second_beta)
        # Gradients make room for what the first moments are divided by.
        torch._foreach_copy_(gradients, seconds)
        torch._foreach_sqrt_(gradients)
        torch._foreach_div_(gradients, [(1.0 - second_beta**count) ** 0.5 for count in counts])
        torch._foreach_add_(gradients, eps)
        sizes = [-group["lr"] / (1.0 - beta**count) for group, count in zip(groups, counts, strict=True)]
        torch._foreach_addcdiv_(weights, firsts, gradients, sizes)
