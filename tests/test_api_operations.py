"""What holds for every route: the registry, problems, request ids and the log line."""

import re
from typing import Any

import httpx2
import msgspec
import pytest
import structlog
from starlette.requests import ClientDisconnect

from api_harness import app_with
from clarion.api.access import Permission
from clarion.api.app import OPERATIONS
from clarion.api.decoding import Form, Nothing
from clarion.api.operation import Call, Operation, Reply
from clarion.api.problems import PROBLEM_JSON
from clarion.api.services import Services
from clarion.errors import (
    ClarionError,
    Invalid,
    Overloaded,
    RequestTimeout,
    TooLarge,
    Unauthenticated,
    Unavailable,
    problems,
)
from clarion.events import Event

JOB_ID = "0191e7a0-0000-7000-8000-000000000000"


# -- The registry ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: f"{operation.method} {operation.path}")
def test_every_v1_route_asks_for_a_permission_and_no_other_does(operation: Operation[Any, Any]) -> None:
    assert bool(operation.permission) == operation.path.startswith("/v1/")


def test_no_operation_is_declared_twice() -> None:
    keys = [(operation.method, operation.path, operation.media_type) for operation in OPERATIONS]
    assert len(keys) == len(set(keys))


def test_every_permission_is_asked_for_somewhere() -> None:
    assert {operation.permission for operation in OPERATIONS} == {None, *Permission}


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: f"{operation.method} {operation.path}")
def test_an_operation_names_the_problems_that_follow_from_its_fields(operation: Operation[Any, Any]) -> None:
    assert Invalid in operation.all_problems
    assert (Unauthenticated in operation.all_problems) == bool(operation.permission)
    assert (TooLarge in operation.all_problems) == operation.takes_body


def test_the_answers_of_every_operation_have_a_schema() -> None:
    kinds = {operation.responds for operation in OPERATIONS} | {operation.query for operation in OPERATIONS}
    msgspec.json.schema_components(
        [*kinds, *(operation.lines or operation.body for operation in OPERATIONS)],
        schema_hook=lambda _: {},
    )


# -- Problems ----------------------------------------------------------------------------------------------------


async def test_a_problem_is_a_whole_document(client: httpx2.AsyncClient) -> None:
    answer = await client.post("/v1/jobs?x=1", json={})
    assert answer.headers["content-type"] == PROBLEM_JSON
    assert answer.json() == {
        "type": "/problems/invalid",
        "title": "Invalid request",
        "status": 422,
        "detail": "x: is not known here",
        "instance": "/v1/jobs",
        "request_id": answer.headers["x-request-id"],
        "retryable": False,
        "errors": [{"parameter": "x", "detail": "is not known here"}],
    }


async def test_a_route_that_does_not_exist_is_a_problem(client: httpx2.AsyncClient) -> None:
    answer = await client.get("/nowhere")
    assert (answer.status_code, answer.headers["content-type"]) == (404, PROBLEM_JSON)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("DELETE", "/v1/jobs", "GET, HEAD, POST"),
        ("GET", "/v1/jobs/batch", "POST"),
        ("POST", f"/v1/jobs/{JOB_ID}", "GET, HEAD, PATCH"),
        ("GET", f"/v1/jobs/{JOB_ID}/cancel", "POST"),
        ("OPTIONS", "/livez", "GET, HEAD"),
        ("POST", "/problems", "GET, HEAD"),
    ],
)
async def test_a_method_that_is_not_allowed_says_which_are(
    client: httpx2.AsyncClient, method: str, path: str, allowed: str
) -> None:
    answer = await client.request(method, path)
    assert (answer.status_code, answer.headers["allow"]) == (405, allowed)
    assert answer.json()["type"] == "/problems/method-not-allowed"


@pytest.mark.parametrize("path", ["/v1/jobs", "/livez", "/readyz", "/problems", f"/v1/jobs/{JOB_ID}"])
async def test_head_answers_like_get_without_a_body(client: httpx2.AsyncClient, path: str) -> None:
    get, head = await client.get(path), await client.head(path)
    assert (head.status_code, head.content) == (get.status_code, b"")
    assert head.headers["content-type"] == get.headers["content-type"]


async def test_every_problem_type_leads_to_its_page(client: httpx2.AsyncClient) -> None:
    listed = (await client.get("/problems")).json()["problems"]
    assert [page["type"] for page in listed] == [f"/problems/{problem.slug}" for problem in problems()]
    for page in listed:
        assert (await client.get(page["type"])).json() == page
    assert (await client.get("/problems/none-of-these")).status_code == 404


# -- Routes that fail ----------------------------------------------------------------------------------------------


