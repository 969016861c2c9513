-- Postpones running jobs at their handlers' wish: no attempt and no error is charged. One row per input, in order.
--
-- Takes: running → scheduled.
-- $1 job ids, $2 lease tokens, $3 seconds until the next run.
-- `snoozed` is true when this token postponed the job, now or in an earlier call; false means the lease is lost.
-- Plan: one primary key probe a job.
with input as materialized (
  select i.*
  from unnest($1::uuid[], $2::uuid[], $3::float8[]) with ordinality as i (id, token, delay_seconds, n)
),
held as materialized (
  select
    i.*, j.worker_id, j.attempt, j.started_at, j.run_at - j.sort_key as head_start,
    clock_timestamp() + make_interval(secs => i.delay_seconds) as next_run_at
  from input as i
  join clarion.jobs as j on j.id = i.id and j.lease_token = i.token
  for update of j
),
ended as (
  update clarion.jobs as j
  set
    state = 'scheduled',
    run_at = h.next_run_at,
    sort_key = h.next_run_at - h.head_start,
    attempt = j.attempt - 1,
    snoozes = j.snoozes + 1,
    lease_token = null, lease_expires_at = null, worker_id = null
  from held as h
  where j.id = h.id
  returning h.n
),
recorded as (
  insert into clarion.attempts (job_id, lease_token, worker_id, attempt, outcome, state, started_at, next_run_at)
  select h.id, h.token, h.worker_id, h.attempt, 'snoozed', 'scheduled', h.started_at, h.next_run_at
  from held as h
)
select e.n is not null or a.job_id is not null as snoozed
from input as i
left join ended as e on e.n = i.n
left join clarion.attempts as a on a.job_id = i.id and a.lease_token = i.token and a.outcome = 'snoozed'
order by i.n
