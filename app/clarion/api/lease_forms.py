"""What workers may say over HTTP, and the conversions to Clarion's own records.

An ending that is refused is an outcome that is lost: the lease runs out, and the job runs again. So the texts of
errors are cut to size instead of being judged.
"""

from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated, Any
from uuid import UUID

import msgspec
from msgspec import UNSET, Meta, Raw, UnsetType

from clarion import texts
from clarion.api.decoding import Form, below, decode
from clarion.api.lease_bodies import HALF_A_PAIR
from clarion.api.lease_tokens import decode_lease_token
from clarion.api.schemas import Duration, Name
from clarion.claims import Ask
from clarion.durations import format_duration, parse_duration
from clarion.errors import FieldError, Invalid
from clarion.execution import AttemptOutcome, Beat, Failure, LogLine
from clarion.job import DeadReason
from clarion.payload import FaultFinder
from clarion.texts import LINE_FIELDS_MAX_BYTES, LINE_MESSAGE_MAX_CHARS, PROGRESS_MESSAGE_MAX_CHARS, storable

CLAIM_MAX_JOBS = 1_000
HEARTBEAT_MAX_LEASES = 1_000
LOG_CALL_MAX_LINES = 1_000
CHECKPOINT_MAX_BYTES = 1_048_576
_HAS_HALF_A_PAIR = "holds half a surrogate pair, which is no character"
WAIT_MAX_SECONDS = 30.0
_QUEUES_MAX = 100
_TASKS_MAX = 1_000
# Beyond, readers that know only doubles would see another number.
_PROGRESS_MAX = 2**53
_DAY_SECONDS = 86_400

# The least and the most seconds of each duration.
_DURATION_BOUNDS: dict[str, tuple[float, float]] = {
    "wait": (0, WAIT_MAX_SECONDS),
    "lease": (1, _DAY_SECONDS),
    "retry_in": (0, 7 * _DAY_SECONDS),
    "delay": (0, 365 * _DAY_SECONDS),
}

Names = Annotated[
    list[Name],
    Meta(description="must be a list of names, each 1 to 128 of the characters A-Z a-z 0-9 _ . : / -"),
]
Json = Annotated[Raw | UnsetType, Meta(description="Any JSON value, kept to the letter.", extra_json_schema={})]


class LeasesIn(Form, frozen=True, kw_only=True):
    """Who wants jobs, how many, and of which tasks (left out: any); `worker` is new with each start of a process."""

    worker: UUID
    queues: Names
    tasks: Names | None = None
    max: Annotated[int, Meta(ge=1, le=CLAIM_MAX_JOBS)] = 1
    lease: Duration | None = None
    wait: Duration = 0
    name: Annotated[str, Meta(description="For people: host and process, say.")] = ""

    def broken_rules(self, finder: FaultFinder) -> Iterator[FieldError]:
        """At least one queue and one task, not too many of them, and durations within bounds."""
        for member, names, most in (("queues", self.queues, _QUEUES_MAX), ("tasks", self.tasks, _TASKS_MAX)):
            if names == [] or len(names or ()) > most:
                yield FieldError(f"must hold 1 to {most} names", pointer=f"/{member}")
        yield from _duration_errors(self, "lease", "wait")

    def to_ask(self, *, lease_seconds: float) -> Ask:
        """What is asked of the hub; `lease_seconds` where the worker does not say."""
        lease = _seconds(self, "lease")
        return Ask(
            worker_id=self.worker,
            queues=list(dict.fromkeys(self.queues)),
            tasks=None if self.tasks is None else frozenset(self.tasks),
            jobs_max=self.max,
            lease_seconds=lease_seconds if lease is None else lease,
        )

    @property
    def wait_seconds(self) -> float:
        """How long it may take until there is one."""
        return _seconds(self, "wait") or 0


class HeldIn(Form, frozen=True, kw_only=True):
    """A lease that a worker holds, and what its attempt leaves for the next, if it says."""

    token: str
    checkpoint: Json = UNSET


