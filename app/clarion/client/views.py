"""Answers of the API as frozen structs; durations are in seconds.

Fields that a newer server adds are ignored, and those that an older one lacks have defaults.
"""

from datetime import datetime
from typing import Any
from uuid import UUID

import msgspec


class ErrorView(msgspec.Struct, frozen=True):
    """Why an attempt went wrong."""

    type: str
    message: str
    trace: str | None = None


class JobSummaryView(msgspec.Struct, frozen=True, kw_only=True):
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
    timeout: float | None
    worker: UUID | None
    dead_reason: str | None
    generation: int = 1
    start_by: datetime | None = None
    finish_by: datetime | None = None
    total_timeout: float | None = None
    cancel_requested_at: datetime | None = None
    error_type: str | None = None


class JobView(JobSummaryView, frozen=True, kw_only=True):
    """A job whole; `error` is that of the latest attempt that went wrong."""

    args: dict[str, Any]
    result: Any
    error: ErrorView | None
    progress: Any = None
    checkpoint: Any = None


class JobPage(msgspec.Struct, frozen=True):
    """Some jobs of a list, and where the next ones begin; None on the last page."""

    jobs: list[JobSummaryView]
    next_cursor: str | None = None


class JobRef(msgspec.Struct, frozen=True):
    """A job that was enqueued in a batch."""

    id: UUID
    state: str
    run_at: datetime
    replayed: bool = False


class Batch(msgspec.Struct, frozen=True):
    """The jobs of a batch, in the order of the request."""

    jobs: list[JobRef]


class AttemptView(msgspec.Struct, frozen=True, kw_only=True):
    """A run of a job; `outcome` is None while it runs, and `state` what the job became."""

    attempt: int
    generation: int = 1
    outcome: str | None = None
    state: str | None = None
    worker: UUID | None = None
    run_at: datetime | None = None
    started_at: datetime | None = None
    ended_at: datetime | None = None
    next_run_at: datetime | None = None
    error: ErrorView | None = None


class TimelineEntry(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened to a job, and who did it."""

    at: datetime
    event: str
    actor: str | None = None
    state: str | None = None
    generation: int | None = None
    attempt: int | None = None
    detail: str | None = None


class Attempts(msgspec.Struct, frozen=True):
    """Every run of a job, and everything that happened to it, in order."""

    attempts: list[AttemptView]
    timeline: list[TimelineEntry]


class LogLine(msgspec.Struct, frozen=True, kw_only=True):
    """A line that a handler logged; `n` counts within the attempt."""

    at: datetime
    attempt: int
    n: int
    level: str
    message: str
    generation: int = 1
    fields: dict[str, Any] | None = None


class LogPage(msgspec.Struct, frozen=True):
    """Some log lines, how many the job's limit dropped, and the cursor of the lines after these."""

    lines: list[LogLine]
    dropped: int = 0
    next_cursor: str | int | None = None
