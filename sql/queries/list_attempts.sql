-- Every attempt of a job, in order: those that ended badly, the one that runs, and the one that succeeded.
--
-- $1 job id.
-- `outcome` is null for the one that runs.
-- Plan: the job's range of attempts, and its primary key in jobs and in each history partition.
select u.*
from (
  select
    a.generation, a.attempt, a.outcome::text as outcome, a.state::text as state, a.worker_id, a.run_at, a.started_at,
    a.ended_at, a.next_run_at, a.error_type, a.error_message, a.error_trace, a.reaped
  from clarion.attempts as a
  where a.job_id = $1::uuid
  union all
  select
    j.generation, j.attempt, null, j.state::text, j.worker_id, j.run_at, j.started_at,
    null, null, null, null, null, false
  from clarion.jobs as j
  where j.id = $1::uuid and j.lease_token is not null
  union all
  select
    h.generation, h.attempt, 'succeeded', h.state::text, h.worker_id, h.run_at, h.started_at,
    h.finished_at, null, null, null, null, false
  from clarion.job_history as h
  where h.id = $1::uuid and h.state = 'succeeded'
) as u
order by u.started_at, u.ended_at nulls last
