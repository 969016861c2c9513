-- Hands running jobs back unfinished (shutdown, drain): ready now, in their old place in line, the attempt given
-- back. One row per input, in input order.
--
-- Takes: running → ready, running → cancelled.
-- $1 job ids, $2 lease tokens.
-- `state` is what this token's release made of the job, now or in an earlier call; null means the lease is lost. A job
-- whose cancellation was requested is cancelled: so a worker says that its handler has stopped.
-- `queue` and `sort_key` say where it waits, for the ring; null unless this call released it, and said once for a call
-- that stands in the input twice.
-- Plan: one primary key probe a job to lock it, and one to write it; for `any(array[…])` see complete_jobs.
with input as materialized (
  select i.* from unnest($1::uuid[], $2::uuid[]) with ordinality as i (id, token, n)
),
calls as materialized (
  select distinct on (i.id, i.token) i.* from input as i order by i.id, i.token, i.n
),
held as materialized (
  select
    c.*, j.worker_id, j.attempt, j.generation, j.run_at, j.started_at, j.cancel_requested_at is not null as cancelled
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
  where j.id = any(array[h.id]) and not h.cancelled
  returning h.id, h.token, h.n, j.state, j.queue, j.sort_key
),
cancelled as materialized (
  select h.id, h.token, clarion.finish_cancelled(h.id, 'worker:' || h.worker_id, null) as state
  from held as h
  where h.cancelled
),
recorded as (
  insert into clarion.attempts (job_id, lease_token, worker_id, attempt, generation, outcome, state, run_at, started_at)
  select
    h.id, h.token, h.worker_id, h.attempt, h.generation, 'released',
    case when h.cancelled then 'cancelled' else 'ready' end::clarion.job_state, h.run_at, h.started_at
  from held as h
)
select
  coalesce(e.state, c.state, w.state)::text as state,
  case when e.n = i.n then e.queue end as queue,
  case when e.n = i.n then e.sort_key end as sort_key
from input as i
left join ended as e on e.id = i.id and e.token = i.token
left join cancelled as c on c.id = i.id and c.token = i.token
left join lateral clarion.ending_of(
  case when e.id is null and c.id is null then i.id end, i.token, '{released}'
) as w on true
order by i.n
