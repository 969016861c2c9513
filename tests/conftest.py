"""One real Postgres for the whole run, a migrated template in it, and a fresh copy for each test file.

The server is the embedded one, or the one that CLARION_TEST_DATABASE_URL names. Under pytest-xdist the controller
starts it, and its workers find it in the environment.
"""

import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from urllib.parse import urlsplit
from uuid import UUID, uuid4

import anyio
import asyncpg
import httpx2
import pytest
from blockbuster import blockbuster_ctx

from api_harness import client_of, services_over
from clarion.api.services import Services
from clarion.db import Database, open_database
from clarion.embedded import running_postgres
from clarion.migrate import migrate
from clarion.settings import Settings
from clarion.store import Store

_SERVER = "CLARION_TEST_DATABASE_URL"
_TEMPLATE = "clarion_template"
_CONNECTING = {"_parse_connect_arguments", "_parse_connect_dsn_and_args", "_read_password_file"}
_FORGET_JOBS = """
    truncate clarion.jobs, clarion.job_history, clarion.attempts, clarion.job_events, clarion.job_logs,
      clarion.idempotency_keys, clarion.queues, clarion.workers
"""
_stack = ExitStack()


def pytest_configure(config: pytest.Config) -> None:
    """Starts the server, and makes the template, once per run."""
    if hasattr(config, "workerinput"):
        return
    if _SERVER not in os.environ:
        server = _stack.enter_context(running_postgres(None, options={"max_connections": "500"}))
        os.environ[_SERVER] = server.url
    anyio.run(_make_template)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Stops the server, unless it is somebody else's."""
    if not hasattr(config, "workerinput"):
        _stack.close()


async def _make_template() -> None:
    await _administer(f'drop database if exists "{_TEMPLATE}"', f'create database "{_TEMPLATE}"')
    await migrate(settings_for(_TEMPLATE))


async def _administer(*statements: str) -> None:
    connection = await asyncpg.connect(os.environ[_SERVER])
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()


def settings_for(database: str) -> Settings:
    """Settings that tests share: that database, everything else as shipped."""
    url = urlsplit(os.environ[_SERVER])._replace(path=f"/{database}").geturl()
    return Settings(database_url=url, ephemeral=True)


@pytest.fixture(autouse=True)
def nothing_blocks_the_event_loop() -> Iterator[None]:
    """Fails any test in which our code makes a blocking call (file, socket, sleep, lock) on an event loop.

    Let through: asyncpg looks for ~/.pgpass and certificates when it connects, and a traceback for its source lines
    when it is formatted; some microseconds that we cannot avoid.
    """
    with blockbuster_ctx(["clarion", "clarion_worker"]) as detector:
        for function in detector.functions.values():
            function.can_block_in("asyncpg/connect_utils.py", _CONNECTING)
            function.can_block_in("linecache.py", {"checkcache", "updatecache"})
        yield


@pytest.fixture(scope="module")
def new_database() -> Iterator[Callable[[], str]]:
    """Makes fresh, migrated databases; answers their names. They are dropped when the test file is done."""
    names: list[str] = []

    def make() -> str:
        name = f"clarion_test_{uuid4().hex[:12]}"
        anyio.run(_administer, f'create database "{name}" template "{_TEMPLATE}"')
        names.append(name)
        return name

    yield make
    anyio.run(_administer, *(f'drop database if exists "{name}" with (force)' for name in names))


@pytest.fixture(scope="module")
def settings(new_database: Callable[[], str]) -> Settings:
    """Settings of this test file's own database."""
    return settings_for(new_database())


@pytest.fixture
def database_url(settings: Settings) -> str:
    """The URL of this test file's own database."""
    return settings.database_url


@pytest.fixture
async def database(settings: Settings) -> AsyncIterator[Database]:
    """A pool on this test file's own database, whose jobs are gone before each test."""
    async with open_database(settings, name="test") as pool:
        await pool.fetch(_FORGET_JOBS)
        yield pool


@pytest.fixture
def store(database: Database, settings: Settings) -> Store:
    """The store on that pool."""
    return Store(database, settings)


@pytest.fixture
def worker_id() -> UUID:
    """A worker that exists nowhere else."""
    return uuid4()


@pytest.fixture
def services(store: Store, settings: Settings) -> Services:
    """What the API's routes work with, on this test file's database."""
    return services_over(store, settings)


@pytest.fixture
async def client(services: Services) -> AsyncIterator[httpx2.AsyncClient]:
    """An HTTP client of the API, in process."""
    async with client_of(services) as client:
        yield client
