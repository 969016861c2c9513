"""Clients of Clarion's HTTP API, for code that awaits and for code that does not.

async with AsyncClient() as client:
    handle = await client.enqueue(send.job(to="ada@example.org", order_id=7), delay="5m", priority=3)
    print(await handle.result(timeout="20m"))
"""

from clarion.client.asynchronous import AsyncClient, AsyncJobHandle
from clarion.client.calls import JobFilters
from clarion.client.errors import (
    ApiError,
    IdempotencyInFlight,
    IdempotencyMismatch,
    IllegalTransition,
    Invalid,
    JobCancelled,
    JobDead,
    JobNotSucceeded,
    NotFound,
    ServerUnavailable,
    Unauthenticated,
    UnexpectedResult,
    Unreachable,
)
from clarion.client.options import ClientOptions
from clarion.client.synchronous import Client, JobHandle
from clarion.client.views import (
    Attempts,
    AttemptView,
    ErrorView,
    JobSummaryView,
    JobView,
    LogLine,
    LogPage,
    TimelineEntry,
)
from clarion.job_request import Duration, JobOptions, JobRequest

__all__ = [
    "ApiError",
    "AsyncClient",
    "AsyncJobHandle",
    "AttemptView",
    "Attempts",
    "Client",
    "ClientOptions",
    "Duration",
    "ErrorView",
    "IdempotencyInFlight",
    "IdempotencyMismatch",
    "IllegalTransition",
    "Invalid",
    "JobCancelled",
    "JobDead",
    "JobFilters",
    "JobHandle",
    "JobNotSucceeded",
    "JobOptions",
    "JobRequest",
    "JobSummaryView",
    "JobView",
    "LogLine",
    "LogPage",
    "NotFound",
    "ServerUnavailable",
    "TimelineEntry",
    "Unauthenticated",
    "UnexpectedResult",
    "Unreachable",
]
