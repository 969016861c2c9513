"""Workers over HTTP: claiming jobs, keeping them, and what they say meanwhile."""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from socket import SHUT_RDWR
from string import ascii_letters, digits
from typing import Any
from uuid import UUID, uuid4

import anyio
import anyio.lowlevel
import httpx2
import msgspec
import pytest
import structlog
from anyio.abc import SocketAttribute, SocketStream

from api_harness import client_of, listening, read_answer, services_over
from clarion.api.lease_tokens import decode_lease_token, encode_lease_token
from clarion.api.services import Services
from clarion.db import Database
from clarion.errors import Unavailable
from clarion.execution import Lease, Policy, Ready, Share
from clarion.job import NewJob
from clarion.main import bind, running_services, serve
from clarion.settings import Settings
from clarion.store import Store
from clarion.wake import Ring
from store_actions import Session

WORKER = str(uuid4())
LONG_AGO = datetime(2000, 1, 1, tzinfo=UTC)
CUT_OFF = """
    select pg_terminate_backend(pid) from pg_stat_activity
    where application_name = 'clarion listener' and datname = current_database()
"""


async def enqueue(store: Store, count: int = 1, **options: Any) -> list[UUID]:
    return [added.id for added in await store.enqueue_jobs([NewJob(**{"task": "work"} | options)] * count)]


async def claim(client: httpx2.AsyncClient, **body: Any) -> list[dict[str, Any]]:
    """The leases that a claim is answered with."""
    answer = await client.post("/v1/leases", json={"worker": WORKER, "queues": ["default"]} | body)
    assert answer.status_code in (200, 204), answer.text
    return answer.json()["leases"] if answer.content else []


async def claim_one(client: httpx2.AsyncClient, store: Store, **options: Any) -> dict[str, Any]:
    """A job of its own, claimed."""
    await enqueue(store, **options)
    [lease] = await claim(client)
    return lease


async def beat(client: httpx2.AsyncClient, *tokens: str, **body: Any) -> dict[str, Any]:
    answer = await client.post(
        "/v1/leases/heartbeat", json={"worker": WORKER, "leases": [{"token": token} for token in tokens]} | body
    )
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


async def say(client: httpx2.AsyncClient, lease: Mapping[str, Any], verb: str, body: Any = None) -> httpx2.Response:
    return await client.post(f"/v1/leases/{lease['token']}/{verb}", json={} if body is None else body)


async def lose(store: Store, database: Database, lease: Mapping[str, Any]) -> None:
    """Takes the job from its worker, whose lease has run out."""
    job_id = UUID(lease["id"])
    await database.fetch("update clarion.jobs set lease_expires_at = now() - interval '1 h' where id = $1", job_id)
    await store.reap_jobs()


async def seconds_left(database: Database, lease: Mapping[str, Any]) -> float:
    [row] = await database.fetch(
        "select extract(epoch from lease_expires_at - clock_timestamp()) as left from clarion.jobs where id = $1",
        UUID(lease["id"]),
    )
    return float(row["left"])


def errors(answer: httpx2.Response) -> dict[str, str]:
    """What is wrong with a request, by place."""
    assert answer.status_code == 422, answer.text
    return {error.get("pointer", error.get("parameter")): error["detail"] for error in answer.json()["errors"]}


# -- Claiming --------------------------------------------------------------------------------------------------------


async def test_a_claim_answers_all_that_a_worker_needs(client: httpx2.AsyncClient, store: Store) -> None:
    [job_id] = await enqueue(
        store, args='{"n": 1.0, "a":[]}', priority=3, max_attempts=4, timeout_seconds=0.3, queue="mail"
    )
    [lease] = await claim(client, queues=["mail"], lease="45s")
    job = (await client.get(f"/v1/jobs/{job_id}")).json()
    assert lease == {
        "token": lease["token"],
        "id": str(job_id),
        "queue": "mail",
        "task": "work",
        "args": {"n": 1.0, "a": []},
        "priority": 3,
        "attempt": 1,
        "max_attempts": 4,
        "generation": 1,
        "errors": 0,
        "crashes": 0,
        "timeout": 0.3,
        "lease": 45.0,
        "checkpoint": None,
        "created_at": job["created_at"],
        "run_at": job["run_at"],
        "started_at": job["started_at"],
    }
    assert (job["state"], job["worker"]) == ("running", WORKER)
    assert decode_lease_token(lease["token"])[0] == job_id


async def test_args_come_to_the_letter(client: httpx2.AsyncClient, store: Store) -> None:
    args = '{"b":1,  "a": 12345678901234567890.10, "b":2}'
    await enqueue(store, args=args)
    answer = await client.post("/v1/leases", json={"worker": WORKER, "queues": ["default"]})
    assert f'"args":{args},' in answer.text


