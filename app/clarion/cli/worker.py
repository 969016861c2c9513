"""`clarion worker`: runs the handlers of a module, in this process or in several below a supervisor."""

import importlib
import os
import signal
import sys
import threading
import traceback
from contextlib import ExitStack
from types import FrameType, ModuleType
from typing import TYPE_CHECKING, Any

import anyio
import click
import msgspec

from clarion.cli import report
from clarion.cli.options import COMMON, as_environment, prepare, setting_flags
from clarion.errors import UsageError
from clarion.settings import Settings

if TYPE_CHECKING:
    from clarion_worker import Worker
    from clarion_worker.pulse import Tell
    from clarion_worker.service import WorkerService


# What a drain takes at most beyond its own time: a last claim, the handlers' grace, their outcomes, a goodbye.
_STOP_MARGIN_SECONDS = 10.0
# A process that has not even ended itself by then is killed by its supervisor.
_KILL_MARGIN_SECONDS = _STOP_MARGIN_SECONDS + 5


class WorkOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What to run; `reports_fd` is where a process below a supervisor says how it is."""

    target: str | None
    queues: str
    with_demo: bool
    reports_fd: int | None


@click.command("worker")
@click.argument("target", metavar="[MODULE:NAME]", required=False)
@click.option("--queues", default="", help="Queues to work on, comma-separated; default: those that the tasks name.")
@click.option("--demo", "with_demo", is_flag=True, help="Also run the built-in demo.* tasks.")
@click.option("--until-stdin-closes", is_flag=True, hidden=True, help="End when the parent process does.")
@click.option("--supervised", "reports_fd", type=int, hidden=True, help="The same, and say there how it is.")
@setting_flags(*COMMON, "processes", "concurrency", "lease_seconds", "drain_timeout_seconds")
@setting_flags("hang_after_seconds", "health_port", "health_host")
def command(
    *,
    target: str | None,
    queues: str,
    with_demo: bool,
    until_stdin_closes: bool,
    reports_fd: int | None,
    **flags: Any,
) -> None:
    """Run jobs with the handlers of MODULE:NAME, a `clarion_worker.Worker`. Any number of these may run.

    With --processes N, a supervisor keeps N of them running: it hands them its signals, replaces those that die, and
    answers probes for all. Concurrency, pool and leases are each process's own: N processes run N times --concurrency
    jobs, over N times CLARION_POOL_MAX connections and two more each. To use all CPUs of a container: --processes auto.
    """
    from clarion.cpus import usable_cpus
    from clarion_worker.pulse import die_with_supervisor, take_lifeline

    settings = prepare(flags)
    options = WorkOptions(target=target, queues=queues, with_demo=with_demo, reports_fd=reports_fd)
    count = usable_cpus() if settings.processes == "auto" else int(settings.processes)
    if until_stdin_closes or reports_fd is not None:
        lifeline = take_lifeline()
        if reports_fd is not None:
            die_with_supervisor(lifeline)
        threading.Thread(target=_leave_with_parent, args=[lifeline], name="clarion-parent", daemon=True).start()
    sys.exit(_work(settings, options) if count == 1 else _supervise(settings, options, count))


def _supervise(settings: Settings, options: WorkOptions, count: int) -> int:
    """Keeps so many processes running; the exit code of all."""
    from clarion.signals import stop_on_signals
    from clarion_worker.supervisor import Launch, Supervisor

    alone = msgspec.structs.replace(settings, processes="1", health_port=0)
    launch = Launch(
        command=_child_command(options),
        environment=as_environment(alone),
        drain_max_seconds=settings.drain_timeout_seconds + _KILL_MARGIN_SECONDS,
    )

    async def run() -> int:
        async with stop_on_signals() as stop:
            supervisor = Supervisor(launch, settings, count=count, stop=stop, reaps_orphans=os.getpid() == 1)
            if not settings.health_port:
                return await supervisor.run()
            from clarion.api.health_port import answering_probes, bind_health_port

            listening = bind_health_port(settings.health_host, settings.health_port)
            async with answering_probes(listening, supervisor.look):
                return await supervisor.run()

    return anyio.run(run, backend_options={"use_uvloop": True})


def _child_command(options: WorkOptions) -> list[str]:
    # -P: nothing of the current directory stands in for a module of the standard library; the command itself looks
    # for MODULE there.
    return [
        *(sys.executable, "-P", "-m", "clarion.cli", "worker"),
        *([options.target] if options.target else []),
        *(["--demo"] if options.with_demo else []),
        *(["--queues", options.queues] if options.queues else []),
        "--supervised",
    ]


def _work(settings: Settings, options: WorkOptions) -> int:
    """Works in this process; its exit code."""
    from clarion.memory import keep_what_is_loaded
    from clarion.signals import stop_on_signals
    from clarion_worker.pulse import telling
    from clarion_worker.service import WorkerService

    worker = _collect(options.target, with_demo=options.with_demo)
    names = [name.strip() for name in options.queues.split(",") if name.strip()]

    async def run(tell: "Tell | None") -> int:
        keep_what_is_loaded()
        async with stop_on_signals(within_seconds=settings.drain_timeout_seconds + _STOP_MARGIN_SECONDS) as stop:
            service = WorkerService(worker, settings, queues=names, stop=stop)
            if options.reports_fd is not None:
                _heed_one_signal()
            if tell is None:
                return await _run_to_the_end(service)
            async with telling(tell, lambda: service.vitals, settings, stop):
                return await _run_to_the_end(service)

    with ExitStack() as stack:
        tell = _open_reports(settings, options, stack)
        return anyio.run(run, tell, backend_options={"use_uvloop": True})


def _open_reports(settings: Settings, options: WorkOptions, stack: ExitStack) -> "Tell | None":
    """Where this process says how it is: to its supervisor, or on a health port of its own, or nowhere."""
    from clarion_worker.pulse import teller

    if options.reports_fd is not None:
        return teller(options.reports_fd)
    if not settings.health_port:
        return None
    from clarion.api.health_port import answering_probes_in_thread, bind_health_port
    from clarion.probes import WatchedProcess

    listening = bind_health_port(settings.health_host, settings.health_port)
    watched = WatchedProcess(hang_after_seconds=settings.hang_after_seconds, pid=os.getpid())
    stack.enter_context(answering_probes_in_thread(listening, lambda: [watched.health()]))
    return watched.hear


def _heed_one_signal() -> None:
    """Below a supervisor, what comes after the first signal says nothing new: a service manager signals every process,
    and the supervisor hands on what it got. It is the supervisor that ends in a hurry, and this process with it."""
    heed, heeded = signal.getsignal(signal.SIGTERM), False

    def receive(number: int, frame: FrameType | None) -> None:
        nonlocal heeded
        if not heeded and callable(heed):
            heeded = True
            heed(number, frame)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, receive)


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


def _leave_with_parent(lifeline: int) -> None:
    """Reads the pipe to its end, which comes when the parent has gone, however; in a thread of its own, since a handler
    may block the event loop."""
    from clarion.signals import leave, leave_signals_to_the_main_thread

    leave_signals_to_the_main_thread()
    while os.read(lifeline, 1024):
        pass
    leave(1)
