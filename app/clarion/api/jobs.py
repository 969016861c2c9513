"""Jobs one at a time, and lists of them."""

from urllib.parse import urlencode
from uuid import UUID

import anyio
import msgspec
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp

from clarion.api.access import Permission
from clarion.api.cursor import encode_cursor
from clarion.api.decoding import Nothing, invalid
from clarion.api.idempotency import REPLAYED, check_replays, new_jobs, with_key
from clarion.api.lookup import etag_of, find_job, job_id_in, job_reply, names_version
from clarion.api.operation import Call, Operation, Reply
from clarion.api.representations import JobListOut, JobOut, fresh_job, job_out, summary_out
from clarion.api.requests import disconnected, idempotency_key
from clarion.api.schemas import JobIn, JobListQuery, JobQuery
from clarion.durations import parse_duration
from clarion.errors import (
    FieldError,
    IdempotencyInFlight,
    IdempotencyMismatch,
    NotFound,
    Overloaded,
    Unavailable,
    Unstorable,
)
from clarion.job import FINAL


async def create_job(call: Call[JobIn, Nothing]) -> Reply:
    """Enqueues a job; answers after its commit. A known key adds none: the answer is the first one's."""
    item = with_key(call.body, idempotency_key(call.request.headers))
    [new] = await new_jobs([item], call.actor)
    added = await call.services.enqueuer.enqueue_one(new)
    check_replays([item], [new], [added])
    headers = {"Location": call.url(f"/v1/jobs/{added.id}")}
    if added.request is not None:
        # The same values, but perhaps spelt otherwise: the answer is to be the first one's, to the letter.
        known = await call.services.store.get_job(added.id)
        new = new if known is None else msgspec.structs.replace(new, args=known.args, enqueued_by=known.enqueued_by)
        headers |= REPLAYED
    return Reply(job_out(fresh_job(new, added)), headers)


async def list_jobs(call: Call[Nothing, JobListQuery]) -> Reply:
    """A page of jobs, newest first; `Link` leads to the next."""
    limit = call.query.limit
    # One more than asked for tells whether there is a next page.
    found = await call.services.store.list_jobs(call.query.to_filter(), limit=limit + 1)
    cursor = encode_cursor(found[limit - 1].id) if len(found) > limit else None
    page = JobListOut([summary_out(job) for job in found[:limit]], cursor)
    return Reply(page, {"Link": f'<{_next_page(call, cursor)}>; rel="next"'} if cursor else {})


async def get_job(call: Call[Nothing, JobQuery]) -> Reply | ASGIApp:
    """A job; with `wait`, once it is finished or the time is up, whichever comes first."""
    job_id, store = job_id_in(call.path["id"]), call.services.store
    seconds = _wait_seconds(call)
    job = await find_job(store, job_id)
    if seconds and job.state not in FINAL:
        await _wait(call, job_id, seconds)
        job = await find_job(store, job_id)
    if names_version(call.request.headers, "if-none-match", job, weak=True):
        return Response(status_code=304, headers={"ETag": etag_of(job)})
    return job_reply(job)


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
        problems=(Unavailable, Overloaded, Unstorable, IdempotencyMismatch, IdempotencyInFlight),
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
