"""What a handler may ask about its job."""

from collections.abc import Callable

from structlog.typing import FilteringBoundLogger

from clarion.execution import Lease


class Context:
    """Given to a handler that has a parameter `ctx`."""

    def __init__(self, lease: Lease, log: FilteringBoundLogger, is_cancelled: Callable[[], bool]) -> None:
        self.job = lease
        self.log = log
        self._is_cancelled = is_cancelled

    @property
    def attempt(self) -> int:
        """Which run of the job this is, from 1."""
        return self.job.attempt

    @property
    def cancelled(self) -> bool:
        """Whether the attempt was ended from outside (lease lost, timeout, shutdown).

        An `async` handler is cancelled at its next `await`; one in a thread has to look here now and then.
        """
        return self._is_cancelled()
