"""Where the fixtures get their databases from: a server, a migrated template on it, and copies of that.

The SQL here is about databases, whose names no statement takes as a parameter; the names are made here.
"""

import fcntl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit
from uuid import uuid4

from anyio.from_thread import start_blocking_portal

from clarion.db import close_connection, connect, translated_errors
from clarion.embedded import running_postgres
from clarion.migrate import migrate
from clarion.settings import Settings

_FORGET_JOBS = Path(__file__).with_name("forget_jobs.sql").read_text(encoding="utf-8")
# A test suite has many processes, each with some connections.
_SERVER_OPTIONS = {"max_connections": "500"}


@contextmanager
def database_on(server_url: str, *, template_url: str | None = None) -> Iterator[str]:
    """A database of its own beside the one that the URL names, empty or a copy of a template; its URL."""
    name = f"clarion_test_{uuid4().hex[:16]}"
    source = "" if template_url is None else f' template "{urlsplit(template_url).path[1:]}"'
    _execute(server_url, f'create database "{name}"{source}')
    try:
        yield urlsplit(server_url)._replace(path=f"/{name}").geturl()
    finally:
        _execute(server_url, f'drop database if exists "{name}" with (force)')


def migrate_database(database_url: str) -> None:
    """Makes Clarion's tables."""
    with start_blocking_portal() as portal:
        portal.call(migrate, Settings(database_url=database_url))


def forget_jobs(database_url: str) -> None:
    """Empties Clarion's tables."""
    _execute(database_url, _FORGET_JOBS)


@contextmanager
def shared_server(directory: Path) -> Iterator[str]:
    """An embedded Postgres for all processes that name this directory; its URL.

    The first of them starts it, and does not leave before the others have. `users` is locked by all, shared; `owner` by
    the one whose server it is. Both are taken, and `owner` is given up, only by whoever has `door`, for a moment.
    """
    with ExitStack() as files:
        door, owner, users = (
            files.enter_context((directory / f"clarion-{name}.lock").open("a")) for name in ("door", "owner", "users")
        )
        address = directory / "clarion-postgres.url"
        with ExitStack() as server:
            with _locked(door):
                is_owner = _lock_now(owner)
                if is_owner:
                    address.write_text(server.enter_context(running_postgres(None, options=_SERVER_OPTIONS)).url)
                fcntl.flock(users, fcntl.LOCK_SH)
            try:
                yield address.read_text()
            finally:
                while is_owner and not _is_last(door, owner, users):
                    fcntl.flock(users, fcntl.LOCK_EX)  # returns when the others have left
                    fcntl.flock(users, fcntl.LOCK_UN)


def _is_last(door: IO[str], owner: IO[str], users: IO[str]) -> bool:
    """Whether nobody else uses the server, nor can from now on: who comes next starts another."""
    with _locked(door):
        last = _lock_now(users)
        if last:
            fcntl.flock(owner, fcntl.LOCK_UN)
            fcntl.flock(users, fcntl.LOCK_UN)
        return last


@contextmanager
def _locked(file: IO[str]) -> Iterator[None]:
    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)


def _lock_now(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _execute(database_url: str, sql: str) -> None:
    with start_blocking_portal() as portal:
        portal.call(_fetch, database_url, sql)


async def _fetch(database_url: str, sql: str) -> None:
    settings = Settings(database_url=database_url)
    connection = await connect(settings, name="testing", statement_timeout_seconds=0)
    try:
        with translated_errors():
            await connection.execute(sql)
    finally:
        await close_connection(connection)
