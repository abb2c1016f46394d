"""The OpenAI routes over real HTTP and Ray Serve; long, because its tests share one cluster."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import uvicorn
from fastapi import FastAPI

from service.adapters.storage import Storage
from service.api.openai import router
from service.db.session import Sessions, open_database
from service.processes import free_ports
from service.ray_head import RayHead, ray_processes, running_ray
from service.serving.deploy import deploy, undeploy, wait_ready
from service.serving.engine import ServingError
from service.settings import Settings
from tests.service.serving_parts import CONTEXT_TOKENS, commit_version, direct_text, save_base

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]
PROMPT = "the answer is"
NUM_TOKENS = 24


@dataclass(frozen=True)
class Service:
    settings: Settings
    sessions: Sessions
    storage: Storage
    base: Path
    adapters: dict[str, Path]
    """name@vN -> folder of the adapter."""
    url: str
    head: RayHead

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def post(self, route: str, **body: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/{route}", json=body, timeout=60)

    def complete(self, **body: Any) -> httpx.Response:
        given = {"model": "alpha", "prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0} | body
        return self.post("completions", **given)

    def text(self, model: str) -> str:
        found: str = self.complete(model=model).json()["choices"][0]["text"]
        return found

    def direct(self, version: str | None) -> str:
        return direct_text(self.base, None if version is None else self.adapters[version], PROMPT, NUM_TOKENS)

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = httpx.get(f"{self.settings.serve_url}/status", timeout=10).json()
        return found


def serve_app(settings: Settings, sessions: Sessions) -> Iterator[str]:
    """Run the routes under uvicorn on a free port and give the address."""
    app = FastAPI()
    app.state.settings = settings
    app.state.sessions = sessions
    app.include_router(router)
    (port,) = free_ports(1)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.02)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    home = tmp_path_factory.mktemp("home")
    base = save_base(home / "models" / "tiny")
    (serve_port,) = free_ports(1)
    with running_ray(home / "ray") as head:
        settings = Settings(
            home=home,
            ray_dashboard_url=head.dashboard_url,
            ray_token_path=head.token_path,
            serve_url=f"http://127.0.0.1:{serve_port}",
        )
        storage = Storage(settings.storage_url)
        sessions = open_database(settings.database_url)
        adapters = {
            "alpha@v1": commit_version(sessions, storage, base, "alpha", 1, alias="prod"),
            "alpha@v2": commit_version(sessions, storage, base, "alpha", 2),
            "beta1@v1": commit_version(sessions, storage, base, "beta1", 1),
        }
        deploy(settings)
        wait_ready(settings)
        for url in serve_app(settings, sessions):
            yield Service(settings, sessions, storage, base, adapters, url, head)
        sessions.close()


@pytest.fixture(scope="module")
def lonely(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The routes without a Serve application behind them."""
    home = tmp_path_factory.mktemp("lonely")
    save_base(home / "models" / "tiny")
    (serve_port,) = free_ports(1)
    settings = Settings(home=home, serve_url=f"http://127.0.0.1:{serve_port}")
    sessions = open_database(settings.database_url)
    yield from serve_app(settings, sessions)
    sessions.close()


