"""Wire the real parts together: `clpeft api` and `clpeft reconciler`, settings from CLPEFT_*."""

from __future__ import annotations

import gc
import logging
import signal
import threading

import uvicorn
from fastapi import FastAPI

from service.adapters.storage import Storage
from service.api.app import create_app
from service.api.routes_catalogue import strategy_choices
from service.db.commands import clear_errors
from service.db.session import open_database
from service.jobs.runner import RayJobRunner
from service.reconciler import Reconciler
from service.serving.deploy import keep_deployed
from service.settings import Settings

logger = logging.getLogger(__name__)
KEEP_ALIVE_S = 75
"""How long an idle connection stays open: longer than clients and proxies keep theirs (5 to 60 s), because a
request is lost when the server closes first."""


def build_app(settings: Settings) -> FastAPI:
    """Make the control plane with its database, storage and Ray Jobs API."""
    return create_app(
        settings,
        sessions=open_database(settings.database_url),
        storage=Storage(settings.storage_url),
        runner=RayJobRunner(settings.ray_dashboard_url, token_path=settings.ray_token_path),
        reconcile=settings.reconcile,
    )


def run_reconciler(settings: Settings) -> None:
    """Reconcile until SIGTERM or Ctrl-C; of several such processes one works and the others wait."""
    _set_up_logging()
    reconciler = Reconciler(
        settings,
        sessions=open_database(settings.database_url),
        storage=Storage(settings.storage_url),
        runner=RayJobRunner(settings.ray_dashboard_url, token_path=settings.ray_token_path),
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: reconciler.stop())
    reconciler.run()


def serve_api(settings: Settings) -> None:
    """Serve until SIGTERM or Ctrl-C, and keep the Serve application deployed."""
    _set_up_logging()
    app = build_app(settings)
    stopping = threading.Event()
    threading.Thread(target=_warm_up, name="warm-up", daemon=True).start()
    thread = threading.Thread(
        target=serve_models, args=(settings, stopping), name="deploy-serve", daemon=True
    )
    thread.start()
    try:
        uvicorn.run(
            app,
            host=settings.host,
            port=settings.port,
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=3,
            timeout_keep_alive=KEEP_ALIVE_S,
        )
    finally:
        stopping.set()
        thread.join()


def serve_models(settings: Settings, stopping: threading.Event) -> None:
    """Keep the Serve application on the cluster until stopping is set, if the settings name an address."""
    if settings.serve_url:
        keep_deployed(settings, stopping)
    else:
        logger.info("no CLPEFT_SERVE_URL is set: nothing is served")


def _warm_up() -> None:
    """Import what the first job's check needs, and take it out of the garbage collector's walks.

    Each full walk over torch's half a million objects would hold up every request for a third of a second.
    """
    strategy_choices()
    gc.collect()
    gc.freeze()


def _set_up_logging() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)


if __name__ == "__main__":
    with clear_errors():
        serve_api(Settings())
