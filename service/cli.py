"""The `clpeft` command: run the service on this machine, submit jobs, watch them, talk to adapters.

Longer than other files: one short function per command, all in one place. Heavy imports wait until needed.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Column, Table

from service.client import ApiError, Client
from service.db import commands as db_commands
from service.settings import Settings

if TYPE_CHECKING:
    from service.chat import Conversation
    from service.embedded import EmbeddedState

app = typer.Typer(
    name="clpeft",
    help="Train one adapter of a language model over a growing sequence of tasks, and serve every version.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
model_app = typer.Typer(help="Base models on this machine.", no_args_is_help=True)
app.add_typer(model_app, name="model", rich_help_panel="Models")
app.add_typer(db_commands.app, name="db", rich_help_panel="Service")

SERVICE, JOBS, ADAPTERS = "Service", "Jobs", "Adapters"
out = Console(highlight=False)


def main() -> None:
    """Run the command line. A user's mistake is one clear text on stderr and exit code 1 or 2."""
    from service.embedded import EmbeddedError
    from service.model_files import ModelError

    try:
        app()
    except (ApiError, EmbeddedError, ModelError) as error:
        fail(str(error))
    except (NotADirectoryError, PermissionError) as error:
        fail(f"{error.filename}: {error.strerror}")
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = "_".join(map(str, first["loc"])).upper()
        fail(f"setting CLPEFT_{name}: {first['msg'].removeprefix('Value error, ')}, got {first['input']!r}")


def fail(text: str) -> None:
    """Write the error to stderr and leave with exit code 1."""
    sys.stderr.write(f"error: {text}\n")
    raise SystemExit(1)


# ---------------------------------------------------------------------------------------------------- service


