"""Jobs one at a time, and lists of them."""

from urllib.parse import urlencode
from uuid import UUID

import anyio
from starlette.requests import ClientDisconnect

from clarion.api.access import Permission
from clarion.api.cursor import encode_cursor
from clarion.api.decoding import Nothing, invalid
from clarion.api.operation import Call, Operation, Reply
from clarion.api.representations import JobListOut, JobOut, fresh_job, job_out, summary_out
from clarion.api.requests import disconnected
from clarion.api.schemas import JobIn, JobListQuery, JobQuery
from clarion.durations import parse_duration
from clarion.errors import FieldError, NotFound, Overloaded, Unavailable, Unstorable
from clarion.job import FINAL, Job
from clarion.store import Store


async def create_job(call: Call[JobIn, Nothing]) -> Reply:
    """Enqueues a job; answers after its commit."""
    new = call.body.to_new_job()
    added = await call.services.enqueuer.enqueue_one(new)
    return Reply(job_out(fresh_job(new, added)), {"Location": call.url(f"/v1/jobs/{added.id}")})


async def list_jobs(call: Call[Nothing, JobListQuery]) -> Reply:
    """A page of jobs, newest first; `Link` leads to the next."""
    limit = call.query.limit
    # One more than asked for tells whether there is a next page.
    found = await call.services.store.list_jobs(call.query.to_filter(), limit=limit + 1)
    cursor = encode_cursor(found[limit - 1].id) if len(found) > limit else None
    page = JobListOut([summary_out(job) for job in found[:limit]], cursor)
    return Reply(page, {"Link": f'<{_next_page(call, cursor)}>; rel="next"'} if cursor else {})


async def get_job(call: Call[Nothing, JobQuery]) -> Reply:
    """A job; with `wait`, once it is finished or the time is up, whichever comes first."""
    job_id, store = _job_id(call.path["id"]), call.services.store
    seconds = _wait_seconds(call)
    job = await _find(store, job_id)
    if seconds and job.state not in FINAL:
        await _wait(call, job_id, seconds)
        job = await _find(store, job_id)
    return Reply(job_out(job))


async def _find(store: Store, job_id: UUID) -> Job:
    job = await store.get_job(job_id)
    if job is None:
        raise NotFound("there is no job with this id")
    return job


async def _wait(call: Call[Nothing, JobQuery], job_id: UUID, seconds: float) -> None:
    gone = False

    async def watch_client(scope: anyio.CancelScope) -> None:
        nonlocal gone
        await disconnected(call.request.receive)
        gone = True
        scope.cancel()

    with call.services.waits.waiter(job_id) as finished, anyio.move_on_after(seconds):
        async with anyio.create_task_group() as group:
            group.start_soon(watch_client, group.cancel_scope)
            await finished.wait()
            group.cancel_scope.cancel()
    if gone:
        raise ClientDisconnect


def _job_id(text: str) -> UUID:
    try:
        job_id = UUID(text)
    except ValueError:
        job_id = None
    # UUID() also takes braces, `urn:` and no hyphens at all: one job has one address.
    if job_id is None or str(job_id) != text.lower():
        raise NotFound("there is no job with this id: ids of jobs are UUIDs")
    return job_id


def _wait_seconds(call: Call[Nothing, JobQuery]) -> float:
    if call.query.wait is None:
        return 0
    try:
        return parse_duration(call.query.wait, max_seconds=call.services.settings.wait_max_seconds)
    except ValueError as error:
        raise invalid([FieldError(str(error), parameter="wait")]) from None


def _next_page(call: Call[Nothing, JobListQuery], cursor: str) -> str:
    kept = [(name, value) for name, value in call.request.query_params.multi_items() if name != "cursor"]
    return call.url(f"/v1/jobs?{urlencode([*kept, ('cursor', cursor)])}")


OPERATIONS = (
    Operation(
        method="POST",
        path="/v1/jobs",
        summary="Enqueue one job",
        handler=create_job,
        permission=Permission.ENQUEUE,
        body=JobIn,
        query=Nothing,
        responds=JobOut,
        status=201,
        problems=(Unavailable, Overloaded, Unstorable),
    ),
    Operation(
        method="GET",
        path="/v1/jobs",
        summary="List jobs, newest first",
        handler=list_jobs,
        permission=Permission.READ,
        body=Nothing,
        query=JobListQuery,
        responds=JobListOut,
        problems=(Unavailable, Overloaded),
    ),
    Operation(
        method="GET",
        path="/v1/jobs/{id}",
        summary="Show one job, or wait for it",
        handler=get_job,
        permission=Permission.READ,
        body=Nothing,
        query=JobQuery,
        responds=JobOut,
        problems=(NotFound, Unavailable, Overloaded),
    ),
)
