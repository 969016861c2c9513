"""The HTTP application: every operation there is, and what stands around them."""

from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.types import Lifespan

from clarion.api import attempt_ends, batch, commands, dead, health, history, jobs, leases, problem_pages, workers
from clarion.api.access import Guard
from clarion.api.middleware import RequestLog
from clarion.api.operation import Operation, routes
from clarion.api.problems import answer_clarion_error, answer_http_exception
from clarion.api.services import Services
from clarion.errors import ClarionError

# What is called once a job or more often comes first.
OPERATIONS: tuple[Operation[Any, Any], ...] = (
    *jobs.OPERATIONS,
    *attempt_ends.OPERATIONS,
    *leases.OPERATIONS,
    *batch.OPERATIONS,
    *commands.OPERATIONS,
    *history.OPERATIONS,
    *dead.OPERATIONS,
    *workers.OPERATIONS,
    *health.OPERATIONS,
    *problem_pages.OPERATIONS,
)


def create_app(services: Services, lifespan: Lifespan[Starlette] | None = None) -> Starlette:
    """The application over these services; `lifespan` starts and stops whatever they need."""
    app = Starlette(
        routes=routes(OPERATIONS),
        middleware=[Middleware(RequestLog)],
        exception_handlers={ClarionError: answer_clarion_error, HTTPException: answer_http_exception},
        lifespan=lifespan,
    )
    # A redirect would answer a path trick, and lose the body of a POST on the way.
    app.router.redirect_slashes = False
    app.state.services = services
    app.state.guard = Guard(services.settings.api_token)
    return app
