"""Runs one handler without a database: with everything that a worker does around it, and nothing behind it."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, NoReturn, TypedDict, TypeVar, Unpack
from uuid import UUID, uuid4

import anyio
import msgspec
from msgspec import UNSET

from clarion.api.decoding import decode
from clarion.api.schemas import JobIn
from clarion.errors import UsageError
from clarion.execution import Beat, Completion, Failure, Heartbeat, Lease, LogLine
from clarion.job import DeadReason, JobState
from clarion.job_request import JobRequest, encode_request
from clarion.settings import Settings
from clarion.store import Store
from clarion_worker.leases import EndReason, Held
from clarion_worker.registry import Task, Worker
from clarion_worker.runner import Outcome
from clarion_worker.testing.attempts import open_attempts, open_states
from clarion_worker.testing.runs import HandlerRun

R = TypeVar("R")


class Circumstances(TypedDict, total=False):
    """What an attempt finds, besides its arguments.

    `attempt`: which run of the job it is, from 1. `checkpoint`: what an earlier one left. `state`: `ctx.state`, instead
    of what the worker's lifespan yields, which then is not entered. `job_id`: the job's, if the handler uses it.

    `cancelled_after_progress`: the job's cancellation is requested, and the handler learns of it in so many calls of
    `ctx.progress` or `ctx.heartbeat`, from 1. `cancelled_by`: the same, when somebody sets this event.
    """

    attempt: int
    checkpoint: Any
    state: Any
    job_id: UUID
    cancelled_after_progress: int
    cancelled_by: anyio.Event


async def run_handler(
    worker: Worker, request: JobRequest[R], /, **circumstances: Unpack[Circumstances]
) -> HandlerRun[R]:
    """Runs the handler of one job as a worker does, without a database, and answers how it went.

        run = await run_handler(worker, send.job(to="ada@example.org", order_id=7), attempt=2)
        assert run.result == {"sent_to": "ada@example.org"}

    The arguments go through JSON and the signature's types, exceptions become outcomes, and the timeout is kept: that
    of the job, `send.job(…).having(timeout="50ms")`, or else the task's. `JobRequest("email.send", {…})` makes a job
    that the signature does not fit. `ctx.complete_in` needs a database: see `Kit`.

    Raises UsageError for a task that the worker does not have, Invalid for a job that no server would take.
    """
    task = worker.tasks.get(request.task)
    if task is None:
        has = ", ".join(sorted(worker.tasks)) or "none"
        raise UsageError(f"this worker has no task {request.task!r}; it has {has}")
    tasks, settings = {task.name: task}, Settings()
    lease = _lease(task, request, circumstances)
    store = _OneJob(settings, cancelled_after=circumstances.get("cancelled_after_progress"))
    async with (
        open_states(tasks, circumstances.get("state", UNSET)) as states,
        open_attempts(tasks, store, settings, states) as attempts,
        anyio.create_task_group() as group,
    ):
        held = attempts.hold(lease)
        if "cancelled_by" in circumstances:
            group.start_soon(_cancel, held, circumstances["cancelled_by"])
        outcome, run = await attempts.run(held)
        group.cancel_scope.cancel()
    state, dead_reason = _became(lease, outcome, settings, cancelled=held.end_reason is EndReason.CANCELLED)
    return msgspec.structs.replace(
        run, state=str(state), dead_reason=dead_reason and str(dead_reason), result_type=request.result_type
    )


class _OneJob(Store):
    """Answers what a handler may ask of a store while it runs, as for a job that is its own."""

    def __init__(self, settings: Settings, *, cancelled_after: int | None) -> None:
        super().__init__(_NoDatabase(), settings)
        self._beats_left = cancelled_after

    async def heartbeat_jobs(self, beats: Sequence[Beat]) -> list[Heartbeat]:
        """Extends leases, until the cancellation is requested."""
        if self._beats_left is not None:
            self._beats_left -= len(beats)
        cancelled = self._beats_left is not None and self._beats_left <= 0
        seconds = self._settings.lease_seconds
        return [Heartbeat(beat.id, beat.token, not cancelled, cancelled, seconds) for beat in beats]

    async def record_logs(self, lines: Sequence[LogLine]) -> list[bool | None]:
        """Keeps all lines."""
        return [True] * len(lines)


class _NoDatabase:
    """Where a database would be."""

    async def fetch(self, _sql: str, *_args: object) -> NoReturn:
        """Refuses."""
        raise UsageError("run_handler has no database: use a Kit for what needs one")


async def _cancel(held: Held, requested: anyio.Event) -> None:
    await requested.wait()
    held.end(EndReason.CANCELLED)


def _lease(task: Task[..., Any], request: JobRequest[Any], circumstances: Circumstances) -> Lease:
    """What a claim of this job would answer."""
    job, policy, now = decode(encode_request(request), JobIn).to_new_job(), task.policy, datetime.now(UTC)
    timeouts = [_first(job.timeout_seconds, policy.timeout_seconds), job.total_timeout_seconds]
    attempt, checkpoint = circumstances.get("attempt", 1), circumstances.get("checkpoint")
    return Lease(
        id=circumstances.get("job_id") or uuid4(),
        token=uuid4(),
        queue=job.queue,
        task=job.task,
        args=job.args,
        priority=job.priority,
        attempt=attempt,
        max_attempts=_first(job.max_attempts, policy.max_attempts),
        generation=1,
        errors=attempt - 1,
        crashes=0,
        timeout_seconds=min((seconds for seconds in timeouts if seconds is not None), default=None),
        checkpoint=None if checkpoint is None else msgspec.json.encode(checkpoint).decode(),
        created_at=now,
        run_at=now,
        started_at=now,
        sort_key=now,
    )


def _became(
    lease: Lease, outcome: Outcome, settings: Settings, *, cancelled: bool
) -> tuple[JobState, DeadReason | None]:
    """What the outcome makes of the job, and why it is dead; a test compares this with what the statements do."""
    if isinstance(outcome, Completion):
        return JobState.SUCCEEDED, None
    if cancelled:
        return JobState.CANCELLED, None
    if not isinstance(outcome, Failure):
        return JobState.SCHEDULED, None
    if outcome.dead_reason is not None:
        return JobState.DEAD, outcome.dead_reason
    if lease.attempt >= (lease.max_attempts or settings.max_attempts):
        return JobState.DEAD, DeadReason.ATTEMPTS_EXHAUSTED
    return JobState.SCHEDULED, None


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)
