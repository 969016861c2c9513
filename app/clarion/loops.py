"""The one loop that every background service runs in: a step, a pause, and patience with the weather."""

import random
from collections.abc import Awaitable, Callable

import anyio
import structlog

from clarion.errors import Unavailable
from clarion.events import Event

log = structlog.get_logger()

# A step does one round of work and answers how many seconds it wants to pause.
Step = Callable[[], Awaitable[float]]

_BACKOFF_FIRST_SECONDS = 0.1
_BACKOFF_CAP_SECONDS = 2.0


class Signal:
    """Says that there is something to look at; setting it twice says it once."""

    def __init__(self) -> None:
        self._event = anyio.Event()
        self._is_set = False

    def set(self) -> None:
        """Wakes the waiter, or the next one."""
        if not self._is_set:  # the event itself is slower to say so, and some are set for each job
            self._is_set = True
            self._event.set()

    async def wait(self) -> None:
        """Returns when set since the last wait, and clears it."""
        await self._event.wait()
        self._event = anyio.Event()
        self._is_set = False

    async def wait_for(self, seconds: float) -> bool:
        """The same, but for so long at most; whether it was set."""
        with anyio.move_on_after(seconds):
            await self.wait()
            return True
        return False


async def run_forever(step: Step, *, name: str, wake: Signal | None = None) -> None:
    """Runs the step again and again, its own pause apart or sooner when woken.

    Weather is logged once when it comes and once when it goes, and waited out with a jittered backoff. Anything
    else ends the process.
    """
    wake = wake or Signal()
    failures = 0
    while True:
        try:
            pause = await step()
        except Unavailable as error:
            failures += 1
            if failures == 1:
                log.warning(Event.STEP_FAILED, step=name, error=str(error))
            await anyio.sleep(backoff_seconds(failures))
            continue
        if failures:
            log.info(Event.STEP_RECOVERED, step=name, failures=failures)
            failures = 0
        await wake.wait_for(pause)


def backoff_seconds(failures: int) -> float:
    """The wait after so many failures in a row: doubling to a cap, ±50 % so that processes do not march in step."""
    wait: float = min(_BACKOFF_CAP_SECONDS, _BACKOFF_FIRST_SECONDS * 2 ** min(failures - 1, 10))
    return wait * random.uniform(0.5, 1.5)  # noqa: S311  jitter, not a secret


def jittered(seconds: float) -> float:
    """±20 %, for sweeps that must not march in step."""
    return seconds * random.uniform(0.8, 1.2)  # noqa: S311  jitter, not a secret
