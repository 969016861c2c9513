-- What attempts have made of their jobs by a call of their own workers: for calls that come late, and for those that
-- complete their jobs in transactions of their own, once these are over.
--
-- $1 job ids, $2 lease tokens.
-- `state` is the job's after that call; null: there was none, or the lease had been taken away before it.
-- Plan: one primary key probe a job in each history partition, and one in the attempts.
select i.token, coalesce(case when c.found then 'succeeded' end, e.state::text) as state
from unnest($1::uuid[], $2::uuid[]) as i (id, token)
left join lateral clarion.completion_of(i.id, i.token) as c on true
left join lateral clarion.ending_of(
  case when c.found is null then i.id end, i.token, '{failed,timeout,snoozed,released}'
) as e on true
