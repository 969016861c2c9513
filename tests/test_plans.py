"""The plans of the statements that run all the time, whatever Postgres believes of the tables.

A pooled connection keeps one plan per statement. It may have been made when the queue was empty, or from statistics
that were taken then, or from none at all; it must read the same few rows when the table holds 41,000 jobs.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest

from clarion.db import connect_options
from clarion.settings import Settings
from clarion.statements import statement
from conftest import settings_for

BACKLOG = 20_000
BATCH = 500
CLAIM = 20
PROMOTABLE = 100
DEAD = BATCH
LATE = 50

NO_AUTOVACUUM = """
    alter table clarion.jobs set (autovacuum_enabled = off);
    alter table clarion.attempts set (autovacuum_enabled = off);
    alter table clarion.job_history_default set (autovacuum_enabled = off);
    alter table clarion.job_events set (autovacuum_enabled = off);
    alter table clarion.job_logs set (autovacuum_enabled = off);
    alter table clarion.idempotency_keys set (autovacuum_enabled = off);
    select clarion.drop_history_partitions('2100-01-01');
"""
ANALYZE = """
    analyze clarion.jobs, clarion.job_history, clarion.attempts, clarion.job_events, clarion.job_logs,
      clarion.idempotency_keys
"""
EMPTY = """
    delete from clarion.jobs; delete from clarion.job_history; delete from clarion.attempts;
    delete from clarion.job_events; delete from clarion.job_logs; delete from clarion.idempotency_keys
"""
FILL = f"""
    insert into clarion.jobs (queue, task, state, start_by)
    select 'late', 't', 'ready', now() + n * interval '1 min' from generate_series(-{LATE} + 1, {LATE}) as n;
    insert into clarion.jobs (queue, task, state, run_at, sort_key)
    select 'default', 't', 'ready', now() - interval '1 h', now() + n * interval '1 ms'
    from generate_series(1, {BACKLOG}) as n;
    insert into clarion.jobs (queue, task, state, run_at)
    select 'default', 't', 'scheduled', now() + interval '1 h' from generate_series(1, {BACKLOG});
    insert into clarion.jobs (queue, task, state, run_at)
    select 'default', 't', 'scheduled', now() - interval '1 h' from generate_series(1, {PROMOTABLE});
    insert into clarion.jobs (queue, task, state, attempt, started_at, lease_token, lease_expires_at, worker_id)
    select 'default', 't', 'running', 1, now(), gen_random_uuid(), now() - interval '1 s', gen_random_uuid()
    from generate_series(1, {BATCH});
    insert into clarion.jobs (queue, task, state, dead_reason, died_at)
    select 'default', 't', 'dead', 'crash_loop', now() - n * interval '1 min' from generate_series(1, {DEAD}) as n;
    insert into clarion.job_history
      (id, lease_token, created_at, run_at, state, priority, attempt, errors, crashes, snoozes, queue, task, args)
    select clarion.new_id(), gen_random_uuid(), now(), now(), 'succeeded', 0, 1, 0, 0, 0, 'default', 't', '{{}}'
    from generate_series(1, 5000);
    insert into clarion.attempts (job_id, lease_token, attempt, outcome, state, started_at)
    select clarion.new_id(), gen_random_uuid(), 1, 'failed', 'scheduled', now() from generate_series(1, 5000);
    insert into clarion.job_events (job_id, event, actor, state, generation)
    select clarion.new_id(), 'retried', 'api', 'ready', 2 from generate_series(1, 5000);
    insert into clarion.job_logs (job_id, lease_token, n, generation, attempt, level, message)
    select clarion.new_id(), gen_random_uuid(), 1, 1, 1, 'info', 'hello' from generate_series(1, 5000);
    insert into clarion.idempotency_keys (key, job_id, state, created_at, run_at, request, expires_at)
    select 'old ' || n, clarion.new_id(), 'ready', now(), now(), '{{}}', now() + interval '1 day'
    from generate_series(1, 5000) as n;
