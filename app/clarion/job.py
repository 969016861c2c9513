"""What a job is: its states, the edges between them, and the frozen records that travel. No I/O.

    scheduled ──promote──▶ ready ──claim──▶ running ──complete──▶ succeeded
        ▲                    ▲                │
        │                    ├──release, reap─┤
        ├──fail, snooze, reap─────────────────┤
        │                                     └──fail, reap, park──▶ dead

`TRANSITIONS` is the one table of edges. Tests prove that the statements in `sql/queries` take exactly these, and
that the diagram in ARCHITECTURE.md shows them.
"""

from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from uuid import UUID

import msgspec


class JobState(StrEnum):
    """Where a job is in its life."""

    SCHEDULED = "scheduled"
    READY = "ready"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    CANCELLED = "cancelled"
    DEAD = "dead"


class DeadReason(StrEnum):
    """Why a job will not run again by itself."""

    ATTEMPTS_EXHAUSTED = "attempts_exhausted"
    NOT_RETRYABLE = "not_retryable"
    UNDECODABLE_PAYLOAD = "undecodable_payload"
    RESULT_UNSTORABLE = "result_unstorable"
    CRASH_LOOP = "crash_loop"
    UNPROCESSABLE = "unprocessable"


class AttemptOutcome(StrEnum):
    """How an attempt that did not succeed ended."""

    FAILED = "failed"
    TIMEOUT = "timeout"
    LEASE_LOST = "lease_lost"
    SNOOZED = "snoozed"
    RELEASED = "released"


# Each verb, named as its statement, with the edges it takes; None stands for "no job yet".
TRANSITIONS: Mapping[str, frozenset[tuple[JobState | None, JobState]]] = {
    "enqueue_jobs": frozenset({(None, JobState.READY), (None, JobState.SCHEDULED)}),
    "promote_jobs": frozenset({(JobState.SCHEDULED, JobState.READY)}),
    "claim_jobs": frozenset({(JobState.READY, JobState.RUNNING)}),
    "complete_jobs": frozenset({(JobState.RUNNING, JobState.SUCCEEDED)}),
    "fail_jobs": frozenset({(JobState.RUNNING, JobState.SCHEDULED), (JobState.RUNNING, JobState.DEAD)}),
    "snooze_jobs": frozenset({(JobState.RUNNING, JobState.SCHEDULED)}),
    "release_jobs": frozenset({(JobState.RUNNING, JobState.READY)}),
    "reap_jobs": frozenset(
        {
            (JobState.RUNNING, JobState.READY),
            (JobState.RUNNING, JobState.SCHEDULED),
            (JobState.RUNNING, JobState.DEAD),
        }
    ),
    "release_unanswered_jobs": frozenset({(JobState.RUNNING, JobState.READY)}),
    "park_jobs": frozenset({(JobState.RUNNING, JobState.DEAD)}),
}

# No run is planned in these; `?wait=` answers.
FINAL = frozenset({JobState.SUCCEEDED, JobState.CANCELLED, JobState.DEAD})


class NewJob(msgspec.Struct, frozen=True, kw_only=True):
    """A job to be; `args` is JSON text, kept to the letter. None leaves a choice to the task, then to the settings."""

    task: str
    args: str = "{}"
    queue: str = "default"
    priority: int = 0
    run_at: datetime | None = None
    delay_seconds: float | None = None
    max_attempts: int | None = None
    timeout_seconds: float | None = None
    backoff_seconds: float | None = None
    backoff_cap_seconds: float | None = None


class Enqueued(msgspec.Struct, frozen=True):
    """The answer to an enqueue that is committed."""

    id: UUID
    state: str
    created_at: datetime
    run_at: datetime


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """What a task decides for jobs that do not say: given with each claim, stamped on the row by the first."""

    max_attempts: int | None = None
    timeout_seconds: float | None = None
    backoff_seconds: float | None = None
    backoff_cap_seconds: float | None = None


class Lease(msgspec.Struct, frozen=True):
    """A claimed job: the right to run one attempt of it, for as long as the token holds."""

    id: UUID
    token: UUID
    queue: str
    task: str
    args: str
    priority: int
    attempt: int
    max_attempts: int | None
    errors: int
    crashes: int
    timeout_seconds: float | None
    created_at: datetime
    run_at: datetime
    started_at: datetime
    sort_key: datetime


class Completion(msgspec.Struct, frozen=True):
    """An attempt that succeeded; `result` is JSON text, or None."""

    id: UUID
    token: UUID
    result: str | None = None


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
    """An attempt that postpones its job."""

    id: UUID
    token: UUID
    delay_seconds: float


class Release(msgspec.Struct, frozen=True):
    """An attempt handed back unfinished."""

    id: UUID
    token: UUID


class Heartbeat(msgspec.Struct, frozen=True):
    """A lease that is still held; `extended` is false when its row was locked at that moment."""

    id: UUID
    extended: bool


class Reaped(msgspec.Struct, frozen=True):
    """A job taken back from a worker that stopped extending its lease."""

    id: UUID
    queue: str
    task: str
    state: str
    attempt: int
    worker_id: UUID
    timed_out: bool


class JobSummary(msgspec.Struct, frozen=True):
    """A job as lists show it: without its payload."""

    id: UUID
    queue: str
    task: str
    state: str
    priority: int
    attempt: int
    max_attempts: int | None
    errors: int
    crashes: int
    snoozes: int
    created_at: datetime
    run_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    timeout_seconds: float | None
    worker_id: UUID | None
    dead_reason: str | None


class Job(JobSummary, frozen=True):
    """A job whole; `args` and `result` are JSON text, the error is the latest attempt's."""

    args: str
    result: str | None
    error_type: str | None
    error_message: str | None


class JobFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Which jobs a list holds; None means any. `before_id` is the cursor."""

    state: JobState | None = None
    queue: str | None = None
    task: str | None = None
    created_after: datetime | None = None
    created_before: datetime | None = None
    before_id: UUID | None = None


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