async def test_nothing_to_do_is_told_without_a_body(client: httpx2.AsyncClient) -> None:
    answer = await client.post("/v1/leases", json={"worker": WORKER, "queues": ["default"]})
    assert (answer.status_code, answer.content) == (204, b"")
    assert "content-type" not in answer.headers


async def test_up_to_max_jobs_come_in_the_order_of_the_line(client: httpx2.AsyncClient, store: Store) -> None:
    await enqueue(store, 2)
    await enqueue(store, priority=9)
    assert [lease["priority"] for lease in await claim(client, max=2)] == [9, 0]
    assert len(await claim(client, max=1000)) == 1


async def test_any_task_will_do_unless_some_are_named(client: httpx2.AsyncClient, store: Store) -> None:
    await enqueue(store, task="a")
    await enqueue(store, task="b")
    assert [lease["task"] for lease in await claim(client, tasks=["b"], max=9)] == ["b"]
    assert [lease["task"] for lease in await claim(client, max=9)] == ["a"]


async def test_a_queue_named_twice_counts_once(client: httpx2.AsyncClient, store: Store) -> None:
    await enqueue(store, 5)
    assert len(await claim(client, queues=["default", "default"], max=3)) == 3


async def test_the_lease_is_as_long_as_asked_or_else_the_servers(
    client: httpx2.AsyncClient, store: Store, database: Database
) -> None:
    await enqueue(store, 2)
    [asked] = await claim(client, lease="10m")
    [unasked] = await claim(client)
    assert (asked["lease"], unasked["lease"]) == (600.0, 30.0)
    assert 590 < await seconds_left(database, asked) <= 600
    assert 20 < await seconds_left(database, unasked) <= 30


async def test_a_checkpoint_is_given_to_the_next_attempt_to_the_letter(
    client: httpx2.AsyncClient, store: Store, database: Database
) -> None:
    lease = await claim_one(client, store)
    body = b'{"checkpoint": {"row": 1.50,  "row": 2}}'
    headers = {"content-type": "application/json"}
    await client.post(f"/v1/leases/{lease['token']}/progress", content=body, headers=headers)
    await lose(store, database, lease)
    answer = await client.post("/v1/leases", json={"worker": WORKER, "queues": ["default"]})
    assert '"checkpoint":{"row": 1.50,  "row": 2},' in answer.text


@pytest.mark.parametrize(
    ("body", "wrong"),
    [
        ({}, {"/worker", "/queues"}),
        ({"worker": "w", "queues": "default", "max": 0}, {"/worker", "/queues", "/max"}),
        ({"lease": "0.5s", "wait": 31}, {"/lease", "/wait"}),
        ({"queues": []}, {"/queues"}),
        ({"queues": ["a"] * 101}, {"/queues"}),
        ({"queues": ["no good"]}, {"/queues"}),
        ({"tasks": []}, {"/tasks"}),
        ({"tasks": ["a", ""]}, {"/tasks"}),
        ({"tasks": "a"}, {"/tasks"}),
        ({"max": 1001, "wait": "1x", "lease": "25h"}, {"/max", "/wait", "/lease"}),
        ({"max": "1", "wait": True, "lease": [], "name": 1}, {"/max", "/wait", "/lease", "/name"}),
        ({"queue": "default"}, {"/queue"}),
    ],
)  # fmt: skip
async def test_every_mistake_of_a_claim_is_listed(client: httpx2.AsyncClient, body: Any, wrong: set[str]) -> None:
    good = {} if body == {} else {"worker": WORKER, "queues": ["default"]}
    assert set(errors(await client.post("/v1/leases", json=good | body))) == wrong


async def test_names_that_are_no_names_are_told_in_words(client: httpx2.AsyncClient) -> None:
    body = {"worker": WORKER, "queues": ["no good"], "tasks": ["ü"]}
    found = errors(await client.post("/v1/leases", json=body))
    assert not [detail for detail in found.values() if "regex" in detail or "[A-Z" in detail]


# -- The list of workers ---------------------------------------------------------------------------------------------


async def test_who_claims_is_on_the_list_of_workers(client: httpx2.AsyncClient, store: Store) -> None:
    worker = str(uuid4())
    await claim(client, worker=worker, queues=["b", "a"], tasks=["y", "x"], max=7, name="node on\x00 box")
    [seen] = await store.list_workers(limit=9)
    assert (str(seen.id), seen.name, seen.version) == (worker, "node on\N{REPLACEMENT CHARACTER} box", "http")
    assert (seen.queues, seen.tasks, seen.concurrency, seen.running) == (["b", "a"], ["x", "y"], 7, 0)


async def test_a_worker_that_is_to_drain_gets_no_more_jobs(client: httpx2.AsyncClient, store: Store) -> None:
    await enqueue(store)
    await beat(client)
    await client.post(f"/v1/workers/{WORKER}/drain")
    await beat(client)
    for wait in (0, 30):
        answer = await client.post("/v1/leases", json={"worker": WORKER, "queues": ["default"], "wait": wait})
        assert (answer.status_code, answer.json()) == (200, {"leases": [], "waited": 0, "directive": "drain"})
    assert len(await claim(client, worker=str(uuid4()))) == 1


