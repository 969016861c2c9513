"""Which task runs which handler, and with which policy."""

import inspect
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar

from clarion.durations import parse_duration
from clarion.errors import UsageError
from clarion.execution import Policy
from clarion.names import check_name
from clarion_worker.arguments import Arguments

P = ParamSpec("P")
R = TypeVar("R")

_POLICY_MAX_SECONDS = 7 * 86_400.0


class Task(Generic[P, R]):
    """A handler under its task name; calling it calls the function."""

    def __init__(self, name: str, handler: Callable[P, R], *, queue: str, policy: Policy) -> None:
        self.name = name
        self.handler = handler
        self.queue = queue
        self.policy = policy
        self.arguments = Arguments(handler, task=name)
        self.is_async = inspect.iscoroutinefunction(handler)
        if inspect.isasyncgenfunction(handler) or inspect.isgeneratorfunction(handler):
            raise UsageError(f"task {name}: a handler returns its result; this one is a generator (it has a `yield`)")

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """The handler itself, for tests and for other handlers."""
        return self.handler(*args, **kwargs)


class Worker:
    """A set of tasks. `clarion worker module:name` runs one of these."""

    def __init__(self) -> None:
        self.tasks: dict[str, Task[..., Any]] = {}

    def task(
        self,
        name: str | None = None,
        *,
        queue: str = "default",
        max_attempts: int | None = None,
        timeout: str | float | None = None,
        backoff: str | float | None = None,
        backoff_cap: str | float | None = None,
    ) -> Callable[[Callable[P, R]], Task[P, R]]:
        """Registers a handler: `async def` runs on the event loop, `def` in a thread.

        The name is the function's unless given. `max_attempts` counts runs, the first included; durations are
        seconds or `"30s"`. A job's own values win over these. Raises UsageError for what cannot work.
        """
        policy = Policy(
            max_attempts=_checked_attempts(max_attempts),
            timeout_seconds=_checked_seconds(timeout, "timeout"),
            backoff_seconds=_checked_seconds(backoff, "backoff"),
            backoff_cap_seconds=_checked_seconds(backoff_cap, "backoff_cap"),
        )
        check_name(queue, "queue")

        def register(handler: Callable[P, R]) -> Task[P, R]:
            task_name = handler.__name__ if name is None else name
            check_name(task_name, "task")
            task = Task(task_name, handler, queue=queue, policy=policy)
            self._add(task)
            return task

        return register

    def include(self, other: "Worker") -> None:
        """Takes over all tasks of another worker."""
        for task in other.tasks.values():
            self._add(task)

    def queues(self) -> list[str]:
        """Every queue that a task names, in order of registration."""
        return list(dict.fromkeys(task.queue for task in self.tasks.values()))

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
