"""What runs jobs: register handlers on a `Worker`, and `clarion worker module:name` runs them.

from clarion_worker import Context, Worker

worker = Worker()

@worker.task("email.send", queue="mail", max_attempts=8, timeout="30s")
async def send(ctx: Context, to: str, order_id: int) -> dict[str, str]:
    ctx.log.info("rendering", order=order_id)
    await ctx.progress(1, total=3)
    return {"sent_to": to}
"""

from clarion.errors import LeaseLost
from clarion_worker.context import Context, SyncContext
from clarion_worker.outcomes import Cancelled, Discard, Retry, Snooze
from clarion_worker.registry import Task, Worker

__all__ = ["Cancelled", "Context", "Discard", "LeaseLost", "Retry", "Snooze", "SyncContext", "Task", "Worker"]