async def test_a_worker_that_only_claims_hears_that_it_is_to_drain(
    client: httpx2.AsyncClient, store: Store, settings: Settings
) -> None:
    await enqueue(store, 2)
    body = {"worker": WORKER, "queues": ["default"]}
    assert (await client.post("/v1/leases", json=body)).json()["directive"] == "ok"
    await client.post(f"/v1/workers/{WORKER}/drain")
    async with client_of(services_over(store, settings)) as elsewhere:
        assert (await elsewhere.post("/v1/leases", json=body)).json()["directive"] == "drain"


async def test_a_busy_loop_of_claims_is_recorded_once(client: httpx2.AsyncClient, database: Database) -> None:
    await claim(client)
    await database.fetch("truncate clarion.workers")
    await claim(client)
    assert not await database.fetch("select from clarion.workers")


async def test_a_claim_leaves_the_number_of_running_jobs_to_the_heartbeats(
    client: httpx2.AsyncClient, store: Store
) -> None:
    lease = await claim_one(client, store)
    await beat(client, lease["token"])
    await claim(client)
    [seen] = await store.list_workers(limit=9)
    assert seen.running == 1


# -- Waiting ---------------------------------------------------------------------------------------------------------


async def waiters(services: Services, count: int) -> None:
    """Returns when so many wait."""
    while services.claims.waiting != count:
        await anyio.lowlevel.checkpoint()


class CountingStore(Store):
    """Counts claims; can hold one up once Postgres has answered."""

    def __init__(self, database: Database, settings: Settings) -> None:
        super().__init__(database, settings)
        self.claims = 0
        self.answered = 0
        self.go_on = anyio.Event()
        self.go_on.set()

    async def claim_jobs(self, shares: Sequence[Share], policies: Mapping[str, Policy] | None) -> list[list[Lease]]:
        self.claims += 1
        leases = await super().claim_jobs(shares, policies)
        self.answered += 1
        await self.go_on.wait()
        return leases

    async def until(self, *, answered: int) -> None:
        while self.answered < answered:
            await anyio.lowlevel.checkpoint()


@pytest.fixture
def counting(database: Database, settings: Settings) -> CountingStore:
    return CountingStore(database, settings)


@asynccontextmanager
async def serving(store: Store, settings: Settings, **changes: Any) -> AsyncIterator[tuple[Services, int]]:
    """The API with all that runs behind it, and its port."""
    changed = msgspec.structs.replace(settings, **{"batch_max": 1} | changes)
    async with running_services(store, changed) as services, listening(services) as port:
        yield services, port
        services.claims.close()


@asynccontextmanager
async def asking(port: int, **body: Any) -> AsyncIterator[SocketStream]:
    """A connection on which a claim that waits has been sent."""
    async with await anyio.connect_tcp("127.0.0.1", port) as stream:
        await send_claim(stream, **body)
        yield stream


async def send_claim(stream: SocketStream, **body: Any) -> None:
    sent = msgspec.json.encode({"worker": str(uuid4()), "queues": ["default"], "wait": "30s"} | body)
    head = (
        f"POST /v1/leases HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(sent)}\r\n\r\n"
    )
    await stream.send(head.encode() + sent)


async def leases_in(stream: SocketStream) -> list[Any]:
    status, body = await read_answer(stream)
    assert status == 200
    leases: list[Any] = msgspec.json.decode(body)["leases"]
    return leases


async def status_of(stream: SocketStream) -> int:
    return int((await stream.receive()).split(b" ")[1])


async def test_a_job_that_comes_is_answered_without_a_sweep(counting: CountingStore, settings: Settings) -> None:
    async with serving(counting, settings, sweep_seconds=300) as (services, port), asking(port) as stream:
        await waiters(services, 1)
        await counting.until(answered=1)
        async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
            job = (await http.post("/v1/jobs", json={"task": "work"})).json()
        assert [lease["id"] for lease in await leases_in(stream)] == [job["id"]]


async def test_a_job_that_goes_before_others_is_claimed_first_by_who_comes_after_its_answer(
    store: Store, settings: Settings
) -> None:
    async with (
        serving(store, settings, sweep_seconds=300, batch_max=500) as (_, port),
        httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http,
    ):
        for priority in (0, 0, 5, 9):
            added = (await http.post("/v1/jobs", json={"task": "work", "priority": priority})).json()
            claimed = await http.post("/v1/leases", json={"worker": WORKER, "queues": ["default"]})
            if priority:
                assert [lease["id"] for lease in claimed.json()["leases"]] == [added["id"]]


