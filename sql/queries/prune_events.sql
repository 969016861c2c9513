-- Deletes old events of jobs that are no longer live; those of dead jobs stay until somebody decides.
--
-- $1 days to keep, $2 the most rows.
-- Plan: the old end of job_events_at, one primary key probe of jobs a row.
delete from clarion.job_events
where ctid = any(array(
  select o.ctid
  from clarion.job_events as o
  where
    o.at < now() - make_interval(days => $1::integer)
    and not exists (select from clarion.jobs as j where j.id = o.job_id)
  order by o.at
  limit $2::integer
  for update skip locked
))
returning job_id