"""
MORE = f"insert into clarion.jobs (queue, task) select 'default', 't' from generate_series(1, {4 * BACKLOG})"

# The indexes of `jobs` that each hot statement walks, and the most rows that one scan of it may look at.
HOT: dict[str, tuple[set[str], int]] = {
    "enqueue_jobs": (set(), 0),
    "claim_jobs": ({"jobs_ready"}, CLAIM),
    "complete_jobs": ({"jobs_pkey"}, BATCH),
    "heartbeat_jobs": ({"jobs_pkey"}, BATCH),
    "extend_leases": ({"jobs_pkey"}, BATCH),
    "record_logs": ({"jobs_pkey"}, BATCH),
    "fail_jobs": ({"jobs_pkey"}, BATCH),
    "snooze_jobs": ({"jobs_pkey"}, BATCH),
    "release_jobs": ({"jobs_pkey"}, BATCH),
    "reap_jobs": ({"jobs_running", "jobs_pkey"}, BATCH),
    "promote_jobs": ({"jobs_scheduled"}, PROMOTABLE),
    "next_due_seconds": ({"jobs_scheduled"}, 1),
    "expire_jobs": ({"jobs_deadline", "jobs_pkey"}, LATE),
    "cancel_jobs": ({"jobs_pkey"}, BATCH),
    "retry_jobs": ({"jobs_pkey"}, BATCH),
    "find_finished": ({"jobs_pkey"}, BATCH),
    "find_states": ({"jobs_pkey"}, BATCH),
    "find_dead": ({"jobs_dead_since"}, CLAIM),
    "get_job": ({"jobs_pkey"}, 1),
    "list_jobs": ({"jobs_pkey"}, CLAIM),
}
# The same statements, asked in another way.
VARIANTS = {"claim_any_task": "claim_jobs"}


async def arguments(connection: asyncpg.Connection[asyncpg.Record]) -> dict[str, str]:
    """What to call each hot statement with: all running jobs at once, as SQL."""
    rows = await connection.fetch("select id::text, lease_token::text from clarion.jobs where state = 'running'")
    dead = await connection.fetch("select id::text from clarion.jobs where state = 'dead'")
    ids, tokens = array([row["id"] for row in rows]), array([row["lease_token"] for row in rows])
    dying = [row["id"] for row in dead]
    some = [row["id"] for row in [*dead[::2], *rows[::2]]]
    failed, nothing, minute = same("failed", rows), same("null", rows), same("60", rows)
    workers = array(["00000000-0000-0000-0000-00000000000a", "00000000-0000-0000-0000-00000000000b"] * 2)
    claim = (
        f"'{{default,other}}', '{{{CLAIM},5}}', '{{null,null}}', '{{null,null}}', "
        f"'{{default,default,other,other}}', '{{1,11,1,3}}', '{{10,{CLAIM},2,5}}', {workers}, '{{30,30,30,30}}'"
    )
    policy = ", '{null,null}'" * 4
    # Half of the keys are there already.
    keys = array([f"{'old' if n % 2 else 'new'} {n}" for n in range(BATCH)])
    new = [same(value, range(BATCH)) for value in ("default", "t", '"{}"', "0", *["null"] * 10)]
    return {
        "enqueue_jobs": f"{', '.join(new)}, {keys}, {new[2]}, 60",
        "claim_jobs": f"{claim}, '{{t,u}}'{policy}, false",
        "claim_any_task": f"{claim}, '{{x}}'" + ", '{null}'" * 4 + ", true",
        "complete_jobs": f"{ids}, {tokens}, {nothing}, {nothing}",
        "heartbeat_jobs": f"{ids}, {tokens}, {minute}, {nothing}, {nothing}",
        "extend_leases": f"{ids}, {tokens}",
        "record_logs": f"{ids}, {tokens}, {', '.join(same(value, rows) for value in ('1', 'info', 'hi', 'null'))}, 10",
        "fail_jobs": f"{ids}, {tokens}, {failed}, {', '.join([nothing] * 5)}, 20::smallint, 5, 3600",
        "snooze_jobs": f"{ids}, {tokens}, {minute}, {same('true', rows)}, 10",
        "release_jobs": f"{ids}, {tokens}",
        "reap_jobs": f"{BATCH}, 5, 20::smallint, 5, 3600, 0, null",
        "promote_jobs": str(BATCH),
        "next_due_seconds": "",
        "expire_jobs": str(BATCH),
        "cancel_jobs": f"{array(some)}, 'api', null",
        "retry_jobs": f"{array(dying)}, {same('0', dying)}, false, 'api', null, null",
        "find_finished": ids,
        "find_states": ids,
        "find_dead": f"'default', 't', null, null, now() - interval '1 hour', null, null, null, {CLAIM}",
        "get_job": f"'{rows[0]['id'] if rows else '00000000-0000-0000-0000-000000000000'}'",
        "list_jobs": f"null, 'default', 't', now() - interval '1 day', null, null, {CLAIM}",
    }


def array(values: Sequence[str]) -> str:
    return f"'{{{','.join(values)}}}'"


def same(value: str, items: Sequence[object]) -> str:
    return array([value] * len(items))


def call(name: str, given: dict[str, str]) -> str:
    return f"execute {name}({given[name]})" if given[name] else f"execute {name}"


async def prepare(connection: asyncpg.Connection[asyncpg.Record]) -> None:
    """Makes the plan of each statement now, by its first execution."""
    given = await arguments(connection)
    for name in [*HOT, *VARIANTS]:
        await connection.execute(f"prepare {name} as {statement(VARIANTS.get(name, name))}")
        async with undone(connection):
            await connection.execute(call(name, given))


@asynccontextmanager
async def undone(connection: asyncpg.Connection[asyncpg.Record]) -> AsyncIterator[None]:
    transaction = connection.transaction()
    await transaction.start()
    try:
        yield
    finally:
        await transaction.rollback()


# -- What Postgres may believe when it plans


async def planned_when_the_queue_was_empty(connection: asyncpg.Connection[asyncpg.Record], _: Settings) -> None:
    await connection.execute(ANALYZE)
    await prepare(connection)
    await connection.execute(FILL)


async def analysed_when_the_queue_was_empty(connection: asyncpg.Connection[asyncpg.Record], _: Settings) -> None:
    await connection.execute(ANALYZE)
    await connection.execute(FILL)
    await prepare(connection)


async def analysed_when_all_was_dead_but_seen(
    connection: asyncpg.Connection[asyncpg.Record], settings: Settings
) -> None:
    """A snapshot holds many pages of deleted rows in the table, which Postgres counts as none."""
    await connection.execute(FILL)
    await connection.execute(ANALYZE)
    reader = await asyncpg.connect(settings.database_url)
    async with reader.transaction(isolation="repeatable_read"):
        await reader.fetch("select count(*) from clarion.jobs")
        await connection.execute(EMPTY)
        await connection.execute(ANALYZE)
        await prepare(connection)
    await reader.close()
    await connection.execute(FILL)


async def never_analysed(connection: asyncpg.Connection[asyncpg.Record], _: Settings) -> None:
    await connection.execute(FILL)
    await connection.execute(MORE)
    await prepare(connection)


async def analysed(connection: asyncpg.Connection[asyncpg.Record], _: Settings) -> None:
    await connection.execute(FILL)
    await connection.execute(ANALYZE)
    await prepare(connection)


async def analysed_and_free_to_scan(connection: asyncpg.Connection[asyncpg.Record], settings: Settings) -> None:
    """As on a connection whose settings a pooler dropped."""
    await connection.execute("set enable_seqscan = on; set enable_bitmapscan = on")
    await analysed(connection, settings)


BELIEFS = (
    planned_when_the_queue_was_empty,
    analysed_when_the_queue_was_empty,
    analysed_when_all_was_dead_but_seen,
    never_analysed,
    analysed,
    analysed_and_free_to_scan,
)


# -- What the plans did


class Plan:
    """A statement's plan, as executed."""

    def __init__(self, explained: str) -> None:
        self._nodes = list(walk(json.loads(explained)[0]["Plan"]))

    def indexes(self) -> set[str]:
        """Those of `jobs` that it walked."""
        return {node["Index Name"] for node in self._nodes if node.get("Index Name", "").startswith("jobs_")}

    def reads_whole_tables(self) -> bool:
        tables = ("jobs", "attempts", "job_", "idempotency_keys")
        return any(node["Node Type"] == "Seq Scan" and node["Relation Name"].startswith(tables) for node in self._nodes)

    def most_read_of_jobs(self) -> int:
        """The most rows that one scan of the jobs looked at."""
        return self.most_read_of("jobs")

    def most_read_of(self, table: str) -> int:
        """The most rows that one scan of the table looked at, those it threw away included."""
        scans = [node for node in self._nodes if node.get("Relation Name") == table and "Scan" in node["Node Type"]]
        return max((rows(scan) + rows(scan, "Rows Removed by Filter") for scan in scans), default=0)

    def most_sorted(self) -> int:
        return max((rows(node) for node in self._nodes if node["Node Type"] == "Sort"), default=0)

    def most_joined_in_vain(self) -> int:
        """Pairs of rows that a join looked at and threw away."""
        return max(rows(node, "Rows Removed by Join Filter") for node in self._nodes)


