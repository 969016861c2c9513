-- Finishes jobs with their results: moves each row to the history. Answers one row per input, in input order.
--
-- Takes: running → succeeded.
-- $1 job ids, $2 lease tokens, $3 results as JSON text (null: none), $4 keys of the calls (null: none).
-- `state` is set for a job that this token finished, now or in an earlier call whose answer was lost (`replayed`); null
-- means the lease is lost. A replay carries what was stored first: `completion_key` and `result`. Of a call that stands in
-- the input twice, the first counts. Jobs are taken in the order of their ids, so that two batches that share some wait
-- for each other and never deadlock. That its cancellation was requested does not matter: success came first.
--
-- Why there is no `state = 'running'`: the token implies it, and with it the planner may pick the partial index on
-- running rows, after which a batch of 500 took 253 ms instead of 10.
-- Why `any(array[c.id])` and not `c.id`: an equality may also be hashed or merged, and a plan made while the table was
-- empty then reads all of it (500 of 41,600 jobs: up to 6.1 s, now 3 ms). This can only be probed.
-- Plan: one primary key probe a job. The history is read by `completion_of` only, for tokens that hold nothing: with 34
-- partitions a single completion took 0.40 ms when the statement itself probed them, and takes 0.22 ms now.
with input as materialized (
  select i.*
  from unnest($1::uuid[], $2::uuid[], $3::text[], $4::text[]) with ordinality as i (id, token, result, key, n)
),
calls as materialized (
  select distinct on (i.id, i.token) i.* from input as i order by i.id, i.token, i.n
),
done as (
  delete from clarion.jobs as j
  using calls as c
  where j.id = any(array[c.id]) and j.lease_token = c.token
  returning j.*, c.result, c.key, c.n
),
moved as (
  insert into clarion.job_history (
    id, lease_token, worker_id, created_at, run_at, started_at, finished_at, state, priority,
    attempt, errors, crashes, snoozes, max_attempts, timeout_seconds, queue, task, args, result,
    start_by, finish_by, total_timeout_seconds, backoff_seconds, backoff_cap_seconds, generation, log_lines,
    enqueued_by, error_type, progress, completion_key
  )
  select
    id, lease_token, worker_id, created_at, run_at, started_at, clock_timestamp(), 'succeeded', priority,
    attempt, errors, crashes, snoozes, max_attempts, timeout_seconds, queue, task, args, result::json,
    start_by, finish_by, total_timeout_seconds, backoff_seconds, backoff_cap_seconds, generation, log_lines,
    enqueued_by, error_type, progress, key
  from done
)
select
  case when d.id is not null or w.found then 'succeeded' end as state,
  coalesce(d.n <> i.n, w.found, false) as replayed,
  case when d.n is distinct from i.n then coalesce(d.key, w.completion_key) end as completion_key,
  case when d.n is distinct from i.n then coalesce(d.result, w.result::text) end as result
from input as i
left join done as d on d.id = i.id and d.lease_token = i.token
left join lateral clarion.completion_of(case when d.id is null then i.id end, i.token) as w on true
order by i.n