class HeartbeatIn(Form, frozen=True, kw_only=True):
    """A worker that is alive, and everything it holds."""

    worker: UUID
    leases: list[HeldIn]
    lease: Duration | None = None

    def broken_rules(self, finder: FaultFinder) -> Iterator[FieldError]:
        """Not too many leases, and a duration within bounds. A bad checkpoint must not cost the others their leases."""
        yield from _too_many(self.leases, HEARTBEAT_MAX_LEASES, "/leases")
        yield from _duration_errors(self, "lease")

    def to_beats(self, finder: FaultFinder) -> tuple[dict[str, Beat], dict[str, str]]:
        """What to extend, by token, and why a checkpoint is refused, by token. What is no token holds nothing."""
        beats: dict[str, Beat] = {}
        refused: dict[str, str] = {}
        lease_seconds = _seconds(self, "lease")
        for held in self.leases:
            fault = _checkpoint_fault(bytes(held.checkpoint), finder) if held.checkpoint is not UNSET else None
            if fault:
                refused[held.token] = f"checkpoint{fault}"
            try:
                job_id, token = decode_lease_token(held.token)
            except ValueError:
                continue
            beats[held.token] = Beat(
                id=job_id,
                token=token,
                lease_seconds=lease_seconds,
                checkpoint=None if fault else _text(held.checkpoint),
            )
        return beats, refused


class CompleteIn(Form, frozen=True, kw_only=True):
    """A success, and what came of it."""

    result: Json = UNSET

    def broken_rules(self, finder: FaultFinder) -> Iterator[FieldError]:
        """A result that can be stored."""
        yield from _json_errors(self.result, finder, "/result")

    @property
    def result_text(self) -> str | None:
        """The result to the letter; null counts as none."""
        return None if self.result is UNSET or bytes(self.result) == b"null" else _text(self.result)


class Verdict(StrEnum):
    """How an attempt went wrong."""

    FAILED = "failed"
    TIMEOUT = "timeout"
    UNDECODABLE = "undecodable"


class ErrorIn(Form, frozen=True, kw_only=True):
    """What went wrong; long texts are cut in the middle."""

    type: str
    message: str
    trace: str | None = None


class FailIn(Form, frozen=True, kw_only=True):
    """An attempt that went wrong: not `retryable`, or `undecodable`, and the job is dead at once."""

    # Decoded by itself, so that all its errors are found, each in its place.
    error: Annotated[Raw, Meta(extra_json_schema=msgspec.json.schema(ErrorIn)["$defs"]["ErrorIn"])]
    outcome: Annotated[Verdict, Meta(description=f"must be one of {', '.join(Verdict)}")] = Verdict.FAILED
    retryable: bool = True
    retry_in: Duration | None = None

    def broken_rules(self, finder: FaultFinder) -> Iterator[FieldError]:
        """An error that says what happened, and a duration within bounds."""
        if isinstance(self.error, Raw):
            try:
                decode(bytes(self.error), ErrorIn)
            except Invalid as error:
                yield from (below("/error", part) for part in error.errors)
        yield from _duration_errors(self, "retry_in")

    def to_failure(self, job_id: UUID, token: UUID) -> Failure:
        """The record that is stored."""
        error = decode(bytes(self.error), ErrorIn)
        dead_reason = None if self.retryable else DeadReason.NOT_RETRYABLE
        return Failure(
            id=job_id,
            token=token,
            outcome=AttemptOutcome.TIMEOUT if self.outcome is Verdict.TIMEOUT else AttemptOutcome.FAILED,
            error_type=storable(error.type, texts.ERROR_TYPE_MAX_CHARS) or "Error",
            error_message=storable(error.message, texts.ERROR_MESSAGE_MAX_CHARS),
            error_trace=None if error.trace is None else storable(error.trace, texts.ERROR_TRACE_MAX_CHARS),
            retry_in_seconds=_seconds(self, "retry_in"),
            dead_reason=DeadReason.UNDECODABLE_PAYLOAD if self.outcome is Verdict.UNDECODABLE else dead_reason,
        )


class SnoozeIn(Form, frozen=True, kw_only=True):
    """An attempt that postpones its job."""

    delay: Duration

    def broken_rules(self, finder: FaultFinder) -> Iterator[FieldError]:
        """A duration within bounds."""
        yield from _duration_errors(self, "delay")

    @property
    def delay_seconds(self) -> float:
        """For so long."""
        return _seconds(self, "delay") or 0


