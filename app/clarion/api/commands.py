"""What people do to single jobs: cancel, retry, change. The statement decides; its answer is explained afterwards."""

from clarion.api.access import Permission
from clarion.api.command_forms import CommandIn, JobPatch, RetryIn, merged
from clarion.api.decoding import Nothing, invalid
from clarion.api.lookup import find_job, job_id_in, job_reply, names_version
from clarion.api.operation import Call, Operation, Reply
from clarion.api.representations import JobOut
from clarion.errors import (
    FieldError,
    IllegalTransition,
    NotFound,
    Overloaded,
    PreconditionFailed,
    PreconditionRequired,
    Unavailable,
    Unstorable,
)
from clarion.execution import ready_by_queue
from clarion.job import Job, JobState, Requeued

MERGE_PATCH = "application/merge-patch+json"
_WAITING = {JobState.SCHEDULED, JobState.READY}
# How often a change is tried on a job that others change at the same time.
_CHANGES_MAX = 5


async def cancel_job(call: Call[CommandIn, Nothing]) -> Reply:
    """Cancels a job that waits or is dead at once, and asks the worker of one that runs; again, changes nothing."""
    store, job_id = call.services.store, job_id_in(call.path["id"])
    [answer] = await store.cancel_jobs([job_id], actor=call.actor, reason=call.body.reason)
    if answer.requested:
        call.services.ringer.mark(cancelled=[job_id])
    job = await find_job(store, job_id)
    if answer.state is None:
        _explain(job, {JobState.CANCELLED}, {JobState.SUCCEEDED}, "be cancelled")
    return job_reply(job)


async def retry_job(call: Call[RetryIn, Nothing]) -> Reply:
    """Runs a dead, cancelled or scheduled job now; one that is ready is left as it is.

    So is one that is beyond the generation that is meant: this call was made before.
    """
    store, job_id, body = call.services.store, job_id_in(call.path["id"]), call.body
    [answer] = await store.retry_jobs([job_id], [0], actor=call.actor, reason=body.reason, generation=body.generation)
    _ring(call, answer)
    job = await find_job(store, job_id)
    if answer.state is None and (body.generation is None or job.generation <= body.generation):
        refused = {JobState.RUNNING, JobState.SUCCEEDED}
        _explain(job, {JobState.READY}, refused, "become ready: only dead, cancelled and scheduled ones can")
    return job_reply(job)


async def change_job(call: Call[JobPatch, Nothing]) -> Reply:
    """Changes a job that waits: each member that is there stands for the old value, `args` as a whole."""
    return await _change(call, merges=False)


async def merge_job(call: Call[JobPatch, Nothing]) -> Reply:
    """The same as a merge patch (RFC 7396): `args` keep the members that the patch does not name."""
    return await _change(call, merges=True)


async def _change(call: Call[JobPatch, Nothing], *, merges: bool) -> Reply:
    store, job_id = call.services.store, job_id_in(call.path["id"])
    if not call.body.given:
        raise invalid([FieldError("names nothing to change", pointer="")])
    if "args" in call.body.given and "if-match" not in call.request.headers:
        raise PreconditionRequired("a change of args needs If-Match with the ETag of the job that was read, or *")
    for left in reversed(range(_CHANGES_MAX)):
        job = await find_job(store, job_id)
        _check(call, job)
        args = _new_args(call, job, merges=merges)
        # Of this very version: whatever happens to the job meanwhile is looked at anew. Among many who change it at
        # once somebody must be last, and where no version is meant it may be this one.
        version = job.version if left or args is not None or "if-match" in call.request.headers else None
        answer = await store.change_job(job_id, call.body.to_change(job, args), version=version, actor=call.actor)
        if answer is not None:
            _ring(call, answer)
            return job_reply(await find_job(store, job_id))
    raise Unavailable("others keep changing this job: try again")


def _check(call: Call[JobPatch, Nothing], job: Job) -> None:
    headers = call.request.headers
    if "if-match" in headers and not names_version(headers, "if-match", job):
        raise PreconditionFailed("the job has changed since: its ETag is another one now")
    if job.state not in _WAITING:
        detail = f"a {job.state} job cannot be changed: only scheduled and ready ones can"
        raise IllegalTransition(detail, state=job.state)
    errors = [error for error in (call.body.late_start(job), call.body.hopeless(job)) if error is not None]
    if errors:
        raise invalid(errors)


def _new_args(call: Call[JobPatch, Nothing], job: Job, *, merges: bool) -> str | None:
    if "args" not in call.body.given:
        return None
    patch = bytes(call.body.given["args"])
    args = merged(job.args.encode(), patch) if merges else patch
    most = call.services.settings.body_max_bytes
    if len(args) > most:
        raise invalid([FieldError(f"would be over {most} bytes", pointer="/args")])
    return str(args, "utf-8")


def _explain(job: Job, as_wished: set[JobState], refused: set[JobState], wish: str) -> None:
    """Why a command did nothing, by what the job is now; returns where it is what the caller wants already."""
    if job.state in refused:
        raise IllegalTransition(f"a {job.state} job cannot {wish}", state=job.state)
    if job.state not in as_wished:
        raise Unavailable("the job changed at this very moment: try again")


def _ring(call: Call[RetryIn, Nothing] | Call[JobPatch, Nothing], answer: Requeued) -> None:
    if answer.state == JobState.SCHEDULED:
        call.services.ringer.mark(scheduled=True)
    else:
        # Also a job that was ready already: for as long as it was locked here, claims skipped it.
        call.services.ringer.mark(ready_by_queue([(answer.queue, answer.sort_key)]))


_PATCH_PROBLEMS = (
    NotFound,
    IllegalTransition,
    PreconditionFailed,
    PreconditionRequired,
    Unavailable,
    Overloaded,
    Unstorable,
)

OPERATIONS = (
    Operation(
        method="POST",
        path="/v1/jobs/{id}/cancel",
        summary="Cancel a job",
        handler=cancel_job,
        permission=Permission.OPERATE,
        body=CommandIn,
        body_optional=True,
        query=Nothing,
        responds=JobOut,
        problems=(NotFound, IllegalTransition, Unavailable, Overloaded),
    ),
    Operation(
        method="POST",
        path="/v1/jobs/{id}/retry",
        summary="Run a job again",
        handler=retry_job,
        permission=Permission.OPERATE,
        body=RetryIn,
        body_optional=True,
        query=Nothing,
        responds=JobOut,
        problems=(NotFound, IllegalTransition, Unavailable, Overloaded),
    ),
    Operation(
        method="PATCH",
        path="/v1/jobs/{id}",
        summary="Change a job that waits",
        handler=change_job,
        permission=Permission.OPERATE,
        body=JobPatch,
        query=Nothing,
        responds=JobOut,
        problems=_PATCH_PROBLEMS,
    ),
    Operation(
        method="PATCH",
        path="/v1/jobs/{id}",
        summary="Change a job that waits, its args member by member",
        handler=merge_job,
        permission=Permission.OPERATE,
        media_type=MERGE_PATCH,
        body=JobPatch,
        query=Nothing,
        responds=JobOut,
        problems=_PATCH_PROBLEMS,
    ),
)
