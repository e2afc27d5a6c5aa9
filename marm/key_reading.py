"""How queries read a set of keys: with the keys projected, or with the projection in the queries.

Both give the same numbers. `ProjectedKeys` is the plain form and the reference; `AbsorbedKeys`
multiplies far less when a user has few queries and many rows, which is what training sees.

Shape legend: B queries, U users, N rows, H heads, E head width, D = H*E, C width of a key input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from marm.query_groups import QueryGroups, slabs_of


@dataclass(frozen=True)
class RowPart:
    """Some columns of a key input. With ``norm``, ``values`` are normalised and still lack its gain
    and shift, so that several layers share them."""

    values: Tensor  # [U, N, C] or [P, C]
    norm: nn.LayerNorm | None = None

    @staticmethod
    def normalised(x: Tensor, norm: nn.Module) -> RowPart:
        """``norm(x)``."""
        assert isinstance(norm, nn.LayerNorm)
        return RowPart(nn.functional.layer_norm(x, norm.normalized_shape, eps=norm.eps), norm)

    def under(self, norm: nn.Module) -> RowPart:
        """The same columns with gain and shift of another norm of the same kind."""
        assert isinstance(norm, nn.LayerNorm)
        return RowPart(self.values, norm)

    def full(self) -> Tensor:
        """The columns as the key projection takes them."""
        return self.values if self.norm is None else self.values * self.norm.weight + self.norm.bias


@dataclass(frozen=True)
class Keys:
    """One set of keys and what each query sees of it.

    A slab has inputs ``[U, N, C]`` and ``user_row`` picks the user of each query; with one user,
    all queries share its keys and nothing is copied per query. A whole block has inputs ``[P, C]``
    and ``user_row`` None. The leading dim of the view is B, or 1 when all queries see the same.
    ``inputs`` may be given as the `parts` that make up C.
    """

    inputs: Tensor | tuple[RowPart, ...]
    visible: Tensor  # bool [B or 1, N or P]
    bias: Tensor  # [B or 1, H, N or P] recency bias of this layer
    user_row: Tensor | None

    @property
    def parts(self) -> tuple[RowPart, ...]:
        """``inputs``, part by part."""
        return as_parts(self.inputs)


def as_parts(inputs: Tensor | tuple[RowPart, ...]) -> tuple[RowPart, ...]:
    """Key inputs as parts, a whole one being one."""
    return (RowPart(inputs),) if isinstance(inputs, Tensor) else inputs


class KeyReading(Protocol):
    """Queries before one set of keys."""

    def content(self) -> Tensor:
        """Products of queries and keys, ``[B, H, N]``."""
        ...

    def mix(self, weights_BHN: Tensor) -> Tensor:
        """Weighted sums of the values, ``[B, H, E]``."""
        ...


class ProjectedKeys:
    """Keys and values of every row, then every query with those of its user.

    Without ``user_row_B`` all queries read the same rows ``[P, C]``; with one user they do, too,
    and nothing is copied per query.
    """

    def __init__(
        self,
        q_BHE: Tensor,
        parts: tuple[RowPart, ...],
        key_value: nn.Linear,
        user_row_B: Tensor | None,
    ) -> None:
        self._q_BHE, self._user_row_B = q_BHE, user_row_B
        inputs = torch.cat([part.full() for part in parts], dim=-1)
        k, v = key_value(inputs).chunk(2, dim=-1)
        heads = (*inputs.shape[:-1], *q_BHE.shape[1:])
        self._k, self._v = k.reshape(heads), v.reshape(heads)

    def content(self) -> Tensor:
        """See `KeyReading.content`."""
        if self._user_row_B is None:
            return torch.einsum("bhe,phe->bhp", self._q_BHE, self._k)
        if self._k.shape[0] == 1:
            return torch.einsum("bhe,nhe->bhn", self._q_BHE, self._k[0])
        return torch.einsum("bhe,bnhe->bhn", self._q_BHE, slabs_of(self._k, self._user_row_B))

    def mix(self, weights_BHN: Tensor) -> Tensor:
        """See `KeyReading.mix`."""
        if self._user_row_B is None:
            return torch.einsum("bhp,phe->bhe", weights_BHN, self._v)
        if self._v.shape[0] == 1:
            return torch.einsum("bhn,nhe->bhe", weights_BHN, self._v[0])
        return torch.einsum("bhn,bnhe->bhe", weights_BHN, slabs_of(self._v, self._user_row_B))


class AbsorbedKeys:
    """Queries multiplied by the key projection, and mixed rows by the value projection.

    ``q . (W x) = (W^T q) . x`` and ``sum w (V x) = V (sum w x)``: the rows themselves are read, by
    one product for each user, and nothing as large as them is made.
    """

    def __init__(
        self,
        q_BHE: Tensor,
        parts: tuple[RowPart, ...],
        key_value: nn.Linear,
        groups: QueryGroups,
    ) -> None:
        self._parts, self._groups, self._num_heads = parts, groups, q_BHE.shape[1]
        by_head = key_value.weight.view(2, *q_BHE.shape[1:], -1)
        key_HEC, self._value_HEC = by_head.unbind(0)
        self._q_BHC = torch.bmm(q_BHE.transpose(0, 1), key_HEC).transpose(0, 1)
        self._rows = [groups.rows(part.values) for part in parts]

    def content(self) -> Tensor:
        """See `KeyReading.content`."""
        gained, shifts = [], []
        for part, q_BHC in zip(self._parts, self._split(self._q_BHC), strict=True):
            if part.norm is None:
                gained.append(q_BHC)
            else:
                gained.append(q_BHC * part.norm.weight)
                shifts.append(q_BHC @ part.norm.bias)
        q_GPC = self._groups.gather(torch.cat(gained, dim=-1))
        logits_GPN = sum_of_products(self._split(q_GPC), self._rows)
        content = self._groups.scatter(logits_GPN, self._num_heads)
        return content if not shifts else content + torch.stack(shifts).sum(0).unsqueeze(2)

    def mix(self, weights_BHN: Tensor) -> Tensor:
        """See `KeyReading.mix`."""
        weights_GPN = self._groups.gather(weights_BHN)
        mixed_GPC = torch.cat([torch.bmm(weights_GPN, rows) for rows in self._rows], dim=-1)
        full = []
        total_BH1 = weights_BHN.sum(dim=2, keepdim=True)
        mixed_BHC = self._groups.scatter(mixed_GPC, self._num_heads)
        for part, mixed in zip(self._parts, self._split(mixed_BHC), strict=True):
            norm = part.norm
            full.append(mixed if norm is None else mixed * norm.weight + total_BH1 * norm.bias)
        by_head_HBC = torch.cat(full, dim=-1).transpose(0, 1)
        return torch.bmm(by_head_HBC, self._value_HEC.transpose(1, 2)).transpose(0, 1)

    def _split(self, x: Tensor) -> tuple[Tensor, ...]:
        return torch.split(x, [part.values.shape[-1] for part in self._parts], dim=-1)


def sum_of_products(queries: tuple[Tensor, ...], rows: list[Tensor]) -> Tensor:
    """``[G, P, N]`` products of queries ``[G, P, C]`` and rows ``[G, N, C]``, over all parts."""
    # Rows first: their gradient is then formed as they lie, without being transposed.
    total = torch.bmm(rows[0], queries[0].transpose(1, 2))
    for q_GPC, x_GNC in zip(queries[1:], rows[1:], strict=True):
        total = torch.baddbmm(total, x_GNC, q_GPC.transpose(1, 2))
    return total.transpose(1, 2)


def read_keys(
    q_BHE: Tensor,
    inputs: Tensor | tuple[RowPart, ...],
    key_value: nn.Linear,
    user_row_B: Tensor | None,
) -> KeyReading:
    """The reading that multiplies less.

    Per row of a user, projecting takes 2*C*D products and D more for each of his queries, twice;
    absorbed, each query takes 2*H*C.
    """
    parts = as_parts(inputs)
    num_users = parts[0].values.shape[0]
    if user_row_B is None or num_users < 2:
        return ProjectedKeys(q_BHE, parts, key_value, user_row_B)
    num_heads, dim = q_BHE.shape[1], key_value.out_features // 2
    width = key_value.in_features
    groups = QueryGroups.of(user_row_B, num_users)
    if groups.size * num_heads * width < width * dim + groups.size * dim:
        return AbsorbedKeys(q_BHE, parts, key_value, groups)
    return ProjectedKeys(q_BHE, parts, key_value, user_row_B)
