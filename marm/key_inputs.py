"""Key inputs of a layer, formed a block of rows at a time, and memory that is used again.

A block is normalised, projected and put in its place while it is in cache. Large fresh arrays cost
a page fault per 4 KiB, which at these sizes is a fifth of the arithmetic.

Shape legend: N rows, C width of a key input.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

BLOCK_ROWS = 1024


class KeyInputs(Protocol):
    """The key inputs of one layer."""

    def __len__(self) -> int:
        """N, the null key not counted."""
        ...

    def rows(self, part: slice) -> Tensor:
        """Key inputs of some rows, ``[rows, C]``; the same memory may be returned again."""
        ...

    def sources(self) -> list[Tensor]:
        """What key inputs are made of, before the norms: ``[N, width]`` each, side by side.

        Raises:
            ValueError: when that is not known.
        """
        ...


class GivenKeys:
    """Key inputs that are there already."""

    def __init__(self, inputs_NC: Tensor) -> None:
        self._inputs_NC = inputs_NC

    def __len__(self) -> int:
        return len(self._inputs_NC)

    def rows(self, part: slice) -> Tensor:
        """See `KeyInputs.rows`."""
        return self._inputs_NC[part]

    def sources(self) -> list[Tensor]:
        """See `KeyInputs.sources`; never known."""
        raise ValueError("these key inputs are normalised already: freeze the layer without norms")


def blocks(num_rows: int) -> Iterator[slice]:
    """All rows, `BLOCK_ROWS` at a time."""
    for start in range(0, num_rows, BLOCK_ROWS):
        yield slice(start, min(start + BLOCK_ROWS, num_rows))


class Workspace(threading.local):
    """Named arrays of a thread that are used again; they grow and are never given back.

    What `take` returns is overwritten by whoever takes the same name next, so nothing of it may
    outlive the layer that asked.
    """

    def __init__(self) -> None:
        self._arrays: dict[str, Tensor] = {}

    def take(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """A contiguous array with arbitrary content."""
        size = 1
        for length in shape:
            size *= length
        array = self._arrays.get(name)
        if array is None or array.numel() < size or (array.dtype, array.device) != (dtype, device):
            with torch.inference_mode(False):
                array = torch.empty(size, dtype=dtype, device=device)
            self._arrays[name] = array
        return array[:size].view(shape)
