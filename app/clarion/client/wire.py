"""What both clients say to httpx2, and how they read what it answers."""

import ssl
from typing import Any

import httpcore2  # noqa: F401  httpx2 would import it later, on somebody's event loop
import httpx2

from clarion import __version__
from clarion.client.exchange import Answer, Ask, Lost
from clarion.client.options import ClientOptions, Server
from clarion.errors import UsageError


def settings_of(server: Server, options: ClientOptions) -> dict[str, Any]:
    """The arguments of httpx2's clients; raises UsageError for an actor that no header can hold."""
    headers = {b"user-agent": f"clarion/{__version__}".encode(), b"accept": b"application/json"}
    if server.token:
        headers[b"authorization"] = f"Bearer {server.token}".encode()
    if options.actor:
        headers[b"x-clarion-actor"] = _actor_header(options.actor)
    limits = httpx2.Limits(max_connections=options.connections_max)
    return {"base_url": server.url, "headers": headers, "limits": limits, "verify": _verify(server)}


def arguments_of(ask: Ask, options: ClientOptions) -> dict[str, Any]:
    """The arguments of one request."""
    connect_seconds = min(ask.timeout_seconds, options.connect_timeout_seconds)
    return {
        "method": ask.method,
        "url": ask.path,
        "params": dict(ask.query),
        "content": ask.body,
        "headers": {} if ask.body is None else {"content-type": "application/json"},
        "timeout": httpx2.Timeout(ask.timeout_seconds, connect=connect_seconds),
    }


def answer_of(response: httpx2.Response) -> Answer:
    """The response, read whole."""
    return Answer(
        response.status_code, {name.lower(): value for name, value in response.headers.items()}, response.content
    )


def lost_to(error: httpx2.RequestError) -> Lost:
    """What went wrong, in words; raises UsageError for a request that HTTP cannot express, which no repeat helps."""
    if isinstance(error, httpx2.LocalProtocolError):
        raise UsageError(f"no such request can be sent: {error}") from error
    if isinstance(error, httpx2.PoolTimeout):
        return Lost(
            "every connection of this client was busy for too long: raise connections_max in its options", error
        )
    return Lost(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__, error)


def _actor_header(actor: str) -> bytes:
    header = " ".join(actor.split()).encode("latin-1", "replace")
    if not header.decode("latin-1").isprintable():
        raise UsageError("the actor of the options holds characters that no header can")
    return header


def _verify(server: Server) -> ssl.SSLContext | bool:
    """The machine's certificates, which take 20 to 200 ms to load; without TLS, an empty context that trusts nobody."""
    return True if server.url.startswith("https:") else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
