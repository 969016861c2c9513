"""One attempt as a test sees it: how it ended, and what it said on the way."""

from collections.abc import Sequence
from typing import Any, Generic, TypeVar
from uuid import UUID

import msgspec

from clarion.execution import AttemptOutcome, Beat, Completion, Failure, Lease, LogLine, Release, Snoozing
from clarion.job import JobState
from clarion_worker.runner import Outcome

R = TypeVar("R")


class NoResult(AssertionError):
    """A test asked for the result of a handler that has none, or none of the type that its signature promises."""


class Progress(msgspec.Struct, frozen=True, repr_omit_defaults=True):
    """What one call of `ctx.progress` said."""

    current: float
    total: float | None = None
    message: str | None = None


class Line(msgspec.Struct, frozen=True, repr_omit_defaults=True):
    """What one call of `ctx.log` said."""

    level: str
    message: str
    fields: dict[str, Any] = {}


class HandlerRun(msgspec.Struct, Generic[R], frozen=True, kw_only=True, repr_omit_defaults=True):
    """One attempt, as it went; R is what its handler returns.

    `outcome` is how it ended: `succeeded`, `failed`, `timeout`, `snoozed`, `released` (its handler was told to end), or
    `lease_lost`. `state` is what its job became: `succeeded`, `scheduled`, `ready`, `dead`, or `cancelled`.

    `checkpoint` is what the next attempt would find, `delay_seconds` when it would begin, if a `Snooze` or a `Retry`
    says so. `stuck`: the handler was told to end and did not, so it goes on unseen.
    """

    job_id: UUID
    task: str
    attempt: int
    outcome: str
    state: str
    error_type: str | None = None
    error_message: str | None = None
    error_trace: str | None = None
    dead_reason: str | None = None
    delay_seconds: float | None = None
    progress: list[Progress] = []
    checkpoint: Any = None
    lines: list[Line] = []
    stuck: bool = False
    result_json: str | None = None
    result_type: Any = Any

    @property
    def result(self) -> R:
        """What the handler returned, as whoever waits for the job reads it; raises NoResult for one that did not."""
        if self.outcome != JobState.SUCCEEDED:
            why = self.error_trace or f"{self.error_type}: {self.error_message}" if self.error_type else ""
            raise NoResult(f"{self.task} has no result: its attempt {self.attempt} ended as {self.outcome}\n{why}")
        try:
            result: R = msgspec.json.decode(self.result_json or "null", type=self.result_type)
        except (msgspec.ValidationError, TypeError) as error:
            raise NoResult(
                f"the result of {self.task} is {self.result_json}, which cannot be read as {self.result_type}, "
                f"as its signature promises: {error}"
            ) from None
        return result


class Said(msgspec.Struct, frozen=True):
    """What an attempt has said of itself."""

    beats: list[Beat] = msgspec.field(default_factory=list)
    lines: list[LogLine] = msgspec.field(default_factory=list)


def describe(lease: Lease, outcome: Outcome, said: Said, *, stuck: bool) -> HandlerRun[Any]:
    """The attempt as its handler ended it; what that made of the job is for others to say."""
    run: HandlerRun[Any] = HandlerRun(
        job_id=lease.id,
        task=lease.task,
        attempt=lease.attempt,
        outcome=str(AttemptOutcome.LEASE_LOST),
        state="",
        progress=[msgspec.json.decode(beat.progress, type=Progress) for beat in said.beats if beat.progress],
        checkpoint=_checkpoint(lease, said.beats),
        lines=[Line(line.level, line.message, msgspec.json.decode(line.fields or "{}")) for line in said.lines],
        stuck=stuck,
    )
    return msgspec.structs.replace(run, **_ending(outcome))


def _ending(outcome: Outcome) -> dict[str, Any]:
    match outcome:
        case Completion():
            return {"outcome": str(JobState.SUCCEEDED), "result_json": outcome.result}
        case Snoozing():
            return {"outcome": str(AttemptOutcome.SNOOZED), "delay_seconds": outcome.delay_seconds}
        case Release():
            return {"outcome": str(AttemptOutcome.RELEASED)}
        case Failure():
            return {
                "outcome": str(outcome.outcome),
                "error_type": outcome.error_type,
                "error_message": outcome.error_message,
                "error_trace": outcome.error_trace,
                "dead_reason": outcome.dead_reason and str(outcome.dead_reason),
                "delay_seconds": outcome.retry_in_seconds,
            }
        case None:
            return {}


def _checkpoint(lease: Lease, beats: Sequence[Beat]) -> Any:
    kept = [lease.checkpoint, *(beat.checkpoint for beat in beats)]
    return next((msgspec.json.decode(text) for text in reversed(kept) if text is not None), None)
