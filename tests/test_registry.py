"""Registering handlers: what works, and what is refused with a text that names the fix."""

from typing import Any

import pytest

from clarion.errors import UsageError
from clarion_worker import Context, Worker


def test_a_task_is_called_like_its_function_unless_named() -> None:
    worker = Worker()

    @worker.task()
    async def nightly() -> None: ...

    @worker.task("email.send", queue="mail", timeout="30s")
    async def send() -> None: ...

    assert sorted(worker.tasks) == ["email.send", "nightly"]
    assert worker.queues() == ["default", "mail"]
    assert worker.tasks["email.send"].policy.timeout_seconds == 30


def test_a_registered_handler_can_still_be_called() -> None:
    worker = Worker()

    @worker.task()
    def double(number: int) -> int:
        return 2 * number

    assert double(4) == 8


def test_two_handlers_for_one_task_are_refused() -> None:
    worker = Worker()

    @worker.task("same")
    async def first() -> None: ...

    with pytest.raises(UsageError, match="two handlers"):

        @worker.task("same")
        async def second() -> None: ...


@pytest.mark.parametrize("name", ["", "with space", "-first", "a" * 129, "new\nline", "line\n", "ünder"])
def test_a_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="is not a name"):
        Worker().task("fine", queue=name)

    async def handler() -> None: ...

    with pytest.raises(UsageError, match="is not a name"):
        Worker().task(name)(handler)


@pytest.mark.parametrize(
    ("policy", "complaint"),
    [
        ({"max_attempts": 0}, "max_attempts must be between"),
        ({"timeout": "soon"}, "timeout must be seconds"),
        ({"timeout": 0}, "timeout must be more than 0"),
        ({"backoff": "9d"}, "backoff must be between"),
    ],
)
def test_a_policy_that_cannot_work_is_refused(policy: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        Worker().task("x", **policy)


def test_positional_handlers_are_refused() -> None:
    def handler(*values: int) -> None: ...

    with pytest.raises(UsageError, match="by name"):
        Worker().task("x")(handler)


def test_a_signature_that_json_cannot_fill_is_refused() -> None:
    def handler(value: complex | Context) -> None: ...

    with pytest.raises(UsageError, match="cannot be read from JSON"):
        Worker().task("x")(handler)


def test_defaults_are_the_functions_own() -> None:
    worker = Worker()
    marker = object()

    @worker.task("x")
    def handler(first: int, second: object = marker, third: int | None = None) -> None: ...

    assert worker.tasks["x"].arguments.decode('{"first": 1}') == {"first": 1}
    assert worker.tasks["x"].arguments.decode('{"first": 1, "third": null}') == {"first": 1, "third": None}
