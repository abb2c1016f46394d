"""The Ray Jobs API behind a small protocol, over plain HTTP so that the control plane never imports ray."""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

import httpx

JOBS_PATH = "/api/jobs/"
TIMEOUT_S = 10.0
_ALREADY_EXISTS = "already exists"
_UNKNOWN_JOB = "does not exist"


class RunnerUnreachable(RuntimeError):
    """The Jobs API does not answer: nothing is known about any job."""


class RunnerRefused(RuntimeError):
    """The Jobs API answers and refuses the request."""


class RayJobState(StrEnum):
    """What the Jobs API says of a job."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    STOPPED = "STOPPED"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"

    @property
    def is_final(self) -> bool:
        """Has the driver ended?"""
        return self in (RayJobState.STOPPED, RayJobState.SUCCEEDED, RayJobState.FAILED)


class JobRunner(Protocol):
    """Starts and watches Ray jobs. Every method raises RunnerUnreachable when nothing answers."""

    def submit(self, submission_id: str, entrypoint: str, env: Mapping[str, str]) -> None:
        """Start a job; a job of this id that exists already is success. Raises RunnerRefused."""

    def state(self, submission_id: str) -> RayJobState | None:
        """Return the job's state; None when the cluster does not know the id."""

    def stop(self, submission_id: str) -> None:
        """Ask Ray to end the job's processes; nothing happens when the id is unknown."""

    def logs(self, submission_id: str) -> str | None:
        """Return the driver's log; None when the cluster does not know the id."""

    def check(self) -> None:
        """Return when the Jobs API answers."""


class RayJobRunner:
    """The Jobs API of a Ray dashboard. The token file is read per request, so that it may be rotated."""

    def __init__(self, dashboard_url: str, *, token_path: Path | None, timeout_s: float = TIMEOUT_S) -> None:
        # The cluster's address is a setting, so proxies of the environment do not apply to it.
        self._client = httpx.Client(base_url=dashboard_url, timeout=timeout_s, trust_env=False)
        self._token_path = token_path

    def submit(self, submission_id: str, entrypoint: str, env: Mapping[str, str]) -> None:
        """Start a job; see JobRunner."""
        body = {
            "entrypoint": entrypoint,
            "submission_id": submission_id,
            "runtime_env": {"env_vars": dict(env)},
            "metadata": {"clpeft": submission_id},
        }
        answer = self._send("POST", JOBS_PATH, json=body)
        if answer.is_success or _ALREADY_EXISTS in answer.text:
            return
        if answer.status_code >= 500:  # the agent is starting, or the head is short of something: try again
            raise RunnerUnreachable(f"the Jobs API answers {answer.status_code}: {_last_line(answer.text)}")
        raise RunnerRefused(
            f"the Jobs API refuses the job with {answer.status_code}: {_last_line(answer.text)}"
        )

    def state(self, submission_id: str) -> RayJobState | None:
        """Return the job's state; see JobRunner."""
        answer = self._get(f"{JOBS_PATH}{submission_id}")
        return None if answer is None else RayJobState(answer["status"])

    def stop(self, submission_id: str) -> None:
        """Ask Ray to end the job; see JobRunner."""
        answer = self._send("POST", f"{JOBS_PATH}{submission_id}/stop")
        if answer.status_code != 404:
            _check(answer)

    def logs(self, submission_id: str) -> str | None:
        """Return the driver's log; see JobRunner."""
        answer = self._get(f"{JOBS_PATH}{submission_id}/logs")
        return None if answer is None else str(answer["logs"])

    def check(self) -> None:
        """Return when the Jobs API answers; see JobRunner."""
        _check(self._send("GET", "/api/version"))

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _get(self, path: str) -> Any:
        answer = self._send("GET", path)
        if answer.status_code == 404 and _UNKNOWN_JOB in answer.text:
            return None
        _check(answer)  # any other 404 comes from something that is not, or not yet, the Jobs API
        try:
            return answer.json()
        except json.JSONDecodeError as error:
            raise RunnerUnreachable(f"the Jobs API answers {path} with something else than JSON") from error

    def _send(self, method: str, path: str, **options: Any) -> httpx.Response:
        headers = {}
        if not self._client.base_url.host:
            raise RunnerUnreachable("no Ray dashboard address is set: CLPEFT_RAY_DASHBOARD_URL")
        try:
            if self._token_path is not None:
                headers["Authorization"] = f"Bearer {self._token_path.read_text().strip()}"
            return self._client.request(method, path, headers=headers, **options)
        except (httpx.TransportError, OSError) as error:
            raise RunnerUnreachable(f"the Jobs API does not answer: {error}") from error


def _check(answer: httpx.Response) -> None:
    if not answer.is_success:
        raise RunnerUnreachable(f"the Jobs API answers {answer.status_code}: {_last_line(answer.text)}")


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1][:500] if lines else "no text"
