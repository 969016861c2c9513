"""What the verify_*.py scripts share: a deployment to talk to, workers to hurt, and a report of what was proven."""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, redirect_stdout
from pathlib import Path
from typing import Any
from uuid import UUID

import anyio
import asyncpg
import httpx2
import msgspec
from anyio.abc import ByteReceiveStream, Process
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from clarion.db import close_connection
from clarion.embedded import running_postgres

_LINE_SECONDS = 60.0
SCRIPTS = Path(__file__).resolve().parent

console = Console(stderr=True, soft_wrap=True)


class VerificationError(Exception):
    """The proof could not even be tried; the text says why."""


def _first(error: BaseException) -> BaseException:
    return _first(error.exceptions[0]) if isinstance(error, BaseExceptionGroup) else error


class Deployment(msgspec.Struct, frozen=True):
    """A running Clarion: its API, and where it is known the database behind it, for workers in Python and to look."""

    url: str
    database_url: str = ""
    token: str = ""

    def client(self, *, actor: str = "verification", connections_max: int = 64) -> httpx2.AsyncClient:
        """An HTTP client for its API; `actor` is who timelines say it was."""
        headers = {"x-clarion-actor": actor}
        if self.token:
            headers["authorization"] = f"Bearer {self.token}"
        limits = httpx2.Limits(max_connections=connections_max)
        return httpx2.AsyncClient(base_url=self.url, headers=headers, timeout=60, limits=limits)

    def known_database_url(self) -> str:
        """The database's address; raises VerificationError where only the API's was given."""
        if not self.database_url:
            raise VerificationError(
                "--url needs --database-url too: this verification looks behind the API, or starts workers there"
            )
        return self.database_url


class WorkerProcess:
    """A `clarion worker` that may be stopped, killed and looked at."""

    def __init__(self, child: "Child", worker_id: UUID) -> None:
        self.child = child
        self.process = child.process
        self.id = worker_id

    def signal(self, number: signal.Signals) -> None:
        """Sends it a signal."""
        self.process.send_signal(number)


class Check(msgspec.Struct, frozen=True):
    """A promise, and what shows that it held or did not; `ok` is None where it could not be tried."""

    ok: bool | None
    promise: str
    evidence: str