async def test_claims_at_once_share_statements_and_no_job(
    counting: CountingStore, settings: Settings, database: Database
) -> None:
    await enqueue(counting, 20)
    counting.go_on = anyio.Event()
    got: list[str] = []

    async def claim(http: httpx2.AsyncClient) -> None:
        claimed = await http.post("/v1/leases", json={"worker": str(uuid4()), "queues": ["default"]})
        got.extend(lease["id"] for lease in claimed.json()["leases"])

    async with (
        serving(counting, settings, sweep_seconds=300, batch_max=500) as (_, port),
        httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http,
        anyio.create_task_group() as group,
    ):
        for _ in range(20):
            group.start_soon(claim, http)
        await counting.until(answered=1)
        # Each is on the list of workers before it claims.
        while len(await database.fetch("select from clarion.workers")) < 20:
            pass
        counting.go_on.set()
    assert len(set(got)) == 20
    assert counting.claims < 10


async def test_one_job_costs_one_claim_however_many_wait(counting: CountingStore, settings: Settings) -> None:
    async with AsyncExitStack() as stack:
        services, port = await stack.enter_async_context(serving(counting, settings, sweep_seconds=300))
        http = await stack.enter_async_context(httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}"))
        line = []
        for place in range(1, 4):  # one after the other, so that it is known who stands first
            line.append(await stack.enter_async_context(asking(port)))
            await counting.until(answered=place)
        first, second, _ = line
        before = counting.claims
        for stream in (first, second):
            await http.post("/v1/jobs", json={"task": "work"})
            assert len(await leases_in(stream)) == 1
        assert (counting.claims, services.claims.waiting) == (before + 2, 1)


async def test_a_client_that_hangs_up_waits_no_longer_and_its_job_goes_to_the_next(
    counting: CountingStore, settings: Settings
) -> None:
    with structlog.testing.capture_logs() as lines:
        async with serving(counting, settings, sweep_seconds=300) as (services, port):
            async with asking(port):
                await counting.until(answered=1)
            await waiters(services, 0)
            async with asking(port) as stream, httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
                await waiters(services, 1)
                await http.post("/v1/jobs", json={"task": "work"})
                assert len(await leases_in(stream)) == 1
    assert [line["status"] for line in lines if line.get("route") == "/v1/leases"] == [499, 200]


async def test_what_was_claimed_for_a_client_that_hung_up_is_handed_back_and_goes_to_the_next(
    counting: CountingStore, settings: Settings, database: Database
) -> None:
    await enqueue(counting)
    counting.go_on = anyio.Event()
    with structlog.testing.capture_logs() as lines:
        async with serving(counting, settings, sweep_seconds=300) as (_, port):
            async with asking(port):
                await counting.until(answered=1)
            # Another looks while the job is held for who has gone, and finds nothing.
            async with asking(port) as stream:
                await counting.until(answered=2)
                counting.go_on.set()
                [lease] = await leases_in(stream)
    assert lease["attempt"] == 1
    assert [row["outcome"] for row in await database.fetch("select outcome from clarion.attempts")] == ["released"]
    assert [line["jobs"] for line in lines if line["event"] == "claim.released"] == [1]


async def test_what_was_claimed_for_a_client_that_hung_up_just_then_is_handed_back(
    database: Database, settings: Settings
) -> None:
    class HangingUp(CountingStore):
        hang_up: Callable[[], None]

        async def claim_jobs(self, *args: Any) -> list[list[Lease]]:
            leases = await super().claim_jobs(*args)
            self.hang_up()
            return leases

    store = HangingUp(database, settings)
    await enqueue(store)
    hung_up = anyio.Event()

    def hang_up(stream: SocketStream) -> None:
        raw_socket = stream.extra(SocketAttribute.raw_socket)  # noqa: S610  not Django's
        raw_socket.shutdown(SHUT_RDWR)
        hung_up.set()

    async with (
        serving(store, settings, sweep_seconds=300) as (_, port),
        await anyio.connect_tcp("127.0.0.1", port) as stream,
    ):
        store.hang_up = partial(hang_up, stream)
        await send_claim(stream)
        await hung_up.wait()
        while not await database.fetch("select from clarion.attempts where outcome = 'released'"):
            pass


async def test_jobs_that_came_while_nobody_listened_are_found_when_the_listener_is_back(
    counting: CountingStore, settings: Settings, database: Database
) -> None:
    async with serving(counting, settings, sweep_seconds=300) as (_, port), asking(port) as stream:
        await counting.until(answered=1)
        await enqueue(counting)  # without a ring
        while not await database.fetch(CUT_OFF):
            pass
        assert len(await leases_in(stream)) == 1


async def test_a_server_that_stops_lets_everybody_go_without_a_job(settings: Settings, database: Database) -> None:
    stop, started, socket = anyio.Event(), anyio.Event(), bind(settings, "127.0.0.1", 0)
    async with anyio.create_task_group() as group:
        group.start_soon(partial(serve, settings, listening=socket, stop=stop, started=started.set))
        await started.wait()
        port = socket.getsockname()[1]
        async with asking(port) as one, asking(port) as two:
            # Each is on the list of workers before it waits.
            while len(await database.fetch("select from clarion.workers")) < 2:
                pass
            stop.set()
            assert [await status_of(one), await status_of(two)] == [204, 204]


