"""What a job is: its states, the edges between them, and the frozen records that travel. No I/O.

    scheduled ──promote──▶ ready ──claim──▶ running ──complete──▶ succeeded
     ▲    ▲                  ▲                │
     │    │                  ├──release, reap─┤
     │    ├──fail, snooze, reap───────────────┤
     │    │                  │                ├──fail, snooze, reap, park──▶ dead
     │  retry              retry              └──fail, snooze, release, reap──▶ cancelled (when it was requested)
     │    │                  │
     └── dead, cancelled ────┘

Besides, `cancel` takes what waits or is dead to cancelled, `expire` what waits too long to dead, and `change` moves
what waits between scheduled and ready.

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
    EXPIRED = "expired"
    TOTAL_TIMEOUT = "total_timeout"
    SNOOZES_EXHAUSTED = "snoozes_exhausted"


class JobEvent(StrEnum):
    """What happens to a job besides its attempts."""

    CANCEL_REQUESTED = "cancel_requested"
    CANCELLED = "cancelled"
    RETRIED = "retried"
    CHANGED = "changed"
    EXPIRED = "expired"
    PARKED = "parked"


# Each verb, named as its statement, with the edges it takes; None stands for "no job yet".
TRANSITIONS: Mapping[str, frozenset[tuple[JobState | None, JobState]]] = {
    "enqueue_jobs": frozenset({(None, JobState.READY), (None, JobState.SCHEDULED)}),
    "promote_jobs": frozenset({(JobState.SCHEDULED, JobState.READY)}),
    "claim_jobs": frozenset({(JobState.READY, JobState.RUNNING)}),
    "complete_jobs": frozenset({(JobState.RUNNING, JobState.SUCCEEDED)}),
    "fail_jobs": frozenset(
        {
            (JobState.RUNNING, JobState.SCHEDULED),
            (JobState.RUNNING, JobState.DEAD),
            (JobState.RUNNING, JobState.CANCELLED),
        }
    ),
    "snooze_jobs": frozenset(
        {
            (JobState.RUNNING, JobState.SCHEDULED),
            (JobState.RUNNING, JobState.DEAD),
            (JobState.RUNNING, JobState.CANCELLED),
        }
    ),
    "release_jobs": frozenset({(JobState.RUNNING, JobState.READY), (JobState.RUNNING, JobState.CANCELLED)}),
    "reap_jobs": frozenset(
        {
            (JobState.RUNNING, JobState.READY),
            (JobState.RUNNING, JobState.SCHEDULED),
            (JobState.RUNNING, JobState.DEAD),
            (JobState.RUNNING, JobState.CANCELLED),
        }
    ),
    "release_unanswered_jobs": frozenset({(JobState.RUNNING, JobState.READY)}),
    "park_jobs": frozenset({(JobState.RUNNING, JobState.DEAD)}),
    "expire_jobs": frozenset({(JobState.SCHEDULED, JobState.DEAD), (JobState.READY, JobState.DEAD)}),
    "cancel_jobs": frozenset(
        {
            (JobState.SCHEDULED, JobState.CANCELLED),
            (JobState.READY, JobState.CANCELLED),
            (JobState.DEAD, JobState.CANCELLED),
        }
    ),
    "retry_jobs": frozenset(
        {
            (JobState.DEAD, JobState.READY),
            (JobState.DEAD, JobState.SCHEDULED),
            (JobState.CANCELLED, JobState.READY),
            (JobState.CANCELLED, JobState.SCHEDULED),
            (JobState.SCHEDULED, JobState.READY),
            (JobState.SCHEDULED, JobState.SCHEDULED),
        }
    ),
    "change_job": frozenset(
        {
            (JobState.SCHEDULED, JobState.READY),
            (JobState.SCHEDULED, JobState.SCHEDULED),
            (JobState.READY, JobState.SCHEDULED),
            (JobState.READY, JobState.READY),
        }
    ),
}

# No run is planned in these; `?wait=` answers.
FINAL = frozenset({JobState.SUCCEEDED, JobState.CANCELLED, JobState.DEAD})


class NewJob(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A job to be; `args` is JSON text, kept to the letter. None leaves a choice to the task, then to the settings.

    `start_within_seconds` and the total timeout count from the moment at which the job is due. `key` makes the enqueue
    repeatable; another call with this key is compared with `request`: a digest of each field, as JSON text.
    """

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
    start_by: datetime | None = None
    start_within_seconds: float | None = None
    total_timeout_seconds: float | None = None
    enqueued_by: str | None = None
    key: str | None = None
    request: str | None = None


