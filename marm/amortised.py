"""All candidates of a request in one pass over one copy of the user's rows.

The same numbers as `marm.attention.MultiLayerTargetAttention`, which stays the reference, from
weights laid out once. What one user's candidates share is computed once per request: the rows they
see, the recency biases, the keys and values of every layer. Rows that a layer hides are left out
instead of masked.

Shape legend: M candidates, N rows, L layers, D row width, F feature dim, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from marm.attention import MultiLayerTargetAttention, TargetAttention
from marm.frozen_layer import FrozenLayer
from marm.key_inputs import Workspace
from marm.precision import Precision
from marm.search import Categories, Found, RowSearch
from marm.sequence import NUM_GAP_BUCKETS


@dataclass(frozen=True)
class UserHistory:
    """One user's rows, newest first, as all of the request's candidates see them."""

    live_NF: Tensor  # live features
    memory_NLD: Tensor  # cached vectors: of all layers, or of the first few only
    visible_N: Tensor  # bool
    memorised_N: Tensor  # bool: visible and with cached vectors
    distance_N: Tensor  # int64, buckets
    gap_N: Tensor  # int64, buckets
    categories: Categories | None = None


class AmortisedAttention:
    """A frozen `MultiLayerTargetAttention`; later changes of its weights are not seen."""

    def __init__(
        self,
        attention: MultiLayerTargetAttention,
        precision: Precision,
        search: RowSearch | None = None,
    ) -> None:
        """``search`` takes the place of the one that ``attention`` was trained with (None: not)."""
        self.precision, self.search = precision, search or attention.search
        modules = [attention.first, *attention.layers]
        self.search.prepare()
        self.workspace = Workspace()
        self._live_norms = [_copied(norm) for norm in attention.feature_norms]
        self._memory_norms = [_copied(norm) for norm in attention.memory_norms]
        self._layers = [
            FrozenLayer(
                layer,
                precision,
                self.workspace,
                [*self._memory_norms[max(index - 1, 0) : index], self._live_norms[index]],
            )
            for index, layer in enumerate(modules)
            if isinstance(layer, TargetAttention)
        ]
        recency = attention.recency
        pairs = recency.distance[:, None].float() + recency.gap[None, :].float()
        self._bias_table = pairs.detach().flatten(0, 1)  # [pair, (L + 1) * H]
        nulls: list[Tensor] = [
            layer.null_logit for layer in modules if isinstance(layer, TargetAttention)
        ]
        self._null_X1 = torch.cat(nulls).detach().float().unsqueeze(1)  # [(L + 1) * H, 1]

    def outputs(
        self, query_MC: Tensor, history: UserHistory, found: list[Found] | None = None
    ) -> list[Tensor]:
        """``[y_1, ..., y_{L+1}]`` of the candidates, each ``[M, D]`` in single precision.

        Args:
            query_MC: layer-0 queries.
            history: the user's rows.
            found: when given, what each layer's search found is appended to it, as positions in
                ``history``; needs a search other than `AllRows`.
        """
        at_layer_0 = _Rows.of(history, history.visible_N)
        above = at_layer_0
        if len(self._layers) > 1 and not torch.equal(history.memorised_N, history.visible_N):
            above = _Rows.of(history, history.memorised_N)
        outputs = [self._layer(0, query_MC, at_layer_0, found)]
        for index in range(1, len(self._layers)):
            outputs.append(self._layer(index, outputs[-1], above, found))
        return outputs

    def _layer(self, index: int, x_MC: Tensor, rows: _Rows, found: list[Found] | None) -> Tensor:
        layer = self._layers[index]
        stored = index == 0 or index <= rows.history.memory_NLD.shape[1]
        num_rows = len(rows) if stored else 0
        q_HME = layer.queries(x_MC)
        if not num_rows or not x_MC.shape[0]:  # the null key alone, or nobody who asks
            if found is not None:
                found.append(_nothing_found(x_MC))
            return layer.finish(x_MC, torch.zeros_like(q_HME))
        keys, bias_HN = self._key_inputs(index, rows), self._biases(index, rows)
        if found is None and self.search.takes_all(num_rows):
            return layer.finish(x_MC, layer.attend(q_HME, keys, bias_HN))
        context_HME, of_layer = layer.attend_found(
            q_HME, keys, bias_HN, self.search, rows.categories
        )
        if found is not None:
            found.append(rows.in_history(of_layer))
        return layer.finish(x_MC, context_HME)

    def _key_inputs(self, index: int, rows: _Rows) -> _LayerKeys:
        norm = self._memory_norms[index - 1] if index > 0 else None
        return _LayerKeys(rows, index, norm, self._live_norms[index], self)

    def _biases(self, index: int, rows: _Rows) -> Tensor:
        """Recency bias of the rows and logit of the null key, ``[H, N + 1]``."""
        if rows.biases_XN is None:  # of all layers at once: each is too little for an operator
            bias_XN = nn.functional.embedding(rows.pair_N, self._bias_table).t()
            rows.biases_XN = torch.cat([bias_XN, self._null_X1], dim=1)
        num_heads = self._layers[index].num_heads
        return rows.biases_XN[index * num_heads : (index + 1) * num_heads]


class _Rows:
    """Some rows of a history and what the layers that see them share."""

    def __init__(self, history: UserHistory, index_N: Tensor | None) -> None:
        self.history, self._index_N = history, index_N
        self.live_NF = self._taken(history.live_NF)
        pair_N = history.distance_N * NUM_GAP_BUCKETS + history.gap_N
        self.pair_N = self._taken(pair_N)
        self.biases_XN: Tensor | None = None  # [(L + 1) * H, N + 1], the null key last
        self.categories = history.categories
        if self.categories is not None and index_N is not None:
            self.categories = self.categories.of_rows(index_N)

    @staticmethod
    def of(history: UserHistory, mask_N: Tensor) -> _Rows:
        """The rows that ``mask_N`` shows."""
        if bool(mask_N.all()):
            return _Rows(history, None)
        return _Rows(history, mask_N.nonzero().squeeze(1))

    def __len__(self) -> int:
        return self.live_NF.shape[0]

    def memory(self, layer: int, part: slice) -> Tensor:
        """Cached vectors of one layer of some rows, ``[rows, D]``."""
        vectors_NLD, index_N = self.history.memory_NLD, self._index_N
        if index_N is None:
            return vectors_NLD[part, layer].float()
        return vectors_NLD[index_N[part], layer].float()

    def in_history(self, found: Found) -> Found:
        """What was found among these rows, as positions in the history."""
        if self._index_N is None:
            return found
        return Found(self._index_N[found.position], found.valid)

    @cached_property
    def standard(self) -> Tensor:
        """Live features ``[N, F]`` normalised without weights: layers differ in these alone."""
        return nn.functional.layer_norm(self.live_NF, self.live_NF.shape[1:])

    def _taken(self, x: Tensor) -> Tensor:
        return x if self._index_N is None else x[self._index_N]


class _LayerKeys:
    """Normalised key inputs of one layer, ``[N, C]``, formed when they are asked for."""

    def __init__(
        self,
        rows: _Rows,
        layer: int,
        memory_norm: nn.LayerNorm | None,
        live_norm: nn.LayerNorm,
        owner: AmortisedAttention,
    ) -> None:
        self._rows, self._layer, self._owner = rows, layer, owner
        self._memory_norm, self._live_norm = memory_norm, live_norm
        self._memory_dim = 0 if memory_norm is None else rows.history.memory_NLD.shape[2]

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self, part: slice) -> Tensor:
        """See `KeyInputs.rows`."""
        live_norm, standard = self._live_norm, self._rows.standard[part]
        live = torch.addcmul(live_norm.bias, standard, live_norm.weight)
        if self._memory_norm is None:
            return live.to(self._owner.precision.dtype)
        dim = self._memory_dim
        inputs = self._owner.workspace.take(
            "key inputs",
            (len(live), dim + live.shape[1]),
            self._owner.precision.dtype,
            live.device,
        )
        inputs[:, :dim] = self._memory_norm(self._rows.memory(self._layer - 1, part))
        inputs[:, dim:] = live
        return inputs

    def sources(self) -> list[Tensor]:
        """See `KeyInputs.sources`."""
        live_NF = self._rows.live_NF
        if self._memory_norm is None:
            return [live_NF]
        return [self._rows.memory(self._layer - 1, slice(None)), live_NF]


def _copied(norm: nn.Module) -> nn.LayerNorm:
    assert isinstance(norm, nn.LayerNorm)
    copy = nn.LayerNorm(norm.normalized_shape, norm.eps, device=norm.weight.device)
    copy.load_state_dict(norm.state_dict())
    return copy.requires_grad_(False)


def _nothing_found(x_MC: Tensor) -> Found:
    nothing = torch.empty((len(x_MC), 0), dtype=torch.int64, device=x_MC.device)
    return Found(nothing, nothing.bool())
