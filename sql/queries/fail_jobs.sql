-- Ends attempts that went wrong: a later run after the backoff, or dead. One row per input, in input order.
--
-- Takes: running → scheduled, running → dead.
-- $1 job ids, $2 lease tokens, $3 outcomes (failed, timeout), $4 error types, $5 messages, $6 traces,
-- $7 seconds until the next run (null: the job's backoff), $8 reason to be dead at once (null: tries decide),
-- $9 max_attempts, $10 backoff in seconds, $11 its cap in seconds, for jobs that were given none.
-- `state` is what this token's failure made of the job, now or in an earlier call; null means the lease is lost. Of a
-- call that stands in the input twice, the first counts.
--
-- Backoff counts errors, not attempts, so that snoozes and releases do not bend its curve. It is computed once,
-- here, and stored. The place in line keeps the head start of the job's priority.
-- Plan: one primary key probe a job to lock it, and one to write it. `any(array[…])` admits nothing else, whatever the
-- statistics: see complete_jobs. (500 of 41,600 jobs, planned while the table was empty: 12.9 s with `=`, now 7 ms.)
with input as materialized (
  select i.*
  from unnest(
    $1::uuid[], $2::uuid[], $3::text[], $4::text[], $5::text[], $6::text[], $7::float8[], $8::text[]
  ) with ordinality as i (id, token, outcome, error_type, error_message, error_trace, retry_in_seconds, dead_reason, n)
),
calls as materialized (
  select distinct on (i.id, i.token) i.* from input as i order by i.id, i.token, i.n
),
held as materialized (
  select
    c.*, j.worker_id, j.attempt, j.started_at, j.run_at, j.sort_key,
    case
      when c.dead_reason is not null then c.dead_reason::clarion.dead_reason
      when j.attempt >= coalesce(j.max_attempts, $9::smallint) then 'attempts_exhausted'
    end as reason,
    clock_timestamp() + coalesce(
      make_interval(secs => c.retry_in_seconds),
      clarion.backoff(j.errors + 1, coalesce(j.backoff_seconds, $10::float8), coalesce(j.backoff_cap_seconds, $11::float8))
    ) as next_run_at
  from calls as c
  join clarion.jobs as j on j.id = any(array[c.id]) and j.lease_token = c.token
  for update of j
),
ended as (
  update clarion.jobs as j
  set
    state = case when h.reason is null then 'scheduled' else 'dead' end::clarion.job_state,
    dead_reason = h.reason,
    died_at = case when h.reason is not null then clock_timestamp() end,
    run_at = case when h.reason is null then h.next_run_at else h.run_at end,
    sort_key = case when h.reason is null then h.next_run_at - (h.run_at - h.sort_key) else h.sort_key end,
    errors = least(j.errors + 1, 32767),
    lease_token = null, lease_expires_at = null, worker_id = null
  from held as h
  where j.id = any(array[h.id])
  returning h.id, h.token, j.state
),
recorded as (
  insert into clarion.attempts (
    job_id, lease_token, worker_id, attempt, outcome, state, started_at, next_run_at,
    error_type, error_message, error_trace
  )
  select
    h.id, h.token, h.worker_id, h.attempt, h.outcome::clarion.attempt_outcome,
    case when h.reason is null then 'scheduled' else 'dead' end::clarion.job_state, h.started_at,
    case when h.reason is null then h.next_run_at end, h.error_type, h.error_message, h.error_trace
  from held as h
)
select
  case
    when e.id is not null then e.state else clarion.ended_as(i.id, i.token, '{failed,timeout}')
  end::text as state
from input as i
left join ended as e on e.id = i.id and e.token = i.token
order by i.n
