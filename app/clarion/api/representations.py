"""What answers about jobs look like, and the conversions from Clarion's own records."""

from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import msgspec
from msgspec import Raw

from clarion.job import Enqueued, Job, JobSummary, NewJob


class JobSummaryOut(msgspec.Struct, frozen=True, kw_only=True):
    """A job as lists show it: without its payload. Timeouts are in seconds.

    A `generation` is begun by each retry of a dead or cancelled job; attempts, errors and crashes are counted in it.
    """

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
    timeout: float | None
    total_timeout: float | None
    start_by: datetime | None
    finish_by: datetime | None
    cancel_requested_at: datetime | None
    worker: UUID | None
    dead_reason: str | None
    error_type: str | None


class ErrorOut(msgspec.Struct, frozen=True):
    """Why the latest attempt that went wrong did."""

    type: str
    message: str


class JobOut(JobSummaryOut, frozen=True, kw_only=True):
    """A job whole; `args`, `result` and `checkpoint` are the JSON that was sent, to the letter."""

    args: Raw
    result: Raw | None
    error: ErrorOut | None
    progress: Raw | None
    checkpoint: Raw | None


class JobListOut(msgspec.Struct, frozen=True):
    """A page of jobs, and where the next begins; null on the last."""

    jobs: list[JobSummaryOut]
    next_cursor: str | None


class JobRef(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """An enqueued job, in the order of the request; `replayed` where its key was known and it was added before."""

    id: UUID
    state: str
    run_at: datetime
    replayed: bool = False


class BatchOut(msgspec.Struct, frozen=True):
    """The jobs of a batch."""

    jobs: list[JobRef]


def summary_out(job: JobSummary) -> JobSummaryOut:
    """A job for a list."""
    return JobSummaryOut(**_shared(job))


def job_out(job: Job) -> JobOut:
    """A job whole."""
    return JobOut(
        **_shared(job),
        args=Raw(job.args.encode()),
        result=raw(job.result),
        error=None if job.error_type is None else ErrorOut(job.error_type, job.error_message or ""),
        progress=raw(job.progress),
        checkpoint=raw(job.checkpoint),
    )


def raw(text: str | None) -> Raw | None:
    """JSON text as it is."""
    return None if text is None else Raw(text.encode())


def fresh_job(new: NewJob, added: Enqueued) -> Job:
    """A job as reading it back would have shown it at the moment when it was enqueued."""
    return Job(
        id=added.id,
        queue=new.queue,
        task=new.task,
        state=added.state,
        priority=new.priority,
        attempt=0,
        max_attempts=new.max_attempts,
        errors=0,
        crashes=0,
        snoozes=0,
        generation=1,
        created_at=added.created_at,
        run_at=added.run_at,
        started_at=None,
        finished_at=None,
        timeout_seconds=new.timeout_seconds,
        start_by=new.start_by or _after(added.run_at, new.start_within_seconds),
        finish_by=_after(added.run_at, new.total_timeout_seconds),
        total_timeout_seconds=new.total_timeout_seconds,
        cancel_requested_at=None,
        worker_id=None,
        dead_reason=None,
        error_type=None,
        args=new.args,
        result=None,
        progress=None,
        checkpoint=None,
        log_lines=0,
        enqueued_by=new.enqueued_by,
        version="",
        error_message=None,
    )


_SAME_NAMES = tuple(name for name in JobSummary.__struct_fields__ if name in JobSummaryOut.__struct_fields__)


def _shared(job: JobSummary) -> dict[str, Any]:
    fields = {name: getattr(job, name) for name in _SAME_NAMES}
    return fields | {
        "timeout": _seven_digits(job.timeout_seconds),
        "total_timeout": _seven_digits(job.total_timeout_seconds),
        "worker": job.worker_id,
    }


def _after(moment: datetime, seconds: float | None) -> datetime | None:
    return None if seconds is None else moment + timedelta(seconds=seconds)


def _seven_digits(seconds: float | None) -> float | None:
    """What was given, back from a `real` column: that many decimal digits it holds for sure or shows as noise."""
    return None if seconds is None else float(f"{seconds:.7g}")
