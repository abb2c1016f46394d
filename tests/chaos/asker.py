"""Asks an adapter for completions, as its users do."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

import httpx

from tests.chaos.jobs import PROMPT

ASK_EVERY_S = 0.2


@dataclass
class Asker:
    """Asks one adapter for the same completion until it is stopped."""

    url: str
    adapter: str
    answers: list[tuple[float, float, int, str]] = field(default_factory=list)
    """When it was asked and answered (monotonic seconds), HTTP status (0: no answer), and what came back."""
    stopping: threading.Event = field(default_factory=threading.Event)

    def ask(self) -> tuple[int, str]:
        """Ask once; the text of a completion, or why there is none."""
        body = {"model": self.adapter, "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
        try:
            answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=20, trust_env=False)
        except httpx.TransportError as error:
            return 0, str(error)
        if not answer.is_success:
            return answer.status_code, answer.text[:300]
        found = answer.json()
        return 200, f"{found['model']}: {found['choices'][0]['text']}"

    def run(self) -> None:
        """Ask until stopped."""
        while not self.stopping.is_set():
            asked_at = time.monotonic()
            status, text = self.ask()
            self.answers.append((asked_at, time.monotonic(), status, text))
            self.stopping.wait(ASK_EVERY_S)
