-- Which attempts have completed their jobs: for those that do it in transactions of their own, once these are over.
--
-- $1 job ids, $2 lease tokens.
-- Plan: one primary key probe a job in each history partition.
select i.token, c.found is not null as completed
from unnest($1::uuid[], $2::uuid[]) as i (id, token)
left join lateral clarion.completion_of(i.id, i.token) as c on true
