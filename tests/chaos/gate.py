"""A TCP proxy before the S3 server that can hold requests: how a case stops the clock inside a short phase.

The product is not touched: it talks to its store, and the store is slow for one request. A rule names
requests by patterns. The first that matches is noted and, if the rule holds, waits until the rule is
released. What the client gives up while it waits, because it was killed, never reaches the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

CHUNK_BYTES = 2**16
HEAD_END = b"\r\n\r\n"


@dataclass(frozen=True)
class Wanted:
    """Requests by patterns over "METHOD /bucket/key" and over the body."""

    request: str
    body: str = ""

    def matches(self, request: str, body: bytes) -> bool:
        """Is this such a request?"""
        if re.search(self.request, request) is None:
            return False
        return re.search(self.body.encode(), body) is not None


@dataclass(eq=False)
class Rule:
    """One kind of request to wait for. Made by Gate.add."""

    wanted: Wanted
    after: Wanted | None
    """The rule sleeps until such a request has passed."""
    holds: bool
    caught: threading.Event = field(default_factory=threading.Event)
    """Set when the first request has matched."""
    caught_request: str = ""
    released: asyncio.Event = field(default_factory=asyncio.Event)

    def matches(self, request: str, body: bytes) -> bool:
        """Is this a request that the rule waits for? Wakes the rule when it is the one before."""
        if self.after is not None:
            if self.after.matches(request, body):
                self.after = None
            return False
        return self.wanted.matches(request, body)


class Gate:
    """The proxy: listens on one address and passes everything on to another."""

    def __init__(self, listen: tuple[str, int], upstream: tuple[str, int]) -> None:
        self._listen, self._upstream = listen, upstream
        self._rules: list[Rule] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="gate", daemon=True)
        self._server: asyncio.Server | None = None

    @property
    def url(self) -> str:
        """Where clients reach it."""
        return f"http://{self._listen[0]}:{self._listen[1]}"

    def start(self) -> None:
        """Listen."""
        self._thread.start()
        self._server = self._do(asyncio.start_server(self._serve, *self._listen, limit=2**20))

    def close(self) -> None:
        """Cut all connections and stop."""
        self._do(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def add(self, wanted: Wanted, *, after: Wanted | None = None, holds: bool = True) -> Rule:
        """Wait for a request; a rule that holds keeps every one that matches until it is released."""
        rule = Rule(wanted, after, holds)

        async def add() -> None:
            self._rules.append(rule)

        self._do(add())
        return rule

    def release(self, rule: Rule) -> None:
        """Let go what the rule holds, and forget the rule."""

        async def release() -> None:
            self._rules.remove(rule)
            rule.released.set()

        self._do(release())

    def _do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    async def _end(self) -> None:
        assert self._server is not None
        self._server.close()
        tasks = asyncio.all_tasks(self._loop) - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -------------------------------------------------------------------------------------------- connections

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry one client's connection until either side ends it."""
        try:
            up_reader, up_writer = await asyncio.open_connection(*self._upstream)
        except OSError:  # the server is away: so are we
            writer.close()
            return
        answers = asyncio.create_task(_copy(up_reader, writer))
        try:
            while await self._carry_request(reader, writer, up_writer):
                pass
        except (OSError, EOFError):  # EOFError: asyncio's IncompleteReadError
            pass
        finally:
            answers.cancel()
            writer.close()
            up_writer.close()

    async def _carry_request(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, up_writer: asyncio.StreamWriter
    ) -> bool:
        """Read one request, hold it if a rule says so, pass it on; False when the client is gone."""
        head = await reader.readuntil(HEAD_END)
        method, target = head.split(b" ", 2)[:2]
        fields = _fields(head)
        if b"transfer-encoding" in fields:
            raise NotImplementedError("the gate carries bodies with a Content-Length only")
        if fields.get(b"expect", b"").lower() == b"100-continue":
            writer.write(b"HTTP/1.1 100 Continue" + HEAD_END)
            head = b"\r\n".join(
                line for line in head.split(b"\r\n") if not line.lower().startswith(b"expect:")
            )
        body = await reader.readexactly(int(fields.get(b"content-length", b"0")))
        request = f"{method.decode()} {unquote(target.decode())}"
        for rule in list(self._rules):
            if rule.matches(request, body) and not await _pass(rule, request, reader):
                return False
        up_writer.write(head + body)
        await up_writer.drain()
        return True


async def _pass(rule: Rule, request: str, reader: asyncio.StreamReader) -> bool:
    """Note the request and hold it while the rule does; False when the client left meanwhile."""
    rule.caught_request = rule.caught_request or request
    rule.caught.set()
    if not rule.holds:
        return True
    released = asyncio.create_task(rule.released.wait())
    left = asyncio.create_task(reader.read(1))  # a client waits for its answer: it can only end
    try:
        await asyncio.wait({released, left}, return_when=asyncio.FIRST_COMPLETED)
        return not left.done()
    finally:
        for task in (released, left):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await task


def _fields(head: bytes) -> dict[bytes, bytes]:
    """Return a request's header fields, names in lower case."""
    lines = (line.partition(b":") for line in head.split(b"\r\n")[1:] if line)
    return {name.strip().lower(): value.strip() for name, _, value in lines}


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Pass on the server's answers until it ends the connection."""
    try:
        while data := await reader.read(CHUNK_BYTES):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()
