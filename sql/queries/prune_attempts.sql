-- Deletes old attempts of jobs that are no longer live; those of dead jobs stay until somebody decides.
--
-- $1 days to keep, $2 the most rows.
-- Plan: the old end of attempts_ended, one primary key probe of jobs a row.
delete from clarion.attempts
where ctid = any(array(
  select a.ctid
  from clarion.attempts as a
  where
    a.ended_at < now() - make_interval(days => $1::integer)
    and not exists (select from clarion.jobs as j where j.id = a.job_id)
  order by a.ended_at
  limit $2::integer
  for update skip locked
))
returning job_id
