"""A job to be enqueued, as Python code says it. No I/O, and no HTTP: what runs jobs makes these too."""

import json
from collections.abc import Mapping
from datetime import datetime, timedelta
from math import isfinite
from typing import Any, Generic, TypeAlias, TypedDict, TypeVar, Unpack

import msgspec

R = TypeVar("R")

# Seconds, text with a unit ("250ms", "30s", "5m", "2h"), or Python's own.
Duration: TypeAlias = str | float | timedelta


class JobOptions(TypedDict, total=False):
    """What an enqueue may say besides the task and its arguments.

    What it leaves open, as None does, the task's definition decides, then the server's settings. `priority` is -100 to
    100, higher runs first. Give `run_at` or `delay`, not both; datetimes are aware. `start_within` and `total_timeout`
    count from the moment at which the job is due. A second enqueue with the same `idempotency_key` answers the first
    one's job.
    """

    queue: str
    priority: int
    run_at: datetime
    delay: Duration
    start_by: datetime
    start_within: Duration
    total_timeout: Duration
    max_attempts: int
    timeout: Duration
    backoff: Duration
    backoff_cap: Duration
    idempotency_key: str


class JobRequest(msgspec.Struct, Generic[R], frozen=True):
    """A call of a task that is to become a job; R is what its handler returns.

    `result_type` is R at run time: what a job's result is read as. Without one it stays plain JSON.
    """

    task: str
    args: Mapping[str, Any] = {}
    options: JobOptions = {}
    result_type: Any = Any

    def having(self, **options: Unpack[JobOptions]) -> "JobRequest[R]":
        """The same call with these options, which win over those it has."""
        return msgspec.structs.replace(self, options=self.options | options)


def requested(request: JobRequest[Any] | str, args: Mapping[str, Any] | None, options: JobOptions) -> JobRequest[Any]:
    """The request that an enqueue was given, or that a task's name and its arguments make, with these options."""
    if isinstance(request, str):
        return JobRequest(request, args or {}, options)
    if args is not None:
        raise TypeError("a JobRequest has its arguments already; give others only with a task's name")
    return request.having(**options)


def encode_request(request: JobRequest[Any]) -> bytes:
    """The body that enqueues it; raises TypeError or ValueError for what JSON cannot express."""
    options = {name: _plain(name, value) for name, value in request.options.items() if value is not None}
    encoded = msgspec.json.encode({"task": request.task, "args": request.args, **options})
    # NaN and infinity are written as null, so only arguments with a null in them can hold one.
    if b"null" in encoded:
        json.dumps(msgspec.to_builtins(request.args), allow_nan=False)
    return encoded


def duration_seconds(duration: Duration) -> str | float:
    """A duration in the forms that HTTP knows."""
    return duration.total_seconds() if isinstance(duration, timedelta) else duration


def _plain(name: str, value: object) -> object:
    if isinstance(value, float) and not isfinite(value):
        raise ValueError(f"the option {name} is {value}, which JSON cannot express")
    return duration_seconds(value) if isinstance(value, timedelta) else value
