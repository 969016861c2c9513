#!/usr/bin/env python3
"""HTTP clients that cost next to nothing: a plan comes on standard input, what was achieved goes to standard output.

A client library takes about a millisecond for a request. On two cores that would be measured instead of the server.
These speak just enough HTTP/1.1, over connections that are kept open, each with one request under way.
"""

import environment  # isort: skip  # noqa: F401  first: makes the imports below work

import asyncio
import re
import sys
import time
from collections.abc import Callable, Generator, Iterator
from typing import cast
from urllib.parse import urlsplit
from uuid import uuid4

import anyio
import msgspec

_CONTENT_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_TOKEN = re.compile(rb'"token":"([^"]+)"')
JSON = "application/json"


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """So many requests over so many connections, all of them alike; or, with `lease_from`, so many jobs of that queue,
    each leased and completed by itself. Each connection pauses before it says the next thing."""

    connections: int
    requests: int
    path: str = "/v1/jobs"
    content_type: str = JSON
    body: str = ""
    lease_from: str = ""
    pause_seconds: float = 0


class Load(msgspec.Struct, frozen=True):
    """How long it took, from the first request to the last answer."""

    seconds: float


class Answer(msgspec.Struct, frozen=True):
    """The status of an answer, and its body."""

    status: int
    body: bytes

    def must_be(self, status: int) -> None:
        """Ends the process with what the server said instead."""
        if self.status != status:
            sys.exit(
                f"the server answered {self.status} instead of {status}: {self.body[:500].decode(errors='replace')}"
            )


# What one connection has to say: it yields requests and is sent their answers.
Conversation = Generator[bytes, Answer, None]


class Connection(asyncio.Protocol):
    """One conversation on one connection; `ended` is called when nothing is left to say."""

    def __init__(self, conversation: Conversation, pause_seconds: float, ended: Callable[[], None]) -> None:
        self._conversation = conversation
        self._pause_seconds = pause_seconds
        self._ended = ended
        self._received = bytearray()
        self._length = -1  # of the whole answer; below 0 as long as its head is not complete
        self._head_length = 0
        self._over = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keeps the transport."""
        self._transport = cast("asyncio.Transport", transport)

    def begin(self) -> None:
        """Says the first thing."""
        try:
            self._transport.write(next(self._conversation))
        except StopIteration:
            self._end()

    def data_received(self, data: bytes) -> None:
        """Collects an answer, and goes on once it is whole."""
        self._received += data
        if self._length < 0 and (end := self._received.find(b"\r\n\r\n")) >= 0:
            found = _CONTENT_LENGTH.search(self._received, 0, end)
            self._head_length = end + 4
            self._length = self._head_length + (int(found[1]) if found else 0)
        if 0 <= self._length <= len(self._received):
            answer = Answer(int(self._received[9:12]), bytes(self._received[self._head_length : self._length]))
            del self._received[: self._length]
            self._length = -1
            try:
                self._say(self._conversation.send(answer))
            except StopIteration:
                self._end()

    def connection_lost(self, error: Exception | None) -> None:
        """The server must not hang up in the middle of it."""
        if not self._over:
            sys.exit(f"the server hung up: {error}")

    def _say(self, said: bytes) -> None:
        if self._pause_seconds:
            asyncio.get_running_loop().call_later(self._pause_seconds, self._transport.write, said)
        else:
            self._transport.write(said)

    def _end(self) -> None:
        self._over = True
        self._transport.close()
        self._ended()


def request(path: str, body: bytes, content_type: str = JSON) -> bytes:
    """A POST, ready to be sent."""
    head = (
        f"POST {path} HTTP/1.1\r\nhost: clarion\r\ncontent-type: {content_type}\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def posting(plan: Plan, left: Iterator[int]) -> Conversation:
    """The same request until none is left."""
    post = request(plan.path, plan.body.encode(), plan.content_type)
    status = 201 if plan.content_type == JSON else 200
    for _ in left:
        (yield post).must_be(status)


def working(plan: Plan, left: Iterator[int]) -> Conversation:
    """Leases one job and completes it, until none is left."""
    claim = request("/v1/leases", msgspec.json.encode({"worker": str(uuid4()), "queues": [plan.lease_from], "max": 1}))
    for _ in left:
        answer = yield claim
        while answer.status == 204:  # others have locked what is left of the queue, for a moment
            answer = yield claim
        answer.must_be(200)
        found = _TOKEN.search(answer.body)
        assert found is not None  # noqa: S101  a lease has a token
        (yield request(f"/v1/leases/{found[1].decode()}/complete", b"{}")).must_be(200)


async def drive(url: str, plan: Plan) -> Load:
    """Opens the connections, then starts the clock."""
    address = urlsplit(url)
    left = iter(range(plan.requests))
    conversation = working if plan.lease_from else posting
    running, done = plan.connections, anyio.Event()

    def ended() -> None:
        nonlocal running
        running -= 1
        if not running:
            done.set()

    connections = []
    for _ in range(plan.connections):
        _, connection = await asyncio.get_running_loop().create_connection(
            lambda: Connection(conversation(plan, left), plan.pause_seconds, ended),
            address.hostname or "",
            address.port or 80,
        )
        connections.append(connection)
    started = time.perf_counter()
    for connection in connections:
        connection.begin()
    await done.wait()
    return Load(time.perf_counter() - started)


def main() -> None:
    """Carries out the plan."""
    plan = msgspec.json.decode(sys.stdin.buffer.read(), type=Plan)
    load = anyio.run(drive, sys.argv[1], plan, backend_options={"use_uvloop": True})
    sys.stdout.buffer.write(msgspec.json.encode(load))


if __name__ == "__main__":
    main()
