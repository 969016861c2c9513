-- Takes ready jobs under a lease, up to a limit per queue, earliest sort_key first.
--
-- Takes: ready → running.
-- $1 worker, $2 lease in seconds, $3 queues, $4 the most to take from each queue,
-- $5 tasks the worker can run, and the policy of each, for jobs that bring none: $6 max_attempts,
-- $7 timeout in seconds (null: none), $8 backoff in seconds, $9 its cap in seconds. $10 any task will do: then $5 to $9
-- hold one policy for all.
-- `timeout_seconds` is what this attempt has: that of the job, or the rest of its total timeout if that is less. A job
-- that is too late to start is left for expire_jobs.
--
-- Why this shape: rows are locked in a subselect that runs once (an array, so the planner cannot run its LIMIT
-- again and take more), and updated by ctid, some 15 % cheaper than by id. Every row that is locked is also
-- taken: a lock on a row left behind would hide it from the next claimer, who would go to sleep over it.
-- Plan: per queue, an index scan of jobs_ready that stops at the limit; then a TID scan. Never a sort of a backlog.
update clarion.jobs as j
set
  state = 'running',
  lease_token = gen_random_uuid(),
  worker_id = $1::uuid,
  started_at = statement_timestamp(),
  lease_seconds = $2::float8,
  lease_expires_at = clarion.lease_end(
    $2::float8, statement_timestamp(), coalesce(j.timeout_seconds, p.timeout_seconds), j.finish_by
  ),
  attempt = least(j.attempt + 1, 32767),
  progress = null,
  max_attempts = coalesce(j.max_attempts, p.max_attempts),
  timeout_seconds = coalesce(j.timeout_seconds, p.timeout_seconds),
  backoff_seconds = coalesce(j.backoff_seconds, p.backoff_seconds),
  backoff_cap_seconds = coalesce(j.backoff_cap_seconds, p.backoff_cap_seconds)
from unnest($5::text[], $6::smallint[], $7::real[], $8::real[], $9::real[])
  as p (task, max_attempts, timeout_seconds, backoff_seconds, backoff_cap_seconds)
where
  (p.task = j.task or $10::boolean)
  and j.ctid = any(array(
    select c.ctid
    from unnest($3::text[], $4::integer[]) as q (name, claim_max)
    cross join lateral (
      select r.ctid
      from clarion.jobs as r
      where
        r.queue = q.name
        and r.state = 'ready'
        and ($10::boolean or r.task = any($5::text[]))
        and (r.start_by is null or r.started_at is not null or r.start_by > now())
        and (r.finish_by is null or r.finish_by > now())
      order by r.sort_key, r.id
      limit q.claim_max
      for update skip locked
    ) as c
  ))
returning
  j.id, j.lease_token as token, j.queue, j.task, j.args, j.priority, j.attempt, j.max_attempts, j.generation,
  j.errors, j.crashes,
  least(j.timeout_seconds, extract(epoch from j.finish_by - statement_timestamp())::real) as timeout_seconds,
  j.checkpoint, j.created_at, j.run_at, j.started_at, j.sort_key
