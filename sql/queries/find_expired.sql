-- The running jobs whose leases ran out, as reap_jobs would take them, with their tokens.
--
-- $1 the most rows, $2 grace in seconds after a start of Postgres, as in reap_jobs.
-- Plan: a scan of jobs_running.
select j.id, j.lease_token as token
from clarion.jobs as j
where
  j.state = 'running'
  and j.lease_expires_at < clock_timestamp()
  and (
    j.started_at > pg_postmaster_start_time()
    or pg_postmaster_start_time() + make_interval(secs => $2::float8) < clock_timestamp()
  )
order by j.id
limit $1::integer
