"""One layer of target attention with its weights as they are now, laid out for inference.

Shape legend: M candidates, N rows (where the null key counts, the last one), H heads, E head width,
D = H*E, C width of a key input.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from marm.attention import TargetAttention
from marm.dense_attention import FusedAttention
from marm.found_attention import SearchedRows, found_attention
from marm.key_inputs import KeyInputs, Workspace, blocks
from marm.layer_end import layer_end
from marm.normed_linear import normed_linear
from marm.precision import FrozenLinear, Precision
from marm.row_projection import BlockedProjection, RowProjection, row_projection
from marm.search import Categories, Found, RowSearch

_SEARCH_BLOCK_BYTES = 16 << 20
"""Scores that a search keeps at a time: few enough for the last cache of most CPUs."""

_WIDE_COST = 1.5
"""Of a product in attention to wide rows, by torch's kernel, in products by the kernels else."""


class FrozenLayer:
    """`TargetAttention` of one user's candidates: all of them attend to the same keys.

    The null key is one row more, the last: its key and value are zeros, and its logit is its bias.
    """

    def __init__(
        self,
        layer: TargetAttention,
        precision: Precision,
        workspace: Workspace,
        norms: Sequence[nn.LayerNorm] | None = None,
    ) -> None:
        """Lay out the weights.

        Args:
            layer: what is frozen.
            precision: what it computes with.
            workspace: memory that the layers of a model share.
            norms: those of the parts of a key input, for keys that can tell their sources; without
                them key inputs are projected as they are given.
        """
        self._workspace = workspace
        self.num_heads, self.dim = layer.num_heads, layer.dim
        self._width = layer.dim // layer.num_heads
        self._precision = precision
        device = layer.key_value.weight.device
        self._attention = precision.attention(self._width, device)
        self._found_attention = found_attention(
            self.num_heads, self._width, precision.dtype, device
        )
        self._absorbed_attention = FusedAttention(precision.dtype)
        scale = self._width**-0.5
        query_weight, query_bias = (
            scale * parameter.detach().float()
            for parameter in (layer.query.weight, layer.query.bias)
        )
        self._query = normed_linear(layer.query_norm, query_weight, query_bias, precision)
        self._key_value_weight = precision.weight(layer.key_value.weight)
        self._projection: RowProjection = (
            BlockedProjection(layer.key_value.weight, precision)
            if norms is None
            else row_projection(layer.key_value.weight, norms, precision)
        )
        residual = layer.residual
        self._residual = (
            FrozenLinear(residual.weight, residual.bias, precision)
            if isinstance(residual, nn.Linear)
            else None
        )
        self._end = layer_end(layer, precision)

    def queries(self, x_MC: Tensor) -> Tensor:
        """Scaled queries ``[H, M, E]``."""
        q_MD = self._query(x_MC)
        return q_MD.view(-1, self.num_heads, self._width).transpose(0, 1)

    def attend(self, q_HME: Tensor, keys: KeyInputs, bias_HN: Tensor) -> Tensor:
        """Attention to all rows, ``[H, M, E]``, by the association that multiplies less."""
        if self.absorbs(q_HME.shape[1]):
            return self._attend_absorbed(q_HME, keys, bias_HN)
        k_HNE, v_HNE = self.keys_and_values(keys)
        return self._attention.attend(q_HME, k_HNE, v_HNE, bias_HN)

    def absorbs(self, num_candidates: int) -> bool:
        """Whether the projections are applied to the candidates instead of the rows.

        Per row, projecting takes C*D products for the keys and each candidate D more; absorbed,
        each candidate takes H*C, by a kernel for wide rows in which one product costs as much as
        one and a half elsewhere. The values cost the same.
        """
        width = self._key_value_weight.shape[1]
        projected = width * self.dim + num_candidates * self.dim
        return _WIDE_COST * num_candidates * self.num_heads * width < projected

    def _attend_absorbed(self, q_HME: Tensor, keys: KeyInputs, bias_HN: Tensor) -> Tensor:
        by_head = self._key_value_weight.view(2, self.num_heads, self._width, -1)
        key_HEC, value_HEC = by_head.unbind(0)
        wide_HMC = torch.bmm(q_HME, key_HEC)
        inputs_NC = wide_HMC.new_zeros((len(keys) + 1, wide_HMC.shape[2]))
        for part in blocks(len(keys)):
            inputs_NC[part] = keys.rows(part)
        shared = inputs_NC.expand(self.num_heads, *inputs_NC.shape)
        mixed_HMC = self._absorbed_attention.attend(wide_HMC, shared, shared, bias_HN)
        return torch.bmm(mixed_HMC, value_HEC.transpose(1, 2))

    def attend_found(
        self,
        q_HME: Tensor,
        keys: KeyInputs,
        bias_HN: Tensor,
        search: RowSearch,
        categories: Categories | None,
    ) -> tuple[Tensor, Found]:
        """Attention to the rows that ``search`` finds, and to the null key (Eq. 9)."""
        k_ND, v_ND = self._projected(keys)[:, :-1]
        bias_NH, null_H = bias_HN[:, :-1].t().contiguous(), bias_HN[:, -1]
        rows = SearchedRows(k_ND, v_ND, bias_NH, null_H)
        q_MD = q_HME.transpose(0, 1).reshape(-1, self.dim)
        scored = _ScoredRows(k_ND, bias_NH, self._precision)
        at_once = max(1, _SEARCH_BLOCK_BYTES // (4 * len(k_ND)))
        mixed, blocks = [], []
        for start in range(0, len(q_MD), at_once):
            part = slice(start, start + at_once)
            of_part = None if categories is None else categories.of_candidates(part)
            found = search.find(scored.scores(q_MD[part]), of_part)
            mixed.append(self._found_attention.attend(q_MD[part], rows, found))
            blocks.append(found)
        context_MD = torch.cat(mixed)
        by_head = context_MD.view(-1, self.num_heads, self._width)
        return by_head.transpose(0, 1), _joined(blocks)

    def finish(self, x_MC: Tensor, context_HME: Tensor) -> Tensor:
        """Residual connection and feed-forward block, ``[M, D]`` in single precision."""
        context_MD = context_HME.transpose(0, 1).reshape(-1, self.dim)
        x_MD = x_MC if self._residual is None else self._residual(x_MC).float()
        return self._end(x_MD, context_MD)

    def keys_and_values(self, keys: KeyInputs) -> tuple[Tensor, Tensor]:
        """Keys and values of the rows and of the null key, both ``[H, N, E]``, until the next call
        of any layer of the same workspace.

        A row's keys of all heads lie side by side, and so do its values.
        """
        both_2ND = self._projected(keys)
        by_head = both_2ND.view(2, -1, self.num_heads, self._width)
        k_HNE, v_HNE = by_head.transpose(1, 2)
        return k_HNE, v_HNE

    def _projected(self, keys: KeyInputs) -> Tensor:
        """Keys and values of the rows and of the null key, ``[2, N, D]``."""
        shape = (2, len(keys) + 1, self.dim)
        both_2ND = self._take("keys and values", shape, self._precision.dtype)
        both_2ND[:, -1] = 0
        self._projection.project(keys, both_2ND[:, :-1])
        return both_2ND

    def _take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return self._workspace.take(name, shape, dtype, self._key_value_weight.device)


class _ScoredRows:
    """The mean over heads of the products of their parts is one product of the whole width, so the
    scores of all rows are a single GEMM. Logits head by head are needed of the found rows alone.
    """

    def __init__(self, k_ND: Tensor, bias_NH: Tensor, precision: Precision) -> None:
        self._precision, self._num_heads = precision, bias_NH.shape[1]
        self._k_ND = k_ND
        self._mean_bias_N = bias_NH.mean(dim=1).to(precision.dtype)

    def scores(self, q_MD: Tensor) -> Tensor:
        """Mean over heads of every row's logit, ``[M, N]``."""
        mean_q_MD = q_MD / self._num_heads
        return self._precision.linear(mean_q_MD, self._k_ND, self._mean_bias_N).float()


def _joined(blocks: list[Found]) -> Found:
    return Found(
        torch.cat([found.position for found in blocks]),
        torch.cat([found.valid for found in blocks]),
    )
