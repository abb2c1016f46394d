"""The transformers engine against transformers and PEFT called directly."""

from __future__ import annotations

import asyncio
import gc
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from service.adapters.storage import Storage
from service.serving.engine import (
    AdapterRef,
    ChatMessage,
    Delta,
    Finished,
    GenerateRequest,
    RequestError,
    ServingError,
    Started,
)
from service.serving.transformers_engine import TransformersEngine
from service.serving.transformers_models import attach, load_base
from tests.service.serving_parts import (
    CONTEXT_TOKENS,
    direct_text,
    direct_tokens,
    save_adapter,
    save_base,
    vouch,
)

PROMPT = "the answer is"
NUM_TOKENS = 24
SHAPES = {"a": ("q_proj", "v_proj"), "b": ("q_proj", "v_proj"), "c": ("k_proj", "up_proj", "down_proj")}


@dataclass(frozen=True)
class Models:
    storage: Path
    base: Path

    def adapter(self, name: str | None) -> Path | None:
        return None if name is None else self.storage / name / "adapter"

    def engine(self, max_adapters: int = 8) -> TransformersEngine:
        return TransformersEngine(
            storage_url=f"file://{self.storage}", max_adapters=max_adapters, num_threads=1
        )

    def request(self, name: str | None, **changes: Any) -> GenerateRequest:
        ref = None if name is None else AdapterRef(id=f"{name}@v1", task_dir=name)
        given = {"prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0.0} | changes
        return GenerateRequest(base_model_path=str(self.base), adapter=ref, **given)

    def direct(self, name: str | None, num_tokens: int = NUM_TOKENS) -> tuple[int, ...]:
        ids = AutoTokenizer.from_pretrained(self.base)(PROMPT)["input_ids"]
        return direct_tokens(self.base, self.adapter(name), ids, num_tokens)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    storage = tmp_path_factory.mktemp("storage")
    base = save_base(tmp_path_factory.mktemp("base"))
    for seed, (name, targets) in enumerate(SHAPES.items(), 1):
        save_adapter(storage / name / "adapter", base, seed, targets=targets)
        vouch(Storage(f"file://{storage}"), name, base)
    return Models(storage, base)


async def answer(engine: TransformersEngine, request: GenerateRequest) -> tuple[str, Finished]:
    """Collect one answer; checks the order of the events."""
    events = [event async for event in engine.generate(request)]
    assert isinstance(events[0], Started)
    assert all(isinstance(event, Delta) for event in events[1:-1])
    assert isinstance(events[-1], Finished)
    return "".join(event.text for event in events if isinstance(event, Delta)), events[-1]


async def until(claim: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not claim():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


def test_greedy_tokens_equal_those_of_the_adapter_called_directly(models: Models) -> None:
    async def check() -> None:
        engine = models.engine()
        names = [None, "a", "b", "c", None, "b", "a", None]
        served = {name: await answer(engine, models.request(name)) for name in names}
        assert len({finished.token_ids for _, finished in served.values()}) == 4
        for name, (text, finished) in served.items():
            assert finished.token_ids == models.direct(name)
            assert text == direct_text(models.base, models.adapter(name), PROMPT, NUM_TOKENS)
            assert finished.finish_reason == "length"

    asyncio.run(check())


def test_adapters_share_one_copy_of_the_base_model(models: Models) -> None:
    async def check() -> None:
        gc.collect()
        before = {id(thing) for thing in gc.get_objects() if type(thing) is LlamaForCausalLM}
        engine = models.engine()
        await asyncio.gather(*(answer(engine, models.request(name)) for name in (None, *SHAPES)))
        gc.collect()
        after = [thing for thing in gc.get_objects() if type(thing) is LlamaForCausalLM]
        assert len([thing for thing in after if id(thing) not in before]) == 1
        assert engine.status().base_models == (str(models.base),)

    asyncio.run(check())


@pytest.mark.parametrize("in_flight", [None, "a"])
def test_a_request_in_flight_is_not_changed_by_adapters_that_load_and_leave(
    models: Models, in_flight: str | None
) -> None:
    async def check() -> None:
        engine = models.engine(max_adapters=2)
        await answer(engine, models.request(in_flight, max_tokens=1))
        long = engine.generate(models.request(in_flight, max_tokens=600))
        assert isinstance(await anext(long), Started)
        await anext(long)
        others = [asyncio.create_task(answer(engine, models.request(name))) for name in ("b", "c")]
        loaded_in_flight = False
        async for event in long:
            loaded_in_flight |= len(engine.status().adapters) == (2 if in_flight is None else 3)
            if isinstance(event, Finished):
                assert event.token_ids == models.direct(in_flight, 600)
        assert loaded_in_flight, "the adapters had to be attached while the long answer was generated"
        for name, other in zip(("b", "c"), others, strict=True):
            assert (await other)[1].token_ids == models.direct(name)
        await until(lambda: len(engine.status().adapters) == 2)
        assert (await answer(engine, models.request("a")))[1].token_ids == models.direct("a")

    asyncio.run(check())


def test_an_evicted_adapter_comes_back_the_same_and_the_last_one_leaves_the_base_as_it_was(
    models: Models,
) -> None:
    async def check() -> None:
        engine = models.engine(max_adapters=1)
        for name in ("a", "b", "a", None, "c", None, "a"):
            assert (await answer(engine, models.request(name)))[1].token_ids == models.direct(name)
        await until(lambda: engine.status().leases == 0 and engine.status().adapters == ("a@v1",))

    asyncio.run(check())


def test_a_client_that_leaves_stops_its_generation_and_frees_its_leases(models: Models) -> None:
    async def check() -> None:
        engine = models.engine()
        events = engine.generate(models.request("a", max_tokens=CONTEXT_TOKENS - 100))
        for _ in range(5):
            await anext(events)
        queued = engine.generate(models.request("b", max_tokens=CONTEXT_TOKENS - 100))
        assert isinstance(await anext(queued), Started)
        assert engine.status().leases == 4
        await events.aclose()
        await queued.aclose()
        start = time.monotonic()
        await answer(engine, models.request("a", max_tokens=1))
        assert time.monotonic() - start < 1.0
        await until(lambda: engine.status().leases == 0, 1.0)

    asyncio.run(check())


def test_the_event_loop_stays_free_while_it_generates(models: Models) -> None:
    async def check() -> None:
        engine = models.engine()
        await answer(engine, models.request("a", max_tokens=1))
        work = asyncio.create_task(answer(engine, models.request("a", max_tokens=300)))
        longest = 0.0
        while not work.done():
            start = time.monotonic()
            await asyncio.sleep(0.001)
            longest = max(longest, time.monotonic() - start)
        assert longest < 0.25

    asyncio.run(check())


def test_sampling_repeats_for_a_seed_and_differs_between_seeds(models: Models) -> None:
    async def check() -> None:
        engine = models.engine()

        async def sample(seed: int | None, **changes: Any) -> tuple[int, ...]:
            request = models.request("a", temperature=1.5, seed=seed, **changes)
            return (await answer(engine, request))[1].token_ids

        first = await sample(1)
        torch.manual_seed(99)  # nobody else's random numbers matter
        assert await sample(1) == first
        assert await sample(2) != first
        assert await sample(None) != await sample(None)
        assert await sample(3, top_p=1e-6) == models.direct("a")

    asyncio.run(check())


def test_the_end_token_and_stop_strings_end_an_answer(models: Models, tmp_path: Path) -> None:
    async def check() -> None:
        engine = models.engine()
        text = direct_text(models.base, None, PROMPT, NUM_TOKENS)
        stop = text[4:6]
        cut, finished = await answer(engine, models.request(None, stop=(stop,)))
        assert cut == text[: text.index(stop)]
        assert finished.finish_reason == "stop"
        assert len(finished.token_ids) < NUM_TOKENS

        ends = models.direct(None)[3]
        ending = save_base(tmp_path / "ending")
        file = ending / "generation_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": [ends]}))
        request = models.request(None).model_copy(update={"base_model_path": str(ending)})
        cut, finished = await answer(engine, request)
        position = models.direct(None).index(ends)
        assert finished.token_ids == models.direct(None)[: position + 1]
        assert finished.finish_reason == "stop"
        assert cut == text[:position]

    asyncio.run(check())


