"""Read uploaded JSON lines piece by piece and write them in one canonical form.

Memory use is one row and one piece of the upload, whatever the size. The rows become visible under the data
set's key only when all of them are right; after any error nothing is left in storage.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from anyio import CancelScope
from anyio.to_thread import run_sync

from service.adapters.storage import Storage, StorageError, dataset_key, outputs_key, unowned_key
from service.errors import Invalid, Problem, TooLarge

T = TypeVar("T")
MAX_ERRORS = 100
DRAIN_BYTES = 64 * 2**20
"""How much of a refused upload is still read: many clients send everything before they read the answer."""
_BOM = b"\xef\xbb\xbf"
_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class UploadLimit:
    """How many bytes an upload may have, and why not more."""

    num_bytes: int
    reason: str
    code: str = "upload_too_large"

    def exceeded(self, found: str) -> TooLarge:
        """Return the refusal of an upload of so many bytes."""
        return TooLarge(f"the upload has {found} bytes; {self.reason}", code=self.code)


class RowError(ValueError):
    """One row cannot be used."""


@dataclass
class TextStatistics:
    """Characters of one kind of text over all rows."""

    total: int = 0
    longest: int = 0

    def add(self, num_chars: int) -> None:
        """Count one row's text."""
        self.total += num_chars
        self.longest = max(self.longest, num_chars)

    def as_dict(self, num_rows: int) -> dict[str, float]:
        """Return total, max and mean."""
        return {"total": self.total, "max": self.longest, "mean": round(self.total / max(num_rows, 1), 2)}


@dataclass
class RowReader:
    """Cuts pieces of an upload into lines, checks each row and passes its canonical bytes to `write`."""

    max_row_bytes: int
    write: Callable[[bytes], Any]
    format: str | None = None
    num_rows: int = 0
    num_bytes: int = 0
    """Canonical bytes written."""
    errors: list[Problem] = field(default_factory=list)
    digest: Any = field(default_factory=hashlib.sha256)
    prompt: TextStatistics = field(default_factory=TextStatistics)
    completion: TextStatistics = field(default_factory=TextStatistics)
    _rest: bytearray = field(default_factory=bytearray)
    _line_number: int = 1
    _is_skipping: bool = False
    """The current line is too long already; its rest is dropped."""

    @property
    def is_full(self) -> bool:
        """Are there as many errors as an answer holds?"""
        return len(self.errors) >= MAX_ERRORS

    def feed(self, piece: bytes) -> None:
        """Take the next piece of the upload."""
        *ended, rest = piece.split(b"\n")
        for part in ended:
            self._extend(part)
            self._end_line()
        self._extend(rest)

    def finish(self) -> None:
        """Take what is left as the last line. An upload without rows is an error."""
        self._end_line()
        if not self.num_rows and not self.errors:
            self.errors.append(Problem("/", "the data set is empty: no rows"))

    def statistics(self) -> dict[str, Any]:
        """Rows, and characters of what is given (prompt) and what is trained (completion)."""
        return {
            "num_rows": self.num_rows,
            "prompt_chars": self.prompt.as_dict(self.num_rows),
            "completion_chars": self.completion.as_dict(self.num_rows),
        }

    def _extend(self, part: bytes) -> None:
        if self._is_skipping:
            return
        self._rest += part
        if len(self._rest) > self.max_row_bytes + len(_BOM) + 1:  # + 1: the \r of a line end
            self._error(f"the row has more than {self.max_row_bytes} bytes")
            self._is_skipping = True

    def _end_line(self) -> None:
        line = bytes(self._rest).removesuffix(b"\r")
        if self._line_number == 1:
            line = line.removeprefix(_BOM)
        if not self._is_skipping and line.strip() and not self.is_full:
            self._take(line)
        self._rest.clear()
        self._is_skipping = False
        self._line_number += 1

    def _take(self, line: bytes) -> None:
        try:
            if len(line) > self.max_row_bytes:
                raise RowError(f"the row has more than {self.max_row_bytes} bytes")
            row, found, given_chars, trained_chars = _check_row(_parse(line))
            if self.format is not None and found != self.format:
                raise RowError(f"has {found} in a data set of {self.format} rows; a data set has one format")
            data = json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
        except UnicodeEncodeError:
            self._error("holds half of a surrogate pair, which is no text")
            return
        except RowError as error:
            self._error(str(error))
            return
        self.format = found
        self.num_rows += 1
        self.num_bytes += len(data)
        self.digest.update(data)
        self.prompt.add(given_chars)
        self.completion.add(trained_chars)
        if not self.errors:
            self.write(data)

    def _error(self, detail: str) -> None:
        if not self.is_full:
            self.errors.append(Problem(f"/lines/{self._line_number}", f"line {self._line_number}: {detail}"))


@dataclass(frozen=True)
class StoredRows:
    """What is known of rows that are in storage now."""

    format: str
    num_rows: int
    bytes: int
    sha256: str
    statistics: dict[str, Any]


