"""The command as a user runs it: a published data set goes in, models come out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from marm_command import ending_json, marm_json, run_marm_anew

from cache_actors.event_log.catalog import read_catalog
from cache_actors.event_log.log import EventLog
from cache_actors.home import Home
from cache_actors.registry import ITEMS, ModelRegistry
from marm.config import STAGES, ModelConfig
from marm.items import ItemFeatures
from marm.memory import InProcessMemory
from marm.model_factory import build_model
from marm.retriever import Retriever

pytestmark = pytest.mark.cluster

T0_S = 1_600_000_000
NUM_USERS, NUM_MOVIES, NUM_RATINGS = 20, 40, 600


def marm(*args: str) -> dict[str, Any]:
    """Runs `marm` on a cluster of its own; the JSON that it ends with."""
    return marm_json(*args, "--address", "local")


def write_movielens(directory: Path) -> Path:
    """A data set as GroupLens publishes it: sorted by user, and nobody rates a movie twice."""
    directory.mkdir()
    rng = np.random.default_rng(0)
    genres = ("Comedy", "Drama", "War")
    movies = [f"{n},Movie {n} (2000),{genres[n % 3]}|Action" for n in range(1, NUM_MOVIES + 1)]
    (directory / "movies.csv").write_text("\n".join(["movieId,title,genres", *movies, ""]))
    lines = ["userId,movieId,rating,timestamp"]
    for user in range(1, NUM_USERS + 1):
        for movie in rng.permutation(NUM_MOVIES)[: NUM_RATINGS // NUM_USERS] + 1:
            lines.append(f"{user},{movie},{rng.integers(1, 11) / 2},{T0_S + rng.integers(10**6)}")
    ratings = directory / "ratings.csv"
    ratings.write_text("\n".join([*lines, ""]))
    return ratings


def test_a_published_data_set_becomes_published_models(tmp_path: Path) -> None:
    ratings, home = write_movielens(tmp_path / "data"), Home(tmp_path / "home")
    where = ("--home", str(home.path), "--address", "local")
    ingested = run_marm_anew("ingest", str(ratings), "--format", "movielens", *where)
    report = ending_json(ingested)
    assert (report["rows_read"], report["rows_kept"]) == (NUM_RATINGS, NUM_RATINGS)
    assert report["items_added"] == len(read_catalog(home.log)) == NUM_MOVIES
    assert EventLog(home.log).num_events() == NUM_RATINGS

    settings = "--depth 1 --dim 8 --history 5 --tasks long_view,like --recency distance --shards 2"
    trained = marm(
        "train", "--home", str(home.path), "--batch-size", "64", "--variant", "tiny",
        *settings.split(),
    )  # fmt: skip
    assert trained["events_seen"] == NUM_RATINGS
    assert trained["step"] >= NUM_RATINGS // 64
    assert trained["versions"] == dict.fromkeys(STAGES, 1)
    assert 0 < trained["hit_rate"] <= 1
    assert set(trained["evaluation"]["ranking"]) == {"long_view", "like"}
    assert set(trained["evaluation"]["retrieval"]) == {"long_view"}
    for metrics in trained["evaluation"]["ranking"].values():
        assert np.isfinite(metrics["log_loss"])

    items = read_catalog(home.log).items
    for stage in STAGES:
        published = ModelRegistry(home.models).latest_loadable(stage, "tiny")
        assert published is not None
        config = ModelConfig.from_dict(published.config["model"])
        assert (config.stage, config.depth, config.recency) == (stage, 1, ("distance",))
        assert (config.error_layers, config.namespace.family) == (1, "ranking_errors1")
        model = build_model(config)
        model.load_state_dict(published.tensors)
        if isinstance(model, Retriever):
            held = published.extra[ITEMS]
            np.testing.assert_array_equal(held["item_id"], items.item_id)
            np.testing.assert_allclose(held["vectors"], model.item_vectors(items), atol=1e-5)
        else:
            rows = InProcessMemory(config.namespace).fetch(np.array([1]), 5)
            some: ItemFeatures = items.take(slice(0, 7))
            assert np.isfinite(model.score(rows, 1, some, T0_S * 1000)).all()
