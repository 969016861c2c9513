"""Runs one attempt: decode, call, and turn whatever happens into the outcome to be recorded."""

import asyncio
from collections.abc import Mapping
from functools import partial
from typing import Any

import anyio
import anyio.to_thread
import structlog
from structlog.typing import FilteringBoundLogger

from clarion.job import Completion, DeadReason, Failure, Release, Snoozing
from clarion_worker.context import Context
from clarion_worker.leases import EndReason, Held
from clarion_worker.outcomes import Discard, Snooze, failure, timed_out
from clarion_worker.registry import Task
from clarion_worker.results import encode_result

# None: the lease is lost, and with it the right to record anything.
Outcome = Completion | Failure | Snoozing | Release | None


class Runner:
    """Runs attempts of the given tasks; `threads_max` bounds handlers that are not async."""

    def __init__(self, tasks: Mapping[str, Task[..., Any]], *, threads_max: int, result_max_bytes: int) -> None:
        self._tasks = tasks
        self._threads = anyio.CapacityLimiter(threads_max)
        self._result_max_bytes = result_max_bytes

    async def run(self, held: Held) -> Outcome:
        """The outcome of one attempt; never raises for anything that a handler does."""
        lease = held.lease
        task = self._tasks[lease.task]
        log = structlog.get_logger().bind(job_id=str(lease.id), task=lease.task, attempt=lease.attempt)
        try:
            arguments = task.arguments.decode(lease.args)
        except ValueError as error:
            return failure(lease, error, dead_reason=DeadReason.UNDECODABLE_PAYLOAD)
        if lease.timeout_seconds is not None:
            held.scope.deadline = anyio.current_time() + lease.timeout_seconds
        outcome: Outcome = None
        with held.scope:
            outcome = await self._call(task, arguments, held, log)
        # A handler that was told to stop and then raised something of its own did not fail: it was ended. One that
        # returned a result all the same succeeded: the result came first.
        ended = held.scope.cancelled_caught or (held.is_cancelled() and isinstance(outcome, Failure))
        return self._ended(held) if ended else outcome

    async def _call(
        self, task: Task[..., Any], arguments: dict[str, Any], held: Held, log: FilteringBoundLogger
    ) -> Outcome:
        lease = held.lease
        if task.arguments.wants_context:
            arguments["ctx"] = Context(lease, log, held.is_cancelled)
        try:
            result = await self._invoke(task, arguments)
        except Snooze as wish:
            return Snoozing(lease.id, lease.token, wish.delay_seconds)
        except Discard as decision:
            return failure(lease, decision, dead_reason=DeadReason.NOT_RETRYABLE)
        except asyncio.CancelledError as error:
            if _was_cancelled():
                raise
            return failure(lease, error)  # the handler cancelled itself: an ordinary failure
        except (Exception, SystemExit) as error:  # noqa: BLE001  whatever a handler raises is its attempt's failure
            return failure(lease, error)
        try:
            return Completion(lease.id, lease.token, encode_result(result, max_bytes=self._result_max_bytes))
        except ValueError as error:
            return failure(lease, error, dead_reason=DeadReason.RESULT_UNSTORABLE)

    async def _invoke(self, task: Task[..., Any], arguments: dict[str, Any]) -> Any:
        if task.is_async:
            return await task.handler(**arguments)
        # Ended from outside, the thread is left to finish by itself: threads cannot be killed.
        call = partial(task.handler, **arguments)
        return await anyio.to_thread.run_sync(call, abandon_on_cancel=True, limiter=self._threads)

    def _ended(self, held: Held) -> Outcome:
        lease = held.lease
        if held.end_reason is None:
            return timed_out(lease)
        if held.end_reason is EndReason.LOST:
            return None
        # Drained, or fenced while the database was silent: if the token still holds the job, it goes back at once.
        return Release(lease.id, lease.token)


def _was_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
