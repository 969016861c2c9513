"""What a worker and its child processes say to each other: JSON behind its length, over a socket.

The worker says `Launch` once, then `Run` for each attempt, and while that runs `Answer` and perhaps `Cancel`. The child
says `Ready` once, then for each attempt any number of `Call`, which is answered, and `Note`, which is not, and at its
end `Finished`.
"""

import os
import select
import socket
import struct
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import msgspec

from clarion.execution import Completion, Failure, Lease, Snoozing
from clarion.settings import Settings

# Far above any payload or result: a greater length is none.
FRAME_MAX_BYTES = 1 << 28
# A child whose socket has ended gets this long to leave by itself.
EXIT_SECONDS = 1.0

_PARENT_CHECK_SECONDS = 1.0
_READ_MAX_BYTES = 1 << 20

_HEADER = struct.Struct("!I")
HEADER_BYTES = _HEADER.size


class CallRefused(Exception):
    """Raised in a handler: the worker could not do what it asked for; the text says why."""


class Target(msgspec.Struct, frozen=True):
    """Where a handler is found: the attribute of the module is its `Task`, or a `Worker` that has the task."""

    module: str
    attribute: str
    task: str


class Launch(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What a child takes over from its worker."""

    sys_path: list[str]
    settings: Settings


class Run(msgspec.Struct, frozen=True, tag=True):
    """An attempt to make."""

    target: Target
    lease: Lease


class Answer(msgspec.Struct, frozen=True, tag=True):
    """What a call came to; `error` is the text of a refusal."""

    content: Any = None
    error: str | None = None


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """The handler is to end."""


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The child may be told what to run."""


class Call(msgspec.Struct, frozen=True, tag=True):
    """A handler asks something of its worker, and waits for the answer."""

    kind: str
    content: Any


class Note(msgspec.Struct, frozen=True, tag=True):
    """A handler tells its worker something, and goes on."""

    kind: str
    content: Any


class Finished(msgspec.Struct, frozen=True, tag=True):
    """The end of an attempt: one of the three, or none for a handler that was told to end and did no more."""

    completion: Completion | None = None
    failure: Failure | None = None
    snoozing: Snoozing | None = None

    @property
    def outcome(self) -> Completion | Failure | Snoozing | None:
        """The one of the three that there is."""
        return self.completion or self.failure or self.snoozing


ToChild = Launch | Run | Answer | Cancel
ToWorker = Ready | Call | Note | Finished

TO_CHILD: msgspec.json.Decoder[ToChild] = msgspec.json.Decoder(ToChild)
TO_WORKER: msgspec.json.Decoder[ToWorker] = msgspec.json.Decoder(ToWorker)


def frame_of(message: ToChild | ToWorker) -> bytes:
    """The bytes that carry the message; raises TypeError or ValueError for content that is not JSON or too large."""
    # A log line must not fail what it tells about, so what is no JSON in it goes as its text.
    body = msgspec.json.encode(message, enc_hook=repr if isinstance(message, Note) else None)
    if len(body) > FRAME_MAX_BYTES:
        raise ValueError(f"the message has {len(body)} bytes, more than the {FRAME_MAX_BYTES} allowed")
    return _HEADER.pack(len(body)) + body


def body_bytes(header: bytes) -> int:
    """How many bytes follow the header; raises ValueError for a number that no frame has."""
    (length,) = _HEADER.unpack(header)
    if length > FRAME_MAX_BYTES:
        raise ValueError(f"{length} bytes are no frame")
    return int(length)


class Wire:
    """A child's end of the socket; one thread reads, and one at a time writes."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._parent_pid = os.getppid()

    def send(self, message: ToWorker) -> None:
        """Returns when the worker has taken the message, or will."""
        self._connection.sendall(frame_of(message))

    def receive(self) -> ToChild:
        """The next message; EOFError or OSError when the worker is gone, or wants this process gone."""
        return TO_CHILD.decode(self._read(body_bytes(self._read(HEADER_BYTES))))

    def _read(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            while not select.select([self._connection], [], [], _PARENT_CHECK_SECONDS)[0]:
                if os.getppid() != self._parent_pid:
                    raise EOFError
            chunk = self._connection.recv(min(count - len(data), _READ_MAX_BYTES))
            if not chunk:
                raise EOFError
            data += chunk
        return bytes(data)


class Channel:
    """What one attempt and its worker say to each other; every thread of the handler may use it."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._calling, self._sending, self._ending = threading.Lock(), threading.Lock(), threading.Lock()
        self._answers: SimpleQueue[Answer] = SimpleQueue()
        self._cancelled = False
        self._stop: Callable[[], None] | None = None
        self.closed = False

    def call(self, kind: str, content: object) -> object:
        """The worker's answer. Raises CallRefused; TypeError or ValueError for content that is not JSON."""
        with self._calling:
            with self._sending:
                if self.closed:
                    raise CallRefused("the attempt has ended")
                self._wire.send(Call(kind, content))
            answer = self._answers.get()
        if answer.error is not None:
            raise CallRefused(answer.error)
        return answer.content

    def tell(self, kind: str, content: object) -> None:
        """Tells the worker, without an answer; nothing once the attempt has ended."""
        with self._sending:
            if not self.closed:
                self._wire.send(Note(kind, content))

    def is_cancelled(self) -> bool:
        """Whether the handler was told to end."""
        return self._cancelled

    def finish(self, finished: Finished) -> None:
        """The last word of the attempt."""
        with self._sending:
            self.closed = True
            self._wire.send(finished)

    def answer(self, answer: Answer) -> None:
        """For the thread that reads: wakes the caller."""
        self._answers.put(answer)

    def cancel(self) -> None:
        """For the thread that reads: the handler is to end."""
        with self._ending:
            self._cancelled, stop = True, self._stop
        if stop is not None:
            stop()

    def on_cancel(self, stop: Callable[[], None]) -> None:
        """Has `stop` called once, from whichever thread, when the handler is to end."""
        with self._ending:
            self._stop, cancelled = stop, self._cancelled
        if cancelled:
            stop()
