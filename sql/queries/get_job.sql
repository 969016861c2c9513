-- One job with its payload, its result and its latest error, wherever it lives; no row when it does not exist.
--
-- $1 job id.
-- `version` changes with every write of the row.
-- Plan: the primary key of jobs, then of each history partition, then the attempts of this job.
with found as (
  select
    j.id, j.queue, j.task, j.state, j.priority, j.attempt, j.max_attempts, j.errors, j.crashes, j.snoozes, j.generation,
    j.created_at, j.run_at, j.started_at, j.died_at as finished_at, j.timeout_seconds, j.start_by, j.finish_by,
    j.total_timeout_seconds, j.cancel_requested_at, j.worker_id, j.dead_reason, j.error_type,
    j.args, null::json as result, j.progress, j.checkpoint, j.log_lines, j.enqueued_by, j.xmin as version
  from clarion.jobs as j
  where j.id = $1::uuid
  union all
  select
    h.id, h.queue, h.task, h.state, h.priority, h.attempt, h.max_attempts, h.errors, h.crashes, h.snoozes, h.generation,
    h.created_at, h.run_at, h.started_at, h.finished_at, h.timeout_seconds, h.start_by, h.finish_by,
    h.total_timeout_seconds, null, h.worker_id, null, h.error_type,
    h.args, h.result, h.progress, h.checkpoint, h.log_lines, h.enqueued_by, h.xmin
  from clarion.job_history as h
  where h.id = $1::uuid
)
select
  f.id, f.queue, f.task, f.state::text as state, f.priority, f.attempt, f.max_attempts, f.errors, f.crashes, f.snoozes,
  f.generation, f.created_at, f.run_at, f.started_at, f.finished_at, f.timeout_seconds, f.start_by, f.finish_by,
  f.total_timeout_seconds, f.cancel_requested_at, f.worker_id, f.dead_reason::text as dead_reason, f.error_type,
  f.args, f.result, f.progress, f.checkpoint, f.log_lines, f.enqueued_by, f.version::text as version, a.error_message
from found as f
left join lateral (
  select l.error_message
  from clarion.attempts as l
  where l.job_id = f.id and l.error_type is not null
  order by l.ended_at desc
  limit 1
) as a on true
limit 1
