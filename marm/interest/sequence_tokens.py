"""Rows and queries of a batch as tensors, for methods that let rows attend to rows.

Layers work on packed tokens: ``[R, ...]`` rows of all users and ``[B, ...]`` queries. Attention
works on padded ones (`marm.interest.user_sequence`).

Shape legend: R rows of all users, B queries, V users, T tokens of the user who has most, X any
width.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor, nn

from marm.interest.interface import History
from marm.interest.pair_tiles import Tile, tiles_of
from marm.interest.user_sequence import Places, UserSequence


class PlacedTokens:
    """Tokens of one kind: where they lie, and the tiles of what they see."""

    def __init__(self, sequence: UserSequence, places: Places, device: torch.device) -> None:
        self._sequence, self._places, self._device = sequence, places, device
        self._place = torch.from_numpy(places.place).to(device)

    @cached_property
    def tiles(self) -> list[Tile]:
        """Pairs of these tokens and the rows they see; computed when a layer asks first."""
        return tiles_of(self._sequence, self._places, self._device)

    def padded(self, x: Tensor) -> Tensor:
        """``[V, T, ...]`` of packed tokens ``[tokens, ...]``."""
        num_users, num_tokens = self._places.shape
        empty = x.new_zeros((num_users * num_tokens, *x.shape[1:]))
        return empty.index_copy(0, self._place, x).view(num_users, num_tokens, *x.shape[1:])

    def packed(self, x: Tensor) -> Tensor:
        """``[tokens, X]`` of padded ones ``[V, T, ...]``; X is all that follows."""
        # As in `marm.attention`: the backward pass of a look-up is the faster one on a CPU.
        return nn.functional.embedding(self._place, x.flatten(0, 1).flatten(1))


class SequenceTokens:
    """All tokens of a batch."""

    def __init__(self, history: History, num_queries: int) -> None:
        sequence = history.sequence
        if sequence is None:
            raise ValueError(
                "a method whose rows attend to one another needs History.sequence, got None; build "
                "the inputs with an InputBuilder whose configuration names the method"
            )
        device = history.slab.features.device
        self._slab_source = torch.from_numpy(sequence.slab_source).to(device)
        self._block_source = torch.from_numpy(sequence.block_source).to(device)
        self.rows = PlacedTokens(sequence, sequence.rows, device)
        self.queries = PlacedTokens(sequence, sequence.queries.shared_by(num_queries), device)

    def rows_of(self, slab_UNX: Tensor, block_PX: Tensor | None) -> Tensor:
        """Packed rows ``[R, X]`` of what a slab and a block have."""
        stored = nn.functional.embedding(self._slab_source, slab_UNX.flatten(0, 1))
        if block_PX is None:
            return stored
        return torch.cat([stored, nn.functional.embedding(self._block_source, block_PX)])
