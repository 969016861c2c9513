"""What a test wants to know of a ringer."""

from collections.abc import Iterable, Mapping
from uuid import UUID

import msgspec

from clarion.execution import Ready
from clarion.settings import Settings
from clarion.store import Store
from clarion.wake import Ring, Ringer


class Rung(msgspec.Struct, frozen=True):
    """What a ring says but for places in line: how many jobs became ready in each queue, and the rest."""

    queues: dict[str, int] = {}
    scheduled: bool = False
    cancelled: list[UUID] = []


def amounts(ready: Mapping[str, Ready]) -> dict[str, int]:
    """How many became ready in each queue."""
    return {queue: more.jobs for queue, more in ready.items()}


def rung(ring: Ring) -> Rung:
    """A ring without what changes from run to run."""
    return Rung(amounts(ring.queues), ring.scheduled, ring.cancelled)


class RecordingRinger(Ringer):
    """Keeps what it is told to ring; `ready` with the places in line, and the hops."""

    def __init__(self, store: Store, settings: Settings) -> None:
        super().__init__(store, settings)
        self._rung: list[Rung] = []
        self.ready: list[tuple[dict[str, Ready], int]] = []

    def mark(
        self,
        ready: Mapping[str, Ready] | None = None,
        *,
        scheduled: bool = False,
        cancelled: Iterable[UUID] = (),
        hops: int = 0,
    ) -> None:
        if ready:
            self.ready.append((dict(ready), hops))
        super().mark(ready, scheduled=scheduled, cancelled=cancelled, hops=hops)
        told = Rung(amounts(ready or {}), scheduled, list(cancelled))
        self._rung += [told] if told != Rung() else []

    def heard(self) -> list[Rung]:
        """What it was told since the last time."""
        heard, self._rung = self._rung, []
        return heard
