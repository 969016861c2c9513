"""What a worker may send, read as strictly as the server reads it."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec
from msgspec import UNSET, Meta, UnsetType

from clarion.durations import parse_duration
from clarion.names import NAME_PATTERN

_WAIT_MAX_SECONDS = 30.0
_LEASE_MIN_SECONDS = 1.0
_DAY_SECONDS = 86_400.0
_YEAR_SECONDS = 365 * _DAY_SECONDS

Name = Annotated[str, Meta(pattern=NAME_PATTERN)]
Duration = str | float


class Verb(StrEnum):
    """What a worker can ask for: the last part of each path, but for `claim`, which has none."""

    CLAIM = "claim"
    HEARTBEAT = "heartbeat"
    COMPLETE = "complete"
    FAIL = "fail"
    SNOOZE = "snooze"
    RELEASE = "release"
    PROGRESS = "progress"
    LOGS = "logs"


# What ends an attempt.
ENDINGS = (Verb.COMPLETE, Verb.FAIL, Verb.SNOOZE, Verb.RELEASE)


class Form(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of a request."""


class Claim(Form, frozen=True):
    """The body of `POST /v1/leases`."""

    worker: UUID
    queues: Annotated[list[Name], Meta(min_length=1)]
    tasks: list[Name] | UnsetType = UNSET
    max: Annotated[int, Meta(ge=1, le=1000)] = 1
    lease: Duration | UnsetType = UNSET
    wait: Duration = 0.0
    name: str | UnsetType = UNSET

    def __post_init__(self) -> None:
        _check_duration("wait", self.wait, _WAIT_MAX_SECONDS)
        _check_lease(self.lease)

    @property
    def wait_seconds(self) -> float:
        """How long the answer may take."""
        return parse_duration(self.wait, max_seconds=_WAIT_MAX_SECONDS)


class HeldLease(Form, frozen=True):
    """One lease in a heartbeat."""

    token: str
    checkpoint: Any = UNSET


class Heartbeat(Form, frozen=True):
    """The body of `POST /v1/leases/heartbeat`."""

    worker: UUID
    leases: Annotated[list[HeldLease], Meta(max_length=1000)]
    lease: Duration | UnsetType = UNSET

    def __post_init__(self) -> None:
        _check_lease(self.lease)


class Complete(Form, frozen=True):
    """The body of `complete`."""

    result: Any = None


class Error(Form, frozen=True):
    """What went wrong."""

    type: Annotated[str, Meta(min_length=1)]
    message: str
    trace: str | UnsetType = UNSET


class Fail(Form, frozen=True):
    """The body of `fail`."""

    error: Error
    outcome: Literal["failed", "timeout", "undecodable"] = "failed"
    retryable: bool = True
    retry_in: Duration | UnsetType = UNSET

    def __post_init__(self) -> None:
        if self.retry_in is not UNSET:
            _check_duration("retry_in", self.retry_in, _YEAR_SECONDS)


class Snooze(Form, frozen=True):
    """The body of `snooze`."""

    delay: Duration

    def __post_init__(self) -> None:
        _check_duration("delay", self.delay, _YEAR_SECONDS)


class Release(Form, frozen=True):
    """The body of `release`, which needs none."""


class Progress(Form, frozen=True):
    """The body of `progress`."""

    current: float | UnsetType = UNSET
    total: float | UnsetType = UNSET
    message: str | UnsetType = UNSET
    checkpoint: Any = UNSET


class Line(Form, frozen=True):
    """One line of a log."""

    n: Annotated[int, Meta(ge=1)]
    message: str
    level: str = "info"
    fields: dict[str, Any] = {}


class Logs(Form, frozen=True):
    """The body of `logs`."""

    lines: list[Line]


FORMS: Mapping[Verb, type[Form]] = {
    Verb.CLAIM: Claim,
    Verb.HEARTBEAT: Heartbeat,
    Verb.COMPLETE: Complete,
    Verb.FAIL: Fail,
    Verb.SNOOZE: Snooze,
    Verb.RELEASE: Release,
    Verb.PROGRESS: Progress,
    Verb.LOGS: Logs,
}


def read_form(verb: Verb, body: bytes, media_type: str) -> Form | str:
    """The body as the verb's form; or, in words, what is wrong with it."""
    if not body and verb is Verb.RELEASE:
        return Release()
    if media_type.partition(";")[0].strip().lower() != "application/json":
        return f"the content-type is {media_type or 'missing'}, not application/json"
    try:
        return msgspec.json.decode(body, type=FORMS[verb])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        return f"{error} in {body[:200].decode(errors='replace')!r}"


def _check_lease(lease: Duration | UnsetType) -> None:
    if lease is not UNSET:
        seconds = _check_duration("lease", lease, _DAY_SECONDS)
        if seconds < _LEASE_MIN_SECONDS:
            raise ValueError("lease must be at least 1s")


def _check_duration(name: str, value: Duration, max_seconds: float) -> float:
    try:
        return parse_duration(value, max_seconds=max_seconds)
    except ValueError as error:
        raise ValueError(f"{name} {error}") from None
