"""Leases over HTTP: claiming jobs, and keeping them while they run. How attempts end is in `attempt_ends`."""

import time
from collections.abc import Sequence
from functools import partial
from operator import attrgetter
from uuid import UUID

import anyio
import anyio.lowlevel
import anyio.to_thread
import structlog
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp

from clarion.api.access import Permission
from clarion.api.decoding import INLINE_MAX_BYTES, Nothing
from clarion.api.lease_answers import (
    BeatOut,
    HeartbeatOut,
    LeasesOut,
    LeaseStatus,
    LogsOut,
    ProgressOut,
    beat_out,
    lease_left,
    lease_out,
    status_of,
)
from clarion.api.lease_bodies import LeaseOperation, TextOperation, lease_of, mended_heartbeat, mended_progress
from clarion.api.lease_forms import HeartbeatIn, LeasesIn, LogsIn, ProgressIn
from clarion.api.operation import Call, Operation, Reply
from clarion.api.requests import disconnected, is_disconnected
from clarion.api.services import Services
from clarion.claims import Ask
from clarion.errors import LeaseLost, NotFound, Overloaded, Unavailable, Unstorable
from clarion.events import Event
from clarion.execution import Directive, Lease, Release, WorkerRecord
from clarion.payload import FaultFinder
from clarion.texts import storable

log = structlog.get_logger()

_NAME_MAX_CHARS = 200
_VERSION = "http"
# A client that has hung up is noticed so many turns of the event loop later: its end is read, its connection closed,
# the protocol told.
_LAST_LOOK_TURNS = 3


async def take_leases(call: Call[LeasesIn, Nothing]) -> Reply | ASGIApp:
    """Claims jobs; with `wait`, as soon as there are any. A worker that is to drain gets none."""
    services, body = call.services, call.body
    ask = body.to_ask(lease_seconds=services.settings.lease_seconds)
    directive = await services.roster.note_claim(
        _record(ask.worker_id, body.name, queues=ask.queues, tasks=sorted(ask.tasks or ()), concurrency=ask.jobs_max)
    )
    if directive is Directive.DRAIN:
        return Reply(LeasesOut([], 0, directive))
    leases, waited = await _claim(call, ask)
    if not leases:
        return Response(status_code=204)
    given = [lease_out(lease, lease_seconds=ask.lease_seconds) for lease in leases]
    return Reply(LeasesOut(given, round(waited, 3), directive))


async def heartbeat(call: Call[HeartbeatIn, Nothing]) -> Reply:
    """Extends leases; says which are lost or to be ended, and whether the worker is to stop.

    All leases of a call are in one statement, with those of other workers that call at the same time.
    """
    services, body = call.services, call.body
    judge = partial(body.to_beats, FaultFinder())
    beats, refused = judge() if call.share.held_bytes <= INLINE_MAX_BYTES else await anyio.to_thread.run_sync(judge)
    answers = await services.endings.beat_all(list(beats.values())) if beats else []
    held = {answer.token: answer for answer in answers if answer is not None}
    lost = [beat.id for beat in beats.values() if beat.token not in held]
    states = await services.store.find_states(lost) if lost else {}
    directive = await services.roster.note_heartbeat(_record(body.worker, "", running=len(body.leases)))

    def said(token: str) -> BeatOut:
        beat = beats.get(token)
        answer, state = (held.get(beat.token), states.get(beat.id)) if beat else (None, None)
        return beat_out(token, answer, state=state, refused=refused.get(token))

    return Reply(HeartbeatOut([said(lease.token) for lease in body.leases], directive))


async def progress(call: Call[ProgressIn, Nothing]) -> Reply:
    """Keeps what an attempt has to say, and extends its lease."""
    job_id, token = lease_of(call.path)
    held = await call.services.endings.beat(call.body.to_beat(job_id, token))
    if held is None:
        if await _has_ended(call.services, job_id, token):
            return Reply(ProgressOut(LeaseStatus.ENDED, None))
        raise await lost(call.services, job_id)
    return Reply(ProgressOut(status_of(held), lease_left(held)))


