"""Ids that sort by their time of creation."""

from __future__ import annotations

import secrets
import time
from datetime import UTC, datetime
from typing import Literal


def new_id(prefix: Literal["job", "run", "task", "ds", "req"]) -> str:
    """Return <prefix>_<microseconds, 13 hex digits><10 random hex digits>."""
    return f"{prefix}_{time.time_ns() // 1000:013x}{secrets.token_hex(5)}"


def created_at(id_: str) -> datetime:
    """Return the time of an id that new_id gave. Raises ValueError for any other text."""
    _, found, rest = id_.partition("_")
    if not found or len(rest) != 23:
        raise ValueError(f"{id_!r} is no id of this service")
    return datetime.fromtimestamp(int(rest[:13], 16) / 1e6, UTC)
