"""What only a real server and a raw socket show: bodies cut off before they are held, and clients that misbehave."""

import contextlib
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import anyio
import msgspec
import pytest
import structlog
from anyio.abc import SocketStream
from starlette.types import ASGIApp, Receive, Scope, Send

from api_harness import listening, read_answer, services_over
from clarion.api import problems, requests
from clarion.api.decoding import Form, Nothing
from clarion.api.operation import Call, Operation
from clarion.api.services import Services
from clarion.job import JobFilter
from clarion.main import bind, serve
from clarion.settings import Settings
from clarion.store import Store

HEAD = "POST {path} HTTP/1.1\r\nhost: clarion\r\ncontent-type: {media_type}\r\n{header}\r\n\r\n"
CHUNKED = "transfer-encoding: chunked"


@pytest.fixture
def services(store: Store, settings: Settings) -> Services:
    return services_over(store, settings, body_max_bytes=10_000, batch_body_max_bytes=50_000)


@asynccontextmanager
async def post(
    port: int, header: str, *, path: str = "/v1/jobs", media_type: str = "application/json"
) -> AsyncIterator[SocketStream]:
    """A connection on which the head of a request has been sent."""
    async with await anyio.connect_tcp("127.0.0.1", port) as stream:
        await stream.send(HEAD.format(path=path, header=header, media_type=media_type).encode())
        yield stream


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


async def is_closed(stream: SocketStream) -> bool:
    """Waits for the other side to hang up."""
    try:
        while True:
            await stream.receive()
    except (anyio.EndOfStream, anyio.BrokenResourceError):
        return True


async def send_for_ever(stream: SocketStream) -> None:
    """Sends until the other side hangs up."""
    with contextlib.suppress(anyio.BrokenResourceError):
        while True:
            await stream.send(chunk(b"x" * 60_000))


@pytest.mark.parametrize(("path", "size"), [("/v1/jobs", 10_001), ("/v1/jobs/batch", 50_001), ("/v1/jobs", 10**11)])
async def test_a_body_that_says_it_is_over_the_limit_is_refused_unread(
    services: Services, path: str, size: int
) -> None:
    async with listening(services) as port, post(port, f"content-length: {size}", path=path) as stream:
        status, body = await read_answer(stream)
        assert (status, msgspec.json.decode(body)["type"]) == (413, "/problems/too-large")
        await stream.send_eof()
        assert await is_closed(stream)


async def test_a_chunked_body_is_cut_off_once_it_is_over_the_limit(services: Services) -> None:
    async with listening(services) as port, post(port, CHUNKED) as stream:
        for _ in range(10):
            await stream.send(chunk(b"x" * 1_000))
        # Just the limit has arrived: the server still waits for more.
        with anyio.move_on_after(0.05) as scope:
            await stream.receive()
        assert scope.cancelled_caught
        await stream.send(chunk(b"x"))
        status, _ = await read_answer(stream)
        assert status == 413


async def test_a_client_that_goes_on_sending_still_reads_the_413(services: Services) -> None:
    async with listening(services) as port, post(port, "content-length: 3000000") as stream:
        for _ in range(300):
            await stream.send(b"x" * 10_000)
        status, _ = await read_answer(stream)
        assert status == 413
        assert await is_closed(stream)


