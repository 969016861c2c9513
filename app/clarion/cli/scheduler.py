"""`clarion scheduler`: maintenance."""

from typing import Any

import anyio
import click

from clarion.cli.options import COMMON, prepare, setting_flags


@click.command("scheduler")
@setting_flags(*COMMON, "reap_seconds", "history_days")
def command(**flags: Any) -> None:
    """Promote due jobs, take back expired leases, keep the history's partitions. Any number of these may run."""
    from clarion.main import run_maintenance
    from clarion.signals import stop_on_signals, until

    settings = prepare(flags)

    async def run() -> None:
        async with stop_on_signals() as stop, until(stop):
            await run_maintenance(settings)

    anyio.run(run, backend_options={"use_uvloop": True})
