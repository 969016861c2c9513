"""What runs jobs: register handlers on a `Worker`, and `clarion worker module:name` runs them.

from clarion_worker import Context, Worker

worker = Worker()

@worker.task("email.send", queue="mail", max_attempts=8, timeout="30s")
async def send(ctx: Context, to: str, order_id: int) -> dict[str, str]:
    ctx.log.info("rendering", order=order_id)
    await ctx.progress(1, total=3)
    return {"sent_to": to}

The names are imported when they are used: pytest imports this package in everybody's run, for its plugin's sake.
"""

import importlib
from typing import TYPE_CHECKING, Any

__all__ = ["Cancelled", "Context", "Discard", "LeaseLost", "Retry", "Snooze", "SyncContext", "Task", "Worker"]

_HOMES = {
    "Cancelled": "clarion_worker.outcomes",
    "Context": "clarion_worker.context",
    "Discard": "clarion_worker.outcomes",
    "LeaseLost": "clarion.errors",
    "Retry": "clarion_worker.outcomes",
    "Snooze": "clarion_worker.outcomes",
    "SyncContext": "clarion_worker.context",
    "Task": "clarion_worker.registry",
    "Worker": "clarion_worker.registry",
}

if TYPE_CHECKING:
    from clarion.errors import LeaseLost
    from clarion_worker.context import Context, SyncContext
    from clarion_worker.outcomes import Cancelled, Discard, Retry, Snooze
    from clarion_worker.registry import Task, Worker
else:

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(_HOMES[name]), name)
