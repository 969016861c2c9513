-- Postpones running jobs at their handlers' wish: no attempt and no error is charged. One row per input, in order.
--
-- Takes: running → scheduled, running → dead, running → cancelled.
-- $1 job ids, $2 lease tokens, $3 seconds until the next run, $4 whether it counts, $5 the most snoozes of a job: one more
-- that counts and it is dead.
-- `state` is what this token's snooze made of the job, now or in an earlier call, and `next_run_at` its next run; a null
-- state means the lease is lost. Of a call that stands in the input twice, the first delay counts. A job whose
-- cancellation was requested is cancelled.
-- Plan: one primary key probe a job to lock it, and one to write it; for `any(array[…])` see complete_jobs.
with input as materialized (
  select i.*
  from unnest($1::uuid[], $2::uuid[], $3::float8[], $4::boolean[])
    with ordinality as i (id, token, delay_seconds, counted, n)
),
calls as materialized (
  select distinct on (i.id, i.token) i.* from input as i order by i.id, i.token, i.n
),
held as materialized (
  select
    c.*, j.worker_id, j.attempt, j.generation, j.started_at, j.run_at, j.sort_key, c.counted and j.snoozes >= $5::integer as worn_out,
    j.cancel_requested_at is not null as cancelled,
    clock_timestamp() + make_interval(secs => c.delay_seconds) as next_run_at
  from calls as c
  join clarion.jobs as j on j.id = any(array[c.id]) and j.lease_token = c.token
  for update of j
),
ended as (
  update clarion.jobs as j
  set
    state = case when h.worn_out then 'dead' else 'scheduled' end::clarion.job_state,
    dead_reason = case when h.worn_out then 'snoozes_exhausted' end::clarion.dead_reason,
    died_at = case when h.worn_out then clock_timestamp() end,
    run_at = case when h.worn_out then h.run_at else h.next_run_at end,
    sort_key = case when h.worn_out then h.sort_key else h.next_run_at - (h.run_at - h.sort_key) end,
    attempt = j.attempt - 1,
    snoozes = least(j.snoozes, 32766) + h.counted::integer,
    lease_token = null, lease_expires_at = null, worker_id = null
  from held as h
  where j.id = any(array[h.id]) and not h.cancelled
  returning h.id, h.token, j.state, case when not h.worn_out then h.next_run_at end as next_run_at
),
cancelled as materialized (
  select h.id, h.token, clarion.finish_cancelled(h.id, 'worker:' || h.worker_id, null) as state
  from held as h
  where h.cancelled
),
recorded as (
  insert into clarion.attempts (
    job_id, lease_token, worker_id, attempt, generation, outcome, state, run_at, started_at, next_run_at
  )
  select
    h.id, h.token, h.worker_id, h.attempt, h.generation, 'snoozed',
    case when h.cancelled then 'cancelled' when h.worn_out then 'dead' else 'scheduled' end::clarion.job_state,
    h.run_at, h.started_at, case when not h.cancelled and not h.worn_out then h.next_run_at end
  from held as h
)
select coalesce(e.state, c.state, w.state)::text as state, coalesce(e.next_run_at, w.next_run_at) as next_run_at
from input as i
left join ended as e on e.id = i.id and e.token = i.token
left join cancelled as c on c.id = i.id and c.token = i.token
left join lateral clarion.ending_of(case when e.id is null and c.id is null then i.id end, i.token, '{snoozed}') as w on true
order by i.n
