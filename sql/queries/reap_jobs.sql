-- Takes jobs back from workers whose leases ran out. Answers one row per job taken back.
--
-- Takes: running → ready, running → scheduled, running → dead, running → cancelled.
-- $1 the most rows to take, $2 crashes that make a job dead, $3 max_attempts, $4 backoff in seconds and $5 its cap
-- for jobs that were given none, $6 grace in seconds after a start of Postgres, in which leases from before it stay:
-- their workers could not heartbeat while it was down, and may renew them first. $7 only these jobs (null: any).
--
-- The first lost lease is nearly always the machine's fault, not the job's: the job is ready again at once, in its
-- old place. From the second on it backs off from 1 s, and at the crash budget it is dead as `crash_loop`. An
-- attempt whose lease reached its deadline outlived its timeout: an error, not a crash. That the clock is past the
-- deadline would prove nothing: the reaper may be late. A job whose cancellation was requested is cancelled, at no cost.
-- Plan: a scan of jobs_running, as many entries as jobs run at this moment; no index holds the expiry, so that a
-- heartbeat is a HOT update. Then one primary key probe a job taken; for `any(array[…])` see complete_jobs (500 of
-- 41,600 jobs, planned while the table was empty: 9.3 s with `=`, now 7 ms).
with expired as materialized (
  select
    j.*, j.cancel_requested_at is not null as cancelled,
    coalesce(j.lease_expires_at >= clarion.attempt_deadline(j.started_at, j.timeout_seconds, j.finish_by), false)
      as timed_out
  from clarion.jobs as j
  where
    j.state = 'running'
    and j.lease_expires_at < clock_timestamp()
    and ($7::uuid[] is null or j.id = any($7::uuid[]))
    and (
      j.started_at > pg_postmaster_start_time()
      or pg_postmaster_start_time() + make_interval(secs => $6::float8) < clock_timestamp()
    )
  order by j.id
  limit $1::integer
  for update skip locked
),
decided as materialized (
  select
    x.*,
    case
      when not x.timed_out and x.crashes + 1 >= $2::integer then 'crash_loop'::clarion.dead_reason
      when x.attempt >= coalesce(x.max_attempts, $3::smallint) then 'attempts_exhausted'
      when x.timed_out and x.finish_by < clock_timestamp() then 'total_timeout'
    end as reason,
    case
      when x.timed_out then clarion.backoff(
        x.errors + 1, coalesce(x.backoff_seconds, $4::float8), coalesce(x.backoff_cap_seconds, $5::float8)
      )
      when x.crashes > 0 then clarion.backoff(x.crashes::integer, 1, coalesce(x.backoff_cap_seconds, $5::float8))
    end as wait
  from expired as x
),
ended as (
  update clarion.jobs as j
  set
    state = case
      when d.reason is not null then 'dead' when d.wait is null then 'ready' else 'scheduled'
    end::clarion.job_state,
    dead_reason = d.reason,
    died_at = case when d.reason is not null then clock_timestamp() end,
    run_at = case when d.reason is null and d.wait is not null then clock_timestamp() + d.wait else d.run_at end,
    sort_key = case
      when d.reason is null and d.wait is not null then clock_timestamp() + d.wait - (d.run_at - d.sort_key)
      else d.sort_key
    end,
    errors = least(j.errors + d.timed_out::integer, 32767),
    crashes = least(j.crashes + (not d.timed_out)::integer, 32767),
    error_type = case when d.timed_out then 'AttemptTimeout' else 'LeaseLost' end,
    lease_token = null, lease_expires_at = null, worker_id = null
  from decided as d
  where j.id = any(array[d.id]) and not d.cancelled
  returning
    j.id, d.lease_token, d.worker_id, j.queue, j.task, j.attempt, j.generation, j.started_at, d.run_at, d.timed_out,
    j.sort_key, j.state as became, case when d.reason is null then j.run_at end as next_run_at
),
answered as materialized (
  select e.* from ended as e
  union all
  select
    d.id, d.lease_token, d.worker_id, d.queue, d.task, d.attempt, d.generation, d.started_at, d.run_at, d.timed_out,
    d.sort_key, clarion.finish_cancelled(d.id, 'reaper', 'its worker never said that the handler had stopped'), null
  from decided as d
  where d.cancelled
),
recorded as (
  insert into clarion.attempts (
    job_id, lease_token, worker_id, attempt, generation, outcome, state, run_at, started_at, next_run_at,
    error_type, error_message, reaped
  )
  select
    a.id, a.lease_token, a.worker_id, a.attempt, a.generation,
    case when a.timed_out then 'timeout' else 'lease_lost' end::clarion.attempt_outcome, a.became, a.run_at, a.started_at,
    a.next_run_at,
    case when a.timed_out then 'AttemptTimeout' else 'LeaseLost' end,
    case
      when a.timed_out then 'the attempt outlived its timeout and its worker did not end it'
      else 'the worker stopped extending its lease: killed, hung or cut off'
    end,
    true
  from answered as a
)
select a.id, a.queue, a.task, a.became::text as state, a.attempt, a.worker_id, a.timed_out, a.sort_key
from answered as a
