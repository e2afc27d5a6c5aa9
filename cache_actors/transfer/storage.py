"""A directory or an object store, by URL, for files that are written once and read whole."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import get_protocol

from cache_actors.atomic_files import pending_path, sync_directory

Result = TypeVar("Result")


class StorageError(RuntimeError):
    """A place cannot be reached, read or written; the message says what was tried."""


@dataclass(frozen=True)
class Storage:
    """What is below one URL. Names are relative, with ``/`` between their parts."""

    url: str  # fit to be shown
    files: Any
    root: str

    @staticmethod
    def at(url: str) -> Storage:
        """The place that ``url`` names: a path, or whatever fsspec knows (``file://``, ``s3://``,
        ``gs://``, ``memory://``, ...). Settings and credentials of an object store come from its
        own environment variables and files."""
        shown = without_password(url)
        if not url.strip():
            raise StorageError("expected a directory or a URL such as s3://bucket/prefix, got ''")
        protocol = get_protocol(url)
        try:
            files, root = url_to_fs(url)
        except ImportError as error:
            raise StorageError(f"{shown} needs another package: {error}") from error
        except ValueError as error:
            known = ", ".join(sorted({"file", "memory", "s3", "gs", "abfs"}))
            raise StorageError(
                f"{shown} cannot be opened ({error}); expected a directory, or a URL of one of "
                f"{known} or another protocol of fsspec, got {protocol!r}"
            ) from error
        except Exception as error:  # drivers raise errors of their own for credentials and names
            raise StorageError(f"{shown} cannot be opened: {_said(error)}") from error
        files.invalidate_cache()  # drivers keep listings, and others may have written since
        return Storage(shown, files, root.rstrip("/"))

    @property
    def is_local(self) -> bool:
        """Whether this is a directory of this machine."""
        return isinstance(self.files, LocalFileSystem)

    def write(self, name: str, content: bytes | memoryview) -> None:
        """Write or replace a file, whole or not at all; on this machine it is durable when this
        returns."""
        self._try("write", name, lambda: self._write(self._path(name), content))

    def read(self, name: str) -> bytes:
        """A file's content."""
        content: bytes = self._try("read", name, lambda: self.files.cat_file(self._path(name)))
        return content

    def num_bytes(self, name: str) -> int | None:
        """A file's size; None when it is not there."""
        try:
            size = self._try("look at", name, lambda: self.files.info(self._path(name))["size"])
        except StorageError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            raise
        return int(size)

    def remove(self, name: str) -> None:
        """Remove a file or a directory with all that is in it; none there is no error."""
        path = self._path(name)

        def remove() -> None:
            self.files.invalidate_cache()
            if self.files.exists(path):
                self.files.rm(path, recursive=True)

        self._try("remove", name, remove)

    def _write(self, path: str, content: bytes | memoryview) -> None:
        directory = path.rpartition("/")[0]
        if not self.is_local:
            try:
                self.files.pipe_file(path, bytes(content))
            except FileNotFoundError:  # a server with directories; buckets must not be made here
                self.files.makedirs(directory, exist_ok=True)
                self.files.pipe_file(path, bytes(content))
            return
        os.makedirs(directory, exist_ok=True)
        pending = pending_path(Path(directory))
        try:
            with pending.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            pending.replace(path)
        finally:
            pending.unlink(missing_ok=True)
        sync_directory(Path(directory))

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}" if self.root else name

    def _try(self, what: str, name: str, act: Callable[[], Result]) -> Result:
        try:
            return act()
        except Exception as error:  # drivers raise errors of their own besides OSError
            raise StorageError(
                f"cannot {what} {name} in {self.url}: {_said(error)}; check that the place exists "
                "and that this process may use it"
            ) from error


def without_password(url: str) -> str:
    """The URL as it may be shown and stored."""
    return re.sub(r"(://[^/@:]*):[^/@]*@", r"\1:***@", url)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