class Report:
    """Collects what was checked, and prints each check at once; `failed` says whether anything was not as promised."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._checks: list[Check] = []

    @property
    def failed(self) -> bool:
        """Whether any promise was broken, or none was looked at."""
        return not self._checks or any(check.ok is False for check in self._checks)

    def check(self, promise: str, *, ok: bool, evidence: str) -> None:
        """Notes whether a promise held, and what shows it."""
        self._note(Check(ok, promise, evidence))

    def skip(self, promise: str, *, because: str) -> None:
        """Notes a promise that cannot be tried here."""
        self._note(Check(None, promise, because))

    def conclude(self, *, seconds: float, as_json: bool) -> None:
        """The verdict on standard output, or all of it as one JSON object."""
        if as_json:
            document = {"title": self._title, "ok": not self.failed, "seconds": round(seconds, 1)}
            print(msgspec.json.encode(document | {"checks": self._checks}).decode())
            return
        held = sum(check.ok is True for check in self._checks)
        verdict = "NOT AS PROMISED" if self.failed else "proven" if held else "skipped"
        figures = f"in {seconds:.1f} s, {held} of {len(self._checks)} checks: {self._title}"
        Console(soft_wrap=True).print(Text(verdict, style="red" if self.failed else "green"), Text(figures))

    def _note(self, check: Check) -> None:
        self._checks.append(check)
        mark = {True: Text("✓", "green"), False: Text("✗", "red"), None: Text("skipped", "yellow")}[check.ok]
        Console(soft_wrap=True).print(Text.assemble(mark, f" {check.promise}: {check.evidence}"))


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The flags every verification has; the description is best the script's own `__doc__`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--url", help="a running API; default: an ephemeral stack of its own")
    database_url = os.environ.get("CLARION_DATABASE_URL", "")
    parser.add_argument("--database-url", default=database_url, help="its database, where the script needs it")
    parser.add_argument("--token", default=os.environ.get("CLARION_API_TOKEN", ""), help="its API token, if it has one")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    return parser


@asynccontextmanager
async def deployment(options: argparse.Namespace) -> AsyncIterator[Deployment]:
    """The deployment that the flags name, or an ephemeral one that ends with this block."""
    if options.url:
        yield Deployment(options.url.rstrip("/"), options.database_url, options.token)
        return
    with running_postgres(None) as server:
        async with stack(server.url) as target:
            yield target


@asynccontextmanager
async def stack(database_url: str) -> AsyncIterator[Deployment]:
    """An API and a scheduler of our own, as processes, on a database that may be thrown away."""
    # What the shell says of another deployment is nothing to this one.
    for name in ("CLARION_API_TOKEN", "CLARION_LOG_LEVEL", "CLARION_LOG_FORMAT"):
        os.environ.pop(name, None)
    os.environ.update({"CLARION_DATABASE_URL": database_url, "CLARION_EPHEMERAL": "true"})
    await anyio.run_process([*clarion(), "migrate", "up"])
    async with running([*clarion(), "scheduler"]), running([*clarion(), "serve", "--port", "0"]) as api:
        said = await api.line_with("Clarion answers on ")
        yield Deployment(said.removeprefix("Clarion answers on "), database_url)


@asynccontextmanager
async def worker(target: Deployment, *flags: str) -> AsyncIterator[WorkerProcess]:
    """A worker process with the demo tasks and those of `verification_tasks`, once it has started."""
    command = [
        *clarion(),
        "worker",
        "verification_tasks:tasks",
        "--demo",
        "--log-format",
        "json",
        "--log-level",
        "info",
    ]
    command += ["--database-url", target.known_database_url(), *flags]
    async with running(command, cwd=SCRIPTS) as child:
        line = msgspec.json.decode(await child.line_with('"worker.started"'))
        yield WorkerProcess(child, UUID(line["worker_id"]))


class Child:
    """A child process whose standard error is read, so that it never blocks on it."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self._changed = anyio.Event()
        self._ended = False
        self._tail: deque[str] = deque(maxlen=50)

    async def line_with(self, text: str) -> str:
        """The first line that contains the text; exits, showing what the process said, if none comes in a minute."""
        with anyio.move_on_after(_LINE_SECONDS):
            while True:
                for line in self._tail:
                    if text in line:
                        return line
                if self._ended:
                    break
                await self._changed.wait()
        raise VerificationError(f"a process never said {text!r}; it said:\n" + "\n".join(self._tail))

    async def pump(self) -> None:
        """Reads standard error to its end, and remembers the last lines."""
        if self.process.stderr is not None:
            async for line in _lines(self.process.stderr):
                self._tail.append(line)
                self._change()
        self._ended = True
        self._change()

    def _change(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()


async def _lines(stream: ByteReceiveStream) -> AsyncIterator[str]:
    rest = b""
    async for chunk in stream:
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line.decode(errors="replace")


@asynccontextmanager
async def running(
    command: list[str],
    *,
    cwd: Path | None = None,
    merge_output: bool = False,
    variables: Mapping[str, str] | None = None,
) -> AsyncIterator[Child]:
    """A child process that does not outlive the block; `variables` come on top of our environment.

    With `merge_output` its standard output is read as well.
    """
    if merge_output:
        command = ["sh", "-c", 'exec "$@" >&2', "sh", *command]
    environment = os.environ | dict(variables or {})
    process = await anyio.open_process(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, cwd=cwd, env=environment
    )
    child = Child(process)
    try:
        async with anyio.create_task_group() as group:
            group.start_soon(child.pump)
            try:
                yield child
            finally:
                with anyio.CancelScope(shield=True):
                    if process.returncode is None:
                        process.kill()
                    await process.wait()
                group.cancel_scope.cancel()
    finally:
        with anyio.CancelScope(shield=True):
            await process.aclose()


def clarion() -> list[str]:
    """The command line of `clarion`, in this environment."""
    return [sys.executable, "-m", "clarion.cli"]


@asynccontextmanager
async def database(target: Deployment) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    """A connection to look behind the API with."""
    connection = await asyncpg.connect(target.known_database_url())
    try:
        yield connection
    finally:
        await close_connection(connection)


@contextmanager
def progress_bar(what: str, total: int) -> Iterator["ProgressBar"]:
    """A bar on a terminal, a line every few seconds elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield ProgressBar(progress, what, total)


class ProgressBar:
    """How far something has come."""

    def __init__(self, progress: Progress, what: str, total: int) -> None:
        self._progress = progress
        self._task = progress.add_task(what, total=total)
        self._what = what
        self._total = total
        self._said = time.monotonic()

    def name(self, what: str) -> None:
        """What is under way now."""
        self._what = what
        self._progress.update(self._task, description=what)

    def update(self, done: int) -> None:
        """So many are done."""
        self._progress.update(self._task, completed=done)
        if not console.is_terminal and (time.monotonic() - self._said > 3 or done == self._total):
            self._said = time.monotonic()
            console.print(f"{self._what}: {done} of {self._total}")


def run(main: Any, options: argparse.Namespace) -> None:
    """Runs `main(options)`, which answers a report; prints the verdict and exits 1 if anything was not as promised."""
    began = time.monotonic()
    # Ended as Ctrl-C ends it, so that nothing that it started outlives it.
    # Shells start what is to run in their background with Ctrl-C ignored, and so this would be.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        report = _report_of(main, options)
    except KeyboardInterrupt:
        sys.exit(130)
    report.conclude(seconds=time.monotonic() - began, as_json=options.json)
    sys.exit(1 if report.failed else 0)


def _report_of(main: Any, options: argparse.Namespace) -> Report:
    try:
        # With --json standard output is for the one object.
        with redirect_stdout(sys.stderr if options.json else sys.stdout):
            report: Report = anyio.run(main, options)
    except* (VerificationError, httpx2.TransportError) as group:
        error = _first(group)
        sys.exit(f"cannot verify: {str(error) or type(error).__name__}")
    return report
