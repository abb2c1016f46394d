"""The report that benchmarks, chaos runs and the demo write."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from benchmarks.report import target, write_report


def test_a_report_holds_name_environment_rows_and_targets(tmp_path: Path) -> None:
    path = tmp_path / "new" / "out.json"
    write_report(path, "jobs", [{"p50_ms": 3.5}], [target("p50, ms", 3.5, "<= 10", True)])
    report = json.loads(path.read_text())
    assert list(report) == ["name", "environment", "rows", "targets"]
    assert report["name"] == "jobs"
    assert report["rows"] == [{"p50_ms": 3.5}]
    assert report["targets"] == [{"what": "p50, ms", "value": 3.5, "limit": "<= 10", "ok": True}]
    assert set(report["environment"]) == {"cpu", "cores", "memory_gib", "os", "python", "packages"}
    assert report["environment"]["packages"]["torch"]
    assert [entry.name for entry in path.parent.iterdir()] == ["out.json"]


def test_a_report_names_neither_host_nor_folder(tmp_path: Path) -> None:
    write_report(tmp_path / "out.json", "jobs", [], [])
    text = (tmp_path / "out.json").read_text()
    assert socket.gethostname() not in text
    assert str(Path.home()) not in text


def test_a_figure_that_json_cannot_hold_is_refused_and_the_old_report_stays(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    write_report(path, "jobs", [], [])
    before = path.read_bytes()
    with pytest.raises(ValueError, match="must be finite"):
        target("loss", float("nan"), "<= 1", False)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_report(path, "jobs", [{"loss": float("inf")}], [])
    assert path.read_bytes() == before
