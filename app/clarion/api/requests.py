"""Reading request bodies within bounds: nothing is held that is over its limit, and no one may stall for ever."""

from collections.abc import AsyncGenerator

import anyio
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from clarion.errors import RequestTimeout, TooLarge, UnsupportedMediaType

JSON = "application/json"
NDJSON = "application/x-ndjson"

# A client that sends nothing for so long is gone, or means to hold the connection.
BODY_IDLE_SECONDS = 30.0


def media_type_of(headers: Headers) -> str:
    """The body's media type in lower case, without parameters; JSON when the request does not say.

    Raises UnsupportedMediaType for a compressed body: it would have to be inflated before it could be measured.
    """
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise UnsupportedMediaType(f"Content-Encoding {encoding[:40]!r} is not read: send the body as it is")
    return headers.get("content-type", JSON).partition(";")[0].strip().lower()


def unsupported(media_type: str, accepted: list[str]) -> UnsupportedMediaType:
    """The problem of a body of a type that the route does not read, with the way out."""
    hint = f"add the header, in curl: -H 'content-type: {accepted[0]}'"
    return UnsupportedMediaType(f"{media_type[:80]!r} is not read here, {' or '.join(accepted)} is: {hint}")


async def read_body(headers: Headers, receive: Receive, max_bytes: int) -> bytes:
    """The whole body; raises TooLarge on a Content-Length over the limit, or as soon as more has arrived."""
    too_large = TooLarge(f"the body is over {max_bytes} bytes")
    declared = headers.get("content-length", "0")
    if not declared.isdecimal() or int(declared) > max_bytes:
        raise too_large
    body, more = bytearray(), True
    while more:
        chunk, more = await read_chunk(receive)
        body += chunk
        if len(body) > max_bytes:
            raise too_large
    return bytes(body)


async def read_chunk(receive: Receive) -> tuple[bytes, bool]:
    """The next part of the body and whether there is more; raises ClientDisconnect, or RequestTimeout if none comes."""
    with anyio.move_on_after(BODY_IDLE_SECONDS) as scope:
        message = await receive()
    if scope.cancelled_caught:
        raise RequestTimeout(f"nothing of the body arrived for {BODY_IDLE_SECONDS:g} s")
    if message["type"] == "http.disconnect":
        raise ClientDisconnect
    return message.get("body", b""), message.get("more_body", False)


async def read_lines(receive: Receive, max_bytes: int) -> AsyncGenerator[bytes | None, None]:
    """The body line by line, without the line ends; None for a line over the limit, which is not held."""
    held, overlong, more = bytearray(), False, True
    while more:
        chunk, more = await read_chunk(receive)
        *ends, rest = chunk.split(b"\n")
        for end in ends:
            overlong = overlong or len(held) + len(end) > max_bytes
            yield None if overlong else bytes(held + end)
            held, overlong = bytearray(), False
        overlong = overlong or len(held) + len(rest) > max_bytes
        held += b"" if overlong else rest
    if held or overlong:
        yield None if overlong else bytes(held)


async def disconnected(receive: Receive) -> None:
    """Returns when the client has gone away; for use once the body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass
