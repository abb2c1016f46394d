"""Which models can be asked: adapter versions by any of their names, and base models by their ids."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.adapters import registry
from service.db.session import Sessions
from service.db.tables import Adapter, AdapterVersion, Job
from service.errors import NotFound
from service.models import is_model_folder, list_models
from service.serving.engine import AdapterRef
from service.specs import NAME_PATTERN

OWNER = "cl-peft"
Place = tuple[str, int]
"""Where a card is in the list: adapter, and version or 0 for its bare name."""
_BASE = "base:"
"""Begins the cursor of a page that ends in a base model."""
_VERSIONS = select(
    AdapterVersion.adapter,
    AdapterVersion.version,
    AdapterVersion.created_at,
    AdapterVersion.task_name,
    AdapterVersion.manifest["data_format"].as_string().label("data_format"),
    Job.base_model_id.label("base_model"),
).join(Job, Job.id == AdapterVersion.job_id)
"""What a card shows; a whole manifest is several kilobytes."""


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """What one request is answered with; it does not move while the request lasts."""

    id: str
    """name@vN, or a base model's id."""
    version: int | None
    """None for a base model."""
    base_model_path: str
    adapter: AdapterRef | None


class ModelDirectory:
    """Looks models up in the registry and in the folder of prepared models."""

    def __init__(self, sessions: Sessions, models_dir: Path) -> None:
        self._sessions = sessions
        self._models_dir = models_dir

    def find(self, model: str) -> ServedModel:
        """Resolve name, name@vN, name@alias or a base model's id. An adapter hides a base model of its name.

        Raises NotFound with the code model_not_found.
        """
        with self._sessions.read() as session:
            try:
                found = registry.resolve(session, model)
            except NotFound as error:
                path = self._base_path(session, model)
                if path is None:
                    raise NotFound(
                        f"the model {model!r} does not exist: {error.detail}", code="model_not_found"
                    ) from error
                return ServedModel(id=model, version=None, base_model_path=path, adapter=None)
        name = f"{found.name}@v{found.version}"
        return ServedModel(
            id=name,
            version=found.version,
            base_model_path=found.base_model_path,
            adapter=AdapterRef(id=name, task_dir=found.task_dir),
        )

    def cards(self, *, limit: int, after: str = "") -> tuple[list[dict[str, Any]], str | None]:
        """Return a page of OpenAI model objects, and the cursor of the next page if there is one.

        Each adapter's bare name, its versions oldest first, then base models. Beside OpenAI's fields an
        adapter's entry has base_model, data_format, version, task and aliases.
        """
        last_base = after.removeprefix(_BASE) if after.startswith(_BASE) else ""
        name, _, version = after.partition("@v")
        seen = int(version) if version.isdigit() else 0
        with self._sessions.read() as session:
            place = (name, seen) if after else ("", -1)
            cards = [] if last_base else self._adapter_cards(session, place, limit + 1)
            if len(cards) <= limit:
                times = sorted(self._base_times(session).items())
                cards += [((_BASE, 0), _base_card(base, at)) for base, at in times if base > last_base]
        page = cards[:limit]
        if len(cards) <= limit:
            return [card for _, card in page], None
        (last, number), card = page[-1]
        cursor = f"{_BASE}{card['id']}" if last == _BASE else f"{last}@v{number}"
        return [card for _, card in page], cursor

    def card(self, model: str) -> dict[str, Any]:
        """Return one model object by any of the model's names. Raises NotFound as find() does."""
        found = self.find(model)
        with self._sessions.read() as session:
            if found.version is None:
                return _base_card(found.id, self._base_times(session)[found.id])
            name = found.id.partition("@")[0]
            row = session.execute(
                _VERSIONS.where(AdapterVersion.adapter == name, AdapterVersion.version == found.version)
            ).one()
            card = _version_card(row, registry.aliases_of(session, name))
        return {**card, "id": name} if model == name else card

    def _base_path(self, session: Session, model: str) -> str | None:
        folder = self._models_dir / model
        if re.match(NAME_PATTERN, model) and is_model_folder(folder):
            return str(folder)
        wanted = select(Job.base_model_path).where(Job.base_model_id == model, Job.num_committed > 0)
        return session.scalar(wanted.limit(1))

    def _base_times(self, session: Session) -> dict[str, int]:
        used = select(Job.base_model_id).where(Job.num_committed > 0).distinct()
        found: dict[str, int] = dict.fromkeys(session.scalars(used), 0)
        return found | {info.name: int(info.path.stat().st_mtime) for info in list_models(self._models_dir)}

    @staticmethod
    def _adapter_cards(session: Session, after: Place, most: int) -> list[tuple[Place, dict[str, Any]]]:
        """Return cards of adapters with their places, in order; a few more than `most` if there are more."""
        cards: list[tuple[Place, dict[str, Any]]] = []
        at_once = most // 4 + 1  # an adapter of three versions has four cards
        from_here = Adapter.name >= after[0]
        while len(cards) < most:
            wanted = select(Adapter.name).where(from_here).order_by(Adapter.name).limit(at_once)
            names = session.scalars(wanted).all()
            aliases = registry.aliases_of_all(session, names)
            order = (AdapterVersion.adapter, AdapterVersion.version)
            rows = session.execute(_VERSIONS.where(AdapterVersion.adapter.in_(names)).order_by(*order)).all()
            for name, group in groupby(rows, key=lambda row: str(row.adapter)):
                versions = {row.version: _version_card(row, aliases[name]) for row in group}
                if registry.DEFAULT_ALIAS in aliases[name]:
                    newest = versions[aliases[name][registry.DEFAULT_ALIAS]]
                    cards.append(((name, 0), {**newest, "id": name}))
                cards += [((name, number), card) for number, card in versions.items()]
            cards = [(place, card) for place, card in cards if place > after]
            if len(names) < at_once:
                break
            from_here = Adapter.name > names[-1]
        return cards


def _base_card(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": OWNER}


def _version_card(row: Any, aliases: dict[str, int]) -> dict[str, Any]:
    return {
        "id": f"{row.adapter}@v{row.version}",
        "object": "model",
        "created": int(row.created_at.timestamp()),
        "owned_by": OWNER,
        "version": row.version,
        "task": row.task_name,
        "aliases": [alias for alias, version in aliases.items() if version == row.version],
        "base_model": row.base_model,
        "data_format": row.data_format,
    }