async def test_an_endless_body_is_neither_held_nor_read_for_ever(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(problems, "LINGER_SECONDS", 0.3)
    tracemalloc.start()
    try:
        async with listening(services) as port, post(port, CHUNKED) as stream:
            with anyio.fail_after(10):
                await send_for_ever(stream)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 5_000_000


async def test_a_body_is_asked_for_only_when_it_will_be_read(services: Services) -> None:
    expect = "expect: 100-continue\r\ncontent-length: {0}"
    async with listening(services) as port:
        async with post(port, expect.format(20_000)) as stream:
            assert (await read_answer(stream))[0] == 413
        async with post(port, expect.format(15)) as stream:
            assert await stream.receive() == b"HTTP/1.1 100 Continue\r\n\r\n"
            await stream.send(b'{"task":"work"}')
            assert (await read_answer(stream))[0] == 201


async def test_a_body_that_stops_arriving_is_given_up(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "BODY_IDLE_SECONDS", 0.05)
    async with listening(services) as port, post(port, "content-length: 100") as stream:
        await stream.send(b'{"task":')
        status, body = await read_answer(stream)
        assert (status, msgspec.json.decode(body)["retryable"]) == (408, True)
        assert await is_closed(stream)


async def test_beyond_what_all_bodies_may_hold_together_a_request_is_told_to_come_back(services: Services) -> None:
    bodies = requests.Bodies(max_bytes=12_000)
    services = msgspec.structs.replace(services, bodies=bodies)
    job = b'{"task":"work"}'
    async with listening(services) as port:
        async with post(port, "content-length: 9000") as one, post(port, "content-length: 9000") as two:
            await one.send(job.ljust(8_000))
            while bodies.held_bytes < 8_000:
                await anyio.lowlevel.checkpoint()
            await two.send(job.ljust(9_000))
            status, body = await read_answer(two)
            assert (status, msgspec.json.decode(body)["type"]) == (503, "/problems/overloaded")
            await one.send(b" " * 1_000)
            assert (await read_answer(one))[0] == 201
        assert bodies.held_bytes == 0
        async with post(port, "content-length: 9000") as again:
            await again.send(job.ljust(9_000))
            assert (await read_answer(again))[0] == 201


async def test_lines_are_held_until_they_are_enqueued_and_beyond_the_bound_each_is_told(services: Services) -> None:
    bodies = requests.Bodies(max_bytes=40)
    services = msgspec.structs.replace(services, bodies=bodies)
    lines = b'{"task":"work"}\n' * 3
    header = f"content-length: {len(lines)}"
    async with (
        listening(services) as port,
        post(port, header, path="/v1/jobs/batch", media_type="application/x-ndjson") as stream,
    ):
        await stream.send(lines)
        status, answer = await read_answer(stream)
    said = [msgspec.json.decode(line) for line in answer.splitlines()]
    assert (status, ["id" in line for line in said], bodies.held_bytes) == (200, [True, True, False], 0)
    assert said[2]["error"]["type"] == "/problems/overloaded"


async def test_what_is_there_is_had_at_once_and_what_is_not_is_waited_for_by_nobody() -> None:
    coming, ended = anyio.Event(), False

    async def at_hand() -> str:
        return "it"

    async def not_yet() -> str:
        nonlocal ended
        try:
            await coming.wait()
        finally:
            ended = True
        return "it"

    async def broken() -> str:
        raise OSError("no")

    assert requests.at_once(at_hand()) == "it"
    assert requests.at_once(not_yet()) is None
    assert ended
    with pytest.raises(OSError, match="no"):
        requests.at_once(broken())
    await anyio.lowlevel.checkpoint()  # the task is as sound as before


@pytest.mark.parametrize("media_type", ["application/json", "application/x-ndjson"])
async def test_a_body_that_is_half_sent_when_the_server_stops_is_answered_and_soon(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, media_type: str
) -> None:
    monkeypatch.setattr(requests, "SHUTDOWN_GRACE_SECONDS", 0.05)
    stop, started, socket = anyio.Event(), anyio.Event(), bind(settings, "127.0.0.1", 0)
    async with anyio.create_task_group() as group:
        group.start_soon(partial(serve, settings, listening=socket, stop=stop, started=started.set))
        await started.wait()
        expect = "expect: 100-continue\r\ncontent-length: 100"
        port = socket.getsockname()[1]
        async with post(port, expect, path="/v1/jobs/batch", media_type=media_type) as stream:
            assert (await stream.receive()).startswith(b"HTTP/1.1 100")  # the body is being read
            await stream.send(b'{"task":')
            stop.set()
            with anyio.fail_after(5):
                status, body = await read_answer(stream)
            assert (status, msgspec.json.decode(body)["type"]) == (503, "/problems/unavailable")


async def test_a_text_that_is_no_token_is_told_before_the_body_is_read(services: Services) -> None:
    async with (
        listening(services) as port,
        post(port, "content-length: 40000", path="/v1/leases/x/complete") as stream,
    ):
        with anyio.fail_after(5):
            assert (await read_answer(stream))[0] == 404


@pytest.mark.parametrize("media_type", ["application/json", "application/x-ndjson"])
async def test_a_client_that_hangs_up_in_its_body_leaves_no_job_and_no_traceback(
    services: Services, media_type: str
) -> None:
    with structlog.testing.capture_logs() as lines:
        async with listening(services) as port:
            async with post(port, "content-length: 100", path="/v1/jobs/batch", media_type=media_type) as stream:
                await stream.send(b'{"task":"work"}\n')
            while not lines:
                await anyio.lowlevel.checkpoint()
    assert [(line["status"], line["log_level"]) for line in lines] == [(499, "info")]
    assert await services.store.list_jobs(JobFilter(), limit=1) == []


async def test_a_thousand_clients_that_hang_up_leave_the_pool_whole(services: Services) -> None:
    async def hang_up(port: int) -> None:
        async with post(port, "content-length: 15") as stream:
            await stream.send(b'{"task":"work"}')

    with structlog.testing.capture_logs() as lines:
        async with listening(services) as port:
            for _ in range(10):
                async with anyio.create_task_group() as group:
                    for _ in range(100):
                        group.start_soon(hang_up, port)
            while len(lines) < 1_000:
                await anyio.lowlevel.checkpoint()
            async with post(port, "content-length: 15") as stream:
                await stream.send(b'{"task":"work"}')
                assert (await read_answer(stream))[0] == 201
    assert {line["log_level"] for line in lines} == {"info"}


async def test_slow_bodies_do_not_keep_others_waiting(services: Services) -> None:
    async with listening(services) as port, anyio.create_task_group() as group:

        async def dawdle(*, task_status: anyio.abc.TaskStatus[None]) -> None:
            async with post(port, "content-length: 100") as stream:
                await stream.send(b"{")
                task_status.started()
                await anyio.sleep_forever()

        for _ in range(200):
            await group.start(dawdle)
        async with post(port, "content-length: 15") as stream:
            await stream.send(b'{"task":"work"}')
            assert (await read_answer(stream))[0] == 201
        group.cancel_scope.cancel()


async def test_a_client_that_sends_everything_before_it_reads_is_answered(services: Services) -> None:
    """Three megabytes each way is more than both sockets' buffers hold."""
    lines = 25_000
    body = (b'{"task":"work"}'.ljust(120) + b"\n") * lines
    header = f"content-length: {len(body)}"
    async with (
        listening(services) as port,
        post(port, header, path="/v1/jobs/batch", media_type="application/x-ndjson") as stream,
    ):
        await stream.send(body)
        status, answer = await read_answer(stream)
    assert (status, answer.count(b"\n")) == (200, lines)


@pytest.mark.parametrize(
    "target",
    [
        "//v1/jobs",
        "/v1//jobs",
        "/v1/jobs/",
        "/v1/%2e/jobs",
        "/%2e%2e/v1/jobs",
        "/v1/jobs%0a",
        "/v1/jobs%00",
        "/V1/jobs",
    ],
)  # fmt: skip
async def test_a_path_that_is_not_a_route_is_not_found(services: Services, target: str) -> None:
    async with listening(services) as port, post(port, "content-length: 15", path=target) as stream:
        await stream.send(b'{"task":"work"}')
        assert (await read_answer(stream))[0] == 404


async def test_a_connection_is_kept_for_the_next_request_after_a_problem(services: Services) -> None:
    async with listening(services) as port, post(port, "content-length: 2") as stream:
        await stream.send(b"{}")
        assert (await read_answer(stream))[0] == 422
        head = HEAD.format(path="/v1/jobs", header="content-length: 15", media_type="application/json")
        await stream.send(head.encode() + b'{"task":"work"}')
        assert (await read_answer(stream))[0] == 201


async def test_an_answer_that_breaks_off_in_the_middle_does_not_look_whole(services: Services) -> None:
    async def break_off(call: Call[Nothing, Nothing]) -> ASGIApp:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"10")]})
            await send({"type": "http.response.body", "body": b"half", "more_body": True})
            raise ZeroDivisionError

        return app

    operation = Operation(
        method="POST",
        path="/break",
        summary="",
        handler=break_off,
        permission=None,
        body=Nothing,
        query=Nothing,
        responds=Form,
    )
    with structlog.testing.capture_logs() as lines:
        async with listening(services, operation) as port, post(port, "content-length: 0", path="/break") as stream:
            with pytest.raises(anyio.EndOfStream):
                await read_answer(stream)
    assert [(line["log_level"], line["status"]) for line in lines] == [("error", 200)]
