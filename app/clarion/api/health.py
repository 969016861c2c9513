"""Health, for machines that poll: is the process alive, and can it do its work?"""

import msgspec
from starlette.types import ASGIApp

from clarion.api.decoding import Form, Nothing
from clarion.api.operation import Call, Operation, Reply
from clarion.api.problems import problem_response
from clarion.api.services import Services
from clarion.errors import Unavailable
from clarion.ground import find_faults


class Health(msgspec.Struct, frozen=True, omit_defaults=True):
    """The verdict; with `?verbose`, each check's."""

    status: str
    checks: dict[str, str] | None = None


class ReadyQuery(Form, frozen=True, kw_only=True):
    """`?verbose` shows each check."""

    verbose: str | None = None


async def live(call: Call[Nothing, Nothing]) -> Reply:
    """The event loop answers; the database is none of its business, or its absence would restart the process."""
    return Reply(Health("ok"))


async def ready(call: Call[Nothing, ReadyQuery]) -> Reply | ASGIApp:
    """Whether requests should be sent here: not while draining, nor over a database that cannot serve them."""
    checks = {"process": _process_check(call.services), "database": await _database_check(call.services)}
    shown = {"checks": checks} if call.query.verbose is not None else {}
    bad = [f"{name}: {verdict}" for name, verdict in checks.items() if verdict != "ok"]
    if bad:
        return problem_response(call.request, Unavailable("; ".join(bad)), **shown)
    return Reply(Health("ok", **shown))


def _process_check(services: Services) -> str:
    return "draining: this process is shutting down" if services.draining.is_set() else "ok"


async def _database_check(services: Services) -> str:
    try:
        if not await services.store.has_migrations():
            return "has no Clarion schema yet: run `clarion migrate up`"
        ground = await services.store.read_ground()
    except Unavailable as error:
        return str(error)
    faults = find_faults(ground, ephemeral=services.settings.ephemeral)
    faults += ["is read-only"] if ground.read_only else []
    return "; ".join(faults) or "ok"


OPERATIONS = (
    Operation(
        method="GET",
        path="/livez",
        summary="Is the process alive?",
        handler=live,
        permission=None,
        body=Nothing,
        query=Nothing,
        responds=Health,
        quiet=True,
    ),
    Operation(
        method="GET",
        path="/readyz",
        summary="Can the process serve requests?",
        handler=ready,
        permission=None,
        body=Nothing,
        query=ReadyQuery,
        responds=Health,
        problems=(Unavailable,),
        quiet=True,
    ),
)
