"""What runs jobs: register handlers on a `Worker`, and `clarion worker module:name` runs them.

from clarion_worker import Context, Worker

worker = Worker()

@worker.task("email.send", queue="mail", max_attempts=8, timeout="30s")
async def send(to: str, order_id: int, *, ctx: Context) -> dict[str, str]:
    ctx.log.info("rendering", order=order_id)
    return {"sent_to": to}
"""

from clarion_worker.context import Context
from clarion_worker.outcomes import Discard, Snooze
from clarion_worker.registry import Task, Worker

__all__ = ["Context", "Discard", "Snooze", "Task", "Worker"]
