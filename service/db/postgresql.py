"""Connections to PostgreSQL that never wait without end. Imported only where the URL asks for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import psycopg
from psycopg.abc import PQGen
from psycopg.pq import TransactionStatus

CONNECT_TIMEOUT_S = 5
STATEMENT_TIMEOUT_S = 30
LOCK_TIMEOUT_S = 10
IDLE_TIMEOUT_S = 15
"""A transaction that is silent for so long is rolled back: its process is frozen, and holds locks."""
ANSWER_TIMEOUT_S = STATEMENT_TIMEOUT_S + 5.0
"""The server ends a statement itself before this; later it is frozen or out of reach."""
MIGRATION_LOCK_TIMEOUT_S = 300
APPLICATION_NAME = "cl-peft"
_KEEPALIVE = {
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 2,
    "tcp_user_timeout": 20_000,
}
"""A link that is cut in silence is noticed in 20 s. Seconds, and for the last one milliseconds."""
T = TypeVar("T")


def connection_parameters(given: Mapping[str, Any], *, migrates: bool) -> dict[str, Any]:
    """Return the parameters of every connection; those in the URL, `given`, win."""
    seconds = {
        "statement_timeout": 0 if migrates else STATEMENT_TIMEOUT_S,
        "lock_timeout": MIGRATION_LOCK_TIMEOUT_S if migrates else LOCK_TIMEOUT_S,
        "idle_in_transaction_session_timeout": MIGRATION_LOCK_TIMEOUT_S if migrates else IDLE_TIMEOUT_S,
    }
    ours = " ".join(f"-c {name}={value}s" for name, value in seconds.items())
    return {
        "connect_timeout": CONNECT_TIMEOUT_S,
        "application_name": APPLICATION_NAME,
        **_KEEPALIVE,
        **given,
        "options": f"{ours} {given.get('options', '')}".strip(),  # the server takes the last one of a name
    }


def connect(*args: Any, patient: bool, **given: Any) -> psycopg.Connection[Any]:
    """Open a connection; a patient one waits for its answers without end."""
    return (psycopg.Connection if patient else _Connection).connect(*args, **given)


class _Connection(psycopg.Connection[Any]):
    """Gives up, and closes itself, when the server takes a statement and does not answer."""

    def wait(self, gen: PQGen[T], interval: float = 0.1, timeout: float | None = None) -> T:
        """Wait for an answer. Raises psycopg.OperationalError after ANSWER_TIMEOUT_S."""
        try:
            return super().wait(gen, interval, ANSWER_TIMEOUT_S if timeout is None else timeout)
        except psycopg.OperationalError:
            if self.pgconn.transaction_status == TransactionStatus.ACTIVE:
                self.pgconn.finish()  # an answer may still come, and would be taken for the next one's
            raise
