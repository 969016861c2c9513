-- Cancels jobs: those that wait or are dead at once, those that run by asking their workers. One row per input, in order.
--
-- Takes: scheduled → cancelled, ready → cancelled, dead → cancelled.
-- $1 job ids, $2 who asks, $3 why (null: no reason given).
-- `state` is what the job is now: cancelled, or running with its cancellation requested; null for a job that is finished
-- or unknown. `requested` is true where this call was the first to ask a worker, for the ring. Asking again changes
-- nothing. A finish that is being committed at this moment is waited for, and wins.
-- Plan: one primary key probe a job to lock it, and one to write it.
with input as materialized (
  select i.* from unnest($1::uuid[]) with ordinality as i (id, n)
),
locked as materialized (
  select j.id, j.state, j.generation, j.cancel_requested_at
  from (select distinct d.id from input as d order by d.id) as i
  join clarion.jobs as j on j.id = any(array[i.id])
  for update of j
),
requested as (
  update clarion.jobs as j
  -- Of a job that was claimed while this waited for it, Postgres first checks the constraints with the row as it was.
  set cancel_requested_at = case when j.state = 'running' then clock_timestamp() end
  from locked as l
  where j.id = any(array[l.id]) and l.state = 'running' and l.cancel_requested_at is null
  returning j.id, l.generation
),
noted as (
  insert into clarion.job_events (job_id, event, actor, state, generation, detail)
  select r.id, 'cancel_requested', $2::text, 'running', r.generation, $3::text
  from requested as r
),
cancelled as materialized (
  select l.id, clarion.finish_cancelled(l.id, $2::text, $3::text) as state
  from locked as l
  where l.state <> 'running'
)
select coalesce(c.state, l.state)::text as state, r.id is not null as requested
from input as i
left join locked as l on l.id = i.id
left join requested as r on r.id = i.id
left join cancelled as c on c.id = i.id
order by i.n
