"""Versions and aliases of adapters. Only commit() makes a version, and only from a complete manifest."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from sqlalchemy import select
from sqlalchemy.orm import Session

from service.adapters.manifest import MANIFEST_NAME, Manifest
from service.adapters.storage import Storage
from service.db.tables import Adapter, AdapterVersion, Alias, Job, Task
from service.errors import Invalid, NotFound
from service.jobs.events import add_event
from service.jobs.states import TaskState
from service.specs import NAME_PATTERN

DEFAULT_ALIAS = "live"
_VERSION_PATTERN = re.compile(r"^v(\d{1,9})$")


class ManifestError(RuntimeError):
    """A manifest does not describe the files beside it, or not this job's next task."""


@dataclass(frozen=True)
class StoredManifest:
    """A manifest whose files were checked, and where it lies."""

    task_dir: str
    manifest: Manifest
    sha256: str


@dataclass(frozen=True)
class ResolvedAdapter:
    """One immutable version, as serving needs it."""

    name: str
    version: int
    alias: str | None
    """The alias that led here; None when the version was named."""
    task_dir: str
    """Storage key of the task's folder; the adapter is in its folder adapter/."""
    base_model_path: str
    base_model_id: str
    data_format: str


# ----------------------------------------------------------------------------------------------------- lookup


def get_adapter(session: Session, name: str) -> Adapter:
    """Return an adapter. Raises NotFound."""
    found = session.get(Adapter, name)
    if found is None:
        raise NotFound(f"no adapter {name!r}; GET /v1/adapters lists the adapters", code="adapter_not_found")
    return found


def get_version(session: Session, name: str, version: int) -> AdapterVersion:
    """Return a version. Raises NotFound."""
    adapter = get_adapter(session, name)
    found = session.get(AdapterVersion, (name, version))
    if found is None:
        raise NotFound(
            f"adapter {name!r} has no version v{version}; the latest is v{adapter.latest_version}",
            code="version_not_found",
        )
    return found


def versions_of(session: Session, name: str) -> Sequence[AdapterVersion]:
    """Return the versions of an adapter, oldest first."""
    wanted = select(AdapterVersion).where(AdapterVersion.adapter == name).order_by(AdapterVersion.version)
    return session.scalars(wanted).all()


def aliases_of(session: Session, name: str) -> dict[str, int]:
    """Return alias -> version."""
    wanted = select(Alias).where(Alias.adapter == name).order_by(Alias.alias)
    return {row.alias: row.version for row in session.scalars(wanted)}


def aliases_of_all(session: Session, names: Collection[str]) -> dict[str, dict[str, int]]:
    """Return adapter -> alias -> version, in one query."""
    found: dict[str, dict[str, int]] = {name: {} for name in names}
    for row in session.scalars(select(Alias).where(Alias.adapter.in_(names)).order_by(Alias.alias)):
        found[row.adapter][row.alias] = row.version
    return found


def resolve(session: Session, model: str) -> ResolvedAdapter:
    """Find the version that `name`, `name@vN` or `name@alias` means now. Raises NotFound."""
    name, at, reference = model.partition("@")
    alias: str | None = (reference or None) if at else DEFAULT_ALIAS
    if not re.match(NAME_PATTERN, name) or alias is None:
        raise NotFound(f"no model {model!r}; a model is name, name@vN or name@alias", code="model_not_found")
    get_adapter(session, name)
    pinned = _VERSION_PATTERN.match(alias)
    if pinned:
        version, alias = int(pinned[1]), None
    else:
        aliases = aliases_of(session, name)
        if alias not in aliases:
            known = ", ".join(aliases) or "none"
            raise NotFound(f"adapter {name!r} has no alias {alias!r}; known: {known}", code="alias_not_found")
        version = aliases[alias]
    row = get_version(session, name, version)
    return ResolvedAdapter(
        name=name,
        version=version,
        alias=alias,
        task_dir=row.task_dir,
        base_model_path=row.manifest["base_model_path"],
        base_model_id=row.manifest["base_model"]["id"],
        data_format=row.manifest["data_format"],
    )


