"""What clients raise: the problems of the API as exceptions, no answer at all, and jobs that did not succeed."""

from typing import Any, ClassVar

import msgspec

from clarion import errors
from clarion.client.options import TOKEN_VARIABLE, URL_VARIABLE
from clarion.client.views import ErrorView, JobView
from clarion.errors import ClarionError, FieldError, Unavailable

# What servers, and the proxies before them, answer when another try may help.
_RETRYABLE_STATUSES = {408, 429, 502, 503, 504}
_EXCERPT_CHARS = 200


class ProblemDocument(msgspec.Struct, frozen=True, kw_only=True):
    """An error of the API, as RFC 9457 writes it."""

    status: int
    type: str
    title: str
    detail: str = ""
    errors: tuple[FieldError, ...] = ()
    request_id: str = ""
    retryable: bool = False
    state: str | None = None


class ApiError(ClarionError):
    """The API answered with a problem. `type` tells which, `errors` what is wrong with which field."""

    hint: ClassVar[str] = ""

    def __init__(self, document: ProblemDocument) -> None:
        super().__init__(_in_words(document, self.hint), errors=document.errors)
        self.document = document
        self.status = document.status
        self.type = document.type
        self.title = document.title
        self.detail = document.detail
        self.request_id = document.request_id
        self.retryable = document.retryable

    def __reduce__(self) -> tuple[Any, ...]:
        """For process pools, which pickle what a call raised."""
        return type(self), (self.document,)


class Invalid(ApiError):
    """The request breaks a rule; `errors` lists every broken one with its place."""

    problem = errors.Invalid.problem


class Unauthenticated(ApiError):
    """The server wants a token, or another one."""

    problem = errors.Unauthenticated.problem
    hint = f"give the client the server's token, as token=… or in {TOKEN_VARIABLE}"


class NotFound(ApiError):
    """There is no such job, or retention removed it."""

    problem = errors.NotFound.problem


class IllegalTransition(ApiError):
    """The job's present state does not allow it."""

    problem = errors.IllegalTransition.problem

    @property
    def state(self) -> str | None:
        """The job's present state."""
        return self.document.state


class IdempotencyMismatch(ApiError):
    """The key belongs to another request; `errors` names what differs."""

    problem = errors.IdempotencyMismatch.problem


class IdempotencyInFlight(ApiError):
    """Another request with the same key was still being committed, for as long as the client tried."""

    problem = errors.IdempotencyInFlight.problem


class ServerUnavailable(ApiError, Unavailable):
    """The server, or a proxy before it, cannot answer now, and could not for as long as the client tried."""


class Unreachable(Unavailable):
    """No answer came for as long as the client tried; whether a write was done is unknown."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(
            f"no answer from Clarion at {url}: {reason}. Is `clarion serve` or `clarion dev` running there? "
            f"The address comes from url=… or {URL_VARIABLE}"
        )
        self.url = url
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        """For process pools, which pickle what a call raised."""
        return type(self), (self.url, self.reason)


class JobNotSucceeded(ClarionError):
    """The job is final, and has no result."""

    def __init__(self, job: JobView) -> None:
        super().__init__(_ending(job))
        self.job = job

    def __reduce__(self) -> tuple[Any, ...]:
        """For process pools, which pickle what a call raised."""
        return type(self), (self.job,)


class JobDead(JobNotSucceeded):
    """The job will not run again by itself."""

    @property
    def reason(self) -> str | None:
        """Why, as in `attempts_exhausted`."""
        return self.job.dead_reason

    @property
    def error(self) -> ErrorView | None:
        """That of the latest attempt that went wrong."""
        return self.job.error


class JobCancelled(JobNotSucceeded):
    """Somebody cancelled the job."""


class UnexpectedResult(ClarionError):
    """The job succeeded, but its result is not what it was to be read as."""


def error_of(document: ProblemDocument) -> ApiError:
    """The exception for a problem."""
    if document.status == 503:
        return ServerUnavailable(document)
    return _BY_TYPE.get(document.type, ApiError)(document)


def read_problem(status: int, body: bytes, request_id: str) -> ProblemDocument:
    """The problem in an answer; whatever else it is, and whoever sent it, becomes one too."""
    try:
        return msgspec.json.decode(body, type=ProblemDocument)
    except msgspec.DecodeError:
        return unknown_problem(status, excerpt(body) or "it is empty", request_id)


def unknown_problem(status: int, detail: str, request_id: str = "") -> ProblemDocument:
    """What to say of an answer that Clarion did not give."""
    return ProblemDocument(
        status=status,
        type="about:blank",
        title="Not an answer of Clarion's",
        detail=detail,
        request_id=request_id,
        retryable=status in _RETRYABLE_STATUSES,
    )


def excerpt(body: bytes) -> str:
    """The beginning of a body that nobody can read, for people."""
    return " ".join(body[:_EXCERPT_CHARS].decode("utf-8", "replace").split())


def _in_words(document: ProblemDocument, hint: str) -> str:
    trail = f"HTTP {document.status}" + (f", request {document.request_id}" if document.request_id else "")
    return f"{document.title}: {document.detail} ({trail})" + (f"; {hint}" if hint else "")


def _ending(job: JobView) -> str:
    why = f": {job.dead_reason}" if job.dead_reason else ""
    error = f"; its latest error is {job.error.type}: {job.error.message}" if job.error else ""
    return f"job {job.id} ({job.task}) is {job.state}{why}{error}"


_BY_TYPE = {f"/problems/{kind.problem.slug}": kind for kind in ApiError.__subclasses__()}
