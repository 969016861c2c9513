"""Built-in tasks to try Clarion with: loaded by `clarion dev`, and elsewhere by `--demo` only.

`demo.sha256` reads any file that the worker may read, so it is nothing for production.
"""

import hashlib
import random
from pathlib import Path
from typing import Annotated

import anyio
from msgspec import Meta

from clarion_worker.context import Context
from clarion_worker.outcomes import Discard
from clarion_worker.registry import Worker

demo = Worker()

_CHUNK_BYTES = 1 << 20


@demo.task("demo.echo")
async def echo(**args: object) -> dict[str, object]:
    """Answers its arguments."""
    return args


@demo.task("demo.sleep")
async def sleep(seconds: Annotated[float, Meta(ge=0, le=86_400)] = 1.0) -> dict[str, float]:
    """Sleeps, and says for how long."""
    await anyio.sleep(seconds)
    return {"slept_seconds": seconds}


@demo.task("demo.fail")
async def fail(message: str = "this task always fails", *, retry: bool = True) -> None:
    """Fails every time; with `retry` false it is dead at once."""
    raise RuntimeError(message) if retry else Discard(message)


@demo.task("demo.flaky", backoff="1s")
async def flaky(fail_rate: Annotated[float, Meta(ge=0, le=1)] = 0.5, *, ctx: Context) -> dict[str, int]:
    """Fails with the given probability, else says which attempt succeeded."""
    if random.random() < fail_rate:  # noqa: S311  a demonstration, not a secret
        raise RuntimeError(f"attempt {ctx.attempt} was unlucky")
    return {"attempt": ctx.attempt}


@demo.task("demo.sha256")
def sha256(path: str, *, ctx: Context) -> dict[str, str | int]:
    """The SHA-256 digest and the size of a file, read in a thread."""
    digest, size_bytes = hashlib.sha256(), 0
    with Path(path).open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            if ctx.cancelled:
                raise InterruptedError(f"ended after {size_bytes} bytes of {path}")
            digest.update(chunk)
            size_bytes += len(chunk)
    return {"path": path, "sha256": digest.hexdigest(), "size_bytes": size_bytes}
