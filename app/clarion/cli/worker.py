"""`clarion worker`: runs the handlers of a module."""

import importlib
import os
import sys
import threading
from typing import TYPE_CHECKING, Any

import anyio
import click

from clarion.cli.options import COMMON, prepare, setting_flags
from clarion.errors import UsageError

if TYPE_CHECKING:
    from clarion_worker import Worker


@click.command("worker")
@click.argument("target", metavar="[MODULE:NAME]", required=False)
@click.option("--queues", default="", help="Queues to work on, comma-separated; default: those that the tasks name.")
@click.option("--demo", "with_demo", is_flag=True, help="Also run the built-in demo.* tasks.")
@click.option("--until-stdin-closes", is_flag=True, hidden=True, help="End when the parent process does.")
@setting_flags(*COMMON, "concurrency", "lease_seconds", "drain_timeout_seconds", "hang_after_seconds")
def command(*, target: str | None, queues: str, with_demo: bool, until_stdin_closes: bool, **flags: Any) -> None:
    """Run jobs with the handlers of MODULE:NAME, a `clarion_worker.Worker`. Any number of these may run."""
    from clarion.signals import leave, stop_on_signals
    from clarion_worker.service import WorkerService

    settings = prepare(flags)
    worker = _collect(target, with_demo=with_demo)
    names = [name.strip() for name in queues.split(",") if name.strip()]

    async def run() -> None:
        async with stop_on_signals() as stop, anyio.create_task_group() as group:
            if until_stdin_closes:
                group.start_soon(_leave_with_parent)
            await WorkerService(worker, settings, queues=names, stop=stop).run()
            group.cancel_scope.cancel()

    anyio.run(run, backend_options={"use_uvloop": True})
    if any(thread is not threading.current_thread() and not thread.daemon for thread in threading.enumerate()):
        leave(0)  # a handler that ignored its end still sits in its thread, and would hold the process


def _collect(target: str | None, *, with_demo: bool) -> "Worker":
    from clarion_worker import Worker
    from clarion_worker.demo import demo

    worker = Worker()
    if target is not None:
        worker.include(load_worker(target))
    if with_demo:
        worker.include(demo)
    if not worker.tasks:
        raise UsageError("nothing to run: name a worker as MODULE:NAME, or give --demo")
    return worker


def load_worker(target: str) -> "Worker":
    """The worker that `module:name` names, the module looked for in the current directory as well."""
    from clarion_worker import Worker

    module_name, _, name = target.partition(":")
    if not module_name or not name:
        raise UsageError(f"{target!r} does not name a worker: write MODULE:NAME, as in tasks:worker")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise
        raise UsageError(f"there is no module {module_name!r} here or on the Python path") from error
    found = getattr(module, name, None)
    if not isinstance(found, Worker):
        raise UsageError(f"{module_name} has no clarion_worker.Worker called {name!r}")
    return found


async def _leave_with_parent() -> None:
    from clarion.signals import leave

    await anyio.wait_readable(sys.stdin)
    leave(1)
