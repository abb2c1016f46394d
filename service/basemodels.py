"""Which base models a job may name, and where they are."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from service.errors import Invalid, Problem
from service.specs import BaseModelSpec

POINTER = "/base_model/id"
HUB_TIMEOUT_S = 5.0
_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_ID_PATTERN = re.compile(rf"^{_PART}(/{_PART})?$")


@dataclass(frozen=True)
class KnownModel:
    """A prepared base model."""

    id: str
    path: str


def known_models(models_dir: Path) -> list[KnownModel]:
    """Return the prepared models: folders, or folders of folders, with a config.json."""
    configs = sorted([*models_dir.glob("*/config.json"), *models_dir.glob("*/*/config.json")])
    ids = [config.parent.relative_to(models_dir).as_posix() for config in configs]
    return [KnownModel(id=name, path=str(models_dir / name)) for name in ids if _is_id(name)]


def find_base_model(spec: BaseModelSpec, models_dir: Path) -> str:
    """Return the folder of a prepared model, or a hub id that the hub confirms.

    Raises Invalid that names the prepared models.
    """
    if not _is_id(spec.id):
        known = _names(models_dir)
        raise _unknown(f"{spec.id!r} is no model id; give a name or org/name; prepared here: {known}")
    if (models_dir / spec.id / "config.json").is_file():
        if spec.revision is not None:
            raise Invalid(
                f"base model {spec.id!r} is prepared here and has no revisions, got {spec.revision!r}",
                problems=[Problem("/base_model/revision", "prepared models have no revisions")],
            )
        return str(models_dir / spec.id)
    known = _names(models_dir)
    if "/" not in spec.id:
        raise _unknown(
            f"unknown base model {spec.id!r}; prepared here: {known}; a hub id has the form org/name"
        )
    _ask_hub(spec, known)
    return spec.id


def _names(models_dir: Path) -> str:
    return ", ".join(model.id for model in known_models(models_dir)) or "none"


def _is_id(name: str) -> bool:
    return _ID_PATTERN.match(name) is not None and ".." not in name


def _ask_hub(spec: BaseModelSpec, known: str) -> None:
    from huggingface_hub import HfApi  # takes long to import and is seldom needed
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    where = f"base model {spec.id!r}" + (f" at revision {spec.revision!r}" if spec.revision else "")
    try:
        HfApi().model_info(spec.id, revision=spec.revision, timeout=HUB_TIMEOUT_S)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise _unknown(f"unknown {where}: the hub has none; prepared here: {known}") from error
    except Exception as error:  # its client raises errors of several HTTP libraries
        kind = type(error).__name__
        raise _unknown(
            f"unknown {where}: not prepared here ({known}), and the hub does not answer ({kind})"
        ) from error


def _unknown(detail: str) -> Invalid:
    return Invalid(detail, code="unknown_base_model", problems=[Problem(POINTER, detail)])
