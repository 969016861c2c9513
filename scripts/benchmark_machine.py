"""Where a benchmark was run: what its figures cannot be compared without."""

import os
import platform
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import asyncpg

from clarion import __version__

_SETTINGS = (
    "fsync",
    "synchronous_commit",
    "full_page_writes",
    "shared_buffers",
    "max_wal_size",
    "max_connections",
    "autovacuum_naptime",
)
_HERE = Path(__file__).resolve().parent


async def describe_machine(connection: "asyncpg.Connection[asyncpg.Record]") -> dict[str, str]:
    """The processor, the memory, the versions, and the settings of Postgres that matter, as a reader sees them."""
    settings = [f"{name} = {await connection.fetchval('select current_setting($1)', name)}" for name in _SETTINGS]
    return {
        "cpu": _cpu(),
        "cores": str(os.cpu_count()),
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GB",
        "kernel": platform.release(),
        "postgres": await connection.fetchval("select current_setting('server_version')"),
        "settings": ", ".join(settings),
        "python": platform.python_version(),
        "clarion": f"{__version__}{_commit()}",
        "date": datetime.now(UTC).date().isoformat(),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    """The commit of this clone, with a plus when something was changed since; empty outside of one."""
    if not shutil.which("git"):
        return ""
    command = ["git", "-C", str(_HERE), "describe", "--always", "--dirty=+", "--exclude=*"]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    return f" ({said.stdout.strip()})" if said.returncode == 0 else ""
