"""What is written in one turn of the event loop is sent in one piece."""

import asyncio

import anyio.lowlevel
import pytest

from clarion.api.joined_writes import _JoiningTransport


class Sink(asyncio.Transport):
    """A transport that keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[bytes] = []
        self.closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        assert not self.closed, "a closed transport takes nothing"
        self.sent.append(bytes(data))

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def sink() -> Sink:
    return Sink()


async def test_writes_of_one_turn_are_sent_together_and_those_of_the_next_apart(sink: Sink) -> None:
    transport = _JoiningTransport(sink)
    transport.write(b"head ")
    transport.write(b"body")
    assert sink.sent == []
    await anyio.lowlevel.checkpoint()
    transport.write(b"next")
    await anyio.lowlevel.checkpoint()
    assert sink.sent == [b"head body", b"next"]


async def test_what_was_written_is_sent_before_the_transport_is_closed(sink: Sink) -> None:
    transport = _JoiningTransport(sink)
    transport.write(b"last words")
    transport.close()
    await anyio.lowlevel.checkpoint()
    assert (sink.sent, sink.closed) == ([b"last words"], True)


async def test_nothing_is_sent_to_a_client_that_has_gone(sink: Sink) -> None:
    transport = _JoiningTransport(sink)
    transport.write(b"too late")
    sink.close()
    await anyio.lowlevel.checkpoint()
    assert sink.sent == []
