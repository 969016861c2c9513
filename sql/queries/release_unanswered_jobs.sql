-- Hands back jobs that were claimed for a worker which never got the answer: the connection was cut, or Postgres stood
-- still and ran the claim long after the worker had given up on it. Answers the queue of each, and its sort_key.
--
-- Takes: running → ready.
-- One whose cancellation was requested is left to the reaper.
-- $1 worker, $2 the lease tokens that it knows. Not to be called while a claim of this worker is under way.
-- Plan: a scan of jobs_running, then one primary key probe a job.
with unanswered as materialized (
  select j.id, j.lease_token, j.worker_id, j.attempt, j.generation, j.run_at, j.started_at
  from clarion.jobs as j
  where
    j.state = 'running'
    and j.worker_id = $1::uuid
    and not j.lease_token = any($2::uuid[])
    and j.cancel_requested_at is null
  for update skip locked
),
ended as (
  update clarion.jobs as j
  set
    state = 'ready',
    attempt = greatest(j.attempt - 1, 0),
    lease_token = null, lease_expires_at = null, worker_id = null
  from unanswered as u
  where j.id = any(array[u.id])
  returning j.queue, j.sort_key
),
recorded as (
  insert into clarion.attempts (job_id, lease_token, worker_id, attempt, generation, outcome, state, run_at, started_at)
  select u.id, u.lease_token, u.worker_id, u.attempt, u.generation, 'released', 'ready', u.run_at, u.started_at
  from unanswered as u
)
select e.queue, e.sort_key from ended as e
