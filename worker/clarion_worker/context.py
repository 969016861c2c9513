"""What a handler may ask and say about its job: `Context` in `async def` handlers, `SyncContext` in others."""

import asyncio
from typing import Any, Protocol

import anyio.from_thread
import msgspec

from clarion.errors import LeaseLost
from clarion.execution import Lease
from clarion_worker.calls import Calls, Connection, Standing, progress_json
from clarion_worker.lines import HandlerLog
from clarion_worker.outcomes import Cancelled
from clarion_worker.results import encode_result

CHECKPOINT_MAX_BYTES = 1_048_576
# Longer than the runner takes to cancel an attempt that is to end.
_CANCELLATION_SECONDS = 3.0


class AsyncCalls(Protocol):
    """How a handler on an event loop speaks for its attempt."""

    async def beat(self, progress: str | None, checkpoint: str | None) -> Standing:
        """Extends the lease."""

    async def complete_in(self, connection: Connection, result: object) -> None:
        """Finishes the job in an open transaction."""

    def is_ending(self) -> bool:
        """Whether the attempt is to end."""


class SyncCalls(Protocol):
    """How a handler anywhere else does."""

    def beat(self, progress: str | None, checkpoint: str | None) -> Standing:
        """Extends the lease; waits for the answer."""

    def is_ending(self) -> bool:
        """Whether the attempt is to end."""


class _Attempt:
    """What both contexts know."""

    def __init__(self, lease: Lease, log: HandlerLog, state: Any) -> None:
        self.job = lease
        self.log = log
        self.state = state

    @property
    def attempt(self) -> int:
        """Which run of the job this is, from 1."""
        return self.job.attempt

    @property
    def checkpoint(self) -> Any:
        """What an earlier attempt left with `heartbeat(checkpoint)`; None when none did."""
        return None if self.job.checkpoint is None else msgspec.json.decode(self.job.checkpoint)


class Context(_Attempt):
    """Given to an `async def` handler that has a parameter `ctx`.

    `job` is the lease with the job's data, `log` a log whose lines are shown with the job, `state` what the worker's
    lifespan yielded.
    """

    def __init__(self, lease: Lease, log: HandlerLog, calls: AsyncCalls, state: Any = None) -> None:
        super().__init__(lease, log, state)
        self._calls = calls

    @property
    def cancelled(self) -> bool:
        """Whether the attempt was ended from outside; the handler is cancelled at its next `await`."""
        return self._calls.is_ending()

    async def progress(self, current: float, total: float | None = None, message: str | None = None) -> None:
        """Says how far the work is: stored with the job, and the lease is extended.

        The handler is cancelled here when the job's cancellation was requested, or when it is another's by now.
        """
        await self._beat(progress_json(current, total, message), None)

    async def heartbeat(self, checkpoint: Any = None) -> None:
        """Extends the lease, and keeps a checkpoint for the next attempt, should this one not succeed.

        Ends the handler as `progress` does; raises ValueError for a checkpoint that JSON or Postgres cannot hold.
        """
        await self._beat(None, encode_result(checkpoint, max_bytes=CHECKPOINT_MAX_BYTES))

    async def complete_in(self, connection: Connection, result: Any = None) -> None:
        """Finishes the job in your own transaction, on an asyncpg connection to the same database.

        What the transaction writes then happens exactly once: it and the completion are committed together, or neither
        is. Return after the commit; the handler's own return value is not used, and what it logs from here on is not
        kept with the job. Raises LeaseLost when the job is another's by now, and the transaction must be given up;
        UsageError when none is open.
        """
        await self._calls.complete_in(connection, result)

    async def _beat(self, progress: str | None, checkpoint: str | None) -> None:
        standing = await self._calls.beat(progress, checkpoint)
        if standing is not Standing.HELD:
            # The attempt is being ended: its one cancellation arrives here, unless this is a task it has left behind.
            await asyncio.sleep(_CANCELLATION_SECONDS)
            raise asyncio.CancelledError if standing is Standing.CANCELLED else LeaseLost


class SyncContext(_Attempt):
    """Given to a handler in a thread or a process that has a parameter `ctx`: the same, but its calls block."""

    def __init__(self, lease: Lease, log: HandlerLog, calls: SyncCalls, state: Any = None) -> None:
        super().__init__(lease, log, state)
        self._calls = calls

    @property
    def cancelled(self) -> bool:
        """Whether the attempt was ended from outside (lease lost, timeout, cancel, shutdown): look now and then."""
        return self._calls.is_ending()

    def progress(self, current: float, total: float | None = None, message: str | None = None) -> None:
        """Says how far the work is: stored with the job, and the lease is extended.

        Raises Cancelled when the job's cancellation was requested, LeaseLost when it is another's by now.
        """
        self._beat(progress_json(current, total, message), None)

    def heartbeat(self, checkpoint: Any = None) -> None:
        """Extends the lease, and keeps a checkpoint for the next attempt, should this one not succeed.

        Raises as `progress` does, and ValueError for a checkpoint that JSON or Postgres cannot hold.
        """
        self._beat(None, encode_result(checkpoint, max_bytes=CHECKPOINT_MAX_BYTES))

    def _beat(self, progress: str | None, checkpoint: str | None) -> None:
        standing = self._calls.beat(progress, checkpoint)
        if standing is Standing.CANCELLED:
            raise Cancelled
        if standing is Standing.LOST:
            raise LeaseLost


class ThreadCalls:
    """From a thread to the event loop that started it."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def beat(self, progress: str | None, checkpoint: str | None) -> Standing:
        """Extends the lease; waits for the answer."""
        return anyio.from_thread.run(self._calls.beat, progress, checkpoint)

    def is_ending(self) -> bool:
        """Whether the attempt is to end."""
        return self._calls.is_ending()