def test_messages_go_through_the_chat_template(models: Models, tmp_path: Path) -> None:
    async def check() -> None:
        engine = models.engine()
        messages = (ChatMessage(role="system", content="S"), ChatMessage(role="user", content="hi"))
        chat = await answer(engine, models.request("a", prompt=None, messages=messages))
        raw = await answer(engine, models.request("a", prompt="<|system|>S</s><|user|>hi</s><|assistant|>"))
        assert chat == raw
        assert chat != await answer(engine, models.request("a", prompt="hi"))

        plain = save_base(tmp_path / "plain", chat_template=None)
        request = models.request(None, prompt=None, messages=messages)
        with pytest.raises(RequestError, match="no chat template"):
            await answer(engine, request.model_copy(update={"base_model_path": str(plain)}))

    asyncio.run(check())


def test_a_prompt_that_does_not_fit_is_refused_and_a_default_limit_is_cut(models: Models) -> None:
    async def check() -> None:
        engine = models.engine()
        long = "x" * (CONTEXT_TOKENS - 2)
        with pytest.raises(RequestError, match=f"{CONTEXT_TOKENS} tokens.*{len(long)}") as error:
            await answer(engine, models.request("a", prompt=long, max_tokens=3))
        assert (error.value.param, error.value.code) == ("prompt", "context_length_exceeded")
        cut = models.request("a", prompt=long, max_tokens=16, cut_max_tokens=True)
        assert len((await answer(engine, cut))[1].token_ids) == 2
        with pytest.raises(RequestError):
            await answer(engine, models.request("a", prompt=long + "xx", max_tokens=16, cut_max_tokens=True))
        await until(lambda: engine.status().leases == 0)

    asyncio.run(check())


