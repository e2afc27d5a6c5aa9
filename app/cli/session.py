"""A command's connection to Ray, and its progress on the terminal."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import ray
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from app.build import RAY_NAMESPACE

console = Console(stderr=True)
"""People read this; results meant for programs go to standard output."""


@contextmanager
def ray_session(address: str | None) -> Iterator[None]:
    """Connect to the cluster at ``address``; None: to the one that `ray start` started on this
    machine, else to a new one for this command; ``"local"``: always to a new one.

    A new one offers at least four CPUs: the actors of a run mostly wait, and a laptop with two
    cores should still be able to host them all.
    """
    connect = partial(
        ray.init,
        address=address,
        namespace=RAY_NAMESPACE,
        log_to_driver=False,
        logging_level=logging.WARNING,
    )
    if address in (None, "local"):
        try:
            connect(num_cpus=max(4, os.cpu_count() or 1), include_dashboard=False)
        except ValueError:  # a running cluster was found, whose CPUs are not ours to set
            connect()
    else:
        connect()
    # Ray Data draws its own bars and explains itself at length; commands show their own progress.
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    try:
        yield
    finally:
        ray.shutdown()


def to_json(value: Any) -> str:
    """One line of valid JSON: what is not a number (a metric of too few events) becomes null."""
    return json.dumps(_finite(value), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def progress_bar() -> Progress:
    """A progress display with a spinner, a bar, counts and the time taken."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )
