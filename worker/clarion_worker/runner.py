"""Runs one attempt: decode, call, and turn whatever happens into the outcome to be recorded.

A handler runs in a task of its own, so that nothing it does to its task (cancelling it, swallowing a cancellation,
setting context variables) reaches anybody else. To end it, the task is cancelled once, as asyncio does it. A handler
that does not end then is *stuck*: its outcome is recorded without it and its slot is free, while the task, or the
thread it sits in, is left behind, since neither can be killed. A job whose earlier attempt is still stuck here does not
start a second time beside it. A handler in a process of its own is never stuck: that one is killed.
"""

import asyncio
import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any
from uuid import UUID

import anyio
import anyio.to_thread
import msgspec
import structlog

from clarion.endings import Endings
from clarion.events import Event
from clarion.execution import Completion, Failure, Release, Snoozing
from clarion.job import DeadReason
from clarion.settings import Settings
from clarion_worker.arguments import CONTEXT_PARAMETER
from clarion_worker.calls import Calls
from clarion_worker.context import Context, SyncContext, ThreadCalls
from clarion_worker.frames import Target
from clarion_worker.leases import EndReason, Held, Leases
from clarion_worker.lines import HandlerLog, LineKeeper
from clarion_worker.outcomes import Discard, Snooze, failure, timed_out
from clarion_worker.processes import ProcessDied, Processes
from clarion_worker.registry import Lifespan, Task
from clarion_worker.results import encode_result

log = structlog.get_logger()

# None: the lease is lost, and with it the right to record anything.
Outcome = Completion | Failure | Snoozing | Release | None

# A cancelled handler gets this long to end before it counts as stuck.
CANCEL_GRACE_SECONDS = 3.0
_STUCK_RETRY_SECONDS = 5.0


class Equipment(msgspec.Struct, frozen=True, kw_only=True):
    """What attempts of one worker share; `states` holds what each lifespan yielded."""

    tasks: Mapping[str, Task[..., Any]]
    endings: Endings
    keeper: LineKeeper
    processes: Processes
    targets: Mapping[str, Target]
    states: Mapping[Lifespan, Any]


class Runner:
    """Runs attempts; `threads_max` bounds the handlers that are in threads and not stuck."""

    def __init__(self, equipment: Equipment, leases: Leases, settings: Settings) -> None:
        self._equipment = equipment
        self._leases = leases
        self._settings = settings
        self._threads = anyio.CapacityLimiter(settings.concurrency)
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
            return Snoozing(lease.id, lease.token, _STUCK_RETRY_SECONDS, counted=False)
        # Not in a task group: one could not let go of a handler that is stuck.
        calls = self._calls(held)
        task = asyncio.create_task(self._attempt(held, calls), name=f"{lease.task} {lease.id}")
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
        outcome = self._outcome(held, task)
        if calls is not None:
            held.finishing = True  # what is told to an attempt whose outcome is known comes too late
            await self._equipment.keeper.close(calls.lines)
        return outcome

    def _calls(self, held: Held) -> Calls | None:
        """The calls of an attempt that may make some."""
        task = self._equipment.tasks[held.lease.task]
        if task.runs_in != "process" and not task.arguments.wants_context:
            return None
        calls = Calls(held, self._equipment.endings, self._settings, valid_until=self._leases.valid_until)
        self._equipment.keeper.open(calls.lines)
        return calls

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

    async def _attempt(self, held: Held, calls: Calls | None) -> Outcome:
        task = self._equipment.tasks[held.lease.task]
        if calls is not None and task.runs_in == "process":
            return await self._attempt_in_process(held, calls)
        return await self._call(held, task, calls)

    async def _call(self, held: Held, task: Task[..., Any], calls: Calls | None) -> Outcome:
        lease = held.lease
        try:
            arguments = task.arguments.decode(lease.args)
        except ValueError as error:
            return failure(lease, error, dead_reason=DeadReason.UNDECODABLE_PAYLOAD)
        if calls is not None:
            arguments[CONTEXT_PARAMETER] = self._context(task, calls)
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
            return Completion(lease.id, lease.token, encode_result(result, max_bytes=self._settings.result_max_bytes))
        except ValueError as error:
            return failure(lease, error, dead_reason=DeadReason.RESULT_UNSTORABLE)

    def _context(self, task: Task[..., Any], calls: Calls) -> Context | SyncContext:
        lease = calls.held.lease
        bound = log.bind(job_id=str(lease.id), task=lease.task, attempt=lease.attempt)
        handler_log = HandlerLog(bound, calls.lines.add)
        state = None if task.lifespan is None else self._equipment.states[task.lifespan]
        if task.is_async:
            return Context(lease, handler_log, calls, state)
        return SyncContext(lease, handler_log, ThreadCalls(calls), state)

    async def _attempt_in_process(self, held: Held, calls: Calls) -> Outcome:
        lease = held.lease
        try:
            return await self._equipment.processes.run(self._equipment.targets[lease.task], lease, calls.hear)
        except ProcessDied as error:
            return failure(lease, error)

    async def _invoke(self, task: Task[..., Any], arguments: dict[str, Any], held: Held) -> Any:
        if task.is_async:
            return await task.handler(**arguments)
        held.in_thread = True
        try:
            result = await anyio.to_thread.run_sync(partial(task.handler, **arguments), limiter=self._threads)
        finally:
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
    # Cancelled: a release says that the handler has stopped.
    return Release(lease.id, lease.token)
