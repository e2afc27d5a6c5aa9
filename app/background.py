"""What the edge knows of the rest of the system, refreshed in the background of requests."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import numpy as np

from app.args import AppArgs
from cache_actors.event_log.catalog import catalog_version, read_catalog
from cache_actors.home import Home
from cache_actors.registry import ModelRegistry, PublishedModel
from marm.items import ItemCatalog, ItemFeatures
from marm.memory import Namespace
from stages.assemble import published_items
from stages.item_filters import NO_LISTS, ItemLists
from stages.knobs import RetrievalKnobs
from stages.live_model import LiveModel
from stages.popular import PopularItems
from stages.request import StageName, StageStatus
from stages.similar_items import SimilarItems

logger = logging.getLogger("ray.serve")

MAX_POPULAR = 12_000
"""Popular items that the edge keeps for when retrieval is down: the most candidates a stage may
pass on, and as many again as a request may exclude."""


@dataclass(frozen=True)
class PopularVersion:
    """The most popular items of one published retrieval version, and items like items."""

    version: int
    popular: PopularItems
    similar: SimilarItems

    @staticmethod
    def of(published: PublishedModel) -> PopularVersion:
        """Read them from a published version."""
        items, popularity = published_items(published.items)
        vectors_MV = np.asarray(published.items["vectors"], np.float32)
        return PopularVersion(
            published.version,
            PopularItems.ranked(items, popularity).head(MAX_POPULAR),
            SimilarItems.small(items, vectors_MV, popularity, MAX_POPULAR),
        )


class BackgroundState:
    """Catalog, popular items and live namespaces, each at most ``poll_s`` old."""

    def __init__(
        self, home: Home, args: AppArgs, statuses: Callable[[], Awaitable[list[StageStatus]]]
    ) -> None:
        variant, settings = next(iter(args.retrieval.variants.items()))
        self._home = home
        self._poll_s = args.ingress.poll_s
        self._statuses = statuses
        self._live: LiveModel[PopularVersion] = LiveModel(
            ModelRegistry(home.models),
            "retrieval",
            settings.model or variant,
            PopularVersion.of,
            logger,
        )
        self._catalog = ItemCatalog(ItemFeatures.empty())
        self._catalog_version = 0
        self._namespaces: dict[tuple[StageName, str], Namespace] = {}
        self._lists = {
            name: RetrievalKnobs.model_validate(arm.user_config).lists
            for name, arm in args.retrieval.variants.items()
        }
        self._task: asyncio.Task[None] | None = None

    @property
    def catalog(self) -> ItemCatalog:
        """The item catalog."""
        return self._catalog

    @property
    def popular(self) -> PopularItems:
        """Items to start from when retrieval does not answer."""
        live = self._live.current
        return PopularItems.empty() if live is None else live.popular

    @property
    def similar(self) -> SimilarItems | None:
        """Items like those that a user saw last; None while no version is published."""
        live = self._live.current
        return None if live is None else live.similar

    def namespace_of(self, stage: StageName) -> Namespace | None:
        """The memory that a variant of a stage was seen to read."""
        found = (space for (name, _), space in self._namespaces.items() if name == stage)
        return next(found, None)

    def start(self) -> None:
        """Read what is stored, then keep refreshing on the running event loop."""
        self.refresh_files()
        self._task = asyncio.create_task(self._refresh_forever())

    def observe(self, stage: StageName, variant: str, namespace: Namespace | None) -> None:
        """Note the namespace that a stage variant was seen to read."""
        if namespace is not None:
            self._namespaces[stage, variant] = namespace

    async def namespaces(self) -> set[Namespace]:
        """The namespaces that live models read. A stage that does not answer keeps its last."""
        if not self._namespaces:
            await self.refresh_namespaces()
        return set(self._namespaces.values())

    def lists_of(self, variant: str) -> ItemLists:
        """The block and allow lists that a retrieval variant had when it last answered."""
        return self._lists.get(variant, NO_LISTS)

    async def refresh_namespaces(self) -> None:
        """Ask every stage variant what it reads and what it may return."""
        for status in await self._statuses():
            self.observe(status.stage, status.variant, status.namespace)
            if status.stage == "retrieval" and status.lists is not None:
                self._lists[status.variant] = status.lists

    def refresh_files(self) -> None:
        """Look for new items and new versions."""
        self._live.poll()
        version = catalog_version(self._home.log)
        if version != self._catalog_version:
            self._catalog = read_catalog(self._home.log)
            self._catalog_version = version

    async def _refresh_forever(self) -> None:
        while True:
            try:
                await asyncio.to_thread(self.refresh_files)
                await self.refresh_namespaces()
            except Exception as error:
                # What was known before goes on being used; the next round tries again.
                logger.warning("the edge could not refresh its state: %s", error)
            await asyncio.sleep(self._poll_s)
