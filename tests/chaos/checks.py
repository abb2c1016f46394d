"""What must hold after every case: the adapter's bits, one version per task, whole events, nothing leaked."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import httpx

from tests.chaos.parts import processes
from tests.chaos.stand import STORE, Stand
from tests.chaos.watch import Watch

LEAK_TIMEOUT_S = 45.0
"""Seconds that what a job held is given to go."""
KEPT_ACTORS = ("ServeController", "ServeReplica", "ProxyActor", "_AutoscalingCoordinatorActor")
"""Serve, and an actor that Ray Train starts once per cluster."""


def version_digests(stand: Stand, adapter: str) -> dict[int, str]:
    """Return the sha256 of the weights of each version of an adapter, as stored."""
    found = {}
    for version in stand.client.adapter(adapter)["versions"]:
        data = stand.stored(f"{version['task_dir']}/adapter/adapter_model.safetensors")
        found[int(version["version"])] = hashlib.sha256(data).hexdigest()
    return found


def check_job(stand: Stand, watch: Watch, adapter: str, expected: dict[int, str]) -> list[str]:
    """Say what is wrong with an ended job; expected: the digests of the uninterrupted run."""
    job = stand.client.job(watch.job_id)
    if job["state"] != "succeeded":
        return [f"the job ended as {job['state']}: {job.get('reason')} {job.get('message')}"]
    problems = []
    digests = version_digests(stand, adapter)
    if sorted(digests) != sorted(expected):
        problems.append(f"versions {sorted(digests)}, expected {sorted(expected)}")
    problems += [
        f"version {version} differs from the uninterrupted run"
        for version, digest in digests.items()
        if digest != expected.get(version, digest)
    ]
    problems += [f"metrics of {name} {text}" for name, text in _metric_gaps(stand, job)]
    return problems + check_events(stand, watch, num_tasks=len(expected))


def _metric_gaps(stand: Stand, job: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (task, what is wrong): every step of every task must be there, once."""
    for task in job["tasks"]:
        page = _get(stand, job["id"], "metrics", task=task["name"], limit=500)
        steps = [row["step"] for row in page["data"]]
        if steps != list(range(1, task["steps"] + 1)):
            yield task["name"], f"are not of steps 1..{task['steps']}: {_oddities(steps)}"


def check_events(stand: Stand, watch: Watch, *, num_tasks: int) -> list[str]:
    """Say what is wrong with a job's events: as followed, as listed, and as workers numbered them."""
    problems = []
    listed = list_events(stand, watch.job_id)
    ids = [event["id"] for event in listed]
    if ids != list(range(1, len(ids) + 1)):
        problems.append(f"listed ids are not 1..{len(ids)}: {_oddities(ids)}")
    followed = [seen.event.id for seen in watch.seen]
    if followed != ids:
        problems.append(
            f"followed {len(followed)} events, listed {len(ids)}; first difference: "
            f"{next((pair for pair in zip(followed, ids, strict=False) if pair[0] != pair[1]), 'at the end')}"
        )
    committed = Counter(event["data"]["task"] for event in listed if event["type"] == "task.committed")
    if sorted(committed.values()) != [1] * num_tasks:
        problems.append(f"commits per task: {dict(committed)}")
    by_attempt: dict[tuple[str, int], list[int]] = {}
    for event in listed:
        if event["seq"] is not None:
            by_attempt.setdefault((event["run_id"], event["attempt"]), []).append(event["seq"])
    for (run_id, attempt), seqs in by_attempt.items():
        if seqs != list(range(1, len(seqs) + 1)):
            problems.append(f"worker events of {run_id} a{attempt} have gaps: {_oddities(seqs)}")
    unreadable = [event["id"] for event in listed if event["type"] == "event.unreadable"]
    return problems + [f"event {number} could not be read" for number in unreadable]


def list_events(stand: Stand, job_id: str) -> list[dict[str, Any]]:
    """Return all events of a job as the API lists them."""
    found: list[dict[str, Any]] = []
    while True:
        after = found[-1]["id"] if found else 0
        page = _get(stand, job_id, "events", after=after, limit=500)
        found += page["data"]
        if not page["has_more"]:
            return found


def _get(stand: Stand, job_id: str, what: str, **params: Any) -> dict[str, Any]:
    url = f"{stand.api_url}/v1/jobs/{job_id}/{what}"
    answer = httpx.get(url, params=params, timeout=30, trust_env=False)
    found: dict[str, Any] = answer.raise_for_status().json()
    return found


def check_leaks(stand: Stand) -> list[str]:
    """Say what is left of jobs that have ended, after what is on its way out had time to go."""
    kinds: tuple[Callable[[Stand], list[str]], ...] = (_processes, _actors, _groups, _cpus, _files, _uploads)
    deadline = time.monotonic() + LEAK_TIMEOUT_S
    while True:
        problems = [f"leaked {what}" for kind in kinds for what in kind(stand)]
        if not problems or time.monotonic() > deadline:
            return problems
        time.sleep(1.0)


def _processes(stand: Stand) -> list[str]:
    return [
        f"{part} process {p.pid}" for part in ("driver", "worker", "memory") for p in processes(stand, part)
    ]


def _actors(stand: Stand) -> list[str]:
    rows = [row for row in stand.ray_list("actors") if row["state"] != "DEAD"]
    return [
        f"actor {row['class_name']} ({row['state']})"
        for row in rows
        if not row["class_name"].startswith(KEPT_ACTORS)
    ]


def _groups(stand: Stand) -> list[str]:
    rows = stand.ray_list("placement_groups")
    return [f"placement group {row['name']} ({row['state']})" for row in rows if row["state"] != "REMOVED"]


def _cpus(stand: Stand) -> list[str]:
    status = (stand.dashboard("/api/cluster_status") or {}).get("data", {})
    report = (status.get("clusterStatus") or {}).get("loadMetricsReport")
    if report is None:
        return ["CPUs: the cluster does not say how many are in use"]
    used, total = report["usage"].get("CPU", (0.0, 0.0))
    expected = 1.0 + len(stand.hosts.nodes)
    return (
        [] if (used, total) == (0.0, expected) else [f"CPUs: {used} of {total} in use, {expected} expected"]
    )


def _files(stand: Stand) -> list[str]:
    """Temporary files. Ray keeps its session's files elsewhere; its dashboard keeps a folder pymp-* here."""
    found = (path for folder in (stand.root / "tmp").iterdir() for path in folder.iterdir())
    return sorted(
        f"file {path.relative_to(stand.root)}" for path in found if not path.name.startswith("pymp-")
    )


def _uploads(stand: Stand) -> list[str]:
    """Objects that were begun and never finished, and temporary ones."""
    client = stand.s3.client()
    bucket, _, prefix = STORE.partition("/")
    answer = client.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix)
    begun = [f"multipart upload {entry['Key']}" for entry in answer.get("Uploads") or []]
    return begun + [f"object {path}" for path in client.find(STORE) if path.endswith(".tmp")]


def _oddities(numbers: list[int]) -> str:
    """Return what is odd about numbers that should count up from 1."""
    missing = sorted(set(range(1, max(numbers, default=0) + 1)) - set(numbers))
    twice = sorted(number for number, count in Counter(numbers).items() if count > 1)
    return f"missing {missing[:10]}, twice {twice[:10]}, {len(numbers)} in all"
