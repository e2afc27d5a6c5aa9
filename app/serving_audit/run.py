"""Audits of a whole deployment, over its running memory pool."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import httpx
import numpy as np

from app.args import AppArgs
from app.build import variant_spec
from app.serving_audit.arms import ConfiguredArm, offline_model
from app.serving_audit.cases import AuditCase, cases_of, sample_users
from app.serving_audit.history import OfflineHistory
from app.serving_audit.http_audit import HttpAudit, audit_client
from app.serving_audit.report import AuditReport, Outcome
from app.serving_audit.stage_audit import AuditedStage
from cache_actors.event_log.catalog import read_catalog
from cache_actors.home import Home
from cache_actors.registry import ModelRegistry, PublishedModel
from cache_actors.transfer.pool_memory import PoolMemory as WholePool
from marm.items import ItemCatalog
from marm.memory import Namespace
from stages.assemble import published_config
from stages.deployments import stage_parts
from stages.pool_memory import PoolMemory
from stages.request import STAGES


@dataclass(frozen=True)
class AuditSize:
    """How much an audit looks at."""

    num_users: int
    num_items: int
    seed: int = 0


@dataclass
class ServingAudit:
    """What audits of one deployment share: its configuration, models, memory and items."""

    args: AppArgs
    home: Home
    pool: WholePool
    size: AuditSize
    registry: ModelRegistry = field(init=False)
    catalog: ItemCatalog = field(init=False)

    def __post_init__(self) -> None:
        self.registry = ModelRegistry(self.home.models)
        self.catalog = read_catalog(self.home.log)

    def of_stages(self) -> AuditReport:
        """Every arm of every stage, assembled in this process."""
        memory = PoolMemory(self.pool.pool, self.args.memory.staleness.bound())
        try:
            return AuditReport.of(
                outcome
                for stage in STAGES
                for name in self.args.stage(stage).variants
                for outcome in self._of_arm(ConfiguredArm.of(self.args, stage, name), memory)
            )
        finally:
            memory.close()

    def of_application(self, url: str, api_key: str | None = None) -> AuditReport:
        """The ranking arms of the application that answers at ``url``."""
        memory = PoolMemory(self.pool.pool, self.args.memory.staleness.bound())

        def history_of(namespace: Namespace) -> OfflineHistory:
            return OfflineHistory(memory.client(namespace))

        try:
            with audit_client(url, api_key) as client:
                audit = HttpAudit(client, self.args, self.registry, history_of, self.size.num_items)
                return AuditReport.of(
                    audit.audit(case)
                    for namespace in self._ranking_namespaces()
                    for case in self._cases(namespace, history_of(namespace))
                )
        except httpx.HTTPError as error:
            raise ValueError(
                f"{url} did not answer ({type(error).__name__}: {error}); give the URL of a "
                "running application, or leave --url out"
            ) from error
        finally:
            memory.close()

    def _of_arm(self, arm: ConfiguredArm, memory: PoolMemory) -> Iterator[Outcome]:
        published = arm.load(self.registry)
        if published is None:
            return
        namespace = published_config(published, arm.stage).namespace
        audited = self._audited(arm, published, memory)
        for case in self._cases(namespace, audited.history):
            yield audited.audit(case)

    def _audited(
        self, arm: ConfiguredArm, published: PublishedModel, memory: PoolMemory
    ) -> AuditedStage:
        spec = variant_spec(self.args, arm.stage, arm.name, self.home, self.pool.pool)
        build, _ = stage_parts(spec, memory.client)
        model = offline_model(published)
        return AuditedStage(
            arm=arm.under_audit(published.version),
            stage=build(published),
            knobs=arm.knobs,
            search=arm.args.scoring_plan().search,
            model=model,
            history=OfflineHistory(memory.client(model.config.namespace)),
        )

    def _cases(self, namespace: Namespace, history: OfflineHistory) -> Iterator[AuditCase]:
        rng = np.random.default_rng(self.size.seed)
        users = sample_users(
            lambda bucket: self.pool.users(namespace, bucket), self.size.num_users, rng
        )
        for user_id in users:
            yield from cases_of(history.rows(user_id), self.catalog, self.size.num_items, rng)

    def _ranking_namespaces(self) -> list[Namespace]:
        arms = [ConfiguredArm.of(self.args, "ranking", name) for name in self.args.ranking.variants]
        served = [arm.load(self.registry) for arm in arms]
        found = [published_config(one, "ranking").namespace for one in served if one is not None]
        return list(dict.fromkeys(found))
