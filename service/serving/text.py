"""From tokens to text, piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_INCOMPLETE = "\ufffd"


class TextStream:
    """Turn generated tokens into text deltas that end before the first stop string.

    `decode` maps token ids to text. A delta never ends inside a character, and the part of the text that may
    still become a stop string is held back.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str]) -> None:
        self._decode = decode
        self._stop = tuple(stop)
        self._ids: list[int] = []
        # Only tokens from _start are decoded, so that a long answer costs no more per token than a short one;
        # those before _read are in the text already.
        self._start = 0
        self._read = 0
        self._held = ""
        self.is_stopped = False
        """A stop string was found; nothing more may be added."""

    def add(self, token_id: int) -> str:
        """Return the new text that is safe to send; often empty."""
        self._ids.append(token_id)
        before = self._decode(self._ids[self._start : self._read])
        after = self._decode(self._ids[self._start :])
        if after.endswith(_INCOMPLETE):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return self._release(after[len(before) :])

    def end(self) -> str:
        """Return what was held back; call it once, when no token follows."""
        if self.is_stopped:
            return ""
        before = self._decode(self._ids[self._start : self._read])
        rest = self._release(self._decode(self._ids[self._start :])[len(before) :])
        return rest if self.is_stopped else rest + self._held

    def _release(self, text: str) -> str:
        self._held += text
        found = [position for stop in self._stop if (position := self._held.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            return self._held[: min(found)]
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        cut = len(self._held) - keep
        sent, self._held = self._held[:cut], self._held[cut:]
        return sent


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of text that begins the stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
