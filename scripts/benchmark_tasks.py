"""What the benchmark's workers run."""

import time

import anyio

from clarion_worker import Worker

tasks = Worker()


@tasks.task("bench.nothing")
async def nothing() -> None:
    """Nothing."""


@tasks.task("bench.clock")
async def clock() -> float:
    """The time at which the handler started, in seconds since 1970."""
    return time.time()


@tasks.task("bench.hold")
async def hold() -> None:
    """Runs for as long as its worker."""
    await anyio.sleep_forever()
