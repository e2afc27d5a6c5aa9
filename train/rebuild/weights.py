"""A published ranking version, frozen: what a rebuild or an audit computes rows with."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cache_actors.event_log.offsets import LogOffsets
from cache_actors.registry import ModelRegistry, ModelRegistryError, PublishedModel
from marm.config import ModelConfig
from marm.model_factory import build_model
from marm.ranker import Ranker


@dataclass(frozen=True)
class RankingWeights:
    """Everything of a version that rows depend on.

    ``log_end`` is how far into the log the version has learned. Events from there on are
    training's: it is about to write, or has written, their rows with newer weights.
    """

    variant: str
    version: int
    step: int
    config: ModelConfig
    tensors: dict[str, torch.Tensor]
    log_end: LogOffsets

    def build(self) -> Ranker:
        """The model, ready to compute; nothing in it learns."""
        model = build_model(self.config)
        assert isinstance(model, Ranker)
        model.load_state_dict(self.tensors)
        model.requires_grad_(False)
        return model.eval()


def load_weights(
    registry: ModelRegistry, variant: str, version: int | None = None
) -> RankingWeights:
    """The ranking version that serves (the pinned one, else the newest sound one), or ``version``.

    Raises:
        ModelRegistryError: when there is none, or ``version`` is missing or damaged.
        ValueError: when what was published cannot compute rows.
    """
    if version is not None:
        published = registry.load("ranking", variant, version)
    else:
        newest = registry.latest_loadable("ranking", variant)
        if newest is None:
            known = ", ".join(registry.variants("ranking")) or "none"
            raise ModelRegistryError(
                f"no ranking model of variant {variant!r} is published (variants: {known}); rows "
                "are computed with published weights: run `marm train` first"
            )
        published = newest
    return _checked(published)


def _checked(published: PublishedModel) -> RankingWeights:
    name = f"ranking/{published.variant} version {published.version}"
    absent = [key for key in ("model", "step", "log_offsets") if key not in published.config]
    if absent:
        raise ValueError(f"{name} has no {absent} in its config.json; publish it again by training")
    config = ModelConfig.from_dict(published.config["model"])
    if config.stage != "ranking":
        raise ValueError(f"{name} is a {config.stage} model; only a ranking model computes rows")
    broken = [
        key
        for key, tensor in published.tensors.items()
        if tensor.is_floating_point() and not torch.isfinite(tensor).all()
    ]
    if broken:
        raise ValueError(f"{name}: tensors {broken[:3]} hold NaN or infinity; use another version")
    return RankingWeights(
        published.variant,
        published.version,
        int(published.config["step"]),
        config,
        published.tensors,
        LogOffsets.from_dict(published.config["log_offsets"]),
    )
