"""TWIN-V2: attention to clusters of rows (Si et al., CIKM 2024).

Shape legend: B queries, W columns of a window, S clusters of at most C rows, H heads, F feature
dim, K numbers of a sketch, D width, G segments. A leading dim of 1 instead of B means that all
queries share it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from marm.config import InterestConfig, ModelConfig
from marm.interest.twin import Twin
from marm.interest.window import Window, take_rows

SKETCH_DIM = 8
"""Width in which rows are compared: distances survive a random projection, and each of the many
passes over all rows costs that much less."""


class TwinV2(Twin):
    """As `marm.interest.twin.Twin`, on clusters: a cluster's key is the mean of its rows, its logit
    ``a + ln(size)``, so that it weighs as much as its rows would side by side.

    What differs from the paper's clustering, which is hierarchical k-means over a user's whole life
    every two weeks, offline, inside groups of like completion ratio:

    - It happens within the forward pass (`bisect`), on the rows that a query sees and with the
      weights of the moment, and no gradient passes through the choice. Rows are compared in a
      fixed random projection to `SKETCH_DIM` numbers.
    - Clusters are halved at the median of one direction until they are small enough: all but the
      last are equally large, where k-means lets size follow density.
    - There are no groups of completion ratio beforehand. Feedback is part of a row's embedding, and
      separates rows as far as it has learned to matter.
    - A cluster is the mean of its rows' embeddings. The paper takes the ids of the item nearest to
      the centre and means of numbers only.

    Recency: a cluster's bias is the mean of its rows' biases.
    """

    projection_FK: Tensor

    def __init__(self, config: ModelConfig, interest: InterestConfig) -> None:
        super().__init__(config, interest)
        self._layout = layout_of_clusters(config.history_length, interest.cluster_size)
        seeded = torch.Generator("cpu").manual_seed(0)
        projection_FK = torch.randn(config.feature_dim, SKETCH_DIM, generator=seeded, device="cpu")
        # Saved although it is the same in every model, as random numbers may change with torch.
        self.register_buffer("projection_FK", projection_FK)

    def sketch(self, keys: Tensor) -> Tensor:
        """``[..., SKETCH_DIM]``: what rows are compared by."""
        return keys.detach() @ self.projection_FK

    def _searched(self, window: Window, bias_BHW: Tensor) -> tuple[Window, Tensor]:
        """The clusters as rows of a window, and their bias ``[B or 1, H, S]`` with ln(size); rows
        that queries share are clustered once."""
        column_BSC, member_BSC = bisect(self.sketch(window.keys), window.visible, *self._layout)
        member_BSC = member_BSC.to(window.keys.dtype)
        size_BS = member_BSC.sum(dim=-1)
        share_BSC = member_BSC / size_BS.clamp(min=1).unsqueeze(-1)
        mean_BSF = _mean_rows(window.keys, column_BSC, share_BSC)
        bias_BSH = _mean_rows(bias_BHW.transpose(1, 2), column_BSC, share_BSC)
        bias_BSH = bias_BSH + size_BS.clamp(min=1).log().unsqueeze(-1)
        # Distance and gap have entered the bias; a cluster has none of its own.
        none_BS = torch.zeros_like(size_BS, dtype=torch.int64)
        clusters = Window(mean_BSF, size_BS > 0, none_BS, none_BS, None)
        return clusters, bias_BSH.transpose(1, 2)


def layout_of_clusters(num_rows: int, most: int) -> tuple[int, int]:
    """Into how many clusters, a power of two, and of which capacity, at most ``most``, a full
    history is cut."""
    num_clusters = 1
    while num_clusters * most < num_rows:
        num_clusters *= 2
    return num_clusters, -(-num_rows // num_clusters)


def bisect(
    keys_BWF: Tensor, visible_BW: Tensor, num_clusters: int, capacity: int
) -> tuple[Tensor, Tensor]:
    """Clusters of at most ``capacity`` rows: columns ``[B, S, C]`` and which of them are visible
    rows. S is ``num_clusters``, or less where the window is too narrow to reach the last ones.

    Every visible row is in one cluster. A segment is cut where it is widest: rows are ordered along
    the direction from their mean to the row farthest from it, turned towards the principal axis by
    one power iteration, and the lower half goes left. Hidden rows go last, so that clusters fill
    up from the left. The same rows give the same clusters, whoever else is in the batch.
    """
    num_lines, width = visible_BW.shape
    while num_clusters > 1 and num_clusters // 2 * capacity >= width:
        num_clusters //= 2  # nothing would go right in the first cut
    padding = num_clusters * capacity - width
    keys = nn.functional.pad(keys_BWF, (0, 0, 0, padding))
    visible = nn.functional.pad(visible_BW, (0, padding))
    column = torch.arange(keys.shape[1], device=keys.device).clamp(max=width - 1)
    column = column.expand(num_lines, -1)
    num_segments = 1
    while num_segments < num_clusters:
        shape = (num_lines * num_segments, keys.shape[1] // num_segments)
        order = _order_along_axis(keys.reshape(*shape, keys.shape[2]), visible.reshape(shape))
        keys = take_rows(keys.reshape(*shape, keys.shape[2]), order).view(keys.shape)
        visible = visible.reshape(shape).gather(1, order).view(visible.shape)
        column = column.reshape(shape).gather(1, order).view(column.shape)
        num_segments *= 2
    clusters = (num_lines, num_clusters, capacity)
    return column.reshape(clusters), visible.reshape(clusters)


def _order_along_axis(x_GWF: Tensor, visible_GW: Tensor) -> Tensor:
    """Columns ``[G, W]`` of G segments in order of their place along the longest axis, hidden ones
    last."""
    seen_GW1 = visible_GW.unsqueeze(-1)
    count_G1 = visible_GW.sum(dim=1, keepdim=True).clamp(min=1)
    mean_GF = (x_GWF * seen_GW1).sum(dim=1) / count_G1
    centred_GWF = (x_GWF - mean_GF.unsqueeze(1)) * seen_GW1
    farthest_G1 = centred_GWF.square().sum(dim=-1).argmax(dim=1, keepdim=True)
    axis_GF1 = take_rows(centred_GWF, farthest_G1).transpose(1, 2)
    place_GW1 = torch.bmm(centred_GWF, axis_GF1)
    axis_GF1 = torch.bmm(centred_GWF.transpose(1, 2), place_GW1)
    place_GW = torch.bmm(centred_GWF, axis_GF1).squeeze(-1)
    place_GW = place_GW.masked_fill(~visible_GW, torch.inf)
    return place_GW.argsort(dim=1, stable=True)


def _mean_rows(x_BWF: Tensor, column_BSC: Tensor, share_BSC: Tensor) -> Tensor:
    """``[B, S, F]``: rows of each cluster, each by its share of it."""
    rows = take_rows(x_BWF, column_BSC.flatten(1)).view(*column_BSC.shape, x_BWF.shape[-1])
    return (rows * share_BSC.unsqueeze(-1)).sum(dim=2)
