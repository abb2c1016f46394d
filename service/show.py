"""What a user sees in the terminal: live progress of a job, accuracy matrices, tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column, Table

from service.client import JobEvent

PLAIN_EVERY_S = 10.0
"""Without a terminal, seconds between two lines about steps."""

SCALARS = (
    ("average_accuracy", "average accuracy", "higher is better"),
    ("forgetting", "forgetting", "lower is better"),
    ("bwt", "backward transfer", "higher is better"),
    ("fwt", "forward transfer", "higher is better"),
    ("learning_accuracy", "learning accuracy", "higher is better"),
)

_WORDS = {
    "run.queued": "waiting for its turn",
    "run.submitted": "starting workers",
    "run.started": "workers are up",
    "run.cancelling": "stopping",
    "run.pausing": "pausing at the next step",
    "run.paused": "paused; 'clpeft resume' goes on",
}


def show_events(
    console: Console, events: Iterable[JobEvent], *, on_event: Callable[[JobEvent], None] = lambda _: None
) -> JobEvent | None:
    """Show a job's events as they come, as live bars in a terminal, else as lines; return the last one."""
    view = _LiveView(console) if console.is_terminal else _PlainView(console)
    last = None
    with view:
        for event in events:
            on_event(event)
            view.show(event)
            last = event
    return last


class _LiveView:
    """One bar per task, a line of text for each finished one."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}", markup=False, style="bold"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[text]}", markup=False),
            console=console,
            transient=True,
        )
        self._bars: dict[str, TaskID] = {}

    def __enter__(self) -> _LiveView:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def show(self, event: JobEvent) -> None:
        """Bring the bars up to date."""
        data = event.data
        if words := _words(event):
            self._bar("job", text=words, total=None)
        elif event.type == "task.started":
            self._drop("job")
            self._bar(data["task"], completed=0, total=data["num_steps"], text="starting")
        elif event.type == "step":
            self._bar(data["task"], completed=data["step"], total=data["num_steps"], text=_step_text(data))
        elif event.type == "task.trained":
            self._bar("evaluation", completed=0, total=None, text="answering the evaluation rows")
        elif event.type == "task.evaluating":
            text = f"{data['scored']} {data['done_rows']}/{data['num_rows']} rows"
            self._bar("evaluation", completed=data["done_rows"], total=data["num_rows"], text=text)
        elif event.type == "task.evaluated":
            self._drop("evaluation")
            self._drop(data["task"])
            self._console.print(f"[green]✓[/] {_evaluated_text(data)}")
        else:
            for line in _event_lines(event):
                self._console.print(line)

    def _bar(self, name: str, *, text: str, total: float | None, completed: float = 0) -> None:
        if name not in self._bars:
            self._bars[name] = self._progress.add_task(name, total=total, text=text)
        self._progress.update(self._bars[name], completed=completed, total=total, text=text)

    def _drop(self, name: str) -> None:
        if name in self._bars:
            self._progress.remove_task(self._bars.pop(name))


class _PlainView:
    """Lines for a file or a pipe."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last_step_s = 0.0

    def __enter__(self) -> _PlainView:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def show(self, event: JobEvent) -> None:
        """Write what is worth a line."""
        data = event.data
        lines: Sequence[str] = ()
        if words := _words(event):
            lines = [words]
        elif event.type == "step":
            now = self._console.get_time()
            if data["step"] in (1, data["num_steps"]) or now - self._last_step_s > PLAIN_EVERY_S:
                self._last_step_s = now
                lines = [f"{escape(data['task'])}: {_step_text(data)}"]
        elif event.type == "task.trained":
            lines = [f"{escape(data['task'])}: trained, answering the evaluation rows"]
        elif event.type == "task.evaluated":
            lines = [_evaluated_text(data)]
        else:
            lines = _event_lines(event)
        for line in lines:
            self._console.print(line, soft_wrap=True)


def _words(event: JobEvent) -> str | None:
    if event.type == "run.started" and event.data.get("is_restart"):
        return "a worker had ended; the workers are up again and go on from the last checkpoint"
    return _WORDS.get(event.type)


