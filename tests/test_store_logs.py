"""Log lines of handlers: stored once, in order, up to a limit per job, and only while the lease is held."""

from uuid import uuid4

import anyio
import msgspec
import pytest

from clarion.db import Database
from clarion.errors import Unstorable
from clarion.execution import Lease, LogLine
from clarion.settings import Settings
from clarion.store import Store
from store_actions import ENDINGS, Jobs, line, with_token


@pytest.fixture
def jobs(database: Database, settings: Settings) -> Jobs:
    return Jobs(database, settings)


def keeping(jobs: Jobs, most: int) -> Store:
    """A store that keeps so many lines of a job."""
    return Store(jobs.database, msgspec.structs.replace(jobs.settings, job_log_max_lines=most))


def lines(lease: Lease, *numbers: int) -> list[LogLine]:
    return [line(lease, n) for n in numbers]


async def told(jobs: Jobs, lease: Lease) -> list[int]:
    """The numbers of the lines that are stored, in their order."""
    return [stored.n for stored in await jobs.store.list_logs(lease.id, after=None, limit=100)]


async def age_logs(jobs: Jobs, days: int) -> None:
    await jobs.fetch("update clarion.job_logs set at = at - make_interval(days => $1::int)", days)


# -- What is kept


async def test_a_line_is_kept_as_it_was_said(jobs: Jobs) -> None:
    lease = await jobs.run()
    said = line(lease, 7, level="warning", message="é\n\t", fields='{"b": 1.10, "a": [null]}')
    assert await jobs.store.record_logs([said, line(lease, 8)]) == [True, True]
    stored, plain = await jobs.store.list_logs(lease.id, after=None, limit=9)
    assert (stored.n, stored.level, stored.message, stored.fields) == (
        7,
        "warning",
        "é\n\t",
        '{"b": 1.10, "a": [null]}',
    )
    assert (stored.generation, stored.attempt, plain.fields) == (1, 1, None)
    assert stored.at >= lease.started_at


async def test_lines_are_listed_in_the_order_in_which_they_came(jobs: Jobs) -> None:
    lease = await jobs.run()
    for numbers in ((3, 1, 2), (9,), (5, 4)):
        await jobs.store.record_logs(lines(lease, *numbers))
    assert await told(jobs, lease) == [3, 1, 2, 9, 5, 4]


@pytest.mark.parametrize("limit", [1, 2, 5, 7])
async def test_pages_join_to_the_whole_list(jobs: Jobs, limit: int) -> None:
    lease, other = await jobs.run(), await jobs.run()
    for n in range(1, 6):
        await jobs.store.record_logs([line(lease, n), line(other, n)])
    pages: list[int] = []
    after = None
    while page := await jobs.store.list_logs(lease.id, after=after, limit=limit):
        assert len(page) <= limit
        pages += [stored.n for stored in page]
        after = page[-1].id
    assert pages == [1, 2, 3, 4, 5]


async def test_each_attempt_numbers_its_lines_from_one(jobs: Jobs) -> None:
    lease = await jobs.run()
    await jobs.store.record_logs(lines(lease, 1, 2))
    await jobs.attempt("fail", lease)
    await jobs.make_due(lease.id)
    (again,) = await jobs.claim()
    assert await jobs.store.record_logs(lines(again, 1, 2)) == [True, True]
    stored = await jobs.store.list_logs(lease.id, after=None, limit=9)
    assert [(item.attempt, item.n) for item in stored] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert (await jobs.job(lease.id)).log_lines == 4


async def test_lines_of_many_jobs_are_answered_in_order(jobs: Jobs) -> None:
    leases = [await jobs.run() for _ in range(4)]
    await jobs.lose(leases[1])
    stranger = with_token(leases[2], uuid4())
    said = [line(item, n) for n in (1, 2) for item in [*leases, stranger]]
    assert await jobs.store.record_logs(said) == [True, None, True, True, None] * 2
    assert [await told(jobs, lease) for lease in leases] == [[1, 2], [], [1, 2], [1, 2]]
    assert await jobs.store.record_logs([]) == []


async def test_a_line_that_postgres_refuses_undoes_the_set(jobs: Jobs) -> None:
    lease, other = await jobs.run(), await jobs.run()
    before = await jobs.everything()
    for bad in (line(other, message="a\x00b"), line(other, fields="no JSON")):
        with pytest.raises(Unstorable):
            await jobs.store.record_logs([line(lease), bad])
    assert await jobs.everything() == before


# -- The limit


async def test_a_job_keeps_so_many_lines_and_the_others_are_counted(jobs: Jobs) -> None:
    lease, other = await jobs.run(), await jobs.run()
    store = keeping(jobs, 5)
    assert await store.record_logs(lines(lease, 1, 2, 3)) == [True] * 3
    assert await store.record_logs([*lines(lease, 4, 5, 6, 7), line(other, 1)]) == [True, True, False, False, True]
    assert await store.record_logs(lines(lease, 8)) == [False]
    assert await told(jobs, lease) == [1, 2, 3, 4, 5]
    assert (await jobs.job(lease.id)).log_lines == 8


async def test_the_limit_counts_the_lines_of_all_attempts(jobs: Jobs) -> None:
    lease = await jobs.run()
    store = keeping(jobs, 3)
    await store.record_logs(lines(lease, 1, 2))
    await jobs.attempt("release", lease)
    (again,) = await jobs.claim()
    assert await store.record_logs(lines(again, 1, 2)) == [True, False]


