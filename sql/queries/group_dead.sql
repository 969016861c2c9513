-- The dead jobs by task, error and reason: how many of each, since when, and the latest of them; the largest groups first.
--
-- $1 queue (null: any), $2 the most groups.
-- Plan: a scan of jobs_dead_since, as long as there are dead jobs, then a hash or sort of the groups.
select
  j.task, j.error_type, j.dead_reason::text as dead_reason, count(*)::integer as jobs,
  min(j.died_at) as first_died_at, max(j.died_at) as last_died_at,
  (array_agg(j.id order by j.died_at desc, j.id desc))[1] as latest_id
from clarion.jobs as j
where j.state = 'dead' and ($1::text is null or j.queue = $1::text)
group by j.task, j.error_type, j.dead_reason
order by jobs desc, last_died_at desc
limit $2::integer
