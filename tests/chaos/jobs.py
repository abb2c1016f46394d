"""The job that every run plays: a tiny model, two tasks, EWC and experience replay, two workers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.chaos.cases import NUM_TASKS
from tests.chaos.checks import check_job, check_leaks, version_digests
from tests.chaos.stand import Stand
from tests.chaos.watch import Watch
from tests.service.tiny import letter_rows

STEPS = 60
CHECKPOINT_EVERY_STEPS = 20
JOB_TIMEOUT_S = 300.0
REFERENCE = "job1"
"""Adapter of the uninterrupted run: the first job of every stand."""
PROMPT = letter_rows(1, 1)[0]["prompt"]


class Jobs:
    """Submits equal jobs. Each has evaluation data of its own: what was answered once is not asked again."""

    def __init__(self, stand: Stand) -> None:
        self._stand = stand
        self._train = [self._upload(f"train{i}", letter_rows(24, i + 1)) for i in range(NUM_TASKS)]
        self._num_jobs = 0

    def submit(self) -> tuple[str, Watch]:
        """Submit the next job; return its name, which is its adapter's, and the watch over its events."""
        self._num_jobs += 1
        name = f"job{self._num_jobs}"
        tasks = [
            {
                "name": f"t{i}",
                "dataset": self._train[i],
                "eval_dataset": self._upload(f"{name}-eval{i}", letter_rows(7, i + 1)),
                "steps": STEPS,
            }
            for i in range(NUM_TASKS)
        ]
        spec: dict[str, Any] = {
            "name": name,
            "base_model": {"id": "tiny"},
            "peft": {"type": "lora", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
            "strategy": [
                {"type": "ewc", "ewc_lambda": 10.0, "fisher_sample_size": 16},
                {"type": "experience_replay", "buffer_size": 6, "replay_ratio": 0.3},
            ],
            "tasks": tasks,
            "training": {
                "num_workers": 2,
                "learning_rate": 0.01,
                "batch_size": 6,
                "micro_batch_size": 2,
                "max_length": 32,
                "checkpoint_every_steps": CHECKPOINT_EVERY_STEPS,
            },
            "evaluation": {"general": None},
        }
        job = self._stand.client.submit(spec)
        return name, Watch(self._stand.api_url, job["id"])

    def _upload(self, name: str, rows: list[dict[str, str]]) -> str:
        path = Path(self._stand.root) / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(self._stand.client.upload_dataset(name, path)["id"])


def play_reference(stand: Stand, jobs: Jobs) -> tuple[str, dict[int, str]]:
    """Run a job without an interruption; return its adapter and the digest of each version.

    Raises RuntimeError when even that does not hold.
    """
    adapter, watch = jobs.submit()
    watch.wait_end(JOB_TIMEOUT_S)
    job = stand.client.job(watch.job_id)
    if job["state"] != "succeeded":
        raise RuntimeError(f"the uninterrupted run {job['state']}: {job.get('reason')} {job.get('message')}")
    digests = version_digests(stand, adapter)
    expected = dict.fromkeys(range(1, NUM_TASKS + 1), "")
    problems = check_job(stand, watch, adapter, digests or expected) + check_leaks(stand)
    if sorted(digests) != sorted(expected):
        problems.append(f"versions {sorted(digests)}")
    if problems:
        raise RuntimeError(f"the uninterrupted run does not hold: {'; '.join(problems)}")
    return adapter, digests