async def test_no_line_need_be_kept(jobs: Jobs) -> None:
    lease = await jobs.run()
    assert await keeping(jobs, 0).record_logs(lines(lease, 1, 2)) == [False, False]
    assert await told(jobs, lease) == []


# -- The same call again


@pytest.mark.parametrize("ending", [None, *ENDINGS])
async def test_a_repeated_call_adds_nothing_and_is_answered_alike(jobs: Jobs, ending: str | None) -> None:
    lease = await jobs.run()
    await jobs.store.record_logs(lines(lease, 1, 2, 3))
    if ending:
        await jobs.attempt(ending, lease)
    before = await jobs.everything()
    assert await jobs.store.record_logs(lines(lease, 1, 2, 3)) == [True, True, True]
    assert await jobs.everything() == before


async def test_a_repeated_call_may_hold_new_lines(jobs: Jobs) -> None:
    lease = await jobs.run()
    await jobs.store.record_logs(lines(lease, 1, 2))
    assert await jobs.store.record_logs(lines(lease, 2, 3, 1, 4)) == [True] * 4
    assert await told(jobs, lease) == [1, 2, 3, 4]
    assert (await jobs.job(lease.id)).log_lines == 4


async def test_a_repeated_call_does_not_use_the_limit_up(jobs: Jobs) -> None:
    lease = await jobs.run()
    store = keeping(jobs, 3)
    for _ in range(3):
        assert await store.record_logs(lines(lease, 1, 2)) == [True, True]
    assert await store.record_logs(lines(lease, 3, 4)) == [True, False]
    assert await store.record_logs(lines(lease, 3, 4)) == [True, False]


async def test_of_one_number_twice_in_a_set_the_first_is_kept(jobs: Jobs) -> None:
    lease = await jobs.run()
    said = [line(lease, 1, message=message) for message in ("first", "second")]
    assert await jobs.store.record_logs(said) == [True, True]
    (stored,) = await jobs.store.list_logs(lease.id, after=None, limit=9)
    assert (stored.message, (await jobs.job(lease.id)).log_lines) == ("first", 1)


@pytest.mark.parametrize("commit", [True, False])
async def test_a_call_repeated_while_the_first_is_being_committed_adds_nothing(jobs: Jobs, commit: bool) -> None:
    lease = await jobs.run()
    answers: list[bool | None] = []

    async def repeat() -> None:
        answers.extend(await keeping(jobs, 3).record_logs(lines(lease, 1, 2, 3)))

    async with jobs.session() as first, anyio.create_task_group() as group:
        await first.store.record_logs(lines(lease, 1, 2))
        group.start_soon(repeat)
        await first.until_it_blocks_another()
        await (first.commit() if commit else first.rollback())
    assert answers == [True, True, True]
    assert await told(jobs, lease) == [1, 2, 3]
    assert (await jobs.job(lease.id)).log_lines == 3


async def test_a_call_repeated_while_the_attempt_is_being_ended_is_answered_alike(jobs: Jobs) -> None:
    lease = await jobs.run()
    answers: list[bool | None] = []

    async def repeat() -> None:
        answers.extend(await jobs.store.record_logs(lines(lease, 1, 2)))

    async with jobs.session() as first, anyio.create_task_group() as group:
        await first.store.record_logs(lines(lease, 1))
        await jobs.attempt("complete", lease, store=first.store)
        group.start_soon(repeat)
        await first.until_it_blocks_another()
        await first.commit()
    assert answers == [True, None]


async def test_sets_that_share_jobs_take_them_in_one_order(jobs: Jobs) -> None:
    await jobs.enqueue(5)
    leases = sorted(await jobs.claim(5), key=lambda lease: lease.id)

    async def log() -> None:
        await jobs.store.record_logs([line(lease) for lease in reversed(leases)])

    async with jobs.session() as session, anyio.create_task_group() as group:
        await session.fetch("select from clarion.jobs where id = $1 for update", leases[0].id)
        group.start_soon(log)
        await session.until_it_blocks_another()
        free = await session.fetch("select from clarion.jobs where id <> $1 for update skip locked", leases[0].id)
        assert len(free) == 4
        await session.rollback()
    assert [await told(jobs, lease) for lease in leases] == [[1]] * 5


# -- How long they are kept


async def test_lines_of_finished_jobs_go_with_retention_and_no_sooner(jobs: Jobs) -> None:
    lease = await jobs.run()
    await jobs.store.record_logs(lines(lease, 1, 2))
    await jobs.attempt("complete", lease)
    await age_logs(jobs, jobs.settings.history_days - 1)
    assert await jobs.store.prune_logs() == 0
    await age_logs(jobs, 2)
    assert await jobs.limited_to(1).prune_logs() == 1
    assert await told(jobs, lease) == [2]
    assert [await jobs.store.prune_logs() for _ in range(2)] == [1, 0]


@pytest.mark.parametrize("fate", ["running", "dead", "ready"])
async def test_lines_of_live_and_dead_jobs_stay(jobs: Jobs, fate: str) -> None:
    lease = await jobs.run(max_attempts=1)
    await jobs.store.record_logs(lines(lease, 1))
    if fate != "running":
        await jobs.attempt("fail" if fate == "dead" else "release", lease)
    assert await jobs.state(lease.id) == fate
    await age_logs(jobs, 10_000)
    assert await jobs.store.prune_logs() == 0
    assert await told(jobs, lease) == [1]
