"""The one way from a tensor to an address: kernels read memory as they are told, unchecked."""

from __future__ import annotations

import torch
from torch import Tensor


def address_of(
    name: str,
    x: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    strides: tuple[int, ...] | None = None,
) -> int:
    """Where ``x`` begins in this process's memory; it must be kept alive while that is used.

    Args:
        name: of the tensor, for the error.
        x: what a kernel is to read or write.
        shape: that the kernel takes it to have.
        dtype: that the kernel takes its numbers to be.
        strides: from entry to entry of each dimension, in numbers; none for a contiguous tensor.

    Raises:
        ValueError: when it is anything else, or not in the CPU's memory.
    """
    lies = x.is_contiguous() if strides is None else x.stride() == strides
    if not x.is_cpu or x.dtype != dtype or x.shape != shape or not lies:
        expected = "contiguous" if strides is None else f"with strides {strides}"
        raise ValueError(
            f"{name} must be {dtype} on the CPU of shape {shape}, {expected}; got {x.dtype} on "
            f"{x.device} of shape {tuple(x.shape)} with strides {x.stride()}"
        )
    return x.data_ptr()


def in_rows(x: Tensor) -> Tensor:
    """``x``, or a copy of it where the numbers of a row don't lie side by side."""
    # Not `contiguous`, which takes any strides for right where there is nothing to stride over.
    return x if x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)
