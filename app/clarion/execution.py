"""Who runs jobs, and what becomes of it: leases, the calls of those who hold them, and the answers. No I/O."""

from collections.abc import Iterable
from datetime import datetime
from enum import StrEnum
from typing import Annotated, TypeAlias
from uuid import UUID

import msgspec
from msgspec import Meta

from clarion.job import DeadReason


class AttemptOutcome(StrEnum):
    """How an attempt that did not succeed ended."""

    FAILED = "failed"
    TIMEOUT = "timeout"
    LEASE_LOST = "lease_lost"
    SNOOZED = "snoozed"
    RELEASED = "released"


class Directive(StrEnum):
    """What a worker is told in answer to its heartbeats."""

    OK = "ok"
    DRAIN = "drain"


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """What a task decides for jobs that do not say: given with each claim, stamped on the row by the first."""

    max_attempts: int | None = None
    timeout_seconds: float | None = None
    backoff_seconds: float | None = None
    backoff_cap_seconds: float | None = None


# Nobody makes more ready at once; a stranger's ring may say anything.
_READY_MAX = 2**31 - 1


class Ready(msgspec.Struct, frozen=True, array_like=True):
    """So many jobs became ready in a queue; `earliest` is the least sort_key among them."""

    jobs: Annotated[int, Meta(ge=0, le=_READY_MAX)]
    earliest: Annotated[datetime, Meta(tz=True)]

    def together(self, other: "Ready") -> "Ready":
        """These and those, in one queue."""
        return Ready(min(self.jobs + other.jobs, _READY_MAX), min(self.earliest, other.earliest))


def ready_by_queue(places: Iterable[tuple[str | None, datetime | None]]) -> dict[str, Ready]:
    """What to ring for jobs that became ready, each in its queue at its sort_key; None is nobody's place."""
    keys: dict[str, list[datetime]] = {}
    for queue, sort_key in places:
        if queue is not None and sort_key is not None:
            keys.setdefault(queue, []).append(sort_key)
    return {queue: Ready(len(found), min(found)) for queue, found in keys.items()}


# A place in line: a sort_key, and an id among those that have the same.
Place: TypeAlias = tuple[datetime, UUID]


class Share(msgspec.Struct, frozen=True, kw_only=True):
    """What one claimant wants of one queue: up to `jobs_max` jobs.

    `earliest` is where to look from: who knows that nothing is ready before it spares Postgres the way there.
    """

    queue: str
    jobs_max: int
    worker_id: UUID
    lease_seconds: float
    earliest: Place | None = None


class Lease(msgspec.Struct, frozen=True):
    """A claimed job: the right to run one attempt of it, for as long as the token holds.

    `timeout_seconds` is what this attempt has; `checkpoint` is JSON text that an earlier one left.
    """

    id: UUID
    token: UUID
    queue: str
    task: str
    args: str
    priority: int
    attempt: int
    max_attempts: int | None
    generation: int
    errors: int
    crashes: int
    timeout_seconds: float | None
    checkpoint: str | None
    created_at: datetime
    run_at: datetime
    started_at: datetime
    sort_key: datetime

    @property
    def place_in_line(self) -> Place:
        """Where the job stood."""
        return self.sort_key, self.id


class Claimed(Lease, frozen=True):
    """A lease as the claim answers it: the `place`-th job taken from its queue, for the `share`-th that asked."""

    share: int
    place: int


class Completion(msgspec.Struct, frozen=True):
    """An attempt that succeeded; `result` is JSON text, or None. `key` names the call, if its caller names them."""

    id: UUID
    token: UUID
    result: str | None = None
    key: str | None = None


class Completed(msgspec.Struct, frozen=True):
    """What a completion met: succeeded, or None where the lease is lost; a replay carries what was stored first."""

    state: str | None
    replayed: bool
    completion_key: str | None
    result: str | None


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """An attempt that went wrong. `dead_reason` ends the job at once; otherwise its tries and its backoff decide."""

    id: UUID
    token: UUID
    outcome: AttemptOutcome = AttemptOutcome.FAILED
    error_type: str
    error_message: str
    error_trace: str | None = None
    retry_in_seconds: float | None = None
    dead_reason: DeadReason | None = None


class Snoozing(msgspec.Struct, frozen=True):
    """An attempt that postpones its job; not `counted` where that is the worker's wish, and not the handler's."""

    id: UUID
    token: UUID
    delay_seconds: float
    counted: bool = True


class Release(msgspec.Struct, frozen=True):
    """An attempt handed back unfinished."""

    id: UUID
    token: UUID


class Ended(msgspec.Struct, frozen=True):
    """What the end of an attempt made of its job, None where the lease is lost; and when it runs next, if it does."""

    state: str | None
    next_run_at: datetime | None


class Beat(msgspec.Struct, frozen=True, kw_only=True):
    """A lease to extend, counted from now; `progress` and `checkpoint` are JSON text, None leaves them as they are."""

    id: UUID
    token: UUID
    lease_seconds: float | None = None
    progress: str | None = None
    checkpoint: str | None = None


class Heartbeat(msgspec.Struct, frozen=True):
    """A lease that is still held, for so long; `extended` is false when its row was locked at that moment.

    `cancelled`: its cancellation was requested, and it is not extended any more.
    """

    id: UUID
    token: UUID
    extended: bool
    cancelled: bool
    lease_seconds: float


class LogLine(msgspec.Struct, frozen=True, kw_only=True):
    """What a handler said, the `n`-th time in its attempt; `fields` is JSON text."""

    id: UUID
    token: UUID
    n: int
    level: str
    message: str
    fields: str | None = None


class StoredLine(msgspec.Struct, frozen=True):
    """A log line of a job; `id` is its place."""

    id: int
    at: datetime
    generation: int
    attempt: int
    n: int
    level: str
    message: str
    fields: str | None


class Reaped(msgspec.Struct, frozen=True):
    """A job taken back from a worker that stopped extending its lease."""

    id: UUID
    queue: str
    task: str
    state: str
    attempt: int
    worker_id: UUID
    timed_out: bool
    sort_key: datetime


class Attempt(msgspec.Struct, frozen=True):
    """One run of a job; `outcome` is None while it runs, and `succeeded` for the last of a job that did."""

    generation: int
    attempt: int
    outcome: str | None
    state: str
    worker_id: UUID | None
    run_at: datetime | None
    started_at: datetime
    ended_at: datetime | None
    next_run_at: datetime | None
    error_type: str | None
    error_message: str | None
    error_trace: str | None
    reaped: bool


class WorkerRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A worker process as people see it."""

    id: UUID
    name: str
    version: str
    queues: list[str]
    tasks: list[str]
    concurrency: int
    running: int
    state: str


class Standing(msgspec.Struct, frozen=True):
    """A worker's place among the `workers` that hear the rings of a queue, counted from 0; `idle` of them had room."""

    queue: str
    rank: int
    workers: int
    idle: int


class WorkerSeen(msgspec.Struct, frozen=True):
    """A worker process that is alive, or died lately."""

    id: UUID
    name: str
    version: str
    queues: list[str]
    tasks: list[str]
    concurrency: int
    running: int
    state: str
    directive: str
    started_at: datetime
    seen_at: datetime
