"""The numbers that inference computes with, and the kernels that suit each of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from marm.attention_kernel import KernelAttention
from marm.dense_attention import DenseAttention, FusedAttention
from marm.kernels.attention_code import Tiling
from marm.kernels.native_code import Registers, host_registers

PRECISIONS = ("fp32", "bf16", "auto")

_TALL, _WIDE = 64, 512
"""From so many rows and columns on oneDNN's product is faster than torch's own."""


class Precision(ABC):
    """Linear maps and attention at one precision; the residual stream stays in single precision."""

    name: ClassVar[str]
    dtype: ClassVar[torch.dtype]
    tolerance: ClassVar[float]
    """Largest difference of a layer's output from the plain path, relative to the largest of the
    outputs of that layer. Tests hold every precision to it."""

    def weight(self, x: Tensor) -> Tensor:
        """A weight, bias excluded, as `linear` wants it."""
        return x.detach().to(self.dtype).contiguous()

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x @ weight.T + bias`` in ``dtype``; ``bias`` is in ``dtype`` too."""
        return nn.functional.linear(x.to(self.dtype), weight, bias)

    def registers(self, device: torch.device) -> Registers | None:
        """Those of kernels that compute in this precision on ``device``; None where torch does."""
        return None

    @abstractmethod
    def attention(self, head_width: int, device: torch.device) -> DenseAttention:
        """What attends with heads of one width on a device; may compile a kernel first."""


class FrozenLinear:
    """A linear map whose weights are laid out for a precision, as they are now."""

    def __init__(self, weight: Tensor, bias: Tensor, precision: Precision) -> None:
        self._weight, self._bias = precision.weight(weight), bias.detach().to(precision.dtype)
        self._precision = precision

    def __call__(self, x: Tensor) -> Tensor:
        """``x @ weight.T + bias``, in the precision's numbers."""
        return self._precision.linear(x, self._weight, self._bias)


class FullPrecision(Precision):
    """Single precision: on CPUs by kernels of our own and oneDNN, elsewhere by torch's best."""

    name = "fp32"
    dtype = torch.float32
    tolerance = 1e-4

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `Precision.linear`; large products by oneDNN where torch has it."""
        is_large = len(x) >= _TALL and len(weight) >= _WIDE and x.device.type == "cpu"
        large_product = _onednn_linear() if is_large else None
        if large_product is None:
            return super().linear(x, weight, bias)
        product: Tensor = large_product(x.to(self.dtype).contiguous(), weight, bias, "none", [], "")
        return product

    def registers(self, device: torch.device) -> Registers | None:
        """See `Precision.registers`."""
        return host_registers() if device.type == "cpu" else None

    def attention(self, head_width: int, device: torch.device) -> DenseAttention:
        """See `Precision.attention`."""
        registers = self.registers(device)
        if registers is None:
            return FusedAttention()
        return KernelAttention(head_width, Tiling.of(registers))


class HalfPrecision(Precision):
    """bfloat16 with torch's fused attention: for devices that have fast units for it."""

    name = "bf16"
    dtype = torch.bfloat16
    tolerance = 3e-2

    def attention(self, head_width: int, device: torch.device) -> DenseAttention:
        """See `Precision.attention`."""
        return FusedAttention(torch.bfloat16)


def _onednn_linear() -> Callable[..., Tensor] | None:
    """torch's binding of oneDNN's linear map, the one its compiler uses for CPUs; on some of them
    it is a quarter faster than the library behind `nn.functional.linear`."""
    operator: Callable[..., Tensor] | None = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return operator


def build_precision(name: str, device: torch.device) -> Precision:
    """The precision called ``name`` on ``device``; ``auto`` is the fastest one that it has.

    Raises:
        ValueError: when the name is unknown, or ``device`` is no faster with that precision.
    """
    if name not in PRECISIONS:
        raise ValueError(f"precision must be one of {PRECISIONS}, got {name!r}")
    fast_half = fast_half_precision(device)
    if name == "bf16" and fast_half is None:
        raise ValueError(
            f"precision bf16 needs a {device.type} with units for products of bfloat16 matrices "
            "(AMX on a CPU); this one would be slower than with fp32. Use fp32 or auto"
        )
    if name == "fp32" or fast_half is None:
        return FullPrecision()
    return fast_half


def fast_half_precision(device: torch.device) -> Precision | None:
    """bfloat16 where ``device`` computes faster with it than in single precision.

    A CPU that multiplies it in vectors only (AVX-512 BF16) does not: products of this size gain no
    more than it costs to convert around them, and the kernels of single precision are faster.
    """
    if device.type == "cuda":  # not verified: developed without such a device
        return HalfPrecision() if torch.cuda.is_bf16_supported(including_emulation=False) else None
    if device.type == "cpu" and torch.cpu.get_capabilities().get("amx_bf16", False):
        return HalfPrecision()  # not verified: developed without such a CPU
    return None
