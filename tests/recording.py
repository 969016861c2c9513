"""What a test wants to know of a ringer."""

from collections.abc import Iterable, Mapping
from uuid import UUID

from clarion.settings import Settings
from clarion.store import Store
from clarion.wake import Ring, Ringer


class RecordingRinger(Ringer):
    """Keeps what it is told to ring."""

    def __init__(self, store: Store, settings: Settings) -> None:
        super().__init__(store, settings)
        self._rings: list[Ring] = []

    def mark(
        self, ready: Mapping[str, int] | None = None, *, scheduled: bool = False, cancelled: Iterable[UUID] = ()
    ) -> None:
        ring = Ring(dict(ready or {}), scheduled, list(cancelled))
        self._rings += [ring] if ring != Ring() else []

    def heard(self) -> list[Ring]:
        """What it was told since the last time."""
        rings, self._rings = self._rings, []
        return rings
