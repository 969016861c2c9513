"""A notification is only a hint: late, doubled, unreadable or lost, every job still starts."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from uuid import uuid4

import anyio
import msgspec
import pytest

from clarion.db import Database
from clarion.errors import Unavailable
from clarion.job import NewJob
from clarion.loops import run_forever
from clarion.settings import Settings
from clarion.store import Store
from clarion.wake import CHANNEL, Listener, Ring, Ringer, decode_ring, encode_ring
from clarion_worker import Worker
from running import client, running_worker

worker = Worker()

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
        ringer.mark({"mail": 1}, scheduled=True)
        ringer.mark({"bulk": 2})
    await ringer.step()
    assert [[decode_ring(payload) for payload in payloads] for payloads in store.payloads] == [
        [Ring({"mail": 100, "bulk": 200}, scheduled=True)]
    ]


async def test_rings_for_many_queues_fit_into_notifications(database: Database, settings: Settings) -> None:
    store = RecordingStore(database, settings)
    names = [f"{number:03}" + "q" * 125 for number in range(200)]
    ringer = Ringer(store, settings)
    async with listening(settings) as rings:
        ringer.mark(dict.fromkeys(names, 1))
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
    ringer.mark({"mail": 1})
    await ringer.step()
    assert store.payloads == [[encode_ring(Ring({"mail": 1}))]]


async def test_a_ring_that_could_not_be_sent_is_sent_later(database: Database, settings: Settings) -> None:
    store = RecordingStore(database, settings)
    store.refusals = 2
    ringer = Ringer(store, settings)
    cancelled = uuid4()
    async with listening(settings) as rings, anyio.create_task_group() as group:
        ringer.mark({"mail": 1}, cancelled=[cancelled])
        group.start_soon(partial(run_forever, ringer.step, name="ring"))
        await rings.until(heard=1)
        group.cancel_scope.cancel()
    assert rings.heard == [Ring({"mail": 1}, cancelled=[cancelled])]


@pytest.mark.parametrize(
    "payload", ["", "nonsense", "[]", '{"queues": {"mail": "many"}}', '{"queues": 5}', "[" * 5000, "\ud800"]
)
def test_a_payload_that_cannot_be_read_says_nothing(payload: str) -> None:
    assert decode_ring(payload) == Ring()


def test_a_payload_of_a_newer_version_can_be_read() -> None:
    assert decode_ring('{"queues": {"mail": 1}, "color": "blue"}') == Ring({"mail": 1})


def test_a_ring_survives_its_encoding() -> None:
    ring = Ring({"a.b:c/d-e": 3}, scheduled=True, cancelled=[uuid4(), uuid4()])
    assert decode_ring(encode_ring(ring)) == ring


async def test_a_listener_that_is_cut_off_listens_again_and_says_so(database: Database, settings: Settings) -> None:
    async with listening(settings) as rings:
        await database.fetch(CUT_OFF)
        await rings.until(connected=2)
        await database.fetch("select pg_notify($1, $2)", CHANNEL, encode_ring(Ring({"mail": 1})))
        await rings.until(heard=1)


async def test_with_every_ring_lost_a_job_starts_at_the_next_sweep(database: Database, settings: Settings) -> None:
    brisk = msgspec.structs.replace(settings, sweep_seconds=0.2)
    async with client(settings) as jobs, running_worker(worker, brisk):
        assert (await jobs.run(NewJob(task="quick"))).state == "succeeded"
        (silent,) = await jobs.store.enqueue_jobs([NewJob(task="quick")])
        assert (await jobs.final(silent.id)).state == "succeeded"


async def test_a_thousand_rings_for_nothing_do_no_harm(database: Database, settings: Settings) -> None:
    async with client(settings) as jobs, running_worker(worker, settings):
        payload = encode_ring(Ring({"default": 5}, scheduled=True))
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
    ringer.mark({f"{n:0128}": 10_000 for n in range(100)}, scheduled=True, cancelled=[uuid4() for _ in range(100)])
    assert await ringer.step() > 0
