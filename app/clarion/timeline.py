"""The life of a job as a list of what happened, put together from what is stored anyway. No I/O.

A job that simply succeeds costs no row besides its own: that it was enqueued, was claimed and has succeeded stands in
its columns. Attempts that ended badly have rows, and so have commands and what the maintenance decided. That a job
became ready after a wait is written nowhere: it follows from the moment at which it was due.
"""

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from operator import attrgetter

import msgspec

from clarion.execution import Attempt
from clarion.job import Happening, Job, JobEvent, JobState

ENQUEUED, READY, CLAIMED, DEAD = "enqueued", "ready", "claimed", "dead"
DETAIL_MAX_CHARS = 200

# When the job was due, by the moment at which it was claimed then.
_Due = Mapping[datetime, datetime | None]


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """What happened to a job, who did it, and what the job was then; a null state is one that nothing tells any more.

    `event` is `enqueued`, `ready`, `claimed`, how an attempt ended, `dead`, or a `JobEvent`.
    """

    at: datetime
    event: str
    actor: str
    state: str | None
    generation: int
    attempt: int | None = None
    detail: str | None = None


def timeline(job: Job, attempts: Sequence[Attempt], happenings: Sequence[Happening]) -> list[Entry]:
    """Everything that happened to the job, in order; `attempts` and `happenings` are each in theirs."""
    due: dict[datetime, datetime | None] = {job.started_at: job.run_at} if job.started_at else {}
    due |= {attempt.started_at: attempt.run_at for attempt in attempts}
    ran = [entry for attempt in attempts for entry in _of_attempt(job, attempt)]
    done = [entry for happening in happenings for entry in _of_happening(job, happening, ran)]
    # Of the same moment, the end of an attempt comes before what was made of it.
    later = sorted([*ran, *done], key=attrgetter("at"))
    state, actor = _first_state(job, later, due), job.enqueued_by or "api"
    first = Entry(at=job.created_at, event=ENQUEUED, actor=actor, state=state, generation=1)
    return list(_with_waits(job, [first, *later], due))


def _of_attempt(job: Job, attempt: Attempt) -> Iterator[Entry]:
    claimed = Entry(
        at=attempt.started_at,
        event=CLAIMED,
        actor="worker" if attempt.worker_id is None else f"worker:{attempt.worker_id}",
        state=JobState.RUNNING,
        generation=attempt.generation,
        attempt=attempt.attempt,
    )
    yield claimed
    if attempt.ended_at is None or attempt.outcome is None:
        return
    actor = "reaper" if attempt.reaped else claimed.actor
    ended = msgspec.structs.replace(claimed, at=attempt.ended_at, actor=actor, state=attempt.state)
    yield msgspec.structs.replace(ended, event=attempt.outcome, detail=_error(attempt))
    if attempt.state == JobState.DEAD:
        # The reason is kept for as long as the job is dead.
        reason = job.dead_reason if attempt.generation == job.generation else None
        yield msgspec.structs.replace(ended, event=DEAD, detail=reason)


def _of_happening(job: Job, happening: Happening, ran: Sequence[Entry]) -> Iterator[Entry]:
    entry = Entry(
        at=happening.at,
        event=happening.event,
        actor=happening.actor,
        state=happening.state,
        generation=happening.generation,
        detail=happening.detail,
    )
    if entry.event == JobEvent.PARKED and job.started_at and all(job.started_at != other.at for other in ran):
        # What is parked is touched as little as can be: its attempt has no row, and its worker no name any more.
        claimed = msgspec.structs.replace(entry, at=job.started_at, event=CLAIMED, actor="worker", attempt=job.attempt)
        yield msgspec.structs.replace(claimed, state=JobState.RUNNING)
    if entry.event == JobEvent.CHANGED:
        names = ", ".join(name.removesuffix("_seconds") for name in _changed(entry))
        entry = msgspec.structs.replace(entry, detail=names)
    yield entry


def _first_state(job: Job, later: Sequence[Entry], due: _Due) -> JobState | None:
    """What the job was when it was enqueued, by the moment at which it was due at first."""
    first_due: datetime | None = job.run_at
    for entry in later:
        if entry.event == CLAIMED:
            first_due = due[entry.at]
            break
        if _reschedules(entry):
            # Only what waits can be retried within a generation.
            was_waiting = entry.event == JobEvent.RETRIED and entry.generation == 1
            return JobState.SCHEDULED if was_waiting else None
    if first_due is None:
        return None
    return JobState.SCHEDULED if first_due > job.created_at else JobState.READY


def _with_waits(job: Job, entries: Sequence[Entry], due: _Due) -> Iterator[Entry]:
    """The entries, and between them the moments at which waits were over."""
    for place, entry in enumerate(entries):
        yield entry
        if entry.state != JobState.SCHEDULED:
            continue
        rest = entries[place + 1 :]
        ready_at = _due_after(job, rest, due)
        is_over = (ready_at is not None and ready_at <= rest[0].at) if rest else job.state == JobState.READY
        if ready_at is not None and is_over:
            at = max(ready_at, entry.at)
            yield Entry(at=at, event=READY, actor="scheduler", state=JobState.READY, generation=entry.generation)


def _due_after(job: Job, rest: Sequence[Entry], due: _Due) -> datetime | None:
    """When a job that waits is due, if these come after; None where that was overwritten."""
    for entry in rest:
        if entry.event == CLAIMED:
            return due[entry.at]
        if _reschedules(entry):
            return None
    return job.run_at


def _reschedules(entry: Entry) -> bool:
    moved = entry.event == JobEvent.CHANGED and not {"run_at", "delay"}.isdisjoint(_changed(entry))
    return entry.event == JobEvent.RETRIED or moved


def _changed(entry: Entry) -> list[str]:
    return (entry.detail or "").split(", ")


def _error(attempt: Attempt) -> str | None:
    if attempt.error_type is None:
        return None
    text = f"{attempt.error_type}: {attempt.error_message or ''}".removesuffix(": ")
    return text if len(text) <= DETAIL_MAX_CHARS else f"{text[:DETAIL_MAX_CHARS]}…"
