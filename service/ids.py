"""Ids that sort by their time of creation."""

from __future__ import annotations

import secrets
import time
from typing import Literal


def new_id(prefix: Literal["job", "run", "task", "ds", "req"]) -> str:
    """Return <prefix>_<microseconds, 13 hex digits><10 random hex digits>."""
    return f"{prefix}_{time.time_ns() // 1000:013x}{secrets.token_hex(5)}"
