"""The cache of leased values."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from service.serving.cache import LeaseCache


class Recorder:
    """Loads and unloads strings; a load waits for `gate`."""

    def __init__(self) -> None:
        self.loads: Counter[str] = Counter()
        self.unloaded: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.fails = False

    async def load(self, key: str) -> str:
        self.loads[key] += 1
        await self.gate.wait()
        if self.fails:
            raise OSError(f"cannot read {key}")
        return key.upper()

    async def unload(self, value: str) -> None:
        self.unloaded.append(value)

    def cache(self, capacity: int | None) -> LeaseCache[str, str]:
        return LeaseCache(self.load, self.unload, capacity=capacity)


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def use(cache: LeaseCache[str, str], key: str) -> str:
    async with cache.lease(key) as value:
        return value


def test_requests_for_one_key_share_one_load() -> None:
    async def check() -> None:
        recorder = Recorder()
        recorder.gate.clear()
        cache = recorder.cache(2)
        requests = [asyncio.create_task(use(cache, "a")) for _ in range(5)]
        await settle()
        assert cache.num_leases == 5
        assert cache.loaded() == []
        recorder.gate.set()
        assert await asyncio.gather(*requests) == ["A"] * 5
        assert recorder.loads == {"a": 1}
        assert cache.num_leases == 0

    asyncio.run(check())


def test_the_least_recently_used_idle_value_is_evicted() -> None:
    async def check() -> None:
        recorder = Recorder()
        cache = recorder.cache(2)
        for key in ("a", "b", "a", "c"):
            await use(cache, key)
        await settle()
        assert recorder.unloaded == ["B"]
        assert cache.loaded() == ["a", "c"]

    asyncio.run(check())


def test_a_leased_value_is_never_evicted_and_goes_with_its_last_lease() -> None:
    async def check() -> None:
        recorder = Recorder()
        cache = recorder.cache(1)
        async with cache.lease("a"):
            async with cache.lease("a"):
                async with cache.lease("b"):
                    await settle()
                    assert recorder.unloaded == []
                await settle()
                assert recorder.unloaded == ["B"]
            await use(cache, "c")
            await settle()
            assert recorder.unloaded == ["B", "C"]
        await use(cache, "d")
        await settle()
        assert recorder.unloaded == ["B", "C", "A"]

    asyncio.run(check())


def test_a_lease_is_released_once_when_its_request_is_cancelled_or_fails() -> None:
    async def check() -> None:
        recorder = Recorder()
        cache = recorder.cache(1)

        async def hold() -> None:
            async with cache.lease("a"):
                await asyncio.sleep(60)

        held = asyncio.create_task(hold())
        async with cache.lease("a"):
            await settle()
            assert cache.num_leases == 2
            held.cancel()
            with pytest.raises(asyncio.CancelledError):
                await held
            assert cache.num_leases == 1
            with pytest.raises(RuntimeError, match="in the block"):
                async with cache.lease("a"):
                    raise RuntimeError("in the block")
            assert cache.num_leases == 1
        assert cache.num_leases == 0

    asyncio.run(check())


def test_a_request_that_leaves_does_not_end_the_load_of_the_others() -> None:
    async def check() -> None:
        recorder = Recorder()
        recorder.gate.clear()
        cache = recorder.cache(1)
        leaves = asyncio.create_task(use(cache, "a"))
        stays = asyncio.create_task(use(cache, "a"))
        await settle()
        leaves.cancel()
        await settle()
        recorder.gate.set()
        assert await stays == "A"
        assert recorder.loads == {"a": 1}
        assert leaves.cancelled()

    asyncio.run(check())


def test_a_failed_load_reaches_every_waiter_and_the_next_request_tries_again() -> None:
    async def check() -> None:
        recorder = Recorder()
        recorder.fails = True
        cache = recorder.cache(1)
        results = await asyncio.gather(*(use(cache, "a") for _ in range(3)), return_exceptions=True)
        assert [str(result) for result in results] == ["cannot read a"] * 3
        assert recorder.loads == {"a": 1}
        assert cache.num_leases == 0
        recorder.fails = False
        assert await use(cache, "a") == "A"
        assert recorder.loads == {"a": 2}

    asyncio.run(check())
