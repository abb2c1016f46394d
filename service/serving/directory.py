"""Which models can be asked: adapter versions by any of their names, and base models by their ids."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.adapters import registry
from service.db.session import Sessions
from service.db.tables import Adapter, AdapterVersion
from service.errors import NotFound
from service.models import is_model_folder, list_models
from service.serving.engine import AdapterRef
from service.specs import NAME_PATTERN

OWNER = "cl-peft"
_BASE_ID = AdapterVersion.manifest["base_model"]["id"].as_string()
_BASE_PATH = AdapterVersion.manifest["base_model_path"].as_string()


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

    def cards(self) -> list[dict[str, Any]]:
        """Return OpenAI model objects: each adapter's bare name, its versions oldest first, then base models.

        Beside OpenAI's fields an adapter's entry has base_model, data_format, version, task and aliases.
        """
        cards: list[dict[str, Any]] = []
        with self._sessions.read() as session:
            for adapter in session.scalars(select(Adapter).order_by(Adapter.name)):
                aliases = registry.aliases_of(session, adapter.name)
                versions = {
                    row.version: _version_card(row, aliases)
                    for row in registry.versions_of(session, adapter.name)
                }
                if registry.DEFAULT_ALIAS in aliases:
                    cards.append({**versions[aliases[registry.DEFAULT_ALIAS]], "id": adapter.name})
                cards.extend(versions.values())
            cards.extend(
                {"id": name, "object": "model", "created": created, "owned_by": OWNER}
                for name, created in sorted(self._base_times(session).items())
            )
        return cards

    def _base_path(self, session: Session, model: str) -> str | None:
        folder = self._models_dir / model
        if re.match(NAME_PATTERN, model) and is_model_folder(folder):
            return str(folder)
        return session.scalar(select(_BASE_PATH).where(_BASE_ID.in_([model])).limit(1))

    def _base_times(self, session: Session) -> dict[str, int]:
        used: dict[str, int] = dict.fromkeys(session.scalars(select(_BASE_ID).distinct()), 0)
        return used | {info.name: int(info.path.stat().st_mtime) for info in list_models(self._models_dir)}


def _version_card(row: AdapterVersion, aliases: dict[str, int]) -> dict[str, Any]:
    return {
        "id": f"{row.adapter}@v{row.version}",
        "object": "model",
        "created": int(row.created_at.timestamp()),
        "owned_by": OWNER,
        "version": row.version,
        "task": row.task_name,
        "aliases": [alias for alias, version in aliases.items() if version == row.version],
        "base_model": row.manifest["base_model"]["id"],
        "data_format": row.manifest["data_format"],
    }