def _step_text(data: Mapping[str, Any]) -> str:
    parts = [f"step {data['step']}/{data['num_steps']}", f"loss {data['loss']:.3f}"]
    if data.get("tokens_per_s") is not None:
        parts.append(f"{data['tokens_per_s']:.0f} tokens/s")
    if data.get("eta_s") is not None:
        parts.append(f"{_duration(data['eta_s'])} left")
    return "  ".join(parts)


def _evaluated_text(data: Mapping[str, Any]) -> str:
    scores = "  ".join(f"{escape(name)} {score:.2f}" for name, score in data["scores"].items())
    general = data.get("general")
    change = f"; general ability {100 * (general['after'] / general['base'] - 1):+.1f} %" if general else ""
    return f"trained {escape(data['task'])}; scores now: {scores}{change}"


def _event_lines(event: JobEvent) -> list[str]:
    data = event.data
    if event.type in ("attempt.lost", "attempt.failed"):
        return [f"[yellow]attempt {data.get('attempt')} ended: {escape(str(data.get('message')))}[/]"]
    if event.type in ("run.failed", "run.cancelled") and data.get("message"):
        return [f"[red]{event.type.replace('.', ' ')}: {escape(str(data['message']))}[/]"]
    if event.type == "task.committed":
        return [f"version {data['version']} is registered"]
    return []


def tasks_table(job: Mapping[str, Any]) -> Table:
    """Show how far each task of a job is."""
    table = Table("task", "state", Column("steps", justify="right"), "version")
    for task in job["tasks"]:
        version = "-" if task["version"] is None else f"v{task['version']}"
        table.add_row(escape(task["name"]), task["state"], str(task["steps"]), version)
    return table


def attempts_table(job: Mapping[str, Any], attempts: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table:
    """Show a job's runs, by id, with their attempts: when each began, how long it took, how it ended."""
    table = Table("run", "attempt", "state", "began (UTC)", Column("took", justify="right"), "message")
    for run in job["runs"]:
        first = [str(run["number"])]
        for attempt in attempts[run["id"]]:
            began, ended = attempt["created_at"], attempt["finished_at"]
            seconds = (_moment(ended) - _moment(began)).total_seconds() if ended else None
            took = "" if seconds is None else _duration(seconds)
            message = escape(attempt["message"] or "")
            table.add_row(
                *first, str(attempt["number"]), attempt["state"], began[5:19].replace("T", " "), took, message
            )
            first = [""]
        if not attempts[run["id"]]:
            table.add_row(*first, "-", run["state"], "", "", escape(run["message"] or ""))
    return table


def matrix_table(matrix: Mapping[str, Any], *, title: str = "accuracy") -> Table:
    """Show a[i][j], the score on task j after training task i, with the untrained model's scores above."""
    names = list(matrix["tasks"])
    table = Table(title=title, title_justify="left", title_style="bold", min_width=len(title))
    table.add_column("after training")
    for name in names:
        table.add_column(name, justify="right")
    base = matrix["base_scores"]
    if any(score is not None for score in base):
        table.add_row("(nothing)", *(_score(score) for score in base), style="dim")
    for i, row in enumerate(matrix["matrix"]):
        cells = [_score(score) if j <= i or score is not None else "" for j, score in enumerate(row)]
        cells[i] = f"[bold]{cells[i]}[/]"
        table.add_row(names[i], *cells)
    return table


def scalars_table(matrices: Mapping[str, Mapping[str, Any]]) -> Table:
    """Show the scalar figures of one or more runs side by side."""
    table = Table()
    table.add_column("")
    for name in matrices:
        table.add_column(name, justify="right")
    table.add_column("", style="dim")
    for key, words, note in SCALARS:
        table.add_row(words, *(_with_interval(matrix, key) for matrix in matrices.values()), note)
    return table


def _with_interval(matrix: Mapping[str, Any], key: str) -> str:
    interval = matrix.get("intervals_95", {}).get(key)
    return _score(matrix.get(key)) + (f"\n[{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


def _moment(text: str) -> datetime:
    return datetime.fromisoformat(text)


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
