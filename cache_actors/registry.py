"""Published models: immutable, numbered, checksummed directories that serving picks up.

A version is ``<stage>/<variant>/<version>/`` with ``model.safetensors``, ``config.json`` and any
extra arrays (a retrieval model brings ``items.safetensors``). It appears in one atomic step, and
its config lists every file with size and checksum, so a damaged copy is refused by name.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import safetensors.torch
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError

from cache_actors.atomic_files import (
    claim_directory,
    pending_path,
    remove_abandoned,
    replace_text,
    sync_directory,
    sync_file,
)
from cache_actors.served_versions import note_served, read_served

logger = logging.getLogger(__name__)

MODEL_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
PIN_FILE = "pin.json"
ITEMS = "items"
"""Name of the extra arrays that a retrieval model's item index is built from."""

NEWEST_EVENT = "newest_event_ms"
"""Key of a version's configuration: time of the newest event that it has learned."""

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
_VERSION_NAME = re.compile(r"\d{8}")


class ModelRegistryError(RuntimeError):
    """A version is missing, damaged or half-written; the message says which and what is wrong."""


@dataclass(frozen=True)
class PublishedModel:
    """One version, read and verified."""

    stage: str
    variant: str
    version: int
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    extra: dict[str, dict[str, NDArray]]
    path: Path

    @property
    def items(self) -> dict[str, NDArray]:
        """Item columns of a retrieval model; empty for other stages."""
        return self.extra.get(ITEMS, {})

    @property
    def newest_event_ms(self) -> int | None:
        """Time of the newest event that it has learned; None where its publisher did not say."""
        newest_ms = self.config.get(NEWEST_EVENT)
        return newest_ms if isinstance(newest_ms, int) else None


