"""The registry: what a commit changes, and that it changes all of it or nothing."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import select

from service.adapters import registry
from service.adapters.manifest import Manifest
from service.adapters.registry import ManifestError
from service.adapters.storage import task_key
from service.db.tables import Job, Task
from service.errors import Invalid, NotFound
from tests.service.control import Service, write_task


@pytest.fixture
def finished(service: Service) -> tuple[Service, str]:
    """A service with a run whose first task lies in storage, not yet committed; and the task's folder."""
    job = service.submit("one", "two", promotion={"alias": "prod"})
    service.reconciler.tick()
    return service, write_task(service.storage, job["runs"][0]["id"], 1, 0, scores={"one": 0.75})


def test_a_commit_makes_version_alias_event_and_task_state_together(finished: tuple[Service, str]) -> None:
    service, folder = finished
    service.reconciler.tick()
    with service.sessions.read() as session:
        job, task = (
            session.scalars(select(Job)).one(),
            session.scalars(select(Task).where(Task.index == 0)).one(),
        )
        version = registry.get_version(session, "demo", 1)
        assert (task.state, task.version, job.num_committed) == ("committed", 1, 1)
        assert registry.aliases_of(session, "demo") == {"prod": 1}
        assert Manifest.model_validate(version.manifest).scores == {"one": 0.75}
        assert version.task_dir == folder
        resolved = registry.resolve(session, "demo@prod")
        assert (resolved.task_dir, resolved.base_model_id, resolved.data_format) == (
            folder,
            "tiny",
            "completion",
        )
        assert resolved.base_model_path == str(service.settings.models_dir / "tiny")
        with pytest.raises(NotFound, match="no alias 'live'; known: prod"):
            registry.resolve(session, "demo")


def test_a_commit_that_breaks_off_leaves_nothing(
    finished: tuple[Service, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    service, _ = finished
    before = service.holdings()

    def breaks(*_: Any, **__: Any) -> None:
        raise RuntimeError("the process dies here")

    with monkeypatch.context() as patch:
        patch.setattr(registry, "add_event", breaks)  # the last step of a commit
        service.reconciler.tick()
        assert service.holdings() == before
    service.reconciler.tick()
    assert service.holdings()[0]["adapter_versions"] == 1


def test_a_file_outside_the_task_folder_is_not_looked_at(finished: tuple[Service, str]) -> None:
    service, folder = finished
    manifest = service.storage.read_json(f"{folder}/manifest.json")
    manifest["files"] = {"../../../plan.json": {"bytes": 1, "sha256": "0"}}
    service.storage.write_json(f"{folder}/manifest.json", manifest)
    with pytest.raises(ManifestError, match="bad storage key"):
        registry.read_manifest(service.storage, folder)


def test_a_manifest_that_is_no_manifest_is_an_error_and_a_missing_one_is_not(service: Service) -> None:
    folder = task_key("run_1", 1, 0)
    assert registry.read_manifest(service.storage, folder) is None
    service.storage.write_json(f"{folder}/manifest.json", {"schema_version": 2})
    with pytest.raises(ManifestError, match="schema_version"):
        registry.read_manifest(service.storage, folder)


@pytest.mark.parametrize("alias", ["v1", "v123456789012", "V1", "a@b", "", "../x"])
def test_an_alias_that_could_be_mistaken_is_refused(finished: tuple[Service, str], alias: str) -> None:
    service, _ = finished
    service.reconciler.tick()
    with service.sessions.write() as session, pytest.raises(Invalid, match="alias"):
        registry.set_alias(session, "demo", alias, 1)