async def test_beyond_the_bound_a_claim_is_told_to_come_back(counting: CountingStore, settings: Settings) -> None:
    services = services_over(counting, settings, waiters_max=1)
    async with listening(services) as port, asking(port), client_of(services) as client:
        await waiters(services, 1)
        body = {"worker": WORKER, "queues": ["default"]}
        answer = await client.post("/v1/leases", json=body | {"wait": "5s"})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert (await client.post("/v1/leases", json=body)).status_code == 204
        services.claims.close()


async def test_in_weather_a_claim_is_told_to_come_back(database: Database, settings: Settings) -> None:
    class Away(CountingStore):
        async def claim_jobs(self, *_args: Any) -> list[list[Lease]]:
            raise Unavailable("the database is away")

    services = services_over(Away(database, settings), settings)
    async with client_of(services) as client:
        for wait in (0, 30):
            answer = await client.post("/v1/leases", json={"worker": WORKER, "queues": ["default"], "wait": wait})
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")


async def test_when_the_time_is_up_the_answer_is_empty(client: httpx2.AsyncClient) -> None:
    assert await claim(client, wait="10ms") == []


async def test_in_process_a_ring_is_enough(services: Services, client: httpx2.AsyncClient) -> None:
    async with anyio.create_task_group() as group:
        found: list[Any] = []

        async def wait() -> None:
            found.extend(await claim(client, wait="30s", queues=["other", "default"]))

        group.start_soon(wait)
        await waiters(services, 1)
        await enqueue(services.store)
        services.claims.hear(Ring({"default": Ready(1, LONG_AGO)}))
    assert len(found) == 1


# -- Heartbeats ------------------------------------------------------------------------------------------------------


async def test_a_heartbeat_tells_of_each_lease_in_the_order_of_the_request(
    client: httpx2.AsyncClient, store: Store, settings: Settings, database: Database
) -> None:
    await enqueue(store, 5)
    leases = await claim(client, max=5)
    held, asked_to_cancel, lost, finished, busy = leases
    await store.cancel_jobs([UUID(asked_to_cancel["id"])], actor="api")
    await lose(store, database, lost)
    await say(client, finished, "complete")
    strange = encode_lease_token(uuid4(), uuid4())
    tokens = [strange, *(lease["token"] for lease in (finished, lost, busy, held, asked_to_cancel)), "no token"]
    async with Session.open(settings) as session:
        await session.fetch("select from clarion.jobs where id = $1 for update", UUID(busy["id"]))
        answer = await beat(client, *tokens, lease="50s")
    assert [lease["token"] for lease in answer["leases"]] == tokens
    assert [(lease["status"], lease["state"]) for lease in answer["leases"]] == [
        ("lost", None),
        ("lost", "succeeded"),
        ("lost", "ready"),
        ("unchanged", "running"),
        ("extended", "running"),
        ("cancel", "running"),
        ("lost", None),
    ]
    left = [lease["lease"] for lease in answer["leases"]]
    assert left[:3] + left[6:] == [None] * 4
    assert left[3] <= 30 < left[4] <= 50
    assert left[5] <= 30
    assert answer["directive"] == "ok"


async def test_a_worker_without_leases_is_alive_and_hears_when_it_is_to_drain(
    client: httpx2.AsyncClient, store: Store
) -> None:
    assert await beat(client) == {"leases": [], "directive": "ok"}
    await client.post(f"/v1/workers/{WORKER}/drain")
    assert (await beat(client))["directive"] == "drain"


async def test_a_heartbeat_keeps_checkpoints(client: httpx2.AsyncClient, store: Store) -> None:
    lease = await claim_one(client, store)
    await beat(client, leases=[{"token": lease["token"], "checkpoint": {"row": 7}}])
    await beat(client, lease["token"])
    assert (await client.get(f"/v1/jobs/{lease['id']}")).json()["checkpoint"] == {"row": 7}


async def test_a_checkpoint_that_cannot_be_stored_costs_nobody_the_lease(
    client: httpx2.AsyncClient, store: Store
) -> None:
    await enqueue(store, 2)
    bad, good = (lease["token"] for lease in await claim(client, max=2))
    answer = await beat(
        client, leases=[{"token": bad, "checkpoint": {"a": ["\x00"]}}, {"token": good, "checkpoint": 1}]
    )
    assert [lease["status"] for lease in answer["leases"]] == ["extended", "extended"]
    assert answer["leases"][0]["refused"].startswith("checkpoint/a/0 holds \\u0000")
    assert "refused" not in answer["leases"][1]


