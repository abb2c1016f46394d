"""A cache of loaded things that requests hold by leases."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

_logger = logging.getLogger(__name__)


@dataclass
class _Entry(Generic[V]):
    loading: asyncio.Task[V]
    leases: int = 0


class LeaseCache(Generic[K, V]):
    """Load each key once, keep it while a request holds it, drop the least recently used beyond a capacity.

    More than `capacity` values stay while all of them are leased; None keeps everything. One event loop only.
    """

    def __init__(
        self,
        load: Callable[[K], Awaitable[V]],
        unload: Callable[[V], Awaitable[None]],
        *,
        capacity: int | None,
    ) -> None:
        self._load = load
        self._unload = unload
        self._capacity = capacity
        self._entries: OrderedDict[K, _Entry[V]] = OrderedDict()
        self._unloading: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def lease(self, key: K) -> AsyncIterator[V]:
        """Hold the value of a key until the block ends, in whichever way.

        Requests for a key that is loading share that load. A failed load raises in each of them and is
        forgotten, so that the next request tries again. A request that leaves early does not end the load.
        """
        entry = self._entries.get(key)
        if entry is None:
            entry = self._start(key)
        self._entries.move_to_end(key)
        entry.leases += 1
        try:
            yield await asyncio.shield(entry.loading)
        finally:
            entry.leases -= 1
            self._evict()

    @property
    def num_leases(self) -> int:
        """Leases that are held now."""
        return sum(entry.leases for entry in self._entries.values())

    def loaded(self) -> list[K]:
        """Keys whose value is loaded, least recently used first."""
        return [key for key, entry in self._entries.items() if entry.loading.done()]

    def _start(self, key: K) -> _Entry[V]:
        entry = _Entry(asyncio.ensure_future(self._load(key)))
        self._entries[key] = entry

        def loaded(task: asyncio.Task[V]) -> None:
            if task.cancelled() or task.exception() is not None:
                del self._entries[key]
            self._evict()

        entry.loading.add_done_callback(loaded)
        return entry

    def _evict(self) -> None:
        if self._capacity is None:
            return
        idle = [key for key, entry in self._entries.items() if entry.leases == 0 and entry.loading.done()]
        for key in idle[: max(0, len(self._entries) - self._capacity)]:
            entry = self._entries.pop(key)
            task = asyncio.ensure_future(self._unload(entry.loading.result()))
            self._unloading.add(task)
            task.add_done_callback(self._unloaded)

    def _unloaded(self, task: asyncio.Task[None]) -> None:
        self._unloading.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _logger.error("a value did not unload; its memory stays taken", exc_info=error)
