"""`clpeft demo`: the whole service on a real model, once with a strategy and once without, compared.

It runs in a home of its own, <home>/demo, emptied at the start, so that it never touches a service that
runs; only the prepared base models are shared.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import openai
from rich.console import Console
from rich.markup import escape

from service import embedded
from service.client import ApiError, Client, JobEvent
from service.demo_results import (
    BASELINE,
    BUFFER_SHARE,
    STRATEGY,
    Findings,
    answers_table,
    rows_of,
    show_costs,
    targets_of,
)
from service.demo_tasks import write_tasks
from service.demo_tasks.folders import DemoError, DemoTask, load_tasks
from service.models import prepare_model
from service.processes import MemoryWatch, interrupt_on_signals
from service.report import write_report
from service.settings import Settings
from service.show import matrix_table, scalars_table, show_events

# What the demo trains with, in one place.

MODEL = "smollm2-135m"
NUM_STEPS = 50
NUM_WORKERS = 2
LORA: dict[str, Any] = {"type": "lora", "r": 8, "lora_alpha": 16}
TRAINING: dict[str, Any] = {
    "num_workers": NUM_WORKERS,
    "batch_size": 8,
    "micro_batch_size": 4,
    "learning_rate": 2e-3,
    "schedule": "linear",
    "max_length": 64,
    "seed": 0,
}
EWC: dict[str, Any] = {"type": "ewc"}
REPLAY: dict[str, Any] = {"type": "experience_replay", "replay_ratio": 0.3, "replay_frequency": 1}
USER_TASKS_MAX_LENGTH = 96
USER_TASKS_MAX_EVAL_ROWS = 24
USER_TASKS_NUM_STEPS = 15


def run_demo(
    console: Console, *, tasks_dir: Path | None, json_path: Path | None, num_steps: int | None, keep: bool
) -> int:
    """Run the demo; return the exit code: 0, 1 when a job failed or a process is left, 130 after Ctrl-C."""
    shared = Settings()
    home = shared.home / "demo"
    findings = Findings()
    interrupt_on_signals()
    exit_code = 0
    start = time.monotonic()
    with _only_demo(home), MemoryWatch() as memory, tempfile.TemporaryDirectory(prefix="clpeft-") as scratch:
        if tasks_dir is None:
            write_tasks(Path(scratch))
        tasks = load_tasks(tasks_dir or Path(scratch))
        settings = _fresh_settings(shared, home)
        try:
            _train_and_ask(console, settings, tasks, memory, findings, num_steps, is_own=tasks_dir is None)
        except KeyboardInterrupt:
            console.print("\n[yellow]interrupted[/]")
            exit_code, keep = 130, False
        except _JobFailed as error:
            console.print(f"[red]{escape(str(error))}[/]")
            exit_code, keep = 1, False
        except BaseException:
            embedded.down(home)
            raise
        if keep:
            (home / "kept").touch()
            console.print(
                f"The service stays. Talk to the adapter, then end it:\n{_commands(home, findings)}"
            )
        else:
            with _phase(console, findings, "shut down"):
                survivors = embedded.down(home) or []
            if survivors:
                console.print(f"[red]still running: {', '.join(str(p.pid) for p in survivors)}[/]")
                exit_code = exit_code or 1
            else:
                console.print("No process is left.")
        findings.phases_s["total"] = time.monotonic() - start
        findings.peak_bytes = memory.peak_bytes
    if exit_code == 0:
        targets = targets_of(findings)
        show_costs(console, findings, targets)
        if json_path is not None:
            write_report(json_path, "demo", rows_of(findings), targets)
    return exit_code


# -------------------------------------------------------------------------------------------------------- run


class _JobFailed(RuntimeError):
    """A job ended in another state than succeeded."""


def _train_and_ask(
    console: Console,
    settings: Settings,
    tasks: list[DemoTask],
    memory: MemoryWatch,
    findings: Findings,
    num_steps: int | None,
    *,
    is_own: bool,
) -> None:
    with _phase(console, findings, "prepare the model"):
        prepare_model(MODEL, settings.models_dir)
    with _phase(console, findings, "start the service"):
        state = embedded.up(settings)
        memory.include([state.ray.root], state.ray.marker)
    console.print(f"The API answers at [bold]{state.api_url}[/], for OpenAI clients at {state.api_url}/v1")
    with Client(state.api_url) as client:
        with _phase(console, findings, "upload the data"):
            planned = [_upload(client, task) for task in tasks]
        steps = num_steps or (NUM_STEPS if is_own else USER_TASKS_NUM_STEPS)
        findings.num_old_rows = min(tasks[0].num_rows, steps * TRAINING["batch_size"])
        findings.buffer_size = max(1, int(BUFFER_SHARE * findings.num_old_rows))
        strategies: dict[str, list[dict[str, Any]]] = {
            STRATEGY: [EWC, {**REPLAY, "buffer_size": findings.buffer_size}],
            BASELINE: [{"type": "none"}],
        }
        for name, strategy in strategies.items():
            spec = _job_spec(planned, strategy, steps, is_own=is_own)
            if name == STRATEGY:
                console.print(_describe(spec, tasks, is_own=is_own))
            console.rule(f"train with strategy {name}", align="left")
            with _phase(console, findings, f"train and evaluate: {name}"):
                job = _run_job(console, client, spec, name, findings)
            findings.matrices[name] = client.matrix(job["id"])
            if name == STRATEGY:
                findings.adapter, findings.version = job["adapter"], len(tasks)
        console.rule("what the strategy bought", align="left")
        for name, matrix in findings.matrices.items():
            console.print(matrix_table(matrix, title=f"accuracy on each task, strategy {name}"))
        console.print(scalars_table(findings.matrices))
        console.rule(f"ask the newest adapter, {findings.adapter}", align="left")
        with _phase(console, findings, "ask the adapter"):
            try:
                findings.answers = _ask(state.api_url, findings, tasks)
            except openai.APIError as error:
                raise ApiError(f"adapter {findings.adapter} does not answer: {error.message}") from error
        console.print(answers_table(findings.answers))


def _upload(client: Client, task: DemoTask) -> dict[str, str]:
    train = client.upload_dataset(f"{task.name[:50]}-train", task.train)
    test = client.upload_dataset(f"{task.name[:50]}-test", task.test)
    return {"name": task.name, "dataset": train["id"], "eval_dataset": test["id"]}


def _job_spec(
    tasks: list[dict[str, str]], strategy: list[dict[str, Any]], num_steps: int, *, is_own: bool
) -> dict[str, Any]:
    name = "demo-" + "-".join(str(entry["type"]).replace("_", "-") for entry in strategy)
    spec: dict[str, Any] = {
        "name": name,
        "base_model": {"id": MODEL},
        "peft": LORA,
        "strategy": strategy,
        "tasks": [{**task, "steps": num_steps} for task in tasks],
        "training": dict(TRAINING),
    }
    if not is_own:
        spec["training"]["max_length"] = USER_TASKS_MAX_LENGTH
        spec["evaluation"] = {"max_rows": USER_TASKS_MAX_EVAL_ROWS}
    return spec


def _describe(spec: Mapping[str, Any], tasks: list[DemoTask], *, is_own: bool) -> str:
    training = spec["training"]
    names = ", ".join(f"{task.name} ({task.num_rows} rows)" for task in tasks)
    text = f"{len(tasks)} tasks: {names}\n"
    text += f"per task {spec['tasks'][0]['steps']} steps of {training['batch_size']} rows "
    text += f"on {training['num_workers']} workers, LoRA rank {spec['peft']['r']}"
    if not is_own:
        text += f"\ncapped so that it ends soon: {training['max_length']} tokens per row, "
        text += f"{spec['evaluation']['max_rows']} evaluation rows per task"
    return text


def _run_job(
    console: Console, client: Client, spec: Mapping[str, Any], name: str, findings: Findings
) -> dict[str, Any]:
    start = time.monotonic()

    def note_first_step(event: JobEvent) -> None:
        if event.type == "step" and name not in findings.first_step_s:
            findings.first_step_s[name] = time.monotonic() - start

    job = client.submit(spec)
    show_events(console, client.events(job["id"]), on_event=note_first_step)
    job = client.job(job["id"])
    if job["state"] != "succeeded":
        raise _JobFailed(f"job {job['id']} {job['state']}: {job.get('message') or 'no reason given'}")
    return job


def _ask(api_url: str, findings: Findings, tasks: list[DemoTask]) -> list[dict[str, str]]:
    """Ask the first evaluation row of each task through the official client."""
    client = openai.OpenAI(base_url=f"{api_url}/v1", api_key="none")
    answers = []
    for task in tasks:
        with task.test.open(encoding="utf-8") as file:
            row = json.loads(next(line for line in file if line.strip()))
        if "messages" in row:
            *turns, reference = row["messages"]
            reply = client.chat.completions.create(
                model=findings.adapter, messages=turns, max_tokens=32, temperature=0
            )
            prompt, expected = turns[-1]["content"], reference["content"]
            answer = reply.choices[0].message.content
        else:
            completion = client.completions.create(
                model=findings.adapter, prompt=row["prompt"], max_tokens=32, temperature=0
            )
            prompt, answer, expected = row["prompt"], completion.choices[0].text, row["completion"]
        found = {"prompt": prompt, "answer": (answer or "").strip(), "reference": expected.strip()}
        answers.append({"task": task.name, **found})
    return answers


# ------------------------------------------------------------------------------------------------------ parts


def _commands(home: Path, findings: Findings) -> str:
    prefix = f"  CLPEFT_HOME={home} clpeft"
    return f"{prefix} chat {findings.adapter}\n{prefix} down"


@contextlib.contextmanager
def _phase(console: Console, findings: Findings, name: str) -> Iterator[None]:
    start = time.monotonic()
    # training shows its own bars, and two live displays do not fit one terminal
    waiting = contextlib.nullcontext() if name.startswith("train") else console.status(name)
    with waiting:
        yield
    findings.phases_s[name] = time.monotonic() - start
    console.print(f"[green]✓[/] {name} [dim]{findings.phases_s[name]:.1f} s[/]")


@contextlib.contextmanager
def _only_demo(home: Path) -> Iterator[None]:
    """Hold the demo's home, and end what an earlier demo left running. Raises DemoError for a second demo."""
    home.parent.mkdir(parents=True, exist_ok=True)
    with home.with_suffix(".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DemoError(f"another demo runs in {home}") from error
        state = embedded.read_state(home)
        if state is not None and state.api_runs and (home / "kept").exists():
            command = f"CLPEFT_HOME={home} clpeft down"
            raise DemoError(f"the demo kept with --keep still runs; end it with: {command}")
        embedded.down(home)
        yield


def _fresh_settings(shared: Settings, home: Path) -> Settings:
    """Empty the demo's home and return its settings: own database and storage, a free port, shared models."""
    shutil.rmtree(home, ignore_errors=True)
    return Settings(
        home=home,
        port=0,
        database_url=f"sqlite:///{home / 'clpeft.db'}",
        storage_url=f"file://{home / 'storage'}",
        models_dir=shared.models_dir,
        poll_interval_s=0.5,
    )
