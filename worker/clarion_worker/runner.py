"""Runs attempts: decode, call, and turn whatever happens into the outcome to be recorded.

A handler runs in a task of its own, so that nothing it does to its task (cancelling it, swallowing a cancellation,
setting context variables, leaving a cancel scope open) reaches anybody else. That task is all that a job costs here,
unless it has a timeout or log lines that are not stored yet: no other task waits for it. Tasks that have ended are
concluded together, by the one loop of `Runner.run`. When each had a task waiting for it, a worker spent 95 µs of Python
on a no-op job, now some 25.

To end a handler, its task is cancelled once, as asyncio does it. One that does not end then is *stuck*: its outcome is
recorded without it and its slot is free, while the task, or the thread it sits in, is left behind, since neither can be
killed. A job whose earlier attempt is still stuck here does not start a second time beside it. A handler in a process
of its own is never stuck: that one is killed.
"""

import asyncio
import inspect
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any
from uuid import UUID

import anyio
import anyio.to_thread
import msgspec
import structlog
from anyio.abc import TaskGroup

from clarion.endings import Endings
from clarion.events import Event
from clarion.execution import Completion, Failure, Lease, Release, Snoozing
from clarion.job import DeadReason
from clarion.loops import Signal
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
# Is told the outcome of an attempt, once.
Done = Callable[[Held, Outcome], None]

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


class _Attempt:
    """A run of a handler, until its outcome is known; or, when it is stuck, until its task ends at last."""

    __slots__ = ("calls", "concluded", "done", "held", "task", "threads_lent", "timer")

    def __init__(self, held: Held, done: Done) -> None:
        self.held = held
        self.done = done
        self.calls: Calls | None = None
        self.task: asyncio.Task[Outcome] | None = None  # none: it was not to begin
        self.timer: asyncio.TimerHandle | None = None  # of its timeout, then of its grace
        self.concluded = False
        self.threads_lent = 0  # given to others in place of the thread that it is stuck in


