"""What answers to workers look like, and the conversions from Clarion's own records. Durations are in seconds."""

from datetime import datetime
from enum import StrEnum
from uuid import UUID

import msgspec
from msgspec import Raw

from clarion.api.lease_tokens import encode_lease_token
from clarion.api.representations import raw
from clarion.execution import Directive, Heartbeat, Lease
from clarion.job import JobState


class LeaseStatus(StrEnum):
    """What became of a lease; `unchanged`: its row was busy at that moment, and it is still held.

    `ended` is said to a call that came late: its own worker has ended the attempt.
    """

    EXTENDED = "extended"
    UNCHANGED = "unchanged"
    CANCEL = "cancel"
    LOST = "lost"
    ENDED = "ended"


class LeaseOut(msgspec.Struct, frozen=True, kw_only=True):
    """A claimed job; `token` names the lease in every call about it, `timeout` is what this attempt has."""

    token: str
    id: UUID
    queue: str
    task: str
    args: Raw
    priority: int
    attempt: int
    max_attempts: int | None
    generation: int
    errors: int
    crashes: int
    timeout: float | None
    lease: float
    checkpoint: Raw | None
    created_at: datetime
    run_at: datetime
    started_at: datetime


class LeasesOut(msgspec.Struct, frozen=True):
    """What a claim took, in the order of the line.

    `waited` is how many seconds the request waited before it took them: so much after it was sent, at the earliest, did
    the leases begin. The directive is `ok`; or `drain`, and then there are no leases.
    """

    leases: list[LeaseOut]
    waited: float
    directive: Directive


class BeatOut(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A lease in the answer to a heartbeat: what is left of it, and what its job is now.

    `refused` says why its checkpoint was not kept; the lease was extended all the same.
    """

    token: str
    status: LeaseStatus
    lease: float | None
    state: str | None
    refused: str | None = None


class HeartbeatOut(msgspec.Struct, frozen=True):
    """The leases in the order of the request, and what the worker is told: `ok`, or `drain`."""

    leases: list[BeatOut]
    directive: str


class ProgressOut(msgspec.Struct, frozen=True):
    """What became of the lease, and what is left of it."""

    status: LeaseStatus
    lease: float | None


class LogsOut(msgspec.Struct, frozen=True):
    """How many lines are stored, and how many are beyond what one job may say."""

    kept: int
    dropped: int


class CompletedOut(msgspec.Struct, frozen=True):
    """A finished job and its result as it is stored."""

    id: UUID
    state: str
    result: Raw | None


class EndedOut(msgspec.Struct, frozen=True):
    """What the end of an attempt made of its job, and when it runs next, if it does."""

    id: UUID
    state: str
    run_at: datetime | None


_SAME_NAMES = tuple(
    name for name in LeaseOut.__struct_fields__ if name in Lease.__struct_fields__ and name not in {"token", "args"}
)


def lease_out(lease: Lease, *, lease_seconds: float) -> LeaseOut:
    """A lease as its worker sees it."""
    fields = {name: getattr(lease, name) for name in _SAME_NAMES}
    return LeaseOut(
        **fields
        | {
            "token": encode_lease_token(lease.id, lease.token),
            "args": raw(lease.args),
            "timeout": _whole_milliseconds(lease.timeout_seconds),
            "lease": lease_seconds,
            "checkpoint": raw(lease.checkpoint),
        }
    )


def status_of(held: Heartbeat) -> LeaseStatus:
    """What became of a lease that is still held."""
    if held.cancelled:
        return LeaseStatus.CANCEL
    return LeaseStatus.EXTENDED if held.extended else LeaseStatus.UNCHANGED


def lease_left(held: Heartbeat) -> float:
    """What is left of a lease, in seconds."""
    return max(0.0, round(held.lease_seconds, 3))


def beat_out(token: str, held: Heartbeat | None, *, state: str | None, refused: str | None) -> BeatOut:
    """A lease in the answer to a heartbeat; `state` is what the job of a lost one is now."""
    if held is None:
        return BeatOut(token=token, status=LeaseStatus.LOST, lease=None, state=state, refused=refused)
    return BeatOut(token=token, status=status_of(held), lease=lease_left(held), state=JobState.RUNNING, refused=refused)


def _whole_milliseconds(seconds: float | None) -> float | None:
    """A timeout from its `real` column, without the noise; of a total timeout it is what is left."""
    return None if seconds is None else round(seconds, 3)
