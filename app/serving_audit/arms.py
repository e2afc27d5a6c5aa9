"""The arms of a configuration as an audit needs them: what they serve, and how exactly."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from app.args import KNOBS, AppArgs, VariantArgs
from app.serving_audit.report import ArmUnderAudit
from cache_actors.registry import ModelRegistry, PublishedModel
from marm.model_factory import Model, build_unfilled
from marm.precision import build_precision
from stages.assemble import published_config
from stages.knobs import StageKnobs
from stages.request import StageName
from stages.version_checks import load_weights

TOLERANCE_FP32 = 1e-4


@dataclass(frozen=True)
class ConfiguredArm:
    """One arm as configured."""

    stage: StageName
    name: str
    args: VariantArgs
    knobs: StageKnobs

    @staticmethod
    def of(args: AppArgs, stage: StageName, name: str) -> ConfiguredArm:
        """The arm ``name`` of ``stage``.

        Raises:
            ValueError: the configuration has no such arm.
        """
        variants = args.stage(stage).variants
        if name not in variants:
            raise ValueError(
                f"{stage} has no arm {name!r} in this configuration, only {sorted(variants)}; give "
                "the one that serves with --config"
            )
        variant = variants[name]
        return ConfiguredArm(stage, name, variant, KNOBS[stage].model_validate(variant.user_config))

    @property
    def model(self) -> str:
        """The published variant that it serves."""
        return self.args.model or self.name

    @property
    def tolerance(self) -> float:
        """1e-4 in single precision; what half precision states where that is configured and this
        machine has it."""
        precision = build_precision(self.args.precision, torch.device("cpu"))
        return TOLERANCE_FP32 if precision.dtype == torch.float32 else precision.tolerance

    def under_audit(self, version: int) -> ArmUnderAudit:
        """One of its versions."""
        return ArmUnderAudit(self.stage, self.name, version, self.tolerance)

    def load(self, registry: ModelRegistry) -> PublishedModel | None:
        """The version that it serves now; None when none is sound."""
        if self.knobs.model_version is not None:
            return registry.load(self.stage, self.model, self.knobs.model_version)
        return registry.latest_loadable(self.stage, self.model)


def offline_model(published: PublishedModel) -> Model:
    """The model of a version along the path that training evaluates with."""
    model = build_unfilled(published_config(published, published.stage))
    # Copies: the model that serves has taken the tensors themselves.
    load_weights(model, {name: tensor.clone() for name, tensor in published.tensors.items()})
    model.requires_grad_(False)
    model.eval()
    return model
