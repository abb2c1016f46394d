"""The Serve document; deploying it is tested with the OpenAI routes, on a cluster."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Request, Response
from ray.serve.schema import ServeDeploySchema

from service.bootstrap import serve_models
from service.serving.app import ServeArgs, build
from service.serving.deploy import APPLICATION, deploy, keep_deployed, serve_config
from service.serving.engine import ServingError
from service.settings import Settings
from tests.service.control import serve, wait_until


def settings(home: Path, serve_url: str = "http://127.0.0.1:8123", **changes: int) -> Settings:
    return Settings.model_validate({"home": home, "serve_url": serve_url, **changes})


def test_the_document_is_valid_and_asks_for_no_cpu(tmp_path: Path) -> None:
    document = ServeDeploySchema.model_validate(serve_config(settings(tmp_path, serve_threads=3)))
    assert (document.http_options.host, document.http_options.port) == ("127.0.0.1", 8123)
    (application,) = document.applications
    assert application.runtime_env["env_vars"]["OMP_NUM_THREADS"] == "3"
    args = ServeArgs.model_validate(application.args)
    assert (args.num_threads, args.storage_url) == (3, f"file://{tmp_path}/storage")
    deployment = build(application.args)._bound_deployment
    assert deployment.ray_actor_options["num_cpus"] == 0


@pytest.mark.parametrize("url", ["", "127.0.0.1:8000", "http://127.0.0.1", "https://127.0.0.1:8000"])
def test_a_serve_address_without_host_and_port_is_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(ValueError, match="serve_url must look like"):
        serve_config(settings(tmp_path, url))


@pytest.mark.parametrize(
    ("url", "host"),
    [("http://localhost:8000", "localhost"), ("http://ray-head.cluster:8000", "0.0.0.0")],
)
def test_the_proxy_leaves_this_machine_only_for_a_cluster(tmp_path: Path, url: str, host: str) -> None:
    assert serve_config(settings(tmp_path, url))["http_options"] == {"host": host, "port": 8000}


def test_an_application_that_the_cluster_forgot_is_deployed_again(tmp_path: Path) -> None:
    app, deployed, stopping = FastAPI(), [], threading.Event()
    cluster: dict[str, Any] = {"applications": {}}

    @app.get("/api/serve/applications/")
    def state() -> dict[str, Any]:
        return cluster

    @app.put("/api/serve/applications/")
    def put(document: dict[str, Any]) -> None:
        deployed.append(document["applications"][0]["name"])
        cluster["applications"] = {APPLICATION: {"status": "RUNNING"}}

    with serve(app) as url:
        given = settings(tmp_path).model_copy(update={"ray_dashboard_url": url})
        thread = threading.Thread(target=keep_deployed, args=(given, stopping), kwargs={"look_every_s": 0.05})
        thread.start()
        try:
            wait_until(lambda: deployed == [APPLICATION], "the first deployment")
            cluster["applications"] = {}  # a restarted head knows no application
            wait_until(lambda: deployed == [APPLICATION] * 2, "the second deployment")
        finally:
            stopping.set()
            thread.join()


@pytest.mark.parametrize("trouble", ["no token", "no JSON"])
def test_what_stands_between_it_and_the_cluster_is_said_once_and_waited_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, trouble: str
) -> None:
    app, looks, stopping = FastAPI(), [], threading.Event()
    token, is_broken = tmp_path / "token", threading.Event()
    is_broken.set()

    @app.get("/api/serve/applications/")
    def state(request: Request) -> Response:
        looks.append(request.headers.get("authorization"))
        text = "<html>" if trouble == "no JSON" and is_broken.is_set() else '{"applications": {}}'
        return Response(text)

    @app.put("/api/serve/applications/")
    def put() -> None:
        pass

    if trouble == "no JSON":
        token.write_text("secret\n")
    with serve(app) as url:
        given = settings(tmp_path).model_copy(update={"ray_dashboard_url": url, "ray_token_path": token})
        thread = threading.Thread(target=keep_deployed, args=(given, stopping), kwargs={"look_every_s": 0.05})
        thread.start()
        try:
            said = "something else than JSON" if trouble == "no JSON" else "No such file or directory"
            wait_until(lambda: said in caplog.text, "the warning")
            time.sleep(0.3)  # several more looks
            assert caplog.text.count(said) == 1
            assert thread.is_alive()
            is_broken.clear()
            token.write_text("secret\n")
            num_looks = len(looks)
            wait_until(lambda: len(looks) > num_looks + 2, "it to go on")
            assert set(looks) == {"Bearer secret"}
        finally:
            stopping.set()
            thread.join()


def test_without_a_serve_address_the_api_works_and_says_that_nothing_is_served(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    serve_models(settings(tmp_path, ""), threading.Event())  # returns: there is nothing to keep
    assert "no CLPEFT_SERVE_URL is set: nothing is served" in caplog.text


def test_no_dashboard_address_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ServingError, match="CLPEFT_RAY_DASHBOARD_URL"):
        deploy(settings(tmp_path))
