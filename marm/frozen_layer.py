"""One layer of target attention with its weights as they are now, laid out for inference.

Shape legend: M candidates, N rows (where the null key counts, the last one), H heads, E head width,
D = H*E, C width of a key input.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from marm.attention import TargetAttention
from marm.key_inputs import KeyInputs, Workspace, blocks
from marm.precision import Precision
from marm.search import Categories, Found, RowSearch

_SEARCH_BLOCK_BYTES = 4 << 20
"""Scores that a search keeps at a time: few enough to stay in cache between its steps."""


class FrozenLayer:
    """`TargetAttention` of one user's candidates: all of them attend to the same keys.

    The null key is one row more, the last: its key and value are zeros, and its logit is its bias.
    """

    def __init__(self, layer: TargetAttention, precision: Precision, workspace: Workspace) -> None:
        self._workspace = workspace
        self.num_heads, self.dim = layer.num_heads, layer.dim
        self._width = layer.dim // layer.num_heads
        self._precision = precision
        scale = self._width**-0.5
        self._query_norm = _Norm(layer.query_norm)
        self._query = _Linear(layer.query.weight * scale, layer.query.bias * scale, precision)
        self._key_value_weight = precision.weight(layer.key_value.weight)
        self._output = _linear(layer.output, precision)
        residual = layer.residual
        self._residual = _linear(residual, precision) if isinstance(residual, nn.Linear) else None
        norm, wide, _, narrow = layer.feed_forward
        assert isinstance(norm, nn.LayerNorm)
        assert isinstance(wide, nn.Linear)
        assert isinstance(narrow, nn.Linear)
        self._forward_norm = _Norm(norm)
        self._wide, self._narrow = _linear(wide, precision), _linear(narrow, precision)

    def queries(self, x_MC: Tensor) -> Tensor:
        """Scaled queries ``[H, M, E]``."""
        q_MD = self._query(self._query_norm(x_MC))
        return q_MD.view(-1, self.num_heads, self._width).transpose(0, 1)

    def attend(self, q_HME: Tensor, keys: KeyInputs, bias_HN: Tensor) -> Tensor:
        """Attention to all rows, ``[H, M, E]``, by the association that multiplies less."""
        if self.absorbs(q_HME.shape[1]):
            return self._attend_absorbed(q_HME, keys, bias_HN)
        k_HNE, v_HNE = self.keys_and_values(keys)
        return self._precision.attend(q_HME, k_HNE, v_HNE, bias_HN)

    def absorbs(self, num_candidates: int) -> bool:
        """Whether the projections are applied to the candidates instead of the rows.

        Per row, projecting takes C*D products for the keys and each candidate D more; absorbed,
        each candidate takes H*C. The values cost the same.
        """
        width = self._key_value_weight.shape[1]
        projected = width * self.dim + num_candidates * self.dim
        return num_candidates * self.num_heads * width < projected

    def _attend_absorbed(self, q_HME: Tensor, keys: KeyInputs, bias_HN: Tensor) -> Tensor:
        by_head = self._key_value_weight.view(2, self.num_heads, self._width, -1)
        key_HEC, value_HEC = by_head.unbind(0)
        wide_HMC = torch.bmm(q_HME, key_HEC)
        inputs_NC = wide_HMC.new_zeros((len(keys) + 1, wide_HMC.shape[2]))
        for part in blocks(len(keys)):
            inputs_NC[part] = keys.rows(part)
        shared = inputs_NC.expand(self.num_heads, *inputs_NC.shape)
        mixed_HMC = self._precision.attend(wide_HMC, shared, shared, bias_HN)
        return torch.bmm(mixed_HMC.to(value_HEC.dtype), value_HEC.transpose(1, 2))

    def attend_found(
        self,
        q_HME: Tensor,
        keys: KeyInputs,
        bias_HN: Tensor,
        search: RowSearch,
        categories: Categories | None,
    ) -> tuple[Tensor, Found]:
        """Attention to the rows that ``search`` finds, and to the null key (Eq. 9)."""
        k_ND, v_HNE = self._wide_keys_and_values(keys)
        q_MD = q_HME.transpose(0, 1).reshape(-1, self.dim)
        rows = _SearchedRows(k_ND, v_HNE, bias_HN)
        at_once = max(1, _SEARCH_BLOCK_BYTES // (4 * len(k_ND)))
        mixed, blocks = [], []
        for start in range(0, len(q_MD), at_once):
            part = slice(start, start + at_once)
            of_part = None if categories is None else categories.of_candidates(part)
            found = search.find(rows.scores(q_MD[part]), of_part)
            mixed.append(rows.attend(q_MD[part], found))
            blocks.append(found)
        return torch.cat(mixed, dim=1), _joined(blocks)

    def finish(self, x_MC: Tensor, context_HME: Tensor) -> Tensor:
        """Residual connection and feed-forward block, ``[M, D]`` in single precision."""
        context_MD = context_HME.transpose(0, 1).reshape(-1, self.dim)
        x_MD = x_MC if self._residual is None else self._residual(x_MC).float()
        y_MD = x_MD + self._output(context_MD)
        hidden = nn.functional.gelu(self._wide(self._forward_norm(y_MD)))
        return y_MD + self._narrow(hidden)

    def keys_and_values(self, keys: KeyInputs) -> tuple[Tensor, Tensor]:
        """Keys and values of the rows and of the null key, both ``[H, N, E]``, until the next call
        of any layer of the same workspace."""
        shape = (2, self.num_heads, len(keys) + 1, self._width)
        both = self._take("keys and values", shape, self._precision.dtype)
        both[:, :, -1] = 0
        for part in blocks(len(keys)):
            projected = self._precision.linear(keys.rows(part), self._key_value_weight)
            by_head = projected.view(-1, 2, self.num_heads, self._width)
            both[:, :, part] = by_head.permute(1, 2, 0, 3)
        return both[0], both[1]

    def _wide_keys_and_values(self, keys: KeyInputs) -> tuple[Tensor, Tensor]:
        """Keys ``[N, D]`` and values ``[H, N, E]``, the latter in single precision."""
        k_ND = self._take("keys", (len(keys), self.dim), self._precision.dtype)
        v_HNE = self._take("values", (self.num_heads, len(keys), self._width), torch.float32)
        for part in blocks(len(keys)):
            projected = self._precision.linear(keys.rows(part), self._key_value_weight)
            k_ND[part] = projected[:, : self.dim]
            by_head = projected[:, self.dim :].view(-1, self.num_heads, self._width)
            v_HNE[:, part] = by_head.transpose(0, 1)
        return k_ND, v_HNE

    def _take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return self._workspace.take(name, shape, dtype, self._key_value_weight.device)


class _SearchedRows:
    """Keys and values of a layer and what a search asks of them.

    The mean over heads of the products of their parts is one product of the whole width, so the
    scores of all rows are a single GEMM. Logits head by head are needed of the found rows alone.
    """

    def __init__(self, k_ND: Tensor, v_HNE: Tensor, bias_HN: Tensor) -> None:
        self._num_heads = len(bias_HN)
        self._k_ND, self._v_HNE = k_ND, v_HNE
        self._bias_NH, self._null_H = bias_HN[:, :-1].t().contiguous(), bias_HN[:, -1]
        self._mean_bias_N = bias_HN[:, :-1].mean(dim=0)

    def scores(self, q_MD: Tensor) -> Tensor:
        """Mean over heads of every row's logit, ``[M, N]``."""
        products = torch.mm(q_MD, self._k_ND.t()).float()
        return products.mul_(1 / self._num_heads).add_(self._mean_bias_N)

    def attend(self, q_MD: Tensor, found: Found) -> Tensor:
        """Softmax over the found rows and the null key, ``[H, M, E]`` in single precision."""
        num_candidates, num_found = found.position.shape
        heads = (num_candidates, num_found, self._num_heads, -1)
        products = nn.functional.embedding(found.position, self._k_ND).mul_(q_MD.unsqueeze(1))
        logits_MKH = products.view(heads).sum(dim=3, dtype=torch.float32)
        logits_MKH += nn.functional.embedding(found.position, self._bias_NH)
        logits_MKH.masked_fill_(~found.valid.unsqueeze(2), float("-inf"))
        null_M1H = self._null_H.expand(num_candidates, 1, -1)
        logits_HMK = torch.cat([logits_MKH, null_M1H], dim=1).permute(2, 0, 1).contiguous()
        weights_HMK = torch.softmax(logits_HMK, dim=2)[:, :, :-1].contiguous()
        return torch.stack(
            [
                nn.functional.embedding_bag(
                    found.position, v_NE, per_sample_weights=weights_MK, mode="sum"
                )
                for v_NE, weights_MK in zip(self._v_HNE, weights_HMK, strict=True)
            ]
        )


class _Linear:
    def __init__(self, weight: Tensor, bias: Tensor, precision: Precision) -> None:
        self._weight, self._bias = precision.weight(weight), bias.detach().to(precision.dtype)
        self._precision = precision

    def __call__(self, x: Tensor) -> Tensor:
        return self._precision.linear(x, self._weight, self._bias)


class _Norm:
    def __init__(self, norm: nn.LayerNorm) -> None:
        self._weight, self._bias, self._eps = norm.weight.detach(), norm.bias.detach(), norm.eps

    def __call__(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, x.shape[-1:], self._weight, self._bias, self._eps)


def _linear(linear: nn.Linear, precision: Precision) -> _Linear:
    return _Linear(linear.weight, linear.bias, precision)


def _joined(blocks: list[Found]) -> Found:
    return Found(
        torch.cat([found.position for found in blocks]),
        torch.cat([found.valid for found in blocks]),
    )
