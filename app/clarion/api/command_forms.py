"""What requests that change jobs may say, and the conversions to Clarion's own records."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, Raw, UnsetType

from clarion.api.decoding import Form
from clarion.api.schemas import (
    DATES,
    Duration,
    MaxAttempts,
    Moment,
    Name,
    Payload,
    Priority,
    deadline_errors,
    duration_errors,
    is_storable,
    payload_errors,
    seconds_in,
    start_errors,
)
from clarion.errors import FieldError
from clarion.job import DeadFilter, DeadReason, Job, JobChange
from clarion.payload import FaultFinder

REASON_MAX_CHARS = 1_000
REDRIVE_MAX_JOBS = 10_000
ERROR_TYPE_MAX_CHARS = 200
_DURATIONS = {"delay", "timeout", "backoff", "backoff_cap", "total_timeout"}

Reason = Annotated[str, Meta(max_length=REASON_MAX_CHARS, description="For people who read the timeline later.")]
ErrorType = Annotated[str, Meta(max_length=ERROR_TYPE_MAX_CHARS, description="The type of the latest error.")]
Pace = Annotated[float, Meta(ge=0.001, le=REDRIVE_MAX_JOBS, description="How fast they become due.")]
Why = Annotated[DeadReason, Meta(description=f"must be one of {', '.join(DeadReason)}")]


class CommandIn(Form, frozen=True, kw_only=True):
    """Why somebody cancels or retries a job, if he says so."""

    reason: Reason | None = None

    def broken_rules(self, finder: FaultFinder) -> Iterator[FieldError]:
        """A reason that Postgres can store."""
        if self.reason and "\x00" in self.reason:
            yield FieldError("holds \\u0000, which Postgres cannot store as text", pointer="/reason")


class RetryIn(CommandIn, frozen=True, kw_only=True):
    """Why, and perhaps of which generation: so a retry can be repeated without running the job a third time."""

    generation: Annotated[int, Meta(ge=1, le=32_767, description="The job's generation, as it was read.")] | None = None


class JobPatch(Form, frozen=True, kw_only=True):
    """What to change of a job that waits. A member that is null goes back to what the task or the settings decide.

    `run_at: null` is now. What counts from the moment at which the job is due, the total timeout, moves with it.
    """

    queue: Name | UnsetType = UNSET
    priority: Priority | UnsetType = UNSET
    run_at: Moment | UnsetType | None = UNSET
    delay: Duration | UnsetType = UNSET
    max_attempts: MaxAttempts | UnsetType | None = UNSET
    timeout: Duration | UnsetType | None = UNSET
    backoff: Duration | UnsetType | None = UNSET
    backoff_cap: Duration | UnsetType | None = UNSET
    total_timeout: Duration | UnsetType | None = UNSET
    start_by: Moment | UnsetType | None = UNSET
    args: Payload = UNSET

    def broken_rules(self, finder: FaultFinder) -> Iterator[FieldError]:
        """The rules that an enqueue has."""
        yield from payload_errors(self.args, finder)
        yield from duration_errors(self)
        yield from start_errors(self.run_at)
        yield from deadline_errors(self.start_by)
        if self.run_at is not UNSET and self.delay is not UNSET:
            yield FieldError("excludes run_at: give one of them", pointer="/delay")

    @property
    def given(self) -> dict[str, Any]:
        """The members that are there."""
        members = msgspec.structs.asdict(self)
        return {name: value for name, value in members.items() if value is not UNSET}

    def late_start(self, job: Job) -> FieldError | None:
        """A start_by that would pass before the job is due; of a job that was started once, none counts any more."""
        moved = [name for name in ("start_by", "run_at", "delay") if name in self.given]
        start_by = self.given.get("start_by", job.start_by)
        if not moved or start_by is None or job.started_at is not None or start_by >= self._due(job):
            return None
        return FieldError("start_by would pass before the job is due", pointer=f"/{moved[0]}")

    def hopeless(self, job: Job) -> FieldError | None:
        """What would leave the job no run: fewer attempts than were made, or a total timeout that is over."""
        if (self.given.get("max_attempts") or job.attempt + 1) <= job.attempt:
            return FieldError(f"must be more than {job.attempt}, the attempts made", pointer="/max_attempts")
        total = self.given.get("total_timeout")
        if total is not None:
            ends = self._due(job) if {"run_at", "delay"} & self.given.keys() else job.run_at
            if ends + timedelta(seconds=seconds_in("total_timeout", total)) <= datetime.now(UTC):
                return FieldError("would be over already, counted from when the job was due", pointer="/total_timeout")
        return None

    def to_change(self, job: Job, args: str | None) -> JobChange:
        """The record that the store takes; `args` as they are to be."""
        values = {_column(name): _stored(name, value) for name, value in self.given.items()} | {"args": args}
        if args is None:
            del values["args"]
        if values.keys() & {"run_at", "delay_seconds"} and job.total_timeout_seconds is not None:
            values.setdefault("total_timeout_seconds", job.total_timeout_seconds)
        return JobChange(names=frozenset(values), **values)

    def _due(self, job: Job) -> datetime:
        now = datetime.now(UTC)
        if not isinstance(self.delay, UnsetType):
            return now + timedelta(seconds=seconds_in("delay", self.delay))
        return max(now, self.given.get("run_at", job.run_at) or now)


class DeadFields(Form, frozen=True, kw_only=True):
    """Which dead jobs are meant."""

    queue: Name | None = None
    task: Name | None = None
    error_type: ErrorType | None = None
    dead_reason: Why | None = None
    died_after: Moment | None = None
    died_before: Moment | None = None

    def wrong_fields(self) -> Iterator[tuple[str, str]]:
        """Names and faults of what Postgres cannot hold."""
        for name in ("died_after", "died_before"):
            if not is_storable(getattr(self, name)):
                yield name, DATES
        if self.error_type and "\x00" in self.error_type:
            yield "error_type", "holds NUL, which no stored text does"

    def to_filter(self) -> DeadFilter:
        """The record that the store takes, from the first one on."""
        return DeadFilter(**{name: getattr(self, name) for name in DeadFields.__struct_fields__})


class RedriveIn(DeadFields, frozen=True, kw_only=True):
    """Which dead jobs to run again: the first `limit` that died, `per_second` of them a second, or all at once."""

    limit: Annotated[int, Meta(ge=1, le=REDRIVE_MAX_JOBS, description="The most jobs.")] = 1_000
    per_second: Pace | None = None
    dry_run: Annotated[bool, Meta(description="Only say what would happen.")] = False

    def broken_rules(self, finder: FaultFinder) -> Iterator[FieldError]:
        """Values that Postgres can hold."""
        for name, fault in self.wrong_fields():
            yield FieldError(fault, pointer=f"/{name}")


def merged(target: bytes, patch: bytes) -> bytes:
    """The JSON text that a merge patch (RFC 7396) makes of another; what it does not touch stays to the letter."""
    if not patch.lstrip().startswith(b"{"):
        return patch
    is_object = target.lstrip().startswith(b"{")
    members = msgspec.json.decode(target, type=dict[str, Raw]) if is_object else {}
    for name, value in msgspec.json.decode(patch, type=dict[str, Raw]).items():
        if bytes(value) == b"null":
            members.pop(name, None)
        else:
            members[name] = Raw(merged(bytes(members.get(name, b"null")), bytes(value)))
    return msgspec.json.encode(members)


def _column(name: str) -> str:
    return f"{name}_seconds" if name in _DURATIONS else name


def _stored(name: str, value: Any) -> Any:
    return seconds_in(name, value) if name in _DURATIONS and value is not None else value
