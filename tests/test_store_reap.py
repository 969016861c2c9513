"""Taking jobs back from workers that stopped extending their leases, and what that costs the job."""

from uuid import uuid4

import msgspec
import pytest

from clarion.db import Database
from clarion.execution import Lease
from clarion.settings import Settings
from clarion.store import Store
from store_actions import Jobs, attempt_all


@pytest.fixture
def jobs(database: Database, settings: Settings) -> Jobs:
    return Jobs(database, settings)


async def crash(jobs: Jobs, lease: Lease, *, crashes: int = 0) -> str:
    """Lets the lease run out after so many crashes before; the state that the reaper puts the job in."""
    await jobs.fetch("update clarion.jobs set crashes = $2::int where id = $1", lease.id, crashes)
    await jobs.expire(lease.id)
    (reaped,) = await jobs.store.reap_jobs()
    assert (reaped.id, reaped.timed_out) == (lease.id, False)
    return reaped.state


async def time_out(jobs: Jobs, lease: Lease) -> str:
    """Lets a worker that beats but does not end its handler reach the attempt's deadline."""
    assert lease.timeout_seconds
    await jobs.age(lease.id, lease.timeout_seconds)
    assert await jobs.attempt("heartbeat", lease)
    await jobs.age(lease.id, 6)
    (reaped,) = await jobs.reaper.reap_jobs()
    assert (reaped.id, reaped.timed_out) == (lease.id, True)
    return reaped.state


async def test_a_lease_that_has_not_run_out_is_left_alone(jobs: Jobs) -> None:
    lease = await jobs.run()
    before = await jobs.everything()
    assert await jobs.store.reap_jobs() == []
    assert await jobs.everything() == before
    assert await jobs.attempt("heartbeat", lease)


async def test_only_running_jobs_are_reaped(jobs: Jobs) -> None:
    for ending in ("complete", "fail", "snooze", "release"):
        lease = await jobs.run(queue=ending)
        await jobs.attempt(ending, lease)
        await jobs.age(lease.id, 1000)
    assert await jobs.reaper.reap_jobs() == []


async def test_the_first_crash_makes_the_job_ready_at_once_in_its_old_place(jobs: Jobs) -> None:
    lease = await jobs.run(priority=2)
    later = (await jobs.enqueue(priority=2))[0].id
    before = await jobs.row(lease.id)
    assert await crash(jobs, lease) == "ready"
    row = await jobs.row(lease.id)
    assert (row["run_at"], row["sort_key"]) == (before["run_at"], before["sort_key"])
    assert (row["crashes"], row["errors"], row["attempt"]) == (1, 0, 1)
    assert [row[name] for name in ("lease_token", "lease_expires_at", "worker_id")] == [None] * 3
    assert [again.id for again in await jobs.claim(2)] == [lease.id, later]


@pytest.mark.parametrize(("crashes", "seconds"), [(1, 1), (2, 2), (3, 4)])
async def test_further_crashes_back_off_from_one_second(jobs: Jobs, crashes: int, seconds: float) -> None:
    lease = await jobs.run(priority=2, backoff_seconds=1000.0)
    assert await crash(jobs, lease, crashes=crashes) == "scheduled"
    row = await jobs.row(lease.id)
    (attempt,) = await jobs.attempts(lease.id)
    wait = (row["run_at"] - attempt["ended_at"]).total_seconds()
    assert seconds * 0.8 <= wait <= seconds * 1.2 + 0.5
    assert (row["run_at"] - row["sort_key"]).total_seconds() == pytest.approx(120)
    assert attempt["next_run_at"] == row["run_at"]


async def test_at_its_budget_of_crashes_a_job_is_dead(jobs: Jobs) -> None:
    budget = jobs.settings.max_crashes
    lease = await jobs.run()
    assert await crash(jobs, lease, crashes=budget - 1) == "dead"
    row = await jobs.row(lease.id)
    assert (row["dead_reason"], row["crashes"], row["died_at"] is None) == ("crash_loop", budget, False)
    (attempt,) = await jobs.attempts(lease.id)
    assert (attempt["state"], attempt["next_run_at"]) == ("dead", None)


async def test_a_crash_costs_an_attempt_too(jobs: Jobs) -> None:
    lease = await jobs.run(max_attempts=1)
    assert await crash(jobs, lease) == "dead"
    assert (await jobs.row(lease.id))["dead_reason"] == "attempts_exhausted"


async def test_a_job_that_kills_every_worker_is_dead_after_its_budget(jobs: Jobs) -> None:
    lease = await jobs.run()
    states = [await crash(jobs, lease)]
    for crashes in range(1, jobs.settings.max_crashes):
        await jobs.make_due(lease.id)
        (lease,) = await jobs.claim(worker_id=uuid4())
        states.append(await crash(jobs, lease, crashes=crashes))
    assert states == ["ready", *["scheduled"] * (jobs.settings.max_crashes - 2), "dead"]
    assert [row["outcome"] for row in await jobs.attempts(lease.id)] == ["lease_lost"] * jobs.settings.max_crashes


async def test_a_lost_lease_is_recorded_with_its_worker(jobs: Jobs) -> None:
    lease = await jobs.run()
    await crash(jobs, lease)
    (row,) = await jobs.attempts(lease.id)
    assert (row["outcome"], row["state"], row["attempt"], row["worker_id"], row["lease_token"]) == (
        "lease_lost", "ready", 1, jobs.worker_id, lease.token,
    )  # fmt: skip
    assert (row["error_type"], row["started_at"]) == ("LeaseLost", lease.started_at)
    job = await jobs.store.get_job(lease.id)
    assert job is not None
    assert job.error_type == "LeaseLost"