class Enqueued(msgspec.Struct, frozen=True, gc=False):
    """The answer to an enqueue that is committed; a replay has the `request` of the first call with its key.

    An empty state: not added, since a neighbour's key stands for another request. `sort_key` is None unless this call
    added the job.
    """

    id: UUID
    state: str
    created_at: datetime
    run_at: datetime
    request: str | None
    sort_key: datetime | None


class Expired(msgspec.Struct, frozen=True):
    """A job that waited past a deadline."""

    id: UUID
    queue: str
    task: str
    reason: str


class Cancelling(msgspec.Struct, frozen=True):
    """What a cancel met; None for a job that is finished or unknown. `requested`: a worker is to be told."""

    state: str | None
    requested: bool


class Requeued(msgspec.Struct, frozen=True):
    """What a retry or a change made of a job, None where it cannot; `queue` where it waits, `sort_key` its place there.

    A retry answers these of a job that was ready before as well, also where that one was not meant.
    """

    state: str | None
    queue: str | None
    sort_key: datetime | None


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
    generation: int
    created_at: datetime
    run_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    timeout_seconds: float | None
    start_by: datetime | None
    finish_by: datetime | None
    total_timeout_seconds: float | None
    cancel_requested_at: datetime | None
    worker_id: UUID | None
    dead_reason: str | None
    error_type: str | None


class Job(JobSummary, frozen=True):
    """A job whole; what is JSON is JSON text. The error is that of the latest attempt that went wrong.

    `version` changes with every write; `log_lines` counts what handlers said, kept or not.
    """

    args: str
    result: str | None
    progress: str | None
    checkpoint: str | None
    log_lines: int
    enqueued_by: str | None
    version: str
    error_message: str | None


class Happening(msgspec.Struct, frozen=True):
    """What happened to a job besides its attempts; `state` is what it was then."""

    at: datetime
    event: str
    actor: str
    state: str
    generation: int
    detail: str | None


class JobFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Which jobs a list holds; None means any. `before_id` is the cursor."""

    state: JobState | None = None
    queue: str | None = None
    task: str | None = None
    created_after: datetime | None = None
    created_before: datetime | None = None
    before_id: UUID | None = None


class DeadFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Which dead jobs a list holds; None means any. `after` is the cursor: when the last one died, and its id."""

    queue: str | None = None
    task: str | None = None
    error_type: str | None = None
    dead_reason: DeadReason | None = None
    died_after: datetime | None = None
    died_before: datetime | None = None
    after: tuple[datetime, UUID] | None = None


class DeadGroup(msgspec.Struct, frozen=True):
    """Dead jobs of one task that died of the same."""

    task: str
    error_type: str | None
    dead_reason: str
    jobs: int
    first_died_at: datetime
    last_died_at: datetime
    latest_id: UUID


class JobChange(msgspec.Struct, frozen=True, kw_only=True):
    """What to change of a job that waits: the columns that `names` lists, to the values of the same names."""

    names: frozenset[str]
    queue: str | None = None
    priority: int | None = None
    run_at: datetime | None = None
    max_attempts: int | None = None
    timeout_seconds: float | None = None
    backoff_seconds: float | None = None
    backoff_cap_seconds: float | None = None
    total_timeout_seconds: float | None = None
    start_by: datetime | None = None
    args: str | None = None
    delay_seconds: float | None = None
