"""Deploy the Serve application through the Ray dashboard's REST API.

The control plane never joins the Ray cluster: it sends one declarative document and reads the state back.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any
from urllib.parse import urlsplit

import httpx

from service.serving.engine import ServingError
from service.settings import Settings

APPLICATION = "clpeft"
_ROUTE = "/api/serve/applications/"
_LOG_LEVEL = "WARNING"
logger = logging.getLogger(__name__)


def serve_config(settings: Settings) -> dict[str, Any]:
    """Return the whole Serve document: one HTTP proxy at settings.serve_url and one application.

    A proxy that is reached on this machine listens there only; one that is reached by a name listens on
    all addresses, because the name belongs to the cluster's network. Raises ValueError for a Serve address
    without a host and port.
    """
    address = urlsplit(settings.serve_url)
    if address.scheme != "http" or not address.hostname or not address.port:
        raise ValueError(f"serve_url must look like http://127.0.0.1:8000, got {settings.serve_url!r}")
    is_local = address.hostname in ("127.0.0.1", "localhost", "::1")
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": address.hostname if is_local else "0.0.0.0", "port": address.port},
        "logging_config": {"log_level": _LOG_LEVEL, "enable_access_log": False},
        "applications": [
            {
                "name": APPLICATION,
                "route_prefix": "/",
                "import_path": "service.serving.app:build",
                "args": {
                    "storage_url": settings.storage_url,
                    "num_threads": settings.serve_threads,
                    "num_replicas": settings.serve_replicas,
                    "max_adapters": settings.serve_max_adapters,
                },
                "runtime_env": {
                    "env_vars": {
                        "OMP_NUM_THREADS": str(settings.serve_threads),
                        "OMP_WAIT_POLICY": "PASSIVE",
                        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                        "HF_HUB_DISABLE_TELEMETRY": "1",
                        "TOKENIZERS_PARALLELISM": "false",
                    }
                },
            }
        ],
    }


def deploy(settings: Settings) -> None:
    """Ask the cluster to run the application; returns before it is ready.

    Repeating it with the same settings changes nothing. Raises ServingError when the dashboard refuses or is
    away.
    """
    _call(settings, "PUT", serve_config(settings))


def keep_deployed(settings: Settings, stopping: threading.Event, *, look_every_s: float = 5.0) -> None:
    """Deploy the application, and again whenever the cluster has forgotten it, until stopping is set.

    A cluster whose head was restarted knows nothing of it. Refusals and a dashboard that is away are logged,
    each once in a row, and asked again.
    """
    is_known, said = False, ""
    while not stopping.is_set():
        try:
            if not is_known or application_state(settings) == "NOT_DEPLOYED":
                deploy(settings)
                logger.info("Ray Serve has its application at %s", settings.serve_url)
            is_known, said = True, ""
        except (ServingError, ValueError) as error:
            if str(error) != said:
                said = str(error)
                logger.warning("Ray Serve: %s", said)
        stopping.wait(look_every_s if is_known else min(1.0, look_every_s))


def wait_ready(settings: Settings, timeout_s: float = 120.0) -> float:
    """Wait until the application answers over HTTP; return the seconds waited.

    Raises ServingError with Serve's own message when the deployment fails or time runs out.
    """
    start = time.monotonic()
    state = "no answer yet"
    while time.monotonic() - start < timeout_s:
        state = application_state(settings)
        if state == "RUNNING" and _answers(settings.serve_url):
            return time.monotonic() - start
        time.sleep(0.2)
    raise ServingError(f"Serve was not ready after {timeout_s:.0f} s; last state: {state}")


def application_state(settings: Settings) -> str:
    """Return Serve's state word, such as DEPLOYING or RUNNING, or NOT_DEPLOYED.

    Raises ServingError with the reason when the deployment failed or the dashboard is away.
    """
    application = _call(settings, "GET").get("applications", {}).get(APPLICATION)
    if application is None:
        return "NOT_DEPLOYED"
    if application["status"] == "DEPLOY_FAILED":
        raise ServingError(f"the Serve application failed to deploy: {application['message']}")
    return str(application["status"])


def undeploy(settings: Settings) -> None:
    """End the application, the proxy and Serve's controller."""
    _call(settings, "DELETE")


def _call(settings: Settings, method: str, document: dict[str, Any] | None = None) -> dict[str, Any]:
    if not settings.ray_dashboard_url:
        raise ServingError(
            "no Ray dashboard address: set CLPEFT_RAY_DASHBOARD_URL, for example http://127.0.0.1:8265"
        )
    headers = {}
    url = settings.ray_dashboard_url.rstrip("/") + _ROUTE
    try:
        if settings.ray_token_path is not None:
            headers["Authorization"] = f"Bearer {settings.ray_token_path.read_text().strip()}"
        response = httpx.request(method, url, headers=headers, json=document, timeout=60.0, trust_env=False)
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        raise ServingError(
            f"the Ray dashboard at {settings.ray_dashboard_url} does not answer: {error}"
        ) from error
    if response.status_code != 200:
        raise ServingError(
            f"the Ray dashboard answered {response.status_code} to {method} {_ROUTE}: {response.text[:2000]}"
        )
    try:
        found: dict[str, Any] = response.json() if method == "GET" else {}
    except ValueError as error:
        raise ServingError(
            f"the Ray dashboard answered {method} {_ROUTE} with something else than JSON"
        ) from error
    return found


def _answers(serve_url: str) -> bool:
    try:
        return httpx.get(f"{serve_url.rstrip('/')}/status", timeout=5.0, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False
