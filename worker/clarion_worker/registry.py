"""Which task runs which handler, where, and with which policy."""

import inspect
import typing
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, Concatenate, Generic, Literal, ParamSpec, Protocol, TypeVar, overload

import msgspec

from clarion.durations import parse_duration
from clarion.errors import UsageError
from clarion.execution import Policy
from clarion.job_request import JobRequest
from clarion.names import check_name
from clarion_worker.arguments import CONTEXT_PARAMETER, Arguments
from clarion_worker.context import Context, SyncContext

P = ParamSpec("P")
R = TypeVar("R")

# Where a handler runs. `async def` ones run on the event loop unless told otherwise, others in a thread.
Place = Literal["loop", "thread", "process"]
# Opens what all handlers of a worker share, yields it (as `ctx.state`), and closes it after the last of them.
Lifespan = Callable[[], AbstractAsyncContextManager[Any]]

_POLICY_MAX_SECONDS = 7 * 86_400.0


class Task(Generic[P, R]):
    """A handler under its task name; P are its arguments without `ctx`, R is its result."""

    def __init__(
        self, name: str, handler: Callable[..., Any], *, queue: str, policy: Policy, runs_in: Place | None = None
    ) -> None:
        self.name = name
        self.handler = handler
        self.queue = queue
        self.policy = policy
        self.lifespan: Lifespan | None = None
        self.arguments = Arguments(handler, task=name)
        self.is_async = inspect.iscoroutinefunction(handler)
        self.runs_in: Place = runs_in or ("loop" if self.is_async else "thread")
        if inspect.isasyncgenfunction(handler) or inspect.isgeneratorfunction(handler):
            raise UsageError(f"task {name}: a handler returns its result; this one is a generator (it has a `yield`)")
        if self.runs_in == "loop" and not self.is_async:
            raise UsageError(f'task {name}: only an `async def` runs on the loop; leave runs_in out, or say "thread"')
        if self.runs_in == "thread" and self.is_async:
            raise UsageError(f'task {name}: an `async def` runs on the loop or in a "process", not in a thread')

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The handler itself, for tests and for other handlers."""
        return self.handler(*args, **kwargs)

    def job(self, *args: P.args, **kwargs: P.kwargs) -> JobRequest[R]:
        """A call of this task that is to become a job: `client.enqueue(send.job(to="ada@example.org"), delay="5m")`.

        Editors and type checkers know the arguments from the handler's signature. Raises TypeError for arguments
        that do not fit it, ValueError for values that do not.
        """
        signature = inspect.signature(self.handler)
        own = [parameter for name, parameter in signature.parameters.items() if name != CONTEXT_PARAMETER]
        bound = signature.replace(parameters=own).bind(*args, **kwargs)
        arguments = dict(bound.arguments)
        for parameter in own:
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                arguments |= arguments.pop(parameter.name, {})
        self.arguments.decode(msgspec.json.encode(arguments).decode())
        return JobRequest(self.name, arguments, {"queue": self.queue}, self._result_type())

    def _result_type(self) -> Any:
        try:
            return typing.get_type_hints(self.handler).get("return", Any)
        except (NameError, TypeError):  # names that are there for type checkers only
            return Any


class Registration(Protocol):
    """What `@worker.task(…)` answers: it takes a handler, with or without `ctx` as its first parameter."""

    @overload
    def __call__(self, handler: Callable[Concatenate[Context, P], Awaitable[R]], /) -> Task[P, R]: ...
    @overload
    def __call__(self, handler: Callable[Concatenate[SyncContext, P], R], /) -> Task[P, R]: ...
    @overload
    def __call__(self, handler: Callable[P, Awaitable[R]], /) -> Task[P, R]: ...
    @overload
    def __call__(self, handler: Callable[P, R], /) -> Task[P, R]: ...


class Worker:
    """A set of tasks. `clarion worker module:name` runs one of these.

    `lifespan` opens what its handlers share: an async context manager, entered before the first claim and left after
    the last handler; what it yields is `ctx.state`. A handler in a process has no part in it.
    """

    def __init__(self, *, lifespan: Lifespan | None = None) -> None:
        self.tasks: dict[str, Task[..., Any]] = {}
        self.lifespan = lifespan

    def task(  # noqa: PLR0913  one parameter an option
        self,
        name: str | None = None,
        *,
        queue: str = "default",
        max_attempts: int | None = None,
        timeout: str | float | None = None,
        backoff: str | float | None = None,
        backoff_cap: str | float | None = None,
        runs_in: Place | None = None,
    ) -> Registration:
        """Registers a handler: `async def` runs on the event loop, `def` in a thread, either `runs_in="process"`.

        The name is the function's unless given. `max_attempts` counts runs, the first included; durations are
        seconds or `"30s"`. A job's own values win over these. A handler in a process of its own can be killed, at its
        timeout for one, and takes nobody down with it. Raises UsageError for what cannot work.
        """
        policy = Policy(
            max_attempts=_checked_attempts(max_attempts),
            timeout_seconds=_checked_seconds(timeout, "timeout"),
            backoff_seconds=_checked_seconds(backoff, "backoff"),
            backoff_cap_seconds=_checked_seconds(backoff_cap, "backoff_cap"),
        )
        check_name(queue, "queue")

        def register(handler: Callable[..., Any]) -> Task[..., Any]:
            task_name = handler.__name__ if name is None else name
            check_name(task_name, "task")
            task: Task[..., Any] = Task(task_name, handler, queue=queue, policy=policy, runs_in=runs_in)
            task.lifespan = self.lifespan
            self._add(task)
            return task

        return typing.cast("Registration", register)

    def include(self, other: "Worker") -> None:
        """Takes over all tasks of another worker, each with its own lifespan."""
        for task in other.tasks.values():
            self._add(task)

    def queues(self) -> list[str]:
        """Every queue that a task names, in order of registration."""
        return list(dict.fromkeys(task.queue for task in self.tasks.values()))

    def lifespans(self) -> list[Lifespan]:
        """Those of all tasks, each once."""
        return list(dict.fromkeys(task.lifespan for task in self.tasks.values() if task.lifespan is not None))

    def _add(self, task: Task[..., Any]) -> None:
        known = self.tasks.setdefault(task.name, task)
        if known is not task:
            raise UsageError(f"two handlers are registered for the task {task.name!r}: give one another name")


def _checked_attempts(value: int | None) -> int | None:
    if value is not None and not 1 <= value <= 1000:
        raise UsageError(f"max_attempts must be between 1 and 1000, got {value}")
    return value


def _checked_seconds(value: str | float | None, what: str) -> float | None:
    if value is None:
        return None
    try:
        seconds = parse_duration(value, max_seconds=_POLICY_MAX_SECONDS)
    except ValueError as error:
        raise UsageError(f"{what} {error}, got {value!r}") from error
    if seconds == 0:
        raise UsageError(f"{what} must be more than 0")
    return seconds