@app.command(rich_help_panel=SERVICE)
def up(
    port: Annotated[
        int | None, typer.Option(help="Port of the API; 0 takes a free one.", min=0, max=65535)
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return when everything runs.")] = False,
) -> None:
    """Start the service on this machine: API, Ray and Ray Serve.

    Stays in the foreground, and Ctrl-C ends everything. With --detach, end it with 'clpeft down'. When only
    the API ended, this starts a new one beside the Ray that still runs, and training there goes on.
    """
    from service import embedded
    from service.processes import interrupt_on_signals

    settings = Settings() if port is None else Settings(port=port)
    interrupt_on_signals()
    try:
        with out.status("starting") as status:
            state = embedded.up(settings, progress=lambda text: status.update(text))
    except KeyboardInterrupt:
        is_gone = embedded.read_state(settings.home) is None
        left = "nothing is left" if is_gone else "what had run before still runs: 'clpeft status'"
        out.print(f"stopped before everything ran; {left}")
        raise typer.Exit(130) from None
    out.print(_panel(state))
    if detach:
        return
    out.print("Ctrl-C ends it.")
    try:
        while state.api_runs:
            time.sleep(0.5)
    except KeyboardInterrupt:
        out.print()
        _end(settings)
        return
    if embedded.read_state(settings.home) is None:
        out.print("ended by 'clpeft down'")
        return
    fail(
        f"the API ended; its log is {settings.home / 'run' / 'api.log'}\n"
        "Ray still runs: 'clpeft up' starts a new API beside it, 'clpeft down' ends everything"
    )


@app.command(rich_help_panel=SERVICE)
def down(
    api_only: Annotated[bool, typer.Option("--api-only", help="Leave Ray and its training running.")] = False,
) -> None:
    """End the service on this machine, and exactly that."""
    from service import embedded

    settings = Settings()
    if not api_only:
        _end(settings)
        return
    state = embedded.read_state(settings.home)
    if state is None or not state.api_runs:
        out.print("no API runs")
        return
    embedded.stop_api(state)
    out.print("the API has ended; Ray still runs")


@app.command(rich_help_panel=SERVICE)
def api(
    host: Annotated[str | None, typer.Option(help="Address to listen on; default 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(help="Port of the API.", min=0, max=65535)] = None,
) -> None:
    """Serve the API alone, beside a Ray cluster that runs elsewhere (settings from CLPEFT_*).

    It asks for no keys: on an address that others reach, put something in front that does.
    """
    from service.bootstrap import serve_api

    given = {"host": host, "port": port}
    settings = Settings.model_validate({name: value for name, value in given.items() if value is not None})
    with db_commands.clear_errors():
        serve_api(settings)


@app.command(rich_help_panel=SERVICE)
def reconciler() -> None:
    """Start, watch and end runs without an API in this process (settings from CLPEFT_*).

    Of several such processes on one database one works, the others wait to take over. The APIs beside them
    get CLPEFT_RECONCILE=false.
    """
    from service.bootstrap import run_reconciler

    with db_commands.clear_errors():
        run_reconciler(Settings())


@app.command(rich_help_panel=SERVICE)
def status() -> None:
    """Say what runs, and where."""
    from service import embedded

    settings = Settings()
    state = embedded.read_state(settings.home)
    if state is None or not (state.api_runs or state.ray.is_alive()):
        out.print(f"nothing runs under {settings.home}; start the service with 'clpeft up'", soft_wrap=True)
        raise typer.Exit(1)
    out.print(_panel(state))


def _end(settings: Settings) -> None:
    from service import embedded

    with out.status("ending the service"):
        survivors = embedded.down(settings.home)
    if survivors is None:
        out.print("nothing runs")
    elif survivors:
        fail(f"these processes could not be ended: {', '.join(str(process.pid) for process in survivors)}")
    else:
        out.print("everything has ended")


def _panel(state: EmbeddedState) -> Panel:
    rows = Table.grid(padding=(0, 2))
    rows.add_row("API", f"[bold]{state.api_url}[/]" if state.api_runs else "[red]not running[/]")
    if state.api_runs:
        rows.add_row("OpenAI base URL", f"{state.api_url}/v1")
        rows.add_row("API reference", f"{state.api_url}/docs")
    rows.add_row(
        "Ray", f"{state.ray.num_cpus} logical CPUs" if state.ray.is_alive() else "[red]not running[/]"
    )
    rows.add_row("data", escape(str(state.home)))
    return Panel(rows, title="cl-peft", title_align="left", expand=False)


# ------------------------------------------------------------------------------------------------------- jobs


@app.command(rich_help_panel=JOBS)
def submit(
    file: Annotated[
        Path, typer.Argument(metavar="JOB.yaml", exists=True, dir_okay=False, help="Job specification.")
    ],
    watch_it: Annotated[
        bool, typer.Option("--watch", "-w", help="Show the progress until the job ends.")
    ] = False,
) -> None:
    """Submit a job. Data sets named by a file's path are uploaded first."""
    from service.job_files import local_datasets, read_yaml

    spec = read_yaml(file)
    with connect() as client:
        given = spec.get("tasks")
        found = given if isinstance(given, list) else []
        parts = [*found, spec.get("evaluation")]
        with local_datasets(parts, file.parent, client, progress=out.print) as [*tasks, evaluation]:
            resolved = {"tasks": tasks if isinstance(given, list) else given, "evaluation": evaluation}
            job = client.submit({**spec, **{name: value for name, value in resolved.items() if name in spec}})
        out.print(f"job {job['id']} trains adapter {job['adapter']}")
        if watch_it:
            _watch(client, job["id"])
        else:
            out.print(f"follow it with: clpeft watch {job['id']}")


@app.command(rich_help_panel=JOBS)
def append(
    job: Annotated[str, typer.Argument(metavar="JOB", help="Id of a finished or running job.")],
    file: Annotated[Path, typer.Argument(metavar="TASK.yaml", exists=True, dir_okay=False, help="One task.")],
    watch_it: Annotated[
        bool, typer.Option("--watch", "-w", help="Show the progress until the job ends.")
    ] = False,
) -> None:
    """Add one task to a job: it is trained from the newest version, and nothing earlier is trained again."""
    from service.job_files import local_datasets, read_yaml

    with connect() as client:
        with local_datasets([read_yaml(file)], file.parent, client, progress=out.print) as [task]:
            client.append_task(job, task)
        out.print(f"task {task.get('name')} is appended to {job}")
        if watch_it:
            _watch(client, job)


@app.command(rich_help_panel=JOBS)
def watch(job: Annotated[str, typer.Argument(metavar="JOB")]) -> None:
    """Show a job's progress until it ends, then its scores."""
    with connect() as client:
        _watch(client, job)


@app.command(rich_help_panel=JOBS)
def jobs(limit: Annotated[int, typer.Option(min=1, max=100, help="How many, newest first.")] = 20) -> None:
    """List jobs, newest first."""
    with connect() as client:
        found = client.jobs(limit=limit)
    if not found:
        out.print("no jobs yet; submit one with: clpeft submit JOB.yaml")
        return
    rest = (Column(title, no_wrap=True) for title in ("state", "tasks", "created (UTC)"))
    table = Table(Column("job", no_wrap=True), Column("name", overflow="fold"), *rest)
    for job in found:
        tasks = f"{job['num_committed']}/{job['num_tasks']}"
        name = job["name"] if job["adapter"] == job["name"] else f"{job['name']} (adapter {job['adapter']})"
        created = job["created_at"][5:16].replace("T", " ")
        table.add_row(job["id"], name, job["state"], tasks, created)
    out.print(table)


@app.command(rich_help_panel=JOBS)
def show(job: Annotated[str, typer.Argument(metavar="JOB")]) -> None:
    """Show one job: its state and why, its tasks, its runs and their attempts."""
    from service.show import attempts_table, tasks_table

    with connect() as client:
        found = client.job(job)
        attempts = {run["id"]: client.attempts(run["id"]) for run in found["runs"]}
    said = [found["state"], found["reason"], found["message"]]
    out.print(f"job {job} is {escape(': '.join(text for text in said if text))}", soft_wrap=True)
    out.print(f"adapter {found['adapter']} over {found['base_model_id']}", soft_wrap=True)
    out.print(tasks_table(found))
    out.print(attempts_table(found, attempts))


@app.command(rich_help_panel=JOBS)
def matrix(job: Annotated[str, typer.Argument(metavar="JOB")]) -> None:
    """Show what a job learnt and what it forgot."""
    from service.show import matrix_table, scalars_table

    with connect() as client:
        found = client.matrix(job)
    out.print(matrix_table(found))
    out.print(scalars_table({"value": found}))


@app.command(rich_help_panel=JOBS)
def report(
    job: Annotated[str, typer.Argument(metavar="JOB")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="File ending in .html, .md or .json; without it Markdown is printed."
        ),
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Id of a job to compare with, such as one with strategy none.")
    ] = None,
) -> None:
    """Write what a job learnt and forgot: scores, curves, costs, data, configuration, lineage."""
    formats = {".html": "html", ".md": "md", ".json": "json"}
    if output is not None and output.suffix not in formats:
        fail(f"a report's file ends in {', '.join(formats)}; got {str(output)!r}")
    if output is not None and not output.absolute().parent.is_dir():
        fail(f"there is no folder {output.absolute().parent}")
    with connect() as client:
        text = client.report(job, format=formats[output.suffix] if output else "md", baseline=baseline)
    if output is None:
        sys.stdout.write(text)
        return
    output.write_text(text, encoding="utf-8")
    out.print(f"the report of {job} is in {output}", soft_wrap=True)


@app.command(rich_help_panel=JOBS)
def logs(
    job: Annotated[str, typer.Argument(metavar="JOB")],
    process: Annotated[
        str | None, typer.Option(help="Process, such as worker-0-1234; default the driver.")
    ] = None,
    attempt: Annotated[int | None, typer.Option(min=1, help="Attempt; default the newest.")] = None,
    run: Annotated[str | None, typer.Option(help="Id of a run; default the newest.")] = None,
) -> None:
    """Print what a job's processes printed, also when the cluster is gone."""
    with connect() as client:
        text, processes = client.logs(job, run=run, attempt=attempt, process=process)
    sys.stdout.write(text)
    if others := [name for name in processes if name != (process or "driver")]:
        sys.stdout.flush()
        typer.echo(f"more with --process: {', '.join(others)}", err=True)


@app.command(rich_help_panel=JOBS)
def cancel(job: Annotated[str, typer.Argument(metavar="JOB")]) -> None:
    """Stop a job at its next step; finished tasks stay."""
    with connect() as client:
        found = client.cancel(job)
    out.print(f"job {job} is {found['state']}")


@app.command(rich_help_panel=JOBS)
def pause(job: Annotated[str, typer.Argument(metavar="JOB")]) -> None:
    """Stop a job at its next step, to go on from there later; its place is free for others meanwhile."""
    with connect() as client:
        found = client.pause(job)
    out.print(f"job {job} is {found['state']}; go on with: clpeft resume {job}", soft_wrap=True)


@app.command(rich_help_panel=JOBS)
def resume(job: Annotated[str, typer.Argument(metavar="JOB", help="Id of a paused job.")]) -> None:
    """Let a paused job go on from the step where it stopped."""
    with connect() as client:
        found = client.resume(job)
    out.print(f"job {job} is {found['state']}; follow it with: clpeft watch {job}", soft_wrap=True)


@app.command(rich_help_panel=JOBS)
def retry(
    job: Annotated[str, typer.Argument(metavar="JOB", help="Id of a failed or cancelled job.")],
) -> None:
    """Train the tasks that a failed or cancelled job has left, in a new run."""
    with connect() as client:
        found = client.retry(job)
    out.print(f"job {job} is {found['state']}; follow it with: clpeft watch {job}", soft_wrap=True)


def _watch(client: Client, job_id: str) -> None:
    from service.show import matrix_table, scalars_table, show_events

    client.job(job_id)  # an unknown id is refused here
    try:
        show_events(out, client.events(job_id))
    except KeyboardInterrupt:
        out.print(f"the job goes on; come back with: clpeft watch {job_id}")
        raise typer.Exit(130) from None
    job = client.job(job_id)
    if job["num_committed"]:
        found = client.matrix(job_id)
        out.print(matrix_table(found))
        out.print(scalars_table({"value": found}))
    if job["state"] != "succeeded":
        fail(f"job {job_id} {job['state']}: {job.get('message') or job.get('reason') or 'no reason given'}")
    out.print(f"job {job_id} succeeded; ask its adapter with: clpeft chat {job['adapter']}")


# --------------------------------------------------------------------------------------------------- adapters


@app.command(rich_help_panel=ADAPTERS)
def adapters() -> None:
    """List adapters and their newest versions."""
    with connect() as client:
        found = client.adapters()
    if not found:
        out.print("no adapters yet; the first appears when a job's first task is trained")
        return
    table = Table("adapter", "newest version", "job", "updated")
    for adapter in found:
        row = [
            adapter["name"],
            f"v{adapter['latest_version']}",
            adapter["job_id"],
            adapter["updated_at"][:19],
        ]
        table.add_row(*row)
    out.print(table)


@app.command(rich_help_panel=ADAPTERS)
def chat(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="name, name@vN or name@alias")],
    message: Annotated[str | None, typer.Option("--message", "-m", help="Ask once and leave.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, max=4096, help="Longest answer.")] = 128,
) -> None:
    """Talk to an adapter. One trained on plain prompts gets the text as it is; \\n in it is a new line."""
    from service.chat import Conversation

    with connect() as client:
        conversation = Conversation(client, adapter, max_tokens=max_tokens)
        if message is not None:
            _answer(conversation, message)
            return
        out.print(f"[dim]{conversation.describe()}; an empty line or Ctrl-D leaves[/]")
        with _quiet_interrupt():
            while text := out.input("[bold]> [/]"):
                _answer(conversation, text)


def _answer(conversation: Conversation, text: str) -> None:
    for piece in conversation.ask(text.replace("\\n", "\n")):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


@contextmanager
def _quiet_interrupt() -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, EOFError):
        out.print()


# ----------------------------------------------------------------------------------------------------- models


@model_app.command("prepare")
def model_prepare(name: Annotated[str, typer.Argument(help="smollm2-135m")]) -> None:
    """Fetch, check and convert a known model once; later calls only say where it is."""
    from service.models import prepare_model

    with out.status("preparing") as status:
        path = prepare_model(name, Settings().models_dir, progress=lambda text: status.update(text))
    out.print(f"{name} is ready: {path}", soft_wrap=True)


@model_app.command("add")
def model_add(
    name: Annotated[str, typer.Argument(help="Its name in base_model.id of a job.")],
    source: Annotated[
        str, typer.Argument(metavar="FOLDER_OR_HUB_ID", help="A folder, org/name or org/name@revision.")
    ],
) -> None:
    """Add a causal language model: safetensors, configuration and tokenizer."""
    from service.models import add_model

    with out.status("adding") as status:
        path = add_model(name, source, Settings().models_dir, progress=lambda text: status.update(text))
    out.print(f"{name} is ready: {path}", soft_wrap=True)


@model_app.command("list")
def model_list() -> None:
    """List the base models on this machine."""
    from service.models import PREPARED_MODELS, list_models

    found = list_models(Settings().models_dir)
    table = Table("model", "architecture", "size", "from")
    for info in found:
        table.add_row(info.name, info.architecture, f"{info.bytes / 1e6:.0f} MB", info.source)
    if found:
        out.print(table)
    missing = sorted(set(PREPARED_MODELS) - {info.name for info in found})
    for name in missing:
        out.print(f"not here yet: {name}; fetch it with: clpeft model prepare {name}")


# ------------------------------------------------------------------------------------------------------- demo


@app.command(rich_help_panel=SERVICE)
def demo(
    tasks: Annotated[
        Path | None,
        typer.Option(
            exists=True, file_okay=False, help="Folder of <task>/train.jsonl and <task>/test.jsonl."
        ),
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write figures and targets here.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps per task.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the service running at the end.")] = False,
) -> None:
    """Show everything on a real model: train three tasks with and without a strategy, compare, ask."""
    from service.demo import run_demo

    raise typer.Exit(run_demo(out, tasks_dir=tasks, json_path=json_path, num_steps=steps, keep=keep))


def connect() -> Client:
    """Return a client of the service: CLPEFT_URL, else the one that runs on this machine. Raises ApiError."""
    from service import embedded

    if url := os.environ.get("CLPEFT_URL"):
        return Client(url)
    state = embedded.read_state(Settings().home)
    if state is None or not state.api_runs:
        raise ApiError(
            "no service runs here; start one with 'clpeft up', or set CLPEFT_URL to the address of another"
        )
    return Client(state.api_url)
