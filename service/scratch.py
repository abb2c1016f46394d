"""Temporary folders that do not stay when their process is killed: the next one on the machine tidies up."""

from __future__ import annotations

import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

_PREFIX = f"clpeft-scratch-{socket.gethostname()}-"
"""Processes of another host or container, which may share the folder, have other names."""


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A temporary folder of this process; it is removed when the block ends."""
    with new_scratch_folder() as folder:
        yield Path(folder)


def new_scratch_folder() -> tempfile.TemporaryDirectory[str]:
    """Return one that its user removes by cleanup()."""
    return tempfile.TemporaryDirectory(prefix=f"{_PREFIX}{os.getpid()}-")


def remove_abandoned_folders() -> None:
    """Remove the scratch folders of processes that have ended, as SIGKILL leaves them."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        found = re.match(r"(\d+)-", path.name.removeprefix(_PREFIX))
        if found and not psutil.pid_exists(int(found[1])):
            shutil.rmtree(path, ignore_errors=True)
