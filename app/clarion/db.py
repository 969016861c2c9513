"""Connections to Postgres: how they are opened and configured, and what counts as weather.

Everything above this module sees rows or a `ClarionError`, never a driver's exception.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Protocol, TypeAlias

import anyio
import asyncpg
from asyncpg.pool import PoolConnectionProxy

from clarion.errors import Overloaded, Unavailable, Unstorable, UsageError
from clarion.settings import Settings

# The database is away, restarting, read-only, out of room, or too slow: try again later.
WEATHER = (
    OSError,
    TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.exceptions.OperatorInterventionError,
    asyncpg.exceptions.InsufficientResourcesError,
    asyncpg.exceptions.TransactionRollbackError,
    asyncpg.exceptions.ReadOnlySQLTransactionError,
    asyncpg.exceptions.PostgresSystemError,
    asyncpg.exceptions.InternalServerError,
    asyncpg.exceptions.FatalPostgresError,
)

# Postgres refuses the value itself: a NUL, a number out of range, a row too large, a broken constraint.
UNSTORABLE = (
    asyncpg.DataError,
    asyncpg.exceptions.ProgramLimitExceededError,
    asyncpg.IntegrityConstraintViolationError,
)


# How long a statement waits for a row that another session has locked.
_LOCK_TIMEOUT_SECONDS = 2.0
# How many connections stay borrowed between statements, and after how many statements one goes back all the same.
_KEPT_MAX = 4
_RETURN_EVERY = 1_000

_Borrowed: TypeAlias = "PoolConnectionProxy[asyncpg.Record]"

_REFUSED = (
    asyncpg.exceptions.InvalidAuthorizationSpecificationError,
    asyncpg.exceptions.InvalidCatalogNameError,
    asyncpg.exceptions.InsufficientPrivilegeError,
)


class Refused(Unavailable):
    """Postgres answers and refuses us. At start-up that is a mistake to report; later, weather: somebody is at work."""


class Locked(Unavailable):
    """Weather of single rows: another session has held a lock on one for longer than the lock timeout."""


class Executor(Protocol):
    """What runs one statement."""

    async def fetch(self, sql: str, *args: object) -> list[asyncpg.Record]:
        """All rows of the statement; committed when this returns."""


class Database:
    """A pool whose statements end in rows, or in a `ClarionError`; each statement is its own transaction.

    A few connections are kept from one statement to the next. To give one back to the pool and to borrow it again is a
    task and some turns of the event loop: a `select 1` cost Python 110 µs that way, and costs 70. The rest go back, and
    the pool closes them when nobody needs them.
    """

    def __init__(self, pool: asyncpg.Pool[asyncpg.Record], settings: Settings) -> None:
        self._pool = pool
        self._acquire_timeout_seconds = settings.acquire_timeout_seconds
        self._kept: list[_Borrowed] = []
        self._kept_max = _KEPT_MAX
        self._borrowing = 0
        self._returns = 0

    async def fetch(self, sql: str, *args: object) -> list[asyncpg.Record]:
        """All rows of one statement; committed when this returns."""
        with translated_errors():
            connection = await self._take()
            try:
                rows = await connection.fetch(sql, *args)
            except BaseException:
                await self._give_back(connection)
                raise
            self._returns += 1
            # Now and then each goes back all the same: the pool replaces what has served long enough.
            if self._borrowing or len(self._kept) >= self._kept_max or not self._returns % _RETURN_EVERY:
                await self._give_back(connection)
            else:
                self._kept.append(connection)
            return rows

    async def close(self) -> None:
        """Gives back what is kept; nothing is kept any more."""
        self._kept_max = 0
        while self._kept:
            await self._give_back(self._kept.pop())

    async def _take(self) -> _Borrowed:
        while self._kept:
            connection = self._kept.pop()
            if _is_open(connection):
                return connection
            await self._give_back(connection)
        self._borrowing += 1
        try:
            # Where nobody need wait, a limit would only cost a task, and turns of the loop that others get first.
            is_free = self._pool.get_idle_size() > 0
            return await self._pool.acquire(timeout=None if is_free else self._acquire_timeout_seconds)
        except TimeoutError as error:
            if self._pool.get_idle_size() == 0 and self._pool.get_size() >= self._pool.get_max_size():
                raise Overloaded("every connection to the database is busy") from error
            raise
        finally:
            self._borrowing -= 1

    async def _give_back(self, connection: _Borrowed) -> None:
        # Goes on when this is cancelled: the pool shields it. One that was closed it has taken back by itself.
        await self._pool.release(connection, timeout=self._acquire_timeout_seconds)


def _is_open(connection: _Borrowed) -> bool:
    try:
        return not connection.is_closed()
    except asyncpg.InterfaceError:  # closed, and back in the pool
        return False


@contextmanager
def translated_errors() -> Iterator[None]:
    """Turns the driver's exceptions into ours: weather, or a value that cannot be stored. Bugs pass through."""
    try:
        yield
    except asyncpg.exceptions.LockNotAvailableError as error:
        raise Locked(f"a row is locked by another session: {error}") from error
    except asyncpg.CheckViolationError as error:
        if error.constraint_name is None:
            # Not a check of ours: the row was on its way to the default partition when its own was attached.
            raise Unavailable(f"the history was being partitioned: {error}") from error
        raise Unstorable(f"Postgres refuses the value: {error}") from error
    except _REFUSED as error:
        raise Refused(f"Postgres refuses the connection: {error}; check the database URL and its role") from error
    except asyncpg.exceptions.ClientConfigurationError as error:
        raise UsageError(f"the database URL cannot be used: {error}") from error
    except UNSTORABLE as error:
        raise Unstorable(f"Postgres refuses the value: {error}") from error
    except WEATHER as error:
        raise Unavailable(f"the database is unavailable: {str(error) or type(error).__name__}") from error


