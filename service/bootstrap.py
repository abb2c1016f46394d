"""Wire the real parts together and serve the API: `python -m service.bootstrap`, settings from CLPEFT_*."""

from __future__ import annotations

import uvicorn
from fastapi import FastAPI

from service.adapters.storage import Storage
from service.api.app import create_app
from service.db.session import open_database
from service.jobs.runner import RayJobRunner
from service.settings import Settings


def build_app(settings: Settings) -> FastAPI:
    """Make the control plane with its database, storage and Ray Jobs API; it runs the reconciler itself."""
    return create_app(
        settings,
        sessions=open_database(settings.database_url),
        storage=Storage(settings.storage_url),
        runner=RayJobRunner(settings.ray_dashboard_url, token_path=settings.ray_token_path),
    )


def main() -> None:
    """Serve until SIGTERM or Ctrl-C."""
    settings = Settings()
    uvicorn.run(
        build_app(settings),
        host=settings.host,
        port=settings.port,
        log_level="info",
        access_log=False,
        timeout_graceful_shutdown=3,
    )


if __name__ == "__main__":
    main()
