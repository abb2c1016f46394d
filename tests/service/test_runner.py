"""The Jobs API of a real Ray cluster, and what the runner makes of servers that are no Jobs API."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from service.jobs.runner import RayJobRunner, RayJobState, RunnerRefused, RunnerUnreachable
from service.ray_head import RayHead
from tests.service.control import wait_until


@pytest.fixture
def runner(ray_head: RayHead) -> Iterator[RayJobRunner]:
    """A runner with the cluster's token."""
    made = RayJobRunner(ray_head.dashboard_url, token_path=ray_head.token_path)
    yield made
    made.close()


@pytest.mark.ray
def test_a_job_runs_with_its_environment_and_submitting_it_twice_is_no_error(runner: RayJobRunner) -> None:
    runner.check()
    for _ in range(2):
        runner.submit("run_a-a1", "echo storage is $CLPEFT_STORAGE_URL", {"CLPEFT_STORAGE_URL": "file:///x"})
    wait_until(lambda: runner.state("run_a-a1") == RayJobState.SUCCEEDED, "the job", timeout_s=60)
    assert "storage is file:///x" in (runner.logs("run_a-a1") or "")


@pytest.mark.ray
def test_a_failed_a_stopped_and_an_unknown_job_are_told_apart(runner: RayJobRunner) -> None:
    runner.submit("run_b-a1", "exit 3", {})
    runner.submit("run_c-a1", "sleep 600", {})
    wait_until(lambda: runner.state("run_c-a1") == RayJobState.RUNNING, "the job", timeout_s=60)
    runner.stop("run_c-a1")
    wait_until(lambda: runner.state("run_b-a1") == RayJobState.FAILED, "the failure", timeout_s=60)
    wait_until(lambda: runner.state("run_c-a1") == RayJobState.STOPPED, "the stop", timeout_s=60)
    assert runner.state("run_x-a1") is None
    assert runner.logs("run_x-a1") is None
    runner.stop("run_x-a1")


@pytest.mark.ray
def test_a_wrong_token_is_unknown_not_failed(ray_head: RayHead, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("0" * 64)
    runner = RayJobRunner(ray_head.dashboard_url, token_path=tmp_path / "token")
    with pytest.raises(RunnerUnreachable, match=r"40[13]"):
        runner.state("run_a-a1")
    with pytest.raises(RunnerUnreachable, match="token"):
        RayJobRunner(ray_head.dashboard_url, token_path=tmp_path / "missing token").check()


@contextmanager
def answering(status: int, body: str) -> Iterator[str]:
    """A server with one answer to everything; yields its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.do_GET()

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [(500, "No available agent", RunnerUnreachable), (400, "bad runtime_env", RunnerRefused)],
)
def test_a_submission_is_refused_for_good_or_unknown(status: int, body: str, error: type[Exception]) -> None:
    with answering(status, body) as url, pytest.raises(error, match=body):
        RayJobRunner(url, token_path=None).submit("run_a-a1", "true", {})


def test_a_server_that_answers_no_json_or_nothing_is_unknown() -> None:
    with answering(200, "<html>") as url, pytest.raises(RunnerUnreachable, match="JSON"):
        RayJobRunner(url, token_path=None).state("run_a-a1")
    with pytest.raises(RunnerUnreachable, match="does not answer"):
        RayJobRunner(url, token_path=None).state("run_a-a1")
