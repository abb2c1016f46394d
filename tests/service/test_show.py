"""What watching a job shows, in a terminal and in a pipe."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from service.client import JobEvent
from service.show import show_events

STEP = {"task": "one", "step": 1, "num_steps": 2, "loss": 0.5, "tokens_per_s": 10.0, "eta_s": 3}


def shown(*events: tuple[str, dict[str, Any]], in_terminal: bool) -> str:
    """What the events leave on the screen; a terminal's text is that of its last frame."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=in_terminal, width=120, color_system=None)
    show_events(console, [JobEvent(i, kind, "", data) for i, (kind, data) in enumerate(events)])
    return file.getvalue()


@pytest.mark.parametrize("in_terminal", [True, False])
@pytest.mark.parametrize(
    ("kind", "data", "words"),
    [
        ("run.started", {"is_restart": False}, "workers are up"),
        ("run.started", {"is_restart": True}, "a worker had ended; the workers are up again"),
        ("run.pausing", {}, "pausing at the next step"),
        ("run.paused", {}, "paused; 'clpeft resume' goes on"),
        ("run.cancelling", {}, "stopping"),
    ],
)
def test_what_happens_between_steps_is_said(
    kind: str, data: dict[str, Any], words: str, in_terminal: bool
) -> None:
    seen = shown(("step", STEP), (kind, data), in_terminal=in_terminal)
    assert words in seen
    assert "step 1/2  loss 0.500  10 tokens/s  3 s left" in seen


@pytest.mark.parametrize("in_terminal", [True, False])
def test_an_attempt_that_ended_is_said_with_its_reason(in_terminal: bool) -> None:
    data = {"attempt": 2, "message": "the driver [died]"}
    assert "attempt 2 ended: the driver [died]" in shown(("attempt.lost", data), in_terminal=in_terminal)