@pytest.mark.parametrize(
    ("checkpoint", "why"),
    [
        (rb'"caf\ud83d"', "checkpoint holds half a surrogate pair"),
        (rb'{"a": [1, "\uDE00"]}', "checkpoint/a/1 holds half a surrogate pair"),
        (b"[" * 5_000 + b"]" * 5_000, f"checkpoint{'/0' * 64} nests deeper than 64 levels"),
        (b'{"a":' * 5_000 + b'"]}"' + b"}" * 5_000, f"checkpoint{'/a' * 64} nests deeper than 64 levels"),
        (b'"%s"' % (b"x" * 1_048_576), "checkpoint has 1048578 bytes, more than the 1048576 allowed"),
    ],
    ids=["half a pair", "the other half", "deep arrays", "deep objects", "large"],
)
async def test_a_checkpoint_that_cannot_even_be_read_costs_nobody_the_lease(
    client: httpx2.AsyncClient, store: Store, checkpoint: bytes, why: str
) -> None:
    await enqueue(store, 2)
    bad, good = (lease["token"].encode() for lease in await claim(client, max=2))
    kept = rb'["\ud83d\ude00", "\\ud83d"]'
    body = b'{"worker": "%s", "leases": [{"token": "%s", "checkpoint": %s}, {"token": "%s", "checkpoint": %s}]}' % (
        WORKER.encode(), bad, checkpoint, good, kept,
    )  # fmt: skip
    headers = {"content-type": "application/json"}
    answer = await client.post("/v1/leases/heartbeat", content=body, headers=headers)
    assert answer.status_code == 200, answer.text
    first, second = answer.json()["leases"]
    assert (first["status"], second["status"], "refused" in second) == ("extended", "extended", False)
    assert first["refused"].startswith(why)
    job_id = decode_lease_token(good.decode())[0]
    assert (await client.get(f"/v1/jobs/{job_id}")).json()["checkpoint"] == ["\N{GRINNING FACE}", "\\ud83d"]


async def test_a_lease_named_twice_is_answered_twice(client: httpx2.AsyncClient, store: Store) -> None:
    token = (await claim_one(client, store))["token"]
    answer = await beat(client, leases=[{"token": token}, {"token": token, "checkpoint": 2}])
    assert [lease["status"] for lease in answer["leases"]] == ["extended", "extended"]


async def test_a_heartbeat_without_a_length_extends_as_the_claim_asked(
    client: httpx2.AsyncClient, store: Store, database: Database
) -> None:
    await enqueue(store)
    [lease] = await claim(client, lease="100s")
    await database.fetch("update clarion.jobs set lease_expires_at = now() + interval '1 s'")
    answer = await beat(client, lease["token"])
    assert 90 < answer["leases"][0]["lease"] <= 100


@pytest.mark.parametrize(
    ("body", "wrong"),
    [
        ({}, {"/worker", "/leases"}),
        ({"worker": 1, "leases": {}, "lease": "1ms"}, {"/worker", "/leases", "/lease"}),
        ({"leases": ["t", {"checkpoint": 1}, {"x": 1, "token": "t"}]}, {"/leases/0", "/leases/1/token", "/leases/2/x"}),
        ({"leases": [{"token": "t"}] * 1001}, {"/leases"}),
    ],
)  # fmt: skip
async def test_every_mistake_of_a_heartbeat_is_listed(client: httpx2.AsyncClient, body: Any, wrong: set[str]) -> None:
    good = {} if body == {} else {"worker": WORKER, "leases": []}
    assert set(errors(await client.post("/v1/leases/heartbeat", json=good | body))) == wrong


# -- Progress --------------------------------------------------------------------------------------------------------


async def test_progress_is_kept_and_extends_the_lease(
    client: httpx2.AsyncClient, store: Store, database: Database
) -> None:
    lease = await claim_one(client, store)
    await database.fetch("update clarion.jobs set lease_expires_at = now() + interval '1 s'")
    answer = await say(client, lease, "progress", {"current": 3, "total": 10.5, "message": "so far\x00"})
    assert answer.json()["status"] == "extended"
    assert 20 < answer.json()["lease"] <= 30
    job = (await client.get(f"/v1/jobs/{lease['id']}")).json()
    assert job["progress"] == {"current": 3, "total": 10.5, "message": "so far\N{REPLACEMENT CHARACTER}"}


async def test_half_a_character_in_a_message_is_replaced_and_in_a_checkpoint_refused(
    client: httpx2.AsyncClient, store: Store
) -> None:
    lease = await claim_one(client, store)
    path, headers = f"/v1/leases/{lease['token']}/progress", {"content-type": "application/json"}
    answer = await client.post(path, content=rb'{"message": "so \ud83d", "checkpoint": [1]}', headers=headers)
    assert answer.json()["status"] == "extended"
    job = (await client.get(f"/v1/jobs/{lease['id']}")).json()
    assert (job["progress"]["message"], job["checkpoint"]) == ("so \N{REPLACEMENT CHARACTER}", [1])
    answer = await client.post(path, content=rb'{"checkpoint": ["\ud83d"]}', headers=headers)
    assert errors(answer)["/checkpoint/0"].startswith("holds half a surrogate pair")