def failing_client(services: Services, error: BaseException) -> httpx2.AsyncClient:
    """A client of an application with one more route, `/fail`, that raises the error."""

    async def fail(call: Call[Nothing, Nothing]) -> Reply:
        raise error

    operation = Operation(
        method="GET",
        path="/fail",
        summary="",
        handler=fail,
        permission=None,
        body=Nothing,
        query=Nothing,
        responds=Form,
    )
    transport = httpx2.ASGITransport(app_with(services, operation))
    return httpx2.AsyncClient(transport=transport, base_url="http://clarion")


@pytest.mark.parametrize("error", [Unavailable("away"), Overloaded("full")])
async def test_weather_says_when_to_come_back(services: Services, error: Unavailable) -> None:
    async with failing_client(services, error) as client:
        answer = await client.get("/fail")
    assert (answer.status_code, answer.headers["retry-after"], answer.json()["retryable"]) == (503, "1", True)


async def test_a_bug_is_a_500_that_tells_nothing_but_the_request_id(services: Services) -> None:
    bug = ZeroDivisionError("secret")
    with structlog.testing.capture_logs() as lines:
        async with failing_client(services, bug) as client:
            answer = await client.get("/fail")
    assert (answer.status_code, answer.headers["content-type"]) == (500, PROBLEM_JSON)
    assert answer.json()["request_id"] == answer.headers["x-request-id"]
    assert "secret" not in answer.text
    assert "ZeroDivisionError" not in answer.text
    [line] = lines
    assert (line["log_level"], line["exc_info"], line["problem"], line["status"]) == ("error", bug, "internal", 500)


async def test_a_client_that_went_away_leaves_one_line_and_no_traceback(services: Services) -> None:
    with structlog.testing.capture_logs() as lines:
        async with failing_client(services, ClientDisconnect()) as client:
            with pytest.raises(AssertionError):  # the transport's own: nobody was answered
                await client.get("/fail")
    [line] = lines
    assert (line["log_level"], line["status"]) == ("info", 499)
    assert "exc_info" not in line


@pytest.mark.parametrize("error", [TooLarge("big"), RequestTimeout("slow")])
async def test_a_body_that_was_not_read_to_its_end_closes_the_connection(
    services: Services, error: ClarionError
) -> None:
    async with failing_client(services, error) as client:
        answer = await client.get("/fail")
    assert answer.headers["connection"] == "close"


# -- Request ids and log lines ---------------------------------------------------------------------------------------


async def test_a_request_id_is_made_when_none_is_given(client: httpx2.AsyncClient) -> None:
    first, second = await client.get("/livez"), await client.get("/livez")
    assert re.fullmatch("[0-9a-f]{32}", first.headers["x-request-id"])
    assert first.headers["x-request-id"] != second.headers["x-request-id"]


@pytest.mark.parametrize("given", ["abc", "A.b_c-9", "x" * 64])
async def test_a_harmless_request_id_is_kept(client: httpx2.AsyncClient, given: str) -> None:
    assert (await client.get("/livez", headers={"x-request-id": given})).headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "a b", "x" * 65, "<script>", "a,b", "é"])
async def test_any_other_request_id_is_replaced(client: httpx2.AsyncClient, given: str) -> None:
    answer = await client.get("/livez", headers={b"x-request-id": given.encode()})
    assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])


async def test_a_request_leaves_one_canonical_line(client: httpx2.AsyncClient) -> None:
    with structlog.testing.capture_logs([structlog.contextvars.merge_contextvars]) as lines:
        answer = await client.get(f"/v1/jobs/{JOB_ID}?wait=0", headers={"x-request-id": "mine"})
    [line] = lines
    assert line.pop("duration_ms") >= 0
    assert line == {
        "event": Event.REQUEST_FINISHED,
        "log_level": "info",
        "request_id": "mine",
        "method": "GET",
        "route": "/v1/jobs/{id}",
        "status": 404,
        "problem": "not-found",
        "request_bytes": 0,
        "response_bytes": len(answer.content),
    }


async def test_the_line_counts_the_bytes_of_the_body(client: httpx2.AsyncClient) -> None:
    with structlog.testing.capture_logs() as lines:
        await client.post("/v1/jobs", content=b'{"task":"work"}')
    assert (lines[0]["request_bytes"], lines[0]["status"]) == (15, 201)
    assert "problem" not in lines[0]


@pytest.mark.parametrize("path", ["/livez", "/readyz"])
async def test_health_is_logged_at_debug_level(client: httpx2.AsyncClient, path: str) -> None:
    with structlog.testing.capture_logs() as lines:
        await client.get(path)
    assert [line["log_level"] for line in lines] == ["debug"]


@pytest.mark.parametrize("path", ["/livez", "/v1/jobs", "/nowhere"])
async def test_no_answer_is_sniffed_for_its_type(client: httpx2.AsyncClient, path: str) -> None:
    assert (await client.get(path)).headers["x-content-type-options"] == "nosniff"