async def keep_logs(call: Call[LogsIn, Nothing]) -> Reply:
    """Keeps log lines."""
    job_id, token = lease_of(call.path)
    lines = [line.to_line(job_id, token) for line in call.body.lines]
    kept = await call.services.endings.log(lines)
    if None in kept and not await _has_ended(call.services, job_id, token):
        raise await lost(call.services, job_id)
    return Reply(LogsOut(kept.count(True), len(kept) - kept.count(True)))


async def lost(services: Services, job_id: UUID) -> LeaseLost:
    """The problem of a token that does not hold its job any more, with what the job is now."""
    return LeaseLost(state=(await services.store.find_states([job_id])).get(job_id))


async def _has_ended(services: Services, job_id: UUID, token: UUID) -> bool:
    """Whether the token's own worker has ended the attempt: what it said before may arrive after, or once more."""
    return bool(await services.store.find_endings([Release(job_id, token)]))


async def _claim(call: Call[LeasesIn, Nothing], ask: Ask) -> tuple[list[Lease], float]:
    """What the hub answers, and how many seconds it had waited before it looked for that.

    A client that goes away waits no longer, and what was claimed for it is handed back.
    """
    receive = call.request.receive
    arrived = looked = time.monotonic()
    is_gone = False

    def looking() -> None:
        nonlocal looked
        looked = time.monotonic()

    async def gone() -> None:
        nonlocal is_gone
        await disconnected(receive)
        is_gone = True

    leases = await call.services.claims.claim(ask, wait_seconds=call.body.wait_seconds, looking=looking, gone=gone)
    for _ in range(_LAST_LOOK_TURNS if leases else 0):
        await anyio.lowlevel.checkpoint()
    if is_gone or is_disconnected(receive):
        await _hand_back(call.services, leases)
        raise ClientDisconnect
    return leases, looked - arrived


async def _hand_back(services: Services, leases: Sequence[Lease]) -> None:
    if not leases:
        return
    with anyio.CancelScope(shield=True):
        try:
            _, ready = await services.store.release_jobs([Release(lease.id, lease.token) for lease in leases])
        except Unavailable as error:  # their leases run out
            log.warning(Event.OUTCOME_ABANDONED, jobs=len(leases), error=str(error))
        else:
            services.ringer.mark(ready)
            log.info(Event.CLAIM_RELEASED, jobs=len(leases))


def _record(
    worker_id: UUID,
    name: str,
    *,
    queues: Sequence[str] = (),
    tasks: Sequence[str] = (),
    concurrency: int = 0,
    running: int = 0,
) -> WorkerRecord:
    return WorkerRecord(
        id=worker_id,
        name=storable(name, _NAME_MAX_CHARS) or "unnamed",
        version=_VERSION,
        queues=list(queues),
        tasks=list(tasks),
        concurrency=concurrency,
        running=running,
        state="running",
    )


OPERATIONS = (
    Operation(
        method="POST",
        path="/v1/leases",
        summary="Claim jobs, or wait for some",
        handler=take_leases,
        permission=Permission.WORK,
        body=LeasesIn,
        query=Nothing,
        responds=LeasesOut,
        problems=(Unavailable, Overloaded),
    ),
    LeaseOperation(
        method="POST",
        path="/v1/leases/heartbeat",
        summary="Keep leases, and hear of those that are to end",
        handler=heartbeat,
        permission=Permission.WORK,
        body=HeartbeatIn,
        body_max_bytes=attrgetter("batch_body_max_bytes"),
        mended=mended_heartbeat,
        query=Nothing,
        responds=HeartbeatOut,
        problems=(Unavailable, Overloaded),
    ),
    LeaseOperation(
        method="POST",
        path="/v1/leases/{token}/progress",
        summary="Say how far a job has come, and leave a checkpoint",
        handler=progress,
        permission=Permission.WORK,
        body=ProgressIn,
        mended=mended_progress,
        body_optional=True,
        query=Nothing,
        responds=ProgressOut,
        problems=(NotFound, LeaseLost, Unstorable, Unavailable, Overloaded),
    ),
    TextOperation(
        method="POST",
        path="/v1/leases/{token}/logs",
        summary="Keep log lines with a job",
        handler=keep_logs,
        permission=Permission.WORK,
        body=LogsIn,
        body_max_bytes=attrgetter("batch_body_max_bytes"),
        query=Nothing,
        responds=LogsOut,
        problems=(NotFound, LeaseLost, Unstorable, Unavailable, Overloaded),
    ),
)
