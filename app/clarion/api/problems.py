"""Errors as clients see them: `application/problem+json` (RFC 9457), and the pages that explain each type."""

import contextlib
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import anyio
import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from clarion.api.requests import read_chunk
from clarion.errors import (
    ClarionError,
    FieldError,
    NotFound,
    Problem,
    RequestTimeout,
    TooLarge,
    Unauthenticated,
    Unavailable,
)

PROBLEM_JSON = "application/problem+json"
# How long a client that is refused in the middle of its body may go on sending.
LINGER_SECONDS = 2.0
_INSTANCE_MAX_CHARS = 500


class ProblemOut(msgspec.Struct, frozen=True, kw_only=True):
    """A problem document."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    request_id: str
    retryable: bool
    errors: list[FieldError] = []


class ProblemPage(msgspec.Struct, frozen=True, kw_only=True):
    """What a problem type means and what to do about it."""

    type: str
    title: str
    status: int
    retryable: bool
    explanation: str


def problem_out(request: Request, error: ClarionError) -> ProblemOut:
    """The error as a document, for this request."""
    problem = error.problem
    return ProblemOut(
        type=problem_type(problem),
        title=problem.title,
        status=problem.status,
        detail=str(error),
        instance=quote(request.scope["path"], errors="replace")[:_INSTANCE_MAX_CHARS],
        request_id=request.state.request_id,
        retryable=problem.retryable,
        errors=list(error.errors),
    )


def problem_type(problem: Problem) -> str:
    """The stable URI of a problem's type: the page that explains it."""
    return f"/problems/{problem.slug}"


def problem_page(problem: Problem) -> ProblemPage:
    """The page itself."""
    return ProblemPage(
        type=problem_type(problem),
        title=problem.title,
        status=problem.status,
        retryable=problem.retryable,
        explanation=problem.explanation,
    )


def problem_response(
    request: Request, error: ClarionError, headers: Mapping[str, str] | None = None, **members: Any
) -> Response:
    """The error as an answer; `members` are added to the document. Leaves its slug for the log line of the request."""
    request.state.problem = error.problem.slug
    document = msgspec.structs.asdict(problem_out(request, error)) | error.members() | members
    kind = LingeringResponse if isinstance(error, TooLarge) else Response
    return kind(
        msgspec.json.encode(document),
        status_code=error.problem.status,
        headers=_headers(error) | dict(headers or {}),
        media_type=PROBLEM_JSON,
    )


class LingeringResponse(Response):
    """Answers before the body has arrived, then lets some more of it arrive and closes the connection.

    Closing at once resets the connection under a client that is still sending, and most then report the reset
    instead of the answer. What arrives meanwhile is thrown away.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the answer whole, waits for the client to read it and hang up, and ends."""
        start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        await send(start)
        await send({"type": "http.response.body", "body": bytes(self.body), "more_body": True})
        with anyio.move_on_after(LINGER_SECONDS), contextlib.suppress(ClientDisconnect, RequestTimeout):
            while (await read_chunk(receive))[1]:
                pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _headers(error: ClarionError) -> dict[str, str]:
    if isinstance(error, Unavailable):
        return {"Retry-After": str(error.retry_after_seconds)}
    if isinstance(error, Unauthenticated):
        return {"WWW-Authenticate": 'Bearer realm="clarion"'}
    if isinstance(error, TooLarge | RequestTimeout):
        return {"Connection": "close"}
    return {}


async def answer_clarion_error(request: Request, error: Exception) -> Response:
    """Handles every ClarionError that a route raises."""
    assert isinstance(error, ClarionError)  # noqa: S101  what it is registered for
    return problem_response(request, error)


async def answer_http_exception(request: Request, error: Exception) -> Response:
    """Handles what the router raises by itself: no such route."""
    return problem_response(request, NotFound("there is no such route; paths have no trailing slash"))