class ModelRegistry:
    """All models under ``path`` (a home's ``models`` directory); any process may publish."""

    def __init__(self, path: Path) -> None:
        self._path = Path(path)
        self._rejected: dict[Path, tuple[object, ...]] = {}

    def publish(
        self,
        stage: str,
        variant: str,
        tensors: Mapping[str, torch.Tensor | NDArray],
        config: Mapping[str, Any],
        extra: Mapping[str, Mapping[str, NDArray]] | None = None,
    ) -> int:
        """Make a new version visible, whole and durable, and return its number (from 1)."""
        directory = self._directory(stage, variant)
        document = _checked_config(stage, variant, config)
        directory.mkdir(parents=True, exist_ok=True)
        pending = pending_path(directory)
        pending.mkdir()
        try:
            safetensors.torch.save_file(_to_tensors(tensors), str(pending / MODEL_FILE))
            for name, arrays in (extra or {}).items():
                target = pending / f"{_checked_name(name, 'extra name')}.safetensors"
                if target.exists():
                    raise ValueError(f"extra name {name!r} is taken by the model; choose another")
                safetensors.numpy.save_file(_to_arrays(name, arrays), str(target))
            document["files"] = {path.name: _describe(path) for path in sorted(pending.iterdir())}
            version = max(self.versions(stage, variant), default=0) + 1
            while not self._claim(pending, directory, document, version):
                version += 1
            return version
        finally:
            shutil.rmtree(pending, ignore_errors=True)

    def versions(self, stage: str, variant: str) -> list[int]:
        """Numbers of all versions, ascending, sound or not."""
        directory = self._directory(stage, variant)
        if not directory.is_dir():
            return []
        return sorted(
            int(path.name) for path in directory.iterdir() if _VERSION_NAME.fullmatch(path.name)
        )

    def variants(self, stage: str) -> list[str]:
        """Names of the stage's variants that were ever published."""
        directory = self._path / _checked_name(stage, "stage")
        if not directory.is_dir():
            return []
        names = (path.name for path in directory.iterdir() if _NAME.fullmatch(path.name))
        return sorted(name for name in names if self.versions(stage, name))

    def latest(self, stage: str, variant: str) -> int | None:
        """The version to serve: the pinned one, else the newest; None when there is none. Cheap."""
        pinned = self.pinned(stage, variant)
        return pinned if pinned is not None else max(self.versions(stage, variant), default=None)

    def load(self, stage: str, variant: str, version: int) -> PublishedModel:
        """Read a version, verifying every byte."""
        path = self._version_path(stage, variant, version)
        config = _read_config(path, stage, variant, version)
        tensors: dict[str, torch.Tensor] = {}
        extra: dict[str, dict[str, NDArray]] = {}
        for name, expected in config["files"].items():
            content = _verified_bytes(path / name, expected)
            try:
                if name == MODEL_FILE:
                    tensors = safetensors.torch.load(content)
                else:
                    extra[name.removesuffix(".safetensors")] = safetensors.numpy.load(content)
            except SafetensorError as error:
                raise ModelRegistryError(f"{path / name} is not safetensors: {error}") from error
        return PublishedModel(stage, variant, version, config, tensors, extra, path)

    def config(self, stage: str, variant: str, version: int) -> dict[str, Any]:
        """What a version says of itself, without reading its tensors.

        Raises:
            ModelRegistryError: it is missing, or its configuration was changed.
        """
        return _read_config(self._version_path(stage, variant, version), stage, variant, version)

    def latest_loadable(
        self, stage: str, variant: str, current: int | None = None
    ) -> PublishedModel | None:
        """The newest sound version, never newer than a pin; damaged ones are logged and skipped.

        None when there is none, or when it is ``current``, which the caller already has.
        """
        newest = self.latest(stage, variant)
        if newest is None:
            return None
        for version in reversed(self.versions(stage, variant)):
            if version > newest:
                continue
            if version == current:
                return None
            path = self._version_path(stage, variant, version)
            state = _state_of(path)
            if self._rejected.get(path) == state:  # known to be damaged, and not repaired since
                continue
            try:
                return self.load(stage, variant, version)
            except ModelRegistryError as error:
                self._rejected[path] = state
                logger.warning("skipping %s/%s version %d: %s", stage, variant, version, error)
        return None

    def pin(self, stage: str, variant: str, version: int | None) -> None:
        """Serve ``version`` whatever is published later (a rollback); None: the newest again."""
        path = self._directory(stage, variant) / PIN_FILE
        if version is None:
            path.unlink(missing_ok=True)
            return
        self.load(stage, variant, version)  # refuse a pin that could not be served
        replace_text(path, json.dumps({"version": version}))

    def pinned(self, stage: str, variant: str) -> int | None:
        """The pinned version, if any."""
        path = self._directory(stage, variant) / PIN_FILE
        try:
            return int(json.loads(path.read_text(encoding="utf-8"))["version"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise ModelRegistryError(
                f'{path} must hold {{"version": <number>}} ({error!r}); pin again or delete it'
            ) from error

    def note_served(self, stage: str, variant: str, version: int) -> None:
        """Note that ``version`` went live somewhere; never fails."""
        note_served(self._directory(stage, variant), version)

    def served(self, stage: str, variant: str) -> list[int]:
        """Versions in the order in which they were noted to go live."""
        return read_served(self._directory(stage, variant))

    def prune(self, stage: str, variant: str, keep: int) -> list[int]:
        """Delete all but the newest ``keep`` versions and a pinned one, and what crashed publishers
        left unfinished; the numbers deleted."""
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        pinned = self.pinned(stage, variant)
        doomed = [v for v in self.versions(stage, variant)[:-keep] if v != pinned]
        for version in doomed:
            path = self._version_path(stage, variant, version)
            grave = pending_path(path.parent)  # out of sight first, so nobody sees half of it
            path.rename(grave)
            shutil.rmtree(grave)
        remove_abandoned(self._directory(stage, variant))
        return doomed

    def _claim(
        self, pending: Path, directory: Path, document: dict[str, Any], version: int
    ) -> bool:
        target = directory / f"{version:08d}"
        if target.exists():
            return False
        document = {**document, "version": version}
        document["config_sha256"] = _config_checksum(document)
        text = json.dumps(document, indent=1, sort_keys=True, allow_nan=False)
        (pending / CONFIG_FILE).write_text(text, encoding="utf-8")
        for path in pending.iterdir():
            sync_file(path)
        sync_directory(pending)
        return claim_directory(pending, target)

    def _directory(self, stage: str, variant: str) -> Path:
        return self._path / _checked_name(stage, "stage") / _checked_name(variant, "variant")

    def _version_path(self, stage: str, variant: str, version: int) -> Path:
        return self._directory(stage, variant) / f"{version:08d}"


def _checked_name(name: str, role: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{role} must match {_NAME.pattern}, got {name!r}; rename it")
    return name


def _checked_config(stage: str, variant: str, config: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in (("stage", stage), ("variant", variant)):
        if config.get(name, value) != value:
            raise ValueError(f"config says {name} {config[name]!r}, but {value!r} is published")
    document = {"created_ms": time.time_ns() // 1_000_000, **config}
    document.update(stage=stage, variant=variant)
    try:
        json.dumps(document, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"config must be plain JSON without NaN: {error}") from error
    return document


def _to_tensors(tensors: Mapping[str, torch.Tensor | NDArray]) -> dict[str, torch.Tensor]:
    # A clone each: parameters that share storage are stored, and so loaded, as separate ones.
    return {
        name: torch.as_tensor(tensor).detach().to("cpu", copy=True).contiguous()
        for name, tensor in tensors.items()
    }


def _to_arrays(name: str, arrays: Mapping[str, NDArray]) -> dict[str, NDArray]:
    for key, array in arrays.items():
        if np.asarray(array).dtype.kind not in "biuf":
            raise ValueError(
                f"extra array {name!r}/{key!r} must be numbers, got {np.asarray(array).dtype}"
            )
    return {key: np.ascontiguousarray(array) for key, array in arrays.items()}


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _config_checksum(document: Mapping[str, Any]) -> str:
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _read_config(path: Path, stage: str, variant: str, version: int) -> dict[str, Any]:
    try:
        config = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
    except OSError as error:
        found = "half-written" if path.is_dir() else "missing"
        raise ModelRegistryError(f"{path} is {found}: {error.strerror} {CONFIG_FILE}") from error
    except ValueError as error:
        raise ModelRegistryError(f"{path / CONFIG_FILE} is not JSON: {error}") from error
    if not isinstance(config, dict) or not _is_manifest(config.get("files")):
        raise ModelRegistryError(f"{path / CONFIG_FILE} lists no files; publish the model again")
    checksum = config.pop("config_sha256", None)
    if checksum != _config_checksum(config):
        raise ModelRegistryError(f"{path / CONFIG_FILE} was changed after it was published")
    identity = (config.get("stage"), config.get("variant"), config.get("version"))
    if identity != (stage, variant, version):
        raise ModelRegistryError(
            f"{path} holds {identity}, expected {(stage, variant, version)}; was it copied here?"
        )
    return config


def _is_manifest(files: object) -> bool:
    return (
        isinstance(files, dict)
        and MODEL_FILE in files
        and all(_NAME.fullmatch(name) for name in files)
        and all(isinstance(e, dict) and {"bytes", "sha256"} <= e.keys() for e in files.values())
    )


def _verified_bytes(path: Path, expected: Mapping[str, Any]) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ModelRegistryError(f"{path} can't be read: {error.strerror}") from error
    if len(content) != expected["bytes"]:
        raise ModelRegistryError(
            f"{path} is torn: expected {expected['bytes']} bytes, got {len(content)}"
        )
    if hashlib.sha256(content).hexdigest() != expected["sha256"]:
        raise ModelRegistryError(f"{path} is damaged: its checksum differs from {CONFIG_FILE}'s")
    return content


def _state_of(path: Path) -> tuple[object, ...]:
    """What changes when somebody repairs a version's files."""
    try:
        stats = [(file.name, file.stat()) for file in sorted(path.iterdir())]
    except OSError:
        return ()
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)