def walk(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield node
    for child in node.get("Plans", []):
        yield from walk(child)


def rows(node: dict[str, Any], key: str = "Actual Rows") -> int:
    return round(float(node.get(key, 0)) * int(node.get("Actual Loops", 1)))


async def explain(connection: asyncpg.Connection[asyncpg.Record], name: str, given: dict[str, str]) -> Plan:
    """Executes the statement, and undoes it."""
    async with undone(connection):
        return Plan(await connection.fetchval(f"explain (analyze, format json) {call(name, given)}"))


@pytest.fixture
def fresh(new_database: Callable[[], str]) -> Settings:
    """A database that was never filled, analysed or planned for."""
    return settings_for(new_database())


@pytest.mark.parametrize("believe", BELIEFS)
async def test_a_hot_statement_reads_only_what_it_takes(
    fresh: Settings, believe: Callable[[asyncpg.Connection[asyncpg.Record], Settings], Awaitable[None]]
) -> None:
    connection = await asyncpg.connect(**connect_options(fresh, name="test", statement_timeout_seconds=100))
    try:
        await connection.execute(NO_AUTOVACUUM)
        await believe(connection, fresh)
        given = await arguments(connection)
        for name in [*HOT, *VARIANTS]:
            indexes, most = HOT[VARIANTS.get(name, name)]
            plan = await explain(connection, name, given)
            assert plan.indexes() == indexes, name
            assert not plan.reads_whole_tables(), name
            assert plan.most_read_of_jobs() <= most, name
            assert plan.most_sorted() <= BATCH, name
            assert plan.most_joined_in_vain() <= BATCH, name
        async with undone(connection):
            taken = await connection.execute(call("claim_jobs", given))
            assert taken == f"UPDATE {CLAIM}"
    finally:
        await connection.close()


@pytest.mark.parametrize("analysed", [False, True])
@pytest.mark.parametrize("step", [0, 1, 20])
async def test_who_else_hears_the_rings_is_found_in_one_pass_whatever_queues_they_have(
    fresh: Settings, analysed: bool, step: int
) -> None:
    """Each of 100 workers has 20 queues: the same as the one before, all but one of them, or others altogether."""
    connection = await asyncpg.connect(**connect_options(fresh, name="test"))
    try:
        await connection.execute("alter table clarion.workers set (autovacuum_enabled = off)")
        await connection.execute("analyze clarion.workers")
        prepared = f"prepare find_standings as {statement('find_standings')}"
        if not analysed:
            await connection.execute(prepared)
            await connection.execute("execute find_standings(clarion.new_id(), 30)")
        await connection.execute(
            f"""
            insert into clarion.workers (id, name, version, queues, tasks, concurrency)
            select clarion.new_id(), 'w', '1', array(
              select 'q' || (q + n * {step}) from generate_series(1, 20) as q
            ), '{{t}}', 10
            from generate_series(1, 100) as n
            """
        )
        if analysed:
            await connection.execute("analyze clarion.workers")
            await connection.execute(prepared)
        asks = await connection.fetchval("select id from clarion.workers order by id offset 50 limit 1")
        plan = await explain(connection, "find_standings", {"find_standings": f"'{asks}', 30"})
        assert plan.most_read_of("workers") <= 100
        assert plan.most_joined_in_vain() <= 100 * 20
        assert len(await connection.fetch(f"execute find_standings('{asks}', 30)")) == 20
    finally:
        await connection.close()


async def test_a_list_since_a_moment_reads_nothing_older(fresh: Settings) -> None:
    """Ids begin with their time, so the moment bounds the walk along the primary keys."""
    connection = await asyncpg.connect(**connect_options(fresh, name="test"))
    try:
        await connection.execute(FILL)
        await connection.execute(f"prepare list_jobs as {statement('list_jobs')}")
        since = "null, null, null, now() + interval '1 s', null, null, 100"
        plan = await explain(connection, "list_jobs", {"list_jobs": since})
        assert plan.indexes() == {"jobs_pkey"}
        assert plan.most_read_of_jobs() == 0
    finally:
        await connection.close()
