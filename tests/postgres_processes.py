"""Looking at an embedded Postgres from outside: its processes, its socket, and the ground it stands on."""

import asyncio
import os
import select
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import asyncpg

from clarion.embedded import PostgresServer

DEATH_TIMEOUT_SECONDS = 20


@contextmanager
def reachable_directory() -> Iterator[Path]:
    """A directory that every account can enter; pytest's own temporary directories are for root only."""
    with tempfile.TemporaryDirectory(prefix="clarion-test-") as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


def ask(server: PostgresServer, sql: str, *args: object) -> object:
    """One value, over a connection of its own."""

    async def fetch() -> object:
        connection = await asyncpg.connect(server.url)
        try:
            return await connection.fetchval(sql, *args)
        finally:
            await connection.close()

    return asyncio.run(fetch())


def socket_of(server: PostgresServer) -> Path:
    """The directory of its socket, as the URL says."""
    return Path(parse_qs(urlsplit(server.url).query)["host"][0])


def postmaster(directory: Path) -> int:
    """The first process of the server, whose parent is the guard."""
    return int((directory / "data" / "postmaster.pid").read_text().split()[0])


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def children_of(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if parent_of(int(entry.name)) == pid:
                found.append(int(entry.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def owner_of(pid: int) -> int:
    return Path(f"/proc/{pid}").stat().st_uid


def environment_of(pid: int) -> bytes:
    return Path(f"/proc/{pid}/environ").read_bytes()


class Watched:
    """Processes whose death can be awaited without a sleep, even if their pids are given away again.

    One that was listed a moment ago may have ended by itself, as the backend of a connection just closed does: it is
    dead already.
    """

    def __init__(self, *pids: int) -> None:
        self._pidfds: list[int] = []
        for pid in pids:
            with suppress(ProcessLookupError):
                self._pidfds.append(os.pidfd_open(pid))

    def await_death(self) -> None:
        for pidfd in self._pidfds:
            assert select.select([pidfd], [], [], DEATH_TIMEOUT_SECONDS)[0], "a process outlived its time"
            os.close(pidfd)


def watch_server(directory: Path) -> Watched:
    """The guard, the server and every process of it."""
    server = postmaster(directory)
    return Watched(parent_of(server), server, *children_of(server))
