"""What a test expects to wait in the database, and how to say that something else does."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from clarion.client import JobView
from clarion.job import JobState
from clarion.job_request import JobRequest, requested

_WAITING = {JobState.SCHEDULED, JobState.READY}
_SHOWN_MAX_JOBS = 10
_ARGS_MAX_CHARS = 200


class Wanted(msgspec.Struct, frozen=True):
    """Jobs of a task that wait, have at least these arguments, and are in this queue; None: in any."""

    task: str
    args: dict[str, Any]
    queue: str | None

    def __str__(self) -> str:
        """In words."""
        args = f" with {_json(self.args)}" if self.args else ""
        return self.task + args + (f" in queue {self.queue}" if self.queue else "")


def wanted(request: JobRequest[Any] | str, args: Mapping[str, Any] | None, queue: str | None) -> Wanted:
    """What a call of a task, or a task's name with some arguments, stands for; of its options only the queue counts."""
    asked = requested(request, args, {})
    # Dates, structs and the like as they are stored.
    plain = msgspec.json.decode(msgspec.json.encode(asked.args))
    return Wanted(asked.task, plain, queue or asked.options.get("queue"))


def differences(job: JobView, expected: Wanted) -> list[str]:
    """What keeps a job from being the one; nothing if it is."""
    found = [] if job.state in _WAITING else [f"it is {job.state}"]
    if job.task != expected.task:
        return [f"it is {job.task}", *found]
    if expected.queue not in {None, job.queue}:
        found.append(f"its queue is {job.queue}")
    for name, value in expected.args.items():
        if name not in job.args:
            found.append(f"it has no {name}")
        elif job.args[name] != value:
            found.append(f"its {name} is {_json(job.args[name])}")
    return found


def complaint(expected: Wanted, count: str, jobs: Sequence[JobView]) -> str:
    """That not so many jobs are as expected, and what there is, the most alike first."""
    reasons = {job.id: differences(job, expected) for job in jobs}
    found = sum(not why for why in reasons.values())
    alike = sorted(jobs, key=lambda job: (job.task != expected.task, len(reasons[job.id])))
    lines = [f"  {_line(job, reasons[job.id])}" for job in alike[:_SHOWN_MAX_JOBS]]
    if len(alike) > _SHOWN_MAX_JOBS:
        lines.append(f"  and {len(alike) - _SHOWN_MAX_JOBS} more")
    listing = "\n".join(["There is:", *lines] if lines else ["There are no jobs at all."])
    return f"expected {count}, found {found} waiting: {expected}. {listing}"


def _line(job: JobView, reasons: Sequence[str]) -> str:
    args = _json(job.args)
    if len(args) > _ARGS_MAX_CHARS:
        args = f"{args[:_ARGS_MAX_CHARS]}…"
    return f"{job.task} in {job.queue}, {job.state}, {args}" + (f": {', '.join(reasons)}" if reasons else "")


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()
