"""The HTTP API without a socket: each request is answered as `clarion serve` on this database would.

What answers is opened for the request and closed after it, so these transports belong to no event loop and to no test:
a fixture may make a client, and tests on other loops may use it.
"""

import httpx2
from anyio.from_thread import start_blocking_portal

from clarion.api.app import create_app
from clarion.db import open_database
from clarion.main import running_services
from clarion.settings import Settings
from clarion.store import Store


class InProcess(httpx2.AsyncBaseTransport):
    """For an AsyncClient."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """The answer, which is whole when this returns."""
        async with open_database(self._settings, name="testing") as database:
            store = Store(database, self._settings)
            async with running_services(store, self._settings) as services:
                return await httpx2.ASGITransport(create_app(services)).handle_async_request(request)


class BlockingInProcess(httpx2.BaseTransport):
    """For a Client; it answers from a thread with an event loop of its own."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        """The answer, read whole."""
        with start_blocking_portal() as portal:
            return portal.call(self._answer, request.method, request.url, request.headers, request.read())

    async def _answer(self, method: str, url: httpx2.URL, headers: httpx2.Headers, body: bytes) -> httpx2.Response:
        request = httpx2.Request(method, url, headers=headers, content=body)
        response = await InProcess(self._settings).handle_async_request(request)
        return httpx2.Response(response.status_code, headers=response.headers, content=await response.aread())