def until(claim: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not claim():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# ---------------------------------------------------------------------------------------------------- answers


def test_every_name_of_a_model_answers_as_its_adapter_called_directly(service: Service) -> None:
    expected = {
        "alpha": "alpha@v2",
        "alpha@live": "alpha@v2",
        "alpha@prod": "alpha@v1",
        "alpha@v1": "alpha@v1",
        "beta1": "beta1@v1",
        "tiny": None,
        "org/tiny": None,
    }
    texts = {version: service.direct(version) for version in expected.values()}
    assert len(set(texts.values())) == 4
    for name, version in expected.items():
        response = service.complete(model=name)
        body = response.json()
        assert body["choices"][0]["text"] == texts[version]
        assert body["model"] == (version or name)
        assert response.headers.get("X-Adapter-Version") == (version and version.partition("@")[2])


def test_the_official_client_completes_with_and_without_a_stream(service: Service) -> None:
    client = service.client()
    whole = client.completions.create(model="alpha", prompt=PROMPT, max_tokens=NUM_TOKENS, temperature=0)
    assert whole.choices[0].text == service.direct("alpha@v2")
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None
    assert whole.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": len(PROMPT),
        "completion_tokens": NUM_TOKENS,
        "total_tokens": len(PROMPT) + NUM_TOKENS,
    }
    chunks = list(
        client.completions.create(
            model="alpha",
            prompt=PROMPT,
            max_tokens=NUM_TOKENS,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert len(chunks) > 5
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-2:] == [None, "length"]
    assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)
    assert {chunk.model for chunk in chunks} == {"alpha@v2"}
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_official_client_chats_through_the_template_with_and_without_a_stream(service: Service) -> None:
    client = service.client()
    messages: Any = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]},
    ]
    given: Any = {
        "model": "alpha@prod",
        "messages": messages,
        "max_completion_tokens": NUM_TOKENS,
        "temperature": 0,
    }
    raw = client.chat.completions.with_raw_response.create(**given)
    whole = raw.parse()
    rendered = "<|system|>S</s><|user|>hi</s><|assistant|>"
    assert whole.choices[0].message.content == direct_text(
        service.base, service.adapters["alpha@v1"], rendered, NUM_TOKENS
    )
    assert (whole.choices[0].message.role, whole.choices[0].finish_reason) == ("assistant", "length")
    assert (whole.model, raw.headers["X-Adapter-Version"]) == ("alpha@v1", "v1")
    chunks = list(client.chat.completions.create(**given, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert (
        "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    )
    assert chunks[-1].choices[0].finish_reason == "length"


def test_default_lengths_are_16_for_completions_and_128_for_chat(service: Service) -> None:
    completion = service.post("completions", model="tiny", prompt=PROMPT)
    assert completion.json()["usage"]["completion_tokens"] == 16
    chat = service.post(
        "chat/completions", model="tiny", messages=[{"role": "user", "content": "hi"}], temperature=0
    )
    assert chat.json()["usage"]["completion_tokens"] == 128


def test_a_stop_string_ends_the_answer_before_it(service: Service) -> None:
    text = service.direct("alpha@v2")
    choice = service.complete(stop=["\u2603", text[5:7]]).json()["choices"][0]
    assert choice["text"] == text[: text.index(text[5:7])]
    assert choice["finish_reason"] == "stop"


def test_a_seed_repeats_a_sampled_answer(service: Service) -> None:
    def sample(seed: int) -> str:
        found: str = service.complete(temperature=1.5, top_p=0.9, seed=seed).json()["choices"][0]["text"]
        return found

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) > 1


def test_a_version_is_served_as_soon_as_it_is_committed_and_a_pinned_one_stays(service: Service) -> None:
    commit_version(service.sessions, service.storage, service.base, "gamma3", 1)
    first = service.text("gamma3")
    replica = service.status()["generations"]
    folder = commit_version(service.sessions, service.storage, service.base, "gamma3", 2)
    response = service.complete(model="gamma3")
    assert response.json()["model"] == "gamma3@v2"
    assert (
        response.json()["choices"][0]["text"]
        == direct_text(service.base, folder, PROMPT, NUM_TOKENS)
        != first
    )
    assert service.text("gamma3@v1") == first
    assert service.status()["generations"] == replica + 2, "the same replica answered"


def test_models_are_listed_with_their_data_format(service: Service) -> None:
    listed = {model.id: model for model in service.client().models.list().data}
    assert {"alpha", "alpha@v1", "alpha@v2", "beta1", "beta1@v1", "tiny", "org/tiny"} <= set(listed)
    extra = listed["alpha@v1"].model_extra or {}
    assert extra == {
        "version": 1,
        "task": "t1",
        "aliases": ["prod"],
        "base_model": "org/tiny",
        "data_format": "completion",
    }
    assert (listed["alpha"].model_extra or {})["version"] == 2
    assert service.client().models.retrieve("alpha@prod").id == "alpha@v1"
    assert service.client().models.retrieve("org/tiny").id == "org/tiny"


# ----------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("model", ["nobody", "alpha@v9", "alpha@nope", "alpha@", "../tiny", "a b"])
def test_an_unknown_model_is_404_in_openais_body(service: Service, model: str) -> None:
    with pytest.raises(openai.NotFoundError) as error:
        service.client().completions.create(model=model, prompt="x")
    body: Any = error.value.body
    assert (body["code"], body["type"], body["param"]) == (
        "model_not_found",
        "invalid_request_error",
        "model",
    )
    assert repr(model) in body["message"]


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"n": 2}, "n", "2"),
        ({"best_of": 3}, "best_of", "3"),
        ({"max_tokens": 0}, "max_tokens", "0"),
        ({"temperature": -1}, "temperature", "-1"),
        ({"top_p": 0}, "top_p", "0"),
        ({"prompt": ["a", "b"]}, "prompt", "one text prompt"),
        ({"prompt": ""}, "prompt", "no tokens"),
        ({"prompt": None}, "prompt", "string"),
        ({"stop": list("abcde")}, "stop", "4"),
        ({"logprobs": 2}, "logprobs", "None"),
        ({"colour": "red"}, "colour", "not permitted"),
        ({"max_tokens": CONTEXT_TOKENS}, "prompt", f"context is {CONTEXT_TOKENS} tokens"),
    ],
)
def test_a_request_that_cannot_be_answered_is_400_and_names_the_value(
    service: Service, body: dict[str, Any], param: str, words: str
) -> None:
    response = service.complete(**body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"].partition(".")[0] == param
    assert words in error["message"]


def test_a_long_prompt_has_openais_code_also_when_it_is_streamed(service: Service) -> None:
    for stream in (False, True):
        response = service.complete(prompt="x" * CONTEXT_TOKENS, stream=stream)
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("route", "text"),
    [
        ("completions", '{"model": "alpha", "prompt": "\\ud800"}'),
        ("chat/completions", '{"model": "alpha", "messages": [{"role": "user", "content": "\\udfff"}]}'),
    ],
)
def test_half_of_a_surrogate_pair_is_400(service: Service, route: str, text: str) -> None:
    headers = {"Content-Type": "application/json"}
    response = httpx.post(f"{service.url}/v1/{route}", content=text.encode(), headers=headers)
    assert response.status_code == 400
    assert "half of a surrogate pair" in response.json()["error"]["message"]


