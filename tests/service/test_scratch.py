"""Temporary folders of killed processes."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from service.scratch import remove_abandoned_folders, scratch_folder

KILLED = """
import os, signal
from service.scratch import scratch_folder
with scratch_folder() as folder:
    (folder / "half").write_text("x")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_only_folders_of_processes_that_ended_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    (tmp_path / "clpeft-scratch-other.host-1-abc").mkdir()
    with scratch_folder() as mine:
        done = subprocess.run([sys.executable, "-c", KILLED], check=False)
        assert done.returncode == -signal.SIGKILL
        assert len(list(tmp_path.glob("clpeft-scratch-*/half"))) == 1
        remove_abandoned_folders()
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
            [mine.name, "clpeft-scratch-other.host-1-abc"]
        )
    assert not mine.exists()
