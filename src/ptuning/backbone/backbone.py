"""The backbone: a language model that is frozen, copied, and asked once for its abilities."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from ptuning.backbone.forward import HEAD, LanguageModel, Memory
from ptuning.backbone.layers import LayerOffsets
from ptuning.backbone.number_format import format_of, keep_in_place, short_name
from ptuning.backbone.probes import (
    BlockShape,
    DeepShape,
    block_shape,
    check_gradients,
    check_reading,
    deep_shape,
    follows_branches,
    logits_with_pads,
    same_logits,
    shares_prefix,
    turning_length,
)
from ptuning.backbone.randomness import own_draws
from ptuning.backbone.sources import LoadOptions
from ptuning.backbone.tokenizer import original_lengths
from ptuning.backbone.weights import (
    Shards,
    devices_of,
    fingerprint,
    is_offloaded,
    is_packed,
    number_of_weights,
    sharing,
)
from ptuning.errors import BackboneError
from ptuning.files import Json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class TableStatistics(NamedTuple):
    """Mean and standard deviation of the embeddings of all tokens, (E,) float32 on the CPU, and their mean norm."""

    mean: Tensor
    std: Tensor
    norm: float


class Backbone(LanguageModel):
    """A language model with a copy of its tokenizer. ``name`` is its known name, folder or hub id.
    Raises BackboneError if the model is not a language model, or does not take embeddings as input.
    """

    trained: object | None = None  # the trained weights that were put into it, if any
    dtype_reason: str | None = None  # reason for the number format of its weights, where it was chosen on loading
    load_options: LoadOptions | None = None  # options that it was loaded with
    max_length: int | None = None  # maximum row length, where a smaller one was asked for than the model reads

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        revision: str | None = None,
        is_tokenizer_shared: bool = True,
    ) -> None:
        keep_in_place(model)
        super().__init__(model, tokenizer, name=name, is_tokenizer_shared=is_tokenizer_shared)
        self.revision = revision
        self.shards = Shards.of(model)
        self.turn = turning_length(self, original_lengths(model.config))

    @classmethod
    def from_model(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str | None = None
    ) -> Backbone:
        """Make a frozen backbone of a model in memory. It has modules of its own over the same weights, so the model
        stays as it is (mode, gradients, hooks), and its owner may go on using it. If its owner goes on training it,
        the backbone changes along; make a new one then.

        Args:
            model: A language model of transformers, on any device and in any dtype.
            tokenizer: Its tokenizer; the backbone works on a copy.
            name: Name of the backbone in prompts; by default where the model was loaded from.

        Raises:
            BackboneError: If the model cannot be used; the message says why.
        """
        for given, wanted in ((model, "PreTrainedModel"), (tokenizer, "PreTrainedTokenizerBase")):
            if wanted not in {base.__name__ for base in type(given).__mro__}:
                raise BackboneError(
                    f"a backbone is made of a transformers model and its tokenizer, and {type(given).__name__} is no "
                    f"{wanted}; unwrap it (an adapter's merge_and_unload, a compiled or parallel model's module), or "
                    "load a name with load_backbone"
                )
        origin = str(getattr(model.config, "name_or_path", None) or "")
        from_hub = name is None and origin and not Path(origin).exists()
        backbone = cls(
            sharing(model),
            tokenizer,
            name=name or origin or f"a {type(model).__name__} in memory",
            revision=getattr(model.config, "_commit_hash", None) if from_hub else None,
        )
        backbone.freeze()
        check_reading(backbone)
        return backbone

    @property
    def parameters(self) -> int:
        """Number of weights; tied weights count once."""
        return number_of_weights(self.model)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hashes of the embedding table and of samples of every weight; see :mod:`ptuning.backbone.weights`."""
        _ = self._table_weight  # raises, if there is none
        return fingerprint(self.model, self._embedding, name=self.name)

    @property
    def loaded(self) -> dict[str, str]:
        """Options in effect: ``dtype``, ``attn_implementation``, and ``quantization`` and ``max_length`` if any."""
        config = self.model.config
        attention, quantization = getattr(config, "_attn_implementation", None), format_of(config)
        return {
            "dtype": short_name(self.dtype),
            **({"attn_implementation": attention} if isinstance(attention, str) else {}),
            **({"quantization": quantization} if quantization is not None else {}),
            **({"max_length": str(self.max_length)} if self.max_length is not None else {}),
        }

    def to_json(self) -> dict[str, Json]:
        """Return the identity of the backbone, for the record of a run. ``shards`` are where weights are that are not
        all in one place, and which abilities that costs.
        """
        about: dict[str, Json] = {
            "name": self.name,
            "revision": self.revision,
            "fingerprint": self.fingerprint,
            "kind": self.kind,
            "parameters": self.parameters,
            **self.loaded,
            "dtype_reason": self.dtype_reason,
        }
        devices, offloaded = devices_of(self.model), is_offloaded(self.model)
        if self.shards is None and len(devices) == 1 and not offloaded:
            return about
        spread: dict[str, Json] = {
            "how": "map",
            "devices": ", ".join(sorted(map(str, devices))),
            "offloaded": offloaded,
        }
        if self.shards is not None:
            spread = {"how": self.shards.how, "processes": self.shards.processes}
        abilities = {"shares_prefix": self.shares_prefix, "keeps_prefixes": self.keeps_prefixes}
        return {**about, "shards": {**spread, **abilities}}

    def freeze(self) -> None:
        """Put the model into evaluation mode, and turn off gradients for all weights."""
        self.model.eval()
        self.model.requires_grad_(False)

    def check_evaluates(self) -> None:
        """Raise a BackboneError if the model is in training mode, where its dropout changes every answer."""
        if any(module.training for module in self.model.modules()):
            raise BackboneError(
                f"the model of '{self.name}' is in training mode, so its dropout would give another answer each time; "
                "call the backbone's freeze(), or the model's eval(), first"
            )

    @functools.cached_property
    def passes_gradients(self) -> bool:
        """Whether slots can learn through the model: always, or a BackboneError says why not. Found by running a row
        forward and backward.
        """
        with own_draws(self.device):
            check_gradients(self)
        return True

    def thaw(self, weights: Iterable[nn.Parameter]) -> None:
        """Put the model into training mode (its own dropout is on), and turn on gradients for some weights."""
        self.model.train()
        for weight in weights:
            weight.requires_grad_(True)

    def copy(self, *, share: bool = False) -> Backbone:
        """Return a frozen copy to train: with own float32 weights, or (``share``) the same tensors in new modules.
        Raises BackboneError if weights are offloaded or spread, or would have to be own ones and are quantised.
        """
        where = "are offloaded" if is_offloaded(self.model) else ""
        if self.shards is not None:
            where = f"are spread over {self.shards.processes} processes"
        if where:
            raise BackboneError(
                f"{self.name}: its weights {where}, so only a prompt's slots can be trained; leave out whatever needs "
                "a copy of the backbone (train_backbone, random weights), or load it into memory without shard"
            )
        if not share and is_packed(self.model):
            raise BackboneError(
                f"{self.name}: its weights are quantised ({self.loaded['quantization']}), so they cannot be trained or "
                "drawn anew; leave out whatever needs a copy of the backbone (full, head, random weights), or load it "
                "without quantize, or from a folder that is not quantised"
            )
        other = copy.copy(self)
        for name in ("fingerprint", "trained", "table_statistics"):
            other.__dict__.pop(name, None)
        other.model = sharing(self.model) if share else copy.deepcopy(self.model).float()
        other.freeze()
        return other

    @property
    @torch.no_grad()
    def hidden_width(self) -> int:
        """Width of the hidden states that a classification head reads. Found by running three tokens."""
        other = self.copy(share=True)
        other.put_head(nn.Identity())
        return logits_with_pads(other).shape[-1]

    @property
    def head(self) -> nn.Module:
        """The classification head that was put in place of the language-model head."""
        return self.model.get_submodule(HEAD)

    def put_head(self, head: nn.Module) -> None:
        """Replace the language-model head: ``head`` turns (N, H) hidden states into (N, K) logits."""
        self.model.add_module(HEAD, head)

    def with_random_weights(self, *, seed: int) -> Backbone:
        """Return a frozen copy with random weights (Zhong et al. 2021, section 3: random controls)."""
        other = self.copy()
        with own_draws(seed=seed), quiet():
            fresh = type(self.model)(self.model.config)
        other.model.load_state_dict(fresh.state_dict())
        nn.Module.to(other.model, self.dtype)  # a model on several devices has another ``to``
        other.name = f"{self.name} with random weights (seed {seed})"
        return other

    def side(self, length: int) -> bool:
        """Whether a row of this many tokens is read with the positions of long rows. Only rows of one side may share a
        pass, and keys and values serve no row of the other side.
        """
        return self.turn is not None and length > self.turn

    @functools.cached_property
    @torch.no_grad()
    def shares_prefix(self) -> bool:
        """Whether rows can continue from a KV cache that they share. Found by running one token. All layers must be on
        one device, since rows' keys and values are put together.
        """
        return self.kind == "causal" and len(devices_of(self.model)) == 1 and shares_prefix(self)

    @property
    def keeps_prefixes(self) -> bool:
        """Whether keys and values of text before slots can be kept. The memory for them differs between the processes
        over which a model is spread, which must all run the same passes.
        """
        return self.shards is None and self.shares_prefix

    @functools.cached_property
    @torch.no_grad()
    def branches(self) -> bool:
        """Whether a row can hold several continuations of its prefix. Found by running one row and both alone.
        Positions must be those that are given, in rows of any length, and attention must follow any mask.
        """
        return self.shares_prefix and self.takes_positions and self.turn is None and follows_branches(self)

    @functools.cached_property
    @torch.no_grad()
    def block_shape(self) -> BlockShape | None:
        """Shape of keys and values of any tokens before rows, some of them hidden (a prefix of deep slots); None if
        rows cannot continue from them. Found by running two rows. Positions must not depend on the row's length.
        """
        # Of a model in tensor parallelism, each process has the keys and values of its own heads.
        is_whole = self.shards is None or self.shards.how != "tp"
        return block_shape(self) if self.shares_prefix and self.turn is None and is_whole else None

    @property
    def reads_blocks(self) -> bool:
        """Whether rows can continue from given keys and values of any tokens."""
        return self.block_shape is not None

    @functools.cached_property
    @torch.no_grad()
    def deep(self) -> DeepShape:
        """Number of layers that take vectors in the columns of deep slots, and their width. Found by running rows.
        Raises a BackboneError with the reason if the layers of the model do not.
        """
        return deep_shape(self)

    @functools.cached_property
    @torch.no_grad()
    def pads_left(self) -> bool:
        """Whether rows can have pads on the left. Found by running one row with pads and without.
        They cannot if positions count from the first pad (BART) or a recurrent state reads every column (RWKV).
        """
        if self.kind == "encoder-decoder":
            return False
        return same_logits(self, logits_with_pads(self, left=0), logits_with_pads(self, left=2))

    @torch.no_grad()
    def vectors_of(self, token_ids: Tensor) -> Tensor:
        """Return the embeddings of (N,) token ids, (N, E) float32, without gradients."""
        return self.embed(token_ids.to(self.device)[None])[0].float()

    def table(self) -> Tensor:
        """Return the embeddings of all tokens of the tokenizer, (V, E) float32: as large as the model's own table."""
        return self.vectors_of(torch.arange(self.vocabulary))

    @functools.cached_property
    def table_statistics(self) -> TableStatistics:
        """Statistics of the table: random slots start around the mean, and the norm bounds how far a slot moves."""
        table = self.table()
        return TableStatistics(table.mean(dim=0).cpu(), table.std(dim=0).cpu(), float(table.norm(dim=-1).mean()))

    def run_prefix(
        self, embeddings: Tensor, *, positions: Tensor, rows: int, offsets: LayerOffsets | None = None
    ) -> Memory:
        """Run a prefix once, (1, T, E) and (1, T), for a model that :attr:`shares_prefix`.
        Returns the KV cache of T tokens for B rows, as views of one row's. Gradients flow through it.
        """
        memory = self.remember(embeddings, mask=torch.ones_like(positions), positions=positions, offsets=offsets)
        for layer in memory.cache.layers:
            layer.keys = layer.keys.expand(rows, -1, -1, -1)  # type: ignore[union-attr]  # all are plain layers
            layer.values = layer.values.expand(rows, -1, -1, -1)  # type: ignore[union-attr]
        return memory


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and notices; ptuning shows its own."""
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
