"""A private PostgreSQL for `clarion dev`, the tests and the benchmarks, which ends with the process that started it.

The parts: `postgres_account` says who runs it, `postgres_binaries` finds the programs, `embedded_place` the directory
and its lock; `embedded_guard` is the process that starts the server and outlives a killed parent.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal
from urllib.parse import quote

import msgspec

from clarion import embedded_guard
from clarion.embedded_place import Place, choose_place, create_place, create_socket_directory, lock_place, open_log
from clarion.errors import ClarionError, UsageError
from clarion.postgres_account import clean_environment
from clarion.postgres_binaries import Binaries, find_binaries

# On the command line, so that a directory carries no settings of the version that created it.
OPTIONS = {
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    "port": "5432",
    "max_connections": "200",
    "cluster_name": "clarion",
    "timezone": "UTC",
    "log_timezone": "UTC",
}
# A crash of the machine takes an ephemeral directory with it, so nothing is gained by waiting for the disk.
EPHEMERAL_OPTIONS = {"fsync": "off", "full_page_writes": "off"}
LOG_TAIL_LINES = 20


class PostgresServer:
    """The running server; `url` stays the same over `stop` and `start`. One caller at a time."""

    def __init__(self, place: Place, url: str, channel: socket.socket) -> None:
        self.url = url
        self.directory = place.directory
        self._place = place
        self._channel = channel

    def start(self) -> None:
        """Starts it and waits until it answers; UsageError with the end of its log if it does not."""
        seen = self._place.log.stat().st_size
        answer = self._ask("start")
        if answer != "ok":
            log = self._place.log.read_bytes()[seen:].decode(errors="replace").splitlines()
            tail = "\n  ".join(log[-LOG_TAIL_LINES:])
            raise UsageError(
                f"The Postgres of {self.directory} does not start: {answer}. The end of its log:\n  {tail}"
            )

    def stop(self, mode: Literal["smart", "fast", "immediate"] = "fast") -> None:
        """Stops it as `pg_ctl stop` does and keeps the data; `smart` waits for every client to leave."""
        self._demand(f"stop {mode}")

    def kill(self) -> None:
        """SIGKILL to every process of it, which leaves the data as a crash does."""
        self._demand("kill")

    def _demand(self, request: str) -> None:
        answer = self._ask(request)
        if answer != "ok":
            raise ClarionError(f"`{request}` of the Postgres of {self.directory} failed: {answer}")

    def _ask(self, request: str) -> str:
        try:
            self._channel.sendall(request.encode())
            answer = self._channel.recv(1000).decode()
        except OSError:
            answer = ""
        return answer or "its guard process has ended, and the server with it"


@contextmanager
def running_postgres(directory: Path | None, *, options: Mapping[str, str] = {}) -> Iterator[PostgresServer]:
    """A server that ends with this context, or with this process however it ends.

    `directory`: its data, found again by the next call; None: temporary, fast instead of safe, removed at the end.
    As root it may live elsewhere (`server.directory`), namely if an unprivileged account cannot enter the directory.
    `options`: further settings of Postgres. UsageError if there are no binaries, if another process uses the
    directory, or if the server does not start.
    """
    try:
        place = choose_place(directory)
        binaries = find_binaries(place.account)
        _check_major(place, binaries)
        claim = _claim(place)
    except OSError as error:
        raise UsageError(f"No Postgres can live in {directory or 'a temporary directory'}: {error}.") from error
    guard, channel = _spawn_guard(claim, binaries, options)
    try:
        server = PostgresServer(place, claim.url, channel)
        server.start()
        yield server
    finally:
        _end(guard, channel, claim)


class _Claim(msgspec.Struct, frozen=True):
    """A place that is ours, the directory of its socket, and the descriptor of its lock."""

    place: Place
    sockets: Path
    lock_fd: int

    @property
    def url(self) -> str:
        """For asyncpg and libpq alike; the port is named because PGPORT would else be believed."""
        return f"postgresql://clarion@/clarion?host={quote(str(self.sockets))}&port={OPTIONS['port']}"

    @property
    def remove(self) -> list[Path]:
        """The directories that go when the server has gone."""
        aside = [] if self.sockets.parent == self.place.directory else [self.sockets]
        return aside if self.place.durable else [self.place.directory, *aside]


def _check_major(place: Place, binaries: Binaries) -> None:
    try:
        major = (place.data / "PG_VERSION").read_text().strip()
    except FileNotFoundError:
        return
    if major != binaries.major:
        raise UsageError(
            f"The data in {place.directory} is of PostgreSQL {major}, the programs in {binaries.directory} are "
            f"{binaries.version}. Install PostgreSQL {major} and give --database-url, move the data over with "
            "pg_dump and psql, or give another --db for an empty start."
        )


def _claim(place: Place) -> _Claim:
    create_place(place)
    lock_fd = lock_place(place)
    try:
        return _Claim(place, create_socket_directory(place), lock_fd)
    except BaseException:
        os.close(lock_fd)
        raise


def _spawn_guard(
    claim: _Claim, binaries: Binaries, options: Mapping[str, str]
) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """The guard and our end of its channel, which no other process inherits. Hands the lock over to the guard."""
    ours, theirs = socket.socketpair()
    log_fd = open_log(claim.place)
    try:
        guard = subprocess.Popen(
            [sys.executable, "-I", "-S", embedded_guard.__file__, _launch(claim, binaries, options)],
            stdin=theirs.fileno(),
            stdout=log_fd,
            stderr=log_fd,
            pass_fds=[claim.lock_fd],
            cwd="/",
            env=clean_environment(),
            start_new_session=True,
        )
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
        os.close(log_fd)
        os.close(claim.lock_fd)
    return guard, ours


def _launch(claim: _Claim, binaries: Binaries, options: Mapping[str, str]) -> str:
    place = claim.place
    sockets = str(claim.sockets).replace('"', '""')
    launch = embedded_guard.Launch(
        binaries=str(binaries.directory),
        data=str(place.data),
        options={
            **OPTIONS,
            "unix_socket_directories": f'"{sockets}"',
            **({} if place.durable else EPHEMERAL_OPTIONS),
            **options,
        },
        account=[place.account.uid, place.account.gid] if place.account.borrowed else None,
        durable=place.durable,
        lock_fd=claim.lock_fd,
        remove=[str(directory) for directory in claim.remove],
    )
    return json.dumps(launch._asdict())


def _end(guard: subprocess.Popen[bytes], channel: socket.socket, claim: _Claim) -> None:
    """Returns when the server is down and what is thrown away is gone, even if the guard was killed before."""
    with suppress(OSError):
        # Not only closed: a forked child may hold a copy.
        channel.shutdown(socket.SHUT_RDWR)
    channel.close()
    if guard.wait() == 0:
        return
    with suppress(OSError, UsageError):
        os.close(lock_place(claim.place))
    for directory in claim.remove:
        shutil.rmtree(directory, ignore_errors=True)
