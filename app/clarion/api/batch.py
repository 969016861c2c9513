"""Many jobs in one request: as one JSON document, all or none, or as a stream of lines, each for itself."""

from contextlib import aclosing
from operator import attrgetter

import anyio
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp

from clarion.api.access import Permission
from clarion.api.decoding import Nothing, invalid
from clarion.api.idempotency import REPLAYED, check_batch, check_replays, new_jobs, with_keys
from clarion.api.intake import SPOOL_MEMORY_BYTES, Intake, LineAnswer, SpooledAnswer
from clarion.api.operation import Call, Operation, Reply
from clarion.api.representations import BatchOut, JobRef
from clarion.api.requests import NDJSON, idempotency_key, read_lines
from clarion.api.schemas import BatchIn, JobIn
from clarion.errors import (
    ClarionError,
    FieldError,
    IdempotencyInFlight,
    IdempotencyMismatch,
    Overloaded,
    Unavailable,
    Unstorable,
)


async def create_jobs(call: Call[BatchIn, Nothing]) -> Reply:
    """Enqueues all jobs or none; answers after their commit, in their order."""
    header_key = idempotency_key(call.request.headers)
    most = call.services.settings.batch_max_jobs
    if len(call.body.jobs) > most:
        detail = f"holds {len(call.body.jobs)} jobs, and at most {most} fit; {NDJSON} takes any number"
        raise invalid([FieldError(detail, pointer="/jobs")])
    if not call.body.jobs:
        return Reply(BatchOut([]))
    items = with_keys(call.body.jobs, header_key)
    jobs = await new_jobs(items, call.actor)
    check_batch(items, jobs)
    added = await call.services.enqueuer.enqueue(jobs)
    check_replays(items, jobs, added)
    refs = [JobRef(job.id, job.state, job.run_at, replayed=job.request is not None) for job in added]
    return Reply(BatchOut(refs), REPLAYED if all(ref.replayed for ref in refs) else {})


async def stream_jobs(call: Call[Nothing, Nothing]) -> ASGIApp:
    """Enqueues any number of jobs, a line each; answers a line each once the last has been read.

    The answers wait in a spool, since most clients read nothing before they have sent everything: answering as we
    go would fill both sockets' buffers and leave either side waiting for the other.
    """
    header_key = idempotency_key(call.request.headers)
    spool = anyio.SpooledTemporaryFile[bytes](max_size=SPOOL_MEMORY_BYTES)
    try:
        intake = Intake(call, spool, header_key)
        await _take_in(call, intake)
        return SpooledAnswer(spool, size=await spool.tell())
    except BaseException:
        with anyio.CancelScope(shield=True):
            await spool.aclose()
        raise


async def _take_in(call: Call[Nothing, Nothing], intake: Intake) -> None:
    """Reads all lines while those before them are added."""
    failure: ClarionError | ClientDisconnect | None = None
    line_max_bytes = call.services.settings.body_max_bytes
    async with anyio.create_task_group() as group:
        group.start_soon(intake.run)
        try:
            async with aclosing(read_lines(call.request.receive, line_max_bytes, call.share)) as lines:
                async for line in lines:
                    await intake.take(line)
        except (ClarionError, ClientDisconnect) as error:  # told outside of the group, which would wrap it
            failure = error
        await intake.close(complete=failure is None)
    if failure is not None:
        raise failure


OPERATIONS = (
    Operation(
        method="POST",
        path="/v1/jobs/batch",
        summary="Enqueue many jobs, all or none",
        handler=create_jobs,
        permission=Permission.ENQUEUE,
        body=BatchIn,
        body_max_bytes=attrgetter("batch_body_max_bytes"),
        query=Nothing,
        responds=BatchOut,
        status=201,
        problems=(Unavailable, Overloaded, Unstorable, IdempotencyMismatch, IdempotencyInFlight),
    ),
    Operation(
        method="POST",
        path="/v1/jobs/batch",
        summary="Enqueue a stream of jobs, a line each",
        handler=stream_jobs,
        permission=Permission.ENQUEUE,
        media_type=NDJSON,
        body=Nothing,
        lines=JobIn,
        query=Nothing,
        responds=LineAnswer,
    ),
)
