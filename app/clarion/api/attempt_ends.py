"""How attempts end over HTTP: complete, fail, snooze, release. Each may be said again until it is answered."""

from collections.abc import Sequence
from operator import attrgetter
from uuid import UUID

from starlette.requests import Request
from starlette.types import ASGIApp

from clarion.api.access import Permission
from clarion.api.decoding import Nothing
from clarion.api.lease_answers import CompletedOut, EndedOut
from clarion.api.lease_bodies import LeaseOperation, TextOperation, lease_of
from clarion.api.lease_forms import CompleteIn, FailIn, SnoozeIn
from clarion.api.leases import lost
from clarion.api.operation import Call, Reply
from clarion.api.representations import raw
from clarion.api.requests import idempotency_key
from clarion.api.services import Services
from clarion.endings import unstorable
from clarion.errors import (
    ClarionError,
    FieldError,
    IdempotencyMismatch,
    Invalid,
    LeaseLost,
    NotFound,
    Overloaded,
    ResultUnstorable,
    Unavailable,
    Unstorable,
)
from clarion.execution import Completion, Failure, Release, Snoozing


async def complete(call: Call[CompleteIn, Nothing]) -> Reply:
    """Finishes a job. The first call's result stands; the same call again is answered with it."""
    job_id, token = lease_of(call.path)
    key, result = idempotency_key(call.request.headers), call.body.result_text
    most = call.services.settings.result_max_bytes
    if result is not None and len(result.encode()) > most:
        detail = f"has {len(result.encode())} bytes, more than the {most} allowed"
        raise await _bury(call.services, job_id, token, [FieldError(detail, pointer="/result")])
    try:
        completed = await call.services.endings.complete(Completion(job_id, token, result, key))
    except Unstorable as error:
        faults = [FieldError(f"is refused: {error}", pointer="/result")]
        raise await _bury(call.services, job_id, token, faults) from error
    if completed.state is None:
        raise await lost(call.services, job_id)
    if not completed.replayed:
        return Reply(CompletedOut(job_id, completed.state, raw(result)))
    if key is not None and completed.completion_key not in (None, key):
        detail = "this lease was completed under another key"
        raise IdempotencyMismatch(detail, errors=[FieldError(detail, parameter="Idempotency-Key")])
    return Reply(CompletedOut(job_id, completed.state, raw(completed.result)), {"Idempotency-Replayed": "true"})


async def fail(call: Call[FailIn, Nothing]) -> Reply:
    """Ends an attempt that went wrong: its job runs again later, or is dead."""
    job_id, token = lease_of(call.path)
    return await _end(call.services, call.body.to_failure(job_id, token))


async def snooze(call: Call[SnoozeIn, Nothing]) -> Reply:
    """Ends an attempt that postpones its job."""
    job_id, token = lease_of(call.path)
    return await _end(call.services, Snoozing(job_id, token, call.body.delay_seconds))


async def release(call: Call[Nothing, Nothing]) -> Reply:
    """Hands a job back unfinished; one whose cancellation was requested is cancelled then."""
    return await _end(call.services, Release(*lease_of(call.path)))


async def _end(services: Services, ending: Failure | Snoozing | Release) -> Reply:
    ended = await services.endings.end(ending)
    if ended.state is None:
        raise await lost(services, ending.id)
    return Reply(EndedOut(ending.id, ended.state, ended.next_run_at))


async def _bury(services: Services, job_id: UUID, token: UUID, errors: Sequence[FieldError]) -> ClarionError:
    """Ends a job whose result cannot be kept; the problem to answer with, the same for the same call again."""
    reason = f"the result {errors[0].detail}"
    ended = await services.endings.end(unstorable(Completion(job_id, token), reason))
    if ended.state is None:
        return await lost(services, job_id)
    return ResultUnstorable(f"{reason}; the job is {ended.state}", errors=errors)


class Completing(LeaseOperation[CompleteIn, Nothing], frozen=True, kw_only=True):
    """`complete`: a result that is refused is an outcome all the same, and ends the job."""

    async def answer(self, request: Request, services: Services) -> ASGIApp:
        """Decodes the request, handles it and encodes the reply."""
        try:
            return await super().answer(request, services)
        except Invalid as error:
            if not error.errors or not all(_is_about_result(part) for part in error.errors):
                raise
            raise await _bury(services, *lease_of(request.path_params), error.errors) from error


def _is_about_result(error: FieldError) -> bool:
    return error.pointer is not None and f"{error.pointer}/".startswith("/result/")


_PROBLEMS = (NotFound, LeaseLost, Unstorable, Unavailable, Overloaded)

OPERATIONS = (
    Completing(
        method="POST",
        path="/v1/leases/{token}/complete",
        summary="Finish a job with its result",
        handler=complete,
        permission=Permission.WORK,
        body=CompleteIn,
        body_max_bytes=attrgetter("batch_body_max_bytes"),
        body_optional=True,
        query=Nothing,
        responds=CompletedOut,
        problems=(*_PROBLEMS, ResultUnstorable, IdempotencyMismatch),
    ),
    TextOperation(
        method="POST",
        path="/v1/leases/{token}/fail",
        summary="End an attempt that went wrong",
        handler=fail,
        permission=Permission.WORK,
        body=FailIn,
        body_max_bytes=attrgetter("batch_body_max_bytes"),
        query=Nothing,
        responds=EndedOut,
        problems=_PROBLEMS,
    ),
    LeaseOperation(
        method="POST",
        path="/v1/leases/{token}/snooze",
        summary="Postpone a job",
        handler=snooze,
        permission=Permission.WORK,
        body=SnoozeIn,
        query=Nothing,
        responds=EndedOut,
        problems=_PROBLEMS,
    ),
    LeaseOperation(
        method="POST",
        path="/v1/leases/{token}/release",
        summary="Hand a job back unfinished",
        handler=release,
        permission=Permission.WORK,
        body=Nothing,
        query=Nothing,
        responds=EndedOut,
        problems=_PROBLEMS,
    ),
)
