"""What a worker process tells whoever answers for it: how it is, every second, from its main event loop.

That it comes from there is the point: when it does not come, the loop stands still. Under a supervisor it goes through
a pipe, a JSON line each; a line that finds the pipe full is dropped, since the next one says more.
"""

import fcntl
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

import anyio
import msgspec

from clarion.probes import ProcessState, Vitals
from clarion.settings import Settings

_PULSE_SECONDS = 1.0
_PULSES_PER_HANG = 4
# Nothing else tells that the worker has started, and with several processes all others wait for the first.
_STARTING_SECONDS = 0.05
# All that a pipe holds. What a line needs is far less.
_READ_MAX_BYTES = 65_536
_LINE_MAX_BYTES = 1_000

Tell = Callable[[Vitals], None]

_DECODER = msgspec.json.Decoder(Vitals)


@asynccontextmanager
async def telling(tell: Tell, look: Callable[[], Vitals], settings: Settings, stop: anyio.Event) -> AsyncIterator[None]:
    """Tells while the block runs; at once when `stop` is set."""
    pause_seconds = min(_PULSE_SECONDS, settings.hang_after_seconds / _PULSES_PER_HANG)

    async def beat() -> None:
        while True:
            vitals = look()
            tell(vitals)
            if vitals.state is ProcessState.DRAINING:
                await anyio.sleep(pause_seconds)
                continue
            with anyio.move_on_after(_STARTING_SECONDS if vitals.state is ProcessState.STARTING else pause_seconds):
                await stop.wait()

    async with anyio.create_task_group() as group:
        group.start_soon(beat)
        yield
        group.cancel_scope.cancel()
        tell(look())  # that it has drained is known by its last word


def teller(fd: int) -> Tell:
    """Tells through a pipe, and never waits for its reader."""
    os.set_inheritable(fd, False)
    os.set_blocking(fd, False)

    def tell(vitals: Vitals) -> None:
        with suppress(BlockingIOError, BrokenPipeError):
            os.write(fd, msgspec.json.encode(vitals) + b"\n")  # less than PIPE_BUF: whole or not at all

    return tell


class Hearing:
    """The supervisor's end of the pipe, for one life of a process."""

    def __init__(self, fd: int, hear: Tell) -> None:
        os.set_blocking(fd, False)
        self._fd = fd
        self._hear = hear
        self._rest = b""

    async def run(self) -> None:
        """Hears until the process has closed the pipe."""
        await anyio.wait_readable(self._fd)
        while self.take():
            await anyio.wait_readable(self._fd)

    def take(self) -> bool:
        """Hears what the pipe holds; False when nothing will come any more."""
        try:
            chunk = os.read(self._fd, _READ_MAX_BYTES)
        except BlockingIOError:
            return True
        *lines, rest = (self._rest + chunk).split(b"\n")
        self._rest = rest[-_LINE_MAX_BYTES:]
        for line in lines:
            # A handler may write to any descriptor: what it does to its own process must not end the supervisor.
            with suppress(msgspec.MsgspecError, ValueError, RecursionError):
                self._hear(_DECODER.decode(line))
        return bool(chunk)


def take_lifeline() -> int:
    """The pipe that was standard input, on a descriptor that nothing inherits; standard input is empty from now on.

    What a handler starts would wait for the end of that pipe, which comes with our own; and it could change how we
    hear of it, since whoever has a pipe shares its flags.
    """
    lifeline = os.dup(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return lifeline


def die_with_supervisor(lifeline: int) -> None:
    """Has the kernel kill this process group when the pipe ends, on Linux.

    Whatever the process executes then, C code that holds the interpreter's lock included. Nothing is ever written to
    that pipe.
    """
    if sys.platform == "linux" and os.getpgrp() == os.getpid():
        fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
