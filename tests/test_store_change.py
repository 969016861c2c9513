"""Changing a job that waits: only what is named, only the version that is meant, and never one that runs or is dead."""

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import anyio
import pytest

from clarion.db import Database
from clarion.errors import Unstorable
from clarion.job import JobChange, Requeued
from clarion.settings import Settings
from store_actions import ACTOR, EVERY_OPTION, Jobs, where

SOON = datetime.now(UTC).replace(microsecond=0) + timedelta(days=1)
# Another value for each column that may be changed, but for those that move the job in time.
OTHER_VALUES: dict[str, Any] = {
    "queue": "other",
    "priority": -3,
    "max_attempts": 9,
    "timeout_seconds": 1.5,
    "backoff_seconds": 2.5,
    "backoff_cap_seconds": 3.5,
    "total_timeout_seconds": 4.5,
    "start_by": SOON,
    "args": '{"n": 2.50}',
}
NULLABLE = (
    "max_attempts", "timeout_seconds", "backoff_seconds", "backoff_cap_seconds", "total_timeout_seconds", "start_by"
)  # fmt: skip
# What follows from another column.
FOLLOWS = {"queue": {"sort_key"}, "priority": {"sort_key"}, "total_timeout_seconds": {"finish_by"}}


@pytest.fixture
def jobs(database: Database, settings: Settings) -> Jobs:
    return Jobs(database, settings)


async def changed_columns(jobs: Jobs, job_id: UUID, **values: Any) -> dict[str, Any]:
    """What a change of these values makes different in the row."""
    before = await jobs.row(job_id)
    assert await jobs.change(job_id, **values) is not None
    after = await jobs.row(job_id)
    return {column: after[column] for column in after.keys() if after[column] != before[column]}  # noqa: SIM118


async def moved_seconds(jobs: Jobs, job_id: UUID) -> tuple[float, float]:
    """The head start of the job's place in line, and how far from now it is due."""
    (row,) = await jobs.fetch(
        """
        select extract(epoch from run_at - sort_key)::float8 as head_start,
          extract(epoch from run_at - clock_timestamp())::float8 as due
        from clarion.jobs where id = $1
        """,
        job_id,
    )
    return row["head_start"], row["due"]


# -- Columns


@pytest.mark.parametrize("delay_seconds", [None, 3600.0])
@pytest.mark.parametrize("name", OTHER_VALUES)
async def test_each_column_can_be_changed_alone(jobs: Jobs, name: str, delay_seconds: float | None) -> None:
    (added,) = await jobs.enqueue(**EVERY_OPTION, delay_seconds=delay_seconds)
    changed = await changed_columns(jobs, added.id, **{name: OTHER_VALUES[name]})
    assert changed[name] == OTHER_VALUES[name]
    assert changed.keys() - {name} <= FOLLOWS.get(name, set())


async def test_all_columns_can_be_changed_at_once(jobs: Jobs) -> None:
    (added,) = await jobs.enqueue(**EVERY_OPTION)
    changed = await changed_columns(jobs, added.id, **OTHER_VALUES, run_at=SOON)
    assert {name: changed[name] for name in OTHER_VALUES} == OTHER_VALUES
    assert (changed["state"], changed["run_at"]) == ("scheduled", SOON)
    assert changed["finish_by"] - SOON == timedelta(seconds=4.5)
    assert changed["sort_key"] - SOON == timedelta(minutes=3)


@pytest.mark.parametrize("name", NULLABLE)
async def test_a_choice_can_be_left_open_again(jobs: Jobs, name: str) -> None:
    (added,) = await jobs.enqueue(**EVERY_OPTION)
    changed = await changed_columns(jobs, added.id, **{name: None})
    assert changed == {name: None} | ({"finish_by": None} if name == "total_timeout_seconds" else {})


@pytest.mark.parametrize("name", ["queue", "priority", "args"])
async def test_what_a_job_cannot_do_without_is_not_taken_away(jobs: Jobs, name: str) -> None:
    (added,) = await jobs.enqueue()
    before = await jobs.everything()
    with pytest.raises(Unstorable):
        await jobs.change(added.id, **{name: None})
    assert await jobs.everything() == before


