"""The transformers engine: one copy of each base model, PEFT adapters beside it, one generation at a time."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from service.adapters.manifest import ADAPTER
from service.adapters.storage import Storage
from service.adapters.version_files import fetch_folder
from service.scratch import remove_abandoned_folders, scratch_folder
from service.serving import transformers_models as models
from service.serving.cache import LeaseCache
from service.serving.engine import EngineStatus, Event, Finished, GenerateRequest, ServingError, Started
from service.serving.transformers_models import Attached, Base, Job, ModelThread


@dataclass(frozen=True)
class _AdapterKey:
    base_path: str
    task_dir: str
    id: str = field(compare=False)


class TransformersEngine:
    """Engine over transformers' generate(), on CPU or one GPU. Use it from one event loop."""

    def __init__(self, *, storage_url: str, max_adapters: int, num_threads: int) -> None:
        remove_abandoned_folders()
        self._storage = Storage(storage_url)
        self._thread = ModelThread(num_threads)
        self._bases: LeaseCache[str, Base] = LeaseCache(self._load_base, _keep, capacity=None)
        self._adapters: LeaseCache[_AdapterKey, Attached] = LeaseCache(
            self._load_adapter, self._unload_adapter, capacity=max_adapters
        )
        self._names = (f"adapter{number}" for number in itertools.count())
        self._requests: set[asyncio.Task[None]] = set()
        self._num_generations = 0

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        """Yield Started, Deltas and Finished; see Engine."""
        events: asyncio.Queue[Event | Exception] = asyncio.Queue()
        stop = threading.Event()
        # The task, not this generator, holds the leases: it ends when the model thread is done with the
        # adapter, however the client leaves.
        task = asyncio.create_task(self._answer(request, events, stop))
        self._requests.add(task)
        task.add_done_callback(self._requests.discard)
        try:
            while True:
                event = await events.get()
                if isinstance(event, Exception):
                    raise event
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            stop.set()

    def status(self) -> EngineStatus:
        """Return what is loaded and how many requests hold it."""
        return EngineStatus(
            engine="transformers",
            base_models=tuple(self._bases.loaded()),
            adapters=tuple(key.id for key in self._adapters.loaded()),
            leases=self._bases.num_leases + self._adapters.num_leases,
            generations=self._num_generations,
        )

    async def _answer(
        self, request: GenerateRequest, events: asyncio.Queue[Event | Exception], stop: threading.Event
    ) -> None:
        loop = asyncio.get_running_loop()

        def emit(event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        try:
            async with self._leases(request) as (base, adapter):
                ids = await asyncio.to_thread(models.encode, base, request)
                limit = models.token_limit(base, request, len(ids))
                events.put_nowait(Started(prompt_tokens=len(ids)))
                self._num_generations += 1
                job = Job(
                    base=base, adapter=adapter, ids=ids, limit=limit, request=request, stop=stop, emit=emit
                )
                await self._thread.run(lambda: models.generate(job, self._thread))
        except Exception as error:  # the reader raises it
            events.put_nowait(error)

    @asynccontextmanager
    async def _leases(self, request: GenerateRequest) -> AsyncIterator[tuple[Base, str | None]]:
        async with self._bases.lease(request.base_model_path) as base:
            if request.adapter is None:
                yield base, None
                return
            key = _AdapterKey(request.base_model_path, request.adapter.task_dir, request.adapter.id)
            async with self._adapters.lease(key) as attached:
                yield base, attached.name

    async def _load_base(self, path: str) -> Base:
        return await asyncio.to_thread(models.load_base, path)

    async def _load_adapter(self, key: _AdapterKey) -> Attached:
        async with self._bases.lease(key.base_path) as base:
            with scratch_folder() as folder:
                try:
                    await asyncio.to_thread(fetch_folder, self._storage, key.task_dir, ADAPTER, folder)
                    return await self._thread.change(
                        lambda: models.attach(base, str(folder), next(self._names))
                    )
                except (OSError, ValueError, ServingError) as error:
                    raise ServingError(f"{key.id} in {key.task_dir!r} does not load: {error}") from error

    async def _unload_adapter(self, attached: Attached) -> None:
        await self._thread.change(lambda: models.detach(attached))


async def _keep(base: Base) -> None:
    raise AssertionError(f"base models are kept, but {base.path} was let go")
