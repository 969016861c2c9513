-- Hands running jobs back unfinished (shutdown, drain): ready now, in their old place in line, the attempt given
-- back. One row per input, in input order.
--
-- Takes: running → ready.
-- $1 job ids, $2 lease tokens.
-- `released` is true when this token handed the job back, now or in an earlier call; false means the lease is lost.
-- `queue` names where it waits, for the ring; null unless this call released it.
-- Plan: one primary key probe a job.
with input as materialized (
  select i.* from unnest($1::uuid[], $2::uuid[]) with ordinality as i (id, token, n)
),
held as materialized (
  select i.*, j.worker_id, j.attempt, j.started_at
  from input as i
  join clarion.jobs as j on j.id = i.id and j.lease_token = i.token
  for update of j
),
ended as (
  update clarion.jobs as j
  set
    state = 'ready',
    attempt = j.attempt - 1,
    lease_token = null, lease_expires_at = null, worker_id = null
  from held as h
  where j.id = h.id
  returning h.n, j.queue
),
recorded as (
  insert into clarion.attempts (job_id, lease_token, worker_id, attempt, outcome, state, started_at)
  select h.id, h.token, h.worker_id, h.attempt, 'released', 'ready', h.started_at
  from held as h
)
select e.n is not null or a.job_id is not null as released, e.queue
from input as i
left join ended as e on e.n = i.n
left join clarion.attempts as a on a.job_id = i.id and a.lease_token = i.token and a.outcome = 'released'
order by i.n
