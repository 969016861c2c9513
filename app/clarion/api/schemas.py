"""What requests about jobs may say, and the conversions to Clarion's own records."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from operator import attrgetter
from typing import Annotated, TypeAlias

from msgspec import UNSET, Meta, Raw, UnsetType

from clarion.api.cursor import decode_cursor
from clarion.api.decoding import Form, below
from clarion.api.requests import IDEMPOTENCY_KEY_MAX_CHARS
from clarion.durations import format_duration, parse_duration
from clarion.errors import FieldError
from clarion.job import JobFilter, JobState, NewJob
from clarion.names import NAME_PATTERN
from clarion.payload import FaultFinder

_DAY_SECONDS = 86_400
DELAY_MAX_SECONDS = 3_650 * _DAY_SECONDS
LIST_MAX = 500
# A request with a key may be the repetition of one that came in time: for so long its client may have been at it.
REPEAT_SECONDS = 300
# Dates that the columns, and the arithmetic on the time part of ids, are sure to hold.
_EARLIEST = datetime(1970, 1, 1, tzinfo=UTC)
_LATEST = datetime(2200, 1, 1, tzinfo=UTC)
DATES = "must be between 1970 and 2200"

# The least and the most seconds of each duration. A timeout under a millisecond would not survive its `real` column.
_DURATION_BOUNDS = {
    "delay": (0, DELAY_MAX_SECONDS),
    "timeout": (0.001, 30 * _DAY_SECONDS),
    "backoff": (0, _DAY_SECONDS),
    "backoff_cap": (0, 7 * _DAY_SECONDS),
    "start_within": (0.001, DELAY_MAX_SECONDS),
    "total_timeout": (0.001, DELAY_MAX_SECONDS),
}

Name = Annotated[
    str,
    Meta(
        pattern=NAME_PATTERN,
        description="must be 1 to 128 of the characters A-Z a-z 0-9 _ . : / -, the first a letter or digit",
    ),
]
Duration = Annotated[str | float, Meta(description='Seconds, or a number with a unit: "250ms", "30s", "5m", "2h".')]
Moment = Annotated[datetime, Meta(tz=True, description="must be RFC 3339 with an offset, as in 2026-01-31T12:00:00Z")]
State = Annotated[JobState, Meta(description=f"must be one of {', '.join(JobState)}")]
Payload: TypeAlias = Annotated[
    Raw | UnsetType, Meta(description="A JSON object, kept to the letter.", extra_json_schema={"type": "object"})
]
Priority = Annotated[int, Meta(ge=-100, le=100, description="Higher runs first.")]
MaxAttempts = Annotated[int, Meta(ge=1, le=1000, description="Runs, the first included.")]
Key = Annotated[
    str,
    Meta(min_length=1, max_length=IDEMPOTENCY_KEY_MAX_CHARS, description="The same request again adds no other job."),
]
ListLimit = Annotated[int, Meta(ge=1, le=LIST_MAX, description=f"must be a whole number from 1 to {LIST_MAX}")]


class JobIn(Form, frozen=True, kw_only=True, gc=False):
    """A job to enqueue. What it leaves open, the task's definition decides, then the settings."""

    task: Name
    queue: Name = "default"
    args: Payload = UNSET
    priority: Priority = 0
    run_at: Moment | None = None
    delay: Duration | None = None
    start_by: Moment | None = None
    start_within: Duration | None = None
    total_timeout: Duration | None = None
    max_attempts: MaxAttempts | None = None
    timeout: Duration | None = None
    backoff: Duration | None = None
    backoff_cap: Duration | None = None
    idempotency_key: Key | None = None

    def broken_rules(self, finder: FaultFinder) -> Iterator[FieldError]:
        """A payload that is a storable object, durations within bounds, one start within ten years and one deadline."""
        yield from payload_errors(self.args, finder)
        if not self._is_plain:
            yield from self._broken_choices()
        if self.idempotency_key is not None and not self.idempotency_key.isprintable():
            yield FieldError("must be printable characters", pointer="/idempotency_key")

    def _broken_choices(self) -> Iterator[FieldError]:
        yield from duration_errors(self)
        if self.run_at is not None and self.delay is not None:
            yield FieldError("excludes run_at: give one of them", pointer="/delay")
        yield from start_errors(self.run_at)
        if self.start_by is not None and self.start_within is not None:
            yield FieldError("excludes start_by: give one of them", pointer="/start_within")
        yield from deadline_errors(self.start_by)
        if self.start_by is not None and self.run_at is not None and self.start_by < self.run_at:
            yield FieldError("is before run_at", pointer="/start_by")

    def late_start(self, *, keyed: bool) -> FieldError | None:
        """A start_by before the moment at which the job would be due now; one with a key was perhaps sent before."""
        if self.start_by is None:
            return None
        due = datetime.now(UTC) + timedelta(seconds=(self._seconds("delay") or 0) - keyed * REPEAT_SECONDS)
        return FieldError("is before the job is due", pointer="/start_by") if self.start_by < due else None

    def to_new_job(self, *, enqueued_by: str | None = None) -> NewJob:
        """The record that is stored, without a key."""
        args = "{}" if self.args is UNSET else str(bytes(self.args), "utf-8")
        if self._is_plain:
            return NewJob(task=self.task, queue=self.queue, args=args, priority=self.priority, enqueued_by=enqueued_by)
        return NewJob(
            task=self.task,
            queue=self.queue,
            args=args,
            priority=self.priority,
            enqueued_by=enqueued_by,
            run_at=self.run_at,
            delay_seconds=self._seconds("delay"),
            max_attempts=self.max_attempts,
            timeout_seconds=self._seconds("timeout"),
            backoff_seconds=self._seconds("backoff"),
            backoff_cap_seconds=self._seconds("backoff_cap"),
            start_by=self.start_by.astimezone(UTC) if self.start_by else None,
            start_within_seconds=self._seconds("start_within"),
            total_timeout_seconds=self._seconds("total_timeout"),
        )

    @property
    def _is_plain(self) -> bool:
        """Whether it leaves everything open that most do: to look at each field by itself is most of a batch's cost."""
        return _CHOICES(self) == _NONE_CHOSEN

    def _seconds(self, name: str) -> float | None:
        value = getattr(self, name)
        return None if value is None else seconds_in(name, value)


