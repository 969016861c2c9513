"""Handlers for the verifications that need a worker in Python, which runs them besides the demo tasks.

One section a script, each with the tasks that only it uses; their names begin with `verify.`.
"""

import os
import signal
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

import anyio
import msgspec

from clarion_worker import Context, SyncContext, Worker

tasks = Worker()

# -- For any of them: a neighbour that nothing should happen to.


@tasks.task("verify.neighbour")
async def neighbour(number: int, seconds: float = 0) -> int:
    """Answers its number, after a while."""
    await anyio.sleep(seconds)
    return number


# -- verify_execution_timeout.py


@tasks.task("verify.endless")
async def endless(ctx: Context) -> None:
    """Never ends by itself, and says so when it is cancelled."""
    try:
        await anyio.sleep_forever()
    except anyio.get_cancelled_exc_class():
        ctx.log.info("it was cancelled")
        raise


@tasks.task("verify.deaf_thread")
def deaf_thread(ctx: SyncContext, seconds: float) -> str:
    """Takes its time, whatever it is told."""
    time.sleep(seconds)
    ctx.log.info("the thread has ended")
    return "too late"


@tasks.task("verify.deaf_process", runs_in="process")
def deaf_process(ctx: SyncContext, seconds: float) -> int:
    """The same in a process of its own; its pid."""
    ctx.heartbeat({"pid": os.getpid()})
    time.sleep(seconds)
    return os.getpid()


# -- verify_hung_worker.py


@tasks.task("verify.block")
async def block(ctx: Context, seconds: float, until: str = "") -> int:
    """Blocks the event loop in its first attempt, for so long or until there is such a file; the attempt."""
    ends = time.monotonic() + seconds
    while ctx.attempt == 1 and time.monotonic() < ends and not (until and Path(until).exists()):  # noqa: ASYNC240  a touch
        time.sleep(0.02)  # noqa: ASYNC251  as a handler does that should have been a `def`
    return ctx.attempt


# -- verify_crash_loop.py


@tasks.task("verify.crash")
async def crash(harmless: str) -> str:
    """Kills its worker, unless there is such a file."""
    if not Path(harmless).exists():  # noqa: ASYNC240  a touch
        os.kill(os.getpid(), signal.SIGKILL)
    return "harmless by now"


# -- verify_result_unstorable.py

_RESULTS: dict[str, Any] = {
    "NUL": "a\x00b",
    "NaN": {"share": float("nan")},
    "half a pair": "\ud800",
    "levels": msgspec.json.decode("[" * 65 + "]" * 65),
    "no JSON": object(),
    "what only Postgres refuses": msgspec.Raw(b'{"half": '),
}


@tasks.task("verify.result")
async def result(number: int, at: float, kind: str = "", size: int = 0) -> Any:
    """Ends at a moment, in seconds since 1970; answers its number, something of a size, or something of no use."""
    await anyio.sleep(at - time.time())
    return _RESULTS.get(kind, "x" * size or number)


# -- verify_restart_postgres.py


@tasks.task("verify.effect")
async def effect(ctx: Context, directory: str, seconds: float) -> str:
    """Leaves a file that names the job and this run of it; answers the run."""
    name = uuid4().hex
    Path(directory, f"{ctx.job.id}.{name}").touch()  # noqa: ASYNC240  a touch
    await anyio.sleep(seconds)
    return name
