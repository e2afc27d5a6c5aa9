"""Publishing: what training has learned becomes a version that serving picks up."""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from cache_actors.event_log.catalog import read_catalog
from cache_actors.event_log.offsets import LogOffsets
from cache_actors.home import Home
from cache_actors.registry import ITEMS, ModelRegistry
from marm.probe import probe
from marm.retriever import Retriever
from train.item_vectors import item_vectors
from train.learner import Learner
from train.stream import StreamTrainer


def publish_versions(trainer: StreamTrainer, home: Home, offsets: LogOffsets) -> dict[str, int]:
    """Publish every model of the run; returns the new version of each stage.

    Ranking goes first and retrieval last, so that a reader that sees a new retrieval version finds
    the others at least as new.
    """
    registry = ModelRegistry(home.models)
    versions = {}
    for learner in trainer.learners:
        config = {
            "step": trainer.step,
            "model": learner.model.config.to_dict(),
            "namespace": learner.model.config.to_dict()["namespace"],
            "log_offsets": offsets.to_dict(),
            "created_ms": time.time_ns() // 1_000_000,
            "probe": _probe_answer(learner),
        }
        versions[learner.stage] = registry.publish(
            learner.stage,
            trainer.config.variant,
            learner.model.state_dict(),
            config,
            _item_tables(learner, home),
        )
        registry.prune(learner.stage, trainer.config.variant, trainer.config.keep_versions)
    return versions


def _probe_answer(learner: Learner) -> list[float] | None:
    """What serving will have to answer with this version; None for weights that are not finite,
    which serving refuses by name."""
    answer = probe(learner.model)
    return answer.tolist() if np.isfinite(answer).all() else None


def _item_tables(learner: Learner, home: Home) -> dict[str, dict[str, NDArray]]:
    """Vectors and popularity of all items of the catalog, for retrieval."""
    model = learner.model
    if not isinstance(model, Retriever):
        return {}
    items = read_catalog(home.log).items
    return {
        ITEMS: {
            "item_id": items.item_id,
            "author_id": items.author_id,
            "tag_id": items.tag_id,
            "duration_ms": items.duration_ms,
            "popularity": model.popularity(items),
            "vectors": item_vectors(model, items),
        }
    }
