"""Items of the simulated world: what they are, and how the logging policy finds them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from marm.items import ItemFeatures
from train.data.world_config import WorldConfig

ITEMS_PER_AUTHOR = 12
POPULARITY_EXPONENT = 0.9


@dataclass(frozen=True)
class WorldItems:
    """``M`` items as columns, ordered by tag; ``position`` below means a place in this order.

    ``quality`` is what every user agrees on. Exposure is Zipf: ``cumulative`` is the running sum of
    ``rank ** -POPULARITY_EXPONENT``, and tag ``g`` owns ``tag_start[g]:tag_start[g + 1]``.
    """

    item_id: NDArray[np.int64]
    author_id: NDArray[np.int64]
    tag: NDArray[np.int64]  # 0-based; the published tag_id is tag + 1
    duration_ms: NDArray[np.int64]
    quality: NDArray[np.float64]
    cumulative: NDArray[np.float64]
    tag_start: NDArray[np.int64]
    position_of_id: NDArray[np.int64]  # by item_id - 1

    def features(self) -> ItemFeatures:
        """What a log shows of the items, by item id. Quality stays hidden."""
        at = self.position_of_id
        return ItemFeatures(
            self.item_id[at], self.author_id[at], self.tag[at] + 1, self.duration_ms[at]
        )

    def positions(self, item_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Positions of ``item_ids``; an id that is not of this world is an error."""
        ids = np.asarray(item_ids, np.int64)
        unknown = (ids < 1) | (ids > len(self.item_id))
        if unknown.any():
            raise ValueError(
                f"item ids of this world are 1..{len(self.item_id)}, "
                f"got {ids[unknown][:3].tolist()}"
            )
        return self.position_of_id[ids - 1]

    def popular(self, draw: NDArray[np.float64]) -> NDArray[np.int64]:
        """Positions drawn by popularity among all items."""
        return self._between(draw, np.zeros(len(draw), np.int64), len(self.item_id))

    def popular_of_tag(
        self, draw: NDArray[np.float64], tag: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Positions drawn by popularity among the items of each tag."""
        return self._between(draw, self.tag_start[tag], self.tag_start[tag + 1])

    def _between(
        self, draw: NDArray[np.float64], start: NDArray[np.int64], end: NDArray[np.int64] | int
    ) -> NDArray[np.int64]:
        below, above = self.cumulative[start], self.cumulative[end]
        target = below + draw * (above - below)
        found = np.searchsorted(self.cumulative, target, side="right") - 1
        return np.clip(found, start, np.asarray(end) - 1)


def build_items(config: WorldConfig) -> WorldItems:
    """Draw the items of a world."""
    rng = np.random.default_rng([config.seed, 1])
    count, num_tags = config.num_items, config.num_tags
    share = (1.0 + np.arange(num_tags)) ** -0.5
    tag = np.concatenate(
        [np.arange(num_tags), rng.choice(num_tags, count - num_tags, p=share / share.sum())]
    )
    tag.sort()
    authors_per_tag = max(1, count // (ITEMS_PER_AUTHOR * num_tags))
    author = tag + num_tags * rng.integers(0, authors_per_tag, count)
    author_quality = rng.standard_normal(num_tags * authors_per_tag)
    quality = 0.5 * author_quality[author] + np.sqrt(0.75) * rng.standard_normal(count)
    # The policy that chose what to promote knew a little about quality.
    appeal = 0.4 * quality + rng.standard_normal(count)
    rank = np.empty(count, np.int64)
    rank[np.argsort(-appeal, kind="stable")] = np.arange(1, count + 1)
    tag_median_s = rng.uniform(10.0, 50.0, num_tags)
    duration_s = tag_median_s[tag] * np.exp(0.5 * rng.standard_normal(count))
    item_id = rng.permutation(count) + 1
    position_of_id = np.empty(count, np.int64)
    position_of_id[item_id - 1] = np.arange(count)
    return WorldItems(
        item_id=item_id.astype(np.int64),
        author_id=author.astype(np.int64) + 1,
        tag=tag.astype(np.int64),
        duration_ms=(np.clip(duration_s, 4.0, 240.0) * 1_000).astype(np.int64),
        quality=quality,
        cumulative=np.concatenate([[0.0], np.cumsum(rank**-POPULARITY_EXPONENT)]),
        tag_start=np.searchsorted(tag, np.arange(num_tags + 1)).astype(np.int64),
        position_of_id=position_of_id,
    )
