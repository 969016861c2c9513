"""The HTTP server of a scenario: answers as its script says, and notes every request."""

import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import anyio
import msgspec
import uvicorn
from anyio.abc import TaskGroup
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from clarion.api.decoding import Form
from clarion.api.lease_forms import CompleteIn, HeartbeatIn, LeasesIn, LogsIn
from clarion.api.representations import raw
from clarion.conformance.forms import ENDINGS, Verb, read_form
from clarion.conformance.script import Call, Offer, Refusal, Script

_LONG_AGO = "2026-01-01T00:00:00Z"
_SLUGS = {400: "malformed", 404: "not-found", 409: "lease-lost", 503: "unavailable"}
_UNKNOWN = {"x_unknown": {"leases": [], "token": "not this one", "status": "lost", "n": [1, None, "]}"]}}
_STATES = {Verb.COMPLETE: "succeeded", Verb.FAIL: "scheduled", Verb.SNOOZE: "scheduled", Verb.RELEASE: "ready"}


class LoopbackServer:
    """Answers on a port of its own; may go away for a while and come back on the same one."""

    def __init__(self, script: Script, group: TaskGroup) -> None:
        self._app = create_app(script)
        self._script = script
        self._group = group
        self._port = 0
        self._server: _Server | None = None
        self._ended = anyio.Event()

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self._port}"

    def open(self) -> None:
        """Listens from now on."""
        listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(("127.0.0.1", self._port))
        listening.listen()
        self._port = listening.getsockname()[1]
        self._script.closing = False
        self._server, self._ended = _Server(self._app), anyio.Event()
        self._group.start_soon(self._serve, self._server, listening, self._ended)

    async def close(self) -> None:
        """Answers what is being asked with 503, hangs up, and refuses connections."""
        if self._server is not None:
            self._script.closing = True
            self._script.change()
            self._server.should_exit = True
            await self._ended.wait()

    async def _serve(self, server: "_Server", listening: socket.socket, ended: anyio.Event) -> None:
        try:
            await server.serve(sockets=[listening])
        finally:
            ended.set()


class _Server(uvicorn.Server):
    """uvicorn that leaves signals alone, and does not log what scenarios do on purpose."""

    def __init__(self, app: ASGIApp) -> None:
        config = uvicorn.Config(
            app, lifespan="off", log_config=None, log_level="critical", access_log=False, timeout_graceful_shutdown=1
        )
        super().__init__(config)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals belong to the command that runs this server."""
        yield


class _CutResponse(Response):
    """Says how long it is, sends half of it and hangs up."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Ends without a last part, which makes the server close the connection."""
        body = bytes(self.body)
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": body[: len(body) // 2], "more_body": True})


def create_app(script: Script) -> Starlette:
    """The routes that a worker needs, and one that notes whatever else it asks for."""

    async def claim(request: Request) -> Response:
        form = await _read(script, request, Verb.CLAIM)
        return await _answer_claim(script, request, form) if isinstance(form, LeasesIn) else _problem(400)

    async def heartbeat(request: Request) -> Response:
        form = await _read(script, request, Verb.HEARTBEAT)
        return _answer_heartbeat(script, form) if isinstance(form, HeartbeatIn) else _problem(400)

    async def call(request: Request) -> Response:
        verb, token = _verb_of(request), request.path_params["token"]
        form = await _read(script, request, verb, token)
        offer = script.claimed(token)
        if verb is None or offer is None:
            return _problem(404)
        return _answer_call(script, verb, offer, form) if form is not None else _problem(400)

    async def anything(request: Request) -> Response:
        await _read(script, request, None)
        return _problem(404)

    return Starlette(
        routes=[
            Route("/v1/leases", claim, methods=["POST"]),
            Route("/v1/leases/heartbeat", heartbeat, methods=["POST"]),
            Route("/v1/leases/{token}/{verb}", call, methods=["POST"]),
            Route("/{path:path}", anything, methods=["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"]),
        ]
    )


def _verb_of(request: Request) -> Verb | None:
    name = request.path_params["verb"]
    return Verb(name) if name in {*ENDINGS, Verb.PROGRESS, Verb.LOGS} else None


async def _read(script: Script, request: Request, verb: Verb | None, token: str | None = None) -> Form | None:
    """Notes the request; its body as the verb's form, or None if it is none."""
    body = await request.body()
    read: Form | str = f"there is no route {request.method} {request.url.path}"
    if verb is not None:
        read = read_form(verb, body, request.headers.get("content-type", ""))
    call = Call(
        at=time.monotonic(),
        start=script.starts,
        path=request.url.path,
        verb=verb,
        token=token,
        authorization=request.headers.get("authorization"),
        body=body,
        form=read if isinstance(read, Form) else None,
        fault=read if isinstance(read, str) else None,
    )
    script.note(call)
    return call.form


