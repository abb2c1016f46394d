"""The control plane's benchmark: a whole run at tiny size, and what its checks find."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.control_plane.__main__ import TINY, run, targets_of
from benchmarks.control_plane.rows import fill, look
from benchmarks.control_plane.submissions import FAULTS
from benchmarks.report import write_report
from service.db.session import open_database


def test_a_tiny_run_measures_every_list_loses_no_job_and_shows_every_event(tmp_path: Path) -> None:
    rows = run(tmp_path, f"sqlite:///{tmp_path / 'clpeft.db'}", TINY)
    write_report(tmp_path / "report.json", "control_plane", rows, targets_of(rows))
    report = json.loads((tmp_path / "report.json").read_text())
    content, *measured = report["rows"]
    assert (content["num_jobs"], content["num_events"]) == (TINY.num_jobs, TINY.num_events)
    lists = [row for row in measured if row["measures"] == "list"]
    assert len({row["route"] for row in lists}) == len(lists) > 30
    assert all(0 < row["p50_ms"] <= row["p99_ms"] and row["largest_answer_bytes"] > 0 for row in lists)
    submissions = [row for row in measured if row["measures"] == "submissions"]
    assert [row["reconciles"] for row in submissions] == [False, True]
    for row in submissions:
        assert row["num_accepted"] == row["num_sent"] == TINY.rate * TINY.seconds
        assert {name: row[name] for name in FAULTS} == dict.fromkeys(FAULTS, 0)
    (watched,) = [row for row in measured if row["measures"] == "watchers"]
    assert watched["num_received"] == watched["num_events"] * TINY.num_watchers / TINY.num_watched_jobs
    assert (watched["num_missed"], watched["num_seen_twice"], watched["num_out_of_order"]) == (0, 0, 0)
    assert watched["num_reconnects"] > 0
    assert len(report["targets"]) == 8


def test_a_filled_database_has_exactly_so_many_jobs_and_events(tmp_path: Path) -> None:
    sessions = open_database(f"sqlite:///{tmp_path / 'clpeft.db'}")
    fill(sessions, 30, 900)
    filled = look(sessions)
    assert (len(filled.job_ids), filled.num_events) == (30, 900)
    with pytest.raises(ValueError, match="too few"):
        fill(sessions, 30, 100)
    sessions.close()


def test_a_lost_job_and_a_slow_list_miss_their_targets() -> None:
    rows = [
        {"measures": "list", "route": "/v1/jobs", "p99_ms": 50.1},
        {
            "measures": "submissions",
            "reconciles": False,
            "rate_per_s": 10,
            "num_sent": 100,
            "num_accepted": 99,
            "accepted_per_s": 9.0,
            **dict.fromkeys(FAULTS, 0),
            "num_lost": 1,
        },
    ]
    assert [target["ok"] for target in targets_of(rows)] == [False] * 4
