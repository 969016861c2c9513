-- Takes ready jobs under leases, for any number of claimants at once: from each queue up to a limit, earliest sort_key
-- first, and deals them out in that order.
--
-- Takes: ready → running.
-- $1 queues, each once, $2 the most to take from each, $3 sort_key and $4 id of the place in line to look from in each (null:
-- from the start). Who gets what: $5 queue, $6 first and $7 last place in what is taken from it, $8 worker, $9 lease in seconds.
-- $10 tasks that can be run, and the policy of each, for jobs that bring none: $11 max_attempts, $12 timeout in seconds (null:
-- none), $13 backoff in seconds, $14 its cap in seconds. $15 any task will do: then $10 to $14 hold one policy for all.
-- Answers `share`, which of $5 to $9 a job belongs to, counted from 1, and its `place`. `timeout_seconds` is what this
-- attempt has: that of the job, or the rest of its total timeout if that is less. A job that is too late to start is left
-- for expire_jobs.
--
-- Why this shape: rows are locked in a CTE, which runs once (a join could run a bare LIMIT again and take more), and
-- updated by ctid, some 15 % cheaper than by id. Every row that is locked is also taken: a lock on a row left behind would
-- hide it from the next claimer, who would go to sleep over it. But for one that is changed and committed between this
-- statement's snapshot and its lock: what is locked then is the new version, which the TID probe, with the old snapshot,
-- does not see. So the claim takes one less; the job is started by the ring of that change, or at last by a sweep.
-- Why the lower bound: while any session holds a snapshot, the entries of jobs long claimed stay at the head of the index,
-- and a claim from the start walks them all (a claim of one: 0.3 ms, and 4.8 ms after 24,000 jobs). With the id, since all
-- jobs of one transaction may have one sort_key.
-- Plan: per queue, an index scan of jobs_ready from its bound that stops at the limit; then a TID probe a job. Never a sort of
-- a backlog.
with line as materialized (
  select q.queue, f.ctid, f.place
  from unnest($1::text[], $2::integer[], $3::timestamptz[], $4::uuid[]) as q (queue, claim_max, from_key, from_id)
  cross join lateral (
    select t.ctid, row_number() over () as place
    from (
      select r.ctid
      from clarion.jobs as r
      where
        r.queue = q.queue
        and r.state = 'ready'
        and (r.sort_key, r.id)
          >= (coalesce(q.from_key, '-infinity'), coalesce(q.from_id, '00000000-0000-0000-0000-000000000000'))
        and ($15::boolean or r.task = any($10::text[]))
        and (r.start_by is null or r.started_at is not null or r.start_by > now())
        and (r.finish_by is null or r.finish_by > now())
      order by r.sort_key, r.id
      limit q.claim_max
      for update skip locked
    ) as t
  ) as f
)
update clarion.jobs as j
set
  state = 'running',
  lease_token = gen_random_uuid(),
  worker_id = s.worker_id,
  started_at = statement_timestamp(),
  lease_seconds = s.lease_seconds,
  lease_expires_at = clarion.lease_end(
    s.lease_seconds, statement_timestamp(), coalesce(j.timeout_seconds, p.timeout_seconds), j.finish_by
  ),
  attempt = least(j.attempt + 1, 32767),
  progress = null,
  max_attempts = coalesce(j.max_attempts, p.max_attempts),
  timeout_seconds = coalesce(j.timeout_seconds, p.timeout_seconds),
  backoff_seconds = coalesce(j.backoff_seconds, p.backoff_seconds),
  backoff_cap_seconds = coalesce(j.backoff_cap_seconds, p.backoff_cap_seconds)
from
  line as l,
  unnest($5::text[], $6::integer[], $7::integer[], $8::uuid[], $9::float8[]) with ordinality
    as s (queue, first_place, last_place, worker_id, lease_seconds, share),
  unnest($10::text[], $11::smallint[], $12::real[], $13::real[], $14::real[])
    as p (task, max_attempts, timeout_seconds, backoff_seconds, backoff_cap_seconds)
where
  j.ctid = l.ctid
  and s.queue = l.queue and l.place between s.first_place and s.last_place
  and (p.task = j.task or $15::boolean)
returning
  j.id, j.lease_token as token, j.queue, j.task, j.args, j.priority, j.attempt, j.max_attempts, j.generation,
  j.errors, j.crashes,
  least(j.timeout_seconds, extract(epoch from j.finish_by - statement_timestamp())::real) as timeout_seconds,
  j.checkpoint, j.created_at, j.run_at, j.started_at, j.sort_key,
  s.share::integer, l.place::integer