@pytest.mark.parametrize("values", [{"args": "no JSON"}, {"queue": "a\x00b"}, {"delay_seconds": float("inf")}])
async def test_a_value_that_postgres_refuses_changes_nothing(jobs: Jobs, values: dict[str, Any]) -> None:
    (added,) = await jobs.enqueue()
    before = await jobs.everything()
    with pytest.raises(Unstorable):
        await jobs.change(added.id, priority=9, **values)
    assert await jobs.everything() == before


async def test_values_that_are_not_named_are_not_taken(jobs: Jobs) -> None:
    (added,) = await jobs.enqueue(**EVERY_OPTION)
    change = JobChange(names=frozenset({"max_attempts"}), **OTHER_VALUES)
    before = await jobs.row(added.id)
    await jobs.store.change_job(added.id, change, version=None, actor=ACTOR)
    assert {**await jobs.row(added.id)} == {**before} | {"max_attempts": 9}


async def test_the_history_says_who_changed_what(jobs: Jobs) -> None:
    (added,) = await jobs.enqueue()
    change = JobChange(names=frozenset({"queue", "priority"}), queue="mail", priority=3)
    await jobs.store.change_job(added.id, change, version=None, actor="api:ada")
    (event,) = await jobs.store.list_events(added.id)
    assert (event.event, event.actor, event.state, event.detail) == ("changed", "api:ada", "ready", "priority, queue")


# -- Place in line, and time


@pytest.mark.parametrize("priority", [5, 0, -5])
async def test_the_place_in_line_follows_priority_and_queue(jobs: Jobs, priority: int) -> None:
    await jobs.fetch("insert into clarion.queues (name, priority_credit_seconds) values ('slow', 3600)")
    (added,) = await jobs.enqueue(priority=1)
    await jobs.change(added.id, priority=priority)
    assert (await moved_seconds(jobs, added.id))[0] == priority * 60
    await jobs.change(added.id, queue="slow")
    assert (await moved_seconds(jobs, added.id))[0] == priority * 3600
    await jobs.change(added.id, queue="default", priority=1)
    assert (await moved_seconds(jobs, added.id))[0] == 60


async def test_a_change_of_something_else_loses_no_place_in_line(jobs: Jobs) -> None:
    first, second = [(await jobs.enqueue())[0].id for _ in range(2)]
    await jobs.age(first, 100)
    assert where(await jobs.change(first, max_attempts=3, args="[]")) == ("ready", "default")
    assert [lease.id for lease in await jobs.claim(2)] == [first, second]


async def test_a_ready_job_can_be_put_off(jobs: Jobs) -> None:
    (added,) = await jobs.enqueue(priority=2)
    assert where(await jobs.change(added.id, delay_seconds=600.0)) == ("scheduled", "default")
    head_start, due = await moved_seconds(jobs, added.id)
    assert head_start == 120
    assert due == pytest.approx(600, abs=5)
    assert await jobs.claim() == []
    await jobs.make_due(added.id)
    assert len(await jobs.claim()) == 1


@pytest.mark.parametrize(
    "values", [{"delay_seconds": 0.0}, {"run_at": datetime(2020, 1, 1, tzinfo=UTC)}, {"run_at": None}]
)
async def test_a_scheduled_job_can_be_called_at_once_and_jumps_no_line(jobs: Jobs, values: dict[str, Any]) -> None:
    (first,) = await jobs.enqueue()
    (added,) = await jobs.enqueue(delay_seconds=600.0)
    assert where(await jobs.change(added.id, **values)) == ("ready", "default")
    assert [lease.id for lease in await jobs.claim(2)] == [first.id, added.id]


async def test_a_scheduled_job_can_be_moved(jobs: Jobs) -> None:
    (added,) = await jobs.enqueue(delay_seconds=600.0)
    assert where(await jobs.change(added.id, run_at=SOON, queue="mail")) == ("scheduled", "mail")
    assert (await jobs.row(added.id))["run_at"] == SOON


