"""`clarion serve` as a process: with its database away, and at its end."""

import signal
from contextlib import suppress

import anyio
import httpx2
import pytest

from clarion.db import Database
from clarion.settings import Settings
from verification import clarion, running


async def test_with_its_database_away_it_lives_and_is_not_ready() -> None:
    command = [*clarion(), "serve", "--port", "0", "--database-url", "postgresql://nobody@127.0.0.1:1/none"]
    async with running(command) as child:
        url = (await child.line_with("Clarion answers on")).split()[-1]
        async with httpx2.AsyncClient(base_url=url, timeout=30) as http:
            assert (await http.get("/livez")).status_code == 200
            assert (await http.get("/readyz")).status_code == 503
            refused = await http.post("/v1/jobs", json={"task": "x"})
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        child.process.send_signal(signal.SIGTERM)
        assert await child.process.wait() == 0


async def test_a_request_that_waits_is_answered_when_the_server_stops(
    settings: Settings, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLARION_EPHEMERAL", "true")
    command = [*clarion(), "serve", "--port", "0", "--database-url", settings.database_url]
    async with running(command) as child:
        url = (await child.line_with("Clarion answers on")).split()[-1]
        async with httpx2.AsyncClient(base_url=url, timeout=60) as http:
            job = (await http.post("/v1/jobs", json={"task": "x"})).json()
            answers: list[httpx2.Response] = []

            async def wait() -> None:
                answers.append(await http.get(f"/v1/jobs/{job['id']}?wait=60s"))

            async with anyio.create_task_group() as group:
                group.start_soon(wait)
                # The request waits once the look-up of all that wait has been asked.
                while not await database.fetch(
                    "select from pg_stat_activity where application_name = 'clarion api' "
                    "and datname = current_database() and query like '-- Of many jobs%'"
                ):
                    pass
                child.process.send_signal(signal.SIGTERM)
        assert await child.process.wait() == 0
    assert (answers[0].status_code, answers[0].json()["state"]) == (200, "ready")


async def test_a_bug_in_the_background_ends_the_server(
    settings: Settings, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLARION_EPHEMERAL", "true")
    command = [*clarion(), "serve", "--port", "0", "--database-url", settings.database_url]
    async with running(command) as child:
        url = (await child.line_with("Clarion answers on")).split()[-1]
        await database.fetch("alter table clarion.jobs rename to elsewhere")
        async with httpx2.AsyncClient(base_url=url, timeout=30) as http:
            with suppress(httpx2.HTTPError):
                await http.post("/v1/jobs", json={"task": "x"})
        assert await child.process.wait() == 1
        await database.fetch("alter table clarion.elsewhere rename to jobs")
