"""The calls that a running attempt may make: progress, checkpoint, log lines, finishing in a transaction of its own.

All are fenced by the lease token. What a call learns (the lease is lost, the cancellation was requested) ends the
attempt as a heartbeat's answer would; the handler need not look at it.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from enum import StrEnum
from typing import Any, Protocol

import anyio
import msgspec

from clarion.endings import Endings
from clarion.errors import LeaseLost, Unavailable, UsageError
from clarion.execution import Beat, Completion, Lease
from clarion.loops import backoff_seconds
from clarion.settings import Settings
from clarion.store import Store
from clarion.texts import PROGRESS_MESSAGE_MAX_CHARS, storable
from clarion_worker.leases import EndReason, Held
from clarion_worker.lines import Lines
from clarion_worker.results import encode_result


class Standing(StrEnum):
    """How an attempt stands after a call."""

    HELD = "held"
    CANCELLED = "cancelled"
    LOST = "lost"


class Connection(Protocol):
    """An asyncpg connection, as far as `complete_in` needs it."""

    async def fetch(self, query: str, *args: Any) -> list[Any]:
        """Runs a statement."""

    def is_in_transaction(self) -> bool:
        """Whether a transaction is open."""


class Calls:
    """What one attempt says while it runs."""

    def __init__(
        self, held: Held, endings: Endings, settings: Settings, *, valid_until: Callable[[float], float]
    ) -> None:
        self.held = held
        self.lines = Lines(held.lease, endings, lines_max=settings.job_log_max_lines)
        self._endings = endings
        self._settings = settings
        self._valid_until = valid_until

    async def beat(self, progress: str | None = None, checkpoint: str | None = None) -> Standing:
        """Extends the lease and keeps what is given, as JSON text. Waits through weather, as long as it is held."""
        held, failures = self.held, 0
        beat = Beat(id=held.lease.id, token=held.lease.token, progress=progress, checkpoint=checkpoint)
        while not (held.ending or held.finishing):
            sent = time.monotonic()
            try:
                answer = await self._endings.beat(beat)
            except Unavailable:
                failures += 1
                await anyio.sleep(backoff_seconds(failures))
                continue
            if answer is None:
                held.end(EndReason.LOST)
                return Standing.LOST
            if answer.cancelled:
                held.end(EndReason.CANCELLED)
                return Standing.CANCELLED
            held.renew(answer, self._valid_until(sent), sent)
            return Standing.HELD
        return Standing.CANCELLED if held.end_reason is EndReason.CANCELLED else Standing.LOST

    async def hear(self, kind: str, content: object) -> object:
        """What a handler in a process of its own says through these calls."""
        match kind, content:
            case "beat", [str() | None as progress, str() | None as checkpoint]:
                return await self.beat(progress, checkpoint)
            case "line", [str(level), str(message), dict(fields)]:
                self.lines.add(level, message, fields)
            case "committing", _:
                await self._prepare_commit()
            case _:
                raise ValueError(f"no handler says {kind!r}")
        return None

    async def complete_in(self, connection: Connection, result: object) -> None:
        """Finishes the job in an open transaction; see Context.complete_in."""
        encoded = result_to_commit(connection, result, settings=self._settings)
        await self._prepare_commit()
        await complete_on(connection, self.held.lease, encoded, settings=self._settings)

    async def _prepare_commit(self) -> None:
        """Stores the lines so far, while the token holds the row and nobody has locked it.

        From before the completion, no heartbeat may take the row's absence after the commit for a lost lease.
        """
        with suppress(Unavailable):
            await self.lines.flush()
        self.lines.closed = True
        self.held.committing = True

    def is_ending(self) -> bool:
        """Whether the handler is to end."""
        return self.held.is_ending()


def result_to_commit(connection: Connection, result: object, *, settings: Settings) -> str | None:
    """The result as JSON text; raises UsageError where no transaction is open, ValueError for what cannot be stored."""
    if not connection.is_in_transaction():
        raise UsageError("complete_in needs an open transaction: async with connection.transaction(): …")
    return encode_result(result, max_bytes=settings.result_max_bytes)


async def complete_on(connection: Connection, lease: Lease, encoded: str | None, *, settings: Settings) -> None:
    """Finishes a job in the transaction that is open on the connection; raises LeaseLost."""
    (answer,) = await Store(connection, settings).complete_jobs([Completion(lease.id, lease.token, encoded)])
    if answer.state is None:
        raise LeaseLost


def progress_json(current: float | None, total: float | None, message: str | None) -> str:
    """Progress as it is stored."""
    said = {
        "current": current,
        "total": total,
        "message": None if message is None else storable(message, PROGRESS_MESSAGE_MAX_CHARS),
    }
    return msgspec.json.encode(said).decode()