# Of the fields, those that `broken_rules` and `to_new_job` treat alike in every job; all others are left open by most.
_OF_EVERY_JOB = {"task", "queue", "args", "priority", "idempotency_key"}
_OPEN = [name for name in JobIn.__struct_fields__ if name not in _OF_EVERY_JOB]
_CHOICES = attrgetter(*_OPEN)
_NONE_CHOSEN = (None,) * len(_OPEN)


class BatchIn(Form, frozen=True, kw_only=True):
    """Jobs to enqueue together, all or none."""

    jobs: list[JobIn]

    def broken_rules(self, finder: FaultFinder) -> Iterator[FieldError]:
        """Those of every job."""
        for index, job in enumerate(self.jobs):
            for error in job.broken_rules(finder):
                yield below(f"/jobs/{index}", error)


class JobQuery(Form, frozen=True, kw_only=True):
    """`wait`: answer when the job is finished, or after so long."""

    wait: str | None = None


class JobListQuery(Form, frozen=True, kw_only=True):
    """Which jobs to list, newest first."""

    state: State | None = None
    queue: Name | None = None
    task: Name | None = None
    created_after: Moment | None = None
    created_before: Moment | None = None
    limit: ListLimit = 50
    cursor: str | None = None

    def broken_rules(self, finder: FaultFinder) -> Iterator[FieldError]:
        """Dates that Postgres can hold, and a cursor of ours."""
        for name in ("created_after", "created_before"):
            if not is_storable(getattr(self, name)):
                yield FieldError(DATES, parameter=name)
        try:
            self.to_filter()
        except ValueError as error:
            yield FieldError(str(error), parameter="cursor")

    def to_filter(self) -> JobFilter:
        """The record that the store takes."""
        return JobFilter(
            state=self.state,
            queue=self.queue,
            task=self.task,
            created_after=self.created_after,
            created_before=self.created_before,
            before_id=decode_cursor(self.cursor) if self.cursor is not None else None,
        )


def payload_errors(args: Raw | UnsetType, finder: FaultFinder) -> Iterator[FieldError]:
    """Why `args` cannot be a payload."""
    if args is not UNSET and (fault := finder.in_payload(bytes(args))):
        yield FieldError(fault.detail, pointer=f"/args{fault.pointer}")


def duration_errors(form: Form) -> Iterator[FieldError]:
    """Every duration of a form that is none, or out of its bounds."""
    for name in _DURATION_BOUNDS:
        value = getattr(form, name, None)
        try:
            if value is not None and value is not UNSET:
                seconds_in(name, value)
        except ValueError as error:
            yield FieldError(str(error), pointer=f"/{name}")


def start_errors(run_at: datetime | UnsetType | None) -> Iterator[FieldError]:
    """A start that is too far away."""
    if run_at and not _EARLIEST <= run_at <= datetime.now(UTC) + timedelta(seconds=DELAY_MAX_SECONDS):
        yield FieldError("must be between 1970 and ten years from now", pointer="/run_at")


def deadline_errors(start_by: datetime | UnsetType | None) -> Iterator[FieldError]:
    """A deadline that no column can hold."""
    if start_by and not is_storable(start_by):
        yield FieldError(DATES, pointer="/start_by")


def is_storable(moment: datetime | None) -> bool:
    """Whether columns, and the arithmetic on them, are sure to hold the moment."""
    return moment is None or _EARLIEST <= moment <= _LATEST


def seconds_in(name: str, value: str | float) -> float:
    """The seconds of the duration `name`; raises ValueError, in words for the caller, when they are out of bounds."""
    least, most = _DURATION_BOUNDS[name]
    seconds = parse_duration(value, max_seconds=most)
    if seconds < least:
        raise ValueError(f"must be between {format_duration(least)} and {format_duration(most)}")
    return seconds
