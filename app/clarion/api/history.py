"""What happened to a job: its attempts, its timeline, and what its handlers said."""

from collections.abc import Iterator
from datetime import datetime
from typing import Annotated
from uuid import UUID

import msgspec
from msgspec import Meta, Raw

from clarion.api.access import Permission
from clarion.api.cursor import decode_line, encode_line
from clarion.api.decoding import Form, Nothing
from clarion.api.lookup import find_job, job_id_in
from clarion.api.operation import Call, Operation, Reply
from clarion.api.representations import raw
from clarion.errors import FieldError, NotFound, Overloaded, Unavailable
from clarion.execution import Attempt, StoredLine
from clarion.job import FINAL
from clarion.payload import FaultFinder
from clarion.timeline import Entry, timeline

LINES_MAX = 1_000


class AttemptErrorOut(msgspec.Struct, frozen=True):
    """Why an attempt went wrong."""

    type: str
    message: str
    trace: str | None


class AttemptOut(msgspec.Struct, frozen=True, kw_only=True):
    """One run of a job. `outcome` is null while it runs; `state` is what it made of the job; `run_at` when it was due.

    `reaped`: its worker was not heard of any more, and the reaper ended it.
    """

    generation: int
    attempt: int
    outcome: str | None
    state: str
    worker: UUID | None
    run_at: datetime | None
    started_at: datetime
    ended_at: datetime | None
    next_run_at: datetime | None
    reaped: bool
    error: AttemptErrorOut | None


class AttemptsOut(msgspec.Struct, frozen=True):
    """Every run of a job, and everything that happened to it, both in order."""

    attempts: list[AttemptOut]
    timeline: list[Entry]


class LogLineOut(msgspec.Struct, frozen=True, kw_only=True):
    """What a handler said, the `n`-th time in its attempt."""

    id: int
    at: datetime
    generation: int
    attempt: int
    n: int
    level: str
    message: str
    fields: Raw | None


class LogLinesOut(msgspec.Struct, frozen=True):
    """A page of log lines, how many lines were beyond the job's limit, and the cursor of the lines after these.

    The cursor is null where there are no more. While the job may still say something, it leads to what comes next,
    unless the page is empty: its caller has that cursor already.
    """

    lines: list[LogLineOut]
    dropped: int
    next_cursor: str | None


class LogQuery(Form, frozen=True, kw_only=True):
    """Which log lines: those after a cursor, in order."""

    after: str | None = None
    limit: Annotated[int, Meta(ge=1, le=LINES_MAX, description=f"must be a whole number from 1 to {LINES_MAX}")] = 100

    def broken_rules(self, finder: FaultFinder) -> Iterator[FieldError]:
        """A cursor of ours."""
        try:
            self.last_id()
        except ValueError as error:
            yield FieldError(str(error), parameter="after")

    def last_id(self) -> int | None:
        """The line after which to begin."""
        return None if self.after is None else decode_line(self.after)


async def list_attempts(call: Call[Nothing, Nothing]) -> Reply:
    """Every attempt of a job, and its timeline."""
    store, job_id = call.services.store, job_id_in(call.path["id"])
    job = await find_job(store, job_id)
    attempts = await store.list_attempts(job_id)
    happenings = await store.list_events(job_id)
    return Reply(AttemptsOut([_attempt_out(attempt) for attempt in attempts], timeline(job, attempts, happenings)))


async def list_logs(call: Call[Nothing, LogQuery]) -> Reply:
    """A page of what a job's handlers said."""
    store, job_id, limit = call.services.store, job_id_in(call.path["id"]), call.query.limit
    job = await find_job(store, job_id)
    # One more than asked for tells whether there is a next page.
    found = await store.list_logs(job_id, after=call.query.last_id(), limit=limit + 1)
    page = found[:limit]
    goes_on = len(found) > limit or (page and job.state not in FINAL)
    dropped = max(0, job.log_lines - call.services.settings.job_log_max_lines)
    return Reply(
        LogLinesOut([_line_out(line) for line in page], dropped, encode_line(page[-1].id) if goes_on else None)
    )


def _attempt_out(attempt: Attempt) -> AttemptOut:
    error = None
    if attempt.error_type is not None:
        error = AttemptErrorOut(attempt.error_type, attempt.error_message or "", attempt.error_trace)
    return AttemptOut(
        generation=attempt.generation,
        attempt=attempt.attempt,
        outcome=attempt.outcome,
        state=attempt.state,
        worker=attempt.worker_id,
        run_at=attempt.run_at,
        started_at=attempt.started_at,
        ended_at=attempt.ended_at,
        next_run_at=attempt.next_run_at,
        reaped=attempt.reaped,
        error=error,
    )


def _line_out(line: StoredLine) -> LogLineOut:
    return LogLineOut(
        id=line.id,
        at=line.at,
        generation=line.generation,
        attempt=line.attempt,
        n=line.n,
        level=line.level,
        message=line.message,
        fields=raw(line.fields),
    )


OPERATIONS = (
    Operation(
        method="GET",
        path="/v1/jobs/{id}/attempts",
        summary="Show every attempt of a job, and its timeline",
        handler=list_attempts,
        permission=Permission.READ,
        body=Nothing,
        query=Nothing,
        responds=AttemptsOut,
        problems=(NotFound, Unavailable, Overloaded),
    ),
    Operation(
        method="GET",
        path="/v1/jobs/{id}/logs",
        summary="Show what a job's handlers said",
        handler=list_logs,
        permission=Permission.READ,
        body=Nothing,
        query=LogQuery,
        responds=LogLinesOut,
        problems=(NotFound, Unavailable, Overloaded),
    ),
)
