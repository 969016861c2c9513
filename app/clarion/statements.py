"""The SQL that ships with the package: `sql/queries`, one statement a file, and `sql/migrations`, in order."""

import hashlib
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType

import msgspec

_MIGRATION = re.compile(r"(\d{4})_([a-z0-9_]+)\.sql")


class Migration(msgspec.Struct, frozen=True):
    """One numbered step of the schema; the checksum is the SHA-256 of the file."""

    version: int
    name: str
    sql: str
    checksum: str


@cache
def sql_directory() -> Path:
    """`clarion/sql` of an installed wheel, or else the repository's `sql/`."""
    package = Path(__file__).parent
    shipped = package / "sql"
    return shipped if shipped.is_dir() else package.parents[1] / "sql"


def _read_statements() -> Mapping[str, str]:
    paths = (sql_directory() / "queries").glob("*.sql")
    return MappingProxyType({path.stem: path.read_text(encoding="utf-8") for path in paths})


def _read_migrations() -> tuple[Migration, ...]:
    found = []
    for path in sorted((sql_directory() / "migrations").glob("*.sql")):
        match = _MIGRATION.fullmatch(path.name)
        if match is None:
            raise ValueError(f"{path} is not named like 0001_what_it_does.sql")
        sql = path.read_text(encoding="utf-8")
        found.append(Migration(int(match[1]), match[2], sql, hashlib.sha256(sql.encode()).hexdigest()))
    return tuple(found)


# Read when this module is imported, since reading files later would block an event loop.
_STATEMENTS = _read_statements()
_MIGRATIONS = _read_migrations()
_BOOTSTRAP = (sql_directory() / "bootstrap.sql").read_text(encoding="utf-8")


def statement(name: str) -> str:
    """The text of `sql/queries/<name>.sql`."""
    return _STATEMENTS[name]


def bootstrap() -> str:
    """What must stand before the first migration."""
    return _BOOTSTRAP


def migrations() -> tuple[Migration, ...]:
    """Every migration, by version."""
    return _MIGRATIONS


def schema_version() -> int:
    """The version this code was written for."""
    return migrations()[-1].version
