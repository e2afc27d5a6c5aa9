"""What a published version must pass before it may serve. Everything here runs off the request
path, and every error says what is wrong with the version."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from marm.memory import Namespace
from marm.model_factory import Model
from marm.probe import PROBE_USER, probe
from stages.history import MemoryReader
from stages.models import check_scores

PROBE_TOLERANCE = 1e-3
"""How far the answer to the recorded probe may be off: relative above 1, absolute below."""

WARM_ITEMS = 200
WARM_PASSES = 2
MAX_NAMED = 3


def load_weights(model: Model, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give ``model`` its weights: the tensors themselves where their type is right, no copies.

    Raises:
        ValueError: tensors are missing, left over, of another shape, or not finite.
    """
    expected = model.state_dict()
    missing = sorted(expected.keys() - tensors.keys())
    unknown = sorted(tensors.keys() - expected.keys())
    if missing or unknown:
        raise ValueError(
            "its weights are not those of its config: "
            f"{_named(missing)} missing, {_named(unknown)} unknown; publish it again"
        )
    for name, tensor in tensors.items():
        wanted = expected[name]
        if tensor.shape != wanted.shape:
            raise ValueError(
                f"tensor {name!r} must have the shape {list(wanted.shape)} by its config, got "
                f"{list(tensor.shape)}; publish it again"
            )
        if tensor.is_floating_point() != wanted.is_floating_point():
            raise ValueError(
                f"tensor {name!r} must be of type {wanted.dtype}, got {tensor.dtype}; publish it "
                "again"
            )
        if tensor.is_floating_point() and not _is_finite(tensor):
            raise ValueError(f"tensor {name!r} holds NaN or infinity; train it again")
    weights = {name: tensor.to(expected[name].dtype) for name, tensor in tensors.items()}
    model.load_state_dict(weights, assign=True)


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether no number is NaN or infinite, in one pass: both carry NaN on."""
    if not tensor.numel():
        return True
    return all(math.isfinite(float(end)) for end in torch.aminmax(tensor))


def check_probe(model: Model, recorded: Sequence[float] | None) -> None:
    """Compare the model's answer to the probe with the one ``recorded`` when it was published
    (None: published before answers were recorded).

    Raises:
        ValueError: they differ, so this code reads the weights differently from the code that
            trained them.
    """
    answer = probe(model)
    check_scores(answer, answer.shape, "its probe")
    if recorded is None:
        return
    expected = np.asarray(recorded, np.float32)
    if expected.shape != answer.shape or worst_difference(answer, expected) > PROBE_TOLERANCE:
        raise ValueError(
            f"its probe answers {_few(answer)} here, but answered {_few(expected)} where it was "
            "trained; serve it with the code that trained it, or train it again"
        )


def worst_difference(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """The largest ``|found - expected| / max(1, |expected|)``: absolute for probabilities, relative
    for seconds; infinite where one is not finite, 0 for nothing."""
    if not found.size:
        return 0.0
    scale = np.maximum(1.0, np.abs(expected.astype(np.float64)))
    worst = float((np.abs(found.astype(np.float64) - expected) / scale).max())
    return worst if math.isfinite(worst) else math.inf


def warm(model: Model, history_length: int) -> None:
    """Answer made-up requests of full length, so that the first real one is not the slow one.

    Raises:
        ValueError: an answer is not finite.
    """
    for _ in range(WARM_PASSES):
        answer = probe(model, history_length, WARM_ITEMS)
        check_scores(answer, answer.shape, "its probe")


def check_memory(memory: MemoryReader, namespace: Namespace) -> None:
    """Read once what the version will read.

    Raises:
        ValueError: the rows that come are not those of ``namespace``. A memory that does not answer
            passes: versions go live while shards are down.
    """
    rows, _ = memory.fetch_available(np.array([PROBE_USER]), 1)
    fields, expected = rows.rows.dtype, namespace.row_dtype
    if memory.namespace != namespace or fields != expected:
        raise ValueError(
            f"it reads rows of {namespace.name}, but the memory gave rows of "
            f"{memory.namespace.name} with vectors {fields['memory'].shape}, expected "
            f"{expected['memory'].shape}; rebuild the memory, or publish for what it holds"
        )


def recorded_probe(config: Mapping[str, Any]) -> list[float] | None:
    """The answer to the probe in a version's config, if it was recorded."""
    recorded = config.get("probe")
    if recorded is None:
        return None
    if not isinstance(recorded, list) or not all(isinstance(x, int | float) for x in recorded):
        raise ValueError("'probe' in its config.json must be a list of numbers; publish it again")
    return recorded


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return f"{list(names[:MAX_NAMED])}{more}" if names else "none"


def _few(values: NDArray[np.float32]) -> str:
    return f"{[round(float(value), 4) for value in values[:MAX_NAMED]]}..."
