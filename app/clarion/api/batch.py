"""Many jobs in one request: as one JSON document, all or none, or as a stream of lines, each for itself."""

from contextlib import aclosing
from operator import attrgetter

import anyio
from starlette.types import ASGIApp

from clarion.api.access import Permission
from clarion.api.decoding import Nothing, invalid
from clarion.api.intake import SPOOL_MEMORY_BYTES, Intake, LineAnswer, SpooledAnswer
from clarion.api.operation import Call, Operation, Reply
from clarion.api.representations import BatchOut, JobRef
from clarion.api.requests import NDJSON, read_lines
from clarion.api.schemas import BatchIn, JobIn
from clarion.errors import FieldError, Overloaded, Unavailable, Unstorable


async def create_jobs(call: Call[BatchIn, Nothing]) -> Reply:
    """Enqueues all jobs or none; answers after their commit, in their order."""
    most = call.services.settings.batch_max_jobs
    if len(call.body.jobs) > most:
        detail = f"holds {len(call.body.jobs)} jobs, and at most {most} fit; {NDJSON} takes any number"
        raise invalid([FieldError(detail, pointer="/jobs")])
    if not call.body.jobs:
        return Reply(BatchOut([]))
    added = await call.services.enqueuer.enqueue([job.to_new_job() for job in call.body.jobs])
    return Reply(BatchOut([JobRef(job.id, job.state, job.run_at) for job in added]))


async def stream_jobs(call: Call[Nothing, Nothing]) -> ASGIApp:
    """Enqueues any number of jobs, a line each; answers a line each once the last has been read.

    The answers wait in a spool, since most clients read nothing before they have sent everything: answering as we
    go would fill both sockets' buffers and leave either side waiting for the other.
    """
    spool = anyio.SpooledTemporaryFile[bytes](max_size=SPOOL_MEMORY_BYTES)
    try:
        intake = Intake(call.request, call.services, spool)
        line_max_bytes = call.services.settings.body_max_bytes
        async with aclosing(read_lines(call.request.receive, line_max_bytes)) as lines:
            async for line in lines:
                await intake.take(line)
        await intake.flush()
        return SpooledAnswer(spool, size=await spool.tell())
    except BaseException:
        with anyio.CancelScope(shield=True):
            await spool.aclose()
        raise


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
        problems=(Unavailable, Overloaded, Unstorable),
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
