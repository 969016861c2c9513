"""Start-up checks: a database on which the promises cannot be kept is refused, with the way out."""

import anyio
import structlog

from clarion.db import Refused
from clarion.errors import Unavailable, UnsafeGround
from clarion.events import Event
from clarion.loops import backoff_seconds
from clarion.settings import Settings
from clarion.statements import schema_version
from clarion.store import Ground, Store

log = structlog.get_logger()

SERVER_VERSION_MIN = 140000


async def check_ground(store: Store, settings: Settings) -> None:
    """Raises UnsafeGround, naming everything that is wrong, unless the database is safe to work on."""
    if not await store.has_migrations():
        raise UnsafeGround("this database has no Clarion schema yet: run `clarion migrate up`")
    faults = find_faults(await store.read_ground(), ephemeral=settings.ephemeral)
    if faults:
        raise UnsafeGround("; ".join(faults))


async def is_ground_safe(store: Store, settings: Settings) -> bool:
    """The same; False when the database is away, so that nothing is known yet."""
    try:
        await check_ground(store, settings)
    except Refused as error:
        raise UnsafeGround(str(error)) from error
    except Unavailable:
        return False
    return True


async def wait_for_ground(store: Store, settings: Settings) -> None:
    """The same, but waits for a database that is away, saying so once."""
    failures = 0
    while True:
        try:
            await check_ground(store, settings)
        except Refused as error:
            raise UnsafeGround(str(error)) from error
        except Unavailable as error:
            failures += 1
            if failures == 1:
                log.warning(Event.STEP_FAILED, step="connect", error=str(error))
            await anyio.sleep(backoff_seconds(failures))
        else:
            return


def find_faults(ground: Ground, *, ephemeral: bool) -> list[str]:
    """What is wrong with the ground, in words that name the fix."""
    wanted, found = schema_version(), ground.schema_version or 0
    checks = {
        f"PostgreSQL {ground.server_version // 10000} is too old: 14 or newer is needed": (
            ground.server_version < SERVER_VERSION_MIN
        ),
        f"the schema is at version {found} and this Clarion needs {wanted}: run `clarion migrate up`": found < wanted,
        f"the schema is at version {found}, newer than this Clarion understands ({wanted}): upgrade Clarion": (
            found > wanted
        ),
        "fsync is off, so a crash loses acknowledged jobs: turn it on, or set CLARION_EPHEMERAL=true for "
        "throw-away data": (not ground.fsync and not ephemeral),
        "synchronous_commit is off, so a crash loses acknowledged jobs: turn it on for this database or role": (
            not ground.synchronous_commit and not ephemeral
        ),
        f"not logged, so a crash empties them: {_names(ground.unlogged_tables)}: `alter table … set logged`": bool(
            ground.unlogged_tables
        ),
        f"the primary key is missing or invalid on: {_names(ground.missing_unique_indexes)}: restore it": bool(
            ground.missing_unique_indexes
        ),
    }
    return [text for text, wrong in checks.items() if wrong]


def _names(tables: list[str]) -> str:
    return ", ".join(f"clarion.{table}" for table in tables)
