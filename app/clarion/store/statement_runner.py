"""What every part of the store is made of: a way to run a statement by name."""

from collections.abc import Sequence
from operator import attrgetter

import asyncpg
import msgspec

from clarion.db import Executor
from clarion.settings import Settings
from clarion.statements import statement


class StatementRunner:
    """Runs statements on a pool, on a connection, or in somebody's transaction."""

    def __init__(self, database: Executor, settings: Settings) -> None:
        self._database = database
        self._settings = settings

    async def _fetch(self, name: str, *args: object) -> list[asyncpg.Record]:
        return await self._database.fetch(statement(name), *args)


def columns(items: Sequence[msgspec.Struct], *names: str) -> list[list[object]]:
    """The items as one array per field, the shape that `unnest` takes.

    A field that none of them has becomes an empty array, which `unnest` fills up with nulls: to write 1,000 of them
    one by one, as of most fields of a new job, takes as long as to write an id each.
    """
    arrays = [list(map(attrgetter(name), items)) for name in names]
    return [[] if values and values[0] is None and values.count(None) == len(values) else values for values in arrays]
