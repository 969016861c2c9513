"""One declaration per route: from it come decoding, errors, the permission check and the OpenAPI entry.

    Operation(
        method="POST", path="/v1/jobs", summary="Enqueue one job", handler=create_job,
        permission=Permission.ENQUEUE, body=JobIn, query=Nothing, responds=JobOut, status=201,
    )

A handler gets a `Call` in which everything has been decoded and checked, and answers with a `Reply`, or with an ASGI
app where the answer is a stream.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any, Generic, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from clarion.api.access import Permission
from clarion.api.decoding import Form, Nothing, decode_body, decode_query
from clarion.api.problems import problem_response
from clarion.api.requests import JSON, Share, media_type_of, read_body, unsupported
from clarion.api.services import Services
from clarion.errors import (
    ClarionError,
    Forbidden,
    Invalid,
    Malformed,
    MethodNotAllowed,
    NotFound,
    Overloaded,
    RequestTimeout,
    TooLarge,
    Unauthenticated,
    Unavailable,
    UnsupportedMediaType,
)
from clarion.settings import Settings
from clarion.texts import storable

_ACTOR_MAX_CHARS = 100

BodyT = TypeVar("BodyT", bound=Form)
QueryT = TypeVar("QueryT", bound=Form)


class Call(msgspec.Struct, Generic[BodyT, QueryT], frozen=True, kw_only=True):
    """A request whose body and query have been decoded; `path` holds the route's parameters.

    `share` counts what is held of its body.
    """

    services: Services
    request: Request
    body: BodyT
    query: QueryT
    path: Mapping[str, str]
    share: Share

    @property
    def actor(self) -> str:
        """Who asks, as histories show it: what a caller says of himself in `X-Clarion-Actor` is not proven."""
        name = storable(self.request.headers.get("x-clarion-actor", "").strip(), _ACTOR_MAX_CHARS)
        return f"api:{name}" if name else "api"

    def url(self, path: str) -> str:
        """A path of this API as the client sees it, behind whatever prefix a proxy mounts it."""
        return f"{self.request.scope.get('root_path', '')}{path}"


class Reply(msgspec.Struct, frozen=True):
    """An answer: what becomes its JSON, and the status where it is not the operation's own."""

    content: Any
    headers: Mapping[str, str] = {}
    status: int | None = None
    media_type: str = JSON


class Operation(msgspec.Struct, Generic[BodyT, QueryT], frozen=True, kw_only=True):
    """What one method of one path takes, does and answers.

    `problems` are the errors the handler raises; those of decoding and access follow from the other fields. `lines`,
    instead of `body`, is what each line of a streamed body becomes: its handler reads the request by itself. Where the
    body is optional, none at all stands for an empty object. `quiet` routes are polled by machines and logged at debug
    level.
    """

    method: str
    path: str
    summary: str
    handler: Callable[[Call[BodyT, QueryT]], Awaitable[Reply | ASGIApp]]
    permission: Permission | None
    body: type[BodyT]
    query: type[QueryT]
    responds: type[msgspec.Struct]
    status: int = 200
    problems: tuple[type[ClarionError], ...] = ()
    media_type: str = JSON
    body_max_bytes: Callable[[Settings], int] = attrgetter("body_max_bytes")
    lines: type[Form] | None = None
    body_optional: bool = False
    quiet: bool = False

    @property
    def takes_body(self) -> bool:
        """Whether the request's body is looked at."""
        return self.body is not Nothing or self.lines is not None

    @property
    def all_problems(self) -> tuple[type[ClarionError], ...]:
        """Every error that a caller of this operation can meet on purpose."""
        implied: list[type[ClarionError]] = [Invalid]
        implied += [Unauthenticated, Forbidden] if self.permission else []
        if self.takes_body:
            implied += [Malformed, TooLarge, UnsupportedMediaType, RequestTimeout, Unavailable, Overloaded]
        return tuple(dict.fromkeys((*implied, *self.problems)))

    async def answer(self, request: Request, services: Services) -> ASGIApp:
        """Decodes the request, handles it and encodes the reply."""
        with services.bodies.share() as share:
            call = Call(
                services=services,
                request=request,
                query=decode_query(request.scope["query_string"], self.query),
                body=await self._decoded_body(request, services.settings, share),
                path=request.path_params,
                share=share,
            )
            reply = await self.handler(call)
        if not isinstance(reply, Reply):
            return reply
        content = msgspec.json.encode(reply.content)
        return Response(content, reply.status or self.status, dict(reply.headers), reply.media_type)

    async def _decoded_body(self, request: Request, settings: Settings, share: Share) -> BodyT:
        if self.body is Nothing:
            return self.body()
        body = await read_body(request.headers, request.receive, self.body_max_bytes(settings), share)
        if self.body_optional and not body:
            return self.body()
        return await self._decode(body)

    async def _decode(self, body: bytes) -> BodyT:
        return await decode_body(body, self.body)


class Endpoint:
    """All operations of one path, as an ASGI app: checks access, then chooses by method and by media type."""

    def __init__(self, operations: Sequence[Operation[Any, Any]]) -> None:
        self._operations = operations
        self.quiet = all(operation.quiet for operation in operations)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        response = await self._respond(Request(scope, receive, send))
        await response(scope, receive, send)

    async def _respond(self, request: Request) -> ASGIApp:
        # The router's patterns end in `$`, which lets a final newline (%0A) through.
        if request.scope["path"].endswith("\n"):
            raise NotFound("there is no such route")
        method = "GET" if request.method == "HEAD" else request.method
        fitting = [operation for operation in self._operations if operation.method == method]
        state = request.app.state
        # Before anything else, so that without a token even the list of methods stays unknown.
        state.guard.check(request.headers, (fitting or self._operations)[0].permission)
        if not fitting:
            error = MethodNotAllowed(f"{request.method[:20]} is not a method of this route")
            return problem_response(request, error, {"Allow": ", ".join(self._methods())})
        return await _by_media_type(fitting, request).answer(request, state.services)

    def _methods(self) -> list[str]:
        methods = {operation.method for operation in self._operations}
        return sorted(methods | ({"HEAD"} if "GET" in methods else set()))


def routes(operations: Sequence[Operation[Any, Any]]) -> list[Route]:
    """The operations as routes, one per path, in their order, in which they are tried for each request.

    Literal paths come first, before a pattern that would swallow them.
    """
    paths = sorted(dict.fromkeys(operation.path for operation in operations), key=lambda path: "{" in path)
    return [Route(path, Endpoint([item for item in operations if item.path == path])) for path in paths]


def _by_media_type(operations: Sequence[Operation[Any, Any]], request: Request) -> Operation[Any, Any]:
    if not operations[0].takes_body or (operations[0].body_optional and _has_no_body(request)):
        return operations[0]
    given = media_type_of(request.headers)
    for operation in operations:
        if operation.media_type == given:
            return operation
    raise unsupported(given, [operation.media_type for operation in operations])


def _has_no_body(request: Request) -> bool:
    return request.headers.get("content-length", "0") == "0" and "transfer-encoding" not in request.headers
