"""A notification is only a hint: late, doubled, unreadable or lost, every job still starts."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from uuid import uuid4

import anyio
import msgspec
import pytest

from claiming import DisturbedStore, Send
from clarion.db import Database, close_connection, connect
from clarion.enqueuer import Enqueuer
from clarion.errors import Unavailable
from clarion.execution import Ready
from clarion.job import NewJob
from clarion.loops import run_forever
from clarion.settings import Settings
from clarion.store import Store
from clarion.wake import CHANNEL, HOPS_MAX, Listener, Ring, Ringer, decode_ring, encode_ring
from clarion_worker import Worker
from recording import Rung, amounts, rung
from running import Client, client, running_worker

worker = Worker()
NOW = datetime(2026, 1, 1, tzinfo=UTC)
ONE = Ready(1, NOW)

CUT_OFF = """
    select pg_terminate_backend(pid) from pg_stat_activity
    where application_name = 'clarion listener' and datname = current_database()
"""


@worker.task("quick")
async def quick() -> None: ...


class Rings:
    """Everything a listener heard."""

    def __init__(self) -> None:
        self.heard: list[Ring] = []
        self.connected = 0
        self._changed = anyio.Event()

    def on_ring(self, ring: Ring) -> None:
        self.heard.append(ring)
        self._change()

    def on_connect(self) -> None:
        self.connected += 1
        self._change()

    async def until(self, *, heard: int = 0, connected: int = 0) -> None:
        while len(self.heard) < heard or self.connected < connected:
            await self._changed.wait()

    def _change(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()


@asynccontextmanager
async def listening(settings: Settings) -> AsyncIterator[Rings]:
    rings = Rings()
    async with anyio.create_task_group() as group:
        group.start_soon(Listener(settings, on_ring=rings.on_ring, on_connect=rings.on_connect).run)
        await rings.until(connected=1)
        yield rings
        group.cancel_scope.cancel()


class RecordingStore(Store):
    """A store that keeps its rings, and may be told to lose or refuse them."""

    def __init__(self, database: Database, settings: Settings) -> None:
        super().__init__(database, settings)
        self.payloads: list[Sequence[str]] = []
        self.refusals = 0

    async def ring(self, channel: str, payloads: Sequence[str]) -> None:
        self.payloads.append(payloads)
        if self.refusals:
            self.refusals -= 1
            raise Unavailable("refused by the test")
        await super().ring(channel, payloads)


async def test_marks_of_one_interval_leave_in_one_statement(database: Database, settings: Settings) -> None:
    store = RecordingStore(database, settings)
    ringer = Ringer(store, settings)
    for _ in range(100):
        ringer.mark({"mail": ONE}, scheduled=True)
        ringer.mark({"bulk": Ready(2, NOW)})
    await ringer.step()
    assert [[rung(decode_ring(payload)) for payload in payloads] for payloads in store.payloads] == [
        [Rung({"mail": 100, "bulk": 200}, scheduled=True)]
    ]


async def test_marks_of_one_queue_leave_as_their_sum_with_the_earliest_place(
    database: Database, settings: Settings
) -> None:
    store = RecordingStore(database, settings)
    ringer = Ringer(store, settings)
    for seconds in (3, 1, 2):
        ringer.mark({"mail": Ready(seconds, NOW + timedelta(seconds=seconds))})
    await ringer.step()
    assert decode_ring(store.payloads[0][0]).queues == {"mail": Ready(6, NOW + timedelta(seconds=1))}


async def test_what_is_passed_on_leaves_beside_what_is_new(database: Database, settings: Settings) -> None:
    store = RecordingStore(database, settings)
    ringer = Ringer(store, settings)
    for hops in (0, 2, 0, 2, 1):
        ringer.mark({"mail": ONE}, hops=hops)
    await ringer.step()
    rings = [decode_ring(payload) for payload in store.payloads[0]]
    assert {ring.hops: amounts(ring.queues) for ring in rings} == {0: {"mail": 2}, 1: {"mail": 1}, 2: {"mail": 2}}


async def test_each_ring_points_somewhere_else(database: Database, settings: Settings) -> None:
    store = RecordingStore(database, settings)
    ringer = Ringer(store, settings)
    for _ in range(40):
        ringer.mark({"mail": ONE})
        await ringer.step()
    points = [decode_ring(payload).point for payloads in store.payloads for payload in payloads]
    assert len(set(points)) > 30
    assert min(points) < 0.3
    assert max(points) > 0.7


async def test_rings_for_many_queues_fit_into_notifications(database: Database, settings: Settings) -> None:
    store = RecordingStore(database, settings)
    names = [f"{number:03}" + "q" * 125 for number in range(200)]
    ringer = Ringer(store, settings)
    async with listening(settings) as rings:
        ringer.mark(dict.fromkeys(names, ONE))
        await ringer.step()
        await rings.until(heard=len(store.payloads[0]))
    assert sorted(name for ring in rings.heard for name in ring.queues) == names
    assert all(len(payload) < 8000 for payload in store.payloads[0])


async def test_who_is_to_end_a_job_hears_its_id(database: Database, settings: Settings) -> None:
    store = RecordingStore(database, settings)
    ringer = Ringer(store, settings)
    cancelled = [uuid4() for _ in range(120)]
    async with listening(settings) as rings:
        for job_id in [*cancelled, *cancelled]:
            ringer.mark(cancelled=[job_id])
        await ringer.step()
        await rings.until(heard=len(store.payloads[0]))
    heard = [job_id for ring in rings.heard for job_id in ring.cancelled]
    assert sorted(heard) == sorted(cancelled)
    assert not any(ring.queues or ring.scheduled for ring in rings.heard)


async def test_a_mark_of_nothing_rings_nobody(database: Database, settings: Settings) -> None:
    store = RecordingStore(database, settings)
    ringer = Ringer(store, settings)
    ringer.mark()
    ringer.mark({}, cancelled=[])
    ringer.mark({"mail": ONE})
    await ringer.step()
    assert [[rung(decode_ring(payload)) for payload in payloads] for payloads in store.payloads] == [
        [Rung({"mail": 1})]
    ]


async def test_a_ring_that_could_not_be_sent_is_sent_later(database: Database, settings: Settings) -> None:
    store = RecordingStore(database, settings)
    store.refusals = 2
    ringer = Ringer(store, settings)
    cancelled = uuid4()
    async with listening(settings) as rings, anyio.create_task_group() as group:
        ringer.mark({"mail": ONE}, cancelled=[cancelled])
        ringer.mark({"mail": ONE}, hops=1)
        group.start_soon(partial(run_forever, ringer.step, name="ring"))
        await rings.until(heard=2)
        group.cancel_scope.cancel()
    assert {ring.hops: rung(ring) for ring in rings.heard} == {
        0: Rung({"mail": 1}, cancelled=[cancelled]),
        1: Rung({"mail": 1}),
    }


@pytest.mark.parametrize(
    "payload",
    [
        "",
        "nonsense",
        "[]",
        '{"queues": {"mail": "many"}}',
        '{"queues": {"mail": 1}}',
        '{"queues": {"mail": [1]}}',
        '{"queues": {"mail": [1, "2026-01-01T00:00:00"]}}',
        '{"queues": {"mail": [1, "soon"]}}',
        '{"queues": {"mail": [-1, "2026-01-01T00:00:00Z"]}}',
        '{"queues": {"mail": [2147483648, "2026-01-01T00:00:00Z"]}}',
        '{"queues": {"mail": [1e999, "2026-01-01T00:00:00Z"]}}',
        '{"queues": 5}',
        '{"point": 1}',
        '{"point": -0.1}',
        '{"point": 1e999}',
        f'{{"hops": {HOPS_MAX + 1}}}',
        '{"hops": -1}',
        "[" * 5000,
        "\ud800",
    ],
)
def test_a_payload_that_cannot_be_read_says_nothing(payload: str) -> None:
    assert decode_ring(payload) == Ring()


def test_a_payload_of_a_newer_version_can_be_read() -> None:
    ring = decode_ring('{"queues": {"mail": [1, "2026-01-01T00:00:00Z", "and more"]}, "color": "blue"}')
    assert ring == Ring({"mail": ONE})


def test_more_than_a_ring_can_say_is_said_as_the_most() -> None:
    most = Ready(2**31 - 1, NOW)
    assert most.together(most) == most
    assert decode_ring(encode_ring(Ring({"mail": most}))) == Ring({"mail": most})


def test_a_ring_survives_its_encoding() -> None:
    ready = {"a.b:c/d-e": Ready(3, NOW + timedelta(microseconds=1))}
    ring = Ring(ready, scheduled=True, cancelled=[uuid4(), uuid4()], point=0.123456, hops=2)
    assert decode_ring(encode_ring(ring)) == ring


async def test_a_listener_that_is_cut_off_listens_again_and_says_so(database: Database, settings: Settings) -> None:
    async with listening(settings) as rings:
        await database.fetch(CUT_OFF)
        await rings.until(connected=2)
        await database.fetch("select pg_notify($1, $2)", CHANNEL, encode_ring(Ring({"mail": ONE})))
        await rings.until(heard=1)


async def test_with_every_ring_lost_a_job_starts_at_the_next_sweep(database: Database, settings: Settings) -> None:
    brisk = msgspec.structs.replace(settings, sweep_seconds=0.2)
    async with client(settings) as jobs, running_worker(worker, brisk):
        assert (await jobs.run(NewJob(task="quick"))).state == "succeeded"
        (silent,) = await jobs.store.enqueue_jobs([NewJob(task="quick")])
        assert (await jobs.final(silent.id)).state == "succeeded"


async def test_a_thousand_rings_for_nothing_do_no_harm(database: Database, settings: Settings) -> None:
    async with client(settings) as jobs, running_worker(worker, settings):
        payload = encode_ring(Ring({"default": Ready(5, NOW)}, scheduled=True))
        await database.fetch("select pg_notify($1, $2 || n) from generate_series(1, 1000) n", CHANNEL, payload)
        await database.fetch("select pg_notify($1, $2) from generate_series(1, 1000) n", CHANNEL, payload)
        assert (await jobs.run(NewJob(task="quick"))).state == "succeeded"


async def test_jobs_that_became_ready_while_nobody_listened_start_after_the_reconnect(
    database: Database, settings: Settings
) -> None:
    patient = msgspec.structs.replace(settings, sweep_seconds=300.0)
    async with client(settings) as jobs, running_worker(worker, patient):
        assert (await jobs.run(NewJob(task="quick"))).state == "succeeded"
        (silent,) = await jobs.store.enqueue_jobs([NewJob(task="quick")])
        await database.fetch(CUT_OFF)
        assert (await jobs.final(silent.id)).state == "succeeded"


async def test_no_ring_is_too_long_for_postgres(database: Database, settings: Settings) -> None:
    ringer = Ringer(Store(database, settings), settings)
    late = datetime(9999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)
    ringer.mark(
        {f"{n:0128}": Ready(10**12, late) for n in range(100)}, scheduled=True, cancelled=[uuid4() for _ in range(100)]
    )
    assert await ringer.step() > 0


# -- The promise: whatever becomes of a ring, its job starts within the sweep


SWEEP_SECONDS = 0.5


@asynccontextmanager
async def disturbed(settings: Settings, disturb: Callable[[Send], Awaitable[None]]) -> AsyncIterator[Client]:
    """A worker that sweeps, and somebody who enqueues, between whom `disturb` stands."""
    brisk = msgspec.structs.replace(settings, sweep_seconds=SWEEP_SECONDS)
    async with client(settings) as jobs, running_worker(worker, brisk), anyio.create_task_group() as group:
        ringer = Ringer(DisturbedStore(jobs.database, settings, disturb), settings)
        group.start_soon(partial(run_forever, ringer.step, name="ring"))
        assert (await jobs.run(NewJob(task="quick"))).state == "succeeded"
        yield msgspec.structs.replace(jobs, ringer=ringer, enqueuer=Enqueuer(jobs.store, ringer, settings))
        group.cancel_scope.cancel()


async def waited_seconds(jobs: Client, count: int) -> list[float]:
    """So many jobs, one after the other: how long each was ready before it started."""
    waits = []
    for _ in range(count):
        job = await jobs.run(NewJob(task="quick"))
        assert job.started_at is not None
        waits.append((job.started_at - job.run_at).total_seconds())
    return waits


async def settled(send: Send) -> None:
    await send()


async def lose(_send: Send) -> None: ...


async def send_thrice(send: Send) -> None:
    for _ in range(3):
        await send()


@pytest.mark.parametrize("disturb", [lose, send_thrice])
async def test_every_job_starts_within_the_sweep_with_rings(
    database: Database, settings: Settings, disturb: Callable[[Send], Awaitable[None]]
) -> None:
    async with disturbed(settings, disturb) as jobs:
        # The jittered sweep, and as much again for a machine that is busy with other tests.
        assert max(await waited_seconds(jobs, 5)) < 2 * 1.2 * SWEEP_SECONDS


async def test_every_job_starts_within_the_sweep_with_rings_that_come_after_the_next_job(
    database: Database, settings: Settings
) -> None:
    late: list[Send] = []

    async def delay(send: Send) -> None:
        late.append(send)

    async with disturbed(settings, delay) as jobs:
        assert max(await waited_seconds(jobs, 3)) < 2 * 1.2 * SWEEP_SECONDS
        for send in late:
            await send()
        assert max(await waited_seconds(jobs, 3)) < 2 * 1.2 * SWEEP_SECONDS


async def test_every_job_starts_with_a_listener_that_is_cut_off_at_every_ring(
    database: Database, settings: Settings
) -> None:
    async def cut_off(send: Send) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(partial(settled, send))
            group.start_soon(database.fetch, CUT_OFF)

    async with disturbed(settings, cut_off) as jobs:
        # Beside the sweep, the backoff of a listener that is cut off again and again.
        assert max(await waited_seconds(jobs, 8)) < 2 * 1.2 * SWEEP_SECONDS


# -- A job that goes before all others, while dead entries are kept by somebody's snapshot


async def test_behind_a_held_snapshot_a_job_of_an_earlier_place_starts_by_its_ring(
    database: Database, settings: Settings
) -> None:
    patient = msgspec.structs.replace(settings, sweep_seconds=300.0)
    async with client(settings) as jobs, running_worker(worker, patient), snapshot(settings):
        await drain(jobs)
        job = await jobs.run(NewJob(task="quick", priority=100))
        assert job.state == "succeeded"


async def test_behind_a_held_snapshot_a_job_of_an_earlier_place_whose_ring_is_lost_starts_within_the_sweep(
    database: Database, settings: Settings
) -> None:
    brisk = msgspec.structs.replace(settings, sweep_seconds=SWEEP_SECONDS)
    async with client(settings) as jobs, running_worker(worker, brisk), snapshot(settings):
        await drain(jobs)
        (silent,) = await jobs.store.enqueue_jobs([NewJob(task="quick", priority=100)])
        job = await jobs.final(silent.id)
        assert job.started_at is not None
        assert (job.started_at - job.run_at).total_seconds() < 2 * 1.2 * SWEEP_SECONDS


@asynccontextmanager
async def snapshot(settings: Settings) -> AsyncIterator[None]:
    """Another session sees everything as it is now, until the end of the block."""
    connection = await connect(settings, name="snapshot")
    try:
        async with connection.transaction(isolation="repeatable_read"):
            await connection.fetch("select count(*) from clarion.jobs")
            yield
    finally:
        await close_connection(connection)


async def drain(jobs: Client) -> None:
    for job_id in await jobs.enqueue(*[NewJob(task="quick")] * 300):
        await jobs.final(job_id)
