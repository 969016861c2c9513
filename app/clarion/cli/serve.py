"""`clarion serve`: the HTTP API."""

from typing import Any

import anyio
import click

from clarion.cli.options import COMMON, prepare, setting_flags


@click.command("serve")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8080, show_default=True, type=click.IntRange(0, 65535), help="0: any free one.")
@setting_flags(*COMMON, "api_token", "pool_max")
def command(*, host: str, port: int, **flags: Any) -> None:
    """Answer HTTP. Any number of these may run."""
    from clarion.main import bind, serve, url_of
    from clarion.memory import keep_what_is_loaded
    from clarion.signals import stop_on_signals

    settings = prepare(flags)
    listening = bind(settings, host, port)

    def say_where() -> None:
        click.echo(f"Clarion answers on {url_of(listening)}", err=True)

    async def run() -> None:
        keep_what_is_loaded()
        async with stop_on_signals() as stop:
            await serve(settings, listening=listening, stop=stop, started=say_where)

    anyio.run(run, backend_options={"use_uvloop": True})
