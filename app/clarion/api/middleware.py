"""What wraps every request: its id, its one log line, and the last resort when a handler has a bug.

Plain ASGI: Starlette's BaseHTTPMiddleware runs the app in a second task and hides disconnects from it.
"""

import re
import time
from random import getrandbits

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from clarion.api.problems import problem_response
from clarion.errors import ClarionError
from clarion.events import Event

log = structlog.get_logger()

# A request id of the client's is kept when it cannot do harm in a log.
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)
# What nginx calls a client that went away before the answer; never sent.
_CLIENT_CLOSED = 499


class RequestLog:
    """Gives each request an id and one canonical line, and turns bugs into a 500 that names the id."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes one request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = Exchange(scope, receive, send)
        before = structlog.contextvars.bind_contextvars(request_id=exchange.request_id)
        try:
            await self._run(exchange)
        finally:
            exchange.log_line()
            structlog.contextvars.reset_contextvars(**before)

    async def _run(self, exchange: "Exchange") -> None:
        try:
            await self._app(exchange.scope, exchange.receive, exchange.send)
        except ClientDisconnect:
            exchange.status = exchange.status or _CLIENT_CLOSED
        except Exception as error:  # noqa: BLE001  the last resort: a bug in one request must not end the others
            exchange.bug = error
            # An answer that has begun cannot be taken back: ending here makes the server cut the connection.
            if not exchange.status:
                await exchange.send_problem(
                    ClarionError("a bug in Clarion; its log has the details under this request_id")
                )


class Exchange:
    """One request and its answer as they pass: what the log line will say about them."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        self.request_id = _request_id(Headers(scope=scope))
        self.status = 0
        self.bug: Exception | None = None
        self._receive = receive
        self._send = send
        self._started = time.perf_counter()
        self._request_bytes = 0
        self._response_bytes = 0
        scope.setdefault("state", {})["request_id"] = self.request_id

    async def receive(self) -> Message:
        """Counts what comes in."""
        message = await self._receive()
        self._request_bytes += len(message.get("body", b""))
        return message

    async def send(self, message: Message) -> None:
        """Counts what goes out, and adds the headers that every answer has."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["X-Request-Id"] = self.request_id
            headers["X-Content-Type-Options"] = "nosniff"
        self._response_bytes += len(message.get("body", b""))
        await self._send(message)

    async def send_problem(self, error: ClarionError) -> None:
        """Answers with a problem from outside of all routes."""
        request = Request(self.scope, self.receive, self.send)
        await problem_response(request, error)(self.scope, self.receive, self.send)

    def log_line(self) -> None:
        """Writes the canonical line: the route's template, not the path, so that lines of one route group."""
        level = "error" if self.bug else "debug" if getattr(self.scope.get("endpoint"), "quiet", False) else "info"
        facts = {
            "method": self.scope["method"],
            "route": getattr(self.scope.get("route"), "path", None),
            "status": self.status or None,
            "duration_ms": round((time.perf_counter() - self._started) * 1000, 2),
            "request_bytes": self._request_bytes,
            "response_bytes": self._response_bytes,
            "problem": self.scope["state"].get("problem"),
            "exc_info": self.bug,
        }
        getattr(log, level)(Event.REQUEST_FINISHED, **{key: value for key, value in facts.items() if value is not None})


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else f"{getrandbits(128):032x}"
