"""For the tests of those who write handlers: run one without a database, or jobs to their end on a real one.

async def test_an_order_is_confirmed() -> None:
    run = await run_handler(worker, send.job(to="ada@example.org", order_id=7), attempt=2)
    assert run.result == {"sent_to": "ada@example.org"}

async def test_an_order_is_confirmed_once(clarion_kit: Kit) -> None:
    await clarion_kit.enqueue(place_order.job(order_id=7))
    await clarion_kit.drain(worker)
    await clarion_kit.assert_enqueued("email.send", {"order_id": 7}, count=1)

The fixtures `clarion_kit` and `clarion_database_url` come with Clarion: see `plugin.py`. Whatever is named here is
imported when it is first asked for, since pytest loads the plugin in the tests of everybody who has Clarion installed.
"""

import importlib
from typing import TYPE_CHECKING, Any

__all__ = ["Circumstances", "HandlerRun", "Kit", "Line", "NoResult", "Progress", "run_handler"]

_HOMES = {
    "Circumstances": "handler",
    "HandlerRun": "runs",
    "Kit": "kit",
    "Line": "runs",
    "NoResult": "runs",
    "Progress": "runs",
    "run_handler": "handler",
}

if TYPE_CHECKING:
    from clarion_worker.testing.handler import Circumstances, run_handler
    from clarion_worker.testing.kit import Kit
    from clarion_worker.testing.runs import HandlerRun, Line, NoResult, Progress
else:

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
