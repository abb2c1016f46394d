"""Adapters, catalogue and health over HTTP."""

from __future__ import annotations

import pytest

from clcore.engine.registry import STRATEGIES
from service.adapters import registry
from service.errors import NotFound
from tests.service.control import Service, write_task


@pytest.fixture
def trained(service: Service) -> Service:
    """A service with adapter `demo`, versions 1 and 2."""
    job = service.submit("one", "two")
    service.reconciler.tick()
    for index in (0, 1):
        write_task(service.storage, job["runs"][0]["id"], 1, index, scores={"one": 0.5})
    service.reconciler.tick()
    return service


def test_an_adapter_is_listed_once_it_has_a_version(service: Service) -> None:
    service.submit("one")
    assert service.client.get("/v1/adapters").json()["data"] == []


def test_versions_and_aliases_are_shown(trained: Service) -> None:
    (listed,) = trained.client.get("/v1/adapters").json()["data"]
    shown = trained.client.get("/v1/adapters/demo").json()
    assert (listed["name"], listed["latest_version"], listed["aliases"]) == ("demo", 2, {"live": 2})
    assert [(row["version"], row["task_name"]) for row in shown["versions"]] == [(1, "one"), (2, "two")]
    for path in ("v1", "1"):
        version = trained.client.get(f"/v1/adapters/demo/versions/{path}").json()
        assert version == shown["versions"][0]
        assert version["scores"] == {"one": 0.5}


def test_an_alias_moves_and_names_like_versions_are_refused(trained: Service) -> None:
    moved = trained.client.put("/v1/adapters/demo/aliases/prod", json={"version": 1})
    assert (moved.status_code, moved.json()["version"]) == (200, 1)
    with trained.sessions.read() as session:
        found = {
            model: registry.resolve(session, model) for model in ("demo", "demo@prod", "demo@v1", "demo@v2")
        }
    assert {model: (row.version, row.alias) for model, row in found.items()} == {
        "demo": (2, "live"),
        "demo@prod": (1, "prod"),
        "demo@v1": (1, None),
        "demo@v2": (2, None),
    }
    before = trained.holdings()
    for alias, body, status in (
        ("v7", {"version": 1}, 422),
        ("v12345678901", {"version": 1}, 422),
        ("Prod", {"version": 1}, 422),
        ("prod", {"version": 9}, 404),
        ("prod", {"version": 0}, 422),
        ("prod", {"version": 10**30}, 422),
        ("prod", {"version": True}, 422),
        ("prod", {}, 422),
    ):
        assert trained.client.put(f"/v1/adapters/demo/aliases/{alias}", json=body).status_code == status
    assert trained.holdings() == before


@pytest.mark.parametrize("path", ["nobody", "../x", "demo/versions/v9"])
def test_an_unknown_adapter_or_version_is_404(trained: Service, path: str) -> None:
    assert trained.client.get(f"/v1/adapters/{path}").status_code == 404


@pytest.mark.parametrize(
    "model",
    ["nobody", "demo@v3", "demo@prod", "demo@", "@live", "", "../demo", "demo@v0", "demo@v99999999999"],
)
def test_an_unknown_model_is_not_found(trained: Service, model: str) -> None:
    with trained.sessions.read() as session, pytest.raises(NotFound):
        registry.resolve(session, model)


def test_the_catalogue_lists_what_a_job_may_use(service: Service) -> None:
    strategies = service.client.get("/v1/strategies").json()["data"]
    assert {row["type"] for row in strategies} == set(STRATEGIES)
    assert all(row["description"].endswith(".") for row in strategies)
    parameters = [value for row in strategies for value in row["parameters"]["properties"].values()]
    assert all("default" in value and value["description"] for value in parameters)
    ewc = next(row for row in strategies if row["type"] == "ewc")
    assert "ewc_lambda" in ewc["parameters"]["properties"]
    assert [row["type"] for row in service.client.get("/v1/peft-methods").json()["data"]] == ["lora"]
    assert service.client.get("/v1/base-models").json()["data"] == [{"id": "tiny"}]


def test_ready_says_which_part_is_away(service: Service) -> None:
    assert service.client.get("/healthz").json() == {"status": "ok"}
    assert service.client.get("/readyz").json()["checks"] == {"database": "ok", "storage": "ok", "ray": "ok"}
    service.runner.is_reachable = False
    away = service.client.get("/readyz")
    assert away.status_code == 503
    assert "nothing answers" in away.json()["checks"]["ray"]
    assert service.client.get("/healthz").status_code == 200


def test_every_answer_carries_a_request_id(service: Service) -> None:
    own = service.client.get("/healthz", headers={"X-Request-Id": "abc-1"})
    bad = service.client.get("/nowhere", headers={"X-Request-Id": "a b\u00e9".encode()})
    assert own.headers["x-request-id"] == "abc-1"
    assert bad.headers["x-request-id"].startswith("req_")
    assert (bad.status_code, bad.json()["request_id"]) == (404, bad.headers["x-request-id"])


def test_an_unexpected_error_is_a_500_with_a_request_id(service: Service) -> None:
    service.storage.open_new = None  # type: ignore[assignment, method-assign]
    answer = service.client.delete(f"/v1/datasets/{'x' * 5}")
    assert answer.status_code == 404
    dataset = service.client.post(
        "/v1/datasets", params={"name": "a"}, content=b"{}", headers={"Content-Type": "application/x-ndjson"}
    )
    assert (dataset.status_code, dataset.json()["code"]) == (500, "internal")
    assert dataset.headers["x-request-id"] == dataset.json()["request_id"]


def test_the_openapi_document_names_every_route(service: Service) -> None:
    paths = service.client.get("/openapi.json").json()["paths"]
    assert {"/v1/jobs", "/v1/jobs:plan", "/v1/jobs/{job_id}:cancel", "/v1/datasets", "/readyz"} <= set(paths)
    assert {"post", "get"} == set(paths["/v1/jobs"])
