"""Make values that both databases take, and the same ones.

PostgreSQL has no NUL in text, UTF-8 no half of a surrogate pair, JSON no NaN; users and workers send all.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

REPLACEMENT = "\ufffd"


def storable(text: str) -> str:
    """Return text with what cannot be stored replaced by U+FFFD."""
    if "\0" in text:
        text = text.replace("\0", REPLACEMENT)
    if not text.isascii():
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def to_json(value: Any) -> str:
    """Write JSON; NaN and infinities become null."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except ValueError:  # not a number, or half of a surrogate pair
        return json.dumps(_storable(value), ensure_ascii=False)
    return json.dumps(_storable(value), ensure_ascii=False) if "\\u0000" in text else text


def clean_parameters(
    _connection: Any,
    _cursor: Any,
    statement: str,
    parameters: Any,
    _context: Any,
    _executemany: bool,
) -> tuple[str, Any]:
    """Make a statement's parameters storable: SQLAlchemy's before_cursor_execute with retval."""
    return statement, _storable_parameters(parameters)


def _storable_parameters(parameters: Any) -> Any:
    if isinstance(parameters, str):
        return storable(parameters)
    if isinstance(parameters, Mapping):
        return {name: _storable_parameters(value) for name, value in parameters.items()}
    if isinstance(parameters, tuple | list):
        return type(parameters)(_storable_parameters(value) for value in parameters)
    return parameters


def _storable(value: Any) -> Any:
    if isinstance(value, str):
        return storable(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {_storable(key): _storable(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_storable(item) for item in value]
    return value
