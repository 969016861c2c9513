"""`clarion worker`: runs the handlers of a module."""

import importlib
import os
import sys
import threading
import traceback
from types import ModuleType
from typing import TYPE_CHECKING, Any

import anyio
import click

from clarion.cli import report
from clarion.cli.options import COMMON, prepare, setting_flags
from clarion.errors import UsageError

if TYPE_CHECKING:
    from clarion_worker import Worker
    from clarion_worker.service import WorkerService


# What a drain takes at most beyond its own time: a last claim, the handlers' grace, their outcomes, a goodbye.
_STOP_MARGIN_SECONDS = 10.0


@click.command("worker")
@click.argument("target", metavar="[MODULE:NAME]", required=False)
@click.option("--queues", default="", help="Queues to work on, comma-separated; default: those that the tasks name.")
@click.option("--demo", "with_demo", is_flag=True, help="Also run the built-in demo.* tasks.")
@click.option("--until-stdin-closes", is_flag=True, hidden=True, help="End when the parent process does.")
@setting_flags(*COMMON, "concurrency", "lease_seconds", "drain_timeout_seconds", "hang_after_seconds")
def command(*, target: str | None, queues: str, with_demo: bool, until_stdin_closes: bool, **flags: Any) -> None:
    """Run jobs with the handlers of MODULE:NAME, a `clarion_worker.Worker`. Any number of these may run."""
    from clarion.signals import stop_on_signals
    from clarion_worker.service import WorkerService

    settings = prepare(flags)
    worker = _collect(target, with_demo=with_demo)
    names = [name.strip() for name in queues.split(",") if name.strip()]
    if until_stdin_closes:
        threading.Thread(target=_leave_with_parent, name="clarion-parent", daemon=True).start()

    async def run() -> int:
        async with stop_on_signals(within_seconds=settings.drain_timeout_seconds + _STOP_MARGIN_SECONDS) as stop:
            return await _run_to_the_end(WorkerService(worker, settings, queues=names, stop=stop))

    sys.exit(anyio.run(run, backend_options={"use_uvloop": True}))


async def _run_to_the_end(service: "WorkerService") -> int:
    """Runs the service; ends the process here and now where a handler's task or thread would hold it."""
    from clarion.signals import leave

    try:
        code = await service.run()
    except BaseException as error:  # noqa: BLE001  a bug ends the process; whatever still runs, its leases run out
        leave(report(error))
    if service.stuck:
        leave(code)
    return code


def _collect(target: str | None, *, with_demo: bool) -> "Worker":
    from clarion_worker import Worker
    from clarion_worker.demo import demo

    worker = Worker()
    if target is not None:
        worker.include(load_worker(target))
    if with_demo:
        worker.include(demo)
    if target is None and not with_demo:
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
    module = _import(module_name)
    found = getattr(module, name, None)
    if not isinstance(found, Worker):
        raise UsageError(f"{module_name} has no clarion_worker.Worker called {name!r}")
    return found


def _import(module_name: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise UsageError(f"there is no module {module_name!r} here or on the Python path") from error
        raise UsageError(_import_failure(module_name, error)) from error
    except UsageError:
        raise
    except Exception as error:  # somebody's module may raise anything
        raise UsageError(_import_failure(module_name, error)) from error


def _import_failure(module_name: str, error: Exception) -> str:
    """The error with the frames of the module itself, without those of the import system and of this command."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith("<frozen") and frame.filename != __file__]
    shown = traceback.format_list([frame for frame in own if not frame.filename.endswith("importlib/__init__.py")])
    lines = "".join([*shown, *traceback.format_exception_only(error)]).rstrip()
    return f"importing {module_name!r} failed:\n{lines}"


def _leave_with_parent() -> None:
    """Reads standard input to its end, which comes when the parent has gone, however; in a thread of its own, since
    a handler may block the event loop."""
    from clarion.signals import leave, leave_signals_to_the_main_thread

    leave_signals_to_the_main_thread()
    while os.read(sys.stdin.fileno(), 1024):
        pass
    leave(1)
