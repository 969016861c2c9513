-- What jobs are at this moment, for callers whose lease is lost; jobs that do not exist have no row.
--
-- $1 job ids.
-- Plan: one primary key probe a job in jobs, and one in each history partition.
select j.id, j.state::text as state
from clarion.jobs as j
where j.id = any($1::uuid[])
union all
select h.id, h.state::text
from clarion.job_history as h
where h.id = any($1::uuid[])
