"""Adapters: their versions and aliases."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query, Response
from pydantic import Field, StrictInt
from sqlalchemy import select

from service.adapters import registry
from service.api.deps import SessionsDep
from service.api.views import (
    VERSIONS,
    AdapterDetail,
    AdapterView,
    AliasView,
    Page,
    VersionView,
    answer,
    version_view,
)
from service.db.tables import Adapter, AdapterVersion
from service.specs import Spec

router = APIRouter(prefix="/v1/adapters", tags=["adapters"])


class AliasTarget(Spec):
    """The version that an alias points at."""

    version: StrictInt = Field(ge=1, le=10**9)


@router.get("")
def list_adapters(
    sessions: SessionsDep, limit: Annotated[int, Query(ge=1, le=100)] = 20, after: str | None = None
) -> Page[AdapterView]:
    """List adapters with at least one version, by name."""
    wanted = select(Adapter).order_by(Adapter.name).limit(limit + 1)
    if after is not None:
        wanted = wanted.where(Adapter.name > after)
    with sessions.read() as session:
        rows = session.scalars(wanted).all()
        aliases = registry.aliases_of_all(session, [row.name for row in rows])
    has_more = len(rows) > limit
    data = [_view(row, aliases[row.name]) for row in rows[:limit]]
    return Page(data=data, has_more=has_more, next_cursor=data[-1].name if has_more else None)


@router.get("/{name}", response_model=AdapterDetail)
def show_adapter(name: str, sessions: SessionsDep) -> Response:
    """Show an adapter with its versions and aliases."""
    with sessions.read() as session:
        row = registry.get_adapter(session, name)
        of_adapter = VERSIONS.where(AdapterVersion.adapter == name).order_by(AdapterVersion.version)
        versions = session.execute(of_adapter).all()
        aliases = registry.aliases_of(session, name)
    shown = [version_view(version) for version in versions]
    return answer(AdapterDetail(**_view(row, aliases).model_dump(), versions=shown))


@router.get("/{name}/versions/{version}")
def show_version(
    name: str, version: Annotated[str, Path(pattern=r"^v?[0-9]{1,9}$")], sessions: SessionsDep
) -> VersionView:
    """Show one version, written as 2 or v2."""
    with sessions.read() as session:
        found = registry.get_version(session, name, int(version.removeprefix("v")))
        one = VERSIONS.where(AdapterVersion.adapter == name, AdapterVersion.version == found.version)
        return version_view(session.execute(one).one())


@router.put("/{name}/aliases/{alias}")
def move_alias(name: str, alias: str, target: AliasTarget, sessions: SessionsDep) -> AliasView:
    """Point an alias at a version; new requests use it from now on."""
    with sessions.write() as session:
        return AliasView.model_validate(registry.set_alias(session, name, alias, target.version))


def _view(row: Adapter, aliases: dict[str, int]) -> AdapterView:
    return AdapterView(
        name=row.name,
        job_id=row.job_id,
        latest_version=row.latest_version,
        aliases=aliases,
        created_at=row.created_at,
        updated_at=row.updated_at,
    )