@asynccontextmanager
async def open_database(settings: Settings, *, name: str) -> AsyncIterator[Database]:
    """A pool for one process, `name` as its application name. Connects when first used, so Postgres may come later."""
    pool = asyncpg.create_pool(
        min_size=0,
        max_size=settings.pool_max,
        # Nothing here changes a session's state (only `set local` in a transaction), so the round trip that would
        # undo such changes at every release buys nothing.
        reset=_leave_as_is,
        **connect_options(settings, name=name),
    )
    database = Database(pool, settings)
    try:
        await pool
        yield database
    finally:
        with anyio.CancelScope(shield=True):
            with anyio.move_on_after(2) as scope:
                await database.close()
                await pool.close()
            if scope.cancelled_caught:
                pool.terminate()


class DedicatedDatabase:
    """One connection outside every pool, opened when first used and again after each failure."""

    def __init__(self, settings: Settings, *, name: str, lock_timeout_seconds: float = _LOCK_TIMEOUT_SECONDS) -> None:
        self._settings = settings
        self._name = name
        self._lock_timeout_seconds = lock_timeout_seconds
        self._connection: asyncpg.Connection[asyncpg.Record] | None = None

    async def fetch(self, sql: str, *args: object) -> list[asyncpg.Record]:
        """All rows of one statement; committed when this returns."""
        if self._connection is None or self._connection.is_closed():
            self._connection = await connect(
                self._settings, name=self._name, lock_timeout_seconds=self._lock_timeout_seconds
            )
        with translated_errors():
            return await self._connection.fetch(sql, *args)

    async def close(self) -> None:
        """Closes the connection; the next use opens another."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await close_connection(connection)


async def connect(
    settings: Settings,
    *,
    name: str,
    statement_timeout_seconds: float | None = None,
    lock_timeout_seconds: float = _LOCK_TIMEOUT_SECONDS,
) -> asyncpg.Connection[asyncpg.Record]:
    """One connection of its own, outside the pool: for LISTEN, heartbeats, migrations."""
    with translated_errors():
        return await asyncpg.connect(
            **connect_options(
                settings,
                name=name,
                statement_timeout_seconds=statement_timeout_seconds,
                lock_timeout_seconds=lock_timeout_seconds,
            )
        )


async def close_connection(connection: asyncpg.Connection[asyncpg.Record]) -> None:
    """Closes politely within a second, or else at once."""
    with anyio.CancelScope(shield=True):
        try:
            await connection.close(timeout=1)
        except WEATHER:
            connection.terminate()


def connect_options(
    settings: Settings,
    *,
    name: str,
    statement_timeout_seconds: float | None = None,
    lock_timeout_seconds: float = _LOCK_TIMEOUT_SECONDS,
) -> dict[str, Any]:
    """How every connection is opened: time limits (0: none), a pinned search_path, and one plan per statement.

    Replanning at every execution cost more than executing (a single claim: 890 against 560 µs of Postgres CPU). A plan
    that is kept must not depend on the moment it was made, though, and a queue is at its emptiest when its processes
    connect. For an empty table Postgres plans scans of the whole of it, and sorts, and keeps them while it fills: over
    41,600 jobs a claim took 14 ms instead of 0.4, a heartbeat of 500 leases 4.5 s instead of 4 ms. So scans that read
    all of a table, or all that matches before the first row, are priced out; every statement here has an index to walk.
    """
    seconds = settings.statement_timeout_seconds if statement_timeout_seconds is None else statement_timeout_seconds
    statement_ms = int(seconds * 1000)
    return {
        "dsn": settings.database_url,
        "timeout": settings.connect_timeout_seconds,
        # The server's own limit comes first; this one is for a server that no longer answers.
        "command_timeout": seconds + 2 if seconds else None,
        "server_settings": {
            "application_name": f"clarion {name}",
            "search_path": "clarion, pg_catalog",
            "timezone": "UTC",
            "plan_cache_mode": "force_generic_plan",
            "enable_seqscan": "off",
            "enable_bitmapscan": "off",
            "jit": "off",
            "statement_timeout": str(statement_ms),
            "lock_timeout": str(min(int(lock_timeout_seconds * 1000), statement_ms)),
            "idle_in_transaction_session_timeout": "60000",
        },
    }


async def _leave_as_is(_connection: object) -> None:
    return None