async def store_rows(
    pieces: AsyncIterator[bytes],
    *,
    storage: Storage,
    dataset_id: str,
    limit: UploadLimit,
    max_row_bytes: int,
) -> StoredRows:
    """Read an upload to its end and store its rows.

    Raises TooLarge over the limit, Invalid with up to 100 errors that name their lines, StorageError.
    """
    async with _in_thread(storage.open_new(dataset_key(dataset_id))) as file:
        reader = RowReader(max_row_bytes, file.write)
        await _read_all(pieces, reader, limit)
        if reader.errors:
            count = f"{len(reader.errors)} or more rows" if reader.is_full else f"{len(reader.errors)} errors"
            more = f" ({count})" if len(reader.errors) > 1 else ""
            raise Invalid(f"{reader.errors[0].detail}{more}", code="invalid_rows", problems=reader.errors)
    return StoredRows(
        format=str(reader.format),
        num_rows=reader.num_rows,
        bytes=reader.num_bytes,
        sha256=reader.digest.hexdigest(),
        statistics=reader.statistics(),
    )


@asynccontextmanager
async def unowned(storage: Storage, dataset_id: str) -> AsyncIterator[None]:
    """Mark the data set's files as nobody's until the block ends; after an error they are removed.

    What is marked and unknown to the database is cleaned up later (service.jobs.clean). Raises StorageError.
    """
    await run_sync(storage.write_bytes, unowned_key(dataset_id), b"")
    try:
        yield
    except BaseException:
        with CancelScope(shield=True), suppress(StorageError):
            await run_sync(remove_files, storage, dataset_id)
        raise
    with suppress(StorageError):
        await run_sync(storage.delete, unowned_key(dataset_id))


def remove_files(storage: Storage, dataset_id: str) -> None:
    """Remove a data set's rows and what models answered to them; the mark goes last. Raises StorageError."""
    storage.delete(outputs_key(dataset_id))
    storage.delete(dataset_key(dataset_id))
    storage.delete(f"datasets/{dataset_id}")


@asynccontextmanager
async def _in_thread(manager: AbstractContextManager[T]) -> AsyncIterator[T]:
    """Enter and leave a blocking context outside the event loop; a cancelled one leaves it too."""
    value = await run_sync(manager.__enter__)
    try:
        yield value
    except BaseException as error:
        with CancelScope(shield=True):
            await run_sync(manager.__exit__, type(error), error, error.__traceback__)
        raise
    await run_sync(manager.__exit__, None, None, None)


async def _read_all(pieces: AsyncIterator[bytes], reader: RowReader, limit: UploadLimit) -> None:
    num_bytes = 0
    async for piece in pieces:
        num_bytes += len(piece)
        if num_bytes > limit.num_bytes:
            await drain(pieces)
            raise limit.exceeded(f"more than {limit.num_bytes}")
        if reader.is_full:
            await drain(pieces)
            return
        await run_sync(reader.feed, piece)
    await run_sync(reader.finish)


async def drain(pieces: AsyncIterator[bytes]) -> None:
    """Read on and forget, up to DRAIN_BYTES."""
    num_bytes = 0
    async for piece in pieces:
        num_bytes += len(piece)
        if num_bytes > DRAIN_BYTES:
            return


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise RowError(f"is not UTF-8 at byte {error.start + 1}") from error
    except json.JSONDecodeError as error:
        raise RowError(f"malformed JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # a number too long, or nested too deep
        raise RowError(f"malformed JSON: {error}") from error


def _check_row(row: Any) -> tuple[dict[str, Any], str, int, int]:
    """Return the canonical row, its format, and the characters that are given and trained."""
    if not isinstance(row, dict):
        raise RowError(f"a row must be an object, got {type(row).__name__}")
    if "messages" in row and ("prompt" in row or "completion" in row):
        raise RowError("give messages, or prompt and completion, not both")
    if "messages" in row:
        _only(row, ("messages",))
        messages, given_chars, trained_chars = _check_messages(row["messages"])
        return {"messages": messages}, "messages", given_chars, trained_chars
    _only(row, ("prompt", "completion"))
    for name in ("prompt", "completion"):
        if name not in row:
            raise RowError(f"has no {name}; a row has prompt and completion, or messages")
        if not isinstance(row[name], str):
            raise RowError(f"{name} must be text, got {type(row[name]).__name__}")
    if not row["completion"].strip():
        raise RowError("completion is empty")
    text = {"prompt": row["prompt"], "completion": row["completion"]}
    return text, "completion", len(row["prompt"]), len(row["completion"])


def _check_messages(messages: Any) -> tuple[list[dict[str, str]], int, int]:
    if not isinstance(messages, list) or not messages:
        raise RowError("messages must be a list with at least one message")
    checked = []
    for position, message in enumerate(messages):
        if not isinstance(message, dict):
            raise RowError(f"message {position} must be an object, got {type(message).__name__}")
        _only(message, ("role", "content"))
        role, content = message.get("role"), message.get("content")
        if role not in _ROLES:
            raise RowError(f"message {position} has role {role!r}; allowed: {', '.join(_ROLES)}")
        if not isinstance(content, str):
            raise RowError(f"content of message {position} must be text, got {type(content).__name__}")
        checked.append({"role": role, "content": content})
    if checked[-1]["role"] != "assistant" or not checked[-1]["content"].strip():
        raise RowError("the last message must be the assistant's and not empty: it is what is trained")
    return checked, sum(len(message["content"]) for message in checked[:-1]), len(checked[-1]["content"])


def _only(value: dict[str, Any], allowed: tuple[str, ...]) -> None:
    unknown = sorted(set(value) - set(allowed))
    if unknown:
        raise RowError(
            f"unknown field {', '.join(repr(name[:50]) for name in unknown)}; allowed: {', '.join(allowed)}"
        )
