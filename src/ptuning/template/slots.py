"""The slots of a template for one tokenizer: what they start at, which are deep, and which form a block in front."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ptuning.template.language import Target
from ptuning.template.segments import NOTHING, Ids, MarkedText

StartIds = tuple[int | None, ...]


@dataclass(frozen=True)
class PlacedSlots:
    """Slots by the tokens that they start from. Text behind them is tokenised as behind their ``tail``, if there is
    one, else as a word that begins anew.
    """

    start_ids: StartIds
    deep: bool = False
    tail: MarkedText = NOTHING


@dataclass(frozen=True)
class SlotLayout:
    """The slots of a template.

    Args:
        lead_ids: The tokens in front of the block, which open a text; none without a block.
        block_ids: The tokens that the block's deep slots start at; None for one of the data's. These slots stand at the
            very front and are no part of rows: the prompt brings their keys and values.
        slot_start_ids: The tokens that the other slots start at, in template order; None for a random start.
        deep_slots: Which of these are deep, by their index.
    """

    lead_ids: Ids
    block_ids: StartIds
    slot_start_ids: StartIds
    deep_slots: Ids

    @classmethod
    def of(cls, pieces: Sequence[object], prefix_ids: Ids, *, block: bool) -> SlotLayout:
        """Return the layout of a template's pieces; with ``block``, deep slots at the front form one."""
        front = _front(pieces) if block else 0
        every = [piece for piece in pieces if isinstance(piece, PlacedSlots)]
        own = [(start, piece.deep) for piece in every[front:] for start in piece.start_ids]
        return cls(
            prefix_ids if front else (),
            tuple(start for piece in every[:front] for start in piece.start_ids),
            tuple(start for start, _ in own),
            tuple(index for index, (_, is_deep) in enumerate(own) if is_deep),
        )

    @property
    def begun(self) -> int:
        """Number of tokens and slots in front of a row: the block's, and those that open a text."""
        return len(self.lead_ids) + len(self.block_ids)

    @property
    def lead(self) -> int:
        """Number of tokens in front of the block's first slot."""
        return len(self.lead_ids)

    @property
    def in_front(self) -> int:
        """Number of deep slots of the block."""
        return len(self.block_ids)

    @property
    def every_start_id(self) -> StartIds:
        """What all slots start at, in template order, those of the block included."""
        return (*self.block_ids, *self.slot_start_ids)

    def filled_up(self, tokens: Iterator[int]) -> StartIds:
        """Return what all slots start at, with the next of some tokens for each deep slot that has none."""
        deep = {*range(self.in_front), *(self.in_front + slot for slot in self.deep_slots)}
        starts = enumerate(self.every_start_id)
        return tuple(next(tokens) if start is None and index in deep else start for index, start in starts)

    def places(self, slot_positions: Sequence[int]) -> list[int]:
        """Return where all slots are in a row with these positions of its own slots."""
        return [*range(self.lead, self.begun), *(self.begun + position for position in slot_positions)]


def _front(pieces: Sequence[object]) -> int:
    """Return how many pieces of deep slots stand at the front; 0 if nothing but a space, which is the target's, is
    between them and the target.
    """
    for count, piece in enumerate(pieces):
        if not (isinstance(piece, PlacedSlots) and piece.deep):
            return 0 if isinstance(pieces[count + (piece == MarkedText(" "))], Target) else count
    return 0
