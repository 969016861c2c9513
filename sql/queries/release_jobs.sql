-- Hands running jobs back unfinished (shutdown, drain): ready now, in their old place in line, the attempt given
-- back. One row per input, in input order.
--
-- Takes: running → ready.
-- $1 job ids, $2 lease tokens.
-- `released` is true when this token handed the job back, now or in an earlier call; false means the lease is lost.
-- `queue` names where it waits, for the ring; null unless this call released it, and named once for a call that stands
-- in the input twice.
-- Plan: one primary key probe a job to lock it, and one to write it; for `any(array[…])` see complete_jobs.
with input as materialized (
  select i.* from unnest($1::uuid[], $2::uuid[]) with ordinality as i (id, token, n)
),
calls as materialized (
  select distinct on (i.id, i.token) i.* from input as i order by i.id, i.token, i.n
),
held as materialized (
  select c.*, j.worker_id, j.attempt, j.started_at
  from calls as c
  join clarion.jobs as j on j.id = any(array[c.id]) and j.lease_token = c.token
  for update of j
),
ended as (
  update clarion.jobs as j
  set
    state = 'ready',
    attempt = j.attempt - 1,
    lease_token = null, lease_expires_at = null, worker_id = null
  from held as h
  where j.id = any(array[h.id])
  returning h.id, h.token, h.n, j.queue
),
recorded as (
  insert into clarion.attempts (job_id, lease_token, worker_id, attempt, outcome, state, started_at)
  select h.id, h.token, h.worker_id, h.attempt, 'released', 'ready', h.started_at
  from held as h
)
select
  case when e.id is not null then true else clarion.ended_as(i.id, i.token, '{released}') is not null end as released,
  case when e.n = i.n then e.queue end as queue
from input as i
left join ended as e on e.id = i.id and e.token = i.token
order by i.n