async def test_the_total_timeout_counts_from_when_the_job_is_due(jobs: Jobs) -> None:
    (added,) = await jobs.enqueue(delay_seconds=600.0)
    await jobs.change(added.id, total_timeout_seconds=60.0)
    row = await jobs.row(added.id)
    assert row["finish_by"] - row["run_at"] == timedelta(seconds=60)


# -- Which jobs, and which version


async def test_the_version_that_is_meant_is_changed_once(jobs: Jobs) -> None:
    (added,) = await jobs.enqueue()
    version = (await jobs.job(added.id)).version
    assert await jobs.change(added.id, version=version, priority=1) is not None
    before = await jobs.everything()
    assert await jobs.change(added.id, version=version, priority=2) is None
    assert await jobs.change(added.id, version="", priority=2) is None
    assert await jobs.everything() == before
    assert await jobs.change(added.id, version=(await jobs.job(added.id)).version, priority=2) is not None


async def test_any_write_makes_another_version(jobs: Jobs) -> None:
    lease = await jobs.run()
    seen = {(await jobs.job(lease.id)).version}
    for verb in ("heartbeat", "progress", "log", "release"):
        await jobs.attempt(verb, lease)
        seen.add((await jobs.job(lease.id)).version)
    (again,) = await jobs.claim()
    seen.add((await jobs.job(lease.id)).version)
    await jobs.attempt("complete", again)
    seen.add((await jobs.job(lease.id)).version)
    assert len(seen) == 7


async def test_looking_at_a_job_leaves_its_version(jobs: Jobs) -> None:
    (added,) = await jobs.enqueue()
    async with jobs.session() as other:
        await other.fetch("select from clarion.jobs where id = $1 for update", added.id)
        await other.commit()
    assert (await jobs.job(added.id)).version == (await jobs.job(added.id)).version


@pytest.mark.parametrize("state", ["running", "dead", "succeeded", "cancelled"])
async def test_a_job_that_does_not_wait_is_not_changed(jobs: Jobs, state: str) -> None:
    lease = await jobs.run(max_attempts=1)
    if state in {"dead", "succeeded"}:
        await jobs.attempt("fail" if state == "dead" else "complete", lease)
    if state == "cancelled":
        await jobs.cancel(lease.id)
        await jobs.attempt("release", lease)
    assert await jobs.state(lease.id) == state
    before = await jobs.everything()
    assert await jobs.change(lease.id, priority=5) is None
    assert await jobs.change(lease.id, version=(await jobs.job(lease.id)).version, priority=5) is None
    assert await jobs.everything() == before


async def test_an_unknown_job_is_not_changed(jobs: Jobs) -> None:
    await jobs.enqueue()
    assert await jobs.change(uuid4(), priority=5) is None


@pytest.mark.parametrize("with_version", [False, True])
async def test_a_job_that_was_claimed_meanwhile_is_not_changed(jobs: Jobs, with_version: bool) -> None:
    (added,) = await jobs.enqueue()
    version = (await jobs.job(added.id)).version if with_version else None
    answers: list[Requeued | None] = []

    async def change() -> None:
        answers.append(await jobs.change(added.id, version=version, priority=5))

    async with jobs.session() as claiming, anyio.create_task_group() as group:
        await claiming.fetch("update clarion.jobs set state = 'dead', dead_reason = 'expired' where id = $1", added.id)
        group.start_soon(change)
        await claiming.until_it_blocks_another()
        await claiming.commit()
    assert answers == [None]


async def test_of_two_who_mean_the_same_version_the_first_wins(jobs: Jobs) -> None:
    (added,) = await jobs.enqueue()
    version = (await jobs.job(added.id)).version
    answers: list[Requeued | None] = []

    async def change() -> None:
        answers.append(await jobs.change(added.id, version=version, priority=5))

    async with jobs.session() as first, anyio.create_task_group() as group:
        change_to_four = JobChange(names=frozenset({"priority"}), priority=4)
        assert await first.store.change_job(added.id, change_to_four, version=version, actor=ACTOR)
        group.start_soon(change)
        await first.until_it_blocks_another()
        await first.commit()
    assert answers == [None]
    assert (await jobs.row(added.id))["priority"] == 4
