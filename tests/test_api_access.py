"""Who may call what: every route with and without the token, and paths that are no routes."""

from collections.abc import AsyncIterator

import httpx2
import pytest
from starlette.datastructures import Headers

from api_harness import ask, client_of, services_over
from clarion.api.access import Guard, Permission
from clarion.api.app import OPERATIONS, create_app
from clarion.api.services import Services
from clarion.errors import (
    Unauthenticated,
)
from clarion.settings import Settings
from clarion.store import Store

TOKEN = "a-tökén"  # noqa: S105  a test's
JOB_ID = "0191e7a0-0000-7000-8000-000000000000"
V1 = sorted({(operation.method, operation.path) for operation in OPERATIONS if operation.path.startswith("/v1")})
OPEN = sorted({(operation.method, operation.path) for operation in OPERATIONS if not operation.path.startswith("/v1")})


@pytest.fixture
def guarded(store: Store, settings: Settings) -> Services:
    return services_over(store, settings, api_token=TOKEN)


def address(path: str) -> str:
    """A path whose parameters are filled in."""
    return path.replace("{id}", JOB_ID).replace("{slug}", "invalid")


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": ""},
        {"authorization": "Bearer"},
        {"authorization": "Bearer "},
        {"authorization": "Bearer wrong"},
        {"authorization": f"Bearer {TOKEN}x"},
        {"authorization": f"Bearer {TOKEN[:-1]}"},
        {"authorization": f"Basic {TOKEN}"},
        {"authorization": TOKEN},
        {"x-api-key": ""},
        {"x-api-key": "wrong"},
        {"authorization": "Bearer wrong", "x-api-key": TOKEN},
        {"cookie": f"token={TOKEN}"},
        {"x-http-method-override": "GET"},
    ],
)
async def test_without_the_token_no_method_of_a_v1_route_answers(guarded: Services, headers: dict[str, str]) -> None:
    app = create_app(guarded)
    for method in ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "FOO"]:
        for _, path in V1:
            assert (await ask(app, method, address(path), headers))[0] == 401


@pytest.mark.parametrize(
    "headers", [{"authorization": f"Bearer {TOKEN}"}, {"authorization": f"bearer  {TOKEN}"}, {"x-api-key": TOKEN}]
)
@pytest.mark.parametrize(("method", "path"), V1)
async def test_with_the_token_every_v1_route_answers(
    guarded: Services, method: str, path: str, headers: dict[str, str]
) -> None:
    status, _ = await ask(create_app(guarded), method, address(path), headers)
    assert status in {200, 404, 400}


@pytest.mark.parametrize(("method", "path"), V1)
async def test_without_a_configured_token_every_v1_route_is_open(services: Services, method: str, path: str) -> None:
    status, _ = await ask(create_app(services), method, address(path), {"authorization": "Bearer whatever"})
    assert status in {200, 404, 400}


@pytest.mark.parametrize(("method", "path"), OPEN)
async def test_health_and_problem_pages_need_no_token(guarded: Services, method: str, path: str) -> None:
    assert (await ask(create_app(guarded), method, address(path)))[0] == 200


async def test_a_refusal_says_how_to_authenticate(guarded: Services) -> None:
    async with client_of(guarded) as client:
        answer = await client.get("/v1/jobs")
    assert answer.headers["www-authenticate"].startswith("Bearer")
    assert answer.json()["type"] == "/problems/unauthenticated"


async def test_access_is_checked_before_the_body_is_read(guarded: Services) -> None:
    read: list[bytes] = []

    async def body() -> AsyncIterator[bytes]:
        read.append(b"{}")
        yield b"{}"

    async with client_of(guarded) as client:
        assert (await client.post("/v1/jobs", content=body())).status_code == 401
    assert not read


@pytest.mark.parametrize(
    "trick",
    [
        "/{0}",
        "{0}/",
        "{0}//",
        "{0}/.",
        "{0}\n",
        "{0}%0a",
        "{0};x",
        "/.{0}",
        "/x/..{0}",
        "{0}/../jobs",
        "/%2e{0}",
        "{0}.json",
    ],
)
async def test_a_path_that_is_not_a_route_is_not_found(guarded: Services, trick: str) -> None:
    app = create_app(guarded)
    for path in sorted({path for _, path in V1 + OPEN}):
        status, problem = await ask(app, "GET", trick.format(address(path)), {"authorization": f"Bearer {TOKEN}"})
        assert (status, problem["type"]) == (404, "/problems/not-found")


@pytest.mark.parametrize(
    ("site", "status"), [("cross-site", 403), ("same-site", 403), ("same-origin", 201), ("none", 201)]
)
async def test_without_a_token_the_page_of_another_site_cannot_enqueue(
    client: httpx2.AsyncClient, site: str, status: int
) -> None:
    answer = await client.post("/v1/jobs", content=b'{"task":"work"}', headers={"sec-fetch-site": site})
    assert answer.status_code == status


def test_a_guard_without_a_token_lets_everybody_in() -> None:
    Guard("").check(Headers({}), Permission.READ)
    with pytest.raises(Unauthenticated):
        Guard("x").check(Headers({}), Permission.READ)


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8080", "EVIL.example.", "127.0.0.1.evil.example"])
async def test_without_a_token_nobody_is_led_here_by_a_name(client: httpx2.AsyncClient, host: str) -> None:
    for method, path in (("GET", "/v1/jobs"), ("POST", "/v1/jobs")):
        answer = await client.request(method, path, headers={"host": host})
        assert (answer.status_code, answer.json()["type"]) == (403, "/problems/forbidden")


@pytest.mark.parametrize(
    "host", ["127.0.0.1:8080", "[::1]:8080", "localhost", "clarion", "app.localhost:80", "10.0.0.7"]
)
async def test_without_a_token_this_machine_may_be_called_by_its_address(client: httpx2.AsyncClient, host: str) -> None:
    assert (await client.get("/v1/jobs", headers={"host": host})).status_code == 200