def test_an_adapter_that_does_not_fit_leaves_nothing_in_its_base(models: Models, tmp_path: Path) -> None:
    wide = save_adapter(tmp_path / "wide", models.base, 1)
    config = json.loads((wide / "adapter_config.json").read_text())
    (wide / "adapter_config.json").write_text(json.dumps(config | {"r": 5}))
    base = load_base(str(models.base))
    for _ in range(2):
        with pytest.raises(ServingError, match="does not fit"):
            attach(base, str(wide), "wide")
        assert not [name for name, _ in base.model.named_parameters() if "lora_" in name]
    attach(base, str(models.adapter("a")), "a")
    assert list(base.peft.peft_config) == ["a"]


def test_pickled_weights_strange_shapes_changed_and_missing_files_are_refused(
    models: Models, tmp_path: Path
) -> None:
    async def check() -> None:
        storage = tmp_path / "storage"
        pickled = save_adapter(storage / "pickled" / "adapter", models.base, 1)
        (pickled / "adapter_model.safetensors").unlink()
        torch.save({}, pickled / "adapter_model.bin")
        wide = save_adapter(storage / "wide" / "adapter", models.base, 1)
        config = json.loads((wide / "adapter_config.json").read_text())
        (wide / "adapter_config.json").write_text(json.dumps(config | {"r": 5}))
        changed = save_adapter(storage / "changed" / "adapter", models.base, 1)
        save_adapter(storage / "good" / "adapter", models.base, 1)
        for name in ("pickled", "wide", "changed", "good"):
            vouch(Storage(f"file://{storage}"), name, models.base)
        weights = bytearray((changed / "adapter_model.safetensors").read_bytes())
        weights[-1] ^= 1
        (changed / "adapter_model.safetensors").write_bytes(weights)
        engine = TransformersEngine(storage_url=f"file://{storage}", max_adapters=2, num_threads=1)
        for name, reason in {
            "pickled": "no adapter_model.safetensors",
            "wide": "does not fit",
            "changed": "changed/adapter/adapter_model.safetensors is damaged",
            "missing": "missing/manifest.json",
            "../good": "bad storage key",
        }.items():
            with pytest.raises(ServingError, match=reason):
                await answer(engine, models.request(name))
        for name in (None, "good", None):
            expected = direct_tokens(
                models.base,
                None if name is None else storage / name / "adapter",
                AutoTokenizer.from_pretrained(models.base)(PROMPT)["input_ids"],
                NUM_TOKENS,
            )
            assert (await answer(engine, models.request(name)))[1].token_ids == expected
        with pytest.raises(ServingError, match="nowhere"):
            await answer(engine, models.request(None).model_copy(update={"base_model_path": "/nowhere"}))
        await until(lambda: engine.status().leases == 0)

    asyncio.run(check())
