"""Runs one attempt: decode, call, and turn whatever happens into the outcome to be recorded.

A handler runs in a task of its own, so that nothing it does to its task (cancelling it, swallowing a cancellation,
setting context variables) reaches anybody else. To end it, the task is cancelled once, as asyncio does it. A handler
that does not end then is *stuck*: its outcome is recorded without it and its slot is free, while the task, or the
thread it sits in, is left behind, since neither can be killed. A job whose earlier attempt is still stuck here does not
start a second time beside it.
"""

import asyncio
import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any
from uuid import UUID

import anyio
import anyio.to_thread
import structlog

from clarion.events import Event
from clarion.execution import Completion, Failure, Release, Snoozing
from clarion.job import DeadReason
from clarion_worker.context import Context
from clarion_worker.leases import EndReason, Held
from clarion_worker.outcomes import Discard, Snooze, failure, timed_out
from clarion_worker.registry import Task
from clarion_worker.results import encode_result

log = structlog.get_logger()

# None: the lease is lost, and with it the right to record anything.
Outcome = Completion | Failure | Snoozing | Release | None

# A cancelled handler gets this long to end before it counts as stuck.
CANCEL_GRACE_SECONDS = 3.0
_STUCK_RETRY_SECONDS = 5.0


class Runner:
    """Runs attempts of the given tasks; `threads_max` bounds the handlers that are not async and not stuck."""

    def __init__(self, tasks: Mapping[str, Task[..., Any]], *, threads_max: int, result_max_bytes: int) -> None:
        self._tasks = tasks
        self._threads = anyio.CapacityLimiter(threads_max)
        self._result_max_bytes = result_max_bytes
        self._stuck: dict[asyncio.Task[Outcome], UUID] = {}

    @property
    def stuck(self) -> int:
        """Handlers that were told to end and did not."""
        return len(self._stuck)

    async def run(self, held: Held) -> Outcome:
        """The outcome of one attempt; never raises for anything that a handler does."""
        lease = held.lease
        if held.ending:
            return _ended(held)
        if lease.id in self._stuck.values():
            return Snoozing(lease.id, lease.token, _STUCK_RETRY_SECONDS)
        # Not in a task group: one could not let go of a handler that is stuck.
        task = asyncio.create_task(self._attempt(held), name=f"{lease.task} {lease.id}")
        task.add_done_callback(lambda _: held.changed.set())
        try:
            with anyio.move_on_after(lease.timeout_seconds):
                await held.changed.wait()
            if not task.done():
                held.end(EndReason.TIMED_OUT)
                await _end(task, held)
        except BaseException:
            task.cancel()  # this worker itself is cancelled
            raise
        return self._outcome(held, task)

    def _outcome(self, held: Held, task: asyncio.Task[Outcome]) -> Outcome:
        if not task.done():
            self._leave_behind(held, task)
            return _ended(held)
        if task.cancelled():
            cancelled = asyncio.CancelledError("the handler cancelled itself")
            return _ended(held) if held.ending else failure(held.lease, cancelled)
        outcome = task.result()
        # A handler that was told to end and then raised something of its own did not fail: it was ended. One that
        # returned a result all the same succeeded: the result came first.
        return _ended(held) if held.ending and isinstance(outcome, Failure) else outcome

    async def _attempt(self, held: Held) -> Outcome:
        lease = held.lease
        task = self._tasks[lease.task]
        try:
            arguments = task.arguments.decode(lease.args)
        except ValueError as error:
            return failure(lease, error, dead_reason=DeadReason.UNDECODABLE_PAYLOAD)
        if task.arguments.wants_context:
            bound = log.bind(job_id=str(lease.id), task=lease.task, attempt=lease.attempt)
            arguments["ctx"] = Context(lease, bound, held.is_ending)
        try:
            result = await self._invoke(task, arguments, held)
        except Snooze as wish:
            return Snoozing(lease.id, lease.token, wish.delay_seconds)
        except Discard as decision:
            return failure(lease, decision, dead_reason=DeadReason.NOT_RETRYABLE)
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # noqa: BLE001  whatever a handler raises is its attempt's failure
            return failure(lease, error)
        try:
            return Completion(lease.id, lease.token, encode_result(result, max_bytes=self._result_max_bytes))
        except ValueError as error:
            return failure(lease, error, dead_reason=DeadReason.RESULT_UNSTORABLE)

    async def _invoke(self, task: Task[..., Any], arguments: dict[str, Any], held: Held) -> Any:
        if task.is_async:
            return await task.handler(**arguments)
        held.in_thread = True
        result = await anyio.to_thread.run_sync(partial(task.handler, **arguments), limiter=self._threads)
        held.in_thread = False
        return await result if inspect.isawaitable(result) else result

    def _leave_behind(self, held: Held, task: asyncio.Task[Outcome]) -> None:
        lease, in_thread = held.lease, held.in_thread
        log.warning(Event.ATTEMPT_STUCK, job_id=str(lease.id), task=lease.task, attempt=lease.attempt)
        self._stuck[task] = lease.id
        self._threads.total_tokens += in_thread

        def ended(_task: object) -> None:
            del self._stuck[task]
            self._threads.total_tokens -= in_thread

        task.add_done_callback(ended)


async def _end(task: asyncio.Task[Outcome], held: Held) -> None:
    """Asks the handler to end, and gives it its grace."""
    done = anyio.Event()
    task.add_done_callback(lambda _: done.set())
    # A thread would go on unseen; its handler learns of the end from `ctx.cancelled`.
    if not held.in_thread:
        task.cancel()
    with anyio.move_on_after(CANCEL_GRACE_SECONDS):
        await done.wait()


def _ended(held: Held) -> Outcome:
    """The outcome of an attempt that was ended from outside."""
    lease = held.lease
    if held.end_reason is EndReason.TIMED_OUT:
        return timed_out(lease)
    if held.end_reason is EndReason.LOST:
        return None
    # Drained, or fenced while the database was silent: if the token still holds the job, it goes back at once.
    return Release(lease.id, lease.token)
