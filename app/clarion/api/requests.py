"""Reading request bodies within bounds: nothing is held that is over its limit, and no one may stall for ever.

`Bodies` are all that one process reads and holds at a time: a limit on each is none on a thousand of them.
"""

import math
import re
from collections.abc import AsyncGenerator, Awaitable
from typing import Self, TypeVar
from uuid import UUID

import anyio
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive

from clarion.errors import (
    FieldError,
    Invalid,
    Overloaded,
    RequestTimeout,
    TooLarge,
    Unavailable,
    UnsupportedMediaType,
)

JSON = "application/json"
NDJSON = "application/x-ndjson"

# A client that sends nothing for so long is gone, or means to hold the connection.
BODY_IDLE_SECONDS = 30.0
# What a body that is under way gets to arrive in when the server stops.
SHUTDOWN_GRACE_SECONDS = 1.0
# What the requests of a process may hold of bodies together.
BODIES_MAX_BYTES = 268_435_456

IDEMPOTENCY_KEY_MAX_CHARS = 255
# A string of RFC 8941, in quotes; and what nearly everybody sends instead: the bare key.
_QUOTED_KEY = re.compile(r'"((?:[ !#-\[\]-~]|\\["\\])*)"')
_BARE_KEY = re.compile(r"[!#-~][ -~]*")

Answer = TypeVar("Answer")


class Share:
    """What one request holds of bodies: `held_bytes`; it is given back at the end of the block."""

    def __init__(self, bodies: "Bodies") -> None:
        self._bodies = bodies
        self.held_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.give_back(self.held_bytes)

    def take(self, size: int) -> None:
        """Holds so many bytes more; raises Overloaded where all requests together would hold too many."""
        if self._bodies.held_bytes + size > self._bodies.max_bytes:
            raise Overloaded(f"the bodies of all requests together would hold over {self._bodies.max_bytes} bytes")
        self._bodies.held_bytes += size
        self.held_bytes += size

    def give_back(self, size: int) -> None:
        """Holds so many bytes less."""
        self._bodies.held_bytes -= size
        self.held_bytes -= size

    async def read_chunk(self, receive: Receive) -> tuple[bytes, bool]:
        """The same as the function, but soon given up when the server stops: raises Unavailable then."""
        return await self._bodies.read_chunk(receive)


class Bodies:
    """The bodies that the requests of a process read and hold, `held_bytes` of them at the moment."""

    def __init__(self, max_bytes: int = BODIES_MAX_BYTES) -> None:
        self.max_bytes = max_bytes
        self.held_bytes = 0
        self._reading: set[anyio.CancelScope] = set()
        self._ends_at = math.inf

    def share(self) -> Share:
        """What a request takes from now on, in a block."""
        return Share(self)

    def close(self) -> None:
        """Shutdown has begun: what is under way must arrive soon."""
        self._ends_at = anyio.current_time() + SHUTDOWN_GRACE_SECONDS
        for scope in self._reading:
            scope.deadline = min(scope.deadline, self._ends_at)

    async def read_chunk(self, receive: Receive) -> tuple[bytes, bool]:
        """The next part of a body and whether there is more; raises Unavailable where none comes before the end."""
        # A small body has come with its head: a scope with a deadline would be some 7 % of its request.
        message = at_once(receive()) if self._ends_at == math.inf else None
        if message is not None:
            return _chunk(message)
        with anyio.CancelScope(deadline=min(self._ends_at, anyio.current_time() + BODY_IDLE_SECONDS)) as scope:
            self._reading.add(scope)
            try:
                return _chunk(await receive())
            finally:
                self._reading.discard(scope)
        if anyio.current_time() >= self._ends_at:
            raise Unavailable("the server stops, and the body had not arrived")
        raise _idle()


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


def idempotency_key(headers: Headers) -> str | None:
    """The key in the header `Idempotency-Key`, bare or quoted; None without one. Raises Invalid for any other text."""
    given = headers.getlist("idempotency-key")
    if not given:
        return None
    text = given[0].strip()
    quoted = _QUOTED_KEY.fullmatch(text)
    key = re.sub(r"\\(.)", r"\1", quoted[1]) if quoted else text
    if len(given) > 1 or not 1 <= len(key) <= IDEMPOTENCY_KEY_MAX_CHARS or not (quoted or _BARE_KEY.fullmatch(text)):
        detail = f"must be one key of 1 to {IDEMPOTENCY_KEY_MAX_CHARS} printable ASCII characters, bare or in quotes"
        raise Invalid(f"Idempotency-Key: {detail}", errors=[FieldError(detail, parameter="Idempotency-Key")])
    return key


def uuid_in_path(text: str) -> UUID | None:
    """The id that a part of a path names, None if it is none: UUID() also takes braces, `urn:` and no hyphens."""
    try:
        found = UUID(text)
    except ValueError:
        return None
    return found if str(found) == text.lower() else None


async def read_body(headers: Headers, receive: Receive, max_bytes: int, share: Share) -> bytes:
    """The whole body; raises TooLarge on a Content-Length over the limit, or as soon as more has arrived.

    Raises Overloaded when the share cannot hold it beside those of other requests.
    """
    declared = headers.get("content-length", "0")
    if not declared.isdecimal() or int(declared) > max_bytes:
        raise _too_large(max_bytes)
    body, more = bytearray(), True
    while more:
        chunk, more = await share.read_chunk(receive)
        if len(body) + len(chunk) > max_bytes:
            raise _too_large(max_bytes)
        share.take(len(chunk))
        body += chunk
    return bytes(body)


async def read_chunk(receive: Receive) -> tuple[bytes, bool]:
    """The next part of the body and whether there is more; raises ClientDisconnect, or RequestTimeout if none comes."""
    with anyio.move_on_after(BODY_IDLE_SECONDS) as scope:
        message = await receive()
    if scope.cancelled_caught:
        raise _idle()
    return _chunk(message)


def _chunk(message: Message) -> tuple[bytes, bool]:
    if message["type"] == "http.disconnect":
        raise ClientDisconnect
    return message.get("body", b""), message.get("more_body", False)


def _too_large(max_bytes: int) -> TooLarge:
    return TooLarge(f"the body is over {max_bytes} bytes")


def _idle() -> RequestTimeout:
    return RequestTimeout(f"nothing of the body arrived for {BODY_IDLE_SECONDS:g} s")


async def read_lines(receive: Receive, max_bytes: int, share: Share) -> AsyncGenerator[bytes | None, None]:
    """The body line by line, without the line ends; None for a line over the limit, which is not held."""
    held, overlong, more = bytearray(), False, True
    while more:
        chunk, more = await share.read_chunk(receive)
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


def is_disconnected(receive: Receive) -> bool:
    """Whether the client is known to have gone away; for use once the body has been read."""
    while (message := at_once(receive())) is not None:
        if message["type"] == "http.disconnect":
            return True
    return False


def at_once(awaitable: Awaitable[Answer]) -> Answer | None:
    """What it answers if it need not wait for anything; else it is ended as if cancelled, and None.

    To be called in a task, with what does nothing irrevocable before it waits.
    """
    steps = awaitable.__await__()
    try:
        next(steps)
    except StopIteration as end:
        answer: Answer = end.value
        return answer
    steps.close()
    return None
