"""Fixtures of the control plane's tests: settings in a temporary folder, a database, a served application.

Whatever asks for `sessions` or `service` runs on SQLite and on PostgreSQL.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from service.db.session import Sessions, open_database
from service.ray_head import RayHead, running_ray
from service.settings import Settings
from tests.service.control import Service, run_service
from tests.service.postgres import PostgresServer, running_postgres
from tests.service.s3_server import S3Server, running_s3


@pytest.fixture(scope="session")
def ray_head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHead]:
    """One Ray head for every test that needs a cluster and leaves it as it was."""
    with running_ray(tmp_path_factory.mktemp("ray")) as running:
        yield running


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """One PostgreSQL server for every test that leaves it running."""
    with running_postgres() as running:
        yield running


@pytest.fixture(scope="session")
def migrated_postgres(postgres: PostgresServer) -> str:
    """Name of a database with the newest schema, which all tests share."""
    name = "suite"
    open_database(postgres.create(name)).close()
    return name


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of an empty database of each kind, for one test.

    In PostgreSQL it is emptied, not made anew: that costs milliseconds, a new one a second on a busy machine.
    """
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'clpeft.db'}"
    name: str = request.getfixturevalue("migrated_postgres")
    server: PostgresServer = request.getfixturevalue("postgres")
    server.wipe(name)
    return server.url(name)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Small limits, and one prepared base model named tiny."""
    model = tmp_path / "models" / "tiny"
    model.mkdir(parents=True)
    (model / "config.json").write_text('{"model_type": "llama"}')
    return Settings(
        home=tmp_path, max_upload_bytes=100_000, max_row_bytes=2_000, max_attempts=3, poll_interval_s=0.1
    )


@pytest.fixture
def sessions(database_url: str) -> Iterator[Sessions]:
    """An empty database."""
    opened = open_database(database_url)
    yield opened
    opened.close()


@pytest.fixture
def service(settings: Settings, sessions: Sessions) -> Iterator[Service]:
    """A served control plane; the test calls reconciler.tick() itself."""
    with run_service(settings, sessions) as running:
        yield running


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One real S3 server with an empty bucket."""
    with running_s3(tmp_path_factory.mktemp("s3")) as running:
        yield running