def set_alias(session: Session, name: str, alias: str, version: int) -> Alias:
    """Point an alias at a version. Raises Invalid for a name like v7, NotFound for an unknown version."""
    if _VERSION_PATTERN.match(alias) or re.match(r"^v\d+$", alias):
        raise Invalid(f"alias {alias!r} looks like a version; versions never move", code="alias_like_version")
    if not re.match(NAME_PATTERN, alias):
        raise Invalid(f"alias {alias!r} must match {NAME_PATTERN}")
    get_version(session, name, version)
    row = session.get(Alias, (name, alias))
    if row is None:
        row = Alias(adapter=name, alias=alias, version=version)
        session.add(row)
    row.version = version
    session.flush()
    return row


# ----------------------------------------------------------------------------------------------------- commit


def read_manifest(storage: Storage, task_dir: str) -> StoredManifest | None:
    """Read a task folder's manifest and check every file's size and sha256.

    None when there is no manifest yet. Raises ManifestError.
    """
    try:
        raw = storage.read_bytes(f"{task_dir}/{MANIFEST_NAME}")
    except FileNotFoundError:
        return None
    try:
        manifest = Manifest.model_validate_json(raw)
    except ValidationError as error:
        raise ManifestError(f"{task_dir}/{MANIFEST_NAME} cannot be read: {error}") from error
    for relative, expected in manifest.files.items():
        _check_file(storage, f"{task_dir}/{relative}", expected.bytes, expected.sha256)
    return StoredManifest(task_dir, manifest, hashlib.sha256(raw).hexdigest())


def commit(session: Session, job: Job, task: Task, stored: StoredManifest, *, alias: str) -> int:
    """Make a version of a checked manifest and move the alias to it. Returns the version.

    Raises ManifestError when the manifest is not of this task.
    """
    manifest = stored.manifest
    found = (manifest.job_id, manifest.run_id, manifest.task_index, manifest.task_name, manifest.adapter)
    expected = (job.id, task.run_id, task.index, task.name, job.adapter)
    if found != expected:
        raise ManifestError(f"manifest of {stored.task_dir} is for {found}, expected {expected}")
    adapter = session.get(Adapter, job.adapter)
    if adapter is None:
        adapter = Adapter(name=job.adapter, job_id=job.id, latest_version=0)
        session.add(adapter)
    adapter.latest_version += 1
    version = adapter.latest_version
    session.flush()
    session.add(
        AdapterVersion(
            adapter=adapter.name,
            version=version,
            job_id=job.id,
            run_id=manifest.run_id,
            attempt=manifest.attempt,
            task_index=task.index,
            task_name=task.name,
            task_dir=stored.task_dir,
            manifest=json.loads(manifest.model_dump_json()),
            manifest_sha256=stored.sha256,
            bytes=sum(file.bytes for file in manifest.files.values()),
        )
    )
    task.state, task.version = TaskState.COMMITTED, version
    job.num_committed += 1
    session.flush()
    set_alias(session, adapter.name, alias, version)
    data: dict[str, Any] = {
        "task": task.name,
        "task_index": task.index,
        "adapter": adapter.name,
        "version": version,
        "alias": alias,
        "scores": manifest.scores,
        "base_scores": manifest.base_scores,
    }
    add_event(session, job.id, "task.committed", data, run_id=task.run_id, attempt=manifest.attempt)
    return version


def latest_version(session: Session, job_id: str) -> AdapterVersion | None:
    """Return the job's newest version; None before its first commit."""
    wanted = (
        select(AdapterVersion).where(AdapterVersion.job_id == job_id).order_by(AdapterVersion.version.desc())
    )
    return session.scalars(wanted.limit(1)).first()


def _check_file(storage: Storage, key: str, num_bytes: int, sha256: str) -> None:
    digest, size = hashlib.sha256(), 0
    try:
        for chunk in storage.chunks(key):
            digest.update(chunk)
            size += len(chunk)
    except FileNotFoundError as error:
        raise ManifestError(f"{key} is in its manifest but not in storage") from error
    except ValueError as error:
        raise ManifestError(str(error)) from error
    if size != num_bytes or digest.hexdigest() != sha256:
        raise ManifestError(
            f"{key} has {size} bytes, sha256 {digest.hexdigest()}; its manifest says {num_bytes}, {sha256}"
        )
