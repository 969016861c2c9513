-- Postpones running jobs at their handlers' wish: no attempt and no error is charged. One row per input, in order.
--
-- Takes: running → scheduled.
-- $1 job ids, $2 lease tokens, $3 seconds until the next run.
-- `snoozed` is true when this token postponed the job, now or in an earlier call; false means the lease is lost. Of a
-- call that stands in the input twice, the first delay counts.
-- Plan: one primary key probe a job to lock it, and one to write it; for `any(array[…])` see complete_jobs.
with input as materialized (
  select i.*
  from unnest($1::uuid[], $2::uuid[], $3::float8[]) with ordinality as i (id, token, delay_seconds, n)
),
calls as materialized (
  select distinct on (i.id, i.token) i.* from input as i order by i.id, i.token, i.n
),
held as materialized (
  select
    c.*, j.worker_id, j.attempt, j.started_at, j.run_at - j.sort_key as head_start,
    clock_timestamp() + make_interval(secs => c.delay_seconds) as next_run_at
  from calls as c
  join clarion.jobs as j on j.id = any(array[c.id]) and j.lease_token = c.token
  for update of j
),
ended as (
  update clarion.jobs as j
  set
    state = 'scheduled',
    run_at = h.next_run_at,
    sort_key = h.next_run_at - h.head_start,
    attempt = j.attempt - 1,
    snoozes = least(j.snoozes, 32766) + 1,
    lease_token = null, lease_expires_at = null, worker_id = null
  from held as h
  where j.id = any(array[h.id])
  returning h.id, h.token
),
recorded as (
  insert into clarion.attempts (job_id, lease_token, worker_id, attempt, outcome, state, started_at, next_run_at)
  select h.id, h.token, h.worker_id, h.attempt, 'snoozed', 'scheduled', h.started_at, h.next_run_at
  from held as h
)
select case when e.id is not null then true else clarion.ended_as(i.id, i.token, '{snoozed}') is not null end as snoozed
from input as i
left join ended as e on e.id = i.id and e.token = i.token
order by i.n
