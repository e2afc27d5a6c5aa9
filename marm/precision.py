"""The numbers that inference computes with, and the attention kernel that suits each of them.

Shape legend: M candidates, N rows (the last of which is the null key), H heads, E head width,
D = H*E, C width of a key input.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

PRECISIONS = ("fp32", "bf16", "auto")

_SAFE_LOGIT = 80.0
"""exp of more than 88 overflows single precision and bfloat16 alike."""

_BLOCK_ROWS = 1024
_BLOCK_CANDIDATES = 512
"""A block of bfloat16 weights of this size stays in the second-level cache of a core."""

_TALL = 256
"""From so many rows on a library's better kernel outweighs the way to it."""

_WIDTH_STEP = 8  # value columns are padded to a multiple: GEMM kernels dislike odd widths


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

    @abstractmethod
    def attend(self, q_HME: Tensor, k_HNE: Tensor, v_HNE: Tensor, bias_HN: Tensor) -> Tensor:
        """Softmax over all rows of ``q @ k.T + bias``, times ``v``: ``[H, M, E]``.

        ``q`` is already scaled; ``bias`` is in single precision and the same for all candidates.
        Memory does not grow with M * N.
        """


class FullPrecision(Precision):
    """Single precision: torch's fused attention, which keeps its blocks in cache."""

    name = "fp32"
    dtype = torch.float32
    tolerance = 1e-4

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `Precision.linear`; tall products by oneDNN where torch has it."""
        tall_product = _onednn_linear() if len(x) >= _TALL and x.device.type == "cpu" else None
        if tall_product is None:
            return super().linear(x, weight, bias)
        product: Tensor = tall_product(x.contiguous(), weight, bias, "none", [], "")
        return product

    def attend(self, q_HME: Tensor, k_HNE: Tensor, v_HNE: Tensor, bias_HN: Tensor) -> Tensor:
        """See `Precision.attend`."""
        return _fused(q_HME, k_HNE, v_HNE, bias_HN)


class HalfPrecision(Precision):
    """bfloat16 with torch's fused attention: for devices that have fast units for it."""

    name = "bf16"
    dtype = torch.bfloat16
    tolerance = 3e-2

    def attend(self, q_HME: Tensor, k_HNE: Tensor, v_HNE: Tensor, bias_HN: Tensor) -> Tensor:
        """See `Precision.attend`."""
        return _fused(q_HME, k_HNE, v_HNE, bias_HN)


class BlockedHalfPrecision(HalfPrecision):
    """bfloat16 for CPUs that multiply it (AVX-512 BF16) but have no matrix units.

    There the fused kernel is slower than in single precision. Here weights are the bare ``exp`` of
    the products: the recency bias becomes a factor ``exp(bias)`` of the rows' values, and of a
    column beside them that sums up to the denominator. So a block of weights is written, turned
    into its exponential in place and multiplied, and nothing else touches it. Without a maximum to
    subtract this is exact only while no exponential overflows, which Cauchy-Schwarz tells
    beforehand; otherwise the fused kernel is used.
    """

    def attend(self, q_HME: Tensor, k_HNE: Tensor, v_HNE: Tensor, bias_HN: Tensor) -> Tensor:
        """See `Precision.attend`."""
        largest = _largest_norm(q_HME) * _largest_norm(k_HNE) + bias_HN.abs().amax()
        if float(largest) > _SAFE_LOGIT:
            return _fused(q_HME, k_HNE, v_HNE, bias_HN)
        return torch.stack(
            [
                _exponential_attention(*of_head)
                for of_head in zip(q_HME, k_HNE, v_HNE, bias_HN, strict=True)
            ]
        )


def _exponential_attention(q_ME: Tensor, k_NE: Tensor, v_NE: Tensor, bias_N: Tensor) -> Tensor:
    width = v_NE.shape[1]
    factor_N = bias_N.exp().to(v_NE.dtype)
    columns = -(width + 1) % _WIDTH_STEP + width + 1
    weighted = v_NE.new_zeros((len(v_NE), columns))
    torch.mul(v_NE, factor_N.unsqueeze(1), out=weighted[:, :width])
    weighted[:, width] = factor_N
    sums = torch.zeros((len(q_ME), columns), dtype=torch.float32, device=q_ME.device)
    for first in range(0, len(q_ME), _BLOCK_CANDIDATES):
        some_q = q_ME[first : first + _BLOCK_CANDIDATES]
        for start in range(0, len(k_NE), _BLOCK_ROWS):
            rows = slice(start, start + _BLOCK_ROWS)
            weights = torch.mm(some_q, k_NE[rows].t()).exp_()
            sums[first : first + _BLOCK_CANDIDATES] += torch.mm(weights, weighted[rows])
    return sums[:, :width] / sums[:, width : width + 1]


def _onednn_linear() -> Callable[..., Tensor] | None:
    """torch's binding of oneDNN's linear map, the one its compiler uses for CPUs; on some of them
    it is a quarter faster than the library behind `nn.functional.linear`."""
    operator: Callable[..., Tensor] | None = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return operator


def _largest_norm(x_HNE: Tensor) -> Tensor:
    # A product with ones sums narrow rows several times faster than a reduction does.
    ones = x_HNE.new_ones((len(x_HNE), x_HNE.shape[2], 1))
    return torch.bmm(x_HNE * x_HNE, ones).amax().float().sqrt()


def _fused(q_HME: Tensor, k_HNE: Tensor, v_HNE: Tensor, bias_HN: Tensor) -> Tensor:
    mask = bias_HN.to(q_HME.dtype)[None, :, None, :]
    mixed = nn.functional.scaled_dot_product_attention(
        q_HME[None], k_HNE[None], v_HNE[None], attn_mask=mask, scale=1.0
    )
    return mixed[0]


def build_precision(name: str, device: torch.device) -> Precision:
    """The precision called ``name`` on ``device``; ``auto`` is the fastest one that it has.

    Raises:
        ValueError: when the name is unknown, or the device would emulate that precision.
    """
    if name not in PRECISIONS:
        raise ValueError(f"precision must be one of {PRECISIONS}, got {name!r}")
    fast_half = fast_half_precision(device)
    if name == "bf16" and fast_half is None:
        raise ValueError(
            f"precision bf16 needs a {device.type} with bfloat16 units (AVX-512 BF16 or AMX on a "
            "CPU); this one would be slower than with fp32. Use fp32 or auto"
        )
    if name == "fp32" or fast_half is None:
        return FullPrecision()
    return fast_half


def fast_half_precision(device: torch.device) -> Precision | None:
    """bfloat16 as ``device`` computes it fastest; None when it has no units for it."""
    if device.type == "cuda":  # not verified: developed without such a device
        return HalfPrecision() if torch.cuda.is_bf16_supported() else None
    if device.type != "cpu":
        return None
    capabilities = torch.cpu.get_capabilities()
    if capabilities.get("amx_bf16", False):
        return HalfPrecision()
    return BlockedHalfPrecision() if capabilities.get("avx512_bf16", False) else None