async def test_the_reaper_says_whose_job_it_took(jobs: Jobs) -> None:
    lease = await jobs.run(queue="mail")
    await jobs.expire(lease.id)
    (reaped,) = await jobs.store.reap_jobs()
    said = (lease.id, "mail", lease.task, "ready", 1, jobs.worker_id, False, lease.sort_key)
    assert msgspec.structs.astuple(reaped) == said


# -- Timeouts


async def test_an_attempt_past_its_timeout_is_an_error_and_no_crash(jobs: Jobs) -> None:
    lease = await jobs.run(timeout_seconds=50, backoff_seconds=100.0)
    assert await time_out(jobs, lease) == "scheduled"
    row = await jobs.row(lease.id)
    assert (row["errors"], row["crashes"]) == (1, 0)
    (attempt,) = await jobs.attempts(lease.id)
    assert (attempt["outcome"], attempt["error_type"]) == ("timeout", "AttemptTimeout")
    assert 80 <= (row["run_at"] - attempt["ended_at"]).total_seconds() <= 120.5


async def test_timeouts_use_attempts_up(jobs: Jobs) -> None:
    lease = await jobs.run(timeout_seconds=50, max_attempts=1)
    assert await time_out(jobs, lease) == "dead"
    assert (await jobs.row(lease.id))["dead_reason"] == "attempts_exhausted"


async def test_a_timeout_past_the_budget_of_crashes_is_no_crash_loop(jobs: Jobs) -> None:
    lease = await jobs.run(timeout_seconds=50)
    await jobs.fetch("update clarion.jobs set crashes = 100 where id = $1", lease.id)
    assert await time_out(jobs, lease) == "scheduled"


async def test_a_killed_worker_is_a_crash_even_if_the_reaper_comes_after_the_timeout(jobs: Jobs) -> None:
    lease = await jobs.run(timeout_seconds=60)
    await jobs.age(lease.id, 1000)  # it never beat, and nobody reaped
    (reaped,) = await jobs.reaper.reap_jobs()
    assert (reaped.state, reaped.timed_out) == ("ready", False)
    row = await jobs.row(lease.id)
    assert (row["errors"], row["crashes"]) == (0, 1)


async def test_a_worker_killed_early_is_a_crash_when_timeout_and_lease_are_alike(jobs: Jobs) -> None:
    lease = await jobs.run(timeout_seconds=30)
    await jobs.age(lease.id, 31)
    (reaped,) = await jobs.reaper.reap_jobs()
    assert not reaped.timed_out


# -- Grace, limits, locks


async def test_after_a_start_of_postgres_older_leases_get_time_to_be_renewed(jobs: Jobs) -> None:
    lease = await jobs.run()
    patient = Store(jobs.database, msgspec.structs.replace(jobs.settings, lease_seconds=1e9))
    await jobs.age(lease.id, 1e8)  # claimed before the start of this server
    assert await patient.reap_jobs() == []
    assert await jobs.attempt("heartbeat", lease)
    await jobs.expire(lease.id)
    assert [reaped.id for reaped in await jobs.reaper.reap_jobs()] == [lease.id]


async def test_leases_from_after_the_start_of_postgres_get_no_grace(jobs: Jobs) -> None:
    lease = await jobs.run()
    patient = Store(jobs.database, msgspec.structs.replace(jobs.settings, lease_seconds=1e9))
    await jobs.expire(lease.id)
    assert [reaped.id for reaped in await patient.reap_jobs()] == [lease.id]


async def test_the_reaper_keeps_to_its_limit(jobs: Jobs) -> None:
    await jobs.enqueue(10)
    for lease in await jobs.claim(10):
        await jobs.expire(lease.id)
    limited = jobs.limited_to(4)
    assert [len(await limited.reap_jobs()) for _ in range(4)] == [4, 4, 2, 0]


async def test_the_reaper_skips_what_another_session_has_locked(jobs: Jobs) -> None:
    locked, free = await jobs.run(), await jobs.run()
    for lease in (locked, free):
        await jobs.expire(lease.id)
    async with jobs.session() as other:
        await other.fetch("select from clarion.jobs where id = $1 for update", locked.id)
        assert [reaped.id for reaped in await jobs.store.reap_jobs()] == [free.id]
        await other.rollback()
    assert [reaped.id for reaped in await jobs.store.reap_jobs()] == [locked.id]


async def test_two_reapers_take_each_job_once(jobs: Jobs) -> None:
    await jobs.enqueue(10)
    leases = await jobs.claim(10)
    for lease in leases:
        await jobs.expire(lease.id)
    async with jobs.session() as other:
        first = await jobs.limited_to(4, other).reap_jobs()
        second = await jobs.store.reap_jobs()
        await other.commit()
    assert sorted(reaped.id for reaped in [*first, *second]) == sorted(lease.id for lease in leases)
    assert {row["crashes"] for row in await jobs.fetch("select crashes from clarion.jobs")} == {1}


@pytest.mark.parametrize("ending", ["complete", "fail", "snooze", "release"])
async def test_the_reaper_leaves_a_job_alone_whose_end_is_being_committed(jobs: Jobs, ending: str) -> None:
    lease = await jobs.run()
    await jobs.expire(lease.id)
    async with jobs.session() as ending_session:
        assert all(await attempt_all(ending_session.store, ending, [lease]))
        assert await jobs.store.reap_jobs() == []
        await ending_session.commit()
    assert await jobs.store.reap_jobs() == []
    assert await jobs.attempt(ending, lease)
