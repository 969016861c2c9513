"""The worker that is examined: a command of anybody's, started in a session of its own."""

import os
import signal
import subprocess
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress

import anyio
from anyio.abc import Process

from clarion.settings import PREFIX

_LAST_WORDS = 8
# What a worker gets at the end of its scenario for each of two signals, before it is killed.
_GOODBYE_SECONDS = 1.0


class WorkerProcess:
    """One start of the command; `exit_code` is None while it runs."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self.exit_code: int | None = None
        self.last_words: deque[str] = deque(maxlen=_LAST_WORDS)

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to the command's own process, as whoever supervises a worker does."""
        with suppress(ProcessLookupError):
            self._process.send_signal(number)

    async def kill(self) -> None:
        """Ends it, and what it started as far as that is still in its process group, without a warning."""
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self.exit_code = await self._process.wait()

    async def end(self) -> None:
        """Ends it, politely at first, so that it can end what it started."""
        for _ in range(2):
            if self._process.returncode is None:
                self.signal(signal.SIGTERM)
                with anyio.move_on_after(_GOODBYE_SECONDS):
                    await self._process.wait()
        await self.kill()

    async def watch(self, ended: Callable[[], None]) -> None:
        """Waits for its end, and tells."""
        self.exit_code = await self._process.wait()
        ended()

    async def listen(self) -> None:
        """Reads what it says, so that it never blocks on it, and keeps the last lines."""
        rest = b""
        assert self._process.stdout is not None  # noqa: S101  it is opened with a pipe
        async for chunk in self._process.stdout:
            *lines, rest = (rest + chunk).split(b"\n")
            self.last_words.extend(line.decode(errors="replace") for line in lines)


@asynccontextmanager
async def worker_process(
    command: Sequence[str], variables: Mapping[str, str], ended: Callable[[], None]
) -> AsyncIterator[WorkerProcess]:
    """Starts the command with these CLARION_ variables and no others; it does not outlive the block."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    process = await anyio.open_process(
        list(command),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment | dict(variables),
        start_new_session=True,
    )
    worker = WorkerProcess(process)
    try:
        async with anyio.create_task_group() as group:
            group.start_soon(worker.listen)
            group.start_soon(worker.watch, ended)
            try:
                yield worker
            finally:
                with anyio.CancelScope(shield=True):
                    await worker.end()
                group.cancel_scope.cancel()
    finally:
        with anyio.CancelScope(shield=True):
            await process.aclose()