class ProgressIn(Form, frozen=True, kw_only=True):
    """How far an attempt has come, and what it leaves for the next should it not get to the end."""

    current: int | float | None = None
    total: int | float | None = None
    message: str | None = None
    checkpoint: Json = UNSET

    def broken_rules(self, finder: FaultFinder) -> Iterator[FieldError]:
        """Numbers that every reader can read, and a checkpoint that can be stored."""
        for name in ("current", "total"):
            if abs(getattr(self, name) or 0) > _PROGRESS_MAX:
                yield FieldError("must be between -2^53 and 2^53", pointer=f"/{name}")
        yield from _json_errors(self.checkpoint, finder, "/checkpoint")

    def to_beat(self, job_id: UUID, token: UUID) -> Beat:
        """The record that is stored; it extends the lease as the claim asked for."""
        said: dict[str, Any] = {"current": self.current, "total": self.total}
        if self.message is not None:
            said["message"] = storable(self.message, PROGRESS_MESSAGE_MAX_CHARS)
        said = {name: value for name, value in said.items() if value is not None}
        progress = msgspec.json.encode(said).decode() if said else None
        return Beat(id=job_id, token=token, progress=progress, checkpoint=_text(self.checkpoint))


class LineIn(Form, frozen=True, kw_only=True):
    """A log line, the `n`-th of its attempt."""

    n: Annotated[int, Meta(ge=1, le=2**31 - 1)]
    message: str
    level: Annotated[
        str, Meta(pattern="^[a-z]{1,20}$(?!\n)", description="must be a word like info, in small letters")
    ] = "info"
    fields: Annotated[Raw | UnsetType, Meta(description="A JSON object.", extra_json_schema={"type": "object"})] = UNSET

    def broken_rules(self, finder: FaultFinder) -> Iterator[FieldError]:
        """Fields that are a storable object, and not too large."""
        if self._fields is None:
            return
        raw = self._fields.encode()
        fault = finder.in_payload(raw)
        if fault:
            yield FieldError(fault.detail, pointer=f"/fields{fault.pointer}")
        elif len(raw) > LINE_FIELDS_MAX_BYTES:
            yield FieldError(f"must have at most {LINE_FIELDS_MAX_BYTES} bytes", pointer="/fields")

    def to_line(self, job_id: UUID, token: UUID) -> LogLine:
        """The record that is stored."""
        message = storable(self.message, LINE_MESSAGE_MAX_CHARS)
        return LogLine(id=job_id, token=token, n=self.n, level=self.level, message=message, fields=self._fields)

    @property
    def _fields(self) -> str | None:
        text = _text(self.fields)
        return None if text == "null" else text


class LogsIn(Form, frozen=True, kw_only=True):
    """What a handler said."""

    lines: list[LineIn]

    def broken_rules(self, finder: FaultFinder) -> Iterator[FieldError]:
        """Not too many lines, and the rules of each."""
        yield from _too_many(self.lines, LOG_CALL_MAX_LINES, "/lines")
        for index, line in enumerate(self.lines):
            for error in line.broken_rules(finder):
                yield below(f"/lines/{index}", error)


def _checkpoint_fault(raw: bytes, finder: FaultFinder) -> str | None:
    """Where and why a checkpoint is refused, if it is."""
    if len(raw) > CHECKPOINT_MAX_BYTES:
        return f" has {len(raw)} bytes, more than the {CHECKPOINT_MAX_BYTES} allowed"
    fault = finder.in_value(raw)
    if fault is None:
        return None
    return f"{fault.pointer} {_HAS_HALF_A_PAIR if HALF_A_PAIR in raw else fault.detail}"


def _text(value: Raw | UnsetType) -> str | None:
    return None if value is UNSET else str(bytes(value), "utf-8")


def _too_many(items: list[Any], most: int, pointer: str) -> Iterator[FieldError]:
    if len(items) > most:
        yield FieldError(f"must hold at most {most} items, not {len(items)}", pointer=pointer)


def _json_errors(value: Raw | UnsetType, finder: FaultFinder, pointer: str) -> Iterator[FieldError]:
    fault = finder.in_value(bytes(value)) if value is not UNSET else None
    if fault:
        yield FieldError(fault.detail, pointer=f"{pointer}{fault.pointer}")


def _duration_errors(form: Form, *names: str) -> Iterator[FieldError]:
    for name in names:
        try:
            _seconds(form, name)
        except ValueError as error:
            yield FieldError(str(error), pointer=f"/{name}")


def _seconds(form: Form, name: str) -> float | None:
    value = getattr(form, name)
    # Where the field itself is missing or wrong there is an empty tuple, and nothing more to say.
    if value is None or value == ():
        return None
    least, most = _DURATION_BOUNDS[name]
    seconds = parse_duration(value, max_seconds=most)
    if seconds < least:
        raise ValueError(f"must be between {format_duration(least)} and {format_duration(most)}")
    return seconds