async def test_progress_without_words_leaves_them_as_they_were(client: httpx2.AsyncClient, store: Store) -> None:
    lease = await claim_one(client, store)
    await say(client, lease, "progress", {"message": "half", "checkpoint": [1]})
    answer = await client.post(f"/v1/leases/{lease['token']}/progress")
    assert answer.json()["status"] == "extended"
    job = (await client.get(f"/v1/jobs/{lease['id']}")).json()
    assert (job["progress"], job["checkpoint"]) == ({"message": "half"}, [1])


async def test_progress_hears_of_a_cancellation(client: httpx2.AsyncClient, store: Store) -> None:
    lease = await claim_one(client, store)
    await store.cancel_jobs([UUID(lease["id"])], actor="api")
    assert (await say(client, lease, "progress", {"current": 1})).json()["status"] == "cancel"


@pytest.mark.parametrize(
    ("body", "wrong"),
    [
        ({"current": "1", "total": True, "message": 1}, {"/current", "/total", "/message"}),
        ({"current": 1e300, "total": -(10**30)}, {"/current", "/total"}),
        ({"checkpoint": {"a": "\x00"}, "percent": 1}, {"/checkpoint/a", "/percent"}),
        ([], {""}),
    ],
)
async def test_every_mistake_of_a_progress_is_listed(
    client: httpx2.AsyncClient, store: Store, body: Any, wrong: set[str]
) -> None:
    lease = await claim_one(client, store)
    assert set(errors(await say(client, lease, "progress", body))) == wrong


# -- Log lines -------------------------------------------------------------------------------------------------------


async def test_log_lines_are_kept_once(client: httpx2.AsyncClient, store: Store) -> None:
    lease = await claim_one(client, store)
    lines = [{"n": 1, "message": "a"}, {"n": 2, "level": "error", "message": "b", "fields": {"x": 1}}]
    for _ in range(2):
        assert (await say(client, lease, "logs", {"lines": lines})).json() == {"kept": 2, "dropped": 0}
    stored = await store.list_logs(UUID(lease["id"]), after=None, limit=9)
    assert [(line.n, line.level, line.message, line.fields) for line in stored] == [
        (1, "info", "a", None),
        (2, "error", "b", '{"x":1}'),
    ]


async def test_lines_beyond_the_limit_of_a_job_are_counted(database: Database, settings: Settings) -> None:
    changed = msgspec.structs.replace(settings, job_log_max_lines=2)
    services = services_over(Store(database, changed), changed)
    async with client_of(services) as client:
        lease = await claim_one(client, services.store)
        lines = [{"n": n, "message": "a"} for n in (1, 2, 3, 4)]
        assert (await say(client, lease, "logs", {"lines": lines})).json() == {"kept": 2, "dropped": 2}


async def test_long_messages_are_cut_and_halves_of_characters_replaced(
    client: httpx2.AsyncClient, store: Store
) -> None:
    lease = await claim_one(client, store)
    body = rb'{"lines": [{"n": 1, "message": "%s"}, {"n": 2, "message": "\ud83d, \ud83d\ude00, \\ud83d"}]}' % (
        b"x" * 9000
    )
    answer = await client.post(
        f"/v1/leases/{lease['token']}/logs", content=body, headers={"content-type": "application/json"}
    )
    assert answer.json() == {"kept": 2, "dropped": 0}
    long, half = (line.message for line in await store.list_logs(UUID(lease["id"]), after=None, limit=9))
    assert 4000 < len(long) <= 4096
    assert half == "\N{REPLACEMENT CHARACTER}, \N{GRINNING FACE}, \\ud83d"


@pytest.mark.parametrize(
    ("lines", "wrong"),
    [
        ("x", {"/lines"}),
        ([{}], {"/lines/0/n", "/lines/0/message"}),
        ([{"n": 0, "message": 1, "x": 1}], {"/lines/0/n", "/lines/0/message", "/lines/0/x"}),
        ([{"n": 1, "message": "a", "level": "Info!"}], {"/lines/0/level"}),
        ([{"n": 1, "message": "a"}, {"n": 2**31, "message": "a", "fields": []}], {"/lines/1/n", "/lines/1/fields"}),
        ([{"n": 1, "message": "a", "fields": {"a": "x" * 4096}}], {"/lines/0/fields"}),
        ([{"n": 1, "message": "a", "fields": {"a": "\x00"}}], {"/lines/0/fields/a"}),
        ([{"n": 1, "message": "a"}] * 1001, {"/lines"}),
    ],
)  # fmt: skip
async def test_every_mistake_of_log_lines_is_listed(
    client: httpx2.AsyncClient, store: Store, lines: Any, wrong: set[str]
) -> None:
    lease = await claim_one(client, store)
    assert set(errors(await say(client, lease, "logs", {"lines": lines}))) == wrong