def test_a_body_that_is_no_json_is_400(service: Service) -> None:
    response = httpx.post(
        f"{service.url}/v1/completions", content=b"{oops", headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_lost_adapter_files_are_503_and_no_other_adapter_suffers(service: Service) -> None:
    folder = commit_version(service.sessions, service.storage, service.base, "lost44", 1)
    (folder / "adapter_model.safetensors").unlink()
    response = service.complete(model="lost44")
    assert response.status_code == 503
    assert "adapter_model.safetensors" in response.json()["error"]["message"]
    assert service.text("alpha") == service.direct("alpha@v2")


@pytest.mark.parametrize("stream", [False, True])
def test_a_missing_engine_is_503_with_retry_after(lonely: str, stream: bool) -> None:
    body = {"model": "tiny", "prompt": "x", "stream": stream}
    response = httpx.post(f"{lonely}/v1/completions", json=body, timeout=30)
    assert response.status_code == 503
    assert int(response.headers["Retry-After"]) > 0
    assert response.json()["error"]["code"] == "engine_unavailable"
    with pytest.raises(openai.InternalServerError):
        openai.OpenAI(base_url=f"{lonely}/v1", api_key="none", max_retries=0).completions.create(
            model="tiny", prompt="x"
        )


# --------------------------------------------------------------------------------------------- under pressure


def test_a_client_that_leaves_a_stream_stops_its_generation(service: Service) -> None:
    service.text("alpha")
    stream = service.client().completions.create(
        model="alpha", prompt=PROMPT, max_tokens=CONTEXT_TOKENS - 100, temperature=0, stream=True
    )
    for _, _chunk in zip(range(5), stream, strict=False):
        pass
    assert service.status()["leases"] == 2
    stream.close()
    until(lambda: service.status()["leases"] == 0, 3.0)


def test_a_client_that_leaves_a_plain_request_stops_its_generation(service: Service) -> None:
    host, port = service.url.removeprefix("http://").split(":")
    body = json.dumps(
        {"model": "alpha", "prompt": PROMPT, "max_tokens": CONTEXT_TOKENS - 100, "temperature": 0}
    )
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        until(lambda: service.status()["leases"] == 2)
    until(lambda: service.status()["leases"] == 0, 3.0)


def test_many_clients_of_many_adapters_each_get_their_own_answer(service: Service) -> None:
    versions = [None, *service.adapters] * 5
    texts = {version: service.direct(version) for version in set(versions)}
    answers: list[str | None] = [None] * len(versions)

    def ask(position: int) -> None:
        answers[position] = service.text(versions[position] or "tiny")

    threads = [threading.Thread(target=ask, args=(position,)) for position in range(len(versions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [texts[version] for version in versions]


# ----------------------------------------------------------------------------------------------------- deploy


def test_a_replica_that_dies_ends_streams_with_an_error_and_is_replaced(service: Service) -> None:
    stream = service.client().completions.create(
        model="alpha", prompt=PROMPT, max_tokens=CONTEXT_TOKENS - 100, temperature=0, stream=True
    )
    next(stream)
    (replica,) = [p for p in ray_processes(service.head) if "ServeReplica" in " ".join(p.cmdline())]
    replica.kill()
    with pytest.raises(openai.APIError, match="broke off"):
        list(stream)
    until(lambda: service.complete(stop=["x"]).status_code == 200, 60.0)
    assert service.text("alpha") == service.direct("alpha@v2")


def test_the_proxy_listens_on_loopback_only(service: Service) -> None:
    port = int(service.settings.serve_url.rpartition(":")[2])
    listening = {
        c.laddr.ip for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr.port == port
    }
    assert listening == {"127.0.0.1"}


def test_deploying_again_keeps_the_replica(service: Service) -> None:
    before = service.status()
    deploy(service.settings)
    assert wait_ready(service.settings) < 10
    assert service.status() == before


def test_a_wrong_token_and_a_missing_dashboard_are_clear_errors(service: Service, tmp_path: Path) -> None:
    wrong = tmp_path / "token"
    wrong.write_text("wrong")
    with pytest.raises(ServingError, match="403"):
        deploy(service.settings.model_copy(update={"ray_token_path": wrong}))
    (port,) = free_ports(1)
    with pytest.raises(ServingError, match="does not answer"):
        deploy(service.settings.model_copy(update={"ray_dashboard_url": f"http://127.0.0.1:{port}"}))


def test_requests_get_503_while_the_application_is_away_and_answers_when_it_is_back(service: Service) -> None:
    undeploy(service.settings)
    response = service.complete()
    assert response.status_code == 503
    assert "Retry-After" in response.headers
    deploy(service.settings)
    wait_ready(service.settings)
    assert service.text("alpha") == service.direct("alpha@v2")
