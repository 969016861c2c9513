"""What a scenario works with: one worker process at a time, the server it talks to, and what passed between them."""

import signal
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
import msgspec
from anyio.abc import TaskGroup, TaskStatus

from clarion.conformance.forms import Verb
from clarion.conformance.script import Call, Offer, Script
from clarion.conformance.server import LoopbackServer
from clarion.conformance.worker_process import WorkerProcess, worker_process

QUEUES = ("conformance-a", "conformance-b")
TASKS = ("demo.echo", "demo.sleep", "demo.fail")


class NotAsPromised(Exception):
    """The worker did something else; the text says what was seen."""


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """What a scenario's worker is started with."""

    lease_seconds: float = 30.0
    drain_seconds: float = 10.0
    token: str | None = "conformance-0123456789"  # noqa: S105  good for a scripted server on loopback

    def variables(self, url: str) -> dict[str, str]:
        """The environment variables that say so."""
        given = {
            "CLARION_URL": url,
            "CLARION_QUEUES": ",".join(QUEUES),
            "CLARION_LEASE": f"{self.lease_seconds:g}s",
            "CLARION_DRAIN_SECONDS": f"{self.drain_seconds:g}",
        }
        return given if self.token is None else given | {"CLARION_API_TOKEN": self.token}


class Trial:
    """One scenario under way. `awaiting` says, in words, what it waits for."""

    def __init__(self, command: Sequence[str], terms: Terms, group: TaskGroup) -> None:
        self.script = Script(lease_seconds=terms.lease_seconds)
        self.terms = terms
        self.awaiting = "anything at all"
        self._command = command
        self._group = group
        self._server = LoopbackServer(self.script, group)
        self._worker: WorkerProcess | None = None
        self._leave = anyio.Event()
        self._left = anyio.Event()

    @property
    def worker(self) -> WorkerProcess:
        """The process that runs, or ran last."""
        assert self._worker is not None  # noqa: S101  started before the scenario
        return self._worker

    async def begin(self) -> None:
        """Opens the server and starts the worker."""
        self._server.open()
        await self.start_worker()

    async def end(self) -> None:
        """Ends the worker, while it still finds its server, and then that."""
        await self._end_worker()
        await self._server.close()

    async def start_worker(self) -> None:
        """Starts the command; whatever comes from now on is this start's."""
        self.script.starts += 1
        self._leave, self._left = anyio.Event(), anyio.Event()
        self._worker = await self._group.start(self._host_worker, self._leave, self._left)

    async def replace_worker(self) -> None:
        """Kills the process and starts another, which finds no request of the killed one waiting before it."""
        await self.worker.kill()
        await self._end_worker()
        await self._server.close()
        self._server.open()
        await self.start_worker()

    def echo(self, args: Mapping[str, Any] | None = None) -> Offer:
        """Offers a job that answers its arguments."""
        return self.script.offer("demo.echo", {"hello": "world"} if args is None else args)

    def sleep(self, seconds: float, *, timeout_seconds: float | None = None) -> Offer:
        """Offers a job that takes so long."""
        return self.script.offer("demo.sleep", {"seconds": seconds}, timeout_seconds=timeout_seconds)

    async def until(self, condition: Callable[[], object], what: str) -> None:
        """Waits for it; raises NotAsPromised when the worker's process ends before."""
        self.awaiting = what
        await self.script.wait_for(lambda: condition() or self.worker.exit_code is not None)
        if not condition():
            raise NotAsPromised(f"the worker exited with {self.worker.exit_code}; awaited was {what}")

    async def pass_time(self, seconds: float) -> None:
        """Lets the worker go on; raises NotAsPromised when its process ends meanwhile."""
        with anyio.move_on_after(seconds):
            await self.until(lambda: False, "nothing in particular")

    async def claim_of(self, offer: Offer) -> float:
        """Waits until the job was handed out; when that was."""
        await self.until(lambda: offer.claimed_at is not None, f"a request for leases, to hand out {offer.task}")
        return offer.claimed_at or 0.0

    async def beat_of(self, offer: Offer) -> Call:
        """Waits for the first heartbeat that names the job's lease."""
        await self.until(lambda: self.script.beats_of(offer), f"a heartbeat that names the lease of {offer.task}")
        return self.script.beats_of(offer)[0]

    async def ending_of(self, offer: Offer, *, count: int = 1) -> Call:
        """Waits until the worker has said, for the nth time, how the job ended."""
        what = f"the end of {offer.task}" if count == 1 else f"the end of {offer.task}, said {count} times"
        await self.until(lambda: len(self.script.endings_of(offer)) >= count, what)
        return self.script.endings_of(offer)[count - 1]

    async def completion_of(self, offer: Offer, *, count: int = 1) -> Call:
        """The same, where only success will do."""
        call = await self.ending_of(offer, count=count)
        expect(call.verb is Verb.COMPLETE, f"instead of complete: {call}")
        expect(call.fault is None, str(call))
        return call

    async def exit_after(self, number: signal.Signals | None = None) -> tuple[int, float]:
        """Sends a signal and waits until the process ends: its code, and the seconds that took."""
        began = time.monotonic()
        if number is not None:
            self.worker.signal(number)
        self.awaiting = "the end of the worker's process"
        await self.script.wait_for(lambda: self.worker.exit_code is not None)
        assert self.worker.exit_code is not None  # noqa: S101  just awaited
        return self.worker.exit_code, time.monotonic() - began

    async def be_away(self, seconds: float) -> None:
        """Refuses connections for so long, like a server that is restarted."""
        await self._server.close()
        await anyio.sleep(seconds)
        self._server.open()

    async def _end_worker(self) -> None:
        if self._worker is not None:
            self._leave.set()
            await self._left.wait()

    async def _host_worker(
        self, leave: anyio.Event, left: anyio.Event, *, task_status: TaskStatus[WorkerProcess]
    ) -> None:
        """Keeps the process in a task of its own, since a scenario starts it in one scope and leaves it to another."""
        try:
            async with worker_process(
                self._command, self.terms.variables(self._server.url), self.script.change
            ) as worker:
                task_status.started(worker)
                await leave.wait()
        finally:
            left.set()


@asynccontextmanager
async def trial(command: Sequence[str], terms: Terms) -> AsyncIterator[Trial]:
    """A server and a worker that talks to it; both end with the block."""
    async with anyio.create_task_group() as group:
        under_way = Trial(command, terms, group)
        try:
            await under_way.begin()
            yield under_way
        finally:
            with anyio.CancelScope(shield=True):
                await under_way.end()


def expect(holds: object, otherwise: str) -> None:
    """Raises NotAsPromised with what was seen otherwise."""
    if not holds:
        raise NotAsPromised(otherwise)
