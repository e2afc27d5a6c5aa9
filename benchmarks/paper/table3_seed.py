"""One seed of Table 3: a world, both configurations trained on its log, and every experiment.

Each experiment begins where the log ended, with a copy of the world and of all models. The first
one has no treatment: its users live as the others would without the experiment.
"""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.paper.code_version import code_version
from benchmarks.paper.datasets import last_part
from benchmarks.paper.table3_models import LiveModels
from benchmarks.paper.table3_world import SIGNALS, Arm, Lives, Traffic, live
from cache_actors.atomic_files import replace_text
from marm.events import EventBatch
from train.config import TrainConfig
from train.data.world import World
from train.data.world_config import WorldConfig
from train.metrics import EvaluationWindow

WITHOUT = "nothing"
EXPERIMENTS: dict[str, tuple[str, ...]] = {
    WITHOUT: (),
    "retrieval": ("retrieval",),
    "cascading": ("cascading",),
    "ranking": ("ranking",),
    "all": ("retrieval", "cascading", "ranking"),
}
"""Stages at which the treatment has MARM, by experiment."""

CONTROL, MARM = "control", "marm"


@dataclass(frozen=True)
class SeedPlan:
    """Everything that determines what a seed finds."""

    seed: int
    world: WorldConfig
    control: TrainConfig
    marm: TrainConfig
    traffic: Traffic
    window: str  # of the log, for the figures of both configurations

    def key(self) -> str:
        """Names the result among those of other plans and other code."""
        text = json.dumps({"plan": asdict(self), "code": code_version([__name__])}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:24]


@dataclass(frozen=True)
class SeedResult:
    """What a seed found."""

    treated_U: NDArray[np.bool_]
    lives: dict[str, Lives]  # by experiment
    figures: dict[str, dict[str, float]]  # on the log, by configuration
    cpu_s: dict[str, float]  # of all threads: each configuration's pass, and living on

    def to_json(self) -> str:
        """`from_json` reads it back."""
        lives = {
            name: {signal: one[signal].tolist() for signal in SIGNALS}
            for name, one in self.lives.items()
        }
        values = {"figures": self.figures, "cpu_s": self.cpu_s, "lives": lives}
        return json.dumps({"treated": self.treated_U.tolist(), **values})

    @staticmethod
    def from_json(text: str) -> SeedResult:
        """The result of `to_json`."""
        values = json.loads(text)
        lives = {
            name: {signal: np.array(column, np.float64) for signal, column in one.items()}
            for name, one in values["lives"].items()
        }
        treated = np.array(values["treated"], np.bool_)
        return SeedResult(treated, lives, values["figures"], values["cpu_s"])


def run_seeds(plans: Sequence[SeedPlan], scratch: Path, jobs: int = 1) -> list[SeedResult]:
    """The results in the order of the plans; those found in ``scratch`` are not run again."""
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    directory = scratch / "table3"
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"{plan.key()}.json" for plan in plans]
    todo = [pair for pair in zip(plans, paths, strict=True) if not pair[1].is_file()]
    if jobs == 1 or len(todo) <= 1:
        for plan, path in todo:
            run_and_write(plan, path)
    else:
        # Forking a process in which torch has run may deadlock.
        with ProcessPoolExecutor(jobs, get_context("spawn")) as executor:
            running = [executor.submit(run_and_write, *pair) for pair in todo]
            for done in as_completed(running):
                done.result()
    return [SeedResult.from_json(path.read_text(encoding="utf-8")) for path in paths]


def run_and_write(plan: SeedPlan, path: Path) -> None:
    """Run a seed and keep what it found."""
    threads = torch.get_num_threads()
    torch.set_num_threads(plan.marm.num_threads)
    try:
        result = run_seed(plan)
    finally:
        torch.set_num_threads(threads)
    replace_text(path, result.to_json())
    events, spent = plan.world.num_events, result.cpu_s
    answers = sum(float(one["requests"].sum()) for one in result.lives.values())
    print(
        f"seed {plan.seed}: {events / spent[CONTROL]:,.0f} (control) and "
        f"{events / spent[MARM]:,.0f} (MARM) events per CPU s on the log; {answers:,.0f} answers "
        f"and what was learned of them in {spent['living']:,.0f} CPU s",
        flush=True,
    )


def run_seed(
    plan: SeedPlan, experiments: Mapping[str, tuple[str, ...]] = EXPERIMENTS
) -> SeedResult:
    """Train both configurations on the log of the world, then run ``experiments``: the stages at
    which the treatment has MARM, by name."""
    world = World(plan.world)
    events = EventBatch.concat(list(world.stream()))
    window = _window(events, plan.window)
    cpu_s, systems = {}, {}
    for name, config in ((CONTROL, plan.control), (MARM, plan.marm)):
        systems[name] = LiveModels(config, world.items(), window)
        began = time.process_time()
        systems[name].learn(events)
        cpu_s[name] = time.process_time() - began
    figures = {name: models.figures() for name, models in systems.items()}
    treated_U = split_users(plan.world.num_users, plan.seed)
    began = time.process_time()
    lives = {
        name: _run_experiment(plan, world, systems, stages, treated_U)
        for name, stages in experiments.items()
    }
    cpu_s["living"] = time.process_time() - began
    return SeedResult(treated_U, lives, figures, cpu_s)


def split_users(num_users: int, seed: int) -> NDArray[np.bool_]:
    """A random half of the users."""
    order = np.random.default_rng([seed, 1]).permutation(num_users)
    return order < num_users // 2


def _run_experiment(
    plan: SeedPlan,
    world: World,
    systems: dict[str, LiveModels],
    stages: tuple[str, ...],
    treated_U: NDArray[np.bool_],
) -> Lives:
    control = systems[CONTROL].fork()
    # Without a treatment nobody asks MARM, so it need not keep up.
    marm = systems[MARM].fork() if stages else control
    following = [control, marm] if stages else [control]

    def learn(events: EventBatch) -> None:
        for models in following:
            models.learn(events)

    treatment = Arm(
        retrieval=marm if "retrieval" in stages else control,
        cascading=marm if "cascading" in stages else control,
        ranking=marm if "ranking" in stages else control,
    )
    arms = Arm(control, control, control), treatment
    return live(copy.deepcopy(world), arms, treated_U, plan.traffic, plan.seed, learn)


def _window(events: EventBatch, name: str) -> EvaluationWindow:
    """From the first to the last event of a window at the end of the log."""
    times = events.timestamp_ms[last_part(len(events), len(events))[name]]
    return EvaluationWindow(int(times[0]), int(times[-1])) if len(times) else EvaluationWindow(1, 0)
