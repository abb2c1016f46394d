"""A small client of the REST API, as the CLI and the demo use it.

    with Client("http://127.0.0.1:8321") as client:
        dataset = client.upload_dataset("tickets", Path("tickets.jsonl"))
        job = client.submit({...})
        for event in client.events(job["id"]): ...

Answers are the API's JSON as dictionaries. Every refusal becomes an ApiError that reads as one clear text.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import httpx

FINAL_STATES = frozenset({"succeeded", "failed", "cancelled"})
AWAY = frozenset({0, 502, 503, 504})
"""HTTP statuses of a service that will be back: it or its database is away; 0 means no answer."""
FINAL_EVENTS = frozenset(f"job.{state}" for state in FINAL_STATES)
Json = dict[str, Any]


class ApiError(RuntimeError):
    """The service refused a request, or cannot be reached (status 0)."""

    def __init__(self, text: str, status: int = 0, code: str = "") -> None:
        super().__init__(text, status, code)  # all of them, so that it survives pickling
        self.text = text
        self.status = status
        self.code = code

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class JobEvent:
    """One thing that happened to a job; ids grow."""

    id: int
    type: str
    time: str
    data: Json


class Client:
    """Calls one service. Raises ApiError from every method."""

    def __init__(self, url: str, *, timeout_s: float = 60.0, reconnect_s: float = 60.0) -> None:
        """Name the service. A cut event stream is taken up again for reconnect_s seconds."""
        self.url = url.rstrip("/")
        try:
            host = httpx.URL(self.url).host
        except httpx.InvalidURL as error:
            raise ApiError(
                f"{url!r} is no address of a service ({error}); it must be like http://host:8321"
            ) from error
        # a service on this machine is never behind a proxy, and the environment may name one
        local = host in ("127.0.0.1", "localhost", "::1")
        self._http = httpx.Client(base_url=self.url, timeout=timeout_s, trust_env=not local)
        self._reconnect_s = reconnect_s

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    # ---------------------------------------------------------------------------------------------- data sets

    def upload_dataset(self, name: str, path: Path) -> Json:
        """Stream a JSON-lines file to the service; the answer holds the data set's id."""
        with path.open("rb") as file:
            return self._call(
                "POST",
                "/v1/datasets",
                params={"name": name},
                content=iter(lambda: file.read(2**20), b""),
                headers={"Content-Type": "application/x-ndjson"},
            )

    def delete_dataset(self, dataset_id: str) -> None:
        """Delete a data set that no job uses."""
        self._call("DELETE", f"/v1/datasets/{_part(dataset_id)}")

    # --------------------------------------------------------------------------------------------------- jobs

    def submit(self, spec: Mapping[str, Any]) -> Json:
        """Create a job from a job specification."""
        return self._call("POST", "/v1/jobs", json=dict(spec))

    def append_task(self, job_id: str, task: Mapping[str, Any]) -> Json:
        """Add a task to a job: a new run that continues from the newest version."""
        return self._call("POST", f"/v1/jobs/{_part(job_id)}/tasks", json=dict(task))

    def jobs(self, *, limit: int = 20) -> list[Json]:
        """Return the newest jobs."""
        answer = self._call("GET", "/v1/jobs", params={"limit": limit, "order": "desc"})
        return list(answer["data"])

    def job(self, job_id: str) -> Json:
        """Return a job with its tasks."""
        return self._call("GET", f"/v1/jobs/{_part(job_id)}")

    def attempts(self, run_id: str) -> list[Json]:
        """Return a run's attempts, oldest first."""
        found: list[Json] = self._call("GET", f"/v1/runs/{_part(run_id)}/attempts")["data"]
        return found

    def cancel(self, job_id: str) -> Json:
        """Ask a job to stop at its next step."""
        return self._call("POST", f"/v1/jobs/{_part(job_id)}:cancel")

    def pause(self, job_id: str) -> Json:
        """Ask a job to stop at its next step and to keep its place."""
        return self._call("POST", f"/v1/jobs/{_part(job_id)}:pause")

    def resume(self, job_id: str) -> Json:
        """Let a paused job go on."""
        return self._call("POST", f"/v1/jobs/{_part(job_id)}:resume")

    def retry(self, job_id: str) -> Json:
        """Train what a failed or cancelled job has left, in a new run."""
        return self._call("POST", f"/v1/jobs/{_part(job_id)}:retry")

    def matrix(self, job_id: str) -> Json:
        """Return the accuracy matrix with average accuracy, forgetting, BWT and FWT."""
        return self._call("GET", f"/v1/jobs/{_part(job_id)}/eval-matrix")

    def report(self, job_id: str, *, format: str = "html", baseline: str | None = None) -> str:
        """Return a job's report as "html", "md" or "json"; baseline: the id of a job to compare with."""
        params = {"format": format, **({"baseline": baseline} if baseline else {})}
        return self._request("GET", f"/v1/jobs/{_part(job_id)}/report", params=params).text

    def logs(
        self, job_id: str, *, run: str | None = None, attempt: int | None = None, process: str | None = None
    ) -> tuple[str, list[str]]:
        """Return what a process printed, and the names of all processes of that attempt.

        By default the driver of the newest attempt.
        """
        wanted = {"run": run, "attempt": attempt, "process": process}
        params = {name: value for name, value in wanted.items() if value is not None}
        answer = self._request("GET", f"/v1/jobs/{_part(job_id)}/logs", params=params)
        return answer.text, [name for name in answer.headers.get("X-Log-Processes", "").split(", ") if name]

    def events(self, job_id: str, *, after: int = 0) -> Iterator[JobEvent]:
        """Follow a job until its terminal event. A cut connection is taken up where it broke."""
        last = after
        is_final = False
        deadline = time.monotonic() + self._reconnect_s
        while True:
            seen = last
            try:
                for event in self._stream(job_id, last):
                    last, is_final = event.id, event.type in FINAL_EVENTS
                    deadline = time.monotonic() + self._reconnect_s
                    yield event
                # the server ends the stream when the job has ended, and also when it is stopped itself
                if is_final or (last == seen and self.job(job_id)["state"] in FINAL_STATES):
                    return
            except (httpx.TransportError, ApiError) as error:
                if isinstance(error, ApiError) and error.status not in AWAY:
                    raise
                if time.monotonic() > deadline:
                    raise ApiError(f"lost the connection to {self.url}: {error}") from error
            time.sleep(0.5)

    def _stream(self, job_id: str, after: int) -> Iterator[JobEvent]:
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
        # the server sends a comment every few seconds, so silence means a dead connection
        with self._http.stream(
            "GET", f"/v1/jobs/{_part(job_id)}/events", headers=headers, timeout=60.0
        ) as answer:
            if not answer.is_success:
                answer.read()
                raise _refusal(answer)
            for fields in _sse(answer.iter_lines()):
                value = json.loads(fields["data"])
                yield JobEvent(int(fields["id"]), value["type"], value["time"], value["data"])

    # ----------------------------------------------------------------------------------------------- adapters

    def adapters(self) -> list[Json]:
        """Return the adapters with their newest versions."""
        return list(self._call("GET", "/v1/adapters", params={"limit": 100})["data"])

    def adapter(self, name: str) -> Json:
        """Return an adapter with its versions and aliases."""
        return self._call("GET", f"/v1/adapters/{_part(name)}")

    def health(self) -> Json:
        """Return the service's state; ApiError with its text when it is not ready."""
        return self._call("GET", "/readyz")

    def _call(self, method: str, path: str, **options: Any) -> Json:
        answer = self._request(method, path, **options)
        found: Json = answer.json() if answer.content else {}
        return found

    def _request(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            answer = self._http.request(method, path, **options)
        except httpx.TransportError as error:
            raise ApiError(
                f"no service answers at {self.url} ({error}); start one with 'clpeft up'"
            ) from error
        if not answer.is_success:
            raise _refusal(answer)
        return answer


def _part(text: str) -> str:
    """Return text as one part of a path, whatever it holds."""
    return quote(text, safe="") if text not in (".", "..") else "%2E" * len(text)


def _refusal(answer: httpx.Response) -> ApiError:
    try:
        body = answer.json()
        lines = [str(body["detail"])]
        lines += [f"  {entry['pointer']}: {entry['detail']}" for entry in body.get("errors") or []]
    except (ValueError, KeyError, TypeError):
        return ApiError(f"HTTP {answer.status_code} from {answer.request.url}", answer.status_code)
    if len(lines) == 2:  # one error only: the detail says the same
        lines = lines[:1] if body["errors"][0]["detail"] in lines[0] else lines
    return ApiError("\n".join(lines), answer.status_code, str(body.get("code", "")))


def _sse(lines: Iterator[str]) -> Iterator[dict[str, str]]:
    fields: dict[str, str] = {}
    for line in lines:
        if not line:
            if "data" in fields:
                yield fields
            fields = {}
        elif not line.startswith(":"):
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            fields[name] = f"{fields[name]}\n{value}" if name == "data" and "data" in fields else value
