"""Publishing: what training has learned becomes a version that serving picks up."""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from cache_actors.event_log.catalog import read_catalog
from cache_actors.event_log.offsets import LogOffsets
from cache_actors.home import Home
from cache_actors.registry import ITEMS, NEWEST_EVENT, ModelRegistry
from marm.model_factory import Model
from marm.probe import probe
from marm.retriever import Retriever
from train.item_vectors import item_vectors
from train.stream import StreamTrainer


def publish_versions(
    trainer: StreamTrainer, home: Home, offsets: LogOffsets, newest_event_ms: int
) -> dict[str, int]:
    """Publish every model of the run, from worker 0; returns the new version of each stage there,
    and nothing elsewhere. All workers call it.

    Every version says how far it has learned: ``offsets`` of the log exactly, and
    ``newest_event_ms``, the newest time of an event before them, for people and alerts.

    Ranking goes first and retrieval last, so that a reader that sees a new retrieval version finds
    the others at least as new.
    """
    registry = ModelRegistry(home.models)
    versions = {}
    for learner in trainer.learners:
        model = learner.whole_model()
        if model is None:
            continue
        config = {
            "step": trainer.step,
            "model": model.config.to_dict(),
            "namespace": model.config.to_dict()["namespace"],
            "log_offsets": offsets.to_dict(),
            NEWEST_EVENT: newest_event_ms,
            "created_ms": time.time_ns() // 1_000_000,
            "probe": _probe_answer(model),
        }
        versions[learner.stage] = registry.publish(
            learner.stage,
            trainer.config.variant,
            model.state_dict(),
            config,
            _item_tables(model, home),
        )
        registry.prune(learner.stage, trainer.config.variant, trainer.config.keep_versions)
    return versions


def _probe_answer(model: Model) -> list[float] | None:
    """What serving will have to answer with this version; None for weights that are not finite,
    which serving refuses by name."""
    answer = probe(model)
    return answer.tolist() if np.isfinite(answer).all() else None


def _item_tables(model: Model, home: Home) -> dict[str, dict[str, NDArray]]:
    """Vectors and popularity of all items of the catalog, for retrieval."""
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
