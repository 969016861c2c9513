"""The names of all log events, `noun.past_tense`; a test proves that each is used and no other is."""

from enum import StrEnum


class Event(StrEnum):
    """What happened, as the `event` key of a log line."""

    REQUEST_FINISHED = "request.finished"
    ATTEMPT_FINISHED = "attempt.finished"
    ATTEMPT_STUCK = "attempt.stuck"

    WORKER_STARTED = "worker.started"
    WORKER_DRAIN_STARTED = "worker.drain_started"
    WORKER_STOPPED = "worker.stopped"
    WORKER_HUNG = "worker.hung"
    WORKER_CHILD_EXITED = "worker.child_exited"
    WORKER_CHILD_RELOADED = "worker.child_reloaded"
    SUPERVISOR_STARTED = "supervisor.started"
    SUPERVISOR_STOPPED = "supervisor.stopped"

    LEASE_LOST = "lease.lost"
    LEASE_FENCED = "lease.fenced"
    CLAIM_RELEASED = "claim.released"
    LEASES_EXPIRED = "leases.expired"
    JOBS_EXPIRED = "jobs.expired"
    JOB_PARKED = "job.parked"
    LINES_DROPPED = "lines.dropped"
    OUTCOME_RETRIED = "outcome.retried"
    OUTCOME_ABANDONED = "outcome.abandoned"

    LISTENER_CONNECTED = "listener.connected"
    LISTENER_LOST = "listener.lost"
    STEP_FAILED = "step.failed"
    STEP_RECOVERED = "step.recovered"

    PARTITIONS_CREATED = "partitions.created"
    PARTITIONS_DROPPED = "partitions.dropped"
    LEDGERS_PRUNED = "ledgers.pruned"
    WORKERS_PRUNED = "workers.pruned"

    MIGRATION_APPLIED = "migration.applied"
    MIGRATION_AWAITED = "migration.awaited"
    SERVER_STARTED = "server.started"
    SERVER_STOPPED = "server.stopped"
