"""When a process is alive, and when requests should be sent to it."""

from collections.abc import Callable
from typing import Any

import httpx2
import pytest

from api_harness import client_of, services_over
from clarion.api.services import Services
from clarion.db import Database, open_database
from clarion.settings import Settings
from clarion.statements import schema_version
from clarion.store import Store
from conftest import settings_for


async def ask_health(services: Services, path: str) -> httpx2.Response:
    async with client_of(services) as client:
        return await client.get(path)


async def test_a_process_over_a_good_database_is_alive_and_ready(services: Services) -> None:
    assert (await ask_health(services, "/livez")).json() == {"status": "ok"}
    assert (await ask_health(services, "/readyz")).json() == {"status": "ok"}
    assert (await ask_health(services, "/readyz?verbose")).json() == {
        "status": "ok",
        "checks": {"process": "ok", "database": "ok"},
    }


@pytest.fixture
def spoilt(new_database: Callable[[], str]) -> Settings:
    """Settings of a database that no other test uses."""
    return settings_for(new_database())


async def expect_not_ready(services: Services, check: str, reason: str) -> None:
    """Not ready for this reason, and alive all the same."""
    answer = await ask_health(services, "/readyz?verbose")
    problem: dict[str, Any] = answer.json()
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert problem["type"] == "/problems/unavailable"
    assert reason in problem["checks"][check]
    assert problem["checks"][check] in problem["detail"]
    assert "checks" not in (await ask_health(services, "/readyz")).json()
    assert (await ask_health(services, "/livez")).status_code == 200


async def test_a_draining_process_is_not_ready(services: Services) -> None:
    services.draining.set()
    await expect_not_ready(services, "process", "draining")


async def test_without_its_database_a_process_is_not_ready() -> None:
    settings = Settings(database_url="postgresql://nobody@127.0.0.1:1/none")
    async with open_database(settings, name="test") as database:
        services = services_over(Store(database, settings), settings)
        await expect_not_ready(services, "database", "unavailable")


async def test_over_an_empty_database_a_process_is_not_ready() -> None:
    empty = settings_for("postgres")
    async with open_database(empty, name="test") as database:
        await expect_not_ready(services_over(Store(database, empty), empty), "database", "clarion migrate up")


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("delete from clarion.schema_migrations where version = {version}", "clarion migrate up"),
        (
            "insert into clarion.schema_migrations (version, name, checksum) values ({version} + 1, 'x', 'x')",
            "upgrade Clarion",
        ),
    ],
)
async def test_over_another_version_of_the_schema_a_process_is_not_ready(
    spoilt: Settings, statement: str, reason: str
) -> None:
    async with open_database(spoilt, name="test") as database:
        await database.fetch(statement.format(version=schema_version()))
        await expect_not_ready(services_over(Store(database, spoilt), spoilt), "database", reason)


async def test_over_a_database_that_may_lose_data_a_process_is_not_ready(
    database: Database, settings: Settings
) -> None:
    services = services_over(Store(database, settings), settings, ephemeral=False)
    fsync = (await services.store.read_ground()).fsync
    if fsync:
        pytest.skip("this server keeps what it acknowledges")
    await expect_not_ready(services, "database", "fsync")