async def test_fields_may_be_null(client: httpx2.AsyncClient, store: Store) -> None:
    lease = await claim_one(client, store)
    lines = [{"n": 1, "message": "a", "fields": None}]
    assert (await say(client, lease, "logs", {"lines": lines})).json() == {"kept": 1, "dropped": 0}


# -- After the end ---------------------------------------------------------------------------------------------------

ERROR = {"type": "Oops", "message": "no luck"}


@pytest.mark.parametrize(
    ("verb", "body"),
    [
        ("complete", {"result": 1}),
        ("fail", {"error": ERROR}),
        ("fail", {"error": ERROR, "retryable": False}),
        ("fail", {"error": ERROR, "outcome": "timeout"}),
        ("snooze", {"delay": "1h"}),
        ("release", None),
    ],
    ids=["complete", "fail", "dead", "timeout", "snooze", "release"],
)
async def test_what_a_worker_said_of_a_job_that_it_has_ended_since_is_not_told_that_its_lease_was_lost(
    client: httpx2.AsyncClient, store: Store, verb: str, body: Any
) -> None:
    lease = await claim_one(client, store)
    await say(client, lease, "logs", {"lines": [{"n": 1, "message": "a"}]})
    assert (await say(client, lease, verb, body)).status_code == 200
    answer = await say(client, lease, "progress", {"current": 1})
    assert (answer.status_code, answer.json()) == (200, {"status": "ended", "lease": None})
    answer = await say(client, lease, "logs", {"lines": [{"n": n, "message": "a"} for n in (1, 2)]})
    assert (answer.status_code, answer.json()) == (200, {"kept": 1, "dropped": 1})


# -- Tokens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verb", "body"), [("progress", {"current": 1}), ("logs", {"lines": [{"n": 1, "message": "a"}]})]
)
async def test_a_lost_lease_is_told_with_the_state_of_the_job(
    client: httpx2.AsyncClient, store: Store, database: Database, verb: str, body: Any
) -> None:
    lease = await claim_one(client, store)
    await lose(store, database, lease)
    answer = await say(client, lease, verb, body)
    assert (answer.status_code, answer.json()["type"], answer.json()["state"]) == (409, "/problems/lease-lost", "ready")
    strange = {"token": encode_lease_token(uuid4(), uuid4())}
    answer = await say(client, strange, verb, body)
    assert (answer.status_code, answer.json()["state"]) == (409, None)


def test_a_token_has_one_text() -> None:
    job_id, token = uuid4(), uuid4()
    text = encode_lease_token(job_id, token)
    assert decode_lease_token(text) == (job_id, token)
    found = {last: _job_of(f"{text[:-1]}{last}") for last in f"{ascii_letters}{digits}-_"}
    assert found[text[-1]] == job_id
    # The last letter holds four bits; of the other 48 letters none is taken.
    assert sum(job is not None for job in found.values()) == 16


@pytest.mark.parametrize("change", ["{}=", "{}A", " {}", "{}\n", "{}{}", "", "ü"])
def test_what_decodes_to_the_same_is_not_the_same(change: str) -> None:
    text = encode_lease_token(uuid4(), uuid4())
    assert _job_of(change.format(text, text)) is None
    assert _job_of(text[:-1]) is None


def _job_of(text: str) -> UUID | None:
    try:
        return decode_lease_token(text)[0]
    except ValueError:
        return None


@pytest.mark.parametrize("token", ["x", "%00", "a" * 43, "a" * 3000, "00000000-0000-0000-0000-000000000000", "%C3%BC"])
@pytest.mark.parametrize("verb", ["progress", "logs", "complete", "fail", "snooze", "release"])
async def test_a_text_that_is_no_token_is_not_found(client: httpx2.AsyncClient, token: str, verb: str) -> None:
    bodies = {
        "logs": {"lines": []},
        "fail": {"error": {"type": "E", "message": ""}},
        "snooze": {"delay": 1},
    }
    answer = await client.post(f"/v1/leases/{token}/{verb}", json=bodies.get(verb, {}))
    assert (answer.status_code, answer.json()["type"]) == (404, "/problems/not-found")


async def test_a_claim_says_how_long_it_waited(services: Services, client: httpx2.AsyncClient, store: Store) -> None:
    answers: list[httpx2.Response] = []

    async def ask() -> None:
        body = {"worker": WORKER, "queues": ["default"], "wait": "20s"}
        answers.append(await client.post("/v1/leases", json=body))

    sent = anyio.current_time()
    async with anyio.create_task_group() as group:
        group.start_soon(ask)
        while not services.claims.waiting:
            await anyio.lowlevel.checkpoint()
        for _ in range(20):  # by then it has looked, and found nothing
            await store.next_due_seconds()
        await enqueue(store)
        services.claims.hear(Ring({"default": Ready(1, LONG_AGO)}))
    [answer] = answers
    assert 0 < answer.json()["waited"] <= anyio.current_time() - sent
