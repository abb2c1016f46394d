"""File systems for tests that fail or dawdle, also in processes that only know their URL.

failing:///FOLDER fails every third call, slow:///FOLDER takes its time, narrow:///FOLDER has no space for Ray
Train's checkpoints. fsspec finds them through the entry
points of a package on PYTHONPATH, which register() writes.
"""

from __future__ import annotations

import errno
import itertools
import os
import re
import time
from pathlib import Path
from typing import Any, ClassVar

from fsspec.implementations.local import LocalFileOpener, LocalFileSystem

ENTRY_POINTS = """[fsspec.specs]
failing = tests.service.failing_fs:FailingFileSystem
slow = tests.service.failing_fs:SlowFileSystem
narrow = tests.service.failing_fs:NarrowFileSystem
"""
DELAY_S = 0.05


def register(folder: Path) -> str:
    """Write the package; returns what PYTHONPATH must begin with."""
    package = folder / "failing_stores-1.0.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: failing-stores\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text(ENTRY_POINTS)
    return str(folder)


class _Object(LocalFileOpener):
    """A new object: it appears, and it fails, when it is closed, as on an object store."""

    is_over = False

    def close(self) -> None:
        if self.is_over or "w" not in self.mode:
            super().close()
            return
        self.is_over = True
        self.fs.trouble(self.path)
        super().close()
        self.commit()

    def discard(self) -> None:
        self.is_over = True
        super().close()
        super().discard()

    @property
    def closed(self) -> bool:
        return bool(self.f.closed)

    @closed.setter
    def closed(self, value: bool) -> None:
        assert value


class _TroubledFileSystem(LocalFileSystem):
    """A local folder behind calls that are troubled."""

    def trouble(self, _path: str = "") -> None:
        raise NotImplementedError

    def _open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        if "w" in mode:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        return _Object(path, mode, fs=self, autocommit="w" not in mode)

    def info(self, path: Any, **options: Any) -> Any:
        self.trouble()
        return super().info(path, **options)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        self.trouble()
        data = Path(path).read_bytes()
        return data[start:end]

    def ls(self, path: str, detail: bool = False, **_: Any) -> Any:
        self.trouble()
        return LocalFileSystem().ls(path, detail=detail)

    def find(self, path: str, detail: bool = False, **_: Any) -> Any:
        self.trouble()
        return LocalFileSystem().find(path, detail=detail)

    def rm(self, path: Any, recursive: bool = False, **_: Any) -> None:
        self.trouble()
        LocalFileSystem().rm(path, recursive=recursive)


class FailingFileSystem(_TroubledFileSystem):
    """Every third call of a process fails."""

    protocol = "failing"
    _calls: ClassVar[Any] = itertools.count(1)

    def trouble(self, _path: str = "") -> None:
        if next(self._calls) % 3 == 0:
            raise OSError(errno.EIO, "the store fails this call")


class SlowFileSystem(_TroubledFileSystem):
    """Every call takes DELAY_S longer."""

    protocol = "slow"

    def trouble(self, _path: str = "") -> None:
        time.sleep(DELAY_S)


class NarrowFileSystem(_TroubledFileSystem):
    """There is no space for the files of checkpoints."""

    protocol = "narrow"

    def trouble(self, _path: str = "") -> None:
        if re.search(r"/train/a\d+/task", _path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
