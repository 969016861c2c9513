"""The workers that are alive, and telling one to stop."""

from datetime import datetime
from typing import Annotated
from uuid import UUID

import msgspec
from msgspec import Meta

from clarion.api.access import Permission
from clarion.api.decoding import Form, Nothing
from clarion.api.operation import Call, Operation, Reply
from clarion.api.requests import uuid_in_path
from clarion.errors import NotFound, Overloaded, Unavailable
from clarion.execution import Directive, WorkerSeen

_LIST_MAX = 1_000


class WorkersQuery(Form, frozen=True, kw_only=True):
    """How many to list."""

    limit: Annotated[int, Meta(ge=1, le=_LIST_MAX, description=f"must be a whole number from 1 to {_LIST_MAX}")] = 500


class WorkerOut(msgspec.Struct, frozen=True, kw_only=True):
    """A worker process. One that claims over HTTP may have no tasks here: then it takes any."""

    id: UUID
    name: str
    version: str
    queues: list[str]
    tasks: list[str]
    concurrency: int
    running: int
    state: str
    directive: str
    started_at: datetime
    seen_at: datetime


class WorkersOut(msgspec.Struct, frozen=True):
    """Those that were seen lately, the youngest first."""

    workers: list[WorkerOut]


class DrainOut(msgspec.Struct, frozen=True):
    """What the worker is told with its next heartbeat."""

    id: UUID
    directive: str


async def list_workers(call: Call[Nothing, WorkersQuery]) -> Reply:
    """Workers that are alive, or died lately."""
    seen = await call.services.store.list_workers(limit=call.query.limit)
    return Reply(WorkersOut([_worker_out(worker) for worker in seen]))


async def drain_worker(call: Call[Nothing, Nothing]) -> Reply:
    """Tells a worker to claim no more, finish what it runs, and exit."""
    worker_id = uuid_in_path(call.path["id"])
    if worker_id is None or not await call.services.store.drain_worker(worker_id):
        raise NotFound("there is no worker with this id; GET /v1/workers lists those that were seen lately")
    return Reply(DrainOut(worker_id, Directive.DRAIN))


def _worker_out(worker: WorkerSeen) -> WorkerOut:
    return WorkerOut(**msgspec.structs.asdict(worker))


OPERATIONS = (
    Operation(
        method="GET",
        path="/v1/workers",
        summary="List workers",
        handler=list_workers,
        permission=Permission.READ,
        body=Nothing,
        query=WorkersQuery,
        responds=WorkersOut,
        problems=(Unavailable, Overloaded),
    ),
    Operation(
        method="POST",
        path="/v1/workers/{id}/drain",
        summary="Have a worker finish what it runs, and exit",
        handler=drain_worker,
        permission=Permission.OPERATE,
        body=Nothing,
        query=Nothing,
        responds=DrainOut,
        problems=(NotFound, Unavailable, Overloaded),
    ),
)
