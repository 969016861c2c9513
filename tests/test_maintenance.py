"""The steps that keep jobs moving, awaited one by one."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import UUID

import msgspec
import pytest
from structlog.testing import capture_logs

from clarion.db import Database
from clarion.errors import Unstorable
from clarion.job import NewJob
from clarion.maintenance import Maintenance
from clarion.settings import Settings
from clarion.store import Store
from clarion.wake import Ringer
from store_actions import Jobs, line

# Everything of every ledger, but what belongs to live jobs, is past its time.
PAST = """
    with a as (update clarion.attempts set ended_at = ended_at - interval '1000 days'),
      e as (update clarion.job_events set at = at - interval '1000 days'),
      l as (update clarion.job_logs set at = at - interval '1000 days')
    update clarion.idempotency_keys set expires_at = expires_at - interval '1000 days'
"""
FAILED_ONCE = """
    insert into clarion.attempts (job_id, lease_token, attempt, outcome, state, started_at)
    values ($1, gen_random_uuid(), 1, 'failed', 'scheduled', now())
"""


@pytest.fixture
def jobs(database: Database, settings: Settings) -> Jobs:
    return Jobs(database, settings)


@pytest.fixture
def maintenance(store: Store, settings: Settings) -> Maintenance:
    return Maintenance(store, Ringer(store, settings), settings)


def in_pages_of(rows: int, jobs: Jobs, settings: Settings) -> Maintenance:
    """Maintenance whose statements take so many rows at once."""
    settings = msgspec.structs.replace(settings, step_max_jobs=rows)
    store = Store(jobs.database, settings)
    return Maintenance(store, Ringer(store, settings), settings)


@asynccontextmanager
async def unhandled(jobs: Jobs, job_id: UUID) -> AsyncIterator[None]:
    """A row that no statement may charge with a crash."""
    await jobs.fetch(f"alter table clarion.jobs add constraint bad_row check (id <> '{job_id}' or crashes = 0)")
    yield
    await jobs.fetch("alter table clarion.jobs drop constraint bad_row")


async def test_promotion_sleeps_until_the_next_job_is_due(jobs: Jobs, maintenance: Maintenance) -> None:
    await jobs.enqueue(delay_seconds=0.5)
    assert 0 < await maintenance.promote() <= 0.5


async def test_promotion_looks_again_at_once_after_a_full_page(jobs: Jobs, settings: Settings) -> None:
    await jobs.enqueue(3, delay_seconds=60)
    await jobs.fetch("update clarion.jobs set run_at = now()")
    maintenance = in_pages_of(2, jobs, settings)
    assert await maintenance.promote() == 0
    assert await maintenance.promote() > 0
    assert [row["state"] for row in await jobs.fetch("select state::text from clarion.jobs")] == ["ready"] * 3


async def test_a_row_that_the_reaper_cannot_handle_is_parked_and_the_others_go_on(
    jobs: Jobs, store: Store, maintenance: Maintenance
) -> None:
    await jobs.enqueue(5)
    leases = await jobs.claim(5)
    for lease in leases:
        await jobs.expire(lease.id)
    bad = leases[2].id
    async with unhandled(jobs, bad):
        with pytest.raises(Unstorable):
            await store.reap_jobs()
        await maintenance.reap()
        await maintenance.reap()
        rows = await jobs.fetch("select id, state::text, dead_reason::text from clarion.jobs")
    assert await jobs.events(bad) == [("parked", "reaper", "dead")]
    states = {row["id"]: (row["state"], row["dead_reason"]) for row in rows}
    assert states.pop(bad) == ("dead", "unprocessable")
    assert list(states.values()) == [("ready", None)] * 4


async def test_a_job_that_waits_past_its_deadline_is_dead_and_said_to_be(jobs: Jobs, maintenance: Maintenance) -> None:
    (late,), _ = await jobs.enqueue(start_within_seconds=60.0), await jobs.enqueue(start_within_seconds=600.0)
    await jobs.age(late.id, 61)
    with capture_logs() as logs:
        assert 0 < await maintenance.expire() <= 1
        assert 0 < await maintenance.expire() <= 1
    assert await jobs.state(late.id) == "dead"
    assert [(line["event"], line["jobs"], line["reasons"]) for line in logs] == [("jobs.expired", 1, {"expired": 1})]


async def test_expiry_looks_again_at_once_after_a_full_page(jobs: Jobs, settings: Settings) -> None:
    for added in await jobs.enqueue(3, total_timeout_seconds=60.0):
        await jobs.age(added.id, 61)
    maintenance = in_pages_of(2, jobs, settings)
    assert await maintenance.expire() == 0
    assert await maintenance.expire() > 0
    assert [row["state"] for row in await jobs.fetch("select state::text from clarion.jobs")] == ["dead"] * 3


async def test_what_is_past_its_time_is_pruned_and_said_to_be(jobs: Jobs, maintenance: Maintenance) -> None:
    lease = await jobs.run()
    await jobs.store.record_logs([line(lease, n) for n in (1, 2)])
    await jobs.cancel(lease.id)
    await jobs.attempt("release", lease)
    await jobs.store.enqueue_jobs([NewJob(task="t", key="k", request="{}")])
    await jobs.fetch(PAST)
    with capture_logs() as logs:
        assert await maintenance.prune() > 10
        assert await maintenance.prune() > 10
    assert logs == [
        {
            "event": "ledgers.pruned", "log_level": "info",
            "attempts": 1, "events": 2, "log_lines": 2, "idempotency_keys": 1,
        }
    ]  # fmt: skip


@pytest.mark.parametrize("ledger", ["attempts", "job_events", "job_logs", "idempotency_keys"])
async def test_pruning_looks_again_at_once_after_a_full_page_of_anything(
    jobs: Jobs, settings: Settings, ledger: str
) -> None:
    for n in range(3):
        lease = await jobs.run()
        await jobs.store.record_logs([line(lease)])
        await jobs.cancel(lease.id)
        await jobs.attempt("complete", lease)
        await jobs.fetch(FAILED_ONCE, lease.id)
        await jobs.store.enqueue_jobs([NewJob(task="u", key=f"k{n}", request="{}")])
    for other in {"attempts", "job_events", "job_logs", "idempotency_keys"} - {ledger}:
        await jobs.fetch(f"truncate clarion.{other}")
    await jobs.fetch(PAST)
    maintenance = in_pages_of(2, jobs, settings)
    assert await maintenance.prune() == 0
    assert await maintenance.prune() > 10
    assert await jobs.fetch(f"select from clarion.{ledger}") == []


async def test_a_step_without_work_asks_for_its_pause(maintenance: Maintenance) -> None:
    assert 0 < await maintenance.reap() <= 1
    assert 0 < await maintenance.expire() <= 1
    assert await maintenance.partition() > 60
    assert await maintenance.prune() > 10
    assert await maintenance.promote() > 0


@pytest.mark.parametrize(
    "spoilt",
    [
        "timeout_seconds = 1e30",
        "timeout_seconds = 'NaN'",
        "backoff_seconds = -1",
        "run_at = 'infinity'",
        "sort_key = '-infinity'",
        "state = 'running'",
        "state = 'succeeded'",
        "start_by = 'infinity'",
        "finish_by = '-infinity'",
        "total_timeout_seconds = 'NaN'",
        "lease_seconds = -1",
        "cancel_requested_at = now()",
    ],
)
async def test_a_row_that_would_stop_a_statement_cannot_be_stored(jobs: Jobs, spoilt: str) -> None:
    (job,) = await jobs.enqueue()
    with pytest.raises(Unstorable):
        await jobs.fetch(f"update clarion.jobs set {spoilt} where id = $1", job.id)


@pytest.mark.parametrize("column", ["attempt", "errors", "crashes"])
async def test_a_counter_at_its_end_stops_nothing(jobs: Jobs, column: str) -> None:
    (job,) = await jobs.enqueue(backoff_seconds=1)
    await jobs.fetch(f"update clarion.jobs set max_attempts = 32767, {column} = 32767 where id = $1", job.id)
    (lease,) = await jobs.claim()
    await jobs.expire(lease.id)
    (reaped,) = await jobs.store.reap_jobs()
    assert reaped.id == job.id