class Runner:
    """Runs attempts; without `run` none is concluded. `freed` is called whenever an attempt has ended."""

    def __init__(
        self, equipment: Equipment, leases: Leases, settings: Settings, freed: Callable[[], None] = lambda: None
    ) -> None:
        self._equipment = equipment
        self._leases = leases
        self._settings = settings
        self._freed = freed
        self._over = False
        # Bounds the handlers that are in threads and not stuck.
        self._threads = anyio.CapacityLimiter(settings.concurrency)
        self._attempts: dict[asyncio.Task[Outcome], _Attempt] = {}
        self._stuck: set[_Attempt] = set()
        self._to_conclude: deque[_Attempt] = deque()
        self._look = Signal()

    @property
    def stuck(self) -> int:
        """Handlers that were told to end and did not."""
        return len(self._stuck)

    def start(self, held: Held, done: Done) -> None:
        """Begins an attempt; whatever its handler does, `done` is told the outcome, later.

        Once `run` has ended nothing begins: nobody would end it, and its lease runs out.
        """
        if self._over:
            return
        attempt = _Attempt(held, done)
        if held.ending or self._is_stuck_here(held.lease.id):
            self._conclude_soon(attempt)
            return
        attempt.calls = self._calls(held)
        # Not in a task group: one could not let go of a handler that is stuck.
        attempt.task = asyncio.create_task(self._run_handler(held, attempt.calls), name=held.lease.task)
        self._attempts[attempt.task] = attempt
        attempt.task.add_done_callback(self._task_ended)
        held.end_handler = partial(self._end, attempt)
        if held.lease.timeout_seconds is not None:
            loop = asyncio.get_running_loop()
            attempt.timer = loop.call_later(held.lease.timeout_seconds, self._time_out, attempt)

    async def run(self) -> None:
        """Concludes attempts until it is cancelled; then those that still run, and are not stuck, are cancelled too."""
        try:
            async with anyio.create_task_group() as closing:
                while True:
                    await self._look.wait()
                    while self._to_conclude:
                        self._conclude(self._to_conclude.popleft(), closing)
        finally:
            self._over = True
            for attempt in self._attempts.values():
                if attempt not in self._stuck:
                    _cancel(attempt)

    def _task_ended(self, task: asyncio.Task[Outcome]) -> None:
        attempt = self._attempts.pop(task)
        if attempt in self._stuck:
            self._stuck.remove(attempt)
            self._threads.total_tokens -= attempt.threads_lent
            _ = task.cancelled() or task.exception()  # nobody else asks for it
        else:
            self._conclude_soon(attempt)

    def _conclude_soon(self, attempt: _Attempt) -> None:
        self._to_conclude.append(attempt)
        self._look.set()

    def _time_out(self, attempt: _Attempt) -> None:
        if attempt.task is not None and not attempt.task.done():
            attempt.held.end(EndReason.TIMED_OUT)

    def _end(self, attempt: _Attempt) -> None:
        """Asks the handler to end, and gives it its grace."""
        if attempt.timer is not None:
            attempt.timer.cancel()
        loop = asyncio.get_running_loop()
        attempt.timer = loop.call_later(CANCEL_GRACE_SECONDS, self._conclude_soon, attempt)
        # A thread would go on unseen; its handler learns of the end from `ctx.cancelled`.
        if not attempt.held.in_thread:
            _cancel(attempt)

    def _conclude(self, attempt: _Attempt, closing: TaskGroup) -> None:
        if attempt.concluded:
            return  # its task ended as its grace did
        attempt.concluded = True
        if attempt.timer is not None:
            attempt.timer.cancel()
        held, outcome = attempt.held, self._outcome(attempt)
        held.end_handler = None  # a cycle, which only the collector would free: 8 µs a job
        self._leases.finish(held)
        self._freed()
        if attempt.calls is None or self._equipment.keeper.has_closed(attempt.calls.lines):
            attempt.done(held, outcome)
        else:
            closing.start_soon(self._close_lines, attempt, outcome)

    async def _close_lines(self, attempt: _Attempt, outcome: Outcome) -> None:
        """Stores the last lines first: after the outcome their token holds nothing."""
        if attempt.calls is not None:
            await self._equipment.keeper.close(attempt.calls.lines)
        attempt.done(attempt.held, outcome)

    def _outcome(self, attempt: _Attempt) -> Outcome:
        held, task = attempt.held, attempt.task
        lease = held.lease
        if task is None:
            return _ended(held) if held.ending else Snoozing(lease.id, lease.token, _STUCK_RETRY_SECONDS, counted=False)
        if not task.done():
            self._leave_behind(attempt)
            return _ended(held)
        if task.cancelled():
            cancelled = asyncio.CancelledError("the handler cancelled itself")
            return _ended(held) if held.ending else failure(lease, cancelled)
        outcome = task.result()
        # A handler that was told to end and then raised something of its own did not fail: it was ended. One that
        # returned a result all the same succeeded: the result came first.
        return _ended(held) if held.ending and isinstance(outcome, Failure) else outcome

    def _is_stuck_here(self, job_id: UUID) -> bool:
        return bool(self._stuck) and any(attempt.held.lease.id == job_id for attempt in self._stuck)

    def _leave_behind(self, attempt: _Attempt) -> None:
        lease = attempt.held.lease
        log.warning(Event.ATTEMPT_STUCK, job_id=str(lease.id), task=lease.task, attempt=lease.attempt)
        self._stuck.add(attempt)
        attempt.threads_lent = int(attempt.held.in_thread)
        self._threads.total_tokens += attempt.threads_lent

    def _calls(self, held: Held) -> Calls | None:
        """The calls of an attempt that may make some."""
        task = self._equipment.tasks[held.lease.task]
        if task.runs_in != "process" and not task.arguments.wants_context:
            return None
        calls = Calls(held, self._equipment.endings, self._settings, valid_until=self._leases.valid_until)
        self._equipment.keeper.open(calls.lines)
        return calls

    async def _run_handler(self, held: Held, calls: Calls | None) -> Outcome:
        lease = held.lease
        task = self._equipment.tasks[lease.task]
        if calls is not None and task.runs_in == "process":
            return await self._run_in_process(held, calls)
        try:
            arguments = task.arguments.decode(lease.args)
        except ValueError as error:
            return failure(lease, error, dead_reason=DeadReason.UNDECODABLE_PAYLOAD)
        if calls is not None:
            arguments[CONTEXT_PARAMETER] = self._context(task, calls)
        try:
            # Here and not in a function of its own: one less on the way of each await of the handler.
            if task.is_async:
                result = await task.handler(**arguments)
            else:
                result = await self._run_in_thread(task, arguments, held)
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # noqa: BLE001  whatever a handler raises is its attempt's outcome
            return _raised(lease, error)
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

    async def _run_in_process(self, held: Held, calls: Calls) -> Outcome:
        lease = held.lease
        try:
            return await self._equipment.processes.run(self._equipment.targets[lease.task], lease, calls.hear)
        except ProcessDied as error:
            return failure(lease, error)

    async def _run_in_thread(self, task: Task[..., Any], arguments: dict[str, Any], held: Held) -> Any:
        held.in_thread = True
        try:
            result = await anyio.to_thread.run_sync(partial(task.handler, **arguments), limiter=self._threads)
        finally:
            held.in_thread = False
        return await result if inspect.isawaitable(result) else result


def _cancel(attempt: _Attempt) -> None:
    """Cancels the handler's task: what it waits for may be anybody's, and what that raises is not for us to catch."""
    if attempt.task is not None:
        asyncio.get_running_loop().call_soon(attempt.task.cancel)


def _raised(lease: Lease, error: BaseException) -> Outcome:
    """The outcome of an attempt whose handler raised."""
    match error:
        case Snooze():
            return Snoozing(lease.id, lease.token, error.delay_seconds)
        case Discard():
            return failure(lease, error, dead_reason=DeadReason.NOT_RETRYABLE)
        case _:
            return failure(lease, error)


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