async def _answer_claim(script: Script, request: Request, claim: LeasesIn) -> Response:
    """Waits for jobs as long as it was asked to, or as long as the script wants, or until nobody listens any more."""
    found: list[Offer] = []
    arrived = anyio.current_time()

    def take() -> bool:
        found.extend(() if script.closing else script.hand_out(claim.max))
        return bool(found) or script.closing or script.directive == "drain"

    async with anyio.create_task_group() as group:
        group.start_soon(_cancel_when_gone, request, group.cancel_scope)
        with anyio.move_on_after(min(claim.wait_seconds, script.hold_seconds)):
            await script.wait_for(take)
        group.cancel_scope.cancel()
    if script.closing and not found:
        return _problem(503, {"Retry-After": "1"})
    if not found and script.directive == "ok" and not script.empty_claims:
        return Response(status_code=204)
    leases = [_with_unknown(script, _lease(script, offer)) for offer in found]
    waited = round(anyio.current_time() - arrived, 3)
    return _json(script, {"leases": leases, "waited": waited, "directive": script.directive})


async def _cancel_when_gone(request: Request, scope: anyio.CancelScope) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


def _lease(script: Script, offer: Offer) -> dict[str, Any]:
    return {
        "token": offer.token,
        "id": offer.id,
        "queue": "conformance-a",
        "task": offer.task,
        "args": offer.args,
        "priority": 0,
        "attempt": 1,
        "max_attempts": 20,
        "generation": 1,
        "errors": 0,
        "crashes": 0,
        "timeout": offer.timeout_seconds,
        "lease": script.lease_seconds,
        "checkpoint": None,
        "created_at": _LONG_AGO,
        "run_at": _LONG_AGO,
        "started_at": _LONG_AGO,
    }


def _answer_heartbeat(script: Script, heartbeat: HeartbeatIn) -> Response:
    if script.heartbeats_fail:
        return _problem(503, {"Retry-After": "1"})
    leases = []
    for lease in heartbeat.leases:
        offer = script.claimed(lease.token)
        status = "lost" if offer is None or offer.ended else offer.lease_status
        held = offer is not None and status != "lost"
        if offer is not None:
            offer.told = status
        answer = {
            "token": lease.token,
            "status": status,
            "lease": script.lease_seconds if held else None,
            "state": "running" if held else None,
        }
        leases.append(_with_unknown(script, answer))
    return _json(script, {"leases": leases, "directive": script.directive})


def _answer_call(script: Script, verb: Verb, offer: Offer, form: Form) -> Response:
    refusals = offer.refusals.get(verb)
    refusal = refusals.popleft() if refusals else Refusal()
    if refusal.status != 200:
        seconds = refusal.retry_after_seconds
        return _problem(refusal.status, {} if seconds is None else {"Retry-After": str(seconds)})
    if offer.ended not in {None, verb} or offer.told == "lost":
        return _problem(409)
    if isinstance(form, LogsIn):
        return _json(script, {"kept": len(form.lines), "dropped": 0})
    if verb is Verb.PROGRESS:
        return _json(script, {"status": offer.told, "lease": script.lease_seconds})
    # Cut off, the worker cannot know whether it was done, so it may as well not have been.
    offer.ended = None if refusal.cut else verb
    return _json(script, _ending(verb, offer, form), cut=refusal.cut)


def _ending(verb: Verb, offer: Offer, form: Form) -> dict[str, Any]:
    if isinstance(form, CompleteIn):
        return {"id": offer.id, "state": _STATES[verb], "result": raw(form.result_text)}
    state = "cancelled" if offer.lease_status == "cancel" else _STATES[verb]
    return {"id": offer.id, "state": state, "run_at": _LONG_AGO}


def _with_unknown(script: Script, document: Mapping[str, Any]) -> Mapping[str, Any]:
    return {**_UNKNOWN, **document} if script.with_unknown_members else document


def _json(script: Script, document: Mapping[str, Any], *, cut: bool = False) -> Response:
    body = msgspec.json.encode(_with_unknown(script, document))
    return (_CutResponse if cut else Response)(body, media_type="application/json")


def _problem(status: int, headers: Mapping[str, str] | None = None) -> Response:
    slug = _SLUGS.get(status, "invalid")
    document = {"type": f"/problems/{slug}", "title": slug, "status": status, "state": None}
    return Response(msgspec.json.encode(document), status, headers, "application/problem+json")
